"""Degraded images, what restores them without an energy, and chains of an energy that do. Images are (N, C, H, W) in
[−1, 1]."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import filters, restoration
from torch import Tensor, nn

from ebm import check
from ebm.composition import Observed
from ebm.evaluation import figures, metrics
from ebm.files import opened
from ebm.sampling.chains import Chains, Given

PLACES = ("left", "right", "top", "bottom", "center")


def hidden_pixels(mask: str, shape: Sequence[int]) -> Tensor:
    """The pixels that `mask` hides, boolean (C, H, W): a half of the image (left, right, top, bottom), the middle
    square of half its side (center), or a file of H×W pixels: .npy of booleans, true where hidden, or a picture,
    white where hidden. Raises ValueError where it is none of these, or hides all or nothing."""
    height, width = shape[1:]
    hidden = np.zeros((height, width), bool)
    if mask in PLACES:
        rows = {"top": slice(height // 2), "bottom": slice(height - height // 2, None)}
        columns = {"left": slice(width // 2), "right": slice(width - width // 2, None)}
        if mask == "center":
            rows[mask], columns[mask] = (slice(size // 4, size - size // 4) for size in (height, width))
        hidden[rows.get(mask, slice(None)), columns.get(mask, slice(None))] = True
    elif not Path(mask).is_file():
        raise ValueError(f"mask must be {', '.join(PLACES)} or a file, .npy or a picture, got {mask}")
    else:
        try:
            is_array = Path(mask).suffix == ".npy"
            hidden = np.load(mask, allow_pickle=False) if is_array else np.asarray(opened(mask, "L")) >= 128
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"mask={mask} is no readable mask: {error}") from error
        if hidden.shape != (height, width) or hidden.dtype != bool:
            got = f"{hidden.dtype} {hidden.shape}"
            raise ValueError(f"mask={mask} must be bool ({height}, {width}) like the images, or a picture, got {got}")
    if hidden.all() or not hidden.any():
        raise ValueError(f"mask={mask} must hide some pixels and leave some, it hides {hidden.sum()} of {hidden.size}")
    return torch.from_numpy(hidden).expand(*shape)


def noisy(x: Tensor, noise_std: float, generator: torch.Generator) -> Tensor:
    """clip(x + noise_std·ε) to [−1, 1], ε ~ N(0, I)."""
    return (x + noise_std * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def blurred(x: Tensor, blur: float) -> Tensor:
    """Convolved with a Gaussian of standard deviation `blur` > 0 pixels, cut at four of them; the border goes on."""
    radius = round(4 * check.number("blur", blur, 0, open_low=True))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / blur) ** 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = nn.functional.pad(x, (radius,) * 4, mode="replicate")
    x = nn.functional.conv2d(x, weights, groups=x.shape[1])
    return nn.functional.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])


def best(candidates: Iterable[Tensor], clean: Tensor) -> Tensor:
    """Of several restorations the one with the highest mean PSNR: in hindsight, which favours it."""
    return max(candidates, key=lambda x: float(metrics.psnr(x, clean).mean()))


def by_image(filtered: Callable[..., NDArray[Any]], x: Tensor, **settings: Any) -> Tensor:
    """`filtered` of every image as scikit-image has them, (H, W) or (H, W, C) in [0, 1] with its channel_axis."""
    axis = -1 if x.shape[1] > 1 else None
    images = x.double().add(1).div(2).movedim(1, -1).numpy()
    done = [filtered(image if axis else image[..., 0], channel_axis=axis, **settings) for image in images]
    return torch.from_numpy(np.stack(done)).view(images.shape).movedim(-1, 1).mul(2).sub(1).clamp(-1, 1).to(x.dtype)


def denoised(x: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Noisy `x` by the median of a cross or square of pixels, and by the bilateral filter (Tomasi & Manduchi 1998)."""
    from scipy import ndimage  # takes half a second to import

    footprints = (ndimage.generate_binary_structure(2, 1), np.ones((3, 3)), np.ones((5, 5)))
    medians = (torch.from_numpy(ndimage.median_filter(x.numpy(), footprint=area[None, None])) for area in footprints)
    settings = [(colour, space) for colour in (0.05, 0.1, 0.25, 0.5) for space in (1, 2, 3)]
    bilateral = (by_image(restoration.denoise_bilateral, x, sigma_color=c, sigma_spatial=s) for c, s in settings)
    return {"median": best(medians, clean), "bilateral": best(bilateral, clean)}


def inpainted(x: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """`x` with the pixels `hidden` (C, H, W) filled in by biharmonic equations; what `x` has there plays no part."""
    return {"biharmonic": by_image(restoration.inpaint_biharmonic, x, mask=hidden[0].numpy()).where(hidden, x)}


def sharpened(x: Tensor, clean: Tensor, blur: float) -> dict[str, Tensor]:
    """Blurred `x` by the unsharp mask, and by Richardson & Lucy's deconvolution, which is told the blur."""
    point = torch.zeros(1, 1, *(2 * round(4 * blur) + 1,) * 2)
    point[..., round(4 * blur), round(4 * blur)] = 1
    kernel = blurred(point, blur)[0, 0].double().numpy()

    def deconvolved(image: NDArray[Any], channel_axis: int | None, num_iter: int) -> NDArray[Any]:
        return restoration.richardson_lucy(image, kernel if channel_axis is None else kernel[..., None], num_iter)

    settings = [(radius, amount) for radius in (0.5 * blur, blur, 1.5 * blur) for amount in (0.5, 1, 2, 3, 5)]
    unsharp = (by_image(filters.unsharp_mask, x, radius=radius, amount=amount) for radius, amount in settings)
    lucy = (by_image(deconvolved, x, num_iter=count) for count in (10, 30, 100, 300))
    return {"unsharp mask": best(unsharp, clean), "Richardson–Lucy": best(lucy, clean)}


# --- with an energy


@dataclass
class Task:
    """Degraded images, and the chains that restore them."""

    name: str  # of the degradation, in the table
    clean: Tensor  # the images
    seen: Tensor  # and what the degradation left of them
    filtered: dict[str, Tensor]  # what filters make of that
    energy: nn.Module  # which the chains go down
    start: Tensor  # of the chains: images, or (N, 2, C, H, W) of an image and what was seen of it (`Observed`)
    given: Given | None = None  # what the chains keep, as in SGLD
    hidden: Tensor | None = None  # (C, H, W), the pixels that are judged; None for all


def denoising(energy: nn.Module, clean: Tensor, noise_std: float, generator: torch.Generator) -> Task:
    """Chains from the noisy images."""
    seen = noisy(clean, noise_std, generator)
    return Task(f"σ {noise_std:g}", clean, seen, denoised(seen, clean), energy, start=seen)


def inpainting(energy: nn.Module, clean: Tensor, mask: str, noise: Tensor) -> Task:
    """Chains from `noise` in the hole, the pixels around it given; `mask` as in `hidden_pixels`."""
    hidden = hidden_pixels(mask, clean.shape[1:])
    seen = clean.masked_fill(hidden, 0)
    given = ((~hidden).expand_as(seen), seen)
    start, filtered = noise.where(hidden, seen), inpainted(seen, hidden)
    return Task(f"mask {Path(mask).stem}", clean, seen, filtered, energy, start, given, hidden)


def sharpening(
    energy: nn.Module, clean: Tensor, noise_std: float, generator: torch.Generator, blur: float, fidelity: float
) -> Task:
    """Chains from the blurred and noisy images, down the energy and `fidelity` times how far the blurred image is from
    what was seen."""
    degrade = partial(blurred, blur=blur)
    seen = noisy(degrade(clean), noise_std, generator)
    observed = Observed(energy, degrade, fidelity)
    start = torch.stack([seen, seen], dim=1)
    given = (torch.tensor([False, True]).view(1, 2, 1, 1, 1).expand_as(start), start)
    name = f"blur {blur:g}, σ {noise_std:g}"
    return Task(name, clean, seen, sharpened(seen, clean, blur), observed, start, given)


@dataclass
class Restoration:
    """What the chains made of a task's images, beside what filters made of them."""

    name: str  # of the degradation
    images: dict[str, Tensor]  # degraded, by each filter, by the energy
    psnr: dict[str, float]  # of each, mean over the images, in dB
    in_hole: bool  # the PSNR is that of the hidden pixels
    trace: Tensor  # snapshots (T, N, C, H, W) of the chains
    steps: list[int]  # after which they were taken


def restored(task: Task, chains: Chains, steps: int) -> Restoration:
    """Run the chains of a task so many steps and compare."""
    trace, times = chains.run(task.energy, task.start, steps, given=task.given)
    if task.start.dim() > task.clean.dim():
        trace = trace[:, :, 0]  # beside the image stands what was seen of it
    images = {"degraded": task.seen} | task.filtered | {"energy": trace[-1]}
    judged = torch.ones(task.clean.shape[1:], dtype=torch.bool) if task.hidden is None else task.hidden
    psnr = {name: metrics.psnr(x[:, judged], task.clean[:, judged]).mean().item() for name, x in images.items()}
    return Restoration(task.name, images, psnr, task.hidden is not None, trace, times)


def table(restorations: Sequence[Restoration]) -> str:
    """The PSNR in lines of text, a row a degradation, a column a way to restore."""
    first = restorations[0]
    lines = [f"{'PSNR, dB':20s}" + "".join(f"{name:>17s}" for name in first.psnr)]
    for name, psnr in {each.name: each.psnr for each in restorations}.items():
        lines.append(f"{name:20s}" + "".join(f"{value:17.2f}" for value in psnr.values()))
    where = "in the hole, " if first.in_hole else ""
    count = len(first.images["degraded"])
    lines.append(f"{where}mean of {count} images; the filters' settings are the best of several in hindsight")
    return "\n".join(lines)


def comparison_sheet(path: Path, clean: Tensor, restorations: Sequence[Restoration]) -> None:
    """A picture file: eight of the images in the first row, and below it each degradation and its restorations."""
    labels, images = ["original"], [clean[:8]]
    for each in restorations:
        images += [x[:8] for x in each.images.values()]
        for name, psnr in each.psnr.items():
            labels.append(f"{each.name if name == 'degraded' else name}\n{psnr:.2f} dB")
    figures.labelled_rows(path, torch.stack(images), [""] * len(clean[:8]), labels)
