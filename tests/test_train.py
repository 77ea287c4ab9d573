"""train.py: the whole experiment, tiny, through the command line; its stages; its evaluation's arithmetic."""
import contextlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dpo
import train
from kit import checkpoints, estimates, files, tokens
from model import GPT, GPTConfig

ROOT = Path(train.__file__).parent
TINY = "--reviews 400 --steps 15 --prompts 40 --held-out 6 --samples 128 --batch 8".split()
FIELDS = """method beta seed reward reward_se kl kl_se kl_median kl_p99 win_rate pair_accuracy pair_accuracy_ceiling
            reward_slope reward_r2 length optimal_reward optimal_kl fraction_of_optimal regret r_hat_w r_hat_l margin""".split()


def command(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, args)], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    done = command(*TINY, "--beta", 0.5, 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "KL falls as beta rises" in done.stdout
    return folder


def same(results: dict) -> dict:
    """Without what may differ between two runs."""
    return results | {"seconds": None, "peak_memory_bytes": None}


def made(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def test_the_experiment_writes_all_that_it_promises(out):
    results = json.loads((out / "results.json").read_text())
    assert {"config", "seconds", "reference", "frontier", "points"} <= set(results)
    assert [p["beta"] for p in results["points"]] == [0.5, 2.0]
    for point in results["points"]:
        assert set(FIELDS) <= set(point)
        assert 0 <= point["win_rate"] <= 1 and point["kl"] > 0 and point["kl_p99"] >= point["kl_median"]
    assert results["seconds"].keys() >= {"world", "reference", "completions", "scores", "dpo-0.5", "evaluation-2.0"}
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "pi_ref" in (out / "samples.txt").read_text() and "beta 0.5" in (out / "samples.txt").read_text()
    assert not list(out.glob("*.part"))


def test_triplets_of_a_run_are_its_samples_and_its_rewards(out):
    triplets = [json.loads(line) for line in open(out / "triplets.jsonl", encoding="utf-8")]
    tokenizer = tokens.tokenizer_of(torch.load(out / "world.pt", weights_only=True)["tokens"])
    for t in triplets:
        for name in ("chosen", "rejected"):
            assert t[name] == data.text_of(t[name + "_ids"], tokenizer)
            assert t["reward_" + name] == pytest.approx(data.toy_reward([t["prompt"] + t[name]]).item())
    assert len({t["number"] for t in triplets}) <= 40 and len(triplets) <= 6 * 40


def test_run_again_nothing_is_made_again_and_the_results_are_the_same(out):
    before, results = made(out), json.loads((out / "results.json").read_text())
    assert train.main([*TINY, "--beta", "0.5", "2", "--out", str(out)]) == 0
    assert made(out) == before and same(json.loads((out / "results.json").read_text())) == same(results)


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(out, tmp_path):
    before = made(out)
    assert train.main([*TINY, "--beta", "0.5", "1", "--rate", "0.02", "--out", str(out)]) == 0
    changed = {name for name, when in made(out).items() if before.get(name) != when}
    assert changed == {"dpo-0.5.pt", "evaluation-0.5.pt", "dpo-1.0.pt", "evaluation-1.0.pt"}


def test_the_same_seed_gives_the_same_results(out, tmp_path):
    for name in ("one", "two"):
        assert train.main([*TINY, "--beta", "1", "--out", str(tmp_path / name)]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert same(one) == same(two)


def test_show_prints_one_triplet_with_its_mask(out, tmp_path, capsys):
    assert train.main([*TINY, "--show", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "chosen" in printed and "rejected" in printed and "[" in printed
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("labels", ["soft", "argmax"])
def test_other_labels_run_and_only_drawn_ones_predict_a_place(labels, tmp_path):
    assert train.main([*TINY, "--labels", labels, "--beta", "1", "--out", str(tmp_path)]) == 0
    point, = json.loads((tmp_path / "results.json").read_text())["points"]
    assert (point["optimal_kl"] is None) or labels == "soft"
    assert point["pair_accuracy_ceiling"] == 1.0 or labels == "soft"


def test_what_is_reported_is_what_it_says_by_plain_arithmetic(out, monkeypatch):
    """Every figure of a point, from the texts that were drawn, by loops over lists; the curve's place by Eq. 4 itself."""
    drawn = {}
    real = train.draw
    monkeypatch.setattr(train, "draw", lambda pi, prompts, *rest: drawn.setdefault(rest[-1], (prompts, real(pi, prompts, *rest)))[1])
    e = train.prepare(train.parse([*TINY, "--beta", "0.5", "2"])[1], out, torch.device("cpu"))
    torch.manual_seed(0)
    pi_theta = train.copy.deepcopy(e.pi_ref)
    with torch.no_grad():
        pi_theta.wte.weight.add_(0.02 * torch.randn_like(pi_theta.wte.weight))
    point = train.evaluate(e, pi_theta, 2.0)["point"]
    (prompts, responses), P = drawn["sampling DPO, beta 2"], len(e.held["prompts"])
    texts = [data.text_of(x + y, e.tokenizer) for x, y in zip(prompts, responses)]
    r, M = data.toy_reward(texts).tolist(), len(prompts) // P
    by_prompt = [sum(r[p * M:(p + 1) * M]) / M for p in range(P)]
    ref = e.held["rewards"]["reward"].tolist()
    wins = [(r[p * M + m] > ref[p][m]) + 0.5 * (r[p * M + m] == ref[p][m]) for p in range(P) for m in range(M)]
    close = lambda name, value: point[name] == pytest.approx(value, rel=1e-3, abs=1e-4) or pytest.fail(f"{name}: {point[name]}, {value}")

    def logp(pi, x, y) -> float:
        ids = torch.tensor([x + y])
        with torch.no_grad():
            logps = pi(ids[:, :-1]).float().log_softmax(-1)
        return sum(logps[0, t - 1, ids[0, t]].item() for t in range(len(x), len(x + y)))
    some = range(0, len(prompts), 37)
    ratio = [logp(pi_theta, prompts[i], responses[i]) - logp(e.pi_ref, prompts[i], responses[i]) for i in some]
    assert point["kl_log_ratio"] == pytest.approx(np.mean(ratio), abs=5 * np.std(ratio) / len(ratio) ** 0.5 + 1e-3)
    close("reward", sum(r) / len(r))
    close("reward_se", np.std(by_prompt, ddof=1) / P ** 0.5)
    close("win_rate", sum(wins) / len(wins))
    close("length", sum(map(len, responses)) / len(responses))
    gaps, gaps_hat, accurate, r_w, r_l = [], [], [], [], []
    for (p, w, l), gap in zip(e.held_pairs.pairs.tolist(), e.held["gap"].tolist()):
        r_hat = []
        for k in (w, l):
            ids, mask = e.held_pairs.ids[p, k], e.held_pairs.mask[p, k]
            x, y = ids[:int(mask.nonzero().min())].tolist(), ids[mask].tolist()
            r_hat.append(2.0 * (logp(pi_theta, x, y) - logp(e.pi_ref, x, y)))
        gaps.append(gap), gaps_hat.append(r_hat[0] - r_hat[1]), r_w.append(r_hat[0]), r_l.append(r_hat[1])
        accurate.append((gaps_hat[-1] > 0) + 0.5 * (gaps_hat[-1] == 0))
    both, n = sum(a * b for a, b in zip(gaps, gaps_hat)), len(gaps)
    close("pair_accuracy", sum(accurate) / n)
    close("pair_accuracy_ceiling", sum(1 / (1 + math.exp(-abs(g))) for g in gaps) / n)
    tolerance = 0.05 if e.pi_ref.bf16 else 1e-3                                     # bfloat16 rounds with the batch's shape
    for name, value in dict(r_hat_w=sum(r_w) / n, r_hat_l=sum(r_l) / n, margin=sum(gaps_hat) / n,
                            reward_slope=both / sum(g * g for g in gaps),
                            reward_r2=both ** 2 / (sum(g * g for g in gaps) * sum(g * g for g in gaps_hat))).items():
        assert point[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    if point["regret"] is not None:
        log_Z = [math.log(sum(math.exp(v / 2.0) for v in row) / len(row)) for row in ref]
        close("regret", 2.0 * sum(log_Z) / P - point["reward"] + 2.0 * point["kl"])
        tilt = [[math.exp(v / 2.0) / sum(math.exp(u / 2.0) for u in row) for v in row] for row in ref]
        close("optimal_reward", sum(p * v for ps, row in zip(tilt, ref) for p, v in zip(ps, row)) / P)
        close("optimal_kl", sum(p * math.log(p * len(ps)) for ps in tilt for p in ps) / P)


# --------------------------------------------------------------------------------------------- IMDb, in its real layout

def small_imdb(path: Path) -> Path:
    """An archive of 600 reviews in the layout of the real one, written by the grammar and labelled by the true reward."""
    reviews = data.toy_reviews(900, 5)
    with tarfile.open(path, "w:gz") as tar:
        for i, (text, r) in enumerate(zip(reviews, data.toy_reward(reviews).tolist())):
            label = "unsup" if i >= 600 else "pos" if r > 0 else "neg"
            info = tarfile.TarInfo(f"aclImdb/{'test' if i % 2 and i < 600 else 'train'}/{label}/{i}_{9 if r > 0 else 2}.txt")
            content = (text.capitalize() + "<br /><br />" + text).encode()
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def test_imdb_runs_from_an_archive_in_the_real_layout(tmp_path, capsys):
    path = small_imdb(tmp_path / "small.tar.gz")
    argv = ["--data", "imdb", "--imdb", str(path), "--beta", "1", "--out", str(tmp_path / "out")]
    assert train.main(argv + "--steps 5 --prompts 12 --held-out 4 --samples 64 --batch 6".split()) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"whole", "words_20"} <= set(results["classifier"])
    assert math.isfinite(results["points"][0]["judge_reward"]) and results["config"]["imdb"] == "small.tar.gz"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.tar.gz"]
    assert train.main([*argv, "--held-out", "5000"]) == 2 and "too few reviews" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- preferences of one's own

def own(path: Path, n: int = 60) -> Path:
    """Prompts with two to six pairs each, that prefer cheerful words."""
    rng = random.Random(0)
    rows = [dict(prompt=f"Film {i // 3}, in a word?", chosen=f" {rng.choice(['superb', 'moving', 'clever'])} ({i})",
                 rejected=f" {rng.choice(['dull', 'bland'])} ({i})", source="kept by nobody") for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_own_preferences_train_with_no_true_reward(tmp_path, capsys):
    path, out = own(tmp_path / "own.jsonl"), tmp_path / "out"
    argv = f"--data {path} --context 48 --steps 20 --vocab-size 300 --beta 0.1 1 --rate 0.001 --batch 2 --out {out}".split()
    assert train.main(argv) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "Held-out pairs ordered as labelled" in said and results["config"]["data"] == "own.jsonl"
    assert results["frontier"] == [] and "reward" not in results["reference"]
    for point in results["points"]:
        assert point["margin"] == pytest.approx(point["r_hat_w"] - point["r_hat_l"], abs=1e-5)
        assert point["kl"] > 0 and 0 <= point["pair_accuracy"] <= 1 and "reward" not in point
    assert max(p["pair_accuracy"] for p in results["points"]) > 0.9
    triplets = [json.loads(line) for line in open(out / "triplets.jsonl", encoding="utf-8")]
    assert {t["prompt"] for t in triplets} < {json.loads(line)["prompt"] for line in open(path)}        # some are held out
    assert (out / "figure.png").exists() and "beta 0.1" in (out / "samples.txt").read_text(encoding="utf-8")
    assert train.main(["--data", str(out / "triplets.jsonl"), *argv[2:-1], str(tmp_path / "again")]) == 0       # reads what it writes


def test_checkpoint_is_the_reference_as_it_is_or_fine_tuned_further(tmp_path):
    path, first = own(tmp_path / "own.jsonl"), tmp_path / "first"
    flags = f"--data {path} --beta 1 --batch 8".split()
    assert train.main([*flags, "--context", "48", "--steps", "20", "--vocab-size", "300", "--out", str(first)]) == 0
    before = checkpoints.read_checkpoint(first / "reference.pt")["weights"]
    for more in ([], ["--steps", "3"]):
        out = tmp_path / f"then{len(more)}"
        assert train.main([*flags, "--init", str(first / "reference.pt"), "--context", "40", *more, "--out", str(out)]) == 0
        after = checkpoints.read_checkpoint(out / "reference.pt")
        assert after["config"]["context"] == 40 and torch.equal(after["weights"]["wte.weight"], before["wte.weight"]) == (not more)
    policy = checkpoints.read_checkpoint(first / "dpo-1.0.pt")["weights"]              # pi_theta can be started from as well
    assert not torch.equal(policy["wte.weight"], before["wte.weight"])


def test_pairs_that_do_not_fit_are_dropped_counted_and_said(tmp_path, capsys):
    """Neither prompt nor response is ever cut: a pair that does not fit is left out.  pitfall 20"""
    path = own(tmp_path / "own.jsonl")
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(prompt="Film 0, in a word?", chosen=" no" * 60, rejected=" yes")) + "\n")
    assert train.main(f"--data {path} --context 48 --steps 1 --vocab-size 300 --show --out {tmp_path / 'out'}".split()) == 0
    said = capsys.readouterr().out
    assert "1 of 61 pairs do not fit in 48 tokens" in said and "chosen" in said and "nats" not in said


# --------------------------------------------------------------------------------------------- bad input

def test_an_interrupted_run_says_so_and_keeps_its_stages(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fine_tune", interrupt)
    assert train.main([*TINY, "--out", str(tmp_path)]) == 130
    assert (tmp_path / "world.pt").exists() and "run again" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- pieces

def test_like_lengths_is_one_pass_over_all_rows():
    lengths = np.random.default_rng(0).integers(1, 40, 1003)
    batches = list(train.like_lengths(lengths, 16, np.random.default_rng(1)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert max(map(len, batches)) <= 16
    assert np.mean([np.ptp(lengths[b]) for b in batches]) < 5 < np.ptp(lengths[:16])


def test_packing_is_undone_by_unpacking():
    lists = [[1, 2, 3], [], [4]]
    assert files.unpack(files.pack(lists)) == lists


def test_fine_tuning_lowers_the_loss_from_the_uniform_one():
    settings = train.Settings(steps=150, rows=16)
    tokenizer = tokens.learn_tokenizer(data.toy_reviews(500, 0), 400)
    openings = data.openings(data.toy_reviews(500, 0), tokenizer, 24)
    torch.manual_seed(0)
    pi = train.fine_tune(GPT(GPTConfig(tokenizer.n_vocab, 24, 1, 2, 32)), openings, settings)
    unseen = data.openings(data.toy_reviews(100, 9), tokenizer, 24)
    assert train.token_nll(pi, unseen).item() < 0.5 * math.log(tokenizer.n_vocab)


def test_a_large_reward_at_no_kl_is_a_fraction_above_one_and_none_beyond_trust():
    r = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    curve, ref = estimates.optimal_curve(r), r.double().mean(1).numpy()
    fraction = lambda gain, kl: estimates.fraction_of_optimal(curve, ref, ref + gain, np.full(20, kl))[0]
    at = int(np.argmin(np.abs(estimates.BETAS - 2)))
    gain, kl = curve["reward"][at].mean() - ref.mean(), curve["kl"][at].mean()
    assert fraction(gain, kl) == pytest.approx(1) and fraction(gain / 2, kl) == pytest.approx(0.5)
    assert fraction(2 * gain, kl) == pytest.approx(2)
    assert fraction(gain, 8.0) is None
    assert curve["trusted"][0] and not curve["trusted"][-1]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's encoding")
def test_gpt2s_encoding_can_be_chosen(tmp_path):
    assert train.main([*TINY, "--tokenizer", "gpt2", "--beta", "1", "--steps", "3", "--out", str(tmp_path)]) == 0
    assert torch.load(tmp_path / "reference.pt", weights_only=True)["config"]["vocab_size"] == 50257


def test_gpt2s_encoding_out_of_reach_is_one_clear_error(monkeypatch):
    def unreachable(name):
        raise ConnectionError
    monkeypatch.setattr(tokens.tiktoken, "get_encoding", unreachable)
    tokens.gpt2_tokenizer.cache_clear()
    with pytest.raises(files.BadInput, match="TIKTOKEN_CACHE_DIR"):
        tokens.gpt2_tokenizer()


def test_bfloat16_changes_logits_by_rounding_alone_and_weights_not_at_all():
    """pi_theta and pi_ref compute alike, and weights stay in float32. pitfalls 14, 16"""
    torch.manual_seed(0)
    pi = GPT(GPTConfig(50, 8, 2, 2, 32))
    ids = torch.randint(0, 50, (4, 8))
    exact = pi(ids)
    pi.bf16 = True
    rounded = pi(ids)
    assert rounded.dtype == torch.bfloat16 and 0 < (rounded.float() - exact).abs().max() < 0.02
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert dpo.response_logps(pi, ids, mask).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in pi.parameters())


def test_a_rate_that_diverges_is_one_clear_error(tmp_path, capsys):
    assert train.main([*TINY, "--beta", "1", "--rate", "1e12", "--out", str(tmp_path)]) == 2
    assert "lower --rate" in capsys.readouterr().err and not (tmp_path / "dpo-1.0.pt").exists()


def test_the_loop_leaves_gradients_on_for_its_caller():
    pi = GPT(GPTConfig(7, 6, 1, 1, 8))
    ids = torch.randint(0, 7, (1, 2, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = dpo.Preferences(ids, mask, dpo.response_logps(pi, ids[0], mask[0]).detach()[None], torch.tensor([[0, 0, 1]]),
                            torch.ones(1))
    steps = dpo.train(pi, batch, lambda t, b: dpo.dpo(t, b, 1.0), torch.optim.SGD(pi.parameters(), 0.1), [torch.tensor([0])] * 2)
    next(steps)
    assert torch.is_grad_enabled()


HANDED_BACK = """
import time, torch
from kit import terminal
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
terminal.HAND_BACK = 0.5
terminal.keep_freed_memory()
before, blocks = resident(), [torch.ones(1 << 18) for _ in range(200)]
last = torch.ones(1 << 18)              # above them, so that they are not the heap's end
del blocks
kept = resident() - before              # of 200 MiB
deadline = time.monotonic() + 30
while resident() - before > 50 << 20 and time.monotonic() < deadline:
    time.sleep(0.1)
print(kept >> 20, resident() - before >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this hint is for glibc")
def test_freed_memory_is_kept_at_first_and_handed_back_in_time():
    kept, later = map(int, subprocess.check_output([sys.executable, "-c", HANDED_BACK], cwd=ROOT, text=True).split())
    assert kept > 150 and later <= 50


# ---------------------------------------------------------------------------------------------- a GPU is never waited for

def two_steps_on(device: str, may_wait: bool = True, **options) -> tuple[GPT, list[dict]]:
    """A GPT on the device after two steps of DPO on preferences that are on the CPU, and their records."""
    torch.manual_seed(0)
    pi = GPT(GPTConfig(11, 8, 2, 2, 16)).to(device)
    ids = torch.randint(0, 11, (4, 3, 8))
    mask = (torch.arange(8) >= 2) & (torch.arange(8) < torch.randint(3, 9, (4, 3, 1)))
    mask[1, 2] = False                                                  # a prompt with fewer completions
    pairs = torch.tensor([[p, 0, 1] for p in range(4)] + [[0, 2, 1]])
    preferences = dpo.Preferences(ids, mask, -mask.float(), pairs, torch.ones(5))
    optimizer = torch.optim.SGD(pi.parameters(), lr=0.1, momentum=0.9, **options)
    batches = [torch.tensor([0, 1]), torch.tensor([3, 0])]
    if not may_wait:
        torch.cuda.set_sync_debug_mode("error")
    try:
        return pi, list(dpo.train(pi, preferences, partial(dpo.dpo, beta=0.5), optimizer, batches, max_grad_norm=1.0))
    finally:
        if not may_wait:
            torch.cuda.set_sync_debug_mode("default")


def test_the_cache_of_a_gpu_s_batch_of_samples_is_as_large_as_draw_says():
    with torch.device("meta"):
        pi = train.GPT(train.GPTConfig(50257, 512, 12, 12, 768))
    pi.bf16 = True
    cache = pi.new_cache(2 ** 19 // 512, 512)
    assert cache.dtype == torch.bfloat16 and round(cache.nbytes / 1e9) == 19 and "19 GB" in train.draw.__doc__


def test_a_step_asks_its_device_nothing(monkeypatch):
    """On the device `meta` there are shapes and no numbers, so a step that asked for a number, or for a shape that depends on
    numbers (nonzero's, a mask's), would be an error  =>  on a GPU the host need not wait"""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())       # it knows no meta
    pi, records = two_steps_on("meta")
    assert {v.device.type for v in (*records[-1].values(), *(p.grad for p in pi.parameters()))} == {"meta"}
    with pytest.raises(RuntimeError):
        torch.ones(2, device="meta").nonzero()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_steps_on_a_gpu_are_those_on_a_cpu_and_wait_for_nothing():
    two_steps_on("cuda", fused=True)                                    # what is loaded and allocated once
    there, seen = two_steps_on("cuda", may_wait=False, fused=True)
    here, expected = two_steps_on("cpu", fused=True)
    for left, right in zip((*seen[-1].values(), *there.parameters()), (*expected[-1].values(), *here.parameters())):
        torch.testing.assert_close(left.detach().cpu(), right.detach(), atol=1e-4, rtol=1e-4)
