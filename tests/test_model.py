"""model.py: GPT-2's architecture, and sampling from it."""
import math

import pytest
import torch
import torch.nn.functional as F

import model
from model import GPT, GPTConfig, sample

CONFIG = GPTConfig(vocab_size=11, context=9, n_layer=2, n_head=2, n_embd=8)


def gpt(seed=0, scale=20.0) -> GPT:
    """A random GPT whose next-token distributions are far from uniform, float64."""
    torch.manual_seed(seed)
    pi = GPT(CONFIG).double()
    with torch.no_grad():
        for p in pi.parameters():
            if p.ndim == 2:
                p.mul_(scale ** 0.5)
    return pi


def test_the_architecture_is_gpt2s():
    """GPT-2's parameters by name and count, and its function written anew: pre-LayerNorm, fused attention, tanh-GELU."""
    pi = gpt()
    V, T, L, C = CONFIG.vocab_size, CONFIG.context, CONFIG.n_layer, CONFIG.n_embd
    assert sum(p.numel() for p in pi.parameters()) == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    ids = torch.randint(0, V, (3, T))
    x = pi.wte(ids) + pi.wpe(torch.arange(T))
    for block in pi.h:
        q, k, v = (h.unflatten(-1, (CONFIG.n_head, -1)).transpose(1, 2) for h in block.attn.c_attn(block.ln_1(x)).split(C, -1))
        x = x + block.attn.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))))
    torch.testing.assert_close(pi(ids), pi.ln_f(x) @ pi.wte.weight.T)


@pytest.mark.parametrize("T, start", [(5, 0), (1, 0), (1, 4), (3, 2)])
def test_attention_of_a_gpu_is_that_of_a_cpu(T, start):
    """The whole of a row, the next token after a cache, or several after one: the fused kernel computes what is written out."""
    q, k, v = torch.randn(3, 2, 2, start + T, 4, dtype=torch.float64)
    written, fused = (model.attend(q[:, :, start:], k, v, start, fused) for fused in (False, True))
    torch.testing.assert_close(fused, written)


def greedy(pi, x, end):
    y = []
    while len(x) + len(y) < CONFIG.context and end not in y:
        y.append(int(pi(torch.tensor([x + y]))[0, -1].argmax()))
    return y


def test_at_temperature_zero_sampling_is_greedy_whatever_stands_beside_it():
    """Prompts of every length in one batch: each row is what it would be alone."""
    pi = gpt(3)
    prompts = [torch.randint(0, 10, (n,)).tolist() for n in (1, 3, 2, 8, 5, 1, 4)]
    expected = [greedy(pi, x, end=10) for x in prompts]
    assert sample(pi, prompts, end=10, temperature=1e-6) == expected


def test_a_response_holds_the_end_token_once_and_last_or_fills_the_context():
    pi = gpt(1, scale=5.0)
    prompts = [[1, 2, 3][:1 + i % 3] for i in range(500)]
    ys = sample(pi, prompts, end=0, generator=torch.Generator().manual_seed(0))
    ended = [0 in y for y in ys]
    assert any(ended) and not all(ended)
    for x, y in zip(prompts, ys):
        assert 1 <= len(y) <= CONFIG.context - len(x)
        assert (y.count(0) == 1 and y[-1] == 0) or (0 not in y and len(x) + len(y) == CONFIG.context)


def test_the_end_token_inside_a_prompt_does_not_end_the_response():
    pi = gpt(1, scale=5.0)
    ys = sample(pi, [[0, 0], [0]] * 50, end=0, generator=torch.Generator().manual_seed(0))
    assert max(map(len, ys)) > 1


def test_a_token_of_probability_zero_is_never_drawn():
    pi = gpt()
    with torch.no_grad():
        pi.ln_f.weight.zero_()
        pi.ln_f.bias.copy_(torch.eye(8, dtype=torch.double)[0])
        pi.wte.weight.zero_()
        pi.wte.weight[[2, 5], 0], pi.wte.weight[[0, 1, 3, 4, 6, 7, 8, 9, 10], 0] = 0.0, -1e4
    drawn = [t for y in sample(pi, [[1]] * 300, end=0, generator=torch.Generator().manual_seed(0)) for t in y]
    assert set(drawn) == {2, 5} and abs(drawn.count(2) / len(drawn) - 0.5) < 5 * 0.5 / math.sqrt(len(drawn))


def test_the_same_generator_draws_the_same_responses():
    pi, prompts = gpt(scale=5.0), [[1], [2, 3]] * 20
    one, two, three = (sample(pi, prompts, 0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one == two != three


@pytest.mark.parametrize("prompt", [[], [1] * 9, [1] * 20])
def test_a_prompt_that_leaves_no_room_is_an_error(prompt):
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        sample(gpt(), [[1], prompt], end=0)


def test_asking_seldom_whether_rows_have_ended_changes_no_response(monkeypatch):
    """A GPU is asked every few tokens: rows that have ended meanwhile stay as they are."""
    pi = gpt(3)
    prompts = [torch.randint(0, 10, (1 + n % 8,)).tolist() for n in range(40)]
    often = sample(pi, prompts, end=2, temperature=1e-6)
    monkeypatch.setitem(model.ASK_EVERY, "cpu", 3)
    assert sample(pi, prompts, end=2, temperature=1e-6) == often and any(y[-1] == 2 for y in often)
