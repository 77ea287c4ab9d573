"""beyond/bench.py: what it times is the same work, and what it counts is right. Tiny models."""

import importlib.util
import json
import math

import numpy as np
import pytest
import tiny
import torch

from beyond import bench
from lib.optim import bf16_supported
from model import GPTConfig

CONFIG = GPTConfig(61, 24, 1, 2, 16)
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module", params=[False, True], ids=["no units", "bf16 units"])
def run(request, tmp_path_factory):
    """A tiny run on a processor with or without bfloat16 units: its output, results, dtypes."""
    if request.param and not bf16_supported(torch.device("cpu")):
        pytest.skip("bfloat16 is very slow on this processor")
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch, tiny.Products() as products:
        patch.setattr(bench, "bf16_supported", lambda device: request.param)
        printed = []
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(args[0]))
        assert bench.main(["--tiny", "--repetitions", "2", "--out", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    return request.param, printed[-1], results, products.dtypes


def test_every_task_is_timed_in_every_supported_dtype(run):
    has_units, printed, results, dtypes = run
    kinds = ["float32", "bfloat16"][: 1 + has_units]
    tasks = [("matmul", "torch"), ("DPO step", "core"), ("DPO step", "train.py")]
    tasks += [("sampling", "train.py")]
    tasks += [("DPO step", "TRL"), ("sampling", "transformers")] if HAS_TRL else []
    expected = [(*task, dtype) for dtype in kinds for task in tasks]
    assert [(row["what"], row["who"], row["dtype"]) for row in results["rows"]] == expected
    assert all(row["per_second"] > 0 for row in results["rows"])
    assert printed.count("\n| ") == len(expected)
    assert ("TRL is not installed" in printed) != HAS_TRL
    skipped = "bfloat16 is skipped: this processor does not support it natively"
    assert (skipped in printed) != has_units and (torch.bfloat16 in dtypes) == has_units


def test_all_implementations_start_at_the_same_loss(run):
    """The first loss of each equals the core's, up to rounding in bfloat16, and is not ln 2."""
    _, _, results, _ = run
    cores = [row["loss"] for row in results["rows"] if row["who"] == "core"]
    assert len(set(cores)) == len(cores)
    for dtype in {row["dtype"] for row in results["rows"]}:
        rows = [r for r in results["rows"] if (r["what"], r["dtype"]) == ("DPO step", dtype)]
        losses = [row["loss"] for row in rows]
        tolerance = 1e-5 if dtype == "float32" else 1e-3
        assert len(losses) >= 2 and max(losses) - min(losses) <= tolerance
        assert abs(losses[0] - math.log(2)) > 1e-3


def test_ratios_are_of_one_repetition_and_shares_of_the_matmul_rate():
    """train.py's rate over each one's, by repetition; the table has the median and the range."""
    of = ("matmul", "torch"), ("DPO step", "core"), ("DPO step", "train.py")
    tasks = [bench.Task(*each, "float32", None, "units", 1e6) for each in of]
    rates = np.array([[2.0, 10.0, 20.0], [1.0, 10.0, 40.0], [4.0, 2.0, 2.0]])
    matmul, core, fast = bench.summarise(tasks, rates)
    assert (core["ratio"], core["ratio_min"], core["ratio_max"]) == (2.0, 1.0, 4.0)
    assert fast["ratio"] == 1.0 and fast["per_second"] == 20.0 and "ratio" not in matmul
    flops = rates[:, 0] * 2.0 * bench.N_MATMUL**3
    assert core["share"] == pytest.approx(np.median(rates[:, 1] * 1e6 / flops))


def test_flops_are_those_that_a_loop_over_tokens_counts():
    """Per token read, one product for each weight; per query and key, two; all times 3."""
    batch = bench.random_preferences(CONFIG, 3)
    L, C, V, count = CONFIG.n_layer, CONFIG.n_embd, CONFIG.vocab_size, 0
    for mask in batch.mask:
        for t in range(int(mask.nonzero().max())):  # the last token is not read
            count += L * 2 * 12 * C * C + L * 2 * 2 * C * (t + 1) + 2 * C * V * bool(mask[t + 1])
    assert bench.step_flops(CONFIG, batch) == 3 * count
