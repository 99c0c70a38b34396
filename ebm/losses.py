"""Losses: (energy, x_data, x_model, generator) → (scalar, logs): named scalars, and `e_model` (B,), E(x_model)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ebm import check
from ebm.data import check_affine, mixed, random_affine


class ContrastiveDivergence:
    """mean E(x⁺) − mean E(x⁻) + α·mean(E(x⁺)² + E(x⁻)²), x⁺ data and x⁻ negatives, each (B, *shape).

    The first two terms' gradient is that of the negative log-likelihood when the negatives follow the model
    (Hinton 2002); the third, `alpha` ≥ 0, keeps the energies' magnitude small (Du & Mordatch 2019, section 3.3).
    Data get N(0, noise_std²) and a clamp to `bounds` first (None: no clamp), so that the network cannot tell
    them by having no noise. Both batches go through the energy in one forward pass.

    energy_clamp   where given, the first two terms take E clamped to ±energy_clamp, > 0: energies beyond it are pushed
                   no further. With alpha 0 it replaces the third term
    kl_weight      of the term that contrastive divergence leaves out (Du, Li, Tenenbaum & Mordatch 2021, section 3.1):
                   the negatives go `kl_steps` steps further, without noise but with `step_size` and `grad_clamp`, to
                   x'(θ), and kl_weight·(mean E(x') − entropy_weight·mean log ‖x' − nearest other negative‖) is added,
                   with respect to x' alone: the sampler's steps are to lead to low energies, and not together
    classification_weight  of T·mean −log p(y⁺ | x⁺), T the energy's temperature, where there are labels: E is then
                   E(x, y) of image and label, and both terms together are T times the negative log-likelihood of
                   p(x | y) and p(y | x) (Grathwohl et al. 2020, "JEM", section 4)
    contrast       weight·T·mean over all pairs of log(1 + exp((E(x⁺) − E(x̃))/T)), x̃ twins of the data: images turned,
                   scaled, shifted and mirrored by `random_affine` with the rest of its settings. Every real image is to
                   have less energy than every twin (noise-contrastive estimation with the data's own twins as noise,
                   after Ceylan & Gutmann 2018, section 2, whose pairs are an image and its own twin). The term fades
                   where it is so, and leaves the chains alone. x⁺ is turned and scaled, too, by `jitter` times as much,
                   so that interpolated pixels do not tell them apart. A share `mix` of the twins are not turned but
                   `mixed` with another real image
    """

    def __init__(
        self, alpha: float = 0.1, noise_std: float = 0.005, bounds: Sequence[float] | None = (-1.0, 1.0),
        energy_clamp: float | None = None, kl_weight: float = 0.0, kl_steps: int = 1, entropy_weight: float = 0.1,
        step_size: float = 10.0, grad_clamp: float | None = 0.03, classification_weight: float = 1.0,
        contrast: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.alpha = check.number("loss.alpha", alpha, 0)
        self.noise_std = check.number("loss.noise_std", noise_std, 0)
        self.bounds = bounds or (-torch.inf, torch.inf)
        self.energy_clamp = check.optional("loss.energy_clamp", energy_clamp, 0, open_low=True) or torch.inf
        self.kl_weight = check.number("loss.kl_weight", kl_weight, 0)
        self.kl_steps = check.number("loss.kl_steps", kl_steps, 1, integer=True)
        self.entropy_weight = check.number("loss.entropy_weight", entropy_weight, 0)
        self.step_size, self.grad_clamp = step_size, grad_clamp or torch.inf
        self.affine = dict(contrast or {})
        self.contrast_weight = check.number("loss.contrast.weight", self.affine.pop("weight", 0.0), 0)
        self.jitter = check.number("loss.contrast.jitter", self.affine.pop("jitter", 0.0), 0, 1)
        self.mix = check.number("loss.contrast.mix", self.affine.pop("mix", 0.0), 0, 1)
        check_affine("loss.contrast", self.affine)
        self.classification_weight = check.number("loss.classification_weight", classification_weight, 0)

    def __call__(
        self, energy: Callable[..., Tensor], x_data: Tensor, x_model: Tensor, generator: torch.Generator,
        y_data: Tensor | None = None, y_model: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """(loss, logs), for data and negatives with labels y (B,) or without.

        loss = logs["cd"] + logs["energy_l2"] + logs["kl"] + logs["classification"] + logs["contrast"], the last three
        where there are such; a score is −E; logs["e_model"] is E of the negatives (B,)."""
        noise = torch.empty_like(x_data).normal_(0, self.noise_std, generator=generator)
        x_data = (x_data + noise).clamp(*self.bounds)
        x, logs = torch.cat([x_data, x_model]), {}
        module: Any = getattr(energy, "module", energy)  # DistributedDataParallel is called once a step
        temperature = getattr(module, "temperature", 1.0)
        if y_data is None or y_model is None:
            energies = energy(x)
        else:
            labels = torch.arange(module.classes, device=x.device)
            every = energy(x, labels.expand(len(x), -1))  # E(x, y) for all y
            energies = every.gather(1, torch.cat([y_data, y_model]).unsqueeze(1)).squeeze(1)
            logits, weight = -every[: len(x_data)] / temperature, temperature * self.classification_weight
            logs["classification"] = weight * functional.cross_entropy(logits, y_data)
            logs["accuracy"] = (logits.argmax(dim=1) == y_data).float().mean()
        e_data, e_model = energies[: len(x_data)], energies[len(x_data) :]
        limit = self.energy_clamp
        cd = e_data.clamp(-limit, limit).mean() - e_model.clamp(-limit, limit).mean()
        energy_l2 = self.alpha * (e_data.square().mean() + e_model.square().mean())
        logs |= {"cd": cd, "energy_l2": energy_l2}
        if self.kl_weight:
            logs["kl"] = self.kl_weight * self.kl(module, x_model, y_model)
        if self.contrast_weight:
            more = self.contrasts(module, x_data, generator) / temperature
            logs["contrast"] = self.contrast_weight * temperature * functional.softplus(-more).mean()
            logs["contrast_accuracy"] = (more > 0).float().mean()
        loss = sum((logs[name] for name in ("energy_l2", "kl", "classification", "contrast") if name in logs), cd)
        logs |= {"loss": loss, "score_real": -e_data.mean(), "score_fake": -e_model.mean(), "e_model": e_model}
        return loss, {name: value.detach() for name, value in logs.items()}

    def contrasts(self, energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        """E(x̃_j) − E(x_i) (B, B) of images x (B, C, H, W), jittered, and twins x̃."""
        slight = {name: self.jitter * value for name, value in self.affine.items() if name != "flip"}
        near, twins = (random_affine(x, generator, **by) for by in (slight, self.affine))
        if self.mix:
            chosen = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < self.mix
            twins = torch.where(chosen, mixed(near, generator), twins)
        e_real, e_twins = energy(torch.cat([near, twins])).view(2, -1)
        return e_twins - e_real.unsqueeze(1)

    def kl(self, energy: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        """mean E(x'(θ)) − entropy_weight·mean log(distance of x' to the nearest other x); gradient through x' alone."""
        labels = () if y is None else (y,)
        others, x = x, x.clone().requires_grad_(True)
        for _ in range(self.kl_steps):
            (gradient,) = torch.autograd.grad(energy(x, *labels).sum(), x, create_graph=True)
            x = (x - self.step_size * gradient.clamp(-self.grad_clamp, self.grad_clamp)).clamp(*self.bounds)
        end = x.detach().requires_grad_(True)
        e_end = energy(end, *labels)
        (slope,) = torch.autograd.grad(e_end.sum(), end)
        # The value of mean E(x'), with the gradient ∂E/∂x'·∂x'/∂θ: none by way of the energy's own weights.
        low_energy = e_end.detach().mean() + (slope * (x - end.detach())).sum() / len(x)
        distances = torch.cdist(x.flatten(1), others.flatten(1)) + torch.diag(x.new_full((len(x),), torch.inf))
        return low_energy - self.entropy_weight * distances.amin(dim=1).clamp(min=1e-6).log().mean()
