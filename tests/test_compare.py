"""beyond/compare.py and beyond/mend.py, tiny, through their command lines; the table's arithmetic; what they refuse."""
import json
from pathlib import Path

import pytest
import torch

import dpo
from beyond import compare, losses, mend
from worlds import assert_same

TINY = "--reviews 400 --steps 15 --prompts 48 --held-out 6 --batch 12".split()
SOME = "dpo kto simpo plackett_luce online iterative rso".split()       # one of each kind


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert compare.main([*TINY, "--methods", *SOME, "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def made(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


# --------------------------------------------------------------------------------------------- the comparison

def test_every_loss_and_every_source_of_pairs_is_a_method():
    assert set(losses.LOSSES) | {"online", "iterative", "rso"} == set(compare.METHODS)
    for name, m in compare.METHODS.items():
        assert len(m.strengths()) == len(m.rates) == 2 and m.why and (m.loss or name) in losses.LOSSES


def test_a_comparison_writes_a_row_for_each_method_and_strength(out):
    found = results(out)
    assert [p["method"] for p in found["points"]] == [name for name in SOME for _ in range(2)]
    for p in found["points"]:
        assert p["kl"] > 0 and 0 <= p["win_rate"] <= 1 and p["length"] > 0
        assert p["log_pi_w"] > p["log_pi_l"] or p["method"] not in ("dpo", "kto")      # too small for the others
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "table.md").read_text() == compare.table([found]) + "\n"


def test_run_again_nothing_is_made_again_and_a_method_more_makes_its_stages_alone(out, capsys):
    before, was = made(out), results(out)
    assert compare.main([*TINY, "--methods", *SOME, "--out", str(out)]) == 0
    assert made(out) == before and results(out)["points"] == was["points"]
    assert compare.main([*TINY, "--methods", "dpo", "ipo", "--out", str(out)]) == 0
    assert {name for name, when in made(out).items() if before.get(name) != when} == {"compare-ipo-0.pt", "compare-ipo-1.pt"}
    assert results(out)["points"][:2] == was["points"][:2]


def test_rewards_are_those_of_the_texts_and_prompts_those_of_the_triplets(out):
    e = compare.train.prepare(compare.Settings(**compare.SMALLER | dict(reviews=400, steps=15, prompts=48, held_out=6, batch=12)),
                              out, torch.device("cpu"))
    triplets = [json.loads(line) for line in open(out / "triplets.jsonl", encoding="utf-8")]
    r, (x, w, l) = compare.rewards(e, e.preferences), e.preferences.pairs.T
    assert_same(r[x, w], torch.tensor([t["reward_chosen"] for t in triplets]))
    assert_same(r[x, l], torch.tensor([t["reward_rejected"] for t in triplets]))
    assert ((r == -torch.inf) == ~e.preferences.mask.any(-1)).all()
    assert compare.prompts_in(e.preferences) == [*{t["number"]: t["prompt_ids"] for t in triplets}.values()]


# --------------------------------------------------------------------------------------------- the table

def made_up(reward: float, fraction: float | None) -> dict:
    point = dict(method="simpo", hyper=dict(beta=2.0, gamma=0.5), reward=reward, kl=1.0, win_rate=0.75,
                 fraction_of_optimal=fraction, length=7.0, log_pi_w=-0.25, log_pi_l=-0.5)
    return dict(points=[point], reference=dict(reward=reward - 1, length=6.0))


def test_the_table_has_mean_and_deviation_over_runs():
    row = compare.table([made_up(1.0, 0.9), made_up(2.0, 0.7), made_up(3.0, 0.8)]).splitlines()[-1]
    assert row == "| simpo\\* | beta 2, gamma 0.5 | 2.00 ± 1.00 | 1.00 | 0.75 | 0.80 ± 0.10 | 7.00 | -0.25 | -0.50 |"


def test_the_table_of_one_run_has_no_deviation_and_an_unknown_value_is_a_dash():
    reference, row = compare.table([made_up(1.0, None)]).splitlines()[2:]
    assert reference == "| pi_ref |  | 0.00 | 0.00 | 0.50 | - | 6.00 | 0.00 | 0.00 |"
    assert row == "| simpo\\* | beta 2, gamma 0.5 | 1.00 | 1.00 | 0.75 | - | 7.00 | -0.25 | -0.50 |"


def test_a_summary_is_the_table_over_its_folders(out, capsys):
    assert compare.main(["--summary", str(out), str(out)]) == 0
    assert capsys.readouterr().out.strip() == compare.table([results(out)] * 2)


# --------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("argv, said", [
    (["--methods", "ppo"], "ppo"),
    (["--data", "own.jsonl"], "own.jsonl"),
    (["--imdb", "somewhere"], "--imdb PATH needs --data imdb"),
    (["--prompts", "0"], "--prompts"),
    (["--times", "nan"], "--times"),
    (["--summary", "nowhere"], "nowhere"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [{}], "reference": {}}'])
def test_results_that_are_none_are_refused_by_name(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--summary", str(tmp_path)])
    assert stopped.value.code == 2 and "results.json" in capsys.readouterr().err


def test_runs_of_different_methods_have_no_table(tmp_path, capsys):
    for name, method in (("a", "simpo"), ("b", "ipo")):
        run = made_up(1.0, 0.5)
        run["points"][0]["method"] = method
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--summary", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stopped.value.code == 2 and "not of the same methods" in capsys.readouterr().err


def test_a_folder_in_use_and_a_missing_archive_are_exit_code_2(tmp_path, capsys):
    with compare.files.alone_in(tmp_path):
        assert compare.main([*TINY, "--out", str(tmp_path)]) == 2
    assert mend.main([*TINY, "--studies", "coverage", "--out", str(tmp_path / "file" / "x")]) in (0, 2)
    assert compare.main(["--data", "imdb", "--imdb", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- the studies

def test_studies_write_figures_and_results_and_resume(out):
    before = made(out)
    assert mend.main([*TINY, "--studies", "verbosity", "coverage", "--out", str(out)]) == 0
    found = json.loads((out / "mend.json").read_text())["studies"]
    assert set(found) == {"verbosity", "coverage"} and made(out).keys() - before.keys() == {"mend-verbosity.pt", "mend-coverage.pt"}
    assert all((out / f"mend-{name}.png").read_bytes()[:4] == b"\x89PNG" for name in found)
    before = made(out)
    assert mend.main([*TINY, "--studies", "verbosity", "coverage", "--out", str(out)]) == 0 and made(out) == before


def test_turned_labels_have_their_probability():
    pairs = torch.tensor([[0, 0, 1]]).repeat(20_000, 1)
    given = dpo.Preferences(torch.zeros(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool), torch.zeros(1, 2, 1), pairs, torch.ones(len(pairs)))
    kept = [(mend.labelled(given, torch.full((len(pairs),), p), 0).pairs[:, 1] == 0).float().mean().item() for p in (0.0, 0.8, 1.0)]
    assert kept[0] == 0.0 and kept[1] == pytest.approx(0.8, abs=0.015) and kept[2] == 1.0


def test_pairs_that_do_not_connect_leave_mass_where_no_reward_is():
    """Four responses, pairs within two islands alone  =>  right odds on each island, wrong mass between them; one pair
    more that connects them gives Eq. 4's optimum"""
    found = mend.coverage(None)
    islands, bridge, optimum = (torch.tensor(found[name]["p"]) for name in ("two islands", "one bridge", "optimum"))
    assert_same(islands[0] / islands[1], optimum[0] / optimum[1], tolerance=1e-6)
    assert_same(islands[2] / islands[3], optimum[2] / optimum[3], tolerance=1e-6)
    assert islands[:2].sum() > 0.5 > 0.02 > optimum[:2].sum()
    assert found["two islands"]["reward"] < found["pi_ref"]["reward"] < found["one bridge"]["reward"]
    assert_same(bridge, optimum, tolerance=1e-4)
