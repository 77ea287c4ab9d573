"""beyond/judge.py: its features, what it learns, and the command line on a tiny run."""

import json

import numpy as np
import pytest

import data
from beyond import judge
from test_reward import graded_reviews


def test_features_are_the_presence_of_runs_of_one_to_three_tokens():
    """a b a b: two tokens, three pairs and four runs of three, of which some end the text."""
    twice, thrice = judge.ngrams([5, 6, 5, 6]), judge.ngrams([5, 6, 5, 6, 5, 6])
    assert len(twice) == len(set(twice)) == 9 and np.array_equal(twice, thrice)
    one, other = set(judge.ngrams([5, 6])), set(judge.ngrams([6, 5]))
    assert len(one) == len(other) == 6 and len(one & other) == 2  # the tokens, but not their order
    assert max(one) < judge.N_FEATURES and not one & set(judge.ngrams([7, 8]))


def test_it_is_accurate_on_reviews_it_was_not_trained_on():
    found = judge.train_judge(graded_reviews(), data.toy_tokens())
    assert 0.9 < found["accuracy"] <= 1 and 0.9 < found["accuracy_short"] <= 1


def test_the_command_line_prints_a_table_of_all_policies(imdb, monkeypatch, capsys):
    monkeypatch.setenv("DPO_CACHE", str(imdb.folder.parent / "cache"))
    argv = [str(imdb.folder), "--imdb", str(imdb.cfg.imdb), "--samples", "2"]
    capsys.readouterr()
    assert judge.main(argv) == 0
    printed = capsys.readouterr().out
    written = imdb.folder / "judge.json"
    rows = json.loads(written.read_text())
    written.unlink()  # other tests look at all files of this run
    assert printed.endswith(judge.table(rows) + "\n") and "its accuracy is 0." in printed
    assert [row["policy"] for row in rows] == ["pi_ref", "dpo, beta 1"]
    assert rows[0]["win rate by r*"] == rows[0]["win rate by judge"] == 0.5
    for name in ("P(positive) by r*", "P(positive) by judge", "win rate by judge"):
        assert all(0 < row[name] < 1 for row in rows)


@pytest.mark.parametrize("name", ["toy", "empty"])
def test_another_folder_is_one_line(name, toy, tmp_path, capsys):
    folder = {"toy": toy.folder, "empty": tmp_path}[name]
    capsys.readouterr()
    assert judge.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is not a finished run with --data imdb" in error and error.count("\n") == 1
