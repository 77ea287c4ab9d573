"""The losses of beyond/losses.py: what characterises each, and each restated from scratch."""

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
    World,
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
from dpo import Preferences
from lib.io import BadInput
from model import sample

NAMES = list(losses.LOSSES)
PI_REF = gpt(0, context=8)

noises = st.integers(1, 9).map(lambda k: k / 20)  # epsilon in [.05, .45]
parts = st.integers(0, 10).map(lambda k: k / 10)  # in [0, 1]
offsets = st.integers(1, 40).map(lambda k: k / 10)
parameters = st.fixed_dictionaries(
    {
        "beta": betas,
        "epsilon": noises,
        "alpha": parts,
        "lam": parts,
        "lam_D": offsets,
        "lam_U": offsets,
        "gamma": offsets,
    }
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


@cache
def token_batch(seed: int, length: int | None = None):
    """Drawn token log-probabilities, and a batch. Each prompt also has a row that no pair names.

    Responses have drawn lengths, or one given length.
    """
    found = triplets(seed)
    if length:
        found = [t | {y: (t[y] * length)[:length] for y in ("y_w", "y_l")} for t in found]
    batch = preferences(found, PI_REF)
    first = torch.tensor([batch.prompt.tolist().index(p) for p in batch.prompt.unique()])
    batch = losses.add_rows(
        batch, batch.ids[first], batch.mask[first], batch.ref_logps[first], batch.prompt[first]
    )
    logps, ref_logps = (
        uniform(batch.mask.shape, -4.0, 0.0, 2 * seed + i).masked_fill(~batch.mask, 0.0)
        for i in (0, 1)
    )
    return logps, replace(batch, ref_logps=ref_logps)


def ranked(batch: Preferences, seed: int) -> Preferences:
    """The same rows, with all pairs of one random ranking per prompt."""
    rng, chosen = random.Random(seed), []
    for p in batch.prompt.unique().tolist():
        order = [row for row in batch.pairs.unique().tolist() if batch.prompt[row] == p]
        rng.shuffle(order)
        chosen += combinations(order, 2)
    return replace(batch, pairs=torch.tensor(chosen), weight=number([1.0] * len(chosen)))


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


def dpo_again(z):
    return -math.log(s(z))


def log_odds(m):
    return math.log(math.exp(m) / (1 - math.exp(m)))


def cut_ratio(tokens, n, alpha):
    """The log-ratio, where tokens from the n-th on count alpha times."""
    total = 0.0
    for t, (logp, ref_logp) in enumerate(tokens):
        total += (logp - ref_logp) * (1 if t < n else alpha)
    return total


def kto_again(y_w, y_l, g, beta, lam_D, lam_U):
    z_0 = max(0.0, sum(g.unpaired) / len(g.unpaired))
    v_w = lam_D * s(beta * (y_w.ratio - z_0))
    v_l = lam_U * s(beta * (z_0 - y_l.ratio))
    return ((lam_D - v_w) + (lam_U - v_l)) / 2


def sppo_again(y_w, y_l, g, beta):
    total = 0.0
    for y in (y_w, y_l):
        won = sum(weight for w, l, weight in g.pairs if w == y.row)
        lost = sum(weight for w, l, weight in g.pairs if l == y.row)
        total += (y.ratio - (won / (won + lost) - 0.5) / beta) ** 2
    return total


def plackett_luce_again(y_w, y_l, g, beta):
    pairs = [(w, l) for w, l, _ in g.pairs if g.rows[w].prompt == y_w.prompt]
    left = {row for pair in pairs for row in pair}
    total = 0.0
    while left:
        (first,) = [i for i in left if not any((j, i) in pairs for j in left)]
        scores = {i: math.exp(beta * g.rows[i].ratio) for i in left}
        total -= math.log(scores[first] / sum(scores.values()))
        left.remove(first)
    return total


AGAIN = {
    "dpo": lambda w, l, g, beta: dpo_again(beta * w.ratio - beta * l.ratio),
    "cdpo": lambda w, l, g, beta, epsilon: (
        (1 - epsilon) * dpo_again(beta * (w.ratio - l.ratio))
        + epsilon * dpo_again(beta * (l.ratio - w.ratio))
    ),
    "robust": lambda w, l, g, beta, epsilon: (
        dpo_again(beta * (w.ratio - l.ratio)) * (1 - epsilon) / (1 - 2 * epsilon)
        - dpo_again(beta * (l.ratio - w.ratio)) * epsilon / (1 - 2 * epsilon)
    ),
    "ipo": lambda w, l, g, beta: (w.ratio - l.ratio - 0.5 / beta) ** 2,
    "hinge": lambda w, l, g, beta: max(0.0, 1 - beta * (w.ratio - l.ratio)),
    "kto": kto_again,
    "sppo_hard": lambda w, l, g, beta: (w.ratio - 0.5 / beta) ** 2 + (l.ratio + 0.5 / beta) ** 2,
    "sppo": sppo_again,
    "orpo": lambda w, l, g, beta: -w.mean + beta * dpo_again(log_odds(w.mean) - log_odds(l.mean)),
    "simpo": lambda w, l, g, beta, gamma: dpo_again(beta * w.mean - beta * l.mean - gamma),
    "dpop": lambda w, l, g, beta, lam: dpo_again(
        beta * (w.ratio - l.ratio - lam * max(0.0, -w.ratio))
    ),
    "r_dpo": lambda w, l, g, beta, alpha: dpo_again(
        beta * (w.ratio - l.ratio) + alpha * (len(w.tokens) - len(l.tokens))
    ),
    "ld_dpo": lambda w, l, g, beta, alpha: dpo_again(
        beta * cut_ratio(w.tokens, len(l.tokens), alpha)
        - beta * cut_ratio(l.tokens, len(w.tokens), alpha)
    ),
    "plackett_luce": plackett_luce_again,
}


def r_hat_again(name, y, other, values):
    if name == "orpo":
        return log_odds(y.mean)
    if name == "simpo":
        return values["beta"] * y.mean
    if name == "ld_dpo":
        return values["beta"] * cut_ratio(y.tokens, len(other.tokens), values["alpha"])
    return values["beta"] * y.ratio


def in_plain_numbers(logps, batch):
    """The batch as Python numbers: rows with their tokens, sums and means, and pairs."""
    rows = []
    for i in range(len(logps)):
        mask = batch.mask[i]
        tokens = list(zip(logps[i][mask].tolist(), batch.ref_logps[i][mask].tolist(), strict=True))
        ratio = sum(logp - ref_logp for logp, ref_logp in tokens)
        average = sum(logp for logp, _ in tokens) / len(tokens)
        rows.append(
            SimpleNamespace(
                row=i, prompt=int(batch.prompt[i]), tokens=tokens, ratio=ratio, mean=average
            )
        )
    pairs = list(zip(*batch.pairs.T.tolist(), batch.weight.tolist(), strict=True))
    paired = {row for w, l, _ in pairs for row in (w, l)}
    unpaired = [y.ratio for y in rows if y.row not in paired]
    return SimpleNamespace(rows=rows, pairs=pairs, unpaired=unpaired)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, values=parameters)
def test_loss_is_its_formula(name, seed, values):
    """Responses of unequal lengths, prompts with unequal numbers of them  =>  losses and r_hat of
    each pair equal the formula in plain loops, with a sum over tokens unless it says mean.
    pitfalls 5, 6"""
    values = values | {"beta": min(values["beta"], 1.0)}  # plain log(s(u)) overflows early
    logps, batch = batch_for(name, seed)
    loss, g = loss_of(name, values), in_plain_numbers(logps, batch)
    expected = []
    for w, l, _ in g.pairs:
        y_w, y_l = g.rows[w], g.rows[l]
        value = AGAIN[name](y_w, y_l, g, **loss.keywords)
        r_hats = r_hat_again(name, y_w, y_l, values), r_hat_again(name, y_l, y_w, values)
        expected.append((value, *r_hats))
    assert_same(torch.stack(loss(logps, batch)), number(expected).T, 1e-8)


# ------------------------------------------------- noisy labels


@given(beta=betas, epsilon=noises, h=margins.map(abs).filter(bool))
def test_robust_loss_of_one_pair_has_no_lower_bound(beta, epsilon, h):
    """z >= 0  =>  the robust loss <= [(1 - epsilon) ln 2 - epsilon z] / (1 - 2 epsilon) -> -inf"""
    loss = partial(losses.robust, beta=beta, epsilon=epsilon)
    for scale in (1, 1e3, 1e6):
        bound = (1 - epsilon) * LN_2 - epsilon * beta * scale * h
        assert_at_most(mean_loss(loss, *rows_at(scale * h, 0.0)), bound / (1 - 2 * epsilon))


# ------------------------------------------------- IPO and hinge


@given(beta=betas, p=parts, off=offsets)
def test_ipo_is_smallest_at_a_finite_margin(beta, p, off):
    """y_w wins with probability p  =>  IPO has its minimum at h = (2p - 1) / (2 beta), and exceeds
    it by d^2 at a distance d.  pitfall 6"""
    loss, h = partial(losses.ipo, beta=beta), (2 * p - 1) / (2 * beta)
    assert_same(slope(loss, h, 0.0, **both_orders(p)), [0.0, 0.0])
    least, *others = (
        mean_loss(loss, *rows_at(h + d, 0.0, **both_orders(p))) for d in (0.0, off, -off)
    )
    assert_same(torch.stack(others) - least, [off**2] * 2, 1e-6)


@given(beta=betas, h=margins)
def test_hinge_has_no_gradient_iff_the_margin_exceeds_one(beta, h):
    """z = beta h > 1  =>  dL/dh = 0;  z < 1  =>  dL/dh = -beta"""
    assume(abs(beta * h - 1) > 1e-6)
    expected = 0.0 if beta * h > 1 else -beta
    assert_same(slope(partial(losses.hinge, beta=beta), h, 0.0), [expected, -expected])


@given(beta=betas, p=parts.filter(lambda p: 0.5 < p < 1), off=offsets)
def test_hinge_stops_at_a_margin_of_one_for_every_majority(beta, p, off):
    """y_w wins with probability p, 1/2 < p < 1  =>  the hinge loss is smallest at z = 1"""
    loss = partial(losses.hinge, beta=beta)
    least, *others = (
        mean_loss(loss, *rows_at((1 + d) / beta, 0.0, **both_orders(p))) for d in (0.0, off, -off)
    )
    assert least < min(others)


# ------------------------------------------------- KTO


@given(beta=betas, p=parts, lam_D=offsets, lam_U=offsets, B=margins, c=margins)
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
    d_A, d_B, d_c = slope(partial(losses.kto, beta=beta), A, B, c)
    assert d_A <= 0 <= d_B and d_c == 0
    if abs(A - max(c, 0)) < 5 and abs(B - max(c, 0)) < 5:
        assert d_A < 0 < d_B


def test_reference_point_of_kto_is_never_negative():
    """Mean log-ratio of the unpaired rows < 0, or no such rows  =>  z_0 = 0"""
    assert_same(losses.reference_point(*rows_at(1.0, 1.0, -3.0, -1.0)), 0.0)
    assert_same(losses.reference_point(*rows_at(1.0, 1.0)), 0.0)


@given(counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=5))
def test_reference_point_is_the_kl_only_if_responses_come_from_the_policy(counts):
    """y' as often as pi_theta samples it  =>  z_0 = KL(pi_theta, pi_ref).
    y' as often as pi_ref samples it  =>  the mean is -KL(pi_ref, pi_theta) <= 0, so z_0 = 0.
    Probabilities are ratios of integers, so the frequencies are exact.  pitfall 30"""
    theta, ref = (torch.tensor(side) for side in zip(*counts, strict=True))
    logp, ref_logp = ((n.double() / n.sum()).log() for n in (theta, ref))
    means = {}
    for name, times in {"pi_theta": theta, "pi_ref": ref}.items():
        y = torch.arange(len(times)).repeat_interleave(times)
        batch = rows_at(1.0, 1.0, *(logp - ref_logp)[y])
        means[name] = losses.unpaired_log_ratio(*batch), losses.reference_point(*batch)
    forward = kl(logp, ref_logp)
    assert_same(torch.stack(means["pi_theta"]), [forward, forward])
    assert_same(torch.stack(means["pi_ref"]), [-kl(ref_logp, logp), 0.0])


def scorer(pi):
    return lambda ids, mask: dpo.response_logps(pi, ids, mask).detach()


@given(seed=seeds, P=st.integers(2, 6))
def test_mismatched_rows_are_completions_of_other_prompts(seed, P):
    """Each prompt gets one more row: its own x, then a completion of another x, cut at T, scored
    under pi_ref. No pair names it, in any batch, and everything else is unchanged.  pitfall 30"""
    pi_ref, found = gpt(seed, context=8), triplets(seed, P)
    before, prompts = preferences(found, pi_ref), {t["prompt"]: t["x"] for t in found}
    assume(len({tuple(x) for x in prompts.values()}) > 1)
    after = losses.with_mismatched(before, scorer(pi_ref), random.Random(seed))
    added = ~losses.is_paired(after)
    assert after.prompt[added].tolist() == sorted(prompts)
    T = before.ids.size(1)
    for row in added.nonzero().flatten().tolist():
        mask = after.mask[row]
        x, y = prompts[int(after.prompt[row])], after.ids[row][mask].tolist()
        others = [t[side] for t in found if t["x"] != x for side in ("y_w", "y_l")]
        assert after.ids[row, : len(x)].tolist() == x
        assert mask.tolist() == [len(x) <= i < len(x) + len(y) for i in range(T)]
        assert y in [other[: T - len(x)] for other in others]
        assert_same(after.ref_logps[row].sum(), log_probability(pi_ref, x, y))
    for name in ("ids", "mask", "ref_logps", "prompt"):
        rows_before, rows_after = getattr(before, name), getattr(after, name)
        assert torch.equal(rows_after[~added], rows_before)
        assert torch.equal(rows_after[after.pairs], rows_before[before.pairs])
    assert (after.prompt.diff() >= 0).all()
    some = after.select(torch.arange(1, P))
    assert (~losses.is_paired(some)).sum() == P - 1


def test_every_completion_of_another_prompt_can_be_the_mismatched_one():
    """Seeds 0 to 99  =>  each prompt meets each completion of the others, and none of its own"""
    found = [
        {"prompt": n, "x": [0] * (n + 1), "y_w": [n, 1], "y_l": [n, 0], "weight": 1.0}
        for n in range(3)
    ]
    before = preferences(found, gpt(0, context=8))
    seen = set()
    for seed in range(100):
        after = losses.with_mismatched(before, lambda ids, mask: 0.0 * mask, random.Random(seed))
        added = ~losses.is_paired(after)
        ys = after.ids[added][after.mask[added]].view(-1, 2).tolist()
        seen |= {(p, *y) for p, y in zip(after.prompt[added].tolist(), ys, strict=True)}
    assert seen == {(p, n, last) for p in range(3) for n in range(3) if n != p for last in (0, 1)}


def test_equal_prompts_have_no_mismatched_completions():
    """All prompts are the same  =>  ValueError"""
    found = [{"prompt": n, "x": [0], "y_w": [0], "y_l": [1], "weight": 1.0} for n in range(2)]
    with pytest.raises(ValueError, match="two different prompts"):
        losses.with_mismatched(preferences(found, gpt(0)), scorer(gpt(0)), random.Random(0))


def test_sampled_rows_estimate_the_kl_and_mismatched_rows_do_not():
    """A GPT, 4,000 prompts  =>  z_0 of rows from pi_theta is KL(pi_theta, pi_ref) within five
    standard errors; z_0 of mismatched rows from pi_ref is 0.  pitfall 30"""
    pi_ref, pi_theta, n = gpt(0), gpt(1), 2000
    xs = PROMPTS * n
    generator = torch.Generator().manual_seed(0)
    ids, mask, ref_logps = sample(pi_ref, [x for x in xs for _ in range(2)], END, 1.0, generator)
    prompt = torch.arange(2 * n).repeat_interleave(2)
    pairs, weight = torch.arange(4 * n).view(-1, 2), torch.ones(2 * n)
    batch = Preferences(ids, mask, ref_logps.double(), prompt, pairs, weight)

    def z_0(batch):
        logps = scorer(pi_theta)(batch.ids, batch.mask)
        ratios = (logps - batch.ref_logps).sum(-1)[~losses.is_paired(batch)]
        assert len(ratios) == 2 * n
        return losses.reference_point(logps, batch), ratios.std() / len(ratios) ** 0.5

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
    """y_w wins with probability p  =>  SPPO-hard is smallest at A = (2p - 1) / (2 beta) = -B, 0 if
    p = 1; adding c to both, which leaves the margin, costs 2 c^2"""
    loss, A = partial(losses.sppo_hard, beta=beta), (2 * p - 1) / (2 * beta)
    assert_same(slope(loss, A, -A, **both_orders(p)), [0.0, 0.0])
    least, moved = (mean_loss(loss, *rows_at(A + d, -A + d, **both_orders(p))) for d in (0.0, c))
    assert_same(least, 2 * p * (1 - p) / beta**2, 1e-6)
    assert_same(moved - least, 2 * c**2, 1e-6)


@given(w=optimiser_worlds, c=shifts)
def test_sppo_with_probabilities_fixes_every_log_ratio(w, c):
    """Soft labels of all pairs  =>  SPPO is 0 iff each log-ratio is (P - 1/2) / beta, where P is
    the mean of p*(y > y') over the other y'; adding c to all costs 2 c^2 per pair"""
    batch = population(w.ref_logp, w.r)
    p = torch.sigmoid(w.r[:, None] - w.r)
    P = (p.sum(1) - 0.5) / (len(w.r) - 1)
    best = w.ref_logp + (P - 0.5) / w.beta
    found, _, _ = losses.sppo((best + c)[:, None], batch, w.beta)
    assert_same(found, torch.full_like(batch.weight, 2 * c**2), 1e-8)


@given(A=margins, B=margins, beta=betas)
def test_sppo_of_two_responses_with_certain_labels_is_the_hard_one(A, B, beta):
    """K = 2, y_w always wins  =>  P_w = 1, P_l = 0, and SPPO is SPPO-hard"""
    soft, hard = (loss(*rows_at(A, B), beta) for loss in (losses.sppo, losses.sppo_hard))
    assert_same(torch.stack(soft), torch.stack(hard))


# ------------------------------------------------- ORPO and SimPO


@given(odds=margins.map(lambda h: h / 4).filter(bool), beta=offsets)
def test_log_odds_gap_of_two_arms_is_twice_their_log_ratio(odds, beta):
    """Two responses of one token, pi_l = 1 - pi_w  =>  the log-odds gap is 2 log(pi_w / pi_l)"""
    logp_w, logp_l = F.logsigmoid(number([odds, -odds]))
    loss, r_hat_w, r_hat_l = losses.orpo(*rows_at(logp_w, logp_l), beta)
    gap = 2 * (logp_w - logp_l)
    assert_same(r_hat_w - r_hat_l, gap[None])
    assert_same(loss, (-logp_w - beta * F.logsigmoid(gap))[None])


@given(w=optimiser_worlds)
def test_orpo_without_its_odds_term_is_fine_tuning_on_the_winners(w):
    """beta = 0, one token each  =>  the minimum of ORPO is the winners' frequencies.  Section 4"""
    batch = population(w.ref_logp, w.r)
    won, _ = losses.win_loss_weights(batch, batch.weight)
    logits = won.log().requires_grad_()
    loss = mean_loss(partial(losses.orpo, beta=0.0), logits.log_softmax(-1)[:, None], batch)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_same(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["orpo", "simpo"])
@given(seed=seeds, values=parameters, times=st.integers(2, 4))
def test_losses_of_means_ignore_repetition(name, seed, values, times):
    """Every token log-probability occurs `times` times  =>  the same ORPO and SimPO"""
    logps, batch = token_batch(seed)
    loss = loss_of(name, values)
    longer = replace(
        batch, mask=batch.mask.repeat(1, times), ref_logps=batch.ref_logps.repeat(1, times)
    )
    found = loss(logps.repeat(1, times), longer)
    assert_same(torch.stack(found), torch.stack(loss(logps, batch)))


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, values=parameters)
def test_only_orpo_and_simpo_ignore_the_reference(name, seed, values):
    """Another pi_ref  =>  another loss, except for ORPO and SimPO"""
    logps, batch = batch_for(name, seed)
    loss = loss_of(name, values | {"beta": 0.1})
    other = replace(batch, ref_logps=batch.ref_logps / 2)
    same = torch.equal(torch.stack(loss(logps, batch)), torch.stack(loss(logps, other)))
    assert same == (name in ("orpo", "simpo"))


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
    """Population labels from r, responses of drawn lengths  =>  R-DPO, which is convex in the
    logits, is stationary at the tilt of r - alpha |y|"""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, w.r.shape, generator=generator).double()
    batch = population(w.ref_logp, w.r)
    mask = torch.arange(4) < lengths[:, None]
    batch = replace(batch, mask=mask, ref_logps=F.pad(batch.ref_logps, (0, 3)))
    logits = tilt(w.ref_logp, w.r - alpha * lengths, w.beta).requires_grad_()
    logps = F.pad(logits.log_softmax(-1)[:, None], (0, 3))
    loss = mean_loss(partial(losses.r_dpo, beta=w.beta, alpha=alpha), logps, batch)
    assert_same(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


@given(seed=seeds, beta=betas, alpha=parts)
def test_ld_dpo_is_dpo_where_nothing_is_discounted(seed, beta, alpha):
    """alpha = 1, or all responses of one length  =>  LD-DPO is Eq. 7"""
    for batch, discount in ((token_batch(seed), 1.0), (token_batch(seed, length=4), alpha)):
        found = losses.ld_dpo(*batch, beta, discount)
        assert_same(torch.stack(found), torch.stack(dpo.dpo(*batch, beta)))


@given(seed=seeds, beta=betas)
def test_ld_dpo_at_zero_ignores_the_longer_responses_tail(seed, beta):
    """alpha = 0  =>  no gradient at the tokens beyond the other response's length, and a gradient
    at every token before"""
    logps, batch = token_batch(seed)
    for pair in batch.pairs:
        one = replace(batch, pairs=pair[None], weight=batch.weight[:1])
        leaf = logps.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(losses.ld_dpo(leaf, one, beta, 0.0)[0].sum(), leaf)
        shared = batch.mask[pair].sum(1).min()
        mask = batch.mask[pair]
        head = mask.cumsum(1) <= shared
        assert (slopes[pair][mask & ~head] == 0).all()
        assert (slopes[pair][mask & head] != 0).all()


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "dpop", "ld_dpo"])
@given(seed=seeds, values=parameters)
def test_losses_on_the_margin_start_at_ln_2(name, seed, values):
    """pi_theta = pi_ref => the loss is ln 2, also for LD-DPO, which discounts both. pitfall 13"""
    _, batch = token_batch(seed)
    found, _, _ = loss_of(name, values)(batch.ref_logps, batch)
    assert_same(found, torch.full_like(found, LN_2))


# ------------------------------------------------- Plackett-Luce


def ranking_loss_gradient(w: World, logp, probability):
    """d mean Plackett-Luce loss / d log pi, over all rankings, which have these probabilities."""
    logp, total = logp.clone().requires_grad_(), 0.0
    for order in permutations(range(len(w.r))):
        chosen = tuple(combinations(order, 2))
        batch = rows_at(*(logp - w.ref_logp), pairs=chosen, weight=(1.0,) * len(chosen))
        total += probability(w.r[list(order)]) * losses.plackett_luce(*batch, w.beta)[0][0]
    return torch.autograd.grad(total, logp)[0]


@given(w=optimiser_worlds.filter(lambda w: len(w.r) < 4))
def test_ranking_loss_on_the_population_finds_the_optimal_policy(w):
    """Rankings drawn from Plackett-Luce with r  =>  the loss is stationary at the tilt, and not at
    another policy.  Eq. 20"""

    def probability(r):
        return dpo.plackett_luce(r).exp()

    best = tilt(w.ref_logp, w.r, w.beta)
    assert_same(ranking_loss_gradient(w, best, probability), torch.zeros_like(best))
    assert ranking_loss_gradient(w, w.logp, probability).norm() > 1e-6


def test_rankings_assembled_from_independent_pairs_miss_the_optimal_policy():
    """Not a theorem: rankings whose pairs are labelled independently do as well.
    Counterexample: r = (0, 1, 2)"""
    w = World(number([0, 0, 0]).log_softmax(-1), number([0, 1, 2]), number([0, 0, 0]), 1.0)

    def probability(r):
        return math.prod(torch.sigmoid(r[i] - r[j]) for i, j in combinations(range(3), 2))

    best = tilt(w.ref_logp, w.r, w.beta)
    assert ranking_loss_gradient(w, best, probability).norm() > 0.01


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


def test_dictionary_lists_every_loss_under_its_name():
    """A function of losses.py that returns PairLosses  <=>  it is in LOSSES; so is DPO. All take
    logps, batch and beta, and have defaults for the rest"""
    found = {
        name: f
        for name, f in inspect.getmembers(losses, inspect.isfunction)
        if f.__module__ == losses.__name__
        and inspect.signature(f).return_annotation == losses.PairLosses
    }
    assert losses.LOSSES == found | {"dpo": dpo.dpo}
    for loss in losses.LOSSES.values():
        names = inspect.signature(loss).parameters
        assert list(names)[:3] == ["logps", "batch", "beta"]
        assert all(isinstance(names[name].default, float) for name in list(names)[3:])


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
    batch = preferences(triplets(3, 6), PI_REF)
    batch = losses.with_mismatched(batch, scorer(PI_REF), random.Random(0))
    w, l = batch.pairs.T
    one_way = w < l  # no pair in both orders
    batch = replace(batch, pairs=batch.pairs[one_way], weight=batch.weight[one_way])
    if name == "plackett_luce":
        batch = ranked(batch, 0)
    pi_theta = copy.deepcopy(PI_REF)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.003)
    loss, everything = partial(losses.LOSSES[name], beta=0.5), batch.prompt.unique()
    metrics = list(dpo.train(pi_theta, batch, loss, optimizer, [everything] * 30))
    assert all(value.isfinite() for step in metrics for value in step.values())
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    assert last < first - 0.1 * first.abs()
