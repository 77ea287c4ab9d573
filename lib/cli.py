"""The command line: flags from a dataclass, one-line errors, and exit codes."""

import argparse
import ctypes
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lib.io import BadInput, file_lock


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")  # one line, without the usage


def usable_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"this machine has no device {name!r}") from None


def at_least(low):
    """A parser for numbers of the type of `low` that rejects values below it."""

    def number(text):
        value = type(low)(text)
        if not low <= value < 2**32:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g} and below {2**32}")
        return value

    return number


def flag(default: object, help: str, low: float | None = None, **how: object):
    """A settings field with a flag. Its metadata are arguments for argparse.

    low: the smallest value allowed, for a number. how: further arguments for argparse.
    """
    if isinstance(default, tuple):
        how["nargs"] = "+"
    if default is False:
        how["action"] = "store_true"
    if low is not None:
        how |= {"type": at_least(low), "metavar": "N"}
    return dataclasses.field(default=default, metadata={"help": help, **how})


def parse(prog: str, doc: str, settings: type, presets: dict, argv: list[str], out="out"):
    """The command line as a namespace, and as `settings`, a dataclass with fields made by `flag`.

    presets: for imdb and own (the user's data), the defaults that differ from those of toy. out:
    the default folder.
    """
    first = Parser(prog, add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="toy")
    dataset = first.parse_known_args(argv)[0].data
    preset = presets.get(dataset if dataset in ("toy", "imdb") else "own", {})

    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, f"{prog} [flags]", doc, formatter_class=style, allow_abbrev=False)
    parser.epilog = "Defaults, in parentheses, depend on --data: try --data imdb --help."
    for field in dataclasses.fields(settings):
        default = preset.get(field.name, field.default)
        parser.set_defaults(**{field.name: default})
        if field.metadata:
            how = dict(field.metadata)
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            how["help"] += f" ({shown})" if default else ""
            parser.add_argument("--" + field.name.replace("_", "-"), **how)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="cpu, cuda or mps")
    parser.add_argument("--out", type=Path, default=out, help=f"folder for all output ({out})")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(settings)}
    return args, settings(**given)


def keep_freed_memory():
    """Make glibc keep freed memory for later use. Getting it from the system again is slow."""
    if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        glibc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its maximum
        glibc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def run_cli(prog: str, out: Path, debug: bool, work: Callable[[], str]) -> int:
    """Do work() while holding the lock of `out`, print what it returns, and return the exit code.

    0: success. 2: the input cannot be used, or memory or disk ran out. 130: interrupted. With
    `debug`, one-line errors show their traceback. Programming errors always do, except in code that
    reads the user's files.
    """
    start = time.perf_counter()
    keep_freed_memory()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with file_lock(out):
            print(f"{work()}\n{time.perf_counter() - start:.0f} s")
    except (BadInput, OSError, MemoryError, RuntimeError) as e:
        is_bug = isinstance(e, RuntimeError) and not re.search("alloc|out of memory", str(e))
        if debug or is_bug:
            raise
        print(f"{prog}: {' '.join(str(e).split())[:500] or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        message = f"interrupted; finished stages are kept in {out}: repeat the command to continue"
        print(f"{prog}: {message}", file=sys.stderr)
        return 130
    return 0
