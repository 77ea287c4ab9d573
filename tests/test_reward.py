"""beyond/reward.py: r* of the IMDb dataset."""

import json
from collections import defaultdict

import pytest

import data
import train
from beyond.reward import accuracy, main, train_classifier
from tiny import archive


def graded_reviews() -> dict[str, list[str]]:
    """Reviews from the grammar under IMDb's keys, labelled by the sum of their words' weights."""
    reviews = defaultdict(list)
    for i, text in enumerate(data.toy_reviews(3000, 77)):
        if r := round(data.WordReward(data.WEIGHT)([text]).item(), 3):
            part = f"{'train' if i % 3 else 'test'}/{'pos' if r > 0 else 'neg'}"
            reviews[part].append(text)
    return reviews


def test_r_star_is_accurate_on_reviews_it_was_not_trained_on():
    reviews = graded_reviews()
    r = train_classifier(reviews["train/pos"], reviews["train/neg"])
    right = (r(reviews["test/pos"]) > 0).tolist() + (r(reviews["test/neg"]) < 0).tolist()
    found = accuracy(r, reviews)
    assert found == pytest.approx(sum(right) / len(right)) and 0.8 < found <= 1


def test_the_command_writes_what_train_py_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    monkeypatch.setattr("beyond.reward.REWARD", tmp_path / "reward.json")
    (tmp_path / "imdb.tar.gz").write_bytes(archive(n=600))
    assert main(["--imdb", str(tmp_path / "imdb.tar.gz")]) == 0
    found = json.loads((tmp_path / "reward.json").read_text())
    committed = json.loads(train.REWARD.read_text())
    assert found.keys() == committed.keys() and committed["accuracy"] > 0.88
    assert len(committed["weight"]) > 10_000 and "superb" in committed["weight"]
    assert main(["--imdb", str(tmp_path / "reward.json")]) == 2
    assert "as the IMDb archive" in capsys.readouterr().err
