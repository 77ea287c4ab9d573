"""Shared by compare, figure2, explain and ablations: the experiment, and its evaluation.

    pi_ref, preferences and held-out prompts, made as in train.py
        -> any method that turns pi_ref into a policy
        -> gain in true reward, KL, P(positive), length, win rate of fresh samples

Each policy is evaluated once, on the same prompts. A gain is the mean true reward minus
pi_ref's, in nats. P(positive) is the mean of sigmoid(r*).
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dpo
import train
from beyond.losses import split_rows
from beyond.page import DATASETS, LABELS, machine, recorded
from beyond.pairs import Ids, Reward, Sample, Score, rows_of_prompts
from data import Dataset, decode_rows, label_pairs, load_tokenizer
from lib import cli, evaluate
from lib.checkpoint import load_gpt
from lib.evaluate import EvalConfig, EvalSet
from lib.inference import compute_logps, generate
from lib.io import BadInput, atomic_write, open_user_file
from lib.stage import Stage

KEPT = (
    "gain gain_se reward reward_se kl kl_se p_positive length win_rate "
    "fraction_of_optimal fraction_of_optimal_se pair_accuracy r_hat_w r_hat_l"
).split()
BEST_OF = (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128)
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# ------------------------------------------------- the experiment before training


@dataclass(frozen=True)
class Experiment:
    """What every method starts from, and what evaluates it."""

    cfg: train.Config
    device: torch.device
    dataset: Dataset
    reference: dict  # pi_ref's checkpoint
    completions: tuple[Tensor, Tensor, Tensor]
    rewards: Tensor  # (P, K) r* of the completions
    preferences: dpo.Preferences
    eval_set: EvalSet
    ev: EvalConfig


def prepare(cfg: train.Config, stage: Stage, device: torch.device) -> Experiment:
    """The stages of train.py up to the preferences and the evaluation set.

    Raises BadInput for a dataset without a true reward.
    """
    if cfg.data not in ("toy", "imdb"):
        raise BadInput(f"--data {cfg.data}: this needs a known reward; use toy or imdb")
    seed, reference = cfg.seed, train.initial_model(cfg)
    dataset = train.load_dataset(cfg, stage, reference["tokens"])
    texts = dataset.sft_texts
    args = texts, *train.sft_settings(cfg, len(texts)), seed, device
    reference = stage("reference", train.sft, reference, *args)
    made = stage("completions", train.complete, reference, dataset, cfg.completions, seed, device)
    preferences = stage("preferences", label_pairs, *made, cfg.labels, seed)
    sizes = cfg.ref_samples, min(cfg.eval_samples, cfg.ref_samples), cfg.completions
    ev = EvalConfig(*sizes, cfg.labels, seed)
    eval_set = stage("eval_set", evaluate.make_eval_set, dataset, None, reference, ev, device)
    return Experiment(cfg, device, dataset, reference, *made, preferences, eval_set, ev)


# ------------------------------------------------- training and evaluation


def train_on_pairs(
    stage: Stage,
    name: str,
    e: Experiment,
    preferences: dpo.Preferences,
    loss: dpo.Loss,
    lr: float,
    epochs: int | None = None,
) -> dict:
    """Run `train.train_dpo` as a stage, from pi_ref, with any loss. lr: in units of --lr."""
    how = training(e.cfg, lr, epochs)
    return stage(name, train.train_dpo, e.reference, preferences, loss, how, None, e.device)


def training(cfg: train.Config, lr: float, epochs: int | None = None) -> train.Training:
    """lr: in units of --lr."""
    lr *= cfg.lr
    more = lr, epochs or cfg.epochs, cfg.batch_size, cfg.seed
    return train.Training(cfg.frozen, cfg.optimizer, *more)


def evaluated(stage: Stage, name: str, e: Experiment, policy: dict) -> dict:
    """Evaluate a policy as a stage, with beta 1, so that r_hat is the change in log pi."""
    args = e.reference, e.dataset, e.eval_set, 1.0, e.ev, e.device
    return stage(f"eval-{name}", evaluate.evaluate_policy, policy, *args)["point"]


def kept(point: dict) -> dict:
    return {name: point[name] for name in KEPT}


def subset(preferences: dpo.Preferences, prompts: Tensor) -> dpo.Preferences:
    """The preferences of these prompts, which are renumbered from 0."""
    some = preferences.select(prompts)
    _, number = some.prompt.unique_consecutive(return_inverse=True)
    return dataclasses.replace(some, prompt=number)


def prompts_of(preferences: dpo.Preferences) -> list[Ids]:
    """The token ids of each prompt."""
    first = rows_of_prompts(preferences.prompt)[:, 0]
    return [x for x, _ in split_rows(preferences.ids[first], preferences.mask[first])]


def true_reward(dataset: Dataset, reference: dict) -> Reward:
    """r*(x, y) of token ids."""
    tokenizer = load_tokenizer(reference["tokens"])
    return lambda ids, mask: dataset.reward(decode_rows(ids, tokenizer))


def sampler(policy: dict, seed: int, what: str, device: torch.device) -> Sample:
    """A function that samples from a policy, as `model.sample` does."""
    pi, tokenizer = load_gpt(policy, device), load_tokenizer(policy["tokens"])
    return lambda prompts: generate(pi, prompts, 1, tokenizer, seed, what)[0]


def scorer(reference: dict, device: torch.device) -> Score:
    """A function that computes log pi_ref of token ids."""
    return partial(compute_logps, load_gpt(reference, device))


# ------------------------------------------------- what the optimum does


def optimum_rows(r: Tensor, lengths: Tensor) -> list[dict]:
    """The optimum of Eq. 4 at each of `evaluate.BETAS`, by importance weights on pi_ref's samples.

    r, lengths: (P, N). Each row has beta, kl, gain, p_positive, length, and whether the estimate is
    reliable.
    """
    frontier = evaluate.optimal_frontier(r)
    r = r.double()
    values = {"gain": r - r.mean(), "p_positive": r.sigmoid(), "length": lengths.double()}
    rows = []
    for i, beta in enumerate(evaluate.BETAS):
        log_w, _ = dpo.optimal_policy(torch.zeros_like(r), r, float(beta))
        row = {name: (log_w.exp() * v).sum(1).mean().item() for name, v in values.items()}
        kl, reliable = frontier["kl"][i].mean().item(), bool(frontier["reliable"][i])
        rows.append({"beta": float(beta), "kl": kl, "reliable": reliable} | row)
    return rows


def best_of_n_rows(r: Tensor, lengths: Tensor) -> list[dict]:
    """The best of n samples of pi_ref by r*, at the bound log n - (n - 1)/n on its KL.

    r, lengths: (P, N). Unbiased: sample i in ascending order wins with probability
    C(i-1, n-1) / C(N, n).
    """
    N = r.size(1)
    order = r.argsort(1)
    values = {"gain": r.double() - r.double().mean(), "p_positive": r.double().sigmoid()}
    values |= {"length": lengths.double()}
    ascending = {name: v.gather(1, order).mean(0) for name, v in values.items()}
    rows = []
    for n in (n for n in BEST_OF if n <= N):
        p = torch.tensor(
            [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.double
        )
        row = {name: (p @ v).item() for name, v in ascending.items()}
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n} | row)
    return rows


def about(e: Experiment) -> dict:
    """What results.json says about pi_ref, the optimum and the run."""
    r, lengths = e.eval_set.rewards, e.eval_set.lengths
    return {
        "config": recorded(e.cfg),
        "pairs": len(e.preferences.pairs),
        "pair_accuracy_of_true_reward": accuracy_of_true_reward(e.eval_set),
        "reference": e.eval_set.about,
        "optimum": optimum_rows(r, lengths),
        "best_of_n": best_of_n_rows(r, lengths),
    } | machine(e.device)


def accuracy_of_true_reward(eval_set: EvalSet) -> float:
    """The ceiling of pair accuracy: how often r* orders the held-out pairs as labelled."""
    share = dpo.mean_weights(eval_set.pairs.weight.double())
    return (share * (eval_set.gap.sign() + 1) / 2).sum().item()


# ------------------------------------------------- statistics over seeds


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t; infinite for one value.

    From 11 values on, t is taken as 2.26, which is slightly wide.
    """
    n = len(values)
    if n == 1:
        return values[0], math.inf
    t = T_975.get(n - 1, 2.26)
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


def verdict(values: list[float]) -> str:
    """Whether a difference, one value for each seed, is above or below 0.

    "seen" or "reversed" needs at least three seeds and a 95% interval that excludes 0.
    """
    if len(values) < 3:
        return f"{'one seed' if len(values) == 1 else f'{len(values)} seeds'}: no verdict"
    mean, half = interval(values)
    if abs(mean) <= half:
        return "no difference seen"
    return "seen" if mean > 0 else "reversed"


def cell(values: list[float | None], digits: int = 2) -> str:
    """Mean and standard deviation over seeds; a dash where a value is missing."""
    if not values or None in values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def interval_cell(values: list[float]) -> str:
    """Mean and 95% interval over seeds."""
    if not values:
        return "-"
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:+.3f}"
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------- figures


def average(runs: list):
    """The mean over runs of each number in results.json.

    None if any run has no value. Booleans are true if all are. Other values are those of the first
    run.
    """
    first = runs[0]
    if None in runs:
        return None
    if isinstance(first, dict):
        return {key: average([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [average(list(each)) for each in zip(*runs, strict=False)]
    if isinstance(first, bool):
        return all(runs)
    return float(np.mean(runs)) if isinstance(first, int | float) else first


def title(runs: list[dict]) -> str:
    cfg, n = runs[0]["config"], np.mean([run["pairs"] for run in runs])
    seeds = ", ".join(str(run["config"]["seed"]) for run in runs)
    seeds = f"seed{'s' * (len(runs) > 1)} {seeds}"
    return f"{DATASETS[cfg['data']]}, {LABELS[cfg['labels']]}, {n:,.0f} pairs, {seeds}"


def draw_optimum(ax, results: dict, y: str, right: float):
    """The optimum, best of N, pi_ref, and a shaded region where the optimum cannot be estimated."""
    start = {"gain": 0.0, "p_positive": results["reference"]["p_positive"]}[y]
    reliable = [(0.0, start)] + [(f["kl"], f[y]) for f in results["optimum"] if f["reliable"]]
    end = reliable[-1][0]
    ax.plot(*np.transpose(reliable), color="0.3", lw=2.5)
    if end < right:
        ax.axvspan(end, right, color="0.94", zorder=0)
        style = {"color": "0.5", "fontsize": "small", "ha": "center"}
        text = "the optimum\ncannot be\nestimated in\nthis region"
        ax.text((end + right) / 2, 0.44, text, transform=ax.get_xaxis_transform(), **style)
    best = [(b["kl"], b[y]) for b in results["best_of_n"]]
    ax.plot(*np.transpose(best), "s:", color="0.55", ms=3, lw=1)
    ax.plot(0, start, "D", color="#1b6ca8", zorder=3)


def label(ax, text: str, x: float, y: float, color: str = "0.3", **more: object):
    """A direct label next to a point."""
    style = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
    ax.annotate(text, (x, y), color=color, **style | more)


# ------------------------------------------------- the command line


def command(
    prog: str,
    doc: str,
    settings: type,
    presets: dict,
    argv: list[str],
    run: Callable,
    table: Callable,
    draw: Callable,
) -> int:
    """Run an experiment; with `--summary DIR DIR ...`, print the table for finished runs,
    and draw their figure.

    run: (cfg, stage, device) -> results. table, draw: a list of results -> Markdown, Figure.
    """
    name = prog.removesuffix(".py")
    if argv[:1] == ["--summary"]:
        return summarise(prog, [Path(folder) for folder in argv[1:]], table, draw)
    args, cfg = cli.parse(prog, doc, settings, presets, argv, f"out/{name}")

    def work() -> str:
        stage = Stage(args.out)
        results = run(cfg, stage, args.device)
        results["seconds"] = {key: round(value, 2) for key, value in stage.seconds.items()}
        text = json.dumps(results, indent=1, allow_nan=False)
        atomic_write(args.out / "results.json", f"{text}\n".encode())
        atomic_write(args.out / "table.md", f"{table([results])}\n".encode())
        draw([results]).savefig(args.out / "figure.png", dpi=110)
        shown = f"see {args.out / 'figure.png'} and {args.out / 'table.md'}"
        more = f"next: the same with --seed {cfg.seed + 1} and another --out, then"
        return f"{shown}\n{more} python -m beyond.{name} --summary DIR DIR ..."

    return cli.run_cli(prog, args.out, args.debug, work)


def summarise(prog: str, folders: list[Path], table: Callable, draw: Callable) -> int:
    """Print the table for finished runs, and draw their figure next to the first folder.

    For results/figure2-0 it is results/figure2.png.
    """
    try:
        if not folders:
            raise BadInput("--summary needs the folders of finished runs")
        runs = [read_results(folder, table) for folder in folders]
        print(table(runs))
        first = folders[0].resolve()
        path = first.with_name(re.sub(r"-\d+$", "", first.name) + ".png")
        draw(runs).savefig(path, dpi=110)
        print(f"see {path}", file=sys.stderr)
    except BadInput as e:
        print(f"{prog}: {e}", file=sys.stderr)
        return 2
    return 0


def read_results(folder: Path, table: Callable) -> dict:
    """A finished run's results.json. Raises BadInput for anything else."""
    path = folder / "results.json"
    with open_user_file(path, "results of this command"):
        results = json.loads(path.read_bytes())
        table([results])
        return results
