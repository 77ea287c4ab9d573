"""lib/optim.py and beyond/muon.py: the learning-rate schedule, and Muon."""

import numpy as np
import pytest
import torch

from beyond.muon import Muon
from lib.optim import linear_warmup_decay
from tiny import Products

SHAPES = [(8, 8), (4, 16), (16, 4), (48, 12), (16, 4), (3, 4)]


def trained(optimizer_of) -> list[torch.Tensor]:
    """Parameters after some steps. The gradient of the last parameter is 0."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optimizer_of(params)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        params[-1].grad.zero_()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("supported", [True, False])
def test_muon_takes_the_steps_of_torch_optim_muon(supported, monkeypatch):
    """Up to bfloat16 rounding, below 5% of the movement. bfloat16 is used if supported."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    how = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    with Products() as products:
        ours = trained(lambda params: Muon(params, **how))
    assert set(products.dtypes) == {torch.bfloat16 if supported else torch.float32}
    theirs = trained(lambda params: torch.optim.Muon(params, **how))
    start = trained(lambda params: torch.optim.SGD(params, lr=0.0))
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (q - before).norm()
        assert moved > 0.01 and (p - q).norm() < 0.05 * moved


def test_the_learning_rate_warms_up_over_2_percent_and_ends_at_0():
    lr = linear_warmup_decay(1000)
    rates = [lr(step) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / 21) and rates[1000] == 0
    assert rates[19] < rates[20] == max(rates) == pytest.approx(0.98)
    assert np.allclose(np.diff(rates[20:]), -1 / 1000)
    assert linear_warmup_decay(1)(0) > 0.9
