"""beyond/figure2.py and beyond/explain.py: losses, curves, verdicts, and tiny runs."""

import dataclasses
import json
import math

import pytest
import torch

from beyond import common, explain, figure2
from beyond.custom_data import to_preferences
from beyond.ppo import PPOConfig
from dpo import Preferences
from lib.io import BadInput
from tiny import CPU, checkpoint

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 24 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4 --beta 1 --ppo-iterations 2 --ppo-batch 8 --reward-lr 1e-3"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the results of a tiny run."""
    folder = tmp_path_factory.mktemp("figure2")
    more = "--ppo-beta 1 --gt-beta 1 --methods DPO PPO PPO-GT Preferred-FT".split()
    assert figure2.main([*TINY, *more, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "results.json").read_text())


# ------------------------------------------------- the losses


def two_words() -> Preferences:
    """Responses of one token, 300 or 301, and the end token, to 40 prompts."""
    end = checkpoint()["config"]["vocab_size"] - 1
    return to_preferences([((260 + p,), (300, end), (301, end)) for p in range(40)])


def test_baseline_losses_equal_their_formulas():
    """Preferred-FT: -log pi(y_w). Unlikelihood: -log pi(y_w) + alpha log pi(y_l)."""
    batch = two_words()
    logps = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(0))
    w, l = logps[0::2].sum(1), logps[1::2].sum(1)  # each pair is two neighbouring rows
    torch.testing.assert_close(figure2.preferred_ft(logps, batch)[0], -w)
    torch.testing.assert_close(figure2.unlikelihood(logps, batch, 0.3)[0], -w + 0.3 * l)


# ------------------------------------------------- curves


def made_up(gains: dict[str, list[tuple[float, float]]]) -> dict:
    """A run with these (KL, gain) of each method."""
    points = [
        dict.fromkeys(figure2.COLUMNS, 1.0)
        | {"method": method, "beta": float(i), "kl": kl, "gain": gain, "p_positive": gain / 10}
        for method, rows in gains.items()
        for i, (kl, gain) in enumerate(rows)
    ]
    row = {"kl": 1.0, "gain": 2.0, "p_positive": 0.2, "length": 7.0, "reliable": True}
    about = {"reference": dict.fromkeys(row, 0.0), "best_of_n": [row], "grid": [1, 2]}
    return about | {"optimum": [row, row | {"kl": 3.0, "reliable": False}], "points": points}


def test_a_curve_joins_neighbours_and_marks_wide_gaps():
    """KL 1.3 lies between 1 and 1.6: measured. 2.8 lies between 1.6 and 4: a gap. 0.5 comes
    before the first run: not measured.

    The curve is not a hull, which noise would bias: it falls from 1.6 to 4.
    """
    run = made_up({"DPO": [(4.0, 1.0), (1.0, 1.0), (1.6, 2.2)]})
    assert figure2.value_at(run, "DPO", "gain", 1.3) == (pytest.approx(1.6), True)
    assert figure2.value_at(run, "DPO", "gain", 2.8) == (pytest.approx(1.6), False)
    assert figure2.value_at(run, "DPO", "gain", 0.5) == (pytest.approx(0.5), False)
    assert figure2.value_at(run, "DPO", "gain", 1.0) == (1.0, True)
    assert figure2.value_at(run, "DPO", "gain", 5.0) == (None, False)
    assert figure2.value_at(run, "optimum", "gain", 0.5) == (pytest.approx(1.0), True)
    assert figure2.value_at(run, "optimum", "gain", 2.0) == (None, False)


def test_claims_compare_dpo_with_another_at_equal_kl():
    """Differences 0.9, 1, 1.1 in three seeds: seen, with mean 1 and Student's interval."""

    def sweep(shift: float) -> dict:
        dpo, ppo = ([(kl, 2 * kl + c) for kl in (0.9, 1.3, 2.0)] for c in (1 + shift, 0))
        return made_up({"DPO": dpo, "PPO": ppo, "Preferred-FT": [(0.1, 0.1)]})

    rows = figure2.claim_rows([sweep(-0.1), sweep(0.0), sweep(0.1)])
    found = {claim: cells for claim, *cells in rows}
    half = 4.303 * 0.1 / math.sqrt(3)
    gain = f"+1.000 [+{1 - half:.3f}, +{1 + half:.3f}]"
    p_positive = f"+0.100 [+{0.1 - half / 10:.3f}, +{0.1 + half / 10:.3f}]"
    cells = ["1.00 ± 0.10", "1.00 ± 0.10", gain, p_positive, "seen"]
    assert found["DPO's frontier lies above PPO's"] == cells
    assert found["Preferred-FT gains less reward than DPO"][-1] == "seen"
    assert "DPO's frontier lies above PPO-GT's" not in found  # there is no PPO-GT


def test_the_table_brackets_gaps_and_leaves_out_what_no_run_reaches():
    run = made_up({"DPO": [(0.9, 1.0), (1.9, 2.0)], "PPO": [(0.9, 1.0), (1.2, 2.0)]})
    head, _, optimum, _, dpo, ppo, *lines = figure2.table([run]).splitlines()
    assert head == "| gain, nats at a KL of | 1 | 2 |" and optimum == "| optimum | 2.00 | - |"
    assert dpo == "| DPO | [1.10] | - |" and ppo == "| PPO | 1.33 | - |"
    assert "| DPO's frontier lies above PPO's | - | - | - | - | not measured |" in lines
    with pytest.raises(BadInput, match="sweep"):
        figure2.table([run, run | {"grid": [1, 3]}])


def test_no_line_is_drawn_across_a_gap_and_the_papers_points_belong_to_imdb():
    run = made_up({"DPO": [(1.0, 1.0), (1.5, 2.0), (4.0, 3.0)]})
    run |= {"pairs": 6, "seconds": {"completions": 0.7}}
    for data, papers in (("toy", 0), ("imdb", 2)):
        config = {"data": data, "labels": "bt", "seed": 0}
        gain, _, p_positive, cost = figure2.draw([run | {"config": config}]).axes
        assert cost.lines[0].get_xdata() == pytest.approx([1.0, 1.3, 1.6])  # .7 s are shared
        lines = [line for line in gain.lines if line.get_color() == figure2.ORANGE]
        joined = [list(line.get_xdata()) for line in lines if line.get_linestyle() == "-"]
        assert joined == [[1.0, 1.5]]
        assert sum("paper" in text.get_text() for text in p_positive.texts) == papers


# ------------------------------------------------- PPO and its rewards


def test_ppo_s_beta_is_in_units_of_the_reward_before_scaling():
    """Rewards are scaled to variance 1, and beta with them: 10 r at 10 beta is r at beta."""

    def make(scale, reference, device):
        critic = figure2.ValueModel(figure2.load_gpt(reference, device))
        return lambda ids, mask: scale * ((ids == 300) & mask).sum(1).float() - 5, critic

    curves, some, start = [], two_words(), checkpoint()
    start["config"]["bias_scale"] = 80.0
    start["weights"]["bias"] = torch.zeros(start["config"]["vocab_size"])
    for scale in (1.0, 10.0):
        config = PPOConfig(iterations=2, batch_size=8, beta=0.3 * scale)
        args = common.prompts_of(some), (some.ids, some.mask), config, 0, CPU
        policy = figure2.train_ppo(make, scale, start, *args)
        curves.append(policy["curves"])
        assert not policy["weights"]["bias"].any()  # the logit bias is not trained
    for one, ten in zip(*curves, strict=True):
        assert one == pytest.approx(ten, rel=0.05, abs=1e-3)
    std = some.ids.eq(300).any(1).float().std().item()
    assert curves[0][0]["beta"] == pytest.approx(0.3 / std, rel=1e-4)


def test_a_bag_learns_a_reward_of_its_class_and_no_other():
    """A bag of tokens orders tokens 300 and 302. Two groups do not: both are in the same one."""
    given = two_words()
    apart = dataclasses.replace(given, ids=torch.where(given.ids == 301, 302, given.ids))
    able, unable = explain.fit_bag(apart, 400, 0), explain.fit_bag(apart, 2, 0)
    assert explain.bag_accuracy(able, apart) == 1.0
    assert explain.bag_accuracy(unable, apart) == 0.5
    ids, mask = torch.tensor([[9, 1, 1, 2]]), torch.tensor([[False, True, True, True]])
    assert explain.counts(ids, mask, 2).tolist() == [[1, 2]]  # the prompt does not count


# ------------------------------------------------- tiny runs


def test_a_run_evaluates_each_policy_once_and_counts_what_it_cost(run):
    _, found = run
    of = {p["method"]: p for p in found["points"]}
    assert list(of) == ["DPO", "Preferred-FT", "PPO", "PPO-GT"] and len(found["points"]) == 4
    assert of["DPO"]["samples"] == 4 * 24
    assert of["PPO"]["samples"] == 4 * 24 + 2 * 8 and of["PPO-GT"]["samples"] == 2 * 8
    assert all(p["kl"] > 0 and p["length"] > 0 and p["seconds"] > 0 for p in found["points"])
    assert 0 <= found["reward_model"]["pair_accuracy"] <= 1


def test_one_more_beta_runs_only_its_own_stages(run):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    more = ["--gt-beta", "1", "0.5", "--methods", "PPO-GT", "--out", str(folder)]
    assert figure2.main([*TINY, *more]) == 0
    changed = {p.name for p in folder.glob("*.pt") if before.get(p) != p.stat().st_mtime_ns}
    assert changed == {"figure2-ppo-gt-0.5.pt", "eval-figure2-ppo-gt-0.5.pt"}


def test_the_two_experiments_run_and_have_a_table(run, capsys):
    folder, _ = run
    argv = [*TINY, "--sizes", "8", "--classes", "8", "--ppo-iterations", "1", "--out", str(folder)]
    assert (
        explain.main([*argv, "--classes", "9"]) == explain.main([*argv, "--sizes", "8", "999"]) == 2
    )
    assert explain.main(argv) == 0
    found = json.loads((folder / "results.json").read_text())
    methods = ["DPO", "PPO", "PPO, bag of tokens", "PPO, 8 groups"]
    assert [p["method"] for p in found["points"]] == methods
    assert all(p["reward_accuracy"] is not None for p in found["points"][1:])
    assert "python -m beyond.explain --summary" in capsys.readouterr().out


def test_the_experiments_table_compares_fractions_over_seeds():
    """DPO 0.95 and PPO 0.86, 0.85, 0.84 in three seeds: seen. A missing fraction: no verdict."""

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


def test_ppo_gets_the_setting_frozen():
    assert figure2.ppo_config(figure2.Config(frozen=3), 0.5).frozen == 3
