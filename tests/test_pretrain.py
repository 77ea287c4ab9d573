"""Pretraining pi_ref: the tokenizer, the texts it sees, and its resume."""

import io
import math
import tarfile

import numpy as np
import pytest
import torch

import data
from beyond import pretrain
from beyond.bpe import learn_tokenizer
from data import load_tokenizer, toy_reviews
from lib.checkpoint import read_checkpoint
from lib.io import BadInput
from model import GPT, GPTConfig

TINY = pretrain.Settings(
    steps=200, vocab_size=300, n_layer=1, n_head=2, n_embd=16, batch_size=2, decay=1.0
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Reviews of the grammar, in the layout of the IMDb archive."""
    path = tmp_path_factory.mktemp("imdb") / "reviews.tar.gz"
    texts = iter(toy_reviews(900, seed=3))
    with tarfile.open(path, "w:gz") as tar:
        for part in ("train/pos", "train/neg", "train/unsup", "test/pos", "test/neg"):
            for i in range(60):
                content = " ".join(next(texts) for _ in range(3)).encode()
                info = tarfile.TarInfo(f"aclImdb/{part}/{i}_7.txt")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_bpe_merges_the_most_frequent_pair_first():
    tokens = learn_tokenizer(["abab abab ab xy"], 260)
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert tokens[256] == b"ab"


def test_bpe_encodes_and_decodes_any_text():
    tokens = learn_tokenizer(toy_reviews(200, 0), 400)
    tokenizer = load_tokenizer(tokens)
    assert tokenizer.n_vocab <= 400
    for text in ("this film works.", "naïve — 東京\n\n  two", ""):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary("this film")) <= 3


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(BadInput):
        learn_tokenizer(["a"], 256)


def test_texts_are_runs_of_whole_sentences_of_one_review():
    tokenizer = load_tokenizer(learn_tokenizer(toy_reviews(200, 0), 400))
    reviews = [" ".join(toy_reviews(6, seed)) for seed in range(20)]
    corpus = pretrain.read_corpus(reviews, tokenizer)
    texts = corpus.texts(np.arange(len(corpus.start)), tokenizer.eot_token)
    assert len(texts) > 2 * len(reviews)
    for ids in texts:
        text = tokenizer.decode(ids[:-1]).strip()
        assert len(ids) <= pretrain.CONTEXT and ids.count(tokenizer.eot_token) == 1
        assert text.endswith(".") and any(text in review for review in reviews)
    openings = [
        tokenizer.decode(ids[:-1]) for ids, o in zip(texts, corpus.opening, strict=True) if o
    ]
    assert all(any(review.startswith(text) for review in reviews) for text in openings)


def test_a_stopped_run_ends_with_the_same_weights(archive, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr(pretrain, "ROUND", 20)
    monkeypatch.setattr(pretrain, "ROUNDS_PER_CHECKPOINT", 1)
    pretrain.run(archive, whole, TINY)

    take_step = pretrain.Training.take_step

    def stop_at_step_50(training, texts):
        if training.step == 50:
            raise KeyboardInterrupt
        return take_step(training, texts)

    monkeypatch.setattr(pretrain.Training, "take_step", stop_at_step_50)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(archive, stopped, TINY)
    monkeypatch.setattr(pretrain.Training, "take_step", take_step)
    pretrain.run(archive, stopped, TINY)
    results = [read_checkpoint(folder / "pi_ref.pt")["weights"] for folder in (whole, stopped)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_command_reports_and_refuses_a_bad_path(tmp_path, capsys):
    assert pretrain.main(["--imdb", str(tmp_path / "missing"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nats_per_byte_of_a_uniform_model():
    """Each token is predicted with probability 1 / V."""
    tokens = data.toy_tokens()
    tokenizer = load_tokenizer(tokens)
    pi = GPT(GPTConfig(tokenizer.n_vocab, 24, 1, 2, 16))
    torch.nn.init.zeros_(pi.wte.weight)
    texts = data.openings(toy_reviews(50, 0), tokenizer, 24)
    n = sum(len(ids) - 1 for ids in texts)
    length = sum(len(tokenizer.decode_bytes(ids[1:-1])) for ids in texts)
    expected = n * math.log(tokenizer.n_vocab) / length
    assert pretrain.nats_per_byte(pi, texts, tokenizer) == pytest.approx(expected, rel=1e-3)
