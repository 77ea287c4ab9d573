"""Tiny runs of train.py, with a record of the project code that each stage executes."""

import functools
import inspect
import io
import json
import random
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from lib.checkpoint import to_checkpoint
from lib.stage import Stage
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
SIZES = dict(context=24, shape=(1, 2, 16), reviews=150, sft_steps=4, sft_batch_size=8,
             prompts=16, completions=3, batch_size=8, eval_prompts=4, ref_samples=64,
             eval_samples=32, lr=0.01)  # fmt: skip


def config(kind: str, folder: Path) -> train.Config:
    """Tiny settings for toy, imdb or own preferences. The last two start from a checkpoint."""
    if kind == "toy":
        return train.Config(beta=(0.5, 2.0), **SIZES)
    (folder / "init.pt").write_bytes(saved(checkpoint()))
    given = SIZES | {"init": str(folder / "init.pt"), "beta": (1.0,)}
    if kind == "imdb":
        (folder / "imdb.tar.gz").write_bytes(archive())
        return train.Config(data="imdb", imdb=folder / "imdb.tar.gz", **given)
    (folder / "own.jsonl").write_bytes(lines(pairs()))
    return train.Config(data=str(folder / "own.jsonl"), **given)


class Executed:
    """A malicious pickle: loading it creates a file."""

    def __reduce__(self):
        return Path("executed").touch, ()


def checkpoint() -> dict:
    torch.manual_seed(0)
    tokens = data.toy_tokens()
    return to_checkpoint(GPT(GPTConfig(len(tokens) + 1, SIZES["context"], *SIZES["shape"])), tokens)


def pairs(n: int = 60) -> list[dict]:
    """Preferences for cheerful words, two for each prompt."""
    rng = random.Random(0)
    good, bad = ("superb", "moving", "clever"), ("dull", "bland", "odd")
    return [
        {
            "prompt": f"film {i // 2} is",
            "chosen": f" {rng.choice(good)} ({i})",
            "rejected": f" {rng.choice(bad)} ({i})",
        }
        for i in range(n)
    ]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def archive(extra: dict[str, bytes] | None = None, kind: bytes = tarfile.REGTYPE, n: int = 240):
    """n reviews from the grammar in the layout of IMDb's archive, and extra members of a kind."""
    reviews = data.toy_reviews(n, 5)
    members = [(name, text, kind) for name, text in (extra or {}).items()]
    for i, text in enumerate(reviews):
        label = "pos" if data.WordReward(data.WEIGHT)([text]) > 0 else "neg"
        folder = "train/unsup" if i % 7 == 0 else f"{('train', 'test')[i % 2]}/{label}"
        content = f"{text.capitalize()}<br /><br />{text}".encode()
        members.append((f"aclImdb/{folder}/{i}_5.txt", content, tarfile.REGTYPE))
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        for name, content, type_ in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content) * (type_ == tarfile.REGTYPE), type_
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def saved(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


class Products(TorchDispatchMode):
    """Records the dtypes of all matrix products, forward and backward."""

    def __init__(self):
        super().__init__()
        self.dtypes = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "mm" in name or "matmul" in name or "attention" in name or "linear" in name:
            for arg in args:
                if isinstance(arg, torch.Tensor):
                    self.dtypes[arg.dtype] += 1
        return function(*args, **kwargs or {})


def target(function) -> object:
    """The code object of a stage's function."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function).__code__


def record(folder: Path, cfg: train.Config) -> SimpleNamespace:
    """Run an experiment. Returns its folder, results, and for each stage by name:
    `calls`, its function and arguments; `executed`, the frames' (code, globals); `returned`.
    """
    calls, executed, returned = {}, defaultdict(dict), {}
    real = Stage.__call__

    def call(self, name, function, *args):
        calls[name] = function, args
        start, inside = target(function), []

        def profile(frame, event, arg):
            if event == "call":
                if frame.f_code is start:
                    inside.append(frame)
                if inside and frame.f_code.co_filename.startswith(str(ROOT)):
                    executed[name][frame.f_code] = frame.f_globals
            elif event == "return" and inside and frame is inside[-1]:
                inside.pop()

        sys.setprofile(profile)
        try:
            returned[name] = real(self, name, function, *args)
        finally:
            sys.setprofile(None)
        return returned[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        patch.setattr(Stage, "__call__", call)
        train.run(cfg, Stage(folder / "out"), CPU)
    results = json.loads((folder / "out" / "results.json").read_text("utf-8"))
    return SimpleNamespace(
        cfg=cfg, folder=folder / "out", results=results,
        calls=calls, executed=executed, returned=returned,
    )  # fmt: skip
