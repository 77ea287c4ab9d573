"""log pi(y|x) and the sequence KL: which tokens count, and how much.

Three models make the mistakes visible one at a time. The logits of `Positional` depend on the
position alone, so the gradient shows which tokens a function counts. Those of `Bigram` depend on
the current token, so they show which tokens the model sees. The GPT is small enough that all its
responses can be listed.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from torch import Tensor
from worlds import (
    CONTEXT,
    END,
    PROMPTS,
    Bigram,
    Positional,
    V,
    assert_at_most,
    assert_same,
    bigram,
    enumerated,
    gpt,
    kl,
    log_probability,
    mean,
    next_token,
    number,
    policy,
    responses,
    rows,
    seeds,
    uniform,
)

import dpo


def batch_of(prompt: int, lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Random responses of these lengths to a prompt of `prompt` tokens, and some padding.

    The padding is the end token, and the responses have none, unless a theorem puts one there.
    """
    tokens = torch.randint(END, (len(lengths), 8), generator=torch.Generator().manual_seed(seed))
    ys = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    return rows([seed % END] * prompt, ys, prompt + max(lengths) + 1, END)


def batches_of(lengths) -> st.SearchStrategy:
    return st.builds(batch_of, st.integers(1, 3), st.lists(lengths, min_size=1, max_size=3), seeds)


batches, long_batches = batches_of(st.integers(1, 4)), batches_of(st.integers(3, 4))


def logits_used(response_logps, ids: Tensor, mask: Tensor) -> Tensor:
    """The gradient of each row's log pi(y|x) with respect to the logits, (B, T, V)."""
    found = []
    for i in range(len(ids)):
        pi = Positional(uniform((ids.size(1), V), -2.0, 2.0, 7))
        response_logps(pi, ids[i : i + 1], mask[i : i + 1]).sum().backward()
        assert pi.logits.grad is not None, "log pi(y|x) has no gradient"
        found.append(pi.logits.grad.double())
    return torch.stack(found)


def token_weights(response_logps, ids: Tensor, mask: Tensor) -> Tensor:
    """How much each token counts in log pi(y|x), (B, T), if the logits before it predict it."""
    p = uniform((ids.size(1), V), -2.0, 2.0, 7).softmax(-1)
    gradient = logits_used(response_logps, ids, mask)[:, :-1]  # (B, T-1, V)
    score = F.one_hot(ids[:, 1:], V) - p[:-1]  # the gradient of one log-probability
    return F.pad((gradient * score).sum(-1) / score.square().sum(-1), (1, 0))


def shown(weights: Tensor, mask: Tensor) -> str:
    weights = [[round(v, 3) + 0.0 for v in row] for row in weights.tolist()]
    return f"the tokens have weights {weights}, but the mask is {mask.int().tolist()}"


# ------------------------------------------------- log pi(y|x), in the order of diagnosis


@mistake("log pi(y|x) has no gradient", 13, "no no_grad, detach or item() for the policy")
@given(batch=long_batches)
def test_log_probability_of_a_response_has_a_gradient(response_logps, batch):
    """d log pi(y|x) / d logits != 0.  pitfall 13"""
    assert logits_used(response_logps, *batch).abs().sum() > 0


@mistake("a cross-entropy instead of a log-probability", None, "negate the cross-entropy")
@given(batch=batches)
def test_log_probability_is_never_positive(response_logps, batch):
    """log pi(y|x) <= 0"""
    pi = Positional(uniform((batch[0].size(1), V), -2.0, 2.0, 7))
    assert_at_most(response_logps(pi, *batch), 0.0)


@mistake("no label shift: logits at t score token t", 1, "score ids[:, 1:] with logits[:, :-1]")
@given(batch=batches)
def test_token_is_scored_by_the_logits_before_it(response_logps, batch):
    """Token t + 1 is y_k  =>  d log pi(y|x) / d logits at t is >= 0 for y_k and <= 0 for other
    tokens, and 0 at the last position.  pitfall 1"""
    ids, mask = batch
    used = logits_used(response_logps, ids, mask)
    assert (used[:, -1].abs() < 1e-6).all(), "the logits at the last position are used"
    toward = used[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    others = used[:, :-1].scatter(-1, ids[:, 1:, None], -1.0)
    assert (toward > -1e-6).all() and (others < 1e-6).all(), "logits at t score another token"


@mistake("the first response token is dropped", 2, "mask ids[:, 1:] with mask[:, 1:]")
@given(batch=long_batches)
def test_first_response_token_counts(response_logps, batch):
    """y_1 has a nonzero weight in log pi(y|x).  pitfall 2"""
    ids, mask = batch
    weights = token_weights(response_logps, ids, mask)
    assert (weights[mask & (mask.cumsum(-1) == 1)].abs() > 1e-3).all(), shown(weights, mask)


@mistake("the end token is masked", 10, "build the mask from lengths, not from ids != pad")
@given(batch=long_batches)
def test_last_response_token_counts(response_logps, batch):
    """The last token of y, its end token, has a nonzero weight in log pi(y|x).  pitfall 10"""
    ids, mask = batch
    last = mask & ~mask.roll(-1, 1)
    weights = token_weights(response_logps, ids.masked_fill(last, END), mask)  # like the padding
    assert (weights[last].abs() > 1e-3).all(), shown(weights, mask)


@mistake("padding is scored", 3, "multiply by mask[:, 1:] before summing")
@given(batch=batches)
def test_padding_does_not_count(response_logps, batch):
    """Tokens after y have weight 0 in log pi(y|x).  pitfall 3"""
    ids, mask = batch
    weights = token_weights(response_logps, ids, mask)
    after = (mask.cumsum(-1) > 0) & ~mask
    assert (weights[after].abs() < 1e-4).all(), shown(weights, mask)


@mistake("the prompt is scored", 7, "the mask must be False on the prompt")
@given(batch=batches)
def test_prompt_does_not_count(response_logps, batch):
    """Tokens of x have weight 0 in log pi(y|x).  pitfall 7"""
    ids, mask = batch
    weights = token_weights(response_logps, ids, mask)
    assert (weights[mask.cumsum(-1) == 0].abs() < 1e-4).all(), shown(weights, mask)


@mistake("tokens have different weights", None, "each token has weight 1")
@given(batch=batches)
def test_all_tokens_of_a_response_count_alike(response_logps, batch):
    """The tokens of one response have equal weights in log pi(y|x).  Eq. 7"""
    ids, mask = batch
    weights = token_weights(response_logps, ids, mask)
    average = (weights * mask).sum(-1) / mask.sum(-1)
    assert_same(weights * mask, average[:, None] * mask, 1e-4)


@mistake("mean instead of sum over the tokens of a response", 5, "log pi(y|x) is the sum")
@given(batch=batches)
def test_log_probability_is_a_sum_over_tokens(response_logps, batch):
    """Each token of y has weight 1 in log pi(y|x), whatever the length of y.  Eq. 7; pitfall 5"""
    ids, mask = batch
    weights = token_weights(response_logps, ids, mask)
    assert (weights[mask] - 1).abs().max() < 1e-4, shown(weights, mask)


@mistake("log-softmax in low precision", 15, "logits.float().log_softmax(-1)")
@given(seed=seeds)
def test_log_probabilities_are_float32_whatever_the_model_computes_in(response_logps, seed):
    """bfloat16 logits  =>  log pi(y|x) as for the same numbers in float64, up to 1e-5.
    pitfall 15"""
    low = Bigram(uniform((V, V), -3.0, 3.0, seed).bfloat16())
    same = Bigram(low.logits.detach().double())
    batch = rows([0], responses([0]))
    logps = response_logps(low, *batch)
    assert logps.dtype in (torch.float32, torch.float64), f"the result is in {logps.dtype}"
    assert_same(logps, response_logps(same, *batch), 1e-5)


@mistake("rows of a batch are mixed up", 3, "sum over the token dimension only")
@given(batch=batches, seed=seeds)
def test_batch_mates_are_invisible(response_logps, batch, seed):
    """A row alone, or in a batch in reverse order  =>  the same log pi(y|x).  pitfall 3"""
    ids, mask = batch
    pi = bigram(seed)
    together = response_logps(pi, ids.flip(0), mask.flip(0)).flip(0)
    alone = [response_logps(pi, *row) for row in zip(ids.split(1), mask.split(1), strict=True)]
    assert_same(together, torch.cat(alone))


@mistake("an attention mask hides the response", 4, "the attention mask must hide padding only")
@given(seed=seeds, prompt=st.integers(1, 3))
def test_model_sees_prompt_and_earlier_tokens(response_logps, seed, prompt):
    """pi depends on the preceding token  =>  log pi(y|x) is that of the chain rule, token by
    token.  pitfall 4"""
    pi = bigram(seed)
    ids, mask = batch_of(prompt, [3], seed)
    x, y = ids[0, :prompt].tolist(), ids[0, prompt : prompt + 3].tolist()
    assert_same(response_logps(pi, ids, mask), log_probability(pi, x, y)[None])


@mistake("all rows share one prompt length", 7, "read it from each row's own mask")
@given(seed=seeds)
def test_prompts_of_different_lengths_share_a_batch(response_logps, seed):
    """Rows with prompts of one and of three tokens  =>  each row's own log pi(y|x).  pitfall 7"""
    pi, both = bigram(seed), [([0], [1, END]), ([1, 0, 1], [0, 1, END])]
    each = [rows(x, [y], 7) for x, y in both]
    ids, mask = (torch.cat(parts) for parts in zip(*each, strict=True))
    assert_same(response_logps(pi, ids, mask), [log_probability(pi, x, y) for x, y in both])


@mistake("padding changes log pi(y|x)", 3, "the padding token and length must not matter")
def test_padding_is_invisible(response_logps):
    """More padding, or another token as padding  =>  the same log pi(y|x).  pitfalls 3, 10"""
    pi, ys = gpt(0, context=CONTEXT + 3), responses([0])
    plain = response_logps(pi, *rows([0], ys))
    for pad in (1, END):
        assert_same(response_logps(pi, *rows([0], ys, CONTEXT + 3, pad)), plain)


@mistake("a shared beginning changes the margin", 7, "let the mask alone decide what is y")
def test_shared_beginning_of_responses_leaves_the_margin_alone(response_logps):
    """y_w and y_l begin alike  =>  log pi(y_w|x) - log pi(y_l|x) is the same whether the shared
    tokens count as prompt or as response.  pitfall 7"""
    pi, ys = gpt(0), [[END], [1, END]]
    as_prompt = response_logps(pi, *rows([0, 1], ys))
    as_response = response_logps(pi, *rows([0], [[1, *y] for y in ys]))
    assert_same(as_prompt[0] - as_prompt[1], as_response[0] - as_response[1])


@mistake("probabilities do not sum to 1", 10, "count each token once, the end token too")
def test_probabilities_of_all_responses_sum_to_one(response_logps):
    """y ends with the end token, or the context cuts it  =>  sum_y pi(y|x) = 1.  pitfalls 10, 11"""
    for x in PROMPTS:
        logps = response_logps(gpt(0), *rows(x, responses(x)))
        assert_same(logps.double().exp().sum(), 1.0)


@mistake("not a sum of conditional log-probabilities", 1, "compare with one call per token")
def test_log_probability_obeys_the_chain_rule(response_logps):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), each from its own call of the model.
    pitfalls 1, 2"""
    pi = gpt(0)
    for x in PROMPTS:
        expected = [log_probability(pi, x, y) for y in responses(x)]
        assert_same(response_logps(pi, *rows(x, responses(x))), torch.stack(expected))


@mistake("a one-token response is scored wrongly", 2, "the last prompt position predicts it")
def test_log_probability_of_a_one_token_response_is_that_of_the_token(response_logps):
    """y = (y_1)  =>  log pi(y|x) = log_softmax(logits at x's last token)[y_1].  pitfall 2"""
    pi = gpt(0)
    logps = response_logps(pi, *rows([1, 0], [[0], [1], [END]]))
    assert_same(logps, next_token(pi, [1, 0]))


@mistake("not a log-likelihood", 5, "sum the log-probabilities, without weights")
@given(seed=seeds, N=st.integers(2, 6))
def test_reference_without_sft_is_the_winners_frequencies(response_logps, seed, N):
    """pi = frequencies f of the winners  =>  E log pi'(y_w) = E log pi(y_w) - KL(f, pi') for every
    pi', so that pi is the argmax.  Section 4's reference"""
    drawn = torch.randint(N, (20,), generator=torch.Generator().manual_seed(seed))
    winners = torch.cat((drawn, torch.arange(N)))
    f, other = (torch.bincount(winners) / number(len(winners))).log(), policy(N, seed)
    batch = rows([0], winners[:, None].tolist(), 2)
    of_f, of_other = (response_logps(Bigram(v.repeat(N, 1)), *batch).mean() for v in (f, other))
    assert_same(of_other, of_f - kl(f, other))


# ------------------------------------------------- dpo.py's form: one value per token


def test_tokens_outside_the_mask_have_log_probability_zero():
    """Prompt and padding are outside the mask  =>  entries 0 there, and log-probabilities on y.
    pitfall 3"""
    ids, mask = rows([0], responses([0]))
    logps = dpo.response_logps(gpt(0), ids, mask)
    assert logps.shape == ids.shape and torch.equal(logps < 0, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_log_softmax_is_in_at_least_float32(dtype):
    """Logits in any precision  =>  log-softmax in float32 or better.  pitfall 15"""
    logits = uniform((2, 5), -9.0, 9.0, 0).to(dtype)
    found = dpo.log_softmax(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(found, logits.double().log_softmax(-1), 1e-5)


# ------------------------------------------------- sequence KL, in the order of diagnosis


@mistake("padding or the prompt is in the KL", 22, "multiply by mask[:, 1:] before summing")
@given(seed=seeds)
def test_kl_estimate_ignores_padding_and_prompt(sequence_kl, seed):
    """Other tokens outside the mask  =>  the same estimate; no response  =>  0.  pitfall 22"""
    pi_theta, pi_ref = bigram(seed), bigram(seed + 1)
    ids, mask = rows([0, 1], [[1, 0, END]], 8, 0)
    other, _ = rows([1, 1], [[1, 0, END]], 8, 1)
    one, two = (torch.stack(sequence_kl(pi_theta, pi_ref, x, mask)) for x in (ids, other))
    assert_same(one, two)
    assert_same(torch.stack(sequence_kl(pi_theta, pi_ref, ids, mask & False)), 0 * one)


@mistake("KL per token instead of per response", 25, "do not divide by the length")
@given(seed=seeds, n=st.integers(2, 4))
def test_kl_estimate_of_a_response_is_a_sum_over_its_tokens(sequence_kl, seed, n):
    """y repeats the last token of x n times  =>  n times the estimate of one.  pitfall 25"""
    pi_theta, pi_ref = bigram(seed), bigram(seed + 1)
    one, many = (
        torch.stack(sequence_kl(pi_theta, pi_ref, *rows([1], [[1] * k], 6))) for k in (1, n)
    )
    assert_same(many, n * one)


@mistake("KL(pi_ref, pi_theta), or the wrong sign", 25, "log pi_theta - log pi_ref")
def test_mean_of_each_kl_estimate_is_the_sequence_kl(sequence_kl):
    """y ~ pi_theta  =>  the mean of each estimate is KL(pi_theta, pi_ref), exactly, as every y is
    listed.  pitfall 25"""
    pi_theta, pi_ref = gpt(0), gpt(1)
    for x in PROMPTS:
        theta, ref = enumerated(pi_theta, x), enumerated(pi_ref, x)
        for estimate in sequence_kl(pi_theta, pi_ref, *rows(x, responses(x))):
            assert_same(mean(theta, estimate), kl(theta, ref))


@mistake("a negative sum of KLs", 25, "sum over the whole vocabulary")
@given(seed=seeds)
def test_kl_of_next_token_distributions_is_never_negative(sequence_kl, seed):
    """Any two models, any responses  =>  sum_t KL_t >= 0, and every estimate is 0 for a model with
    itself.  pitfall 25"""
    pi_theta, pi_ref = bigram(2 * seed), bigram(2 * seed + 1)
    batch = rows([0], responses([0]))
    _, *token_kl = sequence_kl(pi_theta, pi_ref, *batch)
    for estimate in token_kl:
        assert_at_most(0.0, estimate)
    for estimate in sequence_kl(pi_theta, pi_theta, *batch):
        assert_same(estimate, torch.zeros(len(batch[0])))


def test_kl_estimate_is_the_sum_of_token_kls():
    """sum_t KL(pi_theta( . |x, y_<t), pi_ref( . |x, y_<t)).  pitfall 22"""
    pi_theta, pi_ref, x = gpt(0), gpt(1), [1, 0]
    token_kl = torch.zeros(len(responses(x)), dtype=torch.float64)
    for i, y in enumerate(responses(x)):
        for t in range(len(y)):
            token_kl[i] += kl(next_token(pi_theta, x + y[:t]), next_token(pi_ref, x + y[:t]))
    found = dpo.sequence_kl(pi_theta, pi_ref, *rows(x, responses(x)))
    assert_same(found, token_kl)
    assert not found.requires_grad
