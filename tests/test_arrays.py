import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebm.arrays import dataset


@given(
    kind=st.sampled_from(["grey", "first", "last", "vectors"]),
    floats=st.booleans(),
    splits=st.sets(st.sampled_from(["test", "validation"])),
    labelled=st.booleans(),
)
def test_arrays_are_the_images_that_they_hold(kind, floats, splits, labelled):
    rng = np.random.default_rng(0)
    shape = {"grey": (5, 4), "first": (3, 5, 4), "last": (5, 4, 3), "vectors": (7,)}[kind]
    sizes = {"train": 20} | dict.fromkeys(splits, 6)
    stored = {split: rng.integers(0, 256, (count, *shape), dtype=np.uint8) for split, count in sizes.items()}
    if floats or kind == "vectors":
        stored = {split: (x / 127.5 - 1).astype(rng.choice(["f2", "f4", "f8"])) for split, x in stored.items()}
    labels = {f"{split}_labels": np.arange(count) % 3 for split, count in sizes.items()} if labelled else {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/mine.npz", **stored, **labels)
        data = dataset(f"{folder}/mine.npz")
    assert data.name == "mine" and (data.train_labels is not None) == labelled
    every = {"train": data.train, "validation": data.validation, "test": data.test}
    for split in splits:
        x = stored[split][:, None] if kind == "grey" else stored[split]
        x = x.transpose(0, 3, 1, 2) if kind == "last" else x
        assert torch.equal(every[split], torch.from_numpy(x.astype(every[split].numpy().dtype)))
        assert data.shape == x.shape[1:]
    assert sum(map(len, every.values())) == sum(sizes.values())
    assert len(data.test) == (6 if "test" in splits else 2)


BAD_ARRAYS = [
    ({"x": np.zeros((4, 2, 2), np.uint8)}, "must hold train"),
    (
        {"train": np.zeros((4, 2, 2), np.uint8), "images": np.zeros(3)},
        "must hold train, and may hold test.*got train, im",
    ),
    ({"train": np.zeros((4, 2, 2), np.int64)}, r"train must be bytes or floats .*got int64 \(4, 2, 2\)"),
    ({"train": np.zeros(4, np.float32)}, r"got float32 \(4,\)"),
    ({"train": np.ones((4, 2, 2), np.float32)}, r"in \[-1, 1\], those of train are in \[0, 1\]: store 2x - 1"),
    ({"train": np.full((4, 2, 2), np.nan, np.float32)}, r"values in \[-1, 1\]"),
    ({"train": np.zeros((4, 2, 2), np.uint8), "train_labels": np.zeros(3, np.int64)}, r"integers >= 0, \(4,\), got"),
    ({"train": np.zeros((4, 2, 2), np.uint8), "train_labels": np.full(4, -1)}, "integers >= 0"),
    ({"train": np.zeros((4, 2, 2), np.uint8), "test_labels": np.zeros(3, np.int64)}, "holds test_labels and no test"),
    ({"train": np.zeros((4, 2, 2), np.uint8), "test": np.zeros((4, 3, 2), np.uint8)}, "test is"),
    ({"train": np.array([None] * 4)}, "holds no arrays that can be read"),
    ({"train": np.zeros((0, 2, 2), np.uint8)}, r"N > 0, got uint8 \(0, 2, 2\)"),
    ({"train": np.zeros((9, 32, 32, 4), np.uint8)}, r"with C = 1 or 3, .*got uint8 \(9, 32, 32, 4\)"),
]


@pytest.mark.parametrize(("stored", "words"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays_are_refused(stored, words, tmp_path):
    np.savez(tmp_path / "mine.npz", **stored)
    with pytest.raises(ValueError, match=words):
        dataset(str(tmp_path / "mine.npz"))


def test_arrays_that_are_not_there(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK")
    for name, words in [("gone.npz", "must be an .npz file that is there"), ("torn.npz", "no arrays that can be read")]:
        with pytest.raises(ValueError, match=f"data.file=.*{words}"):
            dataset(str(tmp_path / name))
