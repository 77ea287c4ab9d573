"""What this project offers to its own theorems."""

import copy

import torch
from torch import Tensor, nn

import dpo
from beyond import losses
from dpo import (
    Preferences,
    bradley_terry,
    dpo_loss,
    frontier,
    implicit_reward,
    optimal_policy,
    plackett_luce,
    response_logps,
    sequence_kl,
)
from model import GPT, GPTConfig, sample

__all__ = [
    "bradley_terry",
    "dpo_loss",
    "frontier",
    "implicit_reward",
    "optimal_policy",
    "plackett_luce",
    "response_logps",
    "sample",
    "sequence_kl",
]


def preferences_of(
    reference: nn.Module, ids_w: Tensor, mask_w: Tensor, ids_l: Tensor, mask_l: Tensor
) -> Preferences:
    """One pair per prompt: rows 2 i and 2 i + 1 are y_w and y_l of prompt i."""
    ids = torch.stack((ids_w, ids_l), 1).flatten(0, 1)
    mask = torch.stack((mask_w, mask_l), 1).flatten(0, 1)
    n = len(ids_w)
    return Preferences(
        ids=ids,
        mask=mask,
        ref_logps=response_logps(reference, ids, mask).detach(),
        prompt=torch.arange(n).repeat_interleave(2),
        pairs=torch.arange(2 * n).view(n, 2),
        weight=torch.ones(n, dtype=torch.float64),
    )


def training_step(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer) -> Tensor:
    """One step of `dpo.train` on all pairs."""
    preferences = preferences_of(reference, ids_w, mask_w, ids_l, mask_l)

    def loss(logps, batch):
        return dpo.dpo(logps, batch, beta)

    steps = dpo.train(model, preferences, loss, optimizer, [torch.arange(len(ids_w))])
    return next(steps)["loss"]


def pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l, length_w=None, length_l=None):
    """Log-probabilities of n pairs as logps (2n, T) and a batch, as a `dpo.Loss` takes them.

    Each response has its length, 1 unless given, and its tokens share its log-probability.
    """
    n = len(logp_w)
    ones = torch.ones(n, dtype=torch.long)
    lengths = [ones if length is None else length.long() for length in (length_w, length_l)]
    length = torch.cat(lengths)[:, None]
    mask = torch.arange(int(length.max())) < length

    def spread(w, l):
        return torch.cat((w, l))[:, None] / length * mask

    batch = Preferences(
        ids=mask.long(),
        mask=mask,
        ref_logps=spread(ref_logp_w, ref_logp_l),
        prompt=torch.arange(n).repeat(2),
        pairs=torch.arange(2 * n).view(2, n).T,
        weight=torch.ones(n, dtype=torch.float64),
    )
    return spread(logp_w, logp_l), batch


def metrics(logp_w, logp_l, ref_logp_w, ref_logp_l, beta) -> dict[str, Tensor]:
    """The metrics of `dpo.train` for a model whose parameters are the log-probabilities."""
    logps, batch = pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l)
    pi = nn.ParameterList([nn.Parameter(logps)])
    steps = dpo.train(
        pi,
        dpo.Preferences(**{**vars(batch), "prompt": torch.zeros(len(logps))}),
        lambda logps, batch: dpo.dpo(logps, batch, beta),
        torch.optim.SGD(pi.parameters(), lr=0.0),
        batches=[torch.zeros(1)],
        logps_fn=lambda pi, ids, mask: pi[0] * 1.0,
    )
    return next(steps)


def make_model(vocab_size: int, context: int) -> GPT:
    return GPT(GPTConfig(vocab_size, context, n_layer=2, n_head=2, n_embd=16))


def make_reference(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def reference_logps(reference: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return response_logps(reference, ids, mask)


# ------------------------------------------------- the losses of beyond/losses.py


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau):
    return losses.ipo(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), tau)[0]


def cdpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, epsilon):
    return losses.cdpo(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), beta, epsilon)[0]


def robust_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, epsilon):
    return losses.robust(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), beta, epsilon)[0]


def hinge_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return losses.hinge(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), beta)[0]


def sppo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return losses.sppo_hard(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), beta)[0]


def dpop_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, lam):
    return losses.dpop(*pair_batch(logp_w, logp_l, ref_logp_w, ref_logp_l), beta, lam)[0]


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
    """The second half of the rows is in no pair."""
    logps, batch = pair_batch(logp, mismatched_logp, ref_logp, mismatched_ref_logp)
    paired = torch.arange(len(logp))
    pairs = torch.stack((paired, paired.flip(0)), 1)
    return losses.reference_point(logps, dpo.Preferences(**{**vars(batch), "pairs": pairs}))
