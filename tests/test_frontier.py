"""The optimal reward-KL frontier: what Eq. 4 reaches, what samples of pi_ref can tell of it, and what best-of-N
reaches."""
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
from kit import estimates
from worlds import (assert_at_most, assert_same, betas, kl, mean, objective, population, population_loss, seeds,
                    uniform, worlds)

samples = st.builds(lambda N, seed: uniform((N,), -5.0, 5.0, seed), st.integers(2, 50), seeds)      # their rewards


def number(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- the curve

@given(r=samples, beta=betas)
def test_frontier_comes_from_the_cumulants_of_the_reward(r, beta):
    """l = 1 / beta, C(l) = log E_ref e^{l r}  =>  E* = C'(l) and KL* = l C' - C"""
    l = number(1 / beta).requires_grad_()
    C = (l * r).logsumexp(-1) - math.log(len(r))
    slope, = torch.autograd.grad(C, l)
    E, KL, _ = dpo.frontier(r, beta)
    assert_same(torch.stack((E, KL)), torch.stack((slope, l * slope - C)))


@given(r=samples, beta=betas)
def test_frontier_has_slope_beta(r, beta):
    """dE* / dKL* = beta: a nat of KL buys beta of reward at the margin"""
    b = number(beta).requires_grad_()
    E, KL, _ = dpo.frontier(r, b)
    (dE,), (dKL,) = torch.autograd.grad(E, b, retain_graph=True), torch.autograd.grad(KL, b)
    assert_same(dE, beta * dKL)


@given(r=samples, beta=betas)
def test_reward_and_kl_of_the_optimum_fall_as_beta_rises(r, beta):
    """beta_1 < beta_2  =>  E* and KL* are larger at beta_1.  pitfall 24"""
    (E, KL, _), (E_2, KL_2, _) = dpo.frontier(r, beta), dpo.frontier(r, 1.5 * beta)
    assert_at_most(torch.stack((r.mean(), number(0.0))), torch.stack((E_2, KL_2)))
    assert_at_most(torch.stack((E_2, KL_2)), torch.stack((E, KL)))
    assert KL_2 < KL or KL_2 > math.log(len(r)) - 1e-6          # but where one sample holds all the mass already


@given(r=samples, beta=betas)
def test_sampled_frontier_is_the_optimal_policy_on_the_samples(r, beta):
    """w = softmax(r / beta) => E = sum w r, KL = log N - H(w) in [0, log N], effective sample size 1 / sum w^2 in
    [1, N]. Eq. 4"""
    w = (r / beta).softmax(-1)
    E, KL, size = dpo.frontier(r, beta)
    H = torch.special.entr(w).sum()
    assert_same(torch.stack((E, KL, size)), torch.stack((w @ r, math.log(len(r)) - H, 1 / (w @ w))))
    assert_at_most(number([0.0, 1.0]), torch.stack((KL, size)))
    assert_at_most(torch.stack((KL, size)), number([math.log(len(r)), len(r)]))


@given(w=worlds, N=st.integers(1, 3))
def test_sampled_frontier_is_biased_low(w, N):
    """N samples of pi_ref, all their draws weighed => E of the sampled E* <= E*, and the sampled KL* cannot pass log
    N"""
    w = w._replace(pi_ref=w.pi_ref[:4].log_softmax(-1), r=w.r[:4])
    draws = torch.tensor(list(product(range(len(w.r)), repeat=N)))
    E, KL, _ = dpo.frontier(w.r[draws], w.beta)
    pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_at_most(mean(w.pi_ref[draws].sum(-1), E), mean(pi_r, w.r))
    assert_at_most(KL, math.log(N))


@given(w=worlds)
def test_regret_is_beta_times_the_divergence_from_the_optimum(w):
    """J(pi_r) - J(pi) = beta KL(pi, pi_r) = beta log Z - E_pi r + beta KL(pi, pi_ref)"""
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    regret = objective(pi_r, w) - objective(w.pi, w)
    assert_same(torch.stack((regret, w.beta * log_Z - mean(w.pi, w.r) + w.beta * kl(w.pi, w.pi_ref))),
                (w.beta * kl(w.pi, pi_r)).expand(2))


@given(w=worlds)
def test_beta_of_dpo_is_beta_of_the_optimum_for_sampled_labels_alone(w):
    """Labels from Bradley-Terry => dL = 0 at pi_r of the same beta; labels by argmax, the paper's choice for IMDb =>
    dL != 0 there, and descent goes on raising the best response"""
    logits = dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0].clone().requires_grad_()
    order = w.r.argsort()
    soft, argmax = population(w.pi_ref, w.r), population(w.pi_ref, 1e6 * w.r)
    slopes = [torch.autograd.grad(population_loss(logits.log_softmax(-1), batch, w.beta), logits)[0]
              for batch in (soft, argmax)]
    assert_same(slopes[0], torch.zeros_like(slopes[0]))
    assert slopes[1][order[-1]] < 0 < slopes[1][order[0]]


# ---------------------------------------------------------------------------------------------- best of N

@given(seed=seeds, M=st.integers(1, 7), data=st.data())
def test_best_of_n_is_the_mean_over_all_choices_of_n(seed, M, data):
    """M samples, every N of them equally likely => sum_i C(i - 1, N - 1) / C(M, N) r_(i) is the mean of their maxima"""
    N = data.draw(st.integers(1, M))
    r = uniform((2, M), -5.0, 5.0, seed).round(decimals=0 if seed % 2 else 3)        # with ties and without
    maxima = [row[list(choice)].max() for row in r for choice in combinations(range(M), N)]
    assert_same(estimates.best_of_n(r, N), torch.stack(maxima).mean())


def best_of(pi_ref: torch.Tensor, r: torch.Tensor, N: int) -> torch.Tensor:
    """log g: the law of the best of N draws, g_j = F_j^N - F_{j-1}^N over rewards in ascending order."""
    order = r.argsort()
    F = torch.cat((torch.zeros(1), pi_ref[order].exp().cumsum(-1)))
    g = torch.empty_like(r)
    g[order] = F.pow(N).diff().clamp(min=1e-300)
    return g.log()


@given(w=worlds, N=st.integers(2, 20))
def test_best_of_n_lies_below_the_optimum(w, N):
    """The best of N draws has KL < log N - (N - 1) / N on a finite set, and the optimum of that KL has at least its
    reward"""
    g = best_of(w.pi_ref, w.r, N)
    assert kl(g, w.pi_ref) < math.log(N) - (N - 1) / N
    low, high = 1e-3, 1e3
    for _ in range(60):                 # the beta at which the optimum has the KL of best-of-N
        beta = math.sqrt(low * high)
        pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, beta)
        low, high = (beta, high) if kl(pi_r, w.pi_ref) > kl(g, w.pi_ref) else (low, beta)
    assert_at_most(mean(g, w.r), mean(pi_r, w.r), 1e-6)


@given(w=worlds, N=st.integers(1, 3))
def test_best_of_n_is_unbiased(w, N):
    """4 samples of pi_ref, all their draws weighed  =>  the estimate's mean is the reward of the best of N"""
    w = w._replace(pi_ref=w.pi_ref[:3].log_softmax(-1), r=w.r[:3])
    draws = torch.tensor(list(product(range(len(w.r)), repeat=4)))
    each = torch.tensor([estimates.best_of_n(w.r[draw][None], N) for draw in draws], dtype=torch.float64)
    assert_same(mean(w.pi_ref[draws].sum(-1), each), mean(best_of(w.pi_ref, w.r, N), w.r))


# ---------------------------------------------------------------------------------------------- the curve of a run

@pytest.fixture(scope="module")
def r_ref():
    """Rewards of 400 samples of pi_ref for each of 6 prompts, whose means differ."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(6, 400, generator=generator, dtype=torch.float64) + torch.arange(6)[:, None]


def test_optimal_curve_has_one_beta_for_all_prompts_and_pools_no_samples(r_ref):
    """A prompt's curve is the same alone and among others: E* and KL* of its own samples, at each beta"""
    curve = estimates.optimal_curve(r_ref)
    each = [[dpo.frontier(r, beta)[:2] for r in r_ref] for beta in estimates.BETAS]
    assert_same(np.stack((curve["reward"], curve["kl"]), -1), each)


def test_optimal_curve_is_trusted_where_samples_can_tell(r_ref):
    """Trusted => the effective sample size is at least 40 there and at every larger beta; with 30 samples nothing is"""
    curve = estimates.optimal_curve(r_ref)
    trusted, sizes = curve["trusted"], [dpo.frontier(r_ref, beta)[2].mean() for beta in estimates.BETAS]
    assert 0 < trusted.sum() < len(trusted) and (np.diff(trusted.astype(int)) <= 0).all()
    assert min(size for size, trust in zip(sizes, trusted) if trust) >= 40
    assert not estimates.optimal_curve(r_ref[:, :30])["trusted"].any()


def test_optimal_curve_is_not_trusted_where_half_the_samples_disagree():
    """The first half of the samples has twice the spread of the second => the curve from N / 2 samples is off by
    more than 2 %, and nothing is trusted, however large the effective sample size"""
    r = torch.randn(4, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r[:, :200] *= 2
    assert not estimates.optimal_curve(r)["trusted"].any()


def test_fraction_of_optimal_is_one_on_the_curve_and_zero_at_the_references_reward(r_ref):
    """r and KL of each prompt those of pi_r  =>  1, with no error; r that of pi_ref  =>  0"""
    curve = estimates.optimal_curve(r_ref)
    i = int(curve["trusted"].sum()) // 2
    start = r_ref.mean(1).numpy()
    assert_same(estimates.fraction_of_optimal(curve, start, curve["reward"][i], curve["kl"][i]), [1.0, 0.0])
    assert_same(estimates.fraction_of_optimal(curve, start, start, curve["kl"][i]), [0.0, 0.0])


def test_fraction_of_optimal_is_silent_beyond_what_samples_can_tell(r_ref):
    """KL beyond the trusted part of the curve  =>  no fraction and no error bar"""
    curve = estimates.optimal_curve(r_ref)
    beyond = curve["kl"][int(curve["trusted"].sum())]
    assert estimates.fraction_of_optimal(curve, r_ref.mean(1).numpy(), curve["reward"][-1], beyond) == (None, None)


@given(seed=seeds, P=st.integers(2, 6), M=st.integers(1, 6))
def test_standard_error_is_that_of_independent_prompts(seed, P, M):
    """Means over prompts' own means => se = std / sqrt(P), from the data and not a constant: doubled values double
    it, and values alike within a prompt add nothing. pitfall 33"""
    values = uniform((P, M), -5.0, 5.0, seed)
    value, se = estimates.mean_se(values)
    each = values.mean(1).numpy()
    assert_same([value, se], [each.mean(), np.sqrt(((each - each.mean()) ** 2).sum() / (P - 1) / P)])
    assert_same(estimates.mean_se(2 * values.repeat(1, 3)), [2 * value, 2 * se])
