"""The README's numbers come from results/, its commands exist, and its links lead somewhere."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import dpo
import train
from beyond import common, compare, explain, page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = {
    "KL": "kl",
    "optimal KL": "optimal_kl",
    "gain": "gain",
    "P(positive)": "p_positive",
    "win rate": "win_rate",
    "length": "length",
    "slope": "reward_slope",
    "R2": "reward_r2",
    "fraction": "fraction_of_optimal",
    "regret": "regret",
}


def results(dataset: str) -> list[dict]:
    """The results of all seeds of a dataset."""
    paths = sorted(ROOT.glob(f"results/{dataset}-[0-9]*/results.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def table(dataset: str) -> list[str]:
    """The README's table: mean and standard deviation over seeds."""
    lines = [f"| beta | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for points in zip(*(run["points"] for run in results(dataset)), strict=True):
        cells = []
        for name in COLUMNS.values():
            values = [point[name] for point in points]
            known = None not in values
            cells.append(f"{np.mean(values):.2f} ± {np.std(values):.2f}" if known else "-")
        lines.append(f"| {points[0]['beta']:g} | {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("dataset", ["toy", "imdb"])
def test_tables_are_computed_from_results(dataset):
    if not results(dataset):
        pytest.skip(f"no results/{dataset}-*")
    assert "\n".join(table(dataset)) in README


def test_the_fractions_of_dpo_and_ppo_are_those_of_their_results():
    """beyond/README.md, from results/explain.md"""
    text = " ".join((ROOT / "beyond/README.md").read_text(encoding="utf-8").split())
    lines = (ROOT / "results/explain.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:5] == "| PPO"
    ]
    assert len(rows) == 5
    assert all(row[2] in text for row in rows)  # the fractions
    for row in rows[1:4]:  # the differences at 1,000 prompts
        assert all(number in text for number in re.findall(r"[+-]\d\.\d+", row[-2]))
    runs, class_ = results("explain"), "PPO, bag of tokens"
    pairs = [[explain.fractions(run, m, 1000) for m in (class_, "PPO")] for run in runs]
    gained = [a - b for a, b in pairs]
    assert all(n in text for n in re.findall(r"[+-]\d\.\d+", common.interval_cell(gained)))


def test_the_differences_to_other_losses_are_those_of_their_results():
    """beyond/README.md, from results/compare.md"""
    text = " ".join((ROOT / "beyond/README.md").read_text(encoding="utf-8").split())
    lines = (ROOT / "results/compare.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    verdicts = {
        row[0]: row[2:]
        for row in rows
        if len(row) == 4 and row[3] in ("seen", "no difference seen")
    }
    assert len(verdicts) == len(compare.METHODS) - 1
    for name, (interval, verdict) in verdicts.items():
        assert (f"{name} {interval}" in text) == (verdict == "seen"), name
    z_0 = {row[0]: row[10].split()[0] for row in rows if len(row) == 11 and row[0][:3] == "kto"}
    assert z_0["kto"] == "0.00" and f"and {z_0['kto_samples']}" in text


def test_intervals_are_those_of_the_results():
    """beyond/README.md, from the tables in results/; some are written without their signs"""

    def intervals(text: str) -> set[str]:
        number = r"[+-]?\d\.\d{3}"
        found = re.findall(rf"{number} \[{number}, {number}\]", " ".join(text.split()))
        return {re.sub("[+-]", "", interval) for interval in found}

    tables = [path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.md")]
    known = set.union(*map(intervals, tables))
    claimed = intervals((ROOT / "beyond/README.md").read_text(encoding="utf-8"))
    assert len(claimed) > 15 and claimed <= known


def test_the_table_of_four_and_eight_completions_is_that_of_the_results():
    """results/toy-completions.md, from the same ten seeds"""
    text = (ROOT / "results/toy-completions.md").read_text(encoding="utf-8")
    for K, runs in ((4, results("four-toy")), (8, results("toy"))):
        assert len(runs) == 10 and {run["config"]["completions"] for run in runs} == {K}
        n = np.mean([run["pairs"] for run in runs])
        for points in zip(*(run["points"] for run in runs), strict=True):
            cells = []
            for name in ("reward_r2", "reward_slope", "fraction_of_optimal"):
                values = [point[name] for point in points]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
            assert f"| {K} | {n:,.0f} | {points[0]['beta']:g} | {' | '.join(cells)} |" in text


def test_the_judges_table_is_that_of_its_results():
    """docs/imdb.md, from results/imdb-0/judge.json"""
    text = (ROOT / "docs/imdb.md").read_text(encoding="utf-8")
    columns = ("win rate by r*", "win rate by judge", "P(positive) by r*", "P(positive) by judge")
    for row in json.loads((ROOT / "results/imdb-0/judge.json").read_text(encoding="utf-8")):
        cells = [f"{row[name]:.2f}" for name in columns]
        assert f"| {row['policy'].removeprefix('dpo, ')} | {' | '.join(cells)} |" in text


def test_fraction_of_the_optimum_is_the_range_over_seeds():
    runs = results("toy")
    points = [point for run in runs for point in run["points"]]
    fractions = [point["fraction_of_optimal"] for point in points]
    assert f"{min(fractions):.0%} to {max(fractions):.0%}" in " ".join(README.split())
    assert f"over {len(results('toy'))} seeds" in README


def test_the_processor_makes_the_stated_difference():
    """docs/speed.md, from the same five seeds on two kinds of processor"""
    kinds = [
        [point["fraction_of_optimal"] for run in results(f"{kind}-toy") for point in run["points"]]
        for kind in ("avx512", "avx2")
    ]
    text = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    for fractions in kinds:
        assert f"from {min(fractions):.3f} to {max(fractions):.3f}" in text
    assert f"at most {np.abs(np.subtract(*kinds)).max():.3f}" in text


def test_example_output_is_that_of_the_first_result():
    assert page.summary(results("toy")[0]) in README


def test_samples_are_those_of_the_first_result():
    samples = (ROOT / "results/toy-0/samples.txt").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "pi_ref " in b)
    first, _, sample = block.partition("\n\n")
    assert samples.startswith(first) and sample.strip() and sample.strip() in samples


def test_quoted_loss_is_the_code():
    code = (ROOT / "dpo.py").read_text(encoding="utf-8")
    quoted = re.search(r"```python\n(    r_hat_w = .*?)```", README, re.S)[1]
    for line in quoted.splitlines():
        assert line in code


def test_example_loss_is_a_loss():
    source = re.search(r"```python\n(import torch.*?def my_loss.*?)```", README, re.S)[1]
    exec(source, namespace := {})
    import torch

    logps = torch.tensor([[0.0, -1.0], [0.0, -2.0]])
    batch = dpo.Preferences(
        ids=torch.zeros(2, 2, dtype=torch.long),
        mask=torch.tensor([[False, True]] * 2),
        ref_logps=torch.zeros(2, 2),
        prompt=torch.zeros(2, dtype=torch.long),
        pairs=torch.tensor([[0, 1]]),
        weight=torch.ones(1),
    )
    losses, r_hat_w, r_hat_l = namespace["my_loss"](logps, batch, beta=0.5)
    assert losses.shape == r_hat_w.shape == r_hat_l.shape == (1,)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(1 - 0.5)))


def test_links_and_modules_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_flags_exist():
    fields = {"--" + name.replace("_", "-") for name in train.Config.__dataclass_fields__}
    fields |= {"--out", "--device", "--debug", "--help"}
    for line in README.splitlines():
        if "python train.py" in line or line.startswith("`--"):
            assert set(re.findall(r"--[a-z-]+", line)) <= fields, line


def test_readme_is_short():
    assert len(README.splitlines()) < 150


def test_the_difference_to_ppo_is_that_of_its_results():
    """README.md and beyond/README.md, from results/figure2.md"""
    tables = (ROOT / "results/figure2.md").read_text(encoding="utf-8")
    row = next(
        line for line in tables.splitlines() if line.startswith("| DPO's frontier lies above PPO's")
    )
    interval = row.split("|")[10].strip()
    assert interval in (ROOT / "beyond/README.md").read_text(encoding="utf-8")
    mean, low, high = re.findall(r"[+-](\d\.\d+)", interval)
    assert f"{mean} nats (95 % interval {low} to {high})" in " ".join(README.split())
