"""beyond/ablations.py: the labels of its studies, the exact study, and a tiny run."""

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


def test_a_fifth_of_the_labels_is_flipped():
    pairs = torch.tensor([[0, 1]]).repeat(20_000, 1)
    given = Preferences(*[torch.zeros(1)] * 4, pairs, torch.ones(20_000))
    flipped = ablations.noisy(given, 0).pairs[:, 0] == 1
    assert flipped.double().mean().item() == pytest.approx(0.2, abs=0.015)


def test_certain_labels_prefer_the_higher_reward_on_a_tenth_of_the_prompts():
    found = ablations.certain(completions(), TOY, checkpoint(), 0)
    w, l = common.true_reward(TOY, checkpoint())(found.ids, found.mask)[found.pairs].T
    assert found.prompt.unique().tolist() == [0, 1] and len(found.pairs) == 6
    assert (w > l).all()


def test_verbose_labels_pay_for_length(monkeypatch):
    """At a high price per token the longer response wins nearly always; at none, rarely."""
    given, shares = completions(), []
    for price in (0.0, 10.0):
        monkeypatch.setattr(ablations, "PER_TOKEN", price)
        w, l = given.mask.sum(1)[ablations.verbose(given, TOY, checkpoint(), 0).pairs].T
        shares.append((w > l)[w != l].double().mean().item())
    assert shares[0] < 0.75 and shares[1] == 1.0


# ------------------------------------------------- the exact study


def test_pairs_that_do_not_connect_leave_mass_where_no_reward_is():
    """Pairs of two separate sets give the right odds in each set, and the wrong mass to the sets.

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


def test_studies_write_a_table_and_a_figure(run):
    """DPO raises the margin A - B from 0, where it starts."""
    folder, found = run
    methods = {study: [] for study in ablations.STUDIES}
    for p in found["points"]:
        methods[p["study"]].append(p["method"])
    assert methods["noise"] == ["dpo, clean labels", "dpo", "cdpo", "robust", "ipo"]
    assert methods["certainty"] == ["dpo", "ipo"]
    assert methods["displacement"] == ["dpo", "dpop"]
    assert methods["epochs"] == ["offline, 1", "offline, 2", "online, 1", "online, 2"]
    assert methods["verbosity"] == ["dpo", "r_dpo", "simpo", "ld_dpo"]
    walks = [p for p in found["points"] if p["study"] == "displacement"]
    assert all(len(p["A"]) == len(p["B"]) == 3 and p["A"][0] == 0 for p in walks)
    start, *later = (a - b for a, b in zip(walks[0]["A"], walks[0]["B"], strict=True))
    assert start == 0 < min(later)
    lengths = {name: optimum["length"] for name, optimum in found["optima"].items()}
    assert lengths["optimum of the labels"] > lengths["optimum of r*"]
    assert (folder / "table.md").read_text() == ablations.table([found]) + "\n"
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_computes_nothing(run):
    folder, _ = run
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert ablations.main([*TINY, "--out", str(folder)]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def test_titles_state_what_was_found_as_the_mean_over_seeds(run):
    """A second seed, in which DPO's log pi(y_w) falls by 2 nats more."""
    _, one = run
    two = json.loads(json.dumps(one))
    found = [p for p in two["points"] if (p["study"], p["method"]) == ("displacement", "dpo")]
    found[0]["A"][-1] -= 2
    mean = found[0]["A"][-1] + 1
    axes = {ax.get_title(): ax for ax in ablations.draw([one, two]).axes}
    title = next(title for title in axes if title.startswith(r"log $\pi$"))
    assert f"changes by {mean:+.2f} nats with DPO" in title
    ends = [line.get_ydata()[-1] for line in axes[title].lines if line.get_alpha()]
    assert {mean - 1, mean + 1} <= set(ends)  # of both seeds


def test_claims_are_differences_at_the_end_of_training(run):
    """Three seeds, in which DPO's log pi(y_w) ends 0, 1 and 2 nats lower."""
    _, one = run
    runs = [json.loads(json.dumps(one)) for _ in range(3)]
    for i, seed in enumerate(runs):
        of = {p["method"]: p for p in seed["points"] if p["study"] == "displacement"}
        of["dpo"]["A"][-1] = of["dpop"]["A"][-1] - i
    rows = {(study, claim): cells for study, claim, *cells in ablations.claim_rows(runs)}
    claim = rows["displacement", "A: dpop minus dpo"]
    assert claim == ["+1.000 [-1.484, +3.484]", "no difference seen"]
    of = {p["method"]: p["length"] for p in one["points"] if p["study"] == "verbosity"}
    length, _ = rows["verbosity", "length: dpo minus r_dpo"]
    assert length.startswith(f"{of['dpo'] - of['r_dpo']:+.3f}")
    runs[0]["points"].pop()
    with pytest.raises(BadInput, match="studies"):
        ablations.table(runs)
