"""beyond/ppo.py: its estimates against full enumeration, its algorithm against the closed-form optimum.

The model is that of test_enumerated_gpt.py, whose every response can be listed; so an expectation over responses is a sum, and
"unbiased" is an equation without a standard error.
"""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dpo
from beyond import ppo
from worlds import (CONTEXT, END, PROMPTS, V, assert_same, enumerated, gpt, kl, preferences, responses, rows, seeds, triplets,
                    uniform)

lams = st.integers(0, 10).map(lambda k: k / 10)


def critic_of(pi, seed: int) -> ppo.Scalar:
    """A critic that says something at every token."""
    critic = ppo.Scalar(pi)
    with torch.no_grad():
        critic.head.weight.copy_(uniform(critic.head.weight.shape, -1.0, 1.0, seed))
    return critic


def reward_of(x: list[int], seed: int) -> Tensor:
    """A reward of every response to x, (N,) nats."""
    return uniform((len(responses(x)),), -2.0, 2.0, seed)


def exact_gradient(pi, pi_ref, x: list[int], r: Tensor, beta: float) -> list[Tensor]:
    """Of E r - beta KL (Eq. 3), summed over every response."""
    logps = dpo.response_logps(pi, *rows(x, responses(x))).sum(-1)
    objective = (logps.exp() * (r - beta * (logps - enumerated(pi_ref, x)))).sum()
    return torch.autograd.grad(objective, list(pi.parameters()))


def estimated_gradient(pi, pi_ref, critic, x: list[int], r: Tensor, beta: float, lam: float) -> list[Tensor]:
    """The mean, over every response by its probability, of what one response's surrogate says at the old policy."""
    ids, mask = rows(x, responses(x))
    old, advantages, _, _ = ppo.judged(pi, pi_ref, critic, ids, mask, r, beta, lam)
    each = ppo.surrogate(dpo.response_logps(pi, ids, mask), old, advantages, 0.2)
    return torch.autograd.grad((old.sum(-1).exp() * each).sum(), list(pi.parameters()))


def exact_values(pi, pi_ref, x: list[int], r: Tensor, beta: float) -> Tensor:
    """V(x, y_<t): what responses that begin with y_<t still earn, their mean: (N, T), 0 outside the mask."""
    ys = responses(x)
    ids, mask = rows(x, ys)
    with torch.no_grad():
        old, ref = (dpo.response_logps(model, ids, mask) for model in (pi, pi_ref))
    to_come = ppo.token_rewards(r, old - ref, mask, beta).flip(-1).cumsum(-1).flip(-1)
    p, values = old.sum(-1).exp(), torch.zeros_like(old)
    for i, y in enumerate(ys):
        for t in range(len(y)):
            same = torch.tensor([other[:t] == y[:t] and len(other) > t for other in ys])
            values[i, len(x) + t] = (p * to_come[:, len(x) + t])[same].sum() / p[same].sum()
    return values


# ---------------------------------------------------------------------------------------------- the estimates

@pytest.mark.parametrize("x", PROMPTS)
def test_token_rewards_of_a_response_add_up_to_the_objectives_integrand(x):
    """sum_t r_t = r(x, y) - beta log pi(y|x) / pi_ref(y|x), and the reward stands at the last token.  Eq. 3"""
    pi, pi_ref, r, beta = gpt(0), gpt(1), reward_of(x, 2), 0.7
    ids, mask = rows(x, responses(x))
    old, ref = (dpo.response_logps(model, ids, mask).detach() for model in (pi, pi_ref))
    each = ppo.token_rewards(r, old - ref, mask, beta)
    assert_same(each.sum(-1), r - beta * (enumerated(pi, x) - enumerated(pi_ref, x)))
    assert_same(ppo.token_rewards(r, 0 * old, mask, beta)[torch.arange(len(r)), [len(x) + len(y) - 1 for y in responses(x)]], r)
    assert (each[~mask] == 0).all()


@given(seeds, lams)
def test_gae_is_its_definition(seed, lam):
    """A_t = sum_k lam^k delta_{t+k}, delta_t = r_t + V_{t+1} - V_t, V = 0 after the end, by loops"""
    ids, mask = rows([1, 0], responses([1, 0]), length=6)
    rewards, values = (uniform(mask.shape, -1.0, 1.0, seed + k).masked_fill(~mask, 0.0) for k in (0, 1))
    found = ppo.gae(rewards, values, mask, lam)
    for i, y in enumerate(responses([1, 0])):
        first, end = 2, 2 + len(y)
        delta = {t: rewards[i, t] + (values[i, t + 1] if t + 1 < end else 0.0) - values[i, t] for t in range(first, end)}
        due = [sum(lam ** (s - t) * delta[s] for s in range(t, end)) if t in delta else 0.0 for t in range(mask.size(1))]
        assert_same(found[i], torch.tensor(due, dtype=torch.float64))


@given(seeds)
def test_gae_at_one_is_what_is_still_to_come_less_the_value(seed):
    """lam = 1  =>  A_t = sum_{s >= t} r_s - V_t"""
    ids, mask = rows([0], responses([0]))
    rewards, values = (uniform(mask.shape, -1.0, 1.0, seed + k).masked_fill(~mask, 0.0) for k in (0, 1))
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    assert_same(ppo.gae(rewards, values, mask, 1.0), (to_come - values).masked_fill(~mask, 0.0))


def test_values_know_what_came_before_alone():
    """V_t is a function of x and y_<t: another y_t, or later token, leaves it alone; and it stands at token t"""
    critic = critic_of(gpt(0), 3)
    ids, mask = rows([0], responses([0]))
    values = ppo.values_of(critic, ids, mask)
    for t in range(1, CONTEXT):
        other = ids.clone()
        other[:, t:] = (other[:, t:] + 1) % V
        assert_same(ppo.values_of(critic, other, mask)[:, :t + 1].detach(), values[:, :t + 1].detach())
    assert_same(values[0, 1].detach(), critic(torch.tensor([[0]]))[0, 0].detach())


@pytest.mark.parametrize("x", PROMPTS)
def test_policy_gradient_is_unbiased_whatever_the_critic_says(x):
    """lam = 1  =>  sum_y pi(y) grad surrogate(y) = grad of E r - beta KL, at pi_theta = pi_old, for any V.  Eq. 3"""
    for seed in range(3):
        pi, pi_ref, r = gpt(3 * seed), gpt(3 * seed + 1), reward_of(x, seed)
        estimate = estimated_gradient(pi, pi_ref, critic_of(pi, seed), x, r, 0.6, 1.0)
        for left, right in zip(estimate, exact_gradient(pi, pi_ref, x, r, 0.6)):
            assert_same(left, right)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_policy_gradient_is_unbiased_at_any_lam_where_the_critic_is_right(lam):
    """V exact  =>  the same at every lam; and where it is wrong, lam = 0.5 is biased.  Eq. 3"""
    x, pi, pi_ref = [0], gpt(0), gpt(1)
    r, exact = reward_of(x, 4), exact_gradient(pi, pi_ref, x, reward_of(x, 4), 0.6)
    wrong = estimated_gradient(pi, pi_ref, critic_of(pi, 5), x, r, 0.6, lam)
    assert max((a - b).abs().max() for a, b in zip(wrong, exact)) > 1e-3
    values = exact_values(pi, pi_ref, x, r, 0.6)
    right = estimated_gradient(pi, pi_ref, lambda ids: values[:, 1:], x, r, 0.6, lam)
    for a, b in zip(right, exact):
        assert_same(a, b)


def test_surrogates_gradient_at_the_old_policy_is_the_policy_gradient():
    """pi_theta = pi_old  =>  grad surrogate = sum_t A_t grad log pi(y_t|.), of each response"""
    pi, (ids, mask) = gpt(0), rows([0], responses([0]))
    advantages = uniform(mask.shape, -1.0, 1.0, 7).masked_fill(~mask, 0.0)
    for i in range(len(ids)):
        logps = dpo.response_logps(pi, ids[i:i + 1], mask[i:i + 1])
        left = torch.autograd.grad(ppo.surrogate(logps, logps.detach(), advantages[i:i + 1], 0.2).sum(), list(pi.parameters()),
                                   retain_graph=True)
        right = torch.autograd.grad((advantages[i:i + 1] * logps).sum(), list(pi.parameters()))
        for a, b in zip(left, right):
            assert_same(a, b)


@given(seeds)
def test_surrogate_is_never_above_the_unclipped_one_and_stops_at_the_clip(seed):
    """min(rho A, clip(rho) A) <= rho A; no gradient iff rho is beyond the clip on the side that A points to"""
    log_rho, A = uniform((40,), -1.0, 1.0, seed).requires_grad_(), uniform((40,), -1.0, 1.0, seed + 1)
    each = torch.stack([ppo.surrogate(l[None], torch.zeros(1, dtype=l.dtype), a[None], 0.2) for l, a in zip(log_rho, A)])
    rho = log_rho.exp()
    assert (each <= rho * A + 1e-12).all()
    grad, = torch.autograd.grad(each.sum(), log_rho)
    stopped = ((A > 0) & (rho > 1.2)) | ((A < 0) & (rho < 0.8))
    assert_same(grad, torch.where(stopped, 0.0, rho * A).detach())


# ---------------------------------------------------------------------------------------------- the algorithm

def rewarded(x_seed: int = 2):
    """A reward of each response to each prompt, mean 0 and deviation 1 under pi_ref = gpt(0), as PPO asks it."""
    pi_ref, table, exact = gpt(0), {}, {}
    for x in PROMPTS:
        r, p = reward_of(x, x_seed), enumerated(pi_ref, x).exp()
        r = (r - (p * r).sum()) / (p * (r - (p * r).sum()).square()).sum().sqrt()
        exact[tuple(x)] = r
        table |= {(tuple(x), tuple(y)): v for y, v in zip(responses(x), r.tolist())}
    return pi_ref, exact, lambda xs, ys: torch.tensor([table[tuple(x), tuple(y)] for x, y in zip(xs, ys)])


LONG = ppo.Tuning(iterations=80, batch=512, minibatches=2, epochs=2, rate=1e-2, critic_rate=1e-2)


@pytest.fixture(scope="module")
def trained():
    pi_ref, exact, reward = rewarded()
    before = {name: w.clone() for name, w in pi_ref.state_dict().items()}
    *_, (pi_theta, seen) = ppo.ppo(pi_ref, ppo.Scalar(pi_ref), PROMPTS * 256, reward, END, 1.0, LONG, 0, beta=1.0)
    assert all((before[name] == w).all() for name, w in pi_ref.state_dict().items())
    return pi_ref, exact, pi_theta, seen


def test_ppo_with_the_true_reward_approaches_the_optimal_policy(trained):
    """PPO-GT, beta held  =>  KL(pi_theta, pi_r) is at most a thirtieth of KL(pi_ref, pi_r), for each prompt.  Eq. 4"""
    pi_ref, exact, pi_theta, _ = trained
    for x in PROMPTS:
        ref, found = enumerated(pi_ref, x), enumerated(pi_theta, x)
        pi_r, _ = dpo.optimal_policy(ref, exact[tuple(x)], 1.0)
        assert kl(found, pi_r) < kl(ref, pi_r) / 30


def test_what_ppo_reports_is_what_enumeration_says(trained):
    """The samples' mean reward and KL  =>  E r and KL(pi_theta, pi_ref), within sampling error, mean over prompts"""
    pi_ref, exact, pi_theta, seen = trained
    logps = {tuple(x): (enumerated(pi_theta, x), enumerated(pi_ref, x)) for x in PROMPTS}
    assert abs(seen["kl"] - sum(kl(*pair) for pair in logps.values()) / 2) < 0.1
    assert abs(seen["reward"] - sum((logps[x][0].exp() * r).sum() for x, r in exact.items()) / 2) < 0.15


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_the_controller_finds_its_target(target):
    """beta adapted  =>  KL(pi_theta, pi_ref) at the end is the target's, within a fifth"""
    pi_ref, _, reward = rewarded()
    *_, (pi_theta, _) = ppo.ppo(pi_ref, ppo.Scalar(pi_ref), PROMPTS * 128, reward, END, target, replace(LONG, batch=256), 0)
    found = sum(kl(enumerated(pi_theta, x), enumerated(pi_ref, x)) for x in PROMPTS) / 2
    assert abs(found - target) < 0.2 * target


def test_the_same_seed_gives_the_same_policy_and_another_does_not():
    pi_ref, _, reward = rewarded()
    short = replace(LONG, iterations=2, batch=8)
    a, b, c = (list(ppo.ppo(pi_ref, ppo.Scalar(pi_ref), PROMPTS * 8, reward, END, 1.0, short, seed))[-1][0].state_dict() for seed in (1, 1, 2))
    assert all((a[name] == b[name]).all() for name in a) and any((a[name] != c[name]).any() for name in a)


# ---------------------------------------------------------------------------------------------- the reward model

def test_scalar_model_takes_the_policys_weights_and_starts_at_zero():
    pi = gpt(0)
    r_phi = ppo.Scalar(pi)
    assert all((r_phi.state_dict()[name] == w).all() for name, w in pi.state_dict().items())
    assert (r_phi(torch.tensor([[0, 1]])) == 0).all() and r_phi.head.weight.dtype == torch.float64
    again = ppo.Scalar(critic_of(pi, 1))
    assert (again.head.weight != 0).any()


def test_last_is_the_value_at_each_responses_last_token():
    """y of n tokens after x of m  =>  the value at m + n - 1, wherever padding begins"""
    ids, mask = rows([1, 0], responses([1, 0]), length=7)
    values = torch.arange(7.0).expand(len(ids), 7)
    assert ppo.last(values, mask).tolist() == [1.0 + len(y) for y in responses([1, 0])]


def test_reward_loss_is_equation_2():
    """-log s(r_phi(x, y_w) - r_phi(x, y_l)) of each pair, r_phi read at the last token of x + y alone.  Eq. 2"""
    r_phi, found = critic_of(gpt(0, context=8), 3), triplets(5)
    batch = preferences(found, gpt(0, context=8))
    losses, right = ppo.reward_loss(r_phi, batch)

    def r(x, y):
        return r_phi(torch.tensor([x + y]))[0, -1].detach()
    gaps = torch.stack([r(t["prompt_ids"], t["chosen_ids"]) - r(t["prompt_ids"], t["rejected_ids"]) for t in found])
    assert_same(losses.detach(), -F.logsigmoid(gaps))
    assert_same(right, (gaps > 0).double())
    share = batch.weight / batch.weight.sum()
    assert abs(ppo.accuracy(r_phi, batch) - (share * right).sum().item()) < 1e-6


def learnable(P: int = 80) -> list[dict]:
    """Pairs whose better response has more of token 1."""
    found = []
    for number in range(P):
        x, ys = PROMPTS[number % 2], responses(PROMPTS[number % 2])
        y, other = ys[number % len(ys)], ys[(3 * number + 1) % len(ys)]
        if y.count(1) != other.count(1):
            w, l = sorted((y, other), key=lambda some: -some.count(1))
            found.append(dict(number=number, prompt_ids=x, chosen_ids=w, rejected_ids=l, weight=1.0))
    return found


def test_a_fitted_reward_orders_pairs_and_is_the_best_that_was_looked_at():
    """A reward that can be learned  =>  learned; of all that was looked at, the most accurate is kept"""
    preferred = preferences(learnable(), gpt(0))
    r_phi, looked = ppo.fit_reward(gpt(0), preferred, (30.0, 3e-2), 8, 0)
    assert len(looked) == 8 and {one["rate"] for one in looked} == {30.0, 3e-2}
    assert max(one["accuracy"] for one in looked) >= 0.9 and ppo.accuracy(r_phi, preferred) >= 0.9
    assert ppo.accuracy(ppo.Scalar(gpt(0)), preferred) == pytest.approx(0.5)
    xs, ys = [t["prompt_ids"] for t in learnable()], [t["chosen_ids"] for t in learnable()]
    better, worse = (ppo.reward_of(r_phi)(xs, [t[name] for t in learnable()]) for name in ("chosen_ids", "rejected_ids"))
    assert (better > worse).double().mean() >= 0.9 and better.shape == (len(ys),) and math.isfinite(better.sum())
