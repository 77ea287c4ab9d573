"""The theorems have teeth: each wrong edit of dpo.py, beyond/losses.py, beyond/pairs.py or beyond/ppo.py makes a named theorem
fail, and the sources as they are do not.

An edit replaces text that occurs exactly once; the edited source is run as a module of its own, whose names then
take the place of the module's while the theorem is tried. An edit that no theorem notices would be a missing theorem.
"""
import importlib
import sys
import types
from pathlib import Path

import hypothesis
import pytest

import dpo
from beyond import losses, pairs, ppo

LOSS, UPCAST = "-F.logsigmoid(r_hat_w - r_hat_l)", "logits = at_least_float32(pi(ids[:, :-1], where=where))"
PAIRS = "theta[x, w], theta[x, l], ref[x, w], ref[x, l], beta"
SUMS = "theta, ref = pi_theta.sum(-1), batch.pi_ref.sum(-1)"
MASKED, OF_KL = "\n    where = places(mask[:, 1:]", "row, place = places(mask[:, 1:]"
PUT, SHARE = ".index_put(where, logps), (1, 0))", "share = batch.weight / batch.weight.sum()"
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
        "ids[:, 1:][where]", "ids[:, :-1][where]",
        GPT + "log_probability_obeys_the_chain_rule"),
    "mask one to the right": (
        MASKED, MASKED.replace("mask[", "mask.roll(1, -1)["),
        GPT + "log_probability_of_a_one_token_response_is_that_tokens"),
    "mask one to the left": (
        MASKED, MASKED.replace("mask[", "mask.roll(-1, -1)["),
        GPT + "probabilities_of_all_responses_sum_to_one"),
    "prompt counted": (
        MASKED, MASKED.replace("mask[", "(mask | ~mask.cummax(-1)[0])["),
        GPT + "only_logits_that_predict_response_tokens_get_gradient"),
    "padding counted": (
        MASKED, MASKED.replace("mask[", "mask.cummax(-1)[0]["),
        GPT + "padding_is_invisible"),
    "end token dropped": (
        MASKED, MASKED.replace("mask[", "(mask & mask.roll(-1, -1))["),
        GPT + "probabilities_of_all_responses_sum_to_one"),
    "first token dropped": (
        MASKED, MASKED.replace("mask[", "(mask & mask.roll(1, -1))["),
        GPT + "log_probability_of_a_response_is_the_wholes_less_the_prompts"),
    "sign of log pi flipped": (
        "logps = -F.cross_entropy", "logps = F.cross_entropy",
        GPT + "tokens_outside_the_mask_score_zero"),
    "a token's share of its response": (
        PUT, PUT + " / mask.sum(-1, keepdim=True)",
        GPT + "shared_beginning_of_responses_leaves_the_loss_alone"),
    "logits of the batch's last place": (
        UPCAST, UPCAST + "[-1:].expand(len(where[0]), -1)",
        GPT + "batch_mates_are_invisible"),
    "float32 dropped": (
        UPCAST, "logits = pi(ids[:, :-1], where=where)",
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
        OF_KL, OF_KL.replace("1:", ":-1"),
        GPT + "sampled_estimates_agree_with_enumeration"),
    "KL of a token": (
        ".index_add(0, row, kl)", ".index_add(0, row, kl) / mask.sum(-1)",
        GPT + "sampled_estimates_agree_with_enumeration"),
    "KL of the padding too": (
        OF_KL, OF_KL.replace("mask[", "mask.cummax(-1)[0]["),
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
    # tokens, logits and scores, moved to where they belong
    "scores one to the left of their tokens": (
        PUT, PUT.replace("(1, 0)", "(0, 1)"),
        GPT + "tokens_outside_the_mask_score_zero"),
    "logits of the tokens' own places": (
        UPCAST, "logits = at_least_float32(pi(ids[:, 1:], where=where))",
        GPT + "log_probability_obeys_the_chain_rule"),
    "scores at other places of the mask": (
        PUT, PUT.replace("logps)", "logps.flip(0))"),
        GPT + "log_probabilities_and_kl_are_those_of_the_whole_rows"),
    "KL at the token before": (
        "ids[row, place + 1, None]", "ids[row, place, None]",
        GPT + "each_estimate_is_what_it_says"),
    "scores of other completions": (
        "index_put(real, logps)", "index_put(real, logps.flip(0))",
        LOOP + "records_are_means_over_pairs_by_weight"),
}

LAWS = "test_losses.test_"
IPO, Z_0, MEANS = "return (A - B - 1 / (2 * tau)).square()", ".mean().clamp(min=0).detach()", "mean_logps(pi_theta, batch)"
RATIO, HARD = "(pi_theta - batch.pi_ref).sum(-1), batch)", "(A - 1 / (2 * beta)).square() + (B + 1 / (2 * beta)).square()"
UNPAIRED, RESTATED = "batch.mask.any(-1) & (won + lost == 0)", LAWS + "each_loss_is_its_restatement"
TAIL = """alpha * tokens).sum(-1) for tokens, mask in
                        zip(of_pairs(pi_theta - batch.pi_ref, batch), of_pairs(batch.mask, batch))"""

EDITS_OF_LOSSES = {     # the same of beyond/losses.py
    # what all share
    "reference left out": (
        RATIO, "pi_theta.sum(-1), batch)",
        LAWS + "only_orpo_and_simpo_are_reference_free"),
    "log-ratio of a position": (
        RATIO, RATIO.replace("sum", "mean"),
        RESTATED),
    "y_w and y_l swapped": (
        "return values[x, w], values[x, l]", "return values[x, l], values[x, w]",
        LAWS + "conservative_loss_without_noise_is_dpo"),
    "means before pairs": (
        "return theta_w.sum(-1) / mask_w.sum(-1), theta_l.sum(-1) / mask_l.sum(-1)",
        "return of_pairs(pi_theta.sum(-1) / batch.mask.sum(-1), batch)",
        LAWS + "empty_completions_and_padding_are_invisible"),
    # noisy labels
    "label smoothing's sign": (
        "- epsilon * F.logsigmoid(-z), beta", "+ epsilon * F.logsigmoid(-z), beta",
        LAWS + "conservative_loss_is_least_at_the_logit_of_its_confidence"),
    "label smoothing on top of a whole label": (
        "return -(1 - epsilon) * F.logsigmoid(z)", "return -F.logsigmoid(z)",
        LAWS + "conservative_loss_is_dpos_mean_over_flips"),
    "robust loss's sign": (
        "+ epsilon * F.logsigmoid(-z)", "- epsilon * F.logsigmoid(-z)",
        LAWS + "robust_loss_averages_over_flips_to_the_clean_one"),
    "robust loss not rescaled": (
        " / (1 - 2 * epsilon)", "",
        LAWS + "robust_loss_averages_over_flips_to_the_clean_one"),
    "robust loss kept positive": (
        "return (-(1 - epsilon)", "return F.relu(-(1 - epsilon)",
        LAWS + "robust_loss_of_one_pair_has_no_lower_bound"),
    # other curves
    "IPO's silent average": (
        IPO, "A, B = (v / n for v, n in zip((A, B), of_pairs(batch.mask.sum(-1), batch)))\n    " + IPO,
        LAWS + "ipo_looks_at_sums_over_tokens"),
    "IPO's margin doubled": (
        IPO, "return (A - B - 1 / tau).square()",
        LAWS + "ipo_is_least_at_a_finite_margin"),
    "IPO's tau inside the square": (
        IPO, "return (tau * (A - B) - 1 / 2).square()",
        LAWS + "ipo_is_least_at_a_finite_margin"),
    "IPO's r_hat without tau": (
        "tau * A, tau * B", "A, B",
        RESTATED),
    "hinge at 0": (
        "F.relu(1 - beta * (A - B))", "F.relu(-beta * (A - B))",
        LAWS + "hinge_stops_at_a_margin_of_one_for_any_majority"),
    "hinge without beta": (
        "F.relu(1 - beta * (A - B))", "F.relu(1 - (A - B))",
        LAWS + "hinge_has_no_gradient_iff_the_margin_exceeds_one"),
    # KTO
    "z_0 from matched pairs": (
        UNPAIRED, UNPAIRED.replace("==", ">"),
        LAWS + "ktos_reference_point_is_the_mean_over_mismatched_completions"),
    "z_0 from empty completions too": (
        UNPAIRED, "won + lost == 0",
        LAWS + "empty_completions_and_padding_are_invisible"),
    "gradient through z_0": (
        Z_0, Z_0.replace(".detach()", ""),
        LAWS + "no_gradient_passes_through_ktos_reference_point"),
    "z_0 below 0": (
        Z_0, ".mean().detach()",
        LAWS + "ktos_reference_point_is_never_negative"),
    "KTO's undesirable side turned": (
        "torch.sigmoid(beta * (B - z_0))", "torch.sigmoid(beta * (z_0 - B))",
        LAWS + "kto_compares_with_its_reference_point_on_either_side"),
    "KTO's undesirable side compared with y_w": (
        "torch.sigmoid(beta * (B - z_0))", "torch.sigmoid(beta * (B - A))",
        LAWS + "kto_is_linear_in_the_sigmoid_of_the_log_ratio"),
    "KTO's log-sigmoid": (
        "lam_D * torch.sigmoid(beta * (z_0 - A))", "lam_D * -F.logsigmoid(beta * (A - z_0))",
        LAWS + "kto_is_linear_in_the_sigmoid_of_the_log_ratio"),
    "KTO's weights alike": (
        "(lam_D * torch", "(lam_U * torch",
        LAWS + "kto_is_linear_in_the_sigmoid_of_the_log_ratio"),
    "a prompt's own completion for a mismatched one": (
        "order.roll(most)", "order",
        LAWS + "mismatched_completions_are_those_of_other_prompts"),
    "a completion of the same prompt elsewhere": (
        "order.roll(most)", "order.roll(1)",
        LAWS + "mismatched_completions_are_those_of_other_prompts"),
    "a mismatched completion where it stood": (
        "(start[other] - start)", "(start - start)",
        LAWS + "mismatched_completions_are_those_of_other_prompts"),
    "mismatched completions not scored": (
        "pi_ref=score(ids, mask)", "pi_ref=torch.zeros(ids.shape)",
        LAWS + "mismatched_completions_are_those_of_other_prompts"),
    "always the first completion": (
        "torch.multinomial(mask.any(-1).float().cpu(), 1, generator=generator).to(ids.device)[other, 0]", "0 * other",
        LAWS + "every_completion_of_another_prompt_can_be_the_mismatched_one"),
    # SPPO
    "SPPO of the margin alone": (
        HARD, "(A - B - 1 / beta).square()",
        LAWS + "hard_sppo_pins_both_log_ratios"),
    "SPPO's y_l raised": (
        HARD, HARD.replace("B + 1", "B - 1"),
        LAWS + "hard_sppo_pins_both_log_ratios"),
    "SPPO's beta for its eta": (
        "(A - (P_w - 0.5) / beta)", "(A - (P_w - 0.5) * beta)",
        LAWS + "sppo_with_probabilities_pins_every_log_ratio"),
    "SPPO's wins counted, not weighed": (
        "tally(batch, batch.weight)", "tally(batch, torch.ones_like(batch.weight))",
        LAWS + "sppo_with_probabilities_pins_every_log_ratio"),
    "SPPO's probability for its excess over a half": (
        "(P_l - 0.5)", "P_l",
        LAWS + "sppo_of_two_with_sure_labels_is_the_hard_one"),
    # without a reference
    "ORPO on sums": (
        "m_w, m_l = " + MEANS, "m_w, m_l = of_pairs(pi_theta.sum(-1), batch)",
        LAWS + "losses_of_means_ignore_repetition"),
    "ORPO's probabilities for odds": (
        "m - torch.log(-torch.expm1(m)) for", "m for",
        LAWS + "log_odds_of_two_arms_are_twice_their_log_ratio"),
    "ORPO's fine-tuning turned round": (
        "return -m_w - lam", "return m_w - lam",
        LAWS + "log_odds_of_two_arms_are_twice_their_log_ratio"),
    "SimPO without lengths": (
        "beta * m for m in " + MEANS, "beta * m for m in of_pairs(pi_theta.sum(-1), batch)",
        LAWS + "losses_of_means_ignore_repetition"),
    "SimPO's reference": (
        "beta * m for m in " + MEANS, "beta * m for m in mean_logps(pi_theta - batch.pi_ref, batch)",
        LAWS + "simpo_at_equal_lengths_is_dpo_from_a_uniform_reference"),
    "SimPO's margin subtracted": (
        "F.logsigmoid(r_hat_w - r_hat_l - gamma)", "F.logsigmoid(r_hat_w - r_hat_l + gamma)",
        LAWS + "simpo_asks_for_its_margin"),
    # displacement and length
    "DPOP's penalty where y_w has risen": (
        "F.relu(-A)", "F.relu(A)",
        LAWS + "positive_loss_is_dpos_iff_the_chosen_response_has_not_fallen"),
    "DPOP's penalty a bonus": (
        "- beta * lam * F.relu", "+ beta * lam * F.relu",
        LAWS + "positive_loss_is_dpos_iff_the_chosen_response_has_not_fallen"),
    "DPOP's penalty on either sign": (
        "F.relu(-A)", "-A",
        LAWS + "positive_loss_is_dpos_iff_the_chosen_response_has_not_fallen"),
    "R-DPO's sign": (
        "+ alpha * (length_w - length_l)", "- alpha * (length_w - length_l)",
        LAWS + "length_penalised_dpo_finds_the_tilt_of_the_penalised_reward"),
    "R-DPO's alpha times beta": (
        "+ alpha * (length_w - length_l)", "+ alpha * beta * (length_w - length_l)",
        "test_failures.test_a_length_penalty_restores_the_references_stop_probability"),
    "LD-DPO in pi_theta alone": (
        TAIL, TAIL.replace("tokens)", "tokens - (1 - alpha) * ref)").replace("mask in", "mask, ref in")
        .replace("mask, batch)", "mask, batch), of_pairs(batch.pi_ref, batch)"),
        LAWS + "losses_that_compare_with_the_reference_start_at_ln_2"),
    "LD-DPO one token early": (
        "<= shorter", "< shorter",
        LAWS + "length_desensitised_dpo_is_dpo_where_nothing_is_discounted"),
    "LD-DPO beyond the longer": (
        "torch.minimum(", "torch.maximum(",
        LAWS + "length_desensitised_dpo_discounts_the_longer_responses_tail"),
    # rankings
    "worst first": (
        "place, order = lost", "place, order = won",
        LAWS + "ranking_loss_of_pairs_is_dpo"),
    "all completions ranked": (
        ".masked_fill(unranked, -1e30)", "",
        RESTATED),
    "rankings of other prompts": (
        "[batch.pairs[:, 0]], *", "[batch.pairs[:, 0] * 0], *",
        LAWS + "ranking_dpo_on_the_population_finds_the_optimal_policy"),
}

DRAWN = "test_pairs.test_"
GUMBEL, EXTREMES = "torch.empty_like(r).exponential_(generator=generator).log()", "(rewards.argmax(1), rewards.argmin(1))"

EDITS_OF_PAIRS = {      # the same of beyond/pairs.py
    "labels turned round": (
        "data.preferences(prompts, completions, rewards,", "data.preferences(prompts, completions, -rewards,",
        DRAWN + "online_pairs_are_the_policys_own_with_bradley_terry_labels"),
    "rewards of other prompts": (
        "rewards.view(-1, N)", "rewards.view(N, -1).T",
        DRAWN + "completions_stay_with_their_prompts_and_rewards"),
    "worst and best": (
        EXTREMES, "(rewards.argmin(1), rewards.argmax(1))",
        DRAWN + "best_and_worst_of_n_have_the_laws_of_extremes"),
    "best and second best": (
        EXTREMES, "rewards.topk(2, 1).indices.unbind(1)",
        DRAWN + "best_and_worst_make_the_widest_pair"),
    "accepted without r_max": (
        "((r - r_max) / beta).exp()", "(r / beta).exp()",
        DRAWN + "accepted_law_is_the_optimal_policy"),
    "accepted with beta multiplied": (
        "((r - r_max) / beta).exp()", "((r - r_max) * beta).exp()",
        DRAWN + "accepted_law_is_the_optimal_policy"),
    "rejected samples kept": (
        "generator=generator) < acceptance", "generator=generator) > acceptance",
        DRAWN + "accepted_samples_have_the_optimal_policys_frequencies"),
    "too few filled up with rejected ones": (
        "keep.sum(1) >= K", "keep.sum(1) >= 1",
        DRAWN + "of_a_prompt_with_too_few_accepted_nothing_is_kept"),
    "Gumbel noise's sign": (
        "noisy = r - ", "noisy = r + ",
        DRAWN + "rankings_have_plackett_luces_frequencies"),
    "no noise": (
        " - " + GUMBEL, "",
        DRAWN + "rankings_have_plackett_luces_frequencies"),
    "normal noise": (
        GUMBEL, "torch.randn(r.shape, generator=generator) * 1.2825",
        DRAWN + "rankings_have_plackett_luces_frequencies"),
    "missing completions ranked last": (
        " & r.isfinite()[:, None, :]", "",
        DRAWN + "missing_completions_are_in_no_ranking"),
    "rewards of y_w for y_l's": (
        '("reward_chosen", "reward_rejected")', '("reward_rejected", "reward_chosen")',
        DRAWN + "rewards_find_their_completions_again"),
}
CLIMB = "test_ppo.test_"
EDITS_OF_PPO = {        # the same of beyond/ppo.py
    "the KL's sign": (
        "0.0) - beta * log_ratio", "0.0) + beta * log_ratio",
        CLIMB + "policy_gradient_is_unbiased_at_any_lam_where_the_critic_is_right"),
    "no KL": (
        " - beta * log_ratio.masked_fill(~mask, 0.0)", "",
        CLIMB + "token_rewards_of_a_response_add_up_to_the_objectives_integrand"),
    "the reward at the first token": (
        "mask & ~F.pad(mask[:, 1:], (0, 1))", "mask & ~F.pad(mask[:, :-1], (1, 0))",
        CLIMB + "token_rewards_of_a_response_add_up_to_the_objectives_integrand"),
    "the reward at every token": (
        "mask & ~F.pad(mask[:, 1:], (0, 1))", "mask",
        CLIMB + "token_rewards_of_a_response_add_up_to_the_objectives_integrand"),
    "the value of the token before": (
        "F.pad(values[:, 1:], (0, 1)) - values", "F.pad(values[:, :-1], (1, 0)) - values",
        CLIMB + "gae_is_its_definition"),
    "no value to come": (
        "rewards + F.pad(values[:, 1:], (0, 1)) - values", "rewards - values",
        CLIMB + "gae_is_its_definition"),
    "lam of the past": (
        "ahead = ahead[:, None] - ahead", "ahead = ahead - ahead[:, None]",
        CLIMB + "gae_at_one_is_what_is_still_to_come_less_the_value"),
    "the surrogate's larger side": (
        "torch.minimum(rho * advantages", "torch.maximum(rho * advantages",
        CLIMB + "surrogate_is_never_above_the_unclipped_one_and_stops_at_the_clip"),
    "nothing clipped": (
        "rho.clamp(1 - clip, 1 + clip) * advantages", "rho * advantages",
        CLIMB + "surrogate_is_never_above_the_unclipped_one_and_stops_at_the_clip"),
    "a mean over tokens": (
        "rho.clamp(1 - clip, 1 + clip) * advantages).sum(-1)", "rho.clamp(1 - clip, 1 + clip) * advantages).mean(-1)",
        CLIMB + "surrogates_gradient_at_the_old_policy_is_the_policy_gradient"),
    "the ratio upside down": (
        "rho = (pi_theta - pi_old).exp()", "rho = (pi_old - pi_theta).exp()",
        CLIMB + "surrogates_gradient_at_the_old_policy_is_the_policy_gradient"),
    "a critic that sees the token": (
        "F.pad(critic(ids[:, :-1]), (1, 0)).masked_fill", "critic(ids).masked_fill",
        CLIMB + "values_know_what_came_before_alone"),
    "advantages without the KL to pi_ref": (
        "old - ref, mask, beta), values", "old - old, mask, beta), values",
        CLIMB + "policy_gradient_is_unbiased_whatever_the_critic_says"),
    "Eq. 2 turned round": (
        "-F.logsigmoid(margin), ", "-F.logsigmoid(-margin), ",
        CLIMB + "reward_loss_is_equation_2"),
    "the reward of the first token": (
        "(mask * torch.arange(mask.size(-1), device=mask.device)).argmax(-1)", "mask.int().argmax(-1)",
        CLIMB + "last_is_the_value_at_each_responses_last_token"),
    "the worst reward model kept": (
        'looked[-1]["accuracy"] > best[0]', 'looked[-1]["accuracy"] < best[0]',
        CLIMB + "a_fitted_reward_orders_pairs_and_is_the_best_that_was_looked_at"),
    "the controller turned round": (
        "min(max(kl / target_kl - 1, -0.2), 0.2)", "min(max(1 - kl / target_kl, -0.2), 0.2)",
        CLIMB + "the_controller_finds_its_target"),
    "a head that begins at random": (
        "nn.init.zeros_(self.head.weight), ", "",
        CLIMB + "scalar_model_takes_the_policys_weights_and_starts_at_zero"),
}
ALL = {f"{module.__name__}: {what}": (module, *edit) for module, edits in
       ((dpo, EDITS), (losses, EDITS_OF_LOSSES), (pairs, EDITS_OF_PAIRS), (ppo, EDITS_OF_PPO)) for what, edit in edits.items()}
SOURCES = {module: Path(module.__file__).read_text(encoding="utf-8") for module in (dpo, losses, pairs, ppo)}
FEW = hypothesis.settings(max_examples=10, phases=[hypothesis.Phase.generate], deadline=None, derandomize=True,
                          database=None, report_multiple_bugs=False)


def put_in_place(module: types.ModuleType, source: str, monkeypatch):
    """The names that this source defines, as the module's."""
    edited = types.ModuleType("edited_" + module.__name__)
    monkeypatch.setitem(sys.modules, edited.__name__, edited)               # where dataclasses look it up
    exec(compile(source, edited.__name__, "exec"), vars(edited))
    for name, value in vars(edited).items():
        if not name.startswith("__"):
            monkeypatch.setattr(module, name, value)


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
    """At least 25 edits of dpo.py, 20 of losses.py, 10 of pairs.py and 10 of ppo.py, each of text that the file has exactly once, and no two
    alike"""
    assert len(EDITS) >= 25 and len(EDITS_OF_LOSSES) >= 20 and len(EDITS_OF_PAIRS) >= 10 and len(EDITS_OF_PPO) >= 10
    assert len({(module, old, new) for module, old, new, _ in ALL.values()}) == len(ALL)
    assert [what for what, (module, old, new, _) in ALL.items() if SOURCES[module].count(old) != 1 or old == new] == []


@pytest.mark.parametrize("what", ALL)
def test_wrong_edit_makes_its_theorem_fail(what, monkeypatch):
    """A file with one wrong edit  =>  the theorem named beside it fails.  pitfall 32 (identities, not constants)"""
    module, old, new, theorem = ALL[what]
    put_in_place(module, SOURCES[module].replace(old, new), monkeypatch)
    with pytest.raises(AssertionError):
        try_theorem(theorem, monkeypatch)


@pytest.mark.parametrize("theorem", sorted({theorem for *_, theorem in ALL.values()}))
def test_theorems_hold_of_the_sources_as_they_are(theorem, monkeypatch):
    """The files unedited, put in place in the same way  =>  the theorem holds"""
    for module, source in SOURCES.items():
        put_in_place(module, source, monkeypatch)
    try_theorem(theorem, monkeypatch)
