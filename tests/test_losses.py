"""What characterises each loss of beyond/losses.py, and a restatement of each from scratch, in plain loops over tokens."""
import copy
import inspect
import math
import random
import re
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import data
import dpo
import train
from beyond import losses
from beyond.pairs import rankings
from worlds import (LN_2, World, assert_at_most, assert_same, betas, bigram, gpt, log_probability, margins, mild_worlds,
                    minimise, pairs, population, preferences, seeds, shifts, triplets, uniform)

ROOT = Path(__file__).parents[1]
NAMES = list(losses.LOSSES)
SINGLE = 1e-5

noises = st.integers(1, 9).map(lambda k: k / 20)                    # epsilon in [.05, .45]
parts = st.integers(0, 10).map(lambda k: k / 10)                    # in [0, 1]
offsets = st.integers(1, 40).map(lambda k: k / 10)
hypers = st.builds(lambda beta, epsilon, alpha, lam, gamma: dict(
    beta=beta, tau=beta, epsilon=epsilon, alpha=alpha, lam=lam, lam_D=1 + lam, lam_U=2 - lam, gamma=gamma),
    betas, noises, parts, parts, offsets)


# ---------------------------------------------------------------------------------------------- what losses are tried on

def at(*log_ratios, weight=(1.0,), pairs=((0, 0, 1),)):
    """One prompt whose completions, of one token each, have these log-ratios; the first is y_w and the second y_l."""
    pi_theta = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in log_ratios])[None, :, None]
    K = len(log_ratios)
    return pi_theta, dpo.Preferences(torch.zeros(1, K, 1, dtype=torch.long), torch.ones(1, K, 1, dtype=torch.bool),
                                     torch.zeros(1, K, 1, dtype=torch.float64), torch.tensor(pairs),
                                     torch.tensor(weight, dtype=torch.float64))


def both_orders(p: float) -> dict:
    """y_w wins with probability p."""
    return dict(pairs=((0, 0, 1), (0, 1, 0)), weight=(p, 1 - p))


def mean_loss(loss, pi_theta, batch) -> torch.Tensor:
    return (batch.weight * loss(pi_theta, batch)[0]).sum()


def slope(loss, *log_ratios, **labels) -> torch.Tensor:
    """d mean loss / d log-ratio of each completion."""
    v = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(mean_loss(loss, *at(*v, **labels)), v)[0]


def in_batch(p):
    """The arguments of `dpo.dpo_loss`, as pi_theta (B, 2, 1) and a batch of B prompts."""
    theta, ref = (torch.stack(sides, 1)[..., None] for sides in ((p.pi_theta_w, p.pi_theta_l), (p.pi_ref_w, p.pi_ref_l)))
    x = torch.arange(len(theta))
    return theta, dpo.Preferences(torch.zeros_like(theta).long(), torch.ones_like(theta).bool(), ref,
                                  torch.stack((x, 0 * x, 0 * x + 1), 1), torch.ones_like(p.pi_ref_w))


def tokens(seed: int, lengths: str = "drawn"):
    """Log-probabilities of single tokens, and a batch: completions of drawn lengths or of four tokens each, not as many
    for each prompt, and for each one more that no pair names."""
    found = triplets(seed)
    if lengths == "equal":
        found = [t | {name: (t[name] * 4)[:4] for name in ("chosen_ids", "rejected_ids")} for t in found]
    ids, mask, of, weight = data.group(found)
    ids, mask = (torch.cat((v, v[:, :1]), 1) for v in (ids, mask))
    theta, ref = (uniform(mask.shape, -4.0, 0.0, 2 * seed + i).masked_fill(~mask, 0.0) for i in (0, 1))
    return theta, dpo.Preferences(ids, mask, ref, of, weight.double())


def ranked(batch: dpo.Preferences, seed: int) -> dpo.Preferences:
    """The same completions, all pairs of one shuffled ranking for each prompt."""
    rng, of = random.Random(seed), []
    for p in range(len(batch.ids)):
        order = sorted({k for x, *ks in batch.pairs.tolist() if x == p for k in ks})
        rng.shuffle(order)
        of += [(p, w, l) for i, w in enumerate(order) for l in order[i + 1:]]
    assume(of)
    return replace(batch, pairs=torch.tensor(of), weight=torch.ones(len(of), dtype=torch.float64))


def loss_of(name: str, hyper: dict):
    loss = losses.LOSSES[name]
    return partial(loss, **{key: hyper[key] for key in list(inspect.signature(loss).parameters)[2:]})


def batch_for(name: str, seed: int):
    theta, batch = tokens(seed)
    return theta, ranked(batch, seed) if name == "plackett_luce" else batch


# ---------------------------------------------------------------------------------------------- restated from scratch

def s(u):
    return 1 / (1 + math.exp(-u))


def ratio(g, p, k):
    total = 0.0
    for theta, ref in g.tokens[p][k]:
        total += theta - ref
    return total


def nats_a_token(g, p, k):
    total = 0.0
    for theta, _ in g.tokens[p][k]:
        total += theta
    return total / len(g.tokens[p][k])


def dpo_again(g, p, w, l, beta):
    return -math.log(s(beta * ratio(g, p, w) - beta * ratio(g, p, l)))


def cdpo_again(g, p, w, l, beta, epsilon):
    return (1 - epsilon) * dpo_again(g, p, w, l, beta) + epsilon * dpo_again(g, p, l, w, beta)


def robust_again(g, p, w, l, beta, epsilon):
    right, wrong = dpo_again(g, p, w, l, beta), dpo_again(g, p, l, w, beta)
    return right * (1 - epsilon) / (1 - 2 * epsilon) - wrong * epsilon / (1 - 2 * epsilon)


def ipo_again(g, p, w, l, tau):
    return (ratio(g, p, w) - ratio(g, p, l) - 0.5 / tau) ** 2


def hinge_again(g, p, w, l, beta):
    margin = beta * (ratio(g, p, w) - ratio(g, p, l))
    return 1 - margin if margin < 1 else 0.0


def kto_again(g, p, w, l, beta, lam_D, lam_U):
    paired = {(x, k) for x, *ks in g.pairs for k in ks}
    others = [ratio(g, x, k) for x, row in enumerate(g.tokens) for k, y in enumerate(row) if y and (x, k) not in paired]
    z_0 = max(0.0, sum(others) / len(others))
    v_w, v_l = lam_D * s(beta * (ratio(g, p, w) - z_0)), lam_U * s(beta * (z_0 - ratio(g, p, l)))
    return ((lam_D - v_w) + (lam_U - v_l)) / 2


def sppo_hard_again(g, p, w, l, beta):
    return (ratio(g, p, w) - 0.5 / beta) ** 2 + (ratio(g, p, l) + 0.5 / beta) ** 2


def sppo_again(g, p, w, l, beta):
    loss = 0.0
    for y in (w, l):
        won = sum(m for m, (x, i, _) in zip(g.weight, g.pairs) if (x, i) == (p, y))
        played = won + sum(m for m, (x, _, j) in zip(g.weight, g.pairs) if (x, j) == (p, y))
        loss += (ratio(g, p, y) - (won / played - 0.5) / beta) ** 2
    return loss


def log_odds(g, p, k):
    probability = math.exp(nats_a_token(g, p, k))
    return math.log(probability / (1 - probability))


def orpo_again(g, p, w, l, lam):
    return -nats_a_token(g, p, w) - lam * math.log(s(log_odds(g, p, w) - log_odds(g, p, l)))


def simpo_again(g, p, w, l, beta, gamma):
    return -math.log(s(beta * nats_a_token(g, p, w) - beta * nats_a_token(g, p, l) - gamma))


def dpop_again(g, p, w, l, beta, lam):
    fallen = -ratio(g, p, w) if ratio(g, p, w) < 0 else 0.0
    return -math.log(s(beta * (ratio(g, p, w) - ratio(g, p, l) - lam * fallen)))


def r_dpo_again(g, p, w, l, beta, alpha):
    longer = len(g.tokens[p][w]) - len(g.tokens[p][l])
    return -math.log(s(beta * ratio(g, p, w) - beta * ratio(g, p, l) + alpha * longer))


def desensitised(g, p, k, other, alpha):
    total = 0.0
    for t, (theta, ref) in enumerate(g.tokens[p][k]):
        total += (theta - ref) * (1 if t < len(g.tokens[p][other]) else alpha)
    return total


def ld_dpo_again(g, p, w, l, beta, alpha):
    return -math.log(s(beta * (desensitised(g, p, w, l, alpha) - desensitised(g, p, l, w, alpha))))


def plackett_luce_again(g, p, w, l, beta):
    left, nats = {k for x, *ks in g.pairs if x == p for k in ks}, 0.0
    while left:
        first, = [k for k in left if not any((x, j) == (p, k) and i in left for x, i, j in g.pairs)]
        nats -= math.log(math.exp(beta * ratio(g, p, first)) / sum(math.exp(beta * ratio(g, p, k)) for k in left))
        left.remove(first)
    return nats


def r_hat_again(name, g, p, k, other, hyper):
    if name == "orpo":
        return log_odds(g, p, k)
    if name == "simpo":
        return hyper["beta"] * nats_a_token(g, p, k)
    if name == "ld_dpo":
        return hyper["beta"] * desensitised(g, p, k, other, hyper["alpha"])
    return hyper["beta"] * ratio(g, p, k)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, hyper=hypers)
def test_each_loss_is_its_restatement(name, seed, hyper):
    """Token log-probabilities of completions of unequal lengths, some prompts with fewer => losses and both r_hat of each
    pair are what its formula says, in plain loops. pitfall 6 (a sum over tokens wherever no mean is written)"""
    hyper = hyper | dict(beta=min(hyper["beta"], 1.0), tau=min(hyper["beta"], 1.0))     # log(s(u)) is restated as it is written
    theta, batch = batch_for(name, seed)
    loss = loss_of(name, hyper)
    g = SimpleNamespace(pairs=batch.pairs.tolist(), weight=batch.weight.tolist(), tokens=[
        [list(zip(theta[p, k][batch.mask[p, k]].tolist(), batch.pi_ref[p, k][batch.mask[p, k]].tolist()))
         for k in range(theta.size(1))] for p in range(len(theta))])
    again = [(globals()[f"{name}_again"](g, p, w, l, **loss.keywords),
              r_hat_again(name, g, p, w, l, hyper), r_hat_again(name, g, p, l, w, hyper)) for p, w, l in g.pairs]
    assert_same(torch.stack(loss(theta, batch)), torch.tensor(again, dtype=torch.float64).T, 1e-8)


# ---------------------------------------------------------------------------------------------- cDPO

@given(beta=betas, epsilon=noises, off=offsets)
def test_conservative_loss_is_least_at_the_logit_of_its_confidence(beta, epsilon, off):
    """y_w always wins  =>  cDPO is stationary at h = logit(1 - epsilon) / beta, and larger elsewhere"""
    loss, h = partial(losses.cdpo, beta=beta, epsilon=epsilon), math.log((1 - epsilon) / epsilon) / beta
    assert_same(slope(loss, h, 0.0), [0.0, 0.0])
    assert mean_loss(loss, *at(h, 0.0)) < min(mean_loss(loss, *at(h + d, 0.0)) for d in (off, -off))


@given(p=pairs)
def test_conservative_loss_without_noise_is_dpo(p):
    """epsilon = 0  =>  cDPO is Eq. 7"""
    assert_same(torch.stack(losses.cdpo(*in_batch(p), p.beta, 0.0)), torch.stack(dpo.dpo_loss(*p)))


@given(p=pairs, epsilon=noises)
def test_conservative_loss_is_dpos_mean_over_flips(p, epsilon):
    """The label is flipped with probability epsilon  =>  the mean of Eq. 7 is cDPO of the clean label"""
    flipped = p._replace(pi_theta_w=p.pi_theta_l, pi_theta_l=p.pi_theta_w, pi_ref_w=p.pi_ref_l, pi_ref_l=p.pi_ref_w)
    assert_same(losses.cdpo(*in_batch(p), p.beta, epsilon)[0],
                (1 - epsilon) * dpo.dpo_loss(*p)[0] + epsilon * dpo.dpo_loss(*flipped)[0])


# ---------------------------------------------------------------------------------------------- robust DPO

@given(p=pairs, epsilon=noises)
def test_robust_loss_averages_over_flips_to_the_clean_one(p, epsilon):
    """The label is flipped with probability epsilon < 1/2  =>  the mean of robust DPO is Eq. 7 of the clean label"""
    flipped = p._replace(pi_theta_w=p.pi_theta_l, pi_theta_l=p.pi_theta_w, pi_ref_w=p.pi_ref_l, pi_ref_l=p.pi_ref_w)
    kept, turned = (losses.robust(*in_batch(q), p.beta, epsilon)[0] for q in (p, flipped))
    assert_same((1 - epsilon) * kept + epsilon * turned, dpo.dpo_loss(*p)[0])


@given(beta=betas, epsilon=noises, h=margins.map(abs).filter(bool))
def test_robust_loss_of_one_pair_has_no_lower_bound(beta, epsilon, h):
    """0 < epsilon < 1/2, z >= 0  =>  robust DPO <= [(1 - epsilon) ln 2 - epsilon z] / (1 - 2 epsilon), which has no bound"""
    loss = partial(losses.robust, beta=beta, epsilon=epsilon)
    for h in (h, 1e3 * h, 1e6 * h):
        assert_at_most(mean_loss(loss, *at(h, 0.0)), ((1 - epsilon) * LN_2 - epsilon * beta * h) / (1 - 2 * epsilon))


# ---------------------------------------------------------------------------------------------- IPO

@given(tau=betas, p=parts, off=offsets)
def test_ipo_is_least_at_a_finite_margin(tau, p, off):
    """y_w wins with probability p => IPO is stationary at h = (2p - 1) / (2 tau), which is 1 / (2 tau) at p = 1, and
    off^2 larger at a distance off. pitfall 6"""
    loss, h = partial(losses.ipo, tau=tau), (2 * p - 1) / (2 * tau)
    assert_same(slope(loss, h, 0.0, **both_orders(p)), [0.0, 0.0])
    least, *others = (mean_loss(loss, *at(h + d, 0.0, **both_orders(p))) for d in (0.0, off, -off))
    assert_same(torch.stack(others) - least, [off ** 2] * 2, 1e-6)


@given(seed=seeds, tau=betas)
def test_ipo_looks_at_sums_over_tokens(seed, tau):
    """Responses of one token each, with the log-probabilities that the whole ones had => the same IPO loss: a sum, and no
    mean. pitfall 6"""
    theta, batch = tokens(seed)
    short = replace(batch, mask=batch.mask.any(-1, keepdim=True), pi_ref=batch.pi_ref.sum(-1, keepdim=True))
    assert_same(losses.ipo(theta.sum(-1, keepdim=True), short, tau)[0], losses.ipo(theta, batch, tau)[0])


# ---------------------------------------------------------------------------------------------- hinge

@given(beta=betas, h=margins)
def test_hinge_has_no_gradient_iff_the_margin_exceeds_one(beta, h):
    """z = beta h != 1  =>  dL/dh = 0 and L = 0 iff z > 1; else dL/dh = -beta and L = 1 - z"""
    assume(abs(beta * h - 1) > 1e-6)
    loss = partial(losses.hinge, beta=beta)
    left = 0.0 if beta * h > 1 else 1.0
    assert_same(slope(loss, h, 0.0), [-left * beta, left * beta])
    assert_same(mean_loss(loss, *at(h, 0.0)), left * (1 - beta * h))


@given(beta=betas, p=parts, off=offsets)
def test_hinge_stops_at_a_margin_of_one_for_any_majority(beta, p, off):
    """y_w wins with probability p, 1/2 < p < 1  =>  the hinge is least at z = 1, whatever p"""
    assume(0.5 < p < 1.0)
    least, *others = (mean_loss(partial(losses.hinge, beta=beta), *at((1 + d) / beta, 0.0, **both_orders(p)))
                      for d in (0.0, off, -off))
    assert least < min(others)


# ---------------------------------------------------------------------------------------------- KTO

@given(beta=betas, p=parts, lam_D=offsets, lam_U=offsets, B=margins, c=margins)
def test_kto_is_linear_in_the_sigmoid_of_the_log_ratio(beta, p, lam_D, lam_U, B, c):
    """z_0 fixed, y desirable with probability p => twice the expected loss falls by p lam_D - (1 - p) lam_U per unit of
    s(beta (log-ratio - z_0)): no interior optimum, log-ratio -> +inf or -inf by that sign"""
    A, z_0 = torch.linspace(-10, 10, 5, dtype=torch.float64), max(0.0, c)
    loss = partial(losses.kto, beta=beta, lam_D=lam_D, lam_U=lam_U)
    means = torch.stack([mean_loss(loss, *at(a, B, c, **both_orders(p))) for a in A])
    u = torch.sigmoid(beta * (A - z_0))
    assert_same(2 * (means - means[0]), -(p * lam_D - (1 - p) * lam_U) * (u - u[0]))


@given(beta=betas, A=margins, B=margins, c=margins)
def test_kto_compares_with_its_reference_point_on_either_side(beta, A, B, c):
    """lam_D = lam_U = 1 => the loss is the mean of 1 - s(beta (A - z_0)) and 1 - s(beta (z_0 - B)), z_0 = max(0, c)"""
    wanted = torch.sigmoid(beta * torch.tensor([A - max(0.0, c), max(0.0, c) - B], dtype=torch.float64))
    assert_same(losses.kto(*at(A, B, c), beta)[0], (1 - wanted).mean()[None])


@given(beta=betas, A=margins, B=margins, c=margins)
def test_no_gradient_passes_through_ktos_reference_point(beta, A, B, c):
    """z_0 comes from the mismatched completion alone  =>  dL / dlog-ratio of it is 0, and of the pair is not"""
    d_A, d_B, d_c = slope(partial(losses.kto, beta=beta), A, B, c)
    assert d_A <= 0 <= d_B and d_c == 0


def scorer(pi):
    """log pi at the tokens of ids and mask (P, K, T), as `with_mismatched` asks for it."""
    def score(ids, mask):
        with torch.no_grad():
            return dpo.response_logps(pi, ids.flatten(0, 1), mask.flatten(0, 1)).view(ids.shape)
    return score


def written_out(batch: dpo.Preferences) -> list[list[tuple[list[int], list[int]]]]:
    """Each completion of each prompt as the ids of x and of y; an empty one as ([], [])."""
    return [[(row[:int(under.int().argmax())].tolist(), row[under].tolist()) for row, under in zip(ids, mask)]
            for ids, mask in zip(batch.ids, batch.mask)]


def various(seed: int, P: int) -> list[dict]:
    """Triplets whose prompts are not for the most part the same."""
    found = triplets(seed, P)
    xs = [tuple(t["prompt_ids"]) for t in {t["number"]: t for t in found}.values()]
    assume(2 * max(xs.count(x) for x in xs) <= len(xs))
    return found


@given(seed=seeds, P=st.integers(2, 6))
def test_mismatched_completions_are_those_of_other_prompts(seed, P):
    """Any prompts => each has one completion more: its own x, then what another x was answered, cut at the longest row;
    scored under pi_ref; no pair names it, in any batch; all else is as before. pitfall 30"""
    pi_ref, generator = bigram(seed), torch.Generator().manual_seed(seed)
    before = preferences(various(seed, P), pi_ref)
    after = losses.with_mismatched(before, scorer(pi_ref), generator)
    rows, T = written_out(after), before.ids.size(-1)
    for p, row in enumerate(rows):
        x, y = row[-1]
        others = [other for *real, _ in rows for x_other, other in real if other and x_other != row[0][0]]
        assert x == row[0][0] and y and any(y == other[:T - len(x)] for other in others)
        assert_same(after.pi_ref[p, -1][after.mask[p, -1]], [log_probability(pi_ref, x + y[:t], y[t:t + 1])
                                                             for t in range(len(y))], SINGLE)
    for name in ("ids", "mask", "pi_ref", "pairs", "weight"):
        kept = getattr(after, name)[:, :-1] if name in ("ids", "mask", "pi_ref") else getattr(after, name)
        assert torch.equal(kept, getattr(before, name))
    some = after[torch.arange(1, P)]
    assert (some.pairs[:, 1:] < some.ids.size(1) - 1).all() and some.mask[:, -1].any(-1).all()


def test_every_completion_of_another_prompt_can_be_the_mismatched_one():
    """Random choice, seeds 0 to 299  =>  each prompt meets each completion of the others, and none of its own"""
    found = [dict(number=n, prompt_ids=[0] * (n + 1), chosen_ids=[n, 1], rejected_ids=[n, 0], weight=1.0) for n in range(3)]
    ids, mask, *_ = data.group(found)
    seen = {(p, tuple(new[0][under[0]].tolist())) for seed in range(300) for p, (new, under) in
            enumerate(zip(*losses.mismatched(ids, mask, torch.Generator().manual_seed(seed))))}
    assert seen == {(p, (n, last)) for p in range(3) for n in range(3) if n != p for last in (0, 1)}


def test_no_mismatch_among_prompts_that_are_mostly_the_same():
    """Two of three prompts are the same  =>  ValueError"""
    found = [dict(number=n, prompt_ids=[x], chosen_ids=[0], rejected_ids=[1], weight=1.0) for n, x in enumerate((0, 0, 1))]
    with pytest.raises(ValueError, match="2 of 3 prompts are the same"):
        losses.mismatched(*data.group(found)[:2])


def test_ktos_reference_point_is_the_mean_over_mismatched_completions():
    """pi_theta != pi_ref => z_0 = max(0, mean log pi_theta / pi_ref (y'|x)) over mismatched (x, y'); the mean over the
    matched pairs, permuted or not, is another number; without mismatched completions there is none. pitfall 30"""
    pi_ref, pi_theta = gpt(0, context=8), gpt(1, context=8)
    matched = preferences(triplets(3, 6), pi_ref)
    batch = losses.with_mismatched(matched, scorer(pi_ref), torch.Generator().manual_seed(0))
    theta = scorer(pi_theta)(batch.ids, batch.mask)
    z_0 = losses.reference_point(theta, batch)
    apart = [log_probability(pi_theta, *row[-1]) - log_probability(pi_ref, *row[-1]) for row in written_out(batch)]
    assert_same(z_0, max(0.0, torch.stack(apart).mean().item()), SINGLE)
    log_ratio = (theta - batch.pi_ref).sum(-1)[:, :-1][matched.mask.any(-1)]
    permuted = log_ratio[torch.randperm(len(log_ratio), generator=torch.Generator().manual_seed(0))]
    assert z_0 > 0.1 and abs(permuted.mean().clamp(min=0) - z_0) > 0.1
    with pytest.raises(ValueError, match="with_mismatched"):
        losses.reference_point(theta[:, :-1], matched)


def test_ktos_reference_point_is_never_negative():
    """Mean log-ratio of the mismatched completions < 0  =>  z_0 = 0, as a divergence is no less"""
    assert_same(losses.reference_point(*at(1.0, 1.0, -3.0, -1.0)), 0.0)
    assert_same(losses.reference_point(*at(1.0, 1.0, 3.0, -1.0)), 1.0)


# ---------------------------------------------------------------------------------------------- SPPO

@given(beta=betas, p=parts, c=shifts)
def test_hard_sppo_pins_both_log_ratios(beta, p, c):
    """y_w wins with probability p => SPPO-hard is stationary at A = (2p - 1) / (2 beta) = -B, and 0 there at p = 1; both + c,
    which leaves the margin as it is, costs 2 c^2"""
    loss, A = partial(losses.sppo_hard, beta=beta), (2 * p - 1) / (2 * beta)
    assert_same(slope(loss, A, -A, **both_orders(p)), [0.0, 0.0])
    least, moved = (mean_loss(loss, *at(A + d, -A + d, **both_orders(p))) for d in (0.0, c))
    assert_same(torch.stack((least, moved - least)), [2 * p * (1 - p) / beta ** 2, 2 * c ** 2], 1e-6)


@given(w=mild_worlds, c=shifts)
def test_sppo_with_probabilities_pins_every_log_ratio(w, c):
    """Soft labels of all pairs => SPPO is 0 where each log-ratio is (P - 1/2) / beta, P the mean of p*(y > y') over the other
    y'; all + c costs 2 c^2 a pair"""
    batch = population(w.pi_ref, w.r)
    p = torch.sigmoid(w.r[:, None] - w.r)
    P = (p.sum(1) - 0.5) / (len(w.r) - 1)
    best = w.pi_ref + (P - 0.5) / w.beta
    assert_same(losses.sppo((best + c)[None, :, None], batch, w.beta)[0], torch.full_like(batch.weight, 2 * c ** 2))


@given(p=pairs)
def test_sppo_of_two_with_sure_labels_is_the_hard_one(p):
    """K = 2, y_w always wins  =>  P_w = 1, P_l = 0, and SPPO is SPPO-hard"""
    theta, batch = in_batch(p)
    assert_same(torch.stack(losses.sppo(theta, batch, p.beta)), torch.stack(losses.sppo_hard(theta, batch, p.beta)))


# ---------------------------------------------------------------------------------------------- ORPO and SimPO

@given(odds=margins.map(lambda h: h / 4).filter(bool), lam=offsets)
def test_log_odds_of_two_arms_are_twice_their_log_ratio(odds, lam):
    """Two responses of one token, pi_l = 1 - pi_w => the log-odds gap is 2 log pi_w / pi_l, and ORPO's loss
    -log pi_w - lam log s(2 log pi_w / pi_l)"""
    pi_w, pi_l = F.logsigmoid(torch.tensor([odds, -odds], dtype=torch.float64))
    loss, r_hat_w, r_hat_l = losses.orpo(*at(pi_w, pi_l), lam)
    assert_same(r_hat_w - r_hat_l, 2 * (pi_w - pi_l)[None])
    assert_same(loss, (-pi_w - lam * F.logsigmoid(2 * (pi_w - pi_l)))[None])


@pytest.mark.parametrize("name", ["orpo", "simpo"])
@given(seed=seeds, hyper=hypers, times=st.integers(2, 4))
def test_losses_of_means_ignore_repetition(name, seed, hyper, times):
    """Each token's log-probability occurs so many times as often => the same mean, so the same ORPO and SimPO"""
    theta, batch = tokens(seed)
    longer = replace(batch, mask=batch.mask.repeat(1, 1, times))
    loss = loss_of(name, hyper)
    assert_same(torch.stack(loss(theta.repeat(1, 1, times), longer)), torch.stack(loss(theta, batch)))


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, hyper=hypers)
def test_only_orpo_and_simpo_are_reference_free(name, seed, hyper):
    """Another pi_ref  =>  another loss, unless it is ORPO or SimPO"""
    theta, batch = batch_for(name, seed)
    loss = loss_of(name, hyper | dict(beta=0.1, tau=0.1))
    of_two = [torch.stack(loss(theta, replace(batch, pi_ref=factor * batch.pi_ref))) for factor in (1.0, 0.5)]
    assert torch.equal(*of_two) == (name in ("orpo", "simpo"))


@given(seed=seeds, beta=betas)
def test_simpo_at_equal_lengths_is_dpo_from_a_uniform_reference(seed, beta):
    """|y| = L for all y, gamma = 0  =>  SimPO is Eq. 7 with pi_ref uniform and beta / L in the place of beta"""
    theta, batch = tokens(seed, "equal")
    uniform_ref = replace(batch, pi_ref=torch.where(batch.mask, -LN_2, 0.0).double())
    assert_same(losses.simpo(theta, batch, beta, 0.0)[0], dpo.dpo(theta, uniform_ref, beta / 4)[0])


@given(A=margins, gamma=offsets)
def test_simpo_asks_for_its_margin(A, gamma):
    """One token each, beta = 1, log pi_w - log pi_l = gamma  =>  SimPO is ln 2, and falls with log pi_w"""
    loss = partial(losses.simpo, beta=1.0, gamma=gamma)
    assert_same(mean_loss(loss, *at(A + gamma, A)), LN_2)
    assert_same(slope(loss, A + gamma, A), [-0.5, 0.5])


# ---------------------------------------------------------------------------------------------- DPOP, R-DPO, LD-DPO

@given(A=margins, B=margins, beta=betas, lam=offsets)
def test_positive_loss_is_dpos_iff_the_chosen_response_has_not_fallen(A, B, beta, lam):
    """lam > 0  =>  DPOP = Eq. 7 if A >= 0, and DPOP > Eq. 7 if A < 0, by -log s moved to z + beta lam A"""
    positive, plain = (mean_loss(loss, *at(A, B)) for loss in (partial(losses.dpop, beta=beta, lam=lam),
                                                               partial(dpo.dpo, beta=beta)))
    if A >= 0:
        assert_same(positive, plain)
    else:
        assert positive > plain
    moved = beta * (A - B) + beta * lam * min(A, 0.0)
    assert_same(positive, -F.logsigmoid(torch.tensor(moved, dtype=torch.float64)))


@given(w=mild_worlds, alpha=noises, seed=seeds)
def test_length_penalised_dpo_finds_the_tilt_of_the_penalised_reward(w, alpha, seed):
    """Population labels from r, responses of drawn lengths  =>  R-DPO's only minimiser is the tilt of r - alpha |y|"""
    lengths = torch.randint(1, 5, w.r.shape, generator=torch.Generator().manual_seed(seed))
    batch, more = population(w.pi_ref, w.r), (0, 3)
    batch = replace(batch, mask=(torch.arange(4) < lengths[:, None])[None], pi_ref=F.pad(batch.pi_ref, more))

    def loss(logits):
        theta = F.pad(logits.log_softmax(-1)[None, :, None], more)
        return mean_loss(partial(losses.r_dpo, beta=w.beta, alpha=alpha), theta, batch)
    tilt, _ = dpo.optimal_policy(w.pi_ref, w.r - alpha * lengths, w.beta)
    assert_same(minimise(loss, w.pi_ref).log_softmax(-1), tilt, 1e-6)


@given(seed=seeds, beta=betas, alpha=parts)
def test_length_desensitised_dpo_is_dpo_where_nothing_is_discounted(seed, beta, alpha):
    """alpha = 1, or all responses of one length  =>  LD-DPO is Eq. 7"""
    theta, batch = tokens(seed)
    assert_same(torch.stack(losses.ld_dpo(theta, batch, beta, 1.0)), torch.stack(dpo.dpo(theta, batch, beta)))
    theta, batch = tokens(seed, "equal")
    assert_same(torch.stack(losses.ld_dpo(theta, batch, beta, alpha)), torch.stack(dpo.dpo(theta, batch, beta)))


@given(seed=seeds, beta=betas, alpha=parts)
def test_length_desensitised_dpo_discounts_the_longer_responses_tail(seed, beta, alpha):
    """LD-DPO of the pair is Eq. 7 where the tokens of either response beyond the other's length are alpha times as they
    are; with alpha = 0 they do not matter"""
    theta, batch = tokens(seed)
    loss, *_ = losses.ld_dpo(theta, batch, beta, alpha)
    for n, (p, w, l) in enumerate(batch.pairs.tolist()):
        both = min(batch.mask[p, w].sum(), batch.mask[p, l].sum())
        heads = [batch.mask[p, k] & (batch.mask[p, k].cumsum(-1) <= both) for k in (w, l)]
        of = [torch.where(head, v[p, k], alpha * v[p, k]).sum() for v in (theta, batch.pi_ref) for k, head in
              zip((w, l), heads)]
        assert_same(loss[n], dpo.dpo_loss(*of, beta)[0])


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "dpop", "ld_dpo"])
@given(seed=seeds, hyper=hypers)
def test_losses_that_compare_with_the_reference_start_at_ln_2(name, seed, hyper):
    """pi_theta = pi_ref, token by token  =>  the loss is ln 2, LD-DPO's too, as it discounts both.  pitfall 13"""
    _, batch = tokens(seed)
    loss, *_ = loss_of(name, hyper)(batch.pi_ref, batch)
    assert_same(loss, torch.full_like(loss, LN_2))


# ---------------------------------------------------------------------------------------------- Plackett-Luce

@given(p=pairs)
def test_ranking_loss_of_pairs_is_dpo(p):
    """K = 2  =>  Plackett-Luce DPO is Eq. 7.  Eq. 20"""
    assert_same(torch.stack(losses.plackett_luce(*in_batch(p), p.beta)), torch.stack(dpo.dpo_loss(*p)))


def all_rankings(w: World, probability) -> dpo.Preferences:
    """K! prompts with the same completions, one for each ranking; its pairs' weights sum to its probability."""
    orders, N = list(permutations(range(len(w.r)))), len(w.r)
    of = [(x, order[i], order[j]) for x, order in enumerate(orders) for i in range(N) for j in range(i + 1, N)]
    weight = [probability(w.r[list(order)]) / math.comb(N, 2) for order in orders for _ in range(math.comb(N, 2))]
    ones = torch.ones(len(orders), N, 1, dtype=torch.float64)
    weight = torch.stack(weight)
    return dpo.Preferences(ones.long(), ones.bool(), w.pi_ref[:, None] * ones, torch.tensor(of), weight / weight.sum())


def ranking_loss(w: World, batch: dpo.Preferences, logits) -> torch.Tensor:
    theta = logits.log_softmax(-1)[:, None].expand(len(batch.ids), -1, -1)
    return mean_loss(partial(losses.plackett_luce, beta=w.beta), theta, batch)


@given(w=mild_worlds)
def test_ranking_dpo_on_the_population_finds_the_optimal_policy(w):
    """Rankings from Plackett-Luce with r => the loss is stationary at the tilt, and larger at every other policy. Eq. 20"""
    batch = all_rankings(w, lambda r: dpo.plackett_luce(r).exp())
    tilt = dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0].requires_grad_()
    gradient, = torch.autograd.grad(ranking_loss(w, batch, tilt), tilt)
    assert_same(gradient, torch.zeros_like(gradient))
    assert ranking_loss(w, batch, tilt) < ranking_loss(w, batch, w.pi)


def test_rankings_pieced_together_from_pairs_miss_the_optimal_policy():
    """Not a theorem: labels of pairs drawn apart, kept where they make a ranking, do as well. Counterexample: r = (0, 1, 2)"""
    w = World(torch.zeros(3, dtype=torch.float64).log_softmax(-1), torch.arange(3, dtype=torch.float64), torch.zeros(3), 1.0)
    apart = all_rankings(w, lambda r: math.prod(torch.sigmoid(r[i] - r[j]) for i in range(3) for j in range(i + 1, 3)))
    tilt = dpo.optimal_policy(w.pi_ref, w.r, w.beta)[0].requires_grad_()
    assert torch.autograd.grad(ranking_loss(w, apart, tilt), tilt)[0].norm() > 0.01


@pytest.mark.parametrize("of", [((0, 0, 1), (0, 1, 2), (0, 2, 0)), ((0, 0, 1), (0, 1, 0)), ((0, 0, 1), (0, 0, 2)),
                                ((0, 0, 1), (0, 2, 3))])
def test_pairs_that_are_no_ranking_are_refused(of):
    """A cycle, both orders of a pair, a tie, two pairs apart  =>  ValueError"""
    with pytest.raises(ValueError, match="no ranking"):
        losses.plackett_luce(*at(0.0, 0.0, 0.0, 0.0, pairs=of, weight=(1.0,) * len(of)), 1.0)


# ---------------------------------------------------------------------------------------------- all of them

def test_dictionary_lists_every_loss_under_its_name():
    """A function of losses.py that gives back what a loss does  <=>  it is in LOSSES, under its own name; DPO is too"""
    found = {name: f for name, f in vars(losses).items()
             if inspect.isfunction(f) and f.__module__ == losses.__name__
             and inspect.signature(f).return_annotation == losses.PerPair}
    assert losses.LOSSES == found | {"dpo": dpo.dpo}


def test_nothing_in_the_core_imports_what_came_after():
    """dpo.py, model.py, data.py, train.py  =>  none of them imports from `beyond`"""
    assert not [name for name in ("dpo", "model", "data", "train")
                if re.search(r"^\s*(import|from) beyond", (ROOT / f"{name}.py").read_text("utf-8"), re.M)]


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, hyper=hypers)
def test_empty_completions_and_padding_are_invisible(name, seed, hyper):
    """One completion more that is empty, one position more => the same losses and r_hat, and the same gradient at each token of
    the responses; it is finite everywhere"""
    theta, batch = batch_for(name, seed)
    loss = loss_of(name, hyper)
    padded = replace(batch, **{key: F.pad(getattr(batch, key), (0, 1, 0, 1)) for key in ("ids", "mask", "pi_ref")})

    def sides(theta, batch):
        theta = theta.clone().requires_grad_()
        found = loss(theta, batch)
        gradient, = torch.autograd.grad(found[0].sum(), theta)
        assert gradient.isfinite().all()
        return torch.cat([side.detach() for side in (*found, gradient[batch.mask])])
    assert_same(sides(F.pad(theta, (0, 1, 0, 1)), padded), sides(theta, batch))


HYPER = dict(beta=0.5, tau=0.5, epsilon=0.1, alpha=0.3, lam=1.0, lam_D=1.0, lam_U=1.0, gamma=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_trains_through_the_loop(name):
    """A GPT, some prompts with fewer completions than others => dpo.train with this loss has finite records and gradients,
    and lowers the loss by a tenth at least"""
    pi_ref = gpt(0, context=8)
    score, generator = partial(train.score, pi_ref), torch.Generator().manual_seed(0)
    batch = losses.with_mismatched(preferences(triplets(3, 6), pi_ref), score, generator)
    assert not batch.mask.any(-1).all()
    one_way = (batch.pairs[:, 1] < batch.pairs[:, 2]).nonzero().flatten()               # no pair in both orders
    batch = replace(batch, pairs=batch.pairs[one_way], weight=batch.weight[one_way])
    if name == "plackett_luce":
        r = torch.where(batch.mask.any(-1), 0.0, -torch.inf)
        r[:, -1] = -torch.inf
        of, weight = rankings(r, torch.Generator().manual_seed(0))
        batch = replace(batch, pairs=of, weight=weight)
    pi_theta = copy.deepcopy(pi_ref)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.003)
    records = list(dpo.train(pi_theta, batch, loss_of(name, HYPER), optimizer, [torch.arange(len(batch.ids))] * 30))
    assert all(value.isfinite() for record in records for value in record.values())
    assert records[-1]["loss"] < records[0]["loss"] - 0.1 * records[0]["loss"].abs()
