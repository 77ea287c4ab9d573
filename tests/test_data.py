"""data.py: the grammar, the archive, tokens, r*, prompts and preference pairs."""

import math
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from tiny import archive

TOKENIZER = data.load_tokenizer(data.toy_tokens())
END = TOKENIZER.eot_token
REVIEWS = data.toy_reviews(300, 1)
OPENINGS = data.openings(REVIEWS, TOKENIZER, 24)
REWARD = data.WordReward(data.WEIGHT)


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode([i for i in ids if i != END])


# ------------------------------------------------- the toy dataset


def test_reviews_are_seeded_and_use_the_whole_grammar():
    reviews = data.toy_reviews(5_000, 0)
    assert reviews == data.toy_reviews(5_000, 0) != data.toy_reviews(5_000, 1)
    assert len(set(reviews)) > 3_500
    text = " ".join(reviews)
    assert text == text.lower() and set(data.WEIGHT) <= set(re.findall("[a-z]+", text))


def test_toy_tokens_are_bytes_and_the_words_of_the_grammar_and_the_end_token_is_the_last():
    tokens = data.toy_tokens()
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert TOKENIZER.n_vocab - 1 == END == len(tokens)
    assert TOKENIZER.decode_tokens_bytes(range(END)) == tokens
    for review in REVIEWS:
        words = re.findall(r"[a-z]+|\.", review)
        assert len(TOKENIZER.encode_ordinary(review)) == len(words)


def test_r_star_is_a_sum_of_the_weights_of_known_words():
    """On the toy dataset. On IMDb, it is divided by sqrt(n), with n known words, plus a bias."""
    r = REWARD(["the plot is superb. we hated this film.", "the plot is", ""])
    torch.testing.assert_close(r, torch.tensor([1.4 - 1.2, 0.0, 0.0]))
    imdb = data.WordReward({"good": 2.0, "bad": -3.0, "!": 0.5}, bias=0.1, divide=True)
    r = imdb(["a Good, good film!", "bad", "", "zebra"])
    torch.testing.assert_close(r, torch.tensor([4.5 / math.sqrt(3), -3.0, 0.0, 0.0]) + 0.1)


# ------------------------------------------------- the IMDb dataset

MEMBERS = {
    f"aclImdb/{split}/{label}/{i}_{stars}.txt": f"{split} {label} {i}.<br /><br />A  b\nc.".encode()
    for split in ("train", "test")
    for label, stars in (("pos", 9), ("neg", 2))
    for i in (10, 2)
} | {"aclImdb/train/unsup/0_0.txt": b"no \xff label", "aclImdb/README": b"?"}


def test_an_archive_is_read_in_numerical_order_and_refused_if_a_part_is_missing(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(archive(MEMBERS, n=0))
    reviews = data.read_imdb(path)
    assert reviews["train/pos"] == ["train pos 2. A b c.", "train pos 10. A b c."]
    assert reviews["train/unsup"] == ["no \N{REPLACEMENT CHARACTER} label"]
    some = {name: text for name, text in MEMBERS.items() if "test/neg" not in name}
    path.write_bytes(archive(some, n=0))
    with pytest.raises(ValueError, match="expected aclImdb/train/pos"):
        data.read_imdb(path)


# ------------------------------------------------- tokens


@given(st.text())
def test_decoding_inverts_encoding(text):
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and END not in ids


# ------------------------------------------------- openings and prompts


def test_openings_are_whole_sentences_closed_by_exactly_one_end_token():
    """pitfall 10"""
    assert len(OPENINGS) > 250
    for ids in OPENINGS:
        text = text_of(ids)
        assert len(ids) <= 24 and ids == [*TOKENIZER.encode_ordinary(text), END]
        assert text.endswith(".") and any(review.startswith(text) for review in REVIEWS)


def test_openings_hold_as_many_sentences_as_fit():
    review = "the plot was odd. the cast was good. the end."
    n = len(TOKENIZER.encode_ordinary(review))
    texts = [text_of(*data.openings([review], TOKENIZER, context)) for context in (n, n + 1)]
    assert texts == ["the plot was odd. the cast was good.", review]


def test_reviews_without_a_usable_first_sentence_are_left_out():
    reviews = ["very " * 50 + "long.", "no end to it " * 3, "a. b", "it was odd.", ""]
    assert data.openings(reviews, TOKENIZER, 24) == []


def test_prompts_are_2_to_8_tokens_and_end_where_a_word_does():
    """No token spans prompt and response. pitfall 8"""
    prompts = data.cut_prompts(OPENINGS, TOKENIZER, random.Random(0))
    assert {len(x) for x in prompts} == set(range(2, 9)) and len(prompts) > 250
    texts = {text_of(ids) for ids in OPENINGS}
    for x in prompts:
        assert any(text.startswith(TOKENIZER.decode(x) + " ") for text in texts)


def test_no_text_is_used_for_two_purposes():
    """Reviews of the SFT set give no prompts, and evaluation prompts no preferences."""
    sizes = data.Sizes(prompts=1000, eval_prompts=40, context=24)
    parts = REVIEWS[:100], REVIEWS[50:200], REVIEWS[50:60] + REVIEWS[150:]
    split = data.make_dataset(*parts, REWARD, sizes, 0, data.toy_tokens())
    held_out = [tuple(x) for x in split.eval_prompts]
    assert len(set(held_out)) == len(held_out) == 40
    assert not set(held_out) & set(map(tuple, split.prompts))
    assert len(split.prompts) <= len(data.openings(REVIEWS[100:200], TOKENIZER, 24))
    seen = {tuple(ids) for ids in data.openings(REVIEWS[:100], TOKENIZER, 24)}
    assert set(map(tuple, split.sft_texts)) == seen
    with pytest.raises(ValueError, match="too few reviews"):
        data.make_dataset(*parts, REWARD, data.Sizes(10, 400, 24), 0, data.toy_tokens())


# ------------------------------------------------- preferences

WORDS = ["superb", "odd", "good", "dull", "superb"]  # the first and last completion are identical
R = REWARD(WORDS)


def completions(P: int) -> tuple:
    """P prompts with the completions WORDS, each closed by the end token."""
    rows = [[x, *TOKENIZER.encode_ordinary(f" {word}"), END] for x in range(P) for word in WORDS]
    ids = torch.tensor(rows)
    mask = torch.tensor([[False, True, True]]).expand_as(ids)
    return ids, mask, -torch.arange(ids.numel()).view(ids.shape) * mask


def labelled(labels: str, P: int = 2000, rewards=R):
    return data.label_pairs(completions(P), rewards.expand(P, -1), labels, 0)


def words_of(preferences) -> list[tuple[str, str]]:
    texts = data.decode_rows(preferences.ids[:, 1:], TOKENIZER)
    return [(texts[w].strip(), texts[l].strip()) for w, l in preferences.pairs.tolist()]


def test_bt_labels_have_bradley_terry_frequencies():
    preferences = labelled("bt")
    pairs = words_of(preferences)
    for a, b in (("superb", "odd"), ("good", "dull"), ("odd", "dull")):
        wins = [w == a for w, l in pairs if {w, l} == {a, b}]
        p = 1 / (1 + math.exp(data.WEIGHT[b] - data.WEIGHT[a]))
        assert abs(sum(wins) / len(wins) - p) < 4 * math.sqrt(p * (1 - p) / len(wins))
    assert len(pairs) == 9 * 2000 and (preferences.weight == 1).all()


def test_soft_labels_hold_both_orders_weighted_by_their_probability():
    preferences = labelled("soft", P=2)
    pairs = [tuple(pair) for pair in preferences.pairs.tolist()]
    assert len(set(pairs)) == len(pairs) == 36 and {(l, w) for w, l in pairs} == set(pairs)
    for p, (w, l) in zip(preferences.weight.tolist(), words_of(preferences), strict=True):
        assert math.log(p / (1 - p)) == pytest.approx(data.WEIGHT[w] - data.WEIGHT[l], abs=1e-5)


@pytest.mark.parametrize("labels, pairs", [("bt", 9), ("soft", 9), ("argmax", 8)])
def test_ties_and_identical_completions_are_reported(labels, pairs, capsys):
    """Identical completions form no pair; ties are dropped by argmax only. pitfalls 22, 27"""
    preferences = labelled(labels, P=1, rewards=R[[0, 1, 1, 3, 4]])
    assert len(preferences.pairs) == pairs * (2 if labels == "soft" else 1)
    assert f"{10 - pairs} of 10 pairs are dropped" in capsys.readouterr().out
    if labels == "soft":
        assert sorted(preferences.weight.tolist())[8:10] == [0.5, 0.5]


def test_near_ties_are_ranked_by_the_reward_itself():
    """Not by a probability that saturates, as sigmoid(20) and sigmoid(21) do. pitfall 27"""
    order = ["superb", "odd", "good", "dull"]
    for step in (1.0, 1e-8):  # the latter is lost in sigmoid(r_1 - r_2), too
        rewards = step * torch.tensor([20.0, 21, 22, 23, 20])
        preferences = labelled("argmax", P=1, rewards=rewards)
        assert len(preferences.pairs) == 9
        assert all(order.index(w) > order.index(l) for w, l in words_of(preferences))


@pytest.mark.parametrize("labels", ["bt", "soft", "argmax"])
def test_rows_are_the_completions_and_prompts_are_consecutive(labels):
    """Ids, masks and log-probabilities are those that were sampled. pitfall 9"""
    ids, mask, logps = completions(4)
    preferences = labelled(labels, P=4)
    rows = logps.tolist()  # which are distinct
    index = [rows.index(row) for row in preferences.ref_logps.tolist()]
    assert torch.equal(preferences.ids, ids[index]) and torch.equal(preferences.mask, mask[index])
    assert preferences.prompt.tolist() == [i // 5 for i in index] == sorted(i // 5 for i in index)
    w, l = preferences.pairs.T
    assert torch.equal(preferences.prompt[w], preferences.prompt[l])
    assert set(preferences.pairs.flatten().tolist()) == set(range(len(preferences.ids)))


def test_decoding_rows_gives_prompt_and_response_without_end_and_padding():
    text = "the plot is superb."
    row = [*TOKENIZER.encode_ordinary(text), END]
    ids = torch.tensor([[*row, 0, 0], [*row, END, END], [*row[:-1], *row[:3]]])
    again = text + TOKENIZER.decode(row[:3])  # cut off at the context, without an end token
    assert data.decode_rows(ids, TOKENIZER) == [text, text, again]
