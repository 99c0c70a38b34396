"""The compiled steps against the plain loop, exact laws, and what falls back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest
from test_sampler import generator, images, naive
from torch import nn

from ebm import sampler as sampler_module
from ebm.checkpoint import load_energy
from ebm.compiled import NotCompilable, compiled_steps, library, parts_of
from ebm.energies import ConvEnergy, MLPEnergy, Residual, ResNetEnergy
from ebm.sampler import SGLD

try:
    library()
except NotCompilable as reason:
    pytest.skip(f"nothing can be compiled here: {reason}", allow_module_level=True)


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def chain(self) -> nn.Sequential:
        return self.layers

    def forward(self, x):
        return self.layers(x).squeeze(-1)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_chain_of_layers_follows_the_naive_loop_in_float64(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    channels, height, width = before = (number(1, 3), number(4, 9), number(4, 9))
    layers: list[nn.Module] = []
    torch.manual_seed(number(0, 99))
    for _ in range(number(0, 3)):
        kernel, stride, padding, dilation = (number(1, 3), number(1, 3)), number(1, 2), number(0, 2), number(1, 2)
        after = number(1, 20)
        layer = nn.Conv2d(channels, after, kernel, stride, padding, dilation, bias=data.draw(st.booleans()))
        sizes = (
            (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for size, k in zip((height, width), kernel, strict=True)
        )
        if min(both := tuple(sizes)) < 1:
            break
        layers.append(layer)
        if stride == dilation == 1 and min(both) > 1 and data.draw(st.booleans()):
            layers.append(nn.AvgPool2d(2))
            both = (both[0] // 2, both[1] // 2)
        if data.draw(st.booleans()):
            layers.append(nn.SiLU())
        if data.draw(st.booleans()):
            layers.append(
                Residual(nn.Conv2d(after, 7, 3, padding=1), nn.SiLU(), nn.Conv2d(7, after, 1), nn.Dropout(0.5))
            )
            if data.draw(st.booleans()):
                layers.append(nn.SiLU())
        channels, (height, width) = after, both
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 5), nn.SiLU(), nn.Dropout(0.5), nn.Linear(5, 1)]
    energy = Chain(*layers).double()
    x, g = torch.empty(number(1, 19), *before, dtype=torch.float64).uniform_(-1, 1, generator=generator()), generator(1)
    noises = [0.005 * torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(9)]
    ours = SGLD(9, backend="compile", threads=number(1, 2))(energy, x, generator(1))
    torch.testing.assert_close(ours, naive(energy.eval(), x, noises), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_is_the_eager_chain_but_for_rounding(dtype, atol):
    for energy, shape in (
        (ConvEnergy((3, 12, 10), hidden=6), (3, 12, 10)),
        (MLPEnergy((2,), hidden=20), (2,)),
        (ResNetEnergy((3, 12, 10), width=4, blocks=2, spectral_norm=True), (3, 12, 10)),
        (ResNetEnergy((3, 12, 10), width=4, stem=3), (3, 12, 10)),
    ):
        x = torch.rand(21, *shape, dtype=dtype, generator=generator())
        for extra in ({}, {"grad_clamp": None, "bounds": None}, {"final_step_size": 1.0, "noise_std": "langevin"}):
            chains = [SGLD(10, backend=b, **extra)(energy.to(dtype), x, generator()) for b in ("compile", "eager")]
            torch.testing.assert_close(*chains, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ar1_law(dtype):
    """E = (silu(εx) + silu(−εx)) / ε² = x²/2 + O(ε²x⁴): after k steps the chain's law is normal, with mean aᵏx₀ and
    variance a²·noise²·(1 − a²ᵏ)/(1 − a²), a = 1 − step."""
    epsilon, step, noise, k, start, n = 0.01, 0.2, 0.4, 12, -1.0, 200_000
    first, last = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    first.weight.data = torch.tensor([[epsilon], [-epsilon]])
    last.weight.data = torch.full((1, 2), epsilon**-2)
    energy = Chain(nn.Flatten(), first, nn.SiLU(), last).to(dtype)
    sampler = SGLD(k, step, noise, grad_clamp=None, bounds=None, backend="compile")
    x = sampler(energy, torch.full((n, 1), start, dtype=dtype), generator())
    a = 1 - step
    law = (a**k * start, math.sqrt(a**2 * noise**2 * (1 - a ** (2 * k)) / (1 - a**2)))
    assert kstest(x.flatten().double().numpy(), "norm", law).pvalue > 1e-4


def test_same_distribution_as_eager_on_the_published_weights(published):
    energy = load_energy(published)
    drawn = {}
    for backend, seed in (("compile", 1), ("eager", 2)):
        x = SGLD(60, backend=backend)(energy, images(256, seed), generator(seed + 10))
        drawn[backend] = {"energy": energy(x), "ink": x.mean(dim=(1, 2, 3)), "middle": x[:, 0, 14, 14]}
    for name, values in drawn["compile"].items():
        assert ks_2samp(values.detach(), drawn["eager"][name].detach()).pvalue > 1e-3, name


def test_spectral_norm_and_dropout_are_compiled():
    torch.manual_seed(0)
    convolution = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 8, 3))
    energy = Chain(convolution, nn.SiLU(), nn.Flatten(), nn.Dropout(), nn.Linear(8 * 26 * 26, 1))
    x = images(20)
    chains = [SGLD(5, backend=backend)(energy, x, generator()) for backend in ("compile", "eager")]
    torch.testing.assert_close(*chains, rtol=0, atol=1e-4)
    parts_of(energy)


def test_nan_stays_nan():
    energy = ConvEnergy(hidden=4)
    with torch.no_grad():
        energy.layers[2].weight[0, 0, 0, 0] = math.nan
    assert SGLD(2, backend="compile")(energy, images(3), generator()).isnan().all()


end = (nn.Flatten(), nn.Linear(2 * 26 * 26, 1))


def hooked() -> nn.Module:
    energy = ConvEnergy(hidden=4)
    energy.layers[0].register_forward_hook(lambda *_: None)
    return energy


@pytest.mark.parametrize(
    "energy, reason",
    [
        (hooked(), "its Conv2d has hooks"),
        (ResNetEnergy(width=2, scales=2), "ResNetEnergy has no chain"),
        (Chain(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 1)), "it has a ReLU"),
        (Chain(nn.Conv2d(1, 2, 3), Residual(nn.SiLU(), nn.Conv2d(2, 2, 1)), *end), "a short cut does not start"),
        (Chain(nn.Conv2d(1, 2, 3), Residual(nn.Conv2d(2, 2, 1), nn.SiLU()), *end), "a short cut does not start"),
        (Chain(nn.Conv2d(1, 2, 3, stride=2), nn.AvgPool2d(2), nn.Flatten()), "it pools otherwise"),
        (Chain(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(2 * 28 * 28, 1)), "padding='same'"),
        (Chain(nn.Flatten(), nn.Linear(28 * 28, 1), nn.SiLU()), "last layer"),
    ],
)
def test_what_cannot_be_compiled_falls_back_and_says_why(energy, reason, capsys):
    sampler_module.say_once.cache_clear()
    x = SGLD(2, backend="compile")(energy, images(3), generator())
    SGLD(2, backend="compile")(energy, images(3), generator())
    assert torch.equal(x, SGLD(2, backend="eager")(energy, images(3), generator()))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "backend=compile" in line]
    assert line.startswith("sampler.backend=compile: eager, because") and reason in line


def test_other_sizes_and_types_are_refused():
    with pytest.raises(NotCompilable, match="does not take images"):
        compiled_steps(ConvEnergy(hidden=4), torch.zeros(2, 2, 28, 28), None, None)
    with pytest.raises(NotCompilable, match=r"chains are torch\.float64"):
        compiled_steps(ConvEnergy(hidden=4), torch.zeros(2, 1, 28, 28, dtype=torch.float64), None, None)


@pytest.mark.parametrize("compiler, reason", [("no-such-compiler", "no C\\+\\+ compiler"), ("false", "failed")])
def test_without_a_compiler(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    with pytest.raises(NotCompilable, match=reason):
        library()
    library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cuda_graph_needs_cuda(capsys):
    sampler_module.say_once.cache_clear()
    SGLD(2, backend="cuda_graph")(ConvEnergy(hidden=4), images(3), generator())
    assert "cuda_graph: eager, because a CUDA graph takes an nn.Module on CUDA" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("energy", [ConvEnergy(classes=10), ResNetEnergy(width=16, stem=8)])
def test_a_cuda_graph_has_the_bits_of_autograd(energy, monkeypatch):
    """Also after the weights have moved in place; and without TF32 what the CPU has, to rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, labels = images(32), torch.arange(32) % 10 if energy.classes else None
    on_cpu = SGLD(20, noise_std=0, backend="eager")(energy, x, generator(), labels=labels)
    energy.cuda()
    x, labels = x.cuda(), None if labels is None else labels.cuda()
    on_cuda = SGLD(20, noise_std=0)(energy, x, torch.Generator("cuda"), labels=labels)
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=1e-5)
    for _ in range(2):
        graph, eager = (
            SGLD(20, backend=backend)(energy, x, torch.Generator("cuda").manual_seed(1), labels=labels)
            for backend in ("cuda_graph", "eager")
        )
        assert torch.equal(graph, eager)
        with torch.no_grad():
            for weights in energy.parameters():
                weights.mul_(1.1)
