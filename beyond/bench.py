"""How long DPO takes here, beside the least that its matrix products could take and, where they are installed, beside TRL's
DPOTrainer and transformers' generate.

    python -m beyond.bench [--repetitions N] [--threads N] [--out FILE]

One GPT of 4 layers x 128 with 4,097 tokens and a context of 48, weights drawn at random, and 96 pairs a step: of 16 prompts with
4 completions each, all six pairs of a prompt (64 rows), and of 96 prompts with 2 completions each (192 rows, none shared). Ids are
drawn at random too, prompts of 2 to 8 tokens, responses of 20 to 40 with their end token: neither loss nor time cares what they
say. All is timed on as many threads, one task after the other in each repetition, so that a busy machine is busy for all; the first
repetition is not counted. TRL and transformers run in a process of their own, that waits while others are timed, so that train.py's
hint to the allocator is not given to them, as their users do not give it.

A step is forward, backward, clipping and the optimizer's step, on a batch that is there; here also the choice of its prompts.
"here" is dpo.py and model.py as they are, "here, fast" the same within `beyond.fast`.
The log-probabilities under pi_ref are computed once before training here (a row of its own), and in each step by TRL, as it
does unless told otherwise. TRL runs through `train()`, on the same pairs as text, from the same weights: as it comes, with
gradient checkpointing, and without. The optimizers are each one's own: SGD with momentum here, AdamW there. Ratios are of
one repetition, "core / this" the core's pairs a second over the row's, and the table has their median.
"""
import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dpo
from beyond.fast import fast, new_places
from kit import files, terminal
from model import GPT, GPTConfig, sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA, RATE = 0.1, 1e-6
HERE, FAST = "here", "here, fast"


@dataclass(frozen=True)
class Size:
    vocab_size: int = 4097          # the last is the end token
    context: int = 48
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    pairs: int = 96                 # in a step; a multiple of six
    sampled: int = 1024             # rows that are sampled at once, as by train.draw
    matrix: int = 1024              # the product whose rate is 100%: three square matrices fit in a core's share of cache


@dataclass(frozen=True)
class Task:
    what: str                                   # a row of the table has `who` and `dtype` beside it
    who: str
    dtype: str
    unit: str                                   # pairs, tokens or products
    run: Callable[[], tuple[int, float | None]]     # how many units were done, and in how many seconds if it is its own clock
    flops: float | None = None                  # that are needed


# ----------------------------------------------------------------------------- what is computed

def preferences(size: Size, P: int, K: int, seed: int) -> dpo.Preferences:
    """All pairs among K completions of P prompts, of random ids; pi_ref is still to be scored."""
    rng, T = random.Random(seed), size.context
    ids, mask = torch.full((P, K, T), size.vocab_size - 1), torch.zeros(P, K, T, dtype=torch.bool)
    for p in range(P):
        x = rng.randint(2, T // 6)
        ids[p, :, :x] = torch.tensor([rng.randrange(size.vocab_size - 1) for _ in range(x)])
        for k in range(K):
            y = rng.randint(5 * T // 12, 5 * T // 6)
            ids[p, k, x:x + y - 1] = torch.tensor([rng.randrange(size.vocab_size - 1) for _ in range(y - 1)])
            mask[p, k, x:x + y] = True                                  # the end token is there already
    pairs = torch.tensor([(p, w, l) for p in range(P) for w in range(K) for l in range(w)])
    return dpo.Preferences(ids, mask, torch.zeros(ids.shape), pairs, torch.ones(len(pairs)))


FORMULA = ("3 x (24 L C^2 for each token that is read + 4 L C for each key that it may attend to + 2 C V for each response token); "
           "what a row's beginning has in common with that of the row before is read once")


def flops(size: Size, batch: dpo.Preferences) -> float:
    """Of forward and backward, at the positions that are needed alone: no padding, no logits of prompts, no future keys, and once
    what a row's beginning has in common with that of the row before."""
    ids, mask = batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)
    keys, L, C = new_places(ids, mask) * torch.arange(1.0, size.context + 1).double(), size.n_layer, size.n_embd
    return 3 * float(24 * L * C * C * keys.count_nonzero() + 4 * L * C * keys.sum() + 2 * C * size.vocab_size * mask.sum())


def gpts(size: Size) -> tuple[GPT, GPT]:
    """pi_theta and pi_ref, which differ, so that the loss is not ln 2. Both end a response after about 5/8 of the context, as
    those do that have learned from reviews: one dimension is given to the end token alone."""
    config = GPTConfig(size.vocab_size, size.context, size.n_layer, size.n_head, size.n_embd)
    torch.manual_seed(0)
    both = GPT(config).requires_grad_(False), GPT(config).requires_grad_(False)
    for pi in both:
        pi.ln_f.weight[0], pi.ln_f.bias[0], pi.wte.weight[:, 0] = 0.0, 1.0, 0.0
        pi.wte.weight[-1, 0] = math.log(size.vocab_size / (5 * size.context / 8))
    return both[0].requires_grad_(True), both[1]


# ----------------------------------------------------------------------------- here

def scored(pi_ref: GPT, batch: dpo.Preferences) -> Tensor:
    with torch.no_grad():
        return dpo.response_logps(pi_ref, batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)).view(batch.ids.shape)


def ours(size: Size, what: dict[str, dpo.Preferences], prompts: list[list[int]], dtype: str) -> list[Task]:
    pi_theta, pi_ref = gpts(size)
    pi_theta.bf16 = pi_ref.bf16 = dtype == "bfloat16"
    generator, tasks = torch.Generator().manual_seed(0), []

    def step(how, pi: GPT, optimizer: torch.optim.Optimizer, batch: dpo.Preferences) -> tuple[int, None]:
        with how():
            list(dpo.train(pi, batch, partial(dpo.dpo, beta=BETA), optimizer, [torch.arange(len(batch.ids))], 1.0))
        return len(batch.pairs), None

    def reference(how, batch: dpo.Preferences) -> tuple[int, None]:
        with how():
            scored(pi_ref, batch)
        return len(batch.pairs), None

    def draw() -> tuple[int, None]:
        return sum(map(len, sample(pi_ref, prompts, size.vocab_size - 1, generator=generator))), None
    for (name, batch), (who, how) in itertools.product(what.items(), ((HERE, nullcontext), (FAST, fast))):
        pi = copy.deepcopy(pi_theta)
        optimizer = torch.optim.SGD(pi.parameters(), lr=RATE, momentum=0.9, fused=True)
        need = flops(size, batch)
        tasks += [Task(f"DPO step, {name}", who, dtype, "pairs", partial(step, how, pi, optimizer, batch), need),
                  Task(f"reference, {name}", who, dtype, "pairs", partial(reference, how, batch), need / 3)]
    return tasks + [Task("sampling", HERE, dtype, "tokens", draw)]


# ----------------------------------------------------------------------------- theirs

def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("trl", "transformers", "datasets", "tokenizers"))


def as_gpt2(pi: GPT):
    """transformers' GPT2LMHeadModel with these weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = pi.config
    gpt2 = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1))
    turned = {f"transformer.{name}": w.T if w.ndim == 2 and name.startswith("h.") else w for name, w in pi.state_dict().items()}
    missing, unexpected = gpt2.load_state_dict(turned, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    gpt2.tie_weights()
    return gpt2


def words(ids: Tensor) -> str:
    return "".join(f" {i}" for i in ids.tolist())


def trl_trainer(size: Size, batch: dpo.Preferences, dtype: str, folder: str, **options):
    """A DPOTrainer on these pairs, written as text whose words are the ids; it adds the end token itself."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.began
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size.vocab_size)}, unk_token=str(size.vocab_size - 1)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = str(size.vocab_size - 1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    rows = []
    for p, w, l in batch.pairs.tolist():
        start = int(batch.mask[p, w].int().argmax())
        y_w, y_l = (words(batch.ids[p, k][batch.mask[p, k]]) for k in (w, l))
        rows.append(dict(prompt=words(batch.ids[p, w, :start]), chosen=y_w, rejected=y_l))
    AcceleratorState._reset_state()                                     # or it would refuse another dtype in one process
    pi_theta, pi_ref = map(as_gpt2, gpts(size))
    config = DPOConfig(folder, use_cpu=True, bf16=dtype == "bfloat16", beta=BETA, learning_rate=RATE, max_steps=1, seed=0,
                       per_device_train_batch_size=len(rows), report_to=[], save_strategy="no", logging_strategy="no",
                       disable_tqdm=True, **options)
    trainer = DPOTrainer(pi_theta, pi_ref, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback), trainer.add_callback(clock := Clock())
    return trainer, clock


def theirs(size: Size, what: dict[str, dpo.Preferences], prompts: list[list[int]], dtype: str,
           folder: str) -> tuple[list[Task], float]:
    """TRL's steps and generate, and TRL's loss of the first batch before its first step."""
    import datasets
    import transformers
    transformers.logging.set_verbosity_error(), datasets.disable_progress_bars()
    tasks, losses = [], []

    def step(trainer, clock) -> tuple[int, float]:
        trainer.train()
        return len(trainer.train_dataset), clock.seconds
    for name, batch in what.items():
        for who, options in (("TRL", {}), ("TRL, no checkpointing", dict(gradient_checkpointing=False))):
            trainer, clock = trl_trainer(size, batch, dtype, folder, **options)
            with torch.no_grad():
                losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).item())
            tasks.append(Task(f"DPO step, {name}", who, dtype, "pairs", partial(step, trainer, clock)))
    gpt2, end, longest = as_gpt2(gpts(size)[1]).eval(), size.vocab_size - 1, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(x)) + x for x in prompts])
    seen = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts])

    def generate() -> tuple[int, None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = gpt2.generate(ids, attention_mask=seen, do_sample=True, top_k=0, max_length=size.context, pad_token_id=end)
        return int(((out[:, longest:] == end).cumsum(1).cumsum(1) <= 1).sum()), None
    return tasks + [Task("sampling", "transformers", dtype, "tokens", generate)], losses[0]


def serve(pipe, size: Size, what: dict[str, dpo.Preferences], prompts: list[list[int]], threads: int):
    """A process's work: make their tasks, tell what they are, and time the one whose number comes, until -1 comes."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    tasks, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            more, loss = theirs(size, what, prompts, dtype, folder)
            tasks, losses = tasks + more, [*losses, loss]
        pipe.send(([replace(task, run=None) for task in tasks], losses[0]))
        while (i := pipe.recv()) >= 0:
            pipe.send(timed(tasks[i]))


@contextmanager
def their_process(*work) -> Iterator[tuple[list[Task], float]]:
    """Their tasks, which run in a process of their own, and their loss in float32. Errors: BadInput if it ends early."""
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe()
    process = spawn.Process(target=serve, args=(end, *work), daemon=True)
    process.start()
    end.close()

    def ask(i: int) -> tuple[int, float]:
        pipe.send(i)
        return pipe.recv()
    try:
        tasks, loss = pipe.recv()
        yield [replace(task, run=partial(ask, i)) for i, task in enumerate(tasks)], loss
        pipe.send(-1)
        process.join()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise files.BadInput("the process of TRL and transformers ended before it was done") from None
    finally:
        process.kill()


# ----------------------------------------------------------------------------- the clock

def timed(task: Task) -> tuple[int, float]:
    """Units done, and seconds."""
    began = time.perf_counter()
    units, own = task.run()
    return units, own or time.perf_counter() - began


def matmul(size: Size, dtype: str) -> Task:
    a = torch.randn(size.matrix, size.matrix).to(DTYPES[dtype])
    return Task(f"five products of {size.matrix} x {size.matrix}", HERE, dtype, "products",
                lambda: (len([a @ a for _ in range(5)]), None), 5 * 2 * size.matrix ** 3)


def run(size: Size, repetitions: int) -> dict:
    """Every task once in each repetition, and one repetition before, which is not counted."""
    named = {f"{size.pairs} pairs of {size.pairs * 2 // 3} completions": preferences(size, size.pairs // 6, 4, 1),
             f"{size.pairs} pairs of {size.pairs * 2} completions": preferences(size, size.pairs, 2, 2)}
    rng, (pi_theta, pi_ref) = random.Random(3), gpts(size)
    prompts = [[rng.randrange(size.vocab_size - 1) for _ in range(rng.randint(2, size.context // 6))] for _ in range(size.sampled)]
    what = {name: replace(batch, pi_ref=scored(pi_ref, batch)) for name, batch in named.items()}
    first = next(iter(what.values()))
    loss = dict(here=dpo.dpo(scored(pi_theta, first), first, BETA)[0].mean().item(), trl=None, same=None)
    versions = dict(torch=torch.__version__)
    tasks = [task for dtype in DTYPES for task in (matmul(size, dtype), *ours(size, what, prompts, dtype))]
    with ExitStack() as stack:
        if installed():
            versions |= {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
            more, loss["trl"] = stack.enter_context(their_process(size, what, prompts, torch.get_num_threads()))
            tasks, loss["same"] = tasks + more, abs(loss["trl"] - loss["here"]) <= 1e-4
        done: dict[Task, list[tuple[int, float]]] = {task: [] for task in tasks}
        for _ in tqdm(range(repetitions + 1), desc="repetitions"):
            for task, runs in done.items():
                runs.append(timed(task))
    return dict(size=asdict(size), threads=torch.get_num_threads(), repetitions=repetitions, versions=versions, flops=FORMULA,
                loss=loss, measured=summaries({task: runs[1:] for task, runs in done.items()}))


def summaries(done: dict[Task, list[tuple[int, float]]]) -> list[dict]:
    """For each task its units a second; beside them the share of the matmul rate, and how many times as fast it is here, by the
    core and within `beyond.fast`."""
    speed = {(t.what, t.who, t.dtype): [units / seconds for units, seconds in runs] for t, runs in done.items()}
    flops = {t.dtype: t.flops / statistics.median(seconds for _, seconds in runs) for t, runs in done.items() if t.unit == "products"}
    found = []
    for t, runs in done.items():
        each = speed[t.what, t.who, t.dtype]
        times = {who: spread([ours / one for ours, one in zip(speed[t.what, who, t.dtype], each)])
                 for who in (HERE, FAST) if t.who not in (FAST, who) and (t.what, who, t.dtype) in speed}
        took = statistics.median(seconds for _, seconds in runs)
        found.append(dict(what=t.what, who=t.who, dtype=t.dtype, unit=t.unit, seconds=[seconds for _, seconds in runs],
                          units=runs[0][0], per_second=spread(each), flops=t.flops, flops_per_second=t.flops and t.flops / took,
                          utilisation=t.flops and t.flops / took / flops[t.dtype],
                          ratio=times.get(HERE), ratio_fast=times.get(FAST)))
    return found


def spread(values: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def table(results: dict) -> str:
    """Rows of markdown; times are of a step, a pass over a batch, or a batch of samples."""
    lines = ["| what | who | dtype | ms | a second | of the matmul rate | core / this | fast / this |", "|---" * 8 + "|"]
    for m in results["measured"]:
        ms = [1000 * s for s in m["seconds"]]
        lines.append(f"| {m['what']} | {m['who']} | {m['dtype']} | {statistics.median(ms):,.0f} ({min(ms):,.0f} to {max(ms):,.0f}) | "
                     + (f"{m['flops_per_second'] / 1e9:,.0f} GFLOP" if m["unit"] == "products" else
                        f"{m['per_second']['median']:,.0f} {m['unit']}")
                     + (f" | {m['utilisation']:.0%} | " if m["utilisation"] else " | | ")
                     + " | ".join("{median:.1f} ({least:.1f} to {most:.1f})".format(**m[each]) if m[each] else ""
                                  for each in ("ratio", "ratio_fast")) + " |")
    loss = results["loss"]
    said = "TRL is not installed: nothing to compare with." if loss["trl"] is None else (
        f"Loss on the same weights: {loss['here']:.6f} here, {loss['trl']:.6f} TRL's, the same within 1e-4: "
        + ("yes." if loss["same"] else "NO."))
    named = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join((*lines, "", said, f"{results['threads']} threads, {results['repetitions']} repetitions: median (least to "
                      f"most); {named}.", f"FLOPs of a step: {results['flops']}."))


# ----------------------------------------------------------------------------- the command line

def main(argv: list[str], size: Size = Size()) -> int:
    parser = terminal.Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repetitions", type=terminal.between(1, 1000, int), default=5, metavar="N", help="that are counted (default %(default)s)")
    add("--threads", type=terminal.between(1, 1024, int), default=torch.get_num_threads(), metavar="N",
        help="of torch, for all alike (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="where the results are written, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    terminal.keep_freed_memory()
    try:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
        results = run(size, args.repetitions)
        if args.out:
            files.write(args.out, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    except (files.BadInput, OSError, MemoryError) as e:
        print("bench.py:", " ".join(str(e).split())[:500] or "out of memory", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
