"""The theorems have teeth: each wrong edit of dpo.py makes a named theorem fail, and the source as it is does not.

An edit replaces text that occurs exactly once; the edited source is run as a module of its own, whose names then
take the place of dpo's while the theorem is tried. An edit that no theorem notices would be a missing theorem.
"""
import importlib
import sys
import types
from pathlib import Path

import hypothesis
import pytest

import dpo

SOURCE = Path(dpo.__file__).read_text(encoding="utf-8")

LOSS, UPCAST = "-F.logsigmoid(r_hat_w - r_hat_l)", "logits = at_least_float32(pi(ids[:, :-1]))"
PAIRS = "theta[x, w], theta[x, l], ref[x, w], ref[x, l], beta"
SUMS = "theta, ref = pi_theta.sum(-1), batch.pi_ref.sum(-1)"
MASKED, SHARE = "(logps, (1, 0)).masked_fill(~mask, 0.0)", "share = batch.weight / batch.weight.sum()"
BACKWARD, CLIP = "(share * losses).sum().backward()", "clip_grad_norm_(pi_theta.parameters(), max_grad_norm)"

WORLDS = "test_finite_worlds.test_"
GPT = "test_enumerated_gpt.test_"
LOOP = "test_pitfalls.test_"
CURVE = "test_frontier.test_"

EDITS = {   # what is wrong: the text of dpo.py, what takes its place, the theorem that fails
    # preferences and the loss
    "Bradley-Terry turned round": (
        "torch.sigmoid(r_1 - r_2)", "torch.sigmoid(r_2 - r_1)",
        WORLDS + "bradley_terry_prefers_the_higher_reward"),
    "Bradley-Terry without its shift": (
        "torch.sigmoid(r_1 - r_2)", "r_1.sigmoid() / (r_1.sigmoid() + r_2.sigmoid())",
        WORLDS + "bradley_terry_ignores_a_shared_shift"),
    "sign of the loss flipped": (
        LOSS, "F.logsigmoid(r_hat_w - r_hat_l)",
        WORLDS + "loss_falls_with_the_margin"),
    "y_w and y_l swapped in the loss": (
        LOSS, "-F.logsigmoid(r_hat_l - r_hat_w)",
        WORLDS + "gradient_tells_the_main_text_from_appendix_a4"),
    "sigmoid for log-sigmoid": (
        LOSS, "-torch.sigmoid(r_hat_w - r_hat_l)",
        WORLDS + "loss_is_convex_in_the_margin"),
    "hinge for log-sigmoid": (
        LOSS, "F.relu(1 - (r_hat_w - r_hat_l))",
        WORLDS + "loss_is_ln_2_where_policy_and_reference_agree"),
    "square for log-sigmoid": (
        LOSS, "(r_hat_w - r_hat_l - 0.5).square()",
        WORLDS + "dpo_on_the_population_finds_the_optimal_policy"),
    "log of sigmoid": (
        LOSS, "-torch.sigmoid(r_hat_w - r_hat_l).log()",
        WORLDS + "loss_of_a_hopeless_pair_is_finite"),
    "beta dropped": (
        "return beta * (pi_theta - pi_ref)", "return pi_theta - pi_ref",
        WORLDS + "reward_is_recovered_from_its_optimal_policy"),
    "beta squared": (
        "return beta * (pi_theta - pi_ref)", "return beta ** 2 * (pi_theta - pi_ref)",
        WORLDS + "loss_depends_on_beta_times_the_margin_alone"),
    "beta dividing": (
        "return beta * (pi_theta - pi_ref)", "return (pi_theta - pi_ref) / beta",
        WORLDS + "dpo_on_the_population_finds_the_optimal_policy"),
    "reference missing": (
        "return beta * (pi_theta - pi_ref)", "return beta * pi_theta",
        WORLDS + "partition_function_cancels_from_preferences"),
    "reference added": (
        "return beta * (pi_theta - pi_ref)", "return beta * (pi_theta + pi_ref)",
        WORLDS + "every_policy_is_optimal_for_its_own_implicit_reward"),
    "probabilities for log-probabilities": (
        "return beta * (pi_theta - pi_ref)", "return beta * (pi_theta.exp() - pi_ref.exp())",
        WORLDS + "implicit_reward_has_partition_function_one"),
    "reference of y_l taken for y_w's": (
        "implicit_reward(pi_theta_w, pi_ref_w, beta)", "implicit_reward(pi_theta_w, pi_ref_l, beta)",
        WORLDS + "loss_is_minus_log_likelihood_of_the_preference"),
    "y_l's reward detached": (
        "implicit_reward(pi_theta_l, pi_ref_l, beta)", "implicit_reward(pi_theta_l.detach(), pi_ref_l, beta)",
        WORLDS + "gradient_reaches_both_responses_alike_and_the_reference_not"),
    "Plackett-Luce over those already chosen": (
        "r.flip(-1).logcumsumexp(-1).flip(-1)", "r.logcumsumexp(-1)",
        WORLDS + "plackett_luce_chooses_the_best_of_those_that_are_left"),
    "Plackett-Luce over all, each time": (
        "r.flip(-1).logcumsumexp(-1).flip(-1)", "r.logsumexp(-1, keepdim=True)",
        WORLDS + "plackett_luce_sums_to_one_over_all_rankings"),
    "Plackett-Luce's mean": (
        "logcumsumexp(-1).flip(-1)).sum(-1)", "logcumsumexp(-1).flip(-1)).mean(-1)",
        WORLDS + "ranking_loss_of_two_is_the_pair_loss"),
    # the optimum
    "beta multiplied in Eq. 4": (
        "pi_ref + r / beta", "pi_ref + r * beta",
        WORLDS + "optimal_policy_goes_to_the_reference_as_beta_rises"),
    "reward subtracted in Eq. 4": (
        "pi_ref + r / beta", "pi_ref - r / beta",
        WORLDS + "optimal_policy_goes_to_the_best_response_as_beta_falls"),
    "reference left out of Eq. 4": (
        "pi_ref + r / beta", "r / beta",
        WORLDS + "optimal_policy_beats_every_other"),
    "partition function left out": (
        "return tilted - log_Z[..., None], log_Z", "return tilted, log_Z",
        WORLDS + "optimal_policy_is_a_distribution"),
    "partition function of all prompts": (
        "tilted.logsumexp(-1)", "tilted.logsumexp(tuple(range(tilted.ndim))).expand(tilted.shape[:-1])",
        WORLDS + "many_prompts_are_as_many_single_ones"),
    "log Z for beta log Z, given back": (
        "return tilted - log_Z[..., None], log_Z", "return tilted - log_Z[..., None], beta * log_Z",
        WORLDS + "objective_is_its_maximum_minus_a_divergence"),
    "frontier's KL the other way round": (
        "(p * (pi_r - uniform)).sum(-1)", "(uniform.exp() * (uniform - pi_r)).sum(-1)",
        CURVE + "frontier_has_slope_beta"),
    "frontier's KL an entropy": (
        "(p * (pi_r - uniform)).sum(-1)", "-(p * pi_r).sum(-1)",
        CURVE + "reward_and_kl_of_the_optimum_fall_as_beta_rises"),
    "frontier's reward unweighted": (
        "return (p * r).sum(-1)", "return r.mean(-1)",
        CURVE + "frontier_comes_from_the_cumulants_of_the_reward"),
    "frontier of another beta": (
        "optimal_policy(uniform, r, beta)", "optimal_policy(uniform, r, beta / 2)",
        CURVE + "frontier_has_slope_beta"),
    "frontier's reward the best sample's": (
        "return (p * r).sum(-1)", "return r.amax(-1)",
        CURVE + "sampled_frontier_is_biased_low"),
    "samples weighted to a sum of N": (
        "-math.log(r.size(-1))", "0.0",
        CURVE + "sampled_frontier_is_the_optimal_policy_on_the_samples"),
    "effective sample size not squared": (
        "1 / p.square().sum(-1)", "1 / p.sum(-1)",
        CURVE + "sampled_frontier_is_the_optimal_policy_on_the_samples"),
    # log pi(y|x)
    "label shift missing": (
        "ids[:, 1:].flatten()", "ids[:, :-1].flatten()",
        GPT + "log_probability_obeys_the_chain_rule"),
    "mask one to the right": (
        MASKED, MASKED.replace("~mask", "~mask.roll(1, -1)"),
        GPT + "log_probability_of_a_one_token_response_is_that_tokens"),
    "mask one to the left": (
        MASKED, MASKED.replace("~mask", "~mask.roll(-1, -1)"),
        GPT + "probabilities_of_all_responses_sum_to_one"),
    "prompt counted": (
        MASKED, MASKED.replace("~mask", "~(mask | ~mask.cummax(-1)[0])"),
        GPT + "only_logits_that_predict_response_tokens_get_gradient"),
    "padding counted": (
        MASKED, MASKED.replace("~mask", "~mask.cummax(-1)[0]"),
        GPT + "padding_is_invisible"),
    "end token dropped": (
        MASKED, MASKED.replace("~mask", "~(mask & mask.roll(-1, -1))"),
        GPT + "probabilities_of_all_responses_sum_to_one"),
    "first token dropped": (
        MASKED, MASKED.replace("~mask", "~(mask & mask.roll(1, -1))"),
        GPT + "log_probability_of_a_response_is_the_wholes_less_the_prompts"),
    "sign of log pi flipped": (
        "logps = -F.cross_entropy", "logps = F.cross_entropy",
        GPT + "tokens_outside_the_mask_score_zero"),
    "a token's share of its response": (
        MASKED, MASKED + " / mask.sum(-1, keepdim=True)",
        GPT + "shared_beginning_of_responses_leaves_the_loss_alone"),
    "logits of the batch's first row": (
        UPCAST, UPCAST + "[:1].expand(len(ids), -1, -1)",
        GPT + "batch_mates_are_invisible"),
    "float32 dropped": (
        UPCAST, "logits = pi(ids[:, :-1])",
        LOOP + "log_probabilities_are_float32_whatever_the_model_computes_in"),
    # KL
    "log-ratio's sign": (
        "log_ratio = (theta - ref)", "log_ratio = (ref - theta)",
        GPT + "both_estimates_have_the_sequence_kl_as_their_mean"),
    "KL(pi_ref, pi_theta)": (
        "theta.exp() * (theta - ref)", "ref.exp() * (ref - theta)",
        GPT + "both_estimates_have_the_sequence_kl_as_their_mean"),
    "KL's weights left out": (
        "theta.exp() * (theta - ref)", "theta - ref",
        GPT + "second_estimate_is_never_negative"),
    "KL's mask unshifted": (
        "~mask[:, 1:], 0.0", "~mask[:, :-1], 0.0",
        GPT + "sampled_estimates_agree_with_enumeration"),
    "KL of a token": (
        "0.0).sum(-1) for kl", "0.0).mean(-1) for kl",
        GPT + "sampled_estimates_agree_with_enumeration"),
    "KL of the padding too": (
        "~mask[:, 1:], 0.0", "~mask[:, 1:].cummax(-1)[0], 0.0",
        GPT + "each_estimate_is_what_it_says"),
    # pairs and batches
    "mean for sum": (
        SUMS, SUMS.replace("sum", "mean"),
        LOOP + "loss_of_a_pair_is_that_of_its_own_responses_sums"),
    "mean over the response's tokens": (
        SUMS, SUMS + "; theta, ref = (v / batch.mask.sum(-1).clamp(min=1) for v in (theta, ref))",
        GPT + "dpo_trains_a_gpt_to_the_optimal_policy"),
    "reference not frozen": (
        SUMS, "theta, ref = pi_theta.sum(-1), pi_theta.sum(-1).detach()",
        LOOP + "one_batch_can_be_overfitted"),
    "y_w and y_l swapped": (
        PAIRS, "theta[x, l], theta[x, w], ref[x, l], ref[x, w], beta",
        GPT + "dpo_trains_a_gpt_to_the_optimal_policy"),
    "reference's pair swapped": (
        PAIRS, "theta[x, w], theta[x, l], ref[x, l], ref[x, w], beta",
        GPT + "optimal_policy_is_a_fixed_point_of_training"),
    "prompts of a batch not renumbered": (
        "number[self.pairs[keep, :1]]", "self.pairs[keep, :1] % len(prompts)",
        LOOP + "batch_holds_the_preferences_of_its_prompts_and_no_others"),
    "first prompt's pairs lost": (
        "self.pairs[:, 0]] >= 0", "self.pairs[:, 0]] > 0",
        LOOP + "batch_holds_the_preferences_of_its_prompts_and_no_others"),
    "last position lost": (
        ".nonzero().max()) + 1", ".nonzero().max())",
        LOOP + "batch_holds_the_preferences_of_its_prompts_and_no_others"),
    "longest of all prompts kept": (
        "self.mask[prompts].any", "self.mask.any",
        LOOP + "batch_holds_the_preferences_of_its_prompts_and_no_others"),
    "weights of other pairs": (
        "self.weight[keep]", "self.weight[:int(keep.sum())]",
        LOOP + "batch_holds_the_preferences_of_its_prompts_and_no_others"),
    # the loop
    "weights ignored": (
        SHARE, "share = torch.full_like(batch.weight, 1 / len(batch.weight))",
        GPT + "dpo_trains_a_gpt_to_the_optimal_policy"),
    "weights not normalised": (
        SHARE, "share = batch.weight",
        LOOP + "records_are_means_over_pairs_by_weight"),
    "gradient not zeroed": (
        "optimizer.zero_grad()", "pass",
        LOOP + "step_follows_the_gradient_of_the_weighted_mean"),
    "ascent": (
        BACKWARD, "(share * -losses).sum().backward()",
        LOOP + "step_follows_the_gradient_of_the_weighted_mean"),
    "sum over the batch": (
        BACKWARD, "losses.sum().backward()",
        LOOP + "step_follows_the_gradient_of_the_weighted_mean"),
    "no step": (
        "optimizer.step()", "pass",
        LOOP + "step_follows_the_gradient_of_the_weighted_mean"),
    "gradient not clipped": (
        CLIP, CLIP.replace("max_grad_norm)", "math.inf)"),
        LOOP + "step_follows_the_gradient_of_the_weighted_mean"),
    "tie counted as a loss": (
        "(margin.sign() + 1) / 2", "(margin > 0).float()",
        LOOP + "tie_counts_one_half"),
    "tie counted as a win": (
        "(margin.sign() + 1) / 2", "(margin >= 0).float()",
        LOOP + "tie_counts_one_half"),
    "margin's sign": (
        "margin = r_hat_w - r_hat_l", "margin = r_hat_l - r_hat_w",
        LOOP + "records_are_means_over_pairs_by_weight"),
    "log pi(y_l) recorded as log pi(y_w)": (
        "pi_theta_w=pi.sum(-1)[x, w]", "pi_theta_w=pi.sum(-1)[x, l]",
        LOOP + "records_are_means_over_pairs_by_weight"),
}
FEW = hypothesis.settings(max_examples=10, phases=[hypothesis.Phase.generate], deadline=None, derandomize=True,
                          database=None, report_multiple_bugs=False)


def put_in_place(source: str, monkeypatch):
    """The names that this source defines, as dpo's."""
    module = types.ModuleType("edited_dpo")
    monkeypatch.setitem(sys.modules, module.__name__, module)               # where dataclasses look it up
    exec(compile(source, module.__name__, "exec"), vars(module))
    for name, value in vars(module).items():
        if not name.startswith("__"):
            monkeypatch.setattr(dpo, name, value)


def try_theorem(name: str, monkeypatch):
    """Run a theorem test as pytest would, but on few examples and without shrinking."""
    module, function = name.split(".")
    test = getattr(importlib.import_module(module), function)
    if hypothesis.is_hypothesis_test(test):
        monkeypatch.setattr(test, "_hypothesis_internal_use_settings", FEW)
    cases = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for case in [dict(zip([argument], [value])) for argument, values in cases for value in values] or [{}]:
        test(**case)


def test_there_are_edits_enough():
    """At least 25 edits, each of text that dpo.py has exactly once, and no two alike"""
    assert len(EDITS) >= 25 and len({(old, new) for old, new, _ in EDITS.values()}) == len(EDITS)
    assert [what for what, (old, new, _) in EDITS.items() if SOURCE.count(old) != 1 or old == new] == []


@pytest.mark.parametrize("what", EDITS)
def test_wrong_edit_makes_its_theorem_fail(what, monkeypatch):
    """dpo.py with one wrong edit  =>  the theorem named beside it fails.  pitfall 32 (identities, not constants)"""
    old, new, theorem = EDITS[what]
    put_in_place(SOURCE.replace(old, new), monkeypatch)
    with pytest.raises(AssertionError):
        try_theorem(theorem, monkeypatch)


@pytest.mark.parametrize("theorem", sorted({theorem for _, _, theorem in EDITS.values()}))
def test_theorems_hold_of_the_source_as_it_is(theorem, monkeypatch):
    """dpo.py unedited, put in place in the same way  =>  the theorem holds"""
    put_in_place(SOURCE, monkeypatch)
    try_theorem(theorem, monkeypatch)
