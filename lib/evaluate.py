"""Evaluation on held-out prompts: reward, KL, and the distance to the optimum of Eq. 4.

Standard errors are over prompts, because those are what is drawn independently.
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

BETAS = np.geomspace(20, 0.05, 80)  # where the optimal frontier is estimated
MIN_SAMPLE_SIZE = 40  # with a smaller effective sample size, the optimum cannot be estimated


@dataclass(frozen=True)
class EvalConfig:
    ref_samples: int  # N samples of pi_ref for each prompt
    samples: int  # M samples of pi_theta
    completions: int  # samples of pi_ref are paired in groups of this size
    labels: str
    seed: int


@dataclass(frozen=True)
class EvalSet:
    """P held-out prompts with samples of pi_ref, and held-out pairs."""

    about: dict[str, float]  # pi_ref's row of results.json
    texts: list[str]  # the first sample for each prompt
    rewards: Tensor | None  # (P, N) nats; None if r* is unknown
    pairs: dpo.Preferences
    gap: Tensor | None  # r*(y_w) - r*(y_l) of each pair, (n,) nats


def make_eval_set(dataset: Dataset, pairs, reference: dict, cfg: EvalConfig, device,
                  infer: Inference = LOCAL) -> EvalSet:  # fmt: skip
    """Sample pi_ref on the held-out prompts. `pairs`: None to form them from the samples."""
    pi_ref, tokenizer = infer.load(reference, device), load_tokenizer(reference["tokens"])
    N, K = cfg.ref_samples, min(cfg.completions, 16)
    prompts = [x for x in dataset.eval_prompts for _ in range(N)]
    how = tokenizer.eot_token, cfg.seed, "sampling pi_ref"
    ids, mask, logps = infer.generate(pi_ref, prompts, *how)
    texts = decode_rows(ids, mask, tokenizer)
    about = mean_and_se("length", mask.sum(1).view(-1, N))
    if dataset.reward is None:
        return EvalSet(about, texts[::N], None, pairs, None)
    rewards = dataset.reward(texts).view(-1, N)
    about |= mean_and_se("reward", rewards) | mean_and_se("p_positive", rewards.sigmoid())
    used = 16 // K * K
    rows = torch.arange(len(ids)) % N < used
    r = rewards[:, :used].reshape(-1, K)
    pairs, _ = label_pairs((ids[rows], mask[rows], logps[rows]), r, cfg.labels, cfg.seed)
    r_w, r_l = dataset.reward(decode_rows(pairs.ids, pairs.mask, tokenizer))[pairs.pairs.T]
    return EvalSet(about, texts[::N], rewards, pairs, r_w - r_l)


def measure(pi_theta: GPT, pi_ref: GPT, dataset: Dataset, tokenizer, prompts: list[list[int]],
            M: int, seed: int, infer: Inference):  # fmt: skip
    """Sample M responses to each prompt. Returns their metrics, (P, M) each, and texts."""
    repeated = [x for x in prompts for _ in range(M)]
    how = tokenizer.eot_token, seed, "sampling pi_theta"
    ids, mask, logps = infer.generate(pi_theta, repeated, *how)
    texts = decode_rows(ids, mask, tokenizer)
    values = {"kl": infer.mean_kl(pi_theta, pi_ref, ids, mask)}
    values |= {"length": mask.sum(1), "entropy": -logps.sum(1)}
    if dataset.reward is not None:
        r = dataset.reward(texts)
        values |= {"reward": r, "p_positive": r.sigmoid()}
    return {name: value.view(-1, M) for name, value in values.items()}, texts


def evaluate_policy(policy: dict, reference: dict, dataset: Dataset, eval_set: EvalSet, beta: float,
                    cfg: EvalConfig, device, infer: Inference = LOCAL) -> dict:  # fmt: skip
    """Sample pi_theta on the held-out prompts, and compare it with pi_ref.

    Returns "point", a row of results.json, and the first text of each prompt with its reward.
    """
    pi_theta, pi_ref = infer.load(policy, device), infer.load(reference, device)
    tokenizer, M = load_tokenizer(reference["tokens"]), cfg.samples
    args = dataset, tokenizer, dataset.eval_prompts, M, cfg.seed, infer
    values, texts = measure(pi_theta, pi_ref, *args)
    loss = partial(dpo.dpo, beta=beta)
    point = {"beta": beta} | agreement(pi_theta, eval_set.pairs, eval_set.gap, loss, infer)
    ref_r, rewards = eval_set.rewards, [None] * len(dataset.eval_prompts)
    if ref_r is not None:
        r = values["reward"]
        rewards = r[:, 0].tolist()
        values["gain"] = r.mean(1, keepdim=True) - ref_r.mean(1, keepdim=True)  # paired by prompt
        values["win_rate"] = (r - ref_r[:, :M]).sign() / 2 + 0.5  # a tie counts 1/2
        point |= optimality_gap(ref_r, r, values["kl"], beta, cfg.labels)
    for name, value in values.items():
        point |= mean_and_se(name, value)
    return {"point": point, "texts": texts[::M], "rewards": rewards}


def agreement(pi_theta: GPT, pairs: dpo.Preferences, gap: Tensor | None, loss: dpo.Loss,
              infer: Inference = LOCAL) -> dict:  # fmt: skip
    """The implicit reward on held-out pairs: accuracy, and regression on the true reward.

    gap: r*(y_w) - r*(y_l) of each pair, (n,) nats.
    """
    logps = infer.compute_logps(pi_theta, pairs.ids, pairs.mask)
    losses, r_hat_w, r_hat_l = loss(logps.double(), pairs)
    margin = r_hat_w - r_hat_l
    share = dpo.mean_weights(pairs.weight.double())
    values = {"loss": losses, "r_hat_w": r_hat_w, "r_hat_l": r_hat_l, "margin": margin}
    values["pair_accuracy"] = (margin.sign() + 1) / 2
    found = {name: (share @ value).item() for name, value in values.items()}
    if gap is not None:
        gap = gap.double()
        found["pair_accuracy_ceiling"] = (share @ (gap.sign() + 1)).item() / 2  # of r* itself
        slope = (margin @ gap) / (gap @ gap)
        found["reward_slope"] = slope.item()
        found["reward_r2"] = (slope * (margin @ gap) / (margin @ margin)).item()
    return found | {"pairs": len(margin)}


# ------------------------------------------------ the optimum


def optimal_frontier(r: Tensor) -> dict[str, np.ndarray]:
    """Reward and KL of Eq. 4 at each of BETAS, from pi_ref's rewards r (P, N).

    Returns reward and kl (80, P) in nats, and reliable (80,): whether the mean effective sample
    size is at least MIN_SAMPLE_SIZE.
    """
    found = dpo.frontier(r.double(), torch.from_numpy(BETAS)[:, None, None])
    reward, kl, sample_size = (values.numpy() for values in found)
    return {"reward": reward, "kl": kl, "reliable": sample_size.mean(1) >= MIN_SAMPLE_SIZE}


def frontier_rows(r: Tensor) -> list[dict]:
    """The optimal frontier, averaged over prompts, as rows of results.json."""
    found = optimal_frontier(r)
    rows = zip(BETAS, found["kl"].mean(1), found["reward"].mean(1), found["reliable"], strict=True)
    names = "beta", "kl", "reward", "reliable"
    return [{name: value.item() for name, value in zip(names, row, strict=True)} for row in rows]


def optimality_gap(ref_r: Tensor, r: Tensor, kl: Tensor, beta: float, labels: str) -> dict:
    """How close a policy is to the optimum. ref_r: (P, N); r, kl: (P, M) of the policy's samples.

    fraction_of_optimal: the gain in reward over pi_ref, divided by the largest gain at the same KL.
    optimal_reward, optimal_kl: of Eq. 4 at this beta. regret: J(optimum) - J(policy), Eq. 3, nats.
    Values are None where the optimum cannot be estimated. For argmax labels, only
    fraction_of_optimal is estimated.
    """
    gap = fraction_of_optimal(ref_r, r.mean(1), kl.mean(1))
    best_r, best_kl, sample_size = dpo.frontier(ref_r.double(), beta)
    regret = (best_r - beta * best_kl)[:, None] - (r - beta * kl).double()
    values = {"optimal_reward": best_r.mean().item(), "optimal_kl": best_kl.mean().item()}
    values |= mean_and_se("regret", regret)
    if labels == "argmax" or sample_size.mean() < MIN_SAMPLE_SIZE:
        values = dict.fromkeys(values)
    return gap | values


def fraction_of_optimal(ref_r: Tensor, r: Tensor, kl: Tensor) -> dict:
    """(E r - E r_ref) / (E r_optimal(KL) - E r_ref) and its bootstrap standard error over prompts.

    ref_r: (P, N). r, kl: means per prompt, (P,). None where the optimum cannot be estimated.
    """
    frontier = optimal_frontier(ref_r)
    ref_r, r, kl = (values.double().numpy() for values in (ref_r.mean(1), r, kl))
    names = "fraction_of_optimal", "fraction_of_optimal_se"
    if kl.mean() > frontier["kl"].mean(1)[frontier["reliable"]].max(initial=0.0):
        return dict.fromkeys(names)

    def fraction(p: np.ndarray) -> float:  # of these prompts
        kls = [0, *frontier["kl"][:, p].mean(1)]
        gains = [0, *frontier["reward"][:, p].mean(1) - ref_r[p].mean()]
        return float((r[p].mean() - ref_r[p].mean()) / np.interp(kl[p].mean(), kls, gains))

    P, rng = len(r), np.random.default_rng(0)
    resampled = [fraction(rng.choice(P, P)) for _ in range(200)]
    return dict(zip(names, (fraction(np.arange(P)), float(np.std(resampled))), strict=True))


def mean_and_se(name: str, values: Tensor) -> dict[str, float]:
    """The mean of values (P, M) and its standard error over prompts."""
    per_prompt = values.double().mean(1)
    se = per_prompt.std() / math.sqrt(len(per_prompt))
    return {name: per_prompt.mean().item(), f"{name}_se": se.item()}
