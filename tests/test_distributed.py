"""beyond/distributed.py on 1, 2 and 3 processes of this machine equals one process without it.

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
from beyond import distributed, sharded
from beyond.losses import LOSSES
from lib.checkpoint import load_gpt, read_checkpoint, to_checkpoint
from lib.io import BadInput
from lib.optim import linear_warmup_decay
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LR = {"sgd": 0.01, "adamw": 0.01}
CASES = [  # optimizer, dtype, "recompute" and --accumulate 2 or "compile", --replicate N
    ("sgd", torch.float64, "", False),
    ("adamw", torch.float64, "recompute", False),
    ("sgd", torch.float64, "", True),
    ("sgd", torch.float32, "", False),
    ("sgd", torch.float64, "compile", False),  # with two processes alone: tracing is slow
]


def cases(N: int) -> list[tuple]:
    return CASES if N == 2 else CASES[:-1]


BATCHES = [*map(torch.tensor, ([4, 0, 5, 2], [6, 1, 2], [3, 1, 6, 0, 5]))]  # uneven shares
TINY = ("--sft-steps 0 --prompts 120 --completions 3 --eval-prompts 4 --ref-samples 32 "
        "--eval-samples 16 --batch-size 8 --beta 1").split()  # fmt: skip
FOLDERS = "out", "alone"  # of the killed run, and of one process
# Without bfloat16, whose rounding would hide differences.
ENV = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def checkpoint(seed: int) -> dict:
    """A model with weights that are large enough for uneven probabilities."""
    torch.manual_seed(seed)
    tokens = data.toy_tokens()
    pi = GPT(GPTConfig(len(tokens) + 1, context=8, n_layer=2, n_head=2, n_embd=10))
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


def found(pi: GPT, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Weights, last gradients and metrics after training."""
    tensors = [(f"{i}", p) for i, p in enumerate(pi.parameters())]
    tensors += [(f"{i} gradient", p.grad) for i, p in enumerate(pi.parameters())]
    whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in tensors}
    metrics = [[float(row[name]) for name in sorted(row)] for row in rows]
    return {n: v.detach() for n, v in whole.items()} | {"metrics": torch.tensor(metrics)}


def one_process(optimizer: str, dtype: torch.dtype, *_: object) -> dict:
    """Three steps of `dpo.train` with the schedule of train.py."""
    pi = load_gpt(checkpoint(1), CPU).to(dtype)
    opt = distributed.OPTIMIZERS[optimizer](pi.parameters(), LR[optimizer])
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, linear_warmup_decay(len(BATCHES)))
    rows = []
    for row in dpo.train(pi, preferences(dtype), partial(dpo.dpo, beta=0.7), opt, BATCHES):
        schedule.step()
        rows.append(row)
    return found(pi, rows)


def of_many(folder: Path, optimizer: str, dtype: torch.dtype, how: str, replicate: bool) -> dict:
    """The same steps on a sharded model."""
    G = dist.get_world_size() if replicate else 1
    settings = distributed.Settings(accumulate=2 if how == "recompute" else 1)
    pi = sharded.shard(checkpoint(1), CPU, G, how == "recompute", how == "compile").to(dtype)
    opt = distributed.OPTIMIZERS[optimizer](pi.parameters(), LR[optimizer])
    how = opt, BATCHES, LR[optimizer], (settings, folder / "none")
    rows = [*distributed.train_sharded(pi, preferences(dtype), partial(dpo.dpo, beta=0.7), *how)]
    moments = [v for state in opt.state.values() for v in state.values() if isinstance(v, DTensor)]
    kept = {"weights": pi.parameters(), "moments": moments}
    kept["gradients"] = [p.grad for p in pi.parameters()]
    kept = {name: sum(v.to_local().nbytes for v in values) for name, values in kept.items()}
    return found(pi, rows) | {"bytes": kept}


def completions() -> dict:
    """600 prompts, in ten chunks."""
    prompts = [[97 + i % 26, 97 + i // 26] for i in range(600)]
    first = checkpoint(1)
    reward = data.WordReward({})
    dataset = data.Dataset(first["tokens"], [], [], prompts=prompts, reward=reward)
    return train.complete(first, dataset, 1, 0, CPU, sharded.SHARED)


def start(N: int, folder: Path, *command: object) -> list[subprocess.Popen]:
    """Start N processes as torchrun does. What process r writes is in folder / f"{N}-{r}.txt"."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    processes = []
    for r in range(N):
        own = env | {"WORLD_SIZE": str(N), "RANK": str(r), "LOCAL_RANK": str(r)}
        how = {"env": own, "cwd": ROOT, "stderr": subprocess.STDOUT}
        with open(folder / f"{N}-{r}.txt", "w") as log:
            processes.append(subprocess.Popen([sys.executable, *command], stdout=log, **how))
    return processes


def wait(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes. Processes that hang are killed."""
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """What each of N processes found, by N."""
    folder = tmp_path_factory.mktemp("many")
    groups = {N: start(N, folder, __file__, folder) for N in (1, 2, 3)}
    for N, processes in groups.items():
        logs = [folder / f"{N}-{r}.txt" for r in range(N)]
        assert wait(processes) == [0] * N, "".join(log.read_text() for log in logs)
    return {N: [torch.load(folder / f"{N}-{r}.pt") for r in range(N)] for N in groups}


@pytest.mark.parametrize("N, case", [(N, case) for N in (1, 2, 3) for case in cases(N)], ids=str)
def test_many_processes_compute_what_one_computes(results, N, case):
    """N processes, sharded  =>  weights, gradients and metrics of one process, but for rounding"""
    expected = results[1][0]["one", *case]
    tolerance = 1e-6 if case[1] == torch.float32 else 1e-9
    for process in results[N]:
        actual = process[case]
        for name, value in expected.items():
            scale = max(1, value.abs().max().item())
            assert (actual[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("N", [2, 3])
def test_memory_falls_with_the_number_of_processes(results, N):
    """N processes  =>  each keeps about 1/N of the weights, gradients and moments, and all one"""
    for case in CASES[:2]:
        for name, total in results[1][0][case]["bytes"].items():
            shares = [process[case]["bytes"][name] for process in results[N]]
            assert sum(shares) == total > 0
            assert max(shares) < 1.2 * total / N


def test_copies_keep_whole_models(results):
    """--replicate N  =>  each process keeps as much as one process alone"""
    for process in results[2]:
        assert process[CASES[2]]["bytes"] == results[1][0][CASES[2]]["bytes"]


@pytest.mark.parametrize("N", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_processes(results, N):
    """complete() on N processes  =>  bit for bit the same rows, in the prompts' order"""
    ids, *_ = expected = results[1][0]["completions"][0]
    assert ids[:, :2].tolist() == [[97 + i % 26, 97 + i // 26] for i in range(600)]
    assert len({tuple(row) for row in ids[:, 2:].tolist()}) > 300  # chunks are not alike
    for process in results[N]:
        assert all(map(torch.equal, process["completions"][0], expected))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_couple_prompts_are_refused(name):
    """KTO's reference point is a mean over the batch  =>  one line; all other losses pass"""
    loss = partial(LOSSES[name], beta=0.5)
    if name != "kto":
        return distributed.check_loss(loss, name)
    with pytest.raises(BadInput, match="couples"):
        distributed.check_loss(loss, name)


def test_batches_smaller_than_the_number_of_processes_are_refused(results):
    for process in results[3]:
        assert "smaller" in process["refused"]


def test_killed_run_continues_with_another_number_of_processes(tmp_path):
    """2 processes, one is killed in DPO, then 3  =>  one line, then the policy of one process"""
    flags = ["--out", tmp_path / "out", "--checkpoint-every", "1", *TINY]
    module = ["-m", "beyond.distributed", *flags]
    processes = start(2, tmp_path, *module)
    while not [*tmp_path.glob("out/checkpoints/*/00000000[3-9]/.metadata")]:
        time.sleep(0.02)
        assert processes[0].poll() is None, (tmp_path / "2-0.txt").read_text()
    processes[1].kill()
    assert wait(processes)[0] == 2
    last = (tmp_path / "2-0.txt").read_text().splitlines()[-1]
    assert last == "beyond.distributed: another process ended; repeat the command to continue"

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    how = {"env": ENV, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*torchrun, *module], **how)
    assert done.returncode == 0, done.stderr
    assert "[eval_set] cached\n[dpo-1]\n" in done.stdout
    assert int(re.search(r"training: +(\d+)%", done.stderr)[1]) > 0  # of the first step shown
    assert not [*tmp_path.glob("out/checkpoints")]

    alone = start(1, tmp_path, "-m", "beyond.distributed", "--out", tmp_path / "alone", *TINY)
    assert wait(alone) == [0], (tmp_path / "1-0.txt").read_text()
    found, expected = (json.loads((tmp_path / n / "results.json").read_text()) for n in FOLDERS)
    assert found["reference"] == pytest.approx(expected["reference"])
    for name in ("reward", "kl", "length", "pair_accuracy", "reward_r2"):
        assert found["points"][0][name] == pytest.approx(expected["points"][0][name], rel=0.02)
    policy, expected = (read_checkpoint(tmp_path / n / "dpo-1.pt") for n in FOLDERS)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(policy["weights"][name], weight, rtol=0, atol=2e-6)
    runs = [torch.load(tmp_path / n / "dpo-1.pt")["value"] for n in FOLDERS]
    for row, expected in zip(*(each["curves"] for each in runs), strict=True):
        assert row.keys() - {"samples"} == expected.keys() - {"samples"}
        sampled = {"samples", "kl", "entropy", "length", "reward"}  # rounding changes a few tokens
        for name in expected.keys() - sampled:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name


def main(folder: Path):
    torch.compile = partial(torch.compile, backend="aot_eager")  # traces, but needs no compiler
    dist.init_process_group()
    every = {case: of_many(folder, *case) for case in cases(dist.get_world_size())}
    every["completions"] = completions()
    if dist.get_world_size() == 1:
        every |= {("one", *case): one_process(*case) for case in CASES}
    if dist.get_world_size() == 3:
        how = None, [torch.tensor([0, 1])], 0.1, (None, folder)
        with pytest.raises(BadInput) as error:
            next(distributed.train_sharded(None, None, None, *how))
        every["refused"] = str(error.value)
    torch.save(every, folder / f"{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
