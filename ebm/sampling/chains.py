"""Chains: where they start, the generators that their noise is drawn from, and many of them in batches."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Convolution kernels for fewer images round otherwise: whatever is split, is split into multiples of this.
GROUP = 16

Energy = Callable[..., Tensor]  # E(x) or, with labels, E(x, y)
Generators = torch.Generator | Sequence[torch.Generator]
Given = tuple[Tensor, Tensor]  # (mask, values)


def uniform_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Noise (B, *shape) uniform in [−1, 1] on the generator's device; one generator, or one a chain as in SGLD."""
    x = torch.empty(*shape, device=(generator if isinstance(generator, torch.Generator) else generator[0]).device)
    for part, its_generator in with_generators(x, generator):
        part.uniform_(-1, 1, generator=its_generator)
    return x


def with_generators(x: Tensor, generator: Generators) -> Iterable[tuple[Tensor, torch.Generator]]:
    """`x` (B, *shape) with the one generator that fills it, or each chain with its own."""
    return [(x, generator)] if isinstance(generator, torch.Generator) else zip(x, generator, strict=True)


def padded(x: Tensor) -> Tensor:
    """`x` (B, *shape), filled up to a multiple of GROUP by its first one."""
    return torch.cat([x, x[:1].expand(-len(x) % GROUP, *x.shape[1:])])


def chain_generators(seed: int, count: int, device: str | torch.device = "cpu") -> list[torch.Generator]:
    """A generator a chain; the first ones are the same whatever the count."""
    seeds = torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return [torch.Generator(device).manual_seed(number) for number in seeds.tolist()]


def trace_in_batches(
    trace: Callable[..., Tensor],
    energy: Energy,
    x: Tensor,
    generators: Sequence[torch.Generator],
    batch_size: int = 128,
    every: int = 1,
    steps: int | None = None,
    labels: Tensor | None = None,
    given: Given | None = None,
) -> Tensor:
    """`trace`, a sampler's, of any number of chains, `batch_size` at a time on the generators' device: snapshots
    (T, B, *shape) on the CPU. The result does not depend on `batch_size`, which is rounded down to a multiple
    of GROUP (at least GROUP), and the last batch is filled up to one. `given` as in SGLD, of all the chains.
    """
    batch_size = max(batch_size // GROUP, 1) * GROUP

    def batch(x: Tensor, start: int) -> Tensor:
        return padded(x[start : start + batch_size]).to(generators[0].device)

    parts = []
    for start in range(0, len(x), batch_size):
        part, its_generators = batch(x, start), list(generators[start : start + batch_size])
        count = len(its_generators)
        its_generators += [torch.Generator(part.device).manual_seed(0) for _ in range(len(part) - count)]
        its_labels = None if labels is None else batch(labels, start)
        held = (batch(given[0], start), batch(given[1], start)) if given else None
        snapshots = trace(energy, part, its_generators, every=every, steps=steps, labels=its_labels, given=held)
        parts.append(snapshots[:, :count].cpu())
    return torch.cat(parts, dim=1)
