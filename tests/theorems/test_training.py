"""One training step, its metrics, and dpo.py's loop and batches."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mistakes import mistake
from torch import Tensor, nn
from worlds import (
    END,
    LN_2,
    PROMPTS,
    Bigram,
    V,
    assert_same,
    betas,
    bigram,
    enumerated,
    gpt,
    kl,
    log_probability,
    mean,
    number,
    pairs,
    preferences,
    responses,
    rows,
    seeds,
    triplets,
    uniform,
)

import dpo
from model import GPT, GPTConfig

STEP = 1e-5  # a step may compute in float32, which does not show in the dtype of its parameters
mild_betas = st.integers(1, 20).map(lambda k: k / 10)


def pair_batch(seed: int, n: int = 2, length: int | None = None) -> tuple[Tensor, ...]:
    """ids_w, mask_w, ids_l, mask_l of n pairs, (n, 6) each, with unequal lengths unless given."""
    sides = []
    for side in (0, 1):
        tokens = torch.randint(
            V, (n, 6), generator=torch.Generator().manual_seed(1000 * side + seed)
        )
        lengths = [length or 1 + (seed + 2 * i + 3 * side) % 4 for i in range(n)]
        each = [
            rows([(seed + i) % V, 1], [row[:length].tolist()], 6)
            for i, (row, length) in enumerate(zip(tokens, lengths, strict=True))
        ]
        sides += [torch.cat(parts) for parts in zip(*each, strict=True)]
    return tuple(sides)


def sgd(pi: nn.Module, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(pi.parameters(), lr=lr)


def scored(pi, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x), (B,), independently of the code under test."""
    logps = pi(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1)


def mean_loss(pi, reference, batch, beta) -> Tensor:
    ids_w, mask_w, ids_l, mask_l = batch
    h = scored(pi, ids_w, mask_w) - scored(pi, ids_l, mask_l)
    ref_h = scored(reference, ids_w, mask_w) - scored(reference, ids_l, mask_l)
    return torch.nn.functional.softplus(-beta * (h - ref_h.detach())).mean()


def moved_by(step, batch, seed: int, beta: float = 0.5, start=None) -> Tensor:
    """The change of the logits in one SGD step at learning rate 1."""
    pi = copy.deepcopy(start or bigram(2 * seed))
    before = pi.logits.detach().clone()
    step(pi, bigram(2 * seed + 1), *batch, beta, sgd(pi))
    return pi.logits.detach() - before


# ------------------------------------------------- one step, in the order of diagnosis


@mistake(
    "the parameters do not move: no backward, no step, or a detached loss",
    13,
    "zero_grad(), loss.backward(), optimizer.step(), in this order; no no_grad around the policy",
)
@given(seed=seeds)
def test_step_moves_the_parameters(training_step, seed):
    """The gradient is not 0  =>  the parameters change.  pitfall 13"""
    batch = pair_batch(seed)
    pi = bigram(2 * seed)
    loss = mean_loss(pi, bigram(2 * seed + 1), batch, 0.5)
    (gradient,) = torch.autograd.grad(loss, pi.logits)
    assume(gradient.norm() > 1e-3)
    assert moved_by(training_step, batch, seed).norm() > 0, "the parameters did not change"


@mistake(
    "the step goes up: the sign of the loss or the roles of y_w and y_l",
    31,
    "minimise -logsigmoid(r_hat_w - r_hat_l)",
)
@given(seed=seeds)
def test_step_goes_down(training_step, seed):
    """A step at equal lengths => it is along the gradient of log pi(y_w) - log pi(y_l). Section 4's
    gradient; pitfall 31"""
    ids_w, mask_w, ids_l, mask_l = batch = pair_batch(seed, n=1, length=2)
    assume(not torch.equal(ids_w * mask_w, ids_l * mask_l))
    pi = bigram(seed)
    gap = scored(pi, ids_w, mask_w) - scored(pi, ids_l, mask_l)
    (gradient,) = torch.autograd.grad(gap, pi.logits)
    assume(gradient.norm() > 1e-3)
    moved = moved_by(training_step, batch, seed, start=pi)
    assert (moved * gradient).sum() > 0, "the margin falls"


@mistake(
    "the reference is trained too, or is the policy itself",
    28,
    "make the reference a frozen copy; compute its log-probabilities under no_grad",
)
@given(seed=seeds)
def test_step_leaves_the_reference_alone(training_step, seed):
    """Any step  =>  pi_ref is unchanged and has no gradient.  pitfall 28"""
    pi, reference = bigram(seed), bigram(seed + 1)
    before = reference.logits.detach().clone()
    training_step(pi, reference, *pair_batch(seed), 0.5, sgd(pi))
    assert torch.equal(reference.logits, before), "the reference changed"
    assert reference.logits.grad is None, "the reference got a gradient"


@mistake(
    "gradients of earlier steps are added: zero_grad is missing",
    19,
    "call optimizer.zero_grad() before every backward pass",
)
@given(seed=seeds)
def test_step_ignores_gradients_of_earlier_steps(training_step, seed):
    """A gradient is left in .grad  =>  the step is the same.  pitfall 19"""
    batch = pair_batch(seed)
    stale = bigram(2 * seed)
    stale.logits.grad = torch.ones_like(stale.logits)
    pi = copy.deepcopy(stale)
    pi.logits.grad = stale.logits.grad.clone()
    before = pi.logits.detach().clone()
    training_step(pi, bigram(2 * seed + 1), *batch, 0.5, sgd(pi))
    assert_same(pi.logits.detach() - before, moved_by(training_step, batch, seed), STEP)


@mistake("sum instead of mean over the pairs of a batch", 19, "average the losses over the pairs")
@given(seed=seeds)
def test_step_of_a_repeated_batch_is_the_same(training_step, seed):
    """Every pair twice  =>  the same step: the loss is a mean over pairs.  pitfall 19"""
    batch = pair_batch(seed)
    twice = [torch.cat((side, side)) for side in batch]
    once = moved_by(training_step, batch, seed)
    assert_same(moved_by(training_step, twice, seed), once, STEP)


@mistake(
    "the step ignores the reference, for instance because the policy scores itself",
    13,
    "compute the reference's log-probabilities with the reference model, and subtract them",
)
@given(seed=seeds)
def test_step_depends_on_the_reference(training_step, seed):
    """Two references  =>  two steps.  pitfall 13"""
    batch = pair_batch(seed)
    of = [mean_loss(bigram(2 * seed), bigram(2 * seed + i), batch, 1.0) for i in (1, 2)]
    assume(abs(of[0] - of[1]) > 1e-2)
    moves = []
    for i in (1, 2):
        pi = bigram(2 * seed)
        training_step(pi, bigram(2 * seed + i), *batch, 1.0, sgd(pi))
        moves.append(pi.logits.detach())
    assert not torch.allclose(*moves, atol=1e-7), "another reference makes no difference"


@mistake(
    "not the gradient of Eq. 7; mean instead of sum over tokens is the commonest reason",
    5,
    "use the sum of the response's log-probabilities, shifted labels, and the response mask",
)
@given(seed=seeds, beta=mild_betas)
def test_step_follows_the_gradient_of_the_mean_loss(training_step, seed, beta):
    """SGD at learning rate 1  =>  theta moves by minus the gradient of the mean of Eq. 7 over the
    pairs, with sums over tokens.  pitfall 5"""
    batch = pair_batch(seed, n=3)
    pi, reference = bigram(2 * seed), bigram(2 * seed + 1)
    (gradient,) = torch.autograd.grad(mean_loss(pi, reference, batch, beta), pi.logits)
    assert_same(moved_by(training_step, batch, seed, beta), -gradient, STEP)


@mistake(
    "the first loss is not ln 2",
    13,
    "start the policy as a copy of the reference, without dropout, in the same dtype",
)
@given(seed=seeds)
def test_first_loss_is_ln_2(training_step, seed):
    """pi_theta = pi_ref  =>  a loss that the step returns is ln 2.  pitfall 13"""
    pi = bigram(seed)
    loss = training_step(pi, bigram(seed), *pair_batch(seed), 0.5, sgd(pi))
    if isinstance(loss, Tensor | float):
        assert_same(loss, LN_2, STEP)


@mistake(
    "the steps do not fit one batch",
    13,
    "check that gradients reach all parameters, and that nothing is detached",
)
def test_one_batch_can_be_overfitted(training_step):
    """One order of each pair, enough steps  =>  the loss leaves ln 2 for almost 0.  pitfall 13"""
    pi, reference, batch = gpt(0, context=6), gpt(0, context=6), pair_batch(1)
    optimizer = torch.optim.Adam(pi.parameters(), lr=0.02)
    for _ in range(40):
        training_step(pi, reference, *batch, 1.0, optimizer)
    assert mean_loss(pi, reference, batch, 1.0) < 0.02


@mistake(
    "accumulated gradients are not scaled as one batch's",
    19,
    "divide each micro-batch's loss by the number of micro-batches, and step once",
)
@given(seed=seeds, n=st.integers(1, 3))
def test_micro_batches_make_the_step_of_the_whole_batch(accumulated_step, seed, n):
    """k micro-batches of n pairs  =>  the step of one batch of k n pairs.  pitfall 19"""
    ids_w, mask_w, ids_l, mask_l = batch = pair_batch(seed, n=4 * n)
    pi, reference = bigram(2 * seed), bigram(2 * seed + 1)
    (gradient,) = torch.autograd.grad(mean_loss(pi, reference, batch, 0.5), pi.logits)
    before = pi.logits.detach().clone()
    parts = zip(*(side.split(n) for side in (ids_w, mask_w, ids_l, mask_l)), strict=True)
    accumulated_step(pi, reference, list(parts), 0.5, sgd(pi))
    assert_same(pi.logits.detach() - before, -gradient, STEP)


# ------------------------------------------------- metrics, in the order of diagnosis

REWARD = "log beta * (logp - ref_logp), detached"


def metric(metrics, name, p) -> Tensor:
    found = metrics(*p)
    assume(name in found)
    return torch.as_tensor(found[name])


@mistake("a reward without beta, or without the reference", 22, REWARD)
@given(p=pairs)
def test_recorded_rewards_are_implicit_rewards(metrics, p):
    """r_hat_w and r_hat_l are means of beta (log pi_theta - log pi_ref).  Eq. 5; pitfall 22"""
    found = metrics(*p)
    expected = {
        "r_hat_w": p.beta * (p.logp_w - p.ref_logp_w).mean(),
        "r_hat_l": p.beta * (p.logp_l - p.ref_logp_l).mean(),
    }
    for name in expected.keys() & found.keys():
        assert_same(torch.as_tensor(found[name]).double().mean(), expected[name])


@mistake("the margin is not r_hat_w - r_hat_l", 22, "margin = r_hat_w - r_hat_l, with its beta")
@given(p=pairs)
def test_recorded_margin_is_the_difference_of_rewards(metrics, p):
    """margin = mean of r_hat_w - r_hat_l.  pitfall 22"""
    margin = p.beta * ((p.logp_w - p.ref_logp_w) - (p.logp_l - p.ref_logp_l))
    assert_same(metric(metrics, "margin", p).double().mean(), margin.mean())


@mistake("a tie counts as a loss or as a win", 22, "accuracy = ((margin.sign() + 1) / 2).mean()")
@given(p=pairs)
def test_tie_counts_one_half(metrics, p):
    """pi_theta = pi_ref  =>  accuracy 1/2.  pitfall 22"""
    tie = p._replace(logp_w=p.ref_logp_w, logp_l=p.ref_logp_l)
    assert_same(metric(metrics, "accuracy", tie).double().mean(), 0.5)


@mistake(
    "accuracy compares log-probabilities instead of implicit rewards",
    22,
    "accuracy is the share of pairs with r_hat_w > r_hat_l; a tie counts 1/2",
)
@given(p=pairs)
def test_accuracy_compares_implicit_rewards(metrics, p):
    """accuracy = share of pairs with r_hat_w > r_hat_l.  pitfall 22"""
    margin = (p.logp_w - p.ref_logp_w) - (p.logp_l - p.ref_logp_l)
    expected = ((margin.sign() + 1) / 2).mean()
    assert_same(metric(metrics, "accuracy", p).double().mean(), expected)


@mistake("log pi(y_w) or log pi(y_l) is not what its name says", 23, "record logp_w and logp_l")
@given(p=pairs)
def test_recorded_log_probabilities_are_the_policys(metrics, p):
    """logp_w and logp_l are means of log pi_theta, so that a falling one is seen.  pitfall 23"""
    found = metrics(*p)
    for name in {"logp_w", "logp_l"} & found.keys():
        assert_same(torch.as_tensor(found[name]).double().mean(), getattr(p, name).mean())


# ------------------------------------------------- dpo.train


def steps(pi, batch, loss, optimizer, n=1, **options) -> list[dict]:
    """n steps of dpo.train, each on all prompts."""
    return list(dpo.train(pi, batch, loss, optimizer, [batch.prompt.unique()] * n, **options))


def weighted_mean_loss(pi, batch, beta) -> Tensor:
    losses, _, _ = dpo.dpo(dpo.response_logps(pi, batch.ids, batch.mask), batch, beta)
    return (batch.weight * losses).sum() / batch.weight.sum()


@given(seed=seeds, beta=betas)
def test_metrics_are_weighted_means_over_pairs(seed, beta):
    """Computed by hand from each pair's four log-probabilities: loss, rewards with beta, margin,
    accuracy, log pi.  pitfall 22"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    (metrics,) = steps(pi, preferences(found, pi_ref), partial(dpo.dpo, beta=beta), sgd(pi, 0.0))
    names = "loss", "r_hat_w", "r_hat_l", "margin", "accuracy", "logp_w", "logp_l"
    expected = dict.fromkeys(names, 0.0)
    total = sum(t["weight"] for t in found)
    for t in found:
        (w, ref_w), (l, ref_l) = (
            [log_probability(model, t["x"], t[side]).item() for model in (pi, pi_ref)]
            for side in ("y_w", "y_l")
        )
        r_w, r_l = beta * (w - ref_w), beta * (l - ref_l)
        assume(abs(r_w - r_l) > 1e-6)  # a tie has its own test
        values = math.log1p(math.exp(r_l - r_w)), r_w, r_l, r_w - r_l, r_w > r_l, w, l
        for name, value in zip(names, values, strict=True):
            expected[name] += t["weight"] * value / total
    assert_same([metrics[name] for name in names], list(expected.values()))
    assert set(metrics) == {*names, "grad_norm"}
    assert not any(value.requires_grad for value in metrics.values())


@given(seed=seeds)
def test_metrics_of_a_tie(seed):
    """pi_theta = pi_ref  =>  accuracy 1/2, loss ln 2, margin 0.  pitfalls 13, 22"""
    pi = bigram(seed)
    batch = preferences(triplets(seed), pi)
    (metrics,) = steps(pi, batch, partial(dpo.dpo, beta=0.3), sgd(pi, 0.0))
    assert_same([metrics[name] for name in ("accuracy", "loss", "margin")], [0.5, LN_2, 0.0])


@given(seed=seeds, beta=betas)
def test_training_follows_the_gradient_of_the_weighted_mean(seed, beta):
    """SGD at learning rate 1, two steps => each moves theta by minus the gradient of its own
    weighted mean loss, clipped to max_grad_norm; grad_norm is the norm before clipping. pitfall
    19"""
    pi, batch, limit = bigram(seed), preferences(triplets(seed), bigram(seed + 1)), 0.1
    optimizer = sgd(pi)
    for _ in range(2):
        before = copy.deepcopy(pi)
        (gradient,) = torch.autograd.grad(weighted_mean_loss(before, batch, beta), before.logits)
        (metrics,) = steps(pi, batch, partial(dpo.dpo, beta=beta), optimizer, max_grad_norm=limit)
        assert_same(metrics["grad_norm"], gradient.norm())
        size = min(1.0, limit / (gradient.norm().item() + 1e-6))
        assert_same(before.logits - pi.logits, gradient * size)


@given(seed=seeds, chosen=st.permutations(range(4)), n=st.integers(1, 3))
def test_parts_with_global_weights_make_the_gradient_of_the_whole(seed, chosen, n):
    """normalize divides by the weight of the whole => the gradients of the parts add up to that of
    the whole batch. pitfall 19"""
    pi, batch = bigram(seed), preferences(triplets(seed), bigram(seed + 1))
    (whole,) = torch.autograd.grad(weighted_mean_loss(pi, batch, 1.0), pi.logits)
    total = batch.weight.sum()
    parts = [torch.tensor(chosen[:n]), torch.tensor(chosen[n:])]
    moved = 0.0
    for part in parts:
        one = copy.deepcopy(pi)
        loss, normalize = partial(dpo.dpo, beta=1.0), lambda weight: weight / total
        list(dpo.train(one, batch, loss, sgd(one), [part], normalize=normalize))
        moved = moved + (pi.logits - one.logits)
    assert_same(moved, whole)


def test_training_without_a_limit_clips_nothing():
    """max_grad_norm is not given  =>  the step is the whole gradient, however large"""
    pi, pi_ref = bigram(0), bigram(1)
    batch = preferences(triplets(0), pi_ref)
    before = pi.logits.detach().clone()
    (gradient,) = torch.autograd.grad(weighted_mean_loss(pi, batch, 50.0), pi.logits)
    steps(pi, batch, partial(dpo.dpo, beta=50.0), sgd(pi))
    assert gradient.norm() > 1
    assert_same(before - pi.logits, gradient)


def test_training_takes_one_step_per_batch_and_uses_the_given_log_probabilities():
    """Batches of prompts, a logps_fn  =>  one record per batch; logps_fn sees pi_theta and the
    batch's rows, and its values are the ones that are trained on"""
    pi, batch = bigram(0), preferences(triplets(0), bigram(1))
    seen = []

    def logps_fn(model, ids, mask):
        seen.append((model, ids, mask))
        return 2 * dpo.response_logps(model, ids, mask)

    batches = [torch.tensor([0, 2]), torch.tensor([1])]
    records = list(
        dpo.train(pi, batch, partial(dpo.dpo, beta=1.0), sgd(pi, 0.0), batches, logps_fn=logps_fn)
    )
    assert len(records) == 2
    for record, prompts, (model, ids, mask) in zip(records, batches, seen, strict=True):
        part = batch.select(prompts)
        assert model is pi and torch.equal(ids, part.ids) and torch.equal(mask, part.mask)
        w, _, _, _ = dpo.pair_logps(2 * dpo.response_logps(pi, ids, mask), part)
        assert_same(record["logp_w"], (part.weight * w).sum() / part.weight.sum())


def test_training_moves_a_batch_to_the_policys_device():
    """pi_theta on another device than the preferences  =>  logps_fn sees rows on that device"""
    batch, seen = preferences(triplets(0), bigram(1)), []
    pi = bigram(0).to("meta")

    def logps_fn(model, ids, mask):
        seen.extend((ids.device.type, mask.device.type))
        return model.logits.sum() * mask

    steps(pi, batch, partial(dpo.dpo, beta=1.0), sgd(pi, 0.0), logps_fn=logps_fn)
    assert seen == ["meta", "meta"]


def everything_paired(pi_ref, r: list[Tensor]) -> dpo.Preferences:
    """Every ordered pair of responses to every prompt, with its Bradley-Terry probability."""
    return preferences(
        [
            dict(prompt=n, x=x, y_w=y, y_l=other, weight=torch.sigmoid(r[n][i] - r[n][j]).item())
            for n, x in enumerate(PROMPTS)
            for i, y in enumerate(responses(x))
            for j, other in enumerate(responses(x))
            if i != j
        ],
        pi_ref,
    )


def test_dpo_trains_a_gpt_to_the_optimal_policy():
    """Population labels from r => dpo.train takes pi_theta from pi_ref to pi_r, KL(pi_r, pi_theta)
    < 1e-4, on responses of unequal lengths, for each prompt. Eq. 7 and Eq. 4; pitfalls 5, 13"""
    pi_ref, beta, n = gpt(0), 1.0, 200
    r = [uniform((len(responses(x)),), -2.0, 2.0, i) for i, x in enumerate(PROMPTS)]
    pi_theta = copy.deepcopy(pi_ref)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.015, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n)
    batches, losses = [torch.arange(len(PROMPTS))] * n, []
    loss, data = partial(dpo.dpo, beta=beta), everything_paired(pi_ref, r)
    for metrics in dpo.train(pi_theta, data, loss, optimizer, batches):
        schedule.step()
        losses.append(metrics["loss"])
    assert_same(losses[0], LN_2, 1e-6)
    for x, reward in zip(PROMPTS, r, strict=True):
        ref = enumerated(pi_ref, x)
        best, _ = dpo.optimal_policy(ref, reward, beta)
        assert kl(best, ref) > 0.1 and kl(best, enumerated(pi_theta, x)) < 1e-4
        assert mean(enumerated(pi_theta, x), reward) > mean(ref, reward) + 0.1


def test_optimal_policy_is_a_fixed_point_of_training():
    """pi_theta = pi_r under population labels => the gradient of L_DPO is 0. Here the reference is
    pi_theta tilted back: log pi_ref = log pi_theta - r / beta + log Z. Eq. 7 and Eq. 5"""
    pi, beta = gpt(0), 0.5
    r = [uniform((len(responses(x)),), -2.0, 2.0, i) for i, x in enumerate(PROMPTS)]
    batch = everything_paired(pi, r)
    back = {
        (n, tuple(y)): logp
        for n, x in enumerate(PROMPTS)
        for y, logp in zip(
            responses(x), dpo.optimal_policy(enumerated(pi, x), -r[n], beta)[0], strict=True
        )
    }
    ref_logps = torch.zeros_like(batch.ref_logps)
    for i in range(len(batch.ids)):
        y = tuple(batch.ids[i][batch.mask[i]].tolist())
        ref_logps[i, -1] = back[int(batch.prompt[i]), y]
    batch = dpo.Preferences(**{**vars(batch), "ref_logps": ref_logps})
    (metrics,) = steps(pi, batch, partial(dpo.dpo, beta=beta), sgd(pi, 0.0))
    assert metrics["grad_norm"] < 1e-7 and metrics["loss"] < LN_2


class OneFeature(nn.Module):
    """Three one-token responses with logits (1, 0, 3) theta."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, ids):
        return (self.theta * torch.tensor([1.0, 0.0, 3.0])).expand(*ids.shape, 3)


def test_falling_chosen_log_probability_is_recorded():
    """Shared features  =>  log pi(y_w) falls step by step while the loss falls too, and the metrics
    show both.  pitfall 23"""
    pi = OneFeature()
    batch = preferences([dict(prompt=0, x=[0], y_w=[0], y_l=[1], weight=1.0)], pi)
    records = steps(pi, batch, partial(dpo.dpo, beta=1.0), sgd(pi, 0.5), 5)
    for name in ("loss", "logp_w", "logp_l"):
        values = [record[name].item() for record in records]
        assert values == sorted(values, reverse=True) and len(set(values)) == 5


def test_small_steps_move_every_parameter():
    """Weights are float32  =>  a step of 1e-6 moves each of the model's tensors, those near 1 too.
    pitfall 16"""
    pi = GPT(GPTConfig(V, 8, n_layer=1, n_head=2, n_embd=8))
    before = copy.deepcopy(pi)
    batch = preferences(triplets(0), pi)
    steps(pi, batch, partial(dpo.dpo, beta=1.0), torch.optim.Adam(pi.parameters(), lr=1e-6))
    for (name, p), q in zip(pi.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.float32 and not torch.equal(p, q), name


# ------------------------------------------------- pairs and batches


@given(seed=seeds, beta=betas)
def test_loss_of_a_pair_is_that_of_its_own_responses_sums(seed, beta):
    """Responses of unequal lengths, each computed once and paired by row  =>  each pair's loss is
    Eq. 7 of its own four log pi(y|x), which are sums over tokens.  Eq. 7; pitfall 5"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    batch = preferences(found, pi_ref)
    logps = dpo.response_logps(pi, batch.ids, batch.mask)
    four = number(
        [
            [log_probability(model, t["x"], t[y]) for model in (pi, pi_ref) for y in ("y_w", "y_l")]
            for t in found
        ]
    ).T
    assert_same(torch.stack(dpo.pair_logps(logps, batch)), four)
    expected = torch.stack(dpo.dpo_loss(*four, beta))
    assert_same(torch.stack(dpo.dpo(logps, batch, beta)), expected)


@given(seed=seeds, chosen=st.permutations(range(5)), n=st.integers(1, 5))
def test_batch_holds_the_preferences_of_its_prompts_and_no_others(seed, chosen, n):
    """Any prompts in any order  =>  the batch's losses and weights are those of the whole at these
    prompts' pairs, and no position is kept that only other prompts use"""
    pi, prompts = bigram(seed), torch.tensor(chosen[:n])
    whole = preferences(triplets(seed, P=5), bigram(seed + 1))

    def losses(batch):
        logps = dpo.response_logps(pi, batch.ids, batch.mask)
        return torch.stack((*dpo.dpo(logps, batch, 1.0), batch.weight))

    batch = whole.select(prompts)
    kept = torch.isin(whole.prompt[whole.pairs[:, 0]], prompts)
    assert_same(losses(batch), losses(whole)[:, kept])
    assert batch.mask[:, -1].any()
    assert set(batch.prompt.tolist()) == set(chosen[:n])
    assert len(batch.ids) == torch.isin(whole.prompt, prompts).sum()


def test_moving_a_batch_moves_every_tensor_and_keeps_the_order():
    """.to(device)  =>  the same fields, all on the device"""
    batch = preferences(triplets(0), bigram(0))
    moved = batch.to(torch.device("meta"))
    for name, tensor in vars(batch).items():
        other = getattr(moved, name)
        assert other.device.type == "meta" and other.shape == tensor.shape, name
        assert other.dtype == tensor.dtype, name


@pytest.mark.parametrize("weights", [[1.0], [1.0, 3.0], [0.25, 0.5, 0.25]])
def test_mean_weights_are_shares(weights):
    """weight  =>  weight / sum of weights: they sum to 1 and keep their ratios"""
    share = dpo.mean_weights(number(weights))
    assert_same(share.sum(), 1.0)
    assert_same(share / share[0], number(weights) / weights[0])


def test_end_token_is_scored_once():
    """y = (1, END), padded with END  =>  log pi(y|x) has two terms.  pitfall 10"""
    pi = Bigram(torch.zeros(V, V, dtype=torch.float64))
    ids, mask = rows([0], [[1, END]], 6, pad=END)
    assert_same(dpo.response_logps(pi, ids, mask).sum(-1), [-2 * math.log(3)])
