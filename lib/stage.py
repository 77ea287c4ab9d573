"""Cached stages: a result is kept in a file, and reused while nothing it depends on changes.

    reference = stage("reference", sft, checkpoint, texts, steps, seed, device)

The key of a result covers

- the code of the function: its syntax tree without comments, docstrings and annotations, and that
  of every project function, class and constant it refers to, in any file;
- the arguments by value: a tensor or a file at a `Path` by content, a callable by its code;
- the versions of Python and torch, and whether the device supports bfloat16.

The key does not cover code that is found only at run time, for instance by `getattr(object, name)`.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import marshal
import platform
import sysconfig
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from data import Dataset, SentimentClassifier, WordReward
from dpo import Preferences
from lib.evaluate import EvalSet
from lib.io import atomic_write, sha256
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
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), sha256(flat.view(torch.uint8).numpy())
    if isinstance(value, Path):
        return fingerprint(value)
    if isinstance(value, torch.device):
        return str(value), bf16_supported(value)
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [type(value), vars(value)]
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, [describe(part, seen) for part in value]
    if inspect.isroutine(value) or inspect.isclass(value):
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
    return not file.startswith(INSTALLED) and not {"site-packages", "dist-packages"} & set(
        Path(file).parts
    )


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
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float | None] = {}  # None: planned, and not cached

    def __call__(self, name: str, function: Callable, *args: object):
        self.seconds[name] = None
        if self.plan and any(isinstance(arg, Missing) for arg in args):
            return Missing()
        key, path = stage_key(function, args), self.folder / f"{name}.pt"
        found = self.read(path)
        if found.get("key") != key:
            if self.plan:
                return Missing()
            start = time.perf_counter()
            value = function(*args)
            found = {"key": key, "seconds": time.perf_counter() - start, "value": value}
            torch.save(found, buffer := io.BytesIO())
            atomic_write(path, buffer.getvalue())
            if not (found := self.read(path)):
                raise TypeError(f"{name}: add the types of its result to lib.stage.TYPES")
        self.seconds[name] = found["seconds"]
        return found["value"]

    def read(self, path: Path) -> dict:
        """The content of a stage's file; {} if there is none, or if it is damaged."""
        if not path.exists():
            return {}
        try:
            if zipfile.ZipFile(path).testzip() is not None:
                raise ValueError("wrong checksum")
            with torch.serialization.safe_globals(TYPES):
                found = torch.load(path, map_location="cpu", weights_only=True)
            return found if "key" in found else {}
        except Exception as e:  # damaged files may raise anything
            print(f"{path}: is damaged, and is computed again ({e})")
            return {}

    def describe(self) -> str:
        """Which stages are cached and which will run, after a plan."""
        cached = [name for name, seconds in self.seconds.items() if seconds is not None]
        missing = [name for name in self.seconds if name not in cached]
        return f"cached: {', '.join(cached) or 'none'}; to run: {', '.join(missing) or 'none'}"
