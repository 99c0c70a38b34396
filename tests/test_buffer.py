import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebm.buffer import ReplayBuffer


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
            with pytest.raises(ValueError, match=r"buffer\.(initial|capacity) must be at least the batch size"):
                buffer.draw(count, g)
            continue
        chains, places, ages = buffer.draw(count, g)
        assert len(set(places.tolist())) == count  # distinct chains
        stored = buffer.chains[places]
        old = (chains == stored).flatten()
        assert bool((ages[~old] == 0).all())
        assert bool(old.all()) if probability == 0 else not bool(old.any()) if probability == 1 else True
        marks = torch.full((count, 1), 10.0 + call)  # not a value of any other call
        buffer.put(marks, places, ages + 7)
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
            chains, places, ages = buffer.draw(16, g)
            chains = ages.float().unsqueeze(1) + 5  # a chain's value is its age
            buffer.put(chains, places, ages + 5)
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


def test_state_goes_on_alike():
    def make() -> ReplayBuffer:
        return ReplayBuffer((2,), generator(), 32, 8, 0.5, "fifo")

    first, g = make(), generator(5)
    for _ in range(7):
        chains, places, ages = first.draw(8, g)
        first.put(chains + 0.01, places, ages + 1)
    second = make()
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(first.draw(8, generator(9)), second.draw(8, generator(9)), strict=True):
        assert torch.equal(ours, theirs)
    assert second.front == first.front and second.size == first.size


@pytest.mark.parametrize(
    "setting", [{"capacity": 0}, {"reinit_probability": 1.5}, {"policy": "lifo"}, {"initial": 99999}, {"init": "zeros"}]
)
def test_bad_settings_name_their_key(setting):
    with pytest.raises(ValueError, match=rf"buffer\.{next(iter(setting))} must be"):
        ReplayBuffer((2,), generator(), **setting)
