"""Arrays and pictures that a user gives: a data set of an .npz, and images to begin with."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm import check
from ebm.data import Dataset, check_hold_out, held_out, of_splits, scaled
from ebm.files import image_files, read_image

ARRAYS = ("train", "test", "validation")


def dataset(file: str, flip: float = 0.0, hold_out: int | str | None = None) -> Dataset:
    """Arrays of an .npz: `train`, and where there are any `test`, `validation`, their labels (N,), as `train_labels`,
    and `class_names`.

    Images are (N, C, H, W), (N, H, W, C) with C = 1 or 3, or (N, H, W), of bytes or floats in [−1, 1]; vectors (N, D).
    Without `test` a tenth is held out; `flip`, `hold_out` as in `Dataset`. Raises ValueError for another file.
    """
    source = f"data.file={file}"
    check_hold_out(hold_out)
    path = Path(str(file))
    check.that(path.is_file() and path.suffix == ".npz", f"{source} must be an .npz file that is there")
    known = [*ARRAYS, *(f"{split}_labels" for split in ARRAYS), "class_names"]
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy's own words may be advice to trust the file
        raise ValueError(f"{source} holds no arrays that can be read ({type(error).__name__})") from error
    if "train" not in found or set(found) - set(known):
        raise ValueError(f"{source} must hold train, and may hold {', '.join(known[1:])}; got {', '.join(found)}")
    names = [str(name) for name in found["class_names"].ravel()] if "class_names" in found else None
    sets = {split: _arrays_of(found, split, source) for split in ARRAYS}
    if sets["test"][0] is None:
        x, labels = sets["train"]
        sets["train"], sets["test"] = held_out(x, labels, math.ceil(len(x) / 10), seed=0)
    return of_splits(sets, name=path.stem, class_names=names, flip=flip, hold_out=hold_out)


def _arrays_of(found: Mapping[str, NDArray[Any]], split: str, source: str) -> tuple[Any, Tensor | None]:
    """The images of a split, channels first, or None, and their labels."""
    labels, x = found.get(f"{split}_labels"), found.get(split)
    if x is None:
        check.that(labels is None, f"{source} holds {split}_labels and no {split}")
        return None, None
    got = f"got {x.dtype} {x.shape}"
    last = x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3)
    unclear = x.ndim == 4 and not last and x.shape[1] > 4 >= x.shape[-1]  # as (N, 32, 32, 4), with transparency
    if (x.dtype != np.uint8 and x.dtype.kind != "f") or x.ndim not in (2, 3, 4) or len(x) == 0 or unclear:
        raise ValueError(
            f"{source}: {split} must be bytes or floats (N, C, H, W), (N, H, W, C) with C = 1 or 3, (N, H, W) or "
            f"(N, D), N > 0, {got}"
        )
    if x.dtype.kind == "f" and x.ndim > 2 and x.min(initial=0) >= 0:
        raise ValueError(f"{source}: floats must be in [-1, 1], those of {split} are in [0, 1]: store 2x - 1, or bytes")
    if labels is not None and (labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0):
        got = f"got {labels.dtype} {labels.shape}"
        raise ValueError(f"{source}: {split}_labels must be integers >= 0, ({len(x)},), {got}")
    if x.ndim == 3:
        x = x[:, None]
    elif last:
        x = x.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def given_images(path: str, shape: Sequence[int], background: str = "black") -> Tensor:
    """Images (N, *shape) in [−1, 1] of `images=`: an .npz with `samples`, an .npy, a picture or a folder of them.

    `background` lies behind a picture's transparent pixels. Raises ValueError where the images cannot be had or are not
    of `shape` or range.
    """
    source = Path(path)
    check.that(source.exists(), f"images={path} does not exist: give an .npz, an .npy, a picture or a folder of them")
    if source.suffix in (".npz", ".npy") and source.is_file():
        try:
            array = np.load(source, allow_pickle=False)
            x = array["samples"] if source.suffix == ".npz" else array
        except Exception as error:  # whatever a torn or hostile file can make its reader raise
            # numpy's own words may be advice to trust the file
            raise ValueError(f"images={path} holds no array of images ({type(error).__name__})") from error
        return checked_images(x, shape, f"images={path}")
    files = image_files(source) if source.is_dir() else [source]
    check.that(files, f"images={path} is a folder without images")
    return scaled(torch.stack([read_image(file, shape, background) for file in files]))


def checked_images(x: Any, shape: Sequence[int], source: str) -> Tensor:
    """`x` as float32 (N, *shape) in [−1, 1]; ValueError naming `source` where it is not."""
    if not isinstance(x, (np.ndarray, Tensor)) or tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"{source} must hold images (N, {', '.join(map(str, shape))}), got {np.shape(x)}")
    check.that(len(x) > 0, f"{source} holds no images")
    try:
        images = torch.as_tensor(x).float()
    except TypeError as error:
        raise ValueError(f"{source} must hold numbers, got {x.dtype}") from error
    if not bool((images.abs() <= 1).all()):
        raise ValueError(f"{source} must hold values in [-1, 1], got [{images.min():g}, {images.max():g}]")
    return images
