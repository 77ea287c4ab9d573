"""Figure 2 (left) of the paper with all of its methods: gain in true reward against KL.

    python -m beyond.figure2 [most of train.py's flags] [--methods DPO PPO ...]
    python -m beyond.figure2 --summary DIR DIR ...     # the paper's claims, for finished runs

    DPO             Eq. 7, at each --beta
    PPO             Eq. 3 with a reward model trained on the same pairs, at each --ppo-beta
    PPO-GT          Eq. 3 with the true reward, at each --gt-beta
    Preferred-FT    -log pi(y_w)
    Unlikelihood    -log pi(y_w) + alpha log pi(y_l), alpha 0.05, 0.1, 0.5, 1
    best of N       the best of N samples of pi_ref by r*, at a bound on its KL

Each run is evaluated once, after training. A method's curve joins its runs in order of KL. No
run is left out because of its reward, so the mean of a curve over seeds is not biased upward,
unlike the mean of a hull over noisy points.

The curve is broken between runs whose KLs differ by more than a factor of 1.6. Table entries in
such a gap are in brackets, and verdicts do not use them. A verdict needs three seeds; "seen" and
"reversed" also need a 95% interval that excludes 0.

The paper's reward is a probability, which saturates. Ours is a logit, in nats, like the oracle of
EXO (2402.00856). Tables and figure show both: the gain in r*, and P(positive), the mean of
sigmoid(r*).
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import dpo
import train
from beyond import common, ppo
from beyond.common import Experiment
from beyond.pairs import Ids, Reward
from beyond.ppo import PPOConfig, ValueModel
from data import Dataset, load_tokenizer
from dpo import Preferences, pair_logps
from lib.checkpoint import load_gpt, to_checkpoint
from lib.cli import flag
from lib.io import BadInput
from beyond.page import ORANGE
from lib.stage import Stage

METHODS = ("DPO", "PPO", "PPO-GT", "Preferred-FT", "Unlikelihood")
BETAS = (1.0, 0.78, 0.61, 0.47, 0.36, 0.28, 0.21, 0.18, 0.155, 0.13, 0.11)
IMDB_BETAS = (1.0, 0.78, 0.61, 0.54, 0.47, 0.37, 0.29, 0.23, 0.18, 0.14)
IMDB_PPO_BETAS = (1.1, 0.9, 0.73, 0.59, 0.48, 0.39, 0.32, 0.27)
IMDB_GT_BETAS = (1.15, 0.9, 0.73, 0.59, 0.48, 0.43, 0.39, 0.355, 0.32)
PPO_BETAS = (1.0, 0.78, 0.61, 0.47, 0.36, 0.28, 0.21, 0.16)  # with a learned reward
GT_BETAS = (1.0, 0.75, 0.57, 0.44, 0.36, 0.31, 0.275, 0.25)  # with the true reward
ALPHAS = {0.05: 0.33, 0.1: 0.33, 0.5: 0.1, 1.0: 0.1}  # alpha -> learning rate in units of --lr
GRID = (0.5, 1, 1.5, 2, 3, 4, 6, 8)  # KL at which methods are compared, nats
WIDE = 1.6  # a factor between neighbouring KLs


@dataclass(frozen=True)
class Config(train.Config):
    """train.py's settings. --beta sets DPO's sweep."""

    loss: str = "dpo"  # no flag, like the next two
    loss_args: tuple = ()
    pairs: str = "all"
    beta: tuple = flag(BETAS, "DPO's weights of the KL penalty", 1e-4)
    reviews: int = flag(20_000, "reviews to fine-tune pi_ref on", 1)
    sft_steps: int | None = flag(600, "fine-tuning steps", 0)
    ref_samples: int = flag(512, "samples of pi_ref per evaluation prompt", 16)
    eval_samples: int = flag(48, "samples of pi_theta per evaluation prompt", 1)
    prompts: int = flag(10_000, "prompts to collect preferences on", 8)
    completions: int = flag(4, "completions per prompt", 2)
    batch_size: int = flag(64, "prompts per DPO step", 1)
    methods: tuple = flag(METHODS, "methods to run", choices=METHODS)
    ppo_beta: tuple = flag(PPO_BETAS, "PPO's weights of the KL penalty", 1e-4)
    gt_beta: tuple = flag(GT_BETAS, "PPO-GT's weights of the KL penalty", 1e-4)
    ppo_iterations: int = flag(40, "PPO iterations", 1)
    ppo_batch: int = flag(256, "responses per PPO iteration", 1)
    ppo_minibatches: int = flag(2, "optimizer steps per epoch over a PPO batch", 1)
    ppo_lr: float = flag(2e-3, "PPO's learning rate", 1e-9)
    ppo_lam: float = flag(0.95, "GAE's lambda", 0.0)
    ppo_raw: bool = flag(False, "do not whiten the advantages")
    ppo_warmup: int = flag(0, "iterations in which only the critic learns", 0)
    reward_lr: tuple = flag((1e-3,), "learning rates of the reward model", 1e-9)
    reward_epochs: int = flag(3, "epochs of the reward model", 1)


PRESETS = {
    "imdb": train.PRESETS["imdb"]
    | {"beta": IMDB_BETAS, "ppo_beta": IMDB_PPO_BETAS, "gt_beta": IMDB_GT_BETAS}
    | {"ref_samples": 384, "eval_samples": 24, "reward_lr": (2e-4,)}
    | {"ppo_iterations": 30, "ppo_minibatches": 4, "ppo_lr": 3e-4}
}


def ppo_config(cfg: Config, beta: float) -> PPOConfig:
    """A fixed beta, in the units of the reward before scaling; no target KL."""
    return PPOConfig(
        iterations=cfg.ppo_iterations,
        batch_size=cfg.ppo_batch,
        minibatches=cfg.ppo_minibatches,
        lr=cfg.ppo_lr,
        critic_lr=cfg.ppo_lr,
        critic_warmup=cfg.ppo_warmup,
        lam=cfg.ppo_lam,
        whiten=not cfg.ppo_raw,
        beta=beta,
        frozen=cfg.frozen,
    )


# ------------------------------------------------- losses on pairs


def preferred_ft(logps: Tensor, batch: Preferences) -> tuple[Tensor, Tensor, Tensor]:
    """-log pi_theta(y_w|x): fine-tuning on the preferred responses, as a `dpo.Loss`."""
    logp_w, logp_l, _, _ = pair_logps(logps, batch)
    return -logp_w, logp_w, logp_l


def unlikelihood(logps: Tensor, batch: Preferences, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """-log pi_theta(y_w|x) + alpha log pi_theta(y_l|x), as a `dpo.Loss`.

    Section 6 of the paper, after Welleck et al. 2019. The loss has no lower bound.
    """
    logp_w, logp_l, _, _ = pair_logps(logps, batch)
    return -logp_w + alpha * logp_l, logp_w, logp_l


# ------------------------------------------------- PPO and its rewards


def fit_reward(
    reference: dict,
    preferences: Preferences,
    lrs: tuple[float, ...],
    batch_size: int,
    epochs: int,
    seed: int,
    device: torch.device,
) -> dict:
    """The weights of r_phi (Eq. 2), and the held-out accuracies by which they were chosen."""
    pi_ref = load_gpt(reference, device)
    r_phi, evaluations = ppo.fit_reward(pi_ref, preferences, lrs, batch_size, seed, epochs)
    weights = {name: w.cpu() for name, w in r_phi.state_dict().items()}
    return {"weights": weights, "evaluations": evaluations}


def load_reward(model: dict, reference: dict, device: torch.device) -> ValueModel:
    r_phi = ValueModel(load_gpt(reference, device)).requires_grad_(False)
    r_phi.load_state_dict(model["weights"])
    return r_phi


def reward_accuracy(
    model: dict, reference: dict, held_out: Preferences, device: torch.device
) -> float:
    """The share of held-out pairs that r_phi orders as labelled."""
    return ppo.pair_accuracy(load_reward(model, reference, device), held_out)


def learned(model: dict, reference: dict, device: torch.device) -> tuple[Reward, ValueModel]:
    """r_phi, which is also the initial critic.

    The critic keeps the scale of r_phi. Scaled like the reward in `train_ppo`, it did worse
    (results/figure2-search/search.md).
    """
    r_phi = load_reward(model, reference, device)
    return ppo.reward_of(r_phi), r_phi


def given(dataset: Dataset, reference: dict, device: torch.device) -> tuple[Reward, ValueModel]:
    """r*, and a critic that starts at 0."""
    return common.true_reward(dataset, reference), ValueModel(load_gpt(reference, device))


def train_ppo(
    make_reward,
    source: object,
    reference: dict,
    prompts: list[Ids],
    completions: tuple[Tensor, Tensor],
    config: PPOConfig,
    seed: int,
    device: torch.device,
) -> dict:
    """PPO from pi_ref. Returns its checkpoint, with "curves".

    make_reward: (source, reference, device) -> reward and critic. completions: ids and mask (R, T),
    sampled from pi_ref. The reward is scaled to mean 0 and variance 1 on 2,000 of them, and beta by
    the same factor: config.beta is in the units of r before scaling, as in Eq. 3.
    """
    pi_ref = load_gpt(reference, device).requires_grad_(False)
    end = load_tokenizer(reference["tokens"]).eot_token
    reward, critic = make_reward(source, reference, device)
    batches = zip(*(rows[:2000].split(250) for rows in completions), strict=True)
    r = torch.cat([reward(*batch) for batch in batches])
    mean, std = r.mean(), r.std()

    def scaled(ids: Tensor, mask: Tensor) -> Tensor:
        return (reward(ids, mask) - mean) / std

    config = replace(config, beta=config.beta / std.item())
    steps = ppo.ppo(pi_ref, critic, prompts, scaled, end, config, seed)
    curves = []
    for pi_theta, metrics in tqdm(steps, "PPO", config.iterations):  # noqa: B007
        curves.append(metrics)
    if not all(p.isfinite().all() for p in pi_theta.parameters()):
        raise BadInput("PPO diverged: lower --ppo-lr")
    return to_checkpoint(pi_theta, reference["tokens"]) | {"curves": curves}


# ------------------------------------------------- the sweep


def runs_on_pairs(cfg: Config) -> list[dict]:
    """Method, setting, loss, and learning rate in units of --lr, of each run on pairs."""
    runs = [
        {"method": "DPO", "beta": beta, "loss": partial(dpo.dpo, beta=beta), "lr": beta**-1.25}
        for beta in cfg.beta
    ]
    runs.append({"method": "Preferred-FT", "loss": preferred_ft, "lr": 0.33})
    for alpha, lr in ALPHAS.items():
        loss = partial(unlikelihood, alpha=alpha)
        runs.append({"method": "Unlikelihood", "alpha": alpha, "loss": loss, "lr": lr})
    return [run for run in runs if run["method"] in cfg.methods]


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """All runs. Returns the content of results.json."""
    e = common.prepare(cfg, stage, device)
    points = []
    for one in runs_on_pairs(cfg):
        loss, lr = one.pop("loss"), one.pop("lr")
        name = name_of(one)
        policy = common.train_on_pairs(stage, name, e, e.preferences, loss, lr)
        points.append((one, name, common.evaluated(stage, name, e, policy)))
    reward_model, accuracy = None, None
    if "PPO" in cfg.methods:
        args = cfg.reward_lr, cfg.batch_size, cfg.reward_epochs, cfg.seed, device
        reward_model = stage("reward-model", fit_reward, e.reference, e.preferences, *args)
        args = reward_model, e.reference, e.eval_set.pairs, device
        accuracy = stage("reward-accuracy", reward_accuracy, *args)
    rewards = {
        "PPO": (learned, reward_model, cfg.ppo_beta),
        "PPO-GT": (given, e.dataset, cfg.gt_beta),
    }
    completions = e.preferences.ids, e.preferences.mask
    given_to_ppo = e.reference, common.prompts_of(e.preferences), completions
    for method in (name for name in rewards if name in cfg.methods):
        make_reward, source, betas = rewards[method]
        for beta in betas:
            one = {"method": method, "beta": beta}
            name, args = name_of(one), (ppo_config(cfg, beta), cfg.seed, device)
            policy = stage(name, train_ppo, make_reward, source, *given_to_ppo, *args)
            points.append((one, name, common.evaluated(stage, name, e, policy)))
    rows = [one | cost(one, name, e, stage) | common.kept(p) for one, name, p in points]
    results = common.about(e) | {"grid": GRID, "points": rows}
    results["reward_model"] = {"pair_accuracy": accuracy}
    if reward_model:
        results["reward_model"]["evaluations"] = reward_model["evaluations"]
    return results


def name_of(one: dict) -> str:
    """A stage's name, for instance figure2-dpo-0.5."""
    method, *setting = one.values()
    return "-".join(["figure2", method.lower(), *(f"{value:g}" for value in setting)])


def cost(one: dict, name: str, e: Experiment, stage: Stage) -> dict[str, float]:
    """Responses that were sampled for a run, and seconds of sampling, scoring and training.

    The 2,000 responses by which PPO-GT scales its reward are not counted.
    """
    made = e.completions[0].size(0) if one["method"] != "PPO-GT" else 0
    seconds = stage.seconds[name] + shared_seconds(one["method"], stage.seconds)
    drawn = e.cfg.ppo_iterations * e.cfg.ppo_batch if one["method"].startswith("PPO") else 0
    return {"samples": made + drawn, "seconds": round(seconds, 1)}


def shared_seconds(method: str, seconds: dict[str, float]) -> float:
    """Seconds of the stages that all runs of a method share: completions, and the reward model."""
    stages = {"PPO": ("completions", "reward-model"), "PPO-GT": ()}.get(method, ("completions",))
    return sum(seconds[name] for name in stages)


# ------------------------------------------------- curves and claims


def curve(run: dict, method: str, y: str) -> list[tuple[float, float]]:
    """(KL, y) of pi_ref and of a method's runs, in order of KL."""
    rows = [p for p in run["points"] if p["method"] == method]
    if method == "optimum":
        rows = [row for row in run["optimum"] if row["reliable"]]
    if method == "best of N":
        rows = run["best_of_n"][1:]
    start = 0.0 if y == "gain" else run["reference"][y]
    return [(0.0, start), *sorted((row["kl"], row[y]) for row in rows)]


def value_at(run: dict, method: str, y: str, kl: float) -> tuple[float | None, bool]:
    """y of a method at this KL, and whether it is measured: not interpolated over a wide gap.

    None where no run of the method reaches this KL. The optimum has no gaps.
    """
    xs, ys = zip(*curve(run, method, y), strict=True)
    i = int(np.searchsorted(xs, kl))
    if i == len(xs):
        return None, False
    measured = method == "optimum" or xs[i] == kl or xs[i] <= WIDE * xs[max(i - 1, 0)]
    return float(np.interp(kl, xs, ys)), measured


CLAIMS = {  # the paper's claim: (the other method, the KLs at which DPO is compared with it)
    "DPO's frontier lies above PPO's": ("PPO", GRID),
    "DPO's frontier lies above PPO-GT's": ("PPO-GT", GRID),
    "DPO gains more than PPO at low KL": ("PPO", (0.5, 1)),
    "DPO gains more than PPO-GT at low KL": ("PPO-GT", (0.5, 1)),
    "DPO gains more than PPO-GT at high KL": ("PPO-GT", (2, 3)),
}
REACH = {
    "Preferred-FT gains less reward than DPO": "Preferred-FT",
    "Unlikelihood gains less reward than DPO": "Unlikelihood",
}


def difference(run: dict, other: str, y: str, kl: float) -> float | None:
    """DPO's value minus another's at one KL, or None where one of them is not measured."""
    (a, a_measured), (b, b_measured) = (value_at(run, m, y, kl) for m in ("DPO", other))
    return a - b if a_measured and b_measured else None


def largest_gain(run: dict, method: str) -> float:
    """The largest gain of a method's runs, up to the largest KL of DPO's runs."""
    end = max(p["kl"] for p in run["points"] if p["method"] == "DPO")
    points = (p for p in run["points"] if p["method"] == method and p["kl"] <= end)
    return max((p["gain"] for p in points), default=0.0)


def claim_rows(runs: list[dict]) -> list[list[str]]:
    """The paper's claims: the difference at each KL, its mean over these KLs, and the verdict."""
    methods = {p["method"] for p in runs[0]["points"]}
    grid, rows = runs[0]["grid"], []
    for claim, (other, kls) in CLAIMS.items():
        if not {other, "DPO"} <= methods:
            continue
        at = {kl: [difference(run, other, "gain", kl) for run in runs] for kl in grid}
        cells = [common.cell(at[kl]) if kl in kls else "" for kl in grid]
        rows.append([claim, *cells, *mean_differences(runs, other, kls)])
    for claim, other in REACH.items():
        if {other, "DPO"} <= methods:
            found = [largest_gain(run, "DPO") - largest_gain(run, other) for run in runs]
            cells = [""] * len(grid)
            rows.append([claim, *cells, common.interval_cell(found), "", common.verdict(found)])
    return rows


def mean_differences(runs: list[dict], other: str, kls: tuple) -> list[str]:
    """Intervals of the mean difference, over the KLs that are measured in all seeds."""
    cells, said = [], ""
    for y in ("gain", "p_positive"):
        at = [[difference(run, other, y, kl) for run in runs] for kl in kls]
        at = [values for values in at if None not in values]
        means = np.mean(at, 0).tolist() if at else []
        cells.append(common.interval_cell(means))
        said = said or (common.verdict(means) if means else "not measured")
    return [*cells, said]


def table(runs: list[dict]) -> str:
    """Markdown: gain, P(positive) and length at each KL, the claims, and each run's evaluation.

    Mean and standard deviation over seeds. Raises BadInput if the sweeps differ.
    """
    swept = [[name_of(setting_of(p)) for p in run["points"]] for run in runs]
    if any(each != swept[0] for each in swept) or any(r["grid"] != runs[0]["grid"] for r in runs):
        raise BadInput("these runs do not have the same sweep")
    grid = runs[0]["grid"]
    methods = ("optimum", "best of N", *dict.fromkeys(p["method"] for p in runs[0]["points"]))
    tables = []
    for y, title in (("gain", "gain, nats"), ("p_positive", "P(positive)"), ("length", "tokens")):
        head = [f"{title} at a KL of", *(f"{kl:g}" for kl in grid)]
        rows = [[m, *(entry(runs, m, y, kl) for kl in grid)] for m in methods]
        tables.append(common.markdown(head, rows))
    head = ["claim: DPO minus the other, nats, at", *(f"{kl:g}" for kl in grid)]
    head += ["mean difference in gain, 95% CI", "in P(positive), 95% CI", "verdict"]
    tables.append(common.markdown(head, claim_rows(runs)))
    tables.append(common.markdown(["run", *COLUMNS.values()], end_rows(runs)))
    return "\n\n".join(tables)


def entry(runs: list[dict], method: str, y: str, kl: float) -> str:
    """One cell; in brackets if a seed is interpolated over a wide gap."""
    found = [value_at(run, method, y, kl) for run in runs]
    text = common.cell([value for value, _ in found], 1 if y == "length" else 2)
    return text if text == "-" or all(measured for _, measured in found) else f"[{text}]"


COLUMNS = {
    "kl": "KL",
    "gain": "gain",
    "p_positive": "P(positive)",
    "length": "length",
    "win_rate": "win rate",
    "pair_accuracy": "pair accuracy",
    "fraction_of_optimal": "fraction",
    "samples": "responses sampled",
    "seconds": "seconds",
}


def setting_of(point: dict) -> dict:
    names = ("method", "beta", "alpha")
    return {name: point[name] for name in names if name in point}


def end_rows(runs: list[dict]) -> list[list[str]]:
    rows = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        method, *rest = setting_of(points[0]).items()
        name = ", ".join([method[1], *(f"{key} {value:g}" for key, value in rest)])
        cells = [common.cell([p[key] for p in points], digits(key)) for key in COLUMNS]
        rows.append([name, *cells])
    return rows


def digits(column: str) -> int:
    return 0 if column in ("samples", "seconds") else 1 if column == "length" else 2


# ------------------------------------------------- the figure

PURPLE = "#7b5aa6"
LOOK = {
    "DPO": ("o", ORANGE),
    "PPO-GT": ("^", "0.1"),
    "PPO": ("s", PURPLE),
    "Unlikelihood": ("v", "#4d9221"),
    "Preferred-FT": ("P", "0.55"),
}
PAPER = {"DPO": [(5, 1.0), (2.5, 0.9)], "PPO": [(2, 0.53), (11, 0.92)]}  # approximate readings


def draw(runs: list[dict]) -> Figure:
    """Against KL: the gain, the fraction of the largest gain, and P(positive), on IMDb with values
    read from the paper's figure. Against training time: the largest gain. Means over seeds.
    """
    results = common.average(runs)
    figure = Figure((11, 9), layout="constrained")
    (left, share), (right, cost) = figure.subplots(2, 2)
    points = [p for p in results["points"] if p["method"] in ("DPO", "PPO-GT", "PPO")]
    limit = 1.1 * max(p["kl"] for p in points or results["points"])
    papers = PAPER if results["config"]["data"] == "imdb" else {}
    wide = max([limit, *(1.1 * kl for points in papers.values() for kl, _ in points)])
    for ax, y, end in ((left, "gain", limit), (right, "p_positive", wide)):
        common.draw_optimum(ax, results, y, end)
        draw_methods(ax, results, y, end)
        shown = [results["reference"]["p_positive"] if y == "p_positive" else 0]
        shown += [p[y] for p in results["points"] if p["kl"] <= end]
        shown += [1.0] if y == "p_positive" and papers else []
        margin = 0.08 * (max(shown) - min(shown)) or 1
        ax.set(xlim=(-0.02 * end, end), ylim=(min(shown) - margin, max(shown) + margin))
    for ax in (left, share, right):
        ax.set(xlabel=r"KL($\pi_\theta$, $\pi_{ref}$), nats per response")
    left.set(ylabel=r"gain in true reward over $\pi_{ref}$, nats")
    right.set(ylabel="P(positive), mean of sigmoid(r*)")
    draw_fractions(share, runs)
    if len(runs) > 1:
        share.set(title="large: means; pale: single seeds")
    draw_cost(cost, results, limit)
    draw_paper(right, papers)
    left.plot([], [], color="0.3", lw=2.5, label="optimum over all policies (Eq. 4)")
    left.plot([], [], "s:", color="0.55", ms=3, label="best of N, at a bound on its KL")
    left.plot([], [], "D", color="#1b6ca8", label=r"$\pi_{ref}$")
    left.legend(loc="lower right", frameon=False, fontsize="small")
    figure.suptitle(common.title(runs))
    return figure


def draw_fractions(ax, runs: list[dict]):
    """The gain divided by the largest gain at the same KL, where it is known. Seeds are pale."""
    for method, (marker, color) in LOOK.items():
        for points in zip(*(run["points"] for run in runs), strict=True):
            rows = [(p["kl"], p["fraction_of_optimal"]) for p in points if p["method"] == method]
            if rows and None not in (fraction for _, fraction in rows):
                ax.plot(*zip(*rows, strict=True), marker, color=color, ms=3, alpha=0.3)
                ax.plot(*np.mean(rows, 0), marker, color=color, ms=7)
    ax.axhline(1, color="0.3", lw=2.5)
    ax.set(ylabel="gain / largest gain at the same KL")


def draw_cost(ax, results: dict, limit: float):
    """The largest gain so far, at a KL up to limit, against the seconds of all runs so far."""
    for method, (marker, color) in LOOK.items():
        points = [p for p in results["points"] if p["method"] == method]
        if points:
            shared = shared_seconds(method, results["seconds"])
            seconds = shared + np.cumsum([p["seconds"] - shared for p in points])
            best = np.maximum.accumulate([p["gain"] * (p["kl"] <= limit) for p in points])
            ax.step(seconds, best, marker, ls="-", color=color, ms=4, where="post")
    ax.set_xlabel("seconds of sampling and training, all runs so far")
    ax.set_ylabel("largest gain so far, nats")


def draw_methods(ax, results: dict, y: str, end: float):
    """Each run as a point; lines join neighbours, except across a wide gap."""
    for method, (marker, color) in LOOK.items():
        points = [point for point in curve(results, method, y)[1:] if point[0] <= end]
        if points:
            ax.plot(*zip(*points, strict=True), marker, color=color, ms=5, label=method)
        for a, b in pairwise(points):
            if b[0] <= WIDE * a[0]:
                ax.plot(*zip(a, b, strict=True), color=color, lw=1)


def draw_paper(ax, papers: dict):
    """Values read from the paper's figure, as hollow points."""
    for method, points in papers.items():
        marker, color = LOOK[method]
        ax.plot(*zip(*points, strict=True), marker, mfc="none", mec=color, ms=9)
        common.label(ax, f"{method}, paper (approximate)", *points[0], color, xytext=(9, 0))


def main(argv: list[str]) -> int:
    return common.command("figure2.py", __doc__, Config, PRESETS, argv, run, table, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
