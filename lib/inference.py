"""Running a GPT over many rows: log-probabilities, KL and sampling."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

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

    Rows are computed in up to four groups of similar length, which have little padding, and logits
    for response tokens only. ids, mask: (B, T); each row needs a response. Returns (B, T) nats.
    """
    ids, mask = ids.to(pi.device), mask.to(pi.device)
    lengths = row_lengths(mask)
    groups = lengths.argsort().chunk(max(1, min(4, ids.numel() * pi.config.n_embd // 150_000)))
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
    """Rows of token ids as ids and mask (R, T): padded with 0, and True from each start on."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    start, end = torch.tensor([starts, [len(row) for row in rows]])[..., None]  # (R, 1) each
    place = torch.arange(ids.size(1))
    return ids, (start <= place) & (place < end)


def in_batches(pi: GPT, mask: Tensor, what: str):
    """Rows ordered by length, and batches of them whose logits take 16 MB, with a progress bar."""
    order = row_lengths(mask).argsort()
    rows = max(1, (1 << 22) // (pi.config.context * pi.config.vocab_size))
    return order, tqdm(order.split(rows), what, delay=1)


@torch.no_grad()
def compute_logps(pi: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) of many rows: ids, mask (R, T) -> (R, T) nats, on the CPU."""
    order, batches = in_batches(pi, mask, "computing log-probabilities")
    logps = [fast_response_logps(pi, ids[rows], mask[rows]).cpu() for rows in batches]
    return torch.cat(logps)[order.argsort()]


def mean_kl(pi_theta: GPT, pi_ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The second estimate of `dpo.sequence_kl` for many rows, (R,) nats, on the CPU."""
    kls = []
    order, batches = in_batches(pi_ref, mask, "computing the KL")
    for rows in batches:
        T = int(row_lengths(mask[rows]).max())
        batch = ids[rows, :T].to(pi_ref.device), mask[rows, :T].to(pi_ref.device)
        kls.append(sequence_kl(pi_theta, pi_ref, *batch)[1].cpu())
    return torch.cat(kls)[order.argsort()]


def generate(pi: GPT, prompts: TokenLists, n: int, tokenizer, seed: int, what: str):
    """n responses to each prompt: ids, mask and logps (P n, context), as `model.sample` returns.

    Also returns the text of each. `what` labels the progress bar, and with `seed` it seeds the
    random numbers.
    """
    rng = torch.Generator(pi.device).manual_seed(zlib.crc32(f"{seed} {what}".encode()))
    c, batches = pi.config, []
    rows = (1 << 27) // (2 * c.n_layer * c.context * c.n_embd)  # for a cache of 512 MB
    rows = max(16, min(512, rows))
    repeated = [x for x in prompts for _ in range(n)]
    for i in tqdm(range(0, len(repeated), rows), what, delay=1):
        batches.append(sample(pi, repeated[i : i + rows], tokenizer.eot_token, generator=rng))
    samples = tuple(map(torch.cat, zip(*batches, strict=True)))
    return samples, decode_rows(samples[0], tokenizer)


@dataclass(frozen=True)
class Inference:
    """How stages load and run models. beyond/sharded.py has another way."""

    load: Callable = load_gpt
    generate: Callable = generate
    compute_logps: Callable = compute_logps
    mean_kl: Callable = mean_kl


LOCAL = Inference()
