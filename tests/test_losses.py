import pytest
import torch
from torch import nn

from ebm.batches import mixed, noised
from ebm.energies import MLPEnergy
from ebm.losses import KL, Batch, Classification, ContrastiveDivergence, EnergyMatching, Sum, Twins
from ebm.optim import ExponentialDecay, PolynomialDecay, adam


def test_against_a_computation_by_hand():
    """E(x) = x: data 1, 3 and negatives −1, 0 give cd = 2 + 0.5 and mean squares 5 and 0.5."""
    x_data, x_model = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0], [0.0]])
    loss, logs = ContrastiveDivergence(alpha=0.1)(lambda x: x.squeeze(1), x_data, x_model, torch.Generator())
    assert loss.item() == pytest.approx(2.5 + 0.1 * 5.5)
    assert logs.pop("e_model").tolist() == [-1.0, 0.0]
    want = {"loss": 3.05, "cd": 2.5, "energy_l2": 0.55, "score_real": -2.0, "score_fake": 0.5}
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(want)


def test_the_difference_without_the_highest_negatives_and_with_a_floor():
    """E(x) = x: data 0, negatives 1 to 10, of which the lowest eight have the mean 4.5."""
    x_data, x_model = torch.zeros(2, 1), torch.arange(10.0, 0, -1).unsqueeze(1).requires_grad_(True)

    def loss_of(**settings) -> tuple[float, list[float]]:
        loss = ContrastiveDivergence(0.0, **settings)
        value, logs = loss(lambda x: x.squeeze(1), x_data, x_model, torch.Generator())
        assert logs["cd"].item() == pytest.approx(-5.5)
        return value.item(), torch.autograd.grad(value, x_model)[0].flatten().tolist()

    assert loss_of(weight=3) == (pytest.approx(-16.5), pytest.approx([-0.3] * 10))
    assert loss_of(trim=0.2) == (pytest.approx(-4.5), pytest.approx([0, 0] + [-0.125] * 8))
    assert loss_of(trim=0.2, weight=2, floor=5) == (pytest.approx(-9), pytest.approx([0, 0] + [-0.25] * 8))
    assert loss_of(floor=5, weight=2) == (pytest.approx(-10), [0] * 10)  # it teaches nothing any more


def paired(count: int, std: float, mean: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (count, 2) and data N(mean, std²), by the optimal map between the two laws."""
    x0 = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, mean + std * x0


class Quadratic(nn.Module):
    """E(x) = a·‖x‖²/2 + b·Σx."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def forward(self, x):
        return (self.a * x.square() / 2 + self.b * x).sum(dim=1)


def matched(energy: nn.Module, x0: torch.Tensor, x1: torch.Tensor, **settings: float):
    generator = torch.Generator().manual_seed(1)
    loss, logs = EnergyMatching(**settings)(energy, x1, None, generator, x_noise=x0)
    assert set(logs) == {"loss"}  # neither negatives nor a pass of the data
    return loss


def test_energy_matching_against_a_computation_by_hand():
    x0, x1 = paired(50, 0.3, 0.5)
    energy = Quadratic(2.0, -1.0)
    t = 0.7 * torch.rand(50, 1, generator=torch.Generator().manual_seed(1))
    slope = 2 * ((1 - t) * x0 + t * x1) - 1
    want = 3 * ((-slope - (x1 - x0)) ** 2).sum(dim=1).mean() / 2
    torch.testing.assert_close(matched(energy, x0, x1, weight=3, until=0.7), want)


@pytest.mark.parametrize(("std", "mean"), [(0.3, 0.5), (1.0, -2.0), (2.0, 0.0)])
def test_energy_matching_of_a_gaussian_ends_at_the_quadratic_energy(std, mean):
    """The pairs of N(0, 1) and N(m, s²) are x₁ = m + s·x₀, so that x_t = t·m + r·x₀, r = 1 − t + t·s, and the best
    energy a·x²/2 + b·x has −a·x − b, the regression of x₁ − x₀ = m + (s − 1)·x₀ on x_t: with means over t, too,

        −a = cov(x₁ − x₀, x_t)/var x_t = (s − 1)·(1 + s)/2 / ((1 + s + s²)/3 + m²/12),   −b = m + a·m/2.
    """
    x0, x1 = paired(200_000, std, mean)
    energy = Quadratic(0.0, 0.0)
    optimizer = torch.optim.LBFGS(energy.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = matched(energy, x0, x1)
        loss.backward()
        return loss

    optimizer.step(closure)
    a = -(std - 1) * (1 + std) / 2 / ((1 + std + std**2) / 3 + mean**2 / 12)
    assert energy.a.item() == pytest.approx(a, abs=0.01)
    assert energy.b.item() == pytest.approx(-(mean + a * mean / 2), abs=0.01)


def test_every_weight_has_a_gradient_of_energy_matching():
    """Also what is added to every energy: torchrun waits for all."""
    energy, (x0, x1) = MLPEnergy((2,), 8), paired(16, 0.3, 0.5)
    matched(energy, x0.float(), x1.float()).backward()
    assert all(parameter.grad is not None for parameter in energy.parameters())
    assert energy.layers[-1].bias.grad.item() == 0


def test_what_a_loss_takes():
    matching, cd, twins = EnergyMatching(), ContrastiveDivergence(), Twins()
    for terms, negatives, pairs in [([cd, twins], True, False), ([twins], False, False), ([matching, cd], True, True)]:
        loss = Sum(dict(zip("ab", terms, strict=False)))
        assert (loss.needs_negatives, loss.needs_pairs) == (negatives, pairs)
    x = torch.zeros(4, 2)
    _, logs = KL()(lambda x: x.square().sum(dim=1), x, x + 1, torch.Generator())
    assert logs["e_model"].tolist() == [2] * 4  # also where the term itself does not ask for it
    with pytest.raises(ValueError, match="needs_negatives = True"):
        Batch(lambda x: x.sum(dim=1), x).e_model.mean()
    with pytest.raises(ValueError, match="in pairs with noise"):
        matching(lambda x: x.sum(dim=1), x, None, torch.Generator())
    with pytest.raises(ValueError, match=r"loss\.kl has the settings .*loss\.kl=null"):
        Sum({"a": cd, "kl": {"steps": 2}})
    assert set(Sum({"a": cd, "kl": None}).terms) == {"a"}


def test_data_and_negatives_go_through_the_energy_together():
    seen = []

    def energy(x):
        seen.append(x)
        return x.flatten(1).sum(dim=1)

    x_data, x_model = torch.rand(5, 3), torch.rand(4, 3)
    loss = Sum({"one": ContrastiveDivergence(), "other": ContrastiveDivergence()})
    loss(energy, x_data, x_model, torch.Generator())
    (both,) = seen  # one forward pass
    assert torch.equal(both, torch.cat([x_data, x_model]))


def test_data_get_noise_and_a_clamp():
    x = torch.ones(4000, 1)
    data = noised(x, 0.01, (-1.0, 1.0), torch.Generator().manual_seed(0))
    assert data.max() == 1 and torch.equal(x, torch.ones(4000, 1))
    below = data[data < 1]
    assert 0.45 < len(below) / 4000 < 0.55
    assert (below - 1).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)
    assert noised(x, 0.01, None, torch.Generator().manual_seed(0)).max() > 1


def test_a_sum_logs_each_term_under_its_name():
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    loss = Sum({"first": ContrastiveDivergence(0.1), "second": ContrastiveDivergence(0.3)})
    value, logs = loss(lambda x: x.sum(dim=1), x, x, torch.Generator())
    squares = 2 * x.sum(dim=1).square().mean()
    torch.testing.assert_close(logs["first"], 0.1 * squares)
    torch.testing.assert_close(logs["second"], 0.3 * squares)
    torch.testing.assert_close(value, 0.4 * squares)
    assert torch.equal(logs["loss"], value)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_kl_term_against_calculus(steps):
    """E = θ|x|²/2: x' = (1 − sθ)ⁿx, and with respect to x' alone d/dθ mean E(x') = mean θ x'·∂x'/∂θ."""
    step_size, weight, start = 0.3, 0.7, torch.tensor([[0.2, 1.0], [-0.6, 0.4], [0.5, -0.9]])
    theta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = start.double()
    loss_function = KL(weight, steps, entropy_weight=0.2, step_size=step_size, grad_clamp=None)
    loss, _ = loss_function(lambda x: theta * x.square().sum(dim=1) / 2, x, x, torch.Generator())
    (gradient,) = torch.autograd.grad(loss, theta)

    shrink = (1 - step_size * 1.5) ** steps
    slope = -steps * step_size * (1 - step_size * 1.5) ** (steps - 1)  # ∂ shrink / ∂θ
    pairs = torch.cdist(shrink * x, x) + torch.diag(torch.full((3,), torch.inf))
    nearest = x[pairs.argmin(dim=1)]
    energy = (1.5 * (shrink * x).square().sum(dim=1) / 2).mean()
    entropy = pairs.amin(dim=1).log().mean()
    assert loss.item() == pytest.approx(weight * (energy - 0.2 * entropy).item())
    away = ((shrink * x - nearest) * slope * x).sum(dim=1) / (shrink * x - nearest).square().sum(dim=1)
    want = (1.5 * shrink * slope * x.square().sum(dim=1)).mean() - 0.2 * away.mean()
    assert gradient.item() == pytest.approx(weight * want.item())


def test_twins_against_a_computation_by_hand():
    """T·log(1 + exp((E(x_i) − E(twin_j))/T)) for all i, j; twins are mirror images, or x itself where nothing turns."""

    class Tilt(torch.nn.Module):
        temperature = 0.5

        def forward(self, x):
            return (x * torch.linspace(-1, 1, 16).view(4, 4)).flatten(1).sum(dim=1)

    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for settings, twins in (({"flip": 1.0, "jitter": 0.1}, x.flip(-1)), ({"jitter": 0.0}, x)):
        loss, logs = Twins(0.7, **settings)(Tilt(), x, x, torch.Generator().manual_seed(0))
        less = torch.stack([Tilt()(x)[i] - Tilt()(twins)[j] for i in range(50) for j in range(50)])
        torch.testing.assert_close(loss, 0.7 * 0.5 * (1 + (less / 0.5).exp()).log().mean())
        assert logs["twins_accuracy"] == (less < 0).float().mean()


@pytest.mark.parametrize("jitter, right", [(0.0, 1.0), (1.0, 0.5)])
def test_jitter_takes_away_the_cue_of_interpolation(jitter, right):
    """An energy that sees only how smooth an image is tells twins by it, unless the real ones are turned as well."""

    def roughness(x):
        return -(x.diff(dim=-1).square().flatten(1).sum(dim=1))

    x = torch.randint(2, (400, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    _, logs = Twins(rotation=45, jitter=jitter)(roughness, x, x, torch.Generator().manual_seed(1))
    assert logs["twins_accuracy"].item() == pytest.approx(right, abs=0.08)


def test_mixed_images_hold_a_rectangle_of_the_one_before():
    """Image i is all i: what is not i is i − 1, fills a rectangle, and its sides and places are as they are said."""
    x = torch.arange(2000.0).view(-1, 1, 1, 1).expand(-1, 3, 20, 50)
    y = mixed(x, torch.Generator().manual_seed(0))
    other = (y != x)[:, 0]
    assert torch.equal(y[:, 0][other], x.roll(1, 0)[:, 0][other]) and torch.equal(y, y[:, :1].expand_as(y))
    for across, size in ((2, 20), (1, 50)):
        lines = other.any(dim=across)  # (B, size): rows, then columns, of the rectangle
        assert (lines.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
        inner = ~lines[:, 0] & ~lines[:, -1]
        share = lines[inner].sum(dim=1) / size
        assert share.min() >= 0.3 - 1 / size and share.max() <= 0.7 + 1 / size
        centre = (lines[inner] * torch.linspace(0, 1, size)).sum(dim=1) / lines[inner].sum(dim=1)
        assert (centre - 0.5).abs().max() <= 0.25 + 1 / size and centre.std() > 0.1
        assert 0.02 < lines[:, 0].float().mean() < 0.1  # 0.05 by the law: some borders lie outside
    rows, columns = other.any(dim=2), other.any(dim=1)
    assert torch.equal(other, rows.unsqueeze(2) & columns.unsqueeze(1))


def test_a_share_of_the_twins_is_mixed():
    """An energy that sees the sum alone: mirror images keep it, mixed ones do not."""

    def total(x):
        return x.flatten(1).sum(dim=1).square()

    x = torch.arange(400.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 400
    for share in (0.0, 0.3, 1.0):
        differences = Twins(jitter=0, flip=1, mix=share).differences(total, x, torch.Generator().manual_seed(2))
        twins = differences[0] + total(x)[0]
        changed = (twins - total(x)).abs() > 1e-3
        assert abs(changed.float().mean() - share) <= 0.08


def test_schedules():
    assert [ExponentialDecay(0.97)(epoch, 0.5) for epoch in (0, 1, 2)] == pytest.approx([1, 0.97, 0.97**2])
    assert [PolynomialDecay(0.1, 1)(9, progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
    assert [PolynomialDecay(0.2, 2)(9, progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.4, 0.2])


@pytest.mark.parametrize(
    "build, key",
    [
        (lambda: Sum({}), "loss"),
        (lambda: ContrastiveDivergence(alpha=-1), "loss.contrastive_divergence.alpha"),
        (lambda: ContrastiveDivergence(weight=-1), "loss.contrastive_divergence.weight"),
        (lambda: ContrastiveDivergence(trim=1), "loss.contrastive_divergence.trim"),
        (lambda: ContrastiveDivergence(floor=-1), "loss.contrastive_divergence.floor"),
        (lambda: EnergyMatching(until=0), "loss.energy_matching.until"),
        (lambda: EnergyMatching(-1), "loss.energy_matching.weight"),
        (lambda: Classification(-1), "loss.classification.weight"),
        (lambda: KL(steps=0), "loss.kl.steps"),
        (lambda: Twins(weight=-1), "loss.twins.weight"),
        (lambda: Twins(rotation=181), "loss.twins.rotation"),
        (lambda: Twins(mix=1.1), "loss.twins.mix"),
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
