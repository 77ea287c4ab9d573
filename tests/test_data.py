"""data.py: the grammar, the archive, the tokenizer, the true reward, prompts and triplets."""
import io
import json
import math
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import data
from kit import files, own, tokens

TOKENIZER = tokens.learn_tokenizer(data.toy_reviews(2_000, 0), 500)


# --------------------------------------------------------------------------------------------------- the grammar

def test_grammar_is_seeded_and_writes_tens_of_thousands_of_distinct_reviews():
    reviews = data.toy_reviews(40_000, 0)
    assert reviews == data.toy_reviews(40_000, 0)
    assert reviews[:100] != data.toy_reviews(100, 1)
    assert len(set(reviews)) > 20_000


def test_grammar_uses_every_weighted_word_and_no_name_is_left_unexpanded():
    text = " ".join(data.toy_reviews(5_000, 0))
    assert text == text.lower()
    assert set(data.WEIGHT) <= set(text.replace(".", "").split())


def test_toy_reward_is_the_sum_of_its_words_weights():
    r = data.toy_reward(["the plot is superb. we hated this film.", "the plot is", ""])
    torch.testing.assert_close(r, torch.tensor([data.WEIGHT["superb"] + data.WEIGHT["hated"], 0.0, 0.0]))


# --------------------------------------------------------------------------------------------------- the archive

def archive(path, members: dict[str, bytes], kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(text), kind
            tar.addfile(info, io.BytesIO(text))
    return path


MEMBERS = {f"aclImdb/{split}/{label}/{i}_{stars}.txt": f"{split} {label} {i}.<br /><br />A  second\nline.".encode()
           for split in ("train", "test") for label, stars in (("pos", 9), ("neg", 2)) for i in (10, 2)}


def test_archive_and_unpacked_folder_hold_the_same_reviews(tmp_path):
    path = archive(tmp_path / "a.tar.gz", MEMBERS | {"aclImdb/train/unsup/0_0.txt": b"no label", "aclImdb/README": b"?"})
    reviews = data.read_imdb(path)
    assert reviews["train/pos"] == ["train pos 2. A second line.", "train pos 10. A second line."]
    assert reviews["train/unsup"] == ["no label"]
    for name, text in (MEMBERS | {"aclImdb/train/unsup/0_0.txt": b"no label"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    assert data.read_imdb(tmp_path / "aclImdb") == reviews


@pytest.mark.parametrize("name, kind", [("../../train/pos/1_9.txt", tarfile.REGTYPE), ("/train/neg/2_1.txt", tarfile.REGTYPE),
                                        ("train/pos/1_9.txt", tarfile.SYMTYPE), ("train/pos/1_9.txt", tarfile.LNKTYPE),
                                        ("train/pos/1_9.txt", tarfile.CHRTYPE)])
def test_an_archive_that_leads_out_of_its_folder_is_refused_and_nothing_is_written(tmp_path, name, kind):
    path = archive(tmp_path / "a.tar.gz", {name: b""}, kind)
    with pytest.raises(files.BadInput, match="is a link, a device, or leads out"):
        data.read_imdb(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["a.tar.gz"]


def test_an_archive_that_unpacks_to_far_too_much_is_refused_before_it_has(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar.gz", MEMBERS | {"aclImdb/train/pos/3_9.txt": bytes(30_000_000)})
    assert path.stat().st_size < 100_000
    given, bounded = [], files.Bounded

    class Counting(bounded):
        def read(self, n):
            given.append(n)
            return super().read(n)
    monkeypatch.setattr(data, "Bounded", lambda file, limit: Counting(file, 1_000_000))
    with pytest.raises(files.BadInput, match="unpacks to far more"):
        data.read_imdb(path)
    assert sum(given) < 1_100_000


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "another layout", "empty folder"])
def test_an_archive_that_cannot_be_used_is_one_clear_error(tmp_path, damage):
    path = archive(tmp_path / "a.tar.gz", {k: np.random.default_rng(i).bytes(5000) for i, k in enumerate(MEMBERS)})
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "another layout":
        archive(path, {"reviews/1.txt": b"good"})
    else:
        path = tmp_path / "folder"
        path.mkdir()
    with pytest.raises(files.BadInput, match=path.name):
        data.read_imdb(path)


class Download(io.BytesIO):
    """What urlopen returns, cut short or broken off."""
    def __init__(self, content: bytes, breaks=False, url=files.ARCHIVE):
        super().__init__(content)
        self.breaks, self.url = breaks, url

    def geturl(self):
        return self.url

    def read(self, n=-1):
        block = super().read(n)
        if not block and self.breaks:
            raise ConnectionError("cut off")
        return block


def test_a_download_is_checked_then_renamed_and_done_once(tmp_path, monkeypatch):
    content = b"the archive"
    monkeypatch.setattr(files, "ARCHIVE_BYTES", len(content))
    monkeypatch.setattr(files, "ARCHIVE_MD5", files.hashlib.md5(content).hexdigest())
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda url, timeout: Download(content))
    path = files.download_imdb(tmp_path / "cache")
    assert path.read_bytes() == content
    monkeypatch.setattr(files.urllib.request, "urlopen", None)       # not asked again
    assert files.download_imdb(tmp_path / "cache") == path


@pytest.mark.parametrize("download", [Download(b"other bytes"), Download(b"the ar", breaks=True),
                                      Download(b"", url="http://elsewhere.example")])
def test_a_download_that_is_not_the_archive_leaves_nothing(tmp_path, monkeypatch, download):
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda url, timeout: download)
    with pytest.raises(files.BadInput, match="--imdb"):
        files.download_imdb(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- the tokenizer

@given(st.text())
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text


@given(st.binary(max_size=40))
def test_every_byte_string_has_ids(content):
    ids = TOKENIZER._encode_bytes(content)
    assert TOKENIZER.decode_bytes(ids) == content


def plain_bpe(texts: list[str], vocab_size: int) -> list[bytes]:
    """The definition, slowly: count every pair anew, join the most frequent (of equals, the oldest tokens), again."""
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in data.re.findall(tokens.PATTERN, t)]
    found = [bytes([b]) for b in range(256)]
    while len(found) < vocab_size - 1:
        counts = Counter(pair for w in words for pair in zip(w, w[1:]))
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], *map(found.index, pair)))
        if a + b not in found:
            found.append(a + b)
        for k, w in enumerate(words):
            new, i = [], 0
            while i < len(w):
                joined = w[i:i + 2] == [a, b]
                new.append(a + b if joined else w[i])
                i += 2 if joined else 1
            words[k] = new
    return found


@pytest.mark.parametrize("texts", [["aaaa aaa aa a", "abab ababab"], data.toy_reviews(60, 3), ["été, l'été! où? ça"] * 3])
def test_the_heap_learns_the_tokens_of_the_definition(texts):
    learned = tokens.learn_tokenizer(texts, 330)
    assert [learned.decode_single_token_bytes(i) for i in range(learned.n_vocab - 1)] == plain_bpe(texts, 330)


def test_the_end_token_is_last_and_a_saved_tokenizer_is_the_same():
    assert TOKENIZER.eot_token == TOKENIZER.n_vocab - 1
    again = tokens.tokenizer_of([TOKENIZER.decode_single_token_bytes(i) for i in range(TOKENIZER.n_vocab - 1)])
    text = "the plot is superb; naïve — we hated it."
    assert again.encode_ordinary(text) == TOKENIZER.encode_ordinary(text)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(files.BadInput, match="256 bytes"):
        tokens.learn_tokenizer(["a"], 256)


# --------------------------------------------------------------------------------------------------- the true reward

def test_sentiment_learns_what_words_and_pairs_of_words_mean():
    rng = random.Random(0)
    positive = [rng.random() < 0.5 for _ in range(600)]
    texts = [" ".join(rng.choices("the a film plot it was".split(), k=20) + ["not bad" if p else "not good"] +
                      rng.choices("bad good".split(), k=2)) for p in positive]
    r = data.Sentiment.train(texts, positive, epochs=20)
    assert r(["it was not bad"]) > 1 > -1 > r(["it was not good"])
    assert torch.isfinite(r([""])).all()
    torch.testing.assert_close(r(["not bad", "film"])[1:], r(["film"]))      # each text is judged by itself


# --------------------------------------------------------------------------------------------------- prompts, triplets

REVIEWS = data.toy_reviews(300, 1)
OPENINGS = data.openings(REVIEWS, TOKENIZER, 24)


def test_openings_are_whole_sentences_that_fit_and_end_with_the_end_token():
    starts = {review: i for i, review in enumerate(REVIEWS)}
    for ids in OPENINGS:
        text = data.text_of(ids, TOKENIZER)
        assert len(ids) <= 24 and ids[-1] == TOKENIZER.eot_token and ids.count(TOKENIZER.eot_token) == 1
        assert text.endswith(".") and any(review.startswith(text) for review in starts)
        assert ids[:-1] == TOKENIZER.encode_ordinary(text)


def test_a_first_sentence_that_is_too_long_is_left_out():
    assert data.openings(["very " * 50 + "long."], TOKENIZER, 24) == []
    assert data.openings(["no end to it " * 3], TOKENIZER, 24) == []


def test_prompts_are_2_to_8_tokens_and_end_where_a_word_does():
    prompts = data.prompts_of(OPENINGS, TOKENIZER, random.Random(0))
    lengths = {len(x) for x in prompts}
    assert min(lengths) >= 2 and max(lengths) <= 8 and len(lengths) > 3
    texts = {data.text_of(ids, TOKENIZER) for ids in OPENINGS}
    for x in prompts:
        start = TOKENIZER.decode(x)
        assert any(text.startswith(start + " ") for text in texts)


def world(labels: str, n: int = 400):
    rng = random.Random(0)
    prompts = data.prompts_of(OPENINGS, TOKENIZER, rng)[:n]
    completions = [[TOKENIZER.encode_ordinary(" " + rng.choice(["superb", "dull", "good", "odd"])) + [TOKENIZER.eot_token]
                    for _ in range(4)] for _ in prompts]
    rewards = data.toy_reward([data.text_of(y, TOKENIZER) for ys in completions for y in ys]).view(-1, 4)
    return prompts, completions, rewards, *data.preferences(prompts, completions, rewards, TOKENIZER, labels, random.Random(1))


def test_bradley_terry_labels_have_bradley_terry_frequencies():
    *_, triplets, counts = world("bt")
    kept = [t for t in triplets if {t["chosen"], t["rejected"]} == {" superb", " odd"}]
    p = 1 / (1 + math.exp(data.WEIGHT["odd"] - data.WEIGHT["superb"]))
    seen = sum(t["chosen"] == " superb" for t in kept) / len(kept)
    assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / len(kept))
    assert counts["pairs"] == len(triplets) and counts["pairs"] + counts["identical"] == 6 * 300


def test_soft_labels_are_the_expectation_of_sampled_ones():
    *_, triplets, counts = world("soft")
    assert len(triplets) == 2 * counts["pairs"]
    for one, other in zip(triplets[::2], triplets[1::2]):
        assert one["chosen_ids"] == other["rejected_ids"] and one["weight"] + other["weight"] == pytest.approx(1)
        assert math.log(one["weight"] / other["weight"]) == pytest.approx(one["reward_chosen"] - one["reward_rejected"])


def test_argmax_labels_prefer_the_higher_reward_and_have_no_ties():
    *_, triplets, counts = world("argmax")
    assert triplets and all(t["reward_chosen"] > t["reward_rejected"] for t in triplets)
    *_, sampled, sampled_counts = world("bt")
    assert counts["ties"] == sampled_counts["ties"] and len(triplets) == len(sampled) - counts["ties"]


def test_ties_and_identical_completions_are_counted():
    x, end = OPENINGS[0][:3], TOKENIZER.eot_token
    one, two = TOKENIZER.encode_ordinary(" plot"), TOKENIZER.encode_ordinary(" music")
    triplets, counts = data.preferences([x], [[one, one, two, two + [end]]], torch.zeros(1, 4), TOKENIZER, "bt", random.Random(0))
    assert counts == dict(pairs=5, ties=5, identical=1) and len(triplets) == 5


def test_triplets_are_json_lines_and_come_back_the_same(tmp_path):
    *_, triplets, _ = world("bt", 20)
    data.write_triplets(triplets, tmp_path / "t.jsonl")
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()] == triplets
    pairs = own.read_pairs(tmp_path / "t.jsonl")
    assert pairs == [{name: t[name] for name in ("prompt", "chosen", "rejected", "weight")} for t in triplets]


def test_grouping_keeps_every_pair_and_each_completion_once():
    prompts, completions, _, triplets, _ = world("soft", 30)
    ids, mask, pairs, weight = data.group(triplets)
    assert len(pairs) == len(weight) == len(triplets)
    for t, (p, w, l) in zip(triplets, pairs.tolist()):
        for name, k in (("chosen_ids", w), ("rejected_ids", l)):
            row, under = ids[p, k], mask[p, k]
            assert row[under].tolist() == t[name]                                   # the sampled ids are what is scored
            x = row[:int(under.nonzero().min())].tolist()
            assert x == t["prompt_ids"]
    rows = [tuple(r[m].tolist()) for p in range(len(ids)) for r, m in zip(ids[p], mask[p]) if m.any()]
    assert len(rows) == sum(len({tuple(y) for y in ys}) for ys in completions[:30]
                            if len({tuple(y) for y in ys}) > 1)


def test_a_shown_triplet_has_its_response_and_only_that_in_brackets():
    *_, triplets, _ = world("bt", 5)
    first, second, _ = data.show(triplets[0], TOKENIZER).splitlines()
    inside = "".join(data.re.findall(r"\[(.*?)\]", first))
    assert inside == triplets[0]["chosen"] + tokens.END
    assert "[" not in first[:first.index("[")] and "rejected" in second


def test_own_pairs_are_encoded_apart_and_share_rows_while_they_are_few():
    """Prompt and response are joined as ids; pairs of a prompt share a number up to four distinct responses."""
    rows = [dict(prompt="the plot is", chosen=f" superb {i}", rejected=f" dull {j}", weight=2.0)
            for i, j in ((0, 0), (0, 1), (1, 1), (2, 2), (0, 0))] + [dict(prompt="the cast", chosen="s", rejected="d", weight=1.0)]
    triplets = own.encode_pairs(rows, TOKENIZER, 24)
    assert [t["number"] for t in triplets] == [0, 0, 0, 1, 1, 2]
    for row, t in zip(rows, triplets):
        assert t["prompt_ids"] == TOKENIZER.encode_ordinary(row["prompt"]) and t["weight"] == row["weight"]
        for name in ("chosen", "rejected"):
            assert t[name + "_ids"] == TOKENIZER.encode_ordinary(row[name]) + [TOKENIZER.eot_token] and t[name] == row[name]
    assert data.group(triplets)[0].shape[:2] == (len({t["number"] for t in triplets}), 4)


def test_a_pair_fits_if_its_longer_response_and_the_end_token_do():
    pair = dict(prompt="a", chosen="b" * 3, rejected="c", weight=1.0)
    needed = len(TOKENIZER.encode_ordinary("a")) + len(TOKENIZER.encode_ordinary("bbb")) + 1
    assert len(own.encode_pairs([pair], TOKENIZER, needed)) == 1 and own.encode_pairs([pair], TOKENIZER, needed - 1) == []


def test_a_response_that_is_the_end_token_alone_is_read_back_though_its_text_is_empty(tmp_path):
    end = [TOKENIZER.eot_token]
    written = data.triplet(OPENINGS[0][:3], end, OPENINGS[0][3:], TOKENIZER, 1.0, 0)
    data.write_triplets([written], tmp_path / "t.jsonl")
    again, = own.encode_pairs(own.read_pairs(tmp_path / "t.jsonl"), TOKENIZER, 24)
    assert written["chosen"] == "" and again["chosen_ids"] == end and again["rejected_ids"] == written["rejected_ids"]
