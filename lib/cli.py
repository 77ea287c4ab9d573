"""The command line: flags from a dataclass, one-line errors, and exit codes."""

import argparse
import dataclasses
import os
import platform
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


def existing_path(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file or folder")
    return Path(text)


def number(kind: type, low: float, high: float) -> Callable:
    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
        return value

    convert.__name__ = kind.__name__  # for argparse's messages
    return convert


def parse(prog: str, doc: str, settings: type, argv: list[str]):
    """The command line as a namespace, and as `settings`, a dataclass of fields made by `flag`.

    Each field with a help text becomes a flag. Its default depends on --data.
    """
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
    parser = Parser(prog, f"{prog} [flags]", doc, formatter_class=style, allow_abbrev=False)
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
    values = {}
    for field in fields:
        presets, value = field.metadata["presets"], getattr(args, field.name, None)
        default = presets.get(dataset, field.default)
        if dataset == "imdb" and getattr(args, "from_scratch", None):
            default = presets.get("imdb_from_scratch", default)
        values[field.name] = default if value is None else value
        if isinstance(value, list):
            values[field.name] = tuple(dict.fromkeys(value))
    return args, settings(**values)


def add_flag(parser: Parser, field: dataclasses.Field):
    default, extra, how = field.default, field.metadata, {}
    if isinstance(default, tuple):
        how["nargs"] = "+"
    first = next(iter(default), "") if isinstance(default, tuple) else default
    kind = type(first)
    if kind is bool:
        how = {"action": "store_true", "default": None}
    elif extra["choices"]:
        how["choices"] = extra["choices"]
    elif extra["low"] is not None:
        kind = int if first is None else kind
        how |= {"type": number(kind, extra["low"], extra["high"]), "metavar": "N"}
    else:
        how |= {"type": str, "metavar": "NAME"} if kind is str else {"type": existing_path}
    presets = ((name, shown(value)) for name, value in extra["presets"].items())
    defaults = [shown(default), *(f"{name}: {value}" for name, value in presets if value)]
    text = extra["help"] + (f" ({'; '.join(filter(None, defaults))})" if any(defaults) else "")
    parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)


def shown(default: object) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "" if default is None or default is False else os.path.basename(str(default))


def machine(device: torch.device) -> dict[str, object]:
    """What results depend on besides the settings."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    about = {"device": str(device), "processor": (names or [platform.processor()])[0]}
    about |= {"cpu": torch.backends.cpu.get_cpu_capability(), "bf16": bf16_supported(device)}
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
