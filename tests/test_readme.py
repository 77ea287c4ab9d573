"""The README's numbers come from results/, its commands exist, and its links lead somewhere."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from beyond import common, compare, explain, page
from beyond.custom_data import to_preferences

ROOT = Path(__file__).parents[1]
COLUMNS = """kl optimal_kl gain p_positive win_rate length reward_slope reward_r2
    fraction_of_optimal regret""".split()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def words(path: str) -> str:
    """A text on one line."""
    return " ".join(read(path).split())


def rows(path: str) -> list[list[str]]:
    """The cells of all tables in a text."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in read(path).splitlines()
        if line.startswith("|")
    ]


README = read("README.md")


def results(dataset: str) -> list[dict]:
    """The results of all seeds of a dataset."""
    paths = sorted(ROOT.glob(f"results/{dataset}-[0-9]*/results.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def fractions_of(dataset: str) -> list[float]:
    return [point["fraction_of_optimal"] for run in results(dataset) for point in run["points"]]


@pytest.mark.parametrize("dataset", ["toy", "imdb"])
def test_tables_are_computed_from_results(dataset):
    """Mean and standard deviation over seeds, in the README's columns"""
    lines = []
    for points in zip(*(run["points"] for run in results(dataset)), strict=True):
        cells = [common.cell([point[name] for point in points]) for name in COLUMNS]
        lines.append(f"| {points[0]['beta']:g} | {' | '.join(cells)} |\n")
    titles = " | ".join(page.TABLE.get(name, name) for name in COLUMNS)
    head = f"| beta | {titles} |\n{'|---' * (len(COLUMNS) + 1)}|\n"
    assert len(lines) > 2 and head + "".join(lines) in README


def test_the_fractions_of_dpo_and_ppo_are_those_of_their_results():
    """beyond/README.md, from results/explain.md"""
    text = words("beyond/README.md")
    found = [row for row in rows("results/explain.md") if row[0].startswith("PPO")]
    assert len(found) == 5 and all(row[2] in text for row in found)  # the fractions
    gained = []
    for run in results("explain"):
        a, b = (explain.fractions(run, m, 1000) for m in ("PPO, bag of tokens", "PPO"))
        gained.append(a - b)
    differences = [row[-2] for row in found[1:4]]  # at 1,000 prompts
    for cell in (*differences, common.interval_cell(gained)):
        assert all(number in text for number in re.findall(r"[+-]\d\.\d+", cell))


def test_the_differences_from_other_losses_are_those_of_their_results():
    """beyond/README.md, from results/compare.md"""
    text, found = words("beyond/README.md"), rows("results/compare.md")
    verdicts = [r for r in found if len(r) == 4 and r[3] in ("seen", "no difference seen")]
    assert {row[0] for row in verdicts} == compare.METHODS.keys() - {"dpo"}
    unknown = [row[0].strip("\\*") for row in found if len(row) == 11 and row[7] == "-"]
    single = [name for name in unknown if name in compare.METHODS]
    assert f"except for {' and '.join(single)}, which have one" in text
    for name, _, interval, verdict in verdicts:
        assert (f"{name} {interval}" in text) == (verdict == "seen"), name
    z_0 = {row[0]: row[10].split()[0] for row in found if len(row) == 11 and row[0][:3] == "kto"}
    assert z_0["kto"] == "0.00" and f"and {z_0['kto_samples']}" in text


def test_intervals_are_those_of_the_results():
    """beyond/README.md, from the tables in results/; some are written without their signs"""

    def intervals(text: str) -> set[str]:
        number = r"[+-]?\d\.\d{3}"
        found = re.findall(rf"{number} \[{number}, {number}\]", " ".join(text.split()))
        return {re.sub("[+-]", "", interval) for interval in found}

    known = set.union(*(intervals(read(path)) for path in ROOT.glob("results/*.md")))
    claimed = intervals(read("beyond/README.md"))
    assert len(claimed) > 15 and claimed <= known


def test_the_table_of_four_and_eight_completions_is_that_of_the_results():
    """results/toy-completions.md, from the same ten seeds"""
    text = read("results/toy-completions.md")
    for K, runs in ((4, results("four-toy")), (8, results("toy"))):
        assert len(runs) == 10 and {run["config"]["completions"] for run in runs} == {K}
        n = np.mean([run["pairs"] for run in runs])
        for points in zip(*(run["points"] for run in runs), strict=True):
            names = ("reward_r2", "reward_slope", "fraction_of_optimal")
            cells = [common.cell([point[name] for point in points], 3) for name in names]
            assert f"| {K} | {n:,.0f} | {points[0]['beta']:g} | {' | '.join(cells)} |" in text


def test_the_judges_table_is_that_of_its_results():
    """docs/imdb.md, from results/imdb-0/judge.json"""
    columns = ("win rate by r*", "win rate by judge", "P(positive) by r*", "P(positive) by judge")
    found, reward = map(
        json.loads, map(read, ("results/imdb-0/judge.json", "lib/imdb_reward.json"))
    )
    stated = f"{found['accuracy']:.3f} against {reward['accuracy']:.3f}".replace("0.", ".")
    assert f"about as accurate as r*: {stated}" in words("docs/imdb.md")
    for row in found["rows"]:
        cells = [row["policy"].removeprefix("dpo, "), *(f"{row[name]:.2f}" for name in columns)]
        assert cells in rows("docs/imdb.md")


def span(values: list[float]) -> str:
    return f"{min(values):.0%} to {max(values):.0%}"


def test_fractions_of_the_optimum_are_those_of_the_results():
    """Toy dataset: the mean and the range of all runs. IMDb: the range of the means over seeds"""
    fractions = fractions_of("toy")
    assert f"({len(results('toy'))} seeds; single runs {span(fractions)}," in README
    assert f"DPO attains {np.mean(fractions):.0%} of the largest gain" in README
    points = zip(*(run["points"] for run in results("imdb")), strict=True)
    cells = [[p["fraction_of_optimal"] for p in each] for each in points]
    known = [each for each in cells if None not in each]
    assert f"it attains {span([np.mean(each) for each in known])} at KLs of 0.1 to 1" in README
    assert f"single runs {span(np.ravel(known))}), partly" in README


def test_the_processor_makes_the_stated_difference():
    """docs/speed.md, from the same five seeds on two kinds of processor"""
    kinds = fractions_of("toy")[:15], fractions_of("avx2-toy")
    text = words("docs/speed.md")
    for fractions in kinds:
        assert f"from {min(fractions):.3f} to {max(fractions):.3f}" in text
    assert f"at most {np.abs(np.subtract(*kinds)).max():.3f}" in text


def test_the_figure_shows_six_betas():
    (path,) = re.findall(r"!\[.*six values of beta.*\]\((.*)figure.png\)", README)
    assert len(json.loads(read(path + "results.json"))["points"]) == 6


def test_example_output_is_that_of_the_first_result():
    assert page.summary(results("toy")[0]) in README


def test_samples_are_those_of_the_first_result():
    block = next(b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "pi_ref " in b)
    assert block in read("results/toy-0/samples.txt")


def test_quoted_loss_is_the_code():
    quoted = re.search(r"```python\n(    r_hat_w = .*?)```", README, re.S)[1]
    assert all(line in read("dpo.py") for line in quoted.splitlines())


def test_example_loss_is_a_loss():
    source = re.search(r"```python\n(import torch.*?def my_loss.*?)```", README, re.S)[1]
    exec(source, namespace := {})
    logps = torch.tensor([[0.0, -1.0], [0.0, -2.0]])
    batch = to_preferences([((0,), (1,), (2,))])
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


def frontier_claim(table: str) -> list[str]:
    """The row that compares DPO's frontier with PPO's."""
    (row,) = [r for r in rows(f"results/{table}.md") if r[0] == "DPO's frontier lies above PPO's"]
    return row


@pytest.mark.parametrize(
    ("table", "interval"),
    [("figure2", "by {} nats (95% CI {} to {})"), ("figure2-imdb-argmax", "by {} nats ({} to {})")],
)
def test_the_difference_from_ppo_is_that_of_its_results(table, interval):
    """README.md, on the toy dataset and on IMDb with argmax labels"""
    row = frontier_claim(table)
    assert interval.format(*re.findall(r"[+-](\d\.\d+)", row[9])) in words("README.md")
    (leads,) = re.findall(
        r"of a positive review, these leads are (.*?) and (.*?\d)\.", words("README.md")
    )
    assert row[10].startswith("+" + leads[table != "figure2"])


@pytest.mark.parametrize("table", ["figure2-long", "figure2-imdb-long"])
def test_no_difference_is_seen_from_ppo_with_four_times_as_many_samples(table):
    assert frontier_claim(table)[11] == "no difference seen"
    assert "four times as many, no difference is seen" in words("README.md")
    few, many = (
        {p["samples"] for run in results(name) for p in run["points"] if p["method"] == "PPO"}
        for name in (table.replace("-long", "-argmax" if "imdb" in table else ""), table)
    )
    made = results(table)[0]["points"][0]["samples"]  # for the pairs
    assert max(many) - made == 4 * (max(few) - made)


def test_total_time_is_that_of_the_results():
    """docs/CONTRIBUTING.md: all stages of results/make.sh, which has no run restricted to AVX2"""
    runs = [path for path in ROOT.glob("results/*-[0-9]/results.json") if "avx2" not in str(path)]
    stages = [json.loads(path.read_text(encoding="utf-8"))["seconds"].values() for path in runs]
    hours = sum(map(sum, stages)) / 3600
    assert f"add up to {hours:.1f} hours of one core" in words("docs/CONTRIBUTING.md")


def test_claims_on_imdb_are_those_of_the_results():
    """beyond/README.md: the claims' table, and PPO's reward model next to DPO's implicit reward"""
    said = [row for row in rows("beyond/README.md") if len(row) == 6]
    for labels, kind in (("bt", "Bradley-Terry"), ("argmax", "deterministic")):
        claims = [
            r
            for r in rows(f"results/figure2-imdb-{labels}.md")
            if r[-1] == "seen" or "no diff" in r[-1]
        ]
        assert len(claims) == 7
        for row in claims:
            assert [row[0], kind, row[9], row[10] or "-", row[11]] in [
                [*r[:2], *r[3:]] for r in said
            ]
        runs = results(f"figure2-imdb-{labels}")
        model = np.mean([run["reward_model"]["pair_accuracy"] for run in runs])
        found = [p["pair_accuracy"] for run in runs for p in run["points"] if p["method"] == "DPO"]
        assert f"{model:.2f} against {np.mean(found):.2f}" in words("beyond/README.md")


def test_times_are_those_of_the_record():
    """docs/speed.md and README.md, from results/speed/times.txt"""
    lines = read("results/speed/times.txt").splitlines()
    record = [re.split("  +", line) for line in lines if line.startswith("py")]
    table = [[row[0].replace("`", ""), *row[1:]] for row in rows("docs/speed.md")[2:]]
    assert len(record) == 4 and record == table
    for _, fast, _, slow in record[:2]:
        assert f"[{fast} to {slow}](results/speed/times.txt)" in words("README.md")
