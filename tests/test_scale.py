"""beyond/scale.py: each formula beside what it counts, on a small GPT that really trains."""
import sys
from itertools import accumulate

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dpo
from beyond import gpt2, scale
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=300, context=40, n_layer=3, n_head=4, n_embd=32)
B, T = 6, 40
IDS = 5 * 8 * B * T          # ids, targets and the places of the logits, which the formulas leave out: nothing at any real size


def small(checkpointing: bool = False) -> GPT:
    torch.manual_seed(0)
    pi = GPT(SMALL)
    if checkpointing:
        for block in pi.h:
            block.forward = lambda x, cache=None, start=0, whole=block.forward: checkpoint(whole, x, use_reentrant=True)
    return pi


def loss(pi: GPT) -> torch.Tensor:
    """Of DPO's kind: log-probabilities of rows whose T + 1 tokens give the model T to see."""
    ids = torch.randint(0, SMALL.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return dpo.response_logps(pi, ids, torch.ones_like(ids, dtype=torch.bool)).sum()


@pytest.mark.parametrize("name", [*gpt2.PUBLISHED, *scale.MODELS])
def test_parameters_are_counted_exactly(name):
    """N = L (12 C^2 + 13 C) + (V + context) C + 2 C  =  the parameters of a GPT on the meta device"""
    c = (gpt2.PUBLISHED | scale.MODELS)[name]
    with torch.device("meta"):
        pi = GPT(c)
    assert scale.parameters(c) == sum(p.numel() for p in pi.parameters())
    assert scale.block_parameters(c) == sum(p.numel() for p in pi.h[0].parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_a_step_are_counted_exactly(checkpointing):
    """A real forward and backward pass  =>  F and 3 F (4 F in checkpointed blocks) are all its matrix products"""
    pi = small(checkpointing)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        loss(pi)
    assert forward.get_total_flops() == B * sum(scale.forward_flops(SMALL, T))
    with FlopCounterMode(display=False) as training:
        loss(pi).backward()
    assert training.get_total_flops() == B * scale.training_flops(SMALL, T, checkpointing)


def kept(pi: GPT) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, and no parameter's."""
    mine, sizes = {p.untyped_storage().data_ptr() for p in pi.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in mine:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t
    with saved_tensors_hooks(pack, lambda t: t):
        still_there = loss(pi)                          # noqa: F841  a freed storage's address could be counted twice
    return sum(sizes.values())


def test_activations_are_those_that_autograd_keeps():
    """Tensors that a real forward pass saves  =>  the formula within 2 %; of the logits it keeps a third of their peak"""
    formula = B * (scale.activations(SMALL, T) + scale.logits(SMALL, T) / 3) + IDS
    assert kept(small()) == pytest.approx(formula, rel=0.02)


def test_with_checkpointing_only_the_blocks_inputs_are_kept():
    """A real forward pass with checkpointed blocks  =>  the formula less the one block that is made again, within 2 %"""
    one_block = scale.block_activations(SMALL, T)
    formula = B * (scale.activations(SMALL, T, checkpointing=True) - one_block + scale.logits(SMALL, T) / 3) + IDS
    assert kept(small(checkpointing=True)) == pytest.approx(formula, rel=0.02)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("c", [SMALL, GPTConfig(4000, 40, 2, 4, 32)], ids=["small", "many tokens"])
def test_the_peak_of_a_step_is_activations_and_logits(c, checkpointing, monkeypatch):
    """What the allocator gave during a real step, beyond weights and gradients  =>  at most the formula, and within 2 % of it
    unless checkpointing, where the logits are gone before a block is made again"""
    monkeypatch.setattr(sys.modules[__name__], "SMALL", c)
    pi = small(checkpointing)
    loss(pi).backward()                                 # the gradients are there, and stay
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(pi).backward()
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in events))
    formula = B * (scale.activations(c, T, checkpointing) + scale.logits(c, T))
    assert (0.5 if checkpointing else 0.98) * formula < peak < 1.02 * formula


@pytest.mark.parametrize("kind, make", [
    ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3)), ("momentum", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
    ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3))])
def test_state_is_what_weights_gradients_and_optimizer_hold(kind, make):
    """After one step  =>  bytes of the parameters, their gradients and optimizer.state (its count of steps apart)"""
    pi = small()
    optimizer = make(pi.parameters())
    loss(pi).backward()
    optimizer.step()
    moments = [v for of in optimizer.state.values() for v in of.values() if torch.is_tensor(v) and v.ndim]
    assert scale.state(SMALL, kind) == sum(t.nbytes for p in pi.parameters() for t in (p, p.grad)) + sum(t.nbytes for t in moments)


@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_completions_of_one_prompt_share_their_rows(K):
    """All pairs of K completions  =>  K rows, 2 / (K - 1) a pair; with K = 2 as without sharing"""
    n = len(torch.combinations(torch.arange(K)))
    assert scale.rows_per_pair(K) == pytest.approx(K / n) == pytest.approx(2 / (K - 1))


@pytest.mark.parametrize("W", [2, 5, 8])
def test_bytes_sent_are_those_of_rings(W):
    """W GPUs pass chunks to their neighbour: W - 1 times to sum, W - 1 times to spread  =>  each sent 2 (W - 1) / W of all"""
    grads = torch.randn(W, W, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)  # GPU, chunk, numbers of a chunk
    have, sent = grads.clone(), 0
    for step in range(2 * (W - 1)):
        before = have.clone()
        for g in range(W):
            chunk = (g - step) % W
            if step < W - 1:
                have[(g + 1) % W, chunk] += before[g, chunk]
            else:
                have[(g + 1) % W, chunk] = before[g, chunk]
        sent += 7
    torch.testing.assert_close(have, grads.sum(0).expand(W, W, 7))
    N = scale.parameters(SMALL)
    assert scale.communicated(SMALL, W, sharded=False, precomputed=True) == pytest.approx(sent / (7 * W) * 4 * N)
    assert scale.communicated(SMALL, W, sharded=False, precomputed=False) == scale.communicated(SMALL, W, False, True)
    assert [scale.communicated(SMALL, W, True, precomputed) for precomputed in (True, False)] == pytest.approx(
        [times * sent / (2 * 7 * W) * 4 * N for times in (3, 4)])


def test_what_sharding_and_precomputation_buy():
    """pi_ref at hand costs 4 N more, a W-th of it sharded; sharding over many leaves a pair and the unit at work"""
    c, T, N = scale.MODELS["7B"], 512, scale.parameters(scale.MODELS["7B"])
    for W in (1, 8, 64):
        assert scale.memory(c, T, W, False, False) - scale.memory(c, T, W, False, True) == 4 * N
        assert scale.memory(c, T, W, True, False) - scale.memory(c, T, W, True, True) == pytest.approx(4 * N / W)
    assert scale.memory(c, T, 1, True, True) == scale.memory(c, T, 1, False, True)
    assert scale.memory(c, T, 10 ** 6, True, True) < 0.05 * scale.memory(c, T, 10 ** 6, False, True)


def test_the_command_prints_every_model(capsys):
    """python -m beyond.scale  =>  two markdown tables, a row for each model and four for each"""
    assert scale.main([]) == 0
    one, many = capsys.readouterr().out.strip().split("\n\n")
    assert [row.split(" | ")[0] for row in one.splitlines()[2:]] == [f"| {name}" for name in scale.MODELS]
    assert len(many.splitlines()) == 2 + 4 * len(scale.MODELS)
    assert {row.count("|") for row in one.splitlines()} == {13} and {row.count("|") for row in many.splitlines()} == {8}
