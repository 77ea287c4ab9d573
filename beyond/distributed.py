"""The experiment of train.py on N processes, with DPO sharded by PyTorch's FSDP2.

    torchrun --nproc_per_node=N -m beyond.distributed [train.py's flags] [--checkpoint-every K]
             [--checkpoint-activations] [--compile] [--replicate G]

Parameters, gradients and optimizer state are sharded. Each process computes its share of a batch's
prompts. The batch's loss is sum_i w_i loss_i / W, where W is the weight of all its pairs. FSDP
averages gradients over processes, so each process computes

    N / W sum_{i in its share} w_i loss_i

Completions are sampled in shares of prompts, each chunk of prompts with its own seed. All other
stages run on process 0, as in train.py. So results depend on N by rounding only.

What this file leaves out: sharded fine-tuning and inference; losses that couple prompts; gradient
accumulation; Muon. See docs/scale.md.
"""

import contextlib
import datetime
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import dpo
import train
from lib import cli, optim, report
from lib.checkpoint import load_gpt
from lib.io import BadInput
from lib.extension import load_loss
from lib.stage import Stage, stage_key
from model import GPT

# The fused SGD does not take sharded tensors.
OPTIMIZERS = optim.OPTIMIZERS | {"sgd": partial(torch.optim.SGD, momentum=0.9)}


@dataclass(frozen=True)
class Settings(train.Config):
    """Those of train.py, and four that change results by rounding only."""

    checkpoint_every: int = cli.flag(100, "DPO steps between distributed checkpoints", 1)
    checkpoint_activations: bool = cli.flag(False, "recompute activations in the backward pass")
    compile: bool = cli.flag(False, "compile each block with torch.compile")
    replicate: int = cli.flag(1, "copies of the sharded model, for instance one per node", 1)


Job = tuple[Settings, Path]  # and the folder of a training run's distributed checkpoints


# -------------------------------------------------- sharded models


def shard(checkpoint: dict, device: torch.device, settings: Settings) -> GPT:
    """The model of a checkpoint, sharded over all processes, or within each of G groups."""
    N, G = dist.get_world_size(), settings.replicate
    if N % G:
        raise BadInput(f"--replicate {G}: must divide the number of processes, {N}")
    mesh = dist.init_device_mesh(device.type, (G, N // G), mesh_dim_names=("replicate", "shard"))
    how = {"mesh": mesh if G > 1 else mesh["shard"]}
    if device.type == "cuda":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    pi = load_gpt(checkpoint, torch.device("cpu"))  # fully_shard moves the shards to the device
    pi.bf16 = optim.bf16_supported(device)
    for i, block in enumerate(pi.h):
        if settings.checkpoint_activations:
            block = checkpoint_wrapper(block)
        if settings.compile:
            block.compile(dynamic=True)
        pi.h[i] = fully_shard(block, **how)
    return fully_shard(pi, **how)


def gather(pi: GPT, checkpoint: dict) -> dict:
    """`checkpoint` with the weights of a sharded model, whole, on every process."""
    options = state_dict.StateDictOptions(full_state_dict=True)
    weights = state_dict.get_model_state_dict(pi, options=options)
    return checkpoint | {"weights": {name: weight.cpu() for name, weight in weights.items()}}


def train_sharded(pi: GPT, preferences: dpo.Preferences, loss: dpo.Loss, optimizer,
                  batches: list[torch.Tensor], lr: float, job: Job, what: str):  # fmt: skip
    """As `dpo.train`, for all processes, with warmup, decay and distributed checkpoints.

    Yields the metrics of whole batches as floats, also those of the steps before a resumption.
    """
    rank, N, steps = dist.get_rank(), dist.get_world_size(), len(batches)
    if min(map(len, batches)) < N:
        raise BadInput(f"{what}: a batch is smaller than the number of processes, {N}")
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

    how = {"logps_fn": dpo.response_logps, "normalize": normalize}
    records = dpo.train(pi, preferences, loss, optimizer, shares(), **how)
    for metrics in tqdm(records, what, steps, initial=len(rows), disable=rank > 0):
        grad_norm = metrics.pop("grad_norm").full_tensor()
        dist.all_reduce(means := torch.stack([*metrics.values()]) / N)
        row = dict(zip(metrics, means.tolist(), strict=True)) | {"grad_norm": grad_norm.item()}
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"{what} diverged at step {len(rows) + 1}: lower --lr")
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


# -------------------------------------------------- stages that run on all processes


def complete(reference: dict, dataset, K: int, seed: int, device: torch.device, _: Job):
    """As `train.complete`, in shares of prompts. Each chunk of prompts has its own seed."""
    rank, N, starts = dist.get_rank(), dist.get_world_size(), range(0, len(dataset.prompts), 256)
    own = []
    for i in starts[rank::N]:
        chunk = replace(dataset, prompts=dataset.prompts[i : i + 256])
        own.append(train.complete(reference, chunk, K, seed * 10**6 + i, device))
    dist.all_gather_object(shares := [[]] * N, own)
    parts = [shares[i % N][i // N] for i in range(len(starts))]
    completions, rewards = zip(*parts, strict=True)
    return tuple(map(torch.cat, zip(*completions, strict=True))), torch.cat(rewards)


def train_dpo(reference: dict, preferences: dpo.Preferences, loss: dpo.Loss, how: train.Training,
              look: Callable[..., dict], device: torch.device, job: Job) -> dict:  # fmt: skip
    """As `train.train_dpo`."""
    pi_theta, batches = shard(reference, device, job[0]), how.batches(preferences)
    steps, curves = len(batches), []
    opt = OPTIMIZERS[how.optimizer](pi_theta.parameters(), how.lr)
    for row in train_sharded(pi_theta, preferences, loss, opt, batches, how.lr, job, "training"):
        curves.append(row)
        tenth = len(curves) * 10 // steps > (len(curves) - 1) * 10 // steps
        if tenth and "kl" not in row:
            policy = gather(pi_theta, reference)
            if dist.get_rank() == 0:
                row |= look(load_gpt(policy, device), load_gpt(reference, device), loss)
    return gather(pi_theta, reference) | {"curves": curves}


PARALLEL = {train.complete: complete, train.train_dpo: train_dpo}


# -------------------------------------------------- process 0 leads, and the others follow


class ParallelStage(Stage):
    """Process 0's cache. It calls the functions in PARALLEL on all processes."""

    def __init__(self, folder: Path, settings: Settings):
        super().__init__(folder)
        self.settings = settings

    def __call__(self, name: str, function: Callable, *args: object):
        if function not in PARALLEL:
            return super().__call__(name, function, *args)
        function = PARALLEL[function]

        @wraps(function)  # so that the key covers its code
        def on_all_processes(*args: object):
            folder = self.folder.absolute() / "checkpoints" / stage_key(function, args)
            call = partial(function, *args, (self.settings, folder))
            dist.broadcast_object_list([call])
            return call()

        return super().__call__(name, on_all_processes, *args)


def lead(args, settings: Settings) -> str:
    """Run the experiment, as train.py does."""
    loss = load_loss(settings.loss, settings.loss_args)
    check_loss(partial(loss, beta=settings.beta[0]), settings.loss)
    device = torch.device(args.device.type)  # of each process
    results = train.run(settings, ParallelStage(args.out, settings), device)
    dist.broadcast_object_list([None])
    shutil.rmtree(args.out / "checkpoints", ignore_errors=True)
    return report.summary(results)


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


def in_group(work: Callable[[], object]) -> object:
    """Call work() in the group of all processes. Raises BadInput if another process ends."""
    if "RANK" not in os.environ:
        raise BadInput("start it with torchrun, see --help")
    if torch.cuda.is_available():
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
        work = partial(in_group, partial(lead, args, settings))
        return cli.run_cli("beyond.distributed", args.out, args.debug, work)
    with contextlib.suppress(BadInput, KeyboardInterrupt):  # process 0 reports them
        in_group(partial(follow, settings))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of gloo can abort a process that shuts down normally
