"""Checks of plain values, so that every constructor refuses bad input in the same words."""

import os
from math import inf
from typing import Any

import torch


def that(condition: Any, message: str) -> None:
    """ValueError with `message` where `condition` is false."""
    if not condition:
        raise ValueError(message)


def number(
    key: str, value: Any, low: float = -inf, high: float = inf, *, open_low: bool = False, integer: bool = False
) -> Any:
    """Return `value` if it is a finite number in [low, high] ((low, high] with `open_low`).

    `key` is the config key to name. Raises ValueError with what was given and what is accepted.
    """
    kinds: tuple[type, ...] = (int,) if integer else (int, float)
    valid = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < inf  # type: ignore[arg-type]
    if valid and (low < value if open_low else low <= value) and value <= high:
        return value
    accepted = "an integer" if integer else "a number"
    if high < inf:
        accepted += f" in {'(' if open_low else '['}{low:g}, {high:g}]"
    elif low > -inf:
        accepted += f" {'>' if open_low else '>='} {low:g}"
    raise ValueError(f"{key} must be {accepted}, got {value!r}")


def optional(key: str, value: Any, *limits: float, **kind: bool) -> Any:
    """As `number`; None is accepted, too."""
    return None if value is None else number(key, value, *limits, **kind)


def choice(key: str, value: Any, accepted: tuple[Any, ...]) -> Any:
    """Return `value` if it is one of `accepted`; ValueError otherwise."""
    if value in accepted:
        return value
    raise ValueError(f"{key} must be one of {', '.join(map(str, accepted))}, got {value!r}")


def image_shape(key: str, value: Any) -> tuple[int, int, int]:
    """Return `value` as (channels, height, width), all positive; ValueError otherwise."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ValueError(f"{key} must be (channels, height, width), got {value!r}")
    channels, height, width = (number(key, size, 1, integer=True) for size in value)
    return channels, height, width


def memory(what: str, size: int, device: str | torch.device = "cpu") -> None:
    """ValueError where the `size` bytes that the setting `what` asks for are more than there are on `device`."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    if size > there:
        raise ValueError(f"{what} takes {size:,} bytes of memory, there are {there:,}: lower it")
