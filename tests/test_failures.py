"""Where preference optimization breaks, and that it must: failures that are theorems, with their closed forms."""
import math
from functools import partial

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dpo
from beyond import losses
from worlds import (Bigram, assert_at_most, assert_same, betas, kl, margins, mean, mild_worlds, minimise, objective, policy,
                    population, population_loss, seeds, uniform, worlds)

ZERO = torch.zeros((), dtype=torch.float64)


def number(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- no minimum

@given(h=margins, beta=betas)
def test_deterministic_preferences_push_the_margin_up_from_everywhere(h, beta):
    """y_w always wins  =>  dL/dh < 0 at every h and every beta: no minimiser, h -> inf, and beta restrains nothing"""
    h = number(h).requires_grad_()
    slope, = torch.autograd.grad(dpo.dpo_loss(h, ZERO, ZERO, ZERO, beta)[0], h)
    assert slope < 0


@given(gap=margins.map(lambda h: h / 4), beta=betas)
def test_uncertain_preferences_hold_the_margin(gap, beta):
    """y_w wins with probability s(gap) < 1  =>  dL/dh = 0 at h = gap / beta"""
    h = number(gap / beta).requires_grad_()
    wins, loses = dpo.dpo_loss(h, ZERO, ZERO, ZERO, beta)[0], dpo.dpo_loss(ZERO, h, ZERO, ZERO, beta)[0]
    p = torch.sigmoid(number(gap))
    assert_same(torch.autograd.grad(p * wins + (1 - p) * loses, h)[0], 0.0)


def margin_after_training(loss, steps: int) -> float:
    """h of one pair that y_w always wins, two responses of one token each, after so many steps of `dpo.train`."""
    pi = Bigram(torch.zeros(3, 3, dtype=torch.float64))
    ids, mask = torch.tensor([[[0, 1], [0, 2]]]), torch.tensor([[[False, True]] * 2])
    pi_ref = dpo.response_logps(pi, ids[0], mask[0]).detach()[None]
    pair = dpo.Preferences(ids, mask, pi_ref, torch.tensor([[0, 0, 1]]), torch.ones(1))
    optimizer = torch.optim.SGD(pi.parameters(), lr=0.1)
    for _ in dpo.train(pi, pair, loss, optimizer, [torch.tensor([0])] * steps):
        pass
    theta = dpo.response_logps(pi, ids[0], mask[0]).sum(-1)
    return (theta[0] - theta[1] - pi_ref.sum(-1)[0, 0] + pi_ref.sum(-1)[0, 1]).item()


def test_ipo_stops_at_a_margin_that_dpo_runs_past():
    """y_w always wins  =>  IPO stops training at h = 1/(2 tau), and Eq. 7 goes on"""
    tau, eq_7 = 0.2, partial(dpo.dpo, beta=1.0)
    assert_same(margin_after_training(partial(losses.ipo, tau=tau), 200), 1 / (2 * tau))
    assert margin_after_training(eq_7, 400) > margin_after_training(eq_7, 200) > 1 / (2 * tau)


# ---------------------------------------------------------------------------------------------- displacement

@given(seed=seeds, N=st.integers(2, 8), d=st.integers(1, 5), beta=betas)
def test_chosen_response_moves_with_its_features_against_the_policys_mean(seed, N, d, beta):
    """log pi = log softmax(phi theta) => along DPO's descent, d log pi_w = beta s(-z) <phi_w - E_pi phi, phi_w -
    phi_l>"""
    phi = uniform((N, d), -2.0, 2.0, seed)
    theta = uniform((d,), -1.0, 1.0, seed + 1).requires_grad_()
    pi, pi_ref = (phi @ theta).log_softmax(-1), policy(N, seed + 2)
    loss, _, _ = dpo.dpo_loss(pi[0], pi[1], pi_ref[0], pi_ref[1], beta)
    descent, = torch.autograd.grad(-loss, theta, retain_graph=True)
    rise, = torch.autograd.grad(pi[0], theta)
    weight = beta * torch.sigmoid(beta * ((pi[1] - pi_ref[1]) - (pi[0] - pi_ref[0])))
    assert_same(rise @ descent, weight * ((phi[0] - pi.exp() @ phi) @ (phi[0] - phi[1])))


@given(w=worlds)
def test_tabular_pair_never_displaces(w):
    """One logit a response  =>  along DPO's descent log pi_w rises and log pi_l falls"""
    logits = w.pi.clone().requires_grad_()
    pi = logits.log_softmax(-1)
    loss, _, _ = dpo.dpo_loss(pi[0], pi[1], w.pi_ref[0], w.pi_ref[1], w.beta)
    descent, = torch.autograd.grad(-loss, logits, retain_graph=True)
    rise_w, rise_l = (torch.autograd.grad(pi[i], logits, retain_graph=True)[0] @ descent for i in (0, 1))
    assert rise_w > 0 > rise_l


def test_shared_feature_hands_the_chosen_responses_mass_to_an_unseen_one():
    """phi = (1, 0, 3), uniform start, the pair (0, 1) => at margin h, pi_w = e^h / (1 + e^h + e^3h): DPO's descent
    takes it from 1/3 to .003 at h = 2.9 while its loss falls, and the response in no pair takes the mass"""
    phi, pi_ref = number([1.0, 0.0, 3.0]), torch.full((3,), 1 / 3, dtype=torch.float64).log()
    theta, losses, chosen, margin = number(0.0).requires_grad_(), [], [], []
    while theta < 2.9:
        pi = (phi * theta).log_softmax(-1)
        loss, _, _ = dpo.dpo_loss(pi[0], pi[1], pi_ref[0], pi_ref[1], 1.0)
        losses.append(loss.item()), chosen.append(pi[0].exp().item()), margin.append((pi[0] - pi[1]).item())
        slope, = torch.autograd.grad(loss, theta)
        assert slope < 0
        theta = (theta - slope).detach().requires_grad_()
    h = number(margin)
    assert_same(number(chosen), h.exp() / (1 + h.exp() + (3 * h).exp()))
    assert losses == sorted(losses, reverse=True) and chosen == sorted(chosen, reverse=True)
    assert_same((phi * 2.9).softmax(-1), [0.0030, 0.0002, 0.9968], tolerance=5e-5)


@given(w=worlds)
def test_rejected_response_is_pushed_by_the_ratio_of_probabilities(w):
    """L as a function of the probabilities  =>  |dL/dpi_l| / |dL/dpi_w| = pi_w / pi_l"""
    p = w.pi[:2].exp().requires_grad_()
    slopes, = torch.autograd.grad(dpo.dpo_loss(p[0].log(), p[1].log(), w.pi_ref[0], w.pi_ref[1], w.beta)[0], p)
    assert_same(slopes.abs()[1] * p[1], slopes.abs()[0] * p[0])
    assert slopes[0] < 0 < slopes[1]


# ---------------------------------------------------------------------------------------------- over-optimization

def test_proxy_reward_first_helps_and_then_hurts():
    """Uniform over three, gold (0, 1, .2), proxy (0, 1, 1.5)  =>  under the proxy's pi_r gold goes from .4 to .4416 (at
    1/beta = .864, KL .1145) and then to .2"""
    gold, proxy = number([0.0, 1.0, 0.2]), number([0.0, 1.0, 1.5])
    pi_ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()

    def tilt(inverse_beta):
        return dpo.optimal_policy(pi_ref, proxy, 1 / inverse_beta)[0]
    inverse_betas = [k / 1000 for k in range(1, 20_000, 3)]
    golds = torch.stack([mean(tilt(b), gold) for b in inverse_betas])
    top = golds.argmax().item()
    assert_same([golds[0], golds[top], golds[-1]], [0.4, 0.4416, 0.2], tolerance=1e-3)
    assert_same([inverse_betas[top], kl(tilt(inverse_betas[top]), pi_ref)], [0.864, 0.1145], tolerance=1e-3)
    assert (golds[:top + 1].diff() > 0).all() and (golds[top:].diff() < 0).all()


# ---------------------------------------------------------------------------------------------- verbosity

def push_on_length(loss, u, q0: float, gap: int, p: float) -> torch.Tensor:
    """dL/du at u = log(1 - q) for geometric lengths: each token but the last has log-probability u, the last log q. A
    response of 1 + gap tokens wins over one of 1 token with probability p; the reference stops with probability q0."""
    def tokens(u):
        stop = torch.log(-torch.expm1(u))
        return torch.stack((torch.stack((*[u] * gap, stop)), torch.stack((stop, *[ZERO] * gap))))[None]
    u = number(u).requires_grad_()
    mask = torch.tensor([[[True] * (1 + gap), [True] + [False] * gap]])
    batch = dpo.Preferences(mask.long(), mask, tokens(torch.log1p(-number(q0))), torch.tensor([[0, 0, 1], [0, 1, 0]]),
                            number([p, 1 - p]))
    return torch.autograd.grad((batch.weight * loss(tokens(u), batch)[0]).sum(), u)[0]


stops = st.integers(1, 9).map(lambda k: k / 10)
gaps = st.integers(1, 10)
labels = st.integers(5, 95).map(lambda k: k / 100)


def optimal_u(q0: float, gap: int, p: float, beta: float) -> float:
    return math.log(1 - q0) + math.log(p / (1 - p)) / (beta * gap)


@given(q0=stops, gap=gaps, p=labels, beta=betas)
def test_preference_for_length_sets_the_stop_probability(q0, gap, p, beta):
    """The longer by `gap` wins with probability p => 1 - q = (1 - q0) exp(logit(p) / (beta gap)) is optimal while
    below 1"""
    u, eq_7 = optimal_u(q0, gap, p, beta), partial(dpo.dpo, beta=beta)
    assume(u < -1e-6)
    assert_same(push_on_length(eq_7, u, q0, gap, p), 0.0)
    assert push_on_length(eq_7, 1.5 * u, q0, gap, p) < 0 < push_on_length(eq_7, u / 2, q0, gap, p)


@given(q0=stops, gap=gaps, p=labels, beta=betas, u=st.integers(1, 50).map(lambda k: -k / 10))
def test_strong_preference_for_length_makes_it_diverge(q0, gap, p, beta, u):
    """(1 - q0) exp(logit(p) / (beta gap)) >= 1  =>  dL/dlog(1 - q) < 0 at every q: q -> 0, and the length diverges"""
    assume(optimal_u(q0, gap, p, beta) >= 0)
    assert push_on_length(partial(dpo.dpo, beta=beta), u, q0, gap, p) < 0


@given(q0=stops, gap=gaps, p=labels, beta=betas)
def test_a_length_penalty_restores_the_references_stop_probability(q0, gap, p, beta):
    """The longer by `gap` wins with probability p, and alpha = logit(p) / gap  =>  R-DPO's optimum is 1 - q = 1 - q0"""
    loss, u0 = partial(losses.r_dpo, beta=beta, alpha=math.log(p / (1 - p)) / gap), math.log(1 - q0)
    assert_same(push_on_length(loss, u0, q0, gap, p), 0.0)
    assert push_on_length(loss, 1.5 * u0, q0, gap, p) < 0 < push_on_length(loss, u0 / 2, q0, gap, p)


# ---------------------------------------------------------------------------------------------- coverage

@given(w=mild_worlds, v=mild_worlds, c=st.integers(-12, 12).map(lambda k: k / 4))
def test_mass_moves_between_unconnected_responses_at_no_loss(w, v, c):
    """No pair joins two groups of responses => L is the same however mass is split between the groups, and its
    minimisers agree with pi_r within each group alone"""
    n, N = len(w.r), len(w.r) + len(v.r)
    pi_ref, r = torch.cat((w.pi_ref, v.pi_ref)).log_softmax(-1), torch.cat((w.r, v.r))
    inside = [(i, j, 1.0) for i in range(N) for j in range(i) if (i < n) == (j < n)]
    batch = population(pi_ref, r, inside)

    def moved(pi):
        return (pi + c * (torch.arange(N) < n)).log_softmax(-1)
    tilt, _ = dpo.optimal_policy(pi_ref, r, w.beta)
    assert_same([population_loss(moved(pi), batch, w.beta) for pi in (pi_ref, tilt)],
                [population_loss(pi, batch, w.beta) for pi in (pi_ref, tilt)])
    found = minimise(lambda logits: population_loss(logits.log_softmax(-1), batch, w.beta), moved(pi_ref))
    assert_same(torch.cat([part.log_softmax(-1) for part in found.split([n, N - n])]),
                torch.cat([part.log_softmax(-1) for part in tilt.split([n, N - n])]), tolerance=1e-6)


# ---------------------------------------------------------------------------------------------- maximum entropy

@given(w=worlds)
def test_uniform_reference_makes_the_objective_an_entropy_bonus(w):
    """pi_ref uniform over K  =>  J = E r + beta H(pi) - beta log K, greatest at softmax(r / beta)"""
    K = len(w.r)
    w = w._replace(pi_ref=torch.full((K,), -math.log(K), dtype=torch.float64))
    best, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    entropy_bonus = mean(w.pi, w.r) - w.beta * mean(w.pi, w.pi) - w.beta * math.log(K)
    assert_same(objective(w.pi, w), entropy_bonus)
    assert_same(best, (w.r / w.beta).log_softmax(-1))
    assert_at_most(entropy_bonus, w.beta * log_Z)
