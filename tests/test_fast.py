"""beyond/fast.py computes what the core computes: log-probabilities, gradients, whole runs; and leaves the core as it was."""
import contextlib
import json
from functools import partial

import pytest
import torch

import dpo
import train
import worlds
from beyond import fast
from kit import checkpoints
from test_train import two_steps_on
from worlds import assert_same

TINY = "--reviews 300 --steps 8 --prompts 24 --held-out 4 --samples 64 --batch 8 --beta 1".split()
gpt = partial(worlds.gpt, context=8, n_layer=2)             # what a place of the first layer holds reaches the second


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_the_gradient_of_a_logprob_is_that_of_its_differences(rows, monkeypatch):
    """gradcheck in float64, with respect to h and W, however many rows are taken at a time"""
    monkeypatch.setitem(fast.ROWS, "cpu", rows)
    torch.manual_seed(0)
    h, W = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    y = torch.tensor([0, 4, 4, 1, 2, 0, 3])
    assert torch.autograd.gradcheck(lambda h, W: fast.LogProbs.apply(h, W, y, True), (h, W))
    assert_same(fast.LogProbs.apply(h, W, y, False), (h @ W.T).log_softmax(-1)[range(7), y])


def test_a_second_derivative_is_refused():
    """As d is kept as if it did not depend on h and W"""
    h, W = (torch.randn(n, 3, requires_grad=True) for n in (2, 5))
    dh, = torch.autograd.grad(fast.LogProbs.apply(h, W, torch.tensor([0, 4]), True).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def test_a_token_of_no_probability_has_a_finite_logprob():
    """log p(y) = -1000, where exp(-1000) is 0 in any float"""
    h, W = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    logp = fast.LogProbs.apply(h, W, torch.tensor([1]), True)
    logp.sum().backward()
    assert logp.item() == -1000 and h.grad.item() == -1 and W.grad.tolist() == [[-1000.0], [1000.0]]


def everything(pi_theta, ids, mask, weight) -> tuple:
    pi_theta.zero_grad()
    logps = dpo.response_logps(pi_theta, ids, mask)
    (logps * weight).sum().backward()
    with torch.no_grad():
        assert_same(dpo.response_logps(pi_theta, ids, mask), logps)
    return logps.detach(), {name: p.grad.clone() for name, p in pi_theta.named_parameters()}


def ragged() -> tuple:
    """Prompts and responses of every length, a response of one token, a row without a response, masks with holes."""
    torch.manual_seed(1)
    B, T = 9, 8
    ids, mask = torch.randint(worlds.V, (B, T)), torch.zeros(B, T, dtype=torch.bool)
    for row, (start, stop) in enumerate([(1, 8), (2, 3), (5, 6), (1, 2), (7, 8), (3, 8), (4, 7), (1, 5)]):
        mask[row, start:stop] = True
    mask[0, 3] = mask[5, 4] = False
    return ids, mask, torch.randn(B, T, dtype=torch.float64)


@pytest.mark.parametrize("rows", [2, 256])
def test_logps_and_gradients_are_the_core_s_on_rows_of_any_length(rows, monkeypatch):
    """In float64, to rounding: nothing of the padding reaches a value or a gradient"""
    monkeypatch.setitem(fast.ROWS, "cpu", rows)
    pi = gpt(1)
    logps, grads = everything(pi, *ragged())
    with fast.fast():
        assert dpo.response_logps is fast.response_logps
        found, found_grads = everything(pi, *ragged())
    assert_same(found, logps)
    for name, grad in grads.items():
        assert_same(found_grads[name], grad)
    assert (logps[ragged()[1]] < 0).all() and (found[~ragged()[1]] == 0).all()


def alike(seed: int, in_order: bool) -> tuple:
    """Rows of two symbols, so that many begin alike, and go on alike where one has ended or is not read."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, generator=generator)
    ids = draw(2, (12, 8))
    if in_order:
        ids = torch.tensor(sorted(ids.tolist()))
    starts, lengths, place = draw(1, 8, (12, 1)), draw(0, 4, (12, 1)), torch.arange(8)
    return ids, (place >= starts) & (place < starts + lengths), torch.randn(12, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("in_order", [False, True])
def test_what_rows_share_is_as_if_each_were_computed_by_itself(seed, in_order):
    """Log-probabilities and gradients, in float64"""
    pi = gpt(1)
    logps, grads = everything(pi, *alike(seed, in_order))
    with fast.fast():
        found, found_grads = everything(pi, *alike(seed, in_order))
    assert_same(found, logps)
    for name, grad in grads.items():
        assert_same(found_grads[name], grad)


@pytest.mark.parametrize("seed", range(8))
def test_of_rows_in_order_each_beginning_is_computed_once(seed):
    """As many tokens pass through the GPT as there are beginnings, which are a tree's nodes; all the rows' if ids are elsewhere"""
    ids, mask, _ = alike(seed, in_order=True)
    mask[:, 7] = True                                                   # all are read to the same place
    pi, seen = gpt(1), []
    pi.h[0].ln_1.register_forward_hook(lambda module, x, y: seen.append(len(y)))
    fast.response_logps(pi, ids, mask)
    assert seen == [len({tuple(row[:t]) for row in ids.tolist() for t in range(1, 8)})] < [12 * 7]
    assert fast.new_places(ids.to("meta"), mask).sum() == 12 * 7


def test_in_bfloat16_a_prompt_of_many_rows_has_the_gradient_of_their_sum():
    """512 gradients meet in one token: a sum in bfloat16, one by one, would stop growing"""
    torch.manual_seed(2)
    ids, mask = torch.randint(worlds.V, (512, 8)), torch.zeros(512, 8, dtype=torch.bool)
    ids[:, :5], mask[:, 5:], weight = ids[0, :5], True, torch.ones(512, 8)
    exact = everything(gpt(1), ids, mask, weight.double())[1]
    pi = gpt(1).float()
    pi.bf16 = True
    with fast.fast():
        found = everything(pi, ids, mask, weight)[1]
    assert sum((found[name] - exact[name]).square().sum() / exact[name].square().sum() for name in exact) < 0.05 ** 2 * len(exact)


def test_in_bfloat16_the_gradient_is_as_near_to_float64_s_as_the_core_s_is():
    ids, mask, weight = ragged()
    exact = everything(gpt(1), ids, mask, weight)[1]
    pi = gpt(1).float()
    pi.bf16 = True

    def error() -> float:
        grads = everything(pi, ids, mask, weight.float())[1]
        return sum((grads[name] - exact[name]).square().sum().item() for name in exact) ** 0.5
    core = error()
    with fast.fast():
        assert 0 < error() < 1.5 * core
    assert core < 0.05 * sum(g.square().sum().item() for g in exact.values()) ** 0.5


def test_of_bfloat16_logits_half_the_bytes_of_the_core_s_are_kept():
    """(n, V), the one large thing that a step of a small GPT keeps: once, and in the dtype of the products"""
    ids, mask, _ = ragged()
    pi = gpt(1).float()
    pi.bf16 = True

    def kept() -> list[torch.dtype]:
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            dpo.response_logps(pi, ids, mask)
        return [t.dtype for t in seen if t.shape == (int(mask.sum()), worlds.V)]
    assert torch.float32 in kept()
    with fast.fast():
        assert kept() == [torch.bfloat16]


def test_training_is_the_core_s_step_by_step():
    """Records and final weights, of weighted pairs of up to four completions"""
    def trained() -> tuple:
        pi, preferences = gpt(1), worlds.preferences(worlds.triplets(8, P=7), gpt(2))
        optimizer = torch.optim.SGD(pi.parameters(), lr=0.5, momentum=0.9)
        records = [*dpo.train(pi, preferences, partial(dpo.dpo, beta=0.7), optimizer, [*torch.arange(7).split(3)], 0.05)]
        return {name: torch.stack([r[name] for r in records]) for name in records[0]}, pi.state_dict()
    records, weights = trained()
    with fast.fast():
        found, found_weights = trained()
    for name in records:
        assert_same(found[name], records[name])
    for name in weights:
        assert_same(found_weights[name], weights[name])


def test_a_step_asks_its_device_nothing(monkeypatch):
    """As of the core: on the device `meta` to ask for a number, or for a shape that depends on numbers, is an error"""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())       # it knows no meta
    with fast.fast():
        pi, records = two_steps_on("meta")
    assert {v.device.type for v in (*records[-1].values(), *(p.grad for p in pi.parameters()))} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_steps_on_a_gpu_are_those_on_a_cpu_and_wait_for_nothing():
    with fast.fast():
        two_steps_on("cuda", fused=True)                                # what is loaded and allocated once
        there, seen = two_steps_on("cuda", may_wait=False, fused=True)
        here, expected = two_steps_on("cpu", fused=True)
    for left, right in zip((*seen[-1].values(), *there.parameters()), (*expected[-1].values(), *here.parameters())):
        torch.testing.assert_close(left.detach().cpu(), right.detach(), atol=1e-4, rtol=1e-4)


def test_a_run_has_train_py_s_pi_ref_and_ends_where_it_does_with_scores_and_policies_of_its_own(tmp_path, monkeypatch):
    for module in (train, checkpoints):
        monkeypatch.setattr(module, "bf16_pays", lambda device: False)

    def made(main) -> tuple[dict, dict, dict]:
        assert main([*TINY, "--out", str(tmp_path)]) == 0
        times = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        return json.loads((tmp_path / "results.json").read_text()), times, torch.load(tmp_path / "dpo-1.0.pt")
    (first, before, core), (found, after, policy) = made(train.main), made(fast.main)
    assert {name for name in before if after[name] != before[name]} == {"scores", "held_out", "dpo-1.0", "evaluation-1.0"}
    assert found["config"] == first["config"] and found["reference"]["nats_per_byte"] == first["reference"]["nats_per_byte"]
    for kind in ("weights", "records"):
        for name, value in core[kind].items():
            assert_same(policy[kind][name], value, 1e-4)


def test_nothing_stays_replaced():
    before = dpo.response_logps, train.Stages
    with pytest.raises(ZeroDivisionError), fast.fast():
        1 / 0
    assert before == (dpo.response_logps, train.Stages)


def test_a_bad_flag_is_train_py_s_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        fast.main(["--beta", "0"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("train.py: argument --beta")
