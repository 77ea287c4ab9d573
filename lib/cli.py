"""The command line: flags from a dataclass, one-line errors, and exit codes."""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lib.io import BadInput, file_lock
from lib.optim import bf16_supported


def flag(default, help: str = "", low=None, high=None, choices=None, **presets):
    """A field of a settings dataclass. Without `help` it is a setting that has no flag.

    low, high: the smallest and largest value. presets: defaults for other datasets, by name.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "presets": presets}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")  # one line, without the usage


def usable_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"this machine has no device {name!r}") from None


def parse(prog: str, doc: str, settings: type, argv: list[str]):
    """The command line as a namespace, and as `settings`, a dataclass of fields made by `flag`.

    Each field with a help text becomes a flag. Its default depends on --data.
    """
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
    usage = f"{prog} [flags]"
    parser = Parser(prog, usage, doc, formatter_class=style, allow_abbrev=False)
    fields = dataclasses.fields(settings)
    for field in fields:
        if field.metadata["help"]:
            add_flag(parser, field)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="cpu, cuda or mps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all output (out)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    dataset = args.data or "toy"
    if dataset not in ("toy", "imdb"):
        if not Path(dataset).is_file():
            parser.error(f"--data {dataset}: there is no such file")
        dataset = "own"
    return args, settings(**{f.name: choose(parser, f, args, dataset) for f in fields})


def add_flag(parser: Parser, field: dataclasses.Field):
    default, extra = field.default, field.metadata
    many = isinstance(default, tuple)
    first = next(iter(default), "") if many else default
    kind = Path if first is None else type(first)
    defaults = [shown(default), *(f"{name}: {shown(v)}" for name, v in extra["presets"].items())]
    text = extra["help"] + (f" ({'; '.join(filter(None, defaults))})" if any(defaults) else "")
    how = {"type": kind, "nargs": "+" if many else None, "choices": extra["choices"]}
    how["metavar"] = "PATH" if kind is Path else "NAME" if kind is str else "N"
    if extra["choices"]:
        del how["metavar"]
    if kind is bool:
        how = {"action": "store_true", "default": None}
    parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)


def shown(default: object) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "" if default is None or default is False else str(getattr(default, "name", default))


def choose(parser: Parser, field: dataclasses.Field, args: argparse.Namespace, dataset: str):
    """The value that was given for a field, if it is valid, or the dataset's default."""
    extra, value = field.metadata, getattr(args, field.name, None)
    if value is None:
        return extra["presets"].get(dataset, field.default)
    name = "--" + field.name.replace("_", "-")
    if isinstance(value, Path) and not value.exists():
        parser.error(f"{name} {value}: there is no such file or folder")
    for number in value if isinstance(value, list) else [value]:
        if extra["low"] is not None and not extra["low"] <= number <= extra["high"]:
            parser.error(f"{name} {number}: must be from {extra['low']:g} to {extra['high']:g}")
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else value


def machine(device: torch.device) -> dict[str, object]:
    """What results depend on besides the settings."""
    cpu = torch.backends.cpu.get_cpu_capability()
    about = {"device": str(device), "cpu": cpu, "bf16": bf16_supported(device)}
    return about | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def run_cli(prog: str, out: Path, debug: bool, work: Callable[[], str]) -> int:
    """Do work() alone in `out`, print what it returns, and return the exit code.

    0: success. 2: the input cannot be used, or memory or disk ran out. 130: interrupted. With
    `debug`, one-line errors show their traceback. Programming errors always do.
    """
    start = time.perf_counter()
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
