"""Offers TRL's losses, and Hugging Face models, to `beyond.conformance`.

    pip install trl transformers
    python -m beyond.conformance beyond.adapters

TRL computes the loss inside a method of its trainer, from the output of a model. The adapter calls
that method with a model whose log-probabilities are the arguments. Written for TRL 1.16 and
transformers 5.23; other versions may need other attributes.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model, selective_log_softmax


class HuggingFace(nn.Module):
    """A Hugging Face causal language model as a module: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def make_model(vocab_size: int, context: int) -> nn.Module:
    """A small GPT-2 without dropout, which TRL's trainer disables by default."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=context, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    disable_dropout_in_model(model)
    return HuggingFace(model)


def logps_from_logits(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """TRL's log-softmax of the labels, from logits in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (selective_log_softmax(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum(-1)


def trainer(loss_type: str, beta: float, label_smoothing: float) -> SimpleNamespace:
    """The attributes of DPOTrainer that its loss reads."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=nn.Identity(),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        ld_alpha=None,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def trl_loss(
    logp_w: Tensor,
    logp_l: Tensor,
    ref_logp_w: Tensor,
    ref_logp_l: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, list]]:
    """The mean loss of DPOTrainer and its metrics, for responses of one token each."""
    logps = torch.cat((logp_w, logp_l))[:, None]
    ids = torch.zeros(len(logps), 2, dtype=torch.long)
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=logps.detach(),
        mean_logits=logps.detach(),
        is_top1=torch.ones_like(logps, dtype=torch.bool),
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.tensor([[0, 1]]).expand_as(ids),
        "ref_chosen_logps": ref_logp_w,
        "ref_rejected_logps": ref_logp_l,
    }
    state = trainer(loss_type, beta, label_smoothing)
    loss = DPOTrainer._compute_loss(state, lambda **inputs: outputs, inputs, False)
    return loss, state._metrics["train"]


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)[0]


def metrics(logp_w, logp_l, ref_logp_w, ref_logp_l, beta) -> dict[str, float]:
    found = trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)[1]
    names = {
        "r_hat_w": "rewards/chosen",
        "r_hat_l": "rewards/rejected",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
        "logp_w": "logps/chosen",
        "logp_l": "logps/rejected",
    }
    return {name: found[key][0] for name, key in names.items()}


def hinge_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, "hinge")[0]


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau):
    """TRL divides by the length, which is 1 here, so both forms of IPO agree."""
    return trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau, "ipo")[0]


def robust_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, epsilon):
    return trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, "robust", epsilon)[0]


def sppo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return trl_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, "sppo_hard")[0]
