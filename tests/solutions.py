"""Answers to the exercises of derive.ipynb: one that is right, and some that are wrong, each named for what is wrong."""
import torch
from torch.nn.functional import logsigmoid, softplus


def my_reward(pi_theta, pi_ref, beta):
    return beta * (pi_theta - pi_ref)


def my_loss(pi_theta_w, pi_theta_l, pi_ref_w, pi_ref_l, beta):
    return softplus(my_reward(pi_theta_l, pi_ref_l, beta) - my_reward(pi_theta_w, pi_ref_w, beta))


def my_optimum(pi_ref, r, beta):
    return (pi_ref + r / beta).log_softmax(-1)


RIGHT = {"my_reward": my_reward, "my_loss": my_loss, "my_optimum": my_optimum}

WRONG = {
    "my_reward": {
        "beta left out": lambda pi_theta, pi_ref, beta: pi_theta - pi_ref,
        "beta squared": lambda pi_theta, pi_ref, beta: beta ** 2 * (pi_theta - pi_ref),
        "divided by beta": lambda pi_theta, pi_ref, beta: (pi_theta - pi_ref) / beta,
        "policies exchanged": lambda pi_theta, pi_ref, beta: beta * (pi_ref - pi_theta),
        "a ratio of logarithms": lambda pi_theta, pi_ref, beta: beta * (pi_theta / pi_ref),
        "a difference of probabilities": lambda pi_theta, pi_ref, beta: beta * (pi_theta.exp() - pi_ref.exp()),
        "reference left out": lambda pi_theta, pi_ref, beta: beta * pi_theta,
        "averaged": lambda pi_theta, pi_ref, beta: my_reward(pi_theta, pi_ref, beta).mean(),
        "one argument too few": lambda pi_theta, pi_ref: pi_theta - pi_ref,
        "not a function": 0.0,
    },
    "my_loss": {
        "y_w and y_l exchanged": lambda w, l, ref_w, ref_l, beta: my_loss(l, w, ref_l, ref_w, beta),
        "reference left out": lambda w, l, ref_w, ref_l, beta: -logsigmoid(beta * (w - l)),
        "reference added": lambda w, l, ref_w, ref_l, beta: -logsigmoid(beta * (w - l + ref_w - ref_l)),
        "beta left out": lambda w, l, ref_w, ref_l, beta: my_loss(w, l, ref_w, ref_l, 1.0),
        "beta outside": lambda w, l, ref_w, ref_l, beta: beta * my_loss(w, l, ref_w, ref_l, 1.0),
        "averaged": lambda w, l, ref_w, ref_l, beta: my_loss(w, l, ref_w, ref_l, beta).mean(),
        "sign lost": lambda w, l, ref_w, ref_l, beta: logsigmoid(beta * (w - l - ref_w + ref_l)),
        "no logarithm": lambda w, l, ref_w, ref_l, beta: 1 - torch.sigmoid(beta * (w - l - ref_w + ref_l)),
        "logarithm of a sigmoid": lambda w, l, ref_w, ref_l, beta: -torch.sigmoid(beta * (w - l - ref_w + ref_l)).log(),
        "hinge": lambda w, l, ref_w, ref_l, beta: (1 - beta * (w - l - ref_w + ref_l)).clamp(min=0),
        "rewards returned too": lambda w, l, ref_w, ref_l, beta: (my_loss(w, l, ref_w, ref_l, beta), w, l),
    },
    "my_optimum": {
        "multiplied by beta": lambda pi_ref, r, beta: (pi_ref + r * beta).log_softmax(-1),
        "beta left out": lambda pi_ref, r, beta: (pi_ref + r).log_softmax(-1),
        "Z left out": lambda pi_ref, r, beta: pi_ref + r / beta,
        "reference left out": lambda pi_ref, r, beta: (r / beta).log_softmax(-1),
        "probabilities": lambda pi_ref, r, beta: (pi_ref + r / beta).softmax(-1),
        "reward subtracted": lambda pi_ref, r, beta: (pi_ref - r / beta).log_softmax(-1),
        "all divided by beta": lambda pi_ref, r, beta: ((pi_ref + r) / beta).log_softmax(-1),
        "the reference itself": lambda pi_ref, r, beta: pi_ref,
        "log Z returned too": lambda pi_ref, r, beta: (my_optimum(pi_ref, r, beta), torch.tensor(0.0)),
    },
}
