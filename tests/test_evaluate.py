"""lib/evaluate.py: everything that is reported, by plain arithmetic over lists."""

import csv
import functools
import math

import numpy as np
import pytest
import torch

import data
import dpo
from beyond.monitor import Monitor
from lib import evaluate
from lib.checkpoint import load_gpt, to_checkpoint
from lib.evaluate import evaluate_policy
from lib.inference import compute_logps, generate
from tiny import CPU


@pytest.fixture(scope="module")
def other(toy):
    """A policy that differs from pi_ref, its point at beta 2, and the samples it was judged by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # float32
        reference, dataset = toy.returned["reference"], toy.returned["dataset"]
        pi_theta, pi_ref = load_gpt(reference, CPU), load_gpt(reference, CPU)
        torch.manual_seed(0)
        pi_theta.wte.weight.data += 0.1 * torch.randn_like(pi_theta.wte.weight)
        policy = to_checkpoint(pi_theta, reference["tokens"])
        _, (_, *args) = toy.calls["eval-2"]
        result = evaluate_policy(policy, *args)
        tokenizer, M = data.load_tokenizer(reference["tokens"]), toy.cfg.eval_samples
        how = dataset.eval_prompts, M, tokenizer, 0, "sampling pi_theta"
        samples, _ = generate(pi_theta, *how)
        return result, pi_theta, pi_ref, samples, tokenizer


@torch.no_grad()
def logp(pi, row: list[int], under: list[bool]) -> list[torch.Tensor]:
    """The distributions of the response's tokens, in float64, one position at a time."""
    places = [t for t, inside in enumerate(under) if inside]
    ids = torch.tensor([row[: places[-1]]])
    return {t: pi(ids)[0, t - 1].double().log_softmax(-1) for t in places}


def test_a_point_is_what_plain_arithmetic_gives(toy, other):
    """Means over samples, standard errors over prompts; a tie counts 1/2. pitfalls 22, 25"""
    result, pi_theta, pi_ref, (ids, mask, _), tokenizer = other
    point, M, P = result["point"], toy.cfg.eval_samples, toy.cfg.eval_prompts
    ref = toy.returned["eval_set"].rewards.tolist()
    texts = data.decode_rows(ids, tokenizer)
    r = data.WordReward(data.WEIGHT)(texts).tolist()
    by_prompt = [sum(r[p * M : (p + 1) * M]) / M for p in range(P)]
    gain = [mine - sum(row) / len(row) for mine, row in zip(by_prompt, ref, strict=True)]
    wins = [
        (r[p * M + m] > ref[p][m]) + 0.5 * (r[p * M + m] == ref[p][m])
        for p in range(P)
        for m in range(M)
    ]
    kl = []
    for row, under in zip(ids.tolist(), mask.tolist(), strict=True):
        p, q = logp(pi_theta, row, under), logp(pi_ref, row, under)
        kl.append(sum((p[t].exp() * (p[t] - q[t])).sum().item() for t in p))
    kl_by_prompt = [sum(kl[p * M : (p + 1) * M]) / M for p in range(P)]
    expected = {
        "reward": sum(r) / len(r),
        "reward_se": np.std(by_prompt, ddof=1) / P**0.5,
        "gain": sum(gain) / P,
        "gain_se": np.std(gain, ddof=1) / P**0.5,
        "win_rate": sum(wins) / len(wins),
        "p_positive": sum(1 / (1 + math.exp(-x)) for x in r) / len(r),
        "length": mask.sum().item() / len(r),
        "kl": sum(kl) / len(kl),
        "kl_se": np.std(kl_by_prompt, ddof=1) / P**0.5,
        "beta": 2.0,
    }
    for name, value in expected.items():
        assert point[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert result["shown"]["texts"] == texts[::M]
    assert result["shown"]["rewards"] == pytest.approx(r[::M])


def test_agreement_on_held_out_pairs_is_what_plain_arithmetic_gives(toy, other):
    """Implicit rewards contain beta; a tie counts 1/2. pitfall 22"""
    result, pi_theta, pi_ref, _, tokenizer = other
    pairs, reward = toy.returned["eval_set"].pairs, data.WordReward(data.WEIGHT)
    r_hat, r = [], reward(data.decode_rows(pairs.ids, tokenizer)).tolist()
    for row, under in zip(pairs.ids.tolist(), pairs.mask.tolist(), strict=True):
        p, q = logp(pi_theta, row, under), logp(pi_ref, row, under)
        r_hat.append(2.0 * sum((p[t] - q[t])[row[t]].item() for t in p))
    margin = [r_hat[w] - r_hat[l] for w, l in pairs.pairs.tolist()]
    gap = [r[w] - r[l] for w, l in pairs.pairs.tolist()]
    n, both = len(gap), sum(m * g for m, g in zip(margin, gap, strict=True))
    share = {
        name: sum((x > 0) + 0.5 * (x == 0) for x in values) / n
        for name, values in (("pair_accuracy", margin), ("pair_accuracy_ceiling", gap))
    }
    expected = share | {
        "margin": sum(margin) / n,
        "r_hat_w": sum(r_hat[w] for w, _ in pairs.pairs.tolist()) / n,
        "r_hat_l": sum(r_hat[l] for _, l in pairs.pairs.tolist()) / n,
        "reward_slope": both / sum(g * g for g in gap),
        "reward_r2": both**2 / sum(g * g for g in gap) / sum(m * m for m in margin),
    }
    for name, value in expected.items():
        assert result["point"][name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


def test_pi_ref_itself_has_no_kl_and_no_margin(toy):
    """pitfalls 12, 14, 28"""
    _, (_, *args) = toy.calls["eval-2"]
    point = evaluate_policy(toy.returned["reference"], *args)["point"]
    assert point["kl"] == 0 and abs(point["margin"]) < 0.1


def test_the_look_during_training_is_what_plain_arithmetic_gives(toy, other, tmp_path, capsys):
    """All held-out pairs, and a sample for each prompt; log-probabilities give the entropy."""
    _, pi_theta, pi_ref, _, tokenizer = other
    dataset, eval_set = toy.returned["dataset"], toy.returned["eval_set"]
    loss = functools.partial(dpo.dpo, beta=2.0)
    monitor, rows = Monitor(dataset, eval_set, 0, tmp_path / "curves.csv"), [{"a": 1}, {"a": 2}]
    monitor(pi_theta, pi_ref, loss, rows, 1)
    found = rows[1]
    assert rows[0] == {"a": 1} and found.pop("a") == 2
    pairs = eval_set.pairs  # fewer than 128 rows, so all of them
    losses, r_hat_w, r_hat_l = loss(compute_logps(pi_theta, pairs.ids, pairs.mask), pairs)
    margin = (r_hat_w - r_hat_l).tolist()
    how = dataset.eval_prompts, 1, tokenizer, 0, "sampling pi_theta"
    (ids, mask, logps), samples = generate(pi_theta, *how)
    r = data.WordReward(data.WEIGHT)(samples)
    expected = {
        "held_out_loss": losses.mean(),
        "held_out_margin": sum(margin) / len(margin),
        "held_out_pair_accuracy": sum((m > 0) + 0.5 * (m == 0) for m in margin) / len(margin),
        "kl": dpo.sequence_kl(pi_theta, pi_ref, ids, mask)[1].mean(),
        "entropy": -logps.sum() / len(ids),
        "length": mask.sum() / len(ids),
        "reward": r.mean(),
        "p_positive": r.sigmoid().mean(),
        "held_out_pairs": len(margin),
        "held_out_r_hat_w": r_hat_w.mean(),
        "held_out_r_hat_l": r_hat_l.mean(),
    }
    texts = found.pop("samples")
    printed = capsys.readouterr().out
    for text in texts:
        assert f" 10% | KL {found['kl']:.2f} | {' '.join(text.split())[:200]}\n" in printed
    first, last = csv.DictReader((tmp_path / "curves.csv").open())
    assert (first["step"], first["a"], first["kl"]) == ("1", "1", "")
    assert (last["step"], last["a"]) == ("2", "2") and float(last["kl"]) == found["kl"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    assert texts == [f"r* {r[i]:+.2f} | {samples[i]}" for i in range(2)]


# ------------------------------------------------- the optimum


@pytest.mark.parametrize("labels", ["bt", "argmax"])
def test_regret_is_zero_at_the_optimum_and_undefined_for_argmax_labels(labels):
    """The optimum of Eq. 4 at beta 2, and a policy that has 0.3 nats less at the same KL.

    Nothing but the fraction is known for argmax labels, and where the sample is too small.
    """
    r = torch.randn(20, 512, generator=torch.Generator().manual_seed(0)).double()
    w = (r / 2).softmax(1)
    best_r, best_kl = (w * r).sum(1, True), (w * (w * 512).log()).sum(1, True)
    gap = evaluate.optimality_gap(r, best_r, best_kl, 2.0, labels)
    worse = evaluate.optimality_gap(r, best_r - 0.3, best_kl, 2.0, labels)
    gain = (best_r.mean() - r.mean()).item()
    for found, lost in ((gap, 0.0), (worse, 0.3)):
        assert found["fraction_of_optimal"] == pytest.approx(1 - lost / gain, abs=0.01)
        assert found["regret"] == (pytest.approx(lost, abs=1e-4) if labels == "bt" else None)
    assert 0 < worse["fraction_of_optimal_se"] < 0.2
    expected = (best_r.mean().item(), best_kl.mean().item()) if labels == "bt" else (None, None)
    assert (gap["optimal_reward"], gap["optimal_kl"]) == pytest.approx(expected)
    assert evaluate.optimality_gap(r, best_r, best_kl, 0.06, labels)["regret"] is None
