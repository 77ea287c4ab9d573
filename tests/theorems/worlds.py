"""The inputs of the theorems: finite worlds in float64, and a GPT small enough to enumerate.

A finite world is one prompt with N responses. Everything in it is drawn from a seed, so that
Hypothesis shrinks towards few responses and small seeds instead of towards odd floats.
"""

import math
import random
from collections import Counter
from contextvars import ContextVar
from itertools import permutations, product
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import dpo
from model import GPT, GPTConfig

LN_2 = math.log(2)

# 1e-9 for float64. `beyond.conformance` raises it for an implementation that returns float32.
tolerance_in_use = ContextVar("tolerance_in_use", default=1e-9)


def number(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def plain(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).detach()


def assert_same(found, expected, tolerance: float = 0.0):
    """Equal shapes, and values equal within the tolerance, absolute and relative."""
    found, expected = plain(found), plain(expected)
    tolerance = max(tolerance, tolerance_in_use.get())
    same = found.shape == expected.shape and torch.allclose(found, expected, tolerance, tolerance)
    assert same, f"found {found.tolist()}, expected {expected.tolist()}"


def assert_at_most(left, right):
    """left <= right everywhere, up to rounding."""
    left, right = plain(left), plain(right)
    holds = (left <= right + tolerance_in_use.get() * (1 + right.abs())).all()
    assert holds, f"{left.tolist()} is not at most {right.tolist()}"


def assert_frequencies(drawn: list, possible: list, p: Tensor, n: int | None = None):
    """Each possibility occurs with its probability, within five standard errors, and nothing else
    occurs."""
    n, counts = n or len(drawn), Counter(map(tuple, drawn))
    frequency = number([counts.pop(tuple(y), 0) / n for y in possible])
    assert not counts, f"impossible: {sorted(counts)[:3]}"
    se = (p * (1 - p) / n).sqrt().clamp(min=1 / n)
    assert_at_most((frequency - p).abs() / se, 5.0)


# ------------------------------------------------- finite worlds


class World(NamedTuple):
    ref_logp: Tensor  # (N,) log pi_ref
    r: Tensor  # (N,) true reward in nats
    logp: Tensor  # (N,) log pi of some other policy
    beta: float


class Pair(NamedTuple):
    """The arguments of `dpo.dpo_loss`, (B,) each, and beta."""

    logp_w: Tensor
    logp_l: Tensor
    ref_logp_w: Tensor
    ref_logp_l: Tensor
    beta: float


def uniform(shape: tuple[int, ...], low: float, high: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def policy(N: int, seed: int, spread: float = 8.0) -> Tensor:
    """Log-probabilities (N,) with logits in [-spread, spread]."""
    return uniform((N,), -spread, spread, seed).log_softmax(-1)


def world(
    N: int, beta: float, seed: int, spread: float = 8.0, reward: float = 5.0, ties: bool = False
) -> World:
    r = uniform((N,), -reward, reward, 3 * seed + 1)
    r = r.clamp(-1, 1).round() if ties else r
    return World(policy(N, 3 * seed, spread), r, policy(N, 3 * seed + 2, spread), beta)


def mild(sizes, betas) -> st.SearchStrategy[World]:
    """Worlds whose optimum is far from one-hot, half of them with tied rewards."""
    return st.builds(world, sizes, betas, seeds, st.just(2.0), st.just(2.0), st.booleans())


def pair_of(B: int, beta: float, seed: int, lowest: int = 60) -> Pair:
    """B pairs with log-probabilities in quarters of a nat, from -lowest to 0."""
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.randint(-4 * lowest, 1, (4, B), generator=generator)
    return Pair(*(quarters.double() / 4), beta)


def log_grid(low: float, high: float, steps: int = 40) -> st.SearchStrategy[float]:
    """Numbers from low to high, evenly spaced in their logarithm."""
    return st.integers(0, steps).map(lambda k: low * (high / low) ** (k / steps))


seeds = st.integers(0, 10_000)
betas = log_grid(0.05, 5.0)
shifts = st.integers(-50, 50).map(lambda k: k / 4)  # f(x), in nats
margins = st.integers(-200, 200).map(lambda k: k / 10)  # h, in nats
sizes = st.integers(2, 8)

wild_worlds = st.builds(world, sizes, betas, seeds)  # one third have a nearly one-hot optimum
mild_worlds = mild(sizes, log_grid(0.5, 5.0))
worlds = wild_worlds | mild_worlds
small_worlds = st.builds(  # for all K! rankings
    world, st.integers(2, 4), betas, seeds, st.sampled_from([2.0, 8.0])
)
optimiser_worlds = mild(st.integers(2, 5), log_grid(0.2, 5.0))
pairs = st.builds(pair_of, st.integers(1, 4), betas, seeds, st.sampled_from([60, 6]))
rewards = st.builds(lambda N, seed: uniform((N,), -5.0, 5.0, seed), sizes, seeds)


# ------------------------------------------------- the independent side of an equation


def mean(logp: Tensor, f: Tensor) -> Tensor:
    """E_pi f, from log pi."""
    return (logp.exp() * f).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def tilt(ref_logp: Tensor, r: Tensor, beta: float | Tensor) -> Tensor:
    """log of pi_ref exp(r / beta) / Z, the optimum of Eq. 4."""
    return (ref_logp + r / beta).log_softmax(-1)


def objective(logp: Tensor, w: World) -> Tensor:
    """J(pi) = E_pi r - beta KL(pi, pi_ref).  Eq. 3."""
    return mean(logp, w.r) - w.beta * kl(logp, w.ref_logp)


def rivals(w: World, seed: int) -> dict[str, Tensor]:
    """Policies that compete with the optimum: random, plausible but wrong, and close."""
    best = tilt(w.ref_logp, w.r, w.beta)
    disturbance = policy(len(best), seed, 1.0)
    return {
        "random": w.logp,
        "pi_ref": w.ref_logp,
        "optimum at 2 beta": tilt(w.ref_logp, w.r, 2 * w.beta),
        "optimum at beta / 2": tilt(w.ref_logp, w.r, w.beta / 2),
        "optimum without pi_ref": tilt(0 * w.ref_logp, w.r, w.beta),
        "near the optimum": (best + 0.1 * disturbance).log_softmax(-1),
        "nearer to the optimum": (best + 0.01 * disturbance).log_softmax(-1),
    }


def connected(N: int, seed: int) -> list[tuple[int, int, float]]:
    """Unordered pairs (i, j, mass) that connect N responses: a random tree and a few more."""
    rng = random.Random(seed)
    tree = {(i, rng.randrange(i)) for i in range(1, N)}
    more = {(i, j) for i in range(N) for j in range(i) if rng.random() < 0.3}
    return [(i, j, rng.uniform(0.2, 1.0)) for i, j in sorted(tree | more)]


def population(
    ref_logp: Tensor, r: Tensor, drawn: list[tuple[int, int, float]] | None = None
) -> dpo.Preferences:
    """One prompt, responses of one token each, and Bradley-Terry labels of the drawn pairs.

    Without drawn pairs, all pairs have the same mass. Each pair occurs in both orders. The
    weights sum to 1.
    """
    N = len(r)
    drawn = drawn or [(i, j, 1.0) for i in range(N) for j in range(i)]
    orders = drawn + [(j, i, mass) for i, j, mass in drawn]
    w, l, mass = (torch.tensor(column) for column in zip(*orders, strict=True))
    share = mass.double() * torch.sigmoid(r[w] - r[l])
    return dpo.Preferences(
        ids=torch.zeros(N, 1, dtype=torch.long),
        mask=torch.ones(N, 1, dtype=torch.bool),
        ref_logps=ref_logp[:, None],
        prompt=torch.zeros(N, dtype=torch.long),
        pairs=torch.stack((w, l), 1),
        weight=share / share.sum(),
    )


def population_loss(logp: Tensor, batch: dpo.Preferences, beta: float) -> Tensor:
    losses, _, _ = dpo.dpo(logp[:, None], batch, beta)
    return (batch.weight * losses).sum()


def minimise(loss, x: Tensor) -> Tensor:
    """Damped Newton down to a gradient norm of 1e-11, or 1e-8 if rounding ends the descent."""
    for _ in range(100):
        gradient = jacobian(loss, x)
        if gradient.norm() < 1e-11:
            break
        step = torch.linalg.pinv(hessian(loss, x), hermitian=True) @ gradient
        size = 1.0
        while loss(x - size * step) > loss(x) and size > 1e-8:
            size /= 2
        x = x - size * step
    assert gradient.norm() < 1e-8, "the optimiser found no minimum"
    return x


# ------------------------------------------------- models


class Bigram(nn.Module):
    """The smallest language model: one row of logits for each current token."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


class Positional(Bigram):
    """Logits that depend on the position alone, (T, V). They show which logits a function uses."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[: ids.size(1)].expand(*ids.shape, -1)


END, V, CONTEXT = 2, 3, 4  # tokens 0 and 1, and the end token
PROMPTS = [[0], [1, 0]]  # 15 and 7 responses


def bigram(seed: int) -> Bigram:
    return Bigram(uniform((V, V), -3.0, 3.0, seed))


def gpt(seed: int, context: int = CONTEXT, n_layer: int = 1) -> GPT:
    """A GPT in float64 with random parameters, so that no distribution is uniform."""
    pi = GPT(GPTConfig(V, context, n_layer, n_head=2, n_embd=16)).double()
    generator = torch.Generator().manual_seed(seed)
    for p in pi.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)
    return pi


def responses(x: list[int]) -> list[list[int]]:
    """Every response to x: those that end, and those that the context cuts."""
    room = CONTEXT - len(x)
    ended = [[*y, END] for n in range(room) for y in product(range(END), repeat=n)]
    return ended + [list(y) for y in product(range(END), repeat=room)]


def rows(
    x: list[int], ys: list[list[int]], length: int = CONTEXT, pad: int = 0
) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T) of the responses ys to x, padded on the right."""
    ids = torch.tensor([[*x, *y] + [pad] * (length - len(x) - len(y)) for y in ys])
    position = torch.arange(length)
    ends = torch.tensor([len(x) + len(y) for y in ys])[:, None]
    return ids, (len(x) <= position) & (position < ends)


def next_token(pi: nn.Module, ids: list[int]) -> Tensor:
    """log pi( . | ids), from a call that sees nothing else."""
    return pi(torch.tensor([ids]))[0, -1].detach().log_softmax(-1)


def log_probability(pi: nn.Module, x: list[int], y: list[int]) -> Tensor:
    """log pi(y|x) by the chain rule, with one call of the model per token."""
    return torch.stack([next_token(pi, x + y[:t])[y[t]] for t in range(len(y))]).sum()


def enumerated(pi: nn.Module, x: list[int]) -> Tensor:
    """log pi(y|x) of every response to x, as dpo.py computes it."""
    with torch.no_grad():
        return dpo.response_logps(pi, *rows(x, responses(x))).sum(-1).double()


def triplets(seed: int, P: int = 4, K: int = 4) -> list[dict]:
    """P prompts with responses of 1 to K tokens each, and some weighted pairs of them."""
    rng = random.Random(seed)
    found = []
    for prompt in range(P):
        x = rng.choices(range(V), k=rng.randint(1, 3))
        ys = [rng.choices(range(V), k=n) for n in range(1, K + 1)]
        for y_w, y_l in rng.sample([*permutations(ys, 2)], rng.randint(1, 6)):
            found.append(dict(prompt=prompt, x=x, y_w=y_w, y_l=y_l, weight=rng.uniform(0.1, 1.0)))
    return found


def preferences(of: list[dict], pi_ref: nn.Module) -> dpo.Preferences:
    """Triplets as a batch with pi_ref's log-probabilities: each distinct response is one row."""
    both = [[(t["prompt"], (*t["x"],), (*t[side],)) for side in ("y_w", "y_l")] for t in of]
    found = sorted({response for pair in both for response in pair})
    T = max(len(x) + len(y) for _, x, y in found)
    each = [rows(x, [y], T) for _, x, y in found]
    ids, mask = (torch.cat(parts) for parts in zip(*each, strict=True))
    with torch.no_grad():
        ref_logps = dpo.response_logps(pi_ref, ids, mask)
    prompt = torch.tensor([prompt for prompt, _, _ in found])
    pairs = torch.tensor([[found.index(response) for response in pair] for pair in both])
    return dpo.Preferences(ids, mask, ref_logps, prompt, pairs, number([t["weight"] for t in of]))
