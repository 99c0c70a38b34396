"""The part `chains`, through the part itself: samplers with a steady state of known law, and three that have none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebm.data import Dataset
from ebm.evaluation.chains import chains
from ebm.evaluation.evaluation import Evaluation
from ebm.sampling.sgld import SGLD

STD = 0.15


class Gaussians(nn.Module):
    """−log of an equal mixture of Gaussians of standard deviation STD at the `means` (K, *shape)."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means = nn.Buffer(means)

    def forward(self, x: Tensor) -> Tensor:
        squares = (x.unsqueeze(1) - self.means).square().flatten(2).sum(dim=2)
        return -torch.logsumexp(-squares / (2 * STD**2), dim=1)

    def data(self, count: int = 400) -> Dataset:
        """Draws, labelled with the component they are of."""
        generator = torch.Generator().manual_seed(3)
        labels = torch.arange(count) % len(self.means)
        noise = STD * torch.randn(count, *self.means.shape[1:], generator=generator)
        x = (self.means[labels] + noise).clamp(-1, 1)
        half = count // 2
        return Dataset("gaussians", x[:half], x[half:], labels[:half], labels[half:], hold_out=20)


class Nearest(nn.Module):
    """A classifier: logits (B, K + 1) of the mixture's components, and of a class that nothing is ever in."""

    def __init__(self, energy: Gaussians) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        squares = (x.unsqueeze(1) - self.energy.means).square().flatten(2).sum(dim=2)
        return nn.functional.pad(-squares, (0, 1), value=-50.0)


def langevin(step_size: float = 0.2 * STD**2, **settings: object) -> SGLD:
    arguments = {"noise_std": "langevin", "grad_clamp": None, "bounds": None} | settings
    return SGLD(step_size=step_size, **arguments)


def judged(energy: Gaussians, sampler: SGLD, folder: Path, steps: int = 1600) -> Evaluation:
    ev = Evaluation([energy], energy.data(), sampler, folder, torch.device("cpu"))
    vars(ev)["classifier"] = (Nearest(energy), {})  # the judge, whose answers are known
    chains(ev, count=8, steps=steps, rhat=1.05)
    return ev


def two_modes(distance: float) -> Gaussians:
    """Images bright on the left and on the right, of equal energy; `distance` in standard deviations."""
    side = torch.ones(1, 1, 6, 6)
    side[..., 3:] = -1
    return Gaussians(torch.cat([side, -side]) * distance * STD / 2 / side.norm())


@pytest.mark.parametrize("means", [torch.zeros(1, 2), torch.zeros(1, 1, 8, 8), two_modes(2.0).means])
def test_langevin_chains_of_known_law_have_a_steady_state(means: Tensor, tmp_path: Path) -> None:
    ev = judged(Gaussians(means), langevin(), tmp_path)
    statistics = ["energy", "pixels"] + ["classes"] * (len(means) > 1)
    worst = max(ev.numbers[f"chains/rhat/{statistic}/all"] for statistic in statistics)
    assert ev.numbers["chains/steady_state"] == 1
    assert ev.numbers["chains/rhat/all"] == worst < 1.05
    assert ev.numbers["chains/ess/all"] == min(ev.numbers[f"chains/ess/{statistic}/all"] for statistic in statistics)
    if len(means) == 1:  # E = ‖x‖²/2σ²; the chain x ← 0.8·(x + ε) with ε of variance 0.4 σ² has the variance v
        v = 0.64 * 0.4 / (1 - 0.64)
        assert ev.numbers["chains/energy/noise"] == pytest.approx(means[0].numel() / 2 * v, rel=0.1)
    assert not ev.skipped


def test_modes_of_equal_energy_with_a_wall_between_are_no_steady_state(tmp_path: Path) -> None:
    """By the energy alone the chains tell of one law; the classes and the pixels see that none crosses."""
    ev = judged(two_modes(20.0), langevin(), tmp_path)
    assert ev.numbers["chains/rhat/energy/all"] < 1.05
    assert ev.numbers["chains/rhat/pixels/all"] > 2
    assert ev.numbers["chains/steady_state"] == 0
    assert "chains/rhat/classes/all" in ev.skipped or ev.numbers["chains/rhat/classes/all"] > 2
    assert ev.numbers["chains/same_class"] == 1


def test_a_judge_that_knows_no_classes_sees_the_wall_by_the_pixels(tmp_path: Path) -> None:
    energy = two_modes(20.0)
    ev = Evaluation([energy], energy.data(), langevin(), tmp_path, torch.device("cpu"))
    ev.dataset.train_labels = None
    chains(ev, count=8, steps=1600, rhat=1.05)
    assert ev.numbers["chains/steady_state"] == 0 and "chains/rhat/classes/all" not in ev.numbers


class Labelled(Gaussians):
    """E(x, y) = ‖x − mean_y‖²/2σ²: a class a component. E(x) is that of the mixture."""

    @property
    def classes(self) -> int:
        return len(self.means)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)
        return (x - self.means[labels]).square().flatten(1).sum(dim=1) / (2 * STD**2)


def test_chains_with_labels_keep_their_class_where_others_cross(tmp_path: Path) -> None:
    """Modes two and a half standard deviations from the wall between them: along E(x) half of the chains end in the
    other; along E(x, y) an image is beyond the wall once in a hundred times."""
    energy = Labelled(two_modes(5.0).means)
    ev = Evaluation([energy], energy.data(), langevin(), tmp_path, torch.device("cpu"))
    vars(ev)["classifier"] = (Nearest(energy), {})
    chains(ev, count=100, steps=4000, rhat=1.05)
    assert 0.3 < ev.numbers["chains/same_class"] < 0.75
    assert ev.numbers["chains/same_class/labelled"] > 0.94
    low, high = ev.numbers["chains/same_class/labelled/ci95"]
    assert low <= ev.numbers["chains/same_class/labelled"] <= high
    assert "of those that keep the image's label" in ev.sections[0].notes[-1]


def flat(energy: Gaussians) -> Callable[[Tensor], Tensor]:
    return lambda x: energy(x) * 0


@pytest.mark.parametrize("same_energy", [False, True])
def test_chains_that_do_not_move_are_no_steady_state(same_energy: bool, tmp_path: Path) -> None:
    energy = two_modes(2.0)
    if same_energy:
        energy.forward = flat(Gaussians(energy.means))
    still = langevin(noise_std=0.0, grad_clamp=1e-30)
    ev = judged(energy, still, tmp_path, steps=64)
    assert ev.numbers["chains/steady_state"] == 0
    assert "infinite" in ev.skipped["chains/rhat/pixels/all"] and "chains/rhat/pixels/all" not in ev.numbers
    assert "16 chains do not move" in ev.sections[0].notes


def test_chains_that_all_end_in_one_point_do_not_move_either(tmp_path: Path) -> None:
    """All alike and still: there is nothing to tell them apart by, and no law."""
    ev = judged(Gaussians(torch.zeros(1, 1, 4, 4)), langevin(step_size=STD**2, noise_std=0.0), tmp_path, steps=64)
    assert ev.numbers["chains/steady_state"] == 0


def test_one_chain_that_does_not_move_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the others are of one law already, and it stands in their middle: no R̂ sees it."""
    rng = np.random.default_rng(0)
    statistics = {name: rng.normal(size=(16, 1000, size)) for name, size in (("energy", 1), ("pixels", 8))}
    for values in statistics.values():
        values[0] = 0
    snapshots = {step: torch.zeros(16, 2) for step in (0, 999)}
    found = (list(range(1000)), statistics, np.zeros((16, 1000)), snapshots)
    monkeypatch.setattr("ebm.evaluation.chains.run", lambda *_: found)
    ev = judged(Gaussians(torch.zeros(1, 2)), langevin(), tmp_path)
    assert ev.numbers["chains/rhat/all"] < 1.05
    assert ev.numbers["chains/steady_state"] == 0 and "1 chains do not move" in ev.sections[0].notes
