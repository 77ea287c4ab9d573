"""Where pairs come from: every sampling law next to its closed form or its full enumeration.

s is the logistic function, and the tilt is the optimal policy of Eq. 4.
"""

import math
import random
from collections import Counter
from functools import partial
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from worlds import (
    END,
    PROMPTS,
    assert_frequencies,
    assert_same,
    enumerated,
    gpt,
    number,
    optimiser_worlds,
    population,
    population_loss,
    responses,
    rows,
    seeds,
    small_worlds,
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


@pytest.mark.parametrize("x", PROMPTS)
def test_online_pairs_are_the_policys_own_with_bradley_terry_labels(x):
    """K = 2  =>  the pair (y, y') has frequency 2 pi_theta(y|x) pi_theta(y'|x) s(r - r'), within
    five standard errors"""
    pi, n, ys = gpt(0), 6_000, responses(x)
    draw = partial(sample, pi, end=END, generator=torch.Generator().manual_seed(0))
    batch = pairs.online([x] * n, 2, draw, count_reward, no_score, 0)
    named = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    chosen = [(ys.index(named[w]), ys.index(named[l])) for w, l in batch.pairs.tolist()]
    r, p = count_reward(*rows(x, ys)).double(), enumerated(pi, x).exp()
    law = 2 * p[:, None] * p * torch.sigmoid(r[:, None] - r)
    law.fill_diagonal_(0.0)
    assert_frequencies(chosen, list(product(range(len(ys)), repeat=2)), law.flatten(), n)


@given(seed=seeds, P=st.integers(1, 4), N=st.integers(2, 5), decimals=st.sampled_from([0, 2]))
def test_best_and_worst_of_n_are_those_of_each_prompt(seed, P, N, decimals):
    """N samples of each prompt  =>  its best and its worst by the reward are its pair. Samples
    whose rewards all tie give no pair"""
    r = uniform((P, N), -1.0, 1.0, seed).round(decimals=decimals)
    ids = torch.arange(P * N)[:, None]
    best, worst = r.max(1).values, r.min(1).values
    untied = (best > worst).nonzero().flatten()
    assume(len(untied))

    def draw(xs):
        return ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)

    def reward(ids, mask):
        return r.flatten()[ids[:, 0]]

    batch = pairs.online([[0]] * P, N, draw, reward, no_score, 0, which="best-worst")
    w, l = batch.ids[batch.pairs, 0].T
    assert torch.equal(w // N, untied) and torch.equal(l // N, untied)
    assert torch.equal(r.flatten()[w], best[untied])
    assert torch.equal(r.flatten()[l], worst[untied])


@pytest.mark.parametrize("which", ["all", "best-worst"])
def test_fresh_pairs_are_scored_under_the_reference(which):
    """Samples of pi_theta  =>  ref_logps are log pi_ref of the kept rows, not the sampler's"""
    draw = partial(sample, gpt(0), end=END, generator=torch.Generator().manual_seed(0))
    score = partial(dpo.response_logps, gpt(1).requires_grad_(False))
    batch = pairs.online(PROMPTS * 4, 3, draw, count_reward, score, 0, which)
    assert len(batch.pairs) > 4
    assert torch.equal(batch.ref_logps, score(batch.ids, batch.mask))


# ------------------------------------------------- rejection sampling


@given(w=worlds, above=st.integers(0, 8).map(lambda k: k / 4))
def test_accepted_law_is_the_optimal_policy(w, above):
    """y ~ pi_ref accepted with probability exp((r - r_max) / beta), r_max >= max r  =>  the
    accepted law is the tilt, and the acceptance rate is Z exp(-r_max / beta)."""
    r_max = w.r.max() + above
    both = w.ref_logp.exp() * pairs.acceptance(w.r, w.beta, r_max)
    best, log_Z = dpo.optimal_policy(w.ref_logp, w.r, w.beta)
    assert_same(both / both.sum(), best.exp())
    assert_same(both.sum(), (log_Z - r_max / w.beta).exp())


def test_a_bound_below_a_reward_is_refused():
    """r > r_max for some y  =>  ValueError, because a probability would exceed 1"""
    with pytest.raises(ValueError, match="upper bound"):
        pairs.acceptance(torch.tensor([0.0, 1.0]), 1.0, 0.5)


@given(seed=seeds, N=st.integers(1, 5), K=st.integers(1, 6), beta=st.sampled_from([1e-6, 0.5, 1e6]))
def test_rso_drops_no_prompt_and_keeps_completions_with_their_rewards(seed, N, K, beta):
    """P prompts with N >= K samples each  =>  K different completions of each prompt, for every
    beta, with their own masks, log-probabilities and rewards, and the K best as beta -> 0;
    N < K  =>  ValueError.  2309.06657"""
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
    if beta < 1e-3:
        assert torch.equal(r.sort(descending=True).values, rewards.topk(K).values)


def law_of_algorithm_1(r, beta, K, left, accepted=()):
    """The probability of each accepted set, by enumeration of the outcomes of every sweep."""
    if len(accepted) >= K:
        return {tuple(sorted(accepted[:K])): 1.0}
    law, r_max = Counter(), max(r[i] for i in left)
    for outcome in product((True, False), repeat=len(left)):
        rates = [math.exp((r[i] - r_max) / beta) for i in left]
        p = math.prod(q if accept else 1 - q for q, accept in zip(rates, outcome, strict=True))
        new = tuple(i for i, accept in zip(left, outcome, strict=True) if accept)
        rest = tuple(i for i in left if i not in new)
        if p > 0:
            for final, q in law_of_algorithm_1(r, beta, K, rest, accepted + new).items():
                law[final] += p * q
    return law


@pytest.mark.parametrize("K", [1, 2, 3])
def test_rso_has_the_law_of_its_algorithm(K):
    """Four samples, 10,000 runs  =>  each set of K has the probability that the enumeration of all
    sweeps gives it, within five standard errors"""
    r, beta, n, rng = [0.3, -0.5, 1.0, 0.2], 0.8, 10_000, random.Random(0)
    law = law_of_algorithm_1(r, beta, K, range(4))
    runs = [sorted(pairs.rejection_sampling(r, beta, K, rng)) for _ in range(n)]
    assert_frequencies(runs, list(law), number(list(law.values())))


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
    drawn, orders = wins.argsort(1, descending=True).tolist(), list(permutations(range(K)))
    assert_frequencies(drawn, orders, dpo.plackett_luce(w.r[torch.tensor(orders)]).exp())


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=seeds)
def test_a_ranking_compares_every_pair_of_a_prompt_once(sizes, seed):
    """Prompts with unequal numbers of rows  =>  every pair of a prompt occurs once, none across
    prompts, no cycle, and the weights of a prompt sum to 1"""
    prompt = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    r = uniform((len(prompt),), -2.0, 2.0, seed)
    chosen, weight = pairs.rankings(r, prompt, torch.Generator().manual_seed(seed))
    total = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, prompt[chosen[:, 0]], weight)
    assert_same(total, [float(size > 1) for size in sizes])
    expected = []
    for p in range(len(sizes)):
        own = (prompt == p).nonzero().flatten().tolist()
        expected += combinations(own, 2)
        wins = sorted(sum(w == row for w, _ in chosen.tolist()) for row in own)
        assert wins == list(range(len(own)))
    assert sorted(tuple(sorted(pair)) for pair in chosen.tolist()) == expected
