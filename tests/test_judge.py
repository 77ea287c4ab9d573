"""beyond/judge.py: what it learns, and the command line on a tiny run."""

import json

import pytest

import data
from beyond import judge
from test_reward import graded_reviews


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
    found = json.loads(written.read_text())
    rows = found["rows"]
    written.unlink()  # other tests look at all files of this run
    assert printed.endswith(judge.table(rows) + "\n") and "accuracy 0." in printed
    assert 0.5 < found["accuracy"] <= 1 and 0.5 < found["accuracy_short"] <= 1
    assert [row["policy"] for row in rows] == ["pi_ref", "dpo, beta 1"]
    assert rows[0]["win rate by r*"] == rows[0]["win rate by judge"] == 0.5
    for name in ("P(positive) by r*", "P(positive) by judge", "win rate by judge"):
        assert all(0 < row[name] < 1 for row in rows)


@pytest.mark.parametrize("name", ["toy", "empty", "compare"])
def test_another_folder_gives_one_line(name, toy, tmp_path, capsys):
    folder = toy.folder if name == "toy" else tmp_path
    if name == "compare":  # its settings have no beta
        (folder / "results.json").write_text('{"config": {"data": "imdb", "beta": []}}')
    capsys.readouterr()
    assert judge.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is not a finished run with --data imdb" in error and error.count("\n") == 1
