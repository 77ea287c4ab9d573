"""beyond/ppo.py: its estimates against full enumeration, and training against the known optimum.

Every response of the model can be listed. An expectation over responses is therefore a sum, and
"unbiased" is an equation without a standard error.

s is the logistic function, and the tilt is the optimal policy of Eq. 4.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from worlds import (
    CONTEXT,
    END,
    PROMPTS,
    V,
    assert_at_most,
    assert_same,
    enumerated,
    gpt,
    kl,
    mean,
    number,
    preferences,
    responses,
    rows,
    seeds,
    tilt,
    triplets,
    uniform,
)

import dpo
from beyond import ppo

SINGLE = 1e-5  # model.sample returns float32
lams = st.integers(0, 10).map(lambda k: k / 10)


def critic_of(pi, seed: int) -> ppo.ValueModel:
    """A value model with a different output at every token."""
    critic = ppo.ValueModel(pi)
    with torch.no_grad():
        critic.value.weight.copy_(uniform(critic.value.weight.shape, -1.0, 1.0, seed))
    return critic


def drawn_reward(x, seed: int):
    """A reward of every response to x, (N,) nats."""
    return uniform((len(responses(x)),), -2.0, 2.0, seed)


def drawn_tokens(x, seed: int, length: int = CONTEXT):
    """The mask of every response to x, and two drawn values per token, 0 outside the mask."""
    _, mask = rows(x, responses(x), length)
    return mask, *(uniform(mask.shape, -1.0, 1.0, seed + k).masked_fill(~mask, 0.0) for k in (0, 1))


def listed(pi, pi_ref, x, r, beta):
    """Mask, token log-probabilities and token rewards of every response to x, (N, T) each."""
    ids, mask = rows(x, responses(x))
    logps, ref_logps = (dpo.response_logps(model, ids, mask) for model in (pi, pi_ref))
    return mask, logps, ppo.token_rewards(r, (logps - ref_logps).detach(), mask, beta)


# ------------------------------------------------- rewards and advantages


@pytest.mark.parametrize("x", PROMPTS)
def test_token_rewards_sum_to_the_integrand_of_the_objective(x):
    """sum_t r_t = r(x, y) - beta log( pi(y|x) / pi_ref(y|x) ), with r at the last token.  Eq. 3"""
    pi, pi_ref, r, beta = gpt(0), gpt(1), drawn_reward(x, 2), 0.7
    mask, _, found = listed(pi, pi_ref, x, r, beta)
    assert_same(found.sum(-1), r - beta * (enumerated(pi, x) - enumerated(pi_ref, x)))
    assert (found[~mask] == 0).all()
    _, _, reward_alone = listed(pi, pi, x, r, beta)
    assert_same(reward_alone[range(len(r)), [len(x) + len(y) - 1 for y in responses(x)]], r)


@given(seed=seeds, lam=lams)
def test_gae_matches_its_definition(seed, lam):
    """A_t = sum_k lam^k delta_{t+k}, delta_t = r_t + V_{t+1} - V_t, and V = 0 after the end"""
    x = [1, 0]
    mask, r, V_ = drawn_tokens(x, seed, length=6)
    found = ppo.gae(r, V_, mask, lam)
    for i, y in enumerate(responses(x)):
        tokens = range(len(x), len(x) + len(y))
        V_next = {t: V_[i, t + 1] if t + 1 in tokens else 0.0 for t in tokens}
        delta = {t: r[i, t] + V_next[t] - V_[i, t] for t in tokens}
        for t in range(6):
            expected = sum(lam ** (u - t) * delta[u] for u in tokens if u >= t)
            assert_same(found[i, t], expected if t in tokens else 0.0)


@given(seed=seeds, scale=st.integers(1, 8), shift=st.integers(-8, 8))
def test_whitened_advantages_have_mean_0_and_variance_1(seed, scale, shift):
    """Any advantages  =>  mean 0 and variance 1 over the tokens under the mask, 0 outside; an
    increasing affine map of the advantages changes nothing"""
    mask, A, _ = drawn_tokens([0], seed)
    found = ppo.whiten(A, mask)
    assert_same(found[mask].mean(), 0.0)
    assert_same(found[mask].var(correction=0), 1.0, 1e-6)
    assert (found[~mask] == 0).all()
    assert_same(ppo.whiten((scale * A + shift).masked_fill(~mask, 0.0), mask), found, 1e-6)


def test_value_of_a_token_depends_only_on_what_precedes_it():
    """V_t is a function of x and y_<t, is stored at token t, and is 0 outside the mask"""
    critic = critic_of(gpt(0), 3)
    ids, mask = rows([0], responses([0]))
    values = ppo.token_values(critic, ids, mask)
    assert_same(values[0, 1], critic(torch.tensor([[0]]))[0, 0])
    assert (values[~mask] == 0).all() and (values[mask] != 0).all()
    for t in range(1, CONTEXT):
        other = ids.clone()
        other[:, t:] = (other[:, t:] + 1) % V
        changed = ppo.token_values(critic, other, mask)
        assert_same(changed[:, : t + 1], values[:, : t + 1])


# ------------------------------------------------- the policy gradient


def exact_gradient(pi, pi_ref, x, r, beta):
    """The gradient of E r - beta KL (Eq. 3), summed over every response."""
    logp = dpo.response_logps(pi, *rows(x, responses(x))).sum(-1)
    objective = (logp.exp() * (r - beta * (logp - enumerated(pi_ref, x)))).sum()
    return torch.autograd.grad(objective, list(pi.parameters()))


def estimated_gradient(pi, pi_ref, values, x, r, beta, lam):
    """The mean over all responses, weighted by probability, of the gradient of the surrogate."""
    mask, logps, rewards = listed(pi, pi_ref, x, r, beta)
    old_logps = logps.detach()
    each = ppo.surrogate(logps, old_logps, ppo.gae(rewards, values, mask, lam), 0.2)
    return torch.autograd.grad((old_logps.sum(-1).exp() * each).sum(), list(pi.parameters()))


def exact_values(pi, pi_ref, x, r, beta):
    """V(x, y_<t): the mean reward to come of the responses that begin with y_<t, (N, T)."""
    ys = responses(x)
    _, logps, rewards = listed(pi, pi_ref, x, r, beta)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    p, values = logps.detach().sum(-1).exp(), torch.zeros_like(rewards)
    for i, y in enumerate(ys):
        for t in range(len(y)):
            same = torch.tensor([other[:t] == y[:t] and len(other) > t for other in ys])
            column = len(x) + t
            values[i, column] = (p * to_come[:, column])[same].sum() / p[same].sum()
    return values


def drawn_values(pi, x, seed: int):
    return ppo.token_values(critic_of(pi, seed), *rows(x, responses(x))).detach()


def distance(estimate, exact) -> float:
    return max((a - b).abs().max().item() for a, b in zip(estimate, exact, strict=True))


@pytest.mark.parametrize("x", PROMPTS)
def test_policy_gradient_is_unbiased_for_every_critic(x):
    """lam = 1  =>  sum_y pi(y) grad surrogate(y) is the gradient of E r - beta KL at pi_theta =
    pi_old, for every V.  Eq. 3"""
    for seed in range(3):
        pi, pi_ref, r = gpt(3 * seed), gpt(3 * seed + 1), drawn_reward(x, seed)
        found = estimated_gradient(pi, pi_ref, drawn_values(pi, x, seed), x, r, 0.6, 1.0)
        assert distance(found, exact_gradient(pi, pi_ref, x, r, 0.6)) < 1e-9


@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_policy_gradient_is_unbiased_at_every_lam_if_the_critic_is_exact(lam):
    """V exact  =>  unbiased at every lam; V wrong and lam < 1  =>  biased.  Eq. 3"""
    x, pi, pi_ref = [0], gpt(0), gpt(1)
    r = drawn_reward(x, 4)
    exact = exact_gradient(pi, pi_ref, x, r, 0.6)
    wrong = estimated_gradient(pi, pi_ref, drawn_values(pi, x, 5), x, r, 0.6, lam)
    assert distance(wrong, exact) > 1e-3
    values = exact_values(pi, pi_ref, x, r, 0.6)
    assert distance(estimated_gradient(pi, pi_ref, values, x, r, 0.6, lam), exact) < 1e-9


@given(seed=seeds)
def test_surrogate_is_clipped_from_above_and_its_gradient_stops_there(seed):
    """min(rho A, clip(rho) A) <= rho A, summed over tokens; the gradient in log rho is 0 where rho
    is beyond the clip on A's side, and rho A elsewhere, which at pi_old is the policy gradient"""
    log_rho = uniform((10, 4), -1.0, 1.0, seed).requires_grad_()
    A = uniform((10, 4), -1.0, 1.0, seed + 1)
    found = ppo.surrogate(log_rho, torch.zeros(10, 4), A, 0.2)
    rho = log_rho.exp()
    assert_at_most(found, (rho * A).sum(1))
    (gradient,) = torch.autograd.grad(found.sum(), log_rho)
    stopped = ((A > 0) & (rho > 1.2)) | ((A < 0) & (rho < 0.8))
    assert_same(gradient, torch.where(stopped, 0.0, rho * A))


# ------------------------------------------------- the reward model


def test_value_model_starts_at_zero_from_the_policys_weights():
    pi = gpt(0)
    r_phi = ppo.ValueModel(pi)
    assert distance(r_phi.gpt.parameters(), pi.parameters()) == 0
    assert r_phi.gpt.wte.weight is not pi.wte.weight
    assert (r_phi(torch.tensor([[0, 1]])) == 0).all()


def test_reward_loss_is_equation_2():
    """-log s(r_phi(x, y_w) - r_phi(x, y_l)) of each pair, with r_phi read at the last token of
    x + y alone.  Eq. 2"""
    r_phi, found = critic_of(gpt(0, context=8), 3), triplets(5)
    batch = preferences(found, gpt(0, context=8))
    losses, correct = ppo.reward_loss(r_phi, batch)

    def r(t, side):
        return r_phi(torch.tensor([t["x"] + t[side]]))[0, -1].detach()

    gaps = torch.stack([r(t, "y_w") - r(t, "y_l") for t in found])
    assert_same(losses, -F.logsigmoid(gaps))
    assert_same(correct, (gaps > 0).double())
    expected = (batch.weight * correct).sum() / batch.weight.sum()
    assert_same(ppo.pair_accuracy(r_phi, batch, batch_size=3), expected)


def test_fitted_reward_orders_pairs_even_if_another_run_diverges():
    """A learnable reward  =>  learned. Four evaluations per epoch; a good r_phi is returned even if
    the run before or after it diverges"""
    ascending = sorted(responses([0]), key=lambda y: y.count(1))
    found = [
        {"prompt": n, "x": [0], "y_w": y_w, "y_l": y_l, "weight": 1.0}
        for n, (y_l, y_w) in enumerate(combinations(ascending, 2))
        if y_w.count(1) > y_l.count(1)
    ]
    data = preferences(found, gpt(0))
    assert ppo.pair_accuracy(ppo.ValueModel(gpt(0)), data) == 0.5
    for lrs in ((30.0, 3e-2), (3e-2, 30.0)):
        best, evaluations = ppo.fit_reward(gpt(0), data, lrs, 8, 0, epochs=2)
        assert [e["lr"] for e in evaluations] == [lrs[0]] * 8 + [lrs[1]] * 8
        assert ppo.pair_accuracy(best, data) >= 0.9
        assert max(e["accuracy"] for e in evaluations) >= 0.9
    r_w, r_l = ppo.reward_of(best)(data.ids, data.mask)[data.pairs].T
    assert (r_w > r_l).double().mean() >= 0.9
    assert not any(p.requires_grad for p in best.parameters())


# ------------------------------------------------- training


def exact_reward(x):
    """A reward of every response to x, with mean 0 and variance 1 under pi_ref = gpt(0)."""
    r, logp = drawn_reward(x, 2), enumerated(gpt(0), x)
    centred = r - mean(logp, r)
    return centred / mean(logp, centred.square()).sqrt()


TRUE = {(*x, *y): r for x in PROMPTS for y, r in zip(responses(x), exact_reward(x), strict=True)}


def true_reward(ids, mask):
    """`exact_reward` of rows."""
    ends = mask.int().argmax(1) + mask.sum(1)
    return torch.stack(
        [TRUE[tuple(row[:end])] for row, end in zip(ids.tolist(), ends, strict=True)]
    )


LONG = ppo.PPOConfig(iterations=60, batch_size=512, lr=1e-2, critic_lr=1e-2, beta=1.0)


def train(config, seed=0, prompts=PROMPTS):
    """The last pi_theta and metrics."""
    pi_ref = gpt(0)
    critic = ppo.ValueModel(pi_ref)
    *_, last = ppo.ppo(pi_ref, critic, prompts * 256, true_reward, END, config, seed)
    return last


def distance_from_optimum(pi_theta):
    """The largest KL(pi_theta, tilt) / KL(pi_ref, tilt) of a prompt, at beta = 1."""
    ratios = []
    for x in PROMPTS:
        ref_logp = enumerated(gpt(0), x)
        best = tilt(ref_logp, exact_reward(x), 1.0)
        ratios.append(kl(enumerated(pi_theta, x), best) / kl(ref_logp, best))
    return max(ratios)


def exact_kl(pi_theta):
    return sum(kl(enumerated(pi_theta, x), enumerated(gpt(0), x)) for x in PROMPTS) / 2


BETA = 0.5


def rollout(critic, config, generator):
    """1024 samples of pi_theta = gpt(3), more than `in_chunks` runs at once; pi_ref = gpt(0)."""
    args = PROMPTS * 512, true_reward, END, BETA, config, generator
    return ppo.rollout(gpt(3), gpt(0), critic, *args)


def test_rollout_contains_the_estimates_of_its_samples():
    """Samples of pi_theta  =>  logps are log pi_theta, log_ratio is that of the response, returns
    are V + GAE, and advantages are GAE, whitened if so configured"""
    critic = critic_of(gpt(0), 1)
    plain, white = (
        rollout(critic, ppo.PPOConfig(lam=0.7, whiten=whiten), torch.Generator().manual_seed(0))
        for whiten in (False, True)
    )
    ids, mask = plain.ids, plain.mask
    logps, ref_logps = (dpo.response_logps(gpt(i), ids, mask).detach() for i in (3, 0))
    values = ppo.token_values(critic, ids, mask).detach()
    rewards = ppo.token_rewards(true_reward(ids, mask), logps - ref_logps, mask, BETA)
    advantages = ppo.gae(rewards, values, mask, 0.7)
    assert_same(plain.logps, logps, SINGLE)
    assert_same(plain.log_ratio, (logps - ref_logps).sum(1), SINGLE)
    assert_same(plain.advantages, advantages, SINGLE)
    assert_same(white.advantages, ppo.whiten(advantages, mask), SINGLE)
    assert_same(white.returns, values + advantages, SINGLE)


@given(kl_ratio=st.integers(0, 40).map(lambda k: k / 10))
def test_controller_raises_beta_iff_the_kl_exceeds_its_target(kl_ratio):
    """beta rises iff KL > target, by a share of at most 0.2 times the controller's gain, and falls
    likewise.  1909.08593, section 2.2"""
    config = ppo.PPOConfig(target_kl=2.0)
    beta = ppo.adapted_beta(0.5, 2.0 * kl_ratio, config)
    assert (beta > 0.5) == (kl_ratio > 1) and (beta < 0.5) == (kl_ratio < 1)
    assert abs(beta / 0.5 - 1) <= 0.2 * config.gain + 1e-12


@given(target=st.integers(1, 40).map(lambda k: k / 4))
def test_initial_beta_is_that_of_a_normal_reward(target):
    """r ~ N(0, 1) under pi_ref  =>  the tilt is N(1 / beta, 1), at KL 1 / (2 beta^2) = target"""
    r = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    ref_logp = (-r.square() / 2).log_softmax(-1)
    best = tilt(ref_logp, r, ppo.initial_beta(target))
    assert_same(kl(best, ref_logp), target, 1e-3)


def test_value_model_approaches_the_exact_values():
    """Updates of the critic alone, lam = 1  =>  V approaches E[rewards to come | x, y_<t]: its mean
    squared error falls to a fifth of that of V = 0, and pi_theta does not change"""
    pi_theta, critic, config = gpt(3), ppo.ValueModel(gpt(0)), ppo.PPOConfig(lam=1.0)
    optimizers = ppo.adamw(pi_theta, 1.0), ppo.adamw(critic, 3e-3)
    generator = torch.Generator().manual_seed(0)

    def error(x):
        exact = exact_values(pi_theta, gpt(0), x, exact_reward(x), BETA)
        values = ppo.token_values(critic, *rows(x, responses(x)))
        return mean(enumerated(pi_theta, x), (values - exact).square().sum(1)).item()

    before = [error(x) for x in PROMPTS]
    for _ in range(40):
        sampled = rollout(critic, config, generator)
        ppo.update(pi_theta, critic, optimizers, sampled, config, False, generator)
    for x, start in zip(PROMPTS, before, strict=True):
        assert error(x) < start / 5
    assert distance(pi_theta.parameters(), gpt(3).parameters()) == 0


def test_policy_learns_only_after_the_warmup_of_the_critic():
    """iteration < critic_warmup  =>  pi_theta = pi_ref; later pi_theta moves. The given pi_ref and
    critic never change"""
    pi_ref, critic = gpt(0), ppo.ValueModel(gpt(0))
    config = replace(LONG, iterations=4, batch_size=8, critic_warmup=2)
    moved = [
        distance(pi_theta.parameters(), pi_ref.parameters()) > 0
        for pi_theta, _ in ppo.ppo(pi_ref, critic, PROMPTS * 8, true_reward, END, config, 0)
    ]
    assert moved == [False, False, True, True]
    assert distance(pi_ref.parameters(), gpt(0).parameters()) == 0
    assert distance(critic.parameters(), ppo.ValueModel(gpt(0)).parameters()) == 0


def test_frozen_blocks_and_embeddings_stay_those_of_pi_ref():
    """frozen = 1, in a model of one block  =>  of pi_theta, only the last LayerNorm moves"""
    config = replace(LONG, iterations=2, batch_size=8, frozen=1)
    pi_theta, _ = train(config)
    before = gpt(0).state_dict()
    for name, weight in pi_theta.state_dict().items():
        assert torch.equal(weight, before[name]) == name.startswith(("wte", "wpe", "h.0.")), name


def test_a_seed_determines_the_policy():
    """The same seed  =>  the same parameters. Another seed  =>  others, also with a single prompt,
    where only the samples can differ"""
    config = replace(LONG, iterations=2, batch_size=8)
    a, b = (train(config, seed)[0].parameters() for seed in (1, 1))
    assert distance(a, b) == 0
    for prompts in (PROMPTS, [[0]]):
        a, b = (train(config, seed, prompts)[0].parameters() for seed in (1, 2))
        assert distance(a, b) > 0


@pytest.fixture(scope="module")
def trained():
    return train(LONG)


def test_ppo_with_the_true_reward_approaches_the_optimal_policy(trained):
    """PPO-GT, beta fixed  =>  KL(pi_theta, tilt) < KL(pi_ref, tilt) / 30.  Eq. 4"""
    assert distance_from_optimum(trained[0]) < 1 / 30


def test_metrics_are_what_enumeration_says(trained):
    """Mean reward, KL and length of the samples  =>  E r, KL(pi_theta, pi_ref) and E |y| within
    sampling error, averaged over prompts"""
    pi_theta, metrics = trained
    logps = [enumerated(pi_theta, x) for x in PROMPTS]
    lengths = [number([len(y) for y in responses(x)]) for x in PROMPTS]
    for name, of in (("reward", map(exact_reward, PROMPTS)), ("length", lengths)):
        expected = sum(map(mean, logps, of)) / 2
        assert abs(metrics[name] - expected) < 0.15, name
    assert abs(metrics["kl"] - exact_kl(pi_theta)) < 0.1
    assert metrics["beta"] == 1.0 and 0 <= metrics["clip_fraction"] < 0.2


def test_controller_finds_its_target():
    """beta adapted  =>  KL(pi_theta, pi_ref) ends within a fifth of the target"""
    target = 0.1
    beta = ppo.initial_beta(target)
    pi_theta, _ = train(replace(LONG, batch_size=256, beta=beta, target_kl=target))
    assert abs(exact_kl(pi_theta) - target) < 0.2 * target
