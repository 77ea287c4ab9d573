"""Time a DPO step and sampling, side by side with TRL and transformers where they are installed.

    python -m beyond.bench [--repetitions N] [--out FOLDER]

A DPO step (forward, backward, clipping, optimizer) is timed with `dpo.response_logps`, with
`lib.inference.fast_response_logps`, which train.py uses, and with TRL's DPOTrainer; sampling with
`model.sample` and with transformers' `generate`. All have the same random weights and data: 96
preferences between 4 completions of each of 16 prompts.

Every repetition runs each task once, and ratios are taken within it, so that load on the machine
affects all tasks alike. The table has medians. "share of peak" is a task's FLOPs per second,
without counting padding, relative to a large matrix product. Dtypes that the processor does not
support natively are skipped. OMP_NUM_THREADS sets the number of threads.

TRL evaluates pi_ref in each step, and each completion once for each of its pairs. Here pi_ref is
computed once, before training, and completions are shared by their pairs.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dpo
from beyond.page import machine
from lib import cli
from lib.io import atomic_write
from lib.inference import fast_response_logps
from lib.optim import bf16_supported
from model import GPT, GPTConfig, sample

CONFIG = GPTConfig(vocab_size=4097, context=48, n_layer=4, n_head=4, n_embd=128)
PROMPTS, K = 16, 4
BETA, LR = 0.1, 1e-6
N_MATMUL = 1024
SAMPLES = 8  # of each completion's prompt


@dataclass(frozen=True)
class Task:
    what: str  # "DPO step", "sampling" or "matmul"
    who: str
    dtype: str
    run: Callable[[], float]  # returns units done per second
    unit: str
    flops: float | None = None  # needed for each unit
    loss: float | None = None  # of the first step, to check that all compute the same


# ------------------------------------------------- data and models


def random_preferences(config: GPTConfig, prompts: int) -> dpo.Preferences:
    """All pairs between K random completions of random prompts."""
    T, end, rows = config.context, config.vocab_size - 1, torch.arange(prompts * K)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(2, T // 6, (prompts, 1), generator=g).repeat_interleave(K, 0)
    y = torch.randint(5 * T // 12, 5 * T // 6, (len(rows), 1), generator=g)
    ids, place = torch.randint(end, (len(rows), T), generator=g), torch.arange(T)
    ids = torch.where(place < x, ids[rows // K * K], ids)  # completions share their prompt
    ids[place >= x + y - 1] = end
    mask = (place >= x) & (place < x + y)
    pairs = torch.tensor(list(itertools.combinations(range(K), 2)))
    pairs = (pairs + K * torch.arange(prompts)[:, None, None]).flatten(0, 1)
    with torch.no_grad():
        ref_logps = dpo.response_logps(random_gpt(config, seed=1), ids, mask)
    return dpo.Preferences(ids, mask, ref_logps, rows // K, pairs, torch.ones(len(pairs)))


def step_flops(config: GPTConfig, batch: dpo.Preferences) -> float:
    """FLOPs of forward and backward without padding: 3 times the sum, over rows of t tokens, of

    24 L C^2 t  +  4 L C t (t + 1) / 2  +  2 C V for each token of the response.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    t = (batch.mask * torch.arange(batch.mask.size(1))).amax(1).double()  # not the last token
    blocks = 24 * L * C * C * t + 2 * L * C * t * (t + 1)
    return 3 * float(blocks.sum() + 2 * C * V * batch.mask.sum())


def random_gpt(config: GPTConfig, dtype: str = "float32", seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    pi = GPT(config)
    pi.bf16 = dtype == "bfloat16"
    return pi


# ------------------------------------------------- tasks


def clocked(work: Callable[[], int | None], units: int | None = None) -> float:
    """Units per second of work(), which returns their number if `units` does not give it."""
    start = time.perf_counter()
    done = work()
    return (units or done) / (time.perf_counter() - start)


def our_tasks(config: GPTConfig, batch: dpo.Preferences, prompts: list, dtype: str) -> list[Task]:
    n, flops, end = len(batch.pairs), step_flops(config, batch), config.vocab_size - 1
    a = torch.randn(N_MATMUL, N_MATMUL).to(getattr(torch, dtype))
    multiply = partial(clocked, lambda: [a @ a for _ in range(5)], 5)
    tasks = [Task("matmul", "torch", dtype, multiply, "products", 2.0 * N_MATMUL**3)]
    for who, logps_fn in (("core", dpo.response_logps), ("train.py", fast_response_logps)):
        pi, loss = random_gpt(config, dtype), partial(dpo.dpo, beta=BETA)
        optimizer = torch.optim.SGD(pi.parameters(), LR, momentum=0.9, fused=True)
        batches = itertools.repeat(batch.prompt.unique())
        training = dpo.train(pi, batch, loss, optimizer, batches, 1.0, logps_fn)
        first_loss = next(training)["loss"].item()
        step = partial(clocked, partial(next, training), n)
        tasks.append(Task("DPO step", who, dtype, step, "pairs", flops / n, first_loss))
    pi = random_gpt(config, dtype)
    draw = partial(clocked, lambda: int(sample(pi, prompts, end)[1].sum()))
    return [*tasks, Task("sampling", "train.py", dtype, draw, "tokens")]


def as_gpt2(pi: GPT, folder: str):
    """The same model, as transformers' GPT2LMHeadModel."""
    from transformers import GPT2LMHeadModel

    from beyond.gpt2 import to_published
    from lib.checkpoint import to_checkpoint

    to_published(to_checkpoint(pi, None), Path(folder))
    return GPT2LMHeadModel.from_pretrained(folder)


def their_tasks(config, batch: dpo.Preferences, prompts: list, dtype: str, folder: str):
    """TRL's step and transformers' `generate`, where they are installed."""
    tasks, bf16 = [], dtype == "bfloat16"
    pi, end = random_gpt(config, dtype), config.vocab_size - 1
    if importlib.util.find_spec("trl"):
        trainer = trl_trainer(pi, batch, bf16, folder)

        def step() -> float:
            trainer.train()
            return len(batch.pairs) / trainer.clock.seconds

        first_loss = trainer.train().training_loss
        tasks.append(Task("DPO step", "TRL", dtype, step, "pairs", loss=first_loss))
    if importlib.util.find_spec("transformers"):
        gpt2, width = as_gpt2(pi, folder).eval(), max(map(len, prompts))
        ids = torch.tensor([[end] * (width - len(x)) + x for x in prompts])
        seen = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
        how = {"do_sample": True, "top_k": 0, "max_length": config.context, "pad_token_id": end}

        def generate() -> int:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = gpt2.generate(ids, attention_mask=seen, **how)[:, width:]
            return int(((out == end).cumsum(1).cumsum(1) <= 1).sum())

        run = partial(clocked, generate)
        tasks.append(Task("sampling", "transformers", dtype, run, "tokens"))
    return tasks


def trl_trainer(pi: GPT, batch: dpo.Preferences, bf16: bool, folder: str):
    """A DPOTrainer for one step on all pairs. Its tokenizer has a word for each id."""
    import datasets
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.start

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    V = pi.config.vocab_size
    words = models.WordLevel({str(i): i for i in range(V)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": str(V - 1), "pad_token": str(V - 1)}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    gpt2, reference = (as_gpt2(each, folder) for each in (pi, random_gpt(pi.config, seed=1)))
    steps = {"max_steps": 1, "per_device_train_batch_size": len(batch.pairs)}
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    how = {"use_cpu": True, "bf16": bf16, "gradient_checkpointing": False}
    config = DPOConfig(folder, beta=BETA, learning_rate=LR, **steps, **quiet, **how)
    rows = datasets.Dataset.from_list(as_text(batch))
    trainer = DPOTrainer(gpt2, reference, config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.clock = Clock()
    trainer.add_callback(trainer.clock)
    return trainer


def as_text(batch: dpo.Preferences) -> list[dict]:
    """The pairs as texts, whose words are token ids. TRL adds the end token."""

    def text(ids: torch.Tensor) -> str:
        return "".join(f" {i}" for i in ids.tolist())

    rows = []
    for w, l in batch.pairs.tolist():
        x = batch.ids[w, : int(batch.mask[w].int().argmax())]
        y_w, y_l = (text(batch.ids[row][batch.mask[row]][:-1]) for row in (w, l))
        rows.append({"prompt": text(x), "chosen": y_w, "rejected": y_l})
    return rows


# ------------------------------------------------- measurement and report


def measure(config: GPTConfig, prompts: int, samples: int, repetitions: int) -> dict:
    """Run all tasks, once in each repetition. The first repetition is not counted."""
    batch = random_preferences(config, prompts)
    lengths = batch.mask.int().argmax(1).tolist()
    x = [ids[:n].tolist() for ids, n in zip(batch.ids, lengths, strict=True)] * samples
    skipped = [] if bf16_supported(torch.device("cpu")) else ["bfloat16"]
    tasks = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32",) if skipped else ("float32", "bfloat16"):
            tasks += our_tasks(config, batch, x, dtype)
            tasks += their_tasks(config, batch, x, dtype, folder)
        repeat = tqdm(range(repetitions + 1), "repetitions")
        rates = [[task.run() for task in tasks] for _ in repeat]
    rows = summarise(tasks, np.array(rates[1:]))
    return {"rows": rows, "skipped": skipped, **machine(torch.device("cpu"))}


def summarise(tasks: list[Task], rates: np.ndarray) -> list[dict]:
    """One row for each task, from its units per second in each repetition, (repetitions, tasks).

    ratio: train.py's rate divided by the task's. share: the task's rate divided by that of a matrix
    product, in FLOPs.
    """
    column = {(task.what, task.who, task.dtype): rates[:, i] for i, task in enumerate(tasks)}
    rows = []
    for task in tasks:
        own = column[task.what, task.who, task.dtype]
        row = {"what": task.what, "who": task.who, "dtype": task.dtype, "unit": task.unit}
        row |= {"per_second": statistics.median(own), "loss": task.loss}
        fastest = column.get((task.what, "train.py", task.dtype))
        if fastest is not None:
            row["ratio"] = statistics.median(fastest / own)
            row["ratio_min"], row["ratio_max"] = min(fastest / own), max(fastest / own)
        if task.flops:
            matmul = column["matmul", "torch", task.dtype] * 2.0 * N_MATMUL**3
            row["share"] = statistics.median(own * task.flops / matmul)
        rows.append(row)
    return rows


def table(results: dict) -> str:
    titles = ("task", "by", "dtype", "per second", "train.py / this", "share of peak", "loss")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in results["rows"]:
        ratio = "{ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f})" if "ratio" in row else ""
        share = "{share:.0%}" if "share" in row else ""
        loss = "" if row["loss"] is None else "{loss:.4f}"
        cells = ("{what}", "{who}", "{dtype}", "{per_second:,.0f} {unit}", ratio, share, loss)
        lines.append(f"| {' | '.join(cells)} |".format(**row))
    for dtype in results["skipped"]:
        lines.append(f"{dtype} is skipped: this processor does not support it natively")
    if not importlib.util.find_spec("trl"):
        lines.append("TRL is not installed; pip install trl to compare with it")
    lines.append("{cpu}, {threads} threads, torch {torch}".format(**results))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="beyond.bench", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--repetitions", type=int, default=5, help="timed repetitions, after one warm-up (5)")
    add("--out", type=Path, default=Path("out/bench"), help="folder for results.json (out/bench)")
    add("--tiny", action="store_true", help="a small model and few samples, to try the command")
    add("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    size = (GPTConfig(61, 24, 1, 2, 16), 2, 1) if args.tiny else (CONFIG, PROMPTS, SAMPLES)

    def work() -> str:
        results = measure(*size, args.repetitions)
        atomic_write(args.out / "results.json", json.dumps(results, indent=1).encode())
        return f"{table(results)}\nsee {args.out / 'results.json'}"

    return cli.run_cli("beyond.bench", args.out, args.debug, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
