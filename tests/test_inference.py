"""lib/inference.py computes what dpo.py and model.py define, and bfloat16 is used where it pays."""

from types import SimpleNamespace

import pytest
import torch

import dpo
from lib.inference import collate, compute_logps, fast_response_logps, generate, mean_kl
from lib.optim import bf16_supported
from model import GPT, GPTConfig
from tiny import CPU, Products

V, T = 11, 8


def gpt(bf16: bool = False, dtype=torch.float64, context: int = T) -> GPT:
    torch.manual_seed(0)
    pi = GPT(GPTConfig(V, context, 2, 2, 8)).to(dtype)
    for p in pi.parameters():
        p.data += 0.3 * torch.randn_like(p)
    pi.bf16 = bf16
    return pi


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and masks: responses of all lengths and places, some with holes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, T), generator=generator)
    first, last = torch.randint(1, T, (2, rows, 1), generator=generator).sort(0).values
    place = torch.arange(T)
    hole = (torch.rand(ids.shape, generator=generator) < 0.1) & (place != first)
    return ids, (first <= place) & (place <= last) & ~hole


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 40])
def test_fast_response_logps_are_response_logps_with_their_gradients(rows):
    """In float64. pitfalls 2, 3"""
    ids, mask = batch(rows, seed=rows)
    weight = torch.randn(mask.shape, dtype=torch.float64)
    found = []
    for logps_fn in (dpo.response_logps, fast_response_logps):
        pi = gpt()
        logps = logps_fn(pi, ids, mask)
        (logps * weight).sum().backward()
        found.append([logps.detach(), *(p.grad for p in pi.parameters())])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert torch.equal(found[1][0] < 0, mask)


def test_in_bfloat16_log_probabilities_and_gradients_are_float32():
    """Values agree with float32 up to bfloat16 rounding. pitfalls 14, 15, 16"""
    ids, mask = batch(3)
    exact, rounded = gpt(dtype=torch.float32), gpt(bf16=True, dtype=torch.float32)
    with Products() as products:
        logps = fast_response_logps(rounded, ids, mask)
    logps.sum().backward()
    assert torch.bfloat16 in products.dtypes and logps.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in rounded.parameters())
    error = (logps - fast_response_logps(exact, ids, mask)).abs().max().item()
    assert 0 < error < 0.1
    torch.testing.assert_close(logps, dpo.response_logps(rounded, ids, mask), atol=0.05, rtol=0)


def test_log_probabilities_and_kl_of_many_rows_are_those_of_dpo():
    """In several batches, because their size depends on the context. pitfall 25"""
    pi_theta, pi_ref = gpt(context=4096), gpt(context=4096)
    pi_theta.wte.weight.data += 0.3 * torch.randn_like(pi_theta.wte.weight)
    ids, mask = batch(200)
    logps, kl = compute_logps(pi_ref, ids, mask), mean_kl(pi_theta, pi_ref, ids, mask)
    torch.testing.assert_close(logps, dpo.response_logps(pi_ref, ids, mask).detach())
    torch.testing.assert_close(kl, dpo.sequence_kl(pi_theta, pi_ref, ids, mask))
    assert not logps.requires_grad and not kl.requires_grad and (kl > 0).all()
    assert mean_kl(pi_ref, pi_ref, ids, mask).abs().max() == 0


def test_collate_pads_on_the_right():
    ids, mask = collate([[1, 2, 3], [4, 5, 6, 7]], [2, 1])
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


# ------------------------------------------------- sampling


TOKENIZER = SimpleNamespace(eot_token=V - 1, decode=str)


def test_log_probabilities_from_sampling_equal_those_of_rescoring():
    """Even where rows with other prompt lengths share the batch. pitfalls 9, 11, 18"""
    pi, end = gpt(dtype=torch.float32), TOKENIZER.eot_token
    prompts = [[1, 2, 3, 4], [5], [6, 7]] * 100
    (ids, mask, logps), texts = generate(pi, prompts, 4, TOKENIZER, 0, "samples")  # 2 batches
    prompts = [x for x in prompts for _ in range(4)]
    assert texts == [str(row) for row in ids.tolist()]
    torch.testing.assert_close(logps, compute_logps(pi, ids, mask), atol=2e-5, rtol=1e-4)
    for x, row, under in zip(prompts, ids.tolist(), mask.tolist(), strict=True):
        y = [token for token, inside in zip(row, under, strict=True) if inside]
        assert row[: len(x)] == x and under[: len(x)] == [False] * len(x)
        assert y and end not in y[:-1] and (y[-1] == end or len(x) + len(y) == T)


def test_samples_depend_on_seed_and_purpose_only():
    pi, prompts = gpt(dtype=torch.float32), [[1], [2, 3]] * 20

    def samples(*args):
        torch.rand(7)  # the global generator has no influence
        return generate(pi, prompts, 1, TOKENIZER, *args)[0][0].tolist()

    first = samples(0, "a")
    assert samples(0, "a") == first
    assert samples(1, "a") != first and samples(0, "b") != first


# ------------------------------------------------- bfloat16


@pytest.mark.parametrize(
    "units, capability", [(True, "AVX512"), (True, "AVX2"), (True, "DEFAULT"), (False, "AVX512")]
)
def test_bfloat16_is_used_only_on_processors_with_units_for_it(units, capability, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: units)
    assert bf16_supported(CPU) == (units and capability == "AVX512")
    assert bf16_supported(torch.device("cuda")) == units
    assert not bf16_supported(torch.device("mps"))
