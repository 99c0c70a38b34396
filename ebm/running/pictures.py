"""A training seen: its samples and chains in pictures and numbers, and the scores of a validation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm.energies import labels_in_proportion
from ebm.evaluation import features, figures, metrics
from ebm.files import whole_files
from ebm.running.state import Training
from ebm.sampling.chains import Chains, chain_generators


def validation_scores(
    energy: nn.Module, real: Tensor, noise: Tensor, noise_1024: Tensor, **how: Any
) -> dict[str, float]:
    """Mean score of validation images, of as many noise images, noise − real, and of 1024 noise images."""
    score_real, score_noise, score = (float(metrics.scores(energy, x, **how).mean()) for x in (real, noise, noise_1024))
    return {
        "val/cd": score_noise - score_real,
        "val/score_real": score_real,
        "val/score_noise": score_noise,
        "noise/score": score,
    }


def draw_samples(
    training: Training, folder: Path, steps: int, seed: int
) -> tuple[dict[str, Path], dict[str, float], dict[str, metrics.Array]]:
    """PNG files in `folder`: 8 chains from noise, each a strip of 8 snapshots over `steps`; 32 random chains of the
    buffer; histograms of scores and ages. Numbers: how well the long chains mix, and how far short ones fall behind
    them. And the scores of chains in the buffer and of real images."""
    energy, sampler, buffer = training.energy, training.sampler, training.buffer
    real, device = training.dataset.validation, training.device
    generator = torch.Generator(device).manual_seed(seed)  # the same start each time, to compare over training
    noise = sampler.initial((8, *real.shape[1:]), generator)
    every = max(steps // 256, 1)
    labels = labels_in_proportion(energy, 8, device)
    short = sampler(energy, noise, generator.clone_state(), labels=labels)
    trace = sampler.trace(energy, noise, generator, every=every, steps=steps, labels=labels)
    chosen = torch.randperm(buffer.size, generator=generator, device=device)
    held = buffer.chains[chosen[:512]] if training.phase.loss.needs_negatives else None  # else they are at rest
    scores = {"real": metrics.scores(energy, real[:512], device=device)}
    if held is not None:
        scores = {"buffer": metrics.scores(energy, held, device=device)} | scores
    is_image = real.dim() == 4
    keys = ["samples/generation", "samples/buffer", "chain/state"] if is_image else ["samples/points", "chain/state"]
    keys = [key for key in keys if held is not None or key in ("samples/generation", "samples/points")]
    names = {key: f"{key}_{training.loop.step:06d}.png" for key in keys}
    with whole_files(folder) as aside:
        for name in names.values():
            (aside / name).parent.mkdir(exist_ok=True)
        if is_image:
            shown = sorted({-(-i * (len(trace) - 1) // 8) for i in range(1, 9)})
            figures.strips(aside / names["samples/generation"], trace[shown], [min(every * i, steps) for i in shown])
        else:  # vectors: their first two components
            points = sampler(energy, sampler.initial((2048, *real.shape[1:]), generator), generator, steps)
            panels = {"samples": points[:, :2], "buffer": buffer.chains[: buffer.size][-2048:, :2]}
            figures.points(aside / names["samples/points"], panels if held is not None else {"samples": points[:, :2]})
        if is_image and held is not None:
            figures.grid(aside / names["samples/buffer"], held[:32])
        if held is not None:
            figures.chain_state(aside / names["chain/state"], scores, buffer.ages[: buffer.size].cpu().numpy())
    files = {key: folder / name for key, name in names.items()}
    return files, chain_numbers(energy, trace, short), scores


def chain_numbers(energy: nn.Module, trace: Tensor, short: Tensor) -> dict[str, float]:
    """Of long chains (T, B, *shape): the mean score at their end, and how well the second half mixes: the way down from
    noise is not the chain's law. And the mean score of chains (B, *shape) of a short run; it is one of its own, for a
    sampler that anneals is not at the end of its noise after so many steps of a long one."""
    device = trace.device
    settled = trace[len(trace) // 2 :]
    along = metrics.scores(energy, settled.flatten(0, 1), device=device).reshape(len(settled), -1)
    score_short, score_long = float(metrics.scores(energy, short, device=device).mean()), float(along[-1].mean())
    numbers = {
        "chain/score_short_run": score_short,
        "chain/score_long_run": score_long,
        "chain/short_long_gap": score_long - score_short,
    }
    if len(along) >= 16 and bool((along.std(axis=0) > 0).all()):
        numbers["chain/ess"] = metrics.effective_sample_size(along.T)
        numbers["chain/split_rhat"] = metrics.split_rhat(along.T)
    return numbers


def frechet(
    training: Training, steps: int, seed: int, batch_size: int, judge: str | None = None, cache: str | None = None
) -> float:
    """The Fréchet distance of 256 samples, `steps` steps from noise, to the validation images, in the features of the
    judge; evaluate.py's frechet/JUDGE-n256/STEPS is that to the test images."""
    dataset, device = training.dataset, training.device
    count = min(256, len(dataset.validation))
    start = training.sampler.initial((count, *dataset.shape), chain_generators(seed + 1, count))
    chains = Chains(training.sampler.trace, seed, batch_size, frames=1, device=device)
    trace, _ = chains.run(training.energy, start, steps, labels_in_proportion(training.energy, count))
    classifier, _ = features.judge(dataset, judge, cache, device)
    real = features.features_of(classifier, dataset.validation, device=device)
    return metrics.frechet(real, features.features_of(classifier, trace[-1].clamp(-1, 1), device=device))
