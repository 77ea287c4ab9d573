"""One training step, its metrics, and dpo.py's loop and batches."""

import copy
import random
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from mistakes import mistake
from torch import Tensor, nn
from worlds import (
    CONTEXT,
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
    """ids_w, mask_w, ids_l, mask_l of n pairs, (n, 6) each, of unequal lengths unless given."""
    rng = random.Random(seed)

    def side():
        ys = [rng.choices(range(V), k=length or rng.randint(1, 4)) for _ in range(n)]
        return rows([seed % V, 1], ys, 6)

    return *side(), *side()


def sgd(pi: nn.Module, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(pi.parameters(), lr=lr)


def margin(pi, ids_w, mask_w, ids_l, mask_l) -> Tensor:
    """log pi(y_w|x) - log pi(y_l|x), (n,), independently of the code under test."""

    def logp(ids, mask):
        logps = pi(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (logps * mask[:, 1:]).sum(-1)

    return logp(ids_w, mask_w) - logp(ids_l, mask_l)


def mean_loss(pi, reference, batch, beta) -> Tensor:
    """The mean of Eq. 7 over the pairs."""
    return F.softplus(-beta * (margin(pi, *batch) - margin(reference, *batch))).mean()


def expected_step(batch, seed: int, beta: float = 0.5, reference: int = 1) -> Tensor:
    """Minus the gradient of the mean loss at bigram(2 seed)."""
    pi = bigram(2 * seed)
    loss = mean_loss(pi, bigram(2 * seed + reference), batch, beta)
    return -torch.autograd.grad(loss, pi.logits)[0]


def moved_by(step, batch, seed: int, beta=0.5, reference: int = 1, stale=None) -> Tensor:
    """The change in bigram(2 seed)'s logits in one SGD step at learning rate 1."""
    pi = bigram(2 * seed)
    pi.logits.grad = stale
    before = pi.logits.detach().clone()
    step(pi, bigram(2 * seed + reference), *batch, beta, sgd(pi))
    return pi.logits.detach() - before


# ------------------------------------------------- one step, in the order of diagnosis


@mistake("the parameters do not move", 13, "zero_grad, backward, step; no no_grad or detach")
@given(seed=seeds)
def test_step_moves_the_parameters(training_step, seed):
    """The gradient is not 0  =>  the parameters change.  pitfall 13"""
    batch = pair_batch(seed)
    assume(expected_step(batch, seed).norm() > 1e-3)
    assert moved_by(training_step, batch, seed).norm() > 0, "the parameters did not change"


@mistake("the step raises the loss", 31, "minimise -logsigmoid(r_hat_w - r_hat_l)")
@given(seed=seeds)
def test_step_lowers_the_loss(training_step, seed):
    """A step on one pair of equal lengths  =>  it has a positive component along the gradient of
    log pi(y_w) - log pi(y_l). Section 4's gradient; pitfall 31"""
    batch = pair_batch(seed, n=1, length=2)
    expected = expected_step(batch, seed)  # a positive multiple of that gradient
    assume(expected.norm() > 1e-3)
    assert (moved_by(training_step, batch, seed) * expected).sum() > 0, "the margin falls"


@mistake("the reference is trained too", 28, "make it a frozen copy, scored under no_grad")
@given(seed=seeds)
def test_step_leaves_the_reference_alone(training_step, seed):
    """Any step  =>  pi_ref is unchanged and has no gradient.  pitfall 28"""
    pi, reference = bigram(seed), bigram(seed + 1)
    before = reference.logits.detach().clone()
    training_step(pi, reference, *pair_batch(seed), 0.5, sgd(pi))
    assert torch.equal(reference.logits, before), "the reference changed"
    assert reference.logits.grad is None, "the reference got a gradient"


@mistake("zero_grad is missing", 19, "call it before every backward pass")
@given(seed=seeds)
def test_step_ignores_gradients_of_earlier_steps(training_step, seed):
    """A gradient is left in .grad  =>  the step is the same.  pitfall 19"""
    batch, stale = pair_batch(seed), torch.ones(V, V, dtype=torch.float64)
    moved = moved_by(training_step, batch, seed, stale=stale)
    assert_same(moved, moved_by(training_step, batch, seed), STEP)


@mistake("sum instead of mean over the pairs of a batch", 19, "average the losses over the pairs")
@given(seed=seeds)
def test_step_of_a_repeated_batch_is_the_same(training_step, seed):
    """Every pair twice  =>  the same step: the loss is a mean over pairs.  pitfall 19"""
    batch = pair_batch(seed)
    twice = [torch.cat((side, side)) for side in batch]
    once = moved_by(training_step, batch, seed)
    assert_same(moved_by(training_step, twice, seed), once, STEP)


@mistake("the step ignores the reference", 13, "subtract log pi_ref of the reference model")
@given(seed=seeds)
def test_step_depends_on_the_reference(training_step, seed):
    """Two references  =>  two steps.  pitfall 13"""
    batch = pair_batch(seed)
    expected = [expected_step(batch, seed, reference=i) for i in (1, 2)]
    assume((expected[0] - expected[1]).norm() > 1e-2)
    moves = [moved_by(training_step, batch, seed, reference=i) for i in (1, 2)]
    assert (moves[0] - moves[1]).norm() > 1e-3, "another reference makes no difference"


@mistake("not Eq. 7, often mean instead of sum", 5, "sum the response's log-probabilities")
@given(seed=seeds, beta=mild_betas)
def test_step_follows_the_gradient_of_the_mean_loss(training_step, seed, beta):
    """SGD at learning rate 1  =>  theta moves by minus the gradient of the mean of Eq. 7 over the
    pairs, with sums over tokens.  pitfall 5"""
    batch = pair_batch(seed, n=3)
    moved = moved_by(training_step, batch, seed, beta)
    assert_same(moved, expected_step(batch, seed, beta), STEP)


@mistake("the first loss is not ln 2", 13, "start from a copy of the reference, without dropout")
@given(seed=seeds)
def test_first_loss_is_ln_2(training_step, seed):
    """pi_theta = pi_ref  =>  the loss, if the step returns it, is ln 2.  pitfall 13"""
    pi = bigram(seed)
    loss = training_step(pi, bigram(seed), *pair_batch(seed), 0.5, sgd(pi))
    if isinstance(loss, Tensor | float):
        assert_same(loss, LN_2, STEP)


@mistake("training cannot overfit one batch", 13, "let gradients reach all parameters")
def test_one_batch_can_be_overfitted(training_step):
    """One order of each pair, enough steps  =>  the loss leaves ln 2 for almost 0.  pitfall 13"""
    pi, reference, batch = gpt(0, context=6), gpt(0, context=6), pair_batch(1)
    optimizer = torch.optim.Adam(pi.parameters(), lr=0.02)
    for _ in range(40):
        training_step(pi, reference, *batch, 1.0, optimizer)
    assert mean_loss(pi, reference, batch, 1.0) < 0.02


@mistake("accumulated gradients are not scaled", 19, "divide each loss by the number of parts")
@given(seed=seeds, n=st.integers(1, 3))
def test_micro_batches_make_the_step_of_the_whole_batch(accumulated_step, seed, n):
    """k micro-batches of n pairs  =>  the step of one batch of k n pairs.  pitfall 19"""
    batch = pair_batch(seed, n=4 * n)
    parts = list(zip(*(side.split(n) for side in batch), strict=True))
    assert_same(moved_by(accumulated_step, [parts], seed), expected_step(batch, seed), STEP)


# ------------------------------------------------- metrics, in the order of diagnosis


def log_ratios(p) -> tuple[Tensor, Tensor]:
    return p.logp_w - p.ref_logp_w, p.logp_l - p.ref_logp_l


def assert_recorded(metrics, p, **expected):
    """Each metric is the mean of these values, if it is recorded under this name."""
    found = metrics(*p)
    for name in expected.keys() & found.keys():
        assert_same(torch.as_tensor(found[name]).double().mean(), expected[name].mean())


@mistake("a reward without beta or reference", 22, "record beta * (logp - ref_logp)")
@given(p=pairs)
def test_recorded_rewards_are_implicit_rewards(metrics, p):
    """r_hat_w and r_hat_l are means of beta (log pi_theta - log pi_ref).  Eq. 5; pitfall 22"""
    A, B = log_ratios(p)
    assert_recorded(metrics, p, r_hat_w=p.beta * A, r_hat_l=p.beta * B)


@mistake("the margin is not r_hat_w - r_hat_l", 22, "margin = r_hat_w - r_hat_l, with its beta")
@given(p=pairs)
def test_recorded_margin_is_the_difference_of_rewards(metrics, p):
    """margin = mean of r_hat_w - r_hat_l.  pitfall 22"""
    A, B = log_ratios(p)
    assert_recorded(metrics, p, margin=p.beta * (A - B))


@mistake("a tie counts as a loss or as a win", 22, "accuracy = ((margin.sign() + 1) / 2).mean()")
@given(p=pairs)
def test_tie_counts_one_half(metrics, p):
    """pi_theta = pi_ref  =>  accuracy 1/2.  pitfall 22"""
    tie = p._replace(logp_w=p.ref_logp_w, logp_l=p.ref_logp_l)
    assert_recorded(metrics, tie, accuracy=number(0.5))


@mistake("accuracy compares log-probabilities", 22, "count the pairs with r_hat_w > r_hat_l")
@given(p=pairs)
def test_accuracy_compares_implicit_rewards(metrics, p):
    """accuracy = share of pairs with r_hat_w > r_hat_l.  pitfall 22"""
    A, B = log_ratios(p)
    assert_recorded(metrics, p, accuracy=((A - B).sign() + 1) / 2)


@mistake("log pi(y_w) or log pi(y_l) is not what its name says", 23, "record logp_w and logp_l")
@given(p=pairs)
def test_recorded_log_probabilities_are_those_of_the_policy(metrics, p):
    """logp_w and logp_l are means of log pi_theta, so that a falling one is seen.  pitfall 23"""
    assert_recorded(metrics, p, logp_w=p.logp_w, logp_l=p.logp_l)


# ------------------------------------------------- dpo.train


def steps(pi, batch, optimizer, beta: float = 1.0, n: int = 1, **options) -> list[dict]:
    """The metrics of n steps of dpo.train, each on all prompts."""
    batches, loss = [batch.prompt.unique()] * n, partial(dpo.dpo, beta=beta)
    return list(dpo.train(pi, batch, loss, optimizer, batches, **options))


def four_logps(found: list[dict], pi, pi_ref) -> Tensor:
    """log pi_theta of y_w and y_l, and log pi_ref of y_w and y_l, (4, n), by the chain rule."""
    sides = [(model, y) for model in (pi, pi_ref) for y in ("y_w", "y_l")]
    return number([[log_probability(model, t["x"], t[y]) for t in found] for model, y in sides])


@given(seed=seeds, beta=betas)
def test_metrics_are_weighted_means_over_pairs(seed, beta):
    """Computed by hand from each pair's four log-probabilities: loss, rewards with beta, margin,
    accuracy, log pi.  pitfall 22"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    (metrics,) = steps(pi, preferences(found, pi_ref), sgd(pi, 0.0), beta)
    assert not any(value.requires_grad for value in metrics.values())
    w, l, ref_w, ref_l = four_logps(found, pi, pi_ref)
    r_w, r_l = beta * (w - ref_w), beta * (l - ref_l)
    assume((r_w - r_l).abs().min() > 1e-6)  # a tie has its own test
    names = "loss", "r_hat_w", "r_hat_l", "margin", "accuracy", "logp_w", "logp_l"
    values = F.softplus(r_l - r_w), r_w, r_l, r_w - r_l, (r_w > r_l).double(), w, l
    weight = number([t["weight"] for t in found])
    assert set(metrics) == {*names, "grad_norm"}
    expected = torch.stack(values) @ weight / weight.sum()
    assert_same([metrics[name] for name in names], expected)


@given(seed=seeds, beta=betas)
def test_training_follows_the_gradient_of_the_weighted_mean(seed, beta):
    """SGD at learning rate 1, two steps => each moves theta by minus the gradient of its own
    weighted mean loss, clipped to max_grad_norm; grad_norm is the norm before clipping. pitfall
    19"""
    pi, batch, limit = bigram(seed), preferences(triplets(seed), bigram(seed + 1)), 0.1
    optimizer = sgd(pi)
    for _ in range(2):
        before = copy.deepcopy(pi)
        losses, _, _ = dpo.dpo(dpo.response_logps(before, batch.ids, batch.mask), batch, beta)
        loss = (batch.weight * losses).sum() / batch.weight.sum()
        (gradient,) = torch.autograd.grad(loss, before.logits)
        (metrics,) = steps(pi, batch, optimizer, beta, max_grad_norm=limit)
        assert_same(metrics["grad_norm"], gradient.norm())
        size = min(1.0, limit / (gradient.norm().item() + 1e-6))
        assert_same(before.logits - pi.logits, gradient * size)


def test_a_step_sees_the_pairs_of_its_prompts_alone():
    """Batches of one prompt each  =>  the loss sees the rows of that prompt, and no others"""
    data, pi, seen = preferences(triplets(0, 3), bigram(1)), bigram(0), []

    def loss(logps, batch):
        seen.append(batch.prompt.unique().tolist())
        return dpo.dpo(logps, batch, 1.0)

    list(dpo.train(pi, data, loss, sgd(pi), data.prompt.unique().flip(0).split(1)))
    assert seen == [[2], [1], [0]]


def test_training_moves_a_batch_to_the_policys_device():
    """pi_theta and the preferences on different devices  =>  the loss sees each of the batch's
    tensors on pi_theta's device, under its own name"""
    batch, pi, seen = preferences(triplets(0), bigram(1)), bigram(0).to("meta"), []

    def loss(logps, moved):
        seen.append(moved)
        return dpo.dpo(logps, moved, 1.0)

    list(dpo.train(pi, batch, loss, sgd(pi), [batch.prompt.unique()]))
    for name, tensor in vars(seen[0]).items():
        other = getattr(batch, name)
        assert tensor.device.type == "meta" and tensor.shape == other.shape, name
        assert tensor.dtype == other.dtype, name


def all_rows() -> tuple[Tensor, Tensor]:
    """ids and mask of all responses to all prompts."""
    each = [rows(x, responses(x)) for x in PROMPTS]
    return tuple(torch.cat(parts) for parts in zip(*each, strict=True))


def everything_paired(ref_logps: Tensor, r: Tensor) -> dpo.Preferences:
    """Every ordered pair of responses to each prompt, with its Bradley-Terry probability."""
    prompt = torch.tensor([n for n, x in enumerate(PROMPTS) for _ in responses(x)])
    pairs = ((prompt[:, None] == prompt) & ~torch.eye(len(prompt)).bool()).nonzero()
    weight = torch.sigmoid(r[pairs[:, 0]] - r[pairs[:, 1]])
    return dpo.Preferences(*all_rows(), ref_logps, prompt, pairs, weight)


def test_dpo_trains_a_gpt_to_the_optimal_policy():
    """Population labels from r => dpo.train takes pi_theta from pi_ref to pi_r, KL(pi_r, pi_theta)
    < 1e-4, on responses of unequal lengths, for each prompt. Eq. 7 and Eq. 4; pitfalls 5, 13"""
    pi_ref, beta, n = gpt(0), 1.0, 200
    r = uniform((22,), -2.0, 2.0, 0)
    pi_theta = copy.deepcopy(pi_ref)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.015, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n)
    data = everything_paired(dpo.response_logps(pi_ref, *all_rows()).detach(), r)
    loss, batches, losses = partial(dpo.dpo, beta=beta), [torch.arange(len(PROMPTS))] * n, []
    for metrics in dpo.train(pi_theta, data, loss, optimizer, batches):
        schedule.step()
        losses.append(metrics["loss"])
    assert_same(losses[0], LN_2, 1e-6)
    for x, reward in zip(PROMPTS, r.split([15, 7]), strict=True):
        ref, found = enumerated(pi_ref, x), enumerated(pi_theta, x)
        best, _ = dpo.optimal_policy(ref, reward, beta)
        assert kl(best, ref) > 0.1 and kl(best, found) < 1e-4
        assert mean(found, reward) > mean(ref, reward) + 0.1


def test_optimal_policy_is_a_fixed_point_of_training():
    """pi_theta = pi_r under population labels => the gradient of L_DPO is 0. Here the reference is
    pi_theta tilted back: log pi_ref = log pi_theta - r / beta + log Z. Eq. 7 and Eq. 5"""
    pi, beta, r = gpt(0), 0.5, uniform((22,), -2.0, 2.0, 0)
    rewards = zip(PROMPTS, r.split([15, 7]), strict=True)
    back = [dpo.optimal_policy(enumerated(pi, x), -reward, beta)[0] for x, reward in rewards]
    batch = everything_paired(torch.cat(back)[:, None].expand(-1, CONTEXT) / CONTEXT, r)
    (metrics,) = steps(pi, batch, sgd(pi, 0.0), beta)
    assert metrics["grad_norm"] < 1e-7 and metrics["loss"] < LN_2


def one_feature(theta, ids, mask):
    """log pi of responses of one token, with logits (1, 0, 3) theta."""
    return (theta[0] * number([1.0, 0.0, 3.0])).log_softmax(-1)[ids] * mask


def test_falling_chosen_log_probability_is_recorded():
    """Shared features  =>  log pi(y_w) falls step by step while the loss falls too, and the metrics
    show both.  pitfall 23"""
    theta, pi_ref = nn.ParameterList([nn.Parameter(number(0.0))]), Bigram(torch.zeros(V, V))
    batch = preferences([dict(prompt=0, x=[0], y_w=[0], y_l=[1], weight=1.0)], pi_ref)
    records = steps(theta, batch, sgd(theta, 0.5), n=5, logps_fn=one_feature)
    for name in ("loss", "logp_w", "logp_l"):
        values = [record[name].item() for record in records]
        assert values == sorted(values, reverse=True) and len(set(values)) == 5


def test_small_steps_move_every_parameter():
    """Weights are float32  =>  a step of 1e-6 moves each of the model's tensors, those near 1 too.
    pitfall 16"""
    pi = GPT(GPTConfig(V, 8, n_layer=1, n_head=2, n_embd=8))
    before = copy.deepcopy(pi)
    batch = preferences(triplets(0), pi)
    steps(pi, batch, torch.optim.Adam(pi.parameters(), lr=1e-6))
    for (name, p), q in zip(pi.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.float32 and not torch.equal(p, q), name


# ------------------------------------------------- pairs and batches


@given(seed=seeds, beta=betas)
def test_loss_of_a_pair_is_eq_7_of_the_sums_over_its_own_responses(seed, beta):
    """Responses of unequal lengths, each computed once and paired by row  =>  each pair's loss is
    Eq. 7 of its own four log pi(y|x), which are sums over tokens.  Eq. 7; pitfall 5"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    batch = preferences(found, pi_ref)
    logps, four = dpo.response_logps(pi, batch.ids, batch.mask), four_logps(found, pi, pi_ref)
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
