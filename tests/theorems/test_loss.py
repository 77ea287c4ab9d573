"""Eq. 7 and its gradient, as functions of the four log-probabilities of a pair.

h is the difference between the log-ratios log pi_theta / pi_ref of y_w and y_l, z = beta h, and s
the logistic function.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from worlds import LN_2, assert_at_most, assert_same, betas, margins, number, pairs, shifts, worlds

steps = st.integers(1, 16).map(lambda k: k / 4)


def at_margin(dpo_loss, h, beta):
    """The loss where log pi_theta / pi_ref of y_w exceeds that of y_l by h."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return dpo_loss(h, zero, zero, zero, beta)


def slopes(dpo_loss, p):
    """d loss / d each of the four log-probabilities, (4, B)."""
    leaves = [side.clone().requires_grad_() for side in p[:4]]
    loss = dpo_loss(*leaves, p.beta).sum()
    assert loss.requires_grad, "the loss has no gradient"
    return torch.stack(
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    ).double()


# ------------------------------------------------- Eq. 7, in the order of diagnosis


@mistake("the policy is detached, or under no_grad", 13, "only pi_ref gets .detach() or no_grad()")
@given(p=pairs)
def test_gradient_reaches_both_responses(dpo_loss, p):
    """pi_theta = pi_ref  =>  dL / dlog pi(y_w) and dL / dlog pi(y_l) are not 0.  Section 4's
    gradient; pitfall 13"""
    start = p._replace(logp_w=p.ref_logp_w, logp_l=p.ref_logp_l)
    w, l, _, _ = slopes(dpo_loss, start)
    assert (w.abs() > 0).all(), "y_w gets no gradient at the start"
    assert (l.abs() > 0).all(), "y_l gets no gradient at the start"


@mistake("sigmoid(z) underflows to 0", 15, "one function: torch.nn.functional.logsigmoid(z)")
@given(z=st.integers(100, 20_000).map(float))
def test_loss_of_a_hopeless_pair_is_finite(dpo_loss, z):
    """z >= 100  =>  the loss at beta h = -z is finite, although s(-z) may underflow. If the loss at
    beta h = -5 is that of Eq. 7, the loss at beta h = -z is z. pitfall 15"""
    loss = at_margin(dpo_loss, -z, 1.0)
    assert torch.isfinite(loss).all(), f"the loss at beta h = {-z} is {loss.item()}"
    near = at_margin(dpo_loss, -5.0, 1.0).double()
    if torch.isclose(near, number([5.00671535]), atol=1e-5):
        assert_same(loss, [z])


@mistake("y_w and y_l exchanged, or a wrong sign", 31, "use -logsigmoid(r_hat_w - r_hat_l)")
@given(p=pairs)
def test_chosen_response_is_pushed_up(dpo_loss, p):
    """pi_theta = pi_ref  =>  dL / dlog pi(y_w) < 0.  Section 4's gradient; pitfall 31"""
    start = p._replace(logp_w=p.ref_logp_w, logp_l=p.ref_logp_l)
    assert (slopes(dpo_loss, start)[0] < 0).all(), "the loss pushes log pi(y_w) down"


@mistake("pi_ref is left out or has the wrong sign", 13, "r_hat = beta * (logp - ref_logp)")
@given(p=pairs, c=shifts.filter(bool))
def test_loss_depends_on_policy_and_reference_through_their_ratio_alone(dpo_loss, p, c):
    """log pi_theta(y_w) + c and log pi_ref(y_w) + c  =>  the same loss.  Eq. 7; pitfall 13"""
    moved = p._replace(logp_w=p.logp_w + c, ref_logp_w=p.ref_logp_w + c)
    assert_same(dpo_loss(*moved), dpo_loss(*p))


@mistake("an extra term, a clamp, or probabilities without log", None, "-logsigmoid(beta * h)")
@given(h=margins, beta=betas)
def test_loss_does_not_depend_on_how_the_margin_arises(dpo_loss, h, beta):
    """h from y_w rising, y_l falling, or pi_ref  =>  the same loss.  Eq. 7"""
    h, zero = number([h]), torch.zeros(1, dtype=torch.float64)
    sources = [(h, zero, zero, zero), (zero, -h, zero, zero), (zero, zero, -h, zero)]
    sources += [(zero, zero, zero, h), (h / 2 - 9, -h / 2 - 9, zero - 7, zero - 7)]
    losses = torch.cat([dpo_loss(*source, beta) for source in sources])
    assert_same(losses, losses[0].expand(5))


@mistake("the loss is normalised by its batch", 19, "one loss per pair; average once, at the end")
@given(p=pairs)
def test_loss_of_a_pair_ignores_the_other_pairs(dpo_loss, p):
    """A pair alone, or in a batch  =>  the same loss.  Eq. 7; pitfall 19"""
    alone = [dpo_loss(*(side[i : i + 1] for side in p[:4]), p.beta) for i in range(len(p.logp_w))]
    together = dpo_loss(*p)
    assert together.shape == p.logp_w.shape, f"shape {tuple(together.shape)}, expected (B,)"
    assert_same(together, torch.cat(alone))


@mistake("not -log sigmoid, or an extra term or epsilon", 13, "-logsigmoid(beta * h), nothing else")
@given(p=pairs)
def test_loss_is_ln_2_where_policy_and_reference_agree(dpo_loss, p):
    """pi_theta = pi_ref  =>  L_DPO = ln 2 for every beta.  Eq. 7; pitfall 13"""
    loss = dpo_loss(p.ref_logp_w, p.ref_logp_l, p.ref_logp_w, p.ref_logp_l, p.beta)
    assert_same(loss, torch.full_like(loss, LN_2))


@mistake("beta divides the margin", 24, "multiply: a larger beta means a stronger pull to pi_ref")
@given(z=st.integers(1, 10).map(lambda k: k / 40), beta=betas)
def test_larger_beta_makes_the_same_margin_count_for_more(dpo_loss, z, beta):
    """h > 0, beta_1 < beta_2  =>  L(h) is no larger at beta_2 than at beta_1.  Eq. 7; pitfall 24"""
    h = z / beta
    assert_at_most(at_margin(dpo_loss, h, 2 * beta), at_margin(dpo_loss, h, beta))


@mistake("beta is missing, squared, or misplaced", 22, "-logsigmoid(beta * h), h from log-ratios")
@given(p=pairs, c=steps)
def test_loss_depends_on_beta_times_the_margin_alone(dpo_loss, p, c):
    """Log-ratios times c, beta over c  =>  the same loss.  Eq. 7; pitfall 22"""
    scaled = p._replace(
        logp_w=p.ref_logp_w + c * (p.logp_w - p.ref_logp_w),
        logp_l=p.ref_logp_l + c * (p.logp_l - p.ref_logp_l),
        beta=p.beta / c,
    )
    assert_same(dpo_loss(*scaled), dpo_loss(*p))


@mistake("sigmoid without log, or Appendix A.4", 31, "gradient's weight: s(r_hat_l - r_hat_w)")
@given(h=st.integers(1, 200).map(lambda k: k / 10), beta=betas)
def test_wrongly_ranked_pair_has_the_larger_gradient(dpo_loss, h, beta):
    """h > 0  =>  |dL/dh| at -h exceeds that at h.  Section 4's gradient; pitfall 31"""
    h = number([-h, h]).requires_grad_()
    slope = torch.autograd.grad(at_margin(dpo_loss, h, beta).sum(), h)[0]
    wrong, right = slope.abs()
    assert wrong > right, "a correctly ranked pair has the larger gradient"


@mistake("label smoothing (conservative DPO)", None, "no smoothing: the loss must tend to 0")
@given(z=st.integers(30, 60), beta=betas)
def test_loss_of_a_confidently_ranked_pair_tends_to_zero(dpo_loss, z, beta):
    """z >= 30  =>  L_DPO <= 2^-30.  Eq. 7"""
    assert_at_most(at_margin(dpo_loss, z / beta, beta), 2.0**-30)


@mistake("not convex: sigmoid instead of log-sigmoid", None, "use -logsigmoid(beta * h)")
@given(h=margins, k=margins, beta=betas)
def test_loss_is_convex_in_the_margin(dpo_loss, h, k, beta):
    """L((h + k) / 2) <= (L(h) + L(k)) / 2.  Eq. 7"""
    middle = at_margin(dpo_loss, (h + k) / 2, beta)
    assert_at_most(middle, (at_margin(dpo_loss, h, beta) + at_margin(dpo_loss, k, beta)) / 2)


@mistake("a hinge, square or truncated loss", None, "-logsigmoid(beta * h); no offset, no clamp")
@given(h=margins, step=st.integers(1, 100).map(lambda k: k / 10))
def test_loss_falls_with_the_margin(dpo_loss, h, step):
    """h_1 < h_2  =>  L(h_1) > L(h_2) > 0.  Eq. 7"""
    low, high = at_margin(dpo_loss, number([h, h + step]), 1.0)
    assert low > high > 0


@mistake("not Eq. 7", None, "-logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)))")
@given(p=pairs)
def test_loss_is_minus_log_likelihood_of_the_preference(dpo_loss, p):
    """r_hat = beta log pi_theta / pi_ref  =>  L_DPO = -log s(r_hat_w - r_hat_l).  Eq. 7"""
    z = p.beta * ((p.logp_w - p.ref_logp_w) - (p.logp_l - p.ref_logp_l))
    assert_same(dpo_loss(*p), torch.logaddexp(torch.zeros(()), -z))


# ------------------------------------------------- the gradient


@mistake("the gradient's weight is Appendix A.4's", 31, "s(r_hat_l - r_hat_w), as in Section 4")
@given(h=margins.filter(bool), beta=betas)
def test_gradient_tells_the_main_text_from_appendix_a4(dpo_loss, h, beta):
    """The gradient's weight is s(r_hat_l - r_hat_w), as in Section 4. The last line of App. A.4
    prints s(r_hat_w - r_hat_l), which is 1 minus that weight and equals it only at h = 0.
    pitfall 31"""
    at = number([h]).requires_grad_()
    weight = -torch.autograd.grad(at_margin(dpo_loss, at, beta).sum(), at)[0] / beta
    main_text, appendix = torch.sigmoid(number([-beta * h, beta * h]))
    assert_same(weight, main_text[None])
    assert not torch.isclose(weight.double(), appendix, atol=1e-4)


@mistake("the gradient has a factor too many", 13, "-logsigmoid(beta * h), with h unchanged")
@given(p=pairs)
def test_gradient_is_weighted_by_the_error_of_the_implicit_reward(dpo_loss, p):
    """dL / dlog pi(y_w) = -dL / dlog pi(y_l) = -beta s(r_hat_l - r_hat_w).  Section 4's gradient"""
    z = p.beta * ((p.logp_w - p.ref_logp_w) - (p.logp_l - p.ref_logp_l))
    expected = p.beta * torch.sigmoid(-z)
    assert_same(slopes(dpo_loss, p)[:2], torch.stack((-expected, expected)))


@mistake("the gradient does not reach the parameters", 13, "pass log pi_theta through unchanged")
@given(w=worlds)
def test_gradient_of_a_softmax_policy_is_that_of_the_paper(dpo_loss, w):
    """pi = softmax(logits)  =>  grad L = -beta s(r_hat_l - r_hat_w) (grad log pi(y_w) - grad log
    pi(y_l)), with grad log pi(y) = one_hot(y) - pi.  Section 4's gradient"""
    logits = w.logp.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    loss = dpo_loss(log_pi[:1], log_pi[1:2], w.ref_logp[:1], w.ref_logp[1:2], w.beta)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    score = torch.eye(len(w.r), dtype=torch.float64) - w.logp.exp()
    z = w.beta * ((w.logp - w.ref_logp)[0] - (w.logp - w.ref_logp)[1])
    assert_same(gradient, -w.beta * torch.sigmoid(-z) * (score[0] - score[1]))


# ------------------------------------------------- implicit rewards and metrics


@mistake("an implicit reward without its beta", 22, "r_hat = beta * (logp - ref_logp)")
@given(p=pairs)
def test_implicit_rewards_are_beta_times_the_log_ratios(implicit_rewards, p):
    """r_hat_w = beta log pi_theta / pi_ref (y_w), and likewise for y_l.  Eq. 5; pitfall 22"""
    expected = p.beta * (p.logp_w - p.ref_logp_w), p.beta * (p.logp_l - p.ref_logp_l)
    assert_same(torch.stack(implicit_rewards(*p)), torch.stack(expected))


@mistake("the reward is not beta times the log-ratio", 22, "r_hat = beta * (logp - ref_logp)")
@given(p=pairs)
def test_implicit_reward_is_beta_times_the_log_ratio(implicit_reward, p):
    """r_hat = beta log pi_theta / pi_ref.  Eq. 5; pitfall 22"""
    expected = p.beta * (p.logp_w - p.ref_logp_w)
    assert_same(implicit_reward(p.logp_w, p.ref_logp_w, p.beta), expected)


def test_a_lower_loss_need_not_raise_the_chosen_response(dpo_loss):
    """Not a theorem: L_DPO falls => log pi(y_w) rises.  Counterexample: pi_ref = (1/3, 1/3, 1/3),
    pi = (1/4, 1/20, 7/10).  Eq. 7; pitfall 23"""
    ref, pi = number([[1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 20, 7 / 10]]).log()
    before, after = (dpo_loss(p[:1], p[1:2], ref[:1], ref[1:2], 1.0) for p in (ref, pi))
    assert after < before and pi[0] < ref[0]
