"""The DPO loss, its metrics, and other losses of pairs, written wrongly."""

import torch
import torch.nn.functional as F

from .registry import wrong

RATIO = "loss_depends_on_policy_and_reference_through_their_ratio_alone"
FINITE = "loss_of_a_hopeless_pair_is_finite"
GRADIENT = "gradient_reaches_both_responses"
LN_2 = "loss_is_ln_2_where_policy_and_reference_agree"


def margin(w, l, ref_w, ref_l):
    """Correct: h."""
    return (w - ref_w) - (l - ref_l)


# ------------------------------------------------- start and gradient, pitfall 13


@wrong("dpo_loss", 13, RATIO)
def reference_left_out(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * (w - l))


@wrong("dpo_loss", 13, RATIO)
def reference_of_the_other_response(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * ((w - ref_l) - (l - ref_w)))


@wrong("dpo_loss", 13, GRADIENT)
def rejected_detached(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * ((w - ref_w) - (l.detach() - ref_l)))


@wrong("dpo_loss", 13, GRADIENT)
def policy_detached(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * margin(w.detach(), l.detach(), ref_w, ref_l))


@wrong("dpo_loss", 13, LN_2)
def target_margin_left_in(w, l, ref_w, ref_l, beta, gamma=0.5):
    return -F.logsigmoid(beta * margin(w, l, ref_w, ref_l) - gamma)


@wrong("dpo_loss", None, "loss_does_not_depend_on_how_the_margin_arises")
def fine_tuning_term_added(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * margin(w, l, ref_w, ref_l)) + 0.5 * (ref_w - w + 1)


# ------------------------------------------------- precision, pitfall 15


@wrong("dpo_loss", 15, FINITE)
def log_of_sigmoid(w, l, ref_w, ref_l, beta):
    return -torch.log(torch.sigmoid(beta * margin(w, l, ref_w, ref_l)))


@wrong("dpo_loss", 15, FINITE)
def log_of_sigmoid_with_an_epsilon(w, l, ref_w, ref_l, beta):
    return -torch.log(torch.sigmoid(beta * margin(w, l, ref_w, ref_l)) + 1e-8)


# ------------------------------------------------- exchanged responses and signs, pitfall 31


@wrong("dpo_loss", 31, "chosen_response_is_pushed_up")
def responses_exchanged(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * margin(l, w, ref_l, ref_w))


@wrong("dpo_loss", 31, "chosen_response_is_pushed_up")
def sign_forgotten(w, l, ref_w, ref_l, beta):
    return F.logsigmoid(beta * margin(w, l, ref_w, ref_l))


@wrong("dpo_loss", 31, "wrongly_ranked_pair_has_the_larger_gradient")
def gradient_of_appendix_a4(w, l, ref_w, ref_l, beta):
    z = beta * margin(w, l, ref_w, ref_l)
    printed = -F.softplus(z)  # its slope is -sigmoid(z), the weight that Appendix A.4 prints
    return printed - (printed + F.logsigmoid(z)).detach()  # the value is that of Eq. 7


# ------------------------------------------------- beta, pitfalls 22 and 24


@wrong("dpo_loss", 24, "larger_beta_makes_the_same_margin_count_for_more")
def divided_by_beta(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(margin(w, l, ref_w, ref_l) / beta)


@wrong("dpo_loss", 22, "loss_depends_on_beta_times_the_margin_alone")
def beta_forgotten(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(margin(w, l, ref_w, ref_l))


@wrong("dpo_loss", 13, RATIO)
def beta_on_the_policy_only(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * (w - l) - (ref_w - ref_l))


@wrong("dpo_loss", 13, LN_2)
def beta_in_front_of_the_loss(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * margin(w, l, ref_w, ref_l)) * beta / 0.1


# ------------------------------------------------- batches, pitfall 19


@wrong("dpo_loss", 19, "loss_of_a_pair_ignores_the_other_pairs")
def divided_by_the_batch_size(w, l, ref_w, ref_l, beta):
    return -F.logsigmoid(beta * margin(w, l, ref_w, ref_l)) / len(w)


# ------------------------------------------------- another loss


@wrong("dpo_loss", 13, LN_2)
def sigmoid_without_log(w, l, ref_w, ref_l, beta):
    return -torch.sigmoid(beta * margin(w, l, ref_w, ref_l))


@wrong("dpo_loss", None, "loss_of_a_confidently_ranked_pair_tends_to_zero")
def label_smoothing_left_on(w, l, ref_w, ref_l, beta, smoothing=0.1):
    z = beta * margin(w, l, ref_w, ref_l)
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


# ------------------------------------------------- metrics, pitfalls 22 and 23


@wrong("metrics", 22, "recorded_rewards_are_implicit_rewards")
def rewards_without_beta(w, l, ref_w, ref_l, beta):
    return {"r_hat_w": (w - ref_w).mean(), "r_hat_l": (l - ref_l).mean()}


@wrong("metrics", 22, "recorded_rewards_are_implicit_rewards")
def rewards_without_reference(w, l, ref_w, ref_l, beta):
    return {"r_hat_w": beta * w.mean(), "r_hat_l": beta * l.mean()}


@wrong("metrics", 22, "tie_counts_one_half")
def ties_are_losses(w, l, ref_w, ref_l, beta):
    return {"accuracy": (w - ref_w > l - ref_l).float().mean()}


@wrong("metrics", 22, "accuracy_compares_implicit_rewards")
def accuracy_without_reference(w, l, ref_w, ref_l, beta):
    h = w - l if not torch.equal(w, ref_w) else 0 * w
    return {"accuracy": ((h.sign() + 1) / 2).mean()}


@wrong("metrics", 22, "recorded_margin_is_the_difference_of_rewards")
def margin_of_log_probabilities(w, l, ref_w, ref_l, beta):
    return {"margin": beta * (w - l).mean()}


@wrong("metrics", 23, "recorded_log_probabilities_are_those_of_the_policy")
def chosen_and_rejected_confused(w, l, ref_w, ref_l, beta):
    return {"logp_w": l.mean(), "logp_l": w.mean()}


# ------------------------------------------------- Eq. 1, 4, 5 and 18


@wrong("bradley_terry", 31, "bradley_terry_prefers_the_higher_reward")
def reversed_preference(r_1, r_2):
    return torch.sigmoid(r_2 - r_1)


@wrong("bradley_terry", None, "bradley_terry_ignores_a_shared_shift")
def ratio_of_sigmoids(r_1, r_2):
    return r_1.sigmoid() / (r_1.sigmoid() + r_2.sigmoid())


@wrong("bradley_terry", 15, "bradley_terry_of_large_rewards_is_a_probability")
def exponentials_that_overflow(r_1, r_2):
    return r_1.exp() / (r_1.exp() + r_2.exp())


@wrong("implicit_reward", 22, "implicit_reward_is_beta_times_the_log_ratio")
def reward_without_beta(logp, ref_logp, beta):
    return logp - ref_logp


@wrong("optimal_policy", 24, "kl_of_the_optimal_policy_falls_as_beta_rises")
def beta_multiplies(ref_logp, r, beta):
    return (ref_logp + r * beta).log_softmax(-1)


@wrong("optimal_policy", None, "optimal_policy_is_a_distribution")
def not_normalised(ref_logp, r, beta):
    return ref_logp + r / beta


@wrong("optimal_policy", None, "equal_rewards_leave_the_reference_unchanged")
def softmax_of_the_reward(ref_logp, r, beta):
    return (r / beta).log_softmax(-1)


@wrong("optimal_policy", None, "optimal_policy_has_more_reward_than_the_reference")
def reward_subtracted(ref_logp, r, beta):
    return (ref_logp - r / beta).log_softmax(-1)


@wrong("plackett_luce", None, "plackett_luce_sums_to_one_over_all_rankings")
def softmax_of_each(r):
    return r.log_softmax(-1).sum(-1)


@wrong("plackett_luce", None, "plackett_luce_chooses_among_those_that_are_left")
def worst_first(r):
    return (r - r.logcumsumexp(-1)).sum(-1)


# ------------------------------------------------- other losses, pitfalls 5, 6 and 30


@wrong("ipo_loss", 6, "ipo_is_least_at_its_target_margin")
def ipo_scaled_margin(w, l, ref_w, ref_l, tau):
    return (tau * margin(w, l, ref_w, ref_l) - 1 / (2 * tau)) ** 2


@wrong("cdpo_loss", None, "conservative_loss_is_least_at_the_logit_of_its_confidence")
def smoothing_on_top(w, l, ref_w, ref_l, beta, epsilon):
    z = beta * margin(w, l, ref_w, ref_l)
    return -F.logsigmoid(z) - epsilon * F.logsigmoid(-z)


@wrong("robust_loss", None, "robust_loss_averages_over_flips_to_the_clean_one")
def robust_not_divided(w, l, ref_w, ref_l, beta, epsilon):
    z = beta * margin(w, l, ref_w, ref_l)
    return -(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)


@wrong("orpo_loss", 5, "odds_ratio_uses_mean_log_probabilities")
def odds_of_sums(logp_w, logp_l, length_w, length_l):
    odds_w, odds_l = (v - torch.log1p(-v.exp()) for v in (logp_w, logp_l))
    return -F.logsigmoid(odds_w - odds_l)


@wrong("simpo_loss", 5, "simpo_compares_means_with_a_target_margin")
def simpo_of_sums(logp_w, logp_l, length_w, length_l, beta, gamma):
    return -F.logsigmoid(beta * (logp_w - logp_l) - gamma)


@wrong("kto_reference_point", 30, "reference_point_uses_mismatched_pairs")
def kl_of_matched_pairs(logp, ref_logp, mismatched_logp, mismatched_ref_logp):
    return (logp - ref_logp).mean().clamp(min=0).detach()


@wrong("kto_reference_point", 30, "reference_point_is_the_clamped_mean_log_ratio")
def gradient_through_the_reference_point(logp, ref_logp, mismatched_logp, mismatched_ref_logp):
    return (mismatched_logp - mismatched_ref_logp).mean().clamp(min=0)
