"""Every method of beyond/ beside DPO, from one pi_ref and one set of prompts: reward against KL, the optimum behind.

    python -m beyond.compare [--data imdb] [--methods dpo ipo ...] [--seed N] [--out DIR]
    python -m beyond.compare --summary DIR DIR ...      the table over runs, mean and standard deviation, as markdown

World, pi_ref, preferences and evaluation are train.py's. Each method is trained at two strengths, a weaker and a stronger,
by train.optimise: one pass over the prompts. What differs is the loss, and for the last three methods the pairs.

How the rates were chosen: once, on seed 100, which is not among those that are reported. Each loss was first given the rate
at which its first steps are as long as DPO's; then of a quarter, half, once, twice and four times that rate (`--times`) the one
with the least loss on held-out pairs (`held_out_loss`) was kept: a criterion that needs no true reward.
"""
import argparse
import dataclasses
import inspect
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable
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
from data import BadInput
from train import Experiment, Settings

SMALLER = dict(prompts=5_000, answers=48)       # than train.py's toy world, so that all methods fit into ten minutes
REFERENCE_FREE = "orpo", "simpo"


# ----------------------------------------------------------------------------- preferences of other kinds, from the same completions

def as_they_are(e: Experiment, preferences: dpo.Preferences) -> dpo.Preferences:
    return preferences


def mismatched(e: Experiment, preferences: dpo.Preferences) -> dpo.Preferences:
    generator = torch.Generator().manual_seed(e.settings.seed)
    return with_mismatched(preferences, partial(train.score, e.pi_ref), generator)


def ranked(e: Experiment, preferences: dpo.Preferences) -> dpo.Preferences:
    generator = torch.Generator().manual_seed(e.settings.seed)
    pairs_, weight = pairs.rankings(rewards(e, preferences).cpu(), generator)
    return dataclasses.replace(preferences, pairs=pairs_.to(preferences.ids.device), weight=weight.to(preferences.ids.device))


def rewards(e: Experiment, preferences: dpo.Preferences) -> Tensor:
    """r* of the completions, (P, K) nats; -inf where there is none."""
    ends = (preferences.mask * torch.arange(1, preferences.mask.size(-1) + 1, device=preferences.mask.device)).amax(-1)
    texts = [data.text_of(ids[:end], e.tokenizer) for ids, end in zip(preferences.ids.flatten(0, 1).tolist(), ends.flatten().tolist())]
    r = e.rewards_of["reward"](texts).view(ends.shape).to(ends.device)
    return r.masked_fill(ends == 0, -torch.inf)


# ----------------------------------------------------------------------------- preferences from fresh completions, round by round

Draw = Callable[[list[list[int]]], list[list[int]]]


def online(e: Experiment, prompts: list[list[int]], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    return pairs.online(prompts, e.settings.completions, draw, e.rewards_of["reward"], e.tokenizer, "bt", rng)


def iterative(e: Experiment, prompts: list[list[int]], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    found = pairs.completed(prompts, 8, draw, e.rewards_of["reward"], e.tokenizer)
    return data.preferences(prompts, *pairs.best_and_worst(*found), e.tokenizer, "argmax", rng)[0]


def rso(e: Experiment, prompts: list[list[int]], draw: Draw, beta: float, rng: random.Random) -> list[dict]:
    ys, r = pairs.completed(prompts, 16, draw, e.rewards_of["reward"], e.tokenizer)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    kept = pairs.accepted(prompts, ys, r, beta, r.amax(1, keepdim=True), 3, generator)
    return data.preferences(*kept, e.tokenizer, "bt", rng)[0]


def in_rounds(e: Experiment, triplets: Callable, rounds: int, loss: dpo.Loss, rate: float, beta: float, name: str):
    """pi_theta after so many rounds, each on its share of the prompts, from pairs that the last round's pi_theta completed."""
    starts = e.preferences.mask[:, 0].int().argmax(-1).tolist()
    prompts = [ids[:start] for ids, start in zip(e.preferences.ids[:, 0].tolist(), starts)]
    pi_theta, rng = e.pi_ref, random.Random(e.settings.seed)
    for k in range(rounds):
        def draw(xs: list[list[int]]) -> list[list[int]]:
            return train.draw(pi_theta, xs, e.settings, e.tokenizer, f"sampling {name}, round {k}")
        ids, mask, which, weight = data.group(triplets(e, prompts[k::rounds], draw, beta, rng))
        scored = dpo.Preferences(*(t.to(e.preferences.ids.device) for t in (ids, mask, train.score(e.pi_ref, ids, mask), which, weight)))
        pi_theta, _ = train.optimise(pi_theta, scored, loss, rate, e.settings, f"{name}, round {k}")
    return pi_theta


# ----------------------------------------------------------------------------- the methods

@dataclass(frozen=True)
class Method:
    hyper: dict[str, tuple[float, ...] | float]     # the loss's own; a tuple has a value for each strength
    rates: tuple[float, ...]                        # peak learning rate at each strength, in units of Settings.rate
    why: str
    loss: str | None = None                         # in LOSSES; if not given, the method's name
    kind: Callable = as_they_are                    # of preferences
    rounds: tuple[Callable, int] | None = None      # triplets that are not the given ones, in how many rounds

    def strengths(self) -> list[dict[str, float]]:
        return [{name: v[i] if isinstance(v, tuple) else v for name, v in self.hyper.items()} for i in range(len(self.rates))]


BETA = (1.0, 0.5)
METHODS = {
    "dpo": Method(dict(beta=BETA), (1, 2.4), "the yardstick; Settings.rate is for beta 1"),
    "cdpo": Method(dict(beta=BETA, epsilon=0.1), (1, 2.4), "as if a tenth of the labels were flipped, though none is"),
    "robust": Method(dict(beta=BETA, epsilon=0.1), (0.8, 1.9), "as if a tenth of the labels were flipped, though none is"),
    "ipo": Method(dict(tau=(0.25, 0.125)), (0.125, 0.075), "tau = beta / 4: for small gaps of reward its optimum is then the tilt"),
    "hinge": Method(dict(beta=BETA), (0.5, 1.2), "its margin of 1 at DPO's scale"),
    "kto": Method(dict(beta=BETA), (4, 9.6), "equally many are desirable and undesirable, so both weigh 1", kind=mismatched),
    "sppo_hard": Method(dict(beta=(0.5, 0.25)), (0.25, 0.15), "half of DPO's beta: A - B is then the tilt's for small gaps"),
    "sppo": Method(dict(beta=(0.25, 0.125)), (0.25, 0.15), "a quarter of DPO's beta, by the same reckoning"),
    "orpo": Method(dict(lam=(0.5, 2.0)), (5, 2.5), "either side of 1, where both terms weigh the same"),
    "simpo": Method(dict(beta=(7.0, 3.5), gamma=0.5), (0.7, 1.6), "beta / 7 is DPO's, responses having 7 tokens"),
    "dpop": Method(dict(beta=BETA, lam=1.0), (0.7, 1.7), "a nat that y_w falls costs another nat of margin"),
    "r_dpo": Method(dict(beta=BETA, alpha=0.05), (1, 2.4), "a twentieth of a nat a token, though length is not rewarded here"),
    "ld_dpo": Method(dict(beta=BETA, alpha=0.5), (1, 2.4), "half of what is longer"),
    "plackett_luce": Method(dict(beta=BETA), (0.33, 0.8), "rankings instead of pairs, at DPO's beta", kind=ranked),
    "online": Method(dict(beta=BETA), (1, 2.4), "four completions a prompt, like DPO", "dpo", rounds=(online, 4)),
    "iterative": Method(dict(beta=BETA), (1, 2.4), "the best and the worst of eight", "dpo", rounds=(iterative, 3)),
    "rso": Method(dict(beta=BETA), (1, 2.4), "three accepted of sixteen, at the loss's beta", "dpo", rounds=(rso, 1)),
}


def point(e: Experiment, name: str, hyper: dict[str, float], rate: float) -> dict:
    """A method trained at one strength and evaluated: a row of results.json."""
    m, label = METHODS[name], f"{name}, " + ", ".join(f"{key} {value:g}" for key, value in hyper.items())
    loss = partial(LOSSES[m.loss or name], **hyper)
    if m.rounds:
        pi_theta = in_rounds(e, *m.rounds, loss, rate, hyper["beta"], label)
    else:
        pi_theta, _ = train.optimise(e.pi_ref, m.kind(e, e.preferences), loss, rate, e.settings, label)
    seen = train.evaluate(e, pi_theta, 1.0, label)["point"]     # at beta 1 r_hat is the change of log pi itself
    held = m.kind(e, e.pairs)
    losses = loss(train.score(pi_theta, held.ids, held.mask), held)[0]
    kept = "reward reward_se kl kl_se win_rate fraction_of_optimal fraction_of_optimal_se length pair_accuracy".split()
    return dict(method=name, hyper=hyper, rate=rate) | {key: seen[key] for key in kept} | dict(
        log_pi_w=seen["r_hat_w"], log_pi_l=seen["r_hat_l"],
        held_out_loss=((held.weight * losses).sum() / held.weight.sum()).item())


# ----------------------------------------------------------------------------- what is written for people

COLUMNS = dict(reward="reward", kl="KL", win_rate="wins", fraction_of_optimal="fraction", length="tokens",
               log_pi_w="log pi(y_w)", log_pi_l="log pi(y_l)")


def table(runs: list[dict]) -> str:
    """Markdown: a row for each method and strength, mean and, over several runs, standard deviation. A fraction is left
    out where a run's optimal curve does not reach. Errors: BadInput if the runs are not of the same methods."""
    rows = [[(p["method"], p["hyper"]) for p in run["points"]] for run in runs]
    if any(row != rows[0] for row in rows):
        raise BadInput("the runs are not of the same methods at the same strengths: name runs of one kind")
    lines = ["| " + " | ".join(("method", "at", *COLUMNS.values())) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for points in zip(*(run["points"] for run in runs)):
        mark = "\\*" * (points[0]["method"] in REFERENCE_FREE)
        at = ", ".join(f"{key} {value:g}" for key, value in points[0]["hyper"].items())
        cells = [mean_and_deviation([p[name] for p in points]) for name in COLUMNS]
        lines.append("| " + " | ".join((points[0]["method"] + mark, at, *cells)) + " |")
    return "\n".join(lines)


def mean_and_deviation(values: list[float | None]) -> str:
    if None in values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def new_figure(width: float, height: float):
    os.environ.setdefault("MPLCONFIGDIR", str(data.cache()))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def png(fig, dpi: int = 100) -> bytes:
    fig.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    return buffer.getvalue()


def draw_optimum(ax, e: Experiment):
    """The optimal curve as far as it can be trusted, from pi_ref on."""
    n, r_ref = int(e.curve["trusted"].sum()), e.held["rewards"]["reward"].mean().item()
    kl, reward = (e.curve[name].mean(1)[:n] for name in ("kl", "reward"))
    ax.plot([0, *kl], [r_ref, *reward], color="0.25", label="the best of all policies (Eq. 4)")
    ax.plot(0, r_ref, "D", color=train.REF, ms=8, zorder=3, label=r"$\pi_\mathrm{ref}$")
    ax.set(xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response", ylabel="mean true reward, nats")


def draw_figure(e: Experiment, points: list[dict]) -> bytes:
    """A PNG: each method's path from pi_ref through its strengths; the names stand at the right in the order of reward."""
    fig, ax = new_figure(10.5, 6)
    draw_optimum(ax, e)
    r_ref, by_name = e.held["rewards"]["reward"].mean().item(), {}
    for p in points:
        by_name.setdefault(p["method"], []).append(p)
    for name, its in by_name.items():
        marker = "^" if name in REFERENCE_FREE else "s" if METHODS[name].rounds else "o"
        colour = train.THETA if name == "dpo" else "0.45"
        ax.plot([0, *(p["kl"] for p in its)], [r_ref, *(p["reward"] for p in its)], "-", color=colour, lw=0.8, alpha=0.6)
        ax.plot([p["kl"] for p in its], [p["reward"] for p in its], marker, color=colour, ms=6)
    for marker, label in (("o", "given pairs"), ("s", "fresh pairs"), ("^", "given pairs, without a reference")):
        ax.plot([], [], marker, color="0.45", label=label)
    low, high, right = *ax.get_ylim(), 1.05 * max(p["kl"] for p in points)
    ends = sorted((max(its, key=lambda p: p["kl"]) for its in by_name.values()), key=lambda p: p["reward"])
    for end, y in zip(ends, np.linspace(low + 0.3 * (high - low), high, len(ends))):
        ax.annotate(end["method"], (end["kl"], end["reward"]), xytext=(right, y), va="center", fontsize="small",
                    arrowprops=dict(arrowstyle="-", color="0.8", lw=0.6))
    ax.set_title(f"{e.settings.data}, {e.counts['pairs']:,} pairs, seed {e.settings.seed}; DPO in colour")
    ax.set_xlim(-0.03 * right, 1.15 * right)
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    return png(fig)


# ----------------------------------------------------------------------------- the comparison

def run(settings: Settings, names: list[str], times: float, out: Path, device: torch.device) -> dict:
    """`train.prepare`, then each method at each strength, each a stage; results, table and figure."""
    e = train.prepare(settings, out, device)
    points = []
    for name in names:
        m = METHODS[name]
        made_by = [LOSSES[m.loss or name], m.kind, *(m.rounds or ())[:1]]
        for i, (hyper, rate) in enumerate(zip(m.strengths(), m.rates)):
            rate *= times * settings.rate
            e.stage.known["method"] = repr((name, hyper, rate, m.rounds and m.rounds[1], *map(inspect.getsource, made_by)))
            e.stage.known["beyond"] = inspect.getsource(pairs) + inspect.getsource(point) + inspect.getsource(in_rounds)
            points.append(e.stage(f"compare-{name}-{i}", "method beyond scores held_out batch seed answers dpo.py optimise "
                                  "like_lengths warm_then_linear evaluate draw score", lambda: point(e, name, hyper, rate)))
    results = dict(config=dataclasses.asdict(settings) | dict(imdb=settings.imdb and Path(settings.imdb).name), times=times,
                   device=str(device), bf16=e.pi_ref.bf16, seconds=e.stage.seconds, labels=e.counts,
                   reference=dict(reward=e.held["rewards"]["reward"].mean().item(),
                                  length=e.held["lengths"].double().mean().item(), nats_per_byte=e.held["nats_per_byte"]),
                   points=points)
    data.write(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    data.write(out / "table.md", (table([results]) + "\n").encode())
    data.write(out / "figure.png", draw_figure(e, points))
    return results


def read_results(folder: Path) -> dict:
    with data.reading(folder / "results.json", "results of this comparison"):
        found = json.loads((folder / "results.json").read_bytes())
        table([found])
        return found


# ----------------------------------------------------------------------------- the command line, which mend.py shares

def parser_for(prog: str, description: str) -> train.Parser:
    parser = train.Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, train.between(1, 10 ** 7, int)
    add("--seed", type=train.between(0, 2 ** 32 - 1, int), metavar="N", help="of everything that is drawn (default 0)")
    add("--reviews", type=count, metavar="N", help="that pi_ref is fine-tuned on")
    add("--steps", type=count, metavar="N", help="of fine-tuning")
    add("--prompts", type=count, metavar="N", help="that preferences are collected on")
    add("--batch", type=count, metavar="N", help="prompts in a step of training")
    add("--held-out", type=train.between(2, 10 ** 5, int), metavar="N", help="prompts of the evaluation")
    add("--device", type=train.usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps "
        "(default: %(default)s)")
    add("--out", type=Path, default=Path("out/beyond"), help="the folder of everything that is written (default: %(default)s)")
    return parser


def settings_from(args: argparse.Namespace, defaults: dict) -> Settings:
    given = {f.name: value for f in dataclasses.fields(Settings) if (value := getattr(args, f.name, None)) is not None}
    return Settings(**defaults | given)


def guarded(prog: str, work: Callable[[], object]) -> int:
    """The exit code of work(): 2 and one line if something given is unusable, 130 if interrupted."""
    try:
        work()
    except (BadInput, OSError, MemoryError) as e:
        print(f"{prog}:", " ".join(str(e).split())[:500] or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what ended is kept, run again to go on", file=sys.stderr)
        return 130
    return 0


def alone(out: Path, work: Callable[[], object]):
    """work() as the only run in its folder, and the time that it took."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with train.alone_in(out):
        work()
    print(f"{time.perf_counter() - began:.0f} s; see {out}")


def main(argv: list[str]) -> int:
    parser = parser_for("compare.py", __doc__)
    add = parser.add_argument
    add("--data", choices=("toy", "imdb"), default="toy", help="the grammar's reviews (default), or IMDb's, which take hours")
    add("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is downloaded once (84 MB)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME", help="of " + ", ".join(METHODS) + " (default: all)")
    add("--times", type=train.between(1e-6, 1e6), default=1.0, metavar="X", help="every method's rate by this factor")
    add("--summary", type=Path, nargs="+", metavar="DIR", help="print the table over these runs, and stop")
    args = parser.parse_args(argv)
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    if args.summary:
        return guarded("compare.py", lambda: print(table([read_results(folder) for folder in args.summary])))
    settings = settings_from(args, train.IMDB if args.data == "imdb" else SMALLER)
    return guarded("compare.py", lambda: alone(args.out, lambda: print(table(
        [run(settings, args.methods, args.times, args.out, args.device)]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
