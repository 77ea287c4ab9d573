"""Eq. 1, 2 and 18 to 20, Definition 1 and Lemma 1: preferences from rewards. s is the logistic
function."""

import math
from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from worlds import (
    assert_at_most,
    assert_same,
    margins,
    number,
    optimiser_worlds,
    rewards,
    rivals,
    seeds,
    shifts,
    small_worlds,
    tilt,
    uniform,
)


def rankings(N: int) -> torch.Tensor:
    return torch.tensor(list(permutations(range(N))))


# ------------------------------------------------- Bradley-Terry


@mistake("the preference is reversed", 31, "p(y_1 > y_2) = sigmoid(r_1 - r_2)")
@given(r=rewards)
def test_bradley_terry_prefers_the_higher_reward(bradley_terry, r):
    """r_1 > r_2  <=>  p*(y_1 > y_2) > 1/2.  Eq. 1"""
    assert torch.equal(bradley_terry(r[:, None], r) > 0.5, r[:, None] > r)


@mistake("the probability depends on the level of the rewards", None, "use their difference")
@given(r=rewards, f=shifts)
def test_bradley_terry_ignores_a_shared_shift(bradley_terry, r, f):
    """f depends on x alone  =>  r + f has the preferences of r.  Eq. 1, and Lemma 1 for pairs"""
    assert_same(bradley_terry((r + f)[:, None], r + f), bradley_terry(r[:, None], r))


@mistake("the probabilities of both orders do not sum to 1", None, "use sigmoid(r_1 - r_2)")
@given(r=rewards)
def test_bradley_terry_is_antisymmetric(bradley_terry, r):
    """One of the two is preferred  =>  p*(y_1 > y_2) + p*(y_2 > y_1) = 1.  Eq. 1"""
    p = bradley_terry(r[:, None], r)
    assert_same(p + p.T, torch.ones_like(p))


@mistake("not the Bradley-Terry model", None, "use sigmoid(r_1 - r_2)")
@given(r=rewards)
def test_bradley_terry_is_a_ratio_of_exponentials(bradley_terry, r):
    """r real  =>  p*(y_1 > y_2) = exp r_1 / (exp r_1 + exp r_2).  Eq. 1"""
    ratio = r.exp()[:, None] / (r.exp()[:, None] + r.exp())
    assert_same(bradley_terry(r[:, None], r), ratio)


@mistake("exp overflows for large rewards", 15, "use sigmoid(r_1 - r_2)")
def test_bradley_terry_of_large_rewards_is_a_probability(bradley_terry):
    """r up to 2000 nats  =>  p* is finite and in [0, 1].  Eq. 1; pitfall 15"""
    p = bradley_terry(number([2000.0, -2000.0, 1999.0]), number([1999.0, 2000.0, 2000.0]))
    assert_same(p, torch.sigmoid(number([1.0, -4000.0, -1.0])))


@mistake("preferences do not determine the reward differences", None, "use sigmoid(r_1 - r_2)")
@given(r=rewards, f=shifts)
def test_preferences_determine_the_reward_up_to_a_shift(bradley_terry, r, f):
    """logit p*(y > y_0) = r(y) - r(y_0) for a fixed y_0  =>  p* determines r up to a shift f(x).
    Rewards that differ by such a shift are equivalent (Definition 1)."""
    r = r / 2  # in float32, the logit of a probability near 1 is inaccurate
    p = bradley_terry(r + f, r[0] + f).double()
    assert_at_most((p.logit() - (r - r[0])).abs(), 1e-9)


@mistake("different rewards have the same preferences", None, "use sigmoid(r_1 - r_2)")
@given(r=rewards, seed=seeds)
def test_rewards_of_different_classes_prefer_differently(bradley_terry, r, seed):
    """r - r' varies with y, so that r is not ~ r'  =>  some preference differs.  Definition 1"""
    other = r + uniform(r.shape, 0.0, 1.0, seed)
    difference = bradley_terry(other[:, None], other) - bradley_terry(r[:, None], r)
    assert difference.abs().max() > 1e-9


# ------------------------------------------------- Eq. 2


@mistake("the minimum is not at the label's logit", None, "use -logsigmoid(r_w - r_l)")
@given(gap=margins, off=st.integers(1, 40).map(lambda k: k / 10))
def test_reward_loss_is_least_at_the_logit_of_the_label(dpo_loss, gap, off):
    """Soft label p = s(gap) => -E log s(r_w - r_l) is stationary at r_1 - r_2 = logit p and larger
    elsewhere. Eq. 2, which is Eq. 7 at beta 1 with log pi as r and no reference"""
    p = torch.sigmoid(number([gap, -gap]))
    zero = torch.zeros(2, dtype=torch.float64)

    def loss(g):
        r = torch.cat((g, -g))
        return (p * dpo_loss(r, zero, zero, zero, 1.0)).sum()

    at = number([gap]).requires_grad_()
    assert_same(torch.autograd.grad(loss(at), at)[0], [0.0])
    assert_at_most(loss(at), torch.stack((loss(at + off), loss(at - off))))


# ------------------------------------------------- Plackett-Luce


@mistake("the probability of a ranking depends on the level of the rewards", None, "see Eq. 18")
@given(w=small_worlds, f=shifts)
def test_equivalent_rewards_rank_alike(plackett_luce, w, f):
    """r' = r + f(x)  =>  the same probability of every ranking.  Lemma 1"""
    orders = rankings(len(w.r))
    assert_same(plackett_luce((w.r + f)[orders]), plackett_luce(w.r[orders]))


@mistake("probabilities of rankings do not sum to 1", None, "sum_k r_k - logsumexp(r_j, j >= k)")
@given(w=small_worlds)
def test_plackett_luce_sums_to_one_over_all_rankings(plackett_luce, w):
    """The sum of p* over all K! rankings is 1.  Eq. 18"""
    assert_same(plackett_luce(w.r[rankings(len(w.r))]).exp().sum(), 1.0)


@mistake("the denominators are not those of the responses that are left", None, "j >= k in Eq. 18")
@given(r=rewards)
def test_plackett_luce_chooses_among_those_that_are_left(plackett_luce, r):
    """p*(ranking) = prod_k exp r_k / sum_{j >= k} exp r_j.  Eq. 18"""
    choices = [(r[k].exp() / r[k:].exp().sum()).item() for k in range(len(r))]
    assert_same(plackett_luce(r), math.log(math.prod(choices)))


@mistake("log Z does not cancel", None, "see Eq. 19")
@given(w=small_worlds)
def test_partition_function_cancels_from_rankings(plackett_luce, w):
    """pi_r optimal for r  =>  p*(ranking) from beta log pi_r / pi_ref is that from r.  Eq. 19"""
    orders = rankings(len(w.r))
    r_hat = w.beta * (tilt(w.ref_logp, w.r, w.beta) - w.ref_logp)
    assert_same(plackett_luce(r_hat[orders]), plackett_luce(w.r[orders]))


@mistake("the loss of a ranking of two is not that of a pair", None, "see Eq. 20")
@given(w=small_worlds)
def test_ranking_loss_of_two_is_the_pair_loss(plackett_luce, dpo_loss, w):
    """K = 2  =>  -log p*(y_w > y_l) at r_hat is L_DPO.  Eq. 20 and Eq. 7"""
    loss = dpo_loss(w.logp[:1], w.logp[1:2], w.ref_logp[:1], w.ref_logp[1:2], w.beta)
    r_hat = w.beta * (w.logp[:2] - w.ref_logp[:2])
    assert_same(-plackett_luce(r_hat), loss[0])


@mistake("the ranking loss has a different optimum", None, "see Eq. 20")
@given(w=optimiser_worlds, seed=seeds)
def test_population_ranking_loss_is_least_at_the_optimal_policy(plackett_luce, w, seed):
    """Rankings from Plackett-Luce with r => -E log p at beta log pi / pi_ref is stationary at pi_r
    and larger at every rival. Eq. 20"""
    orders = rankings(len(w.r))
    r = w.r[orders]
    p = torch.stack([r[:, k] - r[:, k:].logsumexp(-1) for k in range(len(w.r))]).sum(0).exp()

    def loss(logits):
        r_hat = w.beta * (logits.log_softmax(-1) - w.ref_logp)
        return -(p * plackett_luce(r_hat[orders])).sum()

    logits = tilt(w.ref_logp, w.r, w.beta).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert_same(gradient, torch.zeros_like(gradient))
    for rival in rivals(w, seed).values():
        assert_at_most(loss(logits), loss(rival))
