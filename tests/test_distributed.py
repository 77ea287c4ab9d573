"""beyond/distributed.py on 1, 2 and 3 processes gives the same results as one process without it.

With a folder as its argument, this file is the program that the processes run.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import data
import dpo
import train
from beyond import distributed, scale, sharded
from beyond.custom_model import read_checkpoint
from beyond.losses import LOSSES
from lib.checkpoint import load_gpt, to_checkpoint
from lib.io import BadInput
from lib.optim import linear_warmup_decay
from model import GPT, GPTConfig, sample
from tiny import CPU, ROOT

LR = 0.01
CASES = [  # optimizer, dtype, and the option under test
    ("sgd", torch.float32, "nothing"),
    ("adamw", torch.float64, "recompute"),  # with --accumulate 2
    ("sgd", torch.float64, "replicate"),  # --replicate N
    ("sgd", torch.float64, "compile"),  # on only one of two processes, as tracing is slow
]
BATCHES = [*map(torch.tensor, ([4, 0, 5, 2], [6, 1, 2], [3, 1, 6, 0, 5]))]  # uneven shares
PROMPTS = [[97 + i % 26, 97 + i // 26] for i in range(250)]  # four chunks
TINY = ("--sft-steps 0 --prompts 120 --completions 3 --eval-prompts 4 --ref-samples 32 "
        "--eval-samples 16 --batch-size 8 --beta 1").split()  # fmt: skip
# Without bfloat16, whose rounding would hide differences.
ENV = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def checkpoint(seed: int, width: int = 10) -> dict:
    """A model with weights that are large enough for uneven probabilities."""
    torch.manual_seed(seed)
    tokens = data.toy_tokens()
    pi = GPT(GPTConfig(len(tokens) + 1, context=8, n_layer=2, n_head=2, n_embd=width))
    weights = {name: 2 * value for name, value in pi.state_dict().items()}
    return to_checkpoint(pi, tokens) | {"weights": weights}


def preferences(dtype: torch.dtype) -> dpo.Preferences:
    """Seven prompts with two to four rows, and all pairs of each, with weights from 0 to 1."""
    torch.manual_seed(3)
    prompt = torch.arange(7).repeat_interleave(torch.tensor([4, 3, 2, 4, 3, 4, 2]))
    pairs = (prompt[:, None] == prompt).triu(1).nonzero()
    ids, ends = torch.randint(300, (len(prompt), 8)), torch.randint(4, 9, (len(prompt), 1))
    mask = (torch.arange(8) >= 2) & (torch.arange(8) < ends)
    ref_logps = dpo.response_logps(load_gpt(checkpoint(2), CPU), ids, mask).detach().to(dtype)
    return dpo.Preferences(ids, mask, ref_logps, prompt, pairs, torch.rand(len(pairs), dtype=dtype))


def found(pi: GPT, rows: list[dict]) -> list[torch.Tensor]:
    """Weights, last gradients and metrics after training."""
    tensors = [*pi.parameters(), *(p.grad for p in pi.parameters())]
    whole = [v.full_tensor() if isinstance(v, DTensor) else v for v in tensors]
    metrics = [[float(row[name]) for name in sorted(row)] for row in rows]
    return [*(v.detach() for v in whole), torch.tensor(metrics, dtype=torch.float64)]


def one_process(optimizer: str, dtype: torch.dtype, _: str) -> list[torch.Tensor]:
    """Three steps of `dpo.train` with the schedule of train.py."""
    pi = load_gpt(checkpoint(1), CPU).to(dtype)
    opt = distributed.OPTIMIZERS[optimizer](pi.parameters(), LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, linear_warmup_decay(len(BATCHES)))
    rows = []
    for row in dpo.train(pi, preferences(dtype), partial(dpo.dpo, beta=0.7), opt, BATCHES):
        schedule.step()
        rows.append(row)
    return found(pi, rows)


def of_many(folder: Path, optimizer: str, dtype: torch.dtype, special: str) -> dict:
    """The same steps on a sharded model."""
    G = dist.get_world_size() if special == "replicate" else 1
    recompute = special == "recompute"
    compile = special == "compile" and dist.get_rank() == 0
    settings = distributed.Settings(accumulate=2 if recompute else 1)
    pi = sharded.shard(checkpoint(1), CPU, G, recompute, compile).to(dtype)
    opt = distributed.OPTIMIZERS[optimizer](pi.parameters(), LR)
    how = opt, BATCHES, LR, (settings, folder / "none")
    rows = [*distributed.train_sharded(pi, preferences(dtype), partial(dpo.dpo, beta=0.7), *how)]
    moments = [v for state in opt.state.values() for v in state.values() if isinstance(v, DTensor)]
    kept = [*pi.parameters()], [p.grad for p in pi.parameters()], moments
    nbytes = [sum(v.to_local().nbytes for v in values) for values in kept]
    return {"found": found(pi, rows), "bytes": nbytes}


def completions() -> tuple[torch.Tensor, ...]:
    first, reward = checkpoint(1), data.WordReward({})
    dataset = data.Dataset(first["tokens"], [], [], prompts=PROMPTS, reward=reward)
    return train.complete(first, dataset, 1, 0, CPU, sharded.SHARED)[0]


def torchrun(N: int, *command: object) -> subprocess.CompletedProcess:
    launcher = "torch.distributed.run", "--standalone", f"--nproc-per-node={N}"
    how = {"env": ENV, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, "-m", *launcher, *command], **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the program at the end of this file, when its three processes are done."""
    folder = tmp_path_factory.mktemp("many")
    done = torchrun(3, __file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict]]:
    """What each of N processes found, by N."""
    return {N: [torch.load(folder / f"{N}-{r}.pt") for r in range(N)] for N in (1, 2, 3)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_processes_compute_what_one_computes(results, case):
    """N processes, sharded  =>  weights, gradients and metrics of one process, but for rounding"""
    expected = results[1][0]["one", *case]
    tolerance = 1e-6 if case[1] == torch.float32 else 1e-9
    for process in [each for N in results for each in results[N] if case in each]:
        torch.testing.assert_close(process[case]["found"], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("N", [2, 3])
def test_memory_falls_with_the_number_of_processes(results, N):
    """N processes  =>  each keeps about 1/N of the weights, gradients and moments; together, all.
    --replicate N  =>  each keeps all
    """
    for case in CASES[:3]:
        every = (process[case]["bytes"] for process in results[N])
        for total, *shares in zip(results[1][0][case]["bytes"], *every, strict=True):
            if case[2] == "replicate":
                assert shares == [total] * N
            else:
                assert sum(shares) == total > 0 and max(shares) < 1.2 * total / N


def test_samples_do_not_depend_on_the_number_of_processes(results):
    """complete() on N processes  =>  bit for bit the same rows, in the prompts' order"""
    ids, *_ = expected = results[1][0]["completions"]
    assert ids[:, :2].tolist() == PROMPTS
    assert len({tuple(row) for row in ids[:, 2:].tolist()}) > 125  # chunks are not alike
    for process in results[2] + results[3]:
        assert all(map(torch.equal, process["completions"], expected))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_couple_prompts_are_refused(name):
    """KTO's reference point is a mean over the batch  =>  one line; all other losses pass"""
    loss = partial(LOSSES[name], beta=0.5)
    if name != "kto":
        return distributed.check_loss(loss, name)
    with pytest.raises(BadInput, match="couples"):
        distributed.check_loss(loss, name)


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("width", [10, 128])  # in float32 and in bfloat16
def test_sampling_with_the_settings_for_gpus(group, monkeypatch, width):
    """A model sharded as on a GPU  =>  `sample`, with a cache, and `response_logps` agree"""
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    monkeypatch.setattr(dist, "init_device_mesh", lambda *_, **how: mesh)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    pi = sharded.shard(checkpoint(1, width), torch.device("cuda"))
    ids, mask, logps = sample(pi, PROMPTS, end=256)
    difference = (logps - dpo.response_logps(pi, ids, mask)).abs().max()
    assert difference < (0.01 if width == 128 else 1e-4)
    assert (pi.wte.weight.dtype == torch.bfloat16) == (width == 128)


def test_fsdp_keeps_what_is_outside_the_blocks_gathered(group):
    """After a forward pass, beyond/scale.py's root parameters are whole, and the blocks sharded"""
    pi = sharded.shard(checkpoint(1), CPU)
    pi(torch.zeros(1, 3, dtype=torch.long))
    whole = sum(p.numel() for p in pi.parameters() if not isinstance(p, DTensor))
    assert whole == scale.root_parameters(pi.config)


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", [1])])
def test_a_process_chooses_a_gpu_only_if_the_device_is_cuda(monkeypatch, device, expected):
    """--device cpu on a machine with GPUs  =>  no process needs a GPU of its own"""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda **_: None)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert distributed.in_group(lambda: chosen, torch.device(device)) == expected


def test_preferences_without_pairs_give_one_line():
    empty = dpo.Preferences(*torch.zeros(6, 0, dtype=torch.long))
    with pytest.raises(BadInput, match="no pairs"):
        distributed.train_dpo({}, empty, dpo.dpo, None, None, CPU, (None, None))


def test_batches_smaller_than_the_number_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    batches = [torch.tensor([0, 1])]
    with pytest.raises(BadInput, match="smaller"):
        next(distributed.train_sharded(None, None, None, None, batches, LR, (None, None)))


def test_killed_run_continues_with_a_different_number_of_processes(folder, tmp_path):
    """2 processes, one is killed in DPO, then 3  =>  one line, then the policy of one process"""
    module = "-m", "beyond.distributed", "--out", tmp_path, "--checkpoint-every", "1", *TINY
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    envs = [env | {"WORLD_SIZE": "2", "RANK": r, "LOCAL_RANK": r} for r in "01"]
    how = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    first, second = (subprocess.Popen([sys.executable, *module], env=env, **how) for env in envs)
    while first.poll() is None and not [*tmp_path.glob("checkpoints/*/00000000[3-9]/.metadata")]:
        time.sleep(0.02)
    second.kill()
    printed = first.communicate(timeout=300)[1]
    last = "beyond.distributed: another process ended; repeat the command to continue"
    assert printed.splitlines()[-1] == last and first.returncode == 2
    second.communicate()

    done = torchrun(3, *module)
    assert done.returncode == 0, done.stderr
    assert "[eval_set] cached\n[dpo-1]\n" in done.stdout
    assert int(re.search(r"training: +(\d+)%", done.stderr)[1]) > 0  # of the first step shown
    assert not [*tmp_path.glob("checkpoints")]

    outs = tmp_path, folder / "alone"
    found, expected = (json.loads((out / "results.json").read_text()) for out in outs)
    assert found["reference"] == pytest.approx(expected["reference"])
    for name in ("reward", "kl", "length", "pair_accuracy", "reward_r2"):
        assert found["points"][0][name] == pytest.approx(expected["points"][0][name], rel=0.02)
    sampled = {"samples", "kl", "entropy", "length", "reward"}  # rounding changes a few tokens
    for rows in zip(found["curves"]["1"], expected["curves"]["1"], strict=True):
        row, other = ({k: v for k, v in row.items() if k not in sampled} for row in rows)
        assert row == pytest.approx(other, rel=1e-3, abs=1e-3)
    policy, expected = (read_checkpoint(out / "dpo-1.pt")["weights"] for out in outs)
    torch.testing.assert_close(policy, expected, rtol=0, atol=2e-6)


def main(folder: Path):
    """All that needs a group: of 3 processes, then of the first 2, and of the last one alone."""
    torch.compile = partial(torch.compile, backend="aot_eager")  # traces, but needs no compiler
    rank = int(os.environ["RANK"])
    for N, first in (3, 0), (2, 0), (1, 2):
        if not first <= rank < first + N:
            continue
        r, file = rank - first, (folder / f"group-{N}").as_uri()
        dist.init_process_group("gloo", init_method=file, rank=r, world_size=N)
        every = {case: of_many(folder, *case) for case in (CASES if N == 2 else CASES[:-1])}
        every["completions"] = completions()
        if N == 1:
            every |= {("one", *case): one_process(*case) for case in CASES}
        torch.save(every, folder / f"{N}-{r}.pt")
        dist.barrier()
        dist.destroy_process_group()
    if rank == 2:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        assert distributed.main(["--out", str(folder / "alone"), *TINY]) == 0
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
