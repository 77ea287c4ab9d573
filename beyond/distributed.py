"""train.py's experiment on several processes, in parts of a batch that fit into memory, at sizes that need it.

    torchrun --nproc_per_node=N -m beyond.distributed [train.py's flags]
             [--size gpt2] [--micro-batch M] [--checkpoint-activations] [--compile]
    python -m beyond.distributed ...                    one process

Why parts are right. A loss L sees the parameters theta only through the values v_1 ... v_B that the model gives the texts of
its batch, each by itself: log pi_theta of text i. Therefore

    dL/dtheta = sum_i dL/dv_i dv_i/dtheta

is a sum over texts, and may be taken over parts of them: side by side (processes) or one after the other (micro-batches).
Each process computes the v_i of its share, all of them get all v, every one computes the *whole* L, goes back through its own
v_i, and the gradients are summed. L is never split, so no mean of means can be wrong: weights, gradient norm and
records are train.py's own, and losses that couple a batch's pairs are right as well. A micro-batch keeps v alone on
the way forward and is computed again on the way back, which costs one more forward pass.

So this file replaces, for the duration, what runs a model on texts: `dpo.response_logps`, `dpo.sequence_kl`,
`train.token_nll` and `train.draw`; and `files.Stages`, so that rank 0 alone reads and writes. All else is train.py, by every
process at once. Samples are drawn in batches, each by one process with random numbers of its own: no result depends
on the number of processes, but for rounding.
"""
import contextlib
import dataclasses
import datetime
import functools
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
# Imported before there is a group: defaults of its functions would keep the group for good, and gloo's threads with it, which
# may need the interpreter while it ends, and abort (seen with torch 2.13).
import torch.distributed.nn
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import dpo
import model
import train
from kit import files, report, terminal
from kit.files import BadInput
from model import GPT

SIZES = {   # --size: what is not given by a flag of its own
    "small": dict(n_layer=8, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, tokenizer="gpt2", prompts=25_000),     # 124 M; the paper's count
}


@dataclass(frozen=True)
class Settings(train.Settings):
    processes: int = 1
    micro_batch: int | None = None          # texts at a time on each process; all if None
    checkpoint_activations: bool = False
    compile: bool = False


# ----------------------------------------------------------------------------- parts of a batch

def summed(value: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class SumForward(torch.autograd.Function):
    """v -> its sum over processes. All of them go on to the same L, so that backwards dL/dv is there already."""

    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        return summed(v.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class SumBackward(torch.autograd.Function):
    """theta -> theta; backwards, the sum over processes of each one's dL/dtheta, zero where its share is empty."""

    @staticmethod
    def forward(ctx, *theta: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in theta)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        flat = summed(torch.cat([grad.flatten() for grad in grads]))        # one message
        return tuple(part.view_as(grad) for part, grad in zip(flat.split([grad.numel() for grad in grads]), grads))


class Applied(nn.Module):
    """f(pi, ...) as a module's forward, which `functional_call` can give other tensors for pi's parameters."""

    def __init__(self, f: Callable, pi: nn.Module):
        super().__init__()
        self.f, self.pi = f, pi

    def forward(self, *args: Tensor) -> Tensor:
        return self.f(self.pi, *args)


def in_parts(f: Callable[..., Tensor], micro_batch: int | None, *rows: Tensor) -> Tensor:
    """f(*rows) for tensors of B rows, if f treats each row by itself: (B, ...) on every process. Each computes every N-th
    row, perhaps none, at most `micro_batch` at a time."""
    B, share = len(rows[0]), slice(dist.get_rank(), None, dist.get_world_size())
    parts = list(zip(*(v[share].split(micro_batch or max(B, 1)) for v in rows)))
    if len(parts) > 1:
        f = partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)
    values = torch.cat([f(*part) for part in parts])
    whole = values.new_zeros(B, *values.shape[1:])
    whole[share] = values
    return SumForward.apply(whole)


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def sharded(micro_batch: int | None = None, checkpoint_activations: bool = False, compile: bool = False) -> Iterator[None]:
    """Within, models run on shares and parts of texts, and dpo.train, train.fine_tune, train.optimise, train.score and
    train.evaluate give what they give without, on every process; all must be called by all, with the same arguments. With
    `compile` blocks are compiled where they are called without a cache. A trace serves every block, at any length, but there are
    several: with gradients and without, of one text and of more, of parameters and of what stands for them."""
    logps, kls, one_draw, block = dpo.response_logps, dpo.sequence_kl, train.draw, model.Block.forward
    without_cache = torch.compile(block, dynamic=True) if compile else block
    traces = replaced(torch._dynamo.config, recompile_limit=64) if compile else contextlib.nullcontext()

    def response_logps(pi: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        names, theta = zip(*pi.named_parameters(prefix="pi"))
        f = partial(functional_call, Applied(logps, pi), dict(zip(names, SumBackward.apply(*theta))))
        return in_parts(lambda *part: f(part), micro_batch, ids, mask)

    def sequence_kl(pi_theta: nn.Module, pi_ref: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return in_parts(lambda *part: torch.stack(kls(pi_theta, pi_ref, *part), 1), micro_batch, ids, mask).unbind(1)

    def token_nll(pi: GPT, batch: list[list[int]], reduction: str = "mean") -> Tensor:
        ids = train.padded(batch).to(pi.wte.weight.device)
        mask = (ids >= 0) & (torch.arange(ids.size(1), device=ids.device) > 0)
        nll = -response_logps(pi, ids.clamp(min=0), mask).sum()
        return nll / mask.sum() if reduction == "mean" else nll

    def draw(pi: GPT, prompts: list[list[int]], settings: train.Settings, tokenizer, purpose: str) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches, drawn = train.in_groups(order, 1024), {}
        for k in train.tqdm(range(dist.get_rank(), len(batches), dist.get_world_size()), desc=purpose):
            with replaced(train, tqdm=partial(tqdm, disable=True)):
                ys = one_draw(pi, [prompts[i] for i in batches[k]], settings, tokenizer, purpose + f", batch {k}" * (k > 0))
            drawn |= zip(batches[k], ys)
        shares = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, drawn)
        responses = {i: y for share in shares for i, y in share.items()}
        return [responses[i] for i in range(len(prompts))]

    def forward(self: model.Block, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        if cache is not None:
            return block(self, x, cache, start)
        if checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(without_cache, self, x, use_reentrant=False, preserve_rng_state=False)
        return without_cache(self, x)

    with (traces, replaced(dpo, response_logps=response_logps, sequence_kl=sequence_kl), replaced(model.Block, forward=forward),
          replaced(train, token_nll=token_nll, draw=draw)):
        yield


# ----------------------------------------------------------------------------- rank 0 reads and writes

def from_first(value: object = None) -> object:
    """Rank 0's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Stages(files.Stages):
    """train.Stages, kept by rank 0, whose results all processes get. `world` is made by it alone, the others by all."""

    def value(self, need: str) -> object:
        return super().value(need), Path(__file__).read_text(encoding="utf-8")

    def __call__(self, name: str, needs: str, make: Callable[[], object]):
        @functools.wraps(make)
        def by_all():
            from_first("make")
            return make()
        if dist.get_rank() == 0:
            return from_first(super().__call__(name, needs, make if name == "world" else by_all))
        if (found := from_first()) == "make":
            make()
            found = from_first()
        return found


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is written, printed or drawn."""
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), replaced(data, write=lambda *_: None),
          replaced(report, write_report=lambda *_: None), replaced(train, tqdm=partial(tqdm, disable=True))):
        yield


# ----------------------------------------------------------------------------- the command line

def join() -> dist.Store:
    """Into the group of processes that torchrun's variables tell of, or a group of one. Objects and CPU tensors go through
    gloo, a GPU's through nccl. The store outlasts a process that fails (torchrun keeps it)."""
    if "RANK" in os.environ:
        store, rank, N = next(dist.rendezvous("env://"))
    else:
        store, rank, N = dist.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=N,
                            timeout=datetime.timedelta(hours=2))        # rank 0 may be long in making the world
    return store


def own_device(device: torch.device) -> torch.device:
    """A process's own GPU, if several processes use GPUs. Errors: BadInput if there are too few."""
    if dist.get_world_size() == 1 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    if device.type != "cuda" or local >= torch.cuda.device_count():
        raise BadInput(f"--device {device.type}: several processes need a GPU each, or --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def parse(argv: list[str]) -> tuple:
    parser = terminal.Parser(prog="distributed.py", description=__doc__, allow_abbrev=False,
                          formatter_class=train.argparse.RawDescriptionHelpFormatter,
                          epilog="All other flags are train.py's: see python train.py --help.")
    add = parser.add_argument
    add("--size", choices=SIZES, help="small: 8 layers of 384; gpt2: 12 of 768, GPT-2's tokenizer, 25,000 prompts (124 M parameters)")
    add("--micro-batch", type=terminal.between(1, 10 ** 7, int), metavar="N", help="texts (reviews, or responses) that a process "
        "has in memory at once (default: all of its share)")
    add("--checkpoint-activations", action="store_true", help="keep each block's input alone, and compute the rest again")
    add("--compile", action="store_true", help="compile the blocks (torch.compile); a GPU needs Triton for it, a CPU a C++ compiler")
    own, rest = parser.parse_known_args(argv)
    args, settings = train.parse(rest)
    size = {name: value for name, value in SIZES.get(own.size, {}).items() if getattr(args, name, None) is None}
    return args, Settings(**dataclasses.asdict(settings) | size, processes=dist.get_world_size(), micro_batch=own.micro_batch,
                          checkpoint_activations=own.checkpoint_activations, compile=own.compile)


def experiment(args, settings: Settings):
    """train.run, or its --show, on every process."""
    began, device = time.perf_counter(), own_device(args.device)
    alone = contextlib.nullcontext()
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        alone = files.alone_in(args.out)
    parts = sharded(settings.micro_batch, settings.checkpoint_activations, settings.compile)
    with alone, parts, replaced(train, Stages=Stages):
        if args.show:
            train.prepare(settings, args.out, device, show=True)
            return
        results = train.run(settings, args.out, device)
    print(report.summary(results))
    print(f"{time.perf_counter() - began:.0f} s, {settings.processes} process{'es' * (settings.processes > 1)}; see "
          f"{args.out / 'figure.png'}, and what lies beside it")


def explain(e: BaseException, args) -> int:
    """One line about what went wrong, or all that is known where it is a mistake of the program's; the exit code."""
    said = " ".join(str(e).split())[:500]
    if isinstance(e, KeyboardInterrupt):
        said, code = f"interrupted; the stages that ended are kept in {args.out}, run again to go on", 130
    elif isinstance(e, RuntimeError) and re.search("onnection (closed|reset)|roken pipe|remote process|peer", said):
        said, code = "another process of this run ended; the stages that ended are kept, run again to go on", 2
    elif isinstance(e, RuntimeError) and (missing := re.search(".*working (C|triton).*", str(e))):
        said, code = f"--compile: {missing[0]}", 2
    elif isinstance(e, (BadInput, OSError, MemoryError)) or isinstance(e, RuntimeError) and re.search("alloc|out of memory", said):
        said, code = said or "out of memory", 2
    else:
        traceback.print_exception(e)
        return 1
    print(f"distributed.py: {said}", file=sys.stderr, flush=True)
    return code


def main(argv: list[str]) -> int:
    """Whoever fails first says why; the others lose their connection to it, and end without a word."""
    terminal.keep_freed_memory()
    store, args = join(), None
    first = dist.get_rank() == 0
    try:
        with contextlib.nullcontext() if first else silent():
            try:
                found = from_first(parse(argv) if first else None)
            except SystemExit as e:                     # a flag, or --help: the parser has spoken
                found = from_first(e.code)
            if isinstance(found, int):
                return found
            args, settings = found
            experiment(args, settings)
    except (Exception, KeyboardInterrupt) as e:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)            # torchrun sends one more than the terminal
        except KeyboardInterrupt as late:                           # that had to wait until a collective failed
            e = late
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 130 if isinstance(e, KeyboardInterrupt) else 2
        with contextlib.suppress(dist.DistError):       # the store is gone with rank 0, which failed first then
            if store.add("failures", 1) == 1:
                code = explain(e, args)
        if dist.get_world_size() > 1:                   # at once: taking leave of a broken group may abort
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        return code
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
