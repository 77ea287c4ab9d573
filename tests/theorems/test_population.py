"""The population theorem, and what happens when one of its hypotheses is dropped.

With Bradley-Terry labels from r, pairs that connect all responses, and a policy class that contains
the optimum, the only minimiser of L_DPO (Eq. 7) is the optimal policy of Eq. 4.

s is the logistic function, and z = r_hat_w - r_hat_l.
"""

import dataclasses
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mistakes import mistake
from torch.distributions import Bernoulli, kl_divergence
from worlds import (
    World,
    assert_at_most,
    assert_same,
    betas,
    connected,
    kl,
    margins,
    mean,
    minimise,
    number,
    objective,
    optimiser_worlds,
    policy,
    population,
    population_loss,
    rivals,
    seeds,
    tilt,
    uniform,
    worlds,
)

import dpo

RIGHT_LOSS = "write -logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)))"
ZERO = torch.zeros(1, dtype=torch.float64)


def expected_loss(dpo_loss, logp, batch, beta):
    (w, l), ref = batch.pairs.T, batch.ref_logps[:, 0]
    return (batch.weight * dpo_loss(logp[w], logp[l], ref[w], ref[l], beta)).sum()


def fit(batch, beta: float, start) -> torch.Tensor:
    """log pi of the minimiser of L_DPO over all policies."""
    found = minimise(lambda x: population_loss(x.log_softmax(-1), batch, beta), start)
    return found.log_softmax(-1)


# ------------------------------------------------- the theorem


@mistake("the loss is not a likelihood of the labels", None, RIGHT_LOSS)
@given(w=optimiser_worlds, seed=seeds)
def test_population_loss_is_label_entropy_plus_a_divergence(dpo_loss, w, seed):
    """Bradley-Terry labels from r, any pairs  =>  loss - label entropy = E KL(Bern(p*),
    Bern(s(z))), z = r_hat_i - r_hat_j, s logistic.  The population theorem, Eq. 7"""
    batch = population(w.ref_logp, w.r, connected(len(w.r), seed))
    r_hat = w.beta * (w.logp - w.ref_logp)
    i, j = batch.pairs.T
    labels, model = (Bernoulli(logits=r[i] - r[j]) for r in (w.r, r_hat))
    excess = expected_loss(dpo_loss, w.logp, batch, w.beta) - batch.weight @ labels.entropy()
    assert_same(excess, batch.weight @ kl_divergence(labels, model))


@mistake("another policy has a smaller population loss than the optimum", None, RIGHT_LOSS)
@given(w=optimiser_worlds, seed=seeds)
def test_no_rival_has_a_smaller_population_loss_than_the_optimum(dpo_loss, w, seed):
    """pi != pi_r, near or far, pairs that connect the responses  =>  L(pi) >= L(pi_r).  The
    population theorem"""
    batch = population(w.ref_logp, w.r, connected(len(w.r), seed))
    least = expected_loss(dpo_loss, tilt(w.ref_logp, w.r, w.beta), batch, w.beta)
    for rival in rivals(w, seed).values():
        assert_at_most(least, expected_loss(dpo_loss, rival, batch, w.beta))


@given(w=optimiser_worlds, seed=seeds)
def test_dpo_on_the_population_finds_the_optimal_policy(w, seed):
    """Bradley-Terry labels from r, pairs that connect the responses, any masses => the minimiser of
    L_DPO over all policies is pi_r. The population theorem: Eq. 7 has Eq. 4 as its optimum"""
    batch = population(w.ref_logp, w.r, connected(len(w.r), seed))
    best, _ = dpo.optimal_policy(w.ref_logp, w.r, w.beta)
    assert_same(fit(batch, w.beta, w.ref_logp), best, 1e-6)


@given(w=optimiser_worlds, seed=seeds)
def test_exchanged_responses_reverse_the_reward(w, seed):
    """y_w and y_l exchanged in Eq. 7, an experiment that README.md suggests  =>  the minimiser is
    the optimum for -r, and has at most the reward of pi_ref. Eq. 4 and 7"""
    batch = population(w.ref_logp, w.r, connected(len(w.r), seed))
    found = fit(dataclasses.replace(batch, pairs=batch.pairs.flip(1)), w.beta, w.ref_logp)
    assert_same(found, tilt(w.ref_logp, -w.r, w.beta), 1e-6)
    assert_at_most(mean(found, w.r), mean(w.ref_logp, w.r))


# ------------------------------------------------- no pairs that connect the responses


@given(w=optimiser_worlds, v=optimiser_worlds, c=st.integers(-12, 12).map(lambda k: k / 4))
def test_mass_moves_between_unconnected_responses_at_no_loss(w, v, c):
    """The theorem fails without connection: no pair joins two groups of responses  =>  L is the
    same however mass is split between them, and minimisers agree with pi_r within each group only.
    Eq. 7"""
    n, N = len(w.r), len(w.r) + len(v.r)
    ref_logp, r = torch.cat((w.ref_logp, v.ref_logp)).log_softmax(-1), torch.cat((w.r, v.r))
    inside = [(i, j, 1.0) for i in range(N) for j in range(i) if (i < n) == (j < n)]
    batch = population(ref_logp, r, inside)

    def moved(logp):
        return (logp + c * (torch.arange(N) < n)).log_softmax(-1)

    best, _ = dpo.optimal_policy(ref_logp, r, w.beta)
    for logp in (ref_logp, best):
        loss = population_loss(logp, batch, w.beta)
        assert_same(population_loss(moved(logp), batch, w.beta), loss)
    found = fit(batch, w.beta, moved(ref_logp))
    for group in (slice(n), slice(n, N)):
        assert_same(found[group].log_softmax(-1), best[group].log_softmax(-1), 1e-6)


@given(w=optimiser_worlds, c=st.integers(-12, 12).map(lambda k: k / 4))
def test_response_in_no_pair_takes_any_mass_at_no_loss(w, c):
    """The theorem fails without support: a response in no pair => L is independent of its
    probability. Eq. 7"""
    N = len(w.r)
    assume(N > 2 and c != 0)
    seen = [(i, j, 1.0) for i in range(1, N) for j in range(1, i)]
    batch = population(w.ref_logp, w.r, seen)
    best, _ = dpo.optimal_policy(w.ref_logp, w.r, w.beta)
    other = (best + c * (torch.arange(N) == 0)).log_softmax(-1)
    assert_same(*(population_loss(logp, batch, w.beta) for logp in (best, other)))
    assert kl(best, other) > 1e-9


@given(w=worlds)
def test_response_with_zero_reference_probability_keeps_probability_zero(w):
    """The theorem fails without support: pi_ref(y) = 0  =>  pi_r(y) = 0, whatever its
    reward.  Eq. 4"""
    ref_logp = torch.cat((w.ref_logp, number([-math.inf])))
    best, _ = dpo.optimal_policy(ref_logp, torch.cat((w.r, number([1000.0]))), w.beta)
    assert best[-1].exp() == 0
    assert_same(best[:-1], tilt(w.ref_logp, w.r, w.beta))


# ------------------------------------------------- no policy class that contains the optimum

PHI = number([1.0, 0.0, 3.0])  # pi(y) is proportional to pi_ref(y) exp(theta phi_y)
UNIFORM = number([-math.log(3)] * 3)
CLASS_WORLD = World(UNIFORM, number([1.0, 0.0, -1.0]), UNIFORM, 1.0)
MOSTLY_FIRST_TWO = [(0, 1, 0.96), (0, 2, 0.02), (1, 2, 0.02)]
EVENLY = [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)]


def in_class(theta) -> torch.Tensor:
    return (UNIFORM + theta * PHI).log_softmax(-1)


def dpo_in_class(drawn, r=CLASS_WORLD.r) -> torch.Tensor:
    batch = population(UNIFORM, r, drawn)
    return minimise(lambda theta: population_loss(in_class(theta), batch, 1.0), ZERO)


def best_in_class(r) -> torch.Tensor:
    """The optimum of Eq. 3 with reward r, within the class."""
    w = CLASS_WORLD._replace(r=r)
    return minimise(lambda theta: -objective(in_class(theta), w), ZERO)


def test_misspecified_class_can_prefer_the_worse_response_and_lose_reward():
    """The theorem fails without realisability: one-parameter softmax, r = (1, 0, -1), pairs mostly
    (1, 2)  =>  DPO raises the worst response most and has less reward than pi_ref; the optimum of
    Eq. 3 within the class does not. Eq. 3 and Eq. 7"""
    w, logp = CLASS_WORLD, in_class(dpo_in_class(MOSTLY_FIRST_TWO))
    gain = logp - w.ref_logp
    assert gain[2] > gain[0] > gain[1]
    assert mean(logp, w.r) < mean(w.ref_logp, w.r) - 0.1
    best = in_class(best_in_class(w.r))
    assert mean(best, w.r) > mean(w.ref_logp, w.r) + 0.1


def test_minimiser_in_a_misspecified_class_depends_on_the_shares_of_pairs():
    """The theorem fails without realisability: other shares of the same pairs => another minimiser,
    here of the opposite sign; over all policies the minimiser is the same. Eq. 7"""
    assert dpo_in_class(MOSTLY_FIRST_TWO) > 0.1 and dpo_in_class(EVENLY) < -0.1
    batches = [population(UNIFORM, CLASS_WORLD.r, drawn) for drawn in (MOSTLY_FIRST_TWO, EVENLY)]
    assert_same(*(fit(batch, 1.0, UNIFORM) for batch in batches), 1e-6)


def reward_fit(features: torch.Tensor, drawn) -> torch.Tensor:
    """The maximum-likelihood reward (Eq. 2) of the form theta features, shape (N,)."""
    batch = population(0 * UNIFORM, CLASS_WORLD.r, drawn)
    theta = minimise(lambda theta: population_loss(features @ theta, batch, 1.0), features[0] * 0)
    return features @ theta


def test_two_stages_win_where_the_policy_class_is_misspecified():
    """A tabular reward, one-parameter policies => Eq. 2 and then Eq. 3 find the best policy of the
    class, and DPO does not. Eq. 2, 3 and 7"""
    two_stages = best_in_class(reward_fit(torch.eye(3).double(), MOSTLY_FIRST_TWO))
    assert_same(two_stages, best_in_class(CLASS_WORLD.r), 1e-6)
    best, found = in_class(two_stages), in_class(dpo_in_class(MOSTLY_FIRST_TWO))
    assert objective(best, CLASS_WORLD) > objective(found, CLASS_WORLD) + 0.1


def test_dpo_wins_where_the_reward_class_is_misspecified():
    """A one-parameter reward, tabular policies => DPO finds the optimum, and Eq. 2 with Eq. 3 does
    not. Eq. 2, 3 and 7"""
    w = CLASS_WORLD
    two_stages = tilt(UNIFORM, reward_fit(PHI[:, None], MOSTLY_FIRST_TWO), w.beta)
    one_stage = fit(population(UNIFORM, w.r, MOSTLY_FIRST_TWO), w.beta, UNIFORM)
    assert_same(one_stage, tilt(UNIFORM, w.r, w.beta), 1e-6)
    assert objective(two_stages, w) < objective(one_stage, w) - 0.1


def test_both_ways_agree_where_the_classes_are_equal():
    """Rewards {beta log pi / pi_ref} of the policies in the class => Eq. 2 with Eq. 3 and DPO find
    the same policy, although the class is misspecified. Eq. 2, 3 and 7"""
    for drawn in (MOSTLY_FIRST_TWO, EVENLY):
        r = reward_fit(PHI[:, None], drawn)
        assert_same(best_in_class(r), dpo_in_class(drawn), 1e-6)


# ------------------------------------------------- labels that are not Bradley-Terry


@given(h=margins, beta=betas)
def test_deterministic_labels_push_the_margin_up_from_everywhere(h, beta):
    """y_w always wins  =>  dL/dh < 0 at every h and beta: no finite optimum over all policies, and
    beta restrains nothing.  Eq. 7"""
    h = number([h]).requires_grad_()
    losses, _, _ = dpo.dpo_loss(h, ZERO, ZERO, ZERO, beta)
    assert torch.autograd.grad(losses.sum(), h)[0] < 0


def test_deterministic_labels_have_a_finite_optimum_in_a_class_that_cannot_obey_them():
    """Not a theorem: deterministic labels have no optimum.  Counterexample: one parameter, labels
    1 > 2 and 1 > 3, which pull it in opposite directions.  Eq. 7"""
    r = 1e3 * number([1.0, 0.0, 0.0])
    theta = dpo_in_class([(0, 1, 1.0), (0, 2, 1.0)], r)
    assert math.isfinite(theta) and theta < -0.1


@given(epsilon=st.integers(1, 9).map(lambda k: k / 20), beta=betas)
def test_flipped_labels_are_not_bradley_terry_labels(epsilon, beta):
    """Labels flipped with probability epsilon, three responses => s(d) becomes (1 - 2 epsilon) s(d)
    + epsilon, whose logits do not add up: no policy's loss is the label entropy. With two
    responses, one policy's is. Eq. 7"""
    for r in number([2.0, 0.0]), number([2.0, 0.0, -1.0]):
        batch = population(0 * r, r)
        w, l = batch.pairs.T
        p = (1 - 2 * epsilon) * torch.sigmoid(r[w] - r[l]) + epsilon
        batch = dataclasses.replace(batch, weight=p / p.sum())
        excess = population_loss(fit(batch, beta, 0 * r), batch, beta) + batch.weight @ p.log()
        assert_at_most(0.0, excess)
        assert (excess < 1e-9) == (len(r) == 2)


# ------------------------------------------------- an imperfect reward


@given(rho=st.integers(-9, 9).map(lambda k: k / 10), beta=st.integers(5, 40).map(lambda k: k / 10))
def test_tilting_by_a_gaussian_estimate_gains_its_correlation_times_the_optimal_gain(rho, beta):
    """r and its estimate jointly Gaussian under pi_ref with correlation rho => tilting by the
    estimate gains rho times the optimal gain at equal KL. Eq. 4. The Gaussian is a quadrature rule,
    whose error is below rounding"""
    import numpy as np

    x, w = map(number, np.polynomial.hermite_e.hermegauss(60))
    estimate, noise = torch.cartesian_prod(x, x).T
    ref_logp = (w[:, None] * w).log().flatten().log_softmax(-1)
    r = rho * estimate + math.sqrt(1 - rho**2) * noise
    best, proxy = (dpo.optimal_policy(ref_logp, v, beta)[0] for v in (r, estimate))
    assert_same(kl(best, ref_logp), kl(proxy, ref_logp), 1e-8)
    assert_same(mean(proxy, r), rho * mean(best, r), 1e-8)


def test_proxy_reward_first_helps_and_then_hurts():
    """Uniform over three, gold (0, 1, .2), proxy (0, 1, 1.5)  =>  under the proxy's pi_r gold goes
    from .4 to .4416 (at 1/beta = .864, KL .1145) and then to .2.  Eq. 4"""
    gold, proxy = number([0.0, 1.0, 0.2]), number([0.0, 1.0, 1.5])
    inverse_betas = torch.arange(1, 20_000, 3).double()[:, None] / 1000
    policies, _ = dpo.optimal_policy(UNIFORM, proxy, 1 / inverse_betas)
    golds = mean(policies, gold)
    top = int(golds.argmax())
    assert_same(golds[[0, top, -1]], [0.4, 0.4416, 0.2], 1e-3)
    assert_same([inverse_betas[top], kl(policies[top], UNIFORM)], [0.864, 0.1145], 1e-3)
    assert (golds[: top + 1].diff() > 0).all() and (golds[top:].diff() < 0).all()


# ------------------------------------------------- likelihood displacement


@given(seed=seeds, N=st.integers(2, 8), d=st.integers(1, 5), beta=betas)
def test_chosen_response_moves_by_its_features_relative_to_their_mean(seed, N, d, beta):
    """log pi = log softmax(phi theta) => along DPO's descent, d log pi_w = beta s(-z) <phi_w - E_pi
    phi, phi_w - phi_l>. Section 4's gradient"""
    phi = uniform((N, d), -2.0, 2.0, seed)
    theta = uniform((d,), -1.0, 1.0, seed + 1).requires_grad_()
    pi, ref = (phi @ theta).log_softmax(-1), policy(N, seed + 2)
    loss, _, _ = dpo.dpo_loss(pi[0], pi[1], ref[0], ref[1], beta)
    (descent,) = torch.autograd.grad(-loss, theta, retain_graph=True)
    (rise,) = torch.autograd.grad(pi[0], theta)
    weight = beta * torch.sigmoid(beta * ((pi[1] - ref[1]) - (pi[0] - ref[0])))
    expected = weight * ((phi[0] - pi.exp() @ phi) @ (phi[0] - phi[1]))
    assert_same(rise @ descent, expected)


@given(w=worlds)
def test_tabular_policy_never_displaces_the_chosen_response(w):
    """One logit per response  =>  along DPO's descent log pi_w rises and log pi_l falls.  Eq. 7"""
    logits = w.logp.clone().requires_grad_()
    pi = logits.log_softmax(-1)
    loss, _, _ = dpo.dpo_loss(pi[0], pi[1], w.ref_logp[0], w.ref_logp[1], w.beta)
    (descent,) = torch.autograd.grad(-loss, logits, retain_graph=True)
    (rise,), (fall,) = (torch.autograd.grad(v, logits, retain_graph=True) for v in pi[:2])
    assert rise @ descent > 0 > fall @ descent


def test_shared_feature_hands_the_chosen_responses_mass_to_an_unseen_one():
    """phi = (1, 0, 3), uniform start, the pair (1, 2)  =>  at margin h, pi_w = e^h / (1 + e^h +
    e^3h): descent takes it from 1/3 to .003 at h = 2.9 while the loss falls.  Eq. 7; pitfall 23"""
    h = torch.linspace(0.0, 2.9, 30).double()  # theta, as phi_w - phi_l = 1
    pi = (h[:, None] * PHI).log_softmax(-1)
    losses, _, _ = dpo.dpo_loss(pi[:, 0], pi[:, 1], UNIFORM[0], UNIFORM[1], 1.0)
    chosen = pi[:, 0].exp()
    assert_same(chosen, h.exp() / (1 + h.exp() + (3 * h).exp()))
    assert (losses.diff() < 0).all() and (chosen.diff() < 0).all()
    assert_same(pi[-1].exp(), [0.0030, 0.0002, 0.9968], 5e-5)


@given(w=worlds)
def test_rejected_response_is_pushed_by_the_ratio_of_probabilities(w):
    """L as a function of the probabilities  =>  |dL/dpi_l| / |dL/dpi_w| = pi_w / pi_l.  Eq. 7"""
    p = w.logp[:2].exp().requires_grad_()
    ref = w.ref_logp
    losses, _, _ = dpo.dpo_loss(p[0].log(), p[1].log(), ref[0], ref[1], w.beta)
    (slopes,) = torch.autograd.grad(losses, p)
    assert_same(slopes.abs()[1] * p[1], slopes.abs()[0] * p[0])
    assert slopes[0] < 0 < slopes[1]


# ------------------------------------------------- length

stops = st.integers(1, 9).map(lambda k: k / 10)
gaps = st.integers(1, 10)
labels = st.integers(5, 95).map(lambda k: k / 100)


def optimal_u(q0: float, gap: int, p: float, beta: float) -> float:
    """The optimal log(1 - q): q is the stop probability, q0 that of the reference."""
    return math.log(1 - q0) + math.log(p / (1 - p)) / (beta * gap)


def push_on_length(u: float, q0: float, gap: int, p: float, beta: float) -> torch.Tensor:
    """dL/du at u = log(1 - q) for geometric lengths, where a response of 1 + gap tokens beats one
    of 1 token with probability p. Each token but the last has log-probability u."""
    u = number(u).requires_grad_()

    def logp(u):  # of the long response and the short one
        stop = torch.log(-torch.expm1(u))
        return torch.stack((gap * u + stop, stop))

    r = number([math.log(p / (1 - p)), 0.0])  # the long response wins with probability p
    batch = population(logp(torch.log1p(-number(q0))), r)
    return torch.autograd.grad(population_loss(logp(u), batch, beta), u)[0]


@given(q0=stops, gap=gaps, p=labels, beta=betas)
def test_preference_for_length_sets_the_stop_probability(q0, gap, p, beta):
    """The response that is longer by `gap` tokens wins with probability p =>
    1 - q = (1 - q0) exp(logit(p) / (beta gap)) is optimal while below 1. Eq. 7"""
    u = optimal_u(q0, gap, p, beta)
    assume(u < -1e-6)
    below, at, above = (push_on_length(k * u, q0, gap, p, beta) for k in (1.5, 1, 0.5))
    assert_same(at, 0.0)
    assert below < 0 < above


@given(q0=stops, gap=gaps, p=labels, beta=betas, u=st.integers(1, 50).map(lambda k: -k / 10))
def test_strong_preference_for_length_makes_it_diverge(q0, gap, p, beta, u):
    """(1 - q0) exp(logit(p) / (beta gap)) >= 1  =>  dL/dlog(1 - q) < 0 at every q: q -> 0, and the
    length diverges.  Eq. 7"""
    assume(optimal_u(q0, gap, p, beta) >= 0)
    assert push_on_length(u, q0, gap, p, beta) < 0
