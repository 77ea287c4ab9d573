"""beyond/scale.py: each formula against what it counts, on a small GPT that trains."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dpo
from beyond import scale
from model import GPT, GPTConfig
from tiny import ROOT

SMALL = GPTConfig(vocab_size=300, context=40, n_layer=3, n_head=4, n_embd=32)
B, T = 6, 40
IDS = torch.randint(0, 300, (B, T + 1), generator=torch.Generator().manual_seed(0))


class Checkpointed(GPT):
    def hidden(self, ids, cache=None, start=0):
        x = self.wte(ids) + self.wpe.weight[: ids.size(1)]
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=True)
        return self.ln_f(x)


def loss(pi: GPT) -> torch.Tensor:
    """The log-probabilities of rows of which the model reads T tokens."""
    return dpo.response_logps(pi, IDS, torch.ones_like(IDS, dtype=torch.bool)).sum()


@pytest.mark.parametrize("c", scale.MODELS.values())
def test_parameters_are_counted_exactly(c):
    with torch.device("meta"):
        pi = GPT(c)
    assert scale.parameters(c) == sum(p.numel() for p in pi.parameters())
    assert scale.block_parameters(c) == sum(p.numel() for p in pi.h[0].parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [GPT, Checkpointed])
def test_flops_of_a_step_are_counted_exactly(kind):
    """All matrix products of a real forward pass, and of a forward and backward pass.

    The attention is PyTorch's plain one, which recomputes nothing.
    """
    pi = kind(SMALL)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            loss(pi)
        with FlopCounterMode(display=False) as training:
            loss(pi).backward()
    assert forward.get_total_flops() == B * scale.forward_flops(SMALL, T)
    assert training.get_total_flops() == B * scale.training_flops(SMALL, T, kind is Checkpointed)


def saved_bytes(pi: GPT) -> int:
    """What the forward pass keeps for the backward pass: each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in pi.parameters()}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        keep = loss(pi)
    assert keep.requires_grad
    return sum(size for address, size in sizes.items() if address not in own)


def test_activations_are_those_that_autograd_keeps():
    """In float32, to 2%: with checkpointing the inputs of blocks, otherwise all blocks.

    The last LayerNorm's input and output, the log-probabilities and the ids are the same in both.
    """
    norm = 2 * 4 * SMALL.n_embd * T
    same = norm + scale.logits(SMALL, T) / 3 + 5 * 8 * T
    blocks = 3 * scale.block_activations(SMALL, T, width=4)
    inputs = 2 * (scale.activations(SMALL, T) - scale.block_activations(SMALL, T))  # of bfloat16
    for kind, kept in ((GPT, blocks), (Checkpointed, inputs - norm)):
        assert saved_bytes(kind(SMALL)) == pytest.approx(B * (kept + same), rel=0.02)


def test_state_is_what_parameters_gradients_and_adamw_hold():
    pi = GPT(SMALL)
    optimizer = torch.optim.AdamW(pi.parameters())
    loss(pi).backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held = [*pi.parameters(), *(p.grad for p in pi.parameters()), *moments]
    assert scale.sharded_state(SMALL, 1) == sum(t.nbytes for t in held)
    assert scale.sharded_state(SMALL, 8) == scale.sharded_state(SMALL, 1) / 8


@pytest.mark.parametrize("W", [2, 5])
def test_bytes_sent_are_those_of_rings(W):
    """In a ring of W GPUs, each sends (W - 1) / W of N numbers to reduce-scatter them, and as many
    to all-gather them."""
    once = (W - 1) / W * scale.parameters(SMALL)
    again = (W - 1) / W * SMALL.n_layer * scale.block_parameters(SMALL)
    assert scale.communication(SMALL, W) == pytest.approx(once * (2 + 4) + again * 2)
    assert scale.communication(SMALL, W, reshard_after_forward=False) == pytest.approx(once * 6)


def test_resharding_saves_memory():
    """Without it, all blocks stay gathered in bfloat16 between the passes, not only two."""
    c = scale.MODELS["7B"]
    saved = [scale.memory(c, 512, W, False) - scale.memory(c, 512, W, True) for W in (1, 8)]
    assert saved == [0, 2 * (c.n_layer - 2) * scale.block_parameters(c)]


def test_the_table_is_that_of_the_documentation(capsys):
    assert scale.main([]) == 0
    assert capsys.readouterr().out in (ROOT / "docs/scale.md").read_text("utf-8")
