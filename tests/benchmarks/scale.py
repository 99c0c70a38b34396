"""What a training step costs by image size, width, K and batch, measured here and extrapolated:

python tests/benchmarks/scale.py                              this machine, one process
torchrun --nproc-per-node=2 tests/benchmarks/scale.py         and on two ranks, each with half of the batch
python tests/benchmarks/scale.py TFLOPS GPUS                  no measurement: the extrapolation alone

F: floating point operations of a forward pass of one image. An SGLD step goes forward and back to the image, 2 F; the
loss goes forward and back to image and weights for a real image and a chain, 6 F: (2 K + 6) F an image and step.
"""

import os
import resource
import sys
import time
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ebm.energies import ConvEnergy, ResNetEnergy
from ebm.losses import ContrastiveDivergence
from ebm.running.ranks import Ranks
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD

GIB = 2**30
MEASURED = [  # network, shape, K, batch
    (partial(ConvEnergy, hidden=32), (1, 28, 28), 15, 128),  # the quick recipe's; then one thing changed a line
    (partial(ConvEnergy, hidden=32), (1, 28, 28), 60, 128),
    (partial(ConvEnergy, hidden=32), (1, 28, 28), 15, 32),
    (partial(ConvEnergy, hidden=64), (1, 28, 28), 15, 128),
    (partial(ConvEnergy, hidden=32), (3, 32, 32), 15, 128),
    (partial(ConvEnergy, hidden=32), (3, 64, 64), 15, 128),
    (partial(ResNetEnergy, width=16), (3, 32, 32), 15, 128),
    (partial(ResNetEnergy, width=32), (3, 32, 32), 15, 32),
]
EXTRAPOLATED = [  # name, network, shape, K, batch, chains, training steps
    ("CIFAR-10", partial(ResNetEnergy, width=128), (3, 32, 32), 60, 128, 10_000, 60_000),
    ("ImageNet 64×64", partial(ResNetEnergy, width=128, levels=4), (3, 64, 64), 60, 128, 10_000, 300_000),
]


def forward_flops(energy: torch.nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        energy(torch.zeros(1, *shape))
    return counter.get_total_flops()


def activations(energy: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that a forward pass of one image leaves for the way back."""
    saved: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in energy.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = energy(torch.rand(1, *shape))
    return sum(saved.values()) if result.requires_grad else 0


def gibibytes(energy: torch.nn.Module, shape: tuple[int, ...], batch: int, chains: int) -> float:
    """A device's: weights, gradients and two moments of Adam, the chains, a loss's activations of both batches."""
    parameters = 16 * sum(parameter.numel() for parameter in energy.parameters())
    image = 4 * torch.Size(shape).numel()
    return (parameters + chains * image + 2 * batch * (activations(energy, shape) + image)) / GIB


def seconds_a_step(energy: torch.nn.Module, shape: tuple[int, ...], k: int, batch: int, ranks: Ranks) -> float:
    """The fastest of three: what else the machine does only adds."""
    generator = torch.Generator().manual_seed(ranks.rank)
    parallel_energy, sampler, loss = ranks.wrap(energy), SGLD(steps=k), ContrastiveDivergence()
    x, best = uniform_noise((batch, *shape), generator), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        loss(parallel_energy, x, sampler(energy, x, generator), generator)[0].backward()
        best = min(best, ranks.largest(time.perf_counter() - start)[0])
    return best


if len(sys.argv) > 1:
    rate, gpus = 1e12 * float(sys.argv[1]), int(sys.argv[2])
    print("| | MFLOP an image forward | ms a step | days | GiB a GPU |\n|---|---|---|---|---|")
    for name, kind, shape, k, batch, chains, steps in EXTRAPOLATED:
        energy = kind(shape)
        flops = forward_flops(energy, shape)
        seconds = (2 * k + 6) * flops * batch / rate / gpus
        memory = gibibytes(energy, shape, batch // gpus, chains // gpus)
        print(f"| {name} | {flops / 1e6:.0f} | {1000 * seconds:.0f} | {steps * seconds / 86400:.2f} | {memory:.2f} |")
    sys.exit()

with Ranks() as ranks:
    if ranks.first:
        print(f"{ranks.size} ranks, {torch.get_num_threads()} threads each, {os.cpu_count()} cores")
        print(
            "| network | image | K | batch | MFLOP forward | ms a step | µs an image and SGLD step | GFLOP/s |"
            " GiB by the formula | peak so far |\n|---|---|---|---|---|---|---|---|---|---|"
        )
    for kind, shape, k, batch in MEASURED:
        energy = kind(shape).to(memory_format=torch.channels_last)
        flops = forward_flops(energy, shape)
        seconds = seconds_a_step(energy, shape, k, ranks.share("batch", batch), ranks)
        rate = (2 * k + 6) * flops * batch / seconds
        name = f"{kind.func.__name__.removesuffix('Energy')} {next(iter(kind.keywords.values()))}"
        if ranks.first:
            memory = gibibytes(energy, shape, batch // ranks.size, 8192 // ranks.size)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # torch itself: 0.4
            print(
                f"| {name} | {'×'.join(map(str, shape))} | {k} | {batch} | {flops / 1e6:.1f} | {1000 * seconds:.0f} "
                f"| {1e6 * seconds / batch / (k + 3):.1f} | {rate / 1e9:.0f} | {memory:.2f} "
                f"| {peak:.2f} |",
                flush=True,
            )
