"""lib/report.py: figures, page, samples and the table, all from results.json."""

import json
import shutil
import subprocess
import sys

import pytest

from beyond import page
from beyond.custom_data import wilson_interval
from tiny import ROOT

PRODUCTS = {"results.json", "figure.png", "curves.png", "samples.txt", "report.html"}


@pytest.mark.parametrize("kind", ["toy", "imdb", "own"])
def test_a_report_is_five_files(kind, request):
    run = request.getfixturevalue(kind)
    curves = {f"curves-{beta:g}.csv" for beta in run.cfg.beta}
    assert {path.name for path in run.folder.iterdir() if path.suffix != ".pt"} == PRODUCTS | curves
    for name in ("figure.png", "curves.png"):
        assert (run.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_report_is_drawn_again_from_results_json_alone(toy, tmp_path):
    shutil.copy(toy.folder / "results.json", tmp_path)
    command = [sys.executable, "-m", "lib.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == page.summary(toy.results)
    for name in PRODUCTS - {"figure.png", "curves.png"}:
        assert (tmp_path / name).read_bytes() == (toy.folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == PRODUCTS
    (tmp_path / "results.json").write_text("{")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "results.json" in done.stderr and done.stderr.count("\n") == 1


def test_samples_show_prompts_texts_and_rewards():
    samples = {
        "pi_ref": {"texts": ["the plot is odd."], "rewards": [-0.3]},
        "beta 1": {"texts": ["the plot is superb and moving."]},
        "beta 2": {"texts": ["the plot is superb and moving."], "rewards": [2.3]},
    }
    assert page.samples_text(["the plot"], samples, 16).splitlines() == [
        "pi_ref           | beta 1           | beta 2",
        "",
        "the plot ...",
        "-0.30 is odd.    | is superb and    | +2.30 is superb",
        "                 | moving.          | and moving.",
    ]


def test_the_table_has_a_row_for_each_beta_and_dashes_for_unknown_values(toy):
    results = json.loads(json.dumps(toy.results, default=str))
    results["points"][0] |= {"fraction_of_optimal": None, "kl": 1.25}
    results["points"][1] |= {"fraction_of_optimal": 0.5, "fraction_of_optimal_se": 0.1, "kl": 40}
    header, first, second, claim, unknown, large = page.summary(results).splitlines()
    assert "KL" in header.split() and header.split()[0] == "beta"
    assert first.split()[:2] == ["0.5", "1.25"] and first.split()[-1] == "-"
    assert second.split()[0] == "2" and "attains 50% of" in claim
    assert "At beta 0.5 " in unknown and "At beta 2 the KL is above 30 nats" in large


def test_figures_show_what_is_known(toy, own):
    labels = {}
    for name, run in (("toy", toy), ("own", own)):
        ax = page.draw_frontier(run.results).axes[0]
        labels[name] = [*ax.get_legend_handles_labels()[1], ax.get_ylabel()]
    assert any("optimum of all policies" in label for label in labels["toy"])
    assert not any("optimum" in label for label in labels["own"])
    assert "gain" in labels["toy"][-1] and "accuracy" in labels["own"][-1]
    panels = page.draw_curves(toy.results["curves"]).axes
    assert [ax.get_title() for ax in panels] == list(page.PANELS.values())
    assert all(len(ax.lines) >= 2 * len(toy.results["curves"]) for ax in panels)


def test_wilson_interval_has_known_values():
    """9 of 10: (0.596, 0.982). It is symmetric, and never leaves [0, 1]."""
    assert wilson_interval(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    low, high = wilson_interval(0.1, 10)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(0.9, 10))
    assert wilson_interval(1.0, 5)[1] == pytest.approx(1) and low > 0


def test_the_summary_of_own_preferences_has_an_interval(own):
    last = page.summary(own.results).splitlines()[-1]
    point = own.results["points"][-1]
    low, high = wilson_interval(point["pair_accuracy"], point["pairs"])
    assert f"{point['pairs']} pairs" in last and f"{low:.2f} to {high:.2f}" in last
