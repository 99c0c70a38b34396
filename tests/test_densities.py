import math

import numpy as np
import pytest
import torch
from scipy import stats

from ebm import densities
from ebm.energies import MLPEnergy
from ebm.losses import ContrastiveDivergence
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD

NAMES = ("eight_gaussians", "two_moons", "rings", "checkerboard", "pinwheel")


def test_mixture_against_scipy() -> None:
    means, stds = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([0.5, 2.0])
    p = densities.GaussianMixture(means, stds, torch.tensor([3.0, 1.0]), log_z=1.5)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    parts = [
        w * stats.multivariate_normal(m.numpy(), float(s) ** 2).pdf(x.numpy())
        for w, m, s in zip((0.75, 0.25), means, stds, strict=True)
    ]
    assert p.log_prob(x).numpy() == pytest.approx(np.log(sum(parts)), rel=1e-4)
    assert torch.allclose(p(x), -p.log_prob(x) - 1.5)
    with pytest.raises(ValueError, match="positive"):
        densities.GaussianMixture(means, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_density_is_one_in_all_and_its_samples_follow_it(name: str) -> None:
    truth = densities.density(name)
    cells = 300
    log_p = truth.log_prob(densities.midpoints(cells))
    assert densities.log_integral(log_p) == pytest.approx(0, abs=2e-3)
    x = truth.sample(20_000, torch.Generator().manual_seed(0))
    expected = log_p.exp().view(10, 30, 10, 30).sum(dim=(1, 3)).double() * 4 / cells**2
    cell = ((x + 1) * 5).long().clamp(0, 9)
    seen = torch.bincount(cell[:, 1] * 10 + cell[:, 0], minlength=100).view(10, 10)
    kept = expected * len(x) > 20
    chi2 = float(((seen - expected * len(x))[kept] ** 2 / (expected * len(x))[kept]).sum())
    assert chi2 < stats.chi2.ppf(1 - 1e-6, int(kept.sum()))
    assert float(expected[~kept].sum()) < 0.02


def test_quadrature_and_kl_in_closed_form() -> None:
    p, q = (densities.GaussianMixture(torch.tensor([[m, 0.0]]), 0.15, log_z=2.0) for m in (0.1, -0.1))
    grid = densities.midpoints(400)
    assert densities.log_integral(-p(grid)) == pytest.approx(2.0, abs=1e-4)
    assert densities.kl_on_grid(p.log_prob(grid), q.log_prob(grid)) == pytest.approx(0.2**2 / (2 * 0.15**2), rel=1e-3)
    assert densities.kl_on_grid(p.log_prob(grid), p.log_prob(grid)) == pytest.approx(0, abs=1e-6)


def test_uniform_law() -> None:
    p = densities.Uniform((1, 3, 3))
    assert p.log_z == pytest.approx(9 * math.log(2))
    x = p.sample(10, torch.Generator().manual_seed(0))
    assert x.shape == (10, 1, 3, 3) and bool((p(x) == 0).all())
    assert p.log_prob(x).tolist() == pytest.approx([-p.log_z] * 10)


def test_data_set_is_in_the_box_and_knows_its_law() -> None:
    data = densities.dataset("rings", train_size=100, test_size=50, seed=3)
    assert [x.shape for x in (data.train, data.validation, data.test)] == [(90, 2), (10, 2), (50, 2)]
    assert data.log_prob is not None
    assert torch.equal(data.train, densities.dataset("rings", 100, 50, 3).train)
    with pytest.raises(ValueError, match=r"data.name must be one of .*spirals"):
        densities.dataset("spirals")


@pytest.mark.slow
def test_contrastive_divergence_learns_a_mixture_of_gaussians() -> None:
    means = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.4, -0.3]])
    truth = densities.GaussianMixture(means, torch.tensor([0.15, 0.12, 0.1, 0.2]), torch.tensor([4.0, 3.0, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        energy = MLPEnergy((2,), hidden=64, depth=3)
    sampler = SGLD(steps=20, step_size=0.002, noise_std="langevin", grad_clamp=None)
    loss_function = ContrastiveDivergence(alpha=0.0)
    optimizer = torch.optim.Adam(energy.parameters(), lr=2e-3, betas=(0.0, 0.99))
    chains = uniform_noise((256, 2), generator)
    grid = densities.midpoints(100)
    log_p = truth.log_prob(grid)

    def kl() -> float:
        with torch.no_grad():
            log_q = -energy(grid)
        return densities.kl_on_grid(log_p, log_q - densities.log_integral(log_q))

    before = kl()
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 800)
        chains = sampler(energy, chains, generator)
        loss, _ = loss_function(energy, truth.sample(256, generator), chains, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 1
    assert kl() < 0.15
