"""Six studies, each of a known failure of DPO and of proposed fixes.

    python -m beyond.ablations [most of train.py's flags] [--studies noise certainty ...]
    python -m beyond.ablations --summary DIR DIR ...     # table and figure for finished runs

    noise           a fifth of the labels are flipped           DPO, cDPO, robust DPO, IPO
    certainty       the better response always wins             DPO, IPO
    verbosity       labels that favour length                   DPO, R-DPO, SimPO, LD-DPO
    displacement    log pi(y_w) falls while the margin grows    DPO, DPO-Positive
    epochs          many epochs on few prompts                  DPO offline, DPO online
    coverage        responses that no pair connects             DPO, computed exactly

Data, pi_ref, learning rates and evaluation are compare.py's.
"""

import dataclasses
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
from beyond import common, compare, losses
from beyond.common import Experiment
from beyond.compare import METHODS
from data import Dataset
from dpo import Preferences
from lib.checkpoint import load_gpt
from lib.cli import flag
from lib.inference import compute_logps
from lib.io import BadInput
from beyond.page import BLUE, ORANGE
from lib.stage import Stage

PER_TOKEN = 0.3  # nats that the labels of `verbosity` add per token
FLIPPED = 0.2  # share of the labels in `noise`
REWARDS = (-1.0, -3.0, 3.0, 3.0)  # of the four responses of `coverage`
STUDIES = ("noise", "certainty", "verbosity", "displacement", "epochs", "coverage")


@dataclass(frozen=True)
class Config(compare.Config):
    """compare.py's settings, and two more."""

    rounds: int = flag(8, "epochs in the studies certainty, displacement and epochs", 1)
    studies: tuple = flag(STUDIES, "studies to run", choices=STUDIES)
    methods: tuple = ()  # no flag
    times: float = 1.0


# ------------------------------------------------- labels of other kinds


def relabel(preferences: Preferences, p: Tensor, seed: int) -> Preferences:
    """The same pairs; each keeps its order with probability p (n,), and is flipped otherwise."""
    generator = torch.Generator().manual_seed(2**32 - 1 - seed)  # not the one that drew the labels
    u = torch.rand(p.shape, generator=generator)
    pairs = torch.where((u < p)[:, None], preferences.pairs, preferences.pairs.flip(1))
    return dataclasses.replace(preferences, pairs=pairs)


def gap(values: Tensor, preferences: Preferences) -> Tensor:
    """values (R,) of y_w minus those of y_l, (n,)."""
    of_w, of_l = values[preferences.pairs].T
    return of_w - of_l


def noisy(preferences: Preferences, seed: int) -> Preferences:
    """A fifth of the labels are flipped."""
    return relabel(preferences, torch.full_like(preferences.weight, 1 - FLIPPED), seed)


def certain(preferences: Preferences, dataset: Dataset, reference: dict, seed: int) -> Preferences:
    """A tenth of the prompts; the better response always wins, and ties are dropped."""
    few = first_tenth(preferences)
    r = gap(common.true_reward(dataset, reference)(few.ids, few.mask), few)
    untied = dataclasses.replace(few, pairs=few.pairs[r != 0], weight=few.weight[r != 0])
    return relabel(untied, (r[r != 0] > 0).float(), seed)


def first_tenth(preferences: Preferences) -> Preferences:
    P = int(preferences.prompt.max()) + 1
    return common.subset(preferences, torch.arange(max(2, P // 10)))


def verbose(preferences: Preferences, dataset: Dataset, reference: dict, seed: int) -> Preferences:
    """Bradley-Terry labels of r* + PER_TOKEN |y|."""
    r = common.true_reward(dataset, reference)(preferences.ids, preferences.mask)
    favoured = r + PER_TOKEN * preferences.mask.sum(1)
    return relabel(preferences, torch.sigmoid(gap(favoured, preferences)), seed)


# ------------------------------------------------- studies that train once per method


def loss_and_lr(name: str, setting: int, **hyper: float) -> tuple[dpo.Loss, float]:
    """compare.py's loss and learning rate, with other hyperparameters as given."""
    method = METHODS[name]
    return partial(method.loss, **method.settings()[setting] | hyper), method.lrs[setting]


def trained(stage: Stage, e: Experiment, name: str, preferences, loss, lr: float) -> dict:
    """The evaluation of one run."""
    policy = common.train_on_pairs(stage, name, e, preferences, loss, lr)
    return common.evaluated(stage, name, e, policy)


def noise(stage: Stage, e: Experiment) -> dict[str, dict]:
    """At the second of the two settings in compare.py; epsilon is the share of flips."""
    flipped = stage("noisy", noisy, e.preferences, e.cfg.seed)
    args = e.preferences, *loss_and_lr("dpo", 1)
    found = {"dpo, clean labels": trained(stage, e, "noise-clean", *args)}
    hyper = {"dpo": {}, "cdpo": {"epsilon": FLIPPED}, "robust": {"epsilon": FLIPPED}, "ipo": {}}
    for name, more in hyper.items():
        args = flipped, *loss_and_lr(name, 1, **more)
        found[name] = trained(stage, e, f"noise-{name}", *args)
    return found


def verbosity(stage: Stage, e: Experiment) -> dict[str, dict]:
    """At the first of the two settings in compare.py. R-DPO knows the reward per token."""
    args = e.preferences, e.dataset, e.reference, e.cfg.seed
    labelled = stage("verbose", verbose, *args)
    found = {}
    for name, more in {"dpo": {}, "r_dpo": {"alpha": PER_TOKEN}, "simpo": {}, "ld_dpo": {}}.items():
        args = labelled, *loss_and_lr(name, 0, **more)
        found[name] = trained(stage, e, f"verbosity-{name}", *args)
    return found


def optima(e: Experiment) -> dict[str, dict]:
    """Gain and length of the optimum at beta 1: of r*, and of the labels of `verbosity`."""
    r, length = e.eval_set.rewards.double(), e.eval_set.lengths.double()
    found = {}
    for name, favoured in (("optimum of r*", r), ("optimum of the labels", r + PER_TOKEN * length)):
        w = favoured.softmax(1)  # Eq. 4 over samples of pi_ref
        gain, tokens = ((w * v).sum(1).mean().item() for v in (r - r.mean(), length))
        found[name] = {"gain": gain, "length": tokens}
    return found


# ------------------------------------------------- studies of several epochs


def train_epochs(
    reference: dict,
    preferences: Preferences,
    loss: dpo.Loss,
    how: train.Training,
    rounds: int,
    device: torch.device,
) -> dict:
    """Several epochs over the same pairs, each with its own schedule, as if the pairs were new.

    Returns the checkpoint after each, and the mean change in log pi(y_w) and log pi(y_l), A and B.
    """
    policy, policies, A, B = reference, [], [0.0], [0.0]
    for k in range(rounds):
        epoch = dataclasses.replace(how, epochs=1, seed=how.seed + k)
        policy = train.train_dpo(policy, preferences, loss, epoch, None, device)
        policies.append(policy)
        logps = compute_logps(load_gpt(policy, device), preferences.ids, preferences.mask)
        for means, ratios in zip((A, B), losses.log_ratios(logps, preferences), strict=True):
            means.append(ratios.mean().item())
    return {"policies": policies, "A": A, "B": B}


def train_online(
    reference: dict,
    preferences: Preferences,
    loss: dpo.Loss,
    how: train.Training,
    dataset: Dataset,
    beta: float,
    K: int,
    rounds: int,
    device: torch.device,
) -> dict:
    """Several epochs over the same prompts, which pi_theta completes again before each."""
    policy, policies = reference, []
    for k in range(rounds):
        args = preferences, policy, reference, dataset, K, beta, 1000 * how.seed + k, device
        fresh = compare.online(compare.make_round(*args))
        epoch = dataclasses.replace(how, epochs=1, seed=how.seed + k)
        policy = train.train_dpo(policy, fresh, loss, epoch, None, device)
        policies.append(policy)
    return {"policies": policies}


def over_epochs(stage: Stage, e: Experiment, name: str, preferences, loss, lr: float) -> dict:
    """Run `train_epochs` as a stage."""
    args = preferences, loss, common.training(e.cfg, lr), e.cfg.rounds, e.device
    return stage(name, train_epochs, e.reference, *args)


def run_epochs(stage: Stage, e: Experiment, study: str, hyper: dict[str, dict]) -> dict[str, dict]:
    """Train for --rounds epochs on deterministic labels, at the first settings of compare.py.

    Adds A and B of each epoch.
    """
    args = e.preferences, e.dataset, e.reference, e.cfg.seed
    labelled = stage("certain", certain, *args)
    found = {}
    for name, more in hyper.items():
        path = over_epochs(stage, e, f"{study}-{name}", labelled, *loss_and_lr(name, 0, **more))
        point = common.evaluated(stage, f"{study}-{name}", e, path["policies"][-1])
        found[name] = point | {"A": path["A"], "B": path["B"]}
    return found


def certainty(stage: Stage, e: Experiment) -> dict[str, dict]:
    return run_epochs(stage, e, "certainty", {"dpo": {}, "ipo": {}})


def displacement(stage: Stage, e: Experiment) -> dict[str, dict]:
    return run_epochs(stage, e, "displacement", {"dpo": {}, "dpop": {"lam": 5.0}})


def epochs(stage: Stage, e: Experiment) -> dict[str, dict]:
    """Beta 0.5, after 1, 2, 4, ... epochs over a tenth of the prompts."""
    cfg, (loss, lr) = e.cfg, loss_and_lr("dpo", 1)
    few = stage("first-tenth", first_tenth, e.preferences)
    args = (
        few,
        loss,
        common.training(cfg, lr),
        e.dataset,
        0.5,
        cfg.completions,
        cfg.rounds,
        e.device,
    )
    paths = {"offline": over_epochs(stage, e, "epochs-offline", few, loss, lr)}
    paths["online"] = stage("epochs-online", train_online, e.reference, *args)
    found = {}
    for name, path in paths.items():
        for k in (2**i for i in range(cfg.rounds.bit_length())):
            point = common.evaluated(stage, f"epochs-{name}-{k}", e, path["policies"][k - 1])
            found[f"{name}, {k}"] = point
    return found


# ------------------------------------------------- an exact study


def coverage() -> dict[str, dict]:
    """Four responses; the pairs (1, 2) and (3, 4), with and without (2, 3), which connects them.

    Minimises the expectation of Eq. 7 over Bradley-Terry labels at beta 1, from a uniform pi_ref.
    """
    r, ref = torch.tensor(REWARDS).double(), torch.full((4,), 0.25).double().log()

    def minimiser(compared: list[tuple[int, int]]) -> Tensor:
        w, l = torch.tensor([pair for i, j in compared for pair in ((i, j), (j, i))]).T
        p = dpo.bradley_terry(r[w], r[l])
        logits = torch.zeros(4, dtype=torch.double, requires_grad=True)
        for _ in range(3000):
            pi = logits.log_softmax(-1)
            loss = (p * dpo.dpo_loss(pi[w], pi[l], ref[w], ref[l], 1.0)[0]).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 1.5 * gradient).detach().requires_grad_()
        return logits.log_softmax(-1).detach()

    policies = {"pi_ref": ref, "pairs (1,2), (3,4)": minimiser([(0, 1), (2, 3)])}
    policies["pairs (1,2), (2,3), (3,4)"] = minimiser([(0, 1), (2, 3), (1, 2)])
    policies["optimum"] = dpo.optimal_policy(ref, r, 1.0)[0]
    start = (ref.exp() @ r).item()
    return {
        name: {"p": pi.exp().tolist(), "gain": (pi.exp() @ r).item() - start}
        for name, pi in policies.items()
    }


RUN: dict[str, Callable] = {
    "noise": noise,
    "certainty": certainty,
    "verbosity": verbosity,
    "displacement": displacement,
    "epochs": epochs,
}


def run(cfg: Config, stage: Stage, device: torch.device) -> dict:
    """The studies. Returns the content of results.json."""
    e = common.prepare(cfg, stage, device)
    found = {}
    for name in (name for name in cfg.studies if name in RUN):
        found[name] = RUN[name](stage, e)
    exact = stage("coverage", coverage) if "coverage" in cfg.studies else None
    rows = [
        {"study": study, "method": method}
        | common.kept(p)
        | {k: p[k] for k in ("A", "B") if k in p}
        for study, points in found.items()
        for method, p in points.items()
    ]
    return common.about(e) | {"points": rows, "optima": optima(e), "coverage": exact}


# ------------------------------------------------- the table and the figure

COLUMNS = {
    "gain": "gain",
    "kl": "KL",
    "p_positive": "P(positive)",
    "length": "length",
    "fraction_of_optimal": "fraction",
}


def table(runs: list[dict]) -> str:
    """Markdown: each study's runs, mean and standard deviation over seeds.

    A and B are the mean changes in log pi(y_w) and log pi(y_l) on the training pairs at the end.
    Raises BadInput if the runs do not have the same studies.
    """
    named = [[(p["study"], p["method"]) for p in run["points"]] for run in runs]
    if any(each != named[0] for each in named):
        raise BadInput("these runs do not have the same studies")
    rows = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        cells = [common.cell([p[key] for p in points]) for key in COLUMNS]
        ends = [common.cell([p[k][-1] if k in p else None for p in points]) for k in ("A", "B")]
        rows.append([points[0]["study"], points[0]["method"], *cells, *ends])
    for name in runs[0]["optima"]:
        gain, length = (
            common.cell([r["optima"][name][k] for r in runs]) for k in ("gain", "length")
        )
        rows.append(["verbosity", name, gain, "-", "-", length, "-", "-", "-"])
    for name, policy in (runs[0]["coverage"] or {}).items():
        rows.append(["coverage", name, f"{policy['gain']:.2f}", *["-"] * 6])
    every = common.markdown(["study", "method", *COLUMNS.values(), "A", "B"], rows)
    head = ["study", "claim", "difference, 95% CI", "verdict"]
    return f"{every}\n\n{common.markdown(head, claim_rows(runs))}"


FRACTION = "fraction_of_optimal"
CLAIMS = (  # study; a method, and one that is expected to have less of a metric; the metric
    ("noise", "dpo, clean labels", "dpo", FRACTION),
    ("noise", "dpo, clean labels", "dpo", "gain"),
    ("noise", "robust", "dpo", "gain"),
    ("noise", "cdpo", "dpo", FRACTION),
    ("noise", "ipo", "dpo", FRACTION),
    ("certainty", "dpo", "ipo", "h"),
    ("certainty", "ipo", "dpo", FRACTION),
    ("verbosity", "dpo", "r_dpo", "length"),
    ("verbosity", "dpo", "ld_dpo", "length"),
    ("verbosity", "r_dpo", "dpo", FRACTION),
    ("displacement", "dpop", "dpo", "A"),
    ("displacement", "dpop", "dpo", FRACTION),
    ("epochs", "online, 8", "offline, 8", FRACTION),
)


def claim_rows(runs: list[dict]) -> list[list[str]]:
    """Differences between two methods of a study that was run, at the end of training."""
    rows = []
    for study, more, less, metric in CLAIMS:
        found = [
            {p["method"]: value(p, metric) for p in run["points"] if p["study"] == study}
            for run in runs
        ]
        pairs = [(values.get(more), values.get(less)) for values in found]
        if all(None not in pair for pair in pairs):
            differences = [a - b for a, b in pairs]
            name = COLUMNS.get(metric, metric)
            cells = common.interval_cell(differences), common.verdict(differences)
            rows.append([study, f"{name}: {more} minus {less}", *cells])
    return rows


def value(point: dict, metric: str) -> float | None:
    """A metric at the end of training. h: A - B, the mean margin in log-ratios."""
    if metric == "h":
        return point["A"][-1] - point["B"][-1] if "A" in point else None
    found = point.get(metric)
    return found[-1] if isinstance(found, list) else found


def draw(runs: list[dict]) -> Figure:
    """One panel for each study, with its finding as its title. Means over seeds; seeds are pale."""
    mean = common.average(runs)
    figure = Figure((9, 10.5), layout="constrained")
    axes = figure.subplots(3, 2).flat
    for study, ax in zip(mean["config"]["studies"], axes, strict=False):
        found = [
            {p["method"]: p for p in run["points"] if p["study"] == study}
            for run in (mean, *(runs if len(runs) > 1 else []))
        ]
        ax.set_title(DRAW[study](ax, mean, *found), fontsize="medium")
    for ax in list(axes):
        ax.set_axis_off()
    figure.suptitle(common.title(runs))
    return figure


def color_of(name: str) -> str:
    return ORANGE if name.startswith(("dpo", "offline")) and name != "dpop" else BLUE


LEFT = {"xytext": (-6, 0), "ha": "right"}
BELOW = {"xytext": (0, -8), "ha": "center", "va": "top"}


def dots(ax, x: str, y: str, points: dict, seeds: tuple[dict, ...], where: dict):
    """Each method at (x, y), its seeds pale. where: label positions other than right."""
    for name, p in points.items():
        color, fill = color_of(name), "none" if "clean" in name else None
        for seed in seeds:
            ax.plot(seed[name][x], seed[name][y], ".", color=color, alpha=0.4)
        ax.plot(p[x], p[y], "o", color=color, mfc=fill)
        common.label(ax, name, p[x], p[y], **where.get(name, {}))


def draw_noise(ax, results: dict, points: dict, *seeds: dict) -> str:
    right = 1.7 * max(p["kl"] for p in points.values())
    common.draw_optimum(ax, results, "gain", right)
    where = {name: {"xytext": (6, -9)} for name in points}
    where["dpo, clean labels"] = {"xytext": (-4, 14), "ha": "right"}
    dots(ax, "kl", "gain", points, seeds, where)
    ax.set(xlim=(0, right), ylim=(0, 1.3 * max(p["gain"] for p in points.values())))
    ax.set(xlabel="KL, nats", ylabel="gain, nats")
    ax.plot([], [], color="0.3", lw=2.5, label="optimum (Eq. 4)")
    ax.plot([], [], "s:", color="0.55", ms=3, lw=1, label="best of N")
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    found = {name: p["fraction_of_optimal"] for name, p in points.items()}
    shown = [f"{name} {x:.2f}" for name, x in found.items() if x is not None]
    lines = ", ".join(shown[:2]), ", ".join(shown[2:])
    return "a fifth of the labels are flipped: fraction of the optimum\n" + "\n".join(lines)


def draw_certainty(ax, results: dict, points: dict, *seeds: dict) -> str:
    best = 1 / (2 * METHODS["ipo"].settings()[0]["beta"])
    ax.axhline(best, color="0.6", ls=":")
    common.label(ax, "IPO's optimum, 1/(2 beta)", 0, best, xytext=(5, -8))
    ends = {}
    for name, p in points.items():
        h = np.subtract(p["A"], p["B"])
        for seed in seeds:
            ax.plot(np.subtract(seed[name]["A"], seed[name]["B"]), color=color_of(name), alpha=0.3)
        ax.plot(h, "o-", color=color_of(name), ms=4)
        common.label(ax, name, len(h) - 1, h[-1])
        ends[name] = h[-1]
    ax.margins(x=0.15)
    ax.set(xlabel="epoch", ylabel="h: log-ratio of $y_w$,\nminus that of $y_l$, nats")
    return (
        f"labels without noise: h ends at {ends['dpo']:.1f} nats with DPO,\n"
        f"at {ends['ipo']:.1f} with IPO, whose optimum is {best:g}"
    )


def draw_verbosity(ax, results: dict, points: dict, *seeds: dict) -> str:
    dots(ax, "length", "gain", points, seeds, {"ld_dpo": LEFT})
    for name, p in results["optima"].items():
        ax.plot(p["length"], p["gain"], "s", color="0.3", mfc="none")
        common.label(ax, f"{name}\nat the same beta", p["length"], p["gain"], **BELOW)
    ax.margins(x=0.5, y=0.25)
    ax.set(xlabel="length, tokens", ylabel="gain, nats")
    longer = {name: p["length"] - results["reference"]["length"] for name, p in points.items()}
    return (
        f"labels favour length: DPO's responses are\n"
        f"{longer['dpo']:.1f} tokens longer than pi_ref's, R-DPO's {longer['r_dpo']:.1f}"
    )


def draw_displacement(ax, results: dict, points: dict, *seeds: dict) -> str:
    ax.axhline(0, color="0.8", lw=0.8)
    for name, p in points.items():
        for key, style, y in (("A", "-", "y_w"), ("B", "--", "y_l")):
            for seed in seeds:
                ax.plot(seed[name][key], style, color=color_of(name), alpha=0.3)
            ax.plot(p[key], style, color=color_of(name))
            common.label(ax, f"{name}, ${y}$", len(p[key]) - 1, p[key][-1])
    ax.set_xlim(right=1.25 * (len(p["A"]) - 1))
    ax.set(xlabel="epoch", ylabel=r"change in log $\pi$, nats")
    return (
        rf"log $\pi$($y_w$) changes by {points['dpo']['A'][-1]:+.2f} nats with DPO,"
        "\n"
        f"by {points['dpop']['A'][-1]:+.2f} with DPO-Positive"
    )


def draw_epochs(ax, results: dict, points: dict, *seeds: dict) -> str:
    right = 1.3 * max(p["kl"] for p in points.values())
    common.draw_optimum(ax, results, "gain", right)
    ends = {}
    for name in ("offline", "online"):
        keys = [key for key in points if key.startswith(name)]
        for found in (*seeds, points):
            path = [(found[key]["kl"], found[key]["gain"]) for key in keys]
            style = {"ms": 4} if found is points else {"ms": 2, "alpha": 0.3}
            ax.plot(*zip(*path, strict=True), "o-", color=color_of(name), **style)
        kl, gain = points[keys[-1]]["kl"], points[keys[-1]]["gain"]
        common.label(ax, name, kl, gain)
        ends[name] = f"{gain:.2f} nats at a KL of {kl:.1f}"
    ax.set(xlim=(0, right), ylim=(0, 1.3 * max(p["gain"] for p in points.values())))
    ax.set(xlabel="KL, nats", ylabel="gain, nats")
    last = keys[-1].split(", ")[1]
    return f"after {last} epochs, offline gains {ends['offline']},\nonline {ends['online']}"


def draw_coverage(ax, results: dict, *_: dict) -> str:
    looks = zip(results["coverage"].items(), (BLUE, ORANGE, "0.5", "white"), strict=True)
    for k, ((name, policy), color) in enumerate(looks):
        x = np.arange(4) + 0.2 * k
        text = f"{name}: gain {policy['gain']:+.2f}"
        ax.bar(x, policy["p"], 0.2, color=color, edgecolor="0.2", lw=0.6, label=text)
    names = [f"$y_{i + 1}$, r = {r:g}" for i, r in enumerate(REWARDS)]
    ax.set_xticks(np.arange(4) + 0.3, names, fontsize="small")
    ax.set(ylim=(0, 1), ylabel="probability")
    ax.legend(frameon=False, fontsize="small")
    apart, bridged = (
        results["coverage"][name]["gain"]
        for name in ("pairs (1,2), (3,4)", "pairs (1,2), (2,3), (3,4)")
    )
    return (
        f"pairs ($y_1$, $y_2$) and ($y_3$, $y_4$) gain {apart:+.2f};\n"
        f"with a third pair, ($y_2$, $y_3$), {bridged:+.2f}"
    )


DRAW = {
    "noise": draw_noise,
    "certainty": draw_certainty,
    "verbosity": draw_verbosity,
    "displacement": draw_displacement,
    "epochs": draw_epochs,
    "coverage": draw_coverage,
}


def main(argv: list[str]) -> int:
    return common.command("ablations.py", __doc__, Config, train.PRESETS, argv, run, table, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
