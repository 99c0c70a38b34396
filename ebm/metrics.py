"""Numbers from scores and samples. NaN is an error everywhere."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ebm.data import scaled
from ebm.sampler import frozen


def scores(
    energy: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 256, device: str | torch.device = "cpu"
) -> NDArray[np.float64]:
    """−E(x) (N,) of bytes or floats x (N, *shape). Raises ValueError where one is not finite."""
    with frozen(energy), torch.no_grad():
        parts = [-energy(scaled(part.to(device))) for part in x.split(batch_size)]
    result = torch.cat(parts).double().cpu().numpy()
    if not np.isfinite(result).all():
        raise ValueError(f"{(~np.isfinite(result)).sum()} of {len(result)} scores are not finite")
    return result


def auroc(inliers: NDArray[np.float64], outliers: NDArray[np.float64]) -> float:
    """Probability that an inlier scores higher than an outlier, ties counting half, in [0, 1]."""
    labels = np.concatenate([np.ones(len(inliers)), np.zeros(len(outliers))])
    return float(roc_auc_score(labels, np.concatenate([inliers, outliers])))


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of images (N, C, H, W) whose values span 2: 10 log₁₀(2² / MSE)."""
    mse = (x - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse)
