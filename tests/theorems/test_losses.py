"""The losses of beyond/losses.py: what characterises each, and each restated from scratch.

A and B are the log-ratios log pi_theta / pi_ref of y_w and y_l, h = A - B, z = beta h, and s is the
logistic function.
"""

import copy
import inspect
import math
import random
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from worlds import (
    END,
    LN_2,
    PROMPTS,
    assert_at_most,
    assert_same,
    betas,
    enumerated,
    gpt,
    kl,
    log_probability,
    margins,
    number,
    optimiser_worlds,
    population,
    preferences,
    seeds,
    shifts,
    tilt,
    triplets,
    uniform,
)

import dpo
from beyond import losses
from beyond.pairs import rankings
from lib.io import BadInput
from model import sample

PI_REF = gpt(0, context=8)

noises = st.integers(1, 9).map(lambda k: k / 20)  # epsilon in [.05, .45]
parts = st.integers(0, 10).map(lambda k: k / 10)  # in [0, 1]
tenths = st.integers(1, 40).map(lambda k: k / 10)
parameters = st.fixed_dictionaries(
    {"beta": betas, "epsilon": noises, "alpha": parts, "lam": parts}
    | {name: tenths for name in ("lam_D", "lam_U", "gamma")}
)


# ------------------------------------------------- batches


def rows_at(*log_ratios, pairs=((0, 1),), weight=(1.0,)):
    """One prompt with completions of one token at these log-ratios. Row 0 is y_w, row 1 y_l."""
    logps = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in log_ratios])
    batch = population(torch.zeros_like(logps), torch.zeros_like(logps))
    return logps[:, None], replace(batch, pairs=torch.tensor(pairs), weight=number(weight))


def both_orders(p: float) -> dict:
    """y_w wins with probability p."""
    return {"pairs": ((0, 1), (1, 0)), "weight": (p, 1 - p)}


def mean_loss(loss, logps, batch):
    return (batch.weight * loss(logps, batch)[0]).sum()


def slope(loss, *log_ratios, **labels):
    """d mean loss / d log-ratio of each completion."""
    v = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(mean_loss(loss, *rows_at(*v, **labels)), v)[0]


def slope_in_logits(loss, logits, batch):
    """d mean loss / d logits of a softmax policy over responses. Later tokens are certain."""
    logits = logits.requires_grad_()
    logps = F.pad(logits.log_softmax(-1)[:, None], (0, batch.mask.size(1) - 1))
    return torch.autograd.grad(mean_loss(loss, logps, batch), logits)[0]


@cache
def token_batch(seed: int, length: int | None = None):
    """Drawn token log-probabilities, and a batch of which some rows are in no pair.

    Responses have random lengths, or one given length.
    """
    found = triplets(seed)
    if length:
        found = [t | {y: (t[y] * length)[:length] for y in ("y_w", "y_l")} for t in found]
    batch = preferences(found, PI_REF)
    logps, ref_logps = uniform((2, *batch.mask.shape), -4.0, 0.0, seed) * batch.mask
    even = torch.arange(0, len(batch.pairs), 2)
    pairs, weight = batch.pairs[even], batch.weight[even]
    return logps, replace(batch, ref_logps=ref_logps, pairs=pairs, weight=weight)


def ranked(batch: dpo.Preferences, seed: int) -> dpo.Preferences:
    """The same rows, with all pairs of a random ranking of each prompt's paired rows."""
    generator = torch.Generator().manual_seed(seed)
    order, _ = rankings(torch.zeros(len(batch.ids)), batch.prompt, generator)
    order = order[losses.is_paired(batch)[order].all(1)]
    return replace(batch, pairs=order, weight=number([1.0] * len(order)))


def batch_for(name: str, seed: int):
    logps, batch = token_batch(seed)
    return logps, ranked(batch, seed) if name == "plackett_luce" else batch


def loss_of(name: str, values: dict):
    loss = losses.LOSSES[name]
    names = list(inspect.signature(loss).parameters)[2:]
    return partial(loss, **{key: values[key] for key in names})


# ------------------------------------------------- each loss from scratch, in plain Python


def s(u):
    return 1 / (1 + math.exp(-u))


def nats(z):
    return -math.log(s(z))


def log_odds(m):
    return math.log(math.exp(m) / (1 - math.exp(m)))


def cut_ratio(y, other, alpha):
    """The log-ratio of y, where tokens beyond the length of the other are weighted by alpha."""
    n = len(other.ratios)
    return sum(y.ratios[:n]) + alpha * sum(y.ratios[n:])


def kto_again(p, beta, lam_D, lam_U):
    paired = {row for w, l, _ in p.pairs for row in (w, l)}
    unpaired = [y.ratio for y in p.rows if y.row not in paired]
    z_0 = max(0.0, sum(unpaired) / max(1, len(unpaired)))
    v_w = lam_D * s(beta * (p.A - z_0))
    v_l = lam_U * s(beta * (z_0 - p.B))
    return ((lam_D - v_w) + (lam_U - v_l)) / 2


def sppo_again(p, beta):
    total = 0.0
    for y in (p.w, p.l):
        won = sum(weight for w, _, weight in p.pairs if w == y.row)
        lost = sum(weight for _, l, weight in p.pairs if l == y.row)
        total += (y.ratio - (won / (won + lost) - 0.5) / beta) ** 2
    return total


def plackett_luce_again(p, beta):
    pairs = [(w, l) for w, l, _ in p.pairs if p.rows[w].prompt == p.w.prompt]
    ranking = sorted({*sum(pairs, ())}, key=lambda row: sum(l == row for _, l in pairs))
    scores = [math.exp(beta * p.rows[row].ratio) for row in ranking]
    return -sum(math.log(scores[k] / sum(scores[k:])) for k in range(len(scores)))


AGAIN = {
    "dpo": lambda p, beta: nats(beta * p.A - beta * p.B),
    "cdpo": lambda p, beta, epsilon: (1 - epsilon) * nats(beta * p.h) + epsilon * nats(-beta * p.h),
    "robust": lambda p, beta, epsilon: (
        ((1 - epsilon) * nats(beta * p.h) - epsilon * nats(-beta * p.h)) / (1 - 2 * epsilon)
    ),
    "ipo": lambda p, beta: (p.h - 0.5 / beta) ** 2,
    "hinge": lambda p, beta: max(0.0, 1 - beta * p.h),
    "kto": kto_again,
    "sppo_hard": lambda p, beta: (p.A - 0.5 / beta) ** 2 + (p.B + 0.5 / beta) ** 2,
    "sppo": sppo_again,
    "orpo": lambda p, beta: -p.w.mean + beta * nats(log_odds(p.w.mean) - log_odds(p.l.mean)),
    "simpo": lambda p, beta, gamma: nats(beta * p.w.mean - beta * p.l.mean - gamma),
    "dpop": lambda p, beta, lam: nats(beta * (p.h - lam * max(0.0, -p.A))),
    "r_dpo": lambda p, beta, alpha: nats(beta * p.h + alpha * (len(p.w.ratios) - len(p.l.ratios))),
    "ld_dpo": lambda p, beta, alpha: nats(
        beta * cut_ratio(p.w, p.l, alpha) - beta * cut_ratio(p.l, p.w, alpha)
    ),
    "plackett_luce": plackett_luce_again,
}
NAMES = sorted({*AGAIN, *losses.LOSSES})


def r_hat_again(name, y, other, beta, alpha):
    if name == "orpo":
        return log_odds(y.mean)
    if name == "simpo":
        return beta * y.mean
    return beta * (cut_ratio(y, other, alpha) if name == "ld_dpo" else y.ratio)


def in_plain_numbers(logps, batch):
    """Each pair as Python numbers: A, B, h, its rows w and l, and all rows and pairs."""
    rows = []
    for i, inside in enumerate(batch.mask):
        tokens, ratios = (x[i][inside].tolist() for x in (logps, logps - batch.ref_logps))
        numbers = dict(ratios=ratios, ratio=sum(ratios), mean=sum(tokens) / len(tokens))
        rows.append(SimpleNamespace(row=i, prompt=batch.prompt[i].item(), **numbers))
    pairs = list(zip(*batch.pairs.T.tolist(), batch.weight.tolist(), strict=True))
    for w, l in batch.pairs.tolist():
        A, B = rows[w].ratio, rows[l].ratio
        yield SimpleNamespace(A=A, B=B, h=A - B, w=rows[w], l=rows[l], rows=rows, pairs=pairs)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, values=parameters)
def test_loss_equals_its_formula(name, seed, values):
    """Responses of unequal lengths, prompts with unequal numbers of them  =>  losses and r_hat of
    each pair equal the formula in plain loops, with a sum over tokens unless it says mean.
    pitfalls 5, 6"""
    values = values | {"beta": min(values["beta"], 1.0)}  # plain log(s(u)) overflows early
    logps, batch = batch_for(name, seed)
    loss, beta, alpha = loss_of(name, values), values["beta"], values["alpha"]
    expected = []
    for p in in_plain_numbers(logps, batch):
        r_hat_w = r_hat_again(name, p.w, p.l, beta, alpha)
        r_hat_l = r_hat_again(name, p.l, p.w, beta, alpha)
        expected.append((AGAIN[name](p, **loss.keywords), r_hat_w, r_hat_l))
    assert_same(torch.stack(loss(logps, batch)), number(expected).T, 1e-8)


# ------------------------------------------------- noisy labels


@given(beta=betas, epsilon=noises, h=margins.map(abs).filter(bool))
def test_robust_loss_of_one_pair_has_no_lower_bound(beta, epsilon, h):
    """z >= 0  =>  the robust loss <= [(1 - epsilon) ln 2 - epsilon z] / (1 - 2 epsilon) -> -inf"""
    loss = partial(losses.robust, beta=beta, epsilon=epsilon)
    for scale in (1, 1e3, 1e6):
        bound = (1 - epsilon) * LN_2 - epsilon * beta * scale * h
        assert_at_most(mean_loss(loss, *rows_at(scale * h, 0.0)), bound / (1 - 2 * epsilon))
    with pytest.raises(BadInput, match="epsilon"):
        losses.robust(*rows_at(h, 0.0), beta, 0.5)


# ------------------------------------------------- IPO and hinge


@given(beta=betas, p=parts, off=tenths)
def test_ipo_is_smallest_at_a_finite_margin(beta, p, off):
    """y_w wins with probability p  =>  IPO has its minimum at h = (2p - 1) / (2 beta), and exceeds
    it by d^2 at a distance d"""
    loss, h = partial(losses.ipo, beta=beta), (2 * p - 1) / (2 * beta)
    assert_same(slope(loss, h, 0.0, **both_orders(p)), [0.0, 0.0])
    least, *others = (
        mean_loss(loss, *rows_at(h + d, 0.0, **both_orders(p))) for d in (0.0, off, -off)
    )
    assert_same(torch.stack(others) - least, [off**2] * 2, 1e-6)


@given(beta=betas, p=parts, h=margins)
def test_hinge_on_certain_labels_has_no_gradient_iff_the_margin_exceeds_one(beta, p, h):
    """y_w wins with probability p, z = beta h  =>  dL/dz = (1 - p) [z > -1] - p [z < 1].
    So p = 1: none iff z > 1.  1/2 < p < 1: the loss falls up to z = 1, and then rises"""
    z = beta * h
    assume(abs(abs(z) - 1) > 1e-6)
    expected = beta * ((1 - p) * (z > -1) - p * (z < 1))
    found = slope(partial(losses.hinge, beta=beta), h, 0.0, **both_orders(p))
    assert_same(found, [expected, -expected])


# ------------------------------------------------- KTO


@given(beta=betas, p=parts, lam_D=tenths, lam_U=tenths, B=margins, c=margins)
def test_kto_is_linear_in_the_sigmoid_of_the_log_ratio(beta, p, lam_D, lam_U, B, c):
    """z_0 fixed, y desirable with probability p  =>  twice the expected loss falls by
    p lam_D - (1 - p) lam_U per unit of s(beta (A - z_0)): no interior optimum"""
    A, z_0 = torch.linspace(-10, 10, 5, dtype=torch.float64), max(0.0, c)
    loss = partial(losses.kto, beta=beta, lam_D=lam_D, lam_U=lam_U)
    means = torch.stack([mean_loss(loss, *rows_at(a, B, c, **both_orders(p))) for a in A])
    u = torch.sigmoid(beta * (A - z_0))
    assert_same(2 * (means - means[0]), -(p * lam_D - (1 - p) * lam_U) * (u - u[0]))


@given(beta=betas, A=margins, B=margins, c=margins)
def test_no_gradient_passes_through_the_reference_point_of_kto(beta, A, B, c):
    """z_0 comes from the unpaired row alone  =>  the gradient is 0 there, and not at the pair"""
    z_0 = max(c, 0.0)
    d_A, d_B, d_c = slope(partial(losses.kto, beta=beta), z_0 + A / 4, z_0 + B / 4, c)
    assert d_A < 0 < d_B and d_c == 0


def test_reference_point_of_kto_is_zero_without_unpaired_rows():
    """Every row is in a pair  =>  z_0 = 0"""
    assert_same(losses.reference_point(*rows_at(1.0, 1.0)), 0.0)


@given(counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=5))
def test_reference_point_is_the_kl_only_if_responses_come_from_the_policy(counts):
    """y' as often as pi_theta samples it  =>  z_0 = KL(pi_theta, pi_ref).
    y' as often as pi_ref samples it  =>  the mean is -KL(pi_ref, pi_theta) <= 0, so z_0 = 0.
    Probabilities are ratios of integers, so the frequencies are exact.  pitfall 30"""
    theta, ref = (torch.tensor(side) for side in zip(*counts, strict=True))
    logp, ref_logp = ((n.double() / n.sum()).log() for n in (theta, ref))
    found = []
    for times in (theta, ref):
        y = torch.arange(len(times)).repeat_interleave(times)
        batch = rows_at(1.0, 1.0, *(logp - ref_logp)[y])
        found += [losses.unpaired_log_ratio(*batch), losses.reference_point(*batch)]
    forward = kl(logp, ref_logp)
    assert_same(torch.stack(found), [forward, forward, -kl(ref_logp, logp), 0.0])


def scorer(pi):
    return lambda ids, mask: dpo.response_logps(pi, ids, mask).detach()


@given(seed=seeds, P=st.integers(2, 6))
def test_mismatched_rows_are_completions_of_other_prompts(seed, P):
    """Each prompt gets one more row: its own x, then a completion of another x, cut at T, scored
    under pi_ref. No pair names it, and everything else is unchanged.  pitfall 30"""
    found = triplets(seed, P)
    before, prompts = preferences(found, PI_REF), {t["prompt"]: t["x"] for t in found}
    assume(len(set(map(tuple, prompts.values()))) > 1)
    after = losses.with_mismatched(before, scorer(PI_REF), random.Random(seed))
    added = (~losses.is_paired(after)).nonzero().flatten()
    assert after.prompt[added].tolist() == sorted(prompts)
    for row, x in zip(added, prompts.values(), strict=True):
        y = after.ids[row][after.mask[row]].tolist()
        others = [t[side] for t in found if t["x"] != x for side in ("y_w", "y_l")]
        assert after.ids[row, : len(x)].tolist() == x
        assert y in [other[: before.ids.size(1) - len(x)] for other in others]
        assert_same(after.ref_logps[row].sum(), log_probability(PI_REF, x, y))
    for name in ("ids", "mask", "ref_logps", "prompt"):
        assert torch.equal(getattr(after, name)[after.pairs], getattr(before, name)[before.pairs])
    assert (after.prompt.diff() >= 0).all()


def test_equal_prompts_have_no_mismatched_completions():
    """All prompts are the same  =>  ValueError"""
    batch = preferences([t | {"x": [0]} for t in triplets(0)], PI_REF)
    with pytest.raises(ValueError, match="two different prompts"):
        losses.with_mismatched(batch, scorer(PI_REF), random.Random(0))


def test_sampled_rows_estimate_the_kl_and_mismatched_rows_do_not():
    """A GPT, 4,000 prompts  =>  z_0 of rows from pi_theta is KL(pi_theta, pi_ref) within five
    standard errors; z_0 of mismatched rows from pi_ref is 0.  pitfall 30"""
    pi_ref, pi_theta, xs = gpt(0), gpt(1), PROMPTS * 2000
    generator = torch.Generator().manual_seed(0)
    ids, mask, ref_logps = sample(pi_ref, [x for x in xs for _ in range(2)], END, 1.0, generator)
    prompt, pairs = torch.arange(len(xs)).repeat_interleave(2), torch.arange(len(ids)).view(-1, 2)
    batch = dpo.Preferences(ids, mask, ref_logps.double(), prompt, pairs, torch.ones(len(xs)))

    def z_0(batch):
        logps = scorer(pi_theta)(batch.ids, batch.mask)
        ratios = (logps - batch.ref_logps).sum(-1)[~losses.is_paired(batch)]
        assert len(ratios) == len(xs)
        return losses.reference_point(logps, batch), ratios.std() / len(xs) ** 0.5

    draw = partial(sample, pi_theta, end=END, generator=generator)
    with_samples = losses.with_samples(batch, draw, scorer(pi_ref))
    assert with_samples.ids[:, 0].tolist() == [x[0] for x in xs for _ in range(3)]
    sampled, error = z_0(with_samples)
    exact = sum(kl(enumerated(pi_theta, x), enumerated(pi_ref, x)) for x in PROMPTS) / 2
    assert abs(sampled - exact) < 5 * error and exact > 20 * error
    mismatched, _ = z_0(losses.with_mismatched(batch, scorer(pi_ref), random.Random(0)))
    assert mismatched == 0


# ------------------------------------------------- SPPO


@given(beta=betas, p=parts, c=shifts)
def test_hard_sppo_fixes_both_log_ratios(beta, p, c):
    """y_w wins with probability p  =>  SPPO-hard is smallest at A = (2p - 1) / (2 beta) = -B, where
    it is 2 p (1 - p) / beta^2; adding c to both, which leaves the margin unchanged, costs 2 c^2"""
    loss, A = partial(losses.sppo_hard, beta=beta), (2 * p - 1) / (2 * beta)
    assert_same(slope(loss, A, -A, **both_orders(p)), [0.0, 0.0])
    least, moved = (mean_loss(loss, *rows_at(A + d, -A + d, **both_orders(p))) for d in (0.0, c))
    assert_same(least, 2 * p * (1 - p) / beta**2, 1e-6)
    assert_same(moved - least, 2 * c**2, 1e-6)


@given(w=optimiser_worlds, c=shifts)
def test_sppo_with_probabilities_fixes_every_log_ratio(w, c):
    """Soft labels of all pairs  =>  SPPO is 0 if each log-ratio is (P - 1/2) / beta, where P is
    the mean of p*(y > y') over the other y'; adding c to all costs 2 c^2 per pair"""
    batch = population(w.ref_logp, w.r)
    p = torch.sigmoid(w.r[:, None] - w.r)
    P = (p.sum(1) - 0.5) / (len(w.r) - 1)
    best = w.ref_logp + (P - 0.5) / w.beta
    found, _, _ = losses.sppo((best + c)[:, None], batch, w.beta)
    assert_same(found, torch.full_like(batch.weight, 2 * c**2), 1e-8)


@given(w=optimiser_worlds, seed=seeds)
def test_hard_sppo_has_the_gradient_of_sppo_on_population_labels(w, seed):
    """Labels drawn from Bradley-Terry  =>  SPPO-hard and SPPO have the same expected gradient"""
    batch = population(w.ref_logp, w.r)
    logps = uniform((len(w.r), 1), -9.0, 0.0, seed).requires_grad_()
    found = [
        torch.autograd.grad(mean_loss(partial(loss, beta=w.beta), logps, batch), logps)[0]
        for loss in (losses.sppo_hard, losses.sppo)
    ]
    assert_same(*found, 1e-8)


# ------------------------------------------------- ORPO and SimPO


@given(odds=margins.map(lambda h: h / 4).filter(bool))
def test_log_odds_gap_of_two_responses_is_twice_their_log_ratio(odds):
    """Two responses of one token, pi_l = 1 - pi_w  =>  the log-odds gap is 2 log(pi_w / pi_l)"""
    logp_w, logp_l = F.logsigmoid(number([odds, -odds]))
    _, r_hat_w, r_hat_l = losses.orpo(*rows_at(logp_w, logp_l), 1.0)
    assert_same(r_hat_w - r_hat_l, [2 * (logp_w - logp_l)])


@given(w=optimiser_worlds)
def test_orpo_without_its_odds_term_is_fine_tuning_on_the_winners(w):
    """beta = 0, one token each  =>  the minimum of ORPO is the winners' frequencies.  Section 4"""
    batch = population(w.ref_logp, w.r)
    won, _ = losses.win_loss_weights(batch, batch.weight)
    slopes = slope_in_logits(partial(losses.orpo, beta=0.0), won.log(), batch)
    assert_same(slopes, torch.zeros_like(won))


@given(seed=seeds, beta=betas)
def test_simpo_at_equal_lengths_is_dpo_from_a_uniform_reference(seed, beta):
    """|y| = L for all y, gamma = 0  =>  SimPO is Eq. 7 with uniform pi_ref and beta / L"""
    logps, batch = token_batch(seed, length=4)
    uniform_ref = replace(batch, ref_logps=torch.where(batch.mask, -LN_2, 0.0).double())
    found = losses.simpo(logps, batch, beta, 0.0)[0]
    assert_same(found, dpo.dpo(logps, uniform_ref, beta / 4)[0])


# ------------------------------------------------- DPOP, R-DPO, LD-DPO


@given(w=optimiser_worlds, alpha=noises, seed=seeds)
def test_r_dpo_finds_the_tilt_of_the_length_penalised_reward(w, alpha, seed):
    """Population labels from r, responses of random lengths  =>  R-DPO, which is convex in the
    logits, is stationary at the tilt of r - alpha |y|"""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, w.r.shape, generator=generator).double()
    batch = population(w.ref_logp, w.r)
    mask = torch.arange(4) < lengths[:, None]
    batch = replace(batch, mask=mask, ref_logps=F.pad(batch.ref_logps, (0, 3)))
    loss = partial(losses.r_dpo, beta=w.beta, alpha=alpha)
    slopes = slope_in_logits(loss, tilt(w.ref_logp, w.r - alpha * lengths, w.beta), batch)
    assert_same(slopes, torch.zeros_like(w.r))


@given(seed=seeds, beta=betas, alpha=parts)
def test_ld_dpo_is_dpo_where_nothing_is_discounted(seed, beta, alpha):
    """alpha = 1, or all responses of one length  =>  LD-DPO is Eq. 7"""
    for batch, discount in ((token_batch(seed), 1.0), (token_batch(seed, length=4), alpha)):
        found = losses.ld_dpo(*batch, beta, discount)
        assert_same(torch.stack(found), torch.stack(dpo.dpo(*batch, beta)))


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "dpop", "ld_dpo"])
@given(seed=seeds, values=parameters)
def test_losses_on_the_margin_start_at_ln_2(name, seed, values):
    """pi_theta = pi_ref  =>  the loss is ln 2, even if LD-DPO discounts tokens.  pitfall 13"""
    _, batch = token_batch(seed)
    found, _, _ = loss_of(name, values)(batch.ref_logps, batch)
    assert_same(found, torch.full_like(found, LN_2))


# ------------------------------------------------- Plackett-Luce


def test_rankings_assembled_from_independent_pairs_miss_the_optimal_policy():
    """Not a theorem: with rankings whose pairs are labelled independently, the ranking loss is
    stationary at r_hat = r. Counterexample: r = (0, 1, 2)"""
    orders = torch.tensor(list(permutations(range(3))))
    r_hat = number([0, 1, 2]).requires_grad_()
    gaps = [r_hat[orders[:, i]] - r_hat[orders[:, j]] for i, j in combinations(range(3), 2)]
    p = torch.stack(gaps).sigmoid().prod(0).detach()
    (gradient,) = torch.autograd.grad((p * dpo.plackett_luce(r_hat[orders])).sum(), r_hat)
    assert gradient.norm() > 0.01


@pytest.mark.parametrize(
    "chosen",
    [((0, 1), (1, 2), (2, 0)), ((0, 1), (1, 0)), ((0, 1), (0, 2)), ((0, 1), (2, 3))],
    ids=["cycle", "both orders", "tie", "two separate pairs"],
)
def test_pairs_that_are_not_a_ranking_are_refused(chosen):
    """The pairs of a prompt are not those of one ranking  =>  BadInput"""
    batch = rows_at(0.0, 0.0, 0.0, 0.0, pairs=chosen, weight=(1.0,) * len(chosen))
    with pytest.raises(BadInput, match="not a ranking"):
        losses.plackett_luce(*batch, 1.0)


# ------------------------------------------------- all losses


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, values=parameters)
def test_padding_is_invisible(name, seed, values):
    """One more padded position  =>  the same losses, r_hat and gradients, which are finite"""
    logps, batch = batch_for(name, seed)
    loss = loss_of(name, values)
    wide = {key: F.pad(getattr(batch, key), (0, 1)) for key in ("ids", "mask", "ref_logps")}

    def results(logps, batch):
        leaf = logps.clone().requires_grad_()
        found = loss(leaf, batch)
        (gradient,) = torch.autograd.grad(found[0].sum(), leaf)
        assert gradient.isfinite().all()
        return torch.cat([part.detach() for part in (*found, gradient[batch.mask])])

    assert_same(results(F.pad(logps, (0, 1)), replace(batch, **wide)), results(logps, batch))


@pytest.mark.parametrize("name", NAMES)
def test_loss_trains_a_model(name):
    """A GPT and prompts with unequal numbers of completions  =>  dpo.train with this loss, at its
    default parameters, has finite metrics and lowers the loss by at least a tenth"""
    batch = ranked(preferences(triplets(3, 6), PI_REF), 0)  # no pair in both orders
    batch = losses.with_mismatched(batch, scorer(PI_REF), random.Random(0))
    pi_theta, loss = copy.deepcopy(PI_REF), partial(losses.LOSSES[name], beta=0.5)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.003)
    metrics = list(dpo.train(pi_theta, batch, loss, optimizer, [batch.prompt.unique()] * 30))
    assert all(value.isfinite() for step in metrics for value in step.values())
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    assert last < first - 0.1 * first.abs()
