"""Direct Preference Optimization: the paper's mathematics and its training loop.

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn (2023), arXiv 2305.18290 v3, whose equation numbers are used throughout:

    L_DPO = -E log sigma( beta log pi_theta(y_w|x) / pi_ref(y_w|x)  -  beta log pi_theta(y_l|x) / pi_ref(y_l|x) )         (7)

    symbol      in the paper      here
    x           prompt            ids before the mask
    y_w, y_l    the preferred and the dispreferred response: ids under the mask, chosen by an index into K completions
    pi_theta    the policy being trained            pi_ref   the frozen reference it starts from
    beta        the price of a nat of KL            sigma    the logistic function
    r, r_hat    true and implicit reward, in nats   Z        the partition function (Eq. 4)

An nn.Module pi_theta or pi_ref is the policy itself; a tensor of that name holds its log-probabilities.

Choices, where code in public has gone both ways: a response's log-probability is the *sum* over its tokens, the end token
among them where the model emitted it, and never the prompt's; log-softmax and sums are in float32 (or float64)
whatever the model computes in; pi_ref is scored once, before training; the loss comes back per pair, and the loop averages it.
Log-probabilities, rewards and KL divergences are in nats, per response.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------------ preferences

def bradley_terry(r_1: Tensor, r_2: Tensor) -> Tensor:
    """p*(y_1 > y_2 | x) = exp r_1 / (exp r_1 + exp r_2).  Eq. 1; any shapes that broadcast."""
    return torch.sigmoid(r_1 - r_2)


def plackett_luce(r: Tensor) -> Tensor:
    """log p*(ranking) = sum_k [ r_k - log sum_{j >= k} exp r_j ],  rewards (..., K) given best first -> (...).  Eq. 18;
    at K = 2 it is log Bradley-Terry, and minus its value at r_hat is DPO's loss over rankings, Eq. 20."""
    return (r - r.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)


def implicit_reward(pi_theta: Tensor, pi_ref: Tensor, beta: float) -> Tensor:
    """r_hat(x, y) = beta log pi_theta(y|x) / pi_ref(y|x), from log-probabilities.  Eq. 5 without its beta log Z(x),
    which every response to x shares and every preference cancels (Eq. 6)."""
    return beta * (pi_theta - pi_ref)


def dpo_loss(pi_theta_w: Tensor, pi_theta_l: Tensor, pi_ref_w: Tensor, pi_ref_l: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """-log s(r_hat_w - r_hat_l) for each pair, and both implicit rewards.  Eq. 7.

    Each argument is log pi(y|x), summed over the response, (B,) nats; each result is (B,). ln 2 where pi_theta = pi_ref.
    """
    r_hat_w = implicit_reward(pi_theta_w, pi_ref_w, beta)
    r_hat_l = implicit_reward(pi_theta_l, pi_ref_l, beta)
    return -F.logsigmoid(r_hat_w - r_hat_l), r_hat_w, r_hat_l       # log(sigmoid(.)) would be -inf below -90


# ------------------------------------------------------------------------------------------------------ the optimum

def optimal_policy(pi_ref: Tensor, r: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """log pi_r(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x), and log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta).
    Eq. 4, on a finite set of responses: pi_ref (..., N) log-probabilities, r (..., N) nats -> (..., N) and (...)."""
    tilted = pi_ref + r / beta
    log_Z = tilted.logsumexp(-1)
    return tilted - log_Z[..., None], log_Z


def frontier(r: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where Eq. 4 lies if N samples of pi_ref stand for it: rewards r (..., N) -> E r, KL(pi_r, pi_ref) and effective
    sample size 1 / sum pi_r^2, (...) each. The KL cannot pass log N and the reward is biased low, which flatters whoever
    is compared with it: trust it only while the effective sample size is large."""
    uniform = torch.full_like(r, -math.log(r.size(-1)))
    pi_r, _ = optimal_policy(uniform, r, beta)
    p = pi_r.exp()
    return (p * r).sum(-1), (p * (pi_r - uniform)).sum(-1), 1 / p.square().sum(-1)


# ------------------------------------------------------------------------------------------------------ a model's side

def at_least_float32(logits: Tensor) -> Tensor:
    """bfloat16 logits would round log-probabilities to steps of a quarter of a nat at -50."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def send(v: Tensor, device: torch.device) -> Tensor:
    """v.to(device), without waiting for what a GPU is still at."""
    return v.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not v.is_cuda else v.to(device)


def places(mask: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Where the mask is true, as an index on the device. Of a mask on the CPU no GPU need be asked how many there are."""
    return tuple(send(i, device) for i in mask.nonzero(as_tuple=True))


def response_logps(pi: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) at the tokens under the mask and 0 elsewhere: ids, mask (B, T) -> (B, T) nats.
    Its sum over T is log pi(y|x). The mask may be on the CPU where ids are on a GPU."""
    where = places(mask[:, 1:], ids.device)
    logits = at_least_float32(pi(ids[:, :-1], where=where))             # (n, V); those at t predict the token at t + 1
    logps = -F.cross_entropy(logits, ids[:, 1:][where], reduction="none")
    return F.pad(logps.new_zeros(ids[:, 1:].shape).index_put(where, logps), (1, 0))


@torch.no_grad()
def sequence_kl(pi_theta: nn.Module, pi_ref: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two estimates of KL(pi_theta, pi_ref) in nats per response, from responses drawn from pi_theta at temperature 1:
    log pi_theta(y|x) / pi_ref(y|x), and the sum along y of the whole next-token distributions' KL. Both have the sequence
    KL as their mean; the second is usually steadier, and never negative. ids, mask (B, T) -> (B,) and (B,)."""
    row, place = places(mask[:, 1:], ids.device)
    logits = (at_least_float32(pi(ids[:, :-1], where=(row, place))) for pi in (pi_theta, pi_ref))
    theta, ref = (each.log_softmax(-1) for each in logits)                                              # (n, V)
    log_ratio = (theta - ref).gather(-1, ids[row, place + 1, None]).squeeze(-1)
    full = (theta.exp() * (theta - ref)).sum(-1)
    return tuple(kl.new_zeros(len(ids)).index_add(0, row, kl) for kl in (log_ratio, full))


# ------------------------------------------------------------------------------------------------------ training

@dataclass(frozen=True)
class Preferences:
    """P prompts with up to K completions each, and n preferences among them. Completions are scored once, and all pairs
    of one prompt are formed from those scores: four rows serve six pairs. All of them stay on the CPU, where shapes are
    known at once; `train` sends each batch to the model's device."""
    ids: Tensor         # (P, K, T) x and then y, padded on the right
    mask: Tensor        # (P, K, T) true on the tokens of y
    pi_ref: Tensor      # (P, K, T) log pi_ref(y_t | x, y_<t), 0 outside the mask
    pairs: Tensor       # (n, 3)    which prompt, which completion is y_w, which is y_l
    weight: Tensor      # (n,)      1, or the probability of this order of the pair

    def __getitem__(self, prompts: Tensor) -> "Preferences":
        """The preferences of these prompts alone, numbered anew, cut after their longest prompt and completion."""
        number = torch.full((len(self.ids),), -1, device=prompts.device)
        number[prompts] = torch.arange(len(prompts), device=prompts.device)
        keep = number[self.pairs[:, 0]] >= 0
        pairs = torch.cat((number[self.pairs[keep, :1]], self.pairs[keep, 1:]), dim=1)
        T = int(self.mask[prompts].any(dim=(0, 1)).nonzero().max()) + 1
        ids, mask, pi_ref = (v[prompts, :, :T] for v in (self.ids, self.mask, self.pi_ref))
        return Preferences(ids, mask, pi_ref, pairs, self.weight[keep])

    def to(self, device: torch.device) -> "Preferences":
        return Preferences(*(send(v, device) for v in vars(self).values()))


Loss = Callable[[Tensor, Preferences], tuple[Tensor, Tensor, Tensor]]   # (pi_theta (P, K, T), batch) -> as dpo_loss


def dpo(pi_theta: Tensor, batch: Preferences, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 for each pair of a batch: token log-probabilities pi_theta (P, K, T) -> as dpo_loss, (n,) each."""
    theta, ref = pi_theta.sum(-1), batch.pi_ref.sum(-1)                 # (P, K) log pi(y|x)
    x, w, l = batch.pairs.T
    return dpo_loss(theta[x, w], theta[x, l], ref[x, w], ref[x, l], beta)


def train(pi_theta: nn.Module, preferences: Preferences, loss: Loss, optimizer: torch.optim.Optimizer,
          batches: Iterable[Tensor], max_grad_norm: float = math.inf) -> Iterator[dict[str, Tensor]]:
    """Take one optimizer step for each batch of prompts, and yield what was seen there, as scalars on the model's device:
    loss; r_hat_w, r_hat_l and their difference, the margin; accuracy, the share of pairs with r_hat_w > r_hat_l, a tie
    counting one half; log pi_theta(y_w|x) and log pi_theta(y_l|x), which may both fall; the gradient's norm. All but the
    last are means over the batch's pairs, by weight, before the step. `loss` says what is minimised, for instance
    `partial(dpo, beta=0.1)`; the reference enters through preferences.pi_ref alone, so it cannot move."""
    device = next(pi_theta.parameters()).device
    for prompts in batches:
        batch = preferences[prompts]
        real = batch.mask.any(-1)                                       # (P, K); a prompt may have fewer than K completions
        mask, real = batch.mask[real], places(real, device)
        batch = batch.to(device)
        logps = response_logps(pi_theta, batch.ids[real], mask)
        pi = logps.new_zeros(batch.ids.shape).index_put(real, logps)
        losses, r_hat_w, r_hat_l = loss(pi, batch)
        share = batch.weight / batch.weight.sum()
        optimizer.zero_grad()
        (share * losses).sum().backward()
        grad_norm = nn.utils.clip_grad_norm_(pi_theta.parameters(), max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            x, w, l = batch.pairs.T
            margin = r_hat_w - r_hat_l
            seen = dict(loss=losses, r_hat_w=r_hat_w, r_hat_l=r_hat_l, margin=margin, accuracy=(margin.sign() + 1) / 2,
                        pi_theta_w=pi.sum(-1)[x, w], pi_theta_l=pi.sum(-1)[x, l])
            record = {name: (share * value).sum() for name, value in seen.items()} | {"grad_norm": grad_norm}
        yield record
