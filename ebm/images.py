"""Image files as bytes: which files of a folder are images, and what they show."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# A file may call itself what it likes: only these readers see it (Pillow would start Ghostscript for an EPS).
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {suffix for suffix, reader in Image.registered_extensions().items() if reader in FORMATS}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF


def image_files(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files in `folder` and below whose suffix is that of an image (.png, .jpg, .tif, …), in order.

    Links are followed, hidden files and folders (.ipynb_checkpoints, macOS's ._a.png) left out. Raises ValueError for a
    link that leads nowhere or to a folder that it lies in; `above` are those.
    """
    real = folder.resolve()
    if len(above) > 100:
        raise ValueError(f"{folder} lies more than 100 folders deep")
    if real in above:
        raise ValueError(f"{folder} leads back to {real}, in which it lies: take that loop of links out")
    files = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.exists():
            raise ValueError(f"{path} is a link that leads nowhere")
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


def opened(path: str | Path, mode: str, background: str = "black") -> Image.Image:
    """What is to be seen of an image file (the first picture in it) in `mode` L or RGB: turned by its EXIF orientation,
    over `background`, a colour's name or #rrggbb, where it is transparent.

    16-bit integers are scaled from their range, floats from [0, 1]. Raises ValueError that names the file where it
    cannot be read, has too many pixels to decode, or values whose range cannot be told: 32-bit integers, other floats.
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
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
