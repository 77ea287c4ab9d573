"""Evaluation on held-out prompts: reward, KL, and the distance to the optimum of Eq. 4.

Standard errors are over prompts: prompts are independent, and samples for one prompt are not.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import dpo
from data import Dataset, decode_rows, label_pairs, load_tokenizer
from lib.inference import LOCAL, Inference
from model import GPT

BETAS = np.geomspace(20, 0.05, 80)  # where the optimum is estimated; falling, so its KL rises
MIN_SAMPLE_SIZE = 40  # with a smaller effective sample size, the optimum cannot be estimated


@dataclass(frozen=True)
class EvalConfig:
    ref_samples: int  # N samples of pi_ref for each prompt
    samples: int  # M samples of pi_theta
    completions: int  # K: 16 samples of pi_ref are paired as in training, in groups of K
    labels: str
    seed: int


@dataclass(frozen=True)
class EvalSet:
    """P held-out prompts with samples of pi_ref, and held-out pairs."""

    about: dict[str, float]  # pi_ref's row of results.json
    shown: dict[str, list]  # see `measure`
    rewards: Tensor | None  # (P, N) nats; None if r* is unknown
    lengths: Tensor  # (P, N) tokens
    pairs: dpo.Preferences
    gap: Tensor | None  # r*(y_w) - r*(y_l) of each pair, (n,) nats


def make_eval_set(dataset, pairs, reference, cfg: EvalConfig, device, infer=LOCAL) -> EvalSet:
    """Sample pi_ref on the held-out prompts. `pairs`: None to form them from the samples."""
    N = cfg.ref_samples
    K = min(cfg.completions, 16)
    how = dataset, cfg.seed, "sampling pi_ref", infer
    samples, shown, values = measure(infer.load(reference, device), dataset.eval_prompts, N, *how)
    about = means_and_errors(values)
    if pairs is not None:
        return EvalSet(about, shown, None, values["length"], pairs, None)
    rewards = values["reward"]
    used = 16 // K * K
    some = [part.view(-1, N, part.size(1))[:, :used].flatten(0, 1) for part in samples]
    pairs = label_pairs(some, rewards[:, :used].reshape(-1, K), cfg.labels, cfg.seed)
    r = dataset.reward(decode_rows(pairs.ids, load_tokenizer(dataset.tokens)))
    r_w, r_l = r[pairs.pairs.T]
    return EvalSet(about, shown, rewards, values["length"], pairs, r_w - r_l)


def measure(pi: GPT, prompts, n: int, dataset: Dataset, seed: int, what: str, infer: Inference):
    """Sample n responses to each of P prompts: ids, mask and logps (P n, T).

    Also returns the first text of each of up to 12 prompts with its reward, and metrics (P, n).
    """
    samples, texts = infer.generate(pi, prompts, n, load_tokenizer(dataset.tokens), seed, what)
    _, mask, logps = samples
    values = {"length": mask.sum(1), "entropy": -logps.sum(1)}
    shown = {"texts": texts[::n][:12]}
    if dataset.reward is not None:
        r = dataset.reward(texts)
        values |= {"reward": r, "p_positive": r.sigmoid()}
        shown["rewards"] = r[::n][:12].tolist()
    return samples, shown, {name: value.view(-1, n) for name, value in values.items()}


def evaluate_policy(policy, reference, dataset, eval_set, beta, cfg, device, infer=LOCAL) -> dict:
    """Sample pi_theta on the held-out prompts, and compare it with pi_ref.

    Metrics of pairs are those of DPO's implicit reward, whatever loss pi_theta was trained with.
    Returns "point", a row of results.json, and "shown", some of the samples.
    """
    pi_theta = infer.load(policy, device)
    pi_ref = infer.load(reference, device)
    M = cfg.samples
    how = dataset, cfg.seed, "sampling pi_theta", infer
    (ids, mask, _), shown, values = measure(pi_theta, dataset.eval_prompts, M, *how)
    kl = values["kl"] = infer.mean_kl(pi_theta, pi_ref, ids, mask).view(-1, M)
    loss = partial(dpo.dpo, beta=beta)
    point = {"beta": beta} | agreement(pi_theta, eval_set.pairs, eval_set.gap, loss, infer)
    if (ref_r := eval_set.rewards) is not None:
        r = values["reward"]
        values["gain"] = r.mean(1, keepdim=True) - ref_r.mean(1, keepdim=True)  # paired by prompt
        values["win_rate"] = (r - ref_r[:, :M]).sign() / 2 + 0.5  # a tie counts as 1/2
        point |= optimality_gap(ref_r, r, kl, beta, cfg.labels)
    return {"point": point | means_and_errors(values), "shown": shown}


def agreement(pi_theta: GPT, pairs: dpo.Preferences, gap, loss: dpo.Loss, infer=LOCAL) -> dict:
    """The implicit reward on held-out pairs: `dpo.pair_metrics`, and a regression.

    gap: r*(y_w) - r*(y_l) of each pair, (n,) nats. r_hat_w - r_hat_l is regressed on it, without an
    intercept. The slope is 1 if r_hat equals r* up to a constant for each prompt. R2 is uncentred.
    """
    logps = infer.compute_logps(pi_theta, pairs.ids, pairs.mask)
    share = dpo.mean_weights(pairs.weight.double())
    _, r_hat_w, r_hat_l = losses = loss(logps.double(), pairs)
    found = {name: value.item() for name, value in dpo.pair_metrics(share, *losses).items()}
    found["pair_accuracy"] = found.pop("accuracy")
    if gap is not None:
        gap = gap.double()
        margin = r_hat_w - r_hat_l
        found["pair_accuracy_ceiling"] = (share @ (gap.sign() + 1)).item() / 2  # that of r*
        slope = (margin @ gap) / (gap @ gap)  # unweighted: flipping a pair changes nothing
        found["reward_slope"] = slope.item()
        found["reward_r2"] = (slope * (margin @ gap) / (margin @ margin)).item()
    return found | {"pairs": len(pairs.pairs), "pair_prompts": len(pairs.prompt.unique())}


# ------------------------------------------------ the optimum


def optimal_frontier(r: Tensor) -> dict:
    """Reward and KL of Eq. 4 at each of BETAS, from pi_ref's rewards r (P, N).

    Returns beta (80,), reward and kl (80, P) in nats, and reliable (80,): whether the mean
    effective sample size is at least MIN_SAMPLE_SIZE.
    """
    found = dpo.frontier(r.double(), torch.from_numpy(BETAS)[:, None, None])
    reward, kl, sample_size = (values.numpy() for values in found)
    reliable = sample_size.mean(1) >= MIN_SAMPLE_SIZE
    return {"beta": BETAS, "reward": reward, "kl": kl, "reliable": reliable}


def optimality_gap(ref_r: Tensor, r: Tensor, kl: Tensor, beta: float, labels: str) -> dict:
    """How close a policy is to the optimum. ref_r: (P, N); r, kl: (P, M) of the policy's samples.

    fraction_of_optimal: the gain in reward over pi_ref, divided by the largest gain at the same KL.
    optimal_reward, optimal_kl: of Eq. 4 at this beta. regret: J(optimum) - J(policy), Eq. 3, nats.
    Values are None where the optimum cannot be estimated. With argmax labels, Eq. 4 for r* is not
    what DPO aims at, so only fraction_of_optimal is estimated.
    """
    gap = fraction_of_optimal(ref_r, r.mean(1), kl.mean(1))
    best_r, best_kl, sample_size = dpo.frontier(ref_r.double(), beta)
    regret = (best_r - beta * best_kl)[:, None] - (r - beta * kl).double()
    values = {"optimal_reward": best_r.mean().item(), "optimal_kl": best_kl.mean().item()}
    values |= means_and_errors({"regret": regret})
    if labels == "argmax" or sample_size.mean() < MIN_SAMPLE_SIZE:
        values = dict.fromkeys(values)
    return gap | values


def fraction_of_optimal(ref_r: Tensor, r: Tensor, kl: Tensor) -> dict:
    """(E r - E r_ref) / (E r_optimal(KL) - E r_ref) and its jackknife standard error over prompts.

    ref_r: (P, N). r, kl: means per prompt, (P,). None where the optimum cannot be estimated.
    """
    frontier = optimal_frontier(ref_r)
    P = len(r)
    ref_r, r, kl = (values.double().numpy() for values in (ref_r.mean(1), r, kl))
    optimal_kl = frontier["kl"]
    optimal_gain = frontier["reward"] - ref_r  # (80, P)

    def fraction(w):  # weights of the prompts (P,): Eq. 4 has the same beta for all prompts
        largest = np.interp(kl @ w, [0, *optimal_kl @ w], [0, *optimal_gain @ w])
        return float((r - ref_r) @ w / largest)

    found = se = None
    covered = optimal_kl.mean(1)[frontier["reliable"]]
    if covered.min(initial=np.inf) <= kl.mean() <= covered.max(initial=0.0):
        found = fraction(np.full(P, 1 / P))
        without_one = [fraction(w) for w in (1 - np.eye(P)) / (P - 1)]
        se = float(np.std(without_one)) * math.sqrt(P - 1)
    return {"fraction_of_optimal": found, "fraction_of_optimal_se": se}


def means_and_errors(values: dict[str, Tensor]) -> dict:
    """The mean of each metric (P, M), and its standard error over prompts as NAME_se."""
    found = {}
    for name, value in values.items():
        per_prompt = value.double().mean(1)
        found[name] = per_prompt.mean().item()
        found[f"{name}_se"] = per_prompt.std().item() / math.sqrt(len(per_prompt))
    return found
