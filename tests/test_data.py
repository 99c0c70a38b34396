import numpy as np
import pytest
import torch
from PIL import Image

from ebm.data import Batches, Dataset, checked_images, image_folder, mnist5k, scaled, torchvision_dataset


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
