"""Samples as a user asks for them: chains with a seed each and snapshots on the way, of which classes, from where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebm import check
from ebm.energies import labels_in_proportion
from ebm.sampling.chains import Energy, Given, chain_generators, trace_in_batches
from ebm.sampling.sgld import SGLD


@dataclass
class Chains:
    """How chains are run: each with a generator of its own, drawn from `seed`, on `device`, `batch_size` at once (which
    changes memory and time, not the samples), with about `frames` snapshots."""

    sampler: SGLD
    seed: int = 0
    batch_size: int = 128
    frames: int = 64
    device: str | torch.device = "cpu"

    def run(
        self, energy: Energy, x: Tensor, steps: int, labels: Tensor | None = None, given: Given | None = None
    ) -> tuple[Tensor, list[int]]:
        """Snapshots (T, B, *shape) on the CPU of chains that start at x (B, *shape), the last after `steps`, and their
        steps. `given` as in SGLD. Raises ValueError where the memory does not hold them."""
        every = max(1, steps // self.frames)
        check.memory(f"frames={self.frames} of {len(x)} chains", 4 * x.numel() * (steps // every + 2))
        generators = chain_generators(self.seed, len(x), self.device)
        trace = trace_in_batches(
            self.sampler.trace, energy, x, generators, self.batch_size, every, steps, labels, given
        )
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
