"""The figures of derive.ipynb. Nothing in the derivation depends on them."""

import io
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, display
from PIL import Image as PillowImage

ORANGE, BLUE = "#d95f02", "#1b6ca8"  # pi_theta and pi_ref
BLACK, GREY = "#222222", "#8a8a8a"  # pi*, and the rest
PI_REF, PI_STAR, PI_THETA = r"$\pi_{\mathrm{ref}}$", r"$\pi^{\ast}$", r"$\pi_\theta$"
KL_LABEL = r"KL$(\pi, \pi_{\mathrm{ref}})$, nats"
LINES = ("-", "--", ":", "-.")
plt.rcParams.update(
    {
        "figure.dpi": 80,
        "font.size": 13,
        "axes.titlesize": 13,
        "legend.fontsize": 12,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2,
        "figure.constrained_layout.use": True,
    }
)


def show_figure():
    """Display the current figure with few colours, which keeps the notebook small."""
    png, small = io.BytesIO(), io.BytesIO()
    plt.savefig(png, format="png", bbox_inches="tight")
    plt.close()
    image = PillowImage.open(png).convert("RGB")
    image = image.quantize(64, PillowImage.Quantize.MAXCOVERAGE, dither=PillowImage.Dither.NONE)
    image.save(small, format="png", optimize=True)
    display(Image(data=small.getvalue()))


def bars(ax, names, **series):
    """Side-by-side bars. series: label=(values, colour, hatch)."""
    width = 0.8 / len(series)
    for i, (label, (values, colour, hatch)) in enumerate(series.items()):
        at = torch.arange(len(values)) + (i - (len(series) - 1) / 2) * width
        face = "white" if hatch else colour
        ax.bar(at, values, width, label=label, facecolor=face, edgecolor=colour, hatch=hatch)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set_xticks(range(len(names)), names, rotation=20)
    ax.legend()


def plot_world(names, ref_logp, r):
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.9))
    bars(left, names, **{PI_REF: (ref_logp.exp(), BLUE, "//")})
    bars(right, names, **{"$r$": (r, BLACK, "")})
    left.set_title(r"probability $\pi_{\mathrm{ref}}(y|x)$")
    right.set_title("reward $r(x, y)$, nats")
    show_figure()


def plot_reward_model(names, p, d, losses, gaps):
    _, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    left.imshow(p, cmap="Greys", vmin=0, vmax=1.5)
    for i in range(len(p)):
        for j in range(len(p)):
            left.text(j, i, f"{p[i, j]:.2f}", ha="center", va="center", fontsize=11)
    left.set_xticks(range(len(p)), names, rotation=35, ha="right")
    left.set_yticks(range(len(p)), names)
    left.set_title("P(row preferred to column)")
    for k, style in enumerate(LINES):
        right.plot(d, losses[:, k], BLACK, ls=style, label=f"against {names[k + 1]}")
    right.plot(gaps, losses.min(0).values, "s", color=BLACK, mfc="white", label="true gap")
    right.set(xlabel="gap $d$ of the reward model", title="expected loss (Eq. 2)", ylim=(0, 2.6))
    right.legend(ncol=2)
    show_figure()


def scatter_policies(ax, kl, reward, ref_reward):
    ax.plot(kl, reward, ".", ms=4, color=GREY, label="random policies")
    ax.plot(0, ref_reward, "D", color=BLUE, clip_on=False, label=PI_REF)
    ax.set(xlabel=KL_LABEL, xlim=(0, 2.6), ylabel="mean reward, nats", ylim=(-1.6, 1.6))


def plot_optimum(names, ref_net, star_net, policies, ref_reward, edge, star, beta):
    _, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.8))
    bars(left, names, **{PI_REF: (ref_net, BLUE, "//"), PI_STAR: (star_net, BLACK, "")})
    left.set_title("net reward of each response, nats")
    scatter_policies(right, *policies, ref_reward)
    right.plot(*edge, color=BLACK, label=r"optimum for every $\beta$")
    right.axline(star, slope=beta, color=BLACK, lw=1, ls=":", label=rf"slope $\beta = {beta}$")
    right.plot(*star, "*", ms=14, color=BLACK, label=PI_STAR)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show_figure()


def plot_implicit_reward(r, r_hat, shift):
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.axline((0, 0), slope=1, color=GREY, lw=1, label="equal")
    left.axline((0, -shift), slope=1, color=BLACK, lw=1, ls=":", label=r"lower by $\beta \log Z$")
    left.plot(r, r_hat, "*", ms=11, color=BLACK, label="a response")
    left.set(xlabel="$r$", ylabel=r"$\hat r$ of $\pi^{\ast}$", title="rewards, nats")
    right.axline((0, 0), slope=1, color=GREY, lw=1, label="equal")
    differences = ((v[:, None] - v).flatten() for v in (r, r_hat))
    right.plot(*differences, "*", ms=11, color=BLACK, label="a pair")
    right.set(xlabel="$r_1 - r_2$", ylabel=r"$\hat r_1 - \hat r_2$", title="differences, nats")
    left.legend()
    right.legend()
    show_figure()


def plot_loss(h, losses, regret, excess, ref_regret, ref_excess):
    _, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6))
    for (beta, values), style in zip(losses.items(), LINES, strict=False):
        left.plot(h, values, ORANGE, ls=style, label=rf"$\beta = {beta}$")
    left.plot(0, math.log(2), "D", color=BLUE, label=rf"$\ln 2$ at {PI_REF}")
    left.set(xlabel="$h$, nats", title="loss of one pair", ylim=(0, 4))
    right.plot(regret, excess, ".", ms=4, color=GREY, label="random policies")
    right.plot(ref_regret, ref_excess, "D", color=BLUE, label=PI_REF)
    right.plot(0, 0, "*", ms=14, color=BLACK, clip_on=False, label=PI_STAR)
    right.set(xlabel=r"$J(\pi^{\ast}) - J(\pi)$", xlim=(0, None), ylim=(0, None))
    right.set_title(r"$L(\pi) - L(\pi^{\ast})$")
    left.legend()
    right.set_ylim(-0.02, 2)
    right.legend(loc="upper left")
    show_figure()


def plot_gradient(names, bracket, beta, title):
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    u = torch.linspace(-5, 5, 101)
    left.plot(u, torch.sigmoid(-u), ORANGE, label=r"$\sigma(\hat r_l - \hat r_w)$: Section 4")
    left.plot(u, torch.sigmoid(u), GREY, ls="--", label=r"$\sigma(\hat r_w - \hat r_l)$: App. A.4")
    left.plot(0, 0.5, "D", color=BLUE, label=rf"start, $\pi_\theta =$ {PI_REF}")
    left.set(xlabel=r"margin $u = \hat r_w - \hat r_l$, nats", title="weight", ylim=(0, 1.65))
    steps = {f"margin {u}": beta / (1 + math.exp(u)) * bracket for u in (-2, 0, 2)}
    styles = ((ORANGE, ""), (ORANGE, "//"), (ORANGE, ".."))
    styled = {k: (v, *s) for (k, v), s in zip(steps.items(), styles, strict=True)}
    bars(right, names, **styled)
    right.set_title(title)
    left.legend(loc="upper center")
    show_figure()


def plot_classes(u, v, points):
    _, ax = plt.subplots(figsize=(6.6, 3.9))
    ax.plot(u, v, color=BLACK, lw=2.5, label="Eq. 9 holds: policies")
    for k, (gap, point, p) in enumerate(points):
        ax.axline(
            (0, -gap), slope=1, color=GREY, lw=1, ls="--", label="a class" if k == 0 else None
        )
        ax.plot(*point, "o", color=BLACK, label=r"its policy, $\pi(y_1|x)$" if k == 0 else None)
        ax.text(point[0] + 0.06, point[1] - 0.04, f"{p:.2f}", va="top")
    ax.set(xlim=(-1.6, 1), ylim=(-1.2, 1.3), xlabel="$r(x, y_1)$", ylabel="$r(x, y_2)$")
    ax.set_aspect("equal")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show_figure()


def plot_rankings(labels, probability, share):
    _, ax = plt.subplots(figsize=(10, 3))
    at = range(len(labels))
    ax.barh(at, probability, color="white", edgecolor=BLACK, label="Eq. 18")
    ax.plot(share, at, "|", ms=14, mew=3, color=BLACK, label="share among sorted samples")
    ax.set_yticks(at, labels, fontsize=11)
    ax.invert_yaxis()
    ax.set(title="the six most probable of 120 rankings", xlim=(0, 0.17))
    ax.legend(loc="lower right")
    show_figure()


CORNERS = torch.tensor([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)


def plot_walk(names, paths, heights, ref_logp, star_logp, height):
    _, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), width_ratios=(1.1, 1))
    n = 60
    grid = torch.tensor([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)])
    inside = (grid / n + 1e-4).log().log_softmax(-1).double()
    levels = [0, 0.003, 0.015, 0.04, 0.08, 0.14, 0.22, 0.32, 0.44, 0.58, 0.75, 1, 1.4]
    left.tricontour(
        *(inside.exp() @ CORNERS).T, height(inside), levels, colors=GREY, linewidths=0.7
    )
    left.plot([], [], color=GREY, lw=0.7, label=r"equal $J$")
    left.plot(*CORNERS[[0, 1, 2, 0]].T, color=BLACK, lw=1)
    for name, (x, y), side in zip(names, CORNERS, ("bottom", "top", "top"), strict=True):
        left.text(x, y + (0.03 if side == "bottom" else -0.03), name, ha="center", va=side)
    for (name, path), style in zip(paths.items(), LINES, strict=False):
        left.plot(*(path.exp() @ CORNERS).T, color=ORANGE, ls=style, lw=2.5, label=name)
        right.plot(heights[name], color=ORANGE, ls=style, label=name)
    left.plot(*(ref_logp.exp() @ CORNERS), "D", color=BLUE, label=PI_REF)
    left.plot(*(star_logp.exp() @ CORNERS), "*", ms=14, color=BLACK, label=PI_STAR)
    left.set_aspect("equal")
    left.axis("off")
    left.legend(loc="center left", bbox_to_anchor=(0.78, 0.72), fontsize=11)
    right.set(yscale="log", ylim=(1e-5, 2), xlim=(0, 120), xlabel="step")
    right.set_title(r"$J(\pi^{\ast}) - J(\pi_\theta)$, nats")
    right.legend(fontsize=11)
    show_figure()


def plot_tokens(rows):
    _, axes = plt.subplots(1, len(rows), figsize=(11.5, 3.4), sharey=True)
    for ax, (name, (tokens, values)) in zip(axes, rows.items(), strict=True):
        ax.bar(range(len(values)), values, color=ORANGE, label="one token")
        total = values.sum()
        ax.axhline(total, color=BLACK, ls="--", label=rf"their sum, $\hat r$ = {total:.2f}")
        ax.axhline(0, color=BLACK, lw=0.8)
        ax.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
        ax.set_title(name)
        ax.legend()
    axes[0].set_ylabel(r"$\beta \log \pi_\theta / \pi_{\mathrm{ref}}$, nats")
    show_figure()


def plot_curves(curves, xlabel, ylabel, reference=None, size=(7.5, 3.4), **settings):
    """Curves by label: (x, y, style). reference: label -> height of a horizontal line."""
    _, ax = plt.subplots(figsize=size)
    for label, (x, y, style) in curves.items():
        ax.plot(x, y, label=label, **style)
    heights = reference or {}
    for (label, y), style in zip(heights.items(), LINES[1:], strict=False):
        ax.axhline(y, color=BLUE if PI_REF in label else BLACK, ls=style, lw=1.5, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, **settings)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show_figure()


def plot_experiments(experiments):
    _, axes = plt.subplots(1, len(experiments), figsize=(6 * len(experiments), 4.2), squeeze=False)
    for ax, (name, results) in zip(axes[0], experiments.items(), strict=True):
        points, rows = results["points"], results["optimum"]
        base = results["reference"]["reward"]
        edge = 1.25 * max(point["kl"] for point in points)
        end = rows[-1]["kl"]
        ax.plot(
            [row["kl"] for row in rows],
            [row["reward"] - base for row in rows],
            color=BLACK,
            label=r"optimum for every $\beta$ (Eq. 4)",
        )
        if end < edge:
            ax.axvspan(end, edge, fc="0.9", ec=GREY, label="optimum cannot be estimated")
        ax.plot(
            [point["kl"] for point in points],
            [point["reward"] - base for point in points],
            "o",
            ms=8,
            color=ORANGE,
            label="DPO",
        )
        for point in points:
            at = point["kl"], point["reward"] - base
            ax.annotate(
                rf"$\beta = {point['beta']:g}$", at, (9, -6), textcoords="offset points", va="top"
            )
        ax.plot(0, 0, "D", color=BLUE, clip_on=False, label=PI_REF)
        ax.set(xlabel=KL_LABEL, ylabel=r"gain over $\pi_{\mathrm{ref}}$, nats", title=name)
        ax.set(xlim=(0, edge), ylim=(0, None))
        ax.legend(loc="lower right", fontsize=11)
    show_figure()
