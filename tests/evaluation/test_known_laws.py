"""The parts `likelihood`, `density` and `classification`, whole, against laws whose code length, log Z, divergence and
p(y | x) are known."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebm.data import Dataset
from ebm.densities import GaussianMixture
from ebm.evaluation.classification import classification
from ebm.evaluation.density import density
from ebm.evaluation.evaluation import Evaluation
from ebm.evaluation.likelihood import dequantised, likelihood
from ebm.sampling.sgld import SGLD

SHAPE = (1, 4, 4)
AIS = {"chains": 16, "temperatures": 100, "power": 1.0, "leapfrog": 2, "acceptance": 0.8, "burn_in": 0}


class Tempered(nn.Module):
    """The energy whose law at its temperature T is exp(log_p), up to its constant: −T·(log_p(x) + constant)."""

    def __init__(self, log_p: Callable[[Tensor], Tensor], temperature: float, constant: float = 0.0) -> None:
        super().__init__()
        self.log_p, self.temperature, self.constant = log_p, temperature, constant

    def forward(self, x: Tensor) -> Tensor:
        return -self.temperature * (self.log_p(x) + self.constant)


def evaluated(folder: Path, energy: nn.Module, data: Dataset, part: Callable[..., None], **how: Any) -> Evaluation:
    ev = Evaluation([energy], data, SGLD(), folder, torch.device("cpu"), bootstrap=20)
    part(ev, **how)
    return ev


def bytes_of(p: Tensor, count: int) -> Dataset:
    """Images of independent bytes, each drawn from p (256,)."""
    x = torch.multinomial(p, count * math.prod(SHAPE), replacement=True, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8).view(count, *SHAPE)
    return Dataset("bytes", x[:20], x[20:])


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_flat_energy_takes_eight_bits_a_byte(tmp_path: Path, temperature: float) -> None:
    energy = Tempered(lambda x: 0 * x.flatten(1).sum(dim=1), temperature, constant=3.0)
    data = bytes_of(torch.ones(256), 60)
    found = evaluated(tmp_path, energy, data, likelihood, **AIS | {"temperatures": 2}).numbers
    for side in ("lower", "upper"):
        assert found[f"bits_per_dim/{side}"] == pytest.approx(8, abs=1e-6)
        assert found[f"log_z/{side}"] == pytest.approx(16 * math.log(2) + 3, abs=1e-4)
    assert found["ais/acceptance/forward"] == found["ais/acceptance/reverse"] == 1


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_independent_pixels_take_their_entropy(tmp_path: Path, temperature: float) -> None:
    """p(y) ∝ exp(a·y) over [−1, 1]: its integral over the cell of byte b is ∝ exp(a·b/128), and log Z log(2·sinh(a)/a)
    a pixel. The noise within the cells adds 1e-5 bits."""
    a, dims = 2.0, math.prod(SHAPE)
    p = (a * torch.arange(256, dtype=torch.float64) / 128).softmax(dim=0)
    data = bytes_of(p, 20_000)
    energy = Tempered(lambda x: a * x.flatten(1).sum(dim=1), temperature)
    found = evaluated(tmp_path, energy, data, likelihood, **AIS | {"temperatures": 400}).numbers
    lengths = -p.log2()[data.test.long()]
    length, standard_error = float(lengths.mean()), float(lengths.std()) / math.sqrt(lengths.numel())
    assert length == pytest.approx(float((-p * p.log2()).sum()), abs=5 * standard_error)  # the entropy, of these data
    log_z = dims * math.log(2 * math.sinh(a) / a)
    for side in ("lower", "upper"):
        of_log_z = (found[f"log_z/{side}"] - log_z) / dims / math.log(2)
        assert found[f"bits_per_dim/{side}"] == pytest.approx(length + of_log_z, abs=5e-4)
    (low, low_end), (high_start, high) = (found[f"bits_per_dim/{side}/ci95"] for side in ("lower", "upper"))
    assert low - (low_end - low) / 2 < length < high + (high - high_start) / 2  # four standard errors
    assert found["bits_per_dim/upper"] - found["bits_per_dim/lower"] < 0.05
    assert 0.6 < found["ais/acceptance/forward"] < 0.95 and 0.6 < found["ais/acceptance/reverse"] < 0.95


def test_floats_have_a_density_and_no_code_length(tmp_path: Path) -> None:
    x = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(0))
    energy = Tempered(lambda x: 0 * x.flatten(1).sum(dim=1), 0.1)
    ev = evaluated(tmp_path, energy, Dataset("floats", x, x), likelihood, **AIS | {"temperatures": 2})
    assert ev.numbers["bits_per_dim/lower"] == pytest.approx(1, abs=1e-6)  # −log₂ of the box's density, 2⁻ᴰ
    assert "the images are no bytes" in ev.sections[0].text()


def test_bytes_spread_over_their_own_cell() -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat(1000, 1)
    y = dequantised(x, torch.Generator().manual_seed(0))
    assert y.min() >= -1 and y.max() <= 1
    within = (y + 1) * 128 - x  # rounded to 1e-5
    assert within.min() > -1e-4 and within.max() < 1 + 1e-4
    assert within.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / x.numel()))


@pytest.mark.parametrize("temperature", [1.0, 0.1, 5.0])
def test_points_have_the_law_at_their_temperature(tmp_path: Path, temperature: float) -> None:
    truth = GaussianMixture(torch.tensor([[0.1, -0.2]]), 0.15)
    model = GaussianMixture(torch.tensor([[0.2, -0.2]]), 0.15)
    x = truth.sample(2000, torch.Generator().manual_seed(0)).clamp(-1, 1)
    data = Dataset("plane", x[:1000], x[1000:], log_prob=truth.log_prob)
    energy = Tempered(model.log_prob, temperature, constant=1.5)
    found = evaluated(tmp_path, energy, data, density, cells=200, steps=1).numbers
    assert found["log_z"] == pytest.approx(1.5, abs=1e-4)
    assert found["kl"] == pytest.approx(0.1**2 / (2 * 0.15**2), rel=1e-3)
    assert found["nll"] == pytest.approx(-float(model.log_prob(x[1000:]).mean()), abs=1e-4)


class TwoClasses(nn.Module):
    """E(x, y) = T·‖x − μ_y‖²/2σ², μ = (∓0.1, 0), σ = 0.2: p(y = 1 | x) = 1/(1 + exp(−0.2·x₁/σ²)), whatever T."""

    classes = 2

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.means = temperature, torch.tensor([[-0.1, 0.0], [0.1, 0.0]])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.temperature * (x[:, None] - self.means[labels]).square().sum(dim=2) / (2 * 0.2**2)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 5.0])
def test_classes_have_the_odds_of_the_law(tmp_path: Path, temperature: float) -> None:
    energy, labels = TwoClasses(temperature), torch.arange(4000) % 2
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = (energy.means[labels] + 0.2 * noise).clamp(-1, 1)
    data = Dataset("plane", x[:20], x[20:], labels[:20], labels[20:])
    found = evaluated(tmp_path, energy, data, classification).numbers
    log_odds = (0.2 * x[20:, 0] / 0.2**2).double()
    right = torch.where(labels[20:] == 1, log_odds, -log_odds)
    assert found["classification/nll"] == pytest.approx(float(nn.functional.softplus(-right).mean()), abs=1e-5)
    assert found["classification/confidence"] == pytest.approx(float(log_odds.abs().sigmoid().mean()), abs=1e-5)
    assert found["classification/accuracy"] == pytest.approx(float((right > 0).double().mean()))
    assert found["classification/calibration_error"] < 0.05  # of data of the law itself


def test_quadrature_of_images_is_skipped(tmp_path: Path) -> None:
    energy = Tempered(lambda x: 0 * x.flatten(1).sum(dim=1), 1.0)
    ev = evaluated(tmp_path, energy, bytes_of(torch.ones(256), 60), density, cells=9, steps=1)
    assert ev.skipped == {"density": "quadrature takes points in the plane, of shape (2,), not (1, 4, 4)"}
    assert not ev.numbers
