"""Running a GPT over many rows: log-probabilities and sampling."""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import GPT, sample


def fast_response_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The same as `dpo.response_logps`, about 1.7 times as fast on a CPU.

    Rows are computed in four groups of similar length, which have little padding, and logits for
    response tokens only. ids, mask: (B, T). Returns (B, T) nats.
    """
    lengths = row_lengths(mask)
    groups = lengths.argsort().chunk(4)
    logps = []
    for rows in groups:
        T = int(lengths[rows].max())
        scored = mask[rows, 1:T]
        logits = pi.head(pi.hidden(ids[rows, : T - 1])[scored])  # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = -F.cross_entropy(logits, ids[rows, 1:T][scored], reduction="none")
        scored = F.pad(scored, (1, mask.size(1) - T))  # (rows, full T)
        logps.append(values.new_zeros(scored.shape).masked_scatter(scored, values))
    return torch.cat(logps)[torch.cat(groups).argsort()]


def row_lengths(mask: Tensor) -> Tensor:
    """The tokens of each row, prompt and response together: mask (R, T) -> (R,)."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1)


@torch.no_grad()
def compute_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) of many rows: ids, mask (R, T) -> (R, T) nats, on the CPU."""
    logps = []
    for rows in tqdm(torch.arange(len(ids)).split(256), "computing log-probabilities"):
        batch = ids[rows].to(pi.device), mask[rows].to(pi.device)
        logps.append(fast_response_logps(pi, *batch).cpu())
    return torch.cat(logps)


def generate(pi: GPT, prompts: list[list[int]], end: int, seed: int, what: str):
    """One response for each prompt: ids, mask and logps (B, context), as `model.sample` returns.

    `what` is shown by the progress bar, and different purposes use different random numbers.
    """
    generator = torch.Generator(pi.device).manual_seed(zlib.crc32(f"{seed} {what}".encode()))
    batches = []
    for i in tqdm(range(0, len(prompts), 1024), what):
        batches.append(sample(pi, prompts[i : i + 1024], end, generator=generator))
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
