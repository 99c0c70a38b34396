import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from ebm.energies import ConvEnergy, MLPEnergy, ResNetEnergy
from ebm.running.checkpoint import load_energy
from ebm.sampling.chains import chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return uniform_noise((count, 1, 28, 28), generator(seed))


def naive(energy, x, noises, step_size=10.0, clamp=0.03):
    """The tutorial's loop, written down from its description."""
    for noise in noises:
        x = (x + noise).clamp(-1, 1).detach().requires_grad_(True)
        energy(x).sum().backward()
        x = (x - step_size * x.grad.clamp(-clamp, clamp)).clamp(-1, 1)
    return x.detach()


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_follows_the_naive_loop_in_float64(threads, backend):
    energy = ConvEnergy(hidden=8).double()
    x, g = images(40).double(), generator(1)
    noises = [0.005 * torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(19)]
    ours = SGLD(steps=19, threads=threads, backend=backend)(energy, x, generator=generator(1))
    torch.testing.assert_close(ours, naive(energy, x, noises), rtol=0, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
def test_ar1_law(threads):
    """E = (x − μ)²/2σ² without clamps: x' = μ + a(x + noise − μ), a = 1 − step/σ²; the gradient sees the noise, so
    after k steps the mean is μ + aᵏ(x₀ − μ) and the variance a²·noise²·(1 − a²ᵏ)/(1 − a²)."""
    mu, sigma, step, noise, k, start, n = 0.7, 1.3, 0.2, 0.4, 12, -1.0, 200_000
    chains = torch.full((n, 1), start, dtype=torch.float64)
    sampler = SGLD(k, step, noise, grad_clamp=None, bounds=None, threads=threads)
    x = sampler(lambda x: ((x - mu) ** 2 / (2 * sigma**2)).sum(dim=1), chains, generator=generator())
    a = 1 - step / sigma**2
    mean, variance = mu + a**k * (start - mu), a**2 * noise**2 * (1 - a ** (2 * k)) / (1 - a**2)
    assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


def parabola(temperature):
    """E(x) = x²/2 as layers, for every backend: SiLU(z) + SiLU(−z) = z²/2 − z⁴/24 + …, here with z = x/1000."""
    energy = MLPEnergy((1,), hidden=2, depth=1, temperature=temperature).double()
    weights = ([[1e-3], [-1e-3]], [0.0, 0.0], [[1e6, 1e6]], [0.0])
    for parameter, values in zip(energy.parameters(), weights, strict=True):
        parameter.data = torch.tensor(values, dtype=torch.float64)
    return energy


@pytest.mark.parametrize("temperature", [1.0, 0.1, 4.0])
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_langevin_noise_reaches_the_boltzmann_law(backend, temperature):
    """noise_std=langevin: the stationary variance of the discrete chain is a²·2·step·T/(1 − a²), near T."""
    n, step = 50_000, 0.1
    sampler = SGLD(100, step, "langevin", grad_clamp=None, bounds=None, backend=backend)
    energy = parabola(temperature)
    x = sampler(energy, torch.zeros(n, 1, dtype=torch.float64), generator())
    assert sampler.run_as(energy, x)[0] == backend
    a = 1 - step
    variance = a**2 * 2 * step * temperature / (1 - a**2)
    assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    energy = parabola(1.0)
    energy.temperature = temperature
    with pytest.raises(ValueError, match=r"energy\.temperature must be a number > 0"):
        SGLD(1)(energy, torch.zeros(1, 1, dtype=torch.float64), generator())


def test_gradient_clamp_and_box():
    steep = lambda x: 1e6 * x.sum(dim=(1, 2, 3))  # noqa: E731
    x = torch.zeros(2, 1, 4, 4)
    assert torch.allclose(SGLD(1, 10.0, 0.0)(steep, x, generator()), torch.full_like(x, -0.3))
    assert torch.equal(SGLD(9, 10.0, 0.0)(steep, x, generator()), torch.full_like(x, -1))
    free = SGLD(1, 10.0, 0.0, grad_clamp=None, bounds=None)(steep, x, generator())
    assert torch.equal(free, torch.full_like(x, -1e7))


def test_annealing_is_linear_from_first_to_last_step():
    sampler = SGLD(5, step_size=10, noise_std=0.4, final_step_size=2, final_noise_std=0.0)
    got = [sampler.settings(step, 5) for step in range(5)]
    assert got == [pytest.approx(want) for want in [(10, 0.4), (8, 0.3), (6, 0.2), (4, 0.1), (2, 0.0)]]
    assert SGLD(5, step_size=8, noise_std="langevin").settings(3, 5) == (8, 4)
    assert SGLD(5, step_size=8, noise_std="langevin").settings(3, 5, temperature=0.25) == (8, 2)


def test_the_first_steps_can_be_without_noise():
    sampler = SGLD(4, step_size=8, noise_std="langevin", quiet=0.5)
    assert [sampler.settings(step, 4)[1] for step in range(4)] == [0, 0, 4, 4]
    assert [SGLD(quiet=1.0).settings(step, 3)[1] for step in range(3)] == [0, 0, 0]
    x = torch.zeros(4, 1, 4, 4)
    flat = lambda x: 0 * x.sum(dim=(1, 2, 3))  # noqa: E731
    trace = SGLD(6, quiet=0.5).trace(flat, x, generator())
    assert not trace[:4].any() and bool((trace[4] != 0).all())


def test_chains_from_noise_start_by_the_samplers_law():
    for start, law in (("uniform", ("uniform", (-1, 2))), ("normal", ("norm", ()))):
        x = SGLD(start=start).initial((500, 1, 4, 4), generator())
        assert kstest(x.flatten().numpy(), *law).pvalue > 0.01
        own = SGLD(start=start).initial((3, 2), [generator(seed) for seed in (5, 6, 7)])
        assert torch.equal(own[1:2], SGLD(start=start).initial((1, 2), generator(6)))


class Watched(nn.Module):
    """Refuses to run other than frozen; fails at the `fail_at`-th call."""

    def __init__(self, fail_at: int = 10**9) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
        self.a.weight.requires_grad_(False)
        self.b.eval()  # a mixed state, to be found again
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x):
        assert not any(module.training for module in self.modules())
        assert not any(parameter.requires_grad for parameter in self.parameters())
        self.calls += 1
        if self.calls >= self.fail_at:
            raise KeyboardInterrupt
        return self.b(self.a(x)).squeeze(-1)


@pytest.mark.parametrize("fail_at", [10**9, 1, 3])
@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_leaves_the_network_as_found(fail_at, grad_enabled, threads):
    energy = Watched(fail_at)
    for parameter in energy.parameters():
        parameter.grad = torch.ones_like(parameter)
    x, g = torch.zeros(32, 4), generator()
    before = [m.training for m in energy.modules()], [p.requires_grad for p in energy.parameters()]
    with torch.set_grad_enabled(grad_enabled):
        if fail_at < 100:
            with pytest.raises(KeyboardInterrupt):
                SGLD(5, threads=threads)(energy, x, g)
        else:
            SGLD(5, threads=threads)(energy, x, g)
        assert torch.is_grad_enabled() == grad_enabled
    assert before == ([m.training for m in energy.modules()], [p.requires_grad for p in energy.parameters()])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in energy.parameters())
    assert torch.equal(x, torch.zeros(32, 4)) and not x.requires_grad


def test_runs_in_inference_mode():
    energy = MLPEnergy((2,), hidden=4)
    with torch.inference_mode():
        x = SGLD(2)(energy, torch.zeros(3, 2), generator())
    assert x.shape == (3, 2)


@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 6, 5), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_and_dtype(shape, dtype):
    x = SGLD(3)(lambda x: x.flatten(1).square().sum(dim=1), torch.zeros(4, *shape, dtype=dtype), generator())
    assert x.shape == (4, *shape) and x.dtype == dtype


@pytest.mark.parametrize("every, times", [(1, range(11)), (4, [0, 4, 8, 10]), (100, [0, 10])])
def test_trace_is_the_chain(every, times):
    energy, x = MLPEnergy((3,), hidden=8), torch.zeros(20, 3)
    trace = SGLD(10)(energy, x, generator()), SGLD(10).trace(energy, x, generator(), every=every)
    assert torch.equal(trace[1][-1], trace[0])
    whole = SGLD(10).trace(energy, x, generator())
    assert torch.equal(trace[1], whole[list(times)])


@pytest.mark.parametrize(
    "energy, backend",
    [(ConvEnergy(hidden=16), "eager"), (ConvEnergy(hidden=16), "auto"), (ResNetEnergy(width=8), "auto")],
)
def test_batch_size_and_threads_change_no_bit(energy, backend):
    x = images(44)

    def chains(batch_size: int, threads: int) -> torch.Tensor:
        sampler = SGLD(12, threads=threads, backend=backend)
        return trace_in_batches(sampler.trace, energy, x, chain_generators(3, 44), batch_size, every=12)

    reference = chains(44, 2)
    for batch_size, threads in [(1, 2), (8, 2), (20, 2), (44, 3), (1000, 2)]:
        assert torch.equal(chains(batch_size, threads), reference), (batch_size, threads)
    assert torch.equal(chain_generators(3, 2)[1].get_state(), chain_generators(3, 9)[1].get_state())


def test_published_weights_bring_noise_near_the_digits(published):
    """Chains from noise (score −17.9) reach the digits' range (−0.3 … 0.15) within the training's 60 steps."""
    energy = load_energy(published)
    x = SGLD()(energy, images(64), generator())
    assert (-energy(x)).mean().item() > -0.3


@settings(deadline=None, max_examples=30)
@given(
    setting=st.sampled_from(["steps", "step_size", "noise_std", "grad_clamp", "threads", "final_step_size"]),
    value=st.one_of(st.floats(max_value=-1e-6), st.just(math.nan), st.just(math.inf), st.text(), st.booleans()),
)
def test_bad_settings_name_their_key(setting, value):
    if setting == "noise_std" and value == "langevin":
        return
    with pytest.raises(ValueError, match=rf"sampler\.{setting} must be"):
        SGLD(**{setting: value})


def test_backends_are_named():
    with pytest.raises(ValueError, match=r"sampler\.backend must be"):
        SGLD(backend="fast")


@pytest.mark.parametrize("bounds", [[1, -1], [0], "ab", [0, math.nan], 3])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match=r"sampler\.bounds must"):
        SGLD(bounds=bounds)
