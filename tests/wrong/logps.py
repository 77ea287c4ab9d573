"""log pi(y|x) and the sequence KL, written wrongly."""

import torch

from .registry import wrong

SHIFT = "token_is_scored_by_the_logits_before_it"
FLOAT32 = "log_probabilities_are_float32_whatever_the_model_computes_in"


def per_token(model, ids, inputs=None):
    """Correct: log pi of the tokens 1, 2, ..., (B, T-1). inputs: the model's, by default ids."""
    logits = model(ids if inputs is None else inputs)[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def logp(model, ids, mask, inputs=None):
    """Correct: log pi(y|x), (B,)."""
    return (per_token(model, ids, inputs) * mask[:, 1:]).sum(-1)


# ------------------------------------------------- label shift, pitfall 1


def shifted(logits, ids, mask, shift):
    """Token t is scored by the logits at t - shift; 1 is correct."""
    logps = logits.log_softmax(-1).roll(shift, dims=1)
    return (logps.gather(-1, ids[..., None]).squeeze(-1) * mask).sum(-1)


@wrong("logps_from_logits", 1, SHIFT)
def no_label_shift(logits, ids, mask):
    return shifted(logits, ids, mask, 0)


@wrong("logps_from_logits", 1, SHIFT)
def shifted_twice(logits, ids, mask):
    return shifted(logits, ids, mask, 2)


# ------------------------------------------------- first token, pitfall 2


@wrong("response_logps", 2, "first_response_token_counts")
def mask_not_shifted(model, ids, mask):
    return (per_token(model, ids) * mask[:, :-1]).sum(-1)


# ------------------------------------------------- padding, pitfall 3


@wrong("response_logps", 3, "padding_does_not_count")
def everything_after_the_prompt(model, ids, mask):
    return logp(model, ids, mask.int().cummax(-1).values)


@wrong("response_logps", 3, "batch_mates_are_invisible")
def sum_over_the_batch(model, ids, mask):
    return logp(model, ids, mask).sum().expand(len(ids))


# ------------------------------------------------- mean instead of sum, pitfall 5


@wrong("response_logps", 5, "log_probability_is_a_sum_over_tokens")
def mean_over_response_tokens(model, ids, mask):
    return logp(model, ids, mask) / mask.sum(-1)


# ------------------------------------------------- prompt, pitfall 7


def up_to_the_end(mask):
    """The mask, extended over the prompt."""
    return mask.flip(-1).int().cummax(-1).values.flip(-1)


@wrong("response_logps", 7, "prompt_does_not_count")
def whole_sequence_scored(model, ids, mask):
    return logp(model, ids, up_to_the_end(mask))


@wrong("response_logps", 7, "prompts_of_different_lengths_share_a_batch")
def one_prompt_length_for_the_batch(model, ids, mask):
    after_prompt = mask[0].int().cummax(-1).values
    return logp(model, ids, after_prompt * up_to_the_end(mask))


# ------------------------------------------------- what the model sees, pitfall 4


@wrong("response_logps", 4, "model_sees_prompt_and_earlier_tokens")
def response_hidden_from_the_model(model, ids, mask):
    return logp(model, ids, mask, inputs=ids.masked_fill(mask, 0))


@wrong("response_logps", 4, "model_sees_prompt_and_earlier_tokens")
def prompt_hidden_from_the_model(model, ids, mask):
    return logp(model, ids, mask, inputs=ids * mask)


# ------------------------------------------------- end token, pitfall 10


@wrong("response_logps", 10, "last_response_token_counts")
def mask_from_the_padding_token(model, ids, mask):
    pad = ids[0, -1]  # pad = eos
    return logp(model, ids, mask & (ids != pad))


# ------------------------------------------------- gradient and precision, pitfalls 13 and 15


@wrong("response_logps", 13, "log_probability_of_a_response_has_a_gradient")
@torch.no_grad()
def under_no_grad(model, ids, mask):
    return logp(model, ids, mask)


@wrong("response_logps", 15, FLOAT32)
def float32_too_late(model, ids, mask):
    logps = model(ids)[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps.float() * mask[:, 1:]).sum(-1)


@wrong("response_logps", 15, FLOAT32)
def summed_in_half_precision(model, ids, mask):
    logps = per_token(model, ids).to(model(ids).dtype)
    return (logps * mask[:, 1:]).sum(-1)


# ------------------------------------------------- other


@wrong("response_logps", None, "log_probability_is_never_positive")
def returns_the_loss(model, ids, mask):
    return -logp(model, ids, mask)


@wrong("response_logps", None, "all_tokens_of_a_response_count_alike")
def discounted(model, ids, mask):
    position = mask.cumsum(-1) - 1
    return logp(model, ids, mask * 0.9**position)


# ------------------------------------------------- sequence KL


def log_ratio(model, reference, ids, mask):
    return logp(model, ids, mask) - logp(reference, ids, mask)


@wrong("sequence_kl", 25, "mean_of_each_kl_estimate_is_the_sequence_kl")
def reversed_kl(model, reference, ids, mask):
    return -log_ratio(model, reference, ids, mask)


@wrong("sequence_kl", 25, "kl_estimate_of_a_response_is_a_sum_over_its_tokens")
def kl_per_token(model, reference, ids, mask):
    return log_ratio(model, reference, ids, mask) / mask.sum(-1).clamp(min=1)


@wrong("sequence_kl", 22, "kl_estimate_ignores_padding_and_prompt")
def kl_of_padding_too(model, reference, ids, mask):
    return log_ratio(model, reference, ids, torch.ones_like(mask))


@wrong("sequence_kl", 25, "mean_of_each_kl_estimate_is_the_sequence_kl")
def full_kl_weighted_by_the_reference(model, reference, ids, mask):
    theta, ref = (m(ids)[:, :-1].log_softmax(-1) for m in (model, reference))
    return ((ref.exp() * (ref - theta)).sum(-1) * mask[:, 1:]).sum(-1)
