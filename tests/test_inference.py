"""lib/inference.py computes what dpo.py and model.py define, and bfloat16 is used where it pays."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
from lib.inference import collate, compute_logps, fast_response_logps, generate, mean_kl
from lib.optim import bf16_supported
from model import GPT, GPTConfig
from tiny import CPU, Products

V, T = 11, 8


def gpt(bf16: bool = False, dtype=torch.float64) -> GPT:
    torch.manual_seed(0)
    pi = GPT(GPTConfig(V, T, 2, 2, 8)).to(dtype)
    for p in pi.parameters():
        p.data += 0.3 * torch.randn_like(p)
    pi.bf16 = bf16
    return pi


def masks(spans: list[tuple[int, int]]) -> torch.Tensor:
    place = torch.arange(T)
    return torch.stack([(place >= start) & (place < stop) for start, stop in spans])


# Responses of all lengths: of one token, at both ends, and rows without padding.
SPANS = st.lists(
    st.integers(1, T - 1).flatmap(lambda i: st.tuples(st.just(i), st.integers(i + 1, T))),
    min_size=1,
    max_size=13,
)


@given(SPANS, st.integers(0, 999))
def test_fast_response_logps_are_response_logps_with_their_gradients(spans, seed):
    """In float64. pitfalls 2, 3"""
    mask, generator = masks(spans), torch.Generator().manual_seed(seed)
    ids = torch.randint(V, mask.shape, generator=generator)
    weight = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    found = []
    for logps_fn in (dpo.response_logps, fast_response_logps):
        pi = gpt()
        logps = logps_fn(pi, ids, mask)
        (logps * weight).sum().backward()
        found.append((logps.detach(), *(p.grad for p in pi.parameters())))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert (found[1][0][mask] < 0).all() and (found[1][0][~mask] == 0).all()


def test_masks_with_holes_are_scored_as_response_logps_does():
    mask = masks([(1, 8), (2, 7), (4, 6)])
    mask[0, 3] = mask[1, 4] = False
    ids = torch.randint(V, mask.shape)
    torch.testing.assert_close(
        fast_response_logps(gpt(), ids, mask), dpo.response_logps(gpt(), ids, mask)
    )


def test_in_bfloat16_log_probabilities_and_gradients_are_float32():
    """Values agree with float32 up to bfloat16 rounding. pitfalls 14, 15, 16"""
    mask = masks([(1, 8), (3, 4), (2, 6)])
    ids = torch.randint(V, mask.shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = gpt(dtype=torch.float32), gpt(bf16=True, dtype=torch.float32)
    logps = fast_response_logps(rounded, ids, mask)
    logps.sum().backward()
    assert logps.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in rounded.parameters())
    error = (logps - fast_response_logps(exact, ids, mask)).abs().max().item()
    assert 0 < error < 0.1
    torch.testing.assert_close(logps, dpo.response_logps(rounded, ids, mask), atol=0.05, rtol=0)


def test_many_rows_are_computed_in_batches():
    mask = masks([(1 + i % 6, 2 + i % 6) for i in range(600)])
    ids = torch.randint(V, mask.shape)
    logps = compute_logps(gpt(), ids, mask)
    torch.testing.assert_close(logps.double(), dpo.response_logps(gpt(), ids, mask).detach())
    assert not logps.requires_grad


def test_collate_pads_on_the_right():
    ids, mask = collate([[1, 2, 3], [4, 5, 6, 7]], [2, 1])
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_the_kl_of_many_rows_is_the_second_estimate_of_sequence_kl():
    """Also where responses have holes or lie in the first of several batches. pitfall 25"""
    pi_theta, pi_ref = gpt(), gpt()
    pi_theta.wte.weight.data += 0.3 * torch.randn_like(pi_theta.wte.weight)
    mask = masks([(1 + i % 6, 2 + i % 6 + i % 2) for i in range(150)])
    mask[1, 2] = False
    ids = torch.randint(V, mask.shape)
    kl = mean_kl(pi_theta, pi_ref, ids, mask)
    torch.testing.assert_close(kl, dpo.sequence_kl(pi_theta, pi_ref, ids, mask)[1])
    assert not kl.requires_grad and (kl > 0).sum() > 100
    assert mean_kl(pi_ref, pi_ref, ids, mask).abs().max() == 0


# ------------------------------------------------- sampling


TOKENIZER = SimpleNamespace(eot_token=V - 1, decode_batch=lambda rows: list(map(str, rows)))


def test_log_probabilities_from_sampling_equal_a_rescoring():
    """Also where rows of other prompt lengths share the batch. pitfalls 9, 11, 18"""
    pi, end = gpt(dtype=torch.float32), TOKENIZER.eot_token
    prompts = [[1, 2, 3, 4], [5], [6, 7]] * 100
    (ids, mask, logps), texts = generate(pi, prompts, 4, TOKENIZER, 0, "samples")  # 3 batches
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


def test_bfloat16_is_used_only_on_processors_with_units_for_it(monkeypatch):
    answers = {}
    for units in (True, False):
        for capability in ("AVX512", "AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda units=units: units)
            monkeypatch.setattr(
                torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
            )
            answers[units, capability] = bf16_supported(CPU)
    assert [case for case, answer in answers.items() if answer] == [(True, "AVX512")]
    assert not bf16_supported(torch.device("mps"))
    for units in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, units=units: units)
        assert bf16_supported(torch.device("cuda")) == units


@pytest.mark.parametrize("kind", ["toy", "imdb", "own"])
def test_without_bfloat16_units_no_product_of_a_run_is_bfloat16(kind, request):
    """Every matrix product of the run is recorded: fine-tuning, sampling, DPO and evaluation."""
    products = request.getfixturevalue(kind).products
    assert set(products) == {torch.float32} and products[torch.float32] > 1000


def test_the_recording_sees_bfloat16_products():
    with Products() as products:
        fast_response_logps(gpt(True, torch.float32), torch.ones(1, T).long(), masks([(1, 8)]))
    assert torch.bfloat16 in products.dtypes
