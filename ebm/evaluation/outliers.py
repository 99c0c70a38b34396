"""Sets of images that are not of the data: transforms of the test images, and other data sets."""

import os.path
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import functional

from ebm import check
from ebm.data import TORCHVISION, Dataset, images_and_labels, scaled
from ebm.files import image_files, read_image
from ebm.sampling.chains import uniform_noise

# torchvision's classes
OTHERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
OTHERS |= {"omniglot": "Omniglot", "svhn": "SVHN", "cifar10": "CIFAR10"}
SPLITS = ("train", "test")


def _halves(x: Tensor, generator: torch.Generator) -> Tensor:
    """The upper half of each image over the lower half of another."""
    order, middle = torch.randperm(len(x), generator=generator), x.shape[-2] // 2
    return torch.cat([x[order, :, :middle], x[order.roll(1), :, middle:]], dim=-2)


MADE: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {  # of the test images or vectors x (N, *shape)
    "noise": lambda x, generator: uniform_noise(x.shape, generator),
    "inverted": lambda x, _: -x,
    "permuted": lambda x, generator: x.flatten(1)[:, torch.randperm(x[0].numel(), generator=generator)].view(x.shape),
    "constant": lambda x, _: torch.linspace(-1, 1, 256).view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:]),
}
MADE_OF_IMAGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {  # of the test images x (N, C, H, W)
    "rotated": lambda x, _: x.rot90(2, dims=(-2, -1)),
    "rotated90": lambda x, _: x.rot90(1, dims=(-2, -1)),
    "tiny": lambda x, _: functional.pad(x[..., ::2, ::2], [x.shape[-1] // 2, x.shape[-2] // 2, 0, 0], fill=-1),
    # its side is what reflection at the edges can fill
    "blurred": lambda x, _: functional.gaussian_blur(x, [min(9, 2 * min(x.shape[-2:]) - 1)] * 2, [1.5, 1.5]),
    "halves": _halves,
    "grey": lambda x, _: functional.rgb_to_grayscale(x, num_output_channels=3),
}
LEVELS = ("gaussian_", "uniform_")  # and a number


def is_built_in(name: str) -> bool:
    return name in (*SPLITS, "noisy", *MADE, *MADE_OF_IMAGES, *OTHERS) or name.startswith(LEVELS)


def check_name(name: str) -> None:
    """ValueError for what is neither the name of a set nor, with a /, a path."""
    if "/" in name:
        return
    check.that(is_built_in(name), f"ood.sets: {name} is no set that is known; a folder of images needs a / in its path")
    if name.startswith(LEVELS):
        kind, _, level = name.partition("_")
        try:
            check.number(kind, float(level), 0)
        except ValueError:
            raise ValueError(f"ood.sets: {name} needs a number after its _, such as {kind}_0.3") from None


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """The sets `names` under the keys that their numbers get: a name is its own key; a folder's is the shortest end of
    its path, the parts joined by _, that is no end of another folder's path and no name that `outliers` knows.

    noise, my/cats, a/dogs, b/dogs, x/test → noise, cats, a_dogs, b_dogs, x_test. Raises ValueError for an unknown name.
    """
    names = [str(name) for name in names]
    paths = {name: os.path.abspath(name) for name in names if "/" in name}
    keys = {}
    for name in names:
        check_name(name)
        key = name
        if name in paths:
            taken = {end for path in paths.values() if path != paths[name] for end in _ends(path)}
            key = next(end for end in _ends(paths[name]) if end not in taken and not is_built_in(end))
        keys[key] = name
    return keys


def _ends(path: str) -> list[str]:
    parts = Path(path).parts[1:]
    return [*("_".join(parts[-count:]) for count in range(1, len(parts) + 1)), path]


def outliers(
    name: str, dataset: Dataset, root: str, noise_std: float = 0.3, seed: int = 0, background: str = "black"
) -> Tensor:
    """The set `name`, images (N, *shape) in [−1, 1] or bytes, made of the test images of `dataset` or read from `root`.

    train, test             the data set's own splits
    noise                   as many images of uniform noise in [−1, 1]
    noisy, gaussian_<σ>     test images + N(0, σ²), clamped; σ = `noise_std` for noisy
    uniform_<a>             test images + noise uniform in [−a, a], clamped
    rotated, rotated90      by 180° and by 90°
    tiny                    at half size in the lower right corner of a black image
    inverted                −x
    blurred                 by a Gaussian of 1.5 pixels
    permuted                all pixels in one random order
    halves                  the upper half of each over the lower half of another
    grey                    without their colours
    constant                256 images of one grey each, black to white
    mnist, fashion_mnist, kmnist, omniglot, svhn, cifar10    the test split that torchvision finds in `root`; it never
                            downloads. In the data's channels and size
    <a path with a />       a folder of images, all below it, over `background` where they are transparent

    Every set draws from a generator of its own, so that its numbers do not depend on what else is evaluated.
    Raises ValueError for a name that is none of these and for a set that cannot be had.
    """
    check_name(name)
    if name in OTHERS or "/" in name:
        return _read(name, dataset, root, background)
    if name in SPLITS:
        return getattr(dataset, name)
    x, generator = scaled(dataset.test), torch.Generator().manual_seed(seed)
    if name in MADE:
        return MADE[name](x, generator)
    if name in MADE_OF_IMAGES:
        check.that(x.dim() == 4, "made of images, the data are vectors")
        height, width = x.shape[-2:]
        check.that(height == width or name != "rotated90", f"needs square images, the data's are {height}×{width}")
        check.that(x.shape[1] == 3 or name != "grey", f"needs colours, the data have {x.shape[1]} channel(s)")
        return MADE_OF_IMAGES[name](x, generator)
    kind, _, level = name.partition("_")
    noise = uniform_noise(x.shape, generator) if kind == "uniform" else torch.randn(x.shape, generator=generator)
    return (x + (noise_std if name == "noisy" else float(level)) * noise).clamp(-1, 1)


def _read(name: str, dataset: Dataset, root: str, background: str) -> Tensor:
    """Another data set's test images, or those of a folder, as bytes in the data's channels and size."""
    check.that(len(dataset.shape) == 3, "images are no outliers to vectors")
    check.that(OTHERS.get(name) != dataset.name, "it is the data set itself")
    if name in OTHERS:
        return _like(_torchvision_test(OTHERS[name], root), dataset.shape)
    check.that(Path(name).is_dir(), f"{name} is no folder")
    files = image_files(Path(name))
    check.that(len(files) >= 2, f"{name} holds {len(files)} images, at least 2 are needed")
    return torch.stack([read_image(file, dataset.shape, background) for file in files])


def _torchvision_test(name: str, root: str) -> Tensor:
    """Bytes (N, C, H, W) of a test split that lies in `root`."""
    which = {"background": False} if name == "Omniglot" else TORCHVISION[name][-1]
    try:
        split = getattr(torchvision.datasets, name)(root, download=False, **which)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{name} is not in {root}, where torchvision looks for it") from error
    x = images_and_labels(split)[0]
    return 255 - x if name == "Omniglot" else x  # black strokes on white


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bytes (N, C, H, W) as bytes (N, *shape): grey or RGB, resized. Raises ValueError for any other channels."""
    check.that(shape[0] in (1, 3), f"its images are grey or RGB, the data's have {shape[0]} channels")
    if x.shape[1] == 3 and shape[0] == 1:
        x = functional.rgb_to_grayscale(x)
    elif x.shape[1] == 1 and shape[0] == 3:
        x = x.expand(-1, 3, -1, -1)
    return x if x.shape[-2:] == shape[-2:] else functional.resize(x, list(shape[-2:]), antialias=True)
