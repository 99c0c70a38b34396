"""The judge: a classifier in whose features sets of images are compared."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.batches import Batches
from ebm.data import Dataset, Device
from ebm.evaluation.metrics import in_batches
from ebm.files import cache_folder, write_whole

JUDGES = Path(__file__).parent / "judges"
# The judges that ship: the shape of the images they take, and the hash of their weights. All tell ten classes.
SHIPPED: dict[str, tuple[tuple[int, int, int], str]] = {
    "mnist": ((1, 28, 28), "3b0007cff5fef465"),
    "fashion_mnist": ((1, 28, 28), "25a0cf033208d593"),
    "cifar10": ((3, 32, 32), "08886520e3e1cc82"),
}
JUDGE_OF = {"mnist5k": "mnist", "MNIST": "mnist", "FashionMNIST": "fashion_mnist", "CIFAR10": "cifar10"}
OWN = "a block a level, 5 epochs or 100 steps, seed 0"  # the judge of a data set for which none ships


def data_hash(dataset: Dataset) -> str:
    """SHA-256 of all images and labels, first 16 hex digits."""
    images, labels = (dataset.train, dataset.validation), (dataset.train_labels, dataset.validation_labels)
    tensors = (*images, dataset.test, *labels, dataset.test_labels)
    return _hash((str((x.dtype, tuple(x.shape))), x) for x in tensors if x is not None)


def data_hashes(dataset: Dataset) -> dict[str, str]:
    """A hash as `data_hash` of each tensor that a training reads: the test images are none of them."""
    parts = {"training images": dataset.train, "training labels": dataset.train_labels}
    parts |= {"validation images": dataset.validation, "validation labels": dataset.validation_labels}
    return {name: _hash([(str((x.dtype, tuple(x.shape))), x)]) for name, x in parts.items() if x is not None}


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict's names and values, first 16 hex digits."""
    return _hash(sorted(state.items()))


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


class Block(nn.Module):
    """ReLU(x + f(x)), f two 3×3 convolutions with batch norm; where the size halves and the channels double, x is every
    other pixel and the new channels are zero (He et al. 2016, section 4.2)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.more = after // before, after - before
        self.f = nn.Sequential(
            *(nn.Conv2d(before, after, 3, self.stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(x[..., :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.more])
        return (shortcut + self.f(x)).relu()


class Classifier(nn.Module):
    """A residual network of two levels, 32 and 64 channels of `blocks` each, at a half and a quarter of the image's
    side: x (B, C, H, W) → logits (B, classes).

    `features(x)` (B, 128) are the means over the pixels of the maps of the first convolution and of both levels, in
    units in which each has mean 0 and standard deviation 1 over the training images. The last level's alone know little
    but the class: they take digits of one boldness, or with noise of 0.1, for real ones.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, blocks: int = 2) -> None:
        super().__init__()
        self.shape = check.image_shape("shape", shape)
        self.stem = nn.Sequential(nn.Conv2d(shape[0], 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.first = nn.Sequential(nn.MaxPool2d(2), *(Block(32, 32) for _ in range(blocks)))
        self.second = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks - 1)))
        self.head = nn.Linear(64, classes)
        self.mean, self.std = nn.Buffer(torch.zeros(128)), nn.Buffer(torch.ones(128))

    def features(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        first = self.first(stem)
        means = [maps.mean(dim=(2, 3)) for maps in (stem, first, self.second(first))]
        return (torch.cat(means, dim=1) - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))


def untrained(shape: tuple[int, ...], classes: int, blocks: int, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # constructors of modules take no generator
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        return Classifier(shape, classes, blocks).to(memory_format=torch.channels_last)


def train_classifier(
    dataset: Dataset,
    blocks: int = 1,
    epochs: int = 5,
    batch_size: int = 128,
    shift: int = 0,
    flip: float = 0.0,
    seed: int = 0,
    device: Device = "cpu",
) -> Classifier:
    """A `Classifier` of the training images' labels, the same for the same data and seed: one cycle of Nesterov's
    momentum up to a rate of 0.1 for 128 images, in proportion for more, and down to zero; weight decay 5e-4; 100 steps
    at least. Raises ValueError without labels.

    shift, flip  images are moved by up to so many pixels, and mirrored with this probability
    """
    if dataset.train_labels is None:
        raise ValueError(f"data set {dataset.name} has no labels to train a classifier with")
    net = untrained(dataset.shape, int(dataset.train_labels.max()) + 1, blocks, seed).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    batches = Batches(dataset.train, min(batch_size, len(dataset.train)), generator, labels=dataset.train_labels)
    total = max(epochs * batches.steps_per_epoch, 100)
    rate = 0.1 * batches.batch_size / 128
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, cycle_momentum=False)
    for _ in range(total):
        x, labels, _ = batches.next()
        loss = nn.functional.cross_entropy(net(moved(x, shift, flip, generator)), labels)  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    standardise(net, dataset.train, device)
    return net


def standardise(net: Classifier, x: Tensor, device: Device = "cpu") -> None:
    """Give the features mean 0 and standard deviation 1 over images x; those that hardly vary stay as they are."""
    net.mean.zero_()
    net.std.fill_(1)
    features = features_of(net, x, device=device)
    net.mean.copy_(features.mean(dim=0))
    std = features.std(dim=0)
    net.std.copy_(std.where(std > 1e-3, 1))


def moved(x: Tensor, shift: int, flip: float, generator: torch.Generator) -> Tensor:
    """Images x (B, C, H, W), each moved by up to ±shift pixels, the border's repeated, and mirrored with probability
    `flip`."""
    count, _, height, width = x.shape
    mirror = torch.rand(count, 1, 1, 1, generator=generator, device=x.device) < flip
    x = torch.where(mirror, x.flip(-1), x)
    row, column = torch.randint(2 * shift + 1, (2, count, 1), generator=generator, device=x.device)
    rows, columns = (place + torch.arange(size, device=x.device) for place, size in ((row, height), (column, width)))
    padded = nn.functional.pad(x, [shift] * 4, mode="replicate").movedim(1, -1)
    image = torch.arange(count, device=x.device).view(-1, 1, 1)
    return padded[image, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1)


def judge_of(dataset: Dataset, name: str | None = None) -> str | None:
    """The name of a data set's judge: `name`, one that ships, or for None the one that ships for the data; "own" where
    none does, a classifier of its own; None where the data have no images with labels of two classes or more.

    Raises ValueError for another name, and for a judge of images of another shape.
    """
    if name is None:
        ships = JUDGE_OF.get(dataset.name)
        if ships and SHIPPED[ships][0] == dataset.shape:
            return ships
        labels = dataset.train_labels
        return "own" if len(dataset.shape) == 3 and labels is not None and len(labels.unique()) > 1 else None
    check.choice("judge", name, tuple(SHIPPED))
    if SHIPPED[name][0] != dataset.shape:
        raise ValueError(f"judge={name} takes images of {SHIPPED[name][0]}, {dataset.name} has {dataset.shape}")
    return name


def judge(
    dataset: Dataset, name: str | None = None, cache: str | None = None, device: Device = "cpu"
) -> tuple[Classifier, dict[str, Any]]:
    """(the data set's judge, its {name, weights' hash, accuracy}); `name` as in `judge_of`.

    One that ships has its accuracy on the test images of its own data. Another is trained once and kept in the folder
    `cache` under the hash of the training images (None: plain-ebm in the user's cache folder), its accuracy on the
    validation images; where it cannot be written, a warning says so. Raises ValueError where there can be none.
    """
    found = judge_of(dataset, name)
    if found in SHIPPED:
        return shipped_judge(found, device)
    check.that(
        found, f"data set {dataset.name} has no judge: none ships, and it lacks images with labels of two classes"
    )
    labels = dataset.validation_labels
    if labels is None:
        raise ValueError(f"data set {dataset.name}: its validation images have no labels for its judge")
    net = own_classifier(dataset, cache, device)
    predicted = in_batches(net, dataset.validation, device=device).argmax(dim=1)
    accuracy = float((predicted == labels).double().mean())
    return net, {"name": "own", "recipe": OWN, "weights": weights_hash(net.state_dict()), "accuracy": accuracy}


def shipped_judge(name: str, device: Device = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """A judge that ships, and {name, weights' hash, accuracy}. Raises ValueError for weights that are not its own."""
    shape, known = SHIPPED[name]
    net = untrained(shape, 10, blocks=2, seed=0)
    net.load_state_dict(torch.load(JUDGES / f"{name}.pt", map_location="cpu", weights_only=True))
    weights = weights_hash(net.state_dict())
    check.that(
        weights == known, f"{JUDGES / name}.pt is not the judge that numbers are told by: {weights}, not {known}"
    )
    card = json.loads((JUDGES / f"{name}.json").read_text())
    return net.eval().requires_grad_(False).to(device), {"name": name, "weights": weights, "accuracy": card["accuracy"]}


def own_classifier(dataset: Dataset, cache: str | None, device: Device) -> Classifier:
    """`train_classifier`'s, from the cache where it lies. A file that cannot be read is made anew."""
    key = hashlib.sha256(f"{OWN} {data_hashes(dataset)}".encode()).hexdigest()[:16]
    file = (Path(cache) if cache else cache_folder()) / f"classifier-{key}.pt"
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        check.that(all(value.isfinite().all() for value in weights.values()), "its weights are not finite")
        net = untrained(dataset.shape, len(weights["head.bias"]), blocks=1, seed=0)
        net.load_state_dict(weights)
        return net.eval().requires_grad_(False).to(device)
    except Exception:  # missing, torn, another layout: whatever loading can raise
        net = train_classifier(dataset, device=device)
    memory = io.BytesIO()
    torch.save({key: value.cpu().contiguous() for key, value in net.state_dict().items()}, memory)
    try:
        write_whole(file, memory.getbuffer())
    except OSError as error:
        warnings.warn(f"the classifier is not kept: {error} (cache={file.parent})", stacklevel=3)
    return net


def features_of(net: Classifier, x: Tensor, batch_size: int = 256, device: Device = "cpu") -> Tensor:
    """Features (N, D) of bytes or floats x (N, *shape), on the CPU; they do not depend on `batch_size`."""
    with torch.no_grad():
        return in_batches(net.features, x, batch_size, device)
