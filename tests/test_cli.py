"""The command line: a bad input is one clear line and exit code 2, and no file is changed."""

import dataclasses
import gzip
import pickle
import random
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import tiny
import train
from beyond.custom_data import load_pairs
from lib import cli
from lib.checkpoint import read_checkpoint
from lib.io import BadInput, file_lock, open_user_file
from tiny import archive, lines, pairs, saved

TINY = "--context 24 --sft-steps 2 --prompts 16 --batch-size 8 --eval-prompts 4 --reviews 100"
TINY = f"{TINY} --ref-samples 32 --eval-samples 16 --beta 0.5 2 --from-scratch --init good.pt"
TINY = TINY.split()


class Executed:
    """A malicious pickle: loading it creates a file."""

    def __reduce__(self):
        return Path("executed").touch, ()


GOOD = tiny.checkpoint()
CONFIG, WEIGHTS, TOKENS = GOOD["config"], GOOD["weights"], GOOD["tokens"]


def with_config(**changes) -> bytes:
    return saved(GOOD | {"config": CONFIG | changes})


def with_norm(weight: torch.Tensor) -> bytes:
    return saved(GOOD | {"weights": WEIGHTS | {"ln_f.weight": weight}})


def third(**changes) -> bytes:
    """Preferences whose third line is changed."""
    rows = pairs(20)
    rows[2] |= changes
    return lines(rows)


OWN = "--data bad.file --init good.pt --context 24".split()
IMDB = "--data imdb --imdb bad.file --init good.pt --context 24".split()
LOSS = ["--loss", "bad.py:f"]
INIT = "--init bad.file --context 24".split()
BAD_FILES = {  # flags, the content of bad.file (None: there is none), a part of the message
    "own, missing": (OWN, None, "cannot be read as a dataset"),
    "own, a folder": (["--data", "."], None, "cannot be read as a dataset"),
    "own, blank": (OWN, b"\n \n\n", "no rows"),
    "own, truncated": (OWN, lines(pairs(3))[:-20], "line 3: is not JSON"),
    "own, empty prompt": (OWN, third(prompt=""), "line 3: prompt is missing, empty"),
    "own, one prompt": (OWN, lines(pairs(2)), "two different prompts"),
    "own, none fits": ([*OWN, "--context", "8"], lines(pairs()), "--context 8"),
    "imdb, missing": (IMDB, None, "cannot be read as the IMDb archive"),
    "imdb, empty": (IMDB, b"", "as the IMDb archive"),
    "imdb, text": (IMDB, b"not an archive", "as the IMDb archive"),
    "imdb, truncated": (IMDB, archive()[:-700], "as the IMDb archive"),
    "imdb, no archive inside": (IMDB, gzip.compress(b"text" * 999), "as the IMDb archive"),
    "imdb, no reviews": (IMDB, gzip.compress(bytes(1 << 20)), "expected aclImdb/train/pos"),
    "imdb, wrong checksum": (IMDB, archive()[:-8] + bytes(8), "as the IMDb archive"),
    "imdb, few reviews": (IMDB, archive(n=40), "imdb: cannot be read as a dataset (too few"),
    "init, missing": (INIT, None, "is not a checkpoint, a folder, or one of gpt2"),
    "init, a folder": (["--init", "."], None, "cannot be read as"),
    "init, empty": (INIT, b"", "cannot be read as a checkpoint"),
    "init, text": (INIT, b"not a checkpoint", "cannot be read as a checkpoint"),
    "init, truncated": (INIT, saved(GOOD)[:-500], "cannot be read as a checkpoint"),
    "init, code": (INIT, saved(Executed()), "cannot be read as a checkpoint"),
    "init, a pickle": (INIT, pickle.dumps(Executed()), "cannot be read as a checkpoint"),
    "init, a list": (INIT, saved([1, 2, 3]), "cannot be read as a checkpoint"),
    "init, another width": (INIT, with_config(n_embd=32), "cannot be read as a checkpoint"),
    "init, another depth": (INIT, with_config(n_layer=2), "cannot be read as a checkpoint"),
    "init, absurd depth": (INIT, with_config(n_layer=10**9), "cannot be read as a checkpoint"),
    "init, absurd width": (INIT, with_config(n_embd=10**15), "cannot be read as a checkpoint"),
    "init, heads": (INIT, with_config(n_head=3), "cannot be read as a checkpoint"),
    "init, a weight's shape": (INIT, with_norm(torch.ones(9)), "cannot be read as a checkpoint"),
    "init, huge by repetition": (INIT, with_norm(torch.ones(1).expand(10**9)), "cannot be read"),
    "init, not finite": (INIT, with_norm(torch.full((16,), float("nan"))), "not finite"),
    "init, tokens missing": (INIT, saved(GOOD | {"tokens": TOKENS[:-1]}), "vocabulary size"),
    "init, no bytes": (INIT, saved(GOOD | {"tokens": [*TOKENS[1:], b"zz"]}), "cannot be read"),
    "init, doubled token": (INIT, saved(GOOD | {"tokens": [*TOKENS[:-1], b"a"]}), "cannot be read"),
    "init, tokens of text": (INIT, saved(GOOD | {"tokens": "abc"}), "cannot be read"),
    "loss, missing": (LOSS, None, "bad.py"),
    "loss, a syntax error": (LOSS, b"def f(:", "bad.py"),
    "loss, no such function": (LOSS, b"def g(): 1", "'f'"),
    "loss, its arguments": (LOSS, b"def f(beta): 1", "(logps, batch, beta)"),
}
BAD_FLAGS = {  # pitfall 29: an unknown or unusable flag is an error
    "--unknown 1": "--unknown", "--bet 1": "--bet", "--beta": "--beta", "--beta one": "--beta",
    "--beta 0": "--beta", "--beta -1": "--beta", "--beta nan": "--beta", "--beta inf": "--beta",
    "--beta 1e99": "--beta", "--beta 1 0": "--beta", "--lr 0": "--lr", "--lr nan": "--lr",
    "--prompts 0": "--prompts", "--prompts 1.5": "--prompts", "--prompts 9999999999": "--prompts",
    "--sft-steps -1": "--sft-steps", "--batch-size 0": "--batch-size", "--seed -1": "--seed",
    "--eval-prompts 1": "--eval-prompts", "--ref-samples 4": "--ref-samples",
    "--context 1": "--context", "--labels best": "--labels", "--pairs some": "--pairs",
    "--optimizer lion": "--optimizer", "--device abacus": "--device", "--device meta:x": "--device",
    "--init": "--init", "--data nowhere.jsonl": "nowhere.jsonl", "--init nowhere.pt": "nowhere.pt",
    "--loss nothing": "nothing", "--loss dpo --loss-args nothing=1": "nothing",
    "--loss dpo --loss-args x": "loss-args", "--out FILE": "FILE", "--out FILE/below": "FILE",
    "--data imdb --imdb nowhere --init good.pt --context 24": "nowhere",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the empty lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = {str(path): path.read_bytes() for path in paths}
    return {path: content for path, content in files.items() if content}


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(argv): the one line with which main refuses. It must change no file."""
    monkeypatch.chdir(tmp_path)
    Path("good.pt").write_bytes(saved(GOOD))
    Path("FILE").write_text("precious")

    def refused(argv: list[str]) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        try:
            code = train.main(argv)
        except SystemExit as e:  # from argparse
            code = e.code
        printed = capsys.readouterr().err
        assert code == 2 and "Traceback" not in printed
        last = printed.strip().splitlines()[-1]
        assert last.startswith("train.py: ") and printed.count("train.py: ") == 1
        assert len(last) < 700 and contents(tmp_path) == before and not Path("executed").exists()
        return last

    return refused


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(what, refused):
    flags, content, message = BAD_FILES[what]
    if content is not None:
        Path("bad.py" if flags == LOSS else "bad.file").write_bytes(content)
    line = refused(flags)
    assert message in line and ("bad.file" in line or "imdb:" in line or "bad.file" not in flags)


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_it(flags, refused):
    assert BAD_FLAGS[flags] in refused(flags.split())


def test_links_and_paths_upwards_in_an_archive_write_nothing(tmp_path):
    """Members are read as a stream. Links and devices are skipped, wherever they point."""
    path = tmp_path / "in" / "a.tar.gz"
    path.parent.mkdir()
    names = {f"{up}train/pos/{i}_9.txt": b"" for i, up in enumerate(("../../", "/", ""), 900)}
    path.write_bytes(archive())
    plain = data.read_imdb(path)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        path.write_bytes(archive(names, kind))
        assert data.read_imdb(path) == plain
    path.write_bytes(archive({name: b"text" for name in names}))
    assert len(data.read_imdb(path)["train/pos"]) == len(plain["train/pos"]) + 3
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


# ------------------------------------------------- any bytes


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """The good file with bytes changed, removed, repeated or cut off; or arbitrary bytes."""

    def mutate(kind: int, seed: int) -> bytes:
        rng, b = random.Random(seed), bytearray(good)
        for _ in range(rng.randint(1, 4)):
            i = rng.randrange(len(b) + 1)
            j = min(len(b), i + rng.randint(1, 40))
            if kind == 0 and b:
                b[i % len(b)] = rng.randrange(256)
            elif kind == 1:
                del b[i:j]
            elif kind == 2:
                b[i:i] = b[i:j]
            else:
                del b[i:]
        return bytes(b)

    return st.builds(mutate, st.integers(0, 3), st.integers(0, 2**32)) | st.binary(max_size=300)


def read_archive(path: Path):
    with open_user_file(path, "the IMDb archive"):
        return data.read_imdb(path)


def read_preferences(path: Path):
    return load_pairs(path, data.Sizes(1, 4, 24), 0, TOKENS)


READERS = {
    "preferences": (read_preferences, lines(pairs(6))),
    "archive": (read_archive, archive(n=60)),
    "checkpoint": (read_checkpoint, saved(GOOD)),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_are_read_or_refused_in_one_line(reader, tmp_path):
    (read, good), path = READERS[reader], tmp_path / "file"

    @settings(max_examples=40)
    @given(mutated(good))
    def check(content):
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            read(path)
        except BadInput as e:
            assert str(path) in str(e)
        assert time.perf_counter() - start < 5 and path.read_bytes() == content

    path.write_bytes(good)
    read(path)
    check()


# ------------------------------------------------- interruptions


def test_a_second_run_in_the_same_folder_is_refused(refused, tmp_path):
    (tmp_path / "out").mkdir()
    with file_lock(tmp_path / "out"):
        assert "another run" in refused(TINY)


def test_ctrl_c_keeps_finished_stages_and_exits_with_130(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.pt").write_bytes(saved(GOOD))

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "complete", interrupt)
    assert train.main(TINY) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: interrupted") and "repeat the command" in last
    assert {path.name for path in Path("out").glob("*.pt")} == {"dataset.pt", "reference.pt"}


def test_a_full_disk_is_one_line_and_keeps_what_was_there(refused, monkeypatch, tmp_path):
    from lib import stage

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("precious")

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(stage, "atomic_write", full)
    assert "No space left on device" in refused(TINY)


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback_of_a_one_line_error(debug, tmp_path, capsys):
    def work():
        raise BadInput("why")

    if debug:
        with pytest.raises(BadInput):
            cli.run_cli("prog", tmp_path, debug, work)
    else:
        assert cli.run_cli("prog", tmp_path, debug, work) == 2
        assert capsys.readouterr().err == "prog: why\n"


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), RuntimeError("shape bug")])
def test_a_bug_shows_its_traceback(error, tmp_path):
    with pytest.raises(type(error)):
        cli.run_cli("prog", tmp_path, False, lambda: (_ for _ in ()).throw(error))


def test_memory_that_runs_out_is_one_line(tmp_path, capsys):
    assert cli.run_cli("prog", tmp_path, False, lambda: bytearray(1 << 60)) == 2
    assert cli.run_cli("prog", tmp_path, False, lambda: torch.empty(1 << 50)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


# ------------------------------------------------- flags


def parsed(*argv: str) -> train.Config:
    return cli.parse("train.py", "", train.Config, train.PRESETS, list(argv))[1]


def test_every_flag_sets_the_field_of_its_name(tmp_path):
    other = {str: "bt", int: 17, float: 0.5, bool: True}
    for field in dataclasses.fields(train.Config):
        if not field.metadata["help"] or field.name in ("data", "imdb", "init"):
            continue
        default = field.default
        value = list(default[:1]) or ["x=1"] if isinstance(default, tuple) else other[type(default)]
        if choices := field.metadata["how"].get("choices"):
            value = choices[-1]
        words = value if isinstance(value, list) else () if value is True else (value,)
        cfg = parsed("--" + field.name.replace("_", "-"), *map(str, words))
        assert getattr(cfg, field.name) == value and type(getattr(cfg, field.name)) is type(value)
        assert dataclasses.replace(cfg, **{field.name: default}) == train.Config()


def test_defaults_depend_on_the_dataset_and_flags_override_them(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines(pairs()))
    assert parsed() == train.Config()
    for field in dataclasses.fields(train.Config):
        for name, argument in (("imdb", "imdb"), ("own", str(path))):
            expected = train.PRESETS[name].get(field.name, field.default)
            expected = argument if field.name == "data" else expected
            assert getattr(parsed("--data", argument), field.name) == expected
    assert parsed("--data", "imdb", "--context", "20", "--beta", "2", "3").beta == [2.0, 3.0]


def test_only_the_shipped_pi_ref_is_not_fine_tuned_on_imdb():
    for flags, steps in (
        ("", 0),
        ("--sft-steps 7", 7),
        ("--from-scratch", 2343),  # three epochs of 25,000 reviews in batches of 32
        ("--from-scratch --sft-steps 7", 7),
        ("--init another.pt", 2343),
    ):
        assert train.sft_settings(parsed("--data", "imdb", *flags.split()), 25_000)[0] == steps


def test_help_fits_on_two_screens_and_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and len(text.splitlines()) <= 90
    for field in dataclasses.fields(train.Config):
        flag = "--" + field.name.replace("_", "-")
        assert (f"\n  {flag}" in text) == bool(field.metadata["help"])
