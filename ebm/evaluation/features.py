"""A feature space to compare sample sets in: a small classifier of the data set."""

import hashlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.data import Batches, Dataset, Device
from ebm.evaluation.metrics import in_batches
from ebm.files import cache_folder, write_whole

RECIPE = "32 and 64 3×3 filters, 64 standardised features, 3 epochs of batch 128, one cycle of Adam to 3e-3, seed 0"


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


class Classifier(nn.Module):
    """A small convolutional classifier: x (B, C, H, W) → logits (B, classes). `features(x)` (B, 64) lie below them, in
    units in which each has mean 0 and standard deviation 1 over the training images."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = check.image_shape("shape", shape)
        size = 64 * (height // 4) * (width // 4)
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(size, 64)),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, classes))
        self.mean, self.std = nn.Buffer(torch.zeros(64)), nn.Buffer(torch.ones(64))

    def features(self, x: Tensor) -> Tensor:
        return (self.body(x) - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def has_classes(dataset: Dataset) -> bool:
    """Whether a classifier can be had of it: it has images with labels of two classes or more."""
    labels = dataset.train_labels
    return len(dataset.shape) == 3 and labels is not None and len(labels.unique()) > 1


def untrained(dataset: Dataset, seed: int, device: Device) -> Classifier:
    """A `Classifier` for the data set's labels. Raises ValueError without."""
    if dataset.train_labels is None:
        raise ValueError(f"data set {dataset.name} has no labels to train a classifier with")
    with torch.random.fork_rng(devices=[]):  # constructors of modules take no generator
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        net = Classifier(dataset.shape, int(dataset.train_labels.max()) + 1)
    return net.to(memory_format=torch.channels_last).to(device)


def train_classifier(dataset: Dataset, epochs: int = 3, seed: int = 0, device: Device = "cpu") -> Classifier:
    """A `Classifier` of the data set's labels, the same for the same data and seed. Raises ValueError without."""
    net, generator = untrained(dataset, seed, device), torch.Generator(device).manual_seed(seed)
    batches = Batches(dataset.train, min(128, len(dataset.train)), generator, labels=dataset.train_labels)
    total = epochs * batches.steps_per_epoch
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _ in range(total):
        x, labels = batches.next()
        loss = nn.functional.cross_entropy(net(x), labels)  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    features = features_of(net, dataset.train, device=device)
    net.mean.copy_(features.mean(dim=0))
    net.std.copy_(features.std(dim=0))
    return net


def cached_classifier(
    dataset: Dataset, cache: str | None = None, device: Device = "cpu"
) -> tuple[Classifier, dict[str, Any]]:
    """(the data set's classifier, {recipe, weights' hash, accuracy on the validation images}), trained once and kept in
    the folder `cache` under the data's hashes; None: plain-ebm in the user's cache folder. A file that cannot be read
    is made anew; where it cannot be written, a warning says so."""
    name = hashlib.sha256(f"{RECIPE} {data_hashes(dataset)}".encode()).hexdigest()[:16]
    file = (Path(cache) if cache else cache_folder()) / f"classifier-{name}.pt"
    net = untrained(dataset, 0, device)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        check.that(all(value.isfinite().all() for value in weights.values()), "its weights are not finite")
        net.load_state_dict(weights)
        net.eval().requires_grad_(False)
    except Exception:  # missing, torn, another layout: whatever loading can raise
        net = train_classifier(dataset, device=device)
        memory = io.BytesIO()
        torch.save({key: value.cpu().contiguous() for key, value in net.state_dict().items()}, memory)
        try:
            write_whole(file, memory.getbuffer())
        except OSError as error:
            warnings.warn(f"the classifier is not kept: {error} (cache={file.parent})", stacklevel=2)
    info: dict[str, Any] = {"recipe": RECIPE, "weights": weights_hash(net.state_dict())}
    if dataset.validation_labels is not None:
        predicted = in_batches(net, dataset.validation, device=device).argmax(dim=1)
        info["accuracy"] = float((predicted == dataset.validation_labels).double().mean())
    return net, info


def features_of(net: Classifier, x: Tensor, batch_size: int = 256, device: Device = "cpu") -> Tensor:
    """Features (N, D) of bytes or floats x (N, *shape), on the CPU; they do not depend on `batch_size`."""
    with torch.no_grad():
        return in_batches(net.features, x, batch_size, device)
