"""The optimizer and the learning rate's course over training."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ebm import check


def adam(parameters: Iterable[Tensor], lr: float = 1e-4, beta1: float = 0.0, beta2: float = 0.999) -> torch.optim.Adam:
    """torch's Adam with checked arguments; β₁ = 0 since the loss surface moves with the parameters."""
    check.number("optimizer.lr", lr, 0, open_low=True)
    check.number("optimizer.beta1", beta1, 0, 1 - 1e-9)
    check.number("optimizer.beta2", beta2, 0, 1 - 1e-9)
    return torch.optim.Adam(parameters, lr=lr, betas=(float(beta1), float(beta2)))


class ExponentialDecay:
    """lr × gamma^epoch, for the `epoch`-th epoch from 0."""

    def __init__(self, gamma: float = 0.97) -> None:
        self.gamma = check.number("scheduler.gamma", gamma, 0, 1, open_low=True)

    def __call__(self, epoch: int, progress: float) -> float:
        return self.gamma**epoch


class PolynomialDecay:
    """From lr to lr × final_factor over the whole training, as (1 − progress)^power; `progress` in [0, 1].

    power 1 is a straight line; 2 leaves the high rates, at which chains are lost, earlier.
    """

    def __init__(self, final_factor: float = 0.02, power: float = 2.0) -> None:
        self.final_factor = check.number("scheduler.final_factor", final_factor, 0, 1)
        self.power = check.number("scheduler.power", power, 0, open_low=True)

    def __call__(self, epoch: int, progress: float) -> float:
        return self.final_factor + (1 - self.final_factor) * max(1 - progress, 0.0) ** self.power
