"""Training steps, references, rows, fine-tuning, models and sampling, written wrongly."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from model import GPT, GPTConfig

from .logps import logp, per_token
from .registry import wrong

GRADIENT = "step_follows_the_gradient_of_the_mean_loss"
FREQUENCIES = "sampled_frequencies_are_the_enumerated_probabilities"


def gap(model, ids_w, mask_w, ids_l, mask_l):
    """Correct: log pi(y_w|x) - log pi(y_l|x) of each pair."""
    return logp(model, ids_w, mask_w) - logp(model, ids_l, mask_l)


def loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta):
    """Correct: Eq. 7 of each pair."""
    h, ref_h = (gap(m, ids_w, mask_w, ids_l, mask_l) for m in (model, reference))
    return -F.logsigmoid(beta * (h - ref_h.detach()))


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ------------------------------------------------- one step


@wrong("training_step", 13, "step_moves_the_parameters")
def gradient_zeroed_after_backward(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean().backward()
    optimizer.zero_grad()
    optimizer.step()


@wrong("training_step", 31, "step_lowers_the_loss")
def chosen_and_rejected_exchanged(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(loss_of(model, reference, ids_l, mask_l, ids_w, mask_w, beta).mean(), optimizer)


@wrong("training_step", 28, "step_leaves_the_reference_alone")
def reference_not_frozen(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    h, ref_h = (gap(m, ids_w, mask_w, ids_l, mask_l) for m in (model, reference))
    descend(-F.logsigmoid(beta * (h - ref_h)).mean(), optimizer)


@wrong("training_step", 28, "step_leaves_the_reference_alone")
def reference_follows_the_policy(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean(), optimizer)
    reference.load_state_dict(model.state_dict())


@wrong("training_step", 19, "step_ignores_gradients_of_earlier_steps")
def gradient_never_zeroed(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean().backward()
    optimizer.step()


@wrong("training_step", 19, "step_of_a_repeated_batch_is_the_same")
def sum_over_pairs(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).sum(), optimizer)


@wrong("training_step", 13, "step_depends_on_the_reference")
def policy_as_its_own_reference(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(loss_of(model, model, ids_w, mask_w, ids_l, mask_l, beta).mean(), optimizer)


@wrong("training_step", 5, GRADIENT)
def step_with_means(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    mean_w, mean_l = (mask / mask.sum(-1, keepdim=True) for mask in (mask_w, mask_l))
    descend(loss_of(model, reference, ids_w, mean_w, ids_l, mean_l, beta).mean(), optimizer)


@wrong("training_step", 5, GRADIENT)
def mean_inside_the_sigmoid(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    h, ref_h = (gap(m, ids_w, mask_w, ids_l, mask_l) for m in (model, reference))
    descend(-F.logsigmoid(beta * (h - ref_h.detach()).mean()), optimizer)


@wrong("accumulated_step", 19, "micro_batches_make_the_step_of_the_whole_batch")
def micro_batches_not_divided(model, reference, micro_batches, beta, optimizer):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        loss_of(model, reference, *micro_batch, beta).mean().backward()
    optimizer.step()


# ------------------------------------------------- the reference


@wrong("make_reference", 28, "reference_stays_where_the_policy_started")
def shallow_copy(model):
    return copy.copy(model).eval()


@wrong("make_reference", 14, "reference_has_the_policys_dtype")
def reference_in_half_precision(model):
    return copy.deepcopy(model).bfloat16().requires_grad_(False)


@wrong("make_reference", 28, "reference_is_frozen")
def reference_not_frozen_copy(model):
    return copy.deepcopy(model).eval()


@wrong("reference_logps", 18, "reference_log_probabilities_are_those_of_the_model")
@torch.no_grad()
def precomputed_with_another_mask(reference, ids, mask):
    return (per_token(reference, ids) * mask[:, :-1]).sum(-1)


@wrong("reference_logps", 18, "scoring_the_reference_draws_no_random_number")
@torch.no_grad()
def precomputed_on_a_shuffled_batch(reference, ids, mask):
    order = torch.randperm(len(ids))
    return logp(reference, ids[order], mask[order])[order.argsort()]


# ------------------------------------------------- rows, tokens and fine-tuning


def rows_of(prompts, responses, pad):
    """Correct: ids and mask (B, T)."""
    xs, ys = ([torch.tensor(tokens) for tokens in side] for side in (prompts, responses))
    both = [torch.cat(row) for row in zip(xs, ys, strict=True)]
    inside = [torch.arange(len(row)) >= len(x) for x, row in zip(xs, both, strict=True)]
    return pad_sequence(both, True, pad), pad_sequence(inside, True)


@wrong("collate", 20, "long_prompt_leaves_the_response_whole")
def truncated_from_the_right(prompts, responses, pad, max_length):
    ids, mask = rows_of(prompts, responses, pad)
    return ids[:, :max_length], mask[:, :max_length]


@wrong("collate", 10, "mask_covers_an_end_token_that_equals_the_padding")
def mask_where_not_padding(prompts, responses, pad, max_length):
    ids, mask = rows_of(prompts, responses, pad)
    return ids, mask & (ids != pad)


@wrong("collate", 11, "no_end_token_is_added")
def end_token_always_added(prompts, responses, pad, max_length):
    responses = [y if y[-1] == pad or len(y) > 4 else [*y, pad] for y in responses]
    return rows_of(prompts, responses, pad)


@wrong("collate", 2, "mask_covers_exactly_the_responses")
def mask_one_token_late(prompts, responses, pad, max_length):
    ids, mask = rows_of(prompts, responses, pad)
    return ids, mask & mask.roll(1, dims=1)


@wrong("tokenize", 8, "prompt_and_response_are_encoded_separately")
def encoded_together(encode, prompt, response):
    ids, n = encode(prompt + response), len(encode(prompt))
    return ids[:n], ids[n:]


@wrong("tokenize", 9, "whitespace_is_kept")
def stripped(encode, prompt, response):
    return encode(prompt.strip()), encode(response.strip())


@wrong("sft_loss", 3, "fine_tuning_ignores_padding")
def fine_tuning_on_padding(model, ids, mask):
    return -per_token(model, ids).mean()


@wrong("sft_loss", 21, "fine_tuning_loss_is_a_mean_over_tokens")
def mean_of_means(model, ids, mask):
    return -(logp(model, ids, mask) / mask.sum(-1)).mean()


# ------------------------------------------------- models


@wrong("make_model", 12, "training_and_evaluation_mode_are_the_same_function")
def model_with_dropout(vocab_size, context):
    return nn.Sequential(GPT(GPTConfig(vocab_size, context, 1, 2, 16)), nn.Dropout(0.1))


@wrong("make_model", 4, "later_tokens_are_invisible")
def model_without_causal_mask(vocab_size, context):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(vocab_size, 16), layer, nn.Linear(16, vocab_size))


@wrong("make_model", 4, "earlier_tokens_are_visible")
def model_without_memory(vocab_size, context):
    return nn.Embedding(vocab_size, vocab_size)


@wrong("make_model", 16, "weights_are_at_least_float32")
def model_in_bfloat16(vocab_size, context):
    return GPT(GPTConfig(vocab_size, context, 1, 2, 16)).bfloat16()


# ------------------------------------------------- sampling


@torch.no_grad()
def sampled(model, prompts, end, top=None, temperature=1.0):
    """Correct, unless top or temperature is given. Prompts of one length are a batch."""
    responses = [None] * len(prompts)
    for n in {len(x) for x in prompts}:
        members = [i for i, x in enumerate(prompts) if len(x) == n]
        ids = torch.tensor([prompts[i] for i in members])
        while ids.size(1) < model.config.context:
            logits, tokens = model(ids)[:, -1].topk(top or model.config.vocab_size)
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1)
            ids = torch.cat((ids, tokens.gather(1, drawn)), 1)
        for i, y in zip(members, ids[:, n:].tolist(), strict=True):
            responses[i] = y[: y.index(end) + 1] if end in y else y
    return responses


@wrong("sample", 25, FREQUENCIES)
def temperature_left_at_one_half(model, prompts, end):
    return sampled(model, prompts, end, temperature=0.5)


@wrong("sample", 25, FREQUENCIES)
def top_two(model, prompts, end):
    return sampled(model, prompts, end, top=2)


@wrong("sample", 10, "end_token_is_last_if_there_is_one")
def end_token_dropped(model, prompts, end):
    return [[t for t in y if t != end] or [0] for y in sampled(model, prompts, end)]


@wrong("sample", 20, "sampled_response_is_never_empty")
def empty_where_the_end_comes_first(model, prompts, end):
    return [[] if y == [end] else y for y in sampled(model, prompts, end)]


@wrong("sample", 11, "response_without_end_token_fills_the_context")
def end_token_forced(model, prompts, end):
    return [y if end in y else [*y[:-1], end] for y in sampled(model, prompts, end)]


@wrong("sample", 26, "prompts_of_two_lengths_share_a_batch")
def left_padding(model, prompts, end):
    n = max(map(len, prompts))
    return sampled(model, [[end] * (n - len(x)) + x for x in prompts], end)
