"""beyond/custom_data.py: the user's own preferences as a dataset."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import data
import dpo
import tiny
from beyond.custom_data import load_pairs, to_preferences, with_ref_logps
from beyond.losses import split_rows
from lib.checkpoint import load_gpt
from lib.io import BadInput

from tiny import CPU, lines, pairs

TOKENS = data.toy_tokens()
TOKENIZER = data.load_tokenizer(TOKENS)
END = TOKENIZER.eot_token
TEXT = st.text(min_size=1).filter(str.strip)


def load(path, rows, context=24, eval_prompts=4, seed=0, labels="bt") -> data.Dataset:
    path.write_bytes(lines(rows))
    return load_pairs(path, data.Sizes(1, eval_prompts, context), seed, TOKENS, labels=labels)


def row(prompt, chosen, rejected) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def encoded(preferences: dpo.Preferences) -> list[tuple]:
    """The pairs as lists of tokens: (x, y_w, y_l)."""
    rows = split_rows(preferences.ids, preferences.mask)
    found = [(*rows[w], *rows[l]) for w, l in preferences.pairs.tolist()]
    assert all(x == other for x, _, other, _ in found)
    return [(x, y_w, y_l) for x, y_w, _, y_l in found]


@given(TEXT, TEXT, TEXT)
def test_prompt_and_response_are_encoded_separately(tmp_path_factory, x, y_w, y_l):
    """No merge spans both, and each response has one end token, its last. pitfalls 8, 10"""
    assume(y_w != y_l)
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    prompts = [x, x + "!", x + "?"]
    dataset = load(path, [row(each, y_w, y_l) for each in prompts], 10**4)
    encode = TOKENIZER.encode_ordinary
    both = encoded(dataset.pairs) + encoded(dataset.eval_pairs)
    expected = [(encode(each), [*encode(y_w), END], [*encode(y_l), END]) for each in prompts]
    assert sorted(both) == sorted(expected)


def test_a_tenth_of_the_prompts_are_held_out_with_all_their_pairs(tmp_path):
    dataset = load(tmp_path / "own.jsonl", pairs(60))
    train, held = (
        {tuple(x) for x, _, _ in encoded(part)} for part in (dataset.pairs, dataset.eval_pairs)
    )
    assert len(train) == 27 and len(held) == 3 and not train & held
    assert len(dataset.pairs.pairs) == 54 and len(dataset.eval_pairs.pairs) == 6
    assert {tuple(x) for x in dataset.eval_prompts} == held
    assert dataset.sft_texts == [[*x, *y_w] for x, y_w, _ in encoded(dataset.pairs)]
    assert dataset.reward is None and not dataset.prompts
    again, other = (load(tmp_path / "own.jsonl", pairs(60), seed=seed) for seed in (0, 1))
    assert again.sft_texts == dataset.sft_texts != other.sft_texts


def test_evaluation_prompts_and_held_out_rows_are_in_random_order(tmp_path):
    """Not in the order of token ids or of the file, so that the first ones are a random subset."""
    dataset = load(tmp_path / "own.jsonl", pairs(600), eval_prompts=1000)
    rows = [x for x, _ in split_rows(dataset.eval_pairs.ids, dataset.eval_pairs.mask)]
    order = list(dict.fromkeys(map(tuple, rows)))
    assert order == [tuple(x) for x in dataset.eval_prompts] != sorted(order)
    assert len(order) == 30
    few = load(tmp_path / "own.jsonl", pairs(600)).eval_prompts
    assert few == dataset.eval_prompts[:4]


def test_labels_say_how_scores_become_pairs(tmp_path):
    """Two scores that differ by 0.1: by argmax the higher always wins, by bt it does not."""
    rows = [dict(prompt=f"{i} is", completions=[" a", " b"], scores=[0.1, 0]) for i in range(60)]
    for labels, always in (("argmax", True), ("bt", False)):
        dataset = load(tmp_path / "own.jsonl", rows, labels=labels)
        winners = {tuple(y_w) for _, y_w, _ in encoded(dataset.pairs)}
        assert (winners == {(*TOKENIZER.encode_ordinary(" a"), END)}) == always
    with pytest.raises(BadInput, match="--labels soft needs a known"):
        load(tmp_path / "own.jsonl", rows, labels="soft")


def test_pairs_that_do_not_fit_are_dropped_and_counted(tmp_path, capsys):
    """A pair fits if the longer response and its end token do. Nothing is cut. pitfall 20"""
    y = "the plot is"
    long = len(TOKENIZER.encode_ordinary(y)) + 1 + 1
    rows = [row("a", y, "b"), row("b", "a", y), row("c", "a", "b"), row("d", "a", "b")]
    rows.append(row("e", "a", "b"))
    for context, fit in ((long, 5), (long - 1, 3)):
        dataset = load(tmp_path / "own.jsonl", rows, context)
        assert len(dataset.pairs.pairs) + len(dataset.eval_pairs.pairs) == fit
        said = f"2 of 5 pairs do not fit in --context {context}" in capsys.readouterr().out
        assert said == (fit == 3)
    with pytest.raises(BadInput, match="fewer than three different prompts fit in --context 9"):
        load(tmp_path / "own.jsonl", rows[:2], 9)


@pytest.mark.parametrize("n, held", [(6, 4), (280, 28), (300, 30)])
def test_few_held_out_pairs_are_enough_but_reported(n, held, tmp_path, capsys):
    dataset = load(tmp_path / "own.jsonl", pairs(n))
    assert len(dataset.pairs.pairs) == n - held and len(dataset.eval_pairs.pairs) == held
    warned = f"only {held} pairs are held out" in capsys.readouterr().out
    assert warned == (held < 30)


def test_shared_responses_are_one_row_and_every_pair_is_kept():
    """Rows are grouped by prompt, in the order of prompts, and scored under pi_ref. pitfall 28"""
    texts = [("b", "1", "2"), ("a", "1", "2"), ("b", "1", "3"), ("b", "3", "2"), ("a", "1", "2")]
    given = [((ord(x),), (ord(w), END), (ord(l), END)) for x, w, l in texts]
    preferences = to_preferences(given)
    assert len(preferences.ids) == 5 and preferences.prompt.tolist() == [0, 0, 0, 1, 1]
    assert [tuple(map(tuple, pair)) for pair in encoded(preferences)] == given
    assert preferences.weight.tolist() == [1] * 5

    pi_ref = load_gpt(tiny.checkpoint(), CPU)
    dataset = data.Dataset(TOKENS, [], [], [], pairs=preferences, eval_pairs=preferences)
    scored, again = with_ref_logps(dataset, tiny.checkpoint(), CPU)
    assert torch.equal(scored.ref_logps, again.ref_logps)
    expected = dpo.response_logps(pi_ref, preferences.ids, preferences.mask)
    tolerance = 0.1 if pi_ref.bf16 else 1e-4
    torch.testing.assert_close(scored.ref_logps, expected, atol=tolerance, rtol=0)
