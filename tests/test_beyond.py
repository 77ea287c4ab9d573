"""beyond/README.md's numbers are those of results/, and what it names is there."""
import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from beyond import bench, compare, figure2, mend, scale

HERE = Path(compare.__file__).parent
RESULTS = HERE.parent / "results"
README = (HERE / "README.md").read_text(encoding="utf-8")
RUNS = [compare.read_results(RESULTS / f"compare-{seed}") for seed in (0, 1, 2)]
STUDIES = json.loads((RESULTS / "mend" / "mend.json").read_text())["studies"]


def leaves(value) -> list[float]:
    """All numbers of a study, and h = A - B where it has both."""
    if isinstance(value, dict):
        value = list(value.values()) + [a - b for a, b in zip(value.get("A", []), value.get("B", []))]
    return [number for each in value for number in leaves(each)] if isinstance(value, list) else [value]


def test_the_table_is_the_summary_of_the_results():
    """compare --summary over the three seeds  =>  the README's table, whole"""
    assert compare.table(RUNS) in README
    assert [run["config"]["seed"] for run in RUNS] == [0, 1, 2]


def test_every_method_is_in_the_results_at_its_hyperparameters_and_rate():
    """METHODS  =>  the points of each run: results are of the code that is here"""
    due = [(name, hyper, rate * compare.Settings().rate) for name, m in compare.METHODS.items()
           for hyper, rate in zip(m.strengths(), m.rates)]
    for run in RUNS:
        assert [(p["method"], p["hyper"], p["rate"]) for p in run["points"]] == due and run["times"] == 1.0


def test_two_sentences_under_each_figure_quote_its_results():
    """A number with two decimals under a figure  =>  a number of that study's results; and two sentences, no more"""
    for name in mend.STUDIES:
        said, = re.findall(rf"!\[[^\]]*\]\(\.\./results/mend/mend-{name}\.png\)\n\n(.+?)\n\n", README + "\n\n", re.S)
        results = {f"{abs(number):.2f}" for number in leaves(STUDIES[name]) if isinstance(number, float)}
        quoted = re.findall(r"\d+\.\d\d(?!\d)", said)
        assert quoted and set(quoted) <= results, (name, sorted(set(quoted) - results))
        assert len(re.findall(r"[.](?= [A-Z]|$)", " ".join(said.split()))) == 2, name


def test_quoted_seconds_are_those_of_the_runs():
    """The seconds of the stages  =>  the README's, seed by seed"""
    assert ", ".join(f"{sum(run['seconds'].values()):.0f}" for run in RUNS) + " s" in README


def test_the_tables_of_what_a_step_costs_are_printed_by_the_formulas():
    """python -m beyond.scale  =>  the README's tables, whole"""
    for table in scale.tables().split("\n\n"):
        assert table in README


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / name).exists(), name


@pytest.mark.parametrize("folders", [[f"figure2-{seed}" for seed in range(3)], [f"figure2-argmax-{seed}" for seed in range(3)],
                                     ["figure2-imdb-0"]])
def test_the_paper_s_claims_are_the_summary_of_the_results(folders):
    """figure2 --summary  =>  the README's tables of frontiers and claims, whole; and the results are of the sweep that is here"""
    runs = [figure2.read_results(RESULTS / folder) for folder in folders]
    assert all(table in README for table in figure2.summary(runs).split("\n\n"))
    assert [run["config"]["seed"] for run in runs] == [*range(len(runs))]
    for run in runs:
        sweep = figure2.IMDB if run["config"]["data"] == "imdb" else figure2.TOY
        assert run["runs"] == sweep.runs() and run["tuning"] == dataclasses.asdict(sweep.tuning)
        assert run["config"]["labels"] == ("argmax" if "argmax" in folders[0] else "bt")


def test_what_is_said_of_the_paper_s_labels_holds_in_each_seed():
    """Figure 2 under argmax: DPO above PPO from a KL of 2 on, within 0.05 of PPO-GT from 1 to 3, beta 5 at a KL above 1, accuracy
    0.99 of both, PPO's two largest targets missed"""
    came, beta5, seconds = [], [], []
    for seed in range(3):
        run = figure2.read_results(RESULTS / f"figure2-argmax-{seed}")
        claims = figure2.summary([run]).split("\n\n")[1]
        rows = re.findall(r"\| DPO lies above (PPO|PPO-GT) \|(.+)", claims)
        ahead = {name: [float(value) for value in row.split("|")[:7]] for name, row in rows}
        assert run["grid"] == [0.5, 1, 2, 3, 6, 9, 12] and min(ahead["PPO"][2:]) > 0 and abs(ahead["PPO"][1]) < 0.04
        assert max(map(abs, ahead["PPO-GT"][1:4])) <= 0.05
        ends = {p["run"]: p for p in run["points"] if p["last"]}
        came += [ends[f"PPO, kl {target}"]["kl"] for target in (9, 12)]
        beta5.append(ends["DPO, beta 5"]["kl"])
        seconds.append(sum(run["seconds"].values()))
        assert round(run["reward_model"]["pair_accuracy"], 2) == round(ends["DPO, beta 1"]["pair_accuracy"], 2) == 0.99
    said = " ".join(README.split())
    assert f"beta 5 goes to a KL of {min(beta5):.2f} to {max(beta5):.2f}" in said
    assert f"came to a KL of {min(came):.1f} to {max(came):.1f}" in said
    assert "{:.0f}, {:.0f} and {:.0f} s".format(*seconds) in said


def test_ppo_with_the_true_reward_is_within_a_tenth_of_the_optimum_in_the_results():
    """PPO-GT at target KL 0.5, 1 and 2, toy  =>  at least 0.9 of the optimal gain at its KL, each seed: a PPO that works"""
    for seed in range(3):
        ends = {p["run"]: p for p in figure2.read_results(RESULTS / f"figure2-{seed}")["points"] if p["last"]}
        assert all(ends[f"PPO-GT, kl {kl}"]["fraction_of_optimal"] >= 0.9 for kl in ("0.5", "1", "2"))


def test_the_table_of_speed_is_that_of_the_results():
    """bench's rows of results/bench  =>  the README's table, whole; the ratios and shares that both READMEs quote; one loss"""
    results = json.loads((RESULTS / "bench" / "results.json").read_text())
    assert bench.table(results).split("\n\n")[0] in README and results["loss"]["same"]
    found = {(m["what"], m["who"], m["dtype"]): m for m in results["measured"]}
    shared, unshared = (f"DPO step, 96 pairs of {rows} completions" for rows in (64, 192))

    def times(what: str, who: str, ratio: str = "ratio") -> list[str]:
        return [f"{found[what, who, dtype][ratio]['median']:.1f}" for dtype in bench.DTYPES]

    def across(what: str, who: str) -> float:
        """Bfloat16 here beside float32 there"""
        pairs = zip(found[what, "TRL", "float32"]["seconds"], found[what, who, "bfloat16"]["seconds"])
        return statistics.median(there / here for there, here in pairs)
    core, fast = times(shared, "TRL"), times(shared, "TRL", "ratio_fast")
    samples = times("sampling", "transformers")
    share = {who: [f"{found[shared, who, dtype]['utilisation']:.0%}" for dtype in bench.DTYPES]
             for who in (bench.HERE, bench.FAST)}
    said = " ".join(README.split())
    for words in (
        "{} times as fast as TRL's in float32 and {} times in bfloat16".format(*core),
        "where pairs share nothing it is {} and {} times".format(*times(unshared, "TRL")),
        "it is {} and {}, {} and {} times".format(*fast, *times(unshared, "TRL", "ratio_fast")),
        f"is {across(shared, bench.HERE):.0f} times as fast, {across(shared, bench.FAST):.0f} within fast.py",
        f"of pairs that share nothing {across(unshared, bench.HERE):.0f} and {across(unshared, bench.FAST):.0f} (medians",
        "Sampling is {} times as fast as `generate` in float32, {} times in bfloat16".format(*samples),
        "{} in float32 and {} in bfloat16, {} and {} within fast.py".format(*share[bench.HERE], *share[bench.FAST]),
    ):
        assert words in said
    first = " ".join((HERE.parent / "README.md").read_text(encoding="utf-8").split())
    assert ("{} times as fast in float32 and {} times in bfloat16 ({} and {} times within `beyond/fast.py`) where four completions "
            "serve six pairs, {} and {} times where pairs share nothing, and sampling {} and {} times".format(
                *core, *fast, *times(unshared, "TRL"), *samples)) in first
