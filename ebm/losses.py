"""Losses: (energy, x_data, x_model, generator) → (scalar, {name: scalar}). A training's is a sum of named terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """Data x⁺ and negatives x⁻, (B, *shape) each, what an energy says of them, and of data alone where there are none.

    parallel      the energy, so called that gradients are averaged over all ranks: at least once a step
    y_data, …     labels (B,) or None
    x_noise       (B, *shape), that the data are paired with, or None
    """

    parallel: Callable[..., Tensor]
    x_data: Tensor
    x_model: Tensor | None = None
    y_data: Tensor | None = None
    y_model: Tensor | None = None
    x_noise: Tensor | None = None

    @property
    def energy(self) -> Any:
        """The module itself, for what else it has."""
        return getattr(self.parallel, "module", self.parallel)

    @property
    def temperature(self) -> float:
        return temperature_of(self.energy)

    @property
    def negatives(self) -> Tensor:
        """x⁻. Raises ValueError where there are none."""
        if self.x_model is None:
            raise ValueError("a term of the loss takes negatives, and none says needs_negatives = True")
        return self.x_model

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """E of the data and of the negatives, (B,) each, with labels E(x, y); then also −E(x⁺, y)/T (B, classes) for
        all y. They go through the energy together: batch statistics, were there any, could not tell them."""
        x = self.x_data if self.x_model is None else torch.cat([self.x_data, self.x_model])
        labels, count = [y for y in (self.y_data, self.y_model) if y is not None], len(self.x_data)
        if getattr(self.energy, "classes", None) is None or sum(map(len, labels)) < len(x):
            energies, logits = self.parallel(x), None
        else:
            every = torch.arange(self.energy.classes, device=x.device)
            of_all_labels = self.parallel(x, every.expand(len(x), -1))  # E(x, y) for all y
            energies = of_all_labels.gather(1, torch.cat(labels).unsqueeze(1)).squeeze(1)
            logits = -of_all_labels[:count] / self.temperature
        return energies[:count], energies[count:], logits

    @property
    def e_data(self) -> Tensor:
        return self.forward[0]

    @property
    def e_model(self) -> Tensor:
        """E of the negatives. Raises ValueError where there are none."""
        return self.forward[1][: len(self.negatives)]

    @property
    def logits(self) -> Tensor | None:
        return self.forward[2]


class Loss(ABC):
    """A term of the loss, or their sum.

    needs_negatives  whether it takes chains of the model; where no term does, none are run
    needs_pairs      whether it takes data in pairs with noise
    """

    needs_negatives = False
    needs_pairs = False

    def check(self, shape: Sequence[int], classes: int | None) -> None:  # noqa: B027 — most take any
        """ValueError where it has no meaning for data of this shape or an energy with these classes."""

    @abstractmethod
    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """(value, what is logged besides)."""

    def __call__(
        self,
        energy: Callable[..., Tensor],
        x_data: Tensor,
        x_model: Tensor | None,
        generator: torch.Generator,
        y_data: Tensor | None = None,
        y_model: Tensor | None = None,
        x_noise: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """(loss, logs) of data and negatives (B, *shape), with labels y (B,) or without; see `Batch`.

        The logs are detached scalars: `loss`, what the terms say, where the data went through the energy their mean
        score −E, `score_real`, and with negatives theirs, `score_fake`, the difference `cd`; and `e_model` (B,), E of
        the negatives.
        """
        batch = Batch(energy, x_data, x_model, y_data, y_model, x_noise)
        loss, logs = self.of(batch, generator)
        logs |= {"loss": loss}
        if x_model is not None or "forward" in vars(batch):
            logs["score_real"] = -batch.e_data.mean()
            if x_model is not None:
                score_fake = -batch.e_model.mean()
                logs |= {"cd": score_fake - logs["score_real"], "score_fake": score_fake, "e_model": batch.e_model}
        return loss, {name: value.detach() for name, value in logs.items()}


class Sum(Loss):
    """The sum of `terms`, each of which weighs itself and is logged under its name; one that is None is left out.
    Raises ValueError for none, and for what is no term."""

    def __init__(self, terms: Mapping[str, Loss | None]) -> None:
        self.terms = {name: term for name, term in terms.items() if term is not None}
        check.that(self.terms, "loss must be a list of terms, as [contrastive_divergence], got none")
        for name, term in self.terms.items():
            if not isinstance(term, Loss):
                chosen = "which is not in the list of terms: add it there, or leave it out"
                raise ValueError(f"loss.{name} has the settings {term}, {chosen}: loss.{name}=null")
        self.needs_negatives = any(term.needs_negatives for term in self.terms.values())
        self.needs_pairs = any(term.needs_pairs for term in self.terms.values())

    def check(self, shape: Sequence[int], classes: int | None) -> None:
        for term in self.terms.values():
            term.check(shape, classes)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        loss = torch.zeros((), device=batch.x_data.device)
        logs: Logs = {}
        for name, term in self.terms.items():
            value, numbers = term.of(batch, generator)
            loss = loss + value
            logs |= numbers | {name: value}
        return loss, logs


class ContrastiveDivergence(Loss):
    """weight · max(mean E(x⁺) − mean E(x⁻), −floor) + α·mean(E(x⁺)² + E(x⁻)²).

    The difference's gradient is that of the negative log-likelihood, times T, when the negatives follow the model
    (Hinton 2002); the second term, `alpha` ≥ 0, keeps the energies' magnitude small (Du & Mordatch 2019, section 3.3).

    trim   share of the negatives, those of the highest energies, that are left out of the difference, in [0, 1): chains
           that have not arrived
    floor  below which the difference teaches nothing, >= 0, in the energy's unit; None: it always does

    The last two are those of Balcerak et al. 2025 ("Energy Matching", algorithm 2). Logs the second term, `energy_l2`;
    every loss logs the plain difference, `cd`.
    """

    needs_negatives = True

    def __init__(self, alpha: float = 0.1, weight: float = 1.0, trim: float = 0.0, floor: float | None = None) -> None:
        key = "loss.contrastive_divergence"
        self.alpha = check.number(f"{key}.alpha", alpha, 0)
        self.weight = check.number(f"{key}.weight", weight, 0)
        self.trim = check.number(f"{key}.trim", trim, 0, 0.99)
        self.floor = check.optional(f"{key}.floor", floor, 0)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        e_data, e_model = batch.e_data, batch.e_model
        kept = e_model
        if self.trim:
            kept = e_model.sort().values[: max(1, len(e_model) - int(self.trim * len(e_model)))]
        cd = e_data.mean() - kept.mean()
        if self.floor is not None:
            cd = cd.clamp(min=-self.floor)
        energy_l2 = self.alpha * (e_data.square().mean() + e_model.square().mean())
        return self.weight * cd + energy_l2, {"energy_l2": energy_l2}


class EnergyMatching(Loss):
    """weight · mean ‖−∇E(x_t) − (x₁ − x₀)‖²/D, x_t = (1 − t)·x₀ + t·x₁, t ~ U(0, until): the energy's slope carries
    noise x₀ ~ N(0, I) to the data x₁ in one unit of time (Balcerak et al. 2025, "Energy Matching", section 3.1).

    Pairs are those of `ebm.transport`; D is the number of an image's components. An energy with classes is that of x
    alone. It is to be steep, |x₁ − x₀| a unit of x: `energy.output_scale` is for that. There are no chains in it.
    `until` in (0, 1]: less leaves the surroundings of the data to other terms.
    """

    needs_pairs = True

    def __init__(self, weight: float = 1.0, until: float = 1.0) -> None:
        self.weight = check.number("loss.energy_matching.weight", weight, 0)
        self.until = check.number("loss.energy_matching.until", until, 0, 1, open_low=True)

    def of(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        if batch.x_noise is None:
            raise ValueError("loss.energy_matching takes data in pairs with noise (ebm.transport)")
        x0, x1 = batch.x_noise, batch.x_data
        t = self.until * torch.rand(len(x1), *[1] * (x1.dim() - 1), generator=generator, device=x1.device)
        x = ((1 - t) * x0 + t * x1).requires_grad_(True)
        energies = batch.parallel(x)
        (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
        # No slope depends on what is added to an energy: the last sum gives that weight a gradient, 0, for other ranks
        return self.weight * (gradient + x1 - x0).square().mean() + 0 * energies.sum(), {}


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

    needs_negatives = True

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
        others, x = batch.negatives, batch.negatives.clone().requires_grad_(True)
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
        more = self.differences(batch.parallel, batch.x_data, generator) / batch.temperature
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
