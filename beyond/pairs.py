"""Where the pairs come from, after DPO: fresh from pi_theta, the best and the worst of N, accepted samples, whole rankings.

    online DPO (2402.04792)         `online`, from pi_theta itself, before each round of training
    iterative DPO (2405.07863)      `completed` by pi_theta, then `best_and_worst`, each round
    RSO (2309.06657)                `completed` by pi_ref, then `accepted`: pairs of samples of the optimum
    Plackett-Luce (DPO's Eq. 20)    `rankings`, in the place of data.group's pairs

Labels, triplets and tensors are data.py's: `data.preferences` labels what these functions choose, `data.group` packs it.
"""
import random
from collections.abc import Callable

import torch
from tiktoken import Encoding
from torch import Tensor

import data

Ids = list[int]


def completed(prompts: list[Ids], N: int, sample: Callable[[list[Ids]], list[Ids]], reward: Callable[[list[str]], Tensor],
              tokenizer: Encoding) -> tuple[list[list[Ids]], Tensor]:
    """N completions of each prompt and their rewards, (P, N) nats. `sample` draws one y for each x that it is given, as
    `partial(model.sample, pi, end=tokenizer.eot_token)` does; `reward` judges the texts of x and y together."""
    each = [x for x in prompts for _ in range(N)]
    ys = sample(each)
    rewards = reward([data.text_of(x + y, tokenizer) for x, y in zip(each, ys)])
    return [ys[i:i + N] for i in range(0, len(ys), N)], rewards.view(-1, N)


def online(prompts: list[Ids], K: int, sample: Callable[[list[Ids]], list[Ids]], reward: Callable[[list[str]], Tensor],
           tokenizer: Encoding, labels: str, rng: random.Random) -> list[dict]:
    """The triplets of one round of online DPO: all pairs of K completions that `sample` draws from pi_theta as it is now.
    The tilt stays where it is under them: wherever pairs come from, each asks for its own gap of rewards."""
    completions, rewards = completed(prompts, K, sample, reward, tokenizer)
    return data.preferences(prompts, completions, rewards, tokenizer, labels, rng)[0]


def take(completions: list[list[Ids]], rewards: Tensor, which: Tensor) -> tuple[list[list[Ids]], Tensor]:
    """Those of N completions of each prompt, and their rewards, whose numbers are in the prompt's row of `which`, (P, K)."""
    return [[ys[i] for i in row] for ys, row in zip(completions, which.tolist())], rewards.gather(1, which)


def best_and_worst(completions: list[list[Ids]], rewards: Tensor) -> tuple[list[list[Ids]], Tensor]:
    """Of N completions the best and the worst, in this order: with labels "argmax", one pair a prompt, as far apart as N
    samples are."""
    return take(completions, rewards, torch.stack((rewards.argmax(1), rewards.argmin(1)), 1))


def acceptance(r: Tensor, beta: float, r_max: Tensor | float) -> Tensor:
    """exp((r - r_max) / beta), the probability of accepting a sample of pi_ref. The accepted law is then the tilt, Eq. 4:
    pi_ref exp(r / beta) / Z, and the rate of acceptance Z exp(-r_max / beta). Errors: ValueError if r passes r_max."""
    if (r > r_max).any():
        raise ValueError("r_max is no upper bound of the rewards")
    return ((r - r_max) / beta).exp()


def accepted(prompts: list[Ids], completions: list[list[Ids]], rewards: Tensor, beta: float, r_max: Tensor | float, K: int,
             generator: torch.Generator | None = None) -> tuple[list[Ids], list[list[Ids]], Tensor]:
    """The first K of each prompt's N samples of pi_ref that are accepted, and their rewards (P', K); prompts with fewer are
    left out. RSO puts the largest of the N rewards, `rewards.amax(1, keepdim=True)`, in the place of the unknown r_max, which
    accepts too much, the less the larger N."""
    keep = torch.rand(rewards.shape, generator=generator) < acceptance(rewards, beta, r_max)
    enough = (keep.sum(1) >= K).nonzero().flatten()
    first = keep[enough].int().argsort(dim=1, descending=True, stable=True)[:, :K]
    kept = enough.tolist()
    return [prompts[p] for p in kept], *take([completions[p] for p in kept], rewards[enough], first)


def rewards_of(triplets: list[dict], pairs: Tensor, shape: tuple[int, int]) -> Tensor:
    """The rewards (P, K) of the completions that `data.group` made of these triplets; -inf where there is none."""
    x, w, l = pairs.T
    r = torch.full(shape, -torch.inf)
    r[x, w], r[x, l] = (torch.tensor([t[name] for t in triplets]) for name in ("reward_chosen", "reward_rejected"))
    return r


def rankings(r: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One ranking of each prompt's completions drawn from Plackett-Luce (Eq. 18) with r, by sorting r + Gumbel noise, given
    as all its pairs: rewards (P, K), -inf where there is no completion -> pairs (n, 3) of prompt, y_w, y_l, and weight (n,),
    which sums to one over each ranking."""
    noisy = r - torch.empty_like(r).exponential_(generator=generator).log()
    wins = (noisy[:, :, None] > noisy[:, None, :]) & r.isfinite()[:, None, :]           # (P, K, K)
    pairs = wins.nonzero()
    return pairs, 1 / wins.sum((1, 2)).to(r.dtype)[pairs[:, 0]]
