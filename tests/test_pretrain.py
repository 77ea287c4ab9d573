"""Pretraining pi_ref: the tokenizer, the texts it sees, and how a run resumes."""

import math
from itertools import compress

import numpy as np
import pytest
import torch

import data
import tiny
from beyond import pretrain
from beyond.bpe import learn_tokenizer
from beyond.custom_model import read_checkpoint
from data import load_tokenizer, toy_reviews
from lib.io import BadInput
from model import GPT, GPTConfig

TINY = pretrain.Settings(steps=60, vocab_size=300, n_layer=1, n_head=2, n_embd=16, batch_size=2)


def test_bpe_merges_the_most_frequent_pair_first_and_encodes_any_text():
    tokens = learn_tokenizer(["abab abab ab xy"], 260)
    assert tokens[:257] == [*(bytes([b]) for b in range(256)), b"ab"]
    tokenizer = load_tokenizer(learn_tokenizer(toy_reviews(200, 0), 400))
    assert tokenizer.n_vocab <= 400 and len(tokenizer.encode_ordinary("this film")) <= 3
    for text in ("this film works.", "naïve — 東京\n\n  two", ""):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


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
    for ids in compress(texts, corpus.opening):
        assert any(review.startswith(tokenizer.decode(ids[:-1])) for review in reviews)


def test_a_stopped_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    archive, whole, stopped = (tmp_path / name for name in ("imdb.tar.gz", "whole", "stopped"))
    archive.write_bytes(tiny.archive())
    monkeypatch.setattr(pretrain, "ROUND", 10)
    monkeypatch.setattr(pretrain, "ROUNDS_PER_CHECKPOINT", 2)
    pretrain.run(archive, whole, TINY)

    take_step = pretrain.Training.take_step

    def stop_at_step_35(training, texts):
        if training.step == 35:
            raise KeyboardInterrupt
        return take_step(training, texts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Training, "take_step", stop_at_step_35)
        pretrain.run(archive, stopped, TINY)
    pretrain.run(archive, stopped, TINY)
    with pytest.raises(BadInput, match="was made from other reviews"):
        archive.write_bytes(tiny.archive(n=200))
        pretrain.run(archive, stopped, TINY)
    first, second = (read_checkpoint(out / "pi_ref.pt")["weights"] for out in (whole, stopped))
    assert all(torch.equal(w, second[name]) for name, w in first.items())


def test_nats_per_byte_of_a_uniform_model():
    """Each token is predicted with probability 1 / V."""
    tokenizer = load_tokenizer(data.toy_tokens())
    pi = GPT(GPTConfig(tokenizer.n_vocab, 24, 1, 2, 16))
    torch.nn.init.zeros_(pi.wte.weight)
    texts = data.openings(toy_reviews(50, 0), tokenizer, 24)
    n = sum(len(ids) - 1 for ids in texts)
    length = sum(len(tokenizer.decode_bytes(ids[1:-1])) for ids in texts)
    expected = n * math.log(tokenizer.n_vocab) / length
    assert pretrain.nats_per_byte(pi, texts, tokenizer) == pytest.approx(expected, rel=1e-3)
