import numpy as np
import pytest
import torch
from PIL import Image

from ebm.data import Dataset
from ebm.evaluation.outliers import keys_of, outliers

TEST = torch.arange(4 * 16, dtype=torch.uint8).view(4, 1, 4, 4) * 4
DATA = Dataset("ramps", TEST[:2], TEST)
X = TEST.float() / 127.5 - 1


def get(name: str, data: Dataset = DATA) -> torch.Tensor:
    return outliers(name, data, "nowhere", noise_std=0.3, seed=0)


def test_transforms_by_hand() -> None:
    assert torch.equal(get("test"), TEST)
    assert torch.equal(get("rotated"), X.flip(-1, -2))
    assert torch.equal(get("rotated90"), X.rot90(1, (-2, -1)))
    assert torch.equal(get("inverted"), -X)
    tiny = get("tiny")
    assert torch.equal(tiny[..., 2:, 2:], X[..., ::2, ::2])
    assert bool((tiny[..., :2, :] == -1).all()) and bool((tiny[..., :2] == -1).all())
    assert get("constant").flatten(1).std(dim=1).max() == 0
    assert get("constant")[[0, -1], 0, 0, 0].tolist() == [-1, 1]


def test_permutation_is_one_for_all_images() -> None:
    before, after = X.flatten(1), get("permuted").flatten(1)
    order = [before[0].tolist().index(value) for value in after[0].tolist()]
    assert order != sorted(order)
    assert torch.equal(before[:, order], after)


def test_halves_are_of_two_images() -> None:
    upper = {tuple(x.flatten().tolist()): i for i, x in enumerate(X[..., :2, :])}
    lower = {tuple(x.flatten().tolist()): i for i, x in enumerate(X[..., 2:, :])}
    pairs = [
        (upper[tuple(x[:, :2].flatten().tolist())], lower[tuple(x[:, 2:].flatten().tolist())]) for x in get("halves")
    ]
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == [0, 1, 2, 3]
    assert all(a != b for a, b in pairs)


def test_grey_has_the_brightness_of_the_colours() -> None:
    colour = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grey = get("grey", Dataset("colour", colour, colour))
    luma = 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]  # ITU-R BT.601
    torch.testing.assert_close(grey, luma.unsqueeze(1).expand(-1, 3, -1, -1), atol=2e-4, rtol=0)


def test_noise_has_its_level_and_stays_in_the_box() -> None:
    grey = Dataset("grey", torch.zeros(2, 1, 8, 8), torch.zeros(500, 1, 8, 8))
    assert get("gaussian_0.1", grey).std() == pytest.approx(0.1, rel=0.03)
    assert get("noisy", grey).std() == pytest.approx(0.3, rel=0.03)
    assert get("uniform_0.3", grey).abs().max() == pytest.approx(0.3, rel=0.01)
    assert get("noise", grey).std() == pytest.approx(1 / 3**0.5, rel=0.03)
    assert get("gaussian_9", grey).abs().max() == 1


def test_a_set_is_the_same_each_time() -> None:
    for name in ("noise", "noisy", "permuted", "halves", "blurred"):
        assert torch.equal(get(name), get(name))


def test_folder_of_images_in_the_datas_own_size(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for i in range(4):
        Image.fromarray(np.full((9, 12, 3), 60 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    x = outliers(str(tmp_path), DATA, "nowhere")
    assert x.shape == (4, 1, 4, 4)
    assert sorted(x.flatten(1).float().mean(dim=1).round().tolist()) == pytest.approx([0, 60, 120, 180], abs=1)


def test_what_cannot_be_had_says_why() -> None:
    with pytest.raises(ValueError, match="KMNIST is not in nowhere"):
        get("kmnist")
    with pytest.raises(ValueError, match=r"ood\.sets: nonsense"):
        get("nonsense")
    with pytest.raises(ValueError, match="gaussian_x needs a number"):
        get("gaussian_x")
    vectors = Dataset("vectors", torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="vectors"):
        get("rotated", vectors)
    with pytest.raises(ValueError, match="vectors"):
        get("mnist", vectors)
    with pytest.raises(ValueError, match="needs colours"):
        get("grey")
    wide = Dataset("wide", torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6))
    with pytest.raises(ValueError, match="square"):
        get("rotated90", wide)


def test_every_set_has_a_key_of_its_own_whatever_the_order() -> None:
    names = ["test", "noise", "my/cats", "a/dogs", "b/dogs", "x/test", "y/gaussian_0.3", "/e", "/d/e", "../c/svhn"]
    keys = ["test", "noise", "cats", "a_dogs", "b_dogs", "x_test", "y_gaussian_0.3", "/e", "d_e", "c_svhn"]
    assert keys_of(names) == dict(zip(keys, names, strict=True))
    assert keys_of(reversed(names)) == keys_of(names)
    assert list(keys_of(["a/b", "./a/b/", "a/b"])) == ["b"]
    assert len(keys_of(["/a/b_c", "/a_b/c", "/x/b_c", "/x/b/c", "/x_b/c"])) == 5


@pytest.mark.parametrize("name", ["tset", "gaussian_", "uniform_nan", "gaussian_-1", "3"])
def test_mistyped_names_are_told(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ood\.sets: {name}"):
        keys_of([name])
