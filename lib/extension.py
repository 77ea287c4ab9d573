"""Functions found by name: in beyond/, which the core does not import, or in a user's own file."""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import dpo
from lib.io import BadInput, open_user_file


def find(name: str, module: str) -> Callable:
    """The function NAME of a module, or of a file if `name` is FILE.py:NAME. Raises BadInput."""
    path, _, function = name.rpartition(":")
    found = load_file(Path(path)) if path else importlib.import_module(module)
    if not callable(getattr(found, function, None)):
        raise BadInput(f"{name}: there is no function {function!r} in {path or module}")
    return getattr(found, function)


def load_file(path: Path):
    with open_user_file(path, "a Python file"):
        module = ModuleType(f"user_{path.stem}")
        module.__file__ = str(path.resolve())
        sys.modules[module.__name__] = module  # so that the function's code can be found
        # An import could run bytecode of an earlier version that is as long and less than 1 s old.
        exec(compile(path.read_bytes(), module.__file__, "exec"), vars(module))
        return module


def load_loss(name: str, arguments: tuple[str, ...]) -> Callable:
    """A function of (logps, batch, beta), as `dpo.dpo`, with arguments such as "epsilon=0.1".

    name: dpo, NAME in beyond/losses.py, or FILE.py:NAME. Raises BadInput.
    """
    loss = dpo.dpo if name == "dpo" else find(name, "beyond.losses")
    try:
        values = {key: float(value) for key, value in (a.split("=") for a in arguments)}
        inspect.signature(loss).bind(None, None, beta=1.0, **values)
    except (ValueError, TypeError) as e:
        wanted = "must take (logps, batch, beta) and --loss-args NAME=VALUE"
        raise BadInput(f"--loss {name}: {wanted} ({e})") from e
    return partial(loss, **values)
