"""beyond/figure2.py, tiny, through its command line; its two losses; frontiers and verdicts; what it refuses."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from beyond import figure2
from worlds import assert_at_most, assert_same, bigram, preferences, seeds, triplets, uniform

TINY = "--reviews 400 --steps 15 --prompts 48 --held-out 6 --batch 12 --iterations 4".split()
WHOLE = figure2.TOY
SWEEP = dict(dpo={0.5: 2.4, 1: 1.0}, unlikelihood={0.5: 0.1}, kl=(0.5,), evaluations=2, grid=(0.05, 0.5))


@pytest.fixture(scope="module")
def small():
    """The toy sweep, with fewer runs."""
    figure2.TOY = dataclasses.replace(WHOLE, **SWEEP)
    yield
    figure2.TOY = WHOLE


@pytest.fixture(scope="module")
def out(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figure2")
    assert figure2.main([*TINY, "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --------------------------------------------------------------------------------------------- the losses

@given(seeds)
def test_baseline_losses_are_their_formulas(seed):
    """Preferred-FT: -log pi(y_w); Unlikelihood: -log pi(y_w) + alpha log pi(y_l); of each triplet alone"""
    pi, found = bigram(seed), triplets(seed)
    batch = preferences(found, bigram(seed + 1))
    logps = preferences(found, pi).pi_ref                       # what pi says of each token

    def log_pi(t: dict, name: str) -> torch.Tensor:
        x, y = t["prompt_ids"], t[name]
        each = pi(torch.tensor(x + y)).log_softmax(-1)
        return sum(each[len(x) + k - 1, token] for k, token in enumerate(y))
    w, l = (torch.stack([log_pi(t, name) for t in found]) for name in ("chosen_ids", "rejected_ids"))
    assert_same(figure2.preferred_ft(logps, batch)[0], -w.detach())
    assert_same(figure2.unlikelihood(logps, batch, 0.3)[0], (-w + 0.3 * l).detach())
    assert_same(figure2.unlikelihood(logps, batch, 0.0)[0], figure2.preferred_ft(logps, batch)[0])


# --------------------------------------------------------------------------------------------- frontiers and verdicts

@given(seeds)
def test_hull_is_concave_rises_and_is_above_every_point(seed):
    """Points (KL, reward)  =>  a concave rising line through some of them, with none above it"""
    points = [(abs(x), y) for x, y in uniform((12, 2), -2.0, 2.0, seed).tolist()] + [(0.0, -1.0)]
    xs, ys = figure2.hull(points)
    assert set(zip(xs, ys)) <= set(points) and (np.diff(xs) > 0).all() and (np.diff(ys) > 0).all()
    slopes = np.diff(ys) / np.diff(xs)
    assert (np.diff(slopes) <= 1e-9).all()
    assert_at_most(torch.tensor([y for _, y in points], dtype=torch.float64), torch.tensor(np.interp([x for x, _ in points], xs, ys)))


def test_hull_of_a_few_points_by_hand():
    xs, ys = figure2.hull([(0, 0), (1, 1), (2, 1.5), (1.5, 1.2), (3, 1.4), (1, 0.5)])
    assert list(zip(xs, ys)) == [(0, 0), (1, 1), (2, 1.5)]


@pytest.mark.parametrize("differences, said", [
    ([[0.3, 0.4, 0.5], [0.1, 0.1, 0.11]], "seen"), ([[-0.3, -0.4, -0.5], [-0.1, -0.1, -0.11]], "reversed"),
    ([[0.3, 0.4, 0.5], [-0.1, -0.1, -0.11]], "mixed"), ([[0.3, 0.4, 0.5], [0.1, -0.1, 0.0]], "mixed"),
    ([[0.3], [0.1]], "seen"), ([[0.3], [0.0]], "mixed")])
def test_verdicts(differences, said):
    assert figure2.verdict(differences) == said


def made_up(shift: float) -> dict:
    def at(method, kl, reward):
        return dict(method=method, kl=kl, reward=reward + shift)
    return dict(grid=[1, 2], runs=[dict(method="DPO"), dict(method="PPO")], reference=dict(reward=shift),
                points=[at("DPO", 2.0, 2.0), at("DPO", 1.0, 1.5), at("PPO", 1.0, 0.5)],
                frontier=[dict(kl=1.0, reward=2.0 + shift, trusted=True), dict(kl=2.0, reward=3.0 + shift, trusted=False)],
                best_of_n=[dict(n=1, kl_bound=0.0, reward=shift), dict(n=4, kl_bound=2.0, reward=1.0 + shift)])


def test_summary_by_hand():
    """Two runs, alike but for pi_ref's reward  =>  frontiers with that deviation, differences without; parentheses beyond the
    last point, brackets before the first"""
    runs = [made_up(0.0), made_up(1.0)]
    lines = figure2.summary(runs).splitlines()
    assert lines[2:6] == ["| optimum | 2.50 ± 0.71 | - |", "| best of N | 1.00 ± 0.71 | 1.50 ± 0.71 |",
                          "| DPO | 2.00 ± 0.71 | 2.50 ± 0.71 |", "| PPO | 1.00 ± 0.71 | (1.00 ± 0.71) |"]
    assert lines[9] == "| DPO lies above PPO | 1.00 | 1.50 | seen |"
    for run in runs:
        run["grid"] = [0.5, 1]
    assert figure2.summary(runs).splitlines()[4:6] == ["| DPO | [1.25 ± 0.71] | 2.00 ± 0.71 |",
                                                       "| PPO | [0.75 ± 0.71] | 1.00 ± 0.71 |"]


# --------------------------------------------------------------------------------------------- the sweep

def test_every_evaluation_is_a_point_and_its_cost_rises(out):
    found = results(out)
    assert len(found["runs"]) == 2 + 3 + 1 + 2 and len(found["points"]) == 2 * len(found["runs"])
    for first, second in zip(found["points"][::2], found["points"][1::2]):
        assert first["run"] == second["run"] and (first["part"], second["part"], second["last"]) == (0.5, 1.0, True)
        assert 0 < first["samples"] < second["samples"] and 0 < first["seconds"] < second["seconds"] and first["kl"] > 0
    of = {p["run"]: p for p in found["points"] if p["last"]}
    assert of["DPO, beta 1"]["samples"] == 4 * 48
    assert of["PPO, kl 0.5"]["samples"] == 4 * 48 + 4 * figure2.TOY.tuning.batch
    assert of["PPO-GT, kl 0.5"]["samples"] == 4 * figure2.TOY.tuning.batch
    assert 0 <= found["reward_model"]["pair_accuracy"] <= 1 and len(found["reward_model"]["looked"]) >= 4
    assert (out / "table.md").read_text() == figure2.summary([found]) + "\n"
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_points_are_kept(out, small, capsys):
    """Run again  =>  nothing is made again; one file gone  =>  that one alone is made, and the numbers are the same"""
    def made():
        return {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    before, was = made(), results(out)
    (out / "dpo-beta-1-2.pt").unlink()
    assert figure2.main([*TINY, "--out", str(out)]) == 0
    assert {name for name, when in made().items() if before[name] != when} == {"dpo-beta-1-2.pt"}
    assert results(out)["points"] == was["points"]


def test_the_papers_labels_can_be_had(small, tmp_path):
    assert figure2.main([*TINY, "--labels", "argmax", "--methods", "DPO", "--out", str(tmp_path)]) == 0
    assert results(tmp_path)["config"]["labels"] == "argmax" and {p["method"] for p in results(tmp_path)["points"]} == {"DPO"}


def test_the_paper_has_these_sweeps():
    for sweep in (WHOLE, figure2.IMDB):
        assert {0.05, 0.1, 1, 5} <= set(sweep.dpo) and {3, 6, 9, 12} <= set(sweep.kl)
        assert [*sweep.unlikelihood] == [0.05, 0.1, 0.5, 1]
        assert {run["method"] for run in sweep.runs()} == set(figure2.LOOK)


@pytest.mark.parametrize("argv, said", [
    (["--methods", "GRPO"], "GRPO"), (["--data", "own.jsonl"], "own.jsonl"), (["--labels", "soft"], "--labels"),
    (["--imdb", "somewhere"], "--imdb PATH needs --data imdb"), (["--iterations", "0"], "--iterations"),
    (["--summary", "nowhere"], "nowhere")])
def test_bad_input_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        figure2.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_runs_of_different_sweeps_have_no_summary(tmp_path, capsys):
    for name, grid in (("a", [1, 2]), ("b", [1, 3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(made_up(0.0) | dict(grid=grid)))
    with pytest.raises(SystemExit) as stopped:
        figure2.main(["--summary", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stopped.value.code == 2 and "sweep" in capsys.readouterr().err
