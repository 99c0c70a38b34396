"""The state of the chains in numbers: how long they live, how far they step, whether they mix."""

import math

from torch import Tensor, nn

from ebm.energies import temperature_of
from ebm.evaluation.metrics import value_and_gradient
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.sgld import SGLD, frozen

OF_FRESH = ("fresh", "old", "fresh_score", "fresh_reached")


def chain_statistics(
    sampler: SGLD, energy: nn.Module, buffer: ReplayBuffer, x_data: Tensor, x_model: Tensor, y: Tensor | None = None
) -> dict[str, Tensor]:
    """Scalars of the chains x_model (B, *shape), with labels y or without, that a training step ended with, and of the
    buffer at rest:

    age_mean, age_median         SGLD steps that the buffer's chains have lived
    saturation, saturation_real  share of the components at the bounds, of the chains and of the data, in [0, 1]
    clamp_share                  share of the gradient's components at the clamp, in [0, 1]
    step_length, noise_length    mean length of the last step along the gradient, and of its noise, of 32 chains

    The one gradient this takes is outside the SGLD loop, on 32 chains, so that the loop stays bare.
    """
    step_size, noise_std = sampler.settings(sampler.steps - 1, sampler.steps, temperature_of(energy))
    labels = () if y is None else (y[:32],)
    with frozen(energy):
        _, gradient = value_and_gradient(lambda x: energy(x, *labels), x_model[:32])
    clamp = sampler.grad_clamp or math.inf
    ages = buffer.ages[: buffer.size].float()
    return {
        "age_mean": ages.mean(),
        "age_median": ages.median(),
        "saturation": saturation(x_model, sampler.bounds),
        "saturation_real": saturation(x_data, sampler.bounds),
        "clamp_share": (gradient.abs() >= clamp).float().mean(),
        "step_length": (step_size * gradient.clamp(-clamp, clamp)).flatten(1).norm(dim=1).mean(),
        "noise_length": ages.new_tensor(noise_std * math.sqrt(gradient[0].numel())),
    }


def fresh_scores(scores: Tensor, ages: Tensor) -> dict[str, Tensor]:
    """Of the `scores` (B,) of chains that came from noise K steps ago, those drawn at age 0: how many, and how many
    others; their sum, and how many came within three standard deviations of the others' mean, or above. No transfer
    from the device."""
    fresh = (ages == 0).float()
    old = 1 - fresh
    mean = (scores * old).sum() / old.sum()
    std = ((scores - mean).square() * old).sum().div(old.sum()).sqrt()
    reached = (scores >= mean - 3 * std).float() * fresh  # none where no chain is old: NaN is not larger
    return dict(zip(OF_FRESH, (fresh.sum(), old.sum(), (scores * fresh).sum(), reached.sum()), strict=True))


def saturation(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Share of the components of x (B, *shape) that lie at the bounds, in [0, 1]."""
    low, high = bounds or (-math.inf, math.inf)
    return ((x <= low) | (x >= high)).float().mean()
