"""lib/report.py: figures, samples and the table, all from results.json."""

import json
import shutil
import subprocess
import sys

import pytest

from lib import report
from tiny import ROOT

PRODUCTS = {"results.json", "figure.png", "curves.png", "samples.txt"}


@pytest.mark.parametrize("kind", ["toy", "imdb", "own"])
def test_a_report_is_four_files(kind, request):
    run = request.getfixturevalue(kind)
    assert {p.name for p in run.folder.iterdir() if p.suffix in (".json", ".png", ".txt")} == {
        *PRODUCTS,
        "stages.json",
    }
    for name in ("figure.png", "curves.png"):
        assert (run.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_report_is_drawn_again_from_results_json_alone(toy, tmp_path):
    shutil.copy(toy.folder / "results.json", tmp_path)
    command = [sys.executable, "-m", "lib.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == report.summary(toy.results)
    for name in PRODUCTS - {"figure.png", "curves.png"}:
        assert (tmp_path / name).read_bytes() == (toy.folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == PRODUCTS
    (tmp_path / "results.json").write_text("{")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "results.json" in done.stderr and done.stderr.count("\n") == 1


def test_samples_show_prompts_texts_and_rewards(toy, own):
    text = (toy.folder / "samples.txt").read_text(encoding="utf-8")
    assert [cell.strip() for cell in text.splitlines()[0].split("|")] == [
        "pi_ref",
        "beta 0.5",
        "beta 2",
    ]
    for sample in toy.results["samples"]:
        assert f"\n{sample['prompt']} ...\n" in text
        for response, r in zip(sample["texts"], sample["rewards"], strict=True):
            words = response.removeprefix(sample["prompt"]).split()
            assert f"{r:+.2f}" in text and all(word in text for word in words)
    assert all(r is None for sample in own.results["samples"] for r in sample["rewards"])


def test_the_table_has_a_row_for_each_beta_and_dashes_for_unknown_values(toy):
    results = json.loads(json.dumps(toy.results, default=str))
    results["points"][0] |= {"fraction_of_optimal": None, "kl": 1.25}
    results["points"][1] |= {"fraction_of_optimal": 0.5}
    header, first, second, last = report.summary(results).splitlines()
    assert "KL" in header.split() and header.split()[0] == "beta"
    assert first.split()[:2] == ["0.5", "1.25"] and first.split()[-1] == "-"
    assert second.split()[0] == "2" and "attains 50% of" in last


def test_figures_show_what_is_known(toy, own):
    labels = {}
    for name, run in (("toy", toy), ("own", own)):
        ax = report.draw_frontier(run.results).axes[0]
        labels[name] = [*ax.get_legend_handles_labels()[1], ax.get_ylabel()]
    assert any("optimum of all policies" in label for label in labels["toy"])
    assert not any("optimum" in label for label in labels["own"])
    assert "gain" in labels["toy"][-1] and "accuracy" in labels["own"][-1]
    panels = report.draw_curves(toy.results["curves"]).axes
    assert [ax.get_title() for ax in panels] == list(report.PANELS)
    assert all(len(ax.lines) >= 2 * len(toy.results["curves"]) for ax in panels)
