"""The figures of a run, and one page with figures, table, settings, command and samples.

`write_results` writes out/results.json after each beta; everything else comes from that file,
except r* on IMDb, which is in dataset.pt. train.py draws the figures and the page when it ends, and
`python -m beyond.page out` redraws them. The page is self-contained. In the samples, the colour of
a word shows its contribution in context: r*(text) - r*(text without the word), in nats. Words that
raise r* are green and underlined, and words that lower it are red with a dotted underline; blue and
orange stand for pi_ref and pi_theta.
"""

import base64
import dataclasses
import json
import platform
import re
import shlex
import sys
import textwrap
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from beyond.custom_data import accuracy_line, wilson_interval
from beyond.sample import printable, true_reward
from data import Dataset, Reward, load_tokenizer
from dpo import Preferences
from lib.cli import Parser
from lib.evaluate import EvalSet, optimal_frontier
from lib.io import BadInput, atomic_write, open_user_file
from lib.optim import bf16_supported
from lib.stage import Stage
from train import PI_REF, PRESETS, Config

PANELS = {  # metric in the curves: title
    "loss": "loss",
    "accuracy": "accuracy on training pairs",
    "margin": "margin, nats",
    "r_hat_w": r"implicit reward of $y_w$ / $\beta$, nats",
    "r_hat_l": r"implicit reward of $y_l$ / $\beta$, nats",
    "kl": r"KL($\pi_\theta$, $\pi_{ref}$), nats",
}
COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#a6761d")  # of the betas
ORANGE, BLUE = "#d95f02", "#1b6ca8"  # pi_theta and pi_ref
TICKS = (0, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 25, 40)  # KL, nats
DATASETS = {"toy": "toy dataset", "imdb": "IMDb"}
LABELS = {"bt": "Bradley-Terry labels", "soft": "soft labels", "argmax": "argmax labels"}
LARGE = 30  # nats: a KL above it is pointed out
STRONG, VISIBLE = 1.0, 0.05  # nats: full colour, and the smallest contribution that is coloured
STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --page: #fff; --line: #ccc; --soft: #f4f4f4;
        --plus: 0, 140, 60; --minus: 205, 35, 50; --blue: #1b6ca8; --orange: #b84f00 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --line: #444; --soft: #22252a;
          --plus: 60, 190, 110; --minus: 250, 90, 100; --blue: #6db3e8; --orange: #f59b4c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page);
       color: var(--text); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem }
figure { margin: 1rem 0 } figcaption { font-size: .9rem }
.wide { overflow-x: auto }
.wide img { min-width: 44rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
         white-space: nowrap }
.settings td, .settings th { text-align: left; white-space: normal; overflow-wrap: anywhere }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
.policies { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)) }
.policies p { margin: 0; padding: .5rem .7rem; background: var(--soft); overflow-wrap: anywhere;
              border-left: .3rem solid var(--orange) }
.policies p.ref { border-color: var(--blue) }
.name { display: block; font-size: .85rem; font-weight: 600; color: var(--orange) }
.ref .name { color: var(--blue) }
.plus { background: rgba(var(--plus), var(--a)); text-decoration: underline }
.minus { background: rgba(var(--minus), var(--a)); text-decoration: underline dotted }
"""
TABLE = {  # the column of each metric in results.json
    "beta": "beta", "kl": "KL", "optimal_kl": "optimal KL", "gain": "gain",
    "p_positive": "P(positive)", "win_rate": "win rate", "length": "length",
    "pair_accuracy": "accuracy", "reward_slope": "slope", "reward_r2": "R2",
    "fraction_of_optimal": "fraction",
}  # fmt: skip


# ------------------------------------------------- parts of the page


def tag(name: str, content: str, **attributes: str) -> str:
    """An element with content that is HTML already."""
    text = "".join(f' {key.strip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{text}>{content}</{name}>"


def figure(drawing: Figure, path: Path, caption: str) -> str:
    """Save a drawing as a PNG. Returns it as HTML, in a box that scrolls sideways if need be."""
    drawing.savefig(path, dpi=120)
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="{source}" alt="{escape(caption)}">'
    if drawing.get_figwidth() > 10:
        image = tag("div", image, class_="wide")
    return tag("figure", image + tag("figcaption", escape(caption)))


def points_table(points: list[dict]) -> str:
    """The results of each beta. Each cell has its exact value as a tooltip."""
    names = [name for name in TABLE if name in points[0]]
    rows = [tag("tr", "".join(tag("th", escape(TABLE[name])) for name in names))]
    for point in points:
        cells = []
        for name in names:
            value = point[name]
            shown = "-" if value is None else f"{value:.3g}"
            cells.append(tag("td", shown, title=f"{name} = {json.dumps(value)}"))
        rows.append(tag("tr", "".join(cells)))
    return tag("div", tag("table", "".join(rows)), class_="wide")


def settings_table(values: dict) -> str:
    rows = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(tag("tr", tag("th", escape(name)) + tag("td", escape(text))))
    return tag("table", "".join(rows), class_="settings")


def machine(device: torch.device) -> dict[str, object]:
    """What results depend on besides the settings."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "device": str(device),
        "processor": names[0] if names else platform.processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16_supported(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def title(config: dict) -> str:
    parts = [Path(config["data"]).name]
    if config["data"] in DATASETS:
        parts = [DATASETS[config["data"]], LABELS[config["labels"]]]
    parts += [Path(config["loss"]).name if config["loss"] != "dpo" else "", *config["loss_args"]]
    return ", ".join([*filter(None, parts), f"seed {config['seed']}"])


def method(config: dict) -> str:
    name = config["loss"].rpartition(":")[2]
    return name if ":" in config["loss"] else name.upper()


def portable(init: str) -> str:
    """--init as it was given, but the shipped pi_ref as a path in the project."""
    shipped = init and Path(init).resolve() == Path(PI_REF).resolve()
    return "lib/pi_ref.pt" if shipped else init


def recorded(cfg: Config) -> dict:
    """The settings for results.json, without the folders of --imdb and of the shipped pi_ref."""
    return vars(cfg) | {"init": portable(cfg.init), "imdb": cfg.imdb and cfg.imdb.name}


def command(config: dict) -> str:
    """The command line of a run: the settings that differ from the defaults of its dataset."""
    dataset = config["data"] if config["data"] in ("toy", "imdb") else "own"
    words = ["python", "train.py"]
    for field in dataclasses.fields(Config):
        default = PRESETS.get(dataset, {}).get(field.name, field.default)
        default = list(default) if isinstance(default, tuple) else default
        default = portable(default) if field.name == "init" else default
        value = config[field.name]
        if field.metadata and value not in (None, default):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


# ------------------------------------------------- samples


def contributions(text: str, reward: Reward) -> list[float]:
    """r*(text) - r*(text without the word) of each word of a text, in nats."""
    words = text.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    r = reward([" ".join(words), *without])
    return (r[0] - r[1:]).tolist()


def coloured(word: str, value: float) -> str:
    word = escape(printable(word))
    if abs(value) < VISIBLE:
        return word
    kind, strength = "plus" if value > 0 else "minus", min(1.0, abs(value) / STRONG)
    style = f"--a: {0.15 + 0.45 * strength:.2f}"
    return tag("span", word, class_=kind, style=style, title=f"{value:+.2f} nats")


def response(prompt: str, text: str, reward: Reward | None) -> str:
    """The words after the prompt, with the colour of their contribution."""
    words = text.removeprefix(prompt).split()
    values = contributions(text, reward) if reward else [0.0] * len(words)
    return " ".join(map(coloured, words, values[-len(words) :])) or "(nothing)"


def samples(results: dict, reward: Reward | None) -> str:
    blocks = []
    for i, prompt in enumerate(results["prompts"]):
        cards = []
        for name, sample in results["samples"].items():
            text, r = sample["texts"][i], sample["rewards"][i] if "rewards" in sample else None
            about = name if r is None else f"{name}: r* = {r:+.2f}"
            heading = tag("span", escape(about), class_="name", title=json.dumps(r))
            kind = "ref" if name == "pi_ref" else "theta"
            cards.append(tag("p", heading + response(prompt, text, reward), class_=kind))
        title = tag("h3", f"{escape(prompt)} ...")
        blocks.append(title + tag("div", "".join(cards), class_="policies"))
    return "".join(blocks)


def colour_key(reward: Reward | None) -> str:
    if reward is None:
        return (
            "<p>Words have no colour, because the true reward r* of this run is not available.</p>"
        )
    words = f"{coloured('green, underlined', STRONG)}, {coloured('red, dotted', -STRONG)}"
    return (
        "<p>r*: the true reward of prompt and response, in nats. The colour of a word shows its "
        f"contribution in context, r*(text) - r*(text without it). Key: {words}: raises or lowers "
        f"r* by {STRONG:g} nat or more; paler: by less; no colour: by less than {VISIBLE:g}. "
        "The bar at the left is blue for pi_ref and orange for trained policies.</p>"
    )


# ------------------------------------------------- the frontier


def draw_frontier(results: dict) -> Figure:
    """Gain in reward against KL, with the optimum. If r* is unknown: pair accuracy.

    If the range of KL is wide, its axis has a square-root scale, on which the curve of the optimal
    gain is nearly straight at first.
    """
    figure = Figure((8, 5), layout="constrained")
    ax, points, known = figure.subplots(), results["points"], bool(results["frontier"])
    name, origin, ylabel = "pair_accuracy", 0.5, "accuracy on held-out pairs"
    right = max(max(1.3 * p["kl"], 1.15 * (p.get("optimal_kl") or 0)) for p in points)
    if known:
        name, origin, ylabel = "gain", 0, r"gain in true reward over $\pi_{ref}$, nats"
        draw_optimum(ax, results, right)
    columns = [[p.get(n) or 0 for p in points] for n in ("kl", name, "kl_se", name + "_se")]
    kl, y, kl_se, y_se = np.array(columns)
    bars, label = 2 * y_se, f"{method(results['config'])}, ±2 standard errors"
    if not known:
        intervals = [wilson_interval(p["pair_accuracy"], p["pair_prompts"]) for p in points]
        low, high = np.transpose(intervals)
        bars, label = (y - low, high - y), f"{method(results['config'])}, 95% intervals"
    ax.errorbar(kl, y, bars, 2 * kl_se, "o", color=ORANGE, label=label)
    for p in points:
        label = rf"$\beta$ = {p['beta']:g}"
        ax.annotate(label, (p["kl"], p[name]), (7, -7), textcoords="offset points", va="top")
    ax.plot(0, origin, "D", color=BLUE, label=r"$\pi_{ref}$", clip_on=False, zorder=5)
    if results["config"]["data"] == "imdb":
        positive = ax.twinx()
        p_positive = [results["reference"]["p_positive"], *(p["p_positive"] for p in points)]
        positive.plot([0, *kl], p_positive, "s", color="0.5", ms=5, mfc="none", clip_on=False)
        positive.set(ylabel="mean P(positive)", ylim=(0, 1))
        ax.plot([], [], "s", color="0.5", ms=5, mfc="none", label="P(positive), right axis")
    xlabel = r"KL($\pi_\theta$, $\pi_{ref}$), nats per response"
    if right > 4:
        xlabel += ", square-root scale"
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ticks = [t for t in TICKS if t == 0 or right / 40 < t < right]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlim=(0, right), xlabel=xlabel, ylabel=ylabel, title=title(results["config"]))
    # "best" does not see the points of the second axis
    ax.legend(loc="lower right" if results["config"]["data"] == "imdb" else "best", framealpha=1)
    return figure


def draw_optimum(ax, results: dict, right: float):
    """The optimal frontier, the region where it cannot be estimated, and each beta's optimum."""
    base = results["reference"]["reward"]
    reliable = np.array(results["frontier"]["reliable"], bool)
    kl = np.array([0, *np.array(results["frontier"]["kl"])[reliable]])
    gain = np.array([0, *np.array(results["frontier"]["reward"])[reliable] - base])
    ax.plot(kl, gain, color="0.3", label="optimum over all policies (Eq. 4)")
    if kl[-1] < 0.98 * right:  # wide enough to be seen
        ax.axvspan(kl[-1], right, color="0.93", label="optimum cannot be estimated here")
    for p in results["points"]:
        if p["optimal_kl"] is not None:
            x, y = p["optimal_kl"], p["optimal_reward"] - base
            ax.plot([x, p["kl"]], [y, p["gain"]], color=ORANGE, lw=0.7)
            ax.plot(x, y, "o", mfc="w", mec=ORANGE, ms=11)
    how = r"optimum at the same $\beta$, joined to the policy"
    ax.plot([], [], "o-", color=ORANGE, mfc="w", lw=0.7, ms=11, label=how)


# ------------------------------------------------- training curves, and samples as text


def draw_curves(curves: dict) -> Figure:
    """Training metrics against the step, for each beta: raw values, and a running mean."""
    figure = Figure((12, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for ax, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (beta, rows) in enumerate(curves.items()):
            points = [(step, row[name]) for step, row in enumerate(rows, 1) if name in row]
            step, values = np.transpose(points)
            if name.startswith("r_hat"):  # for DPO: log pi_theta / pi_ref
                values = values / float(beta)
            colour = COLOURS[i % len(COLOURS)]
            window = max(1, len(values) // 20)
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(step, values, color=colour, alpha=0.2, lw=0.7)
            ax.plot(step[window - 1 :], mean, color=colour, label=rf"$\beta$ = {beta}")
        ax.set_title(title)
    axes[0, 0].axhline(np.log(2), color="0.4", ls=":", label="ln 2")
    axes[0, 0].legend(frameon=False)
    figure.supxlabel("step")
    return figure


def samples_text(prompts: list[str], samples: dict[str, dict], width: int = 96) -> str:
    """What each policy wrote for the same prompts, with the true reward if known."""
    lines, names = [], max(map(len, samples))
    for i, prompt in enumerate(prompts):
        lines += [*textwrap.wrap(f"{prompt} ...", width), ""]
        for name, sample in samples.items():
            start = f"{name:{names}}  "
            start += f"{sample['rewards'][i]:+.2f}  " if "rewards" in sample else ""
            text = sample["texts"][i].removeprefix(prompt).strip()
            how = {"initial_indent": start, "subsequent_indent": " " * len(start)}
            lines += textwrap.wrap(text, width, **how) or [start.rstrip()]
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------- the page


def page(out: Path, results: dict, reward: Reward | None) -> str:
    """The page. Writes figure.png and curves.png, too."""
    points, known = results["points"], bool(results["frontier"])
    caption = "Gain in true reward" if known else "Accuracy on held-out pairs"
    about = {"reference": results["reference"], "training pairs": results["pairs"]}
    about |= {"machine": results["machine"], "seconds": results["seconds"]}
    frontier, curves = draw_frontier(results), draw_curves(results["curves"])
    body = [
        tag("h1", escape(title(results["config"]))),
        *(tag("p", escape(line)) for line in summary(results).splitlines()[1 + len(points) :]),
        figure(frontier, out / "figure.png", f"{caption} against KL from pi_ref, for each beta."),
        tag("h2", "Results"),
        points_table(points),
        "<p>Rewards and KL are in nats per response. Hover over a cell to see its exact value.</p>",
        tag("h2", "Training"),
        figure(curves, out / "curves.png", "Metrics of each step, with a running mean."),
        tag("h2", "Samples"),
        colour_key(reward),
        samples(results, reward),
        tag("h2", "Settings"),
        tag("pre", escape(command(results["config"]))),
        tag(
            "details", "<summary>All settings</summary>" + settings_table(results["config"] | about)
        ),
    ]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        tag("title", escape(title(results["config"]))),
        tag("style", STYLE),
    ]
    content = "\n".join(["<!doctype html>", '<html lang="en">', *head, "<body>", *body])
    return content + "\n</body></html>\n"


def is_known(point: dict) -> bool:
    """Whether the fraction could be estimated, with a small standard error."""
    return bool(point.get("fraction_of_optimal")) and point["fraction_of_optimal_se"] < 0.2


def summary(results: dict) -> str:
    """The table of a run, and how close it came to the optimum."""
    points = results["points"]
    names = [name for name in TABLE if name in points[0]]
    rows = [[TABLE[name] for name in names]]
    rows += [["-" if p[name] is None else f"{p[name]:.3g}" for name in names] for p in points]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    fractions = [p["fraction_of_optimal"] for p in points if is_known(p)]
    if fractions:
        low, high = f"{min(fractions):.0%}", f"{max(fractions):.0%}"
        share = low if low == high else f"{low} to {high}"
        name = method(results["config"])
        table.append(f"{name} attains {share} of the largest possible gain at its KL.")
    if others := [f"{p['beta']:g}" for p in points if results["frontier"] and not is_known(p)]:
        table.append(f"At beta {', '.join(others)} the fraction is unknown or too uncertain.")
    if far := [f"{p['beta']:g}" for p in points if p["kl"] > LARGE]:
        what = f"At beta {', '.join(far)} the KL is above {LARGE} nats"
        table.append(f"{what}: if the samples are degenerate, lower --lr or --epochs.")
    if not results["frontier"]:
        table += map(accuracy_line, points)
    return "\n".join(table)


def write_results(
    stage: Stage,
    cfg: Config,
    dataset: Dataset,
    eval_set: EvalSet,
    preferences: Preferences,
    runs: dict,
    device: torch.device,
):
    """Write results.json to the folder of `stage`. runs: {beta: (policy, evaluation)}."""
    tokenizer = load_tokenizer(dataset.tokens)
    frontier = {} if dataset.reward is None else optimal_frontier(eval_set.rewards)
    results = {
        "config": recorded(cfg),
        "reference": eval_set.about,
        "points": [evaluation["point"] for _, evaluation in runs.values()],
        "frontier": {
            name: values.reshape(len(values), -1).mean(1).tolist()
            for name, values in frontier.items()
        },
        "prompts": [tokenizer.decode(x) for x in dataset.eval_prompts[:12]],
        "samples": {"pi_ref": eval_set.shown}
        | {f"beta {beta:g}": evaluation["shown"] for beta, (_, evaluation) in runs.items()},
        "curves": {f"{beta:g}": policy["curves"] for beta, (policy, _) in runs.items()},
        "pairs": len(preferences.pairs),
        "seconds": stage.seconds,
        "machine": machine(device),
    }
    text = json.dumps(results, default=str, indent=1)
    atomic_write(stage.folder / "results.json", text.encode())


def write_page(out: Path) -> str:
    """Write figure.png, curves.png, samples.txt and report.html. Returns the table.

    Raises BadInput if results.json cannot be used.
    """
    with open_user_file(out / "results.json", "the results of a run"):
        results = json.loads((out / "results.json").read_text("utf-8"))
        content = page(out, results, true_reward(out) if results["frontier"] else None)
        atomic_write(out / "report.html", content.encode())
        text = samples_text(results["prompts"], results["samples"])
        atomic_write(out / "samples.txt", text.encode())
        return summary(results)


def main(argv: list[str]) -> int:
    parser = Parser("beyond.page", description="Redraw a run's table, figures and page.")
    parser.add_argument("out", type=Path, nargs="?", default="out", help="folder of a run (out)")
    try:
        print(write_page(parser.parse_args(argv).out))
    except BadInput as e:
        print(f"beyond.page: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
