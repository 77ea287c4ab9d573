"""Evaluation on held-out prompts: reward, KL, and the distance to the optimum of Eq. 4.

Standard errors are over prompts, because those are what is drawn independently.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dpo
from data import Dataset, decode_rows, label_pairs, load_tokenizer
from lib.checkpoint import load_gpt
from lib.inference import compute_logps, generate
from model import GPT, sample

BETAS = np.geomspace(20, 0.05, 80)  # where the optimal frontier is estimated


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
    N = cfg.ref_samples
    prompts = [x for x in dataset.eval_prompts for _ in range(N)]
    ids, mask, logps = generate(pi_ref, prompts, tokenizer.eot_token, cfg.seed, "sampling pi_ref")
    texts = decode_rows(ids, mask, tokenizer)
    about = {"nats_per_byte": nats_per_byte(pi_ref, dataset.unseen_texts, tokenizer)}
    about["length"] = mask.sum(1).double().mean().item()
    if dataset.reward is None:
        return EvalSet(about, texts[::N], None, pairs, None)
    rewards = dataset.reward(texts).view(-1, N)
    about |= mean_and_se("reward", rewards) | mean_and_se("p_positive", rewards.sigmoid())
    used = min(N, 16) // cfg.completions * cfg.completions
    rows = torch.arange(len(ids)) % N < used
    r = rewards[:, :used].reshape(-1, cfg.completions)
    pairs, _ = label_pairs((ids[rows], mask[rows], logps[rows]), r, cfg.labels, "all", cfg.seed)
    r_w, r_l = dataset.reward(decode_rows(pairs.ids, pairs.mask, tokenizer))[pairs.pairs].T
    return EvalSet(about, texts[::N], rewards, pairs, r_w - r_l)


@torch.no_grad()
def nats_per_byte(pi: GPT, texts: list[list[int]], tokenizer) -> float:
    """How well a model predicts texts, in nats per byte."""
    nats = sum(token_nll(pi, texts[i : i + 50], "sum").item() for i in range(0, len(texts), 50))
    plain = ([i for i in ids[1:] if i != tokenizer.eot_token] for ids in texts)
    return nats / sum(len(tokenizer.decode_bytes(ids)) for ids in plain)


def token_nll(pi: GPT, texts: list[list[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens after the first, in nats: the mean over tokens, or the sum."""
    rows = [torch.tensor(ids) for ids in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1).to(pi.device)  # -1 is ignored below
    logits = pi(ids[:, :-1].clamp(min=0)).float().flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


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
    r = None
    if eval_set.rewards is not None:
        r, ref_r = dataset.reward(texts).view(P, M), eval_set.rewards
        gain = r.mean(1, keepdim=True) - ref_r.mean(1, keepdim=True)  # paired by prompt
        wins = (r - ref_r[:, :M]).sign() / 2 + 0.5  # a tie counts 1/2
        point |= mean_and_se("reward", r) | mean_and_se("gain", gain)
        point |= mean_and_se("p_positive", r.sigmoid()) | mean_and_se("win_rate", wins)
        point |= optimality_gap(ref_r, r, kl, beta, cfg.labels)
    point = {name: v if v is None or math.isfinite(v) else None for name, v in point.items()}
    return {"point": point, "texts": texts[::M], "rewards": None if r is None else r[:, 0]}


def mean_kl(pi_theta: GPT, pi_ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The second estimate of `dpo.sequence_kl` for many rows, (B,) nats, on the CPU."""
    kls = []
    for rows in tqdm(torch.arange(len(ids)).split(64), "computing the KL"):
        T = int(mask[rows].any(0).nonzero().max()) + 1
        batch = ids[rows, :T].to(pi_ref.device), mask[rows, :T].to(pi_ref.device)
        kls.append(dpo.sequence_kl(pi_theta, pi_ref, *batch)[1].cpu())
    return torch.cat(kls)


def agreement(pi_theta: GPT, eval_set: EvalSet, beta: float) -> dict[str, float]:
    """The implicit reward on the held-out pairs: accuracy, and regression on the true reward."""
    pairs, gap = eval_set.pairs, eval_set.gap
    logps = compute_logps(pi_theta, pairs.ids, pairs.mask)
    _, r_hat_w, r_hat_l = dpo.dpo(logps.double(), pairs, beta)
    margin = r_hat_w - r_hat_l
    values = {"r_hat_w": r_hat_w, "r_hat_l": r_hat_l, "margin": margin}
    values["pair_accuracy"] = (margin.sign() + 1) / 2
    if gap is not None:
        values["pair_accuracy_ceiling"] = (gap.sign() + 1) / 2  # of r* itself
    share = dpo.mean_weights(pairs.weight.double())
    found = {name: (share * value).sum().item() for name, value in values.items()}
    if gap is not None:
        gap = gap.double()
        slope = (margin * gap).sum() / gap.square().sum()
        r2 = slope * (margin * gap).sum() / margin.square().sum()
        found |= {"reward_slope": slope.item(), "reward_r2": r2.item()}
    return found


@torch.no_grad()
def monitor(pi_theta: GPT, pi_ref: GPT, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """A quick look during training: the KL of 256 fresh samples, in nats per response."""
    some = list(itertools.islice(itertools.cycle(prompts), 256))
    generator = torch.Generator(pi_ref.device).manual_seed(seed)
    ids, mask, _ = sample(pi_theta, some, pi_ref.config.vocab_size - 1, generator=generator)
    return {"kl": mean_kl(pi_theta, pi_ref, ids, mask).mean().item()}


# ------------------------------------------------ the optimum


def optimal_frontier(r: Tensor) -> dict[str, np.ndarray]:
    """Reward and KL of Eq. 4 at each of BETAS, from pi_ref's rewards r (P, N).

    Returns arrays: reward and kl (80, P), and reliable (80,): the mean effective sample size is at
    least 40, and each half of the samples gives the same gain within 2 %.
    """
    betas = torch.from_numpy(BETAS)[:, None, None]
    reward, kl, sample_size = (v.numpy() for v in dpo.frontier(r.double(), betas))
    gain = reward.mean(1) - r.mean().item()
    gains = []
    for half in r.double().chunk(2, dim=1):
        half_reward, half_kl, _ = (v.mean(1).numpy() for v in dpo.frontier(half, betas))
        gains.append(np.interp(kl.mean(1), half_kl, half_reward - half.mean().item(), right=np.nan))
    halves_agree = np.abs(np.mean(gains, 0) - gain) <= 0.02 * gain
    reliable = np.logical_and.accumulate((sample_size.mean(1) >= 40) & halves_agree)
    return {"reward": reward, "kl": kl, "reliable": reliable}


def frontier_rows(r: Tensor) -> list[dict]:
    """The optimal frontier, averaged over prompts, as rows of results.json."""
    frontier = optimal_frontier(r)
    kl, reward = frontier["kl"].mean(1), frontier["reward"].mean(1)
    columns = (BETAS.tolist(), kl.tolist(), reward.tolist(), frontier["reliable"].tolist())
    names = "beta", "kl", "reward", "reliable"
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def optimality_gap(ref_r: Tensor, r: Tensor, kl: Tensor, beta: float, labels: str) -> dict:
    """How close a policy is to the optimum. ref_r: (P, N); r, kl: (P, M) of the policy's samples.

    fraction_of_optimal: the gain in reward over pi_ref, divided by the largest gain at the same KL.
    optimal_reward, optimal_kl: of Eq. 4 at this beta. regret: J(optimum) - J(policy), Eq. 3, nats.
    Values are None where the frontier is unreliable, and all but the first for argmax labels.
    """
    frontier = optimal_frontier(ref_r)
    per_prompt = (v.double().mean(1).numpy() for v in (ref_r, r, kl))
    gap = dict.fromkeys(("optimal_reward", "optimal_kl", "regret", "regret_se"))
    gap |= fraction_of_optimal(frontier, *per_prompt)
    i = np.searchsorted(-BETAS, -beta)  # the next of BETAS that is not larger
    if i < len(BETAS) and frontier["reliable"][i] and labels != "argmax":
        best_r, best_kl, _ = dpo.frontier(ref_r.double(), beta)
        regret = (best_r - beta * best_kl)[:, None] - (r - beta * kl).double()
        gap |= {"optimal_reward": best_r.mean().item(), "optimal_kl": best_kl.mean().item()}
        gap |= mean_and_se("regret", regret)
    return gap


def fraction_of_optimal(frontier: dict, ref_r: np.ndarray, r: np.ndarray, kl: np.ndarray) -> dict:
    """(E r - E r_ref) / (E r_optimal(KL) - E r_ref) and its bootstrap standard error over prompts.

    ref_r, r, kl: means per prompt, (P,). None where the frontier is unreliable.
    """
    limit = frontier["kl"].mean(1)[frontier["reliable"]].max(initial=0.0)
    names = "fraction_of_optimal", "fraction_of_optimal_se"
    if kl.mean() > limit:
        return dict.fromkeys(names)

    def fraction(p: np.ndarray) -> float:
        kls = [0, *frontier["kl"][:, p].mean(1)]
        gains = [0, *frontier["reward"][:, p].mean(1) - ref_r[p].mean()]
        return float((r[p].mean() - ref_r[p].mean()) / np.interp(kl[p].mean(), kls, gains))

    P, rng = len(r), np.random.default_rng(0)
    resampled = [fraction(rng.choice(P, P)) for _ in range(200)]
    return dict(zip(names, (fraction(np.arange(P)), float(np.std(resampled))), strict=True))


def best_of_n(r: Tensor, n: int) -> float:
    """E max of n of a prompt's M rewards, averaged over prompts; unbiased. r: (P, M) nats.

    With rewards in ascending order it is sum_i C(i-1, n-1) / C(M, n) r_(i).
    """
    M = r.size(1)
    weight = [math.comb(i, n - 1) / math.comb(M, n) for i in range(M)]
    return (r.double().sort(1).values.mean(0) @ torch.tensor(weight, dtype=torch.double)).item()


def mean_and_se(name: str, values: Tensor) -> dict[str, float]:
    """The mean of values (P, M) and its standard error over prompts."""
    per_prompt = values.double().mean(1)
    se = per_prompt.std() / math.sqrt(len(per_prompt))
    return {name: per_prompt.mean().item(), f"{name}_se": se.item()}
