"""Correct implementations in other styles. None may be reported as wrong."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from .logps import logp
from .training import descend, loss_of, rows_of, sampled


# ------------------------------------------------- as in the authors' code: logits in, HF names


def batch_logps(logits, labels, mask):
    labels, mask = labels[:, 1:].clone(), mask[:, 1:]
    labels[~mask] = 0
    logps = logits[:, :-1].float().log_softmax(-1)
    return (torch.gather(logps, 2, labels.unsqueeze(2)).squeeze(2) * mask).sum(-1)


def three_outputs(chosen, rejected, ref_chosen, ref_rejected, beta):
    chosen_rewards = beta * (chosen - ref_chosen).detach()
    rejected_rewards = beta * (rejected - ref_rejected).detach()
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * logits), chosen_rewards, rejected_rewards


def recorded(chosen, rejected, ref_chosen, ref_rejected, beta):
    r_w, r_l = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    accuracy = (r_w > r_l).float() + 0.5 * (r_w == r_l).float()
    values = dict(r_hat_w=r_w, r_hat_l=r_l, margin=r_w - r_l, accuracy=accuracy, logp_w=chosen)
    return {name: value.mean().item() for name, value in values.items()}


authors_style = SimpleNamespace(
    logps_from_logits=batch_logps, dpo_loss=three_outputs, metrics=recorded
)


# ------------------------------------------------- loops, one token and one pair at a time


def one_token_at_a_time(model, ids, mask):
    total = []
    for row, inside in zip(ids, mask, strict=True):
        logps = [
            model(row[None, :t])[0, -1].double().log_softmax(-1)[row[t]] for t in inside.nonzero()
        ]
        total.append(sum(logps))
    return torch.stack(total)


def mean_of_a_loop(w, l, ref_w, ref_l, beta):
    margins = [a - b - c + d for a, b, c, d in zip(w, ref_w, l, ref_l, strict=True)]
    losses = [torch.logaddexp(torch.zeros_like(h), -beta * h) for h in margins]
    return sum(losses) / len(losses)


loops = SimpleNamespace(response_logps=one_token_at_a_time, dpo_loss=mean_of_a_loop)


# ------------------------------------------------- cross-entropy, softplus, values per token


def negative_cross_entropy(model, ids, mask):
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    logits = model(ids)[:, :-1].transpose(1, 2)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nll = F.cross_entropy(logits.to(dtype), labels, ignore_index=-100, reduction="none")
    return F.pad(-nll, (1, 0))


def softplus_loss(w, l, ref_w, ref_l, beta):
    return F.softplus(-beta * ((w - l) - (ref_w - ref_l)))


cross_entropy_style = SimpleNamespace(response_logps=negative_cross_entropy, dpo_loss=softplus_loss)


# ------------------------------------------------- float32 only


def float32_logps(model, ids, mask):
    logps = torch.log_softmax(model(ids[:, :-1]).to(torch.float32), dim=-1)
    logps = logps.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return torch.where(mask[:, 1:], logps, torch.zeros(())).sum(-1)


def float32_loss(w, l, ref_w, ref_l, beta):
    w, l, ref_w, ref_l = (v.to(torch.float32) for v in (w, l, ref_w, ref_l))
    return -F.logsigmoid(beta * ((w - ref_w) - (l - ref_l)))


def float32_optimum(ref_logp, r, beta):
    tilted = ref_logp.float() + r.float() / beta
    return tilted.log_softmax(-1), tilted.logsumexp(-1)


float32_only = SimpleNamespace(
    response_logps=float32_logps,
    dpo_loss=float32_loss,
    optimal_policy=float32_optimum,
    bradley_terry=lambda r_1, r_2: torch.sigmoid(r_1.float() - r_2.float()),
    implicit_reward=lambda logp, ref_logp, beta: beta * (logp.float() - ref_logp.float()),
)


# ------------------------------------------------- what surrounds the loss


def plain_step(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    loss = loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean()
    descend(loss, optimizer)
    return loss.item()


def concatenated_step(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    batch = torch.cat((ids_w, ids_l)), torch.cat((mask_w, mask_l))
    w, l = float32_logps(model, *batch).chunk(2)
    ref_w, ref_l = float32_logps(reference, *batch).detach().chunk(2)
    descend(float32_loss(w, l, ref_w, ref_l, beta).mean(), optimizer)


def divided_micro_batches(model, reference, micro_batches, beta, optimizer):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        loss = loss_of(model, reference, *micro_batch, beta).mean()
        (loss / len(micro_batches)).backward()
    optimizer.step()


def kept_responses(prompts, responses, pad, max_length):
    prompts = [x[-(max_length - len(y)) :] for x, y in zip(prompts, responses, strict=True)]
    return rows_of(prompts, responses, pad)


surroundings = SimpleNamespace(
    training_step=plain_step,
    accumulated_step=divided_micro_batches,
    collate=kept_responses,
    tokenize=lambda encode, prompt, response: (encode(prompt), encode(response)),
    sft_loss=lambda model, ids, mask: -logp(model, ids, mask).sum() / mask.sum(),
    sequence_kl=lambda model, reference, *batch: logp(model, *batch) - logp(reference, *batch),
    make_reference=lambda model: copy.deepcopy(model).requires_grad_(False),
    sample=sampled,
)
float32_step = SimpleNamespace(training_step=concatenated_step)

CORRECT = {
    "as in the authors' code": authors_style,
    "loops": loops,
    "cross-entropy": cross_entropy_style,
    "float32 only": float32_only,
    "float32 step": float32_step,
    "surroundings": surroundings,
}
