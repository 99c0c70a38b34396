"""Energy networks: x (B, *shape) → E(x) of shape (B,), with p(x) ∝ exp(−E(x))."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ebm import check


def _check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"the energy takes a batch of {shape}, got {tuple(x.shape)}")


class ConvEnergy(nn.Module):
    """The tutorial's network: four strided convolutions and two linear layers, SiLU between.

    x (B, C, H, W) in [−1, 1] → E(x) (B,). With 1×28×28 and `hidden` 32 it has 76,993 parameters and
    sees 28 → 16 → 8 → 4 → 2 pixels; any other size and channel count is taken as well.
    SiLU, because the energy is differentiated with respect to the image and wants to be smooth.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), hidden: int = 32) -> None:
        super().__init__()
        self.shape = check.image_shape("energy.shape", shape)
        h = check.number("energy.hidden", hidden, 2, integer=True)
        channels, height, width = self.shape
        sizes = [channels, h // 2, h, 2 * h, 2 * h]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            kernel, padding = (5, 4) if i == 0 else (3, 1)  # 4 more pixels: 28 → 16, a power of two
            layers += [nn.Conv2d(before, after, kernel, stride=2, padding=padding), nn.SiLU()]
            height, width = ((n + 2 * padding - kernel) // 2 + 1 for n in (height, width))
        layers += [nn.Flatten(), nn.Linear(2 * h * height * width, 2 * h), nn.SiLU(), nn.Linear(2 * h, 1)]
        self.layers = nn.Sequential(*layers)

    def chain(self) -> nn.Sequential:
        """E(x) = chain()(x).squeeze(-1): what the sampler can compile."""
        return self.layers

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.shape)
        return self.layers(x).squeeze(-1)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(conv(SiLU(x)))), with a 1×1 convolution on the short cut where channels change."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(nn.functional.silu(x))
        return self.shortcut(x) + self.second(nn.functional.silu(h))


class ResNetEnergy(nn.Module):
    """A small residual network without batch norm: x (B, C, H, W) → E(x) (B,).

    One residual block a level, average pooling between levels (a smoother gradient than striding),
    sum over the pixels of the last level and a linear read-out, as in Du & Mordatch 2019, appendix A.
    No batch norm: the energy of an image must not depend on the rest of its batch.
    Width doubles a level: `width`, 2·`width`, 4·`width`, … for `levels` levels.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), width: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.shape = check.image_shape("energy.shape", shape)
        check.number("energy.width", width, 1, integer=True)
        most = int(math.log2(min(self.shape[1:]))) + 1  # the last level keeps a pixel
        check.number("energy.levels", levels, 1, most, integer=True)
        widths = [width * 2**level for level in range(levels)]
        layers: list[nn.Module] = [nn.Conv2d(self.shape[0], width, 3, padding=1)]
        for level, after in enumerate(widths):
            if level:
                layers.append(nn.AvgPool2d(2))
            layers.append(ResidualBlock(widths[max(level - 1, 0)], after))
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.shape)
        features = nn.functional.silu(self.layers(x)).sum(dim=(2, 3))
        return self.readout(features).squeeze(-1)


class MLPEnergy(nn.Module):
    """Linear layers with SiLU between, for vectors: x (B, D), or any (B, *shape), flattened → E(x) (B,)."""

    def __init__(self, shape: Sequence[int] = (2,), hidden: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.shape = tuple(check.number("energy.shape", size, 1, integer=True) for size in shape)
        check.number("energy.hidden", hidden, 1, integer=True)
        check.number("energy.depth", depth, 1, integer=True)
        sizes = [math.prod(self.shape)] + [hidden] * depth
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def chain(self) -> nn.Sequential:
        """E(x) = chain()(x).squeeze(-1): what the sampler can compile."""
        return self.layers

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.shape)
        return self.layers(x).squeeze(-1)
