"""beyond/sample.py: completions of all models of a run, with their reward and log-ratio."""

import io
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpo
import model
from beyond import sample
from beyond.custom_model import read_checkpoint
from beyond.sample import Completion
from data import decode_rows, load_tokenizer
from lib.checkpoint import load_gpt, to_checkpoint
from model import GPT, GPTConfig
from tiny import CPU


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line -> its exit code, and what it printed, on a very wide terminal."""
    monkeypatch.setenv("COLUMNS", "3000")

    def call(*argv):
        capsys.readouterr()
        try:
            code = sample.main([str(arg) for arg in argv])
        except SystemExit as stopped:  # from argparse
            code = stopped.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["toy", "own"])
def test_every_model_has_completions_with_their_reward_and_log_ratio(name, run, request):
    """What is printed is what the checkpoints sample, and r*, unknown for the user's own pairs."""
    recorded, prompt = request.getfixturevalue(name), "the film works"
    dataset = recorded.returned["dataset"]
    tokenizer, completions = load_tokenizer(dataset.tokens), {}
    x, end = tokenizer.encode_ordinary(prompt), tokenizer.eot_token
    files = {f"dpo, beta {beta:g}": f"dpo-{beta:g}.pt" for beta in recorded.cfg.beta}
    pi_ref = load_gpt(recorded.returned["reference"], CPU)
    for column, file in ({"pi_ref": "reference.pt"} | files).items():
        pi = load_gpt(read_checkpoint(recorded.folder / file), CPU)
        ids, mask, _ = model.sample(pi, [x] * 3, end, 0.7, torch.Generator().manual_seed(5))
        ratio = dpo.response_logps(pi, ids, mask) - dpo.response_logps(pi_ref, ids, mask)
        texts = decode_rows(ids, tokenizer)
        r = dataset.reward(texts).tolist() if name == "toy" else [None] * 3
        ys = [text.removeprefix(prompt) for text in texts]
        completions[column] = [*map(Completion, ys, r, ratio.sum(-1).tolist())]
    flags = ["--n", "3", "--seed", "5", "--temperature", "0.7"]
    code, printed, _ = run(recorded.folder, prompt, *flags)
    assert (code, printed) == (0, sample.side_by_side(completions, 3000) + "\n")


def test_policies_left_over_from_an_earlier_pi_ref_are_skipped(toy, run, tmp_path):
    """A newer reference.pt => no policies; then a newer results.json => those that it names. A
    file with any other name is not a policy."""
    folder = shutil.copytree(toy.folder, tmp_path / "run")
    shutil.copy2(folder / "dpo-2.pt", folder / "ipo-2.pt")
    shutil.copy(folder / "dpo-2.pt", folder / "dpo-2024-05-01.pt")
    columns = ["pi_ref", "dpo, beta 0.5", "dpo, beta 2", "ipo, beta 2"]
    for touched, shown, skipped in (
        (None, columns, None),
        ("reference.pt", columns[:1], "dpo-0.5.pt, dpo-2.pt, ipo-2.pt"),
        ("results.json", columns[:3], "ipo-2.pt"),
    ):
        if touched:
            (folder / touched).touch()
        code, printed, error = run(folder, "the plot", "--n", "1")
        assert code == 0
        assert [name.strip() for name in printed.splitlines()[0].split("|")] == shown
        expected = f"skipped, because reference.pt is newer: {skipped}\n" if skipped else ""
        assert error == expected


def test_columns_have_names_numbers_and_wrapped_text():
    pi_ref = [Completion(" is\x07 superb and truly moving.", -0.3, 0.0)]
    policy = [Completion(" is dull.", None, 1.25)]
    assert sample.side_by_side({"pi_ref": pi_ref, "dpo, beta 1": policy}, 60).splitlines() == [
        "pi_ref                      | dpo, beta 1",
        "",
        "r* -0.30, log-ratio +0.00   | log-ratio +1.25",
        " is\\x07 superb and truly    |  is dull.",
        "moving.                     |",
    ]


def test_one_policy_has_no_log_ratio_and_r_star_only_in_the_folder_of_its_run(toy, run, tmp_path):
    shutil.copy(toy.folder / "dpo-2.pt", tmp_path)
    for path, name, rewards in (
        (toy.folder / "dpo-2.pt", "dpo-2", 2),
        (tmp_path / "dpo-2.pt", "dpo-2", 0),
        (tmp_path, "dpo, beta 2", 0),
    ):
        code, printed, _ = run(path, "the plot", "--n", "2")
        assert code == 0 and printed.splitlines()[0] == name
        assert printed.count("r* ") == rewards and "log-ratio" not in printed


def test_without_a_prompt_it_asks_for_prompts(toy, run, monkeypatch):
    """Three lines, of which the second is empty => two tables, and a message between them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the plot\n\nthis film\n"))
    code, printed, _ = run(toy.folder, "--n", "1")
    assert code == 0 and printed.count("prompt> ") == 4
    assert printed.count("pi_ref") == 2 and printed.count("the prompt is empty") == 1


def test_show_prints_a_pair_with_the_response_tokens_in_brackets(toy, own, run):
    """Text outside brackets is the prompt; inside is the response, with its end token; the rewards
    shown are r*."""
    preferences = toy.returned["preferences"]
    tokenizer = load_tokenizer(toy.calls["dataset"][1][-1])
    code, printed, _ = run(toy.folder, "--show", "--seed", 3)
    assert code == 0
    names = "chosen", "rejected"
    for name, line, row in zip(names, printed.splitlines(), preferences.pairs[3], strict=False):
        ids, mask = preferences.ids[row], preferences.mask[row]
        first, last = mask.nonzero()[[0, -1], 0].tolist()
        shown = [repr(tokenizer.decode([i]))[1:-1] for i in ids[: last + 1].tolist()]
        marked = [f"{token}|" for token in shown[:first]] + [f"[{t}]" for t in shown[first:]]
        r = toy.returned["dataset"].reward(decode_rows(ids[None], tokenizer)).item()
        assert line == f"{name:>8}  r* {r:+.2f}  {''.join(marked)}"
    code, printed, _ = run(own.folder, "--show")
    assert code == 0 and "r*" not in printed and "[<|endoftext|>]" in printed


@pytest.mark.parametrize(
    "argv, says",
    [
        (["toy", ""], "the prompt is empty; enter some text"),
        (["toy", " plot" * 60], "the prompt has 60 tokens; the context has room for 23"),
        (["empty", "the plot"], "there are no models here; python train.py writes them"),
        (["file", "the plot"], "file: cannot be read as a checkpoint"),
        (["other", "the plot"], "dpo, beta 7 has a different tokenizer"),
        (["other/reference.pt", "--show"], "preferences.pt: cannot be read"),
        (["toy", "the plot", "--n", "0"], "--n"),
        (["toy", "the plot", "--temperature", "0"], "--temperature"),
        (["toy", "the plot", "--seed", "x"], "--seed"),
        (["toy", "the plot", "--device", "no"], "--device"),
    ],
)
def test_unusable_input_gives_one_line(argv, says, toy, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy.folder, "toy")
    for name in ("empty", "other"):
        Path(name).mkdir()
    Path("file").write_bytes(b"no model")
    shutil.copy("toy/reference.pt", "other")
    pi = GPT(GPTConfig(257, 24, 1, 2, 16))
    torch.save(to_checkpoint(pi, [bytes([b]) for b in range(256)]), "other/dpo-7.pt")
    code, printed, error = run(*argv)
    assert code == 2 and printed == "" and error.count("\n") == 1
    assert error.startswith("beyond.sample: ") and says in error


def test_held_out_pairs_with_the_largest_and_smallest_margins_are_shown(own, run):
    """--pairs --n 2 => the two largest margins under the policy, then the two smallest."""
    code, printed, _ = run(own.folder, "--pairs", "--n", "2")
    assert code == 0
    beta, pairs = own.cfg.beta[0], own.returned["eval_set"].pairs
    policy = load_gpt(read_checkpoint(own.folder / f"dpo-{beta:g}.pt"), CPU)
    logps = dpo.response_logps(policy, pairs.ids, pairs.mask)
    _, r_hat_w, r_hat_l = dpo.dpo(logps, pairs, beta)
    margin = (r_hat_w - r_hat_l).sort(descending=True).values.tolist()
    shown = [float(r) for r in re.findall(r"r_hat +([+-][\d.]+)", printed)][:8]
    margins = [w - l for w, l in zip(shown[::2], shown[1::2], strict=True)]
    assert margins == pytest.approx([*margin[:2], *margin[-1:-3:-1]], abs=0.1)
    assert f"({len(margin)} held-out pairs, " in printed


def test_pairs_with_soft_labels_are_shown_in_the_likelier_order(toy, run, tmp_path):
    """Both orders, with weights .8 and .2 => the same output as from the first order alone."""
    printed = []
    pairs = toy.returned["eval_set"].pairs
    both = torch.cat((pairs.pairs, pairs.pairs.flip(1)))
    weight = torch.tensor([0.8, 0.2]).repeat_interleave(len(pairs.pairs))
    soft = replace(pairs, pairs=both, weight=weight)
    folder = shutil.copytree(toy.folder, tmp_path / "run")
    for eval_pairs in (pairs, soft):
        eval_set = replace(toy.returned["eval_set"], pairs=eval_pairs)
        torch.save({"key": "", "value": eval_set}, folder / "eval_set.pt")
        printed.append(run(folder, "--pairs")[1])
    assert printed[0] == printed[1] != ""
