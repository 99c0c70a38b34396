from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from ebm.batches import Batches
from ebm.transport import PairedBatches, optimal_order


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(count=st.integers(1, 6), size=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_no_other_order_is_shorter(count, size, seed):
    x0, x1 = torch.randn(2, count, size, 1, generator=generator(seed))

    def length(order: Tensor) -> float:
        return float((x0[order] - x1).double().square().sum())

    order = optimal_order(x0, x1)
    assert sorted(order.tolist()) == list(range(count))
    best = min(length(torch.tensor(other)) for other in permutations(range(count)))
    assert length(order) == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_on_a_line_it_is_the_sorted_one():
    x0, x1 = torch.randn(2, 200, 1, generator=generator())
    assert torch.equal(x0[optimal_order(x0, x1)].flatten().argsort(), x1.flatten().argsort())


IMAGES = torch.rand(70, 1, 2, 2, generator=generator()) * 2 - 1


def batches(rank: int = 0, ranks: int = 1, flip: float = 0.0) -> PairedBatches:
    return PairedBatches(IMAGES, 16, generator(), rank, ranks, torch.arange(70), flip)


def test_the_data_come_in_epochs_and_the_noise_is_normal():
    paired = batches()
    epochs = [[paired.next() for _ in range(4)] for _ in range(200)]
    for epoch in epochs[:2]:
        x, labels = (torch.cat([batch[part] for batch in epoch]) for part in (0, 1))
        assert len(labels.unique()) == 64 and torch.equal(x, IMAGES[labels])
    noise = torch.cat([x0 for epoch in epochs for _, _, x0 in epoch])
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    for x1, _, x0 in epochs[0]:
        assert torch.equal(optimal_order(x0, x1), torch.arange(16))


def test_it_goes_on_where_it_was_and_draws_from_no_other_generator():
    first, outer = batches(flip=0.5), generator()
    before = outer.get_state()
    for _ in range(6):
        first.next()
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in first.state_dict().items()}
    second = PairedBatches(IMAGES, 16, outer, labels=torch.arange(70), flip=0.5)
    for _ in range(3):
        second.next()
    second.load_state_dict(state)
    for _ in range(9):
        for ours, theirs in zip(first.next(), second.next(), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(outer.get_state(), before)


def test_two_ranks_share_a_batch_and_its_noise():
    whole, parts = batches(), [batches(rank, 2) for rank in (0, 1)]
    for _ in range(5):
        _, labels, x0 = whole.next()
        shares = [part.next() for part in parts]
        assert torch.equal(torch.stack([share[1] for share in shares], dim=1).flatten(), labels)
        for its_x1, _, its_x0 in shares:
            assert torch.equal(optimal_order(its_x0, its_x1), torch.arange(8))
        noise = torch.cat([share[2] for share in shares])
        assert torch.equal(noise.flatten().sort().values, x0.flatten().sort().values)


def test_batches_as_they_are_have_no_noise():
    assert Batches(IMAGES, 16, generator()).next()[1:] == (None, None)
