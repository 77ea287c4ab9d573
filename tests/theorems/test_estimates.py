"""Estimates from samples: the optimal frontier, best of N, standard errors."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_optimum import best_of
from worlds import assert_same, mean, number, seeds, uniform, worlds

import dpo
from beyond.common import best_of_n_rows
from lib import evaluate


def best_of_n(r: torch.Tensor, n: int) -> float:
    """The estimate of E max of n of a prompt's rewards, averaged over prompts. r: (P, M)."""
    (row,) = (row for row in best_of_n_rows(r, torch.zeros_like(r)) if row["n"] == n)
    return row["gain"] + r.double().mean().item()


@given(seed=seeds, M=st.integers(1, 7), data=st.data(), decimals=st.sampled_from([0, 3]))
def test_best_of_n_is_the_mean_over_all_choices_of_n(seed, M, data, decimals):
    """M samples, every N of them equally likely => sum_i C(i-1, N-1) / C(M, N) r_(i) is the mean of
    their maxima, with ties and without."""
    N = data.draw(st.integers(1, min(M, 6)))
    r = uniform((2, M), -5.0, 5.0, seed).round(decimals=decimals)
    maxima = [row[list(choice)].max() for row in r for choice in combinations(range(M), N)]
    assert_same(best_of_n(r, N), torch.stack(maxima).mean())


@given(w=worlds, N=st.integers(1, 3))
def test_best_of_n_is_unbiased(w, N):
    """4 samples of pi_ref, every draw weighted by its probability  =>  the mean of the estimate is
    the reward of the best of N"""
    ref_logp, r = w.ref_logp[:3].log_softmax(-1), w.r[:3]
    draws = torch.tensor(list(product(range(len(r)), repeat=4)))
    each = number([best_of_n(r[draw][None], N) for draw in draws])
    assert_same(mean(ref_logp[draws].sum(-1), each), mean(best_of(ref_logp, r, N), r))


@pytest.fixture(scope="module")
def ref_r():
    """Rewards of 400 samples of pi_ref for each of 6 prompts with different means."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 400, generator=generator, dtype=torch.float64)
    return 2 * noise + torch.arange(6)[:, None]


def test_optimal_frontier_has_one_beta_for_all_prompts_and_pools_no_samples(ref_r):
    """A prompt alone, or among others  =>  the same reward and KL at each beta.  Eq. 4"""
    found = evaluate.optimal_frontier(ref_r)
    each = [[torch.stack(dpo.frontier(r, beta)[:2]) for r in ref_r] for beta in evaluate.BETAS]
    expected = torch.stack([torch.stack(row) for row in each])
    assert_same(np.stack((found["reward"], found["kl"]), -1), expected)


def test_optimal_frontier_is_reliable_where_samples_are_enough(ref_r):
    """Reliable => the mean effective sample size is at least 40 there and at every larger beta;
    with 30 samples nothing is reliable"""
    reliable = evaluate.optimal_frontier(ref_r)["reliable"]
    sizes = [dpo.frontier(ref_r, beta)[2].mean() for beta in evaluate.BETAS]
    assert 0 < reliable.sum() < len(reliable) and (np.diff(reliable.astype(int)) <= 0).all()
    assert min(size for size, ok in zip(sizes, reliable, strict=True) if ok) >= 40
    assert not evaluate.optimal_frontier(ref_r[:, :30])["reliable"].any()


def test_fraction_of_optimal_is_one_on_the_frontier_and_zero_at_the_references_reward(ref_r):
    """Reward and KL of pi_r for each prompt  =>  1, without error; the reward of pi_ref  =>  0"""
    frontier = evaluate.optimal_frontier(ref_r)
    i = int(frontier["reliable"].sum()) // 2
    best, kl = (torch.from_numpy(frontier[name][i]) for name in ("reward", "kl"))
    for r, expected in ((best, 1.0), (ref_r.mean(1), 0.0)):
        found = evaluate.fraction_of_optimal(ref_r, r, kl)
        assert_same(list(found.values()), [expected, 0.0])


def test_fraction_of_optimal_is_unknown_beyond_the_reliable_frontier(ref_r):
    """KL beyond the reliable part  =>  no fraction and no standard error"""
    frontier = evaluate.optimal_frontier(ref_r)
    kl = torch.from_numpy(frontier["kl"][int(frontier["reliable"].sum())])
    found = evaluate.fraction_of_optimal(ref_r, torch.from_numpy(frontier["reward"][-1]), kl)
    assert set(found.values()) == {None}


@given(seed=seeds, P=st.integers(2, 6), M=st.integers(1, 6))
def test_standard_error_is_that_of_independent_prompts(seed, P, M):
    """Means of prompts' own means  =>  se = std / sqrt(P), computed from the data: doubled values
    double it, and repeated values of a prompt do not change it.  pitfall 33"""
    values = uniform((P, M), -5.0, 5.0, seed)
    value, se = evaluate.means_and_errors({"x": values}).values()
    each = values.mean(1).numpy()
    assert_same(
        [value, se], [each.mean(), np.sqrt(((each - each.mean()) ** 2).sum() / (P - 1) / P)]
    )
    assert_same(
        list(evaluate.means_and_errors({"x": 2 * values.repeat(1, 3)}).values()),
        [2 * value, 2 * se],
    )
