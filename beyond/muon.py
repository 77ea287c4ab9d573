"""Muon (Jordan et al. 2024): momentum with orthogonalized updates, for the matrices of a model.

It computes the same update as `torch.optim.Muon`, which uses bfloat16 on every processor and is
very slow without native bfloat16.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from lib.optim import bf16_supported


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix close to 1, keeping its singular vectors.

    matrices: (n, rows, cols). Newton-Schulz: each of five steps maps every singular value s to
    a s + b s^3 + c s^5; together they bring it into about [0.7, 1.2]. The products use bfloat16
    only where the hardware supports it natively.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if bf16_supported(matrices.device) else matrices.float()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for matrices (see above)."""

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                same_shape[p.shape].append(p)
            for (rows, cols), params in same_shape.items():
                updates = torch.stack([self.momentum_update(p, group["momentum"]) for p in params])
                lr = group["lr"] * math.sqrt(max(1, rows / cols))
                for p, update in zip(params, orthogonalize(updates), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-lr)

    def momentum_update(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum, as an exponential moving average of the gradients."""
        if not self.state[p]:
            self.state[p]["average"] = torch.zeros_like(p)
        average = self.state[p]["average"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)
