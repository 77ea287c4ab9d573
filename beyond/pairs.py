"""Other sources of pairs: the policy itself, the best and worst of N, RSO, rankings.

    online DPO (2402.04792)       `online`: pairs of fresh samples of pi_theta, every round
    iterative DPO (2405.07863)    `online` with the best and the worst of N samples
    RSO (2309.06657)              `generate` with pi_ref, then `rso`: samples close to the optimum
    Plackett-Luce (Eq. 20)        `rankings`: every pair of one random ranking per prompt

Completions are ids, mask and log-probabilities (P K, T), as `model.sample` returns them for K
copies of each prompt. Rewards are (P, K), in nats. `data.label_pairs` forms and labels the pairs.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from data import Completions, label_pairs
from dpo import Preferences

Ids = list[int]
Sample = Callable[[list[Ids]], Completions]  # as `model.sample`, with pi and end fixed
Reward = Callable[[Tensor, Tensor], Tensor]  # ids, mask (B, T) -> r(x, y) (B,), in nats
Score = Callable[[Tensor, Tensor], Tensor]  # ids, mask (B, T) -> log pi_ref (B, T)


def generate(
    prompts: list[Ids], K: int, sample: Sample, reward: Reward
) -> tuple[Completions, Tensor]:
    """Sample K completions of each prompt, and compute their rewards (P, K)."""
    completions = sample([x for x in prompts for _ in range(K)])
    ids, mask, _ = completions
    return completions, reward(ids, mask).view(-1, K)


def online(
    prompts: list[Ids],
    K: int,
    sample: Sample,
    reward: Reward,
    score: Score,
    seed: int,
    which: str = "all",
) -> Preferences:
    """One round of online DPO: pairs of K samples of pi_theta, with Bradley-Terry labels.

    which: "all" pairs, or "best-worst", one pair for each prompt, labelled by its rewards. sample:
    draws from pi_theta. score: log-probabilities under pi_ref, for instance
    `partial(dpo.response_logps, pi_ref)`.

    With all pairs, the optimal policy of Eq. 4 is a fixed point: it minimises the expected loss for
    every distribution of the pairs, and so also for pairs of its own samples.
    """
    completions, rewards = generate(prompts, K, sample, reward)
    labels = "bt"
    if which == "best-worst":
        completions, rewards = best_worst(completions, rewards)
        labels = "argmax"
    preferences = label_pairs(completions, rewards, labels, seed)
    return replace(preferences, ref_logps=score(preferences.ids, preferences.mask))


def best_worst(completions: Completions, rewards: Tensor) -> tuple[Completions, Tensor]:
    """The best and the worst completion of each prompt: (2 P, T), and their rewards (P, 2)."""
    columns = torch.stack((rewards.argmax(1), rewards.argmin(1)), 1)
    rows = (columns + rewards.size(1) * torch.arange(len(rewards))[:, None]).flatten()
    return tuple(part[rows] for part in completions), rewards.gather(1, columns)


# ------------------------------------------------- rejection sampling


def acceptance(r: Tensor, beta: float, r_max: Tensor | float) -> Tensor:
    """The probability exp((r - r_max) / beta) of accepting a sample of pi_ref.

    Accepted samples then follow the tilt of Eq. 4, and the acceptance rate is Z exp(-r_max / beta).
    This is exact: each sample is accepted or rejected independently, and r_max bounds every reward.
    Raises ValueError if r exceeds r_max.
    """
    if (r > r_max).any():
        raise ValueError("r_max is not an upper bound on the rewards")
    return ((r - r_max) / beta).exp()


def rejection_sampling(r: list[float], beta: float, K: int, rng: random.Random) -> list[int]:
    """The indices of K samples of one prompt, by Algorithm 1 of RSO (2309.06657).

    Sweep over the samples that are left. Accept each with probability exp((r - r_max) / beta),
    where r_max is the maximum of those left at the start of the sweep. Remove the accepted ones,
    and repeat until K are accepted. Every sweep accepts at least the best of those left.

    The accepted samples follow Eq. 4 only approximately: r_max is these samples' maximum, and
    they are drawn without replacement. At K = len(r) all are accepted. The paper's listing
    merges identical samples, so the result ignores how often pi_ref draws each. Here each sample
    counts.
    Raises ValueError if there are fewer than K samples.
    """
    if len(r) < K:
        raise ValueError(f"cannot accept {K} of {len(r)} samples")
    left, accepted = list(range(len(r))), []
    while len(accepted) < K:
        r_max = max(r[i] for i in left)
        new = [i for i in left if rng.random() < math.exp((r[i] - r_max) / beta)]
        accepted += new[: K - len(accepted)]
        left = [i for i in left if i not in new]
    return accepted


def rso(
    completions: Completions, rewards: Tensor, beta: float, K: int, rng: random.Random
) -> tuple[Completions, Tensor]:
    """K accepted completions of each prompt, and their rewards (P, K).  2309.06657.

    completions, rewards: N samples of pi_ref for each prompt. No prompt is dropped.
    """
    accepted = [sorted(rejection_sampling(r, beta, K, rng)) for r in rewards.tolist()]
    columns = torch.tensor(accepted)  # (P, K)
    P, N = rewards.shape
    rows = (columns + N * torch.arange(P)[:, None]).flatten()
    ids, mask, logps = completions
    return (ids[rows], mask[rows], logps[rows]), rewards.gather(1, columns)


# ------------------------------------------------- rankings


def rows_of_prompts(prompt: Tensor) -> Tensor:
    """The rows (P, K) of each prompt, padded with -1. prompt: (R,), as in `Preferences`."""
    _, x, K = prompt.unique_consecutive(return_inverse=True, return_counts=True)
    row = torch.arange(len(prompt), device=prompt.device)
    first = K.cumsum(0) - K
    rows = row.new_full((len(K), int(K.max())), -1)
    rows[x, row - first[x]] = row
    return rows


def rankings(
    r: Tensor, prompt: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """All pairs of one ranking per prompt, drawn from Plackett-Luce (Eq. 18).

    r: (R,) rewards of rows, in nats. prompt: (R,) their prompts, as in `Preferences`. Returns the
    rows (n, 2) of y_w and y_l, and weights (n,) that sum to 1 over each ranking. The ranking is the
    order of r + Gumbel noise.
    """
    noisy = r - torch.empty_like(r).exponential_(generator=generator).log()
    rows = rows_of_prompts(prompt)
    i, j = torch.triu_indices(rows.size(1), rows.size(1), 1)
    pairs = torch.stack((rows[:, i], rows[:, j]), -1).flatten(0, 1)
    pairs = pairs[(pairs >= 0).all(1)]
    noisy_w, noisy_l = noisy[pairs].T
    pairs = torch.where((noisy_w > noisy_l)[:, None], pairs, pairs.flip(1))
    _, x, n = prompt[pairs[:, 0]].unique_consecutive(return_inverse=True, return_counts=True)
    return pairs, 1 / n[x].to(r.dtype)
