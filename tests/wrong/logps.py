"""log pi(y|x) and the sequence KL, written wrongly."""

import torch
import torch.nn.functional as F

from .registry import wrong

SHIFT = "token_is_scored_by_the_logits_before_it"
SUM = "log_probability_is_a_sum_over_tokens"


def per_token(model, ids):
    """Correct: log pi of the tokens 1, 2, ..., (B, T-1)."""
    logits = model(ids)[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def in_model_precision(model, ids):
    logps = model(ids)[:, :-1].log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).squeeze(-1)


# ------------------------------------------------- label shift, pitfall 1


@wrong("response_logps", 1, SHIFT)
def no_label_shift(model, ids, mask):
    logps = model(ids).log_softmax(-1)
    return (logps.gather(-1, ids[..., None]).squeeze(-1) * mask).sum(-1)


@wrong("response_logps", 1, SHIFT)
def shifted_the_wrong_way(model, ids, mask):
    logps = model(ids)[:, 1:].log_softmax(-1)
    return (logps.gather(-1, ids[:, :-1, None]).squeeze(-1) * mask[:, :-1]).sum(-1)


@wrong("response_logps", 1, SHIFT)
def shifted_twice(model, ids, mask):
    logps = model(ids)[:, :-2].log_softmax(-1)
    return (logps.gather(-1, ids[:, 2:, None]).squeeze(-1) * mask[:, 2:]).sum(-1)


@wrong("response_logps", 1, SHIFT)
def rolled_labels_backwards(model, ids, mask):
    labels = ids.roll(1, dims=1)
    logps = -F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    return (logps * mask).sum(-1)


@wrong("logps_from_logits", 1, SHIFT)
def logits_compared_with_their_own_tokens(logits, ids, mask):
    logps = torch.log_softmax(logits, -1)
    return (torch.gather(logps, 2, ids.unsqueeze(2)).squeeze(2) * mask).sum(1)


# ------------------------------------------------- first token, pitfall 2


@wrong("response_logps", 2, "first_response_token_counts")
def mask_not_shifted(model, ids, mask):
    return (per_token(model, ids) * mask[:, :-1]).sum(-1)


@wrong("response_logps", 2, "first_response_token_counts")
def shifts_the_response_only(model, ids, mask):
    logps = per_token(model, ids)
    both = mask[:, 1:] & mask[:, :-1]
    return (logps * both).sum(-1)


@wrong("response_logps", 2, "first_response_token_counts")
def slices_after_the_first_response_position(model, ids, mask):
    logps = per_token(model, ids)
    total = []
    for row, inside in zip(logps, mask, strict=True):
        positions = inside.nonzero().squeeze(-1)
        start, end = int(positions[0]), int(positions[-1]) + 1
        total.append(row[start : end - 1].sum())  # row[start] is the second response token
    return torch.stack(total)


# ------------------------------------------------- padding, pitfall 3


@wrong("response_logps", 3, "padding_does_not_count")
def everything_after_the_prompt(model, ids, mask):
    after_prompt = mask.int().cummax(-1).values
    return (per_token(model, ids) * after_prompt[:, 1:]).sum(-1)


@wrong("response_logps", 3, "padding_does_not_count")
def one_token_too_many(model, ids, mask):
    mask = mask | mask.roll(1, dims=1)
    return (per_token(model, ids) * mask[:, 1:]).sum(-1)


@wrong("response_logps", 3, "padding_does_not_count")
def prompt_length_of_the_first_row_and_no_padding_mask(model, ids, mask):
    start = int(mask[0].int().argmax())
    return per_token(model, ids)[:, start - 1 :].sum(-1)


@wrong("response_logps", 3, "batch_mates_are_invisible")
def sum_over_the_batch(model, ids, mask):
    return (per_token(model, ids) * mask[:, 1:]).sum().expand(len(ids))


# ------------------------------------------------- mean for sum, pitfall 5


@wrong("response_logps", 5, SUM)
def mean_over_response_tokens(model, ids, mask):
    logps = per_token(model, ids) * mask[:, 1:]
    return logps.sum(-1) / mask[:, 1:].sum(-1)


@wrong("response_logps", 5, SUM)
def mean_over_all_positions(model, ids, mask):
    return (per_token(model, ids) * mask[:, 1:]).mean(-1)


@wrong("response_logps", 5, SUM)
def cross_entropy_with_its_default_reduction(model, ids, mask):
    labels = ids.masked_fill(~mask, -100)
    logits = model(ids)
    each = [
        -F.cross_entropy(row[:-1], label[1:], ignore_index=-100)
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(each)


@wrong("logps_from_logits", 5, SUM)
def average_log_prob_left_on(logits, ids, mask, average_log_prob=True):
    labels, loss_mask = ids[:, 1:].clone(), mask[:, 1:]
    per_token = torch.gather(logits[:, :-1].log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    if average_log_prob:
        return (per_token * loss_mask).sum(-1) / loss_mask.sum(-1)
    return (per_token * loss_mask).sum(-1)


@wrong("response_logps", 5, SUM)
def divided_by_the_square_root_of_the_length(model, ids, mask):
    return (per_token(model, ids) * mask[:, 1:]).sum(-1) / mask.sum(-1).sqrt()


# ------------------------------------------------- prompt, pitfall 7


@wrong("response_logps", 7, "prompt_does_not_count")
def whole_sequence_scored(model, ids, mask):
    last = mask.shape[1] - mask.flip(-1).int().argmax(-1, keepdim=True)
    real = torch.arange(ids.shape[1]) < last
    return (per_token(model, ids) * real[:, 1:]).sum(-1)


@wrong("response_logps", 7, "prompt_does_not_count")
def last_prompt_token_scored(model, ids, mask):
    mask = mask | mask.roll(-1, dims=1)
    return (per_token(model, ids) * mask[:, 1:]).sum(-1)


@wrong("response_logps", 7, "prompts_of_different_lengths_share_a_batch")
def one_prompt_length_for_the_batch(model, ids, mask):
    start = int(mask[0].int().argmax())
    last = mask.shape[1] - mask.flip(-1).int().argmax(-1, keepdim=True)
    position = torch.arange(ids.shape[1])
    inside = (position >= start) & (position < last)
    return (per_token(model, ids) * inside[:, 1:]).sum(-1)


# ------------------------------------------------- what the model sees, pitfall 4


@wrong("response_logps", 4, "model_sees_prompt_and_earlier_tokens")
def response_hidden_from_the_model(model, ids, mask):
    logits = model(ids.masked_fill(mask, 0))[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1)


@wrong("response_logps", 4, "model_sees_prompt_and_earlier_tokens")
def prompt_hidden_from_the_model(model, ids, mask):
    logits = model(ids * mask)[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1)


# ------------------------------------------------- end token, pitfall 10


@wrong("response_logps", 10, "last_response_token_counts")
def mask_from_the_padding_token(model, ids, mask):
    pad = ids[0, -1]  # pad = eos
    keep = mask[:, 1:] & (ids[:, 1:] != pad)
    return (per_token(model, ids) * keep).sum(-1)


@wrong("response_logps", 10, "last_response_token_counts")
def stops_one_token_early(model, ids, mask):
    mask = mask & mask.roll(-1, dims=1)
    return (per_token(model, ids) * mask[:, 1:]).sum(-1)


# ------------------------------------------------- gradient and precision, pitfalls 13 and 15


@wrong("response_logps", 13, "log_probability_of_a_response_has_a_gradient")
@torch.no_grad()
def under_no_grad(model, ids, mask):
    return (per_token(model, ids) * mask[:, 1:]).sum(-1)


@wrong("response_logps", 13, "log_probability_of_a_response_has_a_gradient")
def collected_with_item(model, ids, mask):
    logps = per_token(model, ids) * mask[:, 1:]
    return torch.tensor([row.sum().item() for row in logps])


@wrong("response_logps", 15, "log_probabilities_are_float32_whatever_the_model_computes_in")
def log_softmax_in_the_models_precision(model, ids, mask):
    return (in_model_precision(model, ids) * mask[:, 1:]).sum(-1)


@wrong("response_logps", 15, "log_probabilities_are_float32_whatever_the_model_computes_in")
def float32_too_late(model, ids, mask):
    return (in_model_precision(model, ids).float() * mask[:, 1:]).sum(-1)


@wrong("response_logps", 15, "log_probabilities_are_float32_whatever_the_model_computes_in")
def summed_in_half_precision(model, ids, mask):
    logits = model(ids)[:, :-1]
    logps = logits.float().log_softmax(-1).to(logits.dtype)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1)


# ------------------------------------------------- other


@wrong("response_logps", None, "log_probability_is_never_positive")
def returns_the_loss(model, ids, mask):
    return -(per_token(model, ids) * mask[:, 1:]).sum(-1)


@wrong("response_logps", None, "all_tokens_of_a_response_count_alike")
def discounted(model, ids, mask):
    position = (mask[:, 1:].cumsum(-1) - 1).clamp(min=0)
    return (per_token(model, ids) * mask[:, 1:] * 0.9**position).sum(-1)


# ------------------------------------------------- sequence KL


def log_ratio(model, reference, ids, mask):
    return (per_token(model, ids) - per_token(reference, ids)) * mask[:, 1:]


@wrong("sequence_kl", 25, "mean_of_each_kl_estimate_is_the_sequence_kl")
def reversed_kl(model, reference, ids, mask):
    return -log_ratio(model, reference, ids, mask).sum(-1)


@wrong("sequence_kl", 25, "kl_estimate_of_a_response_is_a_sum_over_its_tokens")
def kl_per_token(model, reference, ids, mask):
    return log_ratio(model, reference, ids, mask).sum(-1) / mask.sum(-1).clamp(min=1)


@wrong("sequence_kl", 22, "kl_estimate_ignores_padding_and_prompt")
def kl_of_padding_too(model, reference, ids, mask):
    return (per_token(model, ids) - per_token(reference, ids)).sum(-1)


@wrong("sequence_kl", 25, "mean_of_each_kl_estimate_is_the_sequence_kl")
def absolute_log_ratio(model, reference, ids, mask):
    return log_ratio(model, reference, ids, mask).abs().sum(-1)


@wrong("sequence_kl", 25, "mean_of_each_kl_estimate_is_the_sequence_kl")
def full_kl_weighted_by_the_reference(model, reference, ids, mask):
    theta, ref = (m(ids)[:, :-1].log_softmax(-1) for m in (model, reference))
    return ((ref.exp() * (ref - theta)).sum(-1) * mask[:, 1:]).sum(-1)
