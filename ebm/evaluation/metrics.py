"""Numbers from scores, samples and chains. NaN is an error everywhere, and no draw comes from a global generator.

Intervals are 95 % bootstrap intervals [low, high] from a NumPy generator. Of a statistic that is biased at a
finite number of samples (the Fréchet distance) they are centred on the value: the bias stays, as in the value.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebm import check
from ebm.data import scaled
from ebm.sampling.chains import GROUP, Energy, padded
from ebm.sampling.sgld import frozen

Array = NDArray[np.float64]
Interval = list[float]  # [low, high]


# --- scores ---------------------------------------------------------------------------------------------------------


def in_batches(function: Energy, x: Tensor, batch_size: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """function(x) (N, …) of bytes or floats x (N, *shape), `batch_size` at a time on `device`; it is on the CPU.

    With device cpu it does not depend on `batch_size`: it is rounded down to a multiple of GROUP (at least GROUP) and
    the last batch is filled up to one, since kernels for fewer images round otherwise.
    """
    parts = []
    for part in x.split(max(batch_size // GROUP, 1) * GROUP):
        parts.append(function(scaled(padded(part).to(device)))[: len(part)].cpu())
    return torch.cat(parts)


def _finite(values: Tensor, what: str) -> Array:
    result = values.double().numpy()
    check.that(np.isfinite(result).all(), f"{(~np.isfinite(result)).sum()} of {len(result)} {what} are not finite")
    return result


def scores(energy: Energy, x: Tensor, batch_size: int = 256, device: str | torch.device = "cpu") -> Array:
    """−E(x) (N,) of bytes or floats x (N, *shape). Raises ValueError where one is not finite."""
    with frozen(energy), torch.no_grad():
        return _finite(in_batches(lambda part: -energy(part), x, batch_size, device), "scores")


def value_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """(E(x) (B,), ∇E(x) (B, *shape)), in whatever grad mode."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = energy(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def gradient_norms(energy: Energy, x: Tensor, batch_size: int = 256, device: str | torch.device = "cpu") -> Array:
    """−‖∇E(x)‖₂ (N,), the "approximate mass" of JEM (Grathwohl et al. 2020, section 5.3): near 0 on a mode's top or
    a plateau, far below on slopes. Raises ValueError where one is not finite."""

    def norms(part: Tensor) -> Tensor:
        return -value_and_gradient(energy, part)[1].flatten(1).norm(dim=1)

    with frozen(energy):
        return _finite(in_batches(norms, x, batch_size, device), "gradient norms")


def typicality(values: Array, train: Array) -> Array:
    """−|s − mean s_train| (N,) of scores s = −E(x): low where an image is less *or more* likely than training images
    are (Nalisnick et al. 2019, "Detecting out-of-distribution inputs … using typicality", for single images)."""
    return -np.abs(values - train.mean())


def ensemble(members: list[Array], train: list[Array]) -> tuple[Array, Array]:
    """(mean, −spread) over K ≥ 2 energies of the scores (N,), each in standard deviations of its training scores:
    energies have no common zero or unit. Raises ValueError where the training scores of one are constant."""
    if any(values.std() == 0 for values in train):
        raise ValueError("an ensemble needs scores that vary over the training images, one energy's are constant")
    z = np.stack([(s - at_train.mean()) / at_train.std() for s, at_train in zip(members, train, strict=True)])
    return z.mean(axis=0), -z.std(axis=0)


# --- outliers -------------------------------------------------------------------------------------------------------


def _labelled(inliers: Array, outliers: Array) -> tuple[NDArray[np.int64], Array]:
    both = np.concatenate([inliers, outliers]).astype(np.float64)
    check.that(np.isfinite(both).all(), "scores must be finite to be ranked")
    check.that(both.min() < both.max(), f"all {len(both)} scores are {both[0]:g}: constant scores rank nothing")
    return np.repeat([1, 0], [len(inliers), len(outliers)]), both


def auroc(inliers: Array, outliers: Array) -> float:
    """Probability that an inlier scores higher than an outlier, ties counting half, in [0, 1]."""
    from sklearn.metrics import roc_auc_score  # takes two seconds to import

    return float(roc_auc_score(*_labelled(inliers, outliers)))


def aupr(inliers: Array, outliers: Array) -> float:
    """Average precision Σ (Rₙ − Rₙ₋₁) Pₙ in [0, 1], the inliers (high scores) being what is looked for."""
    from sklearn.metrics import average_precision_score  # takes two seconds to import

    return float(average_precision_score(*_labelled(inliers, outliers)))


def aupr_out(inliers: Array, outliers: Array) -> float:
    """Average precision in [0, 1], the outliers (low scores) being what is looked for."""
    return aupr(-outliers, -inliers)


def fpr95(inliers: Array, outliers: Array) -> float:
    """Share of outliers at or above the highest threshold that at least 95 % of the inliers reach."""
    from sklearn.metrics import roc_curve  # takes two seconds to import

    fpr, tpr, _ = roc_curve(*_labelled(inliers, outliers), drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def separation(inliers: Array, outliers: Array) -> dict[str, float]:
    """The four numbers above, by name. NaN and constant scores raise ValueError."""
    return {function.__name__: function(inliers, outliers) for function in (auroc, aupr, aupr_out, fpr95)}


def separation_ci95(inliers: Array, outliers: Array, resamples: int, rng: np.random.Generator) -> dict[str, Interval]:
    """Percentile intervals of `separation`, inliers and outliers resampled each on their own.

    One sort serves all resamples: a resample is a count of how often each distinct score was drawn.
    """
    distinct, places = np.unique(np.concatenate([inliers, outliers]), return_inverse=True)
    ranks = np.split(len(distinct) - 1 - places, [len(inliers)])  # of each image's score: 0 is the highest
    drawn = []
    for _ in range(resamples):
        counts = [np.bincount(_resampled(part, rng), minlength=len(distinct)) for part in ranks]
        drawn.append(_separation_of_counts(*counts))
    return {name: interval(np.array([found[name] for found in drawn])) for name in drawn[0]}


def _resampled(x: Any, rng: np.random.Generator) -> Any:
    """As many of `x`, drawn from them with replacement."""
    return x[rng.integers(len(x), size=len(x))]


def _separation_of_counts(inliers: NDArray[np.int64], outliers: NDArray[np.int64]) -> dict[str, float]:
    """`separation` of scores given as counts per distinct score, highest first."""
    tp, fp = inliers.cumsum(), outliers.cumsum()
    found = {"auroc": float((outliers * (tp - inliers / 2)).sum() / (tp[-1] * fp[-1]))}
    for name, hits, misses in (("aupr", inliers, outliers), ("aupr_out", outliers[::-1], inliers[::-1])):
        right, wrong = hits.cumsum(), misses.cumsum()
        found[name] = float((hits * right / np.maximum(right + wrong, 1)).sum() / right[-1])
    return found | {"fpr95": float(fp[np.argmax(tp / tp[-1] >= 0.95)] / fp[-1])}


def interval(resampled: Array, centre: float | None = None) -> Interval:
    """[2.5 %, 97.5 %] quantiles of resampled values; with `centre`, shifted so that their mean lies there."""
    shift = 0.0 if centre is None else centre - resampled.mean()
    return [float(q + shift) for q in np.quantile(resampled, [0.025, 0.975])]


def mean_ci95(values: Array, resamples: int, rng: np.random.Generator) -> Interval:
    """Percentile interval of the mean of values (N,)."""
    return interval(np.array([_resampled(values, rng).mean() for _ in range(resamples)]))


# --- classification -------------------------------------------------------------------------------------------------


def classification(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Array]:
    """Of logits (N, classes) for images with these labels: accuracy, confidence max p(y | x) and nll −log p(y | x) of
    each (N,), and the expected calibration error in `bins` equal bins of confidence (Guo et al. 2017, section 3).

    Raises ValueError for logits that are not finite.
    """
    _finite(logits.flatten(), "logits")
    log_p = logits.double().log_softmax(dim=1)
    confidence, predicted = log_p.exp().max(dim=1)
    nll = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    tensors = {"accuracy": (predicted == labels).double(), "confidence": confidence, "nll": nll}
    found = {name: value.numpy() for name, value in tensors.items()}
    error = calibration_error(found["confidence"], found["accuracy"], bins)
    return found | {"calibration_error": np.array(error)}


def calibration_error(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Σ_b (n_b/N)·|mean correct − mean confidence| over `bins` equal bins [low, high) of confidence (N,) in [0, 1]; the
    last one holds 1, too. torchmetrics' own has a bin more for those of exactly 1."""
    differences, _ = np.histogram(confidence, bins, (0, 1), weights=correct - confidence)
    return float(np.abs(differences).sum() / len(confidence))


# --- samples --------------------------------------------------------------------------------------------------------


def frechet(real: Tensor, fake: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of features (N, D) and (M, D): the squared Fréchet distance of the
    Gaussians with their moments (Heusel et al. 2017). "FID" is its name with Inception's features alone.

    It is biased upwards by about D/N: compare at equal N, and with real images against real ones.
    Raises ValueError for features that are not finite and for fewer than two of them.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes a second to import

    _check_features(real, fake)
    as_they_are = nn.Identity()
    as_they_are.num_features = real.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=as_they_are)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(float(metric.compute()), 0.0)


def frechet_ci95(real: Tensor, fake: Tensor, resamples: int, rng: np.random.Generator) -> Interval:
    """Interval of `frechet` by resampling both sides, centred on the value at these numbers of samples."""
    drawn = [frechet(_resampled(real, rng), _resampled(fake, rng)) for _ in range(resamples)]
    return interval(np.array(drawn), frechet(real, fake))


def kernel_distance(real: Tensor, fake: Tensor, resamples: int, rng: np.random.Generator) -> tuple[float, Interval]:
    """Unbiased MMD² with the kernel (a·b/D + 1)³ of features (N, D) and (M, D), as KID (Bińkowski et al. 2018), and
    its interval: (value, [low, high]). About 0, and as often below, where both come from one law.

    An image drawn twice into a resample is not compared with itself, which would bias it upwards.
    """
    _check_features(real, fake)
    real, fake = real.double(), fake.double()
    n, m = len(real), len(fake)

    def times_drawn(count: int) -> Tensor:
        """(1 + resamples, count): how often each image is in the sample itself, once, and in each resample."""
        resampled = rng.multinomial(count, np.full(count, 1 / count), resamples)
        return torch.from_numpy(np.vstack([np.ones(count), resampled]))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor, weights: Tensor) -> Tensor:
        pairs = weights.sum(dim=1) ** 2 - weights.square().sum(dim=1)
        return (weights @ kernel(x, x).fill_diagonal_(0) * weights).sum(dim=1) / pairs

    a, b = times_drawn(n), times_drawn(m)
    values = within(real, a) + within(fake, b) - 2 * (a @ kernel(real, fake) * b).sum(dim=1) / (n * m)
    return float(values[0]), interval(values[1:].numpy(), float(values[0]))


def _check_features(*features: Tensor) -> None:
    for x in features:
        check.that(len(x) >= 2, f"features of at least 2 images are needed, got {len(x)}")
        check.that(torch.isfinite(x).all(), "features must be finite")


def manifold_quality(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, Array]:
    """Per-image values whose means are the metrics, of features (N, D) and (M, D); manifolds are unions of balls
    around each feature as far as its `k`-th neighbour of the same set.

    precision, recall  share of fakes within the real manifold, of reals within the fakes' (Kynkäänniemi et al. 2019)
    density, coverage  real balls around a fake, over k; share of real balls that hold a fake (Naeem et al. 2020)

    Raises ValueError for k or fewer features on a side.
    """
    _check_features(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"more than k={k} images are needed on both sides, got {len(real)} and {len(fake)}")
    exact = "donot_use_mm_for_euclid_dist"  # the product form rounds small distances away
    real_radii = torch.cdist(real, real, compute_mode=exact).kthvalue(k + 1, dim=1).values
    fake_radii = torch.cdist(fake, fake, compute_mode=exact).kthvalue(k + 1, dim=1).values
    distances = torch.cdist(real, fake, compute_mode=exact)
    in_real, in_fake = distances <= real_radii[:, None], distances <= fake_radii[None]
    values = {"precision": in_real.any(dim=0), "recall": in_fake.any(dim=1)}
    values |= {"density": in_real.sum(dim=0) / k, "coverage": in_real.any(dim=1)}
    return {name: value.double().numpy() for name, value in values.items()}


def entropy(counts: NDArray[np.int64]) -> float:
    """−Σ p ln p / ln(classes) of a histogram (classes ≥ 2,), in [0, 1]: 1 for equal shares, 0 for one class alone."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(counts))) + 0.0


def entropy_ci95(counts: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> Interval:
    """Interval of `entropy` by resampling the images behind the counts, centred on the value."""
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), resamples)
    return interval(np.array([entropy(row) for row in drawn]), entropy(counts))


def nearest(x: Tensor, reference: Tensor, chunk: int = 8192) -> tuple[Array, Tensor]:
    """(distance (N,), index (N,)) of the image of `reference` (M, *shape) nearest to each of `x` (N, *shape), by the
    Euclidean distance of pixels in [−1, 1]; bytes or floats. 0 is a copy."""
    x = scaled(x).flatten(1)
    best, index = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.int64)
    for start in range(0, len(reference), chunk):
        part = scaled(reference[start : start + chunk]).flatten(1)
        squared = part.square().sum(dim=1)[None] - 2 * x @ part.T
        value, place = squared.min(dim=1)
        index = torch.where(value < best, place + start, index)
        best = torch.minimum(value, best)
    exact = (x - scaled(reference[index]).flatten(1)).double().norm(dim=1)  # the product form rounds a copy's 0 away
    return exact.numpy(), index


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of images (N, C, H, W) whose values span 2: 10 log₁₀(2² / MSE)."""
    mse = (x - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse)


# --- chains (Gelman et al. 2013, "Bayesian Data Analysis", sections 11.4 and 11.5) -----------------------------------


def _statistics_of(x: Array) -> Any:
    """arviz' statistics of arrays. Raises ValueError where `x` is no set of chains (M, N)."""
    from arviz_stats.base import array_stats  # takes a second to import

    check.that(x.ndim == 2 and x.shape[1] >= 4, f"chains must be (chains, at least 4 draws), got {x.shape}")
    check.that(np.isfinite(x).all(), "chains must be finite")
    check.that(x.min() < x.max(), "chains that are constant, all alike, have no statistics")
    return array_stats


def autocorrelation(x: Array) -> Array:
    """ρ_t (N,) of a statistic of M chains (M, N), autocovariances averaged over chains; ρ₀ = 1."""
    statistics = _statistics_of(x)
    check.that((x != x[:, :1]).any(), "constant chains have no autocorrelation")
    covariance = statistics.autocov(x).mean(axis=0)
    return covariance / covariance[0]


def split_rhat(x: Array) -> float:
    """R̂ = √(var⁺/W) over the halves of M chains (M, N), W the variance within and var⁺ the pooled estimate: 1 where
    all tell of one law, more where they differ, ∞ where none varies within its halves. Raises ValueError where all
    values are the same."""
    statistics, half = _statistics_of(x), x.shape[1] // 2
    if (x[:, :half] == x[:, :1]).all() and (x[:, -half:] == x[:, -1:]).all():
        return np.inf
    return float(statistics.rhat(x, method="split"))


def effective_sample_size(x: Array) -> float:
    """Independent draws that M chains (M, N) are worth for a mean, from the autocorrelations of their halves up to
    where a pair of them turns negative (Geyer 1992; Vehtari et al. 2021, section 3.2).

    As small as the number of half chains where they do not mix; at most MN log₁₀ MN for chains that swing.
    """
    return float(_statistics_of(x).ess(x, method="mean"))
