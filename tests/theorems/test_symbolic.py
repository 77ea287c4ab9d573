"""Derivations as algebra, and identities in exact rationals.

Sympy derives Eq. 4 to 7 and the gradient of Eq. 7 on a generic set of three responses. The
results are compared with dpo.py, so an error on either side shows.
"""

import pytest
import torch
from torch import Tensor
from worlds import assert_same, number

import dpo

sympy = pytest.importorskip("sympy")

beta = sympy.Symbol("beta", positive=True)
ref = sympy.symbols("ref1:4", positive=True)
r = sympy.symbols("r1:4", real=True)
h = sympy.Symbol("h", real=True)
Z = sum(p * sympy.exp(v / beta) for p, v in zip(ref, r, strict=True))
optimum = [p * sympy.exp(v / beta) / Z for p, v in zip(ref, r, strict=True)]

VALUES = {beta: 0.7, ref[0]: 0.2, ref[1]: 0.5, ref[2]: 0.3, r[0]: 1.5, r[1]: -0.5, r[2]: 0.25}
REF_LOGP, R, BETA = number([0.2, 0.5, 0.3]).log(), number([1.5, -0.5, 0.25]), 0.7


def sigma(z):
    return 1 / (1 + sympy.exp(-z))


def is_zero(expression) -> bool:
    return sympy.simplify(expression) == 0


def value(expression) -> float:
    return float(expression.subs(VALUES).evalf(30))


# ------------------------------------------------- Eq. 4 to 7


def test_eq_4_is_where_the_lagrangian_is_stationary():
    """L = sum pi (r - beta log pi / ref) + lam (1 - sum pi) => dL/dpi_i = 0 at Eq. 4 for every i
    with one lam, lam = beta log Z - beta; dpo.optimal_policy has these values. Eq. 3 and 4"""
    pi, lam = sympy.symbols("pi1:4", positive=True), beta * sympy.log(Z) - beta
    objective = sum(p * v - beta * p * sympy.log(p / q) for p, v, q in zip(pi, r, ref, strict=True))
    at_optimum = dict(zip(pi, optimum, strict=True))
    for p in pi:
        slope = sympy.diff(objective, p).subs(at_optimum) - lam
        assert is_zero(sympy.expand_log(slope, force=True))
    logp, log_Z = dpo.optimal_policy(REF_LOGP, R, BETA)
    assert_same(logp.exp(), [value(p) for p in optimum])
    assert_same(log_Z, value(sympy.log(Z)))


def test_eq_5_inverts_eq_4():
    """beta log(pi_r / ref) + beta log Z = r for Eq. 4; dpo.implicit_reward is its first term. Eq.
    5"""
    for p, q, v in zip(optimum, ref, r, strict=True):
        r_hat = beta * sympy.log(p / q)
        assert is_zero(sympy.expand_log(r_hat + beta * sympy.log(Z) - v, force=True))
    logp, _ = dpo.optimal_policy(REF_LOGP, R, BETA)
    expected = [value(beta * sympy.log(p / q)) for p, q in zip(optimum, ref, strict=True)]
    assert_same(dpo.implicit_reward(logp, REF_LOGP, BETA), expected)


def test_eq_6_needs_no_partition_function():
    """sigma(beta log(pi_1/ref_1) - beta log(pi_2/ref_2)) = exp(r_1) / (exp(r_1) + exp(r_2)) at Eq.
    4; dpo.bradley_terry has this value. Eq. 1 and Eq. 6"""
    gap = beta * sympy.log(optimum[0] / ref[0]) - beta * sympy.log(optimum[1] / ref[1])
    gap = sympy.simplify(sympy.expand_log(gap, force=True))
    assert is_zero(gap - (r[0] - r[1]))
    p = sympy.exp(r[0]) / (sympy.exp(r[0]) + sympy.exp(r[1]))
    assert is_zero(sigma(gap) - p)
    assert_same(dpo.bradley_terry(R[0], R[1]), value(p))


MARGINS = [-3.0, -0.5, 0.0, 1.25]


def at_margins(expression) -> list[float]:
    return [value(expression.subs(h, margin)) for margin in MARGINS]


def losses_and_slopes() -> tuple[Tensor, Tensor]:
    """The losses of dpo.py at the margins, and their derivatives."""
    at, zero = number(MARGINS).requires_grad_(), torch.zeros(len(MARGINS))
    losses, _, _ = dpo.dpo_loss(at, zero, zero, zero, BETA)
    return losses, torch.autograd.grad(losses.sum(), at)[0]


def test_eq_7_is_the_log_likelihood_of_eq_6():
    """-log sigma(beta h) = log(1 + exp(-beta h)), ln 2 at h = 0; dpo.dpo_loss has these values.
    Eq. 7"""
    loss = -sympy.log(sigma(beta * h))
    assert is_zero(loss - sympy.log(1 + sympy.exp(-beta * h)))
    assert is_zero(loss.subs(h, 0) - sympy.log(2))
    assert_same(losses_and_slopes()[0], at_margins(loss))


# ------------------------------------------------- Eq. 21 and 22


def test_gradient_of_eq_7_is_that_of_section_4():
    """d/dh of -log sigma(beta h) = -beta sigma(-beta h), which is Eq. 22 for Eq. 7; autograd
    through dpo.dpo_loss agrees. Section 4's gradient"""
    slope = sympy.diff(-sympy.log(sigma(beta * h)), h)
    assert is_zero(slope + beta * sigma(-beta * h))
    assert_same(losses_and_slopes()[1], at_margins(slope))


def test_appendix_a4_as_printed_is_not_the_gradient_of_eq_7():
    """In two of three text versions of App. A.4, Eq. 21 has y_w and y_l exchanged: the gradient of
    -log sigma(r_hat_l - r_hat_w). In the definition of u below Eq. 22 they are exchanged too. The
    last line then has the bracket of Section 4 and the weight sigma(r_hat_w - r_hat_l). Neither Eq.
    21 nor the last line, as printed, is the gradient of Eq. 7: Eq. 21 has the wrong sign and
    weight, the last line the wrong weight. pitfall 31"""
    right = sympy.diff(-sympy.log(sigma(beta * h)), h)
    eq_21_as_printed = sympy.diff(-sympy.log(sigma(-beta * h)), h)
    last_line_as_printed = -beta * sigma(beta * h)
    assert is_zero(eq_21_as_printed - beta * sigma(beta * h))
    assert not is_zero(eq_21_as_printed - right)
    assert sympy.solve(sympy.Eq(last_line_as_printed, right), h) == [0]
