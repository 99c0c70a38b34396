"""Analytic energies with exact sampling and log Z, for toy data and as oracles: E(x) = −log p(x) up to log Z."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ebm import check
from ebm.data import Dataset, Device


class GaussianMixture:
    """p(x) = Σ_k w_k N(x; μ_k, σ_k² I) over x (N, D): means (K, D), stds and weights (K,) or one number for all.

    E(x) = −log p(x) − `log_z`, so that ∫ exp(−E) = exp(log_z). Raises ValueError for a setting out of range.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, weights: Tensor | None = None, log_z: float = 0.0) -> None:
        if means.dim() != 2 or len(means) == 0:
            raise ValueError(f"means must be (components, dimensions), got {tuple(means.shape)}")
        self.means = means
        self.stds = torch.as_tensor(stds, dtype=means.dtype).expand(len(means))
        self.weights = torch.ones_like(self.stds) / len(means) if weights is None else weights / weights.sum()
        if not bool((self.stds > 0).all()) or not bool((self.weights >= 0).all()):
            raise ValueError("stds must be positive and weights not negative")
        self.log_z = log_z

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) (N,)."""
        size = x.shape[1] * (self.stds.log() + 0.5 * math.log(2 * math.pi))
        parts = []
        for part in x.split(8192):  # (8192, K) at a time
            squared = torch.cdist(part, self.means, compute_mode="donot_use_mm_for_euclid_dist").square()
            parts.append(torch.logsumexp(self.weights.log() - size - 0.5 * squared / self.stds**2, dim=1))
        return torch.cat(parts)

    def __call__(self, x: Tensor) -> Tensor:
        return -self.log_prob(x) - self.log_z

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` exact samples (count, D)."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise


class Uniform:
    """The uniform law on [−1, 1]^shape: E(x) = 0 there, log Z = D log 2."""

    def __init__(self, shape: Sequence[int], device: Device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self.log_z = math.prod(shape) * math.log(2)

    def log_prob(self, x: Tensor) -> Tensor:
        inside = (x.abs() <= 1).flatten(1).all(dim=1)
        return torch.where(inside, -self.log_z, -torch.inf).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1).sum(dim=1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, *self.shape, generator=generator, device=self.device, dtype=self.dtype) * 2 - 1


class Checkerboard:
    """Uniform on the black squares of a 4×4 board over [−0.96, 0.96]²: density 1/(8 · 0.48²) there, 0 elsewhere."""

    side, squares = 0.48, 4

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) (N,), −∞ on white."""
        cell = torch.floor(x / self.side).long() + self.squares // 2
        black = (cell >= 0).all(dim=1) & (cell < self.squares).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
        return torch.where(black, -math.log(8 * self.side**2), -torch.inf)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(self.squares, (count,), generator=generator)
        column = 2 * torch.randint(self.squares // 2, (count,), generator=generator) + row % 2
        corner = torch.stack([column, row], dim=1) - self.squares // 2
        return (corner + torch.rand(count, 2, generator=generator)) * self.side


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def density(name: str) -> GaussianMixture | Checkerboard:
    """A density on [−1, 1]² with exact sampling; but for the checkerboard a mixture of Gaussians, dense along curves.

    eight_gaussians  σ = 0.06 around a circle of radius 0.7      two_moons  two half circles, σ = 0.05
    rings            four circles, σ = 0.03                      pinwheel   five spiral arms that widen outwards
    checkerboard     eight black squares
    """
    check.choice("data.name", name, ("eight_gaussians", "two_moons", "rings", "checkerboard", "pinwheel"))
    if name == "checkerboard":
        return Checkerboard()
    if name == "eight_gaussians":
        return GaussianMixture(_polar(torch.tensor(0.7), torch.arange(8) * math.pi / 4), 0.06)
    if name == "two_moons":
        moon = _polar(torch.tensor(0.5), torch.linspace(0, math.pi, 64))
        shift = torch.tensor([0.25, -0.125])
        return GaussianMixture(torch.cat([moon - shift, shift - moon]), 0.05)
    if name == "rings":
        turn = torch.arange(128) * 2 * math.pi / 128
        return GaussianMixture(torch.cat([_polar(torch.tensor(r), turn) for r in (0.2, 0.4, 0.6, 0.8)]), 0.03)
    t = torch.linspace(0, 1, 48)
    arms = [_polar(0.15 + 0.6 * t, 2 * math.pi * arm / 5 + 1.3 * t) for arm in range(5)]
    return GaussianMixture(torch.cat(arms), (0.02 + 0.04 * t).repeat(5))


def dataset(
    name: str, train_size: int = 50_000, test_size: int = 10_000, seed: int = 0, hold_out: int | str | None = None
) -> Dataset:
    """Exact samples (N, 2) of `density(name)` as a data set; its `log_prob` is the density's. `hold_out` as there."""
    for key, value, least in (("train_size", train_size, 2), ("test_size", test_size, 1), ("seed", seed, 0)):
        check.number(f"data.{key}", value, least, integer=True)
    check.memory(f"data.train_size={train_size} with data.test_size={test_size}", 64 * (train_size + test_size))
    truth = density(name)
    x = truth.sample(train_size + test_size, torch.Generator().manual_seed(seed)).clamp(-1, 1)
    return Dataset(name, x[:train_size], x[train_size:], log_prob=truth.log_prob, hold_out=hold_out)


def midpoints(cells: int) -> Tensor:
    """Midpoints (cells², 2) of a square grid over [−1, 1]², row by row from the bottom left."""
    side = (torch.arange(cells) + 0.5) * 2 / cells - 1
    return torch.cartesian_prod(side, side).flip(1)  # y, which changes slowest, comes second


def log_integral(log_values: Tensor) -> float:
    """log ∫ exp over [−1, 1]² from values (cells²,) at `midpoints`; the error is of order (cell size)²."""
    return float(torch.logsumexp(log_values.double(), dim=0)) + math.log(4 / len(log_values))


def kl_on_grid(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p‖q) in nats from log densities (cells²,) at `midpoints`, p normalised there."""
    log_p, log_q = log_p.double() - log_integral(log_p), log_q.double()
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return float(terms.sum() * 4 / len(terms))
