"""The losses that came after DPO, each to be held beside Eq. 7 of dpo.py: formula, source, optimum.

    A, B        log pi_theta / pi_ref of y_w and of y_l, sums over tokens         h = A - B, and z = beta h is DPO's margin
    |y|         tokens of a response                    m = log pi_theta(y|x) / |y|         s        the logistic function

Each function takes token log-probabilities pi_theta (P, K, T) and a batch of preferences, and gives back losses, r_hat_w and
r_hat_l, (n,) each: once its hyperparameters are named it is a `dpo.Loss`, as in `dpo.train(..., partial(ipo, tau=0.1), ...)`.
r_hat is beta times the log-ratio where nothing else is said. An optimum is where the expected loss is least: over all
policies where it is a policy ("tilt" is Eq. 4's), and of one pair by itself, which y_w wins with probability p, where it is a
number.

Log-ratios are sums over tokens, IPO's too; only ORPO and SimPO take means, as their papers do. A batch may have empty
completions (where a prompt has fewer than K): pairs are taken first, so that no mean is ever that of nothing.
"""
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo
from dpo import Preferences

PerPair = tuple[Tensor, Tensor, Tensor]         # losses, r_hat_w, r_hat_l


# ------------------------------------------------------------------------------------------------------ pairs of a batch

def of_pairs(values: Tensor, batch: Preferences) -> tuple[Tensor, Tensor]:
    """From values (P, K, ...) of all completions, those of y_w and those of y_l, (n, ...) each."""
    x, w, l = batch.pairs.T
    return values[x, w], values[x, l]


def log_ratios(pi_theta: Tensor, batch: Preferences) -> tuple[Tensor, Tensor]:
    """A and B, (n,) nats each."""
    return of_pairs((pi_theta - batch.pi_ref).sum(-1), batch)


def mean_logps(pi_theta: Tensor, batch: Preferences) -> tuple[Tensor, Tensor]:
    """m of y_w and of y_l, (n,) nats a token each."""
    (theta_w, theta_l), (mask_w, mask_l) = of_pairs(pi_theta, batch), of_pairs(batch.mask, batch)
    return theta_w.sum(-1) / mask_w.sum(-1), theta_l.sum(-1) / mask_l.sum(-1)


def tally(batch: Preferences, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (n,) of the pairs that each completion wins, and of those that it loses, (P, K) each."""
    x, w, l = batch.pairs.T
    none = weight.new_zeros(batch.mask.shape[:2])
    return none.index_put((x, w), weight, accumulate=True), none.index_put((x, l), weight, accumulate=True)


# ------------------------------------------------------------------------------------------------------ noisy labels

def cdpo(pi_theta: Tensor, batch: Preferences, beta: float, epsilon: float) -> PerPair:
    """-(1 - epsilon) log s(z) - epsilon log s(-z): conservative DPO, or label smoothing (Mitchell 2023, a note).
    It is the mean of Eq. 7 over a label that is flipped with probability epsilon.
    Optimum at p = 1: h = logit(1 - epsilon) / beta, and no further."""
    A, B = log_ratios(pi_theta, batch)
    z = beta * (A - B)
    return -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z), beta * A, beta * B


def robust(pi_theta: Tensor, batch: Preferences, beta: float, epsilon: float) -> PerPair:
    """[ -(1 - epsilon) log s(z) + epsilon log s(-z) ] / (1 - 2 epsilon), epsilon < 1/2.  2403.00409.
    Over flips of the label with probability epsilon its mean is Eq. 7 of the clean label, so its optimum under such noise is
    the tilt; for a single pair it has no lower bound."""
    A, B = log_ratios(pi_theta, batch)
    z = beta * (A - B)
    return (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon), beta * A, beta * B


# ------------------------------------------------------------------------------------------------------ other curves

def ipo(pi_theta: Tensor, batch: Preferences, tau: float) -> PerPair:
    """( h - 1 / (2 tau) )^2.  2310.12036, Eq. 17; tau plays the part of beta, in r_hat too.
    Optimum: h = (2p - 1) / (2 tau), finite even at p = 1."""
    A, B = log_ratios(pi_theta, batch)
    return (A - B - 1 / (2 * tau)).square(), tau * A, tau * B


def hinge(pi_theta: Tensor, batch: Preferences, beta: float) -> PerPair:
    """max(0, 1 - z).  SLiC's curve (2305.10425) on DPO's margin, as in RSO (2309.06657).
    Optimum: z = 1 if p > 1/2, however little, and nothing pushes further; all z >= 1 if p = 1."""
    A, B = log_ratios(pi_theta, batch)
    return F.relu(1 - beta * (A - B)), beta * A, beta * B


# ------------------------------------------------------------------------------------------------------ responses by themselves

def mismatched(ids: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """For each prompt x one of the completions of another prompt, at random, put after x and cut to the length that there is:
    ids and mask (P, K, T), no prompt without its first completion -> (P, 1, T). Errors: ValueError if more than half of the
    prompts are the same."""
    P, _, T = ids.shape
    places, start = torch.arange(T, device=ids.device), mask[:, 0].int().argmax(-1)         # start (P,) = |x|
    is_x = places < start[:, None]                                                          # (P, T)
    kinds, kind = ids[:, 0].masked_fill(~is_x, -1).unique(dim=0, return_inverse=True)
    most = int(kind.bincount().max())
    if 2 * most > P:
        raise ValueError(f"{most} of {P} prompts are the same, so that not each can have another's completion")
    order = torch.randperm(len(kinds), generator=generator).to(ids.device)[kind].argsort()
    other = torch.empty_like(order).index_put((order,), order.roll(most))                   # past all that are the same as x
    k = torch.multinomial(mask.any(-1).float().cpu(), 1, generator=generator).to(ids.device)[other, 0]
    source = places + (start[other] - start)[:, None]           # (P, T) where the other row has what comes to stand at a place
    y, is_y = (v[other, k].gather(1, source.clamp(0, T - 1)) for v in (ids, mask))
    return ids[:, 0].where(is_x, y)[:, None], (is_y & ~is_x & (source < T))[:, None]


def with_mismatched(preferences: Preferences, score: Callable[[Tensor, Tensor], Tensor],
                    generator: torch.Generator | None = None) -> Preferences:
    """The same preferences, and one mismatched completion more for each prompt, which no pair names. `score` gives log pi_ref
    at the tokens of ids and mask (P, 1, T), for instance `partial(train.score, pi_ref)`."""
    ids, mask = mismatched(preferences.ids, preferences.mask, generator)
    more = dict(ids=ids, mask=mask, pi_ref=score(ids, mask).to(preferences.pi_ref))
    return replace(preferences, **{name: torch.cat((getattr(preferences, name), rows), 1) for name, rows in more.items()})


def reference_point(pi_theta: Tensor, batch: Preferences) -> Tensor:
    """KTO's z_0 = max(0, mean log-ratio of the mismatched completions, those that no pair names), without gradient: it
    estimates KL(pi_theta, pi_ref), which log-ratios of the pairs do not, in whatever order they are taken."""
    won, lost = tally(batch, torch.ones_like(batch.weight))
    unpaired = batch.mask.any(-1) & (won + lost == 0)
    if not unpaired.any():
        raise ValueError("every completion belongs to a pair: add mismatched ones by `with_mismatched`")
    return (pi_theta - batch.pi_ref).sum(-1)[unpaired].mean().clamp(min=0).detach()


def kto(pi_theta: Tensor, batch: Preferences, beta: float, lam_D: float = 1.0, lam_U: float = 1.0) -> PerPair:
    """lam_D (1 - s(beta (A - z_0))) for the desirable y_w, lam_U (1 - s(beta (z_0 - B))) for the undesirable y_l, and the mean
    of the two.  2402.01306; z_0 is `reference_point`. Optimum: none. With z_0 fixed, and p the probability that y is
    desirable, the loss is linear in s: log-ratios go to +inf or -inf with the sign of p lam_D - (1 - p) lam_U."""
    A, B = log_ratios(pi_theta, batch)
    z_0 = reference_point(pi_theta, batch)
    losses = (lam_D * torch.sigmoid(beta * (z_0 - A)) + lam_U * torch.sigmoid(beta * (B - z_0))) / 2    # 1 - s(u) = s(-u)
    return losses, beta * A, beta * B


def sppo_hard(pi_theta: Tensor, batch: Preferences, beta: float) -> PerPair:
    """(A - 1 / (2 beta))^2 + (B + 1 / (2 beta))^2: self-play, y_w taken to win always.  2405.00675, its eta being 1 / beta.
    Optimum: A = (2p - 1) / (2 beta) = -B, each of itself and not their difference alone."""
    A, B = log_ratios(pi_theta, batch)
    return (A - 1 / (2 * beta)).square() + (B + 1 / (2 * beta)).square(), beta * A, beta * B


def sppo(pi_theta: Tensor, batch: Preferences, beta: float) -> PerPair:
    """(A - (P_w - 1/2) / beta)^2 + (B - (P_l - 1/2) / beta)^2.  2405.00675; P = P(y > pi_t|x) is the share by weight that y
    wins of its pairs with the other completions of x, which were drawn from pi_t (the first round's pi_t is pi_ref).
    Optimum: every log-ratio is (P - 1/2) / beta."""
    A, B = log_ratios(pi_theta, batch)
    won, lost = tally(batch, batch.weight)
    P_w, P_l = of_pairs(won / (won + lost), batch)              # 0/0 where no pair names a completion, which no pair takes
    return (A - (P_w - 0.5) / beta).square() + (B - (P_l - 0.5) / beta).square(), beta * A, beta * B


# ------------------------------------------------------------------------------------------------------ without a reference

def orpo(pi_theta: Tensor, batch: Preferences, lam: float) -> PerPair:
    """-m_w - lam log s(r_hat_w - r_hat_l), where r_hat = m - log(1 - exp m), the log-odds of a response's mean token.
    2403.07691. There is no pi_ref: the first term fine-tunes on y_w. Optimum: no closed form; the winners' frequencies
    as lam -> 0, for responses of one length."""
    m_w, m_l = mean_logps(pi_theta, batch)
    r_hat_w, r_hat_l = (m - torch.log(-torch.expm1(m)) for m in (m_w, m_l))
    return -m_w - lam * F.logsigmoid(r_hat_w - r_hat_l), r_hat_w, r_hat_l


def simpo(pi_theta: Tensor, batch: Preferences, beta: float, gamma: float) -> PerPair:
    """-log s(r_hat_w - r_hat_l - gamma), where r_hat = beta m.  2405.14734. There is no pi_ref.
    Optimum at gamma = 0: m = r / beta but for a constant; with responses of one length L this is DPO's from a uniform pi_ref
    at beta / L, softmax(L r / beta)."""
    r_hat_w, r_hat_l = (beta * m for m in mean_logps(pi_theta, batch))
    return -F.logsigmoid(r_hat_w - r_hat_l - gamma), r_hat_w, r_hat_l


# ------------------------------------------------------------------------------------------------------ displacement, length

def dpop(pi_theta: Tensor, batch: Preferences, beta: float, lam: float) -> PerPair:
    """-log s(z - beta lam max(0, -A)): DPO-Positive, which makes y_w pay where it falls below pi_ref.  2402.13228.
    Never less than Eq. 7, and the same iff A >= 0. Optimum: no closed form, as every tilt has responses below pi_ref."""
    A, B = log_ratios(pi_theta, batch)
    return -F.logsigmoid(beta * (A - B) - beta * lam * F.relu(-A)), beta * A, beta * B


def r_dpo(pi_theta: Tensor, batch: Preferences, beta: float, alpha: float) -> PerPair:
    """-log s(z + alpha (|y_w| - |y_l|)).  2403.19159, with the sign that its optimum asks for.
    Optimum: the tilt of r - alpha |y|."""
    A, B = log_ratios(pi_theta, batch)
    length_w, length_l = of_pairs(batch.mask.sum(-1, dtype=pi_theta.dtype), batch)
    return -F.logsigmoid(beta * (A - B) + alpha * (length_w - length_l)), beta * A, beta * B


def ld_dpo(pi_theta: Tensor, batch: Preferences, beta: float, alpha: float) -> PerPair:
    """Eq. 7, but tokens beyond the shorter response's length count alpha times, in pi_theta and in pi_ref, and in r_hat.
    2409.06411. At alpha = 1, and for y_w and y_l of one length, it is DPO, and so is its optimum."""
    shorter = torch.minimum(*of_pairs(batch.mask.sum(-1), batch))[:, None]
    r_hat_w, r_hat_l = (beta * tokens.where(mask.cumsum(-1) <= shorter, alpha * tokens).sum(-1) for tokens, mask in
                        zip(of_pairs(pi_theta - batch.pi_ref, batch), of_pairs(batch.mask, batch)))     # (n, T) nats each
    return -F.logsigmoid(r_hat_w - r_hat_l), r_hat_w, r_hat_l


# ------------------------------------------------------------------------------------------------------ rankings

def plackett_luce(pi_theta: Tensor, batch: Preferences, beta: float) -> PerPair:
    """-log p*(ranking) at r_hat: the DPO paper's Eq. 20, for the ranking of all completions of x, the same number for each of
    its pairs. They tell it: a completion loses to all that come before. Optimum: the tilt, if rankings are drawn as by
    `pairs.rankings`. Errors: ValueError if the pairs of a prompt are not those of one ranking."""
    won, lost = tally(batch, torch.ones_like(batch.weight))
    unranked = won + lost == 0
    place, order = lost.masked_fill(unranked, math.inf).sort(-1)
    if (place.isfinite() & (place != torch.arange(place.size(-1), device=place.device))).any():
        raise ValueError("the pairs of a prompt are no ranking: draw them with `pairs.rankings`")
    r_hat = dpo.implicit_reward(pi_theta.sum(-1), batch.pi_ref.sum(-1), beta)
    ranked = r_hat.masked_fill(unranked, -1e30).gather(-1, order)           # last, and never chosen before the others are
    return -dpo.plackett_luce(ranked)[batch.pairs[:, 0]], *of_pairs(r_hat, batch)


LOSSES: dict[str, Callable[..., PerPair]] = {loss.__name__: loss for loss in (
    dpo.dpo, cdpo, robust, ipo, hinge, kto, sppo_hard, sppo, orpo, simpo, dpop, r_dpo, ld_dpo, plackett_luce)}
