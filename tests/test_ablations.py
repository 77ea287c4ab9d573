"""beyond/ablations.py: the labels of its studies, the exact study, and a tiny run."""

import copy
import json

import pytest
import torch

import data
from beyond import ablations, common
from beyond.custom_data import to_preferences
from dpo import Preferences
from lib.io import BadInput
from tiny import checkpoint

TINY = (
    "--reviews 200 --sft-steps 8 --prompts 20 --eval-prompts 4 --batch-size 8 --ref-samples 32 "
    "--eval-samples 4 --rounds 2"
).split()
TOY = data.Dataset(data.toy_tokens(), [], [], [], reward=data.WordReward(data.WEIGHT))


def methods_of(results: dict, study: str) -> dict[str, dict]:
    return {p["method"]: p for p in results["points"] if p["study"] == study}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the results of a tiny run."""
    folder = tmp_path_factory.mktemp("ablations")
    assert ablations.main([*TINY, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "results.json").read_text())


def completions() -> Preferences:
    """20 prompts, each completed with superb, awful, and a longer response of reward 0.

    Of the three pairs of each prompt, the first two are labelled wrongly.
    """
    tokenizer = data.load_tokenizer(TOY.tokens)
    texts = (" superb", " awful", " the plot the plot the plot the plot")
    good, bad, long = ((*tokenizer.encode_ordinary(y), tokenizer.eot_token) for y in texts)
    prompts = [tuple(tokenizer.encode_ordinary(f"plot {i} is")) for i in range(20)]
    pairs = (bad, good), (bad, long), (good, long)
    return to_preferences([(x, y_w, y_l) for x in prompts for y_w, y_l in pairs])


# ------------------------------------------------- labels


def test_a_fifth_of_the_labels_are_flipped():
    pairs = torch.tensor([[0, 1]]).repeat(20_000, 1)
    given = Preferences(*[torch.zeros(1)] * 4, pairs, torch.ones(20_000))
    flipped = ablations.noisy(given, 0).pairs[:, 0] == 1
    assert flipped.double().mean().item() == pytest.approx(0.2, abs=0.015)
    first_won = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < 0.5  # label_pairs
    assert flipped[first_won].double().mean().item() == pytest.approx(0.2, abs=0.02)


def test_deterministic_labels_prefer_the_higher_reward_and_cover_a_tenth_of_the_prompts():
    found = ablations.certain(completions(), TOY, checkpoint(), 0)
    w, l = common.true_reward(TOY, checkpoint())(found.ids, found.mask)[found.pairs].T
    assert found.prompt.unique().tolist() == [0, 1] and len(found.pairs) == 6
    assert (w > l).all()


def test_verbose_labels_favour_length(monkeypatch):
    """With a large bonus per token the longer response always wins; with none, often not."""
    given, shares = completions(), []
    for bonus in (0.0, 10.0):
        monkeypatch.setattr(ablations, "PER_TOKEN", bonus)
        w, l = given.mask.sum(1)[ablations.verbose(given, TOY, checkpoint(), 0).pairs].T
        shares.append((w > l)[w != l].double().mean().item())
    assert shares[0] < 0.75 and shares[1] == 1.0


# ------------------------------------------------- the exact study


def test_pairs_that_do_not_connect_leave_mass_on_responses_of_low_reward():
    """Pairs of two separate sets give the right odds within each set, but the wrong mass to each.

    One more pair that connects them gives the optimum of Eq. 4.
    """
    found = ablations.coverage()
    names = ("pairs (1,2), (3,4)", "pairs (1,2), (2,3), (3,4)", "optimum")
    separate, connected, optimum = (torch.tensor(found[name]["p"]) for name in names)
    odds = optimum[0::2] / optimum[1::2]
    torch.testing.assert_close(separate[0::2] / separate[1::2], odds, rtol=1e-6, atol=0)
    assert separate[:2].sum() > 0.5 > 0.02 > optimum[:2].sum()
    assert found["pairs (1,2), (3,4)"]["gain"] < 0 < found["pairs (1,2), (2,3), (3,4)"]["gain"]
    torch.testing.assert_close(connected, optimum, rtol=0, atol=1e-4)


# ------------------------------------------------- a tiny run


def test_a_run_has_the_methods_of_each_study(run):
    """DPO raises the margin A - B from 0, where it starts."""
    _, found = run
    assert {study: list(methods_of(found, study)) for study in ablations.RUN} == {
        "noise": ["dpo, clean labels", "dpo", "cdpo", "robust", "ipo"],
        "certainty": ["dpo", "ipo"],
        "verbosity": ["dpo", "r_dpo", "simpo", "ld_dpo"],
        "displacement": ["dpo", "dpop"],
        "epochs": ["offline, 1", "offline, 2", "online, 1", "online, 2"],
    }
    walk = methods_of(found, "displacement")["dpo"]
    start, *later = (a - b for a, b in zip(walk["A"], walk["B"], strict=True))
    assert start == 0 < min(later) and len(later) == 2
    lengths = {name: optimum["length"] for name, optimum in found["optima"].items()}
    assert lengths["optimum of the labels"] > lengths["optimum of r*"]


def test_a_second_run_computes_nothing(run):
    folder, _ = run
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert ablations.main([*TINY, "--out", str(folder)]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def test_claims_and_titles_are_about_the_end_of_training(run):
    """Three seeds, in which DPO's log pi(y_w) ends 0, 1 and 2 nats below DPOP's. Titles state means
    over seeds."""
    _, one = run
    runs = [copy.deepcopy(one) for _ in range(3)]
    for i, seed in enumerate(runs):
        of = methods_of(seed, "displacement")
        of["dpo"]["A"][-1] = of["dpop"]["A"][-1] - i
    rows = {claim: cells for _, claim, *cells in ablations.claim_rows(runs)}
    assert rows["A: dpop minus dpo"] == ["+1.000 [-1.484, +3.484]", "no difference seen"]
    of = methods_of(one, "verbosity")
    difference = of["dpo"]["length"] - of["r_dpo"]["length"]
    assert rows["length: dpo minus r_dpo"][0].startswith(f"{difference:+.3f}")
    mean = methods_of(one, "displacement")["dpop"]["A"][-1] - 1
    titles = [ax.get_title() for ax in ablations.draw(runs).axes]
    assert any(f"changes by {mean:+.2f} nats with DPO" in title for title in titles)
    runs[0]["points"].pop()
    with pytest.raises(BadInput, match="studies"):
        ablations.table(runs)
