"""Every number against a closed form, a reference library or a case small enough to do by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.image.kid import KernelInceptionDistance

from ebm.energies import ConvEnergy, MLPEnergy
from ebm.evaluation import metrics

SOME = st.lists(st.integers(0, 6), min_size=1, max_size=30)  # few values: many ties


def floats(values: list[int]) -> metrics.Array:
    return np.array(values, dtype=np.float64)


def test_separation_by_hand_with_ties() -> None:
    inliers, outliers = floats([3, 2, 2, 1]), floats([2, 1, 0, 0])
    # Pairs: 3 beats four; each 2 ties one and beats three; 1 ties one and beats two.
    assert metrics.auroc(inliers, outliers) == (4 + 2 * 3.5 + 2.5) / 16
    # Thresholds 3, 2, 1: recall 1/4, 3/4, 1 at precision 1, 3/4, 4/6.
    assert metrics.aupr(inliers, outliers) == pytest.approx(1 / 4 + 3 / 8 + 1 / 6)
    # From below, thresholds 0, 1, 2: recall 2/4, 3/4, 1 at precision 1, 3/4, 4/7.
    assert metrics.aupr_out(inliers, outliers) == pytest.approx(1 / 2 + 3 / 16 + 1 / 7)
    assert metrics.fpr95(inliers, outliers) == 2 / 4  # all four inliers need the threshold 1


def test_fpr95_lets_one_inlier_in_twenty_go() -> None:
    inliers = np.arange(20.0)
    assert metrics.fpr95(inliers, np.array([0.0, 0.5])) == 0
    assert metrics.fpr95(inliers[:19], np.array([0.0, 0.5])) == 1


@given(SOME, SOME)
@settings(deadline=None, max_examples=60)
def test_counts_of_the_bootstrap_give_what_scikit_learn_gives(a: list[int], b: list[int]) -> None:
    inliers, outliers = floats([7, *a]), floats([-1, *b])
    high_to_low = np.arange(7, -2, -1)
    counts = ((x[None] == high_to_low[:, None]).sum(axis=1) for x in (inliers, outliers))
    labels, both = np.repeat([1, 0], [len(inliers), len(outliers)]), np.concatenate([inliers, outliers])
    found = metrics._separation_of_counts(*counts)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, both))
    assert found["aupr"] == pytest.approx(average_precision_score(labels, both))
    assert found["aupr_out"] == pytest.approx(average_precision_score(1 - labels, -both))
    assert found["fpr95"] == pytest.approx(metrics.fpr95(inliers, outliers))


def test_bootstrap_interval_of_auroc_has_the_width_of_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    inliers, outliers = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
    low, high = metrics.separation_ci95(inliers, outliers, 400, rng)["auroc"]
    value = metrics.auroc(inliers, outliers)
    assert value == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.03)  # Φ(1/√2)
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)  # Hanley & McNeil 1982
    variance = (value * (1 - value) + 1999 * (q1 - value**2) + 1999 * (q2 - value**2)) / 2000**2
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.2)
    assert low < value < high


@pytest.mark.parametrize("bad", [floats([1, 1]), np.array([1.0, np.nan]), np.array([1.0, np.inf])])
def test_nan_and_constant_scores_are_errors(bad: metrics.Array) -> None:
    with pytest.raises(ValueError, match=r"constant|finite"):
        metrics.separation(bad, floats([1, 1]))


@pytest.mark.parametrize("energy", [ConvEnergy(hidden=4), MLPEnergy((1, 28, 28), hidden=16)])
def test_batch_size_changes_no_bit(energy: torch.nn.Module) -> None:
    x = torch.rand(37, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for function in (metrics.scores, metrics.gradient_norms):
        reference = function(energy, x, 256)
        for batch_size in (1, 7, 8, 24):
            assert np.array_equal(function(energy, x, batch_size), reference)


def test_gradient_norm_and_typicality_of_a_paraboloid() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / 10
    values = metrics.gradient_norms(lambda x: x.square().sum(dim=1), x)
    assert values == pytest.approx([-1.0, 0.0])
    assert metrics.typicality(floats([0, 2, 4]), floats([1, 3])).tolist() == [-2, 0, -2]


def test_ensemble_is_in_units_of_each_members_training_scores() -> None:
    train = [floats([0, 2]), floats([100, 300])]
    mean, spread = metrics.ensemble([floats([1, 3]), floats([200, 100])], train)
    assert mean.tolist() == [0, 0.5]
    assert spread.tolist() == [0, -1.5]
    with pytest.raises(ValueError, match="constant"):
        metrics.ensemble(train, [floats([1, 1]), floats([1, 2])])


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_a_loop_over_bins(bins: int) -> None:
    """With confidences of exactly 0, 1 and every edge: each is in one of the bins, and no bin is beyond 1."""
    rng = np.random.default_rng(0)
    edges = np.linspace(0, 1, bins + 1)
    confidence = np.concatenate([rng.random(200), edges, edges, np.ones(7), np.zeros(3)])
    correct = (rng.random(len(confidence)) < confidence**2).astype(float)
    want = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if edges[b] <= c < edges[b + 1] or (b == bins - 1 and c == 1)]
        if inside:
            want += len(inside) / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error(confidence, correct, bins) == pytest.approx(want)


def test_a_sure_and_a_nearly_sure_answer_are_in_one_bin() -> None:
    """The one of confidence 1 is wrong, the other right: half of their bin is right."""
    logits = torch.tensor([[100.0, 0.0], [8.0, 0.0]], dtype=torch.float64)
    confidence = 1 / (1 + math.exp(-8))
    found = metrics.classification(logits, torch.tensor([1, 0]))
    assert found["calibration_error"] == pytest.approx((1 + confidence) / 2 - 0.5)


def with_moments(mean: list[float], std: list[float]) -> torch.Tensor:
    """Four points whose mean and covariance (of the sample) are exactly these, without correlation."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    return torch.tensor(mean) + torch.tensor(std) * signs * math.sqrt(3 / 4)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    a, b = with_moments([0, 0], [1, 2]), with_moments([3, 4], [2, 5])
    assert metrics.frechet(a, b) == pytest.approx(9 + 16 + (1 - 2) ** 2 + (2 - 5) ** 2)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_interval_lies_around_the_value() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 3)))
    low, high = metrics.frechet_ci95(x[:100], x[100:] + 1, 50, rng)
    assert low < metrics.frechet(x[:100], x[100:] + 1) < high


def test_kernel_distance_by_hand_and_against_torchmetrics() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    rng = np.random.default_rng(0)
    # k(x, y) = (xy + 1)³: within 1 and 27; across 1, 1, 8, 27.
    assert metrics.kernel_distance(a, b, 2, rng)[0] == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)

    class AsTheyAre(torch.nn.Identity):
        num_features = 5

    x, y = (torch.from_numpy(rng.normal(size=(40, 5))) for _ in range(2))
    reference = KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=40)
    reference.update(x, real=True)
    reference.update(y + 0.3, real=False)
    value, (low, high) = metrics.kernel_distance(x, y + 0.3, 100, rng)
    assert value == pytest.approx(float(reference.compute()[0]))
    assert low < value < high


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    values = [
        metrics.kernel_distance(*(torch.from_numpy(rng.normal(size=(8, 2))) for _ in range(2)), 2, rng)[0]
        for _ in range(400)
    ]
    assert abs(np.mean(values)) < 5 * np.std(values) / 20


def test_manifold_quality_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # 1-NN radii 1, 1, 1, 8
    fake = torch.tensor([[0.5], [2.5], [30.0]])  # 1-NN radii 2, 2, 27.5
    values = metrics.manifold_quality(real, fake, k=1)
    assert values["precision"].tolist() == [1, 1, 0]
    assert values["recall"].tolist() == [1, 1, 1, 1]  # 10 is within 27.5 of 30
    assert values["density"].tolist() == [2, 2, 0]  # 0.5: by 0 and 1; 2.5: by 2 and 10
    assert values["coverage"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="more than k=4"):
        metrics.manifold_quality(real, fake, k=4)


def test_manifold_quality_of_one_law_and_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(300, 4, generator=generator) for _ in range(3))
    alike, apart = metrics.manifold_quality(a, b), metrics.manifold_quality(a, c + 50)
    assert alike["density"].mean() == pytest.approx(1, abs=0.15)
    assert alike["coverage"].mean() == pytest.approx(1 - 0.5**5, abs=0.05)  # Naeem et al. 2020, equation 6
    assert all(values.mean() == 0 for values in apart.values())


def test_entropy() -> None:
    assert metrics.entropy(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert metrics.entropy(np.array([3, 3, 0, 0])) == pytest.approx(0.5)
    assert metrics.entropy(np.array([0, 7])) == 0
    low, high = metrics.entropy_ci95(np.array([10, 30]), 200, np.random.default_rng(0))
    assert low < metrics.entropy(np.array([10, 30])) < high


def test_nearest_finds_a_copy_at_distance_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(256, (50, 1, 4, 4), generator=generator, dtype=torch.uint8)
    distance, index = metrics.nearest(reference[[7, 3]], reference, chunk=20)
    assert index.tolist() == [7, 3]
    assert distance.tolist() == [0, 0]
    distance, _ = metrics.nearest(torch.ones(1, 1, 4, 4), -torch.ones(3, 1, 4, 4))
    assert distance.tolist() == [8]


def autoregression(rho: float, chains: int, draws: int, seed: int = 0) -> metrics.Array:
    noise = np.random.default_rng(seed).normal(size=(chains, draws)) * math.sqrt(1 - rho**2)
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.6, 0.9])
def test_chains_of_an_autoregression(rho: float) -> None:
    x = autoregression(rho, 8, 20_000)
    assert metrics.autocorrelation(x)[:6] == pytest.approx(rho ** np.arange(6), abs=0.03)
    assert metrics.effective_sample_size(x) == pytest.approx(x.size * (1 - rho) / (1 + rho), rel=0.1)
    assert metrics.split_rhat(x) == pytest.approx(1, abs=0.005)


def test_rhat_sees_chains_apart_and_chains_that_drift() -> None:
    x = autoregression(0.0, 4, 1000)
    shift = np.array([[0.0], [0.0], [0.0], [3.0]])
    halves = 1 + np.array([0, 0, 0, 3]).var(ddof=0) * 8 / 7  # var⁺/W of halves with unit variance
    assert metrics.split_rhat(x + shift) == pytest.approx(math.sqrt(halves), rel=0.03)
    assert metrics.split_rhat(x + np.linspace(0, 5, 1000)) > 1.3  # all drift alike: only their halves differ
    assert metrics.effective_sample_size(x + shift) < 20
    with pytest.raises(ValueError, match="constant"):
        metrics.split_rhat(np.ones((4, 100)))
    assert metrics.split_rhat(np.repeat([[0.0, 1.0], [0.0, 2.0]], 50, axis=1)) == math.inf
    assert metrics.split_rhat(np.repeat([[0.1], [0.3]], 50, axis=1)) == math.inf
    with pytest.raises(ValueError, match="constant"):
        metrics.autocorrelation(np.repeat([[0.1], [0.3]], 50, axis=1))
    with pytest.raises(ValueError, match="finite"):
        metrics.split_rhat(np.full((4, 100), np.nan))
