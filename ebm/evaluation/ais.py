"""Annealed importance sampling: log Z of an energy between two bounds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm import check
from ebm.energies import temperature_of
from ebm.evaluation.metrics import value_and_gradient
from ebm.sampling.chains import Energy
from ebm.sampling.compiled import Box
from ebm.sampling.sgld import frozen


@dataclass
class Bracket:
    """Log-weights (chains,) whose means lie below and above log Z in expectation, by Jensen's inequality.

    lower     of forward chains from the base; log-mean-exp of them estimates log Z itself
    upper     of reverse chains from samples of the target, negated; a bound only if they are samples of exp(−E/T)
    acceptance  mean acceptance of the proposals, "forward" and in "reverse"
    """

    lower: Tensor
    upper: Tensor
    acceptance: dict[str, float]

    def bound(self, side: str) -> tuple[float, float]:
        """(mean, standard error) of "lower" or "upper"."""
        values = getattr(self, side)
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def temperatures(count: int, power: float = 1.0) -> Tensor:
    """β_k = (k/count)^power for k = 0 … count: 0 is the base, 1 the target; a power above 1 lingers at the base."""
    check.number("ais.temperatures", count, 1, integer=True)
    return torch.linspace(0, 1, count + 1, dtype=torch.float64) ** power


def bracket(
    energy: Energy,
    base: Any,
    samples: Tensor,
    generator: torch.Generator,
    betas: Tensor,
    leapfrog: int = 3,
    acceptance: float = 0.8,
    bounds: Box = None,
    burn_in: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Bracket:
    """log Z of exp(−E/T), T the energy's temperature, by AIS and its reverse (Neal 2001; Grosse et al. 2015,
    "Sandwiching the marginal likelihood").

    The path U_β = (1 − β) E_base + β E/T is walked by one HMC transition at each of `betas` (K + 1,), 0 to 1.

    base        a density with `__call__` (its energy), `sample(count, generator)` and `log_z`
    samples     (chains, *shape) of the target, where the reverse starts; as many go forward
    burn_in     transitions at β = 1 that the samples first make, where they are not of the target itself
    leapfrog    steps of a transition, >= 1; with 1 it is MALA
    acceptance  that a first pass, thrown away, tunes step sizes to: the weights are unbiased, those of fixed kernels
    bounds      (low, high) box; chains are reflected at its walls. None for none
    progress    what the transitions are iterated through, as a bar that tells of them: 3K + `burn_in` in four ranges

    The energy is run frozen, as in the sampler. Raises ValueError for weights that are not finite.
    """
    check.number("ais.leapfrog", leapfrog, 1, integer=True)
    check.number("ais.acceptance", acceptance, 0, 1, open_low=True)
    check.that(len(samples) >= 2, f"ais.chains must be at least 2, got {len(samples)}")
    sizes, target = [0.1] * len(betas), _over_temperature(energy)

    def walk(x: Tensor, forward: bool = True, tune: bool = False) -> tuple[Tensor, float]:
        """Summed log weights (chains,) over temperatures 1 … K, or K … 1 in reverse, and the mean acceptance."""
        order = range(1, len(betas)) if forward else range(len(betas) - 1, 0, -1)
        weight = torch.zeros(len(x), dtype=torch.float64)
        accepted, growth = 0.0, 1.0
        for k in progress(order):
            gain = float(betas[k] - betas[k - 1])
            if forward:  # a weight, then the kernel that leaves the law of β_k alone; in reverse the mirror image
                weight += gain * _difference(base, target, x)
            x, rate = hmc(_between(base, target, float(betas[k])), x, sizes[k] * growth, leapfrog, generator, bounds)
            accepted += rate / len(order)
            if not forward:
                weight += gain * _difference(base, target, x)
            if tune:
                sizes[k], growth = sizes[k] * growth, growth * math.exp(0.2 * (rate - acceptance))
        return weight, accepted

    with frozen(energy):
        start = base.sample(2 * len(samples), generator).to(samples)
        walk(start[: len(samples)], tune=True)
        lower, forward = walk(start[len(samples) :])
        x = samples
        for _ in progress(range(burn_in)):
            x, _ = hmc(target, x, sizes[-1], leapfrog, generator, bounds)
        upper, reverse = walk(x, forward=False)
    if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        raise ValueError("annealed importance sampling gave weights that are not finite")
    return Bracket(lower + base.log_z, upper + base.log_z, {"forward": forward, "reverse": reverse})


def _over_temperature(energy: Energy) -> Energy:
    T = temperature_of(energy)
    return lambda x: energy(x) / T


def _between(base: Energy, target: Energy, beta: float) -> Energy:
    return lambda x: (1 - beta) * base(x) + beta * target(x)


def _difference(base: Energy, target: Energy, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (base(x) - target(x)).double().cpu()


def hmc(
    potential: Energy, x: Tensor, size: float, leapfrog: int, generator: torch.Generator, bounds: Box = None
) -> tuple[Tensor, float]:
    """One transition of Hamiltonian Monte Carlo that leaves exp(−U) alone, U the `potential`: (x (B, *shape), mean
    acceptance).

    `leapfrog` steps of length `size` with unit masses (Neal 2011, "MCMC using Hamiltonian dynamics"), then Metropolis.
    At the walls of `bounds` a chain is reflected, which keeps volume and can be undone, as Metropolis needs.
    """
    momentum = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x)
    value, gradient = value_and_gradient(potential, x)
    start = value + 0.5 * momentum.square().flatten(1).sum(dim=1)
    y = x
    for _ in range(leapfrog):
        momentum = momentum - 0.5 * size * gradient
        y = y + size * momentum
        if bounds is not None:
            low, high = bounds
            y = (y - low).remainder(2 * (high - low))  # unfolded: the second half is the way back
            back = y > high - low
            y = torch.where(back, 2 * (high - low) - y, y) + low
            momentum = torch.where(back, -momentum, momentum)
        value, gradient = value_and_gradient(potential, y)
        momentum = momentum - 0.5 * size * gradient
    ratio = (start - value - 0.5 * momentum.square().flatten(1).sum(dim=1)).exp().clamp(max=1)
    accept = torch.rand(len(x), generator=generator, dtype=x.dtype, device=generator.device).to(x) < ratio
    return torch.where(accept.view(-1, *[1] * (x.dim() - 1)), y, x), float(ratio.nan_to_num(0).mean())
