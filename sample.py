"""Draw samples from an energy:  python sample.py checkpoint=RUN_DIR [init=denoise] [key=value …]"""

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ebm import check, checkpoint, figures, metrics
from ebm.cli import one_line_errors, output_folder, pick_device
from ebm.data import Dataset, checked_images, read_image, scaled
from ebm.sampler import SGLD, chain_generators, trace_in_batches, uniform_noise

MNIST = {"_target_": "ebm.data.torchvision_dataset", "name": "MNIST", "root": "data"}


def sampler_of(cfg: DictConfig, state: dict[str, Any]) -> SGLD:
    """The checkpoint's sampler, but for the settings given in the config (those that are not `trained`)."""
    settings = dict(state["config"].get("sampler", {}))
    settings.pop("_target_", None)
    given: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
    settings |= {key: value for key, value in given.items() if value != "trained"}
    try:
        return SGLD(**settings)
    except TypeError as error:  # the file names a setting that there is none of
        raise checkpoint.CheckpointError(f"the checkpoint's sampler cannot be built: {error}") from error


def given_images(path: str, shape: tuple[int, ...]) -> Tensor:
    """Images (N, *shape) in [−1, 1] of an .npz with `samples`, an .npy, or a file or folder of pictures."""
    source = Path(path)
    if not source.exists():
        raise ValueError(f"images={path} does not exist: give an .npz, an .npy, a picture or a folder of them")
    if source.suffix in (".npz", ".npy"):
        try:
            array = np.load(source, allow_pickle=False)
            x = array["samples"] if source.suffix == ".npz" else array
        except (ValueError, OSError, KeyError, EOFError) as error:
            raise ValueError(f"images={path} holds no array of images: {error}") from error
        return checked_images(x, shape, f"images={path}")
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return scaled(torch.stack([read_image(file, shape[-1], shape[0]) for file in files]))


def dataset_of(cfg: DictConfig, state: dict[str, Any]) -> Dataset:
    """The data set given as `data=`, or else the one that the checkpoint was trained on (the tutorial's: MNIST)."""
    config: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if config["_target_"] is None:
        root = config["root"]
        config = dict(state["config"].get("data", MNIST))
        ours = ("ebm.data.", "ebm.densities.")
        if not str(config.get("_target_")).startswith(ours):  # a file does not choose what is called
            raise ValueError(f"the checkpoint was trained on data of its own, {config.get('_target_')}: give data=")
        if root is not None and "root" in config:
            config["root"] = root
    dataset: Dataset = instantiate(config)
    if dataset.shape != checkpoint.input_shape(state):
        raise ValueError(
            f"data set {dataset.name} has images {dataset.shape}, the energy takes {checkpoint.input_shape(state)}"
        )
    return dataset


def sample(cfg: DictConfig) -> None:
    count = check.number("num_samples", cfg.num_samples, 1, integer=True)
    steps = check.number("steps", cfg.steps, 1, integer=True)
    check.number("batch_size", cfg.batch_size, 1, integer=True)
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    check.number("snapshots", cfg.snapshots, 1, integer=True)
    check.number("frames", cfg.frames, 1, integer=True)
    check.number("noise_std", cfg.noise_std, 0)
    check.choice("init", cfg.init, ("noise", "buffer", "images", "denoise"))
    if (cfg.init == "images") != (cfg.images is not None):
        raise ValueError(f"init=images and images=FILE go together, got init={cfg.init} images={cfg.images}")
    device = pick_device(cfg.device)
    state = checkpoint.load(cfg.checkpoint)
    sampler = sampler_of(cfg, state)
    energy = checkpoint.build_energy(state, cfg.checkpoint).to(device)
    shape = checkpoint.input_shape(state)

    generator = torch.Generator().manual_seed(cfg.seed)
    clean = None
    if cfg.init == "buffer":
        if "buffer" not in state:
            raise ValueError(f"checkpoint={cfg.checkpoint} holds no replay buffer: init=noise starts without one")
        chains = state["buffer"]["chains"]
        if count > len(chains):
            raise ValueError(f"num_samples must be at most the {len(chains)} chains of the buffer, got {count}")
        x = chains[torch.randperm(len(chains), generator=generator)[:count]]
    elif cfg.init == "images":
        x = given_images(cfg.images, shape)
    elif cfg.init == "denoise":
        test = dataset_of(cfg, state).test
        if count > len(test):
            raise ValueError(f"num_samples must be at most the {len(test)} test images, got {count}")
        clean = scaled(test[:count])
        x = clean + cfg.noise_std * torch.randn(clean.shape, generator=generator)
        x = x.clamp(-1, 1)
    else:
        x = uniform_noise((count, *shape), chain_generators(cfg.seed + 1, count))
    generators = chain_generators(cfg.seed, len(x), device)

    every = max(1, steps // cfg.frames)
    trace = trace_in_batches(sampler, energy, x, generators, cfg.batch_size, every, steps)
    samples = trace[-1]
    times = [min(i * every, steps) for i in range(len(trace))]

    out = output_folder(cfg.out, cfg.checkpoint, "sampling")
    np.savez_compressed(out / "samples.npz", samples=samples.numpy())
    print(f"samples      {out / 'samples.npz'}  {tuple(samples.shape)} in [-1, 1]")
    if len(shape) != 3:
        return
    figures.grid(out / "grid.png", samples[:400], columns=max(1, min(round(len(samples[:400]) ** 0.5), 20)))
    shown = sorted({round(i * (len(trace) - 1) / cfg.snapshots) for i in range(cfg.snapshots + 1)})
    figures.strips(out / "strips.png", trace[shown, :8], [times[i] for i in shown])
    figures.animation(out / "chains.gif", trace[:, :64])
    names = ["grid.png", "strips.png", "chains.gif"]
    if clean is not None:
        before, after = metrics.psnr(x, clean), metrics.psnr(samples, clean)
        labels = [f"{a:.1f}→{b:.1f}" for a, b in zip(before[:8].tolist(), after[:8].tolist(), strict=True)]
        rows, title = ["original", f"noise σ {cfg.noise_std:g}", "restored"], "PSNR of noisy→restored, dB"
        sheet = torch.stack([clean[:8], x[:8], samples[:8]])
        figures.labelled_rows(out / "denoised.png", sheet, labels, rows, title)
        names.append("denoised.png")
        print(f"PSNR         noisy {before.mean():.2f} dB, restored {after.mean():.2f} dB (mean of {len(x)} images)")
    print(f"pictures     {' '.join(str(out / name) for name in names)}")


def launch(cfg: DictConfig) -> None:
    with one_line_errors():
        sample(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    launch(cfg)


if __name__ == "__main__":
    main()
