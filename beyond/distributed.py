"""The experiment of train.py on N processes, with DPO sharded by PyTorch's FSDP2.

    torchrun --nproc_per_node=N -m beyond.distributed [train.py's flags] [--checkpoint-every K]
             [--checkpoint-activations] [--compile] [--replicate G] [--accumulate K]

Parameters, gradients and optimizer state are sharded. Each process handles its share of a batch's
prompts. The batch's loss is sum_i w_i loss_i / W, where W is the weight of all its pairs. FSDP
averages gradients over processes, so each process computes

    N / W sum_{i in its share} w_i loss_i

Sampling, log-probabilities and KL use sharded models; each process computes a share of the prompts
or rows. Each chunk of responses has its own seed. So results depend on N only through rounding.

What this file leaves out: sharded fine-tuning, and losses that couple prompts. See docs/scale.md.
"""

import contextlib
import datetime
import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict
from tqdm import tqdm

import dpo
import train
from beyond.custom_loss import load_loss
from beyond.monitor import tenth_ending
from beyond.sharded import SHARED, gather, logps_in_parts, shard
from lib import cli, optim
from lib.io import BadInput
from lib.stage import Stage, stage_key
from model import GPT

# The fused SGD does not take sharded tensors.
OPTIMIZERS = optim.OPTIMIZERS | {"sgd": partial(torch.optim.SGD, momentum=0.9)}


@dataclass(frozen=True)
class Settings(train.Config):
    """Those of train.py, and five that change results only by rounding."""

    checkpoint_every: int = cli.flag(100, "DPO steps between distributed checkpoints", 1)
    accumulate: int = cli.flag(1, "parts into which a process splits its share of a batch", 1)
    checkpoint_activations: bool = cli.flag(False, "recompute activations in the backward pass")
    compile: bool = cli.flag(False, "compile each block with torch.compile")
    replicate: int = cli.flag(1, "copies of the sharded model, for instance one per node", 1)


Job = tuple[Settings, Path]  # the settings, and the folder of distributed checkpoints


# -------------------------------------------------- training


def train_sharded(pi: GPT, preferences: dpo.Preferences, loss: dpo.Loss, optimizer,
                  batches: list[torch.Tensor], lr: float, job: Job):  # fmt: skip
    """Like `dpo.train`, for all processes, with warmup, decay and distributed checkpoints.

    Yields the metrics of whole batches as floats, including those from before a restart.
    """
    rank, N, steps = dist.get_rank(), dist.get_world_size(), len(batches)
    if min(map(len, batches)) < N:
        raise BadInput(f"a batch is smaller than the number of processes, {N}")
    settings, folder = job
    multiplier = optim.linear_warmup_decay(steps)
    rows = load(folder, pi, optimizer)
    yield from rows

    def shares() -> Iterator[torch.Tensor]:
        for step in range(len(rows), steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * multiplier(step)
            yield batches[step][rank::N]

    def normalize(weight: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(total := weight.sum())
        return weight * (N / total)

    logps_fn = partial(logps_in_parts, parts=settings.accumulate)
    how = {"logps_fn": logps_fn, "normalize": normalize}
    records = dpo.train(pi, preferences, loss, optimizer, shares(), **how)
    for metrics in tqdm(records, "training", steps, initial=len(rows), disable=rank > 0):
        grad_norm = metrics.pop("grad_norm").full_tensor()
        dist.all_reduce(means := torch.stack([*metrics.values()]) / N)
        row = dict(zip(metrics, means.tolist(), strict=True)) | {"grad_norm": grad_norm.item()}
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"training diverged at step {len(rows) + 1}: lower --lr")
        rows.append(row)
        yield row  # the caller may add to it
        if len(rows) % settings.checkpoint_every == 0:
            save(folder, pi, optimizer, rows)


def save(folder: Path, pi: GPT, optimizer: torch.optim.Optimizer, rows: list[dict]):
    """Write a distributed checkpoint, and then delete older ones."""
    older = [path.parent for path in folder.glob("*/.metadata")]
    model, moments = state_dict.get_state_dict(pi, optimizer)
    state = {"model": model, "optimizer": moments, "rows": json.dumps(rows)}
    dcp.save(state, checkpoint_id=folder / f"{len(rows):09}")
    for path in older if dist.get_rank() == 0 else []:
        shutil.rmtree(path)


def load(folder: Path, pi: GPT, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Load the last complete checkpoint. Returns its rows, or none if there is no checkpoint."""
    complete = sorted(folder.glob("*/.metadata"))  # written last
    if not complete:
        return []
    model, moments = state_dict.get_state_dict(pi, optimizer)
    state = {"model": model, "optimizer": moments, "rows": ""}
    dcp.load(state, checkpoint_id=complete[-1].parent)
    state_dict.set_state_dict(pi, optimizer, model_state_dict=model, optim_state_dict=moments)
    return json.loads(state["rows"])


def train_dpo(reference: dict, preferences: dpo.Preferences, loss: dpo.Loss, how: train.Training,
              look: Callable[..., dict], device: torch.device, job: Job) -> dict:  # fmt: skip
    """Like `train.train_dpo`, sharded."""
    if not len(preferences.pairs):
        raise BadInput("there are no pairs: all completions are equally good or identical")
    s, _ = job
    how_sharded = s.replicate, s.checkpoint_activations, s.compile
    pi_theta, pi_ref = shard(reference, device, *how_sharded), shard(reference, device, s.replicate)
    batches, curves = how.batches(preferences), []
    optim.freeze(pi_theta, how.frozen)
    optimizer = OPTIMIZERS[how.optimizer](pi_theta.parameters(), how.lr)
    for row in train_sharded(pi_theta, preferences, loss, optimizer, batches, how.lr, job):
        curves.append(row)
        if tenth_ending(len(curves), len(batches)) and "kl" not in row:
            found, row["samples"] = look.look(pi_theta, pi_ref, loss, SHARED)
            row |= found
    return gather(pi_theta, reference) | {"curves": curves}


# -------------------------------------------------- process 0 leads, and the others follow


class ParallelStage(Stage):
    """Process 0's cache. DPO, and functions with a parameter `infer`, run on all processes."""

    def __init__(self, folder: Path, settings: Settings):
        super().__init__(folder)
        self.settings = settings

    def __call__(self, name: str, function: Callable, *args: object):
        if function is train.train_dpo:
            function = train_dpo
        elif "infer" in inspect.signature(function).parameters:
            function = partial(function, infer=SHARED)
        return super().__call__(name, function, *args)

    def run(self, function: Callable, *args: object):
        if function is train_dpo:
            folder = self.folder.absolute() / "checkpoints" / stage_key(function, args)
            args = *args, (self.settings, folder)
        elif "infer" not in inspect.signature(function).parameters:
            return function(*args)
        call = partial(function, *args)
        dist.broadcast_object_list([call])
        return call()


def lead(args, settings: Settings) -> str:
    """Run the experiment, as train.py does."""
    loss = load_loss(settings.loss, settings.loss_args)
    check_loss(partial(loss, beta=settings.beta[0]), settings.loss)
    device = torch.device(args.device.type)  # of each process
    table = train.run(settings, ParallelStage(args.out, settings), device)
    dist.broadcast_object_list([None])
    shutil.rmtree(args.out / "checkpoints", ignore_errors=True)
    return table


def follow(settings: Settings):
    """Call what process 0 calls, until it is done."""
    load_loss(settings.loss, settings.loss_args)  # so that a loss can be received
    dist.broadcast_object_list(call := [None])
    while call[0]:
        call[0]()
        dist.broadcast_object_list(call)


def check_loss(loss: dpo.Loss, name: str):
    """Raises BadInput if the loss of a prompt's pair depends on other prompts."""
    prompt, pairs = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[0, 1], [2, 3]])
    ids, logps = torch.arange(18).view(6, 3), -torch.rand(6, 3)
    batch = dpo.Preferences(ids, ids > -1, 2 * logps, prompt, pairs, torch.ones(2))
    together, _, _ = loss(logps, batch)
    alone, _, _ = loss(logps[:2], batch.select(torch.tensor([0])))
    if not torch.allclose(together[:1], alone):
        raise BadInput(f"--loss {name}: couples the prompts of a batch, so it needs train.py")


def in_group(work: Callable[[], object], device: torch.device) -> object:
    """Call work() in the group of all processes. Raises BadInput if another process ends."""
    if "RANK" not in os.environ:
        raise BadInput("start it with torchrun, see --help")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(days=1))  # gloo, and nccl for GPUs
    try:
        return work()
    except RuntimeError as error:
        if not re.search("onnection|peer", str(error)):
            raise
        raise BadInput("another process ended; repeat the command to continue") from error


def main(argv: list[str]) -> int:
    args, settings = cli.parse("beyond.distributed", __doc__, Settings, train.PRESETS, argv)
    if os.environ.get("RANK", "0") == "0":
        work = partial(in_group, partial(lead, args, settings), args.device)
        return cli.run_cli("beyond.distributed", args.out, args.debug, work)
    with contextlib.suppress(BadInput, KeyboardInterrupt):  # process 0 reports them
        in_group(partial(follow, settings), args.device)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of gloo can abort a process that shuts down normally
