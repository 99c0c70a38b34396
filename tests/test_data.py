import struct
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from ebm.data import TORCHVISION, Batches, Dataset, checked_images, image_folder, mnist5k, scaled, torchvision_dataset
from ebm.evaluation.outliers import outliers


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return mnist5k()


def test_embedded_digits(digits):
    assert digits.train.shape == (4500, 1, 28, 28) and digits.test.shape == (500, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [450] * 10 and digits.test_labels.bincount().tolist() == [50] * 10
    x = scaled(digits.train)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    means = digits.class_means()
    assert means.shape == (10, 1, 28, 28)
    torch.testing.assert_close(means[3], x[digits.train_labels == 3].mean(dim=0))


def test_full_mnist_and_fashion_mnist(data_root):
    for name in ("MNIST", "FashionMNIST"):
        data = torchvision_dataset(name, str(data_root))
        assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6000] * 10
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
    assert data.train.shape == (9, 3, 8, 8) and data.test.shape == (3, 3, 8, 8)
    for x, y in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(x[:, 0, 0, 0] >= 120, y == 1)
    again = image_folder(str(tmp_path), image_size=8, test_fraction=0.25)
    assert torch.equal(data.train, again.train)
    assert image_folder(str(tmp_path), image_size=5, channels=1).shape == (1, 5, 5)
    (tmp_path / "left" / "torn.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"torn\.png is not a readable image"):
        image_folder(str(tmp_path))


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


def test_bad_batches_and_data():
    with pytest.raises(ValueError, match=r"train\.batch_size must be at most the 3"):
        Batches(torch.zeros(3, 1), 4, torch.Generator())
    for x, word in [(torch.full((2, 1), 2.0), "in \\[-1, 1\\]"), (torch.full((2, 1), torch.nan), "in \\[-1, 1\\]")]:
        with pytest.raises(ValueError, match=word):
            Dataset("bad", x, x)
    with pytest.raises(ValueError, match="empty"):
        Dataset("bad", torch.zeros(0, 1), torch.zeros(2, 1))
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
    data = torchvision_dataset("SVHN", str(tmp_path))
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
    data = torchvision_dataset("EMNIST", str(tmp_path), split="letters")
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
    assert (len(data.train), len(data.test)) == (11, 1)  # it has one split: a tenth is held out
    assert torch.equal(data.train[:, 0, 0, 0] >= 60, data.train_labels == 1)
