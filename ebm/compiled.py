"""SGLD steps in compiled code (sgld.cpp) on the CPU, for energies that are chains of layers.

A C++ compiler builds sgld.cpp once a machine, in seconds; the library lies in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm.energies import Residual

SOURCE = Path(__file__).with_name("sgld.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p

Pair = tuple[int, int]
Box = Sequence[float] | None  # [low, high]
# (x, noise of each step, step sizes, labels): x goes on in place
Steps = Callable[[Tensor, Tensor, Sequence[float], Tensor | None], None]


class NotCompilable(Exception):
    """Says why an energy, or this machine, has no compiled steps."""


class Taps(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("start", "tap", "source")]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("pixels", "channels", "silu", "out", "skip", "fan")),
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


def cache_folder() -> Path:
    """Where what takes long to make is kept: plain-ebm in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plain-ebm"


@functools.cache
def library() -> ctypes.CDLL:
    """sgld.cpp, compiled. Raises NotCompilable where that cannot be done."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise NotCompilable("there is no C++ compiler (c++ or $CXX)")
    # -march=native: another machine that shares the home directory needs its own
    name = hashlib.sha256(f"{SOURCE.read_text()} {FLAGS} {compiler} {platform.node()}".encode()).hexdigest()[:16]
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"sgld-{name}.so"
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                built = Path(aside) / "sgld.so"
                done = subprocess.run([compiler, *FLAGS, SOURCE, "-o", built], capture_output=True, text=True)
                if done.returncode:
                    raise NotCompilable(f"{compiler} failed: {(done.stderr.splitlines() or ['no message'])[0]}")
                os.replace(built, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise NotCompilable(str(error)) from error


@dataclass
class Part:
    """A convolution or linear layer, what is added to it (the output of an earlier part), and whether SiLU follows."""

    module: nn.Conv2d | nn.Linear
    pool: int = 1  # side of the average over its output's pixels
    skip: int = -1
    silu: bool = False


def parts_of(energy: Any) -> list[Part]:
    """The parts of f = energy.chain(): E(x) itself, or with energy.classes as in `ebm.energies.Network`.

    Raises NotCompilable for an energy without `chain`, and for a layer that sgld.cpp does not know.
    """
    chain = energy.chain() if hasattr(energy, "chain") else None
    if chain is None:
        raise NotCompilable(f"{type(energy).__name__} has no chain() of layers")
    for module in energy.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotCompilable(f"its {type(module).__name__} has hooks")
    parts: list[Part] = []
    flat = False

    def add(module: Any) -> None:
        nonlocal flat
        forward = type(module).forward  # a parametrised layer (spectral norm) has another class and the same forward
        open_end = bool(parts) and not parts[-1].silu  # what goes on with sums that SiLU has not seen
        if forward is nn.Conv2d.forward and module.groups == 1 and module.padding_mode == "zeros" and not flat:
            if isinstance(module.padding, str):
                raise NotCompilable(f"its convolution has padding={module.padding!r}")
            parts.append(Part(module))
        elif forward is nn.Linear.forward and flat:
            parts.append(Part(module))
        elif forward is nn.SiLU.forward and open_end:
            parts[-1].silu = True
        elif forward is nn.AvgPool2d.forward and open_end and isinstance(parts[-1].module, nn.Conv2d):
            convolution, last = parts[-1].module, parts[-1]
            plain = (last.pool, last.skip, convolution.stride, convolution.dilation) == (1, -1, (1, 1), (1, 1))
            side = module.kernel_size
            if not plain or not isinstance(side, int) or module.stride != side or module.padding or module.ceil_mode:
                raise NotCompilable("it pools otherwise than by averages of squares after a plain convolution")
            last.pool = side
        elif forward is Residual.forward and parts and all(part.skip != len(parts) - 1 for part in parts):
            start, source = len(parts) - 1, replace(parts[-1])
            for inner in module.inner:
                add(inner)
            if parts[start] != source or parts[-1] is parts[start] or parts[-1].silu or parts[-1].skip >= 0:
                raise NotCompilable("a short cut does not start before a convolution and end behind another")
            parts[-1].skip = start
        elif forward is nn.Flatten.forward and module.start_dim == 1 and module.end_dim == -1:
            flat = True
        elif forward not in (nn.Identity.forward, nn.Dropout.forward):  # in eval mode dropout does nothing
            raise NotCompilable(f"it has a {type(module).__name__}, which sgld.cpp does not know there")

    for module in chain:
        add(module)
    outputs = getattr(energy, "classes", None) or 1
    if not parts or parts[-1].silu or parts[-1].skip >= 0 or parts[-1].module.weight.shape[0] != outputs or not flat:
        raise NotCompilable("its last layer is not a linear one with one output, or one a class")
    return parts


@functools.cache
def taps(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[Pair, list[list[Tensor]]]:
    """Output size of a convolution, and its taps (start, tap, source) forward and backward, as in sgld.cpp."""
    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
    numbers = torch.arange(1.0, math.prod(size) + 1, dtype=torch.float64).view(1, 1, *size)  # 0 is the padding
    sources = nn.functional.unfold(numbers, kernel, dilation, padding, stride)[0].long() - 1  # (taps, pixels)
    tap, pixel = (sources >= 0).nonzero(as_tuple=True)

    def table(pixel: Tensor, source: Tensor, pixels: int) -> list[Tensor]:
        order = pixel.argsort(stable=True)  # the taps of a pixel stay in turn
        ordered = pixel[order].int()
        start = torch.searchsorted(ordered, torch.arange(pixels + 1, dtype=torch.int32), out_int32=True)
        return [start, tap[order].int(), source[order].int()]

    source = sources[tap, pixel]
    return (rows, columns), [table(pixel, source, rows * columns), table(source, pixel, math.prod(size))]


def compiled_steps(energy: Any, x: Tensor, grad_clamp: float | None, bounds: Box) -> Steps:
    """f(x, noise, step_sizes, labels) that takes chains `x` (B, *shape), contiguous, in place through the SGLD steps
    with that noise (steps, B, *shape) and those step sizes, as `energy` is now, down E(x, y) where there are labels y
    (B,), and else down E(x). It holds no lock: threads run at once.

    x   an example of the chains. Raises NotCompilable where energy, x or machine do not allow it.
    """
    functions = {torch.float32: "sgld_float32", torch.float64: "sgld_float64"}
    parts = parts_of(energy)
    dtypes = {part.module.weight.dtype for part in parts}
    if x.device.type != "cpu" or x.dtype not in functions or dtypes != {x.dtype}:
        raise NotCompilable(f"chains are {x.dtype} on {x.device}, weights {' and '.join(map(str, dtypes))}")
    shape = tuple(x.shape[1:]) if x.dim() == 4 else (math.prod(x.shape[1:]), 1, 1)
    channels, size = shape[0], (shape[1], shape[2])
    kept: list[Tensor] = []  # what the pointers point to

    def pointer(tensor: Tensor) -> int:
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    work = (Layer * len(parts))()
    numbers = math.prod(shape)  # of the workspace, a chain
    for i, (layer, part) in enumerate(zip(work, parts, strict=True)):
        module, weight = part.module, part.module.weight.detach()
        if weight.shape[1] != (channels if isinstance(module, nn.Conv2d) else channels * math.prod(size)):
            raise NotCompilable(f"it does not take images of {tuple(x.shape[1:])}")
        if isinstance(module, nn.Conv2d):
            geometry: Any = (module.kernel_size, module.stride, module.padding, module.dilation)
        else:
            weight, geometry = weight.reshape(-1, channels, *size), (size, (1, 1), (0, 0), (1, 1))
        if part.pool > 1:  # one convolution again, of larger strides: its kernel is the mean of the shifted ones
            q = part.pool
            weight = nn.functional.avg_pool2d(nn.functional.pad(weight, [q - 1] * 4), q, stride=1)
            geometry = (tuple(weight.shape[2:]), (q, q), module.padding, (1, 1))
        size, tables = taps(size, *geometry)
        weight, channels = weight.flatten(2), len(weight)
        bias = torch.zeros(channels, dtype=x.dtype) if module.bias is None else module.bias.detach()
        layer.pixels, layer.channels, layer.silu = math.prod(size), channels, part.silu
        layer.out, layer.skip, layer.fan = numbers, part.skip, -1
        if part.skip >= 0:
            source = work[part.skip]
            source.fan = i
            if (source.pixels, source.channels) != (layer.pixels, layer.channels):
                raise NotCompilable("a short cut adds what has another shape")
        layer.forward, layer.backward = (Taps(*map(pointer, table)) for table in tables)
        layer.weight, layer.transposed = pointer(weight.permute(2, 1, 0)), pointer(weight.permute(2, 0, 1))
        layer.bias = pointer(bias)
        numbers += 2 * layer.pixels * channels
    loaded = library()
    function, vector_bytes = getattr(loaded, functions[x.dtype]), loaded.vector_bytes()
    low, high = bounds or (-math.inf, math.inf)

    def steps(x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None = None) -> None:
        if not (x.is_contiguous() and noise[0].is_contiguous() and len(noise) == len(step_sizes)):
            raise ValueError("compiled steps take contiguous chains and noise, and a step size a step")
        workspace = torch.empty((numbers + 1) * vector_bytes, dtype=torch.uint8)
        sizes = (DOUBLE * len(step_sizes))(*step_sizes)
        job = Work(
            *(len(work), ctypes.addressof(work), math.prod(shape[1:]), shape[0], len(x), x.data_ptr()),
            *(noise.data_ptr(), noise.stride(0), len(noise), ctypes.addressof(sizes)),
            None if labels is None else labels.data_ptr(),
            *(getattr(energy, "temperature", 1.0), math.inf if grad_clamp is None else grad_clamp, low, high),
            -(-workspace.data_ptr() // vector_bytes) * vector_bytes,
        )
        function(ctypes.byref(job))

    steps.__dict__["kept"] = kept  # lives as long as the function that has pointers to it
    return steps
