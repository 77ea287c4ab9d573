"""train.py: the whole experiment on tiny settings, and runs that are killed."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import dpo
import tiny
import train
from beyond import gpt2, page
from beyond.custom_model import read_checkpoint
from lib.checkpoint import load_gpt, to_checkpoint
from lib.io import BadInput
from model import GPT, GPTConfig
from tiny import CPU, ROOT, saved

KILLS = int(os.environ.get("KILLS", 2))  # KILLS=20 for the complete test
FLAGS = "--init init.pt --context 24 --sft-steps 3 --reviews 100 --prompts 16 --batch-size 8"
FLAGS = f"{FLAGS} --epochs 1 --eval-prompts 4 --ref-samples 32 --eval-samples 16 --beta 0.5 2"


@pytest.mark.parametrize("kind", ["toy", "imdb", "own"])
def test_results_json_is_complete(kind, request):
    """It has what the committed results have; the fields about r* only where r* is known."""
    run = request.getfixturevalue(kind)
    results, known = run.results, kind != "own"
    committed = json.loads((ROOT / "results/toy-0/results.json").read_text("utf-8"))
    assert set(results) == set(committed) and set(results["config"]) == set(vars(run.cfg))
    assert [point["beta"] for point in results["points"]] == list(run.cfg.beta)
    fields = set(committed["points"][0])
    assert all((set(point) == fields) == known for point in results["points"])
    for curve in results["curves"].values():
        seen = [row for row in curve if "kl" in row]
        assert len(seen) == min(10, len(curve)) and seen[-1] is curve[-1]
        assert all(("reward" in row) == known for row in seen)
        assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # pitfall 13
    names = ["pi_ref", *(f"beta {beta:g}" for beta in run.cfg.beta)]
    shown = {name: len(sample["texts"]) for name, sample in results["samples"].items()}
    assert shown == dict.fromkeys(names, len(results["prompts"])) and len(results["prompts"]) > 1
    assert bool(results["frontier"]) == known


def test_preferences_hold_the_sampled_ids_and_their_reference_log_probabilities(toy):
    """No text is decoded and encoded again. pitfalls 8, 9, 18, 28"""
    (ids, _, _), _ = toy.returned["completions"]
    preferences = toy.returned["preferences"]
    sampled = {tuple(row) for row in ids.tolist()}
    assert {tuple(row) for row in preferences.ids.tolist()} <= sampled
    pi_ref = load_gpt(toy.returned["reference"], CPU)
    expected = dpo.response_logps(pi_ref, preferences.ids, preferences.mask)
    tolerance = 0.2 if pi_ref.bf16 else 1e-4
    torch.testing.assert_close(preferences.ref_logps, expected, atol=tolerance, rtol=0)
    assert toy.results["pairs"] == len(preferences.pairs)


# ------------------------------------------------- the command line, and kills


def experiment(folder: str, flags: str, output: str):
    """train.main in a process of its own, whose exit code is main's."""
    os.chdir(folder)
    with open(output, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        raise SystemExit(train.main(flags.split()))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(out) runs the command in a new process. Processes are forked, so they start at once."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "init.pt").write_bytes(saved(tiny.checkpoint()))
    method = "forkserver" if os.name == "posix" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        slow = ["matplotlib.backends.backend_agg", "torch._dynamo"]  # to import
        context.set_forkserver_preload(["train", *slow])

    def start(out: str):
        args = str(folder), f"{FLAGS} --out {out}", f"{out}.log"
        process = context.Process(target=experiment, args=args)
        process.folder = folder / out
        process.start()
        return process

    return start


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text("utf-8")) | {"seconds": None}


@pytest.fixture(scope="module")
def undisturbed(start) -> tuple[Path, float]:
    start("first").join()  # also starts the server
    began = time.perf_counter()
    process = start("undisturbed")
    process.join()
    assert process.exitcode == 0, Path(f"{process.folder}.log").read_text()
    return process.folder, time.perf_counter() - began


def run_stages(printed: str) -> list[str]:
    """The stages that were not cached."""
    return re.findall(r"^\[(.*)\]$", printed, re.M)


def test_a_repeated_command_runs_nothing_again(undisturbed, tmp_path, monkeypatch, capsys):
    folder, _ = undisturbed
    monkeypatch.chdir(shutil.copytree(folder.parent, tmp_path / "copy"))
    folder = Path("undisturbed")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert train.main(f"{FLAGS} --out undisturbed".split()) == 0
    printed = capsys.readouterr().out
    assert not run_stages(printed) and "see undisturbed" in printed
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")} == before
    assert train.main(f"{FLAGS} --lr 0.02 --out undisturbed".split()) == 0
    assert run_stages(capsys.readouterr().out) == ["dpo-0.5", "eval-0.5", "dpo-2", "eval-2"]


def test_killed_at_any_moment_a_run_resumes_to_the_same_results(start, undisturbed):
    """Bit for bit, apart from the seconds. Two kills; 20 with KILLS=20."""
    whole, seconds = undisturbed
    killed = 0
    for kill in range(KILLS):
        process = start(f"kill{kill}")
        time.sleep(random.Random(kill).uniform(0.1, 0.9) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        again = start(f"kill{kill}")
        again.join()
        assert again.exitcode == 0, Path(f"{again.folder}.log").read_text()
        assert results(again.folder) == results(whole)
        for name in ("reference.pt", "dpo-2.pt"):
            found, expected = (read_checkpoint(each / name) for each in (again.folder, whole))
            for weight, w in expected["weights"].items():
                assert torch.equal(found["weights"][weight], w)
        assert not list(again.folder.glob("*.part")) or process.exitcode
    assert killed >= KILLS / 2


# ------------------------------------------------- other datasets and settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with init.pt, without a network. No figures are drawn, for speed."""

    def connect(*args):
        raise AssertionError("only a download makes a connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: path.touch())
    Path("init.pt").write_bytes(saved(tiny.checkpoint()))


def main(more: str) -> dict:
    assert train.main([*FLAGS.split(), *more.split(), "--out", "out"]) == 0
    return results(Path("out"))


@pytest.mark.parametrize(
    "flags, labels", [("--labels soft", "soft"), ("--pairs best-worst", "argmax")]
)
def test_other_labels_and_pairs_run(flags, labels, here):
    found = main(f"{flags} --beta 4")
    ceiling = found["points"][0]["pair_accuracy_ceiling"]
    assert found["config"]["labels"] == labels
    assert (ceiling == pytest.approx(1)) == (labels == "argmax")


def test_a_loss_in_a_file_is_trained_again_after_an_edit(here, capsys, monkeypatch):
    """Of its code, a constant that it reads, a function that it calls, or its arguments.

    Python would reuse a file's bytecode if an edit in the same second keeps its length.
    """
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    text = """import dpo
SCALE = {}
def scaled(losses): return SCALE * {} * losses
def mine(logps, batch, beta, scale=1.0):
    losses, *r_hat = dpo.dpo(logps, batch, beta)
    return scale * scaled(losses), *r_hat  # {}
"""
    losses, trained = [], []
    for edits, more in (
        ((1, 1, ""), ""),
        ((1, 1, "a comment"), ""),
        ((3, 1, ""), ""),
        ((3, 2, ""), ""),
        ((3, 2, ""), "--loss-args scale=2"),
    ):
        Path("users.py").write_text(text.format(*edits))
        os.utime("users.py", ns=(0, 10**9 + len(losses) * 10**6))  # all in one second
        found = main(f"--beta 2 --loss users.py:mine {more}")
        assert page.method(found["config"]) == "mine"
        losses.append(found["curves"]["2"][0]["loss"] / math.log(2))
        trained.append("mine-2" in run_stages(capsys.readouterr().out))
    assert losses == pytest.approx([1, 1, 3, 6, 12], rel=1e-3)
    assert trained == [True, False, True, True, True]


def test_nothing_is_trained_if_no_pairs_can_be_formed(here, capsys):
    """Identical completions give no pair: one line, not a traceback."""
    one = tiny.checkpoint()
    one["weights"]["wte.weight"] *= 0
    one["weights"]["wte.weight"][-1] = 1.0
    one["weights"]["ln_f.bias"] += 100.0  # always the end token
    Path("end.pt").write_bytes(saved(one))
    argv = FLAGS.split() + "--sft-steps 0 --init end.pt --out out".split()
    assert train.main(argv) == 2
    assert "pairs" in capsys.readouterr().err.splitlines()[-1]


def test_training_that_diverges_gives_one_line(here, capsys):
    assert train.main([*FLAGS.split(), "--lr", "1e9"]) == 2
    assert "lower --lr" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("out").glob("dpo*"))


# ------------------------------------------------- pieces


def test_fine_tuning_weights_texts_by_their_tokens():
    """A short and a long text disagree about one token => both count equally. A mean over
    texts of means over tokens would give the short one 22 times the weight. pitfall 21"""
    found = train.sft(tiny.checkpoint(), [[1, 2], [1, *[3] * 22]], 150, 2, 1e-2, 0, CPU)
    p = load_gpt(found, CPU)(torch.tensor([[1]]))[0, 0].float().softmax(-1)
    assert p[[2, 3]].tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_zero_steps_of_fine_tuning_change_nothing():
    found, start = train.sft(tiny.checkpoint(), [], 0, 4, 1e-2, 0, CPU), tiny.checkpoint()
    assert found["tokens"] == start["tokens"] and found["config"] == start["config"]
    assert all(torch.equal(w, start["weights"][name]) for name, w in found["weights"].items())


def test_fine_tuning_that_diverges_is_refused():
    with pytest.raises(BadInput, match="fine-tuning diverged"):
        train.sft(tiny.checkpoint(), [[1, 2, 3]] * 8, 5, 4, math.inf, 0, CPU)


@pytest.mark.parametrize("epochs, batch_size, steps", [(3, 5, 12), (None, 8, 100)])
def test_every_epoch_has_each_prompt_once_in_random_order(epochs, batch_size, steps, toy):
    """Without epochs: as many as give at least 100 steps. The seed determines the order."""
    first, again, other = (
        train.Training(0, "sgd", 0.1, epochs, batch_size, seed).batches(toy.returned["preferences"])
        for seed in (0, 0, 1)
    )
    assert len(first) == steps and max(map(len, first)) <= batch_size
    assert torch.equal(torch.cat(first), torch.cat(again))
    orders = torch.cat(first + other).view(-1, 16)
    assert torch.equal(orders.sort().values, torch.arange(16).expand_as(orders))
    assert len(orders.unique(dim=0)) == len(orders)


def test_a_batch_of_one_prompt_can_be_overfitted(toy, capsys):
    """pitfall 13"""
    reference, preferences = toy.returned["reference"], toy.returned["preferences"]
    one = preferences.select(torch.tensor([0]))
    one = dataclasses.replace(one, pairs=one.pairs[:1], weight=one.weight[:1])
    how = train.Training(0, "adamw", 0.01, 30, 8, 0)
    look = toy.calls["dpo-2"][1][4]
    policy = train.train_dpo(reference, one, partial(dpo.dpo, beta=1.0), how, look, CPU)
    curve = policy["curves"]
    assert curve[-1]["loss"] < 0.2 * curve[0]["loss"] and curve[-1]["accuracy"] == 1
    assert [i for i, row in enumerate(curve, 1) if "kl" in row] == [*range(3, 31, 3)]
    printed = capsys.readouterr()
    shown = [f"{p}% | KL " in printed.out + printed.err for p in range(10, 101, 10)]
    assert shown == [p in (10, 40, 70, 100) for p in range(10, 101, 10)]


def test_frozen_blocks_and_embeddings_stay_those_of_pi_ref(toy):
    reference, preferences = toy.returned["reference"], toy.returned["preferences"]
    config = reference["config"] | {"n_layer": 2, "bias_scale": 1.0}
    two = to_checkpoint(GPT(GPTConfig(**config)), reference["tokens"])
    how = train.Training(1, "sgd", 0.1, 1, 8, 0)
    policy = train.train_dpo(two, preferences, partial(dpo.dpo, beta=1.0), how, None, CPU)
    for name, weight in policy["weights"].items():
        frozen = name.startswith(("wte", "wpe", "h.0."))
        assert torch.equal(weight, two["weights"][name]) == frozen, name


def test_the_context_of_a_checkpoint_can_be_changed():
    cut, same, longer = (gpt2.resize_context(tiny.checkpoint(), n) for n in (10, 24, 30))
    ids = torch.randint(0, 256, (2, 10))
    logits = [load_gpt(c, CPU)(ids) for c in (cut, same, longer)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])
    assert load_gpt(longer, CPU).wpe.weight[24:].abs().sum() == 0


def test_pi_ref_of_the_project_is_readable(recwarn):
    assert read_checkpoint(train.PI_REF)["tokens"] and ROOT in Path(train.PI_REF).parents
    assert not [w for w in recwarn if "meta" in str(w.message)]
