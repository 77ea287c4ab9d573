"""Preference losses other than Eq. 7: formula, arXiv number, optimum.

    A, B    log pi_theta / pi_ref of y_w and of y_l, in nats    h = A - B, and z = beta h
    |y|     number of tokens of a response
    m       log pi_theta(y|x) / |y|, in nats per token
    s       the logistic function

Every loss takes token log-probabilities logps (R, T), a batch, beta and its own parameters. It
returns losses, r_hat_w and r_hat_l, (n,) each. With its parameters fixed it is a `dpo.Loss`, for
instance `partial(cdpo, beta=0.1, epsilon=0.2)`. The implicit reward r_hat is beta times the
log-ratio unless stated otherwise.

"Optimum" is where the expected loss is smallest: over all policies ("tilt" is Eq. 4), or, for one
pair in which y_w wins with probability p, over its log-ratios.

Log-ratios are sums over tokens, even for IPO. ORPO and SimPO use means, as their papers do.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo
from beyond.pairs import Sample, rows_of_prompts
from dpo import Preferences, pair_logps
from lib.io import BadInput

PairLosses = tuple[Tensor, Tensor, Tensor]  # losses, r_hat_w, r_hat_l


def log_ratios(logps: Tensor, batch: Preferences) -> tuple[Tensor, Tensor]:
    """A and B of each pair, (n,) each, in nats."""
    logp_w, logp_l, ref_logp_w, ref_logp_l = pair_logps(logps, batch)
    return logp_w - ref_logp_w, logp_l - ref_logp_l


def pair_lengths(batch: Preferences) -> tuple[Tensor, Tensor]:
    """|y_w| and |y_l| of each pair, (n,) each, in tokens."""
    w, l = batch.pairs.T
    length = batch.mask.sum(-1)
    return length[w], length[l]


def mean_logps(logps: Tensor, batch: Preferences) -> tuple[Tensor, Tensor]:
    """m of y_w and of y_l, (n,) each, in nats per token."""
    logp_w, logp_l, _, _ = pair_logps(logps, batch)
    length_w, length_l = pair_lengths(batch)
    return logp_w / length_w, logp_l / length_l


def win_loss_weights(batch: Preferences, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The total weight of the pairs that each row wins, and of those that it loses, (R,) each."""
    w, l = batch.pairs.T
    zero = weight.new_zeros(len(batch.ids))
    return zero.index_add(0, w, weight), zero.index_add(0, l, weight)


def is_paired(batch: Preferences) -> Tensor:
    """True for the rows (R,) that belong to a pair."""
    rows = torch.arange(len(batch.ids), device=batch.pairs.device)
    return torch.isin(rows, batch.pairs)


# ------------------------------------------------- noisy labels


def cdpo(logps: Tensor, batch: Preferences, beta: float, epsilon: float = 0.1) -> PairLosses:
    """-(1 - epsilon) log s(z) - epsilon log s(-z).  Conservative DPO, Mitchell 2023 (a note).

    This is label smoothing: the mean of Eq. 7 over a label that is flipped with probability
    epsilon. Optimum at p = 1: h = logit(1 - epsilon) / beta.
    """
    A, B = log_ratios(logps, batch)
    z = beta * (A - B)
    losses = -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)
    return losses, beta * A, beta * B


def robust(logps: Tensor, batch: Preferences, beta: float, epsilon: float = 0.1) -> PairLosses:
    """[ -(1 - epsilon) log s(z) + epsilon log s(-z) ] / (1 - 2 epsilon).  2403.00409.

    epsilon < 1/2. The mean over labels flipped with probability epsilon is Eq. 7 of the clean
    label, so the optimum under this noise is the tilt. The loss of one pair has no lower bound.
    """
    if not 0 <= epsilon < 0.5:
        raise BadInput(f"robust: epsilon {epsilon:g} is not in [0, 0.5)")
    A, B = log_ratios(logps, batch)
    z = beta * (A - B)
    losses = -(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)
    return losses / (1 - 2 * epsilon), beta * A, beta * B


# ------------------------------------------------- other functions of the margin


def ipo(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """( h - 1 / (2 beta) )^2.  2310.12036, Eq. 17, where beta is called tau.

    Optimum: h = (2p - 1) / (2 beta), which is finite even at p = 1.
    """
    A, B = log_ratios(logps, batch)
    return (A - B - 1 / (2 * beta)).square(), beta * A, beta * B


def hinge(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """max(0, 1 - z).  The loss of SLiC (2305.10425) at DPO's margin, as in RSO (2309.06657).

    Optimum: z = 1 for every p between 1/2 and 1, and any z >= 1 for p = 1.
    """
    A, B = log_ratios(logps, batch)
    return F.relu(1 - beta * (A - B)), beta * A, beta * B


# ------------------------------------------------- each response on its own


def kto(
    logps: Tensor, batch: Preferences, beta: float, lam_D: float = 1.0, lam_U: float = 1.0
) -> PairLosses:
    """The mean of lam_D (1 - s(beta (A - z_0))) and lam_U (1 - s(beta (z_0 - B))).  2402.01306.

    y_w is desirable, y_l undesirable, and z_0 is `reference_point`, without gradient.

    Optimum: none. With z_0 fixed, and p the probability that y is desirable, the expected loss is
    linear in s. The log-ratio goes to +inf or -inf: the sign is that of p lam_D - (1 - p) lam_U.
    """
    A, B = log_ratios(logps, batch)
    z_0 = reference_point(logps, batch)
    loss_w = lam_D * torch.sigmoid(beta * (z_0 - A))  # 1 - s(u) = s(-u)
    loss_l = lam_U * torch.sigmoid(beta * (B - z_0))
    return (loss_w + loss_l) / 2, beta * A, beta * B


def reference_point(logps: Tensor, batch: Preferences) -> Tensor:
    """z_0 = max(0, mean log pi_theta(y'|x) / pi_ref(y'|x)) of the rows that belong to no pair.

    What z_0 estimates depends on the origin of these rows:

    - `with_mismatched`, the paper's: y' is a sample of pi_ref for another prompt. The mean is then
      about -KL(pi_ref, pi_theta), which is negative, so z_0 is 0 nearly always.
    - `with_samples`: y' is a sample of pi_theta for x. The mean is then an unbiased estimate of
      KL(pi_theta, pi_ref). The samples must be drawn again as pi_theta changes.
    - No such rows: z_0 = 0.

    Returns a scalar in nats, without gradient. To record z_0 during training, call this function on
    the arguments of the loss.
    """
    return unpaired_log_ratio(logps, batch).clamp(min=0)


def unpaired_log_ratio(logps: Tensor, batch: Preferences) -> Tensor:
    """The mean log-ratio of the rows that belong to no pair, in nats, or 0 if there are none."""
    log_ratio = (logps - batch.ref_logps).sum(-1).detach()
    unpaired = ~is_paired(batch)
    return (log_ratio * unpaired).sum() / unpaired.sum().clamp(min=1)


Score = Callable[[Tensor, Tensor], Tensor]  # ids, mask (B, T) -> log pi_ref (B, T)


def with_mismatched(preferences: Preferences, score: Score, rng: random.Random) -> Preferences:
    """Add an unpaired row for each prompt x: a random completion of another prompt, after x.

    The completion is cut where the row would exceed T. score: log-probabilities under pi_ref, for
    instance `partial(dpo.response_logps, pi_ref)`. Raises ValueError if all prompts are the same.
    """
    rows = split_rows(preferences.ids, preferences.mask)
    if all(x == rows[0][0] for x, _ in rows):
        raise ValueError("mismatched completions need at least two different prompts")
    first = rows_of_prompts(preferences.prompt)[:, 0]  # (P,)
    ids = preferences.ids[first]
    mask = torch.zeros_like(preferences.mask[first])
    for p, row in enumerate(first.tolist()):
        x, _ = rows[row]
        other_x, y = rng.choice(rows)
        while other_x == x:
            other_x, y = rng.choice(rows)
        y = torch.tensor(y[: ids.size(1) - len(x)])
        ids[p, len(x) : len(x) + len(y)] = y
        mask[p, len(x) : len(x) + len(y)] = True
    return add_rows(preferences, ids, mask, score(ids, mask), preferences.prompt[first])


def with_samples(preferences: Preferences, sample: Sample, score: Score) -> Preferences:
    """Add an unpaired row for each prompt x: a response that pi_theta samples for x.

    sample: for instance `partial(model.sample, pi_theta, end=end)`. score: as in `with_mismatched`.
    """
    rows = split_rows(preferences.ids, preferences.mask)
    first = rows_of_prompts(preferences.prompt)[:, 0]  # (P,)
    ids, mask, _ = sample([rows[row][0] for row in first.tolist()])
    return add_rows(preferences, ids, mask, score(ids, mask), preferences.prompt[first])


def split_rows(ids: Tensor, mask: Tensor) -> list[tuple[list[int], list[int]]]:
    """The token ids of prompt and response of each row."""
    starts = mask.int().argmax(-1).tolist()
    return [
        (row[:start].tolist(), row[in_response].tolist())
        for row, start, in_response in zip(ids, starts, mask, strict=True)
    ]


def add_rows(
    preferences: Preferences, ids: Tensor, mask: Tensor, ref_logps: Tensor, prompt: Tensor
) -> Preferences:
    """The same pairs, and more rows. Each new row follows those of its prompt."""
    prompt = torch.cat((preferences.prompt, prompt))
    order = prompt.argsort(stable=True)
    new_row = order.argsort()

    def joined(old: Tensor, new: Tensor) -> Tensor:
        T = max(old.size(1), new.size(1))
        wide = [F.pad(rows, (0, T - rows.size(1))) for rows in (old, new.to(old))]
        return torch.cat(wide)[order]

    return replace(
        preferences,
        ids=joined(preferences.ids, ids),
        mask=joined(preferences.mask, mask),
        ref_logps=joined(preferences.ref_logps, ref_logps),
        prompt=prompt[order],
        pairs=new_row[preferences.pairs],
    )


def sppo_hard(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """(A - 1 / (2 beta))^2 + (B + 1 / (2 beta))^2.  2405.00675, with eta = 1 / beta.

    Self-play preference optimization where y_w is taken to win with certainty.
    Optimum: A = (2p - 1) / (2 beta) = -B. It fixes both log-ratios, not only their difference.
    """
    A, B = log_ratios(logps, batch)
    half = 1 / (2 * beta)
    return (A - half).square() + (B + half).square(), beta * A, beta * B


def sppo(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """(A - (P_w - 1/2) / beta)^2 + (B - (P_l - 1/2) / beta)^2.  2405.00675, with eta = 1 / beta.

    P = P(y > pi_t | x) is estimated from y's pairs with other completions of x, as the weighted
    share that y wins. The completions must be samples of pi_t, which is pi_ref in the first round.
    Optimum: every log-ratio equals (P - 1/2) / beta.
    """
    A, B = log_ratios(logps, batch)
    won, lost = win_loss_weights(batch, batch.weight)
    P = won / (won + lost)  # 0/0 for a row in no pair
    w, l = batch.pairs.T
    losses = (A - (P[w] - 0.5) / beta).square() + (B - (P[l] - 0.5) / beta).square()
    return losses, beta * A, beta * B


# ------------------------------------------------- without a reference


def orpo(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """-m_w - beta log s(r_hat_w - r_hat_l), r_hat = log( exp(m) / (1 - exp(m)) ).  2403.07691.

    beta is the paper's lambda, the weight of the odds-ratio term against the first term, which is
    supervised fine-tuning on y_w. A larger beta separates the responses more, the reverse of beta
    in Eq. 7. There is no pi_ref. r_hat is the log-odds of the geometric mean of the response's
    token probabilities.
    Optimum: no closed form. At beta = 0 and equal lengths, the winners' frequencies.
    """
    m_w, m_l = mean_logps(logps, batch)
    r_hat_w = m_w - torch.log(-torch.expm1(m_w))
    r_hat_l = m_l - torch.log(-torch.expm1(m_l))
    return -m_w - beta * F.logsigmoid(r_hat_w - r_hat_l), r_hat_w, r_hat_l


def simpo(logps: Tensor, batch: Preferences, beta: float, gamma: float = 0.5) -> PairLosses:
    """-log s(r_hat_w - r_hat_l - gamma), r_hat = beta m.  2405.14734.

    There is no pi_ref. beta multiplies a mean over tokens, so it is about |y| times DPO's.
    Optimum at gamma = 0: m = r / beta up to a constant. With responses of the same length L this is
    DPO's optimum for a uniform pi_ref at beta / L, softmax(L r / beta).
    """
    m_w, m_l = mean_logps(logps, batch)
    r_hat_w, r_hat_l = beta * m_w, beta * m_l
    return -F.logsigmoid(r_hat_w - r_hat_l - gamma), r_hat_w, r_hat_l


# ------------------------------------------------- displacement and length


def dpop(logps: Tensor, batch: Preferences, beta: float, lam: float = 1.0) -> PairLosses:
    """-log s(z - beta lam max(0, -A)).  DPO-Positive, 2402.13228.

    Penalises log pi_theta(y_w|x) < log pi_ref(y_w|x). Never below Eq. 7, and equal iff A >= 0.
    Optimum: no closed form. It is not the tilt, under which some responses have A < 0.
    """
    A, B = log_ratios(logps, batch)
    z = beta * (A - B) - beta * lam * F.relu(-A)
    return -F.logsigmoid(z), beta * A, beta * B


def r_dpo(logps: Tensor, batch: Preferences, beta: float, alpha: float = 0.05) -> PairLosses:
    """-log s(z + alpha (|y_w| - |y_l|)).  2403.19159.

    Eq. 7 for the objective of Eq. 3 with reward r - alpha |y|. The labels come from r, so r_hat
    must equal r - alpha |y|, and the difference of alpha |y| is added back to the margin.
    alpha: nats per token. Optimum: the tilt of r - alpha |y|.
    """
    A, B = log_ratios(logps, batch)
    length_w, length_l = pair_lengths(batch)
    z = beta * (A - B) + alpha * (length_w - length_l).to(A)
    return -F.logsigmoid(z), beta * A, beta * B


def ld_dpo(logps: Tensor, batch: Preferences, beta: float, alpha: float = 0.5) -> PairLosses:
    """Eq. 7, where tokens beyond the shorter response's length are weighted by alpha.  2409.06411.

    Log-probabilities under pi_theta and pi_ref, and so r_hat, are weighted this way, so the loss
    starts at ln 2.
    Optimum: at alpha = 1, or if y_w and y_l have the same length, this is DPO.
    """
    shorter = torch.minimum(*pair_lengths(batch))[:, None]  # (n, 1)
    log_ratio = logps - batch.ref_logps

    def r_hat(rows: Tensor) -> Tensor:
        shared = batch.mask[rows].cumsum(-1) <= shorter  # (n, T)
        tokens = log_ratio[rows]
        return beta * torch.where(shared, tokens, alpha * tokens).sum(-1)

    r_hat_w, r_hat_l = map(r_hat, batch.pairs.T)
    return -F.logsigmoid(r_hat_w - r_hat_l), r_hat_w, r_hat_l


# ------------------------------------------------- rankings


def plackett_luce(logps: Tensor, batch: Preferences, beta: float) -> PairLosses:
    """-log p*(ranking | x) at r_hat.  Eq. 20 of the DPO paper.

    The ranking contains all paired completions of x: each loses to all that precede it. All pairs
    of x get the same loss. Rows in no pair are ignored.
    Optimum: the tilt, if rankings are drawn as by `pairs.rankings`.
    Raises BadInput if the pairs of a prompt are not those of one ranking.
    """
    w, l = batch.pairs.T
    _, lost = win_loss_weights(batch, torch.ones_like(batch.weight))
    rows = rows_of_prompts(batch.prompt)  # (P, K)
    ranked = (rows >= 0) & is_paired(batch)[rows]
    place, order = lost[rows].masked_fill(~ranked, math.inf).sort(-1)
    expected = torch.arange(rows.size(1), device=rows.device)
    if (place.isfinite() & (place != expected)).any():
        raise BadInput("the pairs of a prompt are not a ranking: try --pairs best-worst")

    r_hat = dpo.implicit_reward(logps.sum(-1), batch.ref_logps.sum(-1), beta)
    r_ranked = r_hat[rows].masked_fill(~ranked, -1e30).gather(-1, order)  # unranked rows last
    _, x = batch.prompt.unique_consecutive(return_inverse=True)
    return -dpo.plackett_luce(r_ranked)[x[w]], r_hat[w], r_hat[l]


LOSSES: dict[str, Callable[..., PairLosses]] = {
    loss.__name__: loss
    for loss in (
        dpo.dpo,
        cdpo,
        robust,
        ipo,
        hinge,
        kto,
        sppo_hard,
        sppo,
        orpo,
        simpo,
        dpop,
        r_dpo,
        ld_dpo,
        plackett_luce,
    )
}
