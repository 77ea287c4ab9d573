"""What a step of DPO costs at any size, as formulas that tests hold against measurement.

    python -m beyond.scale          the formulas worked for 124M, 774M, 7B and 70B parameters, as markdown

    N  parameters       L  layers       C  width        V  vocabulary       nh  heads
    T  tokens of a row, prompt and response; a pair is two rows, K completions of one prompt are K rows for K (K - 1) / 2 pairs
    W  GPUs             F  FLOPs of one row's forward pass, 2 for each multiplication with its addition

Only matrix products count as FLOPs. Sizes are in bytes; weights, gradients, optimizer state and logits are float32. The models of
7B and 70B parameters have Llama 2's layers, width, heads and vocabulary, and are otherwise GPT-2: with its MLP and its full
attention heads they come to 6.6B and 64.7B.

What this file does not count: fragmentation, the buckets and buffers of a framework, the causal mask, and time.
"""
import argparse
import sys

from beyond.gpt2 import PUBLISHED
from kit.terminal import Parser
from model import GPTConfig

MODELS = {name: PUBLISHED[name] for name in ("124M", "774M")} | {
    "7B": GPTConfig(32000, 4096, 32, 32, 4096), "70B": GPTConfig(32000, 4096, 80, 64, 8192)}
FLOAT = 4                                               # bytes
MOMENTS = dict(sgd=0, momentum=1, adamw=2)              # numbers that an optimizer remembers for each parameter


# ----------------------------------------------------------------------------- one GPU

def block_parameters(c: GPTConfig) -> int:
    """12 C^2 in four matrices, 13 C in biases and two LayerNorms."""
    return 12 * c.n_embd ** 2 + 13 * c.n_embd


def parameters(c: GPTConfig) -> int:
    """N = L (12 C^2 + 13 C) + (V + context) C + 2 C; the output matrix is the token embedding."""
    return c.n_layer * block_parameters(c) + (c.vocab_size + c.context) * c.n_embd + 2 * c.n_embd


def forward_flops(c: GPTConfig, T: int) -> tuple[int, int]:
    """F of a row, in the blocks and in the output matrix: 2 FLOPs a parameter and token, and 4 T C in each layer for the
    scores and for what they weigh. As written out in model.py; a kernel that skips the future halves the 4 T C."""
    return T * c.n_layer * (24 * c.n_embd ** 2 + 4 * T * c.n_embd), T * 2 * c.vocab_size * c.n_embd


def training_flops(c: GPTConfig, T: int, checkpointing: bool = False) -> int:
    """3 F: the backward pass has two products for each of the forward pass's. With activation checkpointing 4 F, but for the
    output matrix, as the blocks are computed twice."""
    blocks, output = forward_flops(c, T)
    return (4 if checkpointing else 3) * blocks + 3 * output


def block_activations(c: GPTConfig, T: int, width: int = FLOAT, fused: bool = False) -> int:
    """What one block keeps of a row for its backward pass. Numbers a token: each LayerNorm's input and output 4 C, q, k and v
    3 C, the heads' result C, the MLP's inner layer before and after GELU 8 C; and the attention probabilities nh T, unless a
    fused kernel computes them again."""
    return width * T * (16 * c.n_embd + (0 if fused else c.n_head * T))


def activations(c: GPTConfig, T: int, checkpointing: bool = False, width: int = FLOAT, fused: bool = False) -> int:
    """All blocks', and the last LayerNorm's input and output; with checkpointing each block's input, and one whole block
    (which, with the logits, is then more than the peak: they are gone before a block is computed again)."""
    block, last = block_activations(c, T, width, fused), width * T * 2 * c.n_embd
    return (width * T * c.n_layer * c.n_embd + block if checkpointing else c.n_layer * block) + last


def logits(c: GPTConfig, T: int) -> int:
    """The log-probabilities V T that the loss keeps, and at the peak two gradients of that size beside them."""
    return 3 * FLOAT * c.vocab_size * T


def state(c: GPTConfig, optimizer: str = "adamw") -> int:
    """Weights, gradients, and the optimizer's moments: 4 N + 4 N + 4 N or 8 N. Mixed precision with float32 masters has as
    much: 2 N + 2 N + 12 N with AdamW."""
    return FLOAT * parameters(c) * (2 + MOMENTS[optimizer])


def rows_per_pair(K: int) -> float:
    """2 where each pair is computed by itself; 2 / (K - 1) where all pairs of K completions share their rows."""
    return K / (K * (K - 1) / 2)


# ----------------------------------------------------------------------------- W GPUs

def memory(c: GPTConfig, T: int, W: int, sharded: bool, precomputed: bool, pairs: int = 1) -> float:
    """Peak bytes on each GPU, AdamW, activation checkpointing, bfloat16 activations, fused attention. pi_ref is 4 N more unless
    its log-probabilities were computed beforehand. DDP: all on each; FSDP: a W-th of it, and whole only the unit at work, a
    block or the embedding, with its gradient."""
    kept = state(c) + (0 if precomputed else FLOAT * parameters(c))
    if sharded and W > 1:
        kept = kept / W + 2 * FLOAT * max(block_parameters(c), c.vocab_size * c.n_embd)
    return kept + 2 * pairs * (activations(c, T, checkpointing=True, width=2, fused=True) + logits(c, T))


def communicated(c: GPTConfig, W: int, sharded: bool, precomputed: bool) -> float:
    """Bytes that each GPU sends in a step, by rings. DDP: gradients are summed and spread, 2 (W - 1) / W * 4 N, with or without
    pi_ref. FSDP: weights are gathered for the forward and for the backward pass, gradients summed into shards, 3 times
    (W - 1) / W * 4 N; and a fourth to gather pi_ref's weights."""
    times = (3 if precomputed else 4) if sharded else 2
    return times * (W - 1) / W * FLOAT * parameters(c)


# ----------------------------------------------------------------------------- the tables

def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def tables(T: int = 512) -> str:
    """One pair of two rows of T tokens: what it costs, and how much of it lies on each of W GPUs."""
    def digits(x: float) -> str:
        return f"{x:,.{2 if x < 10 else 1 if x < 100 else 0}f}"

    def gb(size: float) -> str:
        return digits(size / 1e9)
    one = [[name, digits(parameters(c) / 1e9), *map(gb, (
        FLOAT * parameters(c), state(c, "momentum"), state(c), 2 * activations(c, T, width=2),
        2 * activations(c, T, width=2, fused=True), 2 * activations(c, T, True, width=2, fused=True), 2 * logits(c, T))), *(
            digits(2 * flops / 1e12) for flops in (sum(forward_flops(c, T)), training_flops(c, T), training_flops(c, T, True)))]
           for name, c in MODELS.items()]
    kinds = [(f"{'FSDP' if sharded else 'DDP'}, pi_ref {'precomputed' if precomputed else 'at hand'}", sharded, precomputed)
             for sharded in (False, True) for precomputed in (False, True)]
    many = [[name, kind, *(gb(memory(c, T, W, *how)) for W in (1, 8, 64)), *(gb(communicated(c, W, *how)) for W in (8, 64))]
            for name, c in MODELS.items() for kind, *how in kinds]
    return "\n\n".join((
        markdown(["model", "N, 10^9", "pi_ref, GB", "SGD, GB", "AdamW, GB", "activations, GB", "fused", "checkpointed", "logits, GB",
                  "pi_ref, TFLOP", "pi_theta, TFLOP", "checkpointed"], one),
        markdown(["model", "how", "1 GPU, GB", "8", "64", "sent by each of 8, GB", "of 64"], many)))


def main(argv: list[str]) -> int:
    Parser(prog="scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
