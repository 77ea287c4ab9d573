"""The loss that `train.py --loss` names: dpo, one of beyond/losses.py, or one in a user's file."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import dpo
from beyond import losses
from lib.io import BadInput, open_user_file


def load_loss(name: str, arguments: tuple[str, ...]) -> Callable:
    """A function of (logps, batch, beta), like `dpo.dpo`, with arguments such as "epsilon=0.1".

    name: dpo, NAME in beyond/losses.py, or FILE.py:NAME. Raises BadInput.
    """
    path, _, function = name.rpartition(":")
    module = load_file(Path(path)) if path else dpo if name == "dpo" else losses
    loss = getattr(module, function, None)
    if not callable(loss):
        raise BadInput(f"--loss {name}: no function {function!r} in {path or 'beyond/losses.py'}")
    try:
        values = {key: float(value) for key, value in (a.split("=") for a in arguments)}
        inspect.signature(loss).bind(None, None, beta=1.0, **values)
    except (ValueError, TypeError) as e:
        wanted = "must take (logps, batch, beta) and what --loss-args names"
        raise BadInput(f"--loss {name}: {wanted} ({e})") from e
    return partial(loss, **values)


def load_file(path: Path) -> ModuleType:
    with open_user_file(path, "a Python file"):
        module = ModuleType(f"user_{path.stem}")
        module.__file__ = str(path.resolve())
        sys.modules[module.__name__] = module  # so that the function's code can be found
        # An import could run stale bytecode if an edit in the same second keeps the file's length.
        exec(compile(path.read_bytes(), module.__file__, "exec"), vars(module))
        return module
