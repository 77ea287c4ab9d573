"""Losses by name: dpo, one of beyond/losses.py, or a function in the user's own file."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dpo
from lib.io import BadInput, open_user_file

LOSSES = Path(__file__).parent.parent / "beyond" / "losses.py"


def load_loss(text: str, arguments: tuple[str, ...]) -> Callable:
    """The loss that `text` names, NAME or FILE.py:NAME, with arguments such as "epsilon=0.1".

    Returns a function of (logps, batch, beta), as `dpo.dpo`. Raises BadInput.
    """
    path, _, name = text.rpartition(":")
    if (path, name) == ("", "dpo"):
        loss = dpo.dpo
    else:
        loss = getattr(load_module(Path(path or LOSSES)), name, None)
    if not callable(loss):
        raise BadInput(
            f"--loss {text}: there is no function {name!r} in {path or 'beyond/losses.py'}"
        )
    try:
        values = {key: float(value) for key, value in (a.split("=") for a in arguments)}
        inspect.signature(loss).bind(None, None, beta=1.0, **values)
    except (ValueError, TypeError) as e:
        raise BadInput(
            f"--loss {text}: must take (logps, batch, beta) and --loss-args ({e})"
        ) from e
    return partial(loss, **values)


def load_module(path: Path):
    with open_user_file(path, "a Python file with a loss"):
        spec = importlib.util.spec_from_file_location(f"loss_{path.stem}", path.resolve())
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that the function's code can be found
        spec.loader.exec_module(module)
        return module
