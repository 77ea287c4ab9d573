"""The figures, samples and table of a run, all from its results.json.

python -m lib.report out        # draws them again for a finished run
"""

import json
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib.io import BadInput, atomic_write, open_user_file

ORANGE, BLUE = "#d95f02", "#1b6ca8"  # pi_theta and pi_ref
PANELS = ("loss", "accuracy", "margin", "logp_w", "logp_l", "kl")
TABLE = {  # the column of each metric in results.json
    "beta": "beta", "kl": "KL", "optimal_kl": "optimal KL", "gain": "gain", "reward": "reward",
    "optimal_reward": "optimal reward", "p_positive": "P(positive)", "win_rate": "win rate",
    "length": "length", "pair_accuracy": "accuracy", "reward_slope": "slope", "reward_r2": "R2",
    "fraction_of_optimal": "fraction",
}  # fmt: skip


def write_report(out: Path, results: dict):
    """Write results.json, figure.png, curves.png and samples.txt."""
    atomic_write(out / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
    atomic_write(out / "samples.txt", samples_text(results["columns"], results["samples"]).encode())
    draw_frontier(results).savefig(out / "figure.png", dpi=120)
    draw_curves(results["curves"]).savefig(out / "curves.png", dpi=120)


def draw_frontier(results: dict) -> Figure:
    """Gain in reward against KL, with the optimum. If r* is unknown: pair accuracy."""
    figure = Figure((8, 5), layout="constrained")
    ax, points, known = figure.subplots(), results["points"], bool(results["frontier"])
    name, origin, ylabel = "pair_accuracy", 0.5, "accuracy on held-out pairs"
    if known:
        name, origin, ylabel = "gain", 0, r"gain in true reward over $\pi_{ref}$, nats"
        draw_optimum(ax, results, 1.15 * max(p["kl"] for p in points))
    kl, kl_se, y, y_se = (
        [p.get(n, 0) for p in points] for n in ("kl", "kl_se", name, name + "_se")
    )
    bars = {"xerr": 2 * np.array(kl_se), "yerr": 2 * np.array(y_se), "fmt": "o", "color": ORANGE}
    ax.errorbar(kl, y, label=f"{results['method']}, ±2 standard errors", **bars)
    for p in points:
        ax.annotate(rf"  $\beta$ = {p['beta']:g}", (p["kl"], p[name]), va="top")
    ax.plot(0, origin, "D", color=BLUE, label=r"$\pi_{ref}$")
    xlabel = r"KL($\pi_\theta$, $\pi_{ref}$), nats per response"
    ax.set(xlabel=xlabel, ylabel=ylabel, title=results["title"])
    ax.legend(loc="lower right", frameon=False)
    return figure


def draw_optimum(ax, results: dict, right: float):
    """The optimal frontier, where it cannot be estimated, and the optimum of each beta."""
    base = results["reference"]["reward"]
    rows = [(f["kl"], f["reward"] - base) for f in results["frontier"] if f["reliable"]]
    kl, gain = np.transpose([(0, 0), *rows])
    ax.plot(kl, gain, color="0.3", label="optimum of all policies (Eq. 4)")
    if kl[-1] < right:
        ax.axvspan(kl[-1], right, color="0.93", label="optimum cannot be estimated here")
    optima = [p for p in results["points"] if p["optimal_kl"] is not None]
    kl, reward = ([p[name] for p in optima] for name in ("optimal_kl", "optimal_reward"))
    label = r"optimum at the same $\beta$"
    ax.plot(kl, np.array(reward) - base, "o", mfc="none", mec=ORANGE, ms=11, label=label)
    ax.set_xlim(-0.03 * right, right)


def draw_curves(curves: dict) -> Figure:
    """Training metrics against the step, for each beta: raw values, and a running mean."""
    figure = Figure((12, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for ax, name in zip(axes.flat, PANELS, strict=True):
        for i, (beta, rows) in enumerate(curves.items()):
            points = [(step, row[name]) for step, row in enumerate(rows, 1) if name in row]
            step, values = np.transpose(points)
            window = max(1, len(values) // 20)
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(step, values, color=f"C{i}", alpha=0.2, lw=0.7)
            ax.plot(step[window - 1 :], mean, color=f"C{i}", label=rf"$\beta$ = {beta}")
        ax.set_title(name)
    axes[0, 0].axhline(np.log(2), color="0.4", ls=":", label="ln 2")
    axes[0, 0].legend(frameon=False)
    figure.supxlabel("step")
    return figure


def samples_text(columns: list[str], samples: list[dict], width: int = 38) -> str:
    """What each policy wrote for the same prompts, side by side, with the true reward if known."""
    rows = [columns]
    for sample in samples:
        cells = []
        for text, r in zip(sample["texts"], sample["rewards"], strict=True):
            reward = "" if r is None else f"{r:+.2f} "
            cells.append(textwrap.wrap(reward + text.removeprefix(sample["prompt"]).strip(), width))
        rows += [[], [f"{sample['prompt']} ..."], *zip_longest(*cells, fillvalue="")]
    return "".join(" | ".join(f"{cell:{width}}" for cell in row).rstrip() + "\n" for row in rows)


def summary(results: dict) -> str:
    """The table of a run, and how close it came to the optimum."""
    points = results["points"]
    names = [name for name in TABLE if name in points[0]]
    rows = [[TABLE[name] for name in names]]
    rows += [["-" if p[name] is None else f"{p[name]:.3g}" for name in names] for p in points]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    fractions = [p["fraction_of_optimal"] for p in points if p.get("fraction_of_optimal")]
    if fractions:
        low, high = f"{min(fractions):.0%}", f"{max(fractions):.0%}"
        shares = low if low == high else f"{low} to {high}"
        table.append(
            f"{results['method']} attains {shares} of the largest possible gain at its KL."
        )
    return "\n".join(table)


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    try:
        with open_user_file(folder / "results.json", "the results of a run"):
            loaded = json.loads((folder / "results.json").read_text("utf-8"))
            write_report(folder, loaded)
            print(summary(loaded))
    except BadInput as e:
        sys.exit(f"lib.report: {e}")
