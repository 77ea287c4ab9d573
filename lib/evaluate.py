"""Evaluation on held-out prompts: reward, KL, and the distance to the optimum of Eq. 4.

Standard errors are over prompts, because those are what is drawn independently.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import dpo
from data import Dataset, decode_rows, label_pairs, load_tokenizer
from lib.checkpoint import load_gpt
from lib.inference import collate, compute_logps, fast_response_logps, generate, mean_kl
from lib.io import BadInput
from model import GPT, sample

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


def make_eval_set(dataset: Dataset, pairs, reference: dict, cfg: EvalConfig, device) -> EvalSet:
    """Sample pi_ref on the held-out prompts. `pairs`: None to form them from the samples."""
    pi_ref, tokenizer = load_gpt(reference, device), load_tokenizer(reference["tokens"])
    N, K = cfg.ref_samples, cfg.completions
    prompts = [x for x in dataset.eval_prompts for _ in range(N)]
    ids, mask, logps = generate(pi_ref, prompts, tokenizer.eot_token, cfg.seed, "sampling pi_ref")
    texts = decode_rows(ids, mask, tokenizer)
    about = {"nats_per_byte": nats_per_byte(pi_ref, dataset.unseen_texts, tokenizer)}
    about["length"] = mask.sum(1).double().mean().item()
    if dataset.reward is None:
        return EvalSet(about, texts[::N], None, pairs, None)
    rewards = dataset.reward(texts).view(-1, N)
    about |= mean_and_se("reward", rewards) | mean_and_se("p_positive", rewards.sigmoid())
    used = min(N, 16) // K * K
    rows = torch.arange(len(ids)) % N < used
    r = rewards[:, :used].reshape(-1, K)
    pairs, _ = label_pairs((ids[rows], mask[rows], logps[rows]), r, cfg.labels, "all", cfg.seed)
    r = dataset.reward(decode_rows(pairs.ids, pairs.mask, tokenizer))[pairs.pairs]
    return EvalSet(about, texts[::N], rewards, pairs, r[:, 0] - r[:, 1])


def nats_per_byte(pi: GPT, texts: list[list[int]], tokenizer) -> float:
    """How well a model predicts texts, in nats per byte."""
    ids, mask = collate(texts, [1] * len(texts))
    n_bytes = sum(len(text.encode()) for text in decode_rows(ids[:, 1:], mask[:, 1:], tokenizer))
    return -compute_logps(pi, ids, mask).double().sum().item() / n_bytes


def evaluate_policy(policy: dict, reference: dict, dataset: Dataset, eval_set: EvalSet,
                    beta: float, cfg: EvalConfig, device) -> dict:  # fmt: skip
    """Sample pi_theta on the held-out prompts, and compare it with pi_ref.

    Returns "point", a row of results.json, and the first text of each prompt with its reward.
    """
    pi_theta, pi_ref = load_gpt(policy, device), load_gpt(reference, device)
    tokenizer = load_tokenizer(reference["tokens"])
    P, M = len(dataset.eval_prompts), cfg.samples
    prompts = [x for x in dataset.eval_prompts for _ in range(M)]
    ids, mask, _ = generate(pi_theta, prompts, tokenizer.eot_token, cfg.seed, "sampling pi_theta")
    texts = decode_rows(ids, mask, tokenizer)
    kl = mean_kl(pi_theta, pi_ref, ids, mask).view(P, M)
    point = {"beta": beta, "length": mask.sum(1).double().mean().item()} | mean_and_se("kl", kl)
    point |= agreement(pi_theta, eval_set, beta)
    ref_r = eval_set.rewards
    if ref_r is None:
        return {"point": point, "texts": texts[::M], "rewards": None}
    r = dataset.reward(texts).view(P, M)
    gain = r.mean(1, keepdim=True) - ref_r.mean(1, keepdim=True)  # paired by prompt
    wins = (r - ref_r[:, :M]).sign() / 2 + 0.5  # a tie counts 1/2
    point |= mean_and_se("reward", r) | mean_and_se("gain", gain)
    point |= mean_and_se("p_positive", r.sigmoid()) | mean_and_se("win_rate", wins)
    point |= optimality_gap(ref_r, r, kl, beta, cfg.labels)
    return {"point": point, "texts": texts[::M], "rewards": r[:, 0]}


def agreement(pi_theta: GPT, eval_set: EvalSet, beta: float) -> dict[str, float]:
    """The implicit reward on the held-out pairs: accuracy, and regression on the true reward."""
    pairs, gap = eval_set.pairs, eval_set.gap
    logps = compute_logps(pi_theta, pairs.ids, pairs.mask)
    _, r_hat_w, r_hat_l = dpo.dpo(logps.double(), pairs, beta)
    margin = r_hat_w - r_hat_l
    share = dpo.mean_weights(pairs.weight.double())
    found = {"pairs": len(margin)}
    values = {"r_hat_w": r_hat_w, "r_hat_l": r_hat_l, "margin": margin}
    found |= {name: (share @ value).item() for name, value in values.items()}
    found["pair_accuracy"] = (share @ (margin.sign() + 1)).item() / 2
    if gap is not None:
        gap = gap.double()
        slope = (margin @ gap) / (gap @ gap)
        found["pair_accuracy_ceiling"] = (share @ (gap.sign() + 1)).item() / 2  # of r* itself
        found["reward_slope"] = slope.item()
        found["reward_r2"] = (slope * (margin @ gap) / (margin @ margin)).item()
    return found


@torch.no_grad()
def monitor(pi_theta: GPT, pi_ref: GPT, loss: dpo.Loss, dataset: Dataset, eval_set: EvalSet,
            tokenizer, seed: int) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """A quick look during training: metrics of held-out pairs and of fresh samples, and texts."""
    pairs = eval_set.pairs
    n = math.ceil(128 / len(pairs.ids) * (int(pairs.prompt.max()) + 1))  # about 128 rows
    pairs, found = pairs.select(torch.arange(n)).to(pi_theta.device), {}
    with contextlib.suppress(BadInput):  # raised by losses that take other pairs
        logps = fast_response_logps(pi_theta, pairs.ids, pairs.mask)
        losses, r_hat_w, r_hat_l = loss(logps, pairs)
        margin, share = r_hat_w - r_hat_l, len(losses) * dpo.mean_weights(pairs.weight)
        found = {"held_out_loss": share * losses, "held_out_margin": share * margin}
        found["held_out_accuracy"] = share * (margin.sign() + 1) / 2
    n = min(32, max(4, 1536 // pi_ref.config.context))  # fewer of longer texts
    prompts = list(itertools.islice(itertools.cycle(dataset.eval_prompts), n))
    generator = torch.Generator(pi_ref.device).manual_seed(seed)
    ids, mask, logps = sample(pi_theta, prompts, tokenizer.eot_token, generator=generator)
    texts = decode_rows(ids, mask, tokenizer)
    found |= {"kl": mean_kl(pi_theta, pi_ref, ids, mask), "entropy": -logps.sum(1)}
    found["length"] = mask.sum(1)
    shown = texts[:2]
    if dataset.reward is not None:
        found["reward"] = dataset.reward(texts)
        shown = [f"r* {r:+.2f} | {text}" for r, text in zip(found["reward"], shown, strict=False)]
    return {name: values.double().mean().item() for name, values in found.items()}, shown


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
    frontier = optimal_frontier(r)
    kl, reward = frontier["kl"].mean(1), frontier["reward"].mean(1)
    columns = BETAS.tolist(), kl.tolist(), reward.tolist(), frontier["reliable"].tolist()
    names = "beta", "kl", "reward", "reliable"
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


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
