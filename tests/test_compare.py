"""beyond/common.py and beyond/compare.py: arithmetic, and a tiny run from the command line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from beyond import ablations, bench, common, compare, explain, figure2, losses, pretrain, scale
from beyond.custom_data import to_preferences
from dpo import Preferences, frontier
from lib.io import BadInput

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 16 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4"
).split()
SOME = ["dpo", "kto_samples", "plackett_luce", "rso"]  # one of each kind


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the results of a tiny run."""
    folder = tmp_path_factory.mktemp("compare")
    assert compare.main([*TINY, "--methods", *SOME, "--out", str(folder)]) == 0
    return folder, results(folder)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------- what every method shares


def test_a_subset_numbers_its_prompts_from_0():
    given = to_preferences([((x,), (w,), (1,)) for x, w in ((7, 2), (8, 3), (9, 4))])
    some = common.subset(given, torch.tensor([1, 2]))
    assert some.prompt.tolist() == [0, 0, 1, 1]
    assert common.prompts_of(some) == [[8], [9]]
    assert some.ids[some.pairs[:, 0], 1].tolist() == [3, 4]


def test_the_optimum_s_rows_agree_with_the_frontier():
    """The importance weights of Eq. 4 give the frontier's gain and KL, and any other mean."""
    r = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)).double()
    length = 3 + r  # a length whose mean is known where that of r is known
    for row in common.optimum_rows(r, length)[::20]:
        reward, kl, _ = frontier(r, row["beta"])
        assert row["gain"] == pytest.approx((reward.mean() - r.mean()).item())
        assert row["kl"] == pytest.approx(kl.mean().item())
        assert row["length"] == pytest.approx(3 + reward.mean().item())


def test_the_length_of_the_best_of_n_is_that_of_the_winners():
    """At n = 2: the mean over all pairs, by hand."""
    r, length = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[7.0, 5.0, 12.0]])
    one, two, three = common.best_of_n_rows(r, length)
    assert one["length"] == pytest.approx(8) and three["length"] == pytest.approx(12)
    assert two["length"] == pytest.approx((7 + 12 + 12) / 3)
    assert two["kl"] == pytest.approx(math.log(2) - 0.5)


def test_a_verdict_needs_three_seeds_and_an_interval_that_excludes_0():
    assert common.verdict([0.3]) == "one seed: no verdict"
    assert common.verdict([0.3, 0.3]) == "2 seeds: no verdict"
    assert common.verdict([0.30, 0.31, 0.32]) == "seen"
    assert common.verdict([-0.30, -0.31, -0.32]) == "reversed"
    assert common.verdict([0.1, 0.3, 0.5]) == "no difference seen"
    assert common.interval([0.0, 2.0]) == (1.0, pytest.approx(12.706))


# ------------------------------------------------- the methods


def test_every_loss_is_a_method_at_two_settings():
    methods = compare.METHODS.values()
    assert {method.loss for method in methods} == set(losses.LOSSES.values())
    for method in methods:
        assert len(method.settings()) == len(method.lrs) == 2 and method.why


def fresh_pairs(method: str) -> Preferences:
    """The pairs of four prompts. Each prompt's sample number i is the token i, with reward i."""

    def sample(prompts):
        ids = torch.tensor([[*x, prompts[:i].count(x)] for i, x in enumerate(prompts)])
        return ids, torch.tensor([[False, True]]).expand(ids.shape), torch.zeros(ids.shape)

    def reward(ids, mask):
        return ids[:, 1].float()

    def score(ids, mask):
        return torch.zeros(ids.shape)

    args = None, [[50 + p] for p in range(4)], sample, score, reward, 4, 0.01, 0
    return compare.METHODS[method].source(compare.Round(*args))


def test_rso_keeps_the_best_of_sixteen_and_every_prompt():
    """At a small beta the three accepted samples are the best three, and no prompt is dropped."""
    found = fresh_pairs("rso")
    assert sorted(set(found.ids[:, 1].tolist())) == [13, 14, 15]
    assert found.prompt.unique().tolist() == [0, 1, 2, 3] and len(found.pairs) == 12


def test_iterative_dpo_pairs_the_best_with_the_worst_of_eight():
    found = fresh_pairs("iterative")
    w, l = found.ids[found.pairs, 1].T
    assert w.tolist() == [7] * 4 and l.tolist() == [0] * 4


# ------------------------------------------------- a run


def test_a_run_has_a_row_for_each_method_and_setting(run):
    folder, found = run
    assert [p["method"] for p in found["points"]] == [name for name in SOME for _ in range(2)]
    for p in found["points"]:
        assert p["kl"] > 0 and 0 < p["p_positive"] < 1 and p["length"] > 0
        assert math.isfinite(p["held_out_loss"]) and p["lr"] > 0
        # KTO's reference point: with y' from pi_theta it is positive once the policy has moved.
        assert p["z_0"] > 0 if p["method"] == "kto_samples" else p["z_0"] is None
    assert found["pair_accuracy_of_true_reward"] > 0.5
    drawn_again = found["best_of_n"][0]["length"]  # the mean over pi_ref's evaluation samples
    assert drawn_again == pytest.approx(found["reference"]["length"])
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "table.md").read_text() == compare.table([found]) + "\n"


def test_a_second_run_computes_nothing_and_one_more_method_its_own_stages(run, capsys):
    folder, was = run
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert compare.main([*TINY, "--methods", "dpo", "rso", "ipo", "--out", str(folder)]) == 0
    changed = {path for path in folder.glob("*.pt") if before.get(path) != path.stat().st_mtime_ns}
    parts = ("", "held-out-", "eval-")
    assert changed == {folder / f"{part}ipo-{i}.pt" for part in parts for i in (0, 1)}
    kept = [p for p in was["points"] if p["method"] in ("dpo", "rso")]
    assert results(folder)["points"][:4] == kept
    assert "python -m beyond.compare --summary" in capsys.readouterr().out  # the next step


# ------------------------------------------------- the table


def made_up(gain: float, fraction: float | None, method: str = "simpo") -> dict:
    point = dict.fromkeys(compare.COLUMNS, 1.0) | {"gain": gain, "fraction_of_optimal": fraction}
    point |= {"method": method, "hyper": {"beta": 2.0, "gamma": 0.5}, "z_0": None}
    reference = {"reward": gain - 1, "length": 6.0, "p_positive": 0.4}
    row = {"beta": 1.0, "kl": 0.5, "gain": 2.0, "p_positive": 0.9, "length": 7.0, "reliable": True}
    return {"points": [point], "reference": reference, "optimum": [row]}


def test_the_table_has_mean_and_standard_deviation_over_seeds():
    """One seed has no deviation. An unknown value is a dash."""
    row = compare.table([made_up(1.0, 0.9), made_up(2.0, 0.7), made_up(3.0, 0.8)]).splitlines()[5]
    assert row.startswith(r"| simpo\* | beta 2, gamma 0.5 | 2.00 ± 1.00 | 1.00 ± 0.00 |")
    assert "| 0.80 ± 0.10 |" in row and row.endswith("| - |")
    reference, optimum, _, row = compare.table([made_up(1.0, None)]).splitlines()[2:6]
    assert reference.startswith("| pi_ref |  | 0.00 | 0.00 | 0.40 | 6.00 | 0.50 | - |")
    assert optimum.startswith("| optimum | beta 1 | 2.00 | 0.50 | 0.90 | 7.00 | - |")
    assert "±" not in row and row.split("|")[8].strip() == "-"


def test_fractions_are_compared_with_dpos_over_the_settings_that_all_seeds_have():
    def run(*fractions: float | None) -> dict:
        methods = "dpo", "dpo", "ipo", "ipo"
        points = zip(methods, fractions, strict=True)
        return {"points": [{"method": m, "fraction_of_optimal": x} for m, x in points]}

    runs = run(0.97, 0.95, 0.90, None), run(0.98, 0.96, 0.92, None), run(0.96, 0.94, 0.88, None)
    assert compare.fraction_rows(runs) == [
        ["dpo", "0.96 ± 0.01", "", ""],
        ["ipo", "0.90 ± 0.02", "+0.060 [+0.035, +0.085]", "seen"],
    ]


def test_a_summary_is_the_table_and_the_figure_for_its_folders(run, tmp_path, capsys):
    """The figure of runs in name2-0, name2-1, ... is name2.png"""
    folders = [shutil.copytree(run[0], tmp_path / f"name2-{i}") for i in range(2)]
    assert compare.main(["--summary", *map(str, folders)]) == 0
    assert capsys.readouterr().out.strip() == compare.table([results(run[0])] * 2)
    assert (tmp_path / "name2.png").stat().st_size > 10_000


def test_results_are_averaged_over_seeds():
    """Numbers are averaged, None and False win, and of anything else the first is kept."""
    one = {"points": [{"kl": 1.0, "gain": None, "method": "DPO", "reliable": True}]}
    two = {"points": [{"kl": 2.0, "gain": 3.0, "method": "DPO", "reliable": False}]}
    assert common.average([one, two]) == {
        "points": [{"kl": 1.5, "gain": None, "method": "DPO", "reliable": False}]
    }


# ------------------------------------------------- bad input


@pytest.mark.parametrize(
    "command, flags, said",
    [
        (compare, "--loss dpo", "--loss"),
        (compare, "--data own.jsonl", "known reward"),
        (figure2, "--methods GRPO", "GRPO"),
        (explain, "--ppo-beta 1", "--ppo-beta"),
        (ablations, "--studies some", "some"),
        (bench, "--repetitions 0", "--repetitions"),
        (pretrain, "--imdb no", "no: there is no such file"),
        (pretrain, "--imdb FILE --out FILE", "FILE"),
        (pretrain, "--imdb no --seed -1", "--seed"),
        (scale, "--tokens 1025", "--tokens"),
    ],
)
def test_a_bad_flag_gives_one_line_and_exit_code_2(
    command, flags, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    try:
        code = command.main(flags.split())
    except SystemExit as stopped:  # from argparse
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", '{"points": [{}], "reference": {}}'])
def test_other_files_are_not_results(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert compare.main(["--summary", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


def test_runs_of_different_methods_have_no_table():
    with pytest.raises(BadInput, match="do not have the same methods"):
        compare.table([made_up(1.0, 0.5), made_up(1.0, 0.5, "ipo")])
