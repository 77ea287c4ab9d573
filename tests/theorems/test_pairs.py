"""Where pairs come from: every sampling law next to its closed form or its full enumeration."""

import math
import random
from collections import Counter
from functools import partial
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import (
    END,
    assert_at_most,
    assert_same,
    enumerated,
    gpt,
    mean,
    number,
    optimiser_worlds,
    policy,
    population,
    population_loss,
    responses,
    rows,
    seeds,
    small_worlds,
    standard_errors,
    tilt,
    uniform,
    worlds,
)

import dpo
from beyond import pairs
from model import sample


def count_reward(ids, mask):
    """One nat for each token 1 of the response, and minus half a nat for each token 0."""
    return (1.0 * ((ids == 1) & mask) - 0.5 * ((ids == 0) & mask)).sum(1)


def no_score(ids, mask):
    return torch.zeros(ids.shape)


def agree(frequency, p, n):
    """n draws have these probabilities, within five standard errors."""
    error = (p * (1 - p) / n).sqrt().clamp(min=1 / n)
    assert_at_most(standard_errors(frequency, p, error), 5.0)


# ------------------------------------------------- online DPO


def gradient_on_own_samples(w, logp):
    """The expected gradient of DPO over pairs sampled from pi itself, with Bradley-Terry labels."""
    drawn = [(i, j, (logp[i] + logp[j]).exp().item()) for i, j in combinations(range(len(logp)), 2)]
    logits, batch = logp.clone().requires_grad_(), population(w.ref_logp, w.r, drawn)
    loss = population_loss(logits.log_softmax(-1), batch, w.beta)
    return torch.autograd.grad(loss, logits)[0]


@given(w=optimiser_worlds)
def test_optimal_policy_is_a_fixed_point_of_online_dpo(w):
    """Pairs from pi_theta with Bradley-Terry labels  =>  the expected gradient is 0 at the tilt,
    and not at another policy"""
    best = tilt(w.ref_logp, w.r, w.beta)
    assert_same(gradient_on_own_samples(w, best), torch.zeros_like(best))
    assert gradient_on_own_samples(w, w.logp).norm() > 1e-6


@pytest.mark.parametrize("x", [[0], [1, 0]])
def test_online_pairs_are_the_policys_own_with_bradley_terry_labels(x):
    """K = 2  =>  the pair (y, y') has frequency 2 pi_theta(y|x) pi_theta(y'|x) s(r - r'), within
    five standard errors"""
    pi, n = gpt(0), 6_000
    generator = torch.Generator().manual_seed(0)
    draw = partial(sample, pi, end=END, generator=generator)
    batch = pairs.online([x] * n, 2, draw, count_reward, no_score, 0)
    named = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    counts = Counter((named[w], named[l]) for w, l in batch.pairs.tolist())
    ys = responses(x)
    r, p = count_reward(*rows(x, ys)).double(), enumerated(pi, x).exp()
    law = 2 * p[:, None] * p * torch.sigmoid(r[:, None] - r)
    law.fill_diagonal_(0.0)
    found = [[counts.pop((tuple(y), tuple(other)), 0) / n for other in ys] for y in ys]
    assert not counts
    agree(number(found), law, n)


# ------------------------------------------------- best and worst of N


@given(w=small_worlds, N=st.integers(2, 4))
def test_best_and_worst_of_n_have_the_laws_of_extremes(w, N):
    """All draws of N, with their probabilities  =>  the best has reward <= r(y) with probability
    F(y)^N, F = pi_ref(r <= r(y)), and the worst has reward >= r(y) with probability G(y)^N.
    Draws whose rewards all tie give no pair"""
    draws = torch.tensor(list(product(range(len(w.r)), repeat=N)))
    ids = draws.view(-1, 1)

    def draw(xs):
        assert len(xs) == len(ids)
        return ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)

    def reward(ids, mask):
        return w.r[ids[:, 0]]

    batch = pairs.online([[0]] * len(draws), N, draw, reward, no_score, 0, which="best-worst")
    p, r = w.ref_logp[draws].sum(1).exp(), w.r[draws]
    best, worst = r.max(1).values, r.min(1).values
    untied = best > worst
    assert len(batch.pairs) == untied.sum()
    best[untied], worst[untied] = w.r[batch.ids[batch.pairs, 0]].T
    for value in w.r:
        assert_same(p[best <= value].sum(), w.ref_logp.exp()[w.r <= value].sum() ** N)
        assert_same(p[worst >= value].sum(), w.ref_logp.exp()[w.r >= value].sum() ** N)


def test_fresh_pairs_are_scored_under_the_reference():
    """Samples of pi_theta  =>  ref_logps are log pi_ref of the kept rows, not the sampler's, and
    both rows of a pair are responses to one prompt"""
    pi_theta, pi_ref = gpt(0), gpt(1)
    draw = partial(sample, pi_theta, end=END, generator=torch.Generator().manual_seed(0))

    def score(ids, mask):
        return dpo.response_logps(pi_ref, ids, mask).detach()

    for which in ("all", "best-worst"):
        batch = pairs.online([[0], [1, 0]] * 4, 3, draw, count_reward, score, 0, which)
        assert torch.equal(batch.ref_logps, score(batch.ids, batch.mask))
        first_w, first_l = batch.ids[batch.pairs, 0].T
        assert torch.equal(first_w, first_l)
        r_w, r_l = count_reward(batch.ids, batch.mask)[batch.pairs].T
        assert len(r_w) > 4 and (which == "all" or (r_w > r_l).all())


# ------------------------------------------------- rejection sampling


@given(w=worlds, above=st.integers(0, 8).map(lambda k: k / 4))
def test_accepted_law_is_the_optimal_policy(w, above):
    """y ~ pi_ref accepted with probability exp((r - r_max) / beta), r_max >= max r  =>  the
    accepted law is the tilt, and the acceptance rate is Z exp(-r_max / beta).  The single pass"""
    r_max = w.r.max() + above
    both = w.ref_logp.exp() * pairs.acceptance(w.r, w.beta, r_max)
    best, log_Z = dpo.optimal_policy(w.ref_logp, w.r, w.beta)
    assert_same(both / both.sum(), best.exp())
    assert_same(both.sum(), (log_Z - r_max / w.beta).exp())


def test_a_bound_below_a_reward_is_refused():
    """r > r_max for some y  =>  ValueError, because a probability would exceed 1"""
    with pytest.raises(ValueError, match="upper bound"):
        pairs.acceptance(torch.tensor([0.0, 1.0]), 1.0, 0.5)


def test_the_best_of_the_samples_is_not_a_bound():
    """Not a theorem: with the largest of N sampled rewards as r_max the accepted law is the tilt.
    Counterexample: r = (0, 1, 2), all draws enumerated; the mean reward of the accepted samples is
    too low, and less so for N = 4 than for N = 2"""
    ref_logp, r, beta = policy(3, 0, 1.0), number([0, 1, 2]), 0.5
    best = mean(tilt(ref_logp, r, beta), r)

    def mean_reward(N):
        draws = torch.tensor(list(product(range(3), repeat=N)))
        r_max = r[draws].amax(1, keepdim=True)
        p = ref_logp[draws].sum(1, keepdim=True).exp() * pairs.acceptance(r[draws], beta, r_max)
        return (p * r[draws]).sum() / p.sum()

    assert mean_reward(2) < mean_reward(4) - 0.01 < best - 0.02


@given(seed=seeds, N=st.integers(1, 5), K=st.integers(1, 6), beta=st.sampled_from([1e-6, 0.5, 1e6]))
def test_rso_drops_no_prompt_and_keeps_completions_with_their_rewards(seed, N, K, beta):
    """P prompts with N >= K samples each  =>  K different completions of each prompt, for every
    beta, with their own masks, log-probabilities and rewards; N < K  =>  ValueError.  2309.06657"""
    P, rng = 4, random.Random(seed)
    ids = torch.arange(P * N)[:, None].repeat(1, 2)
    completions, rewards = (ids, ids % 2 == 0, -ids.double()), uniform((P, N), -2.0, 2.0, seed)
    if K > N:
        with pytest.raises(ValueError, match="cannot accept"):
            pairs.rso(completions, rewards, beta, K, rng)
        return
    (ids, mask, logps), r = pairs.rso(completions, rewards, beta, K, rng)
    rows = ids[:, 0]
    assert (rows // N).tolist() == [p for p in range(P) for _ in range(K)]
    assert len(rows.unique()) == P * K
    assert torch.equal(mask, ids % 2 == 0) and torch.equal(logps, -ids.double())
    assert torch.equal(r.flatten(), rewards.flatten()[rows])


class Never:
    """A random number generator that accepts a sample only if its probability is 1."""

    def random(self):
        return 1 - 2**-53


@given(
    r=st.lists(st.integers(-8, 8).map(lambda k: k / 4), min_size=1, max_size=8),
    K=st.integers(1, 8),
    beta=st.sampled_from([1e-3, 1.0, 10.0]),
)
def test_rso_always_accepts_the_best_of_the_samples_that_are_left(r, K, beta):
    """The worst possible random numbers  =>  the accepted samples are the K best, in descending
    order: each sweep accepts the maximum of those left, which is recomputed"""
    K = min(K, len(r))
    accepted = pairs.rejection_sampling(r, beta, K, Never())
    assert [r[i] for i in accepted] == sorted(r, reverse=True)[:K]


def law_of_algorithm_1(r, beta, K, left=None, accepted=()):
    """The probability of each accepted set, by enumeration of the outcomes of every sweep."""
    left = tuple(range(len(r))) if left is None else left
    r_max = max(r[i] for i in left)
    law = Counter()
    for outcome in product((True, False), repeat=len(left)):
        p = 1.0
        for i, accept in zip(left, outcome, strict=True):
            rate = math.exp((r[i] - r_max) / beta)
            p *= rate if accept else 1 - rate
        if p == 0:
            continue
        new = tuple(i for i, accept in zip(left, outcome, strict=True) if accept)
        total = (accepted + new)[:K]
        if len(total) == K:
            law[tuple(sorted(total))] += p
            continue
        rest = tuple(i for i in left if i not in new)
        for final, q in law_of_algorithm_1(r, beta, K, rest, total).items():
            law[final] += p * q
    return law


@pytest.mark.parametrize("K", [1, 2, 3])
def test_rso_has_the_law_of_its_algorithm(K):
    """Four samples, 10,000 runs  =>  each set of K has the probability that the enumeration of all
    sweeps gives it, within five standard errors"""
    r, beta, n, rng = [0.3, -0.5, 1.0, 0.2], 0.8, 10_000, random.Random(0)
    law = law_of_algorithm_1(r, beta, K)
    counts = Counter(tuple(sorted(pairs.rejection_sampling(r, beta, K, rng))) for _ in range(n))
    frequency = number([counts.pop(chosen, 0) / n for chosen in law])
    assert not counts
    agree(frequency, number(list(law.values())), n)


def marginal(ref_logp, r, beta, N, K):
    """The law (responses,) of a random one of the K samples accepted of N samples of pi_ref."""
    law = torch.zeros_like(r)
    for draw in product(range(len(r)), repeat=N):
        p = ref_logp[list(draw)].sum().exp()
        for chosen, q in law_of_algorithm_1(r[list(draw)].tolist(), beta, K).items():
            for i in chosen:
                law[draw[i]] += p * q / K
    return law


def test_rso_lies_between_the_reference_and_the_optimal_policy():
    """A world of three responses, all draws of N samples and all sweeps enumerated  =>  the mean
    reward of K accepted of N is between those of pi_ref and the tilt, K = N is pi_ref, and it rises
    with N"""
    ref_logp, r, beta = policy(3, 0, 1.0), number([0, 1, 2]), 0.5
    at_ref, best = mean(ref_logp, r), mean(tilt(ref_logp, r, beta), r)
    of_3, of_4 = ((marginal(ref_logp, r, beta, N, 2) * r).sum() for N in (3, 4))
    assert_same(marginal(ref_logp, r, beta, 2, 2), ref_logp.exp())
    assert at_ref + 0.01 < of_3 < of_4 - 0.01 < best - 0.02


# ------------------------------------------------- rankings


@given(w=small_worlds)
def test_rankings_have_the_law_of_plackett_luce(w):
    """Sorting r + Gumbel noise  =>  each of K! rankings has probability
    prod_k exp r_k / sum_{j >= k} exp r_j, within five standard errors.  Eq. 18"""
    n, K = 4000, len(w.r)
    prompt = torch.arange(n).repeat_interleave(K)
    generator = torch.Generator().manual_seed(0)
    chosen, _ = pairs.rankings(w.r.repeat(n), prompt, generator)
    wins = torch.bincount(chosen[:, 0], minlength=n * K).view(n, K)
    counts = Counter(map(tuple, wins.argsort(1, descending=True).tolist()))
    orders = list(permutations(range(K)))
    p = dpo.plackett_luce(w.r[torch.tensor(orders)]).exp()
    agree(number([counts[order] / n for order in orders]), p, n)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=seeds)
def test_a_ranking_compares_every_pair_of_a_prompt_once(sizes, seed):
    """Prompts with unequal numbers of rows  =>  every pair of a prompt occurs once, none across
    prompts, no cycle, and the weights of a prompt sum to 1"""
    prompt = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    r = uniform((len(prompt),), -2.0, 2.0, seed)
    chosen, weight = pairs.rankings(r, prompt, torch.Generator().manual_seed(seed))
    of_prompt = [torch.nonzero(prompt == p).flatten().tolist() for p in range(len(sizes))]
    expected = [pair for own in of_prompt for pair in combinations(own, 2)]
    assert sorted(tuple(sorted(pair)) for pair in chosen.tolist()) == sorted(expected)
    for own in of_prompt:
        wins = sorted(sum(w == row for w, _ in chosen.tolist()) for row in own)
        assert wins == list(range(len(own)))
        if len(own) > 1:
            assert_same(weight[prompt[chosen[:, 0]] == prompt[own[0]]].sum(), 1.0)
