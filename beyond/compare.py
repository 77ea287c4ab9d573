"""The methods of losses.py and pairs.py compared with DPO, from one pi_ref and the same prompts.

    python -m beyond.compare [most of train.py's flags] [--methods dpo ipo ...]
    python -m beyond.compare --summary DIR DIR ...     # table and figure for finished runs

The defaults are train.py's, except on the toy dataset: 375 fine-tuning steps, 3,000 prompts, 4
completions per prompt and 48 samples of pi_theta per evaluation prompt. Each method is run at two
settings, for instance two betas. Methods differ in the loss and its learning rate, and some also in
the pairs.

Learning rates: DPO's follow train.py's rule. Those of the other losses were set by the size of the
loss's gradient. On seed 100, which is not reported, dpo to dpop (in the order of METHODS) trained
stably with them; the methods after dpop were not run on that seed. `held_out_loss` in results.json
and `--times` let you tune the learning rates without the true reward.
"""

import dataclasses
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import dpo
import train
from beyond import common, losses, pairs
from beyond.pairs import Ids, Reward, Sample, Score
from data import Dataset, label_pairs
from lib.cli import flag
from lib.inference import compute_logps
from lib.checkpoint import load_gpt
from lib.io import BadInput
from beyond.page import ORANGE
from lib.stage import Stage

# ------------------------------------------------- where pairs come from


@dataclass(frozen=True)
class Round:
    """What a source of pairs may use. The prompts are those of `given`."""

    given: dpo.Preferences
    prompts: list[Ids]
    sample: Sample  # from the current pi_theta
    score: Score  # log pi_ref
    reward: Reward  # r*
    K: int  # completions per prompt
    beta: float
    seed: int


def as_given(round: Round) -> dpo.Preferences:
    return round.given


def mismatched(round: Round) -> dpo.Preferences:
    """For each prompt, one response to another prompt, for KTO's reference point."""
    return losses.with_mismatched(round.given, round.score, random.Random(round.seed))


def with_samples(round: Round) -> dpo.Preferences:
    """One sample of pi_theta for each prompt, for KTO's reference point."""
    return losses.with_samples(round.given, round.sample, round.score)


def ranked(round: Round) -> dpo.Preferences:
    """The given completions, with the pairs of one ranking for each prompt."""
    given = round.given
    generator = torch.Generator().manual_seed(round.seed)
    r = round.reward(given.ids, given.mask)
    order, weight = pairs.rankings(r, given.prompt, generator)
    return dataclasses.replace(given, pairs=order, weight=weight)


def online(round: Round) -> dpo.Preferences:
    """All pairs of fresh samples of pi_theta, with Bradley-Terry labels."""
    args = round.K, round.sample, round.reward, round.score, round.seed
    return pairs.online(round.prompts, *args)


def iterative(round: Round) -> dpo.Preferences:
    """The best and the worst of eight samples of pi_theta."""
    args = 8, round.sample, round.reward, round.score, round.seed, "best-worst"
    return pairs.online(round.prompts, *args)


def rso(round: Round) -> dpo.Preferences:
    """All pairs of three samples of pi_ref, accepted from sixteen by RSO's Algorithm 1."""
    made = pairs.generate(round.prompts, 16, round.sample, round.reward)
    accepted, r = pairs.rso(*made, round.beta, 3, random.Random(round.seed))
    preferences = label_pairs(accepted, r, "bt", round.seed)
    return preferences


# ------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    loss: Callable
    hyper: dict[str, tuple[float, float] | float]  # a tuple has one value per setting
    lrs: tuple[float, float]  # per setting, in units of --lr
    why: str  # these hyperparameters
    source: Callable[[Round], dpo.Preferences] = as_given
    rounds: int = 1  # each on its share of the prompts

    def settings(self) -> list[dict[str, float]]:
        return [
            {name: v[i] if isinstance(v, tuple) else v for name, v in self.hyper.items()}
            for i in range(len(self.lrs))
        ]


BETA = (1.0, 0.5)
NO_REFERENCE = ("orpo", "simpo")
FRESH = (online, iterative, rso)
METHODS = {
    "dpo": Method(dpo.dpo, {"beta": BETA}, (1, 2.4), "the baseline, at two of train.py's betas"),
    "cdpo": Method(
        losses.cdpo,
        {"beta": BETA, "epsilon": 0.1},
        (1, 2.4),
        "assumes that a tenth of the labels are flipped; none are",
    ),
    "robust": Method(losses.robust, {"beta": BETA, "epsilon": 0.1}, (0.8, 1.9), "as cdpo"),
    "ipo": Method(
        losses.ipo,
        {"beta": (0.25, 0.125)},
        (0.12, 0.074),
        "beta / 4: where reward gaps are small, its optimum is Eq. 4's",
    ),
    "hinge": Method(losses.hinge, {"beta": BETA}, (1, 2.4), "DPO's margin"),
    "kto": Method(
        losses.kto,
        {"beta": BETA},
        (4, 9.5),
        "equal weights: as many desirable as undesirable responses",
        mismatched,
    ),
    "kto_samples": Method(
        losses.kto,
        {"beta": BETA},
        (4, 9.5),
        "as kto, with y' from pi_theta, drawn again in each of 8 rounds",
        with_samples,
        8,
    ),
    "sppo_hard": Method(
        losses.sppo_hard,
        {"beta": (0.25, 0.125)},
        (0.06, 0.04),
        "beta / 4: where reward gaps are small, its optimum is that of Eq. 4",
    ),
    "sppo": Method(losses.sppo, {"beta": (0.25, 0.125)}, (0.1, 0.06), "beta / 4, as sppo_hard"),
    "orpo": Method(
        losses.orpo,
        {"beta": (0.5, 2.0)},
        (2.5, 1.2),
        "the weight of the odds-ratio term, on either side of 1",
    ),
    "simpo": Method(
        losses.simpo,
        {"beta": (7.0, 3.5), "gamma": 0.5},
        (0.6, 1),
        "7 x DPO's, as responses have about 7 tokens",
    ),
    "dpop": Method(
        losses.dpop,
        {"beta": BETA, "lam": 1.0},
        (0.4, 0.8),
        "each nat by which log pi(y_w) falls lowers the margin by beta more nats",
    ),
    "r_dpo": Method(
        losses.r_dpo,
        {"beta": BETA, "alpha": 0.05},
        (1, 2.4),
        "0.05 nats per token, although labels do not depend on length",
    ),
    "ld_dpo": Method(
        losses.ld_dpo,
        {"beta": BETA, "alpha": 0.5},
        (1, 2.4),
        "tokens beyond the shorter response count half",
    ),
    "plackett_luce": Method(losses.plackett_luce, {"beta": BETA}, (0.2, 0.4), "DPO's", ranked),
    "online": Method(
        dpo.dpo, {"beta": BETA}, (1, 2.4), "DPO's; four completions per prompt", online, 4
    ),
    "iterative": Method(
        dpo.dpo,
        {"beta": (4.0, 2.0)},
        (0.1, 0.2),
        "4 x DPO's: best and worst of 8 are far apart, and labels certain",
        iterative,
        3,
    ),
    "rso": Method(dpo.dpo, {"beta": BETA}, (1, 2.4), "DPO's, for acceptance and for training", rso),
}


@dataclass(frozen=True)
class Config(train.Config):
    """train.py's settings with other defaults, so that all methods run in three to ten minutes."""

    loss: str = "dpo"  # no flag, like the next three
    loss_args: tuple = ()
    pairs: str = "all"
    beta: tuple = ()
    sft_steps: int | None = flag(375, "fine-tuning steps", 0)
    prompts: int = flag(3_000, "prompts to collect preferences on", 8)
    completions: int = flag(4, "completions per prompt", 2)
    batch_size: int = flag(32, "prompts per DPO step", 1)
    eval_samples: int = flag(48, "samples of pi_theta per evaluation prompt", 1)
    methods: tuple = flag(tuple(METHODS), "methods to run", choices=tuple(METHODS))
    times: float = flag(1.0, "factor for the learning rate of every method", 1e-6)


# ------------------------------------------------- training


def train_method(
    method: Method,
    hyper: dict[str, float],
    how: train.Training,
    reference: dict,
    preferences: dpo.Preferences,
    dataset: Dataset,
    K: int,
    device: torch.device,
) -> dict:
    """Train one method at one setting. Returns its checkpoint, with the mean z_0 of KTO.

    K: completions per prompt, for methods that sample.
    """
    policy, z_0 = reference, []
    loss = partial(method.loss, **hyper)
    if method.loss is losses.kto:
        loss = partial(recorded, loss=loss, z_0=z_0)
    P = int(preferences.prompt.max()) + 1
    for k in range(min(method.rounds, P)):
        given = common.subset(preferences, torch.arange(k, P, method.rounds))
        round_seed = 1000 * how.seed + k
        round = make_round(given, policy, reference, dataset, K, hyper["beta"], round_seed, device)
        policy = train.train_dpo(policy, method.source(round), loss, how, None, device)
    return policy | {"z_0": float(np.mean(z_0)) if z_0 else None}


def make_round(given, policy, reference, dataset, K, beta, seed, device) -> Round:
    sample = common.sampler(policy, seed, "sampling completions", device)
    score, reward = common.scorer(reference, device), common.true_reward(dataset, reference)
    return Round(given, common.prompts_of(given), sample, score, reward, K, beta, seed)


def recorded(logps: Tensor, batch: dpo.Preferences, loss: dpo.Loss, z_0: list[float]):
    """A loss that appends KTO's reference point to `z_0`."""
    z_0.append(losses.reference_point(logps, batch).item())
    return loss(logps, batch)


def held_out_loss(
    policy: dict,
    method: Method,
    hyper: dict[str, float],
    reference: dict,
    held_out: dpo.Preferences,
    dataset: Dataset,
    device: torch.device,
) -> float:
    """The mean loss on held-out pairs, for choosing learning rates without the true reward."""
    if method.source not in FRESH:
        args = policy, reference, dataset, 0, hyper["beta"], 0, device
        held_out = method.source(make_round(held_out, *args))
    logps = compute_logps(load_gpt(policy, device), held_out.ids, held_out.mask)
    values = method.loss(logps, held_out, **hyper)[0]
    return (dpo.mean_weights(held_out.weight) * values).sum().item()


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """Each method at each setting. Returns the content of results.json."""
    e = common.prepare(cfg, stage, device)
    points = []
    for name in cfg.methods:
        method = METHODS[name]
        for i, (hyper, lr) in enumerate(zip(method.settings(), method.lrs, strict=True)):
            how = common.training(cfg, lr * cfg.times)
            args = e.reference, e.preferences, e.dataset, cfg.completions, device
            policy = stage(f"{name}-{i}", train_method, method, hyper, how, *args)
            held = e.reference, e.eval_set.pairs, e.dataset, device
            loss = stage(f"held-out-{name}-{i}", held_out_loss, policy, method, hyper, *held)
            point = common.evaluated(stage, f"{name}-{i}", e, policy)
            points.append((name, hyper, how.lr, policy, loss, point))
    rows = [
        {"method": name, "hyper": hyper, "lr": lr, "held_out_loss": loss, "z_0": policy["z_0"]}
        | common.kept(point)
        for name, hyper, lr, policy, loss, point in points
    ]
    return common.about(e) | {"points": rows}


# ------------------------------------------------- the table and the figure

COLUMNS = {
    "gain": "gain",
    "kl": "KL",
    "p_positive": "P(positive)",
    "length": "length",
    "win_rate": "win rate",
    "fraction_of_optimal": "fraction",
    "r_hat_w": "change in log pi(y_w)",
    "r_hat_l": "change in log pi(y_l)",
    "z_0": "z_0",
}


def table(runs: list[dict]) -> str:
    """Markdown: each method at each setting, and the mean fraction of each next to DPO's.

    Mean and standard deviation over seeds. Raises BadInput if the methods differ.
    """
    named = [[(p["method"], p["hyper"]) for p in run["points"]] for run in runs]
    if any(each != named[0] for each in named):
        raise BadInput("these runs do not have the same methods at the same settings")
    head = ["method", "at", *COLUMNS.values()]
    rows = [
        ["pi_ref", "", *reference_cells(runs)],
        ["optimum", "beta 1", *optimum_cells(runs, 1.0)],
    ]
    rows.append(["optimum", "beta 0.5", *optimum_cells(runs, 0.5)])
    for points in zip(*(run["points"] for run in runs), strict=True):
        name = points[0]["method"] + r"\*" * (points[0]["method"] in NO_REFERENCE)
        at = ", ".join(f"{key} {value:g}" for key, value in points[0]["hyper"].items())
        rows.append([name, at, *(common.cell([p[key] for p in points]) for key in COLUMNS)])
    every = common.markdown(head, rows)
    head = ["method", "fraction, mean over settings", "DPO minus this, 95% CI", "DPO above this"]
    return f"{every}\n\n{common.markdown(head, fraction_rows(runs))}"


def with_fraction(runs: list[dict]) -> dict[str, list[list[dict]]]:
    """For each method the points of all seeds, at each setting where every seed has a fraction."""
    found = {}
    for points in zip(*(run["points"] for run in runs), strict=True):
        if all(p["fraction_of_optimal"] is not None for p in points):
            found.setdefault(points[0]["method"], []).append(points)
    return found


def mean_fractions(settings: list[list[dict]]) -> np.ndarray:
    """The mean over settings of the fraction of each seed."""
    return np.mean([[p["fraction_of_optimal"] for p in points] for points in settings], 0)


def fraction_rows(runs: list[dict]) -> list[list[str]]:
    """The mean fraction of each method, and DPO's minus it; the highest comes first."""
    means = {name: mean_fractions(found) for name, found in with_fraction(runs).items()}
    rows = []
    for name, mean in sorted(means.items(), key=lambda item: -item[1].mean()):
        row = [name, common.cell(mean.tolist())]
        if "dpo" in means and name != "dpo":
            differences = (means["dpo"] - mean).tolist()
            row += [common.interval_cell(differences), common.verdict(differences)]
        rows.append([*row, *[""] * (4 - len(row))])
    return rows


def reference_cells(runs: list[dict]) -> list[str]:
    fixed = {"gain": 0.0, "kl": 0.0, "win_rate": 0.5, "r_hat_w": 0.0, "r_hat_l": 0.0}
    rows = [fixed | run["reference"] for run in runs]
    return [common.cell([row.get(key) for row in rows]) for key in COLUMNS]


def optimum_cells(runs: list[dict], beta: float) -> list[str]:
    """The optimum's row whose beta is closest to this one."""
    rows = [min(run["optimum"], key=lambda row: abs(row["beta"] - beta)) for run in runs]
    if not all(row["reliable"] for row in rows):
        return ["-"] * len(COLUMNS)
    return [common.cell([row.get(key) for row in rows]) for key in COLUMNS]


def family(name: str) -> str:
    if name in NO_REFERENCE:
        return "no reference"
    return "fresh pairs" if METHODS[name].source in FRESH else "given pairs"


def draw(runs: list[dict]) -> Figure:
    """The fraction of the attainable gain at two settings, sorted within families of methods.

    The mean over seeds is labelled with its KL. Each seed is a small point. A setting
    is left out if the optimum cannot be estimated for one of the seeds.
    """
    found = with_fraction(runs)
    order = sorted(found, key=lambda name: mean_fractions(found[name]).mean())
    order.sort(key=lambda name: ("no reference", "fresh pairs", "given pairs").index(family(name)))
    figure = Figure((8, 0.34 * len(order) + 1.6), layout="constrained")
    ax = figure.subplots()
    for y, name in enumerate(order):
        color = ORANGE if name == "dpo" else "0.25"
        means = [mean_fractions([points]).mean() for points in found[name]]
        ax.plot(means, [y] * len(means), "-", color="0.8", zorder=0)
        for points, mean in zip(found[name], means, strict=True):
            first = points[0]["hyper"] == METHODS[name].settings()[0]
            if len(runs) > 1:
                fractions = [p["fraction_of_optimal"] for p in points]
                ax.plot(fractions, [y] * len(runs), ".", color=color, ms=3, alpha=0.5)
            ax.plot(mean, y, "o", color=color, mfc=color if first else "white")
            style = {"xytext": (0, 5 if first else -11), "textcoords": "offset points"}
            kl = np.mean([p["kl"] for p in points])
            ax.annotate(f"{kl:.1f}", (mean, y), color="0.5", fontsize=7, ha="center", **style)
        if y + 1 == len(order) or family(order[y + 1]) != family(name):
            style = {"transform": ax.get_yaxis_transform(), "style": "italic"}
            ax.text(0.01, y + 0.55, family(name), **style)
            ax.axhline(y + 0.5, color="0.9")
    ax.axvline(1, color="0.3", label="optimum over all policies (Eq. 4)")
    for fill, label in (("0.25", "first setting (KL above)"), ("white", "second (KL below)")):
        ax.plot([], [], "o", color="0.25", mfc=fill, label=label)
    ax.set_yticks(range(len(order)), order)
    ax.set(xlabel="gain divided by the largest gain at the same KL (small numbers: KL, nats)")
    ax.set(ylim=(-0.7, len(order) + 0.1), title=common.title(runs))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(argv: list[str]) -> int:
    return common.command("compare.py", __doc__, Config, train.PRESETS, argv, run, table, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
