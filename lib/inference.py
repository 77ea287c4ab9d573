"""Running a GPT over many rows: log-probabilities, KL and sampling."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import TokenLists, decode_rows
from dpo import log_softmax, sequence_kl
from lib.checkpoint import load_gpt
from model import GPT, sample


def fast_response_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The same as `dpo.response_logps`, about 1.7 times as fast on a CPU.

    Rows are computed in up to four groups of similar length, to reduce padding. Logits are computed
    for response tokens only. ids, mask: (B, T); each row needs a response. Returns (B, T) nats.
    """
    ids = ids.to(pi.device)
    mask = mask.to(pi.device)
    lengths = row_lengths(mask)
    groups = lengths.argsort().chunk(1 + min(3, ids.numel() * pi.config.n_embd // 150_000))
    logps = []
    for rows in groups:
        T = int(lengths[rows].max())
        scored = mask[rows, 1:T]
        logits = pi.head(pi.hidden(ids[rows, : T - 1])[scored])  # (n, V)
        values = -F.nll_loss(log_softmax(logits), ids[rows, 1:T][scored], reduction="none")
        scored = F.pad(scored, (1, mask.size(1) - T))  # (rows, full T)
        logps.append(values.new_zeros(scored.shape).masked_scatter(scored, values))
    return torch.cat(logps)[torch.cat(groups).argsort()]


def row_lengths(mask: Tensor) -> Tensor:
    """The number of tokens up to the end of each response, (R,)."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1)


def collate(rows: TokenLists, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as (R, T): ids padded with 0, and a mask that is True from each start."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = [torch.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
    return ids, pad_sequence(mask, batch_first=True)


def by_length(function: Callable, pi: GPT, ids: Tensor, mask: Tensor, what: str) -> Tensor:
    """function(ids, mask) of R rows, in batches of rows of similar length.

    The logits of a batch take at most 16 MB, unless those of a single row take more.
    """
    order = row_lengths(mask).argsort()
    rows = max(1, (1 << 22) // (pi.config.context * pi.config.vocab_size))
    batches = tqdm(order.split(rows), what, delay=1)
    results = torch.cat([function(ids[rows], mask[rows]).cpu() for rows in batches])
    return results[order.argsort()]


@torch.no_grad()
def compute_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) of many rows: ids, mask (R, T) -> (R, T) nats, on the CPU."""
    logps = partial(fast_response_logps, pi)
    return by_length(logps, pi, ids, mask, "computing log-probabilities")


def mean_kl(pi_theta: GPT, pi_ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """`dpo.sequence_kl` of many rows, (R,) nats, on the CPU."""

    def kl(ids, mask):
        T = int(row_lengths(mask).max())
        batch = ids[:, :T].to(pi_ref.device), mask[:, :T].to(pi_ref.device)
        return sequence_kl(pi_theta, pi_ref, *batch)

    return by_length(kl, pi_ref, ids, mask, "computing the KL")


def generate(pi: GPT, prompts: TokenLists, n: int, tokenizer, seed: int, what: str):
    """n responses to each prompt: ids, mask and logps (P n, context), as `sample` returns them.

    Also returns the text of each. `what` labels the progress bar and, together with `seed`,
    seeds the random numbers.
    """
    rng = torch.Generator(pi.device).manual_seed(zlib.crc32(f"{seed} {what}".encode()))
    c = pi.config
    rows = min(1024, 16 + (1 << 26) // (c.n_layer * c.context * c.n_embd))  # their cache: 512 MB
    # Sorted, because `sample` computes prompts together only up to the end of the shortest.
    order = torch.tensor([len(x) for x in prompts]).repeat_interleave(n).argsort(stable=True)
    batches = [
        sample(pi, [prompts[i // n] for i in batch], tokenizer.eot_token, generator=rng)
        for batch in tqdm(order.split(rows), what, delay=1)
    ]
    samples = tuple(torch.cat(part)[order.argsort()] for part in zip(*batches, strict=True))
    return samples, decode_rows(samples[0], tokenizer)


@dataclass(frozen=True)
class Inference:
    """How stages load and run models. beyond/sharded.py has another way."""

    load: Callable = load_gpt
    generate: Callable = generate
    compute_logps: Callable = compute_logps
    mean_kl: Callable = mean_kl


LOCAL = Inference()
