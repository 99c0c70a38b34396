"""Draw samples from an energy, or restore images:  python sample.py checkpoint=RUN_DIR [init=denoise] [key=value …]"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import math
import os
from functools import partial
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ebm import check, composition
from ebm.arrays import given_images
from ebm.data import scaled
from ebm.evaluation import figures, restoration
from ebm.evaluation.sample_files import Samples, write_samples
from ebm.running import checkpoint, trained
from ebm.running.cli import one_line_errors, output_folder, pick_device
from ebm.sampling.chains import Chains, chain_generators, chosen_chains, chosen_labels
from ebm.sampling.sgld import SGLD

# Without steps=: what restored 128 held-out training digits best with the weights that ship; denoise has its own.
STEPS = {"buffer": 256, "images": 256, "inpaint": 100, "sharpen": 80, "interpolate": 60}
GENERATOR = 5056  # bytes of a generator, of which each chain has one


@one_line_errors()
def launch(cfg: DictConfig) -> None:
    """What the script does, as the config says."""
    levels = checked_levels(cfg)
    out = output_folder(cfg.out, cfg.checkpoint, "sampling")
    state = checkpoint.load(cfg.checkpoint)
    given: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
    sampler, device = trained.sampler_of(state, given), pick_device(cfg.device)
    energy = composed_energy(cfg, state).to(device)
    chains = Chains(sampler.trace, cfg.seed, cfg.batch_size, cfg.frames, device, bar=True)
    if cfg.init in ("inpaint", "denoise", "sharpen"):
        samples = restore_images(cfg, state, chains, energy, sampler, levels)
    elif cfg.init == "interpolate":
        samples = interpolate(cfg, state, chains, energy)
    else:
        samples = draw(cfg, state, chains, energy, sampler)
    write_samples(out, samples, cfg.snapshots)


def draw(cfg: DictConfig, state: dict[str, Any], chains: Chains, energy: nn.Module, sampler: SGLD) -> Samples:
    """Samples from noise, from the checkpoint's chains or from images."""
    shape, count = checkpoint.input_shape(state), cfg.num_samples
    if cfg.init == "noise":
        check.memory(f"num_samples={count}", count * (4 * math.prod(shape) * 2 + 2 * GENERATOR))
    names, source = state.get("class_names") or [], f"checkpoint={cfg.checkpoint}"
    labels = chosen_labels(energy, count, cfg.label, names, source)
    if cfg.init == "noise":
        x = sampler.initial((count, *shape), chain_generators(cfg.seed + 1, count))
    elif cfg.init == "images":
        x = images_of(cfg, state)
        labels = chosen_labels(energy, len(x), cfg.label, names, source)
    else:
        check.that("buffer" in state, f"{source} holds no replay buffer: init=noise starts without one")
        one_class = None if labels is None or cfg.label == "all" else int(labels[0])
        x, held = chosen_chains(state["buffer"], count, cfg.seed, one_class)
        labels = None if labels is None else held
    steps = cfg.steps or STEPS.get(cfg.init)
    if steps is None:
        in_training = state["config"].get("train", {}).get("sample_steps", 256)  # the tutorial's weights say none
        steps = check.number(f"train.sample_steps of {source}", in_training, 1, 1_000_000, integer=True)
    trace, moments = chains.run(energy, x, steps, labels)
    return Samples(trace, moments, labels=labels, class_names=names)


def restore_images(
    cfg: DictConfig, state: dict[str, Any], chains: Chains, energy: nn.Module, sampler: SGLD, levels: list[float]
) -> Samples:
    """Degrade images, at each level of noise, restore them and compare: a table of PSNR and a contact sheet."""
    generator = torch.Generator().manual_seed(cfg.seed)
    clean = source_images(cfg, state, generator)
    restorations = []
    for level in levels:
        if cfg.init == "denoise":
            task = restoration.denoising(energy, clean, level, generator)
        elif cfg.init == "inpaint":
            noise = sampler.initial(clean.shape, chain_generators(cfg.seed + 1, len(clean)))
            task = restoration.inpainting(energy, clean, str(cfg.mask), noise)
        else:
            task = restoration.sharpening(energy, clean, level, generator, cfg.blur, cfg.fidelity)
        steps = cfg.steps or STEPS.get(cfg.init) or max(1, round(50 * level))
        restorations.append(restoration.restored(task, chains, steps))
    last = restorations[-1]
    draw_sheet = partial(restoration.comparison_sheet, clean=clean, restorations=restorations)
    sheet = (f"{cfg.init.removesuffix('e')}ed.png", draw_sheet)
    samples = torch.cat([each.images["energy"] for each in restorations])
    return Samples(last.trace, last.steps, samples, sheet=sheet, report=restoration.table(restorations))


def interpolate(cfg: DictConfig, state: dict[str, Any], chains: Chains, energy: nn.Module) -> Samples:
    """Paths between pairs of images: linear blends, relaxed with their ends held; a contact sheet with energies."""
    check.number("path_images", cfg.path_images, 3, integer=True)
    path = composition.InterpolationPath(energy, cfg.spring)
    ends = source_images(cfg, state, torch.Generator().manual_seed(cfg.seed))
    linear, held = composition.linear_paths(ends, cfg.path_images)
    trace, steps = chains.run(path, linear, cfg.steps or STEPS["interpolate"], given=(held, linear))
    paths = {"linear": linear, "relaxed": trace[-1]}
    energies = {name: path.along(x, chains.device) for name, x in paths.items()}
    sheet = ("interpolated.png", partial(figures.paths, images=paths, energies=energies))
    means = ", ".join(f"{name} {values.amax(dim=1).mean():.3f}" for name, values in energies.items())
    report = f"highest energy on the way: {means} (mean of {len(linear)} paths)"
    return Samples(trace.flatten(1, 2), steps, columns=cfg.path_images, sheet=sheet, report=report)


def checked_levels(cfg: DictConfig) -> list[float]:
    """Check the settings that are read before the checkpoint; the levels of noise that images are restored from."""
    for key in ("num_samples", "batch_size", "snapshots", "frames"):
        check.number(key, cfg[key], 1, integer=True)
    check.optional("steps", cfg.steps, 1, integer=True)
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    levels = listed(cfg.noise_std)
    if levels in ([], [None]):
        levels = [0.3 if cfg.init == "denoise" else 0.0]
    for level in levels:
        check.number("noise_std", level, 0)
    check.choice("init", cfg.init, ("noise", "buffer", "images", "denoise", "inpaint", "sharpen", "interpolate"))
    if (cfg.init == "images" and cfg.images is None) or (cfg.init in ("noise", "buffer") and cfg.images is not None):
        raise ValueError(f"init=images and images=FILE go together, got init={cfg.init} images={cfg.images}")
    if cfg.label not in ("all", "any") and cfg.init not in ("noise", "buffer", "images"):
        raise ValueError(f"label={cfg.label} is for init=noise, buffer or images; init={cfg.init} takes E(x)")
    return levels


def listed(value: Any) -> list[Any]:
    """The items of a list; of one value alone a list, of null an empty one."""
    if OmegaConf.is_list(value):
        return list(value)
    return [] if value is None else [value]


def composed_energy(cfg: DictConfig, state: dict[str, Any]) -> nn.Module:
    """The checkpoint's energy, composed with those of `compose=`, which must be of the same kind."""
    alike: dict[str, Any] = {"images": checkpoint.input_shape}
    if cfg.data._target_ is None:  # data=NAME says that they are of one kind
        alike["data"] = trained.data_name
    energies = [checkpoint.build_energy(state, cfg.checkpoint, cfg.modules)]
    for path in listed(cfg.compose):
        other = checkpoint.load(str(path))
        for what, of in alike.items():
            if of(state) != of(other):
                hint = "; data=NAME says that they are of one kind" if what == "data" else ""
                trained_on = f"checkpoint={cfg.checkpoint} was trained on {of(state)}, compose={path} on {of(other)}"
                raise ValueError(f"energies of other {what} do not compose: {trained_on}{hint}")
        energies.append(checkpoint.build_energy(other, path, cfg.modules))
    if len(energies) == 1 and cfg.weights is None:
        return energies[0]
    return composition.Composed(energies, cfg.combine, cfg.weights)


def images_of(cfg: DictConfig, state: dict[str, Any]) -> Tensor:
    """The images (N, *shape) in [−1, 1] of `images=`."""
    return given_images(str(cfg.images), checkpoint.input_shape(state), trained.background_of(state, cfg.data))


def source_images(cfg: DictConfig, state: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [−1, 1] to restore: those of `images=`, or else `num_samples` random validation images."""
    shape = checkpoint.input_shape(state)
    check.that(len(shape) == 3, f"init={cfg.init} takes images (channels, height, width), the energy takes {shape}")
    if cfg.images is not None:
        return images_of(cfg, state)
    dataset = trained.dataset_of(state, cfg.data.root) if cfg.data._target_ is None else instantiate(cfg.data)
    images = trained.check_shape(dataset, state).validation
    if cfg.num_samples > len(images):
        raise ValueError(f"num_samples must be at most the {len(images)} validation images, got {cfg.num_samples}")
    return scaled(images[torch.randperm(len(images), generator=generator)[: cfg.num_samples]])


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    launch(cfg)


if __name__ == "__main__":
    run_main(main)
