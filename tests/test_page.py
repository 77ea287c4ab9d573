"""beyond/page.py: page, figures, samples and table, from results.json."""

import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from beyond import page
from beyond.custom_data import accuracy_line, wilson_interval
from lib import cli
from train import PI_REF, PRESETS, Config

PRODUCTS = {"results.json", "figure.png", "curves.png", "samples.txt", "report.html"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify([
  innerWidth, document.documentElement.scrollWidth,
  ...[...document.images].map((image) => image.naturalWidth)]), "*"))</script>"""
WINDOW = """<!doctype html>
<iframe src="page.html" width="{}" height="844" style="border: 0"></iframe>
<script>onmessage = (message) => document.body.textContent = message.data</script>"""


@pytest.fixture(scope="module", params=["toy", "imdb", "own"])
def recorded(request):
    """A run, at whose end the page was written."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def content(recorded) -> str:
    return (recorded.folder / "report.html").read_text("utf-8")


def test_a_report_is_five_files(recorded):
    made = {path.name for path in recorded.folder.iterdir() if path.suffix != ".pt"}
    assert made == PRODUCTS | {f"curves-dpo-{beta:g}.csv" for beta in recorded.cfg.beta}
    for name in ("figure.png", "curves.png"):
        assert (recorded.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_numbers_are_those_of_results_json(recorded, content):
    """Each cell of the table, each sample's r*, the title and the conclusions."""
    results = recorded.results
    cells = re.findall(r'<td title="(\w+) = ([^"]*)">([^<]*)</td>', content)
    assert len(cells) >= 4 * len(results["points"]) and cells == [
        (name, json.dumps(point[name]), "-" if point[name] is None else f"{point[name]:.3g}")
        for point in results["points"]
        for name in page.TABLE
        if name in point
    ]
    names = re.findall(r'<span class="name" title="([^"]*)">([^<]*)</span>', content)
    assert len(names) >= 2 and names == [
        (json.dumps(r), column if r is None else f"{column}: r* = {r:+.2f}")
        for i in range(len(results["prompts"]))
        for column, sample in results["samples"].items()
        for r in [sample["rewards"][i] if "rewards" in sample else None]
    ]
    assert content.count("data:image/png;base64,") == 2
    assert html.escape(page.title(results["config"])) in content
    for line in page.summary(results).splitlines()[1 + len(results["points"]) :]:
        assert f"<p>{html.escape(line)}</p>" in content


def test_the_page_loads_nothing(content):
    sources = re.findall(r'(?:src|href)="([^"]{0,30})|url\(([^)]*)', content)
    assert len(sources) == 3 and all(source.startswith("data:") for source, _ in sources)
    assert "<script" not in content and "@import" not in content


def test_words_have_the_colour_of_their_contribution(recorded, content):
    """Green above 0.05 nats, red below -0.05, others plain; stronger up to 1 nat."""
    reward, results = recorded.returned["dataset"].reward, recorded.results
    cards = re.findall(r'<p class="\w+"><span class="name".*?</span>(.*?)</p>', content, re.S)
    span = r'<span class="(\w+)" style="--a: ([\d.]+)" title="(\S+) nats">'

    def shown(r):
        return "plus" if r > 0 else "minus", f"{0.15 + 0.45 * min(1, abs(r)):.2f}", f"{r:+.2f}"

    expected = []
    for i, prompt in enumerate(results["prompts"]):
        for sample in results["samples"].values():
            text = sample["texts"][i]
            values = page.contributions(text, reward) if reward else []
            n = len(text.removeprefix(prompt).split())
            expected.append([shown(r) for r in values[-n:] if abs(r) >= 0.05])
    assert [re.findall(span, card) for card in cards] == expected
    assert any(expected) or recorded.cfg.data != "toy"  # r* may know none of IMDb's tiny samples
    assert ("Words have no colour" in content) == (reward is None)


def test_contributions_depend_on_the_context():
    """A reward that counts pairs of neighbours => a word contributes its pairs, minus the one
    that its removal creates."""

    def reward(texts):
        return torch.tensor([float(text.count("not good")) for text in texts])

    assert page.contributions("not good", reward) == [1.0, 1.0]
    assert page.contributions("not so good", reward) == [0.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "prompt, text, words",
    [("2+2=", "2+2=4 or 5", "4 or 5"), ("a b", "a b", "(nothing)"), ("a b", "a b c", "c")],
)
def test_a_response_may_begin_inside_a_word(prompt, text, words):
    """It then has the colour of the whole word."""

    def reward(texts):
        return torch.tensor([float("=" in text) for text in texts])

    assert page.response(prompt, text, None) == words
    assert page.response(prompt, text, reward).startswith("<span") == ("=" in text)


def test_the_command_repeats_the_run(recorded, content, monkeypatch):
    """The command line of the page => the settings of the run, where they have a flag."""
    command = shlex.split(html.unescape(re.search("<pre>(.*?)</pre>", content)[1]))
    assert command[:2] == ["python", "train.py"]
    monkeypatch.chdir(recorded.folder.parent)
    _, cfg = cli.parse("train.py", "", Config, PRESETS, command[2:])
    for name, field in Config.__dataclass_fields__.items():
        if field.metadata:
            values = getattr(cfg, name), getattr(recorded.cfg, name)
            if name in ("data", "imdb"):  # paths
                values = (Path(str(path)).name for path in values)
            ours, theirs = ([*value] if isinstance(value, tuple) else value for value in values)
            assert ours == theirs, name


@pytest.mark.parametrize(
    "init, flags", [(PI_REF, []), ("lib/pi_ref.pt", []), ("pi_ref.pt", ["--init", "pi_ref.pt"])]
)
def test_the_command_tells_the_shipped_pi_ref_from_other_files(init, flags, monkeypatch):
    monkeypatch.chdir(Path(PI_REF).parent.parent)
    settings = page.recorded(Config("imdb", **PRESETS["imdb"] | {"init": init}))
    command = shlex.split(page.command(json.loads(json.dumps(settings))))
    assert command == ["python", "train.py", "--data", "imdb", *flags]


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors(width, toy, tmp_path):
    """Phone and desktop: no console message, both images, and no sideways scrolling."""
    content = (toy.folder / "report.html").read_text("utf-8")
    (tmp_path / "page.html").write_text(content.replace("</body>", PROBE + "</body>"), "utf-8")
    (tmp_path / "window.html").write_text(WINDOW.format(width))
    flags = "--headless --no-sandbox --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [(tmp_path / "window.html").as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    inner, needed, *images = json.loads(re.search("<body>(.*)</body>", done.stdout, re.S)[1])
    assert inner == width >= needed and len(images) == 2 and min(images) > 500


# ------------------------------------------------- python -m beyond.page


def test_a_report_is_drawn_again_from_results_json_alone(toy, tmp_path, capsys):
    shutil.copy(toy.folder / "results.json", tmp_path)
    capsys.readouterr()
    assert page.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == page.summary(toy.results)
    for name in PRODUCTS:
        assert (tmp_path / name).read_bytes() == (toy.folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == PRODUCTS


@pytest.mark.parametrize("found", [None, "{", '{"points": []}'])
def test_a_folder_without_results_gives_one_line(found, tmp_path, capsys):
    if found is not None:
        (tmp_path / "results.json").write_text(found)
    assert page.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "results.json: cannot be read as the results of a run" in error
    assert error.count("\n") == 1 and not (tmp_path / "report.html").exists()


# ------------------------------------------------- samples, table and figures


def test_samples_show_prompts_texts_and_rewards():
    samples = {
        "pi_ref": {"texts": ["the plot is odd."], "rewards": [-0.3]},
        "beta 1": {"texts": ["the plot is superb and moving."]},
        "beta 2": {"texts": ["the plot is superb and moving."], "rewards": [2.3]},
    }
    assert page.samples_text(["the plot"], samples, 22).splitlines() == [
        "the plot ...",
        "",
        "pi_ref  -0.30  is odd.",
        "beta 1  is superb and",
        "        moving.",
        "beta 2  +2.30  is",
        "               superb",
        "               and",
        "               moving.",
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
    for run, ylabel in ((toy, "gain"), (own, "accuracy")):
        ax = page.draw_frontier(run.results).axes[0]
        assert ylabel in ax.get_ylabel()
        assert ("optimum" in str(ax.get_legend_handles_labels()[1])) == (run is toy)
    certain = own.results | {"points": [own.results["points"][0] | {"pair_accuracy": 1.0}]}
    certain["points"][0] |= {"pairs": 60, "pair_prompts": 12}
    (errors,) = page.draw_frontier(certain).axes[0].containers
    bar = errors.lines[2][1].get_segments()[0]
    assert tuple(bar[:, 1]) == pytest.approx(wilson_interval(1.0, 12))
    panels = page.draw_curves(toy.results["curves"]).axes
    assert [ax.get_title() for ax in panels] == list(page.PANELS.values())
    beta, rows = next(iter(toy.results["curves"].items()))
    expected = [row["r_hat_w"] / float(beta) for row in rows]
    assert panels[3].lines[0].get_ydata() == pytest.approx(expected)
    assert all(len(ax.lines) >= 2 * len(toy.results["curves"]) for ax in panels)


def test_wilson_interval_has_known_values():
    """9 of 10, 1 of 10 and 5 of 5. The intervals for p and 1 - p mirror each other; each contains
    its proportion."""
    assert wilson_interval(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson_interval(0.1, 10) == pytest.approx((0.018, 0.404), abs=1e-3)
    assert wilson_interval(1.0, 5) == pytest.approx((0.566, 1), abs=1e-3)
    for n in range(1, 201):
        assert wilson_interval(0.0, n)[0] <= 0 and wilson_interval(1.0, n)[1] >= 1


def test_the_summary_of_the_users_preferences_has_an_interval(own):
    last = page.summary(own.results).splitlines()[-1]
    point = own.results["points"][-1]
    low, high = wilson_interval(point["pair_accuracy"], point["pair_prompts"])
    assert (point["pairs"], point["pair_prompts"]) == (6, 3)
    assert "on 6 pairs of 3 prompts, " in last and f"{low:.2f} to {high:.2f}" in last
    assert "on 3 pairs, " in accuracy_line(point | {"pairs": 3})
