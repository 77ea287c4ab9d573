"""The paper's equations, lemmas and theorem on finite worlds: one prompt, every response listed, float64.

Each test is a statement: its name says it, its docstring gives hypothesis => equation, its body compares two sides.
"""
import math
from itertools import permutations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import dpo
from worlds import (LN_2, Bigram, World, assert_at_most, assert_same, betas, connected, kl, margins, mean, mild_worlds,
                    minimise, objective, pairs, policy, population, population_loss, rewards, seeds, shifts,
                    small_worlds, uniform, worlds)


def projection(r, w: World):
    """f(r) = r - beta log Z, as the implicit reward of the policy that r makes optimal."""
    return dpo.implicit_reward(dpo.optimal_policy(w.pi_ref, r, w.beta)[0], w.pi_ref, w.beta)


# ---------------------------------------------------------------------------------------------- Eq. 1 and 2

@given(r=rewards)
def test_bradley_terry_is_a_ratio_of_exponentials(r):
    """r real  =>  p*(y_1 > y_2) = exp r_1 / (exp r_1 + exp r_2).  Eq. 1"""
    ratio = r.exp()[:, None] / (r.exp()[:, None] + r.exp())
    assert_same(dpo.bradley_terry(r[:, None], r), ratio)


@given(r=rewards)
def test_bradley_terry_is_antisymmetric(r):
    """One of the two is preferred  =>  p*(y_1 > y_2) + p*(y_2 > y_1) = 1.  Eq. 1"""
    p = dpo.bradley_terry(r[:, None], r)
    assert_same(p + p.T, torch.ones_like(p))


@given(r=rewards, f=shifts)
def test_bradley_terry_ignores_a_shared_shift(r, f):
    """f depends on x alone  =>  r + f has the preferences of r.  Eq. 1, and Lemma 1 for pairs"""
    assert_same(dpo.bradley_terry((r + f)[:, None], r + f), dpo.bradley_terry(r[:, None], r))


@given(r=rewards)
def test_bradley_terry_prefers_the_higher_reward(r):
    """r_1 > r_2  <=>  p*(y_1 > y_2) > 1/2.  Eq. 1"""
    assert torch.equal(dpo.bradley_terry(r[:, None], r) > 0.5, r[:, None] > r)


@given(gap=margins, off=st.integers(1, 40).map(lambda k: k / 10))
def test_reward_loss_is_least_at_the_logit_of_the_label(gap, off):
    """Soft label p = s(gap)  =>  -E log s(r_w - r_l) is stationary at r_1 - r_2 = logit p and larger elsewhere.  Eq. 2,
    which is Eq. 7 at beta 1 with log pi in the place of r and no reference"""
    p, zero = torch.sigmoid(torch.tensor([gap, -gap], dtype=torch.float64)), torch.zeros(2, dtype=torch.float64)

    def loss(g):
        r = torch.stack((g, -g))
        return (p * dpo.dpo_loss(r, zero, zero, zero, 1.0)[0]).sum()
    at, = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
    assert_same(torch.autograd.grad(loss(at), at)[0], 0.0)
    assert loss(at) < min(loss(at + off), loss(at - off))


# ---------------------------------------------------------------------------------------------- Eq. 3 and 4

@given(w=worlds)
def test_optimal_policy_is_the_reference_tilted_by_the_reward(w):
    """Z = sum_y pi_ref(y) exp(r(y) / beta)  =>  pi_r(y) = pi_ref(y) exp(r(y) / beta) / Z.  Eq. 4"""
    unnormalised = w.pi_ref.exp() * (w.r / w.beta).exp()
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    Z = unnormalised.sum()
    assert_same(torch.cat((pi_r, log_Z[None])), torch.cat(((unnormalised / Z).log(), Z.log()[None])))


@given(w=worlds)
def test_optimal_policy_is_a_distribution(w):
    """sum_y pi_r(y|x) = 1.  Eq. 4"""
    pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(pi_r.exp().sum(), 1.0)


@given(w=worlds)
def test_optimal_policy_beats_every_other(w):
    """pi any policy  =>  J(pi) <= J(pi_r).  Eq. 3 and 4"""
    pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_at_most(objective(w.pi, w), objective(pi_r, w))


@given(w=worlds)
def test_objective_is_stationary_at_the_optimal_policy(w):
    """pi = softmax(logits) at pi_r  =>  dJ / dlogits = 0.  Eq. 3 and 4"""
    logits = dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0].clone().requires_grad_()
    slope, = torch.autograd.grad(objective(logits.log_softmax(-1), w), logits)
    assert_same(slope, torch.zeros_like(slope))


@given(w=worlds)
def test_optimal_policy_goes_to_the_reference_as_beta_rises(w):
    """|log pi_r / pi_ref| <= (max r - min r) / beta, so pi_r -> pi_ref as beta -> inf.  Eq. 4"""
    for beta in (w.beta, 10 * w.beta, 1000 * w.beta):
        pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, beta)
        assert_at_most((pi_r - w.pi_ref).abs().max(), (w.r.max() - w.r.min()) / beta)


@given(w=worlds)
def test_optimal_policy_goes_to_the_best_response_as_beta_falls(w):
    """y* = argmax r, ahead by gap  =>  1 - pi_r(y*) <= exp(-gap / beta) / pi_ref(y*), so -> 0 as beta -> 0.  Eq. 4"""
    best, second = w.r.topk(2).values
    for beta in (w.beta, w.beta / 10, w.beta / 1000):
        pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, beta)
        bound = (-(best - second) / beta - w.pi_ref[w.r.argmax()]).exp()
        assert_at_most(1 - pi_r[w.r.argmax()].exp(), bound)


@given(w=worlds)
def test_many_prompts_are_as_many_single_ones(w):
    """Rows of a batch are prompts  =>  each has its own pi_r and Z.  Eq. 4"""
    pi_r, log_Z = dpo.optimal_policy(torch.stack((w.pi_ref, w.pi)), torch.stack((w.r, -w.r)), w.beta)
    each = [dpo.optimal_policy(ref, r, w.beta) for ref, r in ((w.pi_ref, w.r), (w.pi, -w.r))]
    assert_same(torch.cat((pi_r, log_Z[:, None]), 1), torch.stack([torch.cat((p, z[None])) for p, z in each]))


# ---------------------------------------------------------------------------------------------- Eq. 5 and 6

@given(w=worlds)
def test_reward_is_recovered_from_its_optimal_policy(w):
    """pi_r optimal for r  =>  r = beta log pi_r / pi_ref + beta log Z.  Eq. 5"""
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(dpo.implicit_reward(pi_r, w.pi_ref, w.beta) + w.beta * log_Z, w.r)


@given(w=worlds)
def test_partition_function_cancels_from_preferences(w):
    """pi_r optimal for r  =>  p* from beta log pi_r / pi_ref alone is p* from r.  Eq. 6, and Eq. 16 and 17"""
    r_hat = dpo.implicit_reward(dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0], w.pi_ref, w.beta)
    assert_same(torch.sigmoid(r_hat[:, None] - r_hat), dpo.bradley_terry(w.r[:, None], w.r))


# ---------------------------------------------------------------------------------------------- Eq. 7

@given(p=pairs)
def test_loss_is_minus_log_likelihood_of_the_preference(p):
    """r_hat = beta log pi_theta / pi_ref => L_DPO = -log s(r_hat_w - r_hat_l). Eq. 7; pitfall 22 (a reward has its
    beta)"""
    r_hat_w, r_hat_l = p.beta * (p.pi_theta_w - p.pi_ref_w), p.beta * (p.pi_theta_l - p.pi_ref_l)
    nats = torch.logaddexp(torch.zeros(()), r_hat_l - r_hat_w)
    assert_same(torch.stack(dpo.dpo_loss(*p)), torch.stack((nats, r_hat_w, r_hat_l)))


@given(p=pairs)
def test_loss_is_ln_2_where_policy_and_reference_agree(p):
    """pi_theta = pi_ref  =>  L_DPO = ln 2, whatever beta.  Eq. 7; pitfall 13"""
    loss, _, _ = dpo.dpo_loss(p.pi_ref_w, p.pi_ref_l, p.pi_ref_w, p.pi_ref_l, p.beta)
    assert_same(loss, torch.full_like(loss, LN_2))


@given(p=pairs, c=shifts)
def test_loss_depends_on_the_difference_of_log_ratios_alone(p, c):
    """Both log-ratios + c  =>  the same loss: a constant, log Z among them, cancels.  Eq. 7"""
    shifted = p._replace(pi_theta_w=p.pi_theta_w + c, pi_theta_l=p.pi_theta_l + c)
    assert_same(dpo.dpo_loss(*shifted)[0], dpo.dpo_loss(*p)[0])


@given(p=pairs, c=st.integers(1, 16).map(lambda k: k / 4))
def test_loss_depends_on_beta_times_the_margin_alone(p, c):
    """Log-ratios times c, beta over c  =>  the same loss.  Eq. 7"""
    scaled = p._replace(pi_theta_w=p.pi_ref_w + c * (p.pi_theta_w - p.pi_ref_w),
                        pi_theta_l=p.pi_ref_l + c * (p.pi_theta_l - p.pi_ref_l), beta=p.beta / c)
    assert_same(dpo.dpo_loss(*scaled)[0], dpo.dpo_loss(*p)[0])


def at_margin(h, beta):
    """L_DPO where log pi_theta / pi_ref (y_w) exceeds that of y_l by h."""
    h = torch.as_tensor(h, dtype=torch.float64)
    zero = torch.zeros_like(h)
    return dpo.dpo_loss(h, zero, zero, zero, beta)[0]


@given(h=margins, step=st.integers(1, 100).map(lambda k: k / 10), beta=betas)
def test_loss_falls_with_the_margin(h, step, beta):
    """h_1 < h_2  =>  L(h_1) > L(h_2) > 0.  Eq. 7"""
    assert at_margin(h, beta) > at_margin(h + step, beta) > 0


@given(h=margins, k=margins, beta=betas)
def test_loss_is_convex_in_the_margin(h, k, beta):
    """L((h + k) / 2) <= (L(h) + L(k)) / 2.  Eq. 7"""
    assert_at_most(at_margin((h + k) / 2, beta), (at_margin(h, beta) + at_margin(k, beta)) / 2)


@given(z=st.integers(100, 100_000).map(float))
def test_loss_of_a_hopeless_pair_is_finite(z):
    """z << 0  =>  L_DPO = -z with slope -1, in float32 too, where log(s(z)) is already -inf.  Eq. 7; pitfall 15"""
    h = torch.tensor([-z], requires_grad=True)
    loss, _, _ = dpo.dpo_loss(h, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0)
    assert_same(torch.cat((loss, *torch.autograd.grad(loss.sum(), h))), [z, -1.0], tolerance=1e-6)


def test_a_lower_loss_need_not_raise_the_chosen_response():
    """Not a theorem: L_DPO falls => log pi(y_w) rises. Counterexample: pi_ref = (1/3, 1/3, 1/3), pi = (1/4, 1/20,
    7/10)"""
    pi_ref, pi = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 20, 7 / 10]], dtype=torch.float64).log()
    before, after = (dpo.dpo_loss(p[0], p[1], pi_ref[0], pi_ref[1], 1.0)[0] for p in (pi_ref, pi))
    assert after < before and pi[0] < pi_ref[0]


# ---------------------------------------------------------------------------------------------- the gradient

@given(w=worlds)
def test_gradient_is_weighted_by_how_wrong_the_implicit_reward_is(w):
    """pi = softmax(logits)  =>  grad L = -beta s(r_hat_l - r_hat_w) (grad log pi(y_w) - grad log pi(y_l)).  Section 4's
    gradient, Eq. 21 and 22; grad log pi(y) = one_hot(y) - pi"""
    logits = w.pi.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    grad, = torch.autograd.grad(dpo.dpo_loss(log_pi[0], log_pi[1], w.pi_ref[0], w.pi_ref[1], w.beta)[0], logits)
    score = torch.eye(len(w.r), dtype=torch.float64) - w.pi.exp()
    weight = torch.sigmoid(w.beta * ((w.pi[1] - w.pi_ref[1]) - (w.pi[0] - w.pi_ref[0])))
    assert_same(grad, -w.beta * weight * (score[0] - score[1]))


@given(h=margins.filter(lambda h: h != 0), beta=betas)
def test_gradient_tells_the_main_text_from_appendix_a4(h, beta):
    """The last line of App. A.4 prints the weight s(r_hat_w - r_hat_l); the true one is s(r_hat_l - r_hat_w), which
    is 1 minus it: alike at h = 0 alone. pitfall 31"""
    at = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    weight = -torch.autograd.grad(at_margin(at, beta), at)[0] / beta
    main_text, appendix = torch.sigmoid(torch.tensor([-beta * h, beta * h], dtype=torch.float64))
    assert_same(weight, main_text)
    assert not torch.isclose(weight, appendix, atol=1e-4)


@given(p=pairs)
def test_gradient_reaches_both_responses_alike_and_the_reference_not(p):
    """dL / dlog pi(y_w) = -dL / dlog pi(y_l) = -beta s(r_hat_l - r_hat_w).  Section 4's gradient"""
    theta = [p.pi_theta_w.clone().requires_grad_(), p.pi_theta_l.clone().requires_grad_()]
    loss, r_hat_w, r_hat_l = dpo.dpo_loss(*theta, p.pi_ref_w, p.pi_ref_l, p.beta)
    expected = -p.beta * torch.sigmoid(r_hat_l - r_hat_w).detach()
    assert_same(torch.stack(torch.autograd.grad(loss.sum(), theta, allow_unused=True, materialize_grads=True)),
                torch.stack((expected, -expected)))


# ---------------------------------------------------------------------------------------------- Section 4's reference

@given(seed=seeds, V=st.integers(2, 6))
def test_reference_without_sft_is_the_winners_frequencies(seed, V):
    """pi = frequencies f of the winners => E log pi'(y_w) = E log pi(y_w) - KL(f, pi') for every pi', so that pi is
    the argmax. Section 4's reference"""
    winners = torch.randint(V, (20,), generator=torch.Generator().manual_seed(seed)).tolist() + list(range(V))
    ids = torch.tensor([[0, y] for y in winners])
    mask = torch.tensor([[False, True]]).expand_as(ids)
    f = torch.bincount(torch.tensor(winners)).double().div(len(winners)).log()
    other = policy(V, seed)
    mean_logp = [dpo.response_logps(Bigram(pi.expand(V, V)), ids, mask).sum(-1).mean() for pi in (f, other)]
    assert_same(mean_logp[1], mean_logp[0] - kl(f, other), tolerance=1e-5)


# ---------------------------------------------------------------------------------------------- equivalence

@given(r=rewards, f=shifts)
def test_preferences_know_the_reward_up_to_its_class(r, f):
    """r ~ r' iff r - r' depends on x alone (Definition 1) => preferences give back r up to f(x): logit p*(y > y_0) =
    r - r_0"""
    p = dpo.bradley_terry(r + f, r[0] + f)
    assert_same(p.logit(), r - r[0])


@given(r=rewards, seed=seeds)
def test_rewards_of_different_classes_prefer_differently(r, seed):
    """r - r' varies with y, so r is not ~ r'  =>  some pair's preference differs.  Definition 1"""
    other = r + uniform(r.shape, 0.0, 1.0, seed)
    assert (dpo.bradley_terry(other[:, None], other) - dpo.bradley_terry(r[:, None], r)).abs().max() > 1e-9


@given(w=small_worlds, f=shifts)
def test_equivalent_rewards_rank_alike(w, f):
    """r' = r + f(x)  =>  the same probability of every ranking.  Lemma 1"""
    orders = torch.tensor(list(permutations(range(len(w.r)))))
    assert_same(dpo.plackett_luce((w.r + f)[orders]), dpo.plackett_luce(w.r[orders]))


@given(w=worlds, f=shifts)
def test_equivalent_rewards_have_one_optimal_policy(w, f):
    """r' = r + f(x)  =>  the same pi_r, and log Z' = log Z + f / beta.  Lemma 2"""
    (shifted, log_Z_shifted), (pi_r, log_Z) = (dpo.optimal_policy(w.pi_ref, r, w.beta) for r in (w.r + f, w.r))
    assert_same(torch.cat((shifted, log_Z_shifted[None])), torch.cat((pi_r, log_Z[None] + f / w.beta)))


@given(w=worlds)
def test_projection_stays_in_the_rewards_class(w):
    """f(r) = r - beta log Z is beta log pi_r / pi_ref, and r - f(r) is one number.  Eq. 8, Theorem 1"""
    _, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(w.r - projection(w.r, w), (w.beta * log_Z).expand_as(w.r))


@given(w=worlds)
def test_projection_is_idempotent(w):
    """f(f(r)) = f(r).  Eq. 8"""
    assert_same(projection(projection(w.r, w), w), projection(w.r, w))


@given(w=worlds, f=shifts)
def test_projection_sends_a_class_to_one_reward(w, f):
    """r' ~ r  =>  f(r') = f(r): a class has one representative beta log pi / pi_ref.  Theorem 1"""
    assert_same(projection(w.r + f, w), projection(w.r, w))


@given(w=worlds)
def test_every_policy_is_optimal_for_its_own_implicit_reward(w):
    """r_hat = beta log pi / pi_ref  =>  pi_{r_hat} = pi.  Theorem 1"""
    r_hat = dpo.implicit_reward(w.pi, w.pi_ref, w.beta)
    assert_same(dpo.optimal_policy(w.pi_ref, r_hat, w.beta)[0], w.pi)


@given(w=worlds)
def test_implicit_reward_has_partition_function_one(w):
    """r_hat = beta log pi / pi_ref  =>  sum_y pi_ref(y) exp(r_hat(y) / beta) = 1.  Eq. 9"""
    r_hat = dpo.implicit_reward(w.pi, w.pi_ref, w.beta)
    assert_same(dpo.optimal_policy(w.pi_ref, r_hat, w.beta)[1], 0.0)


@given(w=worlds)
def test_normalised_objective_is_minus_a_divergence(w):
    """E_pi[f(r) - beta log pi / pi_ref] = -beta KL(pi, pi_r), at most 0 and 0 at pi_r.  Eq. 10"""
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    gain = torch.stack([mean(pi, w.r - w.beta * log_Z - dpo.implicit_reward(pi, w.pi_ref, w.beta))
                        for pi in (w.pi, pi_r)])
    assert_same(gain, [-w.beta * kl(w.pi, pi_r), 0.0])


@given(w=worlds)
def test_objective_is_its_maximum_minus_a_divergence(w):
    """pi any policy  =>  J(pi) = beta log Z - beta KL(pi, pi_r).  Eq. 11 to 15"""
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(objective(w.pi, w), w.beta * log_Z - w.beta * kl(w.pi, pi_r))


@given(w=worlds, c=shifts.filter(bool))
def test_representative_of_a_class_is_unique(w, c):
    """r_hat obeys Eq. 9, c != 0  =>  r_hat + c does not, as its log Z is c / beta.  Proposition 1"""
    r_hat = projection(w.r, w)
    log_Z, moved = (dpo.optimal_policy(w.pi_ref, r, w.beta)[1] for r in (r_hat, r_hat + c))
    assert_same(torch.stack((log_Z, moved)), [0.0, c / w.beta])


# ---------------------------------------------------------------------------------------------- Plackett-Luce

@given(r=rewards)
def test_plackett_luce_chooses_the_best_of_those_that_are_left(r):
    """p*(ranking) = prod_k exp r_k / sum_{j >= k} exp r_j.  Eq. 18"""
    choices = [r[k].exp() / r[k:].exp().sum() for k in range(len(r))]
    assert_same(dpo.plackett_luce(r), math.log(math.prod(choices)))


@given(w=small_worlds)
def test_plackett_luce_sums_to_one_over_all_rankings(w):
    """sum over K! rankings of p* = 1.  Eq. 18"""
    orders = torch.tensor(list(permutations(range(len(w.r)))))
    assert_same(dpo.plackett_luce(w.r[orders]).exp().sum(), 1.0)


@given(r=rewards)
def test_plackett_luce_of_two_is_bradley_terry(r):
    """K = 2  =>  p*(ranking) = p*(y_1 > y_2).  Eq. 18 and Eq. 1"""
    assert_same(dpo.plackett_luce(r[:2]), dpo.bradley_terry(r[0], r[1]).log())


@given(w=small_worlds)
def test_partition_function_cancels_from_rankings(w):
    """pi_r optimal for r  =>  p*(ranking) from beta log pi_r / pi_ref is p*(ranking) from r.  Eq. 19"""
    orders = torch.tensor(list(permutations(range(len(w.r)))))
    assert_same(dpo.plackett_luce(projection(w.r, w)[orders]), dpo.plackett_luce(w.r[orders]))


@given(p=pairs)
def test_ranking_loss_of_two_is_the_pair_loss(p):
    """K = 2  =>  -log p*(y_w > y_l) at r_hat is L_DPO.  Eq. 20 and Eq. 7"""
    loss, _, _ = dpo.dpo_loss(*p)
    theta, ref = torch.stack((p.pi_theta_w, p.pi_theta_l), -1), torch.stack((p.pi_ref_w, p.pi_ref_l), -1)
    r_hat = dpo.implicit_reward(theta, ref, p.beta)
    assert_same(-dpo.plackett_luce(r_hat), loss)


@given(w=mild_worlds)
def test_population_ranking_loss_is_least_at_the_optimal_policy(w):
    """Rankings drawn from Plackett-Luce with r => -E log p at beta log pi / pi_ref is stationary at pi_r, and larger
    at every other policy. Eq. 20"""
    orders = torch.tensor(list(permutations(range(len(w.r)))))
    p = dpo.plackett_luce(w.r[orders]).exp()

    def loss(logits):
        return -(p * dpo.plackett_luce(dpo.implicit_reward(logits.log_softmax(-1), w.pi_ref, w.beta)[orders])).sum()
    logits = dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0].clone().requires_grad_()
    grad, = torch.autograd.grad(loss(logits), logits)
    assert_same(grad, torch.zeros_like(grad))
    assert loss(logits) < loss(w.pi)


# ---------------------------------------------------------------------------------------------- the population theorem

def bernoulli_kl(p, z):
    """KL(Bern(p), Bern(s(z)))."""
    return p * (p.log() - F.logsigmoid(z)) + (1 - p) * ((1 - p).log() - F.logsigmoid(-z))


@given(w=mild_worlds, seed=seeds)
def test_population_loss_is_label_entropy_plus_a_divergence(w, seed):
    """Labels from Bradley-Terry with r, any pairs  =>  loss - label entropy = E KL(Bern(p*), Bern(s(z))).  Eq. 7"""
    batch = population(w.pi_ref, w.r, connected(len(w.r), seed))
    _, first, second = batch.pairs[::2].T
    mass = batch.weight[::2] + batch.weight[1::2]
    p = torch.sigmoid(w.r[first] - w.r[second])
    z = w.beta * ((w.pi - w.pi_ref)[first] - (w.pi - w.pi_ref)[second])
    entropy = (mass * F.binary_cross_entropy(p, p, reduction="none")).sum()
    assert_same(population_loss(w.pi, batch, w.beta) - entropy, (mass * bernoulli_kl(p, z)).sum())


@given(w=mild_worlds, seed=seeds)
def test_dpo_on_the_population_finds_the_optimal_policy(w, seed):
    """Labels from Bradley-Terry with r, pairs that connect the responses, any masses => the minimiser of L_DPO over
    all policies is pi_r. The population theorem: Eq. 7 has Eq. 4 as its optimum"""
    batch = population(w.pi_ref, w.r, connected(len(w.r), seed))
    found = minimise(lambda logits: population_loss(logits.log_softmax(-1), batch, w.beta), w.pi_ref).log_softmax(-1)
    assert_same(found, dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0], tolerance=1e-6)


@given(w=mild_worlds, seed=seeds)
def test_no_other_policy_has_the_population_loss_of_the_optimum(w, seed):
    """pi != pi_r, pairs that connect the responses => L(pi) > L(pi_r): the minimiser is the only one. The population
    theorem"""
    batch = population(w.pi_ref, w.r, connected(len(w.r), seed))
    pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert population_loss(w.pi, batch, w.beta) > population_loss(pi_r, batch, w.beta)
