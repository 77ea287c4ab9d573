"""Eq. 3 to 6 and 8 to 15, Lemma 2, Theorem 1 and Proposition 1: the optimum and its rewards."""

import math
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from torch.autograd.functional import jacobian
from worlds import (
    World,
    assert_at_most,
    assert_same,
    betas,
    kl,
    mean,
    mild_worlds,
    number,
    objective,
    population,
    population_loss,
    rivals,
    seeds,
    shifts,
    tilt,
    uniform,
    world,
    worlds,
)

import dpo

samples = st.builds(lambda N, seed: uniform((N,), -5.0, 5.0, seed), st.integers(2, 50), seeds)


def log_Z(w: World) -> torch.Tensor:
    return (w.ref_logp + w.r / w.beta).logsumexp(-1)


# ------------------------------------------------- Eq. 3 and 4, in the order of diagnosis


@mistake("the policy is not normalised", None, "subtract log Z = logsumexp(ref_logp + r / beta)")
@given(w=worlds)
def test_optimal_policy_is_a_distribution(optimal_policy, w):
    """sum_y pi_r(y|x) = 1.  Eq. 4"""
    assert_same(optimal_policy(w.ref_logp, w.r, w.beta).exp().sum(), 1.0)


@mistake("pi_ref is left out of Eq. 4", None, "pi_r is pi_ref * exp(r / beta) / Z")
@given(w=worlds)
def test_equal_rewards_leave_the_reference_unchanged(optimal_policy, w):
    """r = 0  =>  pi_r = pi_ref.  Eq. 4"""
    assert_same(optimal_policy(w.ref_logp, 0 * w.r, w.beta), w.ref_logp)


@mistake("the reward has the wrong sign", None, "pi_ref * exp(+r / beta)")
@given(w=mild_worlds)
def test_optimal_policy_has_more_reward_than_the_reference(optimal_policy, w):
    """E_{pi_r} r >= E_{pi_ref} r.  Eq. 4"""
    best = optimal_policy(w.ref_logp, w.r, w.beta)
    assert_at_most(mean(w.ref_logp, w.r), mean(best, w.r))


@mistake("beta multiplies the reward in Eq. 4", 24, "divide: r / beta. KL falls as beta rises")
@given(w=worlds)
def test_kl_of_the_optimal_policy_falls_as_beta_rises(optimal_policy, w):
    """beta_1 < beta_2  =>  KL(pi_r, pi_ref) is no larger at beta_2.  Eq. 4; pitfall 24"""
    low, high = (optimal_policy(w.ref_logp, w.r, beta) for beta in (w.beta, 2 * w.beta))
    assert_at_most(kl(high, w.ref_logp), kl(low, w.ref_logp))


@mistake("pi_r is too far from pi_ref", None, "pi_r is pi_ref * exp(r / beta) / Z")
@given(w=worlds)
def test_optimal_policy_is_close_to_the_reference_at_large_beta(optimal_policy, w):
    """|log pi_r / pi_ref| <= (max r - min r) / beta, so pi_r -> pi_ref as beta -> inf, and beta
    KL(pi_r, pi_ref) <= max r - min r.  Eq. 4"""
    width = w.r.max() - w.r.min()
    for beta in (w.beta, 10 * w.beta, 1000 * w.beta):
        best = optimal_policy(w.ref_logp, w.r, beta)
        assert_at_most((best - w.ref_logp).abs().max(), width / beta)
        assert_at_most(beta * kl(best, w.ref_logp), width)


@mistake("the policy is not greedy at small beta", None, "divide r by beta")
@given(w=worlds)
def test_optimal_policy_goes_to_the_best_responses_as_beta_falls(optimal_policy, w):
    """Best responses ahead by gap => 1 - pi_r(best) <= exp(-gap / beta) / pi_ref(best), so -> 0 as
    beta -> 0; tied best responses keep their ratio under pi_ref. Eq. 4"""
    best = w.r == w.r.max()
    gap = w.r.max() - w.r[~best].max() if (~best).any() else number(0.0)
    for beta in (w.beta, w.beta / 10, w.beta / 100):
        logp = optimal_policy(w.ref_logp, w.r, beta)
        rest = 1 - logp[best].exp().sum()
        assert_at_most(rest, (-gap / beta - w.ref_logp[best].logsumexp(-1)).exp())
        assert_same(logp[best].log_softmax(-1), w.ref_logp[best].log_softmax(-1))


@mistake("not Eq. 4", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds)
def test_optimal_policy_is_the_reference_tilted_by_the_reward(optimal_policy, w):
    """Z = sum_y pi_ref(y) exp(r(y) / beta)  =>  pi_r(y) = pi_ref(y) exp(r(y) / beta) / Z.  Eq. 4"""
    unnormalised = w.ref_logp.exp() * (w.r / w.beta).exp()
    expected = (unnormalised / unnormalised.sum()).log()
    assert_same(optimal_policy(w.ref_logp, w.r, w.beta), expected)


@mistake("prompts of a batch are mixed up", None, "normalise over the last dimension only")
@given(w=worlds)
def test_prompts_of_a_batch_have_their_own_optimal_policies(optimal_policy, w):
    """Rows of a batch are prompts  =>  each has its own pi_r.  Eq. 4"""
    ref_logp, r = torch.stack((w.ref_logp, w.logp)), torch.stack((w.r, -w.r))
    assert_same(optimal_policy(ref_logp, r, w.beta), tilt(ref_logp, r, w.beta))


@mistake("another policy has a larger objective", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds, seed=seeds)
def test_optimal_policy_beats_every_rival(optimal_policy, w, seed):
    """pi any policy, near or far  =>  J(pi) <= J(pi_r).  Eq. 3 and 4"""
    best = objective(optimal_policy(w.ref_logp, w.r, w.beta), w)
    for rival in rivals(w, seed).values():
        assert_at_most(objective(rival, w), best)


@mistake("the objective is not stationary", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds)
def test_objective_is_stationary_at_the_optimal_policy(optimal_policy, w):
    """pi = softmax(logits) at pi_r  =>  dJ / dlogits = 0.  Eq. 3 and 4"""
    best = optimal_policy(w.ref_logp, w.r, w.beta).detach()
    assert_same(jacobian(lambda x: objective(x.log_softmax(-1), w), best), 0 * best)


def test_wrong_optimum_loses_to_a_rival_by_more_than_the_tolerance():
    """A wrong optimum, at 2 beta, loses to some rival in at least 95 of 100 mild worlds:
    `test_optimal_policy_beats_every_rival` would detect it.  pitfall 32"""
    noticed = 0
    for seed in range(100):
        w = world(4, 1.0, seed, 2.0, 2.0)
        wrong = objective(tilt(w.ref_logp, w.r, 2 * w.beta), w)
        noticed += any(objective(rival, w) > wrong + 1e-6 for rival in rivals(w, seed).values())
    assert noticed >= 95


# ------------------------------------------------- Eq. 5 and 6


@mistake("the implicit reward does not invert Eq. 4", 22, "beta * (logp - ref_logp)")
@given(w=worlds)
def test_reward_is_recovered_from_its_optimal_policy(implicit_reward, w):
    """pi_r optimal for r  =>  r = beta log pi_r / pi_ref + beta log Z.  Eq. 5; pitfall 22"""
    r_hat = implicit_reward(tilt(w.ref_logp, w.r, w.beta), w.ref_logp, w.beta)
    assert_same(r_hat + w.beta * log_Z(w), w.r)


@mistake("log Z does not cancel from preferences", 22, "beta * (logp - ref_logp)")
@given(w=worlds)
def test_partition_function_cancels_from_preferences(implicit_reward, w):
    """pi_r optimal for r => p* from beta log pi_r / pi_ref alone is p* from r. Eq. 6, 16 and 17"""
    r_hat = implicit_reward(tilt(w.ref_logp, w.r, w.beta), w.ref_logp, w.beta)
    gaps = w.r[:, None] - w.r
    assert_same(torch.sigmoid(r_hat[:, None] - r_hat), torch.sigmoid(gaps))


# ------------------------------------------------- equivalent rewards


def projection(optimal_policy, r, w: World):
    """f(r) = r - beta log Z, as the implicit reward of the policy that is optimal for r."""
    return w.beta * (optimal_policy(w.ref_logp, r, w.beta) - w.ref_logp)


@mistake("r and r + f(x) have different optima", None, "normalise over the responses")
@given(w=worlds, f=shifts)
def test_equivalent_rewards_have_one_optimal_policy(optimal_policy, w, f):
    """r' = r + f(x)  =>  the same pi_r.  Lemma 2"""
    one, two = (optimal_policy(w.ref_logp, r, w.beta) for r in (w.r, w.r + f))
    assert_same(one, two)


@mistake("log Z does not follow a shift of the reward", None, "logsumexp(ref_logp + r / beta)")
@given(w=worlds, f=shifts)
def test_shift_of_the_reward_shifts_log_z(log_partition, w, f):
    """r' = r + f(x)  =>  log Z' = log Z + f / beta.  Lemma 2"""
    one, two = (log_partition(w.ref_logp, r, w.beta) for r in (w.r, w.r + f))
    assert_same(two, one + f / w.beta)


@mistake("the projection leaves the class of r", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds)
def test_projection_stays_in_the_rewards_class(optimal_policy, w):
    """f(r) is beta log pi_r / pi_ref, and r - f(r) = beta log Z.  Eq. 8, Theorem 1"""
    assert_same(w.r - projection(optimal_policy, w.r, w), (w.beta * log_Z(w)).expand_as(w.r))


@mistake("the projection is not idempotent", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds)
def test_projection_is_idempotent(optimal_policy, w):
    """f(f(r)) = f(r).  Eq. 8"""
    once = projection(optimal_policy, w.r, w)
    assert_same(projection(optimal_policy, once, w), once)


@mistake("a class has two representatives", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds, f=shifts)
def test_projection_sends_a_class_to_one_reward(optimal_policy, w, f):
    """r' ~ r  =>  f(r') = f(r): a class has one representative beta log pi / pi_ref.  Theorem 1"""
    assert_same(projection(optimal_policy, w.r + f, w), projection(optimal_policy, w.r, w))


@mistake("a policy is not optimal for its implicit reward", None, "see Eq. 4 and Eq. 5")
@given(w=worlds)
def test_every_policy_is_optimal_for_its_own_implicit_reward(optimal_policy, w):
    """r_hat = beta log pi / pi_ref  =>  pi_{r_hat} = pi.  Theorem 1"""
    r_hat = w.beta * (w.logp - w.ref_logp)
    assert_same(optimal_policy(w.ref_logp, r_hat, w.beta), w.logp)


@mistake("the implicit reward's log Z is not 0", None, "logsumexp(ref_logp + r / beta)")
@given(w=worlds)
def test_implicit_reward_has_partition_function_one(log_partition, w):
    """r_hat = beta log pi / pi_ref  =>  sum_y pi_ref(y) exp(r_hat(y) / beta) = 1.  Eq. 9"""
    assert_same(log_partition(w.ref_logp, w.beta * (w.logp - w.ref_logp), w.beta), 0.0)


@mistake("two representatives obey Eq. 9", None, "logsumexp(ref_logp + r / beta)")
@given(w=worlds, c=shifts.filter(bool))
def test_representative_of_a_class_is_unique(log_partition, w, c):
    """r_hat obeys Eq. 9, c != 0  =>  r_hat + c does not: its log Z is c / beta.  Proposition 1"""
    r_hat = w.beta * (w.logp - w.ref_logp)
    found = [log_partition(w.ref_logp, r, w.beta) for r in (r_hat, r_hat + c)]
    assert_same(torch.stack(found), [0.0, c / w.beta])


@mistake("Eq. 10 does not hold", None, "(ref_logp + r / beta).log_softmax(-1)")
@given(w=worlds)
def test_normalised_objective_is_minus_a_divergence(optimal_policy, w):
    """E_pi[f(r) - beta log pi / pi_ref] = -beta KL(pi, pi_r), which is 0 at pi_r.  Eq. 10"""
    best = optimal_policy(w.ref_logp, w.r, w.beta)
    f = w.r - w.beta * log_Z(w)
    gains = [mean(pi, f - w.beta * (pi - w.ref_logp)) for pi in (w.logp, best)]
    assert_same(torch.stack(gains), [-w.beta * kl(w.logp, best), 0.0])


@mistake("regret is not a divergence", None, "see Eq. 4")
@given(w=worlds)
def test_regret_is_beta_times_the_divergence_from_the_optimum(optimal_policy, w):
    """J(pi) = beta log Z - beta KL(pi, pi_r), so the regret is beta KL(pi, pi_r).  Eq. 11 to 15"""
    best = optimal_policy(w.ref_logp, w.r, w.beta)
    J, divergence = objective(w.logp, w), w.beta * kl(w.logp, best)
    assert_same(J, w.beta * log_Z(w) - divergence)
    assert_same(objective(best, w) - J, divergence)


@mistake("composing two tilts is not the tilt of the sum", None, "see Eq. 4")
@given(w=worlds, seed=seeds)
def test_two_rounds_with_a_moved_reference_are_one_round_with_the_sum(optimal_policy, w, seed):
    """pi_1 = tilt(pi_ref, r_1), pi_2 = tilt(pi_1, r_2), the same beta => pi_2 = tilt(pi_ref, r_1 +
    r_2). Eq. 4"""
    r_2 = uniform(w.r.shape, -5.0, 5.0, seed)
    pi_1 = optimal_policy(w.ref_logp, w.r, w.beta)
    pi_2 = optimal_policy(pi_1, r_2, w.beta)
    assert_same(pi_2, optimal_policy(w.ref_logp, w.r + r_2, w.beta))


@mistake("a wrong reward costs more than the bound", None, "see Eq. 4")
@given(w=worlds, seed=seeds)
def test_regret_of_a_wrong_reward_is_at_most_twice_its_error(optimal_policy, w, seed):
    """J_r(pi_r) - J_r(pi_r') = beta KL(pi_r', pi_r) <= 2 max |r - r'|.  Eq. 4"""
    error = uniform(w.r.shape, -1.0, 1.0, seed)
    right, wrong = (optimal_policy(w.ref_logp, w.r + e, w.beta) for e in (0.0, error))
    regret = objective(right, w) - objective(wrong, w)
    assert_same(regret, w.beta * kl(wrong, right))
    assert_at_most(regret, 2 * error.abs().max())


@mistake("with a uniform reference, the KL is not an entropy bonus", None, "see Eq. 4")
@given(w=worlds)
def test_uniform_reference_turns_the_kl_into_an_entropy_bonus(optimal_policy, w):
    """pi_ref uniform over K  =>  J = E r + beta H(pi) - beta log K, largest at softmax(r / beta).
    Eq. 3 and 4"""
    K = len(w.r)
    w = w._replace(ref_logp=number([-math.log(K)] * K))
    bonus = mean(w.logp, w.r) - w.beta * mean(w.logp, w.logp) - w.beta * math.log(K)
    best = optimal_policy(w.ref_logp, w.r, w.beta)
    assert_same(best, (w.r / w.beta).log_softmax(-1))
    assert_same(objective(w.logp, w), bonus)


# ------------------------------------------------- the frontier


@mistake("the frontier's KL rises with beta", 24, "weights are softmax(r / beta)")
@given(r=samples, beta=betas)
def test_reward_and_kl_of_the_optimum_fall_as_beta_rises(frontier, r, beta):
    """beta_1 < beta_2  =>  E* and KL* are no smaller at beta_1, and KL* is larger unless one
    sample has all the weight.  Eq. 4; pitfall 24"""
    at_inf, at_larger, at_beta = (torch.stack(frontier(r, b)[:2]) for b in (1e9, 1.5 * beta, beta))
    assert_at_most(at_inf, at_larger)
    assert_at_most(at_larger, at_beta)
    one_sample_has_all = at_larger[1] > math.log(len(r)) - 1e-6
    assert at_larger[1] < at_beta[1] or one_sample_has_all


@mistake("not Eq. 4 on the samples", None, "E = sum w r and KL = log N - H(w), w = softmax(r/beta)")
@given(r=samples, beta=betas)
def test_sampled_frontier_is_the_optimal_policy_on_the_samples(frontier, r, beta):
    """w = softmax(r / beta)  =>  E = sum w r, KL = log N - H(w), and the effective sample size is
    1 / sum w^2.  Eq. 4"""
    w = (r / beta).softmax(-1)
    KL = math.log(len(r)) - torch.special.entr(w).sum()
    assert_same(torch.stack(tuple(frontier(r, beta))), torch.stack((w @ r, KL, 1 / (w @ w))))


@mistake("E and KL do not follow from log E_ref exp(r / beta)", None, "w = softmax(r / beta)")
@given(r=samples, beta=betas)
def test_frontier_comes_from_the_cumulant_generating_function(frontier, r, beta):
    """l = 1 / beta, C(l) = log E_ref e^{l r}  =>  E* = C'(l) and KL* = l C' - C.  Eq. 4"""
    l = number(1 / beta).requires_grad_()
    C = (l * r).logsumexp(-1) - math.log(len(r))
    (slope,) = torch.autograd.grad(C, l)
    assert_same(torch.stack(tuple(frontier(r, beta)[:2])), torch.stack((slope, l * slope - C)))


@mistake("the frontier's slope is not beta", None, "w = softmax(r / beta)")
@given(r=samples, beta=betas)
def test_frontier_has_slope_beta(frontier, r, beta):
    """dE* / dKL* = beta: at the margin, a nat of KL buys beta of reward.  Eq. 4"""
    b = number(beta).requires_grad_()
    E, KL = frontier(r, b)[:2]
    (slope,) = torch.autograd.grad(E - beta * KL, b)
    assert_same(slope, 0.0)


@given(r=samples)
def test_frontier_takes_prompts_and_betas_in_a_batch(r):
    """Rows of r are prompts, beta broadcasts  =>  each entry is its own frontier, none pooled"""
    prompts, betas = torch.stack((r, -r)), number([0.5, 2.0])
    found = torch.stack(dpo.frontier(prompts, betas[:, None, None]), -1)
    each = [torch.stack(dpo.frontier(row, beta)) for beta in betas for row in prompts]
    assert_same(found.flatten(0, 1), torch.stack(each))


@given(w=worlds, N=st.integers(1, 3))
def test_sampled_frontier_is_biased_low(w, N):
    """N samples of pi_ref, every draw weighted by its probability => the mean of the sampled E* is
    at most E*, and the sampled KL* at most log N. Eq. 4"""
    ref_logp, r = w.ref_logp[:4].log_softmax(-1), w.r[:4]
    draws = torch.tensor(list(product(range(len(r)), repeat=N)))
    E, KL, _ = dpo.frontier(r[draws], w.beta)
    best, _ = dpo.optimal_policy(ref_logp, r, w.beta)
    assert_at_most(mean(ref_logp[draws].sum(-1), E), mean(best, r))
    assert_at_most(KL, math.log(N))


@given(w=worlds)
def test_beta_of_dpo_is_beta_of_the_optimum_for_sampled_labels_only(w):
    """Labels from Bradley-Terry  =>  dL = 0 at pi_r of the same beta.  Labels by argmax, which the
    paper uses for IMDb  =>  dL != 0 there, and descent raises the best response.  Eq. 7"""
    r = w.r + 1e-2 * torch.arange(len(w.r))  # no ties
    best, _ = dpo.optimal_policy(w.ref_logp, r, w.beta)

    def slope(r):
        batch = population(w.ref_logp, r)
        return jacobian(lambda x: population_loss(x.log_softmax(-1), batch, w.beta), best)

    assert_same(slope(r), 0 * r)
    assert slope(1e6 * r)[r.argmax()] < 0 < slope(1e6 * r)[r.argmin()]


# ------------------------------------------------- best of N


@given(w=worlds, N=st.integers(2, 20))
def test_best_of_n_lies_below_the_optimum(w, N):
    """Best of N draws has the law g_j = F_j^N - F_{j-1}^N, rewards ascending  =>  KL < log N -
    (N - 1) / N on a finite set, and E_g r <= beta KL + beta log Z at every beta; at the beta whose
    optimum has this KL, the right side is the optimum's reward.  Eq. 4"""
    order = w.r.argsort()
    ref_logp, r = w.ref_logp[order], w.r[order]
    F = torch.cat((number([0.0]), ref_logp.exp().cumsum(-1)))
    g = F.pow(N).diff().clamp(min=1e-300).log()
    KL = kl(g, ref_logp)
    assert KL < math.log(N) - (N - 1) / N
    betas = torch.logspace(-3, 3, 1000, dtype=torch.float64)
    _, log_Zs = dpo.optimal_policy(ref_logp, r, betas[:, None])
    assert_at_most(mean(g, r), betas * (KL + log_Zs))
