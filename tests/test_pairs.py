"""Where the pairs come from: each law beside its closed form, on worlds whose every response or every draw can be listed."""
import math
import random
from collections import Counter
from functools import partial
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import data
import dpo
from beyond import pairs
from kit import tokens
from model import sample
from worlds import (END, World, assert_at_most, assert_same, enumerated, gpt, mean, mild_worlds, policy,
                    population, population_loss, responses, seeds, small_worlds, standard_errors, uniform, worlds)

LETTERS = tokens.tokenizer_of([b"a", b"b"])                       # the tokens of worlds.py, whose end token is END


def letters(texts: list[str]) -> torch.Tensor:
    """A reward that texts tell: so many nats for each b, and for each a."""
    return torch.tensor([1.0 * text.count("b") - 0.5 * text.count("a") for text in texts])


# ---------------------------------------------------------------------------------------------- online

def gradient_on_fresh_pairs(w: World, pi: torch.Tensor) -> torch.Tensor:
    """The expected gradient of DPO at pi over pairs drawn from pi itself, labelled by Bradley-Terry; nothing flows through
    the drawing."""
    drawn = [(i, j, (pi[i] + pi[j]).exp().item()) for i, j in combinations(range(len(pi)), 2)]
    logits = pi.clone().requires_grad_()
    return torch.autograd.grad(population_loss(logits.log_softmax(-1), population(w.pi_ref, w.r, drawn), w.beta), logits)[0]


@given(w=mild_worlds)
def test_optimal_policy_is_a_fixed_point_of_online_dpo(w):
    """Pairs drawn from pi_theta, labels from Bradley-Terry  =>  the expected gradient is 0 at pi_r, and nowhere else"""
    pi_r, _ = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(gradient_on_fresh_pairs(w, pi_r), torch.zeros_like(pi_r))
    assert gradient_on_fresh_pairs(w, w.pi).norm() > 1e-6


@pytest.mark.parametrize("x", [[0], [1, 0]])
def test_online_pairs_are_the_policys_own_with_bradley_terry_labels(x):
    """K = 2 => the frequency of the triplet (x, y, y') is 2 pi_theta(y|x) pi_theta(y'|x) s(r - r') within five standard
    errors; a pair of the same twice is dropped"""
    pi, n = gpt(0), 6_000
    draw = partial(sample, pi, end=END, generator=torch.Generator().manual_seed(0))
    found = pairs.online([x] * n, 2, draw, letters, LETTERS, "bt", random.Random(0))
    counts = Counter((tuple(t["chosen_ids"]), tuple(t["rejected_ids"])) for t in found)
    ys, r = responses(x), letters([data.text_of(x + y, LETTERS) for y in responses(x)]).double()
    p = enumerated(pi, x).exp()
    law = 2 * p[:, None] * p * torch.sigmoid(r[:, None] - r)
    law.fill_diagonal_(0.0)
    frequency = torch.tensor([[counts.pop((tuple(y), tuple(other)), 0) / n for other in ys] for y in ys])
    assert not counts
    assert_at_most(standard_errors(frequency, law, (law * (1 - law) / n).sqrt()), 5.0)


@given(seed=seeds, N=st.integers(1, 4))
def test_completions_stay_with_their_prompts_and_rewards(seed, N):
    """N completions each of several prompts  =>  row p of completions and of rewards is of prompt p"""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 3))] for _ in range(5)]
    completions, r = pairs.completed(prompts, N, lambda xs: [x[::-1] + [i % 2, END] for i, x in enumerate(xs)], letters,
                                     LETTERS)
    for p, x in enumerate(prompts):
        assert completions[p] == [x[::-1] + [(p * N + k) % 2, END] for k in range(N)]
        assert_same(r[p], letters([data.text_of(x + y, LETTERS) for y in completions[p]]))


# ---------------------------------------------------------------------------------------------- best and worst of N

@given(w=small_worlds, N=st.integers(1, 4))
def test_best_and_worst_of_n_have_the_laws_of_extremes(w, N):
    """All K^N draws of N, each with its probability => the best is y with probability F(y)^N - F(y-)^N, F = pi_ref(r <= r(y)),
    and the worst with G(y)^N - G(y+)^N, G = pi_ref(r >= r(y))"""
    draws = list(product(range(len(w.r)), repeat=N))
    both, both_r = pairs.best_and_worst([[[y] for y in ys] for ys in draws], w.r[torch.tensor(draws)])
    probability = w.pi_ref[torch.tensor(draws)].sum(1).exp()
    assert_same(both_r, w.r[torch.tensor(both)[..., 0]])
    for side, order in enumerate((w.r.argsort(), w.r.argsort(descending=True))):
        law = torch.zeros_like(w.r).index_add(0, torch.tensor([ys[side][0] for ys in both]), probability)
        F = w.pi_ref.exp()[order].cumsum(0)
        assert_same(law[order], F ** N - torch.cat((F.new_zeros(1), F[:-1])) ** N)


def test_best_and_worst_make_the_widest_pair():
    """Labels "argmax" of the best and the worst of N => one triplet a prompt, with gap max r - min r; none if all tie"""
    completions = [[[k] for k in (0, 1, END)], [[k] for k in (0, 1, END)]]
    r = torch.tensor([[0.5, 2.0, -1.0], [1.0, 1.0, 1.0]])
    found, _ = data.preferences([[0], [1]], *pairs.best_and_worst(completions, r), LETTERS, "argmax", random.Random(0))
    assert [(t["chosen_ids"], t["rejected_ids"]) for t in found] == [([1], [END])]
    assert found[0]["reward_chosen"] - found[0]["reward_rejected"] == 3.0


# ---------------------------------------------------------------------------------------------- rejection sampling

@given(w=worlds, above=st.integers(0, 8).map(lambda k: k / 4))
def test_accepted_law_is_the_optimal_policy(w, above):
    """y ~ pi_ref accepted with probability exp((r - r_max) / beta), r_max >= max r => the accepted law is pi_r, and the rate
    of acceptance Z exp(-r_max / beta)"""
    r_max = w.r.max() + above
    both = w.pi_ref.exp() * pairs.acceptance(w.r, w.beta, r_max)
    pi_r, log_Z = dpo.optimal_policy(w.pi_ref, w.r, w.beta)
    assert_same(both / both.sum(), pi_r.exp())
    assert_same(both.sum(), (log_Z - r_max / w.beta).exp())


def test_a_bound_that_rewards_pass_is_refused():
    """r > r_max for some y  =>  ValueError, as no probability exceeds one"""
    with pytest.raises(ValueError, match="no upper bound"):
        pairs.acceptance(torch.tensor([0.0, 1.0]), 1.0, 0.5)


def test_the_best_of_the_samples_is_no_bound():
    """Not a theorem: with the largest of N rewards for r_max the accepted law is pi_r. Counterexample: N = 2, all draws
    listed, r = (0, 1, 2); the mean reward of the accepted is too low, and not so low for N = 4"""
    pi_ref, r, beta = policy(3, 0, 1.0), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0.5
    best = mean(dpo.optimal_policy(pi_ref, r, beta)[0], r)

    def mean_of_accepted(N):
        draws = torch.tensor(list(product(range(3), repeat=N)))
        weight = pi_ref[draws].sum(1, keepdim=True).exp() * pairs.acceptance(r[draws], beta, r[draws].amax(1, keepdim=True))
        return (weight * r[draws]).sum() / weight.sum()
    assert mean_of_accepted(2) < mean_of_accepted(4) - 0.01 < best - 0.02


def test_accepted_samples_have_the_optimal_policys_frequencies():
    """N samples of pi_ref, the first K accepted kept => each is y with probability pi_r(y) within five standard errors,
    prompts with fewer are left out, and what is kept stays with its prompt and reward"""
    P, N, K, beta = 20_000, 6, 2, 1.0
    pi_ref, r = policy(4, 1, 1.0), uniform((4,), -2.0, 2.0, 2)
    drawn = torch.multinomial(pi_ref.exp(), P * N, replacement=True, generator=torch.Generator().manual_seed(0)).view(P, N)
    xs, ys, kept = pairs.accepted([[p] for p in range(P)], [[[y] for y in row] for row in drawn.tolist()], r[drawn], beta,
                                  r.max(), K, torch.Generator().manual_seed(1))
    y = torch.tensor(ys)[..., 0]
    assert_same(kept, r[y])
    assert all([of[0] in drawn[x].tolist() for of in both] == [True] * K for (x,), both in zip(xs[:200], ys))
    pi_r, log_Z = dpo.optimal_policy(pi_ref, r, beta)
    p, rate = pi_r.exp(), (log_Z - r.max() / beta).exp()
    for k in range(K):
        frequency = torch.bincount(y[:, k], minlength=4).double() / len(y)
        assert_at_most(standard_errors(frequency, p, (p * (1 - p) / len(y)).sqrt()), 5.0)
    enough = 1 - (1 - rate) ** N - N * rate * (1 - rate) ** (N - 1)
    assert_at_most(standard_errors(torch.tensor(len(xs) / P), enough, (enough * (1 - enough) / P).sqrt()), 5.0)


def test_of_a_prompt_with_too_few_accepted_nothing_is_kept():
    """beta -> 0 accepts the best alone, r_max = max r  =>  K = 1 keeps it, wherever it stands, and K = 2 nothing"""
    xs, ys = [[0], [1]], [[[0], [1], [2]], [[0], [1], [2]]]
    r = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]])
    first = pairs.accepted(xs, ys, r, 1e-6, r.amax(1, keepdim=True), 1)
    assert first[:2] == (xs, [[[1]], [[0]]]) and first[2].tolist() == [[1.0], [1.0]]
    assert pairs.accepted(xs, ys, r, 1e-6, 1.0, 2)[:2] == ([], [])


# ---------------------------------------------------------------------------------------------- rankings

@given(w=small_worlds)
def test_rankings_have_plackett_luces_frequencies(w):
    """Sorting r + Gumbel noise => each of K! rankings has probability prod_k exp r_k / sum_{j >= k} exp r_j, within five
    standard errors.  Eq. 18"""
    n, K = 4000, len(w.r)
    of, weight = pairs.rankings(w.r.expand(n, K), torch.Generator().manual_seed(0))
    wins = torch.zeros(n, K).index_put((of[:, 0], of[:, 1]), torch.ones(len(of)), accumulate=True)
    counts = Counter(map(tuple, wins.argsort(1, descending=True).tolist()))
    orders = list(permutations(range(K)))
    p = dpo.plackett_luce(w.r[torch.tensor(orders)]).exp()
    frequency = torch.tensor([counts[order] / n for order in orders], dtype=torch.float64)
    assert_at_most(standard_errors(frequency, p, (p * (1 - p) / n).sqrt().clamp(min=1 / n)), 5.0)
    assert len(of) == n * math.comb(K, 2)
    assert_same(torch.zeros(n, dtype=weight.dtype).index_add(0, of[:, 0], weight), torch.ones(n))


@given(seed=seeds)
def test_missing_completions_are_in_no_ranking(seed):
    """r = -inf where there is no completion => each prompt's pairs are all those of the others, each once, and its weights
    sum to one"""
    there = uniform((5, 4), 0.0, 1.0, seed) < 0.6
    assume(there.sum(1).max() > 1)
    of, weight = pairs.rankings(torch.where(there, 0.0, -torch.inf), torch.Generator().manual_seed(seed))
    wanted = [(p, *both) for p in range(5) for both in combinations(there[p].nonzero().flatten().tolist(), 2)]
    assert sorted((p, min(w, l), max(w, l)) for p, w, l in of.tolist()) == sorted(wanted)
    total = torch.zeros(5).index_add(0, of[:, 0], weight)
    assert_same(total, (there.sum(1) > 1).float(), 1e-6)


def test_rewards_find_their_completions_again():
    """Triplets grouped by prompt  =>  each completion has its own reward again, and where there is none it is -inf"""
    prompts, completions = [[0], [1]], [[[0, END], [1, END], [1, 1]], [[0, 0], [0, 0], [1, END]]]
    r = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.4, 0.6]])
    found, _ = data.preferences(prompts, completions, r, LETTERS, "bt", random.Random(0))
    ids, mask, of, _ = data.group(found)
    again = pairs.rewards_of(found, of, mask.shape[:2])
    for p in range(2):
        named = {tuple(y): value for y, value in zip(completions[p], r[p].tolist())}
        assert {tuple(i[m].tolist()): value for i, m, value in zip(ids[p], mask[p], again[p].tolist())} == named | (
            {(): -torch.inf} if len(named) < 3 else {})
