"""lib/custom_data.py: the user's own preferences as a dataset."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dpo
import tiny
from lib.checkpoint import load_gpt
from lib.custom_data import collate, load_pairs, read_pairs, to_preferences
from tiny import CPU, lines, pairs

TOKENS = data.toy_tokens()
TOKENIZER = data.load_tokenizer(TOKENS)
END = TOKENIZER.eot_token


def load(path, rows, context=24, eval_prompts=4, seed=0) -> data.Dataset:
    path.write_bytes(lines(rows))
    return load_pairs(path, data.Sizes(1, eval_prompts, context), seed, TOKENS)


def row(prompt, chosen, rejected) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_fields_are_read_and_others_ignored(tmp_path):
    """Also with a byte order mark, Windows line ends, empty lines and U+2028 inside a string."""
    rows = [row("a", "b\u2028", "c"), row("d", "e", "f")]
    text = lines([r | {"source": 1} for r in rows]).replace(b"\n", b"\r\n\r\n")
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    assert read_pairs(tmp_path / "own.jsonl") == rows


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_prompt_and_response_are_encoded_apart(tmp_path_factory, x, y_w, y_l):
    """No merge spans both, and each response has one end token, its last. pitfalls 8, 10"""
    if y_w == y_l:
        return
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    both = [row(x, y_w, y_l), row(x + "!", y_w, y_l)]
    dataset = load(path, both, 10**4)
    for found in dataset.pairs + dataset.eval_pairs:
        assert TOKENIZER.decode(found["x"]) in (x, x + "!")
        for name, y in (("y_w", y_w), ("y_l", y_l)):
            assert found[name] == [*TOKENIZER.encode_ordinary(y), END]


def test_a_tenth_of_the_prompts_is_held_out_with_all_their_pairs(tmp_path):
    dataset = load(tmp_path / "own.jsonl", pairs(60))
    train, held = ({tuple(p["x"]) for p in part} for part in (dataset.pairs, dataset.eval_pairs))
    assert len(train) == 27 and len(held) == 3 and not train & held
    assert len(dataset.pairs) + len(dataset.eval_pairs) == 60
    assert {tuple(x) for x in dataset.eval_prompts} == held
    assert dataset.sft_texts == [p["x"] + p["y_w"] for p in dataset.pairs]
    assert dataset.reward is None and not dataset.prompts
    again, other = (load(tmp_path / "own.jsonl", pairs(60), seed=seed) for seed in (0, 1))
    assert again == dataset != other


def test_pairs_that_do_not_fit_are_dropped_and_counted(tmp_path, capsys):
    """A pair fits if the longer response and its end token do. Nothing is cut. pitfall 20"""
    y = "the plot is"
    long = len(TOKENIZER.encode_ordinary(y)) + 1 + 1
    rows = [row("a", y, "b"), row("b", "a", y), row("c", "a", "b"), row("d", "a", "b")]
    assert len(load(tmp_path / "own.jsonl", rows, long).pairs) == 3 and not capsys.readouterr().out
    dataset = load(tmp_path / "own.jsonl", rows, long - 1)
    assert len(dataset.pairs) + len(dataset.eval_pairs) == 2
    assert f"2 of 4 pairs do not fit in --context {long - 1}" in capsys.readouterr().out


def test_shared_responses_are_one_row_and_every_pair_is_kept(own):
    """Rows are grouped by prompt, and scored under pi_ref. pitfall 28"""
    reference = tiny.checkpoint()
    texts = [("b", "1", "2"), ("a", "1", "2"), ("b", "1", "3"), ("b", "3", "2"), ("a", "1", "2")]
    encoded = [
        {"x": TOKENIZER.encode_ordinary(x), "y_w": [*w.encode(), END], "y_l": [*l.encode(), END]}
        for x, w, l in texts
    ]
    preferences, counts = to_preferences(encoded, reference, CPU)
    assert len(preferences.ids) == 5 and counts["pairs"] == len(preferences.pairs) == 5
    assert preferences.prompt.tolist() == [0, 0, 1, 1, 1]
    for pair, rows in zip(encoded, preferences.pairs.tolist(), strict=True):
        for name, i in zip(("y_w", "y_l"), rows, strict=True):
            inside = preferences.mask[i]
            assert preferences.ids[i][inside].tolist() == pair[name]
            assert preferences.ids[i][: len(pair["x"])].tolist() == pair["x"]
    pi_ref = load_gpt(reference, CPU)
    expected = dpo.response_logps(pi_ref, preferences.ids, preferences.mask)
    tolerance = 0.1 if pi_ref.bf16 else 1e-4
    torch.testing.assert_close(preferences.ref_logps, expected, atol=tolerance, rtol=0)


def test_collate_pads_on_the_right():
    ids, mask = collate([((1, 2), (3,)), ((4,), (5, 6, 7))])
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("n", [4, 60])
def test_few_preferences_are_enough(n, tmp_path):
    dataset = load(tmp_path / "own.jsonl", pairs(n))
    assert dataset.pairs and dataset.eval_pairs
