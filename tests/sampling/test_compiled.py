"""The compiled steps against the plain loop, exact laws, and what falls back."""

import contextlib
import io
import math
import multiprocessing
import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest
from test_sgld import generator, images, naive
from torch import nn

from ebm.composition import Composed
from ebm.energies import ConvEnergy, MLPEnergy, Residual, ResNetEnergy
from ebm.running.checkpoint import load_energy
from ebm.sampling import sgld
from ebm.sampling.compiled import NotCompilable, built, compiled_steps, library, parts_of
from ebm.sampling.sgld import SGLD

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


def test_a_convolution_may_see_the_padding_alone():
    energy = Chain(
        nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(12, 1)
    ).double()  # of a column at 0, the second one reads those at -1 and 1
    x, g = torch.zeros(2, 1, 4, 1, dtype=torch.float64), generator(1)
    noises = [0.005 * torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(5)]
    ours = SGLD(5, backend="compile")(energy, x, generator(1))
    torch.testing.assert_close(ours, naive(energy, x, noises), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_is_the_eager_chain_but_for_rounding(dtype, atol):
    for energy, shape in (
        (ConvEnergy((3, 12, 10), hidden=6), (3, 12, 10)),
        (MLPEnergy((2,), hidden=20), (2,)),
        (ResNetEnergy((3, 12, 10), width=4, blocks=2, spectral_norm=True, stem=0), (3, 12, 10)),
        (ResNetEnergy((3, 12, 10), width=4, stem=3), (3, 12, 10)),
        (ConvEnergy((3, 12, 10), hidden=6, output_scale=5.0), (3, 12, 10)),
        (ResNetEnergy((3, 12, 10), width=4, classes=3, temperature=0.5, output_scale=0.2), (3, 12, 10)),
    ):
        x = torch.rand(21, *shape, dtype=dtype, generator=generator())
        for extra in ({}, {"grad_clamp": None, "bounds": None}, {"final_step_size": 1.0, "noise_std": "langevin"}):
            chains = [SGLD(10, backend=b, **extra)(energy.to(dtype), x, generator()) for b in ("compile", "eager")]
            torch.testing.assert_close(*chains, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_is_right_to_rounding_everywhere(dtype):
    first, last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    first.weight.data, last.weight.data = torch.ones(1, 1), torch.ones(1, 1)
    energy = Chain(nn.Flatten(), first, nn.SiLU(), last).to(dtype)
    x = torch.cat([torch.linspace(-end, end, 20_001, dtype=dtype) for end in (1, 40, 2000)]).unsqueeze(1)
    step_size = 2.0**20  # or x would round the gradient away
    one_step = SGLD(1, step_size, noise_std=0.0, grad_clamp=None, bounds=None, backend="compile")
    exact = x.double().requires_grad_()
    nn.functional.silu(exact).sum().backward()
    expected = (exact - step_size * exact.grad).detach()
    tolerance = 16 * torch.finfo(dtype).eps * step_size  # x · s · (1 − s) loses some
    torch.testing.assert_close(one_step(energy, x, generator()).double(), expected, rtol=0, atol=tolerance)


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
    parts_of(energy.eval())


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
    sgld.say_once.cache_clear()
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
    built.cache_clear()
    with pytest.raises(NotCompilable, match=reason):
        library()
    built.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cuda_graph_needs_cuda(capsys):
    sgld.say_once.cache_clear()
    SGLD(2, backend="cuda_graph")(ConvEnergy(hidden=4), images(3), generator())
    assert "cuda_graph: eager, because a CUDA graph takes chains on CUDA" in capsys.readouterr().err


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


class Restless(ConvEnergy):
    def train(self, mode=True):
        return super().train(True)


class WithOutputs(ConvEnergy):
    def outputs(self, x):
        return super().outputs(x) + x.square().flatten(1).sum(dim=1, keepdim=True) / 2


class WithForward(ConvEnergy):
    def forward(self, x, labels=None):
        return super().forward(x, labels) + x.square().flatten(1).sum(dim=1) / 2


class Penalty(nn.Module):
    def forward(self, x, labels=None):
        return super().forward(x, labels) + x.square().flatten(1).sum(dim=1) / 2


class Mixed(Penalty, ConvEnergy):
    pass


class Called(ConvEnergy):
    def __call__(self, x, labels=None):
        return 2 * super().__call__(x, labels)


class Smaller(ConvEnergy):  # only another constructor
    def __init__(self, **kwargs):
        super().__init__(**kwargs | {"hidden": 3})


class OptsIn(ConvEnergy):
    """Of its own, and says what it is."""

    def chain(self):
        return nn.Sequential(self.layers, nn.Identity())[0]

    def forward(self, x, labels=None):
        return super().forward(x, labels)


class Wavy(nn.SiLU):
    def forward(self, x):
        return x.sin()


class Doubled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Backwards(nn.Sequential):
    def forward(self, x):
        return super().forward(-x)


class Around(Residual):
    def forward(self, x):
        return x - self.inner(x)


class Drawn(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def doubles(module: nn.Module) -> None:
    """Sets forward on the object."""
    inner = module.forward
    module.forward = lambda *x: 2 * inner(*x)


def parametrised(energy):
    nn.utils.parametrizations.weight_norm(energy.layers[2])
    nn.utils.parametrizations.spectral_norm(energy.layers[0])


def short_cut(energy, kind=Residual):
    energy.layers[3] = nn.Sequential(nn.SiLU(), kind(nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)), nn.SiLU())
    energy.layers = nn.Sequential(*energy.layers[:3], *energy.layers[3], *energy.layers[4:])


# Energies: (class, what is done to the object, why it is sampled by autograd, or None where it is compiled)
CHANGES = {
    "plain": (ConvEnergy, None, None),
    "constructor": (Smaller, None, None),
    "own chain": (OptsIn, None, None),
    "parametrised": (ConvEnergy, parametrised, None),
    "short cut": (ConvEnergy, short_cut, None),
    "outputs": (WithOutputs, None, "WithOutputs has its own outputs, but the chain() of Network"),
    "forward": (WithForward, None, "WithForward has its own forward"),
    "mixed in": (Mixed, None, "Penalty has its own forward"),
    "called": (Called, None, "Called has its own __call__"),
    "train": (Restless, None, "Restless has its own train"),
    "object": (ConvEnergy, doubles, "its ConvEnergy has a forward other than its class"),
    "layer": (ConvEnergy, lambda e: doubles(e.layers[2]), "its Conv2d has a forward other than its class"),
    "activation": (ConvEnergy, lambda e: e.layers.__setitem__(3, Wavy()), "it has a Wavy"),
    "convolution": (ConvEnergy, lambda e: e.layers.__setitem__(0, Doubled(1, 2, 5, 2, 4)), "it has a Doubled"),
    "sequence": (ConvEnergy, lambda e: setattr(e, "layers", Backwards(*e.layers)), "no chain() of layers, an nn.Seq"),
    "other short cut": (ConvEnergy, lambda e: short_cut(e, Around), "it has a Around"),
    "hook": (ConvEnergy, lambda e: e.layers[1].register_forward_hook(lambda m, a, y: 2 * y), "its SiLU has hooks"),
    "pre-hook": (
        ConvEnergy,
        lambda e: e.register_forward_pre_hook(lambda m, a: (-a[0], *a[1:])),
        "ConvEnergy has hooks",
    ),
    "gradient hook": (
        ConvEnergy,
        lambda e: e.layers[1].register_full_backward_hook(lambda m, g, o: (2 * g[0],)),
        "its SiLU has hooks",
    ),
    "gradient pre-hook": (
        ConvEnergy,
        lambda e: e.layers[1].register_full_backward_pre_hook(lambda m, g: (2 * g[0],)),
        "its SiLU has hooks",
    ),
    "own parametrisation": (
        ConvEnergy,
        lambda e: nn.utils.parametrize.register_parametrization(e.layers[0], "weight", Drawn()),
        "a parametrisation other than torch's",
    ),
    "temperature": (
        ConvEnergy,
        lambda e: setattr(e, "temperature", torch.tensor(2.0, dtype=torch.float64)),
        None,
    ),
    "shape": (ConvEnergy, lambda e: setattr(e, "shape", (1, 9, 9)), "it does not take images of (1, 8, 8)"),
    "kernel": (
        ConvEnergy,
        lambda e: setattr(e.layers[0], "weight", nn.Parameter(torch.randn(2, 1, 6, 6, dtype=torch.float64))),
        None,
    ),
    "bias": (
        ConvEnergy,
        lambda e: setattr(e.layers[-3], "bias", nn.Parameter(torch.ones(1, dtype=torch.float64))),
        "it has a bias of (1,) for 8 outputs",
    ),
    "pool": (
        ConvEnergy,
        lambda e: setattr(
            e, "layers", nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2, divisor_override=1), *e.layers).double()
        ),
        "it pools otherwise",
    ),
    "composed": (lambda **k: Composed([ConvEnergy(**k)]), None, "Composed has no chain"),
}

LABELS = {
    "none": lambda n, classes: None,
    "int64": lambda n, classes: torch.arange(n) % classes,
    "int32": lambda n, classes: (torch.arange(n) % classes).int(),
    "uint8": lambda n, classes: (torch.arange(n) % classes).to(torch.uint8),
    "strided": lambda n, classes: (torch.arange(3 * n) % classes)[::3],
    "expanded": lambda n, classes: torch.tensor([classes - 1]).expand(n),
    "too large": lambda n, classes: torch.full((n,), classes),
    "negative": lambda n, classes: torch.full((n,), -1),
    "real": lambda n, classes: torch.zeros(n),
    "boolean": lambda n, classes: torch.zeros(n, dtype=torch.bool),
    "too many": lambda n, classes: torch.zeros(n + 1, dtype=torch.int64),
    "several": lambda n, classes: torch.zeros(n, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("change", CHANGES)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_auto_is_eager_or_says_why_it_took_eager(change, data):
    build, alter, reason = CHANGES[change]
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    classes, kind, chains = draw(None, 2, 5), draw(*LABELS), draw(1, 3, 33)
    with torch.random.fork_rng():
        torch.manual_seed(draw(0, 1))
        energy = build(shape=(1, 8, 8), hidden=4, classes=classes, temperature=draw(0.1, 1.0)).double()
        if alter:
            alter(energy)
        energy.double()
    x, labels = (
        torch.rand(chains, 1, 8, 8, dtype=torch.float64, generator=generator()),
        LABELS[kind](chains, classes or 3),
    )
    how = {"grad_clamp": draw(None, 0.03), "bounds": draw(None, (-1, 1)), "noise_std": draw(0, 0.01, "langevin")}
    how |= {"final_step_size": draw(None, 1.0), "threads": draw(1, 2)}
    outcomes = []
    for backend in ("auto", "eager"):
        try:
            outcomes.append(SGLD(4, backend=backend, **how)(energy, x, generator(), labels=labels))
        except (ValueError, TypeError, RuntimeError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    auto, eager = outcomes
    if isinstance(eager, str):
        assert auto == eager
    else:
        torch.testing.assert_close(auto, eager, rtol=0, atol=1e-9)
    labelled, said = labels is not None, io.StringIO()
    if labelled and classes is None:
        reason = reason or "there are labels, and the energy has no classes"
    sgld.say_once.cache_clear()
    with contextlib.redirect_stderr(said):
        taken, _ = SGLD().run_as(energy.eval(), x, labelled)
    assert taken == ("eager" if reason else "compile")
    assert (reason or "auto: compile\n") in said.getvalue() or (labelled and "no classes" in said.getvalue())


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("backend", ["compile", "eager"])
def test_labels_of_any_integer_kind_are_those_labels_and_others_are_refused(kind, backend):
    energy, x, labels = ConvEnergy((1, 8, 8), hidden=4, classes=3), torch.zeros(40, 1, 8, 8), LABELS[kind](40, 3)
    refusals = {
        "too large": "labels must be in [0, 3), got 3 to 3",
        "negative": "labels must be in [0, 3), got -1 to -1",
        "real": "labels must be integers (B,), got torch.float32 (40,)",
        "boolean": "labels must be integers (B,), got torch.bool (40,)",
        "too many": "41 labels for 40 chains",
        "several": "labels must be integers (B,), got torch.int64 (40, 2)",
    }
    if kind in refusals:
        with pytest.raises(ValueError, match=re.escape(refusals[kind])):
            SGLD(2, backend=backend)(energy, x, generator(), labels=labels)
    elif labels is not None:
        chains = [
            SGLD(2, backend=backend, threads=threads)(energy, x, generator(), labels=given)
            for given, threads in ((labels, 2), (labels.long().clone(), 1))
        ]
        assert torch.equal(*chains)


def test_hooks_of_all_modules_and_autocast_take_autograd():
    energy, x = ConvEnergy((1, 8, 8), hidden=4), torch.zeros(2, 1, 8, 8)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: y)
    try:
        assert SGLD().run_as(energy, x)[0] == "eager"
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert SGLD().run_as(energy, x)[0] == "eager"
    assert SGLD().run_as(energy, x)[0] == "compile"


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler of two words, one with a space, that copies the library built already; its calls are in a file."""
    script, log = tmp_path / "a compiler", tmp_path / "log"
    script.write_text(
        'for last; do :; done\n[ "$last" = -dM ] && echo "$PROCESSOR" && exit\n'
        'echo built >> "$LOG"; cp "$BUILT" "$last"\n'
    )
    log.touch()
    monkeypatch.setenv("BUILT", library()._name)
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("CXX", f"sh {shlex.quote(str(script))}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built.cache_clear()
    yield lambda: len(log.read_text().splitlines())
    built.cache_clear()


def test_the_library_is_built_once_a_processor(compiler, monkeypatch, tmp_path):
    for processor, builds in [("zen", 1), ("zen", 1), ("skylake", 2), ("zen", 2)]:
        monkeypatch.setenv("PROCESSOR", processor)
        built.cache_clear()
        assert library().vector_bytes() in (32, 64)
        assert Path(library()._name).parent == tmp_path / "cache" / "plain-ebm"
        assert compiler() == builds
    assert len(list(tmp_path.rglob("*.so"))) == 2


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_torn_library_is_built_again(compiler, tmp_path, share):
    library()
    (file,) = tmp_path.rglob("*.so")
    content = file.read_bytes()
    file.unlink()  # this process has mapped it
    file.write_bytes(content[: int(share * len(content))])
    built.cache_clear()
    assert library().vector_bytes() in (32, 64)
    assert compiler() == 2
    assert file.read_bytes() == content
    built.cache_clear()
    assert library() and compiler() == 2


def test_the_library_is_on_the_disk_before_it_has_its_name(compiler, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    library()
    assert calls == ["fsync", "replace"]


def test_a_compiler_that_fails_is_asked_once(monkeypatch, tmp_path):
    script, log = tmp_path / "compiler", tmp_path / "log"
    script.write_text(f"echo asked >> {log}\necho no such flag >&2\nexit 1\n")
    monkeypatch.setenv("CXX", f"sh {script}")
    built.cache_clear()
    for _ in range(3):
        with pytest.raises(NotCompilable, match="no such flag"):
            library()
    built.cache_clear()
    assert log.read_text() == "asked\n"


def test_a_forked_process_samples():
    """Its parent's threads are not there, neither ours nor those with which torch copies large tensors."""
    energy, x = ConvEnergy(hidden=4), images(128)
    for threads in (None, 2):
        ours = SGLD(3, threads=threads)(energy, x, generator())

        def child(threads=threads, ours=ours):
            assert torch.equal(SGLD(3, threads=threads)(energy, x, generator()), ours)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        process.kill()  # where it hangs
        process.join()
        assert process.exitcode == 0


def recorded(monkeypatch, sampler, energy, labels=None, fails=None):
    """`sampler` with `energy` as on CUDA, but for the recording: how many are made, and the chains."""
    count = 0

    def record(steps, x, noise, step_sizes, labels):
        nonlocal count
        count += 1
        steps(x.clone(), noise, step_sizes, labels)
        if fails:
            raise fails
        return steps

    monkeypatch.setattr(sgld, "cuda_graph", record)
    x = torch.full((2, 1, 8, 8), 0.5)
    with sgld.frozen(energy):
        run = sampler._graph(energy, x, sgld.eager_steps(energy, sampler.grad_clamp, sampler.bounds))
        run(x, torch.zeros(3, *x.shape), [1.0] * 3, labels)
    return count, x


def pair() -> Composed:
    return Composed([ConvEnergy((1, 8, 8), 4), ConvEnergy((1, 8, 8), 4, classes=3)])


@pytest.mark.parametrize(
    "change",
    [
        lambda energy, sampler: setattr(energy.energies[1], "temperature", 0.5),
        lambda energy, sampler: setattr(energy, "combine", "or"),
        lambda energy, sampler: setattr(energy, "weights", torch.tensor([2.0, 1.0])),
        lambda energy, sampler: setattr(energy, "energies", energy.energies[:1]),
        lambda energy, sampler: energy.energies.__setitem__(0, MLPEnergy((1, 8, 8), 4)),
        lambda energy, sampler: energy.energies[0].layers.__setitem__(1, nn.ReLU()),
        lambda energy, sampler: setattr(energy.energies[0].layers[0], "padding", (2, 2)),
        lambda energy, sampler: setattr(energy.energies[0].layers[0], "weight", nn.Parameter(torch.zeros(2, 1, 5, 5))),
        lambda energy, sampler: setattr(sampler, "grad_clamp", 0.01),
        lambda energy, sampler: setattr(sampler, "bounds", (0, 1)),
        lambda energy, sampler: vars(sampler).update(step_size=1.0, final_step_size=1.0),
    ],
)
def test_a_graph_is_recorded_again_when_anything_it_depends_on_changes(change, monkeypatch):
    energy, sampler = pair(), SGLD()
    assert [recorded(monkeypatch, sampler, energy)[0] for _ in range(2)] == [1, 0]
    with torch.no_grad():
        energy.energies[0].layers[0].weight.mul_(2)  # in place: the graph reads it
    assert recorded(monkeypatch, sampler, energy)[0] == 0
    change(energy, sampler)
    assert [recorded(monkeypatch, sampler, energy)[0] for _ in range(2)] == [1, 0]


def test_a_graph_that_cannot_be_recorded_falls_back_and_says_why(monkeypatch, capsys):
    sgld.say_once.cache_clear()
    sampler, energy = SGLD(), ConvEnergy((1, 8, 8), 4)
    error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    count, failed = recorded(monkeypatch, sampler, energy, fails=error)
    assert recorded(monkeypatch, sampler, energy, fails=error)[0] == 0 and count == 1
    assert torch.equal(failed, recorded(monkeypatch, SGLD(), energy)[1])
    assert capsys.readouterr().err == (
        "sampler.backend=auto: eager, because no CUDA graph can be recorded: "
        "CUDA error: operation not permitted when stream is capturing\n"
    )


class Counts(ConvEnergy):
    calls = 0

    def forward(self, x, labels=None):
        self.calls += 1
        return super().forward(x, labels) * self.calls


class Holds(ConvEnergy):
    def __init__(self, held):
        super().__init__((1, 8, 8), 4)
        self.held = held


def test_a_graph_is_refused_to_an_energy_whose_changes_cannot_be_seen(monkeypatch, capsys):
    sgld.say_once.cache_clear()
    recorded(monkeypatch, SGLD(), Counts((1, 8, 8), 4))
    assert "because no CUDA graph can be recorded: the energy changes as it runs" in capsys.readouterr().err
    held = []
    for value in (lambda: held, object(), generator(), partial(lambda: held)):
        with pytest.raises(NotCompilable, match="cannot tell when what the energy holds changes"):
            recorded(monkeypatch, SGLD(), Holds(value))
    held.append(held)  # in itself
    for value in (nn.functional.silu, partial(nn.functional.pad, pad=(1, 1)), {"a": [1, 2.0, None]}):
        assert recorded(monkeypatch, SGLD(), Holds(value))[0] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_energy_that_waits_for_the_device_is_sampled_by_autograd_there(capsys):
    class Waits(ConvEnergy):
        def forward(self, x, labels=None):
            return super().forward(x, labels) * (1 + x.mean().item() ** 2)

    sgld.say_once.cache_clear()
    energy, x = Waits().cuda(), images(4).cuda()
    chains = [SGLD(9, backend=b)(energy, x, torch.Generator("cuda")) for b in ("auto", "eager")]
    assert torch.equal(*chains)
    assert "because no CUDA graph can be recorded" in capsys.readouterr().err
    assert torch.rand(3, device="cuda").shape == (3,)  # torch's own generator is whole
    assert SGLD(9)(ConvEnergy().cuda(), x, torch.Generator("cuda")).isfinite().all()
    assert "no CUDA graph" not in capsys.readouterr().err
