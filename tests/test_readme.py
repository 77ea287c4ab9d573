"""The README's numbers are those of results/, and its commands are those that run."""
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def runs(world: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(f"results/{world}-[0-9]*/results.json"))]


def rows(world: str) -> list[str]:
    """The README's table: pi_ref, and each beta; mean and standard deviation over seeds."""
    found, lines = runs(world), []
    for name, points in [("π_ref", [run["reference"] | dict(kl=0.0) for run in found]),
                         *((f"{points[0]['beta']:g}", points) for points in zip(*(run["points"] for run in found)))]:
        cells = []
        for what in "reward optimal_reward kl optimal_kl win_rate reward_slope reward_r2 fraction_of_optimal".split():
            values = [p.get(what) for p in points]
            cells.append("-" if None in values else "0" if not any(values) else f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


WORLDS = {"toy": [], "imdb": ["--data", "imdb"], "imdb-argmax": ["--data", "imdb", "--labels", "argmax"]}


@pytest.mark.parametrize("world", WORLDS)
def test_results_are_of_three_seeds_at_the_settings_that_the_code_has(world):
    assert [run["config"]["seed"] for run in runs(world)] == [0, 1, 2]
    for run in runs(world):
        settings = dataclasses.asdict(train.parse([*WORLDS[world], "--seed", str(run["config"]["seed"])])[1])
        for name in settings.keys() - {"imdb", "vocab_size"}:           # a file's name; an upper bound
            assert run["config"][name] == (list(settings[name]) if name == "beta" else settings[name]), name


@pytest.mark.parametrize("world", WORLDS)
def test_tables_are_those_of_the_results(world):
    for row in rows(world):
        assert row in README, f"results/{world}-* say {row}"


@pytest.mark.parametrize("world", WORLDS)
def test_quoted_facts_of_pi_ref_are_those_of_the_results(world):
    nats = ", ".join(f"{run['reference']['nats_per_byte']:.3f}" for run in runs(world))
    seconds = ", ".join(f"{sum(run['seconds'].values()):.0f}" for run in runs(world))
    said = " ".join(README.split())
    assert f"{nats} nats per byte" in said and f"{seconds} s" in said
    assert world == "imdb-argmax" or f"{runs(world)[0]['peak_memory_bytes'] / 1e9:.1f} GB of memory" in said


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    assert not re.search(r"[A-Z]+_(TIME|LAST)", README)


def test_the_readmes_three_lines_are_those_of_the_loss():
    lines = re.search(r"```python\n(.*?)```", README, re.S)[1].strip().splitlines()
    source = (ROOT / "dpo.py").read_text(encoding="utf-8")
    assert len(lines) == 3 and all(line in source for line in lines)


def test_the_second_judge_agrees_with_the_reward():
    for run in runs("imdb"):
        for point in (*run["points"], run["reference"]):
            assert abs(point["judge_reward"] - point["reward"]) < 0.1


def test_as_many_wrong_edits_are_caught_as_the_readme_says():
    from test_teeth import EDITS
    assert f"{len(EDITS)} wrong edits" in README


def test_every_test_that_the_readme_names_exists():
    defined = {name for path in ROOT.glob("tests/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named and named <= defined, named - defined


def test_quoted_samples_are_those_of_the_results():
    """The README's samples  =>  lines of results/*/samples.txt"""
    quoted = re.findall(r"```text\n(.*?)```", README, re.S)
    assert len(quoted) == 2
    for text, world in zip(quoted, ("toy-0", "imdb-0")):
        assert text.strip("\n") in (ROOT / "results" / world / "samples.txt").read_text(encoding="utf-8")


def test_the_core_does_without_what_is_beyond():
    """dpo, model, data, train and kit  =>  no import of beyond/; dpo and model import nothing of the project"""
    sources = {path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *ROOT.glob("kit/*.py"))}
    assert not any(re.search(r"^\s*(from|import) beyond", source, re.M) for source in sources.values())
    for name in ("dpo.py", "model.py"):
        assert not re.search(r"^\s*(from|import) (kit|data|train|model|dpo)\b", sources[ROOT / name], re.M)


def test_the_first_sentence_and_the_excess_of_kl_are_those_of_the_results():
    """Nine points of the toy world  =>  the range of the fraction, and of KL over its prediction, that the README quotes"""
    points = [p for run in runs("toy") for p in run["points"]]
    fractions, excess = ([p[a] / (p[b] if b else 1) for p in points] for a, b in (("fraction_of_optimal", None), ("kl", "optimal_kl")))
    said = " ".join(README.split())
    assert f"{min(fractions):.0%} to {max(fractions):.0%} of the gain" in said
    assert f"{min(excess):.2f} to {max(excess):.2f} times in these nine runs" in said
