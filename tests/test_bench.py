"""beyond/bench.py: what it counts and says; that what it compares is the same. Tiny, and without TRL unless that is installed."""
import json
from dataclasses import replace

import pytest
import torch

from beyond import bench
from worlds import assert_same

TINY = bench.Size(vocab_size=61, context=24, n_layer=1, n_head=2, n_embd=16, pairs=12, sampled=8, matrix=16)
TASKS = {(what, who, dtype) for dtype in bench.DTYPES for who in (bench.HERE, bench.FAST) for what in (
    "five products of 16 x 16", "sampling", *(f"{kind}, 12 pairs of {rows} completions" for kind in ("DPO step", "reference")
                                              for rows in (8, 24))) if who == bench.HERE or "completions" in what}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "new" / "results.json"
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(bench, "installed", lambda: False)
    try:
        assert bench.main(["--repetitions", "2", "--threads", "1", "--out", str(out)], TINY) == 0
    finally:
        patch.undo(), torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_results_hold_every_task_with_its_seconds_rate_and_share(results):
    assert {(m["what"], m["who"], m["dtype"]) for m in results["measured"]} == TASKS
    for m in results["measured"]:
        assert m["ratio"] is None and len(m["seconds"]) == results["repetitions"] == 2
        assert (m["ratio_fast"] is not None) == (m["who"] == bench.HERE and m["unit"] == "pairs")
        assert 0 < m["per_second"]["least"] <= m["per_second"]["median"] <= m["per_second"]["most"]
        assert (m["utilisation"] is None) == (m["what"] == "sampling")
        if m["unit"] == "pairs":
            assert m["units"] == 12 and m["utilisation"] > 0
    assert results["threads"] == 1 and results["loss"]["here"] > 0 and results["loss"]["trl"] is results["loss"]["same"] is None
    assert results["size"]["vocab_size"] == 61 and set(results["versions"]) == {"torch"}


def test_the_table_has_a_row_for_each_task_and_says_that_there_is_nothing_to_compare_with(results):
    said = bench.table(results)
    assert said.count("\n| ") == len(TASKS) and "TRL is not installed" in said and bench.FORMULA in said


@pytest.mark.parametrize("P, K, rows", [(2, 4, 8), (12, 2, 24)])
def test_pairs_are_those_of_the_completions_which_end(P, K, rows):
    batch = bench.preferences(TINY, P, K, 0)
    assert len(batch.pairs) == 12 and batch.mask.any(-1).sum() == rows
    last = (batch.mask * torch.arange(TINY.context)).amax(-1, keepdim=True)
    assert (batch.ids.gather(-1, last) == 60).all() and (batch.ids[batch.mask] == 60).sum() == rows
    assert {(p, *sorted(pair)) for p, *pair in batch.pairs.tolist()} == {
        (p, i, j) for p in range(P) for j in range(K) for i in range(j)}


def test_flops_are_those_that_a_loop_over_tokens_counts():
    """One multiplication and one addition for each weight and token, each pair of query and key twice, no logits of the prompt, no
    token twice up to where a row parts from the one before"""
    batch, (L, C, V) = bench.preferences(TINY, 3, 2, 1), (TINY.n_layer, TINY.n_embd, TINY.vocab_size)
    count, before = 0, []
    for ids, mask in zip(batch.ids.flatten(0, 1).tolist(), batch.mask.flatten(0, 1)):
        read = int(mask.nonzero().max())                            # the last token is predicted, and not read
        for t in range(read):
            count += 2 * C * V * bool(mask[t + 1])
            if ids[:t + 1] == before[:t + 1]:
                continue
            count += L * 2 * (3 * C * C + C * C + 4 * C * C + 4 * C * C)        # qkv, projection, up, down
            count += L * 2 * 2 * C * (t + 1)                                    # scores, and their mean of values
        before = ids[:read]
    assert bench.flops(TINY, batch) == 3 * count               # the backward pass is twice the forward one


def test_of_the_tokens_of_the_shared_batch_a_tenth_is_what_completions_share():
    """beyond/README.md says so"""
    batch = bench.preferences(bench.Size(), 16, 4, 1)
    ids, mask = batch.ids.flatten(0, 1), batch.mask.flatten(0, 1)
    read = (mask * torch.arange(ids.size(1))).amax(1).sum()
    assert round(float(1 - bench.new_places(ids, mask).sum() / read), 1) == 0.1


def test_ratios_are_of_one_repetition_and_shares_of_the_same_dtype():
    here = bench.Task("step", "here", "float32", "pairs", None, flops=100.0)
    there, product = replace(here, who="TRL", flops=None), bench.Task("product", "here", "float32", "products", None, flops=50.0)
    fast = replace(here, who=bench.FAST)
    found = {m["who"] + m["what"]: m for m in bench.summaries({
        product: [(1, 0.5), (1, 0.25), (1, 0.125)], here: [(6, 1.0), (6, 2.0), (6, 4.0)], fast: [(6, 0.5), (6, 0.5), (6, 0.5)],
        there: [(6, 8.0), (6, 12.0), (6, 16.0)]})}
    assert found["TRLstep"]["ratio_fast"] == dict(median=24.0, least=16.0, most=32.0) and found["here, faststep"]["ratio"] is None
    assert found["herestep"]["ratio_fast"] == dict(median=4.0, least=2.0, most=8.0) and found["here, faststep"]["ratio_fast"] is None
    assert found["TRLstep"]["ratio"] == dict(median=6.0, least=4.0, most=8.0) and found["TRLstep"]["utilisation"] is None
    assert_same(found["herestep"]["utilisation"], (100 / 2.0) / (50 / 0.25))
    assert found["herestep"]["ratio"] is None and found["herestep"]["per_second"]["median"] == 3.0


@pytest.mark.parametrize("argv, said", [(["--repetitions", "0"], "--repetitions"), (["--threads", "x"], "--threads"),
                                        (["--data", "imdb"], "--data")])
def test_bad_input_is_one_line_and_exit_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv, TINY)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    threads = torch.get_num_threads()
    assert bench.main(["--out", str(tmp_path / "file" / "results.json")], TINY) == 2
    torch.set_num_threads(threads)
    assert capsys.readouterr().err.startswith("bench.py: ")


@pytest.mark.skipif(not bench.installed(), reason="TRL is not installed")
def test_trl_has_the_same_loss_and_is_timed(monkeypatch):
    results = bench.run(TINY, 1)
    assert results["loss"]["same"]
    assert {m["who"] for m in results["measured"]} == {
        bench.HERE, bench.FAST, "TRL", "TRL, no checkpointing", "transformers"}
    assert all(m["ratio"]["median"] > 0 for m in results["measured"] if m["who"] not in (bench.HERE, bench.FAST))
