import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from ebm.data import Dataset, mnist5k
from ebm.evaluation import features
from ebm.evaluation.features import (
    Classifier,
    data_hash,
    data_hashes,
    features_of,
    judge,
    judge_of,
    moved,
    train_classifier,
    weights_hash,
)
from ebm.evaluation.metrics import in_batches


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
    a = train_classifier(bars(40))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = train_classifier(bars(40))
    assert weights_hash(a.state_dict()) == weights_hash(b.state_dict())
    assert weights_hash(a.state_dict()) != weights_hash(train_classifier(bars(40), seed=1).state_dict())


def test_a_judge_of_ones_own_learns_is_kept_by_the_data_and_heals_a_torn_file(tmp_path: Path) -> None:
    data = bars(800)
    net, info = judge(data, cache=str(tmp_path))
    assert info["name"] == "own" and info["accuracy"] > 0.95
    (file,) = tmp_path.iterdir()
    modified = file.stat().st_mtime_ns
    again, same = judge(data, cache=str(tmp_path))
    assert same == info and file.stat().st_mtime_ns == modified
    x = features_of(again, data.test, 256)
    assert torch.equal(x, features_of(net, data.test, 8)) and torch.equal(x, features_of(net, data.test, 5))
    train = features_of(net, data.train)
    assert train.mean(dim=0).abs().max() < 1e-4 and (train.std(dim=0) - 1).abs().max() < 1e-3
    file.write_bytes(file.read_bytes()[:100])
    assert judge(data, cache=str(tmp_path))[1] == info
    judge(bars(40, seed=1), cache=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_moved_images_lie_in_the_padded_ones() -> None:
    x = torch.arange(5 * 3 * 4 * 5.0).view(5, 3, 4, 5)
    padded = torch.nn.functional.pad(x, [2] * 4, mode="replicate")
    seen = set()
    for seed in range(120):
        for i, image in enumerate(moved(x, 2, 0.5, torch.Generator().manual_seed(seed))):
            for (row, column), mirrored in product(product(range(5), range(5)), (False, True)):
                there = (padded[i].flip(-1) if mirrored else padded[i])[:, row : row + 4, column : column + 5]
                if torch.equal(image, there):
                    seen.add((row, column, mirrored))
                    break
            else:
                raise AssertionError(f"image {i} of seed {seed} is none that moving makes")
    assert len(seen) == 50
    assert torch.equal(moved(x, 0, 0.0, torch.Generator()), x)


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


def test_which_judge() -> None:
    digits = mnist5k()
    assert judge_of(digits) == judge_of(replace(digits, name="MNIST")) == "mnist"
    assert judge_of(replace(digits, name="FashionMNIST")) == "fashion_mnist"
    assert judge_of(replace(digits, name="mine")) == "own"
    unlabelled = Dataset("mine", digits.train, digits.test)
    assert judge_of(unlabelled) is None and judge_of(unlabelled, "mnist") == "mnist"
    assert judge_of(Dataset("one class", digits.train, digits.test, torch.zeros(4000), torch.zeros(500))) is None
    assert judge_of(bars(40)) == "own" and judge_of(Dataset("points", torch.zeros(9, 2), torch.zeros(9, 2))) is None
    with pytest.raises(ValueError, match="judge must be one of mnist, fashion_mnist, cifar10, got 'inception'"):
        judge_of(digits, "inception")
    with pytest.raises(ValueError, match=r"judge=cifar10 takes images of \(3, 32, 32\), mnist5k has \(1, 28, 28\)"):
        judge_of(digits, "cifar10")
    with pytest.raises(ValueError, match="data set mine has no judge: none ships, and it lacks images"):
        judge(unlabelled)


@pytest.mark.parametrize("name", features.SHIPPED)
def test_the_judges_that_ship_are_those_of_their_cards(name: str) -> None:
    net, info = features.shipped_judge(name)
    card = json.loads((features.JUDGES / f"{name}.json").read_text())
    assert info == {"name": name, "weights": card["weights"], "accuracy": card["accuracy"]}
    assert weights_hash(net.state_dict()) == card["weights"] == features.SHIPPED[name][1]
    assert not net.training and not any(weight.requires_grad for weight in net.parameters())


def test_the_judge_of_digits_tells_digits_that_it_did_not_learn_from() -> None:
    data = mnist5k()
    net, _ = judge(data)
    for x, labels in ((data.validation, data.validation_labels), (data.test, data.test_labels)):
        assert (in_batches(net, x).argmax(dim=1) == labels).sum() >= 494  # of 500


def test_another_file_is_not_the_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "JUDGES", tmp_path)
    torch.save(Classifier((1, 28, 28), 10).state_dict(), tmp_path / "mnist.pt")
    with pytest.raises(ValueError, match="is not the judge that numbers are told by"):
        judge(mnist5k())
