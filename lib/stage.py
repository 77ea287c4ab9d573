"""Cached stages: a result is kept in a file, and reused while nothing it depends on changes.

    reference = stage("reference", sft, checkpoint, texts, steps, batch_size, lr, seed, device)

The key of a result covers

- the code of the function: its syntax tree without comments and docstrings, that of every project
  function and class it refers to, and the value of every constant, in any file;
- the arguments by value: a tensor or a file at a `Path` by content, a callable by its code;
- the versions of Python and torch, and whether the device supports bfloat16.

The key does not cover code that is found only at run time, for instance by `getattr(object, name)`
or by an import inside a function, nor what a decorator captures.
"""

import ast
import functools
import inspect
import io
import pickle
import platform
import sysconfig
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from data import Dataset, WordReward
from dpo import Preferences
from lib.evaluate import EvalSet
from lib.io import atomic_write, sha256
from lib.optim import bf16_supported

TYPES = [Dataset, EvalSet, Preferences, WordReward]
INSTALLED = sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")


def stage_key(function: Callable, args: tuple) -> str:
    """A checksum of the function, its arguments and the versions, as described above.

    Raises TypeError or PicklingError for an argument that cannot be pickled, such as a generator.
    """
    versions = platform.python_version(), str(torch.__version__)
    Describer(buffer := io.BytesIO()).dump([versions, function, args])
    return sha256(buffer.getvalue())


class Describer(pickle.Pickler):
    """Pickles a value to bytes that change when it does; a function as its code, not its name."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.fast = True  # without a memo; with it, sharing an object would change the bytes
        self.seen = set()

    def reducer_override(self, value: object):
        content = NotImplemented
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            numbers = sha256(flat.view(torch.uint8).numpy())
            content = [str(value.dtype), tuple(value.shape), numbers]
        elif isinstance(value, Path):
            content = sha256(value.read_bytes())
        elif isinstance(value, torch.device):
            content = [str(value), bf16_supported(value)]
        elif inspect.isroutine(value) or inspect.isclass(value):
            value = inspect.unwrap(value)
            if in_project(inspect.getmodule(value)):
                content = list(self.describe_code(value))
        return content if content is NotImplemented else (list, (content,))

    def describe_code(self, definition: Callable) -> Iterator:
        """The code of a function or class, what it captures, and what it refers to."""
        yield definition.__qualname__
        if definition in self.seen:
            return
        self.seen.add(definition)
        for name in ("__defaults__", "__kwdefaults__", "__self__"):
            yield getattr(definition, name, None)
        for cell in getattr(definition, "__closure__", None) or ():
            yield cell.cell_contents
        tree = code_of(definition)
        module = inspect.getmodule(definition)
        yield ast.dump(tree)
        for node in ast.walk(tree):
            value = look_up(node, module)
            if value is not None and not isinstance(value, ModuleType):
                yield value


def look_up(node: ast.AST, module: ModuleType) -> object:
    """What NAME, MODULE.NAME or PACKAGE.MODULE.NAME means in a module; None for all else."""
    if isinstance(node, ast.Attribute):
        owner, name = look_up(node.value, module), node.attr
    else:
        owner, name = module, getattr(node, "id", None)
    inside = isinstance(owner, ModuleType) and in_project(owner)
    return vars(owner).get(name) if inside else None


@functools.cache
def in_project(module: ModuleType | None) -> bool:
    """Whether a module is neither installed nor part of Python."""
    file = getattr(module, "__file__", None)
    if file is None:
        return getattr(module, "__name__", "") == "__main__"  # a notebook
    packages = {"site-packages", "dist-packages"}
    return not file.startswith(INSTALLED) and not packages & set(Path(file).parts)


@functools.cache
def code_of(definition: Callable) -> ast.AST:
    """The syntax tree of a function or class, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(definition)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


class Stage:
    """Calls functions through a cache in `folder`: `stage(name, function, *arguments)`.

    Results are loaded without executing code. They may contain the dataclasses in TYPES.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds = {}  # of each stage, now or in an earlier run

    def __call__(self, name: str, function: Callable, *args: object):
        key = stage_key(function, args)
        path = self.folder / f"{name}.pt"
        found = self.read(path)
        if found.get("key") == key:
            print(f"[{name}] cached")
        else:
            print(f"[{name}]")
            start = time.perf_counter()
            value = self.run(function, *args)
            found = {"key": key, "seconds": time.perf_counter() - start, "value": value}
            torch.save(found, buffer := io.BytesIO())
            atomic_write(path, buffer.getvalue())
            found = self.read(path)  # as later runs read it
        self.seconds[name] = found["seconds"]
        return found["value"]

    def run(self, function: Callable, *args: object):
        return function(*args)

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
            print(f"{path}: damaged; computing it again ({e})")
            return {}
