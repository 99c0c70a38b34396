import pytest
import torch

from ebm.losses import ContrastiveDivergence
from ebm.optim import ExponentialDecay, PolynomialDecay, adam


def test_against_a_computation_by_hand():
    """E(x) = x: data 1, 3 and negatives −1, 0 give cd = 2 + 0.5 and mean squares 5 and 0.5."""
    x_data, x_model = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0], [0.0]])
    loss, logs = ContrastiveDivergence(alpha=0.1, noise_std=0.0, bounds=None)(
        lambda x: x.squeeze(1), x_data, x_model, torch.Generator()
    )
    assert loss.item() == pytest.approx(2.5 + 0.1 * 5.5)
    assert logs.pop("e_model").tolist() == [-1.0, 0.0]
    want = {"loss": 3.05, "cd": 2.5, "energy_l2": 0.55, "score_real": -2.0, "score_fake": 0.5}
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(want)


def test_data_get_noise_and_clamp_and_negatives_do_not():
    seen = []

    def energy(x):
        seen.append(x)
        return x.flatten(1).sum(dim=1)

    x = torch.ones(4000, 1)
    ContrastiveDivergence(noise_std=0.01)(energy, x, x, torch.Generator().manual_seed(0))
    (both,) = seen  # one forward pass
    data, model = both[:4000], both[4000:]
    assert torch.equal(model, x) and data.max() == 1 and torch.equal(x, torch.ones(4000, 1))
    below = data[data < 1]
    assert 0.45 < len(below) / 4000 < 0.55
    assert (below - 1).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_schedules():
    assert [ExponentialDecay(0.97)(epoch, 0.5) for epoch in (0, 1, 2)] == pytest.approx([1, 0.97, 0.97**2])
    assert [PolynomialDecay(0.1, 1)(9, progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
    assert [PolynomialDecay(0.2, 2)(9, progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.4, 0.2])


@pytest.mark.parametrize(
    "build, key",
    [
        (lambda: ContrastiveDivergence(alpha=-1), "loss.alpha"),
        (lambda: ContrastiveDivergence(noise_std="a"), "loss.noise_std"),  # type: ignore[arg-type]
        (lambda: adam([], lr=0), "optimizer.lr"),
        (lambda: adam([], beta1=1.0), "optimizer.beta1"),
        (lambda: ExponentialDecay(0), "scheduler.gamma"),
        (lambda: PolynomialDecay(2), "scheduler.final_factor"),
        (lambda: PolynomialDecay(power=0), "scheduler.power"),
    ],
)
def test_bad_settings_name_their_key(build, key):
    with pytest.raises(ValueError, match=f"{key} must be"):
        build()
