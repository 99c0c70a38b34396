"""Energies made of energies, at the temperature of the first. None has a `chain()`: the sampler takes autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.energies import temperature_of


class Composed(nn.Module):
    """x (B, *shape) → E(x) (B,) of several energies E_i with weights w_i (Du, Li & Mordatch 2020, "Compositional
    visual generation with energy-based models", section 3.2):

        and  E(x)/T = Σ w_i E_i(x)/T_i: the product of the densities; w_i < 0 divides by one, which is NOT
        or   E(x)/T = −log Σ w_i exp(−E_i(x)/T_i), w_i > 0: their mixture, in shares of w_i times the unknown Z_i

    T_i are their temperatures, and T is T_1, so that the first one's sampler fits the composition as it is.
    Raises ValueError for energies of other shapes (where they name one), weights out of range or another number.
    """

    weights: Tensor

    def __init__(
        self, energies: Sequence[nn.Module], combine: str = "and", weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        shapes: set[Any] = {energy.shape for energy in energies if hasattr(energy, "shape")}
        if len(shapes) > 1:
            raise ValueError(f"energies of one image shape compose, got {' and '.join(map(str, sorted(shapes)))}")
        weights = [1.0] * len(energies) if weights is None else weights
        if not isinstance(weights, Sequence) or not energies or len(weights) != len(energies):
            raise ValueError(f"weights must be a number for each of the {len(energies)} energies, got {weights}")
        self.combine = check.choice("combine", combine, ("and", "or"))
        for weight in weights:
            check.number("weights", weight, *((0,) if combine == "or" else ()), open_low=True)
        self.energies = nn.ModuleList(energies)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    @property
    def temperature(self) -> float:
        return temperature_of(self.energies[0])

    def forward(self, x: Tensor) -> Tensor:
        energies = torch.stack([energy(x) / temperature_of(energy) for energy in self.energies])
        weights = self.weights.to(energies)[:, None]
        if self.combine == "and":
            return self.temperature * (weights * energies).sum(dim=0)
        return -self.temperature * torch.logsumexp(weights.log() - energies, dim=0)


class InterpolationPath(nn.Module):
    """A path of n images is one chain, x (B, n, *shape) → (B,): Σ_i E(x_i) + spring/2 · Σ_i ‖x_{i+1} − x_i‖², at
    the temperature of E."""

    def __init__(self, energy: nn.Module, spring: float) -> None:
        super().__init__()
        self.energy, self.spring = energy, check.number("spring", spring, 0)
        self.temperature = temperature_of(energy)

    def forward(self, x: Tensor) -> Tensor:
        energies = self.energy(x.flatten(0, 1)).view(x.shape[:2]).sum(dim=1)
        return energies + self.spring / 2 * x.diff(dim=1).square().flatten(1).sum(dim=1)

    def along(self, x: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """The energies E(x_i) (B, n) of paths (B, n, *shape), a path at a time on `device`."""
        return torch.stack([self.energy(images.to(device)).detach().cpu() for images in x])


def linear_paths(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs of images (2·B, *shape), one after the other → linear blends (B, count, *shape) from the one to the other,
    and, of the same shape, true where their ends are. Raises ValueError for an odd number of images."""
    check.that(len(ends) % 2 == 0, f"init=interpolate takes pairs of images, got {len(ends)}")
    check.memory(f"path_images={count}", 4 * ends.numel() * count)
    t = torch.linspace(0, 1, count).view(1, -1, *[1] * (ends.dim() - 1))
    paths = torch.lerp(ends[0::2, None], ends[1::2, None], t)
    return paths, ((t == 0) | (t == 1)).expand_as(paths)


class Observed(nn.Module):
    """An image and what was seen of it are one chain, x (B, 2, *shape) → (B,):
    E(x_0) + fidelity/2 · ‖degrade(x_0) − x_1‖², at the temperature T of E: seen with noise of variance T/fidelity. The
    sampler's `given` holds x_1."""

    def __init__(self, energy: nn.Module, degrade: Callable[[Tensor], Tensor], fidelity: float) -> None:
        super().__init__()
        self.energy, self.degrade, self.fidelity = energy, degrade, check.number("fidelity", fidelity, 0)
        self.temperature = temperature_of(energy)

    def forward(self, x: Tensor) -> Tensor:
        misfit = (self.degrade(x[:, 0]) - x[:, 1]).square().flatten(1).sum(dim=1)
        return self.energy(x[:, 0]) + self.fidelity / 2 * misfit
