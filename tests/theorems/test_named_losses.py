"""Other losses as plain functions of log-probabilities, each with what characterises it.

tests/theorems/test_losses.py has the theorems about beyond/losses.py. Those here are for
implementations that offer a loss by name. A and B are the log-ratios log pi_theta / pi_ref of y_w
and y_l, h = A - B, z = beta h, s is the logistic function, and e is epsilon.
"""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from torch import Tensor
from worlds import assert_at_most, assert_same, betas, margins, number, pairs, seeds, uniform

noises = st.integers(1, 9).map(lambda k: k / 20)  # epsilon in [.05, .45]
small = st.integers(1, 20).map(lambda k: k / 10)


def at(h) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four log-probabilities of a pair at margin h."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return h - 8, zero - 8, zero - 8, zero - 8


def nats(z) -> Tensor:
    """-log s(z)."""
    return torch.nn.functional.softplus(-torch.as_tensor(z, dtype=torch.float64))


@mistake("a factor in IPO's margin or target", 6, "(h - 1 / (2 tau))^2, h from sums")
@given(tau=betas)
def test_ipo_is_least_at_its_target_margin(ipo_loss, tau):
    """IPO = (h - 1 / (2 tau))^2  =>  0 at h = 1 / (2 tau).  pitfall 6"""
    assert_same(ipo_loss(*at(1 / (2 * tau)), tau), [0.0])


@mistake("not a square", 6, "(h - 1 / (2 tau))^2")
@given(h=margins, tau=betas)
def test_ipo_is_the_square_of_the_distance_to_its_target(ipo_loss, h, tau):
    """IPO = (h - 1 / (2 tau))^2.  pitfall 6"""
    assert_same(ipo_loss(*at(h), tau), [(h - 1 / (2 * tau)) ** 2])


@mistake("the first term is not weighted by 1 - epsilon", None, "-(1-e) log s(z) - e log s(-z)")
@given(epsilon=noises, beta=betas)
def test_conservative_loss_is_least_at_the_logit_of_its_confidence(cdpo_loss, epsilon, beta):
    """cDPO  =>  stationary at h = logit(1 - epsilon) / beta"""
    h = number([math.log((1 - epsilon) / epsilon) / beta]).requires_grad_()
    loss = cdpo_loss(*at(h), beta, epsilon).sum()
    assert_same(torch.autograd.grad(loss, h)[0], [0.0])


@mistake("wrong terms in cDPO", None, "-(1-e) log s(z) - e log s(-z)")
@given(h=margins, epsilon=st.just(0.0) | noises, beta=betas)
def test_conservative_loss_is_the_mean_over_flips(cdpo_loss, h, epsilon, beta):
    """cDPO = -(1 - epsilon) log s(z) - epsilon log s(-z), which is DPO at epsilon = 0"""
    expected = (1 - epsilon) * nats(beta * h) + epsilon * nats(-beta * h)
    assert_same(cdpo_loss(*at(h), beta, epsilon), [expected])


@mistake("not divided by 1 - 2 epsilon, or a wrong sign", None, "[(1-e) L(z) - e L(-z)] / (1-2e)")
@given(h=margins, epsilon=noises, beta=betas)
def test_robust_loss_averages_over_flips_to_the_clean_one(robust_loss, h, epsilon, beta):
    """(1 - epsilon) robust(h) + epsilon robust(-h) = L_DPO(h)"""
    right, flipped = (robust_loss(*at(v), beta, epsilon) for v in (h, -h))
    assert_same((1 - epsilon) * right + epsilon * flipped, [nats(beta * h)])


@mistake("the hinge is not at a margin of 1", None, "relu(1 - beta * h)")
@given(h=margins, beta=betas)
def test_hinge_is_one_minus_the_margin_up_to_one(hinge_loss, h, beta):
    """hinge = max(0, 1 - beta h)"""
    assert_same(hinge_loss(*at(h), beta), [max(0.0, 1 - beta * h)])


@mistake("a log-ratio is not pinned", None, "(A - 1/(2 beta))^2 + (B + 1/(2 beta))^2")
@given(p=pairs)
def test_hard_sppo_pins_both_log_ratios(sppo_loss, p):
    """SPPO = (A - 1 / (2 beta))^2 + (B + 1 / (2 beta))^2"""
    A, B = p.logp_w - p.ref_logp_w, p.logp_l - p.ref_logp_l
    expected = (A - 1 / (2 * p.beta)).square() + (B + 1 / (2 * p.beta)).square()
    assert_same(sppo_loss(*p), expected)


@mistake("the penalty has the wrong sign or place", None, "-log s(beta (h - lam max(0, -A)))")
@given(p=pairs, lam=small)
def test_dpo_positive_is_dpo_iff_the_chosen_response_has_not_fallen(dpop_loss, p, lam):
    """DPOP = -log s(beta (h - lam max(0, -A))) >= DPO, and equal where A >= 0"""
    A, B = p.logp_w - p.ref_logp_w, p.logp_l - p.ref_logp_l
    found, h = dpop_loss(*p, lam), A - B
    assert_same(found, nats(p.beta * (h - lam * (-A).clamp(min=0))))
    assert_at_most(nats(p.beta * h), found)


@mistake("wrong sign of the length penalty", None, "-log s(z + alpha (|y_w| - |y_l|))")
@given(h=margins, beta=betas, alpha=small, w=st.integers(1, 9), l=st.integers(1, 9))
def test_length_difference_is_added_to_the_margin(r_dpo_loss, h, beta, alpha, w, l):
    """R-DPO = -log s(z + alpha (|y_w| - |y_l|))"""
    found = r_dpo_loss(*at(h), number([w]), number([l]), beta, alpha)
    assert_same(found, [nats(beta * h + alpha * (w - l))])


@mistake("SimPO without length normalisation, or with a reference", 5, "beta * logp / length")
@given(seed=seeds, beta=betas, gamma=small, w=st.integers(1, 9), l=st.integers(1, 9))
def test_simpo_compares_means_with_a_target_margin(simpo_loss, seed, beta, gamma, w, l):
    """SimPO = -log s(beta logp_w / |y_w| - beta logp_l / |y_l| - gamma).  pitfall 5"""
    logp_w, logp_l = uniform((2, 1), -20.0, 0.0, seed)
    found = simpo_loss(logp_w, logp_l, number([w]), number([l]), beta, gamma)
    assert_same(found, nats(beta * logp_w / w - beta * logp_l / l - gamma))


@mistake("odds of a sum, or without 1 - P", 5, "m = logp / length, odds: exp(m) / (1 - exp(m))")
@given(seed=seeds, w=st.integers(1, 9), l=st.integers(1, 9))
def test_odds_ratio_uses_mean_log_probabilities(orpo_loss, seed, w, l):
    """ORPO's term = -log s(log-odds_w - log-odds_l), odds from the mean log-probability per token.
    pitfall 5"""
    logp, lengths = uniform((2, 1), -20.0, -0.5, seed), number([[w], [l]])
    P = (logp / lengths).exp()
    log_odds = (P / (1 - P)).log()
    assert_same(orpo_loss(*logp, *lengths), nats(log_odds[0] - log_odds[1]))


@mistake("the KL of KTO is from matched pairs", 30, "z_0: mean log-ratio over mismatched pairs")
@given(seed=seeds)
def test_reference_point_uses_mismatched_pairs(kto_reference_point, seed):
    """z_0 does not depend on the matched log-probabilities.  pitfall 30"""
    logp, ref, other, mismatched = uniform((4, 5), -9.0, 0.0, seed)
    shift = mismatched - 1
    one, two = (kto_reference_point(v, ref, mismatched, shift) for v in (logp, other))
    assert_same(one, two)


@mistake("z_0 is not max(0, mean log-ratio)", 30, "(logp - ref_logp).mean().clamp(min=0).detach()")
@given(seed=seeds)
def test_reference_point_is_the_clamped_mean_log_ratio(kto_reference_point, seed):
    """z_0 = max(0, mean of log pi_theta / pi_ref over mismatched pairs), without gradient.
    pitfall 30"""
    logp, ref, mismatched, mismatched_ref = uniform((4, 5), -9.0, 0.0, seed)
    mismatched.requires_grad_()
    found = kto_reference_point(logp, ref, mismatched, mismatched_ref)
    assert_same(found, (mismatched - mismatched_ref).mean().clamp(min=0))
    assert not found.requires_grad, "a gradient passes through z_0"
