"""SGLD steps in compiled code (sgld.cpp) on the CPU, for energies that are chains of layers.

A C++ compiler builds sgld.cpp once a kind of processor, in seconds; the library lies in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ebm.energies import Network, Residual, Scale, temperature_of
from ebm.files import cache_folder

SOURCE = Path(__file__).with_name("sgld.cpp")
FLAGS = ("-O3", "-march=native", "-fno-fast-math", "-std=c++17", "-shared", "-fPIC")  # after those of $CXX
FUNCTIONS = {torch.float32: "sgld_float32", torch.float64: "sgld_float64"}  # of sgld.cpp, by type of the chains
INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p

Pair = tuple[int, int]
Box = Sequence[float] | None  # [low, high]
# (x, noise of each step, step sizes, labels): x goes on in place
Steps = Callable[[Tensor, Tensor, Sequence[float], Tensor | None], None]


class NotCompilable(Exception):
    """Says why an energy, or this machine, has no compiled steps."""


class Taps(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("pixel", "alike", "start", "tap", "source")]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("pixels", "channels", "silu", "kernel", "out", "skip", "fan")),
        *((name, Taps) for name in ("forward", "backward")),
        *((name, POINTER) for name in ("weight", "bias", "transposed")),
    ]


class Work(ctypes.Structure):
    _fields_ = [
        *(("layers", INT), ("layer", POINTER), ("pixels", INT), ("channels", INT), ("chains", INT), ("x", POINTER)),
        *(("noise", POINTER), ("stride", INT), ("steps", INT), ("step_sizes", POINTER), ("labels", POINTER)),
        *((name, DOUBLE) for name in ("temperature", "grad_clamp", "low", "high")),
        ("workspace", POINTER),
    ]


@functools.cache
def built() -> ctypes.CDLL | str:
    """sgld.cpp, compiled, or why it cannot be: neither is tried twice."""
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        if not compiler or shutil.which(compiler[0]) is None:
            return "there is no C++ compiler (c++ or $CXX)"
        command = [*compiler, *FLAGS, str(SOURCE)]
        # The compiler's macros say what -march=native is here: another processor that shares the folder needs its own.
        macros = subprocess.run([*command, "-E", "-dM"], capture_output=True, check=True).stdout
        name = hashlib.sha256(SOURCE.read_bytes() + macros + repr(FLAGS).encode()).hexdigest()[:16]
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"sgld-{name}-*.so"):  # and the hash of its content: to load a torn one can be fatal
            if file.stem.endswith(hashlib.sha256(file.read_bytes()).hexdigest()):
                return ctypes.CDLL(str(file))
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            file = Path(aside) / "sgld.so"
            subprocess.run([*command, "-o", str(file)], capture_output=True, check=True)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
                digest = hashlib.sha256(written.read()).hexdigest()
            kept = folder / f"sgld-{name}-{digest}.so"
            os.replace(file, kept)
        return ctypes.CDLL(str(kept))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").splitlines()
        return f"{shlex.join(compiler)} failed: {said[0] if said else 'no message'}"
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: quotes of $CXX; RuntimeError: no home directory
        return str(error)


def library() -> ctypes.CDLL:
    """sgld.cpp, compiled. Raises NotCompilable where that cannot be done."""
    found = built()
    if isinstance(found, str):
        raise NotCompilable(found)
    return found


@dataclass
class Part:
    """A convolution or linear layer, what is added to it (the output of an earlier part), whether SiLU follows, and the
    factor of the layer's output."""

    module: nn.Conv2d | nn.Linear
    pool: int = 1  # side of the average over its output's pixels
    skip: int = -1
    silu: bool = False
    scale: float = 1.0


def check_hooks(energy: Any, device: str) -> None:
    """NotCompilable where more than its modules' own code is run when `energy` is called: hooks, or autocast."""
    if torch.is_autocast_enabled(device):
        raise NotCompilable("autocast is on")
    if nn.modules.module._has_any_global_hook():
        raise NotCompilable("there are hooks of all modules")
    for module in energy.modules() if isinstance(energy, nn.Module) else []:
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise NotCompilable(f"its {type(module).__name__} has hooks")


def chain_of(energy: Any) -> nn.Sequential:
    """energy.chain(). Raises NotCompilable where there is none, and where energy(x) may be something else: where a
    subclass overrides what the class with chain() has, or an object what its class has, and for parametrisations that
    are not torch's own, which may draw."""
    kinds = type(energy).__mro__
    author = next((kind for kind in kinds if "chain" in vars(kind)), None)
    if author is None or not isinstance(energy, nn.Module):
        raise NotCompilable(f"{type(energy).__name__} has no chain() of layers")
    for kind in kinds[: kinds.index(author)]:
        for name in vars(kind):
            if hasattr(author, name) and (name == "__call__" or not name.startswith("__")):
                raise NotCompilable(f"{kind.__name__} has its own {name}, but the chain() of {author.__name__}")
    for module in energy.modules():
        kind = type(module)
        for name in vars(module):
            if callable(getattr(kind, name, None)):
                raise NotCompilable(f"its {kind.__name__} has a {name} other than its class")
        others = [part for part in module.children() if type(part).__module__ != parametrizations.__name__]
        if isinstance(module, parametrize.ParametrizationList) and (others or module.training):
            raise NotCompilable("it has a parametrisation other than torch's, or one in training mode")
    chain = energy.chain()  # type: ignore[operator]
    if type(chain) is not nn.Sequential:
        raise NotCompilable(f"{type(energy).__name__} has no chain() of layers, an nn.Sequential")
    return chain


def parts_of(energy: Any) -> list[Part]:
    """The parts of f = energy.chain(): E(x) itself, or with energy.classes as in `ebm.energies.Network`.

    Raises NotCompilable as `chain_of`, and for a layer that sgld.cpp does not know.
    """
    parts: list[Part] = []
    flat = False

    def add(module: Any) -> None:
        nonlocal flat
        kind = parametrize.type_before_parametrizations(module)  # no subclass: it may compute something else
        open_end = bool(parts) and not parts[-1].silu  # what goes on with sums that SiLU has not seen
        if kind is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros" and not flat:
            if isinstance(module.padding, str):
                raise NotCompilable(f"its convolution has padding={module.padding!r}")
            parts.append(Part(module))
        elif kind is nn.Linear and flat:
            parts.append(Part(module))
        elif kind is nn.SiLU and open_end:
            parts[-1].silu = True
        elif kind is Scale and open_end and isinstance(parts[-1].module, nn.Linear):
            parts[-1].scale *= module.factor
        elif kind is nn.AvgPool2d and open_end and isinstance(parts[-1].module, nn.Conv2d):
            convolution, last = parts[-1].module, parts[-1]
            plain = (last.pool, last.skip, convolution.stride, convolution.dilation) == (1, -1, (1, 1), (1, 1))
            side = module.kernel_size
            averages = module.stride == side and not (module.padding or module.ceil_mode or module.divisor_override)
            if not plain or not isinstance(side, int) or not averages:
                raise NotCompilable("it pools otherwise than by averages of squares after a plain convolution")
            last.pool = side
        elif kind is Residual and parts and all(part.skip != len(parts) - 1 for part in parts):
            if type(module.inner) is not nn.Sequential:
                raise NotCompilable("a short cut goes around something else than an nn.Sequential")
            start, source = len(parts) - 1, replace(parts[-1])
            for inner in module.inner:
                add(inner)
            if parts[start] != source or parts[-1] is parts[start] or parts[-1].silu or parts[-1].skip >= 0:
                raise NotCompilable("a short cut does not start before a convolution and end behind another")
            parts[-1].skip = start
        elif kind is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
            flat = True
        elif kind is not nn.Identity and (kind is not nn.Dropout or module.training):  # in eval mode it does nothing
            raise NotCompilable(f"it has a {type(module).__name__}, which sgld.cpp does not know there")

    for module in chain_of(energy):
        add(module)
    classes = getattr(energy, "classes", None)
    outputs = 1 if classes is None else classes
    ends = bool(parts) and flat and not parts[-1].silu and parts[-1].skip < 0
    if not ends or parts[-1].module.weight.shape[0] != outputs or classes == 1:
        raise NotCompilable("its last layer is not a linear one with one output, or one a class")
    return parts


@functools.cache
def taps(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[Pair, list[list[Tensor]]]:
    """Output size of a convolution, and its taps (pixel, alike, start, tap, source) forward and backward, as in
    sgld.cpp."""
    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
    numbers = torch.arange(1.0, math.prod(size) + 1, dtype=torch.float64).view(1, 1, *size)  # 0 is the padding
    sources = nn.functional.unfold(numbers, kernel, dilation, padding, stride)[0].long() - 1  # (taps, pixels)
    tap, pixel = (sources >= 0).nonzero(as_tuple=True)

    def table(pixel: Tensor, source: Tensor, pixels: int) -> list[Tensor]:
        counts = pixel.bincount(minlength=pixels)
        order = pixel.argsort(stable=True)  # the taps of a pixel stay in turn
        its_first = (counts.cumsum(0) - counts)[pixel[order]]
        taps_of = torch.full((pixels, int(counts.max()) + 1), -1)  # unique refuses rows of nothing
        taps_of[pixel[order], torch.arange(len(order)) - its_first] = tap[order]
        kind = taps_of.unique(dim=0, return_inverse=True)[1]
        turn = kind.argsort(stable=True)  # pixels with the same taps, one after the other
        alike = kind.bincount().cumsum(0)[kind[turn]] - torch.arange(pixels)
        start = nn.functional.pad(counts[turn].cumsum(0), (1, 0))
        order = turn.argsort()[pixel].argsort(stable=True)
        return [column.int() for column in (turn, alike, start, tap[order], source[order])]

    source = sources[tap, pixel]
    return (rows, columns), [table(pixel, source, rows * columns), table(source, pixel, math.prod(size))]


def check_chains(energy: Any, parts: Sequence[Part], x: Tensor) -> None:
    """NotCompilable where chains like `x` are not what the energy takes, or sgld.cpp: on the CPU, of the weights' type,
    float32 or float64."""
    kinds = {(w.dtype, w.device) for part in parts for w in (part.module.weight, part.module.bias) if w is not None}
    if x.device.type != "cpu" or x.dtype not in FUNCTIONS or kinds != {(x.dtype, x.device)}:
        of_weights = " and ".join(f"{dtype} on {device}" for dtype, device in kinds)
        raise NotCompilable(f"chains are {x.dtype} on {x.device}, weights {of_weights}")
    convolves = any(isinstance(part.module, nn.Conv2d) for part in parts)
    other_shape = isinstance(energy, Network) and energy.shape != x.shape[1:]
    if other_shape or x.dim() < 2 or (convolves and x.dim() != 4):
        raise NotCompilable(f"it does not take images of {tuple(x.shape[1:])}")


def as_convolution(part: Part, channels: int, size: Pair) -> tuple[Tensor, tuple[Pair, Pair, Pair, Pair]]:
    """A part that takes `channels` maps of `size` as one convolution: weight (out, channels, *kernel), and kernel,
    stride, padding and dilation."""
    module: Any = part.module
    weight = part.scale * module.weight.detach()
    if isinstance(module, nn.Linear):
        return weight.reshape(-1, channels, *size), (size, (1, 1), (0, 0), (1, 1))
    stride, dilation, pool = module.stride, module.dilation, part.pool
    if pool > 1:  # one convolution again, of larger strides: its kernel is the mean of the shifted ones
        weight = nn.functional.avg_pool2d(nn.functional.pad(weight, [pool - 1] * 4), pool, stride=1)
        stride, dilation = (pool, pool), (1, 1)
    return weight, (tuple(weight.shape[2:]), stride, module.padding, dilation)


def maps_of(x: Tensor) -> tuple[int, Pair]:
    """Channels and size of chains: vectors are channels of one pixel."""
    return (x.shape[1], (x.shape[2], x.shape[3])) if x.dim() == 4 else (math.prod(x.shape[1:]), (1, 1))


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """Weights (out, in, taps) as sgld.cpp reads them: [tap][in][output] of each block of outputs, then of each that is
    left."""
    blocks = len(weight) // block
    in_whole = weight[: blocks * block].unflatten(0, (blocks, block)).permute(0, 3, 2, 1)
    return torch.cat([in_whole.flatten(), weight[blocks * block :].permute(0, 2, 1).flatten()])


def laid_out(parts: Sequence[Part], x: Tensor, block: int) -> tuple[Any, int, list[Tensor]]:
    """The parts as sgld.cpp's layers for chains like `x`, with its `block` of outputs; the numbers of workspace that a
    chain takes; and the tensors that the layers point to. Raises NotCompilable where one does not take what the one
    before gives."""
    layers = (Layer * len(parts))()
    numbers = math.prod(x.shape[1:])
    channels, size = maps_of(x)
    kept: list[Tensor] = []

    def pointer(tensor: Tensor) -> int:
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    for i, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        inputs = channels if isinstance(part.module, nn.Conv2d) else channels * math.prod(size)
        if part.module.weight.shape[1] != inputs:
            raise NotCompilable(f"it does not take images of {tuple(x.shape[1:])}")
        weight, geometry = as_convolution(part, channels, size)
        size, tables = taps(size, *geometry)
        weight, channels = weight.flatten(2), len(weight)
        bias = (
            torch.zeros(channels, dtype=x.dtype) if part.module.bias is None else part.scale * part.module.bias.detach()
        )
        if bias.shape != (channels,):
            raise NotCompilable(f"it has a bias of {tuple(bias.shape)} for {channels} outputs")
        layer.pixels, layer.channels, layer.silu = math.prod(size), channels, part.silu
        layer.out, layer.skip, layer.fan = numbers, part.skip, -1
        if part.skip >= 0:
            source = layers[part.skip]
            source.fan = i
            if (source.pixels, source.channels) != (layer.pixels, layer.channels):
                raise NotCompilable("a short cut adds what has another shape")
        layer.forward, layer.backward = (Taps(*map(pointer, table)) for table in tables)
        layer.kernel, layer.bias = weight.shape[2], pointer(bias)
        layer.weight, layer.transposed = (pointer(in_blocks(w, block)) for w in (weight, weight.transpose(0, 1)))
        numbers += 2 * layer.pixels * channels
    return layers, numbers, kept


def compiled_steps(energy: Any, x: Tensor, grad_clamp: float | None, bounds: Box) -> Steps:
    """f(x, noise, step_sizes, labels) that takes chains `x` (B, *shape), contiguous, in place through the SGLD steps
    with that noise (steps, B, *shape) and those step sizes, as `energy` is now, down E(x, y) where there are labels y
    (B,), and else down E(x). It holds no lock: threads run at once.

    x   an example of the chains. Raises NotCompilable where energy, x or machine do not allow it.
    """
    parts = parts_of(energy)
    check_chains(energy, parts, x)
    loaded = library()
    layers, numbers, kept = laid_out(parts, x, loaded.block())
    channels, size = maps_of(x)
    function, vector_bytes = getattr(loaded, FUNCTIONS[x.dtype]), loaded.vector_bytes()
    temperature = temperature_of(energy)
    clamp = math.inf if grad_clamp is None else grad_clamp
    low, high = bounds or (-math.inf, math.inf)

    def steps(x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None = None) -> None:
        if not (x.is_contiguous() and noise[0].is_contiguous() and len(noise) == len(step_sizes)):
            raise ValueError("compiled steps take contiguous chains and noise, and a step size a step")
        workspace = torch.empty((numbers + 1) * vector_bytes, dtype=torch.uint8)
        aligned = -(-workspace.data_ptr() // vector_bytes) * vector_bytes
        sizes = (DOUBLE * len(step_sizes))(*step_sizes)
        job = Work(
            *(len(layers), ctypes.addressof(layers), math.prod(size), channels, len(x), x.data_ptr()),
            *(noise.data_ptr(), noise.stride(0), len(noise), ctypes.addressof(sizes)),
            None if labels is None else labels.data_ptr(),
            *(temperature, clamp, low, high),
            aligned,
        )
        function(ctypes.byref(job))

    steps.__dict__["kept"] = kept  # lives as long as the function that has pointers to it
    return steps
