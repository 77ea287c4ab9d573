"""What samples can tell: the optimal curve and how far to trust it, the share of the possible, best of N, standard errors."""
import math

import numpy as np
import torch
from torch import Tensor

import dpo

BETAS = np.geomspace(20, 0.05, 80)     # where the optimal curve is computed


def optimal_curve(r: Tensor) -> dict[str, np.ndarray]:
    """Eq. 4 from pi_ref's rewards r (P, N): for each of BETAS the reward and KL of each prompt (80, P), and whether their
    mean can be trusted: effective sample size at least 40, and the curve from N/2 samples agreeing within 2 %."""
    betas = torch.from_numpy(BETAS)[:, None, None]
    reward, kl, size = (v.numpy() for v in dpo.frontier(r.double(), betas))
    halves = []
    for half in r.double().chunk(2, dim=1):
        half_reward, half_kl, _ = (v.mean(1).numpy() for v in dpo.frontier(half, betas))
        halves.append(np.interp(kl.mean(1), half_kl, half_reward - half.mean().item(), right=np.nan))
    gain = reward.mean(1) - r.mean().item()
    agree = np.abs(np.mean(halves, 0) - gain) <= 0.02 * gain
    trusted = np.logical_and.accumulate((size.mean(1) >= 40) & agree)
    return dict(reward=reward, kl=kl, trusted=trusted)


def fraction_of_optimal(curve: dict, r_ref: np.ndarray, r: np.ndarray, kl: np.ndarray) -> tuple[float | None, float | None]:
    """(E r - r_ref) / (E*(KL) - r_ref) with its standard error over prompts (bootstrap), from per-prompt means (P,); None
    where the curve cannot be trusted."""
    if not kl.mean() <= curve["kl"].mean(1)[curve["trusted"]].max(initial=0.0):
        return None, None
    rng = np.random.default_rng(0)

    def fraction(p: np.ndarray) -> float:
        best = np.interp(kl[p].mean(), [0, *curve["kl"][:, p].mean(1)], [r_ref[p].mean(), *curve["reward"][:, p].mean(1)])
        return float((r[p].mean() - r_ref[p].mean()) / (best - r_ref[p].mean()))
    every = np.arange(len(r))
    return fraction(every), float(np.std([fraction(rng.choice(every, len(every))) for _ in range(200)]))


def mean_se(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over prompts of values (P, M): the prompts are what is drawn independently."""
    each = values.double().mean(1)
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item() if len(each) > 1 else math.nan


def best_of_n(r: Tensor, N: int) -> float:
    """E max of N of a prompt's M rewards, unbiased: sum_i C(i-1, N-1) / C(M, N) r_(i), averaged over prompts; r (P, M)."""
    M = r.size(1)
    weight = torch.tensor([math.comb(i, N - 1) / math.comb(M, N) for i in range(M)], dtype=torch.double)
    return (r.double().sort(1).values * weight).sum(1).mean().item()


def best_of_each_n(r: Tensor) -> list[dict]:
    """The curve of best of N, N to 128: reward, and log N - (N - 1) / N, a bound from above on its KL."""
    return [dict(n=n, reward=best_of_n(r, n), kl_bound=math.log(n) - (n - 1) / n)
            for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= r.size(1)]


def along(curve: dict[str, np.ndarray]) -> list[dict]:
    """The optimal curve, mean over prompts, a row for each of BETAS."""
    return [dict(beta=beta, reward=reward, kl=kl, trusted=bool(trusted)) for beta, reward, kl, trusted in zip(
        BETAS.tolist(), curve["reward"].mean(1).tolist(), curve["kl"].mean(1).tolist(), curve["trusted"])]


def finite(point: dict) -> dict:
    """None for what is 0 / 0: the deviation of one number, a slope without differences."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}
