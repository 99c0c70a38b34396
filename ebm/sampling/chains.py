"""Chains: where they start and of which classes, their generators, and many of them in batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ebm import check
from ebm.energies import labels_in_proportion

# Convolution kernels for fewer images round otherwise: whatever is split, is split into multiples of this.
GROUP = 16

Energy = Callable[..., Tensor]  # E(x) or, with labels, E(x, y)
Generators = torch.Generator | Sequence[torch.Generator]
Given = tuple[Tensor, Tensor]  # (mask, values)


def uniform_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Noise (B, *shape) uniform in [−1, 1] on the generator's device; one generator, or one a chain as in SGLD."""
    return initial_noise(shape, generator)


def initial_noise(shape: Sequence[int], generator: Generators, law: str = "uniform") -> Tensor:
    """Where chains (B, *shape) start: uniform in [−1, 1], or "normal", N(0, I); generators as in `uniform_noise`."""
    x = torch.empty(*shape, device=(generator if isinstance(generator, torch.Generator) else generator[0]).device)
    for part, its_generator in with_generators(x, generator):
        if law == "normal":
            part.normal_(generator=its_generator)
        else:
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
    (T, B, *shape) on the CPU. Run there, they do not depend on `batch_size`, which is rounded down to a multiple of
    GROUP (at least GROUP), and the last batch is filled up to one. `given` as in SGLD, of all the chains.
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


@dataclass
class Chains:
    """How chains are run: by a sampler's `trace`, each with a generator of its own, drawn from `seed`, on `device`,
    `batch_size` at once (which on the CPU changes memory and time, not the samples), with about `frames` snapshots.
    `bar`: whether a terminal's stderr shows how far a run is."""

    trace: Callable[..., Tensor]
    seed: int = 0
    batch_size: int = 128
    frames: int = 64
    device: str | torch.device = "cpu"
    bar: bool = False

    def run(
        self, energy: Energy, x: Tensor, steps: int, labels: Tensor | None = None, given: Given | None = None
    ) -> tuple[Tensor, list[int]]:
        """Snapshots (T, B, *shape) on the CPU of chains that start at x (B, *shape), the last after `steps`, and their
        steps. `given` as in SGLD. Raises ValueError where the memory does not hold them."""
        every = max(1, steps // self.frames)
        check.memory(f"frames={self.frames} of {len(x)} chains", 4 * x.numel() * (steps // every + 2))
        generators = chain_generators(self.seed, len(x), self.device)
        how = {"desc": "SGLD", "unit": " steps", "unit_scale": True, "dynamic_ncols": True}
        with tqdm(total=-(-len(x) // GROUP) * GROUP * steps, disable=None if self.bar else True, **how) as bar:
            run = partial(self.trace, progress=bar.update) if self.bar else self.trace
            trace = trace_in_batches(run, energy, x, generators, self.batch_size, every, steps, labels, given)
        return trace, [min(i * every, steps) for i in range(len(trace))]


def chosen_labels(
    energy: nn.Module, count: int, label: str | int, class_names: Sequence[str] = (), source: str = "this energy"
) -> Tensor | None:
    """The labels (count,) of chains: "all" classes in proportion, "any" for none, or one class by name or number.

    Raises ValueError for a class that there is none of, and for one where the energy, which is called `source`, has
    none.
    """
    if label == "any":
        return None
    if label == "all":
        return labels_in_proportion(energy, count)
    classes = getattr(energy, "classes", None)
    if classes is None:
        raise ValueError(f"label={label} needs an energy with classes, which {source} is not")
    if str(label) in class_names:  # a class called 10 goes before the tenth
        label = class_names.index(str(label))
    elif class_names and not isinstance(label, int):
        raise ValueError(f"label must be all, any, a number or one of {', '.join(class_names[:20])}; got {label!r}")
    return torch.full((count,), check.number("label", label, 0, classes - 1, integer=True))


def chosen_chains(
    buffer: Mapping[str, Tensor], count: int, seed: int, label: int | None = None
) -> tuple[Tensor, Tensor]:
    """Random chains (count, *shape) of a buffer's state, of the class `label` alone where one is given, and their
    labels (count,). Raises ValueError where it holds fewer."""
    chosen = torch.randperm(len(buffer["chains"]), generator=torch.Generator().manual_seed(seed))
    if label is not None:
        chosen = chosen[buffer["labels"][chosen] == label]
    if count > len(chosen):
        raise ValueError(f"num_samples must be at most the {len(chosen)} chains of the buffer, got {count}")
    return buffer["chains"][chosen[:count]], buffer["labels"][chosen[:count]]
