"""Losses: (energy, x_data, x_model, generator) → (scalar, logs): named scalars, and `e_model` (B,), E(x_model)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebm import check


class ContrastiveDivergence:
    """mean E(x⁺) − mean E(x⁻) + α·mean(E(x⁺)² + E(x⁻)²), x⁺ data and x⁻ negatives, each (B, *shape).

    The first two terms' gradient is that of the negative log-likelihood when the negatives follow the model
    (Hinton 2002); the third, `alpha` ≥ 0, keeps the energies' magnitude small (Du & Mordatch 2019, section 3.3).
    Data get N(0, noise_std²) and a clamp to `bounds` first (None: no clamp), so that the network cannot tell
    them by having no noise. Both batches go through the energy in one forward pass.
    """

    def __init__(
        self, alpha: float = 0.1, noise_std: float = 0.005, bounds: Sequence[float] | None = (-1.0, 1.0)
    ) -> None:
        self.alpha = check.number("loss.alpha", alpha, 0)
        self.noise_std = check.number("loss.noise_std", noise_std, 0)
        self.bounds = bounds

    def __call__(
        self, energy: Callable[[Tensor], Tensor], x_data: Tensor, x_model: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs); loss = logs["cd"] + logs["energy_l2"]; a score is −E; logs["e_model"] is E(x_model) (B,)."""
        noise = torch.empty_like(x_data).normal_(0, self.noise_std, generator=generator)
        x_data = x_data + noise
        if self.bounds is not None:
            x_data = x_data.clamp(*self.bounds)
        energies = energy(torch.cat([x_data, x_model]))
        e_data, e_model = energies[: len(x_data)], energies[len(x_data) :]
        cd = e_data.mean() - e_model.mean()
        energy_l2 = self.alpha * (e_data.square().mean() + e_model.square().mean())
        loss = cd + energy_l2
        logs = {
            "loss": loss,
            "cd": cd,
            "energy_l2": energy_l2,
            "score_real": -e_data.mean(),
            "score_fake": -e_model.mean(),
            "e_model": e_model,
        }
        return loss, {name: value.detach() for name, value in logs.items()}
