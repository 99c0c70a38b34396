"""Brackets of log Z against analytic energies, within their own error bars."""

import math

import pytest
import torch
from scipy import stats

from ebm.densities import GaussianMixture, Uniform
from ebm.evaluation import ais


@pytest.mark.parametrize("dims", [2, 16, *(pytest.param(dims, marks=pytest.mark.slow) for dims in (128, 784))])
def test_log_z_lies_between_the_bounds(dims: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    base = GaussianMixture(torch.zeros(1, dims, dtype=torch.float64), 1.0)
    target = GaussianMixture(torch.full((1, dims), 0.2, dtype=torch.float64), 0.6, log_z=3.7)
    found = ais.bracket(target, base, target.sample(24, generator), generator, ais.temperatures(200))
    (low, low_error), (high, high_error) = found.bound("lower"), found.bound("upper")
    assert low - 4 * low_error < 3.7 < high + 4 * high_error
    assert high - low < 0.05 * dims + 1  # a bracket that says something
    assert all(0.6 < rate < 0.95 for rate in found.acceptance.values())


@pytest.mark.parametrize("dims", [2, 64])
def test_log_z_in_a_box_with_the_uniform_base(dims: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    inside = dims * math.log(stats.norm.cdf(1 / 0.5) - stats.norm.cdf(-1 / 0.5))
    target = GaussianMixture(torch.zeros(1, dims, dtype=torch.float64), 0.5, log_z=1.0)
    samples = torch.from_numpy(stats.truncnorm.rvs(-2, 2, scale=0.5, size=(24, dims), random_state=0))
    base = Uniform((dims,), dtype=torch.float64)
    found = ais.bracket(target, base, samples, generator, ais.temperatures(200), bounds=(-1, 1))
    (low, low_error), (high, high_error) = found.bound("lower"), found.bound("upper")
    assert low - 4 * low_error < 1.0 + inside < high + 4 * high_error
    assert high - low < 1


@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_log_z_is_that_of_the_energy_over_its_temperature(temperature: float) -> None:
    """E = ‖x‖²/2 at T is a Gaussian of variance T, log Z = D/2·log 2πT; started from zeros, which are no samples."""

    class Parabola(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square().sum(dim=1) / 2

    energy, dims = Parabola(), 8
    energy.temperature = temperature  # type: ignore[assignment]
    base = GaussianMixture(torch.zeros(1, dims, dtype=torch.float64), 1.0)
    start, betas = torch.zeros(24, dims, dtype=torch.float64), ais.temperatures(200)
    found = ais.bracket(energy, base, start, torch.Generator().manual_seed(0), betas, burn_in=30)
    (low, low_error), (high, high_error) = found.bound("lower"), found.bound("upper")
    log_z = dims / 2 * math.log(2 * math.pi * temperature)
    assert low - 4 * low_error < log_z < high + 4 * high_error
    assert high - low < 1


def test_weights_average_to_z() -> None:
    """E exp(log w) = Z exactly, however few temperatures there are."""
    generator = torch.Generator().manual_seed(0)
    base = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    target = GaussianMixture(torch.tensor([[0.5]], dtype=torch.float64), 0.7, log_z=0.4)
    found = ais.bracket(target, base, target.sample(20_000, generator), generator, ais.temperatures(5), leapfrog=1)
    weights = found.lower.exp()
    assert abs(float(weights.mean()) - math.exp(0.4)) < 5 * float(weights.std()) / math.sqrt(len(weights))
    inverse = (-found.upper).exp()
    assert abs(float(inverse.mean()) - math.exp(-0.4)) < 5 * float(inverse.std()) / math.sqrt(len(inverse))


def test_hmc_leaves_the_uniform_law_of_a_box_and_a_truncated_gaussian_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, law in ((1e3, stats.uniform(-1, 2)), (0.8, stats.truncnorm(-1 / 0.8, 1 / 0.8, scale=0.8))):
        x = torch.from_numpy(law.rvs(size=(20_000, 1), random_state=1))
        for _ in range(20):
            x, _ = ais.hmc(lambda x, s=scale: (x / s).square().sum(dim=1) / 2, x, 0.9, 3, generator, (-1, 1))
        assert x.abs().max() <= 1
        assert stats.kstest(x[:, 0].numpy(), law.cdf).pvalue > 1e-6


def test_arguments_are_checked() -> None:
    base = Uniform((2,))
    x = base.sample(4, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"ais\.leapfrog"):
        ais.bracket(base, base, x, torch.Generator(), ais.temperatures(2), leapfrog=0)
    with pytest.raises(ValueError, match=r"ais\.chains"):
        ais.bracket(base, base, x[:1], torch.Generator(), ais.temperatures(2))
    with pytest.raises(ValueError, match="finite"):
        ais.bracket(lambda x: x.sum(dim=1) * torch.nan, base, x, torch.Generator(), ais.temperatures(2))
