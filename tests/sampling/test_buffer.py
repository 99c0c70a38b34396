import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from ebm.batches import random_affine
from ebm.sampling.buffer import ReplayBuffer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)
@given(
    capacity=st.integers(1, 40),
    policy=st.sampled_from(["fifo", "in_place"]),
    probability=st.sampled_from([0.0, 0.3, 1.0]),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    data=st.data(),
)
def test_invariants(capacity, policy, probability, counts, data):
    """Against a list of Python: what is drawn, where it goes, what falls out."""
    initial = data.draw(st.integers(1, capacity))
    g = generator()
    buffer = ReplayBuffer((1,), g, capacity, initial, probability, policy)
    model = buffer.chains[: buffer.size, 0].tolist()  # fifo: oldest first
    assert buffer.size == (initial if policy == "fifo" else capacity)
    for call, count in enumerate(counts):
        if count > len(model):
            with pytest.raises(ValueError, match=r"buffer\.(initial|capacity) must be at least train.chains"):
                buffer.draw(count, g)
            continue
        chains, places, ages, labels = buffer.draw(count, g)
        assert len(set(places.tolist())) == count  # distinct chains
        stored = buffer.chains[places]
        old = (chains == stored).flatten()
        assert bool((ages[~old] == 0).all())
        assert bool(old.all()) if probability == 0 else not bool(old.any()) if probability == 1 else True
        marks = torch.full((count, 1), 10.0 + call)  # not a value of any other call
        buffer.put(marks, places, ages + 7, labels)
        if policy == "fifo":
            model = (model + [10.0 + call] * count)[-capacity:]
            assert sorted(model) == pytest.approx(sorted(buffer.chains[: buffer.size, 0].tolist()))
        else:
            assert buffer.size == capacity
            assert bool((buffer.chains[places] == marks).all())
            assert (buffer.chains == 10.0 + call).sum() == count
        assert buffer.size <= capacity


def test_share_of_fresh_chains_is_the_probability():
    g = generator()
    buffer = ReplayBuffer((1,), g, 1000, policy="in_place", reinit_probability=0.05)
    buffer.ages += 1
    fresh = sum(int((buffer.draw(1000, g)[2] == 0).sum()) for _ in range(100))
    assert abs(fresh - 5000) < 5 * (100_000 * 0.05 * 0.95) ** 0.5


def test_ages_follow_their_chains():
    g = generator()
    for policy in ("fifo", "in_place"):
        buffer = ReplayBuffer((1,), g, 64, 16, 0.0, policy)
        for _ in range(20):
            chains, places, ages, labels = buffer.draw(16, g)
            chains = ages.float().unsqueeze(1) + 5  # a chain's value is its age
            buffer.put(chains, places, ages + 5, labels)
        used = buffer.ages[: buffer.size]
        lived = used > 0
        assert lived.any() and torch.equal(buffer.chains[: buffer.size, 0][lived], used[lived].float())


def test_start_is_uniform_noise_or_noisy_class_means():
    buffer = ReplayBuffer((1, 28, 28), generator(), 512, policy="in_place")
    assert abs(buffer.chains.mean()) < 0.01 and abs(buffer.chains.var() - 1 / 3) < 0.01
    means = torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    buffer = ReplayBuffer(
        (1, 4, 4),
        generator(),
        512,
        policy="in_place",
        init="class_means",
        init_noise_std=0.1,
        class_means=lambda: means,
    )
    per_chain = buffer.chains.mean(dim=(1, 2, 3))
    assert bool((per_chain.abs() - 0.5).abs().max() < 0.2)
    assert 0.4 < (per_chain > 0).float().mean() < 0.6
    with pytest.raises(ValueError, match=r"2 means for energy\.classes=3"):
        ReplayBuffer((1, 4, 4), generator(), init="class_means", class_means=lambda: means, classes=3)


def test_a_share_of_the_fresh_chains_starts_at_the_data():
    """Images are 10 and 30, of classes 1 and 2; noise is normal."""
    images, labels = torch.tensor([10.0, 30.0]).view(2, 1), torch.tensor([1, 2])
    how = {"policy": "in_place", "start": "normal", "init_noise_std": 0.5}
    buffer = ReplayBuffer((1,), generator(), 4000, data_share=0.25, images=(images, labels), classes=3, **how)
    x, its = buffer.chains.flatten(), buffer.labels
    near = x > 5
    assert 0.22 < near.float().mean() < 0.28 and 0.4 < (x[near] > 20).float().mean() < 0.6
    assert torch.equal(its[near], torch.where(x[near] > 20, 2, 1)) and its[~near].unique().tolist() == [0, 1, 2]
    assert kstest(x[~near].numpy(), "norm").pvalue > 0.01
    assert kstest(((x[near] - 10 - 20 * (x[near] > 20)) / 0.5).numpy(), "norm").pvalue > 0.01
    bytes_of = torch.full((5, 1, 2, 2), 255, dtype=torch.uint8)
    buffer = ReplayBuffer(
        (1, 2, 2), generator(), 8, data_share=1.0, images=(bytes_of, None), **how | {"init_noise_std": 0}
    )
    assert torch.equal(buffer.chains, torch.ones(8, 1, 2, 2)) and not buffer.labels.any()
    with pytest.raises(ValueError, match=r"buffer\.data_share needs images"):
        ReplayBuffer((1,), generator(), data_share=0.5)


def test_state_goes_on_alike():
    def make() -> ReplayBuffer:
        return ReplayBuffer((2,), generator(), 32, 8, 0.5, "fifo")

    first, g = make(), generator(5)
    for _ in range(7):
        chains, places, ages, labels = first.draw(8, g)
        first.put(chains + 0.01, places, ages + 1, labels)
    second = make()
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(first.draw(8, generator(9))[:3], second.draw(8, generator(9))[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert second.front == first.front and second.size == first.size


BAD = [{"capacity": 0}, {"reinit_probability": 1.5}, {"policy": "lifo"}, {"initial": 99999}, {"init": "zeros"}]


@pytest.mark.parametrize("setting", [*BAD, {"data_share": 2}, {"start": "zeros"}])
def test_bad_settings_name_their_key(setting):
    with pytest.raises(ValueError, match=rf"buffer\.{next(iter(setting))} must be"):
        ReplayBuffer((2,), generator(), **setting)


def test_random_affine():
    x = torch.rand(3, 2, 9, 9, generator=generator())
    torch.testing.assert_close(random_affine(x, generator()), x)
    torch.testing.assert_close(random_affine(x, generator(), flip=1.0), x.flip(3))

    dot = torch.full((4000, 1, 33, 33), -1.0)
    dot[:, :, 15:18, 25:28] = 1.0  # 10 pixels to the right of the middle
    pixels = torch.arange(33.0) - 16

    def place(x):
        """(right, down) of the ink's centre from the middle of the image, and the ink."""
        ink = (x[:, 0] + 1) / 2
        total = ink.sum(dim=(1, 2))
        return (ink.sum(dim=1) @ pixels) / total, (ink.sum(dim=2) @ pixels) / total, total

    right, down, _ = place(random_affine(dot, generator(), rotation=40.0))
    torch.testing.assert_close(torch.hypot(right, down), torch.full((4000,), 10.0), rtol=0, atol=0.1)
    assert kstest(torch.atan2(down, right).rad2deg().numpy(), "uniform", (-40, 80)).pvalue > 1e-3
    right, down, _ = place(random_affine(dot, generator(), shift=0.1))
    for moved in (right - 10, down):
        assert kstest(moved.numpy(), "uniform", (-3.3, 6.6)).pvalue > 1e-3
    right, down, ink = place(random_affine(dot, generator(), scale=0.2))
    torch.testing.assert_close(ink / 9, (right / 10) ** 2, rtol=0, atol=0.1)
    assert kstest(right.numpy() / 10, "uniform", (0.8, 0.4)).pvalue > 1e-3


def test_drawn_chains_are_augmented_with_its_probability_and_the_stored_ones_stay():
    augment = {"probability": 0.25, "flip": 1.0}
    buffer = ReplayBuffer((1, 4, 4), generator(), 2000, reinit_probability=0.0, policy="in_place", augment=augment)
    kept = buffer.chains.clone()
    chains, places, _, _ = buffer.draw(2000, generator(1))
    flipped = (chains - kept[places].flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert 0.2 < flipped.float().mean() < 0.3
    assert torch.equal(chains[~flipped], kept[places][~flipped]) and torch.equal(buffer.chains, kept)
    assert random_affine(torch.zeros(0, 1, 4, 4), generator(), rotation=9).shape == (0, 1, 4, 4)  # none was chosen
