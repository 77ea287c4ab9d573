"""Models that are sharded over N processes by PyTorch's FSDP2, and inference with them.

A call to a sharded model waits for all processes, so all of them must make the same calls.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint as recompute

import dpo
from data import decode_rows
from lib import inference, optim
from lib.checkpoint import load_gpt
from lib.io import BadInput
from model import GPT

CHUNK = 64  # responses that are sampled together


def shard(
    checkpoint: dict,
    device: torch.device,
    replicate: int = 1,
    checkpoint_activations: bool = False,
    compile: bool = False,
) -> GPT:
    """The model of a checkpoint, sharded over all processes, or within each of G groups.

    replicate: the number G of copies. For the others, see `distributed.Settings`.
    """
    N, G = dist.get_world_size(), replicate
    if N % G:
        raise BadInput(f"--replicate {G}: must divide the number of processes, {N}")
    mesh = dist.init_device_mesh(device.type, (G, N // G), mesh_dim_names=("replicate", "shard"))
    how = {"mesh": mesh if G > 1 else mesh["shard"]}
    pi = load_gpt(checkpoint, torch.device("cpu"))  # fully_shard moves the shards to the device
    pi.bf16 = optim.bf16_supported(device) and pi.config.n_embd >= 128  # as in load_gpt
    # If the cache were float32, mixed precision would make FSDP write to a bfloat16 copy of it.
    if pi.bf16 and device.type == "cuda":
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for i, block in enumerate(pi.h):
        if checkpoint_activations:
            block = checkpoint_wrapper(block)
        if compile:
            block.compile(dynamic=True)
        pi.h[i] = fully_shard(block, **how)
    pi = fully_shard(pi, **how)
    for method in ("hidden", "head"):
        register_fsdp_forward_method(pi, method)
    # Inside `forward`, the registered methods would gather the embeddings three times in a step.
    pi.forward = lambda ids: GPT.head(pi, GPT.hidden(pi, ids))
    return pi


def gather(pi: GPT, checkpoint: dict) -> dict:
    """`checkpoint` with the weights of a sharded model, which only process 0 receives."""
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return checkpoint | {"weights": state_dict.get_model_state_dict(pi, options=options)}


def logps_in_parts(pi: GPT, ids: torch.Tensor, mask: torch.Tensor, parts: int) -> torch.Tensor:
    """Like `dpo.response_logps`, in parts: only one part's activations are in memory at a time."""
    if parts == 1:
        return dpo.response_logps(pi, ids, mask)
    pairs = zip(ids.tensor_split(parts), mask.tensor_split(parts), strict=True)
    run = partial(recompute, dpo.response_logps, pi, use_reentrant=False)
    return torch.cat([run(*part) for part in pairs])


class InStep:
    """A sharded model to which each process makes the same number of calls.

    A call to a sharded model waits for all processes. Rows end at different times, so a process
    that is done calls the model until it has made as many calls as sampling can take.
    """

    def __init__(self, pi: GPT):
        self.pi, self.left = pi, 0

    def __getattr__(self, name: str):
        return getattr(self.pi, name)

    def new_cache(self, B: int) -> torch.Tensor:  # once for each call of model.sample
        self.left += self.pi.config.context - 1
        return self.pi.new_cache(B)

    def hidden(self, *args) -> torch.Tensor:
        self.left -= 1
        return self.pi.hidden(*args)

    def catch_up(self):
        while self.left:
            self.head(self.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.device)))


@torch.no_grad()
def generate(pi: GPT, prompts: list[list[int]], n: int, tokenizer, seed: int, what: str):
    """Like `inference.generate`, in chunks of responses. Each chunk has its own seed."""
    rank, N = dist.get_rank(), dist.get_world_size()
    prompts = [x for x in prompts for _ in range(n)]
    padded = prompts + prompts[:1] * (-len(prompts) % (CHUNK * N))  # the same number for each
    pi, own = InStep(pi), []
    for i in range(rank, len(padded) // CHUNK, N):
        chunk = padded[i * CHUNK : (i + 1) * CHUNK]
        how = chunk, 1, tokenizer, seed * 10**6 + i, what
        own.append(inference.generate(pi, *how)[0])
        pi.catch_up()
    dist.all_gather_object(shares := [None] * N, own)
    chunks = [chunk for group in zip(*shares, strict=True) for chunk in group]
    samples = tuple(torch.cat(parts)[: len(prompts)] for parts in zip(*chunks, strict=True))
    return samples, decode_rows(samples[0], tokenizer)


def over_rows(function: Callable, *rows: torch.Tensor) -> torch.Tensor:
    """function(*rows), in equal shares of rows."""
    rank, N, n = dist.get_rank(), dist.get_world_size(), len(rows[0])
    own = torch.arange(rank, rank + n + -n % N, N) % n
    dist.all_gather_object(shares := [None] * N, function(*(each[own] for each in rows)))
    return torch.stack(shares, 1).flatten(0, 1)[:n]


def compute_logps(pi: GPT, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return over_rows(partial(inference.compute_logps, pi), ids, mask)


def mean_kl(pi_theta: GPT, pi_ref: GPT, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return over_rows(partial(inference.mean_kl, pi_theta, pi_ref), ids, mask)


SHARED = inference.Inference(shard, generate, compute_logps, mean_kl)
