"""A real GPT whose every response can be listed: what holds of probabilities on paper holds of the model that is
trained.

Three tokens, one of them the end; a context of four; prompts of one and of two tokens. The model is in float64, and
its log-probabilities in float32, as the code takes them: sides agree to 1e-5.
"""
import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import dpo
import model
from model import GPT, sample
from worlds import (CONTEXT, END, LN_2, PROMPTS, Bigram, V, assert_at_most, assert_same, enumerated, gpt, kl, 
                    log_probability, next_token, preferences, responses, rows, seeds, standard_errors, uniform)

SINGLE = 1e-9


def population(pi_ref, r: list[torch.Tensor]) -> dpo.Preferences:
    """Every ordered pair of responses to every prompt, weighted by its Bradley-Terry probability under r."""
    return preferences([
        dict(number=n, prompt_ids=x, chosen_ids=y, rejected_ids=other, weight=torch.sigmoid(r[n][i] - r[n][j]).item())
        for n, x in enumerate(PROMPTS)
        for i, y in enumerate(responses(x)) for j, other in enumerate(responses(x)) if i != j], pi_ref)


# ---------------------------------------------------------------------------------------------- log pi(y|x)

@pytest.mark.parametrize("x", PROMPTS)
def test_probabilities_of_all_responses_sum_to_one(x):
    """y ends with the end token or is cut by the context => sum_y pi(y|x) = 1; the end token counts. pitfalls 10, 11"""
    assert_same(enumerated(gpt(0), x).exp().sum(), 1.0, SINGLE)


@pytest.mark.parametrize("x", PROMPTS)
def test_log_probability_obeys_the_chain_rule(x):
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), each from a call of its own on what precedes.  pitfalls 1, 2"""
    pi = gpt(0)
    assert_same(enumerated(pi, x), torch.stack([log_probability(pi, x, y) for y in responses(x)]), SINGLE)


@pytest.mark.parametrize("x", PROMPTS)
def test_log_probability_of_a_response_is_the_wholes_less_the_prompts(x):
    """log pi(y|x) = log pi(x, y) - log pi(x), both from their first token on.  pitfall 1"""
    pi, first, rest = gpt(0), x[:1], x[1:]
    whole = torch.stack([log_probability(pi, first, rest + y) for y in responses(x)])
    prompt = log_probability(pi, first, rest) if rest else 0.0
    assert_same(enumerated(pi, x), whole - prompt, SINGLE)


def test_log_probability_of_a_one_token_response_is_that_tokens():
    """y = (y_1)  =>  log pi(y|x) = log_softmax(logits at the prompt's last token)[y_1].  pitfall 2"""
    pi = gpt(0)
    logps = dpo.response_logps(pi, *rows([1, 0], [[0], [1], [END]])).sum(-1)
    assert_same(logps, next_token(pi, [1, 0]), SINGLE)


def test_tokens_outside_the_mask_score_zero():
    """Prompt and padding lie outside the mask => their entries are 0, and those inside are log-probabilities.
    pitfall 3"""
    ids, mask = rows([0], responses([0]))
    logps = dpo.response_logps(gpt(0), ids, mask)
    assert torch.equal(logps < 0, mask)


def test_padding_is_invisible():
    """More padding, or another token as padding  =>  the same log pi(y|x) and KL.  pitfalls 3, 10"""
    pi, other, ys = gpt(0, context=CONTEXT + 3), gpt(1, context=CONTEXT + 3), responses([0])
    batches = [rows([0], ys, length, pad) for length, pad in ((CONTEXT, 0), (CONTEXT + 3, 1), (CONTEXT + 3, END))]
    sides = [torch.stack((dpo.response_logps(pi, *batch).sum(-1), *dpo.sequence_kl(pi, other, *batch)))
             for batch in batches]
    assert_same(sides[1], sides[0], SINGLE)
    assert_same(sides[2], sides[0], SINGLE)


def test_batch_mates_are_invisible():
    """A row alone, or among others of other lengths and in any order  =>  the same log pi(y|x).  pitfalls 3, 26"""
    pi, (ids, mask) = gpt(0), rows([0], responses([0]))
    together = dpo.response_logps(pi, ids.flip(0), mask.flip(0)).flip(0)
    alone = torch.cat([dpo.response_logps(pi, ids[i:i + 1], mask[i:i + 1]) for i in range(len(ids))])
    assert_same(together, alone, SINGLE)


def test_shared_beginning_of_responses_leaves_the_loss_alone():
    """y_w and y_l begin alike => L_DPO is the same whether their shared tokens count as prompt or as response.
    pitfall 7"""
    pi, pi_ref, ys = gpt(0), gpt(1), [[END], [1, END]]
    as_prompt, as_response = rows([0, 1], ys), rows([0], [[1, *y] for y in ys])

    def loss(batch):
        theta, ref = (dpo.response_logps(model, *batch).sum(-1) for model in (pi, pi_ref))
        return dpo.dpo_loss(theta[0], theta[1], ref[0], ref[1], 1.0)[0]
    assert_same(loss(as_prompt), loss(as_response), SINGLE)


def test_only_logits_that_predict_response_tokens_get_gradient():
    """L = log pi(y|x) => dL / dlogits at t is nonzero iff token t + 1 belongs to y: the prompt's last position among
    them, the last token's own never. pitfalls 1, 2, 10"""
    pi, (ids, mask) = gpt(0), rows([1, 0], responses([1, 0]))
    seen = []
    pi.register_forward_hook(lambda module, inputs, given, logits: (logits.retain_grad(), seen.append((given["where"], logits)))
                             and None, with_kwargs=True)
    dpo.response_logps(pi, ids, mask).sum().backward()
    (where, logits), moved = seen[0], torch.zeros_like(mask[:, 1:])
    moved[where] = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, mask[:, 1:]) and len(logits) == mask.sum()


@pytest.mark.parametrize("where", [..., "mask", "places"])
def test_logits_at_some_places_are_those_of_all_places_there(where):
    """Logits are computed only where they are wanted, said by a mask or by indices  =>  the same logits there"""
    pi, (ids, mask) = gpt(0), rows([1, 0], responses([1, 0]))
    where = dict(mask=mask, places=dpo.places(mask, ids.device)).get(where, where)
    assert_same(pi(ids, where=where), pi(ids)[where])


def test_log_probabilities_and_kl_are_those_of_the_whole_rows():
    """Scored at the response's places alone => the same as all places scored and those outside the mask dropped, where some
    rows have no response at all.  Eq. 7's log pi(y|x)"""
    pi, other, (ids, mask) = gpt(0), gpt(1), rows([0], responses([0]))
    mask[::3] = False
    theta, ref = (F.pad(model(ids)[:, :-1].log_softmax(-1), (0, 0, 1, 0)) for model in (pi, other))     # (B, T, V)
    own = theta.gather(-1, ids[..., None]).squeeze(-1)
    full = (theta.exp() * (theta - ref)).sum(-1)
    assert_same(dpo.response_logps(pi, ids, mask), own.masked_fill(~mask, 0.0), SINGLE)
    assert_same(dpo.sequence_kl(pi, other, ids, mask)[1], full.masked_fill(~mask, 0.0).sum(-1), SINGLE)


# ---------------------------------------------------------------------------------------------- the model

def test_later_tokens_are_invisible():
    """Token t changes  =>  logits before t stay, and those from t on move.  pitfall 4"""
    pi, ids = gpt(0), torch.tensor([[0, 1, 0, 1]])
    logits = pi(ids)
    for t in range(CONTEXT):
        changed = ids.clone()
        changed[0, t] = END
        moved = (pi(changed) - logits).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [s >= t for s in range(CONTEXT)]


@pytest.mark.parametrize("room", [model.ROOM, 1, 0])
def test_cached_logits_are_the_uncached_ones(room, monkeypatch):
    """Tokens in one call, or one at a time with a cache, or in two pieces, attending to all the room of the cache or to a part
    of it  =>  the same logits"""
    monkeypatch.setattr(model, "ROOM", room)
    pi, ids = gpt(0), torch.tensor([[0, 1, 1, 0], [1, END, 0, 0]])
    def pieces(sizes):
        cache, ends = pi.new_cache(2, CONTEXT), [sum(sizes[:i + 1]) for i in range(len(sizes))]
        return torch.cat([pi(ids[:, end - size:end], cache, end - size) for size, end in zip(sizes, ends)], 1)
    assert_same(pieces([1, 1, 1, 1]), pi(ids))
    assert_same(pieces([3, 1]), pi(ids))
    assert_same(pieces([1, 2, 1]), pi(ids))


def test_training_and_evaluation_mode_are_one_function():
    """No dropout  =>  train() and eval() give the same logits.  pitfall 12"""
    pi, (ids, _) = gpt(0), rows([0], responses([0]))
    assert torch.equal(pi.train()(ids), pi.eval()(ids))


# ---------------------------------------------------------------------------------------------- sampling

def test_samples_do_not_depend_on_how_the_cache_grows(monkeypatch):
    """Room for sixteen keys more each time the cache is full, or for one, or for all from the start, as on a GPU  =>  the same
    samples"""
    pi, prompts = gpt(0), [[0], [1, 0], [0, 1]] * 20

    def drawn() -> list[list[int]]:
        return sample(pi, prompts, END, generator=torch.Generator().manual_seed(0))
    whole = drawn()
    monkeypatch.setattr(model, "ROOM", 1)
    assert drawn() == whole
    new_cache = GPT.new_cache
    monkeypatch.setattr(GPT, "new_cache", lambda pi, B, S: new_cache(pi, B, CONTEXT))
    assert drawn() == whole


def test_sampled_frequencies_are_the_enumerated_probabilities():
    """y ~ pi( . |x) at temperature 1, prompts of two lengths in one batch => the frequency of each y is pi(y|x)
    within five standard errors. pitfalls 9, 25, 26"""
    pi, n = gpt(0), 20_000
    drawn = sample(pi, PROMPTS * n, END, generator=torch.Generator().manual_seed(0))
    for i, x in enumerate(PROMPTS):
        counts = Counter(map(tuple, drawn[i::len(PROMPTS)]))
        p = enumerated(pi, x).exp()
        frequency = torch.tensor([counts.pop(tuple(y), 0) / n for y in responses(x)], dtype=torch.float64)
        assert not counts
        assert_at_most(standard_errors(frequency, p, (p * (1 - p) / n).sqrt()), 5.0)


def test_temperature_flattens_the_next_token():
    """One token left, temperature T => y_1 is drawn from softmax(logits / T), and at T -> 0 it is the argmax.
    pitfall 25"""
    pi, x, n = gpt(0), [0, 1, 0], 20_000
    logits = pi(torch.tensor([x]))[0, -1].detach()
    for temperature in (2.0, 1e-4):
        drawn = sample(pi, [x] * n, END, temperature, torch.Generator().manual_seed(0))
        frequency = torch.bincount(torch.tensor(drawn).flatten(), minlength=V).double() / n
        p = (logits / temperature).softmax(-1)
        assert_at_most(standard_errors(frequency, p, (p * (1 - p) / n).sqrt()), 5.0)


def test_end_token_is_last_or_absent():
    """A response ends with the end token, once, or fills the context without it; it is never empty. pitfalls 10, 11,
    20"""
    pi, generator = gpt(0), torch.Generator().manual_seed(0)
    for x in PROMPTS * 20:
        for y in sample(pi, [x] * 3, END, generator=generator):
            assert y.count(END) == (y[-1] == END) and (y[-1] == END or len(x) + len(y) == CONTEXT)


@pytest.mark.parametrize("x", [[], [0] * CONTEXT])
def test_prompt_that_leaves_no_response_is_refused(x):
    """len(x) = 0 or the whole context  =>  ValueError, whatever the other prompts.  pitfall 20"""
    with pytest.raises(ValueError, match=f"1 to {CONTEXT - 1} tokens"):
        sample(gpt(0), [[0], x], END)


# ---------------------------------------------------------------------------------------------- sequence KL

@pytest.mark.parametrize("x", PROMPTS)
def test_both_estimates_have_the_sequence_kl_as_their_mean(x):
    """y ~ pi_theta => E log pi_theta / pi_ref (y|x) = E sum_t KL_t = KL(pi_theta, pi_ref), exactly, as every y is
    listed. pitfall 25 (nats per response, not per token)"""
    pi_theta, pi_ref = gpt(0), gpt(1)
    theta = enumerated(pi_theta, x)
    estimates = torch.stack(dpo.sequence_kl(pi_theta, pi_ref, *rows(x, responses(x)))).double()
    assert_same((theta.exp() * estimates).sum(-1), kl(theta, enumerated(pi_ref, x)).expand(2), SINGLE)


def test_each_estimate_is_what_it_says():
    """log pi_theta / pi_ref (y|x); and the sum along y of KL(pi_theta( . |x, y_<t), pi_ref( . |x, y_<t)). pitfall 22
    (no pads)"""
    pi_theta, pi_ref, x = gpt(0), gpt(1), [1, 0]
    full = [sum(kl(next_token(pi_theta, x + y[:t]), next_token(pi_ref, x + y[:t])) for t in range(len(y)))
            for y in responses(x)]
    sides = enumerated(pi_theta, x) - enumerated(pi_ref, x), torch.stack(full)
    assert_same(torch.stack(dpo.sequence_kl(pi_theta, pi_ref, *rows(x, responses(x)))), torch.stack(sides), SINGLE)


def test_sampled_estimates_agree_with_enumeration():
    """5,000 responses of pi_theta => the mean of either estimate is KL(pi_theta, pi_ref) within five standard errors"""
    pi_theta, pi_ref, x, n = gpt(0), gpt(1), [0], 5000
    drawn = sample(pi_theta, [x] * n, END, generator=torch.Generator().manual_seed(0))
    estimates = torch.stack(dpo.sequence_kl(pi_theta, pi_ref, *rows(x, drawn))).double()
    truth = kl(enumerated(pi_theta, x), enumerated(pi_ref, x))
    assert_at_most(standard_errors(estimates.mean(-1), truth, estimates.std(-1) / n ** 0.5), 5.0)


@given(seed=seeds)
def test_second_estimate_is_never_negative(seed):
    """Any two models, any responses  =>  sum_t KL_t >= 0, and both estimates are 0 of a model with itself"""
    pi_theta, pi_ref = (Bigram(uniform((V, V), -5.0, 5.0, 2 * seed + i)) for i in (0, 1))
    batch = rows([0], responses([0]))
    assert_at_most(0.0, dpo.sequence_kl(pi_theta, pi_ref, *batch)[1], SINGLE)
    assert_same(torch.stack(dpo.sequence_kl(pi_theta, pi_theta, *batch)), torch.zeros(2, len(batch[0])), SINGLE)


# ---------------------------------------------------------------------------------------------- training

def test_dpo_trains_a_gpt_to_the_optimal_policy():
    """Population labels from r => dpo.train takes pi_theta from pi_ref to pi_r, KL(pi_r, pi_theta) < 1e-4, on
    responses of unequal lengths, to each prompt; its first loss is ln 2. Eq. 7 and Eq. 4; pitfalls 5, 13"""
    pi_ref, beta, steps = gpt(0), 1.0, 200
    r = [uniform((len(responses(x)),), -2.0, 2.0, n) for n, x in enumerate(PROMPTS)]
    pi_theta = copy.deepcopy(pi_ref)
    optimizer = torch.optim.Adam(pi_theta.parameters(), lr=0.015, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = [torch.arange(len(PROMPTS))] * steps
    records = []
    for record in dpo.train(pi_theta, population(pi_ref, r), partial(dpo.dpo, beta=beta), optimizer, batches):
        schedule.step()
        records.append(record)
    assert_same(records[0]["loss"], LN_2, 1e-6)
    for x, reward in zip(PROMPTS, r):
        pi_r, _ = dpo.optimal_policy(enumerated(pi_ref, x), reward, beta)
        assert kl(pi_r, enumerated(pi_ref, x)) > 0.1 and kl(pi_r, enumerated(pi_theta, x)) < 1e-4


def test_optimal_policy_is_a_fixed_point_of_training():
    """pi_theta = pi_r under population labels  =>  the gradient of L_DPO is 0: here pi_theta is left as it is and the
    reference is pi_theta tilted back, log pi_ref = log pi_theta - r / beta + log Z.  Eq. 7 and Eq. 5"""
    pi, beta = gpt(0), 0.5
    r = [uniform((len(responses(x)),), -2.0, 2.0, n) for n, x in enumerate(PROMPTS)]
    batch = population(pi, r)
    back = [dpo.optimal_policy(enumerated(pi, x), -v, beta)[0] for x, v in zip(PROMPTS, r)]
    last = torch.zeros_like(batch.pi_ref)
    last[..., -1] = torch.nn.utils.rnn.pad_sequence(back, batch_first=True)
    batch = dpo.Preferences(batch.ids, batch.mask, last, batch.pairs, batch.weight)
    still = torch.optim.SGD(pi.parameters(), lr=0.0)
    record, = dpo.train(pi, batch, partial(dpo.dpo, beta=beta), still, [torch.arange(len(PROMPTS))])
    assert record["grad_norm"] < 1e-7 and record["loss"] < math.log(2)
