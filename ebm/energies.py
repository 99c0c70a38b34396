"""Energy networks: x (B, *shape) → E(x) of shape (B,); with classes, E(x, y) as well.

The law of an energy is p(x) ∝ exp(−E(x)/T), T its `temperature`, 1 where it has none. Log densities are in nats of that
law, −E(x)/T − log Z; steps of the sampler, clamps and scores −E(x) are in the energy's own unit.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check


def temperature_of(energy: Any) -> float:
    """T of the law p(x) ∝ exp(−E(x)/T). Raises ValueError where the energy's `temperature` is no finite number > 0."""
    return check.number("energy.temperature", float(getattr(energy, "temperature", 1.0)), 0, open_low=True)


class Scale(nn.Module):
    """factor · x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Network(nn.Module):
    """What the energies below share: `outputs`: x (B, *shape) → (B, 1), or with `classes` (B, classes), which is the
    chain of `layers` where a class has no other. f is `output_scale` times that: without classes the energy.

    With classes p(x, y) ∝ exp(−E(x, y)/T): E(x, y) = −f(x)[y], E(x) = −T·log Σ_y exp(f(x)[y]/T), and p(y | x) =
    softmax(f(x)/T). With T = 1 a classifier is an energy of images and labels (Grathwohl et al. 2020, "JEM", section
    3); with less, energies stay small where the classifier is sure.
    """

    layers: nn.Sequential
    class_shares: list[float] | None = None  # p(y) of the data, which the labels of samples follow; None: all alike

    def __init__(self, shape: tuple[int, ...], classes: int | None, temperature: float, output_scale: float) -> None:
        super().__init__()
        self.shape = shape
        self.output_scale = check.number("energy.output_scale", output_scale, 0, open_low=True)
        self.temperature = check.number("energy.temperature", temperature, 0, open_low=True)
        self.classes: int | None = check.optional("energy.classes", classes, 2, integer=True)

    def chain(self) -> nn.Module | None:
        """f as a chain of layers where it is one: what the sampler can compile."""
        return self.scaled(self.layers)

    def scaled(self, layers: nn.Sequential) -> nn.Sequential:
        """The layers, and the output's scale as the last one where it is not 1."""
        return layers if self.output_scale == 1 else nn.Sequential(*layers, Scale(self.output_scale))

    def outputs(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E(x) (B,), or E(x, y) for the `labels` y in [0, classes): (B,), or (B, L) for L labels of each image."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"the energy takes a batch of {self.shape}, got {tuple(x.shape)}")
        outputs = self.output_scale * self.outputs(x)
        if labels is None:
            T = self.temperature
            return outputs.squeeze(-1) if self.classes is None else -T * (outputs / T).logsumexp(dim=1)
        if self.classes is None:
            raise ValueError("labels need an energy with classes (energy.classes)")
        return -outputs.gather(1, labels.view(len(x), -1)).view(labels.shape)


def labels_in_proportion(energy: nn.Module, count: int, device: str | torch.device = "cpu") -> Tensor | None:
    """Labels (count,) for chains of an energy with classes, each as often as its `class_shares` say: where it has none,
    or all are alike, 0, 1, …, 0, 1, …. The first ones are the same whatever the count. None without classes.

    The k-th chain of class y is due at (k + ½)/share (Sainte-Laguë's method).
    """
    classes = getattr(energy, "classes", None)
    if classes is None:
        return None
    shares = torch.tensor(getattr(energy, "class_shares", None) or [1.0] * classes, dtype=torch.float64)
    due = (torch.arange(count).unsqueeze(1) + 0.5) / shares
    return (due.flatten().argsort(stable=True)[:count] % classes).to(device)


class ConvEnergy(Network):
    """The tutorial's network: four strided convolutions and two linear layers, SiLU between.

    x (B, C, H, W) in [−1, 1] → E(x) (B,). With 1×28×28 and `hidden` 32 it has 76,993 parameters and
    sees 28 → 16 → 8 → 4 → 2 pixels; any other size and channel count is taken as well.
    SiLU, because the energy is differentiated with respect to the image and wants to be smooth.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        hidden: int = 32,
        classes: int | None = None,
        temperature: float = 1.0,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__(check.image_shape("energy.shape", shape), classes, temperature, output_scale)
        h = check.number("energy.hidden", hidden, 2, integer=True)
        channels, height, width = self.shape
        sizes = [channels, h // 2, h, 2 * h, 2 * h]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            kernel, padding = (5, 4) if i == 0 else (3, 1)  # 4 more pixels: 28 → 16, a power of two
            layers += [nn.Conv2d(before, after, kernel, stride=2, padding=padding), nn.SiLU()]
            height, width = ((n + 2 * padding - kernel) // 2 + 1 for n in (height, width))
        layers += [nn.Flatten(), nn.Linear(2 * h * height * width, 2 * h), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(2 * h, self.classes or 1))


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ResNetEnergy(Network):
    """A residual network for images of any size: x (B, C, H, W) in [−1, 1] → E(x) (B,).

    Levels of `width`, 2·`width`, 4·`width`, … channels, each half the side of the one before: a 3×3 convolution
    and an average over 2×2 pixels (a smoother gradient than striding), then `blocks` residual blocks
    SiLU(x + conv(SiLU(conv(x)))). Two linear layers read the last level out. There is no batch norm: the energy
    of an image must not depend on the rest of its batch. With 1×28×28 and 3 `levels` it sees 14, 7 and 3 pixels
    a side.

    stem           channels of a 3×3 convolution and SiLU ahead of the levels; 0 for none. Without it the first thing
                   that happens to an image is linear, and its averages leave nothing of stripes one pixel wide: the
                   energy does not see pixels' noise, and its samples keep theirs
    spectral_norm  divides every layer's weights by their largest singular value (Miyato et al. 2018), so that the
                   energy is steep nowhere; its power iteration stands still in eval mode, and so while sampling
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
        scales: int = 1,
        classes: int | None = None,
        temperature: float = 1.0,
        stem: int = 8,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__(check.image_shape("energy.shape", shape), classes, temperature, output_scale)
        check.number("energy.width", width, 1, integer=True)
        check.number("energy.blocks", blocks, 0, integer=True)
        check.number("energy.stem", stem, 0, integer=True)
        highest = int(math.log2(min(self.shape[1:])))  # the last level keeps a pixel
        check.number("energy.levels", levels, 1, highest, integer=True)
        check.number("energy.scales", scales, 1, highest, integer=True)
        self.networks = nn.ModuleList(
            self._network(width, min(levels, highest - scale), blocks, scale, stem) for scale in range(scales)
        )
        if spectral_norm:
            for module in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                nn.utils.parametrizations.spectral_norm(module)

    def _network(self, width: int, levels: int, blocks: int, scale: int, stem: int) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Conv2d(self.shape[0], stem, 3, padding=1), nn.SiLU()] if stem else []
        before = stem or self.shape[0]
        for level in range(levels):
            after = width * 2**level
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.AvgPool2d(2), nn.SiLU()]
            for _ in range(blocks):
                first, second = (nn.Conv2d(after, after, 3, padding=1) for _ in range(2))
                layers += [Residual(first, nn.SiLU(), second), nn.SiLU()]
            before = after
        pixels = math.prod(n >> scale + levels for n in self.shape[1:])
        layers += [nn.Flatten(), nn.Linear(before * pixels, before), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(before, self.classes or 1))

    def chain(self) -> nn.Module | None:
        return self.scaled(self.networks[0]) if len(self.networks) == 1 else None  # type: ignore[arg-type]

    def outputs(self, x: Tensor) -> Tensor:
        outputs = []
        for network in self.networks:
            outputs.append(network(x))
            x = nn.functional.avg_pool2d(x, 2)
        return torch.stack(outputs).sum(dim=0)


class MLPEnergy(Network):
    """Linear layers with SiLU between, for vectors: x (B, D), or any (B, *shape), flattened → E(x) (B,)."""

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        hidden: int = 128,
        depth: int = 3,
        classes: int | None = None,
        temperature: float = 1.0,
        output_scale: float = 1.0,
    ) -> None:
        dims = tuple(check.number("energy.shape", size, 1, integer=True) for size in shape)
        super().__init__(dims, classes, temperature, output_scale)
        check.number("energy.hidden", hidden, 1, integer=True)
        check.number("energy.depth", depth, 1, integer=True)
        sizes = [math.prod(self.shape)] + [hidden] * depth
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, self.classes or 1))
