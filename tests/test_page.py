"""beyond/page.py: one page that shows the numbers of results.json, in any browser window."""

import html
import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch

from beyond import page
from lib import cli, report
from train import PRESETS, Config

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>addEventListener("load", () => {
  const seen = (query) => [...document.querySelectorAll(query)].map((e) => getComputedStyle(e));
  parent.postMessage(JSON.stringify({
    width: innerWidth, needed: document.documentElement.scrollWidth,
    images: [...document.images].map((image) => image.naturalWidth),
    text: seen("body")[0].color, page: seen("body")[0].backgroundColor,
    names: seen(".name").map((s) => s.color), cards: seen(".policies p")[0].backgroundColor,
    plus: seen(".plus")[0].textDecorationStyle, minus: seen(".minus")[0].textDecorationStyle,
    html: document.documentElement.outerHTML,
  }), "*")})</script>"""
WINDOW = """<!doctype html>
<iframe src="page.html" width="{}" height="844" style="border: 0"></iframe>
<script>onmessage = (message) => document.body.textContent = message.data</script>"""


@pytest.fixture(scope="module", params=["toy", "imdb", "own"])
def recorded(request):
    """A run, at whose end the page was written."""
    return request.getfixturevalue(request.param)


def read(run) -> tuple[str, dict]:
    content = (run.folder / "report.html").read_text("utf-8")
    return content, json.loads((run.folder / "results.json").read_text("utf-8"))


def check_numbers(content: str, results: dict):
    """Each cell and each sample of a page, against results.json."""
    cells = re.findall(r'<td title="(\w+) = ([^"]*)">([^<]*)</td>', content)
    found = iter(cells)
    for point in results["points"]:
        for name in (name for name in page.TABLE if name in point):
            value = point[name]
            shown = "-" if value is None else f"{value:.3g}"
            assert next(found) == (name, json.dumps(value), shown)
    assert next(found, None) is None and len(cells) >= 4 * len(results["points"])
    names = re.findall(r'<span class="name" title="([^"]*)">([^<]*)</span>', content)
    expected = [
        (json.dumps(r), column if r is None else f"{column}: r* = {r:+.2f}")
        for i in range(len(results["prompts"]))
        for column, sample in results["samples"].items()
        for r in [sample["rewards"][i] if "rewards" in sample else None]
    ]
    assert names == expected and len(expected) >= 2


def test_numbers_are_those_of_results_json(recorded):
    content, results = read(recorded)
    check_numbers(content, results)
    assert content.count("data:image/png;base64,") == 2
    assert html.escape(page.title(results["config"])) in content
    for line in page.summary(results).splitlines()[1 + len(results["points"]) :]:
        assert f"<p>{html.escape(line)}</p>" in content


def test_the_page_loads_nothing(recorded):
    content, _ = read(recorded)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})|url\(([^)]*)', content)
    assert len(sources) == 3 and all(source.startswith("data:") for source, _ in sources)
    assert "<script" not in content and "@import" not in content


def test_words_have_the_colour_of_their_contribution_in_context(recorded):
    """r*(text) - r*(text without the word): green above 0.05, red below -0.05, others plain."""
    content, results = read(recorded)
    reward = recorded.returned["dataset"].reward
    cards = re.findall(
        r'<p class="(ref|theta)"><span class="name".*?</span>(.*?)</p>', content, re.S
    )
    texts = [
        (prompt, sample["texts"][i])
        for i, prompt in enumerate(results["prompts"])
        for sample in results["samples"].values()
    ]
    assert len(cards) == len(texts)
    spans = 0
    for (_, card), (prompt, text) in zip(cards, texts, strict=True):
        found = re.findall(r'<span class="(\w+)" style="--a: ([\d.]+)" title="(\S+) nats">', card)
        words, expected = text.split(), []
        for i in range(len(prompt.split()), len(words)) if reward else ():
            without = " ".join(words[:i] + words[i + 1 :])
            value = (reward([" ".join(words)]) - reward([without])).item()
            if abs(value) >= 0.05:
                kind = "plus" if value > 0 else "minus"
                strength = 0.15 + 0.45 * min(1, abs(value))
                expected.append((kind, pytest.approx(strength, abs=0.006), f"{value:+.2f}"))
        assert [(kind, float(a), title) for kind, a, title in found] == expected
        spans += len(found)
    assert spans > 0 or recorded.cfg.data != "toy"  # IMDb's r* may know none of the tiny samples
    assert ("Words have no colour" in content) == (reward is None)


def test_colours_are_not_those_of_the_policies():
    """pi_ref is blue and pi_theta orange in the figures; words are green or red."""
    for name in ("--plus", "--minus"):
        for rgb in re.findall(name + r": (\d+), (\d+), (\d+)", page.STYLE):
            red, green, blue = map(int, rgb)
            assert max(red, green) > 1.5 * min(red, green) and blue < max(red, green) - 50
    assert page.BLUE in page.STYLE


def test_the_command_repeats_the_run(recorded, monkeypatch):
    """The command line of the page => the settings of the run, where they have a flag."""
    content, _ = read(recorded)
    command = shlex.split(html.unescape(re.search("<pre>(.*?)</pre>", content)[1]))
    assert command[:2] == ["python", "train.py"]
    monkeypatch.chdir(recorded.folder.parent)
    _, cfg = cli.parse("train.py", "", Config, PRESETS, command[2:])
    for name, field in Config.__dataclass_fields__.items():
        if field.metadata["help"]:
            values = (getattr(each, name) for each in (cfg, recorded.cfg))
            ours, theirs = (
                str(list(value) if isinstance(value, tuple) else getattr(value, "name", value))
                for value in values
            )
            assert ours.split("/")[-1] == theirs.split("/")[-1], name


def luminance(color: str) -> float:
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in (int(value) / 255 for value in re.findall(r"\d+", color)[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_a_browser_shows_it_without_errors(width, scheme, toy, tmp_path):
    """Phone and desktop, dark and light: no console message, both images, no sideways scrolling,
    readable contrast, and the numbers of results.json in the document it builds."""
    content, results = read(toy)
    (tmp_path / "page.html").write_text(content.replace("</body>", PROBE + "</body>"), "utf-8")
    (tmp_path / "window.html").write_text(WINDOW.format(width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--window-size=1400,900", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    command = [BROWSER, *flags, "--virtual-time-budget=5000", "--dump-dom"]
    command += [(tmp_path / "window.html").as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search("<body>(.*)</body>", done.stdout, re.S)[1]))
    check_numbers(found["html"], results)
    assert found["width"] == width and found["needed"] <= width
    assert len(found["images"]) == 2 and min(found["images"]) > 500
    assert (luminance(found["page"]) > 0.5) == (scheme == "light")
    assert contrast(found["text"], found["page"]) > 7
    assert len(set(found["names"])) == 2  # pi_ref and pi_theta
    assert min(contrast(name, found["cards"]) for name in found["names"]) > 4.5
    assert (found["plus"], found["minus"]) == ("solid", "dotted")


@pytest.mark.parametrize("content", [None, "", "{}", '{"points": []}', "[1]"])
def test_a_folder_without_results_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "results.json: cannot be read as the results of a run" in error
    assert error.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_contributions_depend_on_the_context():
    """A reward that counts pairs of neighbours => a word counts its pairs, less the new one."""

    def reward(texts):
        return torch.tensor([float(text.count("not good")) for text in texts])

    assert page.contributions("not good", reward) == [1.0, 1.0]
    assert page.contributions("good", reward) == [0.0]
    assert page.contributions("not so good", reward) == [0.0, -1.0, 0.0]
