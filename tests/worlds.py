"""What the theorems quantify over: finite worlds in float64, and a GPT small enough to enumerate.

A finite world is one prompt with N responses. Everything in it is drawn from one integer seed, so that hypothesis
shrinks to few responses and small seeds rather than to odd floats.
"""
import math
import random
from itertools import product
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import data
import dpo
from model import GPT, GPTConfig


LN_2 = math.log(2)


def assert_same(left, right, tolerance: float = 1e-9):
    """Equal within the tolerance, absolute and relative; never equal where either is NaN."""
    left, right = (torch.as_tensor(side, dtype=torch.float64) for side in (left, right))
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def assert_at_most(left, right, tolerance: float = 1e-9):
    """left <= right everywhere, but for rounding."""
    left, right = (torch.as_tensor(side, dtype=torch.float64) for side in (left, right))
    assert bool((left <= right + tolerance).all()), f"{left.tolist()} is not at most {right.tolist()}"


# ---------------------------------------------------------------------------------------------- strategies

class World(NamedTuple):
    pi_ref: Tensor      # (N,) log-probabilities
    r: Tensor           # (N,) the true reward, nats
    pi: Tensor          # (N,) log-probabilities of some other policy
    beta: float


class Pair(NamedTuple):
    """The arguments of `dpo.dpo_loss`: log-probabilities of responses, (B,) each, and beta."""
    pi_theta_w: Tensor
    pi_theta_l: Tensor
    pi_ref_w: Tensor
    pi_ref_l: Tensor
    beta: float


def uniform(shape: tuple[int, ...], low: float, high: float, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(N: int, seed: int, spread: float = 8.0) -> Tensor:
    return uniform((N,), -spread, spread, seed).log_softmax(-1)


def world(N: int, beta: float, seed: int, spread: float = 8.0, reward: float = 5.0) -> World:
    return World(policy(N, 3 * seed, spread), uniform((N,), -reward, reward, 3 * seed + 1),
                 policy(N, 3 * seed + 2, spread), beta)


seeds = st.integers(0, 10_000)
betas = st.integers(0, 40).map(lambda k: 0.05 * 100 ** (k / 40))                  # log-uniform in [.05, 5]
shifts = st.integers(-50, 50).map(lambda k: k / 4)                                # f(x), nats
margins = st.integers(-200, 200).map(lambda k: k / 10)                            # h, nats
worlds = st.builds(world, st.integers(2, 8), betas, seeds)
mild_worlds = st.builds(world, st.integers(2, 5), st.integers(0, 20).map(lambda k: 0.2 * 25 ** (k / 20)), seeds,
                        st.just(2.0), st.just(2.0))                               # for optimisers: beta in [.2, 5]
small_worlds = st.builds(world, st.integers(2, 4), betas, seeds)                  # for all K! rankings
pairs = st.builds(lambda seed, beta: Pair(*uniform((4, 6), -60.0, 0.0, seed), beta), seeds, betas)
rewards = st.builds(lambda N, seed: uniform((N,), -5.0, 5.0, seed), st.integers(2, 8), seeds)


# ---------------------------------------------------------------------------------------------- independent sides

def mean(pi: Tensor, f: Tensor) -> Tensor:
    """E_pi f."""
    return (pi.exp() * f).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def objective(pi: Tensor, w: World) -> Tensor:
    """J(pi) = E_pi r - beta KL(pi, pi_ref).  Eq. 3."""
    return mean(pi, w.r) - w.beta * kl(pi, w.pi_ref)


def connected(N: int, seed: int) -> list[tuple[int, int, float]]:
    """Unordered pairs (i, j, mass) that connect N responses: a random tree, and some more."""
    rng = random.Random(seed)
    tree = {(i, rng.randrange(i)) for i in range(1, N)}
    more = {(i, j) for i in range(N) for j in range(i) if rng.random() < 0.3}
    return [(i, j, rng.uniform(0.2, 1.0)) for i, j in sorted(tree | more)]


def population(pi_ref: Tensor, r: Tensor, drawn: list[tuple[int, int, float]] | None = None) -> dpo.Preferences:
    """Both orders of each drawn pair, weighted by mass and Bradley-Terry probability; responses of one token each. All
    pairs with mass 1 unless drawn are given."""
    N = len(r)
    drawn = [(i, j, 1.0) for i in range(N) for j in range(i)] if drawn is None else drawn
    orders = [(0, *order, m) for i, j, m in drawn for order in ((i, j), (j, i))]
    x, w, l, mass = zip(*orders)
    weight = torch.tensor(mass, dtype=torch.float64) * dpo.bradley_terry(r[list(w)], r[list(l)])
    return dpo.Preferences(torch.zeros(1, N, 1, dtype=torch.long), torch.ones(1, N, 1, dtype=torch.bool),
                           pi_ref[None, :, None], torch.tensor([x, w, l]).T, weight / weight.sum())


def population_loss(pi: Tensor, batch: dpo.Preferences, beta: float) -> Tensor:
    return (batch.weight * dpo.dpo(pi[None, :, None], batch, beta)[0]).sum()


def minimise(loss, x: Tensor) -> Tensor:
    """Damped Newton, to a gradient norm of 1e-11; an AssertionError where there is no minimum to be found."""
    for _ in range(100):
        x = x.detach().requires_grad_()
        value = loss(x)
        grad, = torch.autograd.grad(value, x)
        if grad.norm() < 1e-11:
            return x.detach()
        step = torch.linalg.pinv(torch.autograd.functional.hessian(loss, x.detach()), hermitian=True) @ grad
        size = 1.0
        while loss((x - size * step).detach()) > value and size > 1e-8:
            size /= 2
        x = x - size * step
    raise AssertionError("the optimiser found no minimum")


# ---------------------------------------------------------------------------------------------- models

class Bigram(nn.Module):
    """The smallest language model: one row of logits for each current token."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor, where=...) -> Tensor:
        return self.logits[ids[where]]


END, V, CONTEXT = 2, 3, 4       # tokens 0 and 1, and the end token
PROMPTS = [[0], [1, 0]]         # of different lengths: 15 and 7 responses


def gpt(seed: int, context: int = CONTEXT, std: float = 0.4, n_layer: int = 1) -> GPT:
    """A GPT in float64 whose every parameter is random, so that none of its distributions is uniform."""
    pi = GPT(GPTConfig(V, context, n_layer, n_head=2, n_embd=16)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pi.parameters():
            p.normal_(std=std, generator=generator)
    return pi


def responses(x: list[int]) -> list[list[int]]:
    """Every response to x: those that end, and those that the context cuts."""
    room = CONTEXT - len(x)
    ended = [[*y, END] for n in range(room) for y in product(range(END), repeat=n)]
    return ended + [list(y) for y in product(range(END), repeat=room)]


def rows(x: list[int], ys: list[list[int]], length: int = CONTEXT, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T) of the responses ys to x, padded on the right."""
    ids = torch.tensor([[*x, *y] + [pad] * (length - len(x) - len(y)) for y in ys])
    place = torch.arange(length)
    ends = torch.tensor([len(x) + len(y) for y in ys])[:, None]
    return ids, (len(x) <= place) & (place < ends)


def next_token(pi: nn.Module, ids: list[int]) -> Tensor:
    """log pi( . | ids), from a call that sees nothing else."""
    return pi(torch.tensor([ids]))[0, -1].detach().log_softmax(-1)


def log_probability(pi: nn.Module, x: list[int], y: list[int]) -> Tensor:
    """log pi(y|x) by the chain rule, one call of the model a token."""
    return torch.stack([next_token(pi, x + y[:t])[y[t]] for t in range(len(y))]).sum()


def enumerated(pi: nn.Module, x: list[int]) -> Tensor:
    """log pi(y|x) of every response to x, as the code scores them."""
    with torch.no_grad():
        return dpo.response_logps(pi, *rows(x, responses(x))).sum(-1).double()


def triplets(seed: int, P: int = 4, K: int = 4) -> list[dict]:
    """Preferences as data.py writes them: P prompts, up to K responses of unequal lengths each, some pairs, drawn
    weights."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(V) for _ in range(rng.randint(low, high))]
    found = []
    for number in range(P):
        x, ys = tokens(1, 3), [tokens(1, 4) for _ in range(K)]
        some = rng.sample([(y, other) for y in ys for other in ys if y != other] or [(ys[0], ys[0])], 1)
        some += [(y, other) for y in ys for other in ys if y != other and rng.random() < 0.3]
        found += [dict(number=number, prompt_ids=x, chosen_ids=y, rejected_ids=other, weight=rng.uniform(0.1, 1.0))
                  for y, other in some]
    return found


def preferences(of: list[dict], pi_ref: nn.Module) -> dpo.Preferences:
    """Triplets grouped by prompt, scored under pi_ref."""
    ids, mask, pairs, weight = data.group(of)
    with torch.no_grad():
        logps = dpo.response_logps(pi_ref, ids.flatten(0, 1), mask.flatten(0, 1)).view(ids.shape)
    return dpo.Preferences(ids, mask, logps, pairs, weight)


def bigram(seed: int) -> Bigram:
    return Bigram(uniform((V, V), -3.0, 3.0, seed))


def standard_errors(estimate: Tensor, truth: Tensor, se: Tensor) -> Tensor:
    """How many standard errors lie between an estimate and the truth."""
    return (estimate - truth).abs() / se.clamp(min=1e-12)
