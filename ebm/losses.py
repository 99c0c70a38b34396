"""Losses: (energy, x_data, x_model, generator) → (scalar, {name: scalar}). A training's is a sum of named terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ebm import check
from ebm.batches import check_affine, mixed, random_affine
from ebm.energies import temperature_of

Logs = dict[str, Tensor]


@dataclass
class Batch:
    """Data x⁺ and negatives x⁻, (B, *shape) each, labels y (B,) or None, and what one forward pass says of them.

    energy          the module, for terms that need more of it
    e_data, e_model E (B,); with labels E(x, y)
    logits          −E(x⁺, y)/T (B, classes) for all y, with labels
    """

    energy: Any
    x_data: Tensor
    x_model: Tensor
    y_data: Tensor | None
    y_model: Tensor | None
    e_data: Tensor
    e_model: Tensor
    logits: Tensor | None

    @property
    def temperature(self) -> float:
        return temperature_of(self.energy)

    @classmethod
    def of(
        cls,
        energy: Callable[..., Tensor],
        x_data: Tensor,
        x_model: Tensor,
        y_data: Tensor | None = None,
        y_model: Tensor | None = None,
    ) -> "Batch":
        """Data and negatives go through the energy together: batch statistics, were there any, could not tell them."""
        x = torch.cat([x_data, x_model])
        module: Any = getattr(energy, "module", energy)  # DistributedDataParallel is called once a step
        logits = None
        if y_data is None or y_model is None:
            energies = energy(x)
        else:
            labels = torch.arange(module.classes, device=x.device)
            of_all_labels = energy(x, labels.expand(len(x), -1))  # E(x, y) for all y
            energies = of_all_labels.gather(1, torch.cat([y_data, y_model]).unsqueeze(1)).squeeze(1)
            logits = -of_all_labels[: len(x_data)] / temperature_of(module)
        e_data, e_model = energies[: len(x_data)], energies[len(x_data) :]
        return cls(module, x_data, x_model, y_data, y_model, e_data, e_model, logits)


class Loss(ABC):
    """A term of the loss, or their sum."""

    def check(self, shape: Sequence[int], classes: int | None) -> None:  # noqa: B027 — most take any
        """ValueError where it has no meaning for data of this shape or an energy with these classes."""

    @abstractmethod
    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """(value, what is logged besides)."""

    def __call__(
        self,
        energy: Callable[..., Tensor],
        x_data: Tensor,
        x_model: Tensor,
        generator: torch.Generator,
        y_data: Tensor | None = None,
        y_model: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """(loss, logs) of data and negatives (B, *shape), with labels y (B,) or without.

        The logs are detached scalars: `loss`, the mean scores −E, `score_real` and `score_fake`, their difference
        `cd`, what the terms say; and `e_model` (B,), E of the negatives.
        """
        batch = Batch.of(energy, x_data, x_model, y_data, y_model)
        loss, logs = self.of(batch, generator)
        mean_data, mean_model = batch.e_data.mean(), batch.e_model.mean()
        logs |= {"loss": loss, "cd": mean_data - mean_model, "score_real": -mean_data, "score_fake": -mean_model}
        return loss, {name: value.detach() for name, value in (logs | {"e_model": batch.e_model}).items()}


class Sum(Loss):
    """The sum of `terms`, each of which weighs itself and is logged under its name. Raises ValueError for none."""

    def __init__(self, terms: Mapping[str, Loss]) -> None:
        if not terms:
            raise ValueError("loss must be a list of terms, as [contrastive_divergence], got none")
        self.terms = dict(terms)

    def check(self, shape: Sequence[int], classes: int | None) -> None:
        for term in self.terms.values():
            term.check(shape, classes)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        loss = torch.zeros((), device=batch.e_data.device)
        logs: Logs = {}
        for name, term in self.terms.items():
            value, numbers = term.of(batch, generator)
            loss = loss + value
            logs |= numbers | {name: value}
        return loss, logs


class ContrastiveDivergence(Loss):
    """mean E(x⁺) − mean E(x⁻) + α·mean(E(x⁺)² + E(x⁻)²).

    The first two terms' gradient is that of the negative log-likelihood when the negatives follow the model
    (Hinton 2002); the third, `alpha` ≥ 0, keeps the energies' magnitude small (Du & Mordatch 2019, section 3.3).
    Logs the third, `energy_l2`; the first two are `cd`, which every loss logs.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = check.number("loss.contrastive_divergence.alpha", alpha, 0)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        cd = batch.e_data.mean() - batch.e_model.mean()
        energy_l2 = self.alpha * (batch.e_data.square().mean() + batch.e_model.square().mean())
        return cd + energy_l2, {"energy_l2": energy_l2}


class Classification(Loss):
    """weight · T · mean −log p(y⁺ | x⁺), T the energy's temperature, of an energy with classes.

    Together with contrastive divergence of E(x, y) it is T times the negative log-likelihood of p(x | y) and p(y | x)
    (Grathwohl et al. 2020, "JEM", section 4). Logs `accuracy` on the batch, in [0, 1].
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = check.number("loss.classification.weight", weight, 0)

    def check(self, shape: Sequence[int], classes: int | None) -> None:
        if classes is None:
            raise ValueError("loss.classification needs an energy with classes: set energy.classes, or leave it out")

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        if batch.logits is None or batch.y_data is None:
            raise ValueError("loss.classification needs data with labels")
        scale = batch.temperature * self.weight
        accuracy = (batch.logits.argmax(dim=1) == batch.y_data).float().mean()
        return scale * functional.cross_entropy(batch.logits, batch.y_data), {"accuracy": accuracy}


class KL(Loss):
    """weight · (mean E(x') − entropy_weight · mean log ‖x' − nearest other negative‖), with respect to x' alone: what
    contrastive divergence leaves out of its own gradient (Du, Li, Tenenbaum & Mordatch 2021, section 3.1).

    x'(θ) are the negatives `steps` steps further, without noise but with the sampler's `step_size`, `grad_clamp` and
    `bounds`: the steps are to lead to low energies, and not together. `entropy_weight` is in the energy's unit, like T.
    Under torchrun the other negatives are those of the rank.
    """

    def __init__(
        self,
        weight: float = 0.3,
        steps: int = 1,
        entropy_weight: float = 0.1,
        step_size: float = 10.0,
        grad_clamp: float | None = 0.03,
        bounds: Sequence[float] | None = (-1.0, 1.0),
    ) -> None:
        self.weight = check.number("loss.kl.weight", weight, 0)
        self.steps = check.number("loss.kl.steps", steps, 1, integer=True)
        self.entropy_weight = check.number("loss.kl.entropy_weight", entropy_weight, 0)
        self.step_size, self.grad_clamp = step_size, grad_clamp or torch.inf
        self.bounds = bounds or (-torch.inf, torch.inf)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        energy, labels = batch.energy, () if batch.y_model is None else (batch.y_model,)
        others, x = batch.x_model, batch.x_model.clone().requires_grad_(True)
        for _ in range(self.steps):
            (gradient,) = torch.autograd.grad(energy(x, *labels).sum(), x, create_graph=True)
            x = (x - self.step_size * gradient.clamp(-self.grad_clamp, self.grad_clamp)).clamp(*self.bounds)
        end = x.detach().requires_grad_(True)
        e_end = energy(end, *labels)
        (slope,) = torch.autograd.grad(e_end.sum(), end)
        # The value of mean E(x'), with the gradient ∂E/∂x'·∂x'/∂θ: none by way of the energy's own weights.
        low_energy = e_end.detach().mean() + (slope * (x - end.detach())).sum() / len(x)
        distances = torch.cdist(x.flatten(1), others.flatten(1)) + torch.diag(x.new_full((len(x),), torch.inf))
        spread = distances.amin(dim=1).clamp(min=1e-6).log().mean()
        return self.weight * (low_energy - self.entropy_weight * spread), {}


class Twins(Loss):
    """weight · T · mean over all pairs of log(1 + exp((E(x⁺) − E(x̃))/T)), x̃ twins of the data: images turned, scaled,
    shifted and mirrored as `random_affine` does.

    Every real image is to have less energy than every twin: noise-contrastive estimation with the data's own twins as
    noise, after Ceylan & Gutmann 2018, section 2, whose pairs are an image and its own twin. The term fades where it is
    so, and leaves the chains alone. Under torchrun the pairs are those of each rank's share of the batch: N ranks have
    an N-th of them.

    jitter  share of it all that x⁺ gets, too, in [0, 1], so that interpolated pixels do not tell them apart
    mix     share of the twins that are, instead, a real image with a rectangle of another (`mixed`), in [0, 1]

    Logs `twins_accuracy`, the share of pairs in order.
    """

    def __init__(
        self,
        weight: float = 1.0,
        jitter: float = 0.03,
        rotation: float = 0.0,
        scale: float = 0.0,
        shift: float = 0.0,
        flip: float = 0.0,
        mix: float = 0.0,
    ) -> None:
        self.weight = check.number("loss.twins.weight", weight, 0)
        self.jitter = check.number("loss.twins.jitter", jitter, 0, 1)
        self.mix = check.number("loss.twins.mix", mix, 0, 1)
        self.affine = {"rotation": rotation, "scale": scale, "shift": shift, "flip": flip}
        check_affine("loss.twins", self.affine)

    def check(self, shape: Sequence[int], classes: int | None) -> None:
        if len(shape) != 3:
            raise ValueError(
                f"loss.twins is for images, it turns them; data of shape {tuple(shape)} have none: leave it out"
            )

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        more = self.differences(batch.energy, batch.x_data, generator) / batch.temperature
        value = self.weight * batch.temperature * functional.softplus(-more).mean()
        return value, {"twins_accuracy": (more > 0).float().mean()}

    def differences(self, energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        """E(x̃_j) − E(x_i) (B, B) of images x (B, C, H, W), jittered, and twins x̃."""
        slight = {name: self.jitter * value for name, value in self.affine.items() if name != "flip"}
        near = random_affine(x, generator, **slight)
        twins = random_affine(x, generator, **self.affine)
        if self.mix:
            chosen = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < self.mix
            twins = torch.where(chosen, mixed(near, generator), twins)
        e_real, e_twins = energy(torch.cat([near, twins])).view(2, -1)
        return e_twins - e_real.unsqueeze(1)
