"""Flags that are checked, errors of one line, and what is asked of the machine."""
import argparse
import ctypes
import functools
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
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
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low:g} to {high:g}")
        return value
    return parse_number


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")         # one line, without the usage


def usable_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine; try cpu") from None


EPILOG = """examples:
  train.py                                                  the toy world: forty seconds on two cores
  train.py --data imdb --imdb aclImdb_v1.tar.gz             IMDb: a quarter of an hour
  train.py --data imdb --labels argmax --seed 1 --out out1  labelled as in the paper, another seed
  train.py --data pairs.jsonl --beta 0.1 --context 512      preferences of your own
  train.py --show                                           what a preference looks like, and which tokens count

Under --out it writes figure.png, samples.html and samples.txt, results.json, triplets.jsonl, and the models reference.pt and
dpo-BETA.pt. Run again, finished stages are kept; a changed setting redoes what depends on it. Nothing else is written but
downloads and matplotlib's list of fonts: to ~/.cache/dpo, or the folder that the environment variable DPO_CACHE names.
Exit codes: 0; 2 for an input that cannot be used, said in one line; 130 if interrupted."""


def flags(doc: str, toy: object, imdb: object) -> Parser:
    """What `train.py --help` shows, with the numbers of both worlds' settings."""
    count = between(1, 10 ** 7, int)
    parser = Parser(prog="train.py", usage="train.py [flags]", description=doc, epilog=EPILOG, allow_abbrev=False,
                    formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27))

    def number(group, name: str, kind: Callable, text: str):
        both = (str(getattr(settings, name.replace("-", "_"))).strip("()").replace(",", "") for settings in (toy, imdb))
        group.add_argument(f"--{name}", type=kind, metavar="N", nargs="+" if name == "beta" else None,
                           help=text + " (toy {}, imdb {})".format(*both))
    g = parser.add_argument_group("what to run")
    g.add_argument("--data", default="toy", metavar="{toy,imdb,PATH}", help="the grammar's reviews (default), IMDb's, or "
                   "preferences of your own: one JSON object a line with the strings prompt, chosen, rejected (then IMDb's "
                   "numbers, but beta 0.1, context 256, steps 500)")
    g.add_argument("--imdb", metavar="PATH", help="the IMDb archive or its unpacked folder; if not given, it is "
                   "downloaded once (84 MB)")
    number(g, "beta", between(1e-4, 1e4), "the price of a nat of KL; one DPO run each")
    number(g, "seed", between(0, 2 ** 32 - 1, int), "of everything that is drawn")
    g.add_argument("--show", action="store_true", help="print one triplet token by token, its mask in brackets, and stop")
    g = parser.add_argument_group("pi_ref")
    g.add_argument("--init", metavar="PATH", help="a checkpoint to start from: reference.pt or dpo-BETA.pt of another run, or "
                   "one of beyond/gpt2.py. With preferences of your own it is pi_ref as it is, unless --steps asks for "
                   "fine-tuning")
    g.add_argument("--tokenizer", choices=("reviews", "gpt2"), help="learned from the texts (default), or GPT-2's, which "
                   "tiktoken downloads once")
    number(g, "vocab-size", between(257, 10 ** 6, int), "of the tokenizer that is learned: 256 bytes, the end token, "
           "and what is merged")
    number(g, "context", between(8, 65536, int), "tokens that the model sees, prompt and response together")
    number(g, "reviews", count, "that it is fine-tuned on")
    number(g, "steps", between(0, 10 ** 7, int), "of fine-tuning")
    g = parser.add_argument_group("preferences and DPO")
    number(g, "prompts", count, "that preferences are collected on")
    g.add_argument("--labels", choices=("bt", "soft", "argmax"), help="drawn from Bradley-Terry (default), their "
                   "expectation, or the paper's")
    number(g, "batch", count, "prompts in a step")
    number(g, "rate", between(1e-12, 1e12), "peak learning rate at beta 1; it is scaled by beta^-1.25")
    g = parser.add_argument_group("evaluation")
    number(g, "held-out", between(2, 10 ** 5, int), "prompts")
    number(g, "samples", between(8, 10 ** 4, int), "of pi_ref for each, a multiple of 4; more extend the trusted curve")
    g = parser.add_argument_group("machine")
    g.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, mps (default: %(default)s)")
    g.add_argument("--out", type=Path, default=Path("out"), help="the folder of everything that is written "
                   "(default: %(default)s)")
    return parser


def check(parser: Parser, args: argparse.Namespace, own: bool):
    """Refuse flags that have no meaning together, or would overwrite what is given; `own` if --data is one's own."""
    for name, path in dict(data=args.data if own else None, init=args.init).items():
        if path and Path(path).resolve().parent == args.out.resolve():
            parser.error(f"--{name} {path} lies in --out, where this run may overwrite it: name another --out")
    if args.imdb and args.data != "imdb":
        parser.error("--imdb PATH needs --data imdb")
    for name in ("labels", "reviews", "prompts", "samples"):
        if own and getattr(args, name) is not None:
            parser.error(f"--{name} has no meaning for preferences of your own: leave it out")
    for name in ("tokenizer", "vocab_size"):
        if args.init and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no meaning beside --init, which brings its tokenizer: leave it out")
    if args.tokenizer == "gpt2" and args.vocab_size:
        parser.error("--vocab-size has no meaning beside --tokenizer gpt2: leave it out")
    if own and not Path(args.data).exists():
        parser.error(f"--data {args.data}: No such file; it is toy, imdb, or a file of preferences")


def exit_code(prog: str, out: Path, work: Callable[[], str | None], see: str = "") -> int:
    """Do work(), alone in its folder, and print what it says, with the time it took. 2 and one line for what was given and
    cannot be used, or where memory or disk ran out; 130 for an interruption. A mistake of the program is a traceback."""
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


HAND_BACK = 5.0         # seconds


@functools.cache
def keep_freed_memory():
    """Ask glibc not to hand large freed blocks back to the system at once, so that each logits tensor need not be paged in anew,
    but every few seconds: not all of them can be used again (seen with 2.36), and a run whose tensors differ in size would
    grow by gigabytes. Other systems are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -2, -3):                  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)

        def hand_back():
            while True:
                time.sleep(HAND_BACK)
                libc.malloc_trim(0)
        threading.Thread(target=hand_back, daemon=True).start()


def peak_memory(device: torch.device) -> int | None:
    """Bytes, of the GPU or else of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
