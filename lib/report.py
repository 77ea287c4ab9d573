"""The figure, table and page of a run, all from its results.json.

python -m lib.report out        # makes them again for a finished run
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import Dataset, load_tokenizer
from lib.evaluate import EvalSet, frontier_rows
from lib.extension import find
from lib.io import BadInput, atomic_write, open_user_file

ORANGE, BLUE = "#d95f02", "#1b6ca8"  # pi_theta and pi_ref
TABLE = {  # the column of each metric in results.json
    "beta": "beta", "kl": "KL", "optimal_kl": "optimal KL", "gain": "gain", "reward": "reward",
    "optimal_reward": "optimal reward", "p_positive": "P(positive)", "win_rate": "win rate",
    "length": "length", "pair_accuracy": "accuracy", "reward_slope": "slope", "reward_r2": "R2",
    "fraction_of_optimal": "fraction",
}  # fmt: skip


def results(cfg, dataset: Dataset, eval_set: EvalSet, tokens, runs: dict) -> dict:
    """What was measured, as the rows of results.json. runs: {beta: (policy, evaluation)}."""
    known, tokenizer = dataset.reward is not None, load_tokenizer(tokens)
    first = {"texts": eval_set.texts, "rewards": eval_set.rewards[:, 0] if known else None}
    shown = [first, *(evaluation for _, evaluation in runs.values())]
    samples = []
    for i, x in enumerate(dataset.eval_prompts[:12]):
        rewards = [each["rewards"][i].item() if known else None for each in shown]
        texts = [each["texts"][i] for each in shown]
        samples.append({"prompt": tokenizer.decode(x), "texts": texts, "rewards": rewards})
    return {
        "method": cfg.loss.split(":")[-1] if ":" in cfg.loss else cfg.loss.upper(),
        "title": ", ".join([Path(cfg.data).name, *[f"{cfg.labels} labels"] * known]),
        "reference": eval_set.about,
        "points": [evaluation["point"] for _, evaluation in runs.values()],
        "frontier": frontier_rows(eval_set.rewards) if known else [],
        "columns": ["pi_ref", *(f"beta {beta:g}" for beta in runs)],
        "samples": samples,
        "curves": {f"{beta:g}": policy["curves"] for beta, (policy, _) in runs.items()},
    }


def write_report(out: Path, results: dict):
    """Write results.json, figure.png, and what beyond/page.py makes of them."""
    plain = json.loads(json.dumps(results, default=str), parse_constant=lambda name: None)  # no NaN
    atomic_write(out / "results.json", json.dumps(plain, indent=1).encode())
    draw_frontier(plain).savefig(out / "figure.png", dpi=120)
    find("write_page", "beyond.page")(out, plain)


def draw_frontier(results: dict) -> Figure:
    """Gain in reward against KL, with the optimum. If r* is unknown: pair accuracy."""
    figure = Figure((8, 5), layout="constrained")
    ax, points, known = figure.subplots(), results["points"], bool(results["frontier"])
    name, origin, ylabel = "pair_accuracy", 0.5, "accuracy on held-out pairs"
    if known:
        name, origin, ylabel = "gain", 0, r"gain in true reward over $\pi_{ref}$, nats"
        draw_optimum(ax, results, 1.15 * max(p["kl"] for p in points))
    columns = [[p.get(n) or 0 for p in points] for n in ("kl", name, "kl_se", name + "_se")]
    kl, y, kl_se, y_se = np.array(columns)
    label = f"{results['method']}, ±2 standard errors"
    ax.errorbar(kl, y, 2 * y_se, 2 * kl_se, "o", color=ORANGE, label=label)
    for p in points:
        ax.annotate(rf"  $\beta$ = {p['beta']:g}", (p["kl"], p[name]), va="top")
    ax.plot(0, origin, "D", color=BLUE, label=r"$\pi_{ref}$")
    xlabel = r"KL($\pi_\theta$, $\pi_{ref}$), nats per response"
    ax.set(xlabel=xlabel, ylabel=ylabel, title=results["title"])
    ax.legend(loc="lower right", framealpha=1)
    return figure


def draw_optimum(ax, results: dict, right: float):
    """The optimal frontier, the region where it cannot be estimated, and each beta's optimum."""
    base = results["reference"]["reward"]
    rows = [(f["kl"], f["reward"] - base) for f in results["frontier"] if f["reliable"]]
    kl, gain = np.transpose([(0, 0), *rows])
    ax.plot(kl, gain, color="0.3", label="optimum of all policies (Eq. 4)")
    if kl[-1] < right:
        ax.axvspan(kl[-1], right, color="0.93", label="optimum cannot be estimated here")
    for p in results["points"]:
        if p["optimal_kl"] is not None:
            where = p["optimal_kl"], p["optimal_reward"] - base
            ax.plot(*where, "o", mfc="none", mec=ORANGE, ms=11)
    ax.plot([], [], "o", mfc="none", mec=ORANGE, ms=11, label=r"optimum at the same $\beta$")
    ax.set_xlim(-0.03 * right, right)


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
        share = low if low == high else f"{low} to {high}"
        table.append(f"{results['method']} attains {share} of the largest possible gain at its KL.")
    if not results["frontier"]:
        for p in points:
            low, high = wilson_interval(p["pair_accuracy"], p["pairs"])
            what = f"held-out accuracy {p['pair_accuracy']:.2f} of {p['pairs']} pairs"
            table.append(f"beta {p['beta']:g}: {what}, 95 % interval {low:.2f} to {high:.2f}")
    return "\n".join(table)


def wilson_interval(p: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion p that was seen in n cases (Wilson 1927)."""
    z2 = 1.96**2
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (p + z2 / (2 * n) - half) / (1 + z2 / n), (p + z2 / (2 * n) + half) / (1 + z2 / n)


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    try:
        with open_user_file(folder / "results.json", "the results of a run"):
            loaded = json.loads((folder / "results.json").read_text("utf-8"))
            write_report(folder, loaded)
            print(summary(loaded))
    except BadInput as e:
        sys.exit(f"lib.report: {e}")
