"""Batches of a data set, shuffled, that can be resumed, and what is done to images in training."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.data import scaled


class Batches:
    """Endless shuffled batches: images (batch_size, *shape) in [−1, 1], their labels (batch_size,), None where there
    are none, and None for noise that they are paired with (`ebm.transport`). A partial batch at an epoch's end is
    dropped; images are mirrored with probability `flip`.

    Its state is the order of the epoch under way, the position in it and the generator's state: it goes on where it
    was. Rank `rank` of `ranks`, whose generators are alike, has every `ranks`-th image of each batch.
    """

    def __init__(
        self,
        x: Tensor,
        batch_size: int,
        generator: torch.Generator,
        rank: int = 0,
        ranks: int = 1,
        labels: Tensor | None = None,
        flip: float = 0.0,
    ) -> None:
        check.number("train.batch_size", batch_size, 1, integer=True)
        if batch_size > len(x):
            raise ValueError(f"train.batch_size must be at most the {len(x)} training images, got {batch_size}")
        self.x = x.to(generator.device)
        self.labels = None if labels is None else labels.to(generator.device)
        self.batch_size, self.generator, self.flip = batch_size, generator, flip
        self.mine = slice(rank, None, ranks)
        self.steps_per_epoch = len(x) // batch_size
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = self.steps_per_epoch  # in steps; the next one opens an epoch

    def next(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.position == self.steps_per_epoch:
            self.order = torch.randperm(len(self.x), generator=self.generator, device=self.x.device)
            self.position = 0
        start = self.position * self.batch_size
        self.position += 1
        chosen = self.order[start : start + self.batch_size][self.mine]
        x = scaled(self.x[chosen])
        if self.flip:
            mirrored = torch.rand(self.batch_size, generator=self.generator, device=x.device)[self.mine] < self.flip
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        return x, None if self.labels is None else self.labels[chosen], None

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` is that of batches of other images."""
        order, position = state["order"], state["position"]
        begun = position != self.steps_per_epoch or len(order)
        if begun and not torch.equal(order.sort().values, torch.arange(len(self.x))):
            raise ValueError(f"the data order is not one of the {len(self.x)} training images")
        if type(position) is not int or not 0 <= position <= self.steps_per_epoch:
            raise ValueError(f"the position in the epoch is {position} of {self.steps_per_epoch}")
        self.order, self.position = order.to(self.x.device), position
        if "generator" in state:  # older files have it elsewhere
            self.generator.set_state(state["generator"])


def noised(x: Tensor, noise_std: float, bounds: tuple[float, float] | None, generator: torch.Generator) -> Tensor:
    """x + N(0, noise_std²), clamped to `bounds` (None: not): what chains of the sampler have, too."""
    low, high = bounds or (-math.inf, math.inf)
    return (x + torch.empty_like(x).normal_(0, noise_std, generator=generator)).clamp(low, high)


def check_affine(key: str, settings: Mapping[str, float]) -> None:
    """ValueError naming `key` and the setting of `random_affine` that is out of range."""
    for name, value in settings.items():
        check.number(f"{key}.{name}", value, 0, {"rotation": 180, "scale": 0.9}.get(name, 1))


def random_affine(
    x: Tensor, generator: torch.Generator, rotation: float = 0, scale: float = 0, shift: float = 0, flip: float = 0
) -> Tensor:
    """Images x (B, C, H, W), each turned by up to ±rotation degrees, scaled by 1 ± scale, shifted by up to ±shift of
    its side and mirrored with probability flip; interpolated, the border's pixels repeated outside."""
    if len(x) == 0:
        return x  # torch interpolates no empty batch

    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        return torch.empty(len(x), columns, device=x.device).uniform_(low, high, generator=generator)

    angle = uniform(-rotation, rotation) * math.pi / 180
    factor = 1 / (1 + uniform(-scale, scale))
    mirror = torch.where(uniform(0, 1) < flip, -1.0, 1.0)
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    right, down = (2 * uniform(-shift, shift, 2)).split(1, dim=1)  # affine_grid's side is 2
    top = torch.cat([cosine * mirror, -sine, right], dim=1)
    bottom = torch.cat([sine * mirror, cosine, down], dim=1)
    theta = torch.stack([top, bottom], dim=1)
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images x (B, C, H, W), each with a rectangle of the one before in the same place, its sides 0.3 to 0.7 of the
    image's (Yun et al. 2019, "CutMix"), its centre in the middle half of either: with centres anywhere a tenth of the
    twins of MNIST get black for black, and are next to the image itself."""
    inside = []
    for size in x.shape[2:]:
        u, v = (torch.rand(len(x), 1, generator=generator, device=x.device) for _ in range(2))
        places = torch.linspace(0, 1, size, device=x.device)
        inside.append((places - 0.25 - 0.5 * u).abs() < 0.15 + 0.2 * v)  # from the centre, below half a side
    return torch.where((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), x.roll(1, 0), x)
