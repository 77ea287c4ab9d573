"""Thirty-three ways in which public implementations of DPO went wrong, each ruled out here or in another file's
docstring.

tests/README.md has the list: row number, statement, test.
"""
import copy
import dataclasses
import json
import math
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import data
import dpo
import train
from kit import files, tokens
from model import GPT, GPTConfig
from worlds import (END, LN_2, V, Bigram, assert_same, betas, bigram, gpt, log_probability, preferences, responses,
                    rewards, rows, seeds, triplets, uniform)

SINGLE = 1e-5


TOKENIZER = tokens.learn_tokenizer(data.toy_reviews(300, 0), 400)


def steps(pi, batch, loss, optimizer, n=1, **options) -> list[dict]:
    """n steps of dpo.train, each on all prompts."""
    return list(dpo.train(pi, batch, loss, optimizer, [torch.arange(len(batch.ids))] * n, **options))


def frozen(pi) -> torch.optim.Optimizer:
    return torch.optim.SGD(pi.parameters(), lr=0.0)


# ---------------------------------------------------------------------------------------------- pairs and batches

@given(seed=seeds, beta=betas)
def test_loss_of_a_pair_is_that_of_its_own_responses_sums(seed, beta):
    """K completions of unequal lengths are scored once and paired by index => each pair's loss is Eq. 7 of its own
    four log pi(y|x), sums over tokens and never means. Eq. 7; pitfall 5"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    batch = preferences(found, pi_ref)
    logps = dpo.response_logps(pi, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)).view(batch.ids.shape)
    each = [[log_probability(model, t["prompt_ids"], t[name])
             for model in (pi, pi_ref) for name in ("chosen_ids", "rejected_ids")] for t in found]
    pairwise = dpo.dpo_loss(*torch.tensor(each).T, beta)
    assert_same(torch.stack(dpo.dpo(logps, batch, beta)), torch.stack(pairwise), SINGLE)


@given(seed=seeds, chosen=st.permutations(range(5)), n=st.integers(1, 5))
def test_batch_holds_the_preferences_of_its_prompts_and_no_others(seed, chosen, n):
    """Any prompts in any order => the batch's losses and weights are those of the whole at these prompts' pairs, and
    no position is kept that only other prompts use"""
    pi, whole, prompts = bigram(seed), preferences(triplets(seed, P=5), bigram(seed + 1)), torch.tensor(chosen[:n])

    def losses(batch):
        logps = dpo.response_logps(pi, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)).view(batch.ids.shape)
        return torch.stack((*dpo.dpo(logps, batch, 1.0), batch.weight))
    batch = whole[prompts]
    assert_same(losses(batch), losses(whole)[:, torch.isin(whole.pairs[:, 0], prompts)], SINGLE)
    assert batch.mask[..., -1].any()


# ---------------------------------------------------------------------------------------------- text and tokens

@given(x=st.text(min_size=1, max_size=12), y=st.text(min_size=1, max_size=12), z=st.text(min_size=1, max_size=12))
def test_prompt_and_response_are_concatenated_as_ids(x, y, z):
    """Any strings => the row is the prompt's ids and then the response's: none merges across the boundary. pitfall 8"""
    x, y, z = map(TOKENIZER.encode_ordinary, (x, y, z))
    ids, mask, _, _ = data.group([dict(number=0, prompt_ids=x, chosen_ids=y, rejected_ids=z, weight=1.0)])
    assert [ids[0, k][mask[0, k]].tolist() for k in (0, ids.size(1) - 1)] == [y, z]
    assert ids[0, 0, :len(x)].tolist() == x and not mask[0, 0, :len(x)].any()


def test_text_of_prompt_and_response_may_encode_otherwise_when_joined():
    """Not a theorem: encode(x + y) = encode(x) + encode(y).  Counterexample: "the pl" + "ot".  pitfall 8"""
    whole, x, y = map(TOKENIZER.encode_ordinary, ("the plot", "the pl", "ot"))
    assert whole != x + y


def test_sampled_ids_are_what_is_scored(tmp_path):
    """Ids that their text would not encode back to, a leading space => they pass through triplets unchanged. pitfall
    9"""
    x, y = map(TOKENIZER.encode_ordinary, ("this film", " the plot "))
    ys = [list(b" the plot "), y + [TOKENIZER.eot_token]]
    assert TOKENIZER.encode_ordinary(TOKENIZER.decode(ys[0])) != ys[0]
    found, _ = data.preferences([x], [ys], torch.tensor([[1.0, 0.0]]), TOKENIZER, "argmax", random.Random(0))
    data.write_triplets(found, tmp_path / "triplets.jsonl")
    ids, mask, _, _ = data.group([json.loads(line) for line in open(tmp_path / "triplets.jsonl", encoding="utf-8")])
    assert [ids[0, k][mask[0, k]].tolist() for k in (0, 1)] == ys


@given(seed=seeds)
def test_mask_covers_each_response_and_its_end_token_once(seed):
    """A response is y, or y and the end token; the padding is a token too  =>  the mask holds exactly what was sampled.
    pitfalls 10, 11"""
    found = [t | dict(chosen_ids=[0] * len(t["chosen_ids"]) + [END]) for t in triplets(seed)]
    ids, mask, pairs, _ = data.group(found)
    for t, (p, w, l) in zip(found, pairs.tolist()):
        assert [ids[p, k][mask[p, k]].tolist() for k in (w, l)] == [t["chosen_ids"], t["rejected_ids"]]


def test_reviews_end_with_one_end_token():
    """pi_ref learns from openings  =>  each has one end token, its last.  pitfall 10"""
    openings = data.openings(data.toy_reviews(200, 1), TOKENIZER, 24)
    assert openings and all(ids.index(TOKENIZER.eot_token) == len(ids) - 1 for ids in openings)


# ---------------------------------------------------------------------------------------------- the loop

def test_one_batch_can_be_overfitted():
    """One order of each pair, enough steps  =>  the loss leaves ln 2 for almost 0.  pitfall 13"""
    pi_ref, pi = gpt(0), gpt(0)
    batch = preferences([dict(number=0, prompt_ids=[0], chosen_ids=[END], rejected_ids=[1, END], weight=1.0),
                         dict(number=1, prompt_ids=[1, 0], chosen_ids=[0, 1], rejected_ids=[END], weight=1.0)], pi_ref)
    records = steps(pi, batch, partial(dpo.dpo, beta=1.0), torch.optim.Adam(pi.parameters(), lr=0.02), 40)
    assert_same(records[0]["loss"], LN_2, SINGLE)
    assert records[-1]["loss"] < 0.01 and records[-1]["accuracy"] == 1


@given(seed=seeds, beta=betas)
def test_records_are_means_over_pairs_by_weight(seed, beta):
    """Hand-computed from each pair's four log-probabilities: loss, rewards with their beta, margin, accuracy, log
    pi. pitfall 22"""
    pi, pi_ref, found = bigram(2 * seed), bigram(2 * seed + 1), triplets(seed)
    record, = steps(pi, preferences(found, pi_ref), partial(dpo.dpo, beta=beta), frozen(pi))
    expected = dict.fromkeys(("loss", "r_hat_w", "r_hat_l", "margin", "accuracy", "pi_theta_w", "pi_theta_l"), 0.0)
    for t in found:
        (w, ref_w), (l, ref_l) = [[log_probability(model, t["prompt_ids"], t[name]).item() for model in (pi, pi_ref)]
                                  for name in ("chosen_ids", "rejected_ids")]
        r_w, r_l = beta * (w - ref_w), beta * (l - ref_l)
        assume(abs(r_w - r_l) > SINGLE)                 # a tie has its own test
        seen = math.log1p(math.exp(r_l - r_w)), r_w, r_l, r_w - r_l, r_w > r_l, w, l
        for name, value in zip(expected, seen):
            expected[name] += t["weight"] * value / sum(t["weight"] for t in found)
    assert_same([record[name] for name in expected], list(expected.values()), SINGLE)


@given(seed=seeds)
def test_tie_counts_one_half(seed):
    """pi_theta = pi_ref  =>  accuracy 1/2, loss ln 2, margin 0.  pitfalls 13, 22"""
    pi = bigram(seed)
    record, = steps(pi, preferences(triplets(seed), pi), partial(dpo.dpo, beta=0.3), frozen(pi))
    assert_same([record[name] for name in ("accuracy", "loss", "margin")], [0.5, LN_2, 0.0], SINGLE)


@given(seed=seeds, beta=betas)
def test_step_follows_the_gradient_of_the_weighted_mean(seed, beta):
    """SGD at rate 1, two steps => each moves theta by minus the gradient of its own weighted mean loss, and by no
    more than max_grad_norm; the gradient's own norm is what is recorded"""
    pi, batch, limit = bigram(seed), preferences(triplets(seed), bigram(seed + 1)), 0.1
    optimizer = torch.optim.SGD(pi.parameters(), lr=1.0)
    for _ in range(2):
        before = copy.deepcopy(pi)
        logps = dpo.response_logps(before, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)).view(batch.ids.shape)
        mean = (batch.weight * dpo.dpo(logps, batch, beta)[0]).sum() / batch.weight.sum()
        gradient, = torch.autograd.grad(mean, before.logits)
        record, = steps(pi, batch, partial(dpo.dpo, beta=beta), optimizer, max_grad_norm=limit)
        assert_same(record["grad_norm"], gradient.norm(), SINGLE)
        assert_same(before.logits - pi.logits, gradient * min(1.0, limit / gradient.norm().item()), SINGLE)


class OneFeature(torch.nn.Module):
    """Three one-token responses with logits (1, 0, 3) theta."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids, where=...):
        return (self.theta * torch.tensor([1.0, 0.0, 3.0])).expand(*ids[where].shape, 3)


def test_falling_chosen_log_probability_is_recorded():
    """Shared features => log pi(y_w) falls, step by step, while the loss falls too: the record shows both. pitfall
    23"""
    pi = OneFeature()
    batch = preferences([dict(number=0, prompt_ids=[0], chosen_ids=[0], rejected_ids=[1], weight=1.0)], pi)
    records = steps(pi, batch, partial(dpo.dpo, beta=1.0), torch.optim.SGD(pi.parameters(), lr=0.5), 5)
    for name in ("loss", "pi_theta_w", "pi_theta_l"):
        values = [record[name].item() for record in records]
        assert all(later < earlier for earlier, later in zip(values, values[1:]))


# ---------------------------------------------------------------------------------------------- precision

@given(seed=seeds)
def test_log_probabilities_are_float32_whatever_the_model_computes_in(seed):
    """bfloat16 logits  =>  log-softmax, sums and KL as of the same numbers in float32.  pitfall 15"""
    low = Bigram(uniform((V, V), -3.0, 3.0, seed).bfloat16())
    same, other = Bigram(low.logits.detach().float()), bigram(seed + 1)
    batch = rows([0], responses([0]))
    logps = dpo.response_logps(low, *batch)
    assert logps.dtype == torch.float32
    assert_same(logps, dpo.response_logps(same, *batch), 1e-6)
    of_low, of_same = (torch.stack(dpo.sequence_kl(pi, other, *batch)) for pi in (low, same))
    assert_same(of_low, of_same, 1e-6)


def test_small_steps_move_every_parameter():
    """Weights are kept in float32 => a step of 1e-6 moves each of the model's tensors, those near 1 among them.
    pitfall 16"""
    pi = GPT(GPTConfig(V, 8, n_layer=1, n_head=2, n_embd=8))
    before = copy.deepcopy(pi)
    steps(pi, preferences(triplets(0), pi), partial(dpo.dpo, beta=1.0), torch.optim.Adam(pi.parameters(), lr=1e-6))
    for (name, p), q in zip(pi.named_parameters(), before.parameters()):
        assert p.dtype == torch.float32 and not torch.equal(p, q), name


# ---------------------------------------------------------------------------------------------- the reference

SETTINGS = train.Settings(batch=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_starts_from_the_reference_and_leaves_it_alone(dtype):
    """pi_theta starts as a copy of pi_ref, in its dtype => the first loss is ln 2; pi_theta moves, pi_ref and its
    scores do not. pitfalls 13, 14, 28"""
    pi_ref = gpt(0, context=8).to(dtype)
    batch, before = preferences(triplets(0), pi_ref), copy.deepcopy(pi_ref.state_dict())
    scores = batch.pi_ref.clone()
    pi_theta, records = train.optimise(pi_ref, batch, partial(dpo.dpo, beta=1.0), 1e-2, SETTINGS)
    assert_same(records["loss"][0], LN_2, SINGLE)
    assert all(torch.equal(p, before[name]) for name, p in pi_ref.state_dict().items())
    assert torch.equal(batch.pi_ref, scores)
    assert all(p.dtype == dtype and not torch.equal(p, before[name]) for name, p in pi_theta.state_dict().items())


def test_reference_scored_once_is_the_reference_scored_in_any_batch():
    """Scored before training, in batches of like length => the same as in one batch, and no random number is used.
    pitfall 18"""
    pi_ref = gpt(0, context=8)
    ids, mask, _, _ = data.group(triplets(0, P=150))
    state = torch.get_rng_state()
    once = train.score(pi_ref, ids, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(once, dpo.response_logps(pi_ref, ids.flatten(0, 1), mask.flatten(0, 1)).view(ids.shape), SINGLE)


def test_result_is_made_again_iff_something_it_depends_on_changed(tmp_path):
    """Scores depend on the reference, that on the seed => another seed remakes both, another number of prompts the
    scores alone, another rate neither; and a reference that is not the one this run made is an error: a run never
    resumes with another reference. pitfall 17"""
    made = []

    def run(**changes):
        made.clear()
        stage = files.Stages(tmp_path, dataclasses.replace(SETTINGS, **changes), {})
        for name, needs in (("reference", "seed"), ("scores", "reference prompts")):
            value = f"{name} of seed {stage.settings.seed}"
            assert stage(name, needs, lambda: made.append(name) or value) == value
        return list(made)
    changes = [{}, {}, dict(rate=1.0), dict(prompts=1), dict(prompts=1, seed=1)]
    assert [run(**c) for c in changes] == [["reference", "scores"], [], [], ["scores"], ["reference", "scores"]]
    torch.save("another reference", tmp_path / "reference.pt")
    with pytest.raises(files.BadInput, match="reference.pt"):
        run(**changes[-1])
    (tmp_path / "reference.pt").unlink()
    assert run(**changes[-1]) == ["reference"]                  # the same again, so the scores are still its own


def test_a_folder_by_the_name_of_a_world_changes_nothing(tmp_path, monkeypatch):
    """A folder that is called toy, with texts in it  =>  the stages of --data toy are kept"""
    monkeypatch.chdir(tmp_path)
    made = []
    for text in ("one", "another and longer"):
        files.Stages(tmp_path, SETTINGS, {})("world", "data", lambda: made.append(text))
        (tmp_path / "toy").mkdir(exist_ok=True)
        (tmp_path / "toy" / "a.txt").write_text(text)
    assert made == ["one"]


# ---------------------------------------------------------------------------------------------- labels and reports

@given(r=rewards)
def test_soft_labels_are_bradley_terry_and_argmax_prefers_the_higher_reward(r):
    """r in nats  =>  each order of a pair weighs p*, and argmax keeps the likelier order.  Eq. 1; pitfall 27"""
    ys = [[k] for k in range(len(r))]
    soft, argmax = (data.preferences([[0]], [ys], r[None], TOKENIZER, labels, random.Random(0))[0]
                    for labels in ("soft", "argmax"))
    w, l = ([t[name][0] for t in soft] for name in ("chosen_ids", "rejected_ids"))
    assert_same([t["weight"] for t in soft], dpo.bradley_terry(r[w], r[l]))
    assert len(argmax) == math.comb(len(r), 2) and all(r[t["chosen_ids"][0]] > r[t["rejected_ids"][0]] for t in argmax)


def test_reference_is_fitted_by_the_mean_over_tokens():
    """Sequences of unequal lengths => pi_ref's loss is the mean nats per token, not per sequence; padding counts in
    neither. pitfalls 3, 21"""
    pi, batch = gpt(0), [[0, 1], [1, 0, 0, END]]
    nats = [-log_probability(pi, ids[:1], ids[1:]) for ids in batch]
    assert_same(train.token_nll(pi, batch), sum(nats) / 4, SINGLE)
    assert_same(train.token_nll(pi, batch, "sum"), sum(nats), SINGLE)


def test_unknown_flag_is_an_error():
    """A flag that does not exist  =>  an error, not silence.  pitfall 29"""
    with pytest.raises(SystemExit):
        train.parse(["--betta", "1"])


def test_every_flag_and_setting_is_read():
    """Each flag sets a setting or is read by main, and each setting is read by some stage: none is dead.  pitfall 29"""
    root = Path(train.__file__).parent
    source = "".join((root / name).read_text(encoding="utf-8") for name in ("train.py", "data.py", "kit/own.py"))
    args, settings = train.parse([])
    names = {field.name for field in dataclasses.fields(settings)}
    assert set(vars(args)) <= names | set(re.findall(r"args\.(\w+)", source))
    assert names <= set(re.findall(r"settings\.(\w+)", source))
