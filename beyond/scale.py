"""Memory, communication and compute of a DPO step at any size, under sharding with FSDP2.

    python -m beyond.scale [--tokens T]     a table for 124M, 774M, 7B and 70B parameters

    N  parameters    L  layers    C  width    V  vocabulary    T  tokens of a row    W  GPUs

Assumptions: AdamW; parameters, gradients and moments are float32 and sharded over W GPUs;
`fully_shard` applied to each block and to the rest, as in beyond/sharded.py, with param_dtype
bfloat16 and reduce_dtype float32; activation checkpointing of each block; attention that does not
keep its probabilities; one pair for each GPU; log pi_ref computed before training. Sizes are in
bytes, and only matrix products count as FLOPs, 2 for each multiply-add. The models of 7B and 70B
parameters have Llama 2's number of layers and heads, width and vocabulary, but GPT-2's blocks.

All numbers come from formulas. tests/test_scale.py compares those for parameters with real models,
and those for FLOPs, activations and optimizer state with what a small model uses. What this file
leaves out: fragmentation, framework buffers, and time.
"""

import argparse
import sys

from beyond.gpt2 import PUBLISHED
from lib import cli
from model import GPTConfig

MODELS = {
    "124M": PUBLISHED["gpt2"],
    "774M": PUBLISHED["gpt2-large"],
    "7B": GPTConfig(32000, 4096, 32, 32, 4096),
    "70B": GPTConfig(32000, 4096, 80, 64, 8192),
}
FLOAT, BF16 = 4, 2  # bytes


def block_parameters(c: GPTConfig) -> int:
    """12 C^2 in four matrices, and 13 C in biases and two LayerNorms."""
    return 12 * c.n_embd**2 + 13 * c.n_embd


def root_parameters(c: GPTConfig) -> int:
    """(V + context + 2) C outside the blocks. The output matrix is the token embedding."""
    return (c.vocab_size + c.context + 2) * c.n_embd


def parameters(c: GPTConfig) -> int:
    """N = L (12 C^2 + 13 C) + (V + context + 2) C."""
    return c.n_layer * block_parameters(c) + root_parameters(c)


def forward_flops(c: GPTConfig, T: int) -> int:
    """Of one row: L (24 C^2 T + 4 C T^2) in the blocks, and 2 V C T in the output matrix."""
    blocks = c.n_layer * (24 * c.n_embd**2 * T + 4 * c.n_embd * T * T)
    return blocks + 2 * c.vocab_size * c.n_embd * T


def training_flops(c: GPTConfig, T: int, checkpointing: bool = True) -> int:
    """3 forward passes: the backward pass has two products for each product of the forward pass.

    With checkpointing, the blocks compute their forward pass once more. Not counted: attention that
    keeps no probabilities computes them again, 2 C T^2 for each block.
    """
    again = forward_flops(c, T) - 2 * c.vocab_size * c.n_embd * T if checkpointing else 0
    return 3 * forward_flops(c, T) + again


def block_activations(c: GPTConfig, T: int, width: int = BF16) -> int:
    """What a block keeps of a row for its backward pass: 16 C T numbers of `width` bytes."""
    return width * 16 * c.n_embd * T


def activations(c: GPTConfig, T: int) -> int:
    """Peak of a row with checkpointing: the input of each block, one whole block, and the last
    LayerNorm's input and output."""
    return BF16 * c.n_embd * T * (c.n_layer + 2) + block_activations(c, T)


def logits(c: GPTConfig, T: int) -> int:
    """Peak of a row: the log-probabilities V T and two gradients of that size, in float32."""
    return 3 * FLOAT * c.vocab_size * T


def sharded_state(c: GPTConfig, W: int) -> float:
    """(4 + 4 + 8) N / W: parameters, gradients, and the two moments of AdamW."""
    return 4 * FLOAT * parameters(c) / W


def unsharded(c: GPTConfig, W: int, reshard_after_forward: bool = True) -> int:
    """What is gathered at any one time on W > 1 GPUs.

    Parameters in bfloat16: those of all blocks or, with reshard_after_forward, of the block in use
    and the next one; and those outside the blocks, which FSDP2 keeps until the backward pass ends.
    Gradients of one unit, in bfloat16 and in float32 to be reduced.
    """
    if W == 1:
        return 0
    block, root = block_parameters(c), root_parameters(c)
    gathered = root + min(2, c.n_layer) * block if reshard_after_forward else parameters(c)
    return BF16 * gathered + (BF16 + FLOAT) * max(block, root)


def memory(c: GPTConfig, T: int, W: int, reshard_after_forward: bool = True) -> float:
    """Peak bytes on each GPU, for one pair of two rows."""
    state = sharded_state(c, W) + unsharded(c, W, reshard_after_forward)
    return state + 2 * (activations(c, T) + logits(c, T))


def communication(c: GPTConfig, W: int, reshard_after_forward: bool = True) -> float:
    """Bytes that each GPU sends in a step, with ring collectives: (W - 1) / W times

    2 N to all-gather parameters in the forward pass, 4 N to reduce-scatter gradients, and, with
    reshard_after_forward, 2 L (12 C^2 + 13 C) to all-gather the blocks again in the backward pass.
    """
    again = c.n_layer * block_parameters(c) if reshard_after_forward else 0
    return (W - 1) / W * (BF16 * (parameters(c) + again) + FLOAT * parameters(c))


def table(T: int) -> str:
    """A row for each model and number of GPUs."""
    titles = ["model", "parameters, 10^9", "GPUs", "state, GB", "gathered, GB"]
    titles += [
        "activations and logits, GB",
        "total, GB",
        "sent, GB",
        "TFLOP per pair",
        "pi_ref once, TFLOP per pair",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, c in MODELS.items():
        for W in (1, 8, 64):
            rows = 2 * (activations(c, T) + logits(c, T))
            sizes = sharded_state(c, W), unsharded(c, W), rows, memory(c, T, W), communication(c, W)
            flops = 2 * training_flops(c, T), 2 * forward_flops(c, T)
            numbers = [f"{x / 1e9:,.1f}" for x in sizes] + [f"{x / 1e12:,.1f}" for x in flops]
            cells = [name, f"{parameters(c) / 1e9:.3g}", str(W), *numbers]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.scale", description=__doc__, formatter_class=style)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each row (512)")
    args = parser.parse_args(argv)
    if not 1 <= args.tokens <= 1024:
        parser.error(f"--tokens {args.tokens}: must be from 1 to 1024, GPT-2's context")
    print(table(args.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
