"""The command line: a bad input gives one clear line and exit code 2, and no file is changed."""

import dataclasses
import gzip
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
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
from beyond.custom_model import read_checkpoint
from lib import cli
from lib.io import BadInput, file_lock
from lib.stage import Stage
from tiny import Executed, archive, lines, pairs, saved

GOOD = tiny.checkpoint()
TOKENS = GOOD["tokens"]


def changed(part: str, **changes) -> bytes:
    """The good checkpoint with changes to its config or weights."""
    return saved(GOOD | {part: GOOD[part] | changes})


def with_norm(weight: torch.Tensor) -> bytes:
    return changed("weights", **{"ln_f.weight": weight})


OWN = "--data bad.file --init good.pt --context 24".split()
IMDB = "--data imdb --imdb bad.file --init good.pt --context 24".split()
LOSS = "--loss bad.py:f".split()
INIT = "--init bad.file --context 24".split()
BAD_FILES = {  # flags, the content of bad.file (None: there is none), a part of the message
    "own, missing": (OWN, None, "cannot be read as a dataset"),
    "own, truncated": (OWN, lines(pairs(3))[:-20], "line 3: is not JSON"),
    "own, one prompt": (OWN, lines(pairs(2)), "fewer than three different prompts"),
    "imdb, missing": (IMDB, None, "cannot be read as the IMDb archive"),
    "imdb, truncated": (IMDB, archive()[:-700], "as the IMDb archive"),
    "imdb, no reviews": (IMDB, gzip.compress(bytes(1 << 20)), "expected aclImdb/train/pos"),
    "imdb, wrong checksum": (IMDB, archive()[:-8] + bytes(8), "as the IMDb archive"),
    "imdb, few reviews": (IMDB, archive(n=40), "imdb: cannot be read as a dataset (too few"),
    "init, missing": (INIT, None, "is not a checkpoint, a folder, or one of gpt2"),
    "init, truncated": (INIT, saved(GOOD)[:-500], "cannot be read as a checkpoint"),
    "init, code": (INIT, saved(Executed()), "cannot be read as a checkpoint"),
    "init, a pickle": (INIT, pickle.dumps(Executed()), "cannot be read as a checkpoint"),
    "init, a list": (INIT, saved([1, 2, 3]), "cannot be read as a checkpoint"),
    "init, another depth": (INIT, changed("config", n_layer=2), "cannot be read as a checkpoint"),
    "init, absurd depth": (INIT, changed("config", n_layer=10**9), "do not match"),
    "init, absurd width": (INIT, changed("config", n_embd=10**15), "cannot be read"),
    "init, heads": (INIT, changed("config", n_head=3), "do not match"),
    "init, huge by repetition": (INIT, with_norm(torch.ones(1).expand(10**9)), "cannot be read"),
    "init, not finite": (INIT, with_norm(torch.full((16,), float("nan"))), "not finite"),
    "init, tokens missing": (INIT, saved(GOOD | {"tokens": TOKENS[:-1]}), "vocabulary size"),
    "init, a byte missing": (INIT, saved(GOOD | {"tokens": TOKENS[1:]}), "all 256 bytes"),
    "init, duplicate token": (INIT, saved(GOOD | {"tokens": [*TOKENS[:-1], b"a"]}), "not distinct"),
    "loss, missing": (LOSS, None, "bad.py: cannot be read as a Python file"),
    "loss, a syntax error": (LOSS, b"def f(:", "bad.py: cannot be read as a Python file"),
    "loss, no such function": (LOSS, b"def g(): 1", "'f'"),
    "loss, its arguments": (LOSS, b"def f(beta): 1", "(logps, batch, beta)"),
}
BAD_FLAGS = {  # pitfall 29: an unknown or unusable flag is an error
    "--unknown 1": "--unknown", "--bet 1": "--bet", "--beta": "--beta", "--beta one": "--beta",
    "--beta nan": "--beta", "--beta 1 0": "--beta", "--beta 1e99": "--beta", "--lr 0": "--lr",
    "--prompts 0": "--prompts", "--prompts 1.5": "--prompts", "--sft-steps -1": "--sft-steps",
    "--batch-size 0": "--batch-size", "--seed -1": "--seed", "--eval-prompts 1": "--eval-prompts",
    "--ref-samples 4": "--ref-samples", "--context 1": "--context", "--labels best": "--labels",
    "--pairs some": "--pairs", "--optimizer lion": "--optimizer", "--device abacus": "--device",
    "--loss nothing": "nothing", "--loss dpo --loss-args nothing=1": "nothing",
    "--loss dpo --loss-args x": "loss-args", "--out FILE": "FILE", "--out FILE/below": "FILE",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files that are neither empty, as the lock is, nor compiled Python."""
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
def test_a_bad_file_gives_one_line_that_names_it(what, refused):
    flags, content, message = BAD_FILES[what]
    bad = Path("bad.py" if flags == LOSS else "bad.file")
    if content is not None:
        bad.write_bytes(content)
    line = refused(flags)
    assert message in line and (bad.name in line or line.startswith("train.py: imdb:"))


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gives_one_line_that_names_it(flags, refused):
    assert BAD_FLAGS[flags] in refused(flags.split())


def test_links_and_parent_paths_in_an_archive_write_nothing(tmp_path):
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
    """The good file with parts changed, removed, repeated or cut off; or arbitrary bytes."""

    def mutate(seed: int) -> bytes:
        rng, content = random.Random(seed), bytearray(good)
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(content) + 1)
            j = rng.choice((i + 1, i + 40, len(content)))
            content[i:j] = rng.choice((rng.randbytes(1), b"", 2 * content[i:j]))
        return bytes(content)

    return st.builds(mutate, st.integers(0, 2**32)) | st.binary(max_size=300)


SIZES = data.Sizes(prompts=1, eval_prompts=4, context=24)
READERS = {
    "preferences": (lambda path: load_pairs(path, SIZES, 0, TOKENS), lines(pairs(6))),
    "archive": (lambda path: train.load_reviews(path, Stage(path.parent / "out")), archive(n=60)),
    "checkpoint": (read_checkpoint, saved(GOOD)),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_are_read_or_refused_by_name(reader, tmp_path):
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
        assert "another run" in refused([])


def test_ctrl_c_keeps_finished_stages_and_exits_with_130(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "complete", interrupt)
    flags = "--sft-steps 2 --reviews 100 --prompts 16 --eval-prompts 4"
    assert train.main(flags.split()) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: interrupted") and "repeat the command" in last
    assert {path.name for path in Path("out").glob("*.pt")} == {"dataset.pt", "reference.pt"}


def raising(error: Exception):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "work, debug, shown",
    [
        (raising(BadInput("why")), False, "prog: why\n"),
        (raising(OSError(28, "No space left on device")), False, "prog: [Errno 28] No space left"),
        (lambda: bytearray(1 << 60), False, "prog: out of memory\n"),
        (lambda: torch.empty(1 << 50), False, "prog: "),
        (raising(BadInput("why")), True, BadInput),
        (raising(RuntimeError("shape bug")), False, RuntimeError),
        (lambda: {}["bug"], False, KeyError),
    ],
)
def test_bad_input_and_full_memory_or_disk_give_one_line_but_bugs_and_debug_a_traceback(
    work, debug, shown, tmp_path, capsys
):
    if isinstance(shown, str):
        assert cli.run_cli("prog", tmp_path, debug, work) == 2
        error = capsys.readouterr().err
        assert error.startswith(shown) and error.count("\n") == 1
    else:
        with pytest.raises(shown):
            cli.run_cli("prog", tmp_path, debug, work)


# ------------------------------------------------- flags


def parsed(*argv: str) -> train.Config:
    return cli.parse("train.py", "", train.Config, train.PRESETS, list(argv))[1]


def test_every_flag_sets_the_field_of_its_name():
    other = {str: "bt", int: 17, float: 0.5, bool: True}
    for field in dataclasses.fields(train.Config):
        if not field.metadata or field.name in ("data", "imdb", "init"):
            continue
        default = field.default
        value = list(default[:1]) or ["x=1"] if isinstance(default, tuple) else other[type(default)]
        if choices := field.metadata.get("choices"):
            value = choices[-1]
        words = value if isinstance(value, list) else () if value is True else (value,)
        cfg = parsed("--" + field.name.replace("_", "-"), *map(str, words))
        assert getattr(cfg, field.name) == value and type(getattr(cfg, field.name)) is type(value)
        assert dataclasses.replace(cfg, **{field.name: default}) == train.Config()


def test_defaults_depend_on_the_dataset_and_flags_override_them():
    assert parsed() == train.Config()
    for name, argument in (("imdb", "imdb"), ("own", "own.jsonl")):
        assert parsed("--data", argument) == train.Config(data=argument, **train.PRESETS[name])
    assert parsed("--data", "imdb", "--context", "20", "--beta", "2", "3").beta == [2.0, 3.0]


def test_only_the_shipped_pi_ref_is_not_fine_tuned_on_imdb(tmp_path, monkeypatch):
    """Even if the project is reached through a link."""
    (tmp_path / "link").symlink_to(tiny.ROOT)
    monkeypatch.setattr(train, "PI_REF", str(tmp_path / "link/lib/pi_ref.pt"))
    for flags, steps in (
        ("", 0),
        (f"--init {train.PI_REF}", 0),
        ("--sft-steps 7", 7),
        ("--from-scratch", 1562),  # two epochs of 25,000 reviews in batches of 32
        ("--from-scratch --sft-steps 7", 7),
        ("--init another.pt", 1562),
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
        assert (f"\n  {flag}" in text) == bool(field.metadata)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again(tmp_path):
    """Allocate 112 MB eight times  =>  the last seven need fewer new pages than the first"""
    program = f"""
import resource, torch
from pathlib import Path
from lib import cli

def work():
    for _ in range(8):
        [torch.zeros(n * 1_000_000) for n in (3, 4, 5, 5, 5, 6)]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return "end"

cli.run_cli("test", Path({str(tmp_path)!r}), False, work)
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    faults = [*map(int, found.stdout.split("end")[0].split())]
    assert faults[-1] - faults[0] < 112e6 / os.sysconf("SC_PAGE_SIZE"), faults
