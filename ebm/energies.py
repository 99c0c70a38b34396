"""Energy networks: x (B, *shape) → E(x) of shape (B,), with p(x) ∝ exp(−E(x))."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
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


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """Self-attention between pixels (Zhang et al. 2019, "SAGAN", section 3): x (B, C, H, W) → x + γ·v(x)·softmax(…).

    γ starts at 0, and the energy as one without attention.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, max(channels // 8, 1), 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)  # (B, pixel, pixel it looks at)
        return x + self.gamma * (value @ weights.transpose(1, 2)).view_as(x)


class ResNetEnergy(nn.Module):
    """A residual network for images of any size: x (B, C, H, W) in [−1, 1] → E(x) (B,).

    Levels of `width`, 2·`width`, 4·`width`, … channels, each half the side of the one before: a 3×3 convolution
    and an average over 2×2 pixels (a smoother gradient than striding), then `blocks` residual blocks
    SiLU(x + conv(SiLU(conv(x)))). Two linear layers read the last level out. There is no batch norm: the energy
    of an image must not depend on the rest of its batch. With 1×28×28 and 3 `levels` it sees 14, 7 and 3 pixels
    a side.

    spectral_norm  divides every layer's weights by their largest singular value (Miyato et al. 2018), so that the
                   energy is steep nowhere; its power iteration stands still in eval mode, and so while sampling
    attention      after the second level (Zhang et al. 2019); such an energy is sampled by autograd
    scales         E is the sum of as many such networks, on the image, its 2×2 averages, theirs, … (Du, Li,
                   Tenenbaum & Mordatch 2021, section 3.3); more than one are sampled by autograd

    Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        width: int = 32,
        levels: int = 3,
        blocks: int = 1,
        spectral_norm: bool = False,
        attention: bool = False,
        scales: int = 1,
    ) -> None:
        super().__init__()
        self.shape = check.image_shape("energy.shape", shape)
        check.number("energy.width", width, 1, integer=True)
        check.number("energy.blocks", blocks, 0, integer=True)
        most = int(math.log2(min(self.shape[1:])))  # the last level keeps a pixel
        check.number("energy.levels", levels, 1, most, integer=True)
        check.number("energy.scales", scales, 1, most, integer=True)
        networks = [
            self._network(width, min(levels, most - scale), blocks, attention, [n >> scale for n in self.shape[1:]])
            for scale in range(scales)
        ]
        self.networks = nn.ModuleList(networks)
        if spectral_norm:
            for module in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                nn.utils.parametrizations.spectral_norm(module)

    def _network(self, width: int, levels: int, blocks: int, attention: bool, size: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        before = self.shape[0]
        for level in range(levels):
            after = width * 2**level
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.AvgPool2d(2), nn.SiLU()]
            for _ in range(blocks):
                first, second = (nn.Conv2d(after, after, 3, padding=1) for _ in range(2))
                layers += [Residual(first, nn.SiLU(), second), nn.SiLU()]
            if attention and level == min(1, levels - 1):
                layers.append(Attention(after))
            before = after
        pixels = math.prod(n >> levels for n in size)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * pixels, before), nn.SiLU(), nn.Linear(before, 1))

    def chain(self) -> nn.Module | None:
        """E(x) = chain()(x).squeeze(-1) where there is one scale: what the sampler can compile."""
        return self.networks[0] if len(self.networks) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.shape)
        energies = []
        for network in self.networks:
            energies.append(network(x))
            x = nn.functional.avg_pool2d(x, 2)
        return torch.stack(energies).sum(dim=0).squeeze(-1)


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
