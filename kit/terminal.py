"""Flags that are checked, errors of one line, and what is asked of the machine."""
import argparse
import ctypes
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kit.files import BadInput, alone_in


def between(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A number from low to high, or an error that names the flag."""
    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number from {low:g} to {high:g}")
        return value
    return parse_number


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")         # one line, without the usage


def usable_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine; try cpu") from None


def exit_code(prog: str, out: Path, work: Callable[[], str | None], see: str = "") -> int:
    """Do work(), alone in its folder, and print what it says, with the time it took. 2 and one line for what was given and cannot be
    used, or where memory or disk ran out; 130 for an interruption. What is wrong with the program itself is a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # a terminal need not know every character
    keep_freed_memory()
    began = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out):
            if (said := work()) is not None:
                print(said)
                print(f"{time.perf_counter() - began:.0f} s; see {out / see}")
    except (BadInput, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("alloc|out of memory", str(e)):
            raise                                           # torch's way to say that memory ran out, and much else
        print(f"{prog}:", " ".join(str(e).split())[:500] or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the stages that ended are kept in {out}, run again to go on", file=sys.stderr)
        return 130
    return 0


def keep_freed_memory():
    """Ask glibc not to hand large freed blocks back to the system, so that each logits tensor need not be paged in anew: a
    fifth of a DPO step on CPU. Other systems are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -2, -3):                  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def peak_memory(device: torch.device) -> int | None:
    """Bytes, of the GPU or else of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
