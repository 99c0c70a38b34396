"""Files: which of a folder are images and what they show, as bytes; and results, written whole or not at all."""

import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ebm import check

# A file may call itself what it likes: only these readers see it (Pillow would start Ghostscript for an EPS).
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {suffix for suffix, reader in Image.registered_extensions().items() if reader in FORMATS}
FEW = 1000  # files that are read within a second
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF


def image_files(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files in `folder` and below whose suffix is that of an image (.png, .jpg, .tif, …), in order.

    Links are followed, hidden files and folders (.ipynb_checkpoints, macOS's ._a.png) left out. Raises ValueError for a
    link that leads nowhere or to a folder that it lies in; `above` are those.
    """
    real = folder.resolve()
    check.that(len(above) <= 100, f"{folder} lies more than 100 folders deep")
    check.that(real not in above, f"{folder} leads back to {real}, in which it lies: take that loop of links out")
    files = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        check.that(path.exists(), f"{path} is a link that leads nowhere")
        if path.is_dir():
            files += image_files(path, (*above, real))
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            files.append(path)
    return sorted(files)


def read_image(path: Path, shape: Sequence[int], background: str = "black") -> Tensor:
    """An image file as bytes of `shape` (C, H, W), C = 1 (grey) or 3 (RGB): `opened`, then `fitted`."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{path} is read as grey or RGB, not as {tuple(shape)}: give an array of those, .npz or .npy")
    return fitted(opened(path, "L" if shape[0] == 1 else "RGB", background), *shape[1:])


def decoded(
    folder: Path, files: Sequence[Path], shape: Sequence[int], background: str = "black", skip_unreadable: bool = False
) -> dict[Path, Tensor]:
    """What `read_image` makes of each of the `files` of `folder`, bytes of `shape`. One that cannot be read raises
    ValueError; if such are to be skipped, a line on stderr says so.

    More than a few are decoded once, if all can be read: an array in plain-ebm's cache folder holds them, under a hash
    of the files' paths, sizes and times and of what reads them. Where it cannot be written, stderr says so.
    """
    kept = _kept(files, shape, background) if len(files) > FEW else None
    if kept:
        with suppress(OSError, ValueError):  # it is not there, or torn
            images = np.load(kept, mmap_mode="c", allow_pickle=False)
            if images.shape == (len(files), *shape):
                return dict(zip(files, torch.from_numpy(images), strict=True))
    images, unreadable = _decode(folder, files, shape, background, skip_unreadable)
    if unreadable:
        why = next(iter(unreadable.values()))
        print(f"data.root={folder}: {len(unreadable)} unreadable images left out: {why}", file=sys.stderr)
    elif kept:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(images))
        try:
            write_whole(kept, header.getbuffer(), images.data)
        except OSError as error:
            print(f"{error}; the images of {folder} will be read anew", file=sys.stderr)
    read = zip(files, torch.from_numpy(images), strict=True)
    return {file: image for file, image in read if file not in unreadable}


def _kept(files: Sequence[Path], shape: Sequence[int], background: str) -> Path | None:
    """Where the decoded files are kept; None where there is no home directory."""
    states = [(str(file.absolute()), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    what = json.dumps([list(shape), background, PIL.__version__, reader, states])
    with suppress(RuntimeError):
        return cache_folder() / "images" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
    return None


def _decode(
    folder: Path, files: Sequence[Path], shape: Sequence[int], background: str, skip_unreadable: bool
) -> tuple[NDArray[np.uint8], dict[Path, str]]:
    """The images (N, *shape), and why some could not be read, which are 0."""
    images, unreadable = np.zeros((len(files), *shape), np.uint8), {}
    bar = tqdm(files, desc=f"reading {folder}", unit=" images", disable=None, dynamic_ncols=True)
    for image, file in zip(images, bar, strict=True):
        try:
            image[:] = read_image(file, shape, background)
        except ValueError as error:
            if not skip_unreadable:
                raise ValueError(f"{error}; data.skip_unreadable=true goes on without such files") from error
            unreadable[file] = str(error)
    return images, unreadable


def opened(path: str | Path, mode: str, background: str = "black") -> Image.Image:
    """What is to be seen of an image file (the first picture in it) in `mode` L or RGB: turned by its EXIF orientation,
    over `background`, a colour's name or #rrggbb, where it is transparent.

    16-bit integers are scaled from their range, floats from [0, 1]. Raises ValueError that names the file where it
    cannot be read, has too many pixels to decode, or values whose range cannot be told: 32-bit integers, other floats.
    """
    try:
        check.that(Path(path).is_file(), "it is no file")  # a pipe would be waited for
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode[0] in "IF":
                    image = _in_bytes(image, getattr(file, "tag_v2", {}), file.format == "PPM")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert(mode)
    except Exception as error:  # whatever a hostile file can make its readers raise
        raise ValueError(f"{path} is not a readable image: {error}") from error


def _in_bytes(image: Image.Image, tags: Mapping[int, Any], is_ppm: bool) -> Image.Image:
    """Integers of 16 bits (12 in some TIFFs) or floats as bytes; Pillow would clip them."""
    if image.mode == "I" and not is_ppm:  # Pillow scales a PPM to 16 bits
        raise ValueError("the range of its signed or 32-bit integers cannot be told: save it with 8 or 16 bits")
    top = 1 if image.mode == "F" else 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    values = np.asarray(image, dtype=np.float64)
    if not ((values >= 0) & (values <= top)).all():
        raise ValueError(f"floats in [0, 1] have a range that can be told, it has [{values.min():g}, {values.max():g}]")
    grey = values if tags.get(PHOTOMETRIC) != 0 else top - values  # 0: white is zero
    converted = Image.fromarray((grey * (255 / top)).round().astype(np.uint8))
    if "transparency" in image.info:  # the grey that stands for it
        converted.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return converted


def fitted(image: Image.Image, height: int, width: int) -> Tensor:
    """Bytes (C, height, width) of the middle of an image, as much of it as has these proportions, resized."""
    wide = max(1, min(image.width, round(image.height * width / height)))
    tall = max(1, min(image.height, round(image.width * height / width)))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    image = image.crop((left, top, left + wide, top + tall)).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous()


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` beside `path`, flush them to the disk and rename: `path` is always a whole file.

    Raises OSError where the disk is full or read-only; `path` is then as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        rename(aside, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}); what was written there before is whole") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def rename(aside: Path, path: Path) -> None:
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk, too
    finally:
        os.close(folder)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A directory aside, on the same disk, whose files are moved to `folder` at the end, and none after an error.

    Raises OSError, naming `folder`, where the disk is full or read-only.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=there) as aside:
            yield Path(aside)
            files = [file for file in Path(aside).rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file.suffix == ".json"):  # the numbers last
                to = folder / file.relative_to(aside)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, to)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{folder} cannot be written ({reason}); what was there before is as it was") from error


def cache_folder() -> Path:
    """Where what takes long to make is kept: plain-ebm in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plain-ebm"
