"""beyond/common.py and beyond/compare.py: arithmetic, and a tiny run from the command line."""

import ast
import inspect
import json
import math
from pathlib import Path

import pytest
import torch

import train
from beyond import common, compare, losses
from dpo import Preferences, frontier
from lib import cli
from lib.io import file_lock
from lib.stage import Stage

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 16 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4"
).split()
SOME = ["dpo", "kto_samples", "plackett_luce", "rso"]  # one of each kind


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert compare.main([*TINY, "--methods", *SOME, "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def made(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def toy_preferences() -> Preferences:
    """Prompts 0, 1 and 2 with two completions each; x = (7), (8), (9)."""
    ids = torch.tensor([[7, 1], [7, 2], [8, 1], [8, 3], [9, 1], [9, 4]])
    mask = torch.tensor([[False, True]]).repeat(6, 1)
    pairs = torch.tensor([[0, 1], [3, 2], [5, 4]])
    prompt = torch.tensor([0, 0, 1, 1, 2, 2])
    return Preferences(ids, mask, torch.zeros(6, 2), prompt, pairs, torch.ones(3))


# ------------------------------------------------- what every method shares


def test_a_subset_numbers_its_prompts_from_0():
    some = common.subset(toy_preferences(), torch.tensor([1, 2]))
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


def test_the_best_of_n_wins_with_the_weights_of_order_statistics():
    """Gain and length at n = 2: the mean over all pairs, by hand."""
    r = torch.tensor([[0.0, 1.0, 2.0]])
    length = torch.tensor([[5.0, 7.0, 12.0]])
    one, two, three = common.best_of_n_rows(r, length)
    assert [row["n"] for row in (one, two, three)] == [1, 2, 3]
    assert two["gain"] == pytest.approx((1 + 2 + 2) / 3 - 1)
    assert two["length"] == pytest.approx((7 + 12 + 12) / 3)
    assert one["length"] == pytest.approx(8) and three["length"] == pytest.approx(12)
    assert two["kl"] == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize(
    "values, said",
    [
        ([0.3], "one seed: no verdict"),
        ([0.3, 0.3], "2 seeds: no verdict"),
        ([0.30, 0.31, 0.32], "seen"),
        ([-0.30, -0.31, -0.32], "reversed"),
        ([0.1, 0.3, 0.5], "no difference seen"),
        ([0.1, 0.3, -0.2], "no difference seen"),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_that_excludes_0(values, said):
    assert common.verdict(values) == said


def test_the_interval_is_student_s():
    """Mean 2, standard deviation 1, n = 3: 2 ± 4.303 / sqrt(3)"""
    assert common.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))


def test_evaluation_samples_of_pi_ref_are_drawn_again_for_their_lengths(out):
    """The stage `ref_lengths` sees the samples whose rewards and mean length eval_set has."""
    argv = [*TINY, "--methods", *SOME, "--out", str(out)]
    args, cfg = cli.parse("compare.py", "", compare.Config, train.PRESETS, argv)
    e = common.prepare(cfg, Stage(out), args.device)
    assert e.ref_lengths.shape == e.eval_set.rewards.shape
    assert e.ref_lengths.double().mean().item() == pytest.approx(e.eval_set.about["length"])


# ------------------------------------------------- the methods


def test_every_loss_is_a_method_at_two_strengths():
    own = {
        name
        for name, f in vars(losses).items()
        if getattr(f, "__module__", "") == losses.__name__
        and list(inspect.signature(f).parameters)[:3] == ["logps", "batch", "beta"]
    }
    assert len(own) == 13
    assert own | {"dpo"} == {method.loss.__name__ for method in compare.METHODS.values()}
    for method in compare.METHODS.values():
        assert len(method.strengths()) == len(method.lrs) == 2 and method.why


def made_round(method: str, sample, P: int = 4) -> Preferences:
    """The pairs of a source for P prompts of one token; r is the response's token."""

    def reward(ids, mask):
        return (ids * mask).sum(1).float()

    given = toy_preferences()
    prompts = [[50 + p] for p in range(P)]
    score = lambda ids, mask: torch.zeros(ids.shape)  # noqa: E731
    round = compare.Round(given, prompts, sample, score, reward, 4, 0.01, 0)
    return compare.METHODS[method].source(round)


def increasing(prompts):
    """Responses 0, 1, 2, ... of each prompt, one token each, in the order of the rows."""
    first = {x[0]: i for i, x in reversed(list(enumerate(prompts)))}
    response = [i - first[x[0]] for i, x in enumerate(prompts)]
    ids = torch.tensor([[x[0], y] for x, y in zip(prompts, response, strict=True)])
    mask = torch.tensor([[False, True]]).repeat(len(prompts), 1)
    return ids, mask, torch.zeros(len(prompts), 2)


def test_rso_keeps_the_best_of_sixteen_and_every_prompt():
    """At a small beta the three accepted samples are the best three, and no prompt is dropped."""
    found = made_round("rso", increasing)
    assert sorted(set(found.ids[:, 1].tolist())) == [13, 14, 15]
    assert found.prompt.unique().tolist() == [0, 1, 2, 3] and len(found.pairs) == 12


def test_iterative_dpo_pairs_the_best_with_the_worst_of_eight():
    found = made_round("iterative", increasing)
    w, l = found.ids[found.pairs, 1].T
    assert w.tolist() == [7] * 4 and l.tolist() == [0] * 4


def test_kto_records_its_reference_point_and_the_variant_s_is_an_estimate_of_the_kl(out):
    """z_0 is None but for KTO; with y' from pi_theta it is positive once the policy has moved."""
    z_0 = {p["method"]: p["z_0"] for p in results(out)["points"]}
    assert z_0["dpo"] is None and z_0["rso"] is None and z_0["kto_samples"] > 0


# ------------------------------------------------- a run


def test_a_run_has_a_row_for_each_method_and_strength(out):
    found = results(out)
    assert [p["method"] for p in found["points"]] == [name for name in SOME for _ in range(2)]
    for p in found["points"]:
        assert p["kl"] > 0 and 0 < p["p_positive"] < 1 and p["length"] > 0
        assert math.isfinite(p["held_out_loss"]) and p["lr"] > 0
    assert found["pair_accuracy_of_true_reward"] > 0.5
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "table.md").read_text() == compare.table([found]) + "\n"


def test_a_second_run_computes_nothing_and_one_more_method_only_itself(out, capsys):
    before, was = made(out), results(out)
    assert compare.main([*TINY, "--methods", "dpo", "rso", "ipo", "--out", str(out)]) == 0
    changed = {name for name, when in made(out).items() if before.get(name) != when}
    parts = ("", "held-out-", "eval-")
    assert changed == {f"{part}ipo-{i}.pt" for part in parts for i in (0, 1)}
    kept = [p for p in was["points"] if p["method"] in ("dpo", "rso")]
    assert results(out)["points"][:4] == kept
    assert "python -m beyond.compare --summary" in capsys.readouterr().out  # the next step


# ------------------------------------------------- the table


def made_up(gain: float, fraction: float | None) -> dict:
    point = dict.fromkeys(compare.COLUMNS, 1.0) | {"gain": gain, "fraction_of_optimal": fraction}
    point |= {"method": "simpo", "hyper": {"beta": 2.0, "gamma": 0.5}, "z_0": None}
    reference = {"reward": gain - 1, "length": 6.0, "p_positive": 0.4}
    row = {"beta": 1.0, "kl": 0.5, "gain": 2.0, "p_positive": 0.9, "length": 7.0, "reliable": True}
    return {"points": [point], "reference": reference, "optimum": [row]}


def test_the_table_has_mean_and_standard_deviation_over_seeds():
    row = compare.table([made_up(1.0, 0.9), made_up(2.0, 0.7), made_up(3.0, 0.8)]).splitlines()[-1]
    assert row.startswith(r"| simpo\* | beta 2, gamma 0.5 | 2.00 ± 1.00 | 1.00 ± 0.00 |")
    assert "| 0.80 ± 0.10 |" in row and row.endswith("| - |")


def test_the_table_of_one_seed_has_no_deviation_and_an_unknown_value_is_a_dash():
    reference, optimum, _, row = compare.table([made_up(1.0, None)]).splitlines()[2:]
    assert reference.startswith("| pi_ref |  | 0.00 | 0.00 | 0.40 | 6.00 | 0.50 | - |")
    assert optimum.startswith("| optimum | beta 1 | 2.00 | 0.50 | 0.90 | 7.00 | - |")
    assert "±" not in row and row.split("|")[8].strip() == "-"


def test_a_summary_is_the_table_over_its_folders(out, capsys):
    assert compare.main(["--summary", str(out), str(out)]) == 0
    assert capsys.readouterr().out.strip() == compare.table([results(out)] * 2)


# ------------------------------------------------- bad input


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--methods", "ppo"], "ppo"),
        (["--data", "own.jsonl"], "own.jsonl"),
        (["--prompts", "0"], "--prompts"),
        (["--times", "nan"], "--times"),
        (["--loss", "dpo"], "--loss"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = compare.main(argv)
    except SystemExit as stopped:  # from argparse
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [{}], "reference": {}}'])
def test_other_files_are_no_results(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert compare.main(["--summary", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


def test_runs_of_different_methods_have_no_table(tmp_path, capsys):
    for method in ("simpo", "ipo"):
        run = made_up(1.0, 0.5)
        run["points"][0]["method"] = method
        (tmp_path / method).mkdir()
        (tmp_path / method / "results.json").write_text(json.dumps(run))
    assert compare.main(["--summary", str(tmp_path / "simpo"), str(tmp_path / "ipo")]) == 2
    assert "not of the same methods" in capsys.readouterr().err


def test_preferences_without_a_true_reward_and_a_folder_in_use_are_exit_code_2(tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert compare.main(["--data", str(own), "--out", str(tmp_path / "a")]) == 2
    assert "known reward" in capsys.readouterr().err
    with file_lock(tmp_path):
        assert compare.main([*TINY, "--out", str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err


def test_no_module_of_beyond_reaches_through_train():
    """beyond uses train's own functions, not the names that train imports."""
    own = {name for name, f in vars(train).items() if getattr(f, "__module__", "") == "train"}
    for name in ("common", "compare", "figure2", "explain", "ablations"):
        text = (Path(compare.__file__).parent / f"{name}.py").read_text()
        assert names_of_train(text) <= own | {"PRESETS"}, name


def names_of_train(text: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "train"
    }
