"""lib/evaluate.py and beyond/monitor.py: what they report, by plain arithmetic."""

import csv
import functools

import pytest
import torch

import data
import dpo
from beyond.monitor import Monitor
from lib import evaluate
from lib.checkpoint import load_gpt, to_checkpoint
from lib.evaluate import evaluate_policy
from lib.inference import generate
from tiny import CPU

REWARD, TOKENIZER = data.WordReward(data.WEIGHT), data.load_tokenizer(data.toy_tokens())


@pytest.fixture(scope="module")
def other(toy):
    """A policy; pi_ref, from which it differs; and the policy's evaluation at beta 2."""
    reference = toy.returned["reference"]
    pi_theta, pi_ref = load_gpt(reference, CPU), load_gpt(reference, CPU)
    torch.manual_seed(0)
    pi_theta.wte.weight.data += 0.1 * torch.randn_like(pi_theta.wte.weight)
    _, (_, *args) = toy.calls["eval-2"]
    return pi_theta, pi_ref, evaluate_policy(to_checkpoint(pi_theta, reference["tokens"]), *args)


def share_above_zero(x: torch.Tensor) -> torch.Tensor:
    """A tie counts as 1/2."""
    return (x > 0) + 0.5 * (x == 0)


def test_a_point_is_what_plain_arithmetic_gives(toy, other):
    """Means over samples, standard errors over prompts; a tie counts as 1/2. pitfalls 22, 25, 33"""
    pi_theta, pi_ref, result = other
    M, P = toy.cfg.eval_samples, toy.cfg.eval_prompts
    how = toy.returned["dataset"].eval_prompts, M, TOKENIZER, 0, "sampling pi_theta"
    (ids, mask, logps), texts = generate(pi_theta, *how)
    r, ref = REWARD(texts), toy.returned["eval_set"].rewards
    expected = {
        "reward": r,
        "gain": r.view(P, M).mean(1) - ref.mean(1),
        "win_rate": share_above_zero(r.view(P, M) - ref[:, :M]),
        "p_positive": 1 / (1 + (-r).exp()),
        "length": mask.sum(1),
        "entropy": -logps.sum(1),
        "kl": dpo.sequence_kl(pi_theta, pi_ref, ids, mask),
    }
    for name, values in expected.items():
        by_prompt = values.double().view(P, -1).mean(1)
        found = [result["point"][name], result["point"][f"{name}_se"]]
        mean_and_error = [by_prompt.mean().item(), by_prompt.std().item() / P**0.5]
        assert found == pytest.approx(mean_and_error, rel=1e-3, abs=1e-4), name
    assert result["point"]["beta"] == 2.0
    assert result["shown"] == {"texts": texts[::M], "rewards": r[::M].tolist()}


def test_agreement_on_held_out_pairs_is_what_plain_arithmetic_gives(toy, other):
    """Implicit rewards contain beta; a tie counts as 1/2. pitfall 22"""
    pi_theta, pi_ref, result = other
    pairs = toy.returned["eval_set"].pairs
    logps, ref_logps = (
        dpo.response_logps(pi, pairs.ids, pairs.mask).sum(1) for pi in (pi_theta, pi_ref)
    )
    r_hat_w, r_hat_l = 2.0 * (logps - ref_logps).detach()[pairs.pairs.T]
    r_w, r_l = REWARD(data.decode_rows(pairs.ids, TOKENIZER))[pairs.pairs.T]
    margin, gap = r_hat_w - r_hat_l, r_w - r_l
    expected = {
        "pair_accuracy": share_above_zero(margin).mean(),
        "pair_accuracy_ceiling": share_above_zero(gap).mean(),
        "loss": -margin.sigmoid().log().mean(),
        "margin": margin.mean(),
        "r_hat_w": r_hat_w.mean(),
        "r_hat_l": r_hat_l.mean(),
        "pairs": torch.tensor(len(pairs.pairs)),
        "pair_prompts": torch.tensor(len(set(pairs.prompt.tolist()))),
        "reward_slope": (margin @ gap) / (gap @ gap),
        "reward_r2": (margin @ gap) ** 2 / (gap @ gap) / (margin @ margin),
    }
    for name, value in expected.items():
        assert result["point"][name] == pytest.approx(value.item(), rel=1e-2, abs=1e-3), name


def test_evaluation_during_training_is_what_plain_arithmetic_gives(toy, other, tmp_path, capsys):
    """All held-out pairs, and a sample for each prompt; log-probabilities give the entropy."""
    pi_theta, pi_ref, result = other
    dataset, eval_set = toy.returned["dataset"], toy.returned["eval_set"]
    loss = functools.partial(dpo.dpo, beta=2.0)
    monitor, rows = Monitor(dataset, eval_set, 0, tmp_path / "curves.csv"), [{"a": 1}, {"a": 2}]
    monitor(pi_theta, pi_ref, loss, rows, steps=20)
    found = rows[1]
    assert rows[0] == {"a": 1} and found.pop("a") == 2
    how = dataset.eval_prompts, 1, TOKENIZER, 0, "sampling pi_theta"
    (ids, mask, logps), samples = generate(pi_theta, *how)
    r = REWARD(samples)
    expected = {
        "kl": dpo.sequence_kl(pi_theta, pi_ref, ids, mask).mean(),
        "entropy": -logps.sum() / len(ids),
        "length": mask.sum() / len(ids),
        "reward": r.mean(),
        "p_positive": r.sigmoid().mean(),
    }
    for name in ("loss", "margin", "pair_accuracy", "pairs", "pair_prompts", "r_hat_w", "r_hat_l"):
        expected[f"held_out_{name}"] = result["point"][name]  # all, as they are < 128
    texts = found.pop("samples")
    assert texts == [f"r* {r[i]:+.2f} | {samples[i]}" for i in range(2)]
    printed = capsys.readouterr().out
    for text in texts:
        assert f" 10% | KL {found['kl']:.2f} | {' '.join(text.split())[:200]}\n" in printed
    first, last = csv.DictReader((tmp_path / "curves.csv").open())
    assert (first["step"], first["a"], first["kl"]) == ("1", "1", "")
    assert (last["step"], last["a"]) == ("2", "2") and float(last["kl"]) == found["kl"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-3, abs=1e-4), name


# ------------------------------------------------- the optimum


@pytest.mark.parametrize("labels", ["bt", "argmax"])
def test_regret_is_zero_at_the_optimum_and_undefined_for_argmax_labels(labels):
    """The optimum of Eq. 4 at beta 2, and a policy that has 0.3 nats less at the same KL.

    For argmax labels, only the fraction is known. If the sample is too small, the regret is
    unknown.
    """
    r = torch.randn(20, 512, generator=torch.Generator().manual_seed(0)).double()
    w = (r / 2).softmax(1)
    best_r, best_kl = (w * r).sum(1, True), (w * (w * 512).log()).sum(1, True)
    for lost in (0.0, 0.3):
        found = evaluate.optimality_gap(r, best_r - lost, best_kl, 2.0, labels)
        fraction = 1 - lost / (best_r.mean() - r.mean()).item()
        assert found["fraction_of_optimal"] == pytest.approx(fraction, abs=0.01)
        assert 0 < found["fraction_of_optimal_se"] < 0.2
        known = lost, best_r.mean().item(), best_kl.mean().item()
        known = pytest.approx(known, abs=1e-4) if labels == "bt" else (None, None, None)
        assert tuple(found[n] for n in ("regret", "optimal_reward", "optimal_kl")) == known
    assert evaluate.optimality_gap(r, best_r, best_kl, 0.06, labels)["regret"] is None
