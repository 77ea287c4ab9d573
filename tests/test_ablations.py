"""beyond/ablations.py: the labels of its studies, the exact study, and a tiny run."""

import json
from pathlib import Path

import pytest
import torch

import data
from beyond import ablations, common
from dpo import Preferences
from lib.checkpoint import to_checkpoint
from model import GPT, GPTConfig

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 20 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4 --rounds 2"
).split()
STUDIES = ["displacement", "epochs", "verbosity", "coverage"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    assert ablations.main([*TINY, "--studies", *STUDIES, "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def completions() -> tuple[Preferences, data.Dataset, dict]:
    """20 prompts; "the plot is" + superb or awful + end, and one longer response of reward 0."""
    tokens = data.toy_tokens()
    tokenizer, end = data.load_tokenizer(tokens), len(tokens)
    x = tokenizer.encode_ordinary("the plot is")
    good, bad = (tokenizer.encode_ordinary(f" {word}") for word in ("superb", "awful"))
    long = tokenizer.encode_ordinary(" the plot the plot the plot the plot the plot")
    T = len(x) + len(long) + 1
    rows = [[*x, *y, end] for y in (good, bad, long)]
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    mask = (torch.arange(T) >= len(x)) & (torch.arange(T) < lengths)
    n = 20
    pairs = torch.tensor([[1, 0], [1, 2], [0, 2]])  # the first two are labelled wrongly
    pairs = torch.cat([pairs + 3 * p for p in range(n)])
    prompt = torch.arange(n).repeat_interleave(3)
    zeros = torch.zeros(3 * n, T)
    made = Preferences(ids.repeat(n, 1), mask.repeat(n, 1), zeros, prompt, pairs, torch.ones(3 * n))
    dataset = data.Dataset(data.toy_tokens(), [], [], [], reward=data.WordReward(data.WEIGHT))
    torch.manual_seed(0)
    return made, dataset, to_checkpoint(GPT(GPTConfig(end + 1, 24, 1, 2, 16)), tokens)


# ------------------------------------------------- labels


def test_flipped_labels_have_their_probability():
    pairs = torch.tensor([[0, 1]]).repeat(20_000, 1)
    given = Preferences(*[torch.zeros(1)] * 4, pairs, torch.ones(20_000))
    for p in (0.0, 0.8, 1.0):
        pairs = ablations.relabel(given, torch.full((20_000,), p), 0).pairs
        assert (pairs[:, 0] == 0).double().mean().item() == pytest.approx(p, abs=0.015)
    noisy = ablations.noisy(given, 0)
    assert (noisy.pairs[:, 0] == 1).double().mean().item() == pytest.approx(0.2, abs=0.015)


def test_certain_labels_prefer_the_higher_reward_on_a_tenth_of_the_prompts():
    given, dataset, reference = completions()
    found = ablations.certain(given, dataset, reference, 0)
    r = common.true_reward(dataset, reference)(found.ids, found.mask)
    w, l = r[found.pairs].T
    assert found.prompt.unique().tolist() == [0, 1] and len(found.pairs) == 6
    assert (w > l).all()


def test_verbose_labels_pay_for_length(monkeypatch):
    """At a high price per token the longer response wins nearly always; at none, rarely."""
    given, dataset, reference = completions()
    ends = given.mask.sum(1)
    shares = []
    for price in (0.0, 10.0):
        monkeypatch.setattr(ablations, "PER_TOKEN", price)
        found = ablations.verbose(given, dataset, reference, 0)
        w, l = ends[found.pairs].T
        differ = w != l
        shares.append((w > l)[differ].double().mean().item())
    assert shares[0] < 0.75 and shares[1] == 1.0


# ------------------------------------------------- the exact study


def test_pairs_that_do_not_connect_leave_mass_where_no_reward_is():
    """Pairs within two islands give the right odds on each island, and wrong mass between them.

    One more pair that connects them gives the optimum of Eq. 4.
    """
    found = ablations.coverage()
    names = ("two islands", "with a bridge", "optimum")
    islands, bridge, optimum = (torch.tensor(found[name]["p"]) for name in names)
    odds = optimum[0::2] / optimum[1::2]
    torch.testing.assert_close(islands[0::2] / islands[1::2], odds, rtol=1e-6, atol=0)
    assert islands[:2].sum() > 0.5 > 0.02 > optimum[:2].sum()
    assert found["two islands"]["gain"] < 0 < found["with a bridge"]["gain"]
    torch.testing.assert_close(bridge, optimum, rtol=0, atol=1e-4)


# ------------------------------------------------- a tiny run


def test_studies_write_a_table_and_a_figure(out, capsys):
    found = results(out)
    methods = {study: [] for study in STUDIES}
    for p in found["points"]:
        methods[p["study"]].append(p["method"])
    assert methods["displacement"] == ["dpo", "dpop"]
    assert methods["epochs"] == ["offline, 1", "offline, 2", "online, 1", "online, 2"]
    assert methods["verbosity"] == ["dpo", "r_dpo", "simpo", "ld_dpo"]
    walks = [p for p in found["points"] if p["study"] == "displacement"]
    assert all(len(p["A"]) == len(p["B"]) == 3 and p["A"][0] == 0 for p in walks)
    lengths = {name: optimum["length"] for name, optimum in found["optima"].items()}
    assert lengths["optimum of the labels"] > lengths["optimum of r*"]
    assert (out / "table.md").read_text() == ablations.table([found]) + "\n"
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_margin_grows_while_dpo_trains(out):
    """A - B after two epochs is larger than after one, and both are positive."""
    dpo = next(p for p in results(out)["points"] if p["study"] == "displacement")
    assert dpo["method"] == "dpo"
    h = [a - b for a, b in zip(dpo["A"], dpo["B"], strict=True)]
    assert 0 < h[1] < h[2]


def test_a_second_run_computes_nothing(out):
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert ablations.main([*TINY, "--studies", "displacement", "coverage", "--out", str(out)]) == 0
    assert made == {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
