"""Texts in batches: which go together, at which rate, and how they become tensors."""
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kit.files import BadInput


def like_lengths(lengths: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One pass over the rows in random batches whose rows are of like length, so that little of them is padding: rows are
    sorted within random chunks of 20 batches."""
    for chunk in np.array_split(rng.permutation(len(lengths)), math.ceil(len(lengths) / (20 * size))):
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = np.array_split(chunk, math.ceil(len(chunk) / size))
        for i in rng.permutation(len(batches)):
            yield batches[i]


def warm_then_linear(steps: int) -> Callable[[int], float]:
    """What a rate is multiplied with: it rises over 2 % of the steps, then falls to 0."""
    return lambda step: min(1.0, (step + 1) / (0.02 * steps + 1)) * (1 - step / steps)


def must_be_finite(values: list[Tensor], purpose: str):
    """Errors: BadInput, which names the first step whose value is not."""
    finite = torch.stack(values).isfinite()
    if not finite.all():
        raise BadInput(f"{purpose} diverged: not finite at step {int(finite.int().argmin())}; lower --rate, if it is DPO; "
                       "what was made before is kept")


def padded(lists: list[list[int]]) -> Tensor:
    """(B, T) ids, -1 after each one's end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], True, -1)


def joined(prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each prompt with its response: ids and mask (B, T), padded on the right."""
    ids = padded([x + y for x, y in zip(prompts, responses)]).to(device)
    starts = torch.tensor([len(x) for x in prompts], device=device)[:, None]
    return ids.clamp(min=0), (torch.arange(ids.size(1), device=device) >= starts) & (ids >= 0)


def in_groups(values: list, size: int) -> list[list]:
    return [values[i:i + size] for i in range(0, len(values), size)]


def longest(mask: Tensor) -> Tensor:
    """The tokens of each prompt together with its longest completion: mask (P, K, T) -> (P,)."""
    return (mask.any(1) * torch.arange(mask.size(-1))).amax(-1) + 1
