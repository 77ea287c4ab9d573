"""Training steps, references, rows, fine-tuning, models and sampling, written wrongly."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, GPTConfig

from .logps import per_token
from .registry import wrong


def logp(model, ids, mask):
    """Correct: log pi(y|x)."""
    return (per_token(model, ids) * mask[:, 1:]).sum(-1)


def loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta):
    """Correct: Eq. 7 of each pair."""
    with torch.no_grad():
        ref_h = logp(reference, ids_w, mask_w) - logp(reference, ids_l, mask_l)
    h = logp(model, ids_w, mask_w) - logp(model, ids_l, mask_l)
    return -F.logsigmoid(beta * (h - ref_h))


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ------------------------------------------------- one step


@wrong("training_step", 13, "step_moves_the_parameters")
def step_without_step(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    optimizer.zero_grad()
    loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean().backward()


@wrong("training_step", 13, "step_moves_the_parameters")
def gradient_zeroed_after_backward(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    loss = loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean()
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()


@wrong("training_step", 31, "step_goes_down")
def ascent(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(-loss_of(model, reference, ids_w, mask_w, ids_l, mask_l, beta).mean(), optimizer)


@wrong("training_step", 31, "step_goes_down")
def chosen_and_rejected_exchanged(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    descend(loss_of(model, reference, ids_l, mask_l, ids_w, mask_w, beta).mean(), optimizer)


@wrong("training_step", 28, "step_leaves_the_reference_alone")
def reference_not_frozen(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    h = logp(model, ids_w, mask_w) - logp(model, ids_l, mask_l)
    ref_h = logp(reference, ids_w, mask_w) - logp(reference, ids_l, mask_l)
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


@wrong("training_step", 5, "step_follows_the_gradient_of_the_mean_loss")
def step_with_means(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    def mean_logp(m, ids, mask):
        return logp(m, ids, mask) / mask.sum(-1)

    h = mean_logp(model, ids_w, mask_w) - mean_logp(model, ids_l, mask_l)
    with torch.no_grad():
        ref_h = mean_logp(reference, ids_w, mask_w) - mean_logp(reference, ids_l, mask_l)
    descend(-F.logsigmoid(beta * (h - ref_h)).mean(), optimizer)


@wrong("training_step", 5, "step_follows_the_gradient_of_the_mean_loss")
def mean_inside_the_sigmoid(model, reference, ids_w, mask_w, ids_l, mask_l, beta, optimizer):
    h = logp(model, ids_w, mask_w) - logp(model, ids_l, mask_l)
    with torch.no_grad():
        ref_h = logp(reference, ids_w, mask_w) - logp(reference, ids_l, mask_l)
    descend(-F.logsigmoid(beta * (h - ref_h).mean()), optimizer)


@wrong("accumulated_step", 19, "micro_batches_make_the_step_of_the_whole_batch")
def micro_batches_not_divided(model, reference, micro_batches, beta, optimizer):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        loss_of(model, reference, *micro_batch, beta).mean().backward()
    optimizer.step()


@wrong("accumulated_step", 19, "micro_batches_make_the_step_of_the_whole_batch")
def only_the_last_micro_batch_counts(model, reference, micro_batches, beta, optimizer):
    for micro_batch in micro_batches:
        optimizer.zero_grad()
        loss_of(model, reference, *micro_batch, beta).mean().backward()
    optimizer.step()


# ------------------------------------------------- the reference


@wrong("make_reference", 28, "reference_stays_where_the_policy_started")
def reference_is_the_policy(model):
    return model


@wrong("make_reference", 28, "reference_stays_where_the_policy_started")
def shallow_copy(model):
    return copy.copy(model).eval()


@wrong("make_reference", 14, "reference_has_the_policys_dtype")
def reference_in_half_precision(model):
    return copy.deepcopy(model).bfloat16().requires_grad_(False)


@wrong("make_reference", 28, "reference_is_frozen")
def reference_not_frozen_copy(model):
    return copy.deepcopy(model).eval()


@wrong("reference_logps", 18, "reference_log_probabilities_are_the_models")
def precomputed_with_another_mask(reference, ids, mask):
    with torch.no_grad():
        return (per_token(reference, ids) * mask[:, :-1]).sum(-1)


@wrong("reference_logps", 18, "scoring_the_reference_draws_no_random_number")
def precomputed_on_a_shuffled_batch(reference, ids, mask):
    order = torch.randperm(len(ids))
    with torch.no_grad():
        return logp(reference, ids[order], mask[order])[order.argsort()]


# ------------------------------------------------- rows, tokens and fine-tuning


def rows_of(prompts, responses, pad, in_mask):
    T = max(len(x) + len(y) for x, y in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), T), pad)
    mask = torch.zeros(len(prompts), T, dtype=torch.bool)
    for i, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        row = [*x, *y]
        ids[i, : len(row)] = torch.tensor(row)
        for t in range(T):
            mask[i, t] = in_mask(t, len(x), len(row), ids[i, t])
    return ids, mask


@wrong("collate", 20, "long_prompt_leaves_the_response_whole")
def truncated_from_the_right(prompts, responses, pad, max_length):
    ids, mask = rows_of(prompts, responses, pad, lambda t, start, end, token: start <= t < end)
    return ids[:, :max_length], mask[:, :max_length]


@wrong("collate", 10, "mask_covers_an_end_token_that_equals_the_padding")
def mask_where_not_padding(prompts, responses, pad, max_length):
    return rows_of(
        prompts, responses, pad, lambda t, start, end, token: t >= start and token != pad
    )


@wrong("collate", 11, "no_end_token_is_added")
def end_token_always_added(prompts, responses, pad, max_length):
    responses = [y if y[-1] == pad or len(y) > 4 else [*y, pad] for y in responses]
    return rows_of(prompts, responses, pad, lambda t, start, end, token: start <= t < end)


@wrong("collate", 2, "mask_covers_exactly_the_responses")
def mask_one_token_late(prompts, responses, pad, max_length):
    return rows_of(prompts, responses, pad, lambda t, start, end, token: start < t < end)


@wrong("collate", 2, "mask_covers_exactly_the_responses")
def mask_of_the_whole_row(prompts, responses, pad, max_length):
    return rows_of(prompts, responses, pad, lambda t, start, end, token: start - 1 <= t < end)


@wrong("tokenize", 8, "prompt_and_response_are_encoded_separately")
def encoded_together(encode, prompt, response):
    ids = encode(prompt + response)
    n = len(encode(prompt))
    return ids[:n], ids[n:]


@wrong("tokenize", 9, "whitespace_is_kept")
def stripped(encode, prompt, response):
    return encode(prompt.strip()), encode(response.strip())


@wrong("sft_loss", 3, "fine_tuning_ignores_padding")
def fine_tuning_on_padding(model, ids, mask):
    return -per_token(model, ids).mean()


@wrong("sft_loss", 21, "fine_tuning_loss_is_a_mean_over_tokens")
def fine_tuning_by_sequence(model, ids, mask):
    return -logp(model, ids, mask).mean()


@wrong("sft_loss", 21, "fine_tuning_loss_is_a_mean_over_tokens")
def mean_of_means(model, ids, mask):
    return -(logp(model, ids, mask) / mask.sum(-1)).mean()


# ------------------------------------------------- models


class WithDropout(nn.Module):
    def __init__(self, vocab_size, context):
        super().__init__()
        self.gpt = GPT(GPTConfig(vocab_size, context, 1, 2, 16))
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids):
        return self.gpt.head(self.dropout(self.gpt.hidden(ids)))


@wrong("make_model", 12, "training_and_evaluation_mode_are_one_function")
def model_with_dropout(vocab_size, context):
    return WithDropout(vocab_size, context)


class BagOfTokens(nn.Module):
    """Every position sees all tokens, later ones too."""

    def __init__(self, vocab_size, context):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h + h.mean(1, keepdim=True))


@wrong("make_model", 4, "later_tokens_are_invisible")
def model_without_causal_mask(vocab_size, context):
    return BagOfTokens(vocab_size, context)


class CurrentTokenOnly(BagOfTokens):
    def forward(self, ids):
        return self.head(self.embed(ids))


@wrong("make_model", 4, "earlier_tokens_are_visible")
def model_without_memory(vocab_size, context):
    return CurrentTokenOnly(vocab_size, context)


@wrong("make_model", 16, "weights_are_at_least_float32")
def model_in_bfloat16(vocab_size, context):
    return GPT(GPTConfig(vocab_size, context, 1, 2, 16)).bfloat16()


# ------------------------------------------------- sampling


@torch.no_grad()
def sample_with(model, prompts, end, law):
    """All prompts at once, grouped by length, with this law of the next token."""
    responses = [None] * len(prompts)
    for n in {len(x) for x in prompts}:
        members = [i for i, x in enumerate(prompts) if len(x) == n]
        ids = torch.tensor([prompts[i] for i in members])
        while ids.size(1) < model.config.context:
            ids = torch.cat((ids, torch.multinomial(law(model(ids)[:, -1]), 1)), 1)
        for i, row in zip(members, ids[:, n:].tolist(), strict=True):
            responses[i] = row[: row.index(end) + 1] if end in row else row
    return responses


@wrong("sample", 25, "sampled_frequencies_are_the_enumerated_probabilities")
def temperature_left_at_one_half(model, prompts, end):
    return sample_with(model, prompts, end, lambda logits: (logits / 0.5).softmax(-1))


@wrong("sample", 25, "sampled_frequencies_are_the_enumerated_probabilities")
def top_two(model, prompts, end):
    def only_two(logits):
        worst = logits.argmin(-1, keepdim=True)
        return logits.softmax(-1).scatter(-1, worst, 1e-3)

    return sample_with(model, prompts, end, only_two)


@wrong("sample", 10, "end_token_is_last_if_there_is_one")
def end_token_dropped(model, prompts, end):
    found = sample_with(model, prompts, end, lambda logits: logits.softmax(-1))
    return [y[:-1] if y[-1] == end and len(y) > 1 else [0] if y[-1] == end else y for y in found]


@wrong("sample", 20, "sampled_response_is_never_empty")
def empty_where_the_end_comes_first(model, prompts, end):
    found = sample_with(model, prompts, end, lambda logits: logits.softmax(-1))
    return [[] if y == [end] else y for y in found]


@wrong("sample", 11, "response_without_end_token_fills_the_context")
def end_token_forced(model, prompts, end):
    found = sample_with(model, prompts, end, lambda logits: logits.softmax(-1))
    return [y if end in y else [*y[:-1], end] for y in found]


@wrong("sample", 26, "prompts_of_two_lengths_share_a_batch")
@torch.no_grad()
def left_padding(model, prompts, end):
    n = max(map(len, prompts))
    ids = torch.tensor([[end] * (n - len(x)) + x for x in prompts])
    room = [model.config.context - len(x) for x in prompts]
    while ids.size(1) < model.config.context:
        p = model(ids)[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(p, 1)), 1)
    cut = [row[:k] for row, k in zip(ids[:, n:].tolist(), room, strict=True)]
    return [row[: row.index(end) + 1] if end in row else row for row in cut]
