"""Optimisation: optimizers, the learning-rate schedule, and batches."""

import math
from collections.abc import Callable
from functools import partial

import torch

from model import GPT


def bf16_supported(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16. Elsewhere it is very slow."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    in_use = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY can lower it
    return torch.cpu._is_avx512_bf16_supported() and in_use.startswith("AVX512")


def linear_warmup_decay(steps: int) -> Callable[[int], float]:
    """Learning-rate multiplier: linear warmup over 2% of the steps, times linear decay to 0."""
    warmup = 0.02 * steps
    return lambda step: min(1.0, (step + 1) / (warmup + 1)) * (1 - step / max(1, steps))


def freeze(pi: GPT, blocks: int):
    """Do not train the embeddings and the first `blocks` blocks. 0 freezes nothing."""
    for module in (pi.wte, pi.wpe, *pi.h[:blocks]) if blocks else ():
        module.requires_grad_(False)


def random_batches(n: int, batch_size: int, epochs: int, seed: int) -> list[torch.Tensor]:
    """Random batches of the numbers 0 to n - 1, reshuffled in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        batches += torch.randperm(n, generator=generator).tensor_split(math.ceil(n / batch_size))
    return batches


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
}
