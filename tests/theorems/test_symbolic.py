"""Derivations as algebra, and identities in exact rationals.

Sympy derives Eq. 4 to 7, 21 and 22 on a generic set of three responses. The results are compared
with dpo.py, so that an error in either side shows.
"""

from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


def value(expression, margin: float = 0.0) -> float:
    return float(sympy.sympify(expression).subs(VALUES | {h: margin}).evalf(30))


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


def loss_at(margin: float, weight: float = BETA) -> tuple[Tensor, Tensor]:
    """The loss of dpo.py at a margin, and its derivative."""
    at, zero = number([margin]).requires_grad_(), number([0.0])
    losses, _, _ = dpo.dpo_loss(at, zero, zero, zero, weight)
    return losses, torch.autograd.grad(losses.sum(), at)[0]


@pytest.mark.parametrize("margin", [-3.0, -0.5, 0.0, 1.25])
def test_eq_7_is_the_log_likelihood_of_eq_6(margin):
    """-log sigma(beta h) = log(1 + exp(-beta h)), ln 2 at h = 0; dpo.dpo_loss has these values.
    Eq. 7"""
    loss = -sympy.log(sigma(beta * h))
    assert is_zero(loss - sympy.log(1 + sympy.exp(-beta * h)))
    assert is_zero(loss.subs(h, 0) - sympy.log(2))
    assert_same(loss_at(margin)[0], [value(loss, margin)])


# ------------------------------------------------- Eq. 21 and 22


def test_sigmoids_derivative_is_sigma_times_one_minus_sigma():
    """sigma'(z) = sigma(z) (1 - sigma(z)) and 1 - sigma(z) = sigma(-z)"""
    z = sympy.Symbol("z", real=True)
    assert is_zero(sympy.diff(sigma(z), z) - sigma(z) * (1 - sigma(z)))
    assert is_zero(1 - sigma(z) - sigma(-z))


@pytest.mark.parametrize("margin", [-3.0, -0.5, 0.0, 1.25])
def test_gradient_of_eq_7_is_that_of_section_4(margin):
    """d/dh of -log sigma(beta h) = -beta sigma(-beta h), which is Eq. 22 for Eq. 7; autograd
    through dpo.dpo_loss agrees. Section 4's gradient"""
    slope = sympy.diff(-sympy.log(sigma(beta * h)), h)
    assert is_zero(slope + beta * sigma(-beta * h))
    assert_same(loss_at(margin)[1], [value(slope, margin)])


def test_appendix_a4_as_printed_is_not_the_gradient_of_eq_7():
    """Two of three transcriptions of App. A.4 print Eq. 21 with y_w and y_l exchanged: the gradient
    of -log sigma(r_hat_l - r_hat_w). So does u under Eq. 22. The last line then has the bracket of
    Section 4 and the weight sigma(r_hat_w - r_hat_l). None of them is the gradient of Eq. 7: Eq. 21
    as printed differs by the sign and the weight, and the last line by the weight. pitfall 31"""
    right = sympy.diff(-sympy.log(sigma(beta * h)), h)
    eq_21_as_printed = sympy.diff(-sympy.log(sigma(-beta * h)), h)
    last_line_as_printed = -beta * sigma(beta * h)
    assert is_zero(eq_21_as_printed - beta * sigma(beta * h))
    assert not is_zero(eq_21_as_printed - right)
    assert not is_zero(last_line_as_printed - right)
    assert not is_zero(last_line_as_printed - eq_21_as_printed)
    assert sympy.solve(sympy.Eq(last_line_as_printed, right), h) == [0]
    for margin in (-2.0, 0.5):
        slope = loss_at(margin)[1].item()
        for printed in (eq_21_as_printed, last_line_as_printed):
            assert abs(slope - value(printed, margin)) > 0.01


# ------------------------------------------------- exact rationals

weights = st.lists(st.integers(1, 20), min_size=2, max_size=4)


def exact_ranking(weight: list[int]) -> Fraction:
    """Plackett-Luce with exp(r) = weight."""
    p = Fraction(1)
    for k in range(len(weight)):
        p *= Fraction(weight[k], sum(weight[k:]))
    return p


@given(weight=weights)
def test_rankings_are_exact_rationals(weight):
    """exp(r_k) integers  =>  the probabilities of the K! rankings sum to exactly 1, and
    dpo.plackett_luce has each to 14 digits.  Eq. 18"""
    orders = list(permutations(weight))
    exact = [exact_ranking(list(order)) for order in orders]
    assert sum(exact) == 1
    found = dpo.plackett_luce(number(orders).log()).exp()
    assert_same(found / number([float(p) for p in exact]), torch.ones(len(orders)), 1e-13)


@given(weight=weights, seed=st.integers(1, 20))
def test_tilts_are_exact_rationals(weight, seed):
    """pi_ref and exp(r / beta) rational  =>  log-ratios of Eq. 4 give back p* exactly, and
    dpo.optimal_policy has Eq. 4 to 13 digits.  Eq. 4 and Eq. 6"""
    N, b = len(weight), 2
    counts = [1 + (seed * (i + 3)) % 7 for i in range(N)]
    ref_p = [Fraction(c, sum(counts)) for c in counts]
    Z_exact = sum(p * q for p, q in zip(ref_p, weight, strict=True))
    pi = [p * q / Z_exact for p, q in zip(ref_p, weight, strict=True)]
    assert sum(pi) == 1
    ratio = [(p / q) ** b for p, q in zip(pi, ref_p, strict=True)]  # exp(r_hat)
    for i in range(N):
        exact = Fraction(weight[i] ** b, weight[i] ** b + weight[0] ** b)
        assert ratio[i] / (ratio[i] + ratio[0]) == exact
    reward = b * number(weight).log()
    logp, log_Z = dpo.optimal_policy(number([float(p) for p in ref_p]).log(), reward, float(b))
    assert_same(logp.exp() / number([float(p) for p in pi]), torch.ones(N), 1e-13)
    assert_same(log_Z.exp() / float(Z_exact), 1.0, 1e-13)
