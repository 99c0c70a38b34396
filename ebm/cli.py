"""What the three scripts share at the command line: errors in one line, and the device."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a user can mend become one line on stderr and exit code 2; a traceback with HYDRA_FULL_ERROR=1."""
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        missing = type(error).__name__ == "MissingMandatoryValue"  # a key whose value is ??? in the config
        cause: BaseException = error  # what a constructor raised lies under Hydra's own exception
        while type(cause).__name__ == "InstantiationException":
            cause = cause.__cause__ or ValueError(str(cause))
        if cause is error and not isinstance(error, (ValueError, OSError)) and not missing:
            raise
        line = " ".join(str(cause).split())
        print(f"error: {line} (HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        sys.exit(2)


def pick_device(name: str) -> torch.device:
    """The torch device for `device` in the config: auto (CUDA, MPS or CPU, whichever is there first) or a name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device must be auto, cpu, cuda, cuda:N or mps, and be there; got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    torch.backends.cudnn.deterministic = True  # same seed, same bits
    return device


def output_folder(out: str | None, checkpoint: str, name: str) -> Path:
    """The directory `out`, made if need be; by default `name` in the run directory `checkpoint`, or here."""
    folder = Path(out) if out is not None else Path(checkpoint) / name if Path(checkpoint).is_dir() else Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
