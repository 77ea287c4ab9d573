"""Two experiments behind figure 2: when does PPO with a learned reward gain more than DPO?

    python -m beyond.explain [most of train.py's flags] [--sizes N N ...]
    python -m beyond.explain --summary DIR DIR ...     # verdicts for finished runs

pairs   DPO and PPO trained on preferences for 200, 1,000 and 5,000 prompts. PPO's reward model is
        trained on the same pairs. Prediction (Swamy et al. 2503.01067): PPO leads when pairs are
        few, because a reward is easier to learn than the policy that is optimal for it.
class   PPO with three reward models trained on the same pairs: a GPT; a bag of tokens, which is the
        class of r*; and a bag of 8 groups of tokens, which cannot express r*. Prediction (Shi et
        al. 2505.19770): relative to DPO, the second helps PPO and the third hurts it.

Runs have different KLs. They are compared by the fraction they attain of the largest gain at
their own KL, averaged over --beta. Fractions are unknown where the optimum cannot be estimated.
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import dpo
from beyond import common, figure2
from beyond.pairs import Reward
from beyond.ppo import ValueModel
from dpo import Preferences
from lib.checkpoint import load_gpt
from lib.cli import flag
from lib.io import BadInput
from beyond.page import ORANGE
from lib.stage import Stage

GROUPS = 8  # of tokens, in the reward that cannot express r*
RIDGES = (1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Config(figure2.Config):
    """figure2.py's settings. Each --beta is used for DPO and for PPO."""

    beta: tuple = flag((0.75, 0.46), "weights of the KL penalty, for DPO and PPO", 1e-4)
    ppo_beta: tuple = ()  # no flag, like the next four
    gt_beta: tuple = ()
    methods: tuple = ()
    epochs: int | None = None
    reward_epochs: int = 3
    sft_steps: int | None = flag(500, "fine-tuning steps", 0)
    ref_samples: int = flag(384, "samples of pi_ref per evaluation prompt", 16)
    prompts: int = flag(5_000, "prompts to collect preferences on", 8)
    sizes: tuple = flag((200, 1000, 5000), "prompts whose pairs are used", 8)
    classes: int = flag(1000, "which of --sizes also compares three reward models", 8)


# ------------------------------------------------- rewards that are linear in counts of tokens


def counts(ids: Tensor, mask: Tensor, groups: int) -> Tensor:
    """How often each group of tokens occurs in the responses, (B, groups). Group: id mod groups."""
    return torch.zeros(len(ids), groups).scatter_add_(1, ids % groups, mask.float())


def fit_bag(preferences: Preferences, groups: int, seed: int) -> dict:
    """Weights of the groups that minimise Eq. 2.

    The ridge penalty is chosen on a tenth of the prompts.
    """
    prompts = preferences.prompt.unique()
    prompts = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
    n = max(1, len(prompts) // 10)
    held_out, some = preferences.select(prompts[:n]), preferences.select(prompts[n:])
    fits = [fit_ridge(some, groups, ridge) for ridge in RIDGES]
    best = max(fits, key=lambda weight: bag_accuracy({"bag": weight}, held_out))
    return {"bag": best}


def fit_ridge(preferences: Preferences, groups: int, ridge: float) -> Tensor:
    x = counts(preferences.ids, preferences.mask, groups)
    w, l = preferences.pairs.T
    difference, share = x[w] - x[l], dpo.mean_weights(preferences.weight)
    weight = torch.zeros(groups, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(share * F.logsigmoid(difference @ weight)).sum() + ridge * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def bag_accuracy(model: dict, preferences: Preferences) -> float:
    """The share of pairs that the bag orders as labelled; a tie counts as 1/2."""
    r = counts(preferences.ids, preferences.mask, len(model["bag"])) @ model["bag"]
    r_w, r_l = r[preferences.pairs].T
    share = dpo.mean_weights(preferences.weight)
    return (share * ((r_w - r_l).sign() + 1) / 2).sum().item()


def bag(model: dict, reference: dict, device: torch.device) -> tuple[Reward, ValueModel]:
    """The reward, and a critic that starts at 0."""
    weight = model["bag"].to(device)

    def reward(ids: Tensor, mask: Tensor) -> Tensor:
        return counts(ids.to(device), mask.to(device), len(weight)) @ weight

    return reward, ValueModel(load_gpt(reference, device))


# ------------------------------------------------- the experiments


def part(preferences: Preferences, n: int) -> Preferences:
    """The preferences of the first n prompts."""
    return common.subset(preferences, torch.arange(n))


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """Both experiments. Returns the content of results.json."""
    if max(cfg.sizes) > cfg.prompts or cfg.classes not in cfg.sizes:
        raise BadInput("--sizes must be at most --prompts, and contain --classes")
    e = common.prepare(cfg, stage, device)
    points = []

    def evaluate(method: str, n: int, beta: float, name: str, policy: dict, accuracy):
        point = common.evaluated(stage, name, e, policy)
        points.append(({"method": method, "prompts": n, "beta": beta}, accuracy, point))

    for n in cfg.sizes:
        some = stage(f"part-{n}", part, e.preferences, n)
        epochs = min(max(5000 // n, 1), 10)
        for beta in cfg.beta:
            loss, name = partial(dpo.dpo, beta=beta), f"dpo-{n}-{beta:g}"
            how = beta**-1.25, epochs
            policy = common.train_on_pairs(stage, name, e, some, loss, *how)
            evaluate("DPO", n, beta, name, policy, None)
        models = {"PPO": reward_models(cfg, stage, e, some, n, epochs)}
        if n == cfg.classes:
            for method, groups in (("PPO, bag of tokens", e.reference), ("PPO, 8 groups", GROUPS)):
                models[method] = bag_models(stage, e, some, method, groups, cfg.seed)
        for method, (make_reward, model, accuracy) in models.items():
            for beta in cfg.beta:
                name = f"{method.replace(', ', '-').replace(' ', '-').lower()}-{n}-{beta:g}"
                args = common.prompts_of(some), (some.ids, some.mask), figure2.ppo_config(cfg, beta)
                args = make_reward, model, e.reference, *args, cfg.seed, device
                policy = stage(name, figure2.train_ppo, *args)
                evaluate(method, n, beta, name, policy, accuracy)
    rows = [
        one | {"reward_accuracy": accuracy} | common.kept(point) for one, accuracy, point in points
    ]
    return common.about(e) | {"points": rows}


def reward_models(cfg: Config, stage: Stage, e, some, n: int, epochs: int) -> tuple:
    args = cfg.reward_lr, min(cfg.batch_size, max(1, n // 10)), max(3, epochs), cfg.seed, e.device
    model = stage(f"reward-{n}", figure2.fit_reward, e.reference, some, *args)
    args = model, e.reference, e.eval_set.pairs, e.device
    return figure2.learned, model, stage(f"accuracy-{n}", figure2.reward_accuracy, *args)


def bag_models(stage: Stage, e, some, method: str, groups, seed: int) -> tuple:
    groups = groups if isinstance(groups, int) else groups["config"]["vocab_size"]
    model = stage(f"bag-{method[-6:]}", fit_bag, some, groups, seed)
    return bag, model, stage(f"accuracy-{method[-6:]}", bag_accuracy, model, e.eval_set.pairs)


# ------------------------------------------------- the table and the figure


def fractions(run: dict, method: str, n: int) -> float | None:
    """The fraction of the attainable gain, averaged over betas; None if a fraction is unknown."""
    found = [
        p["fraction_of_optimal"]
        for p in run["points"]
        if p["method"] == method and p["prompts"] == n
    ]
    return None if None in found else float(np.mean(found))


def table(runs: list[dict]) -> str:
    """Markdown: the fraction of the attainable gain of each method, and its difference from DPO's.

    Mean and standard deviation over seeds. Raises BadInput if the experiments differ.
    """
    kinds = [[(p["method"], p["prompts"], p["beta"]) for p in run["points"]] for run in runs]
    if any(kind != kinds[0] for kind in kinds):
        raise BadInput("these runs do not have the same experiments")
    rows = []
    for method, n in dict.fromkeys((method, n) for method, n, _ in kinds[0]):
        own = [fractions(run, method, n) for run in runs]
        base = [fractions(run, "DPO", n) for run in runs]
        cells = [method, f"{n:,}", common.cell(own)]
        for name in ("kl", "gain", "length", "pair_accuracy"):
            cells.append(common.cell([mean_of(run, method, n, name) for run in runs]))
        cells.append(common.cell([mean_of(run, method, n, "reward_accuracy") for run in runs]))
        if method != "DPO" and None not in (*own, *base):
            differences = [a - b for a, b in zip(base, own, strict=True)]
            cells += [common.interval_cell(differences), common.verdict(differences)]
        rows.append([*cells, *[""] * (10 - len(cells))])
    head = ["method", "prompts", "fraction", "KL", "gain", "length", "pair accuracy"]
    head += ["reward's pair accuracy", "DPO minus this, 95% CI", "DPO above this"]
    return common.markdown(head, rows)


def mean_of(run: dict, method: str, n: int, name: str) -> float | None:
    found = [p[name] for p in run["points"] if p["method"] == method and p["prompts"] == n]
    return None if None in found else float(np.mean(found))


def draw(runs: list[dict]) -> Figure:
    """The fraction of the attainable gain against the number of prompts. Single runs are pale."""
    figure = Figure((7, 4.5), layout="constrained")
    ax = figure.subplots()
    styles = zip(("o", "s", "^", "v"), (ORANGE, figure2.PURPLE, "0.2", "0.55"), strict=True)
    points = [p for run in runs for p in run["points"]]
    methods = dict.fromkeys(p["method"] for p in points)
    for i, (method, (marker, color)) in enumerate(zip(methods, styles, strict=False)):
        shift = 1 + 0.03 * i
        some = [p for p in points if p["method"] == method]
        shown = [p for p in some if p["fraction_of_optimal"] is not None]
        sizes = dict.fromkeys(p["prompts"] for p in shown)
        means = [
            np.mean([p["fraction_of_optimal"] for p in shown if p["prompts"] == n]) for n in sizes
        ]
        if not sizes:
            continue
        xs = [shift * p["prompts"] for p in shown]
        ax.plot(xs, [p["fraction_of_optimal"] for p in shown], marker, color=color, ms=4, alpha=0.4)
        line = marker + "-" * (len(means) > 1)
        ax.plot([shift * n for n in sizes], means, line, color=color, label=method)
    ax.axhline(1, color="0.6", lw=0.8, ls=":", label="optimum over all policies (Eq. 4)")
    ax.legend(loc="lower right", frameon=False)
    ax.set(xscale="log", xlabel="prompts whose pairs are used", title=common.title(runs))
    ax.set(ylabel="fraction of the attainable gain at the same KL")
    sizes = sorted({p["prompts"] for p in points})
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.minorticks_off()
    ax.margins(x=0.3)
    return figure


def main(argv: list[str]) -> int:
    return common.command("explain.py", __doc__, Config, figure2.PRESETS, argv, run, table, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
