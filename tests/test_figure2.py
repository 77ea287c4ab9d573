"""beyond/figure2.py and beyond/explain.py: losses, curves, verdicts, and tiny runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from beyond import common, explain, figure2
from beyond.ppo import PPOConfig
from dpo import Preferences
from lib.checkpoint import to_checkpoint
from model import GPT, GPTConfig

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 24 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4 --beta 1 --ppo-iterations 2 --ppo-batch 8 --reward-lr 1e-3 --reward-epochs 1"
).split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figure2")
    more = [
        "--ppo-beta",
        "1",
        "--gt-beta",
        "1",
        "--methods",
        "DPO",
        "PPO",
        "PPO-GT",
        "Preferred-FT",
    ]
    assert figure2.main([*TINY, *more, "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------- the losses


def test_baseline_losses_are_their_formulas():
    """Preferred-FT: -log pi(y_w). Unlikelihood: -log pi(y_w) + alpha log pi(y_l)."""
    batch = two_words()
    logps = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(0))
    w, l = logps[0::2].sum(1), logps[1::2].sum(1)  # each pair is two neighbouring rows
    torch.testing.assert_close(figure2.preferred_ft(logps, batch)[0], -w)
    torch.testing.assert_close(figure2.unlikelihood(logps, batch, 0.3)[0], -w + 0.3 * l)


# ------------------------------------------------- curves


def made_up(gains: dict[str, list[tuple[float, float]]], grid=(1, 2)) -> dict:
    """A run with these (KL, gain) of each method."""
    points = [
        {"method": method, "beta": float(i), "kl": kl, "gain": gain, "p_positive": gain / 10}
        | {"length": 7.0, "win_rate": 0.5, "pair_accuracy": 0.7, "fraction_of_optimal": None}
        | {"samples": 10, "seconds": 1.0}
        for method, rows in gains.items()
        for i, (kl, gain) in enumerate(rows)
    ]
    rows = [{"kl": 1.0, "gain": 2.0, "p_positive": 0.2, "length": 7.0, "reliable": True}]
    rows.append(rows[0] | {"kl": 3.0, "reliable": False})
    best = [{"n": 1, "kl": 0.0, "gain": 0.0, "p_positive": 0.0, "length": 6.0}]
    reference = {"gain": 0.0, "p_positive": 0.0, "length": 6.0}
    about = {"reference": reference, "optimum": rows, "best_of_n": best, "grid": list(grid)}
    return about | {"points": points}


def test_a_curve_joins_neighbours_and_marks_wide_holes():
    """KL 1.5 lies between 1 and 1.6: measured. 3 lies between 1.6 and 4: a hole. 0.5: before 1."""
    run = made_up({"DPO": [(4.0, 4.0), (1.0, 1.0), (1.6, 2.2)]})
    assert figure2.value_at(run, "DPO", "gain", 1.3) == (pytest.approx(1.6), True)
    assert figure2.value_at(run, "DPO", "gain", 2.8) == (pytest.approx(3.1), False)
    assert figure2.value_at(run, "DPO", "gain", 0.5) == (pytest.approx(0.5), False)
    assert figure2.value_at(run, "DPO", "gain", 1.0) == (1.0, True)
    assert figure2.value_at(run, "DPO", "gain", 5.0) == (None, False)
    assert figure2.value_at(run, "optimum", "gain", 0.5) == (pytest.approx(1.0), True)
    assert figure2.value_at(run, "optimum", "gain", 2.0) == (None, False)


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_the_mean_of_curves_over_noisy_gains_is_the_curve_of_the_mean(seed, k):
    """Interpolation is linear in the gains, so noise does not bias it; a hull's mean is larger."""
    rng = np.random.default_rng(seed)
    kls = [1, 1.5, 2, 3]
    noise = rng.normal(size=(50, 4))
    noise -= noise.mean(0)
    runs = [made_up({"DPO": list(zip(kls, n, strict=True))}) for n in noise.tolist()]
    at = 1 + 2 * k / 10
    assert np.mean([figure2.value_at(run, "DPO", "gain", at)[0] for run in runs]) == pytest.approx(
        0, abs=1e-9
    )


def sweep(shift: float) -> dict:
    """DPO above PPO by 1 + shift at KL 1 and 2."""
    kls = (0.9, 1.3, 2.0)
    gains = {
        "DPO": [(kl, 2 * kl + 1 + shift) for kl in kls],
        "PPO": [(kl, 2 * kl) for kl in kls],
        "Preferred-FT": [(0.1, 0.1)],
    }
    return made_up(gains)


def claims(runs: list[dict]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in figure2.claim_rows(runs)}


def test_claims_compare_dpo_with_another_at_equal_kl():
    """Differences 0.9, 1, 1.1 in three seeds: seen, with mean 1 and Student's interval."""
    found = claims([sweep(-0.1), sweep(0.0), sweep(0.1)])
    row = found["DPO's frontier lies above PPO's"]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert row == [
        "1.00 ± 0.10",
        "1.00 ± 0.10",
        f"+1.000 [+{1 - half:.3f}, +{1 + half:.3f}]",
        f"+0.100 [+{0.1 - half / 10:.3f}, +{0.1 + half / 10:.3f}]",
        "seen",
    ]
    assert found["Preferred-FT reaches less reward than DPO"][-1] == "seen"
    assert "DPO's frontier lies above PPO-GT's" not in found  # there is no PPO-GT


def test_one_seed_has_no_verdict_and_neither_has_a_hole():
    assert claims([sweep(0.0)])["DPO's frontier lies above PPO's"][-1] == "one seed: no verdict"
    hole = made_up({"DPO": [(0.5, 1.0), (2.5, 2.0)], "PPO": [(0.9, 1.0), (1.3, 1.2), (2.0, 2.0)]})
    assert claims([hole] * 3)["DPO's frontier lies above PPO's"][-1] == "not measured"


def test_the_table_brackets_holes_and_leaves_out_what_no_run_reaches():
    run = made_up({"DPO": [(0.9, 1.0), (1.9, 2.0)], "PPO": [(0.9, 1.0), (1.2, 2.0)]})
    lines = figure2.table([run]).splitlines()
    assert lines[0] == "| gain, nats at a KL of | 1 | 2 |"
    assert lines[2] == "| optimum | 2.00 | - |"
    assert lines[4] == "| DPO | [1.10] | - |"
    assert lines[5] == "| PPO | 1.33 | - |"


def test_no_line_is_drawn_across_a_hole_and_the_papers_points_belong_to_imdb():
    run = made_up({"DPO": [(1.0, 1.0), (1.5, 2.0), (4.0, 3.0)]})
    run |= {"pairs": 6, "config": {"data": "toy", "labels": "bt", "seed": 0}}
    toy = figure2.draw(run)
    joined = [line for line in toy.axes[1].lines if line.get_color() == figure2.ORANGE]
    ends = [line.get_xdata() for line in joined if line.get_linestyle() == "-"]
    assert [list(x) for x in ends] == [[1.0, 1.5]]
    imdb = figure2.draw(run | {"config": run["config"] | {"data": "imdb"}})
    texts = [text.get_text() for text in imdb.axes[2].texts]
    assert sum("paper" in text for text in texts) == 2
    assert not any("paper" in t.get_text() for t in toy.axes[2].texts)


def test_the_sweep_of_dpo_has_at_least_nine_betas():
    assert len(figure2.BETAS) >= 9 and len(figure2.IMDB_BETAS) >= 9


# ------------------------------------------------- PPO


def checkpoint() -> dict:
    torch.manual_seed(0)
    tokens = data.toy_tokens()
    return to_checkpoint(GPT(GPTConfig(len(tokens) + 1, 12, 1, 2, 16)), tokens)


def two_words() -> Preferences:
    """Responses of one token, 300 or 301, and the end token, to 40 prompts."""
    end = checkpoint()["config"]["vocab_size"] - 1
    ids = torch.tensor([[260 + p, 300 + k, end] for p in range(40) for k in (0, 1)])
    mask = torch.tensor([[False, True, True]]).repeat(80, 1)
    pairs = torch.arange(80).view(40, 2)
    prompt = torch.arange(40).repeat_interleave(2)
    return Preferences(ids, mask, torch.zeros(80, 3), prompt, pairs, torch.ones(40))


def test_ppo_s_beta_is_in_nats_of_the_reward():
    """Rewards are scaled to variance 1, and beta with them: 10 r at 10 beta is r at beta."""

    def make(scale, reference, device):
        def reward(ids, mask):
            return scale * ((ids == 300) & mask).sum(1).float() - 5

        return reward, figure2.ValueModel(figure2.load_gpt(reference, device))

    curves = []
    for scale in (1.0, 10.0):
        config = PPOConfig(iterations=2, batch_size=8, beta=0.3 * scale)
        some = two_words()
        args = common.prompts_of(some), (some.ids, some.mask), config, 0, CPU
        curves.append(figure2.train_ppo(make, scale, checkpoint(), *args)["curves"])
    for one, ten in zip(*curves, strict=True):
        assert one == pytest.approx(ten, rel=0.05, abs=1e-3)
    std = two_words().ids.eq(300).any(1).float().std().item()
    assert curves[0][0]["beta"] == pytest.approx(0.3 / std, rel=1e-4)


# ------------------------------------------------- rewards that are linear in counts


def test_counts_are_those_of_the_response():
    ids = torch.tensor([[9, 1, 1, 2]])
    mask = torch.tensor([[False, True, True, True]])
    assert explain.counts(ids, mask, 10).tolist() == [[0, 2, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert explain.counts(ids, mask, 2).tolist() == [[1, 2]]


def test_a_bag_learns_a_reward_of_its_class_and_no_other():
    """Tokens 300 and 302 share a group of 2: a bag of tokens orders them, two groups cannot."""
    given = two_words()
    ids = torch.where(given.ids == 301, 302, given.ids)
    apart = Preferences(ids, *list(vars(given).values())[1:])
    able, unable = explain.fit_bag(apart, 400, 0), explain.fit_bag(apart, 2, 0)
    assert explain.bag_accuracy(able, apart) == 1.0
    assert explain.bag_accuracy(unable, apart) == 0.5


# ------------------------------------------------- tiny runs


def test_a_run_evaluates_each_policy_once_and_counts_what_it_cost(out):
    found = results(out)
    of = {p["method"]: p for p in found["points"]}
    assert list(of) == ["DPO", "Preferred-FT", "PPO", "PPO-GT"] and len(found["points"]) == 4
    assert of["DPO"]["samples"] == 4 * 24
    assert of["PPO"]["samples"] == 4 * 24 + 2 * 8 and of["PPO-GT"]["samples"] == 2 * 8
    assert all(p["kl"] > 0 and p["length"] > 0 and p["seconds"] > 0 for p in found["points"])
    assert 0 <= found["reward_model"]["pair_accuracy"] <= 1
    assert (out / "table.md").read_text() == figure2.table([found]) + "\n"
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_one_more_beta_computes_itself_alone(out):
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    more = ["--gt-beta", "1", "0.5", "--methods", "PPO-GT", "--out", str(out)]
    assert figure2.main([*TINY, *more]) == 0
    new = {path.name for path in out.glob("*.pt") if made.get(path.name) != path.stat().st_mtime_ns}
    assert new == {"figure2-ppo-gt-0.5.pt", "eval-figure2-ppo-gt-0.5.pt"}


def test_the_two_experiments_run_and_have_a_table(out, capsys):
    argv = [*TINY, "--sizes", "8", "--classes", "8", "--ppo-iterations", "1", "--out", str(out)]
    assert explain.main(argv) == 0
    found = results(out)
    methods = ["DPO", "PPO", "PPO, bag of tokens", "PPO, 8 groups"]
    assert [p["method"] for p in found["points"]] == methods
    assert all(p["reward_accuracy"] is not None for p in found["points"][1:])
    assert (out / "table.md").read_text() == explain.table([found]) + "\n"
    assert "python -m beyond.explain --summary" in capsys.readouterr().out


def test_the_experiments_table_compares_fractions_over_seeds():
    """DPO 0.9 and PPO 0.8, 0.7, 0.6 in three seeds: seen. A missing fraction: no verdict."""

    def run(fraction: float | None) -> dict:
        point = dict.fromkeys(("kl", "gain", "length", "pair_accuracy"), 1.0)
        point |= {"prompts": 200, "beta": 0.5, "reward_accuracy": 0.7}
        rows = [{"method": "DPO", "fraction_of_optimal": 0.95}]
        rows.append({"method": "PPO", "fraction_of_optimal": fraction})
        return {"points": [point | row for row in rows]}

    seen = explain.table([run(0.86), run(0.85), run(0.84)]).splitlines()[-1]
    assert seen.endswith("| +0.100 [+0.075, +0.125] | seen |")
    unknown = explain.table([run(None)]).splitlines()[-1]
    assert unknown.endswith("|  |  |")


# ------------------------------------------------- bad input


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--methods", "GRPO"], "GRPO"),
        (["--data", "own.jsonl"], "own.jsonl"),
        (["--labels", "best"], "--labels"),
        (["--ppo-iterations", "0"], "--ppo-iterations"),
        (["--ppo-beta", "0"], "--ppo-beta"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = figure2.main(argv)
    except SystemExit as stopped:  # from argparse
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_runs_of_different_sweeps_have_no_summary(tmp_path, capsys):
    for name, grid in (("a", [1, 2]), ("b", [1, 3])):
        (tmp_path / name).mkdir()
        run = made_up({"DPO": [(1.0, 1.0)]}, grid)
        (tmp_path / name / "results.json").write_text(json.dumps(run))
    assert figure2.main(["--summary", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "sweep" in capsys.readouterr().err


def test_the_summary_of_runs_is_their_table(out, capsys):
    folder = str(out)
    figure2.main([*TINY, "--ppo-beta", "1", "--methods", "DPO", "--out", folder])
    capsys.readouterr()
    assert figure2.main(["--summary", folder]) == 0
    assert capsys.readouterr().out.strip() == figure2.table([results(out)])
