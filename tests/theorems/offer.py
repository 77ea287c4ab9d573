"""What this project offers to its own theorems."""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import dpo
from beyond import losses
from dpo import (  # noqa: F401  offered as they are
    Preferences,
    bradley_terry,
    dpo_loss,
    frontier,
    implicit_reward,
    optimal_policy,
    plackett_luce,
    response_logps,
)
from model import GPT, GPTConfig, sample  # noqa: F401


def rows(w: Tensor, l: Tensor) -> Tensor:
    """One pair per prompt: rows 2 i and 2 i + 1 are y_w and y_l of prompt i."""
    return torch.stack((w, l), 1).flatten(0, 1)


def preferences_of(ids: Tensor, mask: Tensor, ref_logps: Tensor) -> Preferences:
    n = len(ids) // 2
    prompt = torch.arange(n).repeat_interleave(2)
    pairs = torch.arange(2 * n).view(n, 2)
    return Preferences(ids, mask, ref_logps, prompt, pairs, torch.ones(n, dtype=torch.float64))


def training_step(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer) -> Tensor:
    """One step of `dpo.train` on all pairs."""
    ids, mask = rows(ids_w, ids_l), rows(mask_w, mask_l)
    preferences = preferences_of(ids, mask, reference_logps(reference, ids, mask))
    loss, prompts = partial(dpo.dpo, beta=beta), torch.arange(len(ids_w))
    return next(dpo.train(model, preferences, loss, optimizer, [prompts]))["loss"]


def pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l, length_w=None, length_l=None):
    """Log-probabilities of n pairs as logps (2n, T) and a batch, as a `dpo.Loss` takes them.

    Each response has its length, 1 unless given, and its log-probability is divided
    equally among its tokens.
    """
    ones = torch.ones(len(logp_w), dtype=torch.long)
    length = rows(ones, ones) if length_w is None else rows(length_w, length_l).long()
    mask = torch.arange(int(length.max())) < length[:, None]
    logps, ref_logps = (
        (rows(*each) / length)[:, None] * mask
        for each in ((logp_w, logp_l), (ref_logp_w, ref_logp_l))
    )
    return logps, preferences_of(mask.long(), mask, ref_logps)


def metrics(logp_w, logp_l, ref_logp_w, ref_logp_l, beta) -> dict[str, Tensor]:
    """The metrics of `dpo.train` for a model whose parameters are the log-probabilities."""
    logps, batch = pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l)
    pi, loss = nn.ParameterList([nn.Parameter(logps)]), partial(dpo.dpo, beta=beta)
    sgd, prompts = torch.optim.SGD(pi.parameters(), lr=0.0), torch.arange(len(logp_w))
    return next(dpo.train(pi, batch, loss, sgd, [prompts], logps_fn=lambda pi, ids, mask: pi[0]))


def make_model(vocab_size: int, context: int) -> GPT:
    return GPT(GPTConfig(vocab_size, context, n_layer=2, n_head=2, n_embd=16))


def make_reference(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def reference_logps(reference: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return response_logps(reference, ids, mask)


@torch.no_grad()
def sequence_kl(pi_theta: nn.Module, pi_ref: nn.Module, ids: Tensor, mask: Tensor):
    """The log-ratio, and the sum of the token KLs, (B,) each."""
    logp, ref_logp = (response_logps(pi, ids, mask).sum(-1) for pi in (pi_theta, pi_ref))
    return logp - ref_logp, dpo.sequence_kl(pi_theta, pi_ref, ids, mask)


# ------------------------------------------------- the losses of beyond/losses.py


def of_pairs(loss):
    """A loss as a function of the four log-probabilities of each pair, and its own parameters."""
    return lambda *args: loss(*pair_batch(*args[:4]), *args[4:])[0]


ipo_loss = of_pairs(losses.ipo)
cdpo_loss = of_pairs(losses.cdpo)
robust_loss = of_pairs(losses.robust)
hinge_loss = of_pairs(losses.hinge)
sppo_loss = of_pairs(losses.sppo_hard)
dpop_loss = of_pairs(losses.dpop)


def r_dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, length_w, length_l, beta, alpha):
    batch = pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l, length_w, length_l)
    return losses.r_dpo(*batch, beta, alpha)[0]


def simpo_loss(logp_w, logp_l, length_w, length_l, beta, gamma):
    batch = pair_batch(logp_w, logp_l, 0 * logp_w, 0 * logp_l, length_w, length_l)
    return losses.simpo(*batch, beta, gamma)[0]


def orpo_loss(logp_w, logp_l, length_w, length_l):
    batch = pair_batch(logp_w, logp_l, 0 * logp_w, 0 * logp_l, length_w, length_l)
    return losses.orpo(*batch, 1.0)[0] - losses.orpo(*batch, 0.0)[0]


def kto_reference_point(logp, ref_logp, mismatched_logp, mismatched_ref_logp):
    """Row 2 i is in a pair, with itself, and row 2 i + 1 in none."""
    logps, batch = pair_batch(logp, mismatched_logp, ref_logp, mismatched_ref_logp)
    return losses.reference_point(logps, replace(batch, pairs=batch.pairs[:, [0, 0]]))
