"""Several processes, and parts of a batch, give what one process gives with the whole: two and three real processes over gloo."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo import lookup_backend

import dpo
import train
import worlds
from beyond import distributed
from kit import checkpoints
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
TINY = "--reviews 300 --steps 8 --prompts 24 --held-out 4 --samples 64 --batch 8 --beta 1".split()
ENV = os.environ | dict(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR",     # torch warns of a store that is gone
                        PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """N processes with torchrun's variables, but without torchrun, which ends the others when one fails."""

    def __init__(self, N: int, *argv: object, **variables: object):
        env = ENV | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(N))
        env |= {name: str(value) for name, value in variables.items()}
        self.files = [[tempfile.TemporaryFile("w+") for _ in range(2)] for _ in range(N)]
        self.processes = [subprocess.Popen([sys.executable, *map(str, argv)], stdout=out, stderr=err, cwd=ROOT,
                                           env=env | dict(RANK=str(r), LOCAL_RANK=str(r)))
                          for r, (out, err) in enumerate(self.files)]

    def end(self, seconds: float = 240) -> tuple[list[int], str, str]:
        """Exit codes, and what all said; those that hang are killed, and the test fails."""
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.05)
        hang = [p.kill() for p in self.processes if p.poll() is None]
        out, err = ("".join(f.seek(0) or f.read() for f in files) for files in zip(*self.files))
        assert not hang, f"a process hangs: {err}"
        return [p.wait() for p in self.processes], out, err


# ------------------------------------------------------------------------------- what is computed whole, and in parts

gpt = partial(worlds.gpt, context=8, n_layer=2)
DPO = partial(dpo.dpo, beta=0.7)


def coupled(pi: torch.Tensor, batch: dpo.Preferences):
    """A loss that is no mean over pairs: each is divided by the batch's spread of margins."""
    losses, r_hat_w, r_hat_l = DPO(pi, batch)
    return losses / (1 + (r_hat_w - r_hat_l).square().sum()), r_hat_w, r_hat_l


def training(loss=DPO, dtype=torch.float64, batches=((4, 0, 5, 2), (0,), (3, 1, 6))) -> dict:
    """Steps with momentum and clipping, on weighted pairs of up to four completions; (0,) has two texts alone."""
    pi, pi_ref = gpt(1).to(dtype), gpt(2).to(dtype)
    preferences = worlds.preferences(worlds.triplets(8, P=7), pi_ref)
    preferences = dpo.Preferences(*(t.to(dtype) if t.is_floating_point() else t for t in vars(preferences).values()))
    optimizer = torch.optim.SGD(pi.parameters(), lr=0.5, momentum=0.9)
    records = [*dpo.train(pi, preferences, loss, optimizer, map(torch.tensor, batches), max_grad_norm=0.05)]
    return dict(weights=pi.state_dict(), grads={name: p.grad for name, p in pi.named_parameters()},
                records={name: torch.stack([r[name] for r in records]) for name in records[0]})


TEXTS = [[0, 1, 2], [1, 1, 0, 2], [0, 2], [1, 0, 0, 1], [0, 0, 2]]


def likelihood(texts: list, reduction: str) -> dict:
    pi = gpt(3).float()
    loss = train.token_nll(pi, texts, reduction)
    loss.backward()
    return dict(loss=loss.detach(), grads={name: p.grad for name, p in pi.named_parameters()})


def fine_tuned() -> dict:
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return train.fine_tune(gpt(4), TEXTS * 3, train.Settings(steps=4, rows=3)).state_dict()


class Tokenizer:
    eot_token = worlds.END


def everything() -> dict:
    """All that `sharded` may change, but random samples."""
    pi, pi_ref = gpt(6), gpt(7)
    preferences = worlds.preferences(worlds.triplets(8, P=9), pi_ref)
    real = preferences.mask.any(-1)
    return dict(training=training(), coupled=training(coupled), single=training(dtype=torch.float32),
                mean=likelihood(TEXTS, "mean"), sum=likelihood(TEXTS, "sum"), one_text=likelihood(TEXTS[:1], "mean"),
                score=train.score(pi, preferences.ids, preferences.mask),
                kl=dpo.sequence_kl(pi, pi_ref, preferences.ids[real], preferences.mask[real]))


def samples(n: int) -> list:
    return train.draw(gpt(9), [worlds.PROMPTS[i % 2] for i in range(n)], train.Settings(), Tokenizer, "testing")


def by_ddp() -> dict:
    """The gradient of a weighted batch by DistributedDataParallel, each process with the loss of its prompts alone."""
    pi, N, rank = gpt(1), dist.get_world_size(), dist.get_rank()
    preferences = worlds.preferences(worlds.triplets(8, P=7), gpt(2))
    batch = preferences[torch.arange(7)[rank::N]]
    ids, mask = batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)
    wrapped = torch.nn.parallel.DistributedDataParallel(pi)
    logps = dpo.response_logps(wrapped, ids, mask).view(batch.ids.shape)
    share = batch.weight / preferences.weight.sum()         # of the whole batch; and DDP divides by N
    (N * share * DPO(logps, batch)[0]).sum().backward()
    return {name: p.grad for name, p in pi.named_parameters()}


def work(folder: str):
    """What each process of a Group does."""
    distributed.join()
    found = dict(ddp=by_ddp())
    for name, (micro_batch, checkpoint) in dict(shares=(None, False), parts=(2, False), both=(1, True)).items():
        with distributed.sharded(micro_batch, checkpoint):
            found[name] = everything()
    with distributed.sharded():
        found |= dict(samples=samples(2500), fine_tuned=fine_tuned())
    torch.save(found, Path(folder) / f"{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, list[dict]]:
    """For one, two and three processes, what each of them computed."""
    folder = tmp_path_factory.mktemp("seen")
    groups = {N: Group(N, "-c", "import sys, test_distributed; test_distributed.work(sys.argv[1])", folder) for N in (1, 2, 3)}
    for group in groups.values():
        codes, _, err = group.end()
        assert not any(codes), err
    return {N: [torch.load(folder / f"{N}-{rank}.pt") for rank in range(N)] for N in groups}


@pytest.fixture(scope="module")
def whole() -> dict:
    return everything()


def close(left, right, float64: float = 1e-11, float32: float = 2e-6):
    """The same tree of tensors, within what the dtype can tell."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = left.values(), right.values()
    if not isinstance(left, torch.Tensor):
        for a, b in zip(left, right, strict=True):
            close(a, b, float64, float32)
        return
    tolerance = float64 if left.dtype == torch.float64 else float32
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.fixture
def alone():
    distributed.join()
    yield
    dist.destroy_process_group()


HOW = [(N, how) for N in (1, 2, 3) for how in ("shares", "parts", "both")]


@pytest.mark.parametrize("N, how", HOW)
@pytest.mark.parametrize("what", ["training", "coupled", "single"])
def test_training_in_parts_is_training_on_the_whole_batch(N, how, what, seen, whole):
    """Records (loss, margin, accuracy, gradient norm), gradients after clipping, and final weights: weighted pairs, uneven
    shares, a batch with fewer texts than processes; in float64, of a loss that couples pairs, in float32"""
    for rank in seen[N]:
        close(rank[how][what], whole[what])


def test_the_batches_leave_some_process_without_a_text():
    preferences = worlds.preferences(worlds.triplets(8, P=7), gpt(2))
    texts = [int(preferences[torch.tensor(batch)].mask.any(-1).sum()) for batch in ((4, 0, 5, 2), (0,), (3, 1, 6))]
    assert min(texts) < 3 and any(n % 2 for n in texts) and len(preferences.weight.unique()) > 5


@pytest.mark.parametrize("N, how", HOW)
@pytest.mark.parametrize("what", ["mean", "sum", "one_text"])
def test_likelihood_and_its_gradient_in_parts_are_those_of_the_whole_batch(N, how, what, seen, whole):
    for rank in seen[N]:
        close(rank[how][what], whole[what])


@pytest.mark.parametrize("N, how", HOW)
def test_scores_and_kl_in_parts_are_those_of_the_whole(N, how, seen, whole):
    for rank in seen[N]:
        close(rank[how]["score"], whole["score"])
        close(rank[how]["kl"], whole["kl"])


@pytest.mark.parametrize("N", [2, 3])
def test_all_processes_have_the_same_weights_bit_for_bit(N, seen):
    for rank in seen[N][1:]:
        for how in ("shares", "parts", "both"):
            close(rank[how], seen[N][0][how], 0, 0)
        close(rank["fine_tuned"], seen[N][0]["fine_tuned"], 0, 0)


@pytest.mark.parametrize("N", [2, 3])
def test_gradients_are_those_of_distributed_data_parallel(N, seen):
    pi, preferences = gpt(1), worlds.preferences(worlds.triplets(8, P=7), gpt(2))
    optimizer = torch.optim.SGD(pi.parameters(), lr=0.0)
    next(dpo.train(pi, preferences, DPO, optimizer, [torch.arange(7)]))
    for rank in seen[N]:                                    # DDP divides by N in float32, which a third shows
        close(rank["ddp"], {name: p.grad for name, p in pi.named_parameters()}, 1e-11 if N == 2 else 1e-6)


@pytest.mark.parametrize("N", [2, 3])
def test_fine_tuning_ends_with_the_same_weights(N, seen):
    """In float64, where Muon's bfloat16 does not see the rounding of sums"""
    for rank in seen[N]:
        close(rank["fine_tuned"], seen[1][0]["fine_tuned"], 1e-9)


@pytest.mark.parametrize("N", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_processes(N, seen):
    """Bit for bit; three batches, of which the first is train.draw's own"""
    for rank in seen[N]:
        assert rank["samples"] == seen[1][0]["samples"]
    assert seen[N][0]["samples"][:2048:2] == samples(2500)[:2048:2]             # the shorter prompts come first
    assert len(seen[N][0]["samples"]) == 2500 and seen[N][0]["samples"] != samples(2500)


# ------------------------------------------------------------------------------- memory

def kept_bytes(micro_batch: int | None, checkpoint: bool) -> int:
    """What a forward pass keeps for the way back, parameters apart; autocast to bfloat16, as on a GPU."""
    torch.manual_seed(0)
    pi, kept = GPT(GPTConfig(50, 32, n_layer=4, n_head=2, n_embd=32)), {}
    pi.bf16 = True
    own = {p.untyped_storage().data_ptr() for p in pi.parameters()}
    ids = torch.randint(50, (16, 32))

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with distributed.sharded(micro_batch, checkpoint), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = dpo.response_logps(pi, ids, ids >= 0).sum()
    total = sum(kept.values())
    loss.backward()                                         # what is computed again fits what was computed first
    return total


def test_checkpointed_blocks_keep_less_and_micro_batches_hardly_anything(alone):
    all_of_it, blocks, parts = kept_bytes(None, False), kept_bytes(None, True), kept_bytes(4, False)
    assert blocks < all_of_it / 3 and parts < all_of_it / 30


@pytest.mark.parametrize("micro_batch, checkpoint", [(None, True), (5, False), (3, True), (100, True)])
def test_what_is_computed_again_gives_the_same_gradients(micro_batch, checkpoint, alone, whole):
    with distributed.sharded(micro_batch, checkpoint):
        close(everything(), whole)


def in_turn() -> list[torch.Tensor]:
    """Scores, gradients and KLs of six texts, then of seven, whose last is by itself in a micro-batch of three."""
    torch.manual_seed(0)
    pi, pi_ref, seen = gpt(1), gpt(2).requires_grad_(False), []
    for B in (6, 7):
        ids, mask = torch.randint(worlds.V, (B, 8)), (torch.arange(8) > 0).expand(B, 8)
        seen += [dpo.response_logps(pi_ref, ids, mask)] if B == 6 else dpo.sequence_kl(pi, pi_ref, ids, mask)
        pi.zero_grad()
        dpo.response_logps(pi, ids, mask).sum().backward()
        seen += [*dpo.sequence_kl(pi, pi_ref, ids, mask), *(p.grad.clone() for p in pi.parameters())]
    return seen


def test_compiled_blocks_give_the_same(alone, monkeypatch):
    """Traced forward and backward; the machine's code is PyTorch's matter. If a block had no trace any more for what is computed
    again, autograd would miss what the trace keeps"""
    torch._dynamo.reset()
    traced, compiler = [], torch.compile

    def eager(graph, inputs):
        traced.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)
    expected = in_turn()
    monkeypatch.setattr(torch, "compile", partial(compiler, backend=eager))
    with distributed.sharded(3, True, compile=True):
        close(in_turn(), expected)
    assert traced


def test_nothing_stays_replaced(alone):
    before = dpo.response_logps, dpo.sequence_kl, train.token_nll, train.draw, train.GPT.forward, distributed.model.Block.forward
    with pytest.raises(ZeroDivisionError), distributed.sharded(2, True):
        assert dpo.response_logps is not before[0]
        1 / 0
    assert before == (dpo.response_logps, dpo.sequence_kl, train.token_nll, train.draw, train.GPT.forward,
                      distributed.model.Block.forward)


# ------------------------------------------------------------------------------- the command

DRIVER = """
import os, sys, time, weakref
import data, dpo, train
from beyond import distributed
from kit import checkpoints
checkpoints.bf16_pays = train.bf16_pays = lambda device: False
join, groups = distributed.join, []
def joins():
    store = join()
    groups.append(weakref.ref(distributed.dist.group.WORLD))
    return store
distributed.join = joins
{}
code = distributed.main(sys.argv[1:])
assert groups[0]() is None, "the group outlives the command, and gloo's threads with it, which may abort as Python ends"
sys.exit(code)
"""


def driver(folder: Path, more: str = "") -> Path:
    """The command in float32 also where bfloat16 is fast, with `more` done before."""
    path = folder / "driver.py"
    path.write_text(DRIVER.format(more))
    return path


def torchrun(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, argv)],
                          capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=240)


def results(out: Path) -> dict:
    found = json.loads((out / "results.json").read_text())
    own = ("processes", "micro_batch", "checkpoint_activations", "compile")
    config = {name: v for name, v in found["config"].items() if name not in own}
    return found | dict(seconds=None, peak_memory_bytes=None, config=config)


def approximately(left, right, path: str = ""):
    if isinstance(left, (dict, list)):
        keys = left.keys() if isinstance(left, dict) else range(len(left))
        assert len(left) == len(right)
        for key in keys:
            approximately(left[key], right[key], f"{path}/{key}")
    else:
        assert left == (pytest.approx(right, rel=1e-4, abs=1e-5) if isinstance(right, float) else right), path


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> tuple[list[str], Path]:
    """Flags, and what train.py makes with them, from a pi_ref that is given, in float32."""
    folder = tmp_path_factory.mktemp("core")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, checkpoints):
            patch.setattr(module, "bf16_pays", lambda device: False)
        assert train.main([*TINY, "--out", str(folder / "first")]) == 0
        flags = [*TINY, "--init", str(folder / "first" / "reference.pt"), "--steps", "0", "--labels", "soft"]
        assert train.main([*flags, "--out", str(folder / "core")]) == 0
    return flags, folder / "core"


def assert_same_run(here: Path, core: Path):
    """Samples bit for bit, where no stage draws more than one batch of them; all else to float32's rounding"""
    approximately(results(here), results(core))
    for name in ("samples.txt", "triplets.jsonl"):
        assert (here / name).read_bytes() == (core / name).read_bytes()
    one, two = (torch.load(folder / "dpo-1.0.pt") for folder in (here, core))
    close([one["weights"], one["records"]], [two["weights"], two["records"]], float32=1e-5)


def test_torchrun_ends_with_the_results_of_train_py_and_one_process_keeps_what_two_made(core, tmp_path, monkeypatch):
    (flags, whole), out = core, tmp_path / "out"
    done = torchrun(driver(tmp_path), *flags, "--out", out, "--micro-batch", "7", "--checkpoint-activations")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole)
    assert done.stdout.count("pi_ref: ") == 1 and "2 processes" in done.stdout
    assert done.stderr.count("sampling completions:   0%") == 1                        # one bar, rank 0's
    for module in (train, checkpoints):
        monkeypatch.setattr(module, "bf16_pays", lambda device: False)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert distributed.main([*flags, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.pt")} == before


def test_one_process_ends_with_the_results_of_train_py(core, tmp_path, monkeypatch):
    for module in (train, checkpoints):
        monkeypatch.setattr(module, "bf16_pays", lambda device: False)
    assert distributed.main([*core[0], "--out", str(tmp_path)]) == 0
    assert_same_run(tmp_path, core[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    codes, _, err = Group(2, driver(folder), *TINY, "--out", folder / "out").end()
    assert codes == [0, 0], err
    return folder / "out"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_run_again_the_results_are_those_of_an_undisturbed_run(number, undisturbed, tmp_path):
    waits = driver(tmp_path, "train.evaluate = lambda *_: time.sleep(60) if os.environ['RANK'] == '0' else distributed.dist.barrier()")
    group = Group(2, waits, *TINY, "--out", tmp_path / "out")
    while not (tmp_path / "out" / "dpo-1.0.pt").exists() and group.processes[0].poll() is None:
        time.sleep(0.05)
    for process in group.processes[:1 if number == signal.SIGKILL else 2]:
        process.send_signal(number)
    codes, out, err = group.end()
    if number == signal.SIGINT:
        assert codes == [130, 130] and err.count("distributed.py: interrupted") == 1 and "Traceback" not in err
    codes, *_ = Group(2, driver(tmp_path), *TINY, "--out", tmp_path / "out").end()
    assert codes == [0, 0] and results(tmp_path / "out") == results(undisturbed)


# ------------------------------------------------------------------------------- what fails

def one_line(said: str) -> str:
    line, = [line for line in said.splitlines() if "%|" not in line and line.strip()]
    return line


@pytest.mark.parametrize("flags, says", [
    ("--beta 0", "train.py: argument --beta"), ("--data nowhere.jsonl", "train.py: --data nowhere.jsonl"),
    ("--data README.md", "distributed.py: README.md, line 1"),
])
def test_bad_flag_and_bad_file_are_one_line_once_and_exit_code_2(flags, says, tmp_path):
    codes, out, err = Group(2, "-m", "beyond.distributed", *flags.split(), "--out", tmp_path / "out").end()
    assert codes == [2, 2] and out == "" and one_line(err).startswith(says)


def test_torchrun_is_told_of_a_bad_flag_by_one_line_and_exit_code_2(tmp_path):
    done = torchrun("-m", "beyond.distributed", "--beta", "0", "--out", tmp_path / "out")
    assert done.returncode != 0 and done.stderr.count("train.py: argument --beta") == 1 and "exitcode  : 2" in done.stderr


FAILS = """
step = dpo.train
def fails(*args):
    for n, record in enumerate(step(*args)):
        if n == 1 and os.environ["RANK"] == "{rank}":
            {how}
        yield record
dpo.train = fails
"""


def test_without_a_compiler_compile_is_one_line_and_exit_code_2(tmp_path):
    codes, out, err = Group(1, "-m", "beyond.distributed", *TINY, "--out", tmp_path / "out", "--compile", "--device", "cpu",
                            CXX="nowhere", TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache").end()
    assert codes == [2] and "Traceback" not in err
    assert one_line(err).startswith("distributed.py: --compile: ") and "compiler" in one_line(err)


@pytest.mark.parametrize("rank, how, codes, says", [
    (1, "raise MemoryError", [2, 2], "distributed.py: out of memory"),
    (1, "os._exit(9)", [2, 9], "distributed.py: another process of this run ended"),
    (0, "os._exit(9)", [9, 2], ""),                                             # and with it the store, where it could be said
])
def test_when_one_process_fails_the_others_end_and_one_line_says_why(rank, how, codes, says, tmp_path):
    path = driver(tmp_path, FAILS.format(rank=rank, how=how))
    found, _, err = Group(2, path, *TINY, "--out", tmp_path / "out").end()
    assert found == codes and err.count("distributed.py: ") == bool(says) and says in err and "Traceback" not in err


def test_a_mistake_of_the_program_is_told_once_and_whole(tmp_path):
    path = driver(tmp_path, FAILS.format(rank=1, how="raise RuntimeError('shapes differ')"))
    codes, _, err = Group(2, path, *TINY, "--out", tmp_path / "out").end()
    assert codes == [2, 1] and err.count("Traceback") == 1 and "RuntimeError: shapes differ" in err


@pytest.mark.parametrize("flags", ["--size huge", "--micro-batc 1", "--micro-batch 0", "--checkpoint-activations 1"])
def test_flag_that_is_none_is_refused_by_name(flags, alone, capsys):
    with pytest.raises(SystemExit) as stopped:
        distributed.parse(flags.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and flags.split()[flags.startswith("--check")] in said


# ------------------------------------------------------------------------------- sizes

def test_size_gpt2_is_gpt2s_and_what_is_given_counts_more(alone):
    _, settings = distributed.parse("--data imdb --size gpt2 --prompts 500 --context 512".split())
    assert (settings.prompts, settings.context, settings.tokenizer, settings.completions) == (500, 512, "gpt2", 4)
    assert distributed.parse("--data imdb --size gpt2".split())[1].prompts == 25_000
    with torch.device("meta"):
        pi = GPT(GPTConfig(50_257, settings.context, settings.n_layer, settings.n_head, settings.n_embd))
    assert sum(p.numel() for p in pi.parameters()) == 124_046_592               # GPT-2's 124,439,808 less 512 positions
