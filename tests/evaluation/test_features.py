import os
from pathlib import Path

import pytest
import torch

from ebm.data import Dataset, torchvision_dataset
from ebm.evaluation.features import (
    cached_classifier,
    data_hash,
    data_hashes,
    features_of,
    train_classifier,
    weights_hash,
)

ROOT = Path(os.environ.get("EBM_DATA", "../shared/data"))


def bars(count: int, seed: int = 0) -> Dataset:
    """Images with one bright row or one bright column, in noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    x = torch.rand(count, 1, 8, 8, generator=generator) * 0.5 - 1
    place = torch.randint(8, (count,), generator=generator)
    for i in range(count):
        x[i, 0, place[i] if y[i] else slice(None), slice(None) if y[i] else place[i]] = 1
    return Dataset("bars", x[: -count // 4], x[-count // 4 :], y[: -count // 4], y[-count // 4 :])


def test_same_data_and_seed_same_weights_and_no_global_randomness() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = train_classifier(bars(400), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = train_classifier(bars(400), epochs=1)
    assert weights_hash(a.state_dict()) == weights_hash(b.state_dict())
    assert weights_hash(a.state_dict()) != weights_hash(train_classifier(bars(400), epochs=1, seed=1).state_dict())


def test_learns_is_cached_by_the_data_and_heals_a_torn_file(tmp_path: Path) -> None:
    data = bars(1600)
    net, info = cached_classifier(data, str(tmp_path))
    assert info["accuracy"] > 0.95
    (file,) = tmp_path.iterdir()
    modified = file.stat().st_mtime_ns
    again, same = cached_classifier(data, str(tmp_path))
    assert same == info and file.stat().st_mtime_ns == modified
    x = features_of(again, data.test, 256)
    assert torch.equal(x, features_of(net, data.test, 8)) and torch.equal(x, features_of(net, data.test, 5))
    train = features_of(net, data.train)
    assert train.mean(dim=0).abs().max() < 1e-4 and (train.std(dim=0) - 1).abs().max() < 1e-3
    file.write_bytes(file.read_bytes()[:100])
    assert cached_classifier(data, str(tmp_path))[1] == info
    cached_classifier(bars(400, seed=1), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_data_hash_sees_every_part() -> None:
    a = bars(40)
    assert data_hash(a) == data_hash(bars(40)) and data_hashes(a) == data_hashes(bars(40))
    for split in ("train", "validation", "test"):
        for part, name in (("", "images"), ("_labels", "labels")):
            other, read = bars(40), {"train": "training"}.get(split, split)
            setattr(other, split + part, 1 - getattr(other, split + part))
            assert data_hash(other) != data_hash(a)
            hashes = data_hashes(other)
            changed = {key for key, value in data_hashes(a).items() if hashes[key] != value}
            assert changed == ({f"{read} {name}"} if split != "test" else set())  # which no training reads


def test_without_labels_it_says_so() -> None:
    with pytest.raises(ValueError, match="no labels"):
        cached_classifier(Dataset("d", torch.zeros(8, 1, 8, 8), torch.zeros(8, 1, 8, 8)), "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "MNIST").is_dir(), reason="full MNIST is neither in EBM_DATA nor in ../shared/data")
@pytest.mark.skipif("EBM_SLOW" not in os.environ, reason="trains for a minute and a half: set EBM_SLOW=1")
def test_ninety_nine_per_cent_on_mnist(tmp_path: Path) -> None:
    assert cached_classifier(torchvision_dataset("MNIST", str(ROOT)), str(tmp_path))[1]["accuracy"] >= 0.99
