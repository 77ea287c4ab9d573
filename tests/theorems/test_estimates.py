"""Estimates from samples: the optimal frontier, best of N, standard errors."""

from itertools import combinations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import assert_same, seeds, uniform

import dpo
from beyond.common import best_of_n_rows
from lib import evaluate


@given(seed=seeds, M=st.integers(1, 7), data=st.data(), decimals=st.sampled_from([0, 3]))
def test_best_of_n_is_the_mean_over_all_choices_of_n(seed, M, data, decimals):
    """M samples, every N of them equally likely => sum_i C(i-1, N-1) / C(M, N) r_(i) is the mean of
    their maxima, with ties and without. So it is unbiased."""
    N = data.draw(st.integers(1, min(M, 6)))
    r = uniform((2, M), -5.0, 5.0, seed).round(decimals=decimals)
    maxima = [row[list(choice)].max() for row in r for choice in combinations(range(M), N)]
    (row,) = (row for row in best_of_n_rows(r, torch.zeros_like(r)) if row["n"] == N)
    assert_same(row["gain"] + r.mean(), torch.stack(maxima).mean())


# Rewards of 400 samples of pi_ref for each of 6 prompts with different means.
noise = torch.randn(6, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF_R = 2 * noise + torch.arange(6)[:, None]


def test_optimal_frontier_has_one_beta_for_all_prompts_and_pools_no_samples():
    """A prompt alone, or among others  =>  the same reward and KL at each beta.  Eq. 4"""
    found = evaluate.optimal_frontier(REF_R)
    expected = [[dpo.frontier(r, beta)[:2] for r in REF_R] for beta in evaluate.BETAS]
    assert_same(np.stack((found["reward"], found["kl"]), -1), expected)


def test_optimal_frontier_is_reliable_only_where_there_are_enough_samples():
    """Reliable => the mean effective sample size is at least 40 there and at every larger beta;
    with 30 samples nothing is reliable"""
    reliable = evaluate.optimal_frontier(REF_R)["reliable"]
    sizes = [dpo.frontier(REF_R, beta)[2].mean() for beta in evaluate.BETAS]
    assert 0 < reliable.sum() < len(reliable) and (np.diff(reliable.astype(int)) <= 0).all()
    assert min(size for size, ok in zip(sizes, reliable, strict=True) if ok) >= 40
    assert not evaluate.optimal_frontier(REF_R[:, :30])["reliable"].any()


def test_fraction_of_optimal_is_one_on_the_frontier_and_zero_at_the_references_reward():
    """Reward and KL of pi_r for each prompt  =>  1, without error; the reward of pi_ref  =>  0"""
    frontier = evaluate.optimal_frontier(REF_R)
    i = int(frontier["reliable"].sum()) // 2
    best, kl = (torch.from_numpy(frontier[name][i]) for name in ("reward", "kl"))
    for r, expected in ((best, 1.0), (REF_R.mean(1), 0.0)):
        fraction, se = evaluate.fraction_of_optimal(REF_R, r, kl).values()
        assert_same([fraction, se], [expected, 0.0])


def test_fraction_of_optimal_is_unknown_beyond_the_reliable_frontier():
    """KL beyond the reliable part, or below that of the largest beta  =>  no fraction and no
    standard error"""
    frontier = evaluate.optimal_frontier(REF_R)
    kl = torch.from_numpy(frontier["kl"])
    for KL in (kl[int(frontier["reliable"].sum())], kl[0] / 2):
        found = evaluate.fraction_of_optimal(REF_R, torch.from_numpy(frontier["reward"][-1]), KL)
        assert set(found.values()) == {None}
