"""What a run shows: a figure, samples before and after, and the table that is printed."""
import html
import io
import json
import os
import textwrap
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import numpy as np
from torch import Tensor

from kit.files import cache, write

THETA, REF = "#d95f02", "#1b6ca8"      # one colour for pi_theta and one for pi_ref, here and in the notebook
ORANGE, BLUE = "217,95,2", "27,108,168"                 # the same, for a page
Cells = list[list[tuple[str, float | None]]]            # for each prompt what each policy made of it, and its reward if known


def write_report(out: Path, results: dict, cells: Cells, prompts: list[str],
                 sentiment: Callable[[list[str]], Tensor] | None, curves: list[dict[str, Tensor]]):
    """results.json, figure.png, and samples as text and as a page; sentiment gives words their reward, curves are each run's."""
    config = results["config"]
    labels = f"{config['labels']} labels, " if results["frontier"] else ""
    title = f"{config['data']}, {labels}{results['labels']['pairs']:,} pairs, seed {config['seed']}"
    names = ["pi_ref", *(f"beta {p['beta']:g}" for p in results["points"])]
    write(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write(out / "samples.txt", samples_text(names, prompts, cells).encode())
    write(out / "samples.html", samples_html(title, names, prompts, cells, sentiment).encode())
    write(out / "figure.png", draw_figure(results, curves, title))


# ----------------------------------------------------------------------------- the figure

def new_figure(width: float, height: float):
    """An empty figure, drawn without a screen. matplotlib is imported where it is used, as it takes a second."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache()))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.figure(figsize=(width, height), layout="constrained")


def png(fig, dpi: int = 90) -> bytes:
    from matplotlib import pyplot
    fig.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    pyplot.close(fig)
    return buffer.getvalue()


def draw_figure(results: dict, curves: list[dict[str, Tensor]], title: str) -> bytes:
    """A PNG: reward against KL, with the optimal curve, theory's place for each beta and DPO's (for one's own data, whose
    reward nobody knows, accuracy against KL); beside it each run's training, step by step."""
    fig = new_figure(13, 5.2)
    grid = fig.add_gridspec(3, 3, width_ratios=(2.5, 1, 1))
    ax, points = fig.add_subplot(grid[:, 0]), results["points"]
    if results["frontier"]:
        draw_frontier(ax, results)
    else:
        ax.plot([p["kl"] for p in points], [p["pair_accuracy"] for p in points], "o", color=THETA, label="DPO")
        ax.plot(0, 0.5, "D", color=REF, ms=8, label=r"$\pi_\mathrm{ref}$")
        ax.set_ylabel("held-out pairs that the implicit reward orders as labelled")
        ax.margins(x=0.15)
    for p in points:
        ax.annotate(f"$\\beta$ = {p['beta']:g}", (p["kl"], p.get("reward", p["pair_accuracy"])), xytext=(8, -12),
                    textcoords="offset points")
    ax.set(xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response", title=title)
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    panels = [("loss, nats", ["loss"]), ("accuracy on pairs", ["accuracy"]),
              (r"$\hat r$ of $y_w$ (solid), $y_l$ (dashed)", ["r_hat_w", "r_hat_l"]), ("margin of the two", ["margin"]),
              (r"$\log\pi_\theta$ of $y_w$ (solid), $y_l$", ["pi_theta_w", "pi_theta_l"]), ("KL so far, nats", ["kl"])]
    for i, (label, names) in enumerate(panels):
        small = fig.add_subplot(grid[i // 2, 1 + i % 2])
        for p, curve, alpha, width in zip(points, curves, np.linspace(1, 0.4, len(points)), np.linspace(1.8, 0.8, len(points))):
            for name, style in zip(names, ("-", "--")):
                values = curve[name].numpy()
                window = 1 if name == "kl" else max(1, len(values) // 20)               # a running mean
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                steps = curve["kl_step"] if name == "kl" else np.arange(len(smooth)) + window
                small.plot(steps, smooth, style, color=THETA, alpha=alpha, lw=width,
                           label=f"$\\beta$ = {p['beta']:g}" if name == names[0] else None)
        small.set_title(label, fontsize="small")
        small.tick_params(labelsize="x-small", labelbottom=i > 3)
        if i > 3:
            small.set_xlabel("step", fontsize="small")
    fig.axes[1].legend(frameon=False, fontsize="x-small")
    return png(fig, 110)


def draw_frontier(ax, results: dict):
    kl, reward, trusted = (np.array([f[name] for f in results["frontier"]]) for name in ("kl", "reward", "trusted"))
    n, points, r_ref = int(trusted.sum()), results["points"], results["reference"]["reward"]
    right, top = (max(p[name] for p in points) for name in ("kl", "reward"))
    ax.plot([0, *kl[:n]], [r_ref, *reward[:n]], color="0.25", label="the best of all policies (Eq. 4)")
    if n == 0 or kl[n - 1] < 1.15 * right:
        ax.plot(kl[max(n - 1, 0):], reward[max(n - 1, 0):], ":", color="0.25",
                label=f"beyond what {results['config']['samples']} samples a prompt can tell")
    ax.plot(*zip(*[(b["kl_bound"], b["reward"]) for b in results["best_of_n"]]), "s-", color="0.6", ms=4, lw=1,
            label="best of N, at an upper bound on its KL")
    if predicted := [p for p in points if p["optimal_kl"] is not None]:
        ax.plot([p["optimal_kl"] for p in predicted], [p["optimal_reward"] for p in predicted], "o", mfc="white", mec=THETA,
                ms=10, label="where theory puts each $\\beta$")
    ax.errorbar([p["kl"] for p in points], [p["reward"] for p in points], yerr=[2 * p["reward_se"] for p in points],
                xerr=[2 * p["kl_se"] for p in points], fmt="o", color=THETA, ms=5, label="DPO, with two standard errors")
    ax.plot(0, r_ref, "D", color=REF, ms=8, label=r"$\pi_\mathrm{ref}$")
    ax.set_xlim(-0.04 * right, 1.15 * right)
    rise = max(top - r_ref, 0.1)
    ax.set_ylim(r_ref - 0.15 * rise, r_ref + 1.35 * rise)
    ax.set_ylabel("mean true reward, nats")


# ----------------------------------------------------------------------------- samples

def samples_text(names: list[str], prompts: list[str], cells: Cells, width: int = 38) -> str:
    """Side by side, a column for each policy: the reward where it is known, then the text."""
    def row(values) -> str:
        return " | ".join(f"{value:<{width}}" for value in values).rstrip()
    lines = [row(names), "-+-".join("-" * width for _ in names)]
    for prompt, texts in zip(prompts, cells):
        lines.append(f"{prompt} ...")
        columns = [textwrap.wrap((f"{signed(r)} " if r is not None else "") + rest(text, prompt), width) for text, r in texts]
        lines += [*map(row, zip_longest(*columns, fillvalue="")), ""]
    return "\n".join(lines)


def samples_html(title: str, names: list[str], prompts: list[str], cells: Cells,
                 sentiment: Callable[[list[str]], Tensor] | None) -> str:
    """The same as a page, each word on a ground of its own reward: blue above zero, orange below."""
    def marked(text: str) -> str:
        words = text.split()
        worth = sentiment([*words, ""]).tolist() if sentiment else [0.0] * (len(words) + 1)
        return " ".join(word if abs(v) < 0.05 else
                        f'<span style="background:rgba({BLUE if v > 0 else ORANGE},{min(0.6, abs(v) / 3):.2f})">{word}</span>'
                        for word, v in zip(map(html.escape, words), (v - worth[-1] for v in worth)))

    def cell(text: str, r: float | None, prompt: str) -> str:
        return f"<td>{f'<b>{signed(r)}</b> ' if r is not None else ''}{marked(rest(text, prompt))}</td>"
    rows = [f"<tr><th>{marked(prompt)} ...</th>{''.join(cell(text, r, prompt) for text, r in texts)}</tr>"
            for prompt, texts in zip(prompts, cells)]
    return "\n".join((
        "<!doctype html><meta charset=utf-8>", f"<title>{html.escape(title)}</title>",
        "<style>body{font:15px/1.5 serif;margin:2em}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.5em;"
        "vertical-align:top;text-align:left;font-weight:normal}b{font-family:monospace}</style>",
        f"<h1>{html.escape(title)}</h1>", "<p>What each policy made of the same prompt" +
        "; in bold the true reward of both together, in nats" * bool(sentiment) + ".</p>", "<table>",
        f"<tr><th>prompt</th>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>", *rows, "</table>", ""))


def signed(r: float) -> str:
    return f"{round(r, 2) + 0.0:+.2f}"              # which is never -0.00


def rest(text: str, prompt: str) -> str:
    """What follows the prompt, on one line."""
    return " ".join(text.removeprefix(prompt).split())


# ----------------------------------------------------------------------------- the table

def summary(results: dict) -> str:
    """The table of the run, and in a sentence whether what the paper predicts was seen."""
    points, ref, known = results["points"], results["reference"], bool(results["frontier"])
    columns = {"beta": "g", "kl": ".2f", "length": ".1f"} | (
        {"reward": ".2f", "optimal_reward": ".2f", "optimal_kl": ".2f", "win_rate": ".2f", "fraction_of_optimal": ".2f"} if known
        else {"r_hat_w": ".2f", "r_hat_l": ".2f", "margin": ".2f"}) | {"pair_accuracy": ".3f"}
    rows = [[format(p[name], form) if p[name] is not None else "-" for name, form in columns.items()] for p in points]
    lines = ["  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, columns)) for row in ([*columns], *rows)]
    counted = ", ".join(f"{n:,} {what}" for what, n in results["labels"].items())
    lines.insert(0, f"pi_ref: {ref['nats_per_byte']:.3f} nats per byte on unseen texts" +
                 (f", reward {ref['reward']:.2f}" if known else "") + f"; preferences: {counted}")
    ordered = sorted(points, key=lambda p: p["beta"])
    falls = all(a["kl"] > b["kl"] for a, b in zip(ordered, ordered[1:]))
    direction = f"KL falls as beta rises: {'seen' if falls else 'not seen'}. " * (len(points) > 1)
    if not known:
        best = max(p["pair_accuracy"] for p in points)
        return "\n".join((*lines, direction + f"Held-out pairs ordered as labelled: {best:.0%}."))
    fractions = [p["fraction_of_optimal"] for p in points if p["fraction_of_optimal"] is not None]
    said = f"No KL is within what {results['config']['samples']} samples can tell of the optimum."
    if fractions:
        least_and_most = dict.fromkeys(f"{fraction:.0%}" for fraction in (min(fractions), max(fractions)))
        said = f"Of the gain that is possible at its KL, DPO reached {' to '.join(least_and_most)}."
    return "\n".join((*lines, direction + said))
