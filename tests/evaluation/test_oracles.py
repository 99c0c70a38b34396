"""Outliers and samples of known Gaussians, through the parts of an evaluation: every number against its closed form."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from scipy import integrate, stats
from torch import Tensor, nn

from ebm.data import Dataset
from ebm.evaluation.evaluation import Evaluation
from ebm.evaluation.ood_scores import ood
from ebm.evaluation.samples import samples
from ebm.running import checkpoint
from ebm.sampling.sgld import SGLD

SHAPE, PIXELS, SIZE = (1, 8, 8), 64, 8  # a sum of pixels has SIZE times their standard deviation
STD, MEAN = 0.1, 0.02  # of the images' pixels


def gaussian(mean: float, std: float, count: int, seed: int) -> Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return (mean + std * noise).clamp(-1, 1)  # beyond six standard deviations


def images(mean: float = MEAN, std: float = STD, count: int = 2000, root: None = None) -> Dataset:
    """Independent pixels, N(MEAN, STD²) of the test and validation images, N(mean, std²) of the training images, with
    labels of two classes."""
    train = gaussian(mean, std, count, 0)
    test, validation = (gaussian(MEAN, STD, count, seed) for seed in (1, 2))
    labels = torch.arange(count) % 2
    return Dataset("gaussian", train, test, labels, labels, validation=validation, validation_labels=labels)


class Linear(nn.Module):
    """E(x) = −sum of x: of independent Gaussian pixels it is Gaussian."""

    def __init__(self, shape: Any = SHAPE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return -self.weight * x.flatten(1).sum(dim=1)


class Paraboloid(nn.Module):
    """E(x) = ‖x − mean‖²/2std²."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).square().flatten(1).sum(dim=1) / (2 * self.std**2)


class Judge(nn.Module):
    """Features: the means of the images' four quarters, in units of the standard deviation that they have. Classes: by
    the sign of the first one."""

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4).flatten(1) * 4 / STD

    def forward(self, x: Tensor) -> Tensor:
        first = self.features(x)[:, :1]
        return torch.cat([first, -first], dim=1)


def evaluation(folder: Path, energy: nn.Module, data: Dataset, sampler: SGLD | None = None) -> Evaluation:
    ev = Evaluation([energy], data, sampler or SGLD(), folder, torch.device("cpu"), bootstrap=60)
    vars(ev)["classifier"] = (Judge(), {"accuracy": 0.5})
    return ev


def found(ev: Evaluation, name: str, of: str) -> float:
    """The number, whatever judge and number of samples its key names."""
    (key,) = [key for key in ev.numbers if re.fullmatch(rf"{name}/([^/]*-n\d+/)?{of}", key)]
    return ev.numbers[key]


def separations(inlier: Any, outlier: Any) -> dict[str, float]:
    """AUROC, AUPR and FPR95 of as many inliers as outliers, of two Gaussian laws of the score."""

    def precision(recall: float) -> float:
        return recall / (recall + outlier.sf(inlier.isf(recall)))

    auroc = stats.norm.cdf((inlier.mean() - outlier.mean()) / math.hypot(inlier.std(), outlier.std()))
    fpr95 = outlier.sf(inlier.isf(0.95))
    return {"auroc": auroc, "aupr": integrate.quad(precision, 0, 1)[0], "fpr95": fpr95}


def outside(law: Any, distance: float) -> float:
    return law.sf(distance) + law.cdf(-distance)


def assert_within_its_interval(numbers: dict[str, Any], key: str, expected: float) -> None:
    """Within four standard errors: the 95 % interval is 3.92 of them wide."""
    low, high = numbers[f"{key}/ci95"]
    assert 0 < high - low < 0.1 and abs(numbers[key] - expected) < high - low, (key, numbers[key], expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.0, 0.15), (-0.01, 0.08)])
def test_outliers_of_another_gaussian(mean: float, std: float, tmp_path: Path) -> None:
    """Against the training images, and against noise, whose 64 uniform pixels have a Gaussian sum, too."""
    ev = evaluation(tmp_path, Linear(), images(mean, std))
    ood(ev, sets=["noise"], scores=["typicality"])
    inlier = stats.norm(PIXELS * MEAN, SIZE * STD)
    others = {"train": stats.norm(PIXELS * mean, SIZE * std), "noise": stats.norm(0, SIZE / math.sqrt(3))}
    for name, outlier in others.items():
        for key, value in separations(inlier, outlier).items():
            assert_within_its_interval(ev.numbers, f"{key}/{name}", value)
        centred, centre = stats.norm(outlier.mean() - PIXELS * mean, outlier.std()), PIXELS * mean
        farther = integrate.quad(lambda s: inlier.pdf(s) * outside(centred, abs(s - centre)), -5, 8)[0]  # noqa: B023
        assert_within_its_interval(ev.numbers, f"auroc/{name}/typicality", farther)
    for name, law in others.items() | {"test": inlier}.items():
        error = law.std() / math.sqrt(2000)
        assert ev.numbers[f"score/{name}/mean"] == pytest.approx(law.mean(), abs=4 * error)
        assert ev.numbers[f"score/{name}/std"] == pytest.approx(law.std(), abs=4 * error)


def test_outliers_of_a_wider_gaussian(tmp_path: Path) -> None:
    """Squared distances from the mean are χ², their quotient is F: score and gradient norm tell the same."""
    ev = evaluation(tmp_path, Paraboloid(MEAN), images(MEAN, 1.1 * STD))
    ood(ev, sets=[], scores=["gradient_norm"])
    expected = stats.f.cdf(1.1**2, PIXELS, PIXELS)
    for key in ("auroc/train", "auroc/train/gradient_norm"):
        assert_within_its_interval(ev.numbers, key, expected)


class Half(nn.Module):
    """E(x) = −sum of the upper or of the lower half of x."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return -x[:, :, self.rows].flatten(1).sum(dim=1)


def test_an_ensemble_of_two_halves(tmp_path: Path) -> None:
    """Its mean is that of all pixels; its spread the size of a difference, whose mean is 0, narrow of test images and
    wide of noise."""
    ev = evaluation(tmp_path, Half(slice(4)), images())
    ev.energies.append(Half(slice(4, None)))
    ood(ev, sets=["noise"], scores=[])
    law, noise = stats.norm(PIXELS * MEAN, SIZE * STD), stats.norm(0, SIZE / math.sqrt(3))
    assert_within_its_interval(ev.numbers, "auroc/noise/ensemble_mean", separations(law, noise)["auroc"])
    spread = 2 / math.pi * math.atan(noise.std() / law.std())
    assert_within_its_interval(ev.numbers, "auroc/noise/ensemble_spread", spread)


def kernel_mean(a: float, s: float, b: float, t: float, dims: int) -> float:
    """E (x·y/D + 1)³ of independent x ~ N(a, s² I) and y ~ N(b, t² I) in D dimensions, by the moments of x·y."""
    dot, x, y, both = dims * a * b, dims * a**2, dims * b**2, dims * s**2 * t**2
    second = dot**2 + t**2 * x + s**2 * y + both
    third = dot**3 + 3 * dot * (s**2 * y + t**2 * x + both + 2 * s**2 * t**2)
    return 1 + 3 * dot / dims + 3 * second / dims**2 + third / dims**3


def test_samples_of_a_known_law(tmp_path: Path) -> None:
    """Chains under a paraboloid are an AR(1) process: after k steps they have a mean and a variance in closed form."""
    energy_mean, noise_std, a = 0.05, 0.08, 0.5
    sampler = SGLD(1, step_size=(1 - a) * STD**2, noise_std=noise_std, grad_clamp=None, bounds=None)
    ev = evaluation(tmp_path, Paraboloid(energy_mean, STD), images(), sampler)
    samples(ev, count=2000, steps=[2, 12], neighbours=5)
    for steps in (2, 12):
        mean = energy_mean * (1 - a**steps)
        variance = a ** (2 * steps) / 3 + (a * noise_std) ** 2 * (1 - a ** (2 * steps)) / (1 - a**2)
        shift, spread = 4 * (mean - MEAN) / STD, math.sqrt(variance) / STD  # of a feature; those of the test set: 0, 1
        expected = 4 * (shift**2 + (spread - 1) ** 2)
        assert found(ev, "frechet", f"{steps}") == pytest.approx(expected, rel=0.1)
        real = 4 * MEAN / STD
        terms = [(real, 1, real, 1), (real + shift, spread, real + shift, spread), (real, 1, real + shift, spread)]
        within, fake, across = (kernel_mean(*term, dims=4) for term in terms)
        assert found(ev, "kernel", f"{steps}") == pytest.approx(within + fake - 2 * across, rel=0.15)
        share = stats.norm.cdf((real + shift) / spread)
        entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
        assert found(ev, "class_entropy", f"{steps}") == pytest.approx(entropy, abs=0.03)
    # Images of the same law: no distance but that of so many draws, and Naeem et al. 2020, equation 6
    assert found(ev, "frechet", "real") < 0.02 and abs(found(ev, "kernel", "real")) < 0.1
    assert found(ev, "density", "real") == pytest.approx(1, abs=0.05)
    assert found(ev, "coverage", "real") == pytest.approx(1 - 0.5**5, abs=0.02)
    assert found(ev, "precision", "real") > 0.95 and found(ev, "recall", "real") > 0.95
    assert found(ev, "precision", "12") > 0.95 and found(ev, "recall", "12") < 0.5  # half as wide: all within


class Sided(nn.Module):
    """E(x, y) = ‖x − m_y‖²/2s², m₀ to the left and m₁ to the right; E(x) is flat."""

    classes, class_shares = 2, (0.75, 0.25)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return 0 * x.flatten(1).sum(dim=1)
        return (x.flatten(1) - (2 * labels - 1).unsqueeze(1)).square().sum(dim=1) / (2 * STD**2)


def test_samples_with_and_without_labels(tmp_path: Path) -> None:
    """With labels chains come in the classes' proportion; without they stay at noise."""
    sampler = SGLD(1, step_size=STD**2, noise_std=0.0, grad_clamp=None, bounds=None)  # a step leads to m_y
    for without_labels in (False, True):
        ev = evaluation(tmp_path, Sided(), images(), sampler)
        samples(ev, count=400, steps=[2], neighbours=5, without_labels=without_labels)
        assert ev.numbers["class_entropy/2"] == pytest.approx(stats.entropy([3, 1], base=2), abs=1e-6)
        assert ("class_entropy/2/any" in ev.numbers) is without_labels
    assert ev.numbers["class_entropy/2/any"] > 0.98
    assert found(ev, "frechet", "2/any") == pytest.approx(4 * ((0.8) ** 2 + (1 / math.sqrt(3) / STD - 1) ** 2), rel=0.2)
    assert "2 steps from noise, without labels" in [row[0] for row in ev.sections[0].rows]


def test_chains_that_do_not_move_are_what_they_were(tmp_path: Path) -> None:
    """The buffer's chains are training images and, three to one, of the first class; noise has no copy among them."""
    data = images(count=400)
    first = Judge()(data.train).argmax(dim=1) == 0
    chains = torch.cat([data.train[first][:90], data.train[~first][:30]])
    still = SGLD(1, step_size=1e-12, noise_std=0.0)
    ev = evaluation(tmp_path, Paraboloid(), data, still)
    samples(ev, count=120, steps=[1], neighbours=5, buffer={"chains": chains, "labels": torch.zeros(120)})
    assert ev.numbers["class_entropy/1/buffer"] == pytest.approx(stats.entropy([3, 1], base=2))
    assert ev.numbers["copies/1/buffer"] == 1 and ev.numbers["nearest/1/buffer"] == pytest.approx(0, abs=1e-5)
    p = torch.sigmoid(2 * Judge()(chains).abs()[:, 0]).mean()
    assert ev.numbers["confidence/1/buffer"] == pytest.approx(float(p), abs=1e-4)
    # Uniform noise: of a pixel's square, 1/3 and STD² + MEAN²; the nearest of 400 is a little nearer than the mean one
    apart = math.sqrt(PIXELS * (1 / 3 + STD**2 + MEAN**2))
    assert ev.numbers["copies/1"] == 0 and 0.9 * apart < ev.numbers["nearest/1"] < apart
    # Noise's features: mean 0, standard deviation 1/√3 over that of the pixels
    assert found(ev, "frechet", "1") == pytest.approx(4 * ((0.8) ** 2 + (1 / math.sqrt(3) / STD - 1) ** 2), rel=0.2)
    assert found(ev, "precision", "1") < 0.5 and found(ev, "precision", "1/buffer") > 0.8


def test_the_script_says_the_same(tmp_path: Path) -> None:
    """evaluate.py, from a checkpoint and a configuration to metrics.json."""
    kind = {"_target_": f"{__name__}.Linear", "shape": list(SHAPE)}
    state = {"energy": Linear().state_dict(), "energy_config": kind, "config": {}, "step": 0, "epoch": 0}
    checkpoint.save(tmp_path / "linear.pt", state)
    data = [f"data._target_={__name__}.images", f"modules=[{__name__}]", "wandb.mode=disabled", "bootstrap=60"]
    sets = ["+data.mean=0", "evaluation.parts=[ood]", "ood.sets=[]", "ood.scores=[]"]
    done = run("evaluate.py", f"checkpoint={tmp_path / 'linear.pt'}", *data, *sets, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    for key, value in separations(stats.norm(PIXELS * MEAN, SIZE * STD), stats.norm(0, SIZE * STD)).items():
        assert_within_its_interval(numbers, f"{key}/train", value)
    assert numbers["score/test/mean"] == pytest.approx(float(images().test.flatten(1).sum(dim=1).mean()))
