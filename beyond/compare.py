"""Every method of beyond/ beside DPO, from one pi_ref and one set of prompts: reward against KL, the optimum behind.

    python -m beyond.compare [--data imdb] [--methods dpo ipo ...] [--seed N] [--out DIR]
    python -m beyond.compare --summary DIR DIR ...      the table over runs, mean and standard deviation, as markdown

World, pi_ref, preferences and evaluation are train.py's, and so is the optimiser: one pass over the prompts, fewer of them
than in train.py. Each method has two strengths, a weaker and a stronger. What differs is the loss and its rate; for the last
three methods also the pairs, which are made of fresh completions, judged by the true reward.

How the rates were chosen: on seed 100, which is not among those that are reported, with 2,000 prompts. Each loss was given a
rate at which its first steps are about as long as DPO's, lower where it diverged; of half, once and twice that (`--times`), the
one with the least loss on held-out pairs (`held_out_loss` in results.json) was kept. This needs no true reward.
"""
import argparse
import dataclasses
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import dpo
import train
from beyond import pairs
from beyond.losses import LOSSES, with_mismatched
from dpo import Preferences
from kit import files, report, terminal
from model import GPT
from train import Experiment, Settings

SMALLER = dict(prompts=3_000, batch=32, answers=48)         # than train.py's toy world: all methods in ten minutes
REFERENCE_FREE = "orpo", "simpo"
Ids = list[int]


# ----------------------------------------------------------------------------- what a loss wants of the given completions

def as_given(e: Experiment, preferences: Preferences) -> Preferences:
    return preferences


def mismatched(e: Experiment, preferences: Preferences) -> Preferences:
    return with_mismatched(preferences, partial(train.score, e.pi_ref), torch.Generator().manual_seed(e.settings.seed))


def ranked(e: Experiment, preferences: Preferences) -> Preferences:
    order, weight = pairs.rankings(rewards(e, preferences), torch.Generator().manual_seed(e.settings.seed))
    device = preferences.ids.device
    return dataclasses.replace(preferences, pairs=order.to(device), weight=weight.to(device))


def rewards(e: Experiment, preferences: Preferences) -> Tensor:
    """r* of the completions, (P, K) nats; -inf where there is none."""
    mask = preferences.mask.cpu()
    ends = (mask * torch.arange(1, mask.size(-1) + 1)).amax(-1)
    rows = zip(preferences.ids.flatten(0, 1).tolist(), ends.flatten().tolist())
    r = e.rewards_of["reward"]([data.text_of(ids[:end], e.tokenizer) for ids, end in rows])
    return r.view(ends.shape).masked_fill(ends == 0, -torch.inf)


def prompts_in(preferences: Preferences) -> list[Ids]:
    starts = preferences.mask[:, 0].int().argmax(-1).tolist()
    return [ids[:start] for ids, start in zip(preferences.ids[:, 0].tolist(), starts)]


# ----------------------------------------------------------------------------- fresh completions: one round's triplets

Draw = Callable[[list[Ids]], list[Ids]]


def online(e: Experiment, prompts: list[Ids], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    return pairs.online(prompts, e.settings.completions, draw, e.rewards_of["reward"], e.tokenizer, "bt", rng)


def iterative(e: Experiment, prompts: list[Ids], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    eight = pairs.completed(prompts, 8, draw, e.rewards_of["reward"], e.tokenizer)
    return data.preferences(prompts, *pairs.best_and_worst(*eight), e.tokenizer, "argmax", rng)[0]


def rso(e: Experiment, prompts: list[Ids], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    ys, r = pairs.completed(prompts, 16, draw, e.rewards_of["reward"], e.tokenizer)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    three = pairs.accepted(prompts, ys, r, beta, r.amax(1, keepdim=True), 3, generator)
    return data.preferences(*three, e.tokenizer, "bt", rng)[0]


def in_rounds(e: Experiment, triplets: Callable, rounds: list[list[Ids]], loss: dpo.Loss, rate: float, beta: float,
              name: str) -> Iterator[GPT]:
    """pi_theta after each round, trained on pairs that the pi_theta before it completed the round's prompts to."""
    pi_theta, rng = e.pi_ref, random.Random(e.settings.seed)
    for k, prompts in enumerate(rounds, 1):
        draw = partial(train.draw, pi_theta, settings=e.settings, tokenizer=e.tokenizer, purpose=f"sampling {name}, round {k}")
        ids, mask, which, weight = data.group(triplets(e, prompts, draw, beta, rng))
        fresh = ids, mask, train.score(e.pi_ref, ids, mask), which, weight
        fresh = Preferences(*(t.to(e.preferences.ids.device) for t in fresh))
        pi_theta, _ = train.optimise(pi_theta, fresh, loss, rate, e.settings, f"{name}, round {k}")
        yield pi_theta


# ----------------------------------------------------------------------------- the methods

@dataclass(frozen=True)
class Method:
    hyper: dict[str, tuple[float, ...] | float]     # the loss's own; a tuple has a value for each strength
    rates: tuple[float, ...]                        # the peak learning rate at each strength, in units of Settings.rate
    why: str                                        # these hyperparameters
    kind: Callable = as_given                       # of preferences that the loss wants
    fresh: Callable | None = None                   # the triplets of a round, if they are not the given ones
    rounds: int = 1                                 # each on its share of the prompts
    loss: str | None = None                         # in LOSSES; the method's name, if not given

    def strengths(self) -> list[dict[str, float]]:
        return [{name: v[i] if isinstance(v, tuple) else v for name, v in self.hyper.items()} for i in range(len(self.rates))]


BETA = 1.0, 0.5
METHODS = {
    "dpo": Method(dict(beta=BETA), (0.5, 2.4), "the yardstick, two of train.py's beta"),
    "cdpo": Method(dict(beta=BETA, epsilon=0.1), (0.5, 2.4), "as if a tenth of the labels were flipped, though none is"),
    "robust": Method(dict(beta=BETA, epsilon=0.1), (0.4, 0.95), "the same"),
    "ipo": Method(dict(tau=(0.25, 0.125)), (0.062, 0.037), "beta / 4: where gaps of reward are small, its optimum is the tilt"),
    "hinge": Method(dict(beta=BETA), (0.5, 1.2), "DPO's scale of the margin"),
    "kto": Method(dict(beta=BETA), (4, 19), "as many are desirable as undesirable, so either weighs 1", mismatched),
    "sppo_hard": Method(dict(beta=(0.5, 0.25)), (0.06, 0.04), "beta / 2: where gaps are small, its A - B is the tilt's"),
    "sppo": Method(dict(beta=(0.25, 0.125)), (0.1, 0.03), "beta / 4, by the same reckoning"),
    "orpo": Method(dict(lam=(0.5, 2.0)), (2.5, 1.2), "either side of 1, where its two terms weigh the same"),
    "simpo": Method(dict(beta=(7.0, 3.5), gamma=0.5), (0.6, 1), "7 beta, as responses have about 7 tokens"),
    "dpop": Method(dict(beta=BETA, lam=1.0), (0.2, 0.4), "a nat that y_w falls costs another nat of margin"),
    "r_dpo": Method(dict(beta=BETA, alpha=0.05), (0.5, 2.4), "a twentieth of a nat a token, though labels do not like length"),
    "ld_dpo": Method(dict(beta=BETA, alpha=0.5), (0.5, 2.4), "what is longer counts half"),
    "plackett_luce": Method(dict(beta=BETA), (0.1, 0.2), "DPO's", ranked),
    "online": Method(dict(beta=BETA), (0.5, 1.2), "DPO's; four completions a prompt, as given", fresh=online, rounds=4, loss="dpo"),
    "iterative": Method(dict(beta=(4.0, 2.0)), (0.05, 0.1), "four times DPO's, as the pairs are sure and far apart: best and "
                        "worst of eight", fresh=iterative, rounds=3, loss="dpo"),
    "rso": Method(dict(beta=BETA), (0.25, 2.4), "DPO's, to accept and to train; three accepted of sixteen", fresh=rso, loss="dpo"),
}


def point(e: Experiment, name: str, hyper: dict[str, float], rate: float) -> dict:
    """A method trained at one strength, and evaluated: a row of results.json."""
    m = METHODS[name]
    loss = partial(LOSSES[m.loss or name], **hyper)
    if m.fresh:
        rounds = [prompts_in(e.preferences)[k::m.rounds] for k in range(m.rounds)]
        *_, pi_theta = in_rounds(e, m.fresh, rounds, loss, rate, hyper["beta"], name)
    else:
        pi_theta, _ = train.optimise(e.pi_ref, m.kind(e, e.preferences), loss, rate, e.settings, name)
    seen = train.evaluate(e, pi_theta, 1.0, name)["point"]      # at beta 1 r_hat is the change of log pi itself
    held = m.kind(e, e.held_pairs)
    losses = loss(train.score(pi_theta, held.ids, held.mask), held)[0]
    kept = "reward reward_se kl kl_se win_rate fraction_of_optimal fraction_of_optimal_se length pair_accuracy".split()
    return dict(method=name, hyper=hyper, rate=rate) | {key: seen[key] for key in kept} | dict(
        log_pi_w=seen["r_hat_w"], log_pi_l=seen["r_hat_l"],
        held_out_loss=((held.weight * losses).sum() / held.weight.sum()).item())


# ----------------------------------------------------------------------------- what is written for people

COLUMNS = dict(reward="reward", kl="KL", win_rate="wins", fraction_of_optimal="fraction", length="tokens",
               log_pi_w="log pi(y_w)", log_pi_l="log pi(y_l)")


def table(runs: list[dict]) -> str:
    """Markdown: a row for pi_ref and for each method at each strength, with mean and, over several runs, standard deviation.
    Errors: BadInput if the runs are not of the same methods."""
    if any([(p["method"], p["hyper"]) for p in run["points"]] != [(p["method"], p["hyper"]) for p in runs[0]["points"]]
           for run in runs):
        raise files.BadInput("these runs are not of the same methods at the same strengths")
    references = [dict(method="pi_ref", hyper={}, kl=0.0, win_rate=0.5, fraction_of_optimal=None, log_pi_w=0.0, log_pi_l=0.0)
                  | {name: run["reference"][name] for name in ("reward", "length")} for run in runs]
    lines = ["| " + " | ".join(("method", "at", *COLUMNS.values())) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for points in (references, *zip(*(run["points"] for run in runs))):
        name = points[0]["method"] + "\\*" * (points[0]["method"] in REFERENCE_FREE)
        at = ", ".join(f"{key} {value:g}" for key, value in points[0]["hyper"].items())
        lines.append("| " + " | ".join((name, at, *(cell([p[key] for p in points]) for key in COLUMNS))) + " |")
    return "\n".join(lines)


def cell(values: list[float | None]) -> str:
    """Mean and standard deviation; none where one of the values is unknown."""
    if None in values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(set(values)) > 1 else "")


def draw_optimum(ax, e: Experiment, beta: float = 1.0):
    """The optimal curve as far as it can be trusted, from pi_ref on; beta times the KL is the implicit reward."""
    n, r_ref = int(e.curve["trusted"].sum()), e.held["rewards"]["reward"].mean().item()
    kl, reward = (e.curve[name].mean(1)[:n] for name in ("kl", "reward"))
    ax.plot([0, *beta * kl], [r_ref, *reward], color="0.25", label="the best of all policies (Eq. 4)")
    ax.plot(0, r_ref, "D", color=report.REF, ms=8, zorder=3, label=r"$\pi_\mathrm{ref}$")
    ax.set(xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response", ylabel="mean true reward, nats")


def draw_figure(e: Experiment, points: list[dict]) -> bytes:
    """A PNG: each method from its weaker to its stronger strength; its name stands at the right, in the order of reward."""
    fig = report.new_figure(10.5, 6)
    ax = fig.add_subplot()
    draw_optimum(ax, e)
    paths: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        paths.setdefault(p["method"], []).append((p["kl"], p["reward"]))
    for name, path in paths.items():
        marker = "^" if name in REFERENCE_FREE else "s" if METHODS[name].fresh else "o"
        ax.plot(*zip(*path), marker + "-", color=report.THETA if name == "dpo" else "0.45", ms=6, lw=0.7)
    for marker, label in (("o", "given pairs"), ("s", "fresh pairs"), ("^", "given pairs, no reference")):
        ax.plot([], [], marker, color="0.45", label=label)
    ends = sorted(paths.items(), key=lambda item: item[1][-1][1])
    for (name, path), y in zip(ends, np.linspace(0.05, 0.95, len(ends))):
        ax.annotate(name, path[-1], xytext=(1.06, y), textcoords="axes fraction", va="center", fontsize="small",
                    color=report.THETA if name == "dpo" else "0.2", arrowprops=dict(arrowstyle="-", color="0.8", lw=0.6))
    ax.set_title(f"{e.settings.data}, {e.counts['pairs']:,} pairs, seed {e.settings.seed}")
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    return report.png(fig)


# ----------------------------------------------------------------------------- the comparison

def run(settings: Settings, names: list[str], times: float, out: Path, device: torch.device) -> dict:
    """`train.prepare`, then each method at each strength, a stage each; results, table and figure."""
    e, points = train.prepare(settings, out, device), []
    for name in names:
        m = METHODS[name]
        sources = [inspect.getsource(of) for of in (LOSSES[m.loss or name], m.kind, m.fresh or m.kind, point, in_rounds, pairs)]
        for i, (hyper, rate) in enumerate(zip(m.strengths(), m.rates)):
            rate *= times * settings.rate
            e.stage.known["method"] = repr((name, hyper, rate, m.rounds, sources))
            points.append(e.stage(f"compare-{name}-{i}", f"method scores held_out batch seed answers dpo.py {train.TRAINS} "
                                  f"{train.JUDGES}", lambda: point(e, name, hyper, rate)))
    results = dict(config=config(settings), times=times, device=str(device), bf16=e.pi_ref.bf16, seconds=e.stage.seconds,
                   labels=e.counts, points=points, reference=dict(
                       reward=e.held["rewards"]["reward"].mean().item(), length=e.held["lengths"].double().mean().item()))
    files.write(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    files.write(out / "table.md", (table([results]) + "\n").encode())
    files.write(out / "figure.png", draw_figure(e, points))
    return results


def config(settings: Settings) -> dict:
    """As it is reported: of a path no more than its name."""
    return dataclasses.asdict(settings) | dict(imdb=settings.imdb and Path(settings.imdb).name)


def read_results(folder: Path) -> dict:
    with files.reading(folder / "results.json", "results of this comparison"):
        found = json.loads((folder / "results.json").read_bytes())
        table([found])
        return found


# ----------------------------------------------------------------------------- the command line, which mend.py shares

def parser_for(prog: str, description: str) -> terminal.Parser:
    parser = terminal.Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, terminal.between(1, 10 ** 7, int)
    add("--seed", type=terminal.between(0, 2 ** 32 - 1, int), metavar="N", help="of everything that is drawn (default 0)")
    for name, what in dict(reviews="that pi_ref is fine-tuned on", steps="of fine-tuning", batch="prompts in a step of training",
                           prompts="that preferences are collected on").items():
        add(f"--{name}", type=count, metavar="N", help=what)
    add("--held-out", type=terminal.between(2, 10 ** 5, int), metavar="N", help="prompts of the evaluation")
    add("--device", type=terminal.usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, mps (default: %(default)s)")
    add("--out", type=Path, default=Path("out/beyond"), help="the folder of everything that is written (default: %(default)s)")
    return parser


def settings_from(args: argparse.Namespace, defaults: dict) -> Settings:
    given = {f.name: value for f in dataclasses.fields(Settings) if (value := getattr(args, f.name, None)) is not None}
    return Settings(**defaults | given)


def main(argv: list[str]) -> int:
    parser = parser_for("compare.py", __doc__)
    add = parser.add_argument
    add("--data", choices=("toy", "imdb"), default="toy", help="the grammar's reviews (default), or IMDb's, which take hours")
    add("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is downloaded once (84 MB)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME", help="of " + ", ".join(METHODS) + " (all)")
    add("--times", type=terminal.between(1e-6, 1e6), default=1.0, metavar="X", help="multiply every method's rate by X")
    add("--summary", type=Path, nargs="+", metavar="DIR", help="print the table over these runs, and stop")
    args = parser.parse_args(argv)
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    if args.summary:
        try:
            print(table([read_results(folder) for folder in args.summary]))
        except files.BadInput as e:
            parser.error(str(e))
        return 0
    settings = settings_from(args, train.IMDB if args.data == "imdb" else SMALLER)
    return terminal.exit_code("compare.py", args.out, lambda: table([run(settings, args.methods, args.times, args.out, args.device)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
