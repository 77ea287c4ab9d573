"""model.py: the GPT (test_gpt2.py checks what it computes), and sampling from a tiny one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from mistakes import mistake
from worlds import (
    CONTEXT,
    END,
    PROMPTS,
    V,
    assert_frequencies,
    assert_same,
    enumerated,
    gpt,
    responses,
)

import dpo
import model
from model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=11, context=8, n_layer=2, n_head=2, n_embd=16)
IDS = torch.tensor([[0, 1, 1, 0], [1, END, 0, 0]])


# ------------------------------------------------- sampling, in the order of diagnosis


def drawn(sample, pi, prompts, *options) -> list[list[int]]:
    """Responses, from a function that returns them, or ids and mask."""
    torch.manual_seed(0)
    found = sample(pi, prompts, END, *options)
    if isinstance(found, list):
        return found
    return [row[inside].tolist() for row, inside in zip(*found[:2], strict=True)]


@mistake("a response is empty", 20, "sample at least one token per prompt")
def test_sampled_response_is_never_empty(sample):
    """Any prompt that leaves room  =>  a response has at least one token.  pitfall 20"""
    assert all(drawn(sample, gpt(0), PROMPTS * 50))


@mistake("the end token is dropped or not the last", 10, "keep the first one, cut what follows")
def test_end_token_is_last_if_there_is_one(sample):
    """A sampled response holds the end token at most once, and then as its last.  pitfall 10"""
    ys = drawn(sample, gpt(0), [[0]] * 500)
    assert all(y.count(END) == (y[-1] == END) for y in ys)
    assert any(y[-1] == END for y in ys), "no response ends with the end token"


@mistake("an end token is forced onto cut responses", 11, "leave them without an end token")
def test_response_without_end_token_fills_the_context(sample):
    """A response has no end token  =>  it fills the context; such responses occur.  pitfall 11"""
    ys = drawn(sample, gpt(0), [[0]] * 500)
    cut = [y for y in ys if y[-1] != END]
    assert cut, "every response ends with the end token, though some must fill the context"
    assert all(len(y) == CONTEXT - 1 for y in cut)


@mistake("samples are not from the policy", 25, "temperature 1, no top-k, top-p or argmax")
def test_sampled_frequencies_are_the_enumerated_probabilities(sample):
    """y ~ pi( . |x) at temperature 1  =>  the frequency of each y is pi(y|x).  pitfalls 9, 25"""
    pi, x = gpt(0), [0]
    assert_frequencies(drawn(sample, pi, [x] * 10_000), responses(x), enumerated(pi, x).exp())


@mistake("wrong positions after short prompts", 26, "pad right, or skip padding in positions")
def test_prompts_of_two_lengths_share_a_batch(sample):
    """Prompts of one and of two tokens  =>  each has its own frequencies.  pitfall 26"""
    pi = gpt(0)
    ys = drawn(sample, pi, PROMPTS * 10_000)
    for i, x in enumerate(PROMPTS):
        assert_frequencies(ys[i::2], responses(x), enumerated(pi, x).exp())


# ------------------------------------------------- sampling in model.py


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sampled_log_probabilities_are_those_of_the_response():
    """ids, mask, logps of `sample`  =>  logps are `response_logps` of ids under mask, whatever the
    temperature.  pitfalls 9, 25"""
    pi = gpt(0)
    for temperature in (1.0, 2.0):
        ids, mask, logps = model.sample(pi, PROMPTS * 20, END, temperature, generator(0))
        assert_same(logps, dpo.response_logps(pi, ids, mask), 1e-5)
        assert torch.equal(logps < 0, mask)


def test_temperature_flattens_the_next_token():
    """One token left, temperature 2  =>  y_1 is drawn from softmax(logits / 2).  pitfall 25"""
    pi, x = gpt(0), [0, 1, 0]
    p = (pi(torch.tensor([x]))[0, -1].detach() / 2).softmax(-1)
    assert_frequencies(drawn(model.sample, pi, [x] * 20_000, 2.0), [[0], [1], [END]], p)


@pytest.mark.parametrize("x", [[], [0] * CONTEXT, [0] * (CONTEXT + 3)])
def test_prompt_that_is_empty_or_leaves_no_room_is_refused(x):
    """len(x) = 0 or the whole context  =>  ValueError, whatever the other prompts.  pitfall 20"""
    with pytest.raises(ValueError, match=f"1 to {CONTEXT - 1} tokens"):
        model.sample(gpt(0), [[0], x], END)


def greedy(pi: GPT, x: list[int]) -> list[int]:
    y = []
    while len(x) + len(y) < pi.config.context and END not in y:
        y.append(int(pi(torch.tensor([x + y]))[0, -1].argmax()))
    return y


def test_at_temperature_zero_each_row_is_the_greedy_response():
    """Prompts of every length in one batch, T -> 0  =>  each row is the greedy response to its own
    prompt, found without cache or batch.  pitfalls 11, 26"""
    pi = gpt(11, context=9, n_layer=2)
    prompts = [torch.randint(V, (1 + n % 8,), generator=generator(n)).tolist() for n in range(40)]
    found = drawn(model.sample, pi, prompts, 1e-6)
    assert found == [greedy(pi, x) for x in prompts]
    assert {y[-1] == END for y in found} == {True, False}


def test_sampling_draws_from_its_own_generator_only():
    """A generator is given  =>  equal seeds give equal samples, another seed gives others, and the
    global random state is untouched.  pitfall 18"""
    pi, state = gpt(0), torch.get_rng_state()
    one, two, three = (
        model.sample(pi, PROMPTS * 20, END, generator=generator(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(two, three)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------- the model


def test_initial_weights_have_gpt2s_scale():
    """Matrices have standard deviation .02, divided by sqrt(2 layers) where a residual is added;
    biases are 0, LayerNorms the identity"""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=200, context=64, n_layer=8, n_head=2, n_embd=64)
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02
            assert abs(p.std() / expected - 1) < 0.05, name


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 2, 1]])
def test_cached_logits_are_the_uncached_ones(sizes):
    """Tokens in one call, or in pieces with a cache  =>  the same logits.  pitfall 26"""
    pi, start = gpt(0), 0
    cache = pi.new_cache(2)
    for ids, expected in zip(IDS.split(sizes, 1), pi(IDS).split(sizes, 1), strict=True):
        assert_same(pi.head(pi.hidden(ids, cache, start)), expected)
        start += ids.size(1)


@pytest.mark.parametrize("T, start", [(5, 0), (1, 0), (1, 4), (3, 2)])
def test_attention_equals_that_of_the_fused_kernel(T, start):
    """A whole row, the next token after a cache, or several after one  =>  as
    scaled_dot_product_attention masked to positions up to the query's.  pitfall 4"""
    q, k, v = torch.randn(3, 2, 2, start + T, 4, dtype=torch.float64)
    seen = torch.ones(T, start + T, dtype=torch.bool).tril(start)
    fused = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=seen)
    assert_same(model.causal_attention(q[:, :, start:], k, v, start), fused)


def test_bfloat16_changes_logits_by_rounding_alone_and_weights_not_at_all():
    """bf16 is set  =>  logits in bfloat16 close to those in float32, weights float32.
    pitfalls 14, 16"""
    torch.manual_seed(0)
    pi = GPT(CONFIG)
    exact = pi(IDS)
    pi.bf16 = True
    low = pi(IDS)
    assert low.dtype == torch.bfloat16 and pi.new_cache(1).dtype == torch.bfloat16
    assert 0 < (low.float() - exact).abs().max() < 0.05
    assert {p.dtype for p in pi.parameters()} == {torch.float32}


def test_logit_bias_shifts_each_tokens_logit_by_its_scaled_value():
    """bias = 0  =>  the logits of a model without one;  logits = h W' + bias_scale bias"""
    plain, biased = GPT(CONFIG), GPT(dataclasses.replace(CONFIG, bias_scale=3.0))
    biased.load_state_dict(plain.state_dict() | {"bias": torch.zeros(11)})
    assert_same(biased(IDS), plain(IDS))
    bias = torch.arange(11.0)
    biased.load_state_dict({"bias": bias}, strict=False)
    assert_same(biased(IDS), plain(IDS) + 3 * bias, 1e-5)
