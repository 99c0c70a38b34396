"""Draw samples from an energy, or restore images:  python sample.py checkpoint=RUN_DIR [init=denoise] [key=value …]"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ebm import check, composition
from ebm.data import Dataset, checked_images, scaled
from ebm.energies import labels_in_proportion
from ebm.evaluation import figures, metrics, restoration
from ebm.files import image_files, read_image, whole_files
from ebm.running import checkpoint, trained
from ebm.running.cli import one_line_errors, output_folder, pick_device
from ebm.sampling.chains import Given, chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD

# Without steps=: what restored 128 held-out training digits best with the weights that ship; denoise has its own.
STEPS = {"noise": 256, "buffer": 256, "images": 256, "inpaint": 100, "sharpen": 80, "interpolate": 60}
GENERATOR = 5056  # bytes of a generator, of which each chain has one


def background_of(cfg: DictConfig, state: dict[str, Any]) -> str:
    """The colour behind transparent pixels: that of `data=`, or of the data that the checkpoint was trained on."""
    config = cfg.data if cfg.data._target_ is not None else trained.data_config(state)
    return str(config.get("background", "black"))


def given_images(cfg: DictConfig, state: dict[str, Any]) -> Tensor:
    """Images (N, *shape) in [−1, 1] of `images=`: an .npz with `samples`, an .npy, a picture or a folder of them."""
    path, shape = str(cfg.images), checkpoint.input_shape(state)
    source = Path(path)
    if not source.exists():
        raise ValueError(f"images={path} does not exist: give an .npz, an .npy, a picture or a folder of them")
    if source.suffix in (".npz", ".npy") and source.is_file():
        try:
            array = np.load(source, allow_pickle=False)
            x = array["samples"] if source.suffix == ".npz" else array
        except Exception as error:  # whatever a torn or hostile file can make its reader raise
            # numpy's own words may be advice to trust the file
            raise ValueError(f"images={path} holds no array of images ({type(error).__name__})") from error
        return checked_images(x, shape, f"images={path}")
    files = image_files(source) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"images={path} is a folder without images")
    return scaled(torch.stack([read_image(file, shape, background_of(cfg, state)) for file in files]))


def dataset_of(cfg: DictConfig, state: dict[str, Any]) -> Dataset:
    """The data set given as `data=`, or else the one that the checkpoint was trained on (the tutorial's: MNIST)."""
    given = cfg.data._target_ is not None
    return trained.check_shape(instantiate(cfg.data) if given else trained.dataset_of(state, cfg.data.root), state)


def composed_energy(cfg: DictConfig, state: dict[str, Any]) -> nn.Module:
    """The checkpoint's energy, composed with those of `compose=`."""
    energies = [checkpoint.build_energy(state, cfg.checkpoint, cfg.modules)]
    for path in cfg.compose if OmegaConf.is_list(cfg.compose) else [cfg.compose] * (cfg.compose is not None):
        other = checkpoint.load(str(path))
        shapes = (checkpoint.input_shape(state), checkpoint.input_shape(other))
        name = trained.data_name(state)
        names = (name, trained.data_name(other) if cfg.data._target_ is None else name)
        for what, (one, two) in (("images", shapes), ("data", names)):
            if one != two:
                raise ValueError(
                    f"energies of other {what} do not compose: checkpoint={cfg.checkpoint} was trained on {one}, "
                    f"compose={path} on {two}" + "; data=NAME says that they are of one kind" * (what == "data")
                )
        energies.append(checkpoint.build_energy(other, path, cfg.modules))
    if len(energies) == 1 and cfg.weights is None:
        return energies[0]
    return composition.Composed(energies, cfg.combine, cfg.weights)


def source_images(cfg: DictConfig, state: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [−1, 1] to restore: those of `images=`, or else `num_samples` random test images."""
    shape = checkpoint.input_shape(state)
    if len(shape) != 3:
        raise ValueError(f"init={cfg.init} takes images (channels, height, width), the energy takes {shape}")
    if cfg.images is not None:
        return given_images(cfg, state)
    test = dataset_of(cfg, state).test
    if cfg.num_samples > len(test):
        raise ValueError(f"num_samples must be at most the {len(test)} test images, got {cfg.num_samples}")
    return scaled(test[torch.randperm(len(test), generator=generator)[: cfg.num_samples]])


def labels_of(cfg: DictConfig, state: dict[str, Any], energy: nn.Module, count: int) -> Tensor | None:
    """The labels of `count` chains: `label=` one class, by name or number, all in turn, or none, where any will do."""
    if cfg.label in ("all", "any"):
        return labels_in_proportion(energy, count) if cfg.label == "all" else None
    classes = getattr(energy, "classes", None)
    if classes is None:
        raise ValueError(f"label={cfg.label} needs an energy with classes, which checkpoint={cfg.checkpoint} is not")
    names, label = state.get("class_names") or [], cfg.label
    if str(label) in names:  # a class called 10 goes before the tenth
        label = names.index(str(label))
    elif names and not isinstance(label, int):
        raise ValueError(f"label must be all, any, a number or one of {', '.join(names[:20])}; got {label!r}")
    return torch.full((count,), check.number("label", label, 0, classes - 1, integer=True))


def run(
    cfg: DictConfig, sampler: SGLD, energy: nn.Module, x: Tensor, steps: int,
    given: Given | None = None, labels: Tensor | None = None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Snapshots (T, B, *shape) of chains that start at `x`, and their steps."""
    every = max(1, steps // cfg.frames)
    check.memory(f"frames={cfg.frames} of {len(x)} chains", 4 * x.numel() * (steps // every + 2))
    generators = chain_generators(cfg.seed, len(x), pick_device(cfg.device))
    trace = trace_in_batches(sampler.trace, energy, x, generators, cfg.batch_size, every, steps, labels, given)
    return trace, [min(i * every, steps) for i in range(len(trace))]


def write(
    cfg: DictConfig,
    samples: Tensor,
    trace: Tensor,
    times: list[int],
    columns: int = 0,
    labels: Tensor | None = None,
    class_names: Sequence[str] = (),
    sheets: Mapping[str, Callable[[Path], None]] = MappingProxyType({}),
) -> None:
    """samples.npz of `samples` (N, *shape), pictures of them and of snapshots (T, B, *shape), and the `sheets`, which
    are drawn by file name."""
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(
            "samples are not finite: the steps diverge; lower sampler.step_size, or set sampler.grad_clamp and bounds"
        )
    out = output_folder(cfg.out, cfg.checkpoint, "sampling")
    arrays = {"samples": samples.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    names: list[str] = []
    if labels is not None and len(labels) > len(rows := labels.unique()) > 1:  # a row a class, as many of each
        columns = max(1, min(int(labels.bincount()[rows].amin()), 400 // len(rows)))
        samples = torch.cat([samples[labels == label][:columns] for label in rows])
        names = [class_names[label] if label < len(class_names) else str(label) for label in rows.tolist()[:400]]
    with whole_files(out) as aside:
        np.savez_compressed(aside / "samples.npz", **arrays)  # type: ignore[arg-type]
        if samples.dim() == 4:
            columns = columns or max(1, min(round(len(samples[:400]) ** 0.5), 20))
            figures.grid(aside / "grid.png", samples[:400], columns, names if class_names else ())
            shown = sorted({round(i * (len(trace) - 1) / cfg.snapshots) for i in range(cfg.snapshots + 1)})
            figures.strips(aside / "strips.png", trace[shown, :8], [times[i] for i in shown])
            figures.animation(aside / "chains.gif", trace[:, :64])
        for name, draw_sheet in sheets.items():
            draw_sheet(aside / name)
    print(
        f"samples      {out / 'samples.npz'}  {arrays['samples'].shape} in [{samples.min():.3g}, {samples.max():.3g}]"
    )
    if samples.dim() == 4:
        print(f"pictures     {' '.join(str(out / name) for name in ('grid.png', 'strips.png', 'chains.gif'))}")
    for name in sheets:
        print(f"sheet        {out / name}")


def draw(cfg: DictConfig, state: dict[str, Any], sampler: SGLD, energy: nn.Module, steps: int) -> None:
    """Samples from noise, from the checkpoint's chains or from images."""
    shape, count = checkpoint.input_shape(state), cfg.num_samples
    if cfg.init == "noise":
        check.memory(f"num_samples={count}", count * (4 * math.prod(shape) * 2 + 2 * GENERATOR))
    labels = labels_of(cfg, state, energy, count)
    if cfg.init == "buffer":
        if "buffer" not in state:
            raise ValueError(f"checkpoint={cfg.checkpoint} holds no replay buffer: init=noise starts without one")
        chains = state["buffer"]["chains"]
        chosen = torch.randperm(len(chains), generator=torch.Generator().manual_seed(cfg.seed))
        if labels is not None:
            held = state["buffer"]["labels"]
            chosen = chosen if cfg.label == "all" else chosen[held[chosen] == labels[0]]
            labels = held[chosen[:count]]
        if count > len(chosen):
            raise ValueError(f"num_samples must be at most the {len(chosen)} chains of the buffer, got {count}")
        x = chains[chosen[:count]]
    elif cfg.init == "images":
        x = given_images(cfg, state)
        labels = labels_of(cfg, state, energy, len(x))
    else:
        x = uniform_noise((count, *shape), chain_generators(cfg.seed + 1, count))
    trace, times = run(cfg, sampler, energy, x, steps, labels=labels)
    write(cfg, trace[-1], trace, times, labels=labels, class_names=state.get("class_names") or ())


def restore(cfg: DictConfig, state: dict[str, Any], sampler: SGLD, energy: nn.Module, levels: list[float]) -> None:
    """Degrade images, at each level of noise, restore them and compare: a table of PSNR and a contact sheet."""
    generator = torch.Generator().manual_seed(cfg.seed)
    clean = source_images(cfg, state, generator)
    hidden = restoration.hidden_pixels(str(cfg.mask), clean.shape[1:]) if cfg.init == "inpaint" else None
    judged = torch.ones(clean.shape[1:], dtype=torch.bool) if hidden is None else hidden
    table, restored, rows, sheet = {}, [], ["original"], [clean[:8]]
    for level in levels:
        posterior, given = energy, None
        if hidden is not None:
            name, seen = f"mask {Path(cfg.mask).stem}", clean.masked_fill(hidden, 0)
            others = restoration.inpainted(seen, hidden)
            start = uniform_noise(seen.shape, chain_generators(cfg.seed + 1, len(seen))).where(hidden, seen)
            given = ((~hidden).expand_as(seen), seen)
        elif cfg.init == "denoise":
            name, seen = f"σ {level:g}", restoration.noisy(clean, level, generator)
            start, others = seen, restoration.denoised(seen, clean)
        else:
            blur = partial(restoration.blurred, blur=cfg.blur)
            name, seen = f"blur {cfg.blur:g}, σ {level:g}", restoration.noisy(blur(clean), level, generator)
            posterior, start = composition.Observed(energy, blur, cfg.fidelity), torch.stack([seen, seen], dim=1)
            others = restoration.sharpened(seen, clean, cfg.blur)
            given = (torch.tensor([False, True]).view(1, 2, 1, 1, 1).expand_as(start), start)
        steps = cfg.steps or STEPS.get(cfg.init) or max(1, round(50 * level))
        trace, times = run(cfg, sampler, posterior, start, steps, given)
        if posterior is not energy:
            trace = trace[:, :, 0]  # beside the image stands what was seen of it
        restored.append(trace[-1])
        images = {"degraded": seen} | others | {"energy": trace[-1]}
        table[name] = {key: metrics.psnr(x[:, judged], clean[:, judged]).mean().item() for key, x in images.items()}
        rows += [f"{name if key == 'degraded' else key}\n{value:.2f} dB" for key, value in table[name].items()]
        sheet += [x[:8] for x in images.values()]
    name = f"{cfg.init.removesuffix('e')}ed.png"
    draw_sheet = partial(figures.labelled_rows, x=torch.stack(sheet), columns=[""] * len(clean[:8]), rows=rows)
    write(cfg, torch.cat(restored), trace, times, sheets={name: draw_sheet})
    print(f"{'PSNR, dB':20s}" + "".join(f"{key:>17s}" for key in images))
    for name, values in table.items():
        print(f"{name:20s}" + "".join(f"{value:17.2f}" for value in values.values()))
    where = "in the hole, " if hidden is not None else ""
    print(f"{where}mean of {len(clean)} images; the filters' settings are the best of several in hindsight")


def interpolate(cfg: DictConfig, state: dict[str, Any], sampler: SGLD, energy: nn.Module, steps: int) -> None:
    """Paths between pairs of images: linear blends, relaxed with their ends held; a contact sheet with energies."""
    check.number("path_images", cfg.path_images, 3, integer=True)
    path = composition.InterpolationPath(energy, cfg.spring)
    ends = source_images(cfg, state, torch.Generator().manual_seed(cfg.seed))
    if len(ends) % 2:
        raise ValueError(f"init=interpolate takes pairs of images, got {len(ends)}")
    check.memory(f"path_images={cfg.path_images}", 4 * ends.numel() * cfg.path_images)
    t = torch.linspace(0, 1, cfg.path_images).view(1, -1, 1, 1, 1)
    linear = torch.lerp(ends[0::2, None], ends[1::2, None], t)
    held = ((t == 0) | (t == 1)).expand_as(linear)
    trace, times = run(cfg, sampler, path, linear, steps, (held, linear))
    paths = {"linear": linear, "relaxed": trace[-1]}
    device = pick_device(cfg.device)
    energies = {name: torch.stack([energy(one.to(device)).detach().cpu() for one in x]) for name, x in paths.items()}
    first = [{name: x[:4] for name, x in of.items()} for of in (paths, energies)]
    sheets = {"interpolated.png": lambda file: figures.paths(file, *first)}
    write(cfg, trace[-1].flatten(0, 1), trace.flatten(1, 2), times, cfg.path_images, sheets=sheets)
    means = ", ".join(f"{name} {values.amax(dim=1).mean():.3f}" for name, values in energies.items())
    print(f"highest energy on the way: {means} (mean of {len(linear)} paths)")


def sample(cfg: DictConfig) -> None:
    for key in ("num_samples", "batch_size", "snapshots", "frames"):
        check.number(key, cfg[key], 1, integer=True)
    check.optional("steps", cfg.steps, 1, integer=True)
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    levels = list(cfg.noise_std) if OmegaConf.is_list(cfg.noise_std) else [cfg.noise_std]
    if levels in ([], [None]):
        levels = [0.3 if cfg.init == "denoise" else 0.0]
    for level in levels:
        check.number("noise_std", level, 0)
    check.choice("init", cfg.init, ("noise", "buffer", "images", "denoise", "inpaint", "sharpen", "interpolate"))
    if (cfg.init == "images" and cfg.images is None) or (cfg.init in ("noise", "buffer") and cfg.images is not None):
        raise ValueError(f"init=images and images=FILE go together, got init={cfg.init} images={cfg.images}")
    if cfg.label not in ("all", "any") and cfg.init not in ("noise", "buffer", "images"):
        raise ValueError(f"label={cfg.label} is for init=noise, buffer or images; init={cfg.init} takes E(x)")
    output_folder(cfg.out, cfg.checkpoint, "sampling")  # refused before the work
    state = checkpoint.load(cfg.checkpoint)
    given: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
    sampler = trained.sampler_of(state, given)
    energy = composed_energy(cfg, state).to(pick_device(cfg.device))
    if cfg.init in ("inpaint", "denoise", "sharpen"):
        restore(cfg, state, sampler, energy, levels)
    elif cfg.init == "interpolate":
        interpolate(cfg, state, sampler, energy, cfg.steps or STEPS["interpolate"])
    else:
        draw(cfg, state, sampler, energy, cfg.steps or STEPS[cfg.init])


def launch(cfg: DictConfig) -> None:
    with one_line_errors():
        sample(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    launch(cfg)


if __name__ == "__main__":
    run_main(main)
