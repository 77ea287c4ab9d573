"""Solutions to the exercises of derive.ipynb, and wrong answers, each named for its mistake."""

import math

import torch


def my_gradient(theta, ref_logp, w, l, beta):
    """Exercise 1: -beta sigma(r_hat_l - r_hat_w) (e_w - e_l), averaged over the pairs."""
    log_ratio = theta.log_softmax(-1) - ref_logp
    margin = beta * (log_ratio[w] - log_ratio[l])  # (n,)
    weight = torch.sigmoid(-margin)
    unit = torch.eye(len(theta), dtype=theta.dtype)
    return -beta * (weight[:, None] * (unit[w] - unit[l])).mean(0)  # (K,)


def my_ranking_loss(logp, ref_logp, order, beta):
    """Exercise 2: minus the sum over k of r_hat_k - log sum_{j >= k} exp(r_hat_j)."""
    r_hat = beta * (logp - ref_logp)[order]
    loss = 0.0
    for k in range(len(r_hat)):
        loss = loss - (r_hat[k] - r_hat[k:].logsumexp(0))
    return loss


def my_response_logp(logits, ids, mask):
    """Exercise 3: shift, select, mask, sum."""
    logps = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T-1)
    return logps.masked_fill(~mask[:, 1:], 0.0).sum(-1)


def my_frontier(r, beta):
    """Exercise 4: self-normalised weights within each prompt, then the mean over prompts."""
    log_w = (r / beta).log_softmax(-1)  # (P, N)
    w = log_w.exp()
    reward = (w * r).sum(-1)
    kl = (w * (log_w + torch.tensor(float(r.size(-1))).log())).sum(-1)
    return reward.mean(), kl.mean()


RIGHT = {f.__name__: f for f in (my_gradient, my_ranking_loss, my_response_logp, my_frontier)}


def repeated_responses_counted_once(theta, ref_logp, w, l, beta):
    log_ratio = theta.log_softmax(-1) - ref_logp
    weight = torch.sigmoid(-beta * (log_ratio[w] - log_ratio[l])) / len(w)
    gradient = torch.zeros_like(theta)
    gradient[w] -= beta * weight
    gradient[l] += beta * weight
    return gradient


def one_denominator(logp, ref_logp, order, beta):
    r_hat = beta * (logp - ref_logp)[order]
    return -(r_hat - r_hat.logsumexp(0)).sum()


def without_logsumexp(logp, ref_logp, order, beta):
    r_hat = beta * (logp - ref_logp)[order]
    return -sum(r_hat[k] - r_hat[k:].exp().sum().log() for k in range(len(r_hat)))


def mask_as_a_factor(logits, ids, mask):
    logps = logits[:, :-1].float().log_softmax(-1)
    return (logps.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)


def logarithm_of_weights(r, beta):
    w = (r / beta).softmax(-1)
    return (w * r).sum(-1).mean(), (w * (w * r.size(-1)).log()).sum(-1).mean()


def uniform_forgotten(r, beta):
    reward, kl = my_frontier(r, beta)
    return reward, kl - math.log(r.size(-1))


WRONG = {
    "my_gradient": {
        "one row per pair": lambda t, ref, w, l, b: my_gradient(t, ref, w, l, b).expand(len(w), -1),
        "weight reversed": lambda t, ref, w, l, b: -my_gradient(t, ref, l, w, b),
        "reference forgotten": lambda t, ref, w, l, b: my_gradient(t, 0 * ref, w, l, b),
        "repeated responses counted once": repeated_responses_counted_once,
        "an argument too few": lambda t, ref, w, l: my_gradient(t, ref, w, l, 1.0),
    },
    "my_ranking_loss": {
        "worst first": lambda p, ref, o, b: my_ranking_loss(p, ref, o.flip(0), b),
        "one denominator for all": one_denominator,
        "exp overflows": without_logsumexp,
    },
    "my_response_logp": {
        "no shift": lambda z, i, m: my_response_logp(z.roll(-1, 1), i, m),
        "mask as a factor": mask_as_a_factor,
        "half precision": lambda z, i, m: my_response_logp(z, i, m).to(z.dtype),
        "one value for the batch": lambda z, i, m: my_response_logp(z, i, m).sum(),
    },
    "my_frontier": {
        "multiplied by beta": lambda r, b: my_frontier(r, 1 / b),
        "pooled prompts": lambda r, b: my_frontier(r.flatten()[None], b),
        "logarithm of weights": logarithm_of_weights,
        "uniform weights forgotten": uniform_forgotten,
        "reward only": lambda r, b: my_frontier(r, b)[0],
    },
}
