"""model.py: GPT-2's architecture, and sampling from an enumerable GPT."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from mistakes import mistake
from worlds import (
    CONTEXT,
    END,
    PROMPTS,
    V,
    assert_at_most,
    assert_same,
    enumerated,
    gpt,
    number,
    responses,
    standard_errors,
)

import dpo
import model
from model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=11, context=8, n_layer=2, n_head=2, n_embd=16)


# ------------------------------------------------- sampling, in the order of diagnosis


def drawn(sample, pi, prompts, seed: int = 0) -> list[list[int]]:
    """Responses, from a function that returns them, or ids and mask."""
    torch.manual_seed(seed)
    result = sample(pi, prompts, END)
    if isinstance(result, list):
        return result
    ids, mask = result[:2]
    return [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]


def assert_frequencies(ys: list[list[int]], possible: list[list[int]], p) -> None:
    """The frequency of each response is its probability, within five standard errors."""
    counts = Counter(map(tuple, ys))
    frequency = torch.tensor([counts.pop(tuple(y), 0) / len(ys) for y in possible]).double()
    assert not counts, f"impossible responses: {sorted(counts)[:3]}"
    assert_at_most(standard_errors(frequency, p, (p * (1 - p) / len(ys)).sqrt()), 5.0)


@mistake("a response is empty", 20, "sample at least one token per prompt")
def test_sampled_response_is_never_empty(sample):
    """Any prompt that leaves room  =>  a response has at least one token.  pitfall 20"""
    assert all(drawn(sample, gpt(0), PROMPTS * 50))


@mistake(
    "tokens follow the end token, or the end token is dropped or doubled",
    10,
    "keep the first end token and cut what follows it",
)
def test_end_token_is_last_if_there_is_one(sample):
    """A sampled response holds the end token at most once, and then as its last.  pitfall 10"""
    ys = drawn(sample, gpt(0), [[0]] * 500)
    assert all(y.count(END) == (y[-1] == END) for y in ys)
    assert any(y[-1] == END for y in ys), "no response ends with the end token"


@mistake(
    "an end token is forced onto responses that reach the length limit",
    11,
    "leave a response that fills the context without an end token",
)
def test_response_without_end_token_fills_the_context(sample):
    """A response has no end token  <=>  it reached the context, which happens.  pitfall 11"""
    ys = drawn(sample, gpt(0), [[0]] * 500)
    cut = [y for y in ys if y[-1] != END]
    assert cut, "every response ends with the end token, though some must fill the context"
    assert all(len(y) == CONTEXT - 1 for y in cut)


@mistake(
    "temperature, top-k or argmax: samples are not from the policy",
    25,
    "sample from softmax(logits) at temperature 1, without top-k or top-p",
)
def test_sampled_frequencies_are_the_enumerated_probabilities(sample):
    """y ~ pi( . |x) at temperature 1  =>  the frequency of each y is pi(y|x).  pitfalls 9, 25"""
    pi, x = gpt(0), [0]
    assert_frequencies(drawn(sample, pi, [x] * 10_000), responses(x), enumerated(pi, x).exp())


@mistake(
    "prompts of different lengths in one batch are at wrong positions",
    26,
    "pad on the right, or pass positions that skip the padding",
)
def test_prompts_of_two_lengths_share_a_batch(sample):
    """Prompts of one and of two tokens  =>  each has its own frequencies.  pitfall 26"""
    pi = gpt(0)
    ys = drawn(sample, pi, PROMPTS * 10_000)
    for i, x in enumerate(PROMPTS):
        assert_frequencies(ys[i::2], responses(x), enumerated(pi, x).exp())


# ------------------------------------------------- sampling in model.py


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sampled_log_probabilities_are_those_of_the_response():
    """ids, mask, logps of `sample`  =>  logps are `response_logps` of ids under mask, whatever the
    temperature.  pitfalls 9, 25"""
    pi = gpt(0)
    for temperature in (1.0, 2.0):
        ids, mask, logps = model.sample(pi, PROMPTS * 20, END, temperature, generator())
        assert_same(logps, dpo.response_logps(pi, ids, mask), 1e-5)
        assert torch.equal(logps < 0, mask)


def test_sample_keeps_prompts_and_pads_on_the_right():
    """A row is prompt, response, padding; the mask is the response  =>  the prompts come back, and
    each mask is one run of True that starts after its prompt.  pitfall 26"""
    prompts = PROMPTS * 20
    ids, mask, _ = model.sample(gpt(0), prompts, END, generator=generator())
    assert ids.shape == mask.shape == (len(prompts), CONTEXT)
    for x, row, inside in zip(prompts, ids.tolist(), mask.tolist(), strict=True):
        n = sum(inside)
        assert row[: len(x)] == x and n >= 1
        assert inside == [len(x) <= t < len(x) + n for t in range(CONTEXT)]


@pytest.mark.parametrize("temperature", [2.0, 1e-4])
def test_temperature_flattens_the_next_token(temperature):
    """One token left, temperature T  =>  y_1 is drawn from softmax(logits / T), and at T -> 0 it is
    the argmax.  pitfall 25"""
    pi, x, n = gpt(0), [0, 1, 0], 20_000
    logits = pi(torch.tensor([x]))[0, -1].detach()
    ids, _, _ = model.sample(pi, [x] * n, END, temperature, generator())
    ys = ids[:, -1:].tolist()
    assert_frequencies(ys, [[0], [1], [END]], (logits / temperature).softmax(-1))


@pytest.mark.parametrize("x", [[], [0] * CONTEXT, [0] * (CONTEXT + 3)])
def test_prompt_that_leaves_no_response_is_refused(x):
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
    prompt, found without cache or batch.  pitfall 26"""
    pi = gpt(11, context=9, n_layer=2)
    torch.manual_seed(0)
    prompts = [torch.randint(0, V, (1 + n % 8,)).tolist() for n in range(40)]
    ids, mask, _ = model.sample(pi, prompts, END, 1e-6)
    found = [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
    assert found == [greedy(pi, x) for x in prompts]
    assert any(y[-1] == END for y in found) and any(y[-1] != END for y in found)


def test_end_token_inside_a_prompt_does_not_end_the_response():
    """x contains the end token  =>  y is sampled as usual.  pitfall 11"""
    _, mask, _ = model.sample(gpt(0), [[END, END], [END]] * 50, END, generator=generator())
    assert mask.sum(1).max() > 1


def test_token_of_probability_zero_is_never_drawn():
    """Two tokens share all the probability  =>  no other is drawn, and each half of the time"""
    pi, logits = GPT(CONFIG), torch.full((11,), -1e4)
    logits[[2, 5]] = 0.0
    pi.head = lambda h: logits.expand(len(h), -1)
    ids, mask, _ = model.sample(pi, [[1]] * 300, 0, generator=generator())
    assert_frequencies(ids[mask][:, None].tolist(), [[2], [5]], number([0.5, 0.5]))


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


def test_architecture_is_gpt2s():
    """GPT-2's parameters by count, and its function written again: pre-LayerNorm, fused attention,
    tanh-GELU, tied output matrix"""
    pi, C, T, L = gpt(0, n_layer=2), 16, CONTEXT, 2
    expected = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert sum(p.numel() for p in pi.parameters()) == expected
    ids = torch.tensor([[0, 1, 1, 0], [1, END, 0, 0]])
    x = pi.wte(ids) + pi.wpe(torch.arange(T))
    for block in pi.h:
        split = block.attn.c_attn(block.ln_1(x)).split(C, -1)
        q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in split)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
        h = block.mlp.c_fc(block.ln_2(x))
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + block.mlp.c_proj(gelu)
    torch.testing.assert_close(pi(ids), pi.ln_f(x) @ pi.wte.weight.T)
    torch.testing.assert_close(pi.head(pi.hidden(ids)), pi(ids))


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
    pi, ids = gpt(0), torch.tensor([[0, 1, 1, 0], [1, END, 0, 0]])
    cache, start, parts = pi.new_cache(2), 0, []
    for size in sizes:
        parts.append(pi.head(pi.hidden(ids[:, start : start + size], cache, start)))
        start += size
    assert_same(torch.cat(parts, 1), pi(ids))


@pytest.mark.parametrize("T, start", [(5, 0), (1, 0), (1, 4), (3, 2)])
def test_attention_is_the_fused_kernels(T, start):
    """A whole row, the next token after a cache, or several after one  =>  as
    scaled_dot_product_attention with the mask of earlier positions.  pitfall 4"""
    q, k, v = torch.randn(3, 2, 2, start + T, 4, dtype=torch.float64)
    seen = torch.ones(T, start + T, dtype=torch.bool).tril(start)
    fused = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=seen)
    torch.testing.assert_close(model.causal_attention(q[:, :, start:], k, v, start), fused)


def test_bfloat16_changes_logits_by_rounding_alone_and_weights_not_at_all():
    """bf16 is set  =>  logits in bfloat16 close to those in float32, weights float32.
    pitfalls 14, 16"""
    torch.manual_seed(0)
    pi, ids = GPT(CONFIG), torch.tensor([[0, 1, 0, END]])
    exact = pi(ids)
    pi.bf16 = True
    low = pi(ids)
    assert low.dtype == torch.bfloat16 and pi.new_cache(1).dtype == torch.bfloat16
    assert 0 < (low.float() - exact).abs().max() < 0.05
    assert {p.dtype for p in pi.parameters()} == {torch.float32}


def test_logit_bias_shifts_each_tokens_logit_by_its_scaled_value():
    """bias = 0  =>  the logits of a model without one;  logits = h W' + bias_scale bias"""
    plain, biased = GPT(CONFIG), GPT(dataclasses.replace(CONFIG, bias_scale=3.0))
    biased.load_state_dict(plain.state_dict() | {"bias": torch.zeros(11)})
    ids = torch.arange(8)[None]
    assert_same(biased(ids), plain(ids))
    with torch.no_grad():
        biased.bias[5] = 2.0
    shift = torch.zeros(11)
    shift[5] = 6.0
    torch.testing.assert_close(biased(ids), plain(ids) + shift)
