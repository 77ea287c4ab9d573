"""Cached stages: a result is kept in a file, and reused while nothing it depends on changes.

    reference = stage("reference", sft, dataset, config, seed, device)

The key of a result covers

- the code of the function: its syntax tree without comments, docstrings and annotations, and that
  of every project function, class and constant it refers to, in any file;
- the arguments by value: a tensor or a file at a `Path` by content, a callable by its code;
- the versions of Python and torch, and whether the device has bfloat16 units.

What this file leaves out: code that is only found at run time, as by `getattr(object, name)`.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import marshal
import platform
import sysconfig
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from data import Dataset, SentimentClassifier, WordReward
from dpo import Preferences
from lib.evaluate import EvalSet
from lib.io import atomic_write, open_user_file, sha256
from lib.optim import bf16_supported

TYPES = [Dataset, EvalSet, Preferences, SentimentClassifier, WordReward]
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib"))


def stage_key(function: Callable, args: tuple) -> str:
    """A checksum of everything that can influence function(*args)."""
    versions = platform.python_version(), torch.__version__
    return sha256(repr([versions, describe([function, *args], set())]).encode())


def describe(value: object, seen: set) -> object:
    """A value as strings and lists that change when it does. `seen`: code that was described."""
    try:
        return type(value).__name__, sha256(marshal.dumps(value, 2))  # no objects in it: fast
    except ValueError:
        pass
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), sha256(flat.view(torch.uint8).numpy())
    if isinstance(value, Path):
        return fingerprint(value)
    if isinstance(value, torch.device):
        return str(value), bf16_supported(value)
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], seen)
    if isinstance(value, dict):
        return type(value).__name__, [describe(item, seen) for item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [describe(part, seen) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe([type(value), vars(value)], seen)
    if callable(value):
        return describe_code(inspect.unwrap(value), seen)
    if repr(value).startswith("<") or " at 0x" in repr(value):  # does not show its content
        raise TypeError(f"a stage cannot depend on {value!r}")
    return repr(value)


def describe_code(definition: Callable, seen: set) -> object:
    """The code of a function or class, and of all project code it refers to."""
    module = inspect.getmodule(definition)
    if not in_project(module) or definition in seen:
        return getattr(definition, "__qualname__", repr(definition))
    seen.add(definition)
    tree = code_of(definition)
    found = [ast.dump(tree), describe(captured(definition), seen)]
    for node in ast.walk(tree):
        owner, name = module, getattr(node, "id", None)  # of a Name
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = vars(module).get(node.value.id), node.attr  # of MODULE.name
        if isinstance(owner, ModuleType) and in_project(owner) and name in vars(owner):
            value = vars(owner)[name]
            if not isinstance(value, ModuleType):
                found.append(describe(value, seen))
    return found


def captured(definition: Callable) -> list:
    """What a function holds besides its code: default values, a closure, the object of a method."""
    names = "__defaults__", "__kwdefaults__", "__self__"
    cells = getattr(definition, "__closure__", None) or ()
    return [getattr(definition, n, None) for n in names] + [cell.cell_contents for cell in cells]


def in_project(module: ModuleType | None) -> bool:
    """Whether a module is neither installed nor part of Python."""
    file = getattr(module, "__file__", None)
    if file is None:
        return getattr(module, "__name__", "") == "__main__"  # a notebook
    return not file.startswith(INSTALLED) and "-packages" not in file


@functools.cache
def code_of(definition: Callable) -> ast.AST:
    """The syntax tree of a function or class, without comments, docstrings and annotations."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(definition)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
    return tree


def fingerprint(path: Path) -> str:
    """Changes when a file, or a file in a folder, changes."""
    if path.is_file():
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    return repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.rglob("*"))])


class Missing:
    """The result of a stage that has not run, while a run is planned, and any part of it."""

    def __getattr__(self, name: str) -> "Missing":
        return self

    def __getitem__(self, key: object) -> "Missing":
        return self

    def __iter__(self):
        return iter((self, self))


class Stage:
    """Calls functions through a cache in `folder`: `stage(name, function, *arguments)`.

    Results are loaded without executing code. They may contain the dataclasses in TYPES.
    With `plan`, nothing runs: cached results are returned, and `Missing` in place of the others.
    """

    def __init__(self, folder: Path, plan: bool = False):
        self.folder, self.plan = folder, plan
        self.log = folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float | None] = {}  # None: planned, and not cached

    def __call__(self, name: str, function: Callable, *args: object):
        self.seconds[name] = None
        if self.plan and any(isinstance(arg, Missing) for arg in args):
            return Missing()
        key, entries, path = stage_key(function, args), self.entries(), self.folder / f"{name}.pt"
        entry = entries.pop(name, {})
        content = path.read_bytes() if path.exists() and entry.get("key") == key else b""
        if content and sha256(content) == entry.get("checksum"):
            self.seconds[name] = entry.get("seconds", 0.0)
            return self.load(path, content)
        if self.plan:
            return Missing()
        if content:
            print(f"{path}: does not match its checksum; computing it again")

        self.write_log(entries)  # forget the old key first, so that a new file never meets it
        start = time.perf_counter()
        torch.save(function(*args), buffer := io.BytesIO())
        self.seconds[name] = time.perf_counter() - start
        atomic_write(path, buffer.getvalue())
        checksum = sha256(buffer.getvalue())
        entry = {"key": key, "checksum": checksum, "seconds": self.seconds[name]}
        self.write_log(entries | {name: entry})
        return self.load(path, buffer.getvalue())

    def describe(self) -> str:
        """Which stages are cached and which will run, after a plan."""
        cached = [name for name, seconds in self.seconds.items() if seconds is not None]
        missing = [name for name in self.seconds if name not in cached]
        return f"cached: {', '.join(cached) or 'none'}; to run: {', '.join(missing) or 'none'}"

    def load(self, path: Path, content: bytes):
        what = "the result of a stage; delete it to compute it again"
        with open_user_file(path, what), torch.serialization.safe_globals(TYPES):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def entries(self) -> dict[str, dict]:
        if not self.log.exists():
            return {}
        with open_user_file(self.log, "the list of stages; delete it to start again"):
            return {name: dict(entry) for name, entry in json.loads(self.log.read_bytes()).items()}

    def write_log(self, entries: dict[str, dict]):
        atomic_write(self.log, json.dumps(entries, indent=1).encode())
