"""Direct Preference Optimization: the mathematics of the paper, and its training loop.

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn (2023), arXiv 2305.18290. Equation numbers are
those of version 3.

    p*(y_1 > y_2 | x) = sigma( r(x, y_1) - r(x, y_2) ), how labels arise         (Eq. 1)
    J(pi)       = E r(x, y) - beta KL(pi, pi_ref), the objective; y ~ pi         (Eq. 3)
    pi_r(y|x)   = pi_ref(y|x) exp( r(x, y) / beta ) / Z(x), its optimum          (Eq. 4)
    r(x, y)     = beta log( pi_r(y|x) / pi_ref(y|x) ) + beta log Z(x)            (Eq. 5)

Eq. 5 is Eq. 4 solved for r: a policy determines the reward for which it is optimal, up to a term
that depends on x alone. DPO puts the reward of pi_theta into Eq. 1, where this term cancels, and
maximises the likelihood of the labels. This needs no reward model, and no samples during training:

    r_hat(x, y) = beta log( pi_theta(y|x) / pi_ref(y|x) ), the implicit reward
    L_DPO       = -E log sigma( r_hat(x, y_w) - r_hat(x, y_l) )                  (Eq. 7)

    symbol      in the paper                           here
    x           prompt                                 the ids before the response
    y_w, y_l    preferred and dispreferred response    two rows of ids; a mask marks the response
    pi_theta    the policy being trained               nn.Module: ids (B, T) -> logits (B, T, V)
    pi_ref      the frozen reference policy            nn.Module of the same kind
    beta        the weight of the KL penalty           a float
    r, r_hat    true reward and implicit reward        tensors, in nats
    Z           sum_y pi_ref(y|x) exp(r(x, y) / beta)  log_Z
    sigma       the logistic function                  torch.sigmoid

Four conventions, because public implementations disagree on them:

- log pi(y|x) is the *sum* of the log-probabilities of the response's tokens, including its end
  token.
- Log-softmax and sums use at least float32, whatever precision the model computes in.
- The reference log-probabilities are computed once, before training: by `model.sample`, as it
  draws the completions, or for given pairs by `beyond.custom_data`.
- A loss returns one value per pair. The training loop averages them.

All log-probabilities, rewards and KL divergences are in nats per response unless stated otherwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------- preferences


def bradley_terry(r_1: Tensor, r_2: Tensor) -> Tensor:
    """p*(y_1 > y_2 | x) = exp(r_1) / (exp(r_1) + exp(r_2)).  Eq. 1.

    r_1, r_2: rewards in nats (their difference is the log-odds that y_1 is preferred), of any
    shapes that broadcast.
    """
    return torch.sigmoid(r_1 - r_2)


def plackett_luce(r: Tensor) -> Tensor:
    """log p*(ranking | x) = sum_k [ r_k - log sum_{j >= k} exp(r_j) ].  Eq. 18.

    r: rewards (..., K) in nats, best response first. Returns shape (...). With K = 2 this is the
    log of Bradley-Terry. Minus its value at the implicit rewards is the ranking loss, Eq. 20.
    """
    log_sum_of_rest = r.flip(-1).logcumsumexp(-1).flip(-1)
    return (r - log_sum_of_rest).sum(-1)


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """r_hat(x, y) = beta log( pi_theta(y|x) / pi_ref(y|x) ), in nats.

    This is Eq. 5 without the term beta log Z(x). All responses to x share that term, so it cancels
    from every preference (Eq. 6).
    """
    return beta * (logp - ref_logp)


def dpo_loss(
    logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigma( r_hat_w - r_hat_l ).  Eq. 7.

    Arguments: log pi(y|x) of both responses under pi_theta and pi_ref, in nats, shape (B,) each.
    Returns the losses and both implicit rewards, (B,) each. The loss is ln 2 where pi_theta =
    pi_ref.
    """
    r_hat_w = implicit_reward(logp_w, ref_logp_w, beta)
    r_hat_l = implicit_reward(logp_l, ref_logp_l, beta)
    losses = -F.logsigmoid(r_hat_w - r_hat_l)  # in float32, log(sigmoid(z)) is -inf for z < -90
    return losses, r_hat_w, r_hat_l


# ------------------------------------------------- the optimum


def optimal_policy(ref_logp: Tensor, r: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """log pi_r(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x).  Eq. 4.

    ref_logp, r: (..., N) log-probabilities and rewards, in nats, of *all* responses to x. beta
    broadcasts against r. Returns log pi_r (..., N) and log Z (...). A language model has
    too many responses to list, so train.py uses `frontier`.
    """
    tilted = ref_logp + r / beta
    log_Z = tilted.logsumexp(-1)
    return tilted - log_Z[..., None], log_Z


def frontier(r: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate reward and KL of the optimum (Eq. 4) from N samples of pi_ref.

    r: (..., N) rewards of the samples in nats. beta broadcasts against it. Each sample stands for
    1/N of pi_ref, and gets a weight w_i proportional to exp(r_i / beta); the weights sum to 1.
    Returns the mean reward, KL(pi_r, pi_ref) and the effective sample size 1 / sum_i w_i^2, each of
    shape (...). The estimate is only reliable while the effective sample size is large: its KL
    cannot exceed log N, and its reward is biased low.
    """
    log_w = (r / beta).log_softmax(-1)
    w = log_w.exp()
    kl = (w * log_w).sum(-1) + math.log(r.size(-1))  # sum of w log( w / (1/N) )
    return (w * r).sum(-1), kl, 1 / w.square().sum(-1)


# -------------------------------- a language model as a policy


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary, in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def response_logps(pi: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) for each response token, and 0 elsewhere.

    ids: (B, T) token ids, padded on the right. mask: (B, T), True on the tokens of the response.
    Returns (B, T), in nats. The sum over T is log pi(y|x). train.py uses
    `lib.inference.fast_response_logps`, which returns the same.
    """
    logps = log_softmax(pi(ids[:, :-1]))  # (B, T-1, V): the logits at t predict the token at t + 1
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T-1)
    logps = logps.masked_fill(~mask[:, 1:], 0.0)
    return F.pad(logps, (1, 0))


@torch.no_grad()
def sequence_kl(pi_theta: nn.Module, pi_ref: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Unbiased estimates of KL(pi_theta, pi_ref), from responses sampled from pi_theta.

    Each is the sum of the KL divergences of the next-token distributions along y (section 6.1). It
    is never negative, and usually has less variance than the log-ratio log pi_theta(y|x) /
    pi_ref(y|x). Sampling must be at temperature 1. ids, mask: (B, T), as in `response_logps`.
    Returns (B,), in nats per response.
    """
    logp = log_softmax(pi_theta(ids[:, :-1]))  # (B, T-1, V)
    ref_logp = log_softmax(pi_ref(ids[:, :-1]))
    token_kl = (logp.exp() * (logp - ref_logp)).sum(-1)  # (B, T-1)
    return token_kl.masked_fill(~mask[:, 1:], 0).sum(-1)


# ---------------------------------------------------- training


@dataclass(frozen=True)
class Preferences:
    """Completions, and n preferences between them.

    Each completion is one row, whose log-probabilities are computed once, however many pairs it
    belongs to: four completions of a prompt serve its six pairs. Both rows of a pair have the same
    prompt. Rows of one prompt are consecutive. Prompts are numbered from 0; `select` keeps their
    numbers.
    """

    ids: Tensor  # (R, T) prompt and response, padded on the right
    mask: Tensor  # (R, T) True on the tokens of the response
    ref_logps: Tensor  # (R, T) log pi_ref(y_t | x, y_<t), 0 outside the mask
    prompt: Tensor  # (R,) the number of the row's prompt, ascending
    pairs: Tensor  # (n, 2) the rows of y_w and y_l
    weight: Tensor  # (n,) in the loss: usually 1; for soft labels, the probability of this order

    def select(self, prompts: Tensor) -> "Preferences":
        """The preferences of these prompts, with T cut to the longest row."""
        rows = torch.isin(self.prompt, prompts)  # (R,) bool
        kept = rows[self.pairs[:, 0]]  # (n,) bool
        new_row = rows.cumsum(0) - 1  # (R,) old row -> new row
        T = int(self.mask[rows].any(0).nonzero().max()) + 1
        ids, mask, ref_logps = (x[rows, :T] for x in (self.ids, self.mask, self.ref_logps))
        pairs = new_row[self.pairs[kept]]
        weight = self.weight[kept]
        return Preferences(ids, mask, ref_logps, self.prompt[rows], pairs, weight)

    def to(self, device: torch.device) -> "Preferences":
        return Preferences(*(tensor.to(device) for tensor in vars(self).values()))


# A loss takes log pi_theta (R, T) and the batch. It returns losses, r_hat_w and r_hat_l, (n,) each.
Loss = Callable[[Tensor, Preferences], tuple[Tensor, Tensor, Tensor]]


def pair_logps(logps: Tensor, batch: Preferences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp_w, logp_l, ref_logp_w, ref_logp_l of each pair, (n,) each, from token logps (R, T)."""
    w, l = batch.pairs.T
    logp = logps.sum(-1)  # (R,) log pi(y|x)
    ref_logp = batch.ref_logps.sum(-1)
    return logp[w], logp[l], ref_logp[w], ref_logp[l]


def dpo(logps: Tensor, batch: Preferences, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 for each pair of a batch: `dpo_loss` as a `Loss`, once beta is given."""
    return dpo_loss(*pair_logps(logps, batch), beta)


def mean_weights(weight: Tensor) -> Tensor:
    """The share of each pair in the batch's mean, (n,)."""
    return weight / weight.sum()


def pair_metrics(share, losses, r_hat_w, r_hat_l) -> dict[str, Tensor]:
    """Means over pairs, weighted by `share`. All arguments have shape (n,).

    Metrics: loss; the implicit rewards r_hat_w and r_hat_l; their difference, the margin; accuracy,
    the share of pairs with r_hat_w > r_hat_l, where a tie counts as 1/2.
    """
    margin = r_hat_w - r_hat_l
    values = {"loss": losses, "r_hat_w": r_hat_w, "r_hat_l": r_hat_l, "margin": margin}
    values["accuracy"] = (margin.sign() + 1) / 2
    return {name: (share * value).sum() for name, value in values.items()}


def train(
    pi_theta: nn.Module,
    preferences: Preferences,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    max_grad_norm: float = math.inf,  # no clipping
    logps_fn: Callable[[nn.Module, Tensor, Tensor], Tensor] = response_logps,
    normalize: Callable[[Tensor], Tensor] = mean_weights,
) -> Iterator[dict[str, Tensor]]:
    """Take one optimizer step per batch of prompts, and yield its metrics as scalar tensors.

    A generator: requesting a value takes one training step.

    loss: for instance `partial(dpo, beta=0.1)`. pi_ref enters only through preferences.ref_logps.
    batches: tensors of prompt numbers. logps_fn: computes log-probabilities as `response_logps`
    does. normalize: scales the weights of a batch's pairs; by default they sum to 1. On several
    processes, `beyond.distributed` uses the sum over all processes.

    Metrics: those of `pair_metrics`; logp_w and logp_l, which may both fall, because Eq. 7 only
    sees their difference; grad_norm. All are measured before the step.
    """
    device = next(pi_theta.parameters()).device
    for prompts in batches:
        batch = preferences.select(prompts).to(device)
        logps = logps_fn(pi_theta, batch.ids, batch.mask)
        losses, r_hat_w, r_hat_l = loss(logps, batch)
        share = normalize(batch.weight)

        optimizer.zero_grad()
        (share * losses).sum().backward()
        grad_norm = nn.utils.clip_grad_norm_(pi_theta.parameters(), max_grad_norm)
        optimizer.step()

        with torch.no_grad():
            metrics = pair_metrics(share, losses, r_hat_w, r_hat_l)
            logp_w, logp_l, _, _ = pair_logps(logps, batch)
            metrics |= {"logp_w": (share * logp_w).sum(), "logp_l": (share * logp_l).sum()}
        yield metrics | {"grad_norm": grad_norm}
