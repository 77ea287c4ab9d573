"""Optimisation: optimizers, the learning-rate schedule, and length-bucketed batches."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch


def bf16_supported(device: torch.device) -> bool:
    """Whether the device has units for bfloat16. Without them bfloat16 is very slow."""
    if device.type != "cpu":
        return device.type == "cuda"
    in_use = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY can lower it
    return torch.cpu._is_avx512_bf16_supported() and in_use.startswith("AVX512")


def linear_warmup_decay(steps: int) -> Callable[[int], float]:
    """Learning-rate multiplier: linear warmup over 2 % of the steps, then linear decay to 0."""
    warmup = 0.02 * steps
    return lambda step: min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps)


def length_bucketed_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """One epoch of random batches of rows with similar lengths, which need little padding.

    Rows are sorted by length within random chunks of 20 batches.
    """
    order = rng.permutation(len(lengths))
    for chunk in np.array_split(order, math.ceil(len(order) / (20 * batch_size))):
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = np.array_split(chunk, math.ceil(len(chunk) / batch_size))
        for i in rng.permutation(len(batches)):
            yield batches[i]


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
}
