"""Figure 2 of the paper, left, whole: reward against KL of every method that it compares, from one pi_ref.

    python -m beyond.figure2 [--data imdb] [--labels argmax] [--seed N] [--out DIR]
    python -m beyond.figure2 --summary DIR DIR ...      the paper's claims over these runs, as markdown

    DPO             Eq. 7                                       beta 0.05, 0.1, 1, 5
    Preferred-FT    -log pi(y_w)                                over seeds
    Unlikelihood    -log pi(y_w) + alpha log pi(y_l)            alpha 0.05, 0.1, 0.5, 1
    PPO             ppo.py, a reward learned from the pairs     target KL 3, 6, 9, 12
    PPO-GT          ppo.py, the true reward                     target KL 3, 6, 9, 12
    best of N       N samples of pi_ref, the best by r*         N to 128, at a bound on its KL

World, pi_ref, preferences and evaluation are train.py's. Training is evaluated as it goes, and every evaluation is a point. In
the toy world there are also beta 0.5 and 2, and targets 0.5, 1 and 2, where the optimal curve can be trusted.

A method's *frontier* is the concave hull of its points, pi_ref among them: a coin that picks one of two policies for each
response has the mean of their rewards, and at most the mean of their KLs, so what lies on the hull can be had.

Samples are responses drawn for a method: the completions behind the pairs it has been trained on so far (all of them for the
reward model), and those that it drew. Seconds are those of drawing and scoring them, and of training.
"""
import dataclasses
import inspect
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import dpo
import train
from beyond import losses, ppo
from beyond.compare import cell, config, parser_for, prompts_in, settings_from
from beyond.ppo import Reward, Scalar, Tuning
from dpo import Preferences
from kit import batches, checkpoints, estimates, files, report, terminal
from model import GPT
from train import Experiment, Settings

Run = dict[str, str | float]            # "method", what it is swept over, and its rate


@dataclass(frozen=True)
class Sweep:
    """What is run in a world. How rates and PPO's dials were chosen is told in README.md."""
    settings: dict                      # of train.py, where they differ
    dpo: dict[float, float]             # beta -> the peak rate, in units of Settings.rate
    preferred: float                    # the rate, likewise
    unlikelihood: dict[float, float]    # alpha -> the rate, likewise
    kl: tuple[float, ...]               # PPO's targets, nats
    tuning: Tuning
    reward_rates: tuple[float, ...]     # of AdamW, for the reward model
    evaluations: int                    # of a run, at even distances, the last at its end
    grid: tuple[float, ...]             # KL at which frontiers are compared

    def runs(self) -> list[Run]:
        return [*(dict(method="DPO", beta=beta, rate=rate) for beta, rate in self.dpo.items()),
                *(dict(method="Preferred-FT", order=seed, rate=self.preferred) for seed in range(3)),
                *(dict(method="Unlikelihood", alpha=alpha, rate=rate) for alpha, rate in self.unlikelihood.items()),
                *(dict(method=name, kl=kl, rate=self.tuning.rate) for name in ("PPO", "PPO-GT") for kl in self.kl)]


TOY = Sweep(dict(answers=48), dpo={0.05: 10, 0.1: 6, 0.5: 2.4, 1: 1, 2: 0.42, 5: 0.13}, preferred=0.1,
            unlikelihood={0.05: 0.1, 0.1: 0.1, 0.5: 0.03, 1: 0.03}, kl=(0.5, 1, 2, 3, 6, 9, 12), tuning=Tuning(),
            reward_rates=(3e-4, 1e-3, 3e-3), evaluations=4, grid=(0.5, 1, 2, 3, 6, 9, 12))
IMDB = Sweep(train.IMDB | dict(prompts=8_000, answers=24), dpo={0.05: 42, 0.1: 18, 1: 1, 5: 0.13}, preferred=0.3,
             unlikelihood={0.05: 0.3, 0.1: 0.3, 0.5: 0.1, 1: 0.02}, kl=(3, 6, 9, 12),
             tuning=Tuning(iterations=40, minibatches=4, rate=1e-4), reward_rates=(1e-4, 3e-4), evaluations=4,
             grid=(0.5, 1, 2, 3, 6, 9, 12))


# ----------------------------------------------------------------------------- the methods

def preferred_ft(pi_theta: Tensor, batch: Preferences) -> tuple[Tensor, Tensor, Tensor]:
    """-log pi_theta(y_w|x): fine-tuning on what was preferred.  As dpo.dpo."""
    w, l = losses.of_pairs(pi_theta.sum(-1), batch)
    return -w, w, l


def unlikelihood(pi_theta: Tensor, batch: Preferences, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """-log pi_theta(y_w|x) + alpha log pi_theta(y_l|x), without a bound below.  The paper's section 6, after Welleck et al.
    2019.  As dpo.dpo."""
    w, l = losses.of_pairs(pi_theta.sum(-1), batch)
    return -w + alpha * l, w, l


LOSSES = {"DPO": dpo.dpo, "Preferred-FT": preferred_ft, "Unlikelihood": unlikelihood}


def marks(steps: int, evaluations: int) -> set[int]:
    return {steps * k // evaluations for k in range(1, evaluations + 1)}


def snapshot(pi: GPT, seconds: float, samples: int) -> dict:
    return dict(weights={name: w.detach().clone().cpu() for name, w in pi.state_dict().items()}, seconds=seconds, samples=samples)


def from_pairs(e: Experiment, run: Run, evaluations: int) -> list[dict]:
    """Snapshots of a run on the given pairs."""
    K, made = e.settings.completions, e.stage.seconds["completions"] + e.stage.seconds["scores"]
    settings = dataclasses.replace(e.settings, seed=e.settings.seed + 1000 * run.get("order", 0))
    found, began = [], time.perf_counter()

    def watch(pi_theta: GPT, step: int, steps: int):
        if step in marks(steps, evaluations):
            found.append(snapshot(pi_theta, time.perf_counter() - began + made * step / steps,
                                  K * len(e.preferences.ids) * step // steps))
    loss = partial(LOSSES[run["method"]], **{name: run[name] for name in ("beta", "alpha") if name in run})
    train.optimise(e.pi_ref, e.preferences, loss, run["rate"] * settings.rate, settings, name_of(run), watch)
    return found


def from_samples(e: Experiment, run: Run, reward: Reward, critic: Scalar, tuning: Tuning, evaluations: int, spent: dict
                 ) -> list[dict]:
    """Snapshots of a run of PPO; `spent` are the seconds and samples that its reward cost."""
    found, began = [], time.perf_counter()
    bar = train.tqdm(ppo.ppo(e.pi_ref, critic, prompts_in(e.preferences), reward, e.tokenizer.eot_token, run["kl"],
                             dataclasses.replace(tuning, rate=run["rate"]), e.settings.seed), total=tuning.iterations, desc=name_of(run))
    for i, (pi_theta, seen) in enumerate(bar, 1):
        bar.set_postfix_str("reward {reward:.2f}, KL {kl:.2f}, beta {beta:.3f}".format(**seen))
        if i in marks(tuning.iterations, evaluations):
            found.append(snapshot(pi_theta, time.perf_counter() - began + spent["seconds"], i * tuning.batch + spent["samples"]))
    return found


def name_of(run: Run) -> str:
    return ", ".join([run["method"], *(f"{name} {value:g}" for name, value in run.items() if name not in ("method", "rate"))])


def normalised(reward: Reward, e: Experiment, prompts: int = 1000) -> Reward:
    """The reward with mean 0 and deviation 1 over pi_ref's completions of the first prompts."""
    some = e.preferences[torch.arange(min(prompts, len(e.preferences.ids)))]
    real = some.mask.any(-1)
    pairs = [(ids[:start], ids[start:end]) for ids, start, end in zip(
        some.ids[real].tolist(), some.mask[real].int().argmax(-1).tolist(),
        (some.mask[real] * torch.arange(1, some.mask.size(-1) + 1)).amax(-1).tolist())]
    r = torch.cat([reward(*zip(*part)) for part in train.in_groups(pairs, 256)])
    mean, deviation = r.mean(), r.std()
    return lambda xs, ys: (reward(xs, ys) - mean) / deviation


# ----------------------------------------------------------------------------- frontiers, and the paper's claims

def hull(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The concave hull of points (KL, reward), as far as it rises: what a mixture of them reaches for its KL."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while kept and (y >= kept[-1][1] and x == kept[-1][0] or len(kept) > 1 and
                        (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) <= (y - kept[-2][1]) * (kept[-1][0] - kept[-2][0])):
            kept.pop()
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    xs, ys = zip(*kept)
    return np.array(xs), np.array(ys)


def frontier_at(run: dict, method: str, kl: float) -> tuple[float | None, str]:
    """The reward on a method's frontier at no more than this KL, None where the optimum cannot be told; and the brackets to put
    it in: () where no point of the method goes so far, [] where all go further, so that a chord from pi_ref stands there."""
    start = 0.0, run["reference"]["reward"]
    points = [(p["kl"], p["reward"]) for p in run["points"] if p["method"] == method]
    if method == "optimum":
        points = [(f["kl"], f["reward"]) for f in run["frontier"] if f["trusted"]]
    if method == "best of N":
        points = [(b["kl_bound"], b["reward"]) for b in run["best_of_n"]]
    nearest, farthest = (of([x for x, _ in points], default=0.0) for of in (min, max))
    if method == "optimum" and kl > farthest:
        return None, ""
    return float(np.interp(kl, *hull([start, *points]))), "()" if kl > farthest else "[]" if kl < nearest else ""


CLAIMS = {  # the paper's, of DPO's frontier against another's: which, and at how many of the grid's KLs
    "DPO lies above PPO": ("PPO", None), "DPO lies above PPO-GT": ("PPO-GT", None),
    "DPO lies above PPO at low KL": ("PPO", 2), "DPO lies above PPO-GT at low KL": ("PPO-GT", 2),
    "Preferred-FT lies below DPO": ("Preferred-FT", None), "Unlikelihood lies below DPO": ("Unlikelihood", None)}


def verdict(differences: list[list[float]]) -> str:
    """Of DPO less another, a list over runs for each KL. Seen: above 0 at every KL by two standard errors over the runs, or, of
    one run, above 0; reversed: below 0 likewise; mixed: neither."""
    signs = set()
    for d in differences:
        margin = 2 * np.std(d, ddof=1) / math.sqrt(len(d)) if len(d) > 1 else 0.0
        signs.add(0 if abs(np.mean(d)) <= margin else int(np.sign(np.mean(d))))
    return {frozenset({1}): "seen", frozenset({-1}): "reversed"}.get(frozenset(signs), "mixed")


def summary(runs: list[dict]) -> str:
    """Markdown: each method's frontier at no more than each KL of the grid, in the brackets that any run asks for; each claim's
    differences and verdict. Mean and, over several runs, standard deviation.
    Errors: BadInput if the runs are not of the same sweep."""
    if any((run["grid"], run["runs"]) != (runs[0]["grid"], runs[0]["runs"]) for run in runs):
        raise files.BadInput("these runs are not of the same sweep")
    grid, methods = runs[0]["grid"], dict.fromkeys(run["method"] for run in runs[0]["runs"])

    def rewards(method: str, kl: float) -> tuple[list[float | None], str]:
        each, brackets = zip(*(frontier_at(run, method, kl) for run in runs))
        return list(each), max(brackets)
    head = "".join(f" {kl:g} |" for kl in grid)
    lines = [f"| reward at a KL of |{head}", "|---" * (1 + len(grid)) + "|"]
    for method in ("optimum", "best of N", *methods):
        cells = [around[:1] + cell(each) + around[1:] for each, around in (rewards(method, kl) for kl in grid)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", f"| claim; DPO's reward less the other's at |{head} |", "|---" * (2 + len(grid)) + "|"]
    for claim, (other, first) in CLAIMS.items():
        if {other, "DPO"} <= methods.keys():
            less = [[a - b for a, b in zip(rewards("DPO", kl)[0], rewards(other, kl)[0])] for kl in grid[:first]]
            lines.append(f"| {claim} | " + " | ".join([*map(cell, less)] + [""] * (len(grid) - len(less))) + f" | {verdict(less)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- the figure

LOOK = {"DPO": ("o", report.THETA), "PPO-GT": ("^", "0.1"), "PPO": ("s", "#7b5aa6"), "Unlikelihood": ("v", "#4d9221"),
        "Preferred-FT": ("P", "0.55")}


def draw_figure(results: dict, title: str) -> bytes:
    """A PNG. Left: every evaluation, large at a run's end; each method's frontier; the optimum behind; KL on a scale of square
    roots, on which the optimum begins as a straight line. Right: reward against what it cost, each line a run."""
    fig = report.new_figure(12, 6.2)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter      # once new_figure has said where its cache is
    grid = fig.add_gridspec(2, 2, width_ratios=(1.9, 1))
    ax, by_seconds, by_samples = fig.add_subplot(grid[:, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, 1])
    r_ref, points = results["reference"]["reward"], results["points"]
    trusted = [(f["kl"], f["reward"]) for f in results["frontier"] if f["trusted"]]
    ax.plot(*zip((0, r_ref), *trusted), color="0.25", lw=2.5, label="the best of all policies (Eq. 4)")
    ax.plot(*zip(*[(b["kl_bound"], b["reward"]) for b in results["best_of_n"]]), "D-", mfc="white", color="0.4", ms=4, lw=1,
            label="best of N, at an upper bound on its KL")
    for method, (marker, color) in LOOK.items():
        if not (own := [p for p in points if p["method"] == method]):
            continue
        for last, size, alpha in ((False, 3.5, 0.45), (True, 8, 0.9)):
            some = [p for p in own if p["last"] == last]
            ax.plot([p["kl"] for p in some], [p["reward"] for p in some], marker, color=color, ms=size, alpha=alpha, mec="white",
                    mew=0.5, label=method if last else None)
        xs, ys = hull([(0, r_ref), *((p["kl"], p["reward"]) for p in own)])
        dense = np.linspace(0, np.sqrt(xs[-1]), 200) ** 2
        ax.plot(dense, np.interp(dense, xs, ys), "-", color=color, lw=1)
        for run in dict.fromkeys(p["run"] for p in own):
            line = [p for p in own if p["run"] == run]
            for small, what in ((by_seconds, "seconds"), (by_samples, "samples")):
                small.plot([p[what] for p in line], [p["reward"] for p in line], marker + "-", color=color, ms=3, lw=0.8, alpha=0.8)
    ax.plot(0, r_ref, "D", color=report.REF, ms=8, label=r"$\pi_\mathrm{ref}$")
    right = 1.2 * results["grid"][-1]
    rewards = [r_ref, *(p["reward"] for p in points if p["kl"] < right)]
    ax.set_xscale("function", functions=(np.sqrt, np.square))
    ax.set(xlim=(0, right), ylim=(min(rewards) - 0.1, 1.05 * max(rewards) + 0.1), title=title, xticks=(0, 0.1, *results["grid"]),
           xlabel=r"KL($\pi_\theta$, $\pi_\mathrm{ref}$), nats per response, square roots", ylabel="mean true reward, nats")
    for small, what in ((by_seconds, "seconds of drawing, scoring and training"), (by_samples, "responses drawn")):
        small.axhline(r_ref, color=report.REF, lw=1)
        small.set(xscale="log", xlabel=what, ylabel="reward", ylim=ax.get_ylim())
        small.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        small.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        small.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="upper left", frameon=False, fontsize="small")
    return report.png(fig)


# ----------------------------------------------------------------------------- the sweep

def run(sweep: Sweep, settings: Settings, methods: list[str], out: Path, device: torch.device) -> dict:
    """`train.prepare`, the reward model, then every run and each of its evaluations, a stage each; results, table, figure."""
    e = train.prepare(settings, out, device)
    e.stage.known |= dict(rates=sweep.reward_rates, evaluations=sweep.evaluations, tuning=sweep.tuning, on_samples=sources(
        ppo, from_samples, snapshot, marks, normalised, batches), on_pairs=sources(from_pairs, snapshot, marks, *LOSSES.values()))
    learned = e.stage("reward_model", "scores batch seed on_samples dpo.py model.py rates", lambda: fit(e, sweep.reward_rates))
    r_phi = Scalar(e.pi_ref).requires_grad_(False)
    r_phi.load_state_dict(learned["weights"])
    rewards = {"PPO": (ppo.reward_of(r_phi), r_phi, dict(
                   seconds=e.stage.seconds["completions"] + e.stage.seconds["reward_model"],
                   samples=settings.completions * len(e.preferences.ids))),
               "PPO-GT": (true_reward(e), Scalar(e.pi_ref), dict(seconds=0.0, samples=0))}

    def make(one: Run) -> list[dict]:
        if one["method"] in LOSSES:
            return from_pairs(e, one, sweep.evaluations)
        reward, critic, spent = rewards[one["method"]]
        return from_samples(e, one, normalised(reward, e), critic, sweep.tuning, sweep.evaluations, spent)
    runs, points = [one for one in sweep.runs() if one["method"] in methods], []
    for one in runs:
        name, e.stage.known["run"] = re.sub("[^a-z0-9.]+", "-", name_of(one).lower()), one
        needs = f"on_pairs batch {train.TRAINS}" if one["method"] in LOSSES else "on_samples reward_model tuning"
        kept = e.stage(name, f"run evaluations scores rate seed dpo.py model.py {needs}", lambda: make(one))
        for k, found in enumerate(kept, 1):
            pi_theta = checkpoints.load(dict(config=dataclasses.asdict(e.pi_ref.config), weights=found["weights"]), device)
            seen = e.stage(
                f"{name}-{k}", f"{name} held_out answers seed {train.JUDGES}",
                lambda: train.evaluate(e, pi_theta.requires_grad_(False), 1.0, f"{name_of(one)}, {k} of {len(kept)}"))["point"]
            points.append(dict(run=name_of(one), method=one["method"], part=k / len(kept), last=k == len(kept),
                               seconds=found["seconds"], samples=found["samples"]) | {key: seen[key] for key in KEPT})
    r = e.held["rewards"]["reward"]
    results = dict(
        config=config(settings), grid=sweep.grid, runs=runs, tuning=dataclasses.asdict(sweep.tuning), device=str(device),
        bf16=e.pi_ref.bf16, seconds=e.stage.seconds, labels=e.counts,
        reference=dict(reward=r.mean().item(), length=e.held["lengths"].double().mean().item()),
        reward_model=dict(looked=learned["looked"], pair_accuracy=learned["pair_accuracy"]),
        frontier=estimates.along(e.curve), best_of_n=estimates.best_of_each_n(r), points=points)
    files.write(out / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    files.write(out / "table.md", (summary([results]) + "\n").encode())
    files.write(out / "figure.png", draw_figure(
        results, f"{settings.data}, {settings.labels} labels, {e.counts['pairs']:,} pairs, seed {settings.seed}"))
    return results


KEPT = "reward reward_se kl kl_se kl_median win_rate fraction_of_optimal fraction_of_optimal_se length pair_accuracy".split()


def sources(*of) -> str:
    return "".join(inspect.getsource(each) for each in of)


def true_reward(e: Experiment) -> Reward:
    return lambda xs, ys: e.rewards_of["reward"]([data.text_of(x + y, e.tokenizer) for x, y in zip(xs, ys)])


def fit(e: Experiment, rates: tuple[float, ...]) -> dict:
    """The reward model, and how it orders the held-out pairs, beside DPO's implicit reward in each point."""
    r_phi, looked = ppo.fit_reward(e.pi_ref, e.preferences, rates, e.settings.batch, e.settings.seed)
    return dict(weights=r_phi.state_dict(), looked=looked, pair_accuracy=ppo.accuracy(r_phi, e.held_pairs))


def main(argv: list[str]) -> int:
    parser = parser_for("figure2.py", __doc__)
    add = parser.add_argument
    add("--data", choices=("toy", "imdb"), default="toy", help="the grammar's reviews (default), or IMDb's, which take an hour")
    add("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is downloaded once (84 MB)")
    add("--labels", choices=("bt", "argmax"), help="drawn from Bradley-Terry (default), or the paper's")
    add("--methods", nargs="+", choices=LOOK, default=[*LOOK], metavar="NAME", help="of " + ", ".join(LOOK) + " (all)")
    add("--iterations", type=terminal.between(1, 10 ** 6, int), metavar="N", help="of PPO")
    add("--summary", type=Path, nargs="+", metavar="DIR", help="print the table over these runs, and stop")
    args = parser.parse_args(argv)
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    if args.summary:
        try:
            print(summary([read_results(folder) for folder in args.summary]))
        except files.BadInput as e:
            parser.error(str(e))
        return 0
    sweep = IMDB if args.data == "imdb" else TOY
    if args.iterations:
        sweep = dataclasses.replace(sweep, tuning=dataclasses.replace(sweep.tuning, iterations=args.iterations))
    settings = settings_from(args, sweep.settings)
    return terminal.exit_code("figure2.py", args.out, lambda: summary([run(sweep, settings, args.methods, args.out, args.device)]))


def read_results(folder: Path) -> dict:
    with files.reading(folder / "results.json", "results of this sweep"):
        found = json.loads((folder / "results.json").read_bytes())
        summary([found])
        return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
