"""beyond/sample.py: completions of all models of a run, with their reward and log-ratio."""

import io
import re
import shutil
import sys

import pytest
import tiny
import torch

import dpo
import model
from beyond import sample
from data import WEIGHT, WordReward, decode_rows, load_tokenizer
from lib.checkpoint import load_gpt, read_checkpoint
from model import GPT, GPTConfig


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line -> its exit code, and what it printed, on a very wide terminal."""
    monkeypatch.setenv("COLUMNS", "3000")

    def call(*argv):
        capsys.readouterr()
        code = sample.main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return call


def completions(printed: str) -> dict[str, list[tuple]]:
    """The numbers and texts of each column: name -> list of (reward, log-ratio, text)."""
    names, *rows = [row for row in printed.split("\n") if row]
    ends = [match.start() for match in re.finditer(r" \| ", names)]
    starts = [0, *(end + 3 for end in ends)]
    found = {}
    for start, end in zip(starts, [*ends, None], strict=True):
        name, *cells = [row[start:end].strip() for row in (names, *rows)]
        about = [re.fullmatch(r"(?:r\* (\S+), )?log-ratio (\S+)", c).groups() for c in cells[::2]]
        values = [[value and float(value) for value in pair] for pair in about]
        found[name] = [(*pair, text) for pair, text in zip(values, cells[1::2], strict=True)]
    return found


@torch.no_grad()
def expected(
    checkpoint: dict, reference: dict, reward, prompt: str, n: int, seed: int, temperature
):
    """The same from model.sample and dpo.response_logps: (reward, log-ratio, text)."""
    pi, pi_ref = (load_gpt(each, torch.device("cpu")) for each in (checkpoint, reference))
    tokenizer = load_tokenizer(checkpoint["tokens"])
    x, generator = tokenizer.encode_ordinary(prompt), torch.Generator().manual_seed(seed)
    ids, mask, logps = model.sample(pi, [x] * n, tokenizer.eot_token, temperature, generator)
    ratio = (logps - dpo.response_logps(pi_ref, ids, mask)).sum(-1)
    texts = decode_rows(ids, tokenizer)
    rewards = reward(texts) if reward else [None] * n
    return list(zip(rewards, ratio.tolist(), (t.removeprefix(prompt) for t in texts), strict=True))


@pytest.mark.parametrize("name", ["toy", "imdb", "own"])
def test_every_model_has_completions_with_their_reward_and_log_ratio(name, run, request):
    """What is printed is what the checkpoints sample, and r*, which is unknown for own pairs."""
    recorded, prompt = request.getfixturevalue(name), "the film is"
    flags = ["--n", "3", "--seed", "5", "--temperature", "0.7"]
    code, printed, _ = run(recorded.folder, prompt, *flags)
    assert code == 0
    found = completions(printed)
    betas = {f"dpo, beta {beta:g}": f"dpo-{beta:g}.pt" for beta in recorded.cfg.beta}
    files = {"pi_ref": "reference.pt"} | betas
    assert list(found) == list(files)
    reference = read_checkpoint(recorded.folder / "reference.pt")
    for column, file in files.items():
        checkpoint = read_checkpoint(recorded.folder / file)
        reward = recorded.returned["dataset"].reward
        rows = expected(checkpoint, reference, reward, prompt, 3, 5, 0.7)
        for (r, ratio, text), (true_r, true_ratio, y) in zip(found[column], rows, strict=True):
            assert (r is None) == (name == "own")
            assert r is None or r == pytest.approx(float(true_r), abs=0.006)
            assert ratio == pytest.approx(true_ratio, abs=0.02)
            assert "".join(text.split()) == "".join(sample.printable(y).split())


def test_without_pi_ref_there_is_no_log_ratio(toy, run, tmp_path):
    shutil.copy(toy.folder / "dpo-2.pt", tmp_path)
    code, printed, _ = run(tmp_path, "the plot", "--n", "1")
    assert code == 0 and "dpo, beta 2" in printed
    assert "pi_ref" not in printed and "log-ratio" not in printed


def test_one_checkpoint_is_sampled_by_itself(toy, run, tmp_path):
    """In its run's folder with r*, elsewhere without; never with a log-ratio."""
    shutil.copy(toy.folder / "dpo-2.pt", tmp_path / "copy.pt")
    code, printed, _ = run(toy.folder / "dpo-2.pt", "the plot", "--n", "2")
    assert code == 0 and printed.splitlines()[0] == "dpo-2"
    assert printed.count("r* ") == 2 and "log-ratio" not in printed
    code, printed, _ = run(tmp_path / "copy.pt", "the plot", "--n", "2")
    assert code == 0 and printed.splitlines()[0] == "copy" and "r* " not in printed


def test_without_a_prompt_it_asks_for_prompts(toy, run, monkeypatch):
    """Three lines, of which the second is empty => two tables, and a message between them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the plot\n\nthis film\n"))
    code, printed, _ = run(toy.folder, "--n", "1")
    assert code == 0 and printed.count("prompt> ") == 4
    assert (
        printed.count("pi_ref") == 2 and printed.count("the prompt is empty; give some words") == 1
    )


def test_columns_fit_the_terminal(toy, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, printed, _ = run(toy.folder, "the plot", "--n", "8")
    assert max(map(len, printed.splitlines())) <= 100


def test_show_prints_a_pair_with_the_masked_tokens_in_brackets(toy, own, run):
    """Text outside brackets is the prompt; inside is the response, with its end token; rewards are
    r*'s."""
    preferences = toy.returned["preferences"]
    tokenizer = load_tokenizer(toy.calls["dataset"][1][-1])
    for number in (0, 3):
        code, printed, _ = run(toy.folder, "--show", "--seed", number)
        assert code == 0
        lines = printed.splitlines()[:2]
        for name, line, row in zip(
            ("chosen", "rejected"), lines, preferences.pairs[number], strict=True
        ):
            found = re.fullmatch(rf" *{name}  r\* (\S+)  (.*)", line)
            ids, mask = preferences.ids[row], preferences.mask[row]
            first, last = mask.nonzero()[0].item(), mask.nonzero()[-1].item()
            shown = [repr(tokenizer.decode([i]))[1:-1] for i in ids[: last + 1].tolist()]
            marked = [f"{token}|" for token in shown[:first]] + [f"[{t}]" for t in shown[first:]]
            assert found[2] == "".join(marked)
            text = tokenizer.decode(ids[: last + 1].tolist()).replace("<|endoftext|>", "")
            assert float(found[1]) == pytest.approx(WordReward(WEIGHT)([text]).item(), abs=0.006)
    code, printed, _ = run(own.folder, "--show")
    assert code == 0 and "r*" not in printed and "[<|endoftext|>]" in printed


def other_tokens(folder):
    checkpoint = tiny.checkpoint()
    config = GPTConfig(257, 24, 1, 2, 16)
    checkpoint |= {"tokens": [bytes([b]) for b in range(256)], "weights": GPT(config).state_dict()}
    torch.save(checkpoint | {"config": vars(config)}, folder / "dpo-7.pt")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["{toy}", ""], "the prompt is empty; give some words"),
        (["{toy}", " \n"], "the prompt is empty; give some words"),
        (["{toy}", " plot" * 60], "the prompt has 60 tokens; the context has room for 23"),
        (["{empty}", "the plot"], "there are no models here; python train.py writes them"),
        (["{empty}/none", "the plot"], "there are no models here; python train.py writes them"),
        (["{empty}/file", "the plot"], "file: cannot be read as a checkpoint"),
        (["{other}", "the plot"], "dpo, beta 7 is left from a run with other tokens"),
        (["{other}/reference.pt", "--show"], "preferences.pt: cannot be read"),
    ],
)
def test_unusable_input_is_one_line(argv, says, toy, run, tmp_path):
    folders = {name: tmp_path / name for name in ("empty", "other")}
    for folder in folders.values():
        folder.mkdir()
    (tmp_path / "empty" / "file").write_bytes(b"no model")
    shutil.copy(toy.folder / "reference.pt", tmp_path / "other")
    other_tokens(tmp_path / "other")
    code, printed, error = run(*(arg.format(toy=toy.folder, **folders) for arg in argv))
    assert code == 2 and printed == "" and error.count("\n") == 1
    assert error.startswith("beyond.sample: ") and says in error


@pytest.mark.parametrize(
    "flags", [["--n", "0"], ["--temperature", "0"], ["--seed", "x"], ["--device", "no"]]
)
def test_a_wrong_flag_is_one_line(flags, toy, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(toy.folder, "the plot", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and flags[0] in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["toy", "own"])
def test_held_out_pairs_are_shown_from_the_largest_to_the_smallest_margin(name, run, request):
    """--pairs --n 2 => the margins of each policy's first pairs and last pairs, from its logps."""
    recorded = request.getfixturevalue(name)
    code, printed, _ = run(recorded.folder, "--pairs", "--n", "2")
    assert code == 0
    beta = recorded.cfg.beta[0]
    policy = load_gpt(read_checkpoint(recorded.folder / f"dpo-{beta:g}.pt"), torch.device("cpu"))
    pairs = recorded.returned["eval_set"].pairs
    logps = dpo.response_logps(policy, pairs.ids, pairs.mask)
    _, r_hat_w, r_hat_l = dpo.dpo(logps, pairs, beta)
    margin = (r_hat_w - r_hat_l).sort(descending=True).values.tolist()
    shown = [float(r) for r in re.findall(r"r_hat +([+-][\d.]+)", printed)][:8]
    margins = [shown[i] - shown[i + 1] for i in range(0, 8, 2)]
    expected = [*margin[:2], *margin[-1:-3:-1]]
    assert margins == pytest.approx(expected, abs=0.1)
    assert f"of {len(margin)} held-out pairs" in printed
