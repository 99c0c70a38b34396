"""Statistics of chains: against closed forms and arviz."""

import importlib.util

import numpy as np
import pytest
import torch

from ebm import figures
from ebm.buffer import ReplayBuffer
from ebm.energies import ConvEnergy
from ebm.sampler import SGLD
from ebm.telemetry import chain_statistics, effective_sample_size, fresh_scores, split_rhat


def ar1(steps: int, chains: int, a: float, seed: int = 0) -> torch.Tensor:
    """Stationary chains x ← a·x + √(1−a²)·ε (steps, chains) in float64."""
    noise = torch.randn(steps, chains, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = [noise[0]]
    for e in noise[1:]:
        x.append(a * x[-1] + (1 - a * a) ** 0.5 * e)
    return torch.stack(x)


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, -0.3])
def test_effective_sample_size_of_an_autoregression(a):
    """For AR(1) it is N (1 − a)/(1 + a)."""
    x = ar1(4000, 16, a)
    assert effective_sample_size(x) == pytest.approx(x.numel() * (1 - a) / (1 + a), rel=0.12)


def test_split_rhat_tells_chains_of_one_law_from_others():
    x = ar1(1000, 8, 0.5)
    assert split_rhat(x) == pytest.approx(1, abs=0.01)
    shifted = x + torch.tensor([0.0, 3.0] * 4)
    within, between = x.var(), (shifted.mean(dim=0)).repeat(2).var()
    assert split_rhat(shifted) == pytest.approx(float((1 + between / within).sqrt()), rel=0.02)
    trend = x + torch.linspace(0, 6, 1000).unsqueeze(1)
    assert split_rhat(trend) > 1.5  # whole chains agree, their halves do not


@pytest.mark.skipif(importlib.util.find_spec("arviz") is None, reason="arviz is not installed")
@pytest.mark.parametrize("a", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("steps", [101, 128, 1000])
def test_against_arviz(a, steps):
    import arviz

    x = ar1(steps, 8, a, seed=steps)
    assert split_rhat(x) == pytest.approx(float(arviz.rhat(x.T.numpy(), method="split")), rel=1e-6)
    assert effective_sample_size(x) == pytest.approx(float(arviz.ess(x.T.numpy(), method="mean")), rel=1e-6)


def test_chain_statistics_of_a_linear_energy():
    """E = Σ w·x has the gradient w everywhere: every number is known."""
    w = torch.tensor([0.01, 0.05, -0.5, 0.0]).view(1, 2, 2)

    class Linear(torch.nn.Module):
        def forward(self, x):
            return (x * w).flatten(1).sum(dim=1)

    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer((1, 2, 2), generator, capacity=40, policy="in_place")
    buffer.ages[:] = torch.arange(40)
    x_model = torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 1, 2, 2).repeat(40, 1, 1, 1)
    sampler = SGLD(step_size=10.0, noise_std=0.005, grad_clamp=0.03, bounds=(-1, 1))
    got = chain_statistics(sampler, Linear(), buffer, torch.zeros(40, 1, 2, 2), x_model)
    step = 10 * np.sqrt(0.01**2 + 2 * 0.03**2)
    want = {"age_mean": 19.5, "age_median": 19.0, "saturation": 0.5, "saturation_real": 0.0, "clamp_share": 0.5}
    want |= {"step_length": step, "noise_length": 0.01}
    assert {name: float(value) for name, value in got.items()} == pytest.approx(want)


def test_chain_statistics_leave_the_energy_alone():
    energy = ConvEnergy((1, 8, 8), 4).train()
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer((1, 8, 8), generator, capacity=8, policy="in_place")
    x = buffer.chains.clone()
    state = generator.get_state()
    for sampler in (SGLD(), SGLD(bounds=None, grad_clamp=None, noise_std="langevin", steps=0)):
        got = chain_statistics(sampler, energy, buffer, x, x)
        assert all(bool(torch.isfinite(value)) for value in got.values())
    assert energy.training and all(p.requires_grad and p.grad is None for p in energy.parameters())
    assert torch.equal(generator.get_state(), state) and torch.equal(buffer.chains, x) and not x.requires_grad


def test_fresh_scores():
    scores, ages = torch.tensor([1.0, 2.0, 3.0, 0.0, -9.0, 9.0]), torch.tensor([30, 60, 90, 0, 0, 0])
    got = fresh_scores(scores, ages)  # the old: 2 ± 0.82
    assert {name: float(value) for name, value in got.items()} == {"fresh": 3, "fresh_score": 0, "fresh_reached": 2}
    nothing_old = fresh_scores(scores, torch.zeros(6, dtype=torch.int64))
    assert nothing_old["fresh"] == 6 and nothing_old["fresh_reached"] == 0


def test_picture_of_scores_and_ages(tmp_path):
    rng = np.random.default_rng(0)
    figures.chains(tmp_path / "a.png", {"buffer": rng.normal(size=50), "real": rng.normal(size=9)}, np.arange(40))
    assert (tmp_path / "a.png").stat().st_size > 5000
