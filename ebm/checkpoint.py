"""Everything that evolves, in one atomic file; import of foreign weights."""

import importlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of ours (or of the tutorial); says which file and why."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, flush it to the disk and rename: `path` is always a whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def locate(path: str | Path) -> Path:
    """The checkpoint file that `path` names: the file itself, or a run directory's checkpoints/last.pt."""
    path = Path(str(path))
    if path.is_dir():
        file = path / "checkpoints" / "last.pt"
        if not file.is_file():
            raise CheckpointError(f"checkpoint={path} is a directory without checkpoints/last.pt: not a run")
        return file
    if not path.is_file():
        raise CheckpointError(f"checkpoint={path} does not exist: give a run directory or a checkpoint file")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run directory or file, on the CPU, in our format whoever wrote it.

    Reads tensors and plain values only (`weights_only=True`); nothing in the file is executed.
    Raises CheckpointError for what is missing, torn or something else.
    """
    file = locate(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} is truncated or not a checkpoint: {reason}") from error
    if isinstance(state, dict) and "pytorch-lightning_version" in state:
        return _from_tutorial(file, state)
    if not isinstance(state, dict) or "energy_config" not in state or "energy" not in state:
        raise CheckpointError(f"{file} is not a checkpoint of plain-ebm: it holds no energy")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{file} has checkpoint format {state.get('format')!r}, this version reads {FORMAT}")
    return state


def _from_tutorial(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The tutorial's Lightning file. Its network returns −E: the sign is turned in the last layer."""
    prefix = "cnn.cnn_layers."
    weights = {
        f"layers.{name.removeprefix(prefix)}": value
        for name, value in state["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        for name in ("layers.11.weight", "layers.11.bias"):
            weights[name] = -weights[name]
        hidden = len(weights["layers.2.weight"])
        shape = list(state["hyper_parameters"]["img_shape"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is a Lightning file of another network than the tutorial's") from error
    return {
        "energy": weights,
        "energy_config": {"_target_": "ebm.energies.ConvEnergy", "shape": shape, "hidden": hidden},
        "step": state.get("global_step", 0),
        "epoch": state.get("epoch", 0),
        "config": {},
    }


def build_energy(state: dict[str, Any], source: str | Path = "checkpoint") -> nn.Module:
    """The energy of a loaded checkpoint, in eval mode, on the CPU. Raises CheckpointError if it does not fit."""
    config = dict(state["energy_config"])
    module, _, name = str(config.pop("_target_", "")).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{source}: its energy class {module}.{name} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(f"{source}: its energy class {module}.{name} is not an nn.Module")
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave no trace of them
            energy = kind(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its energy cannot be built: {error}") from error
    differences = _differences(energy.state_dict(), state["energy"])
    if differences:
        raise CheckpointError(f"{source} holds another architecture than its energy's: {differences}")
    energy.load_state_dict(state["energy"])
    for key, value in energy.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{source}: weights {key} are not finite")
    return energy.eval().to(memory_format=torch.channels_last)


def _differences(ours: dict[str, Tensor], theirs: Any) -> str:
    if not isinstance(theirs, dict):
        return "no state dict"
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in theirs:
            return f"{key} is missing"
        if key not in ours:
            return f"{key} is unknown"
        if not isinstance(theirs[key], Tensor) or ours[key].shape != theirs[key].shape:
            got = tuple(theirs[key].shape) if isinstance(theirs[key], Tensor) else type(theirs[key]).__name__
            return f"{key} is {got}, not {tuple(ours[key].shape)}"
    return ""


def load_energy(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """E(x) (B, *shape) → (B,) in eval mode from a run directory, a checkpoint file or the tutorial's weights."""
    return build_energy(load(path), path).to(device)


def input_shape(state: dict[str, Any]) -> tuple[int, ...]:
    """(C, H, W) that the checkpoint's energy takes."""
    return tuple(state["energy_config"]["shape"])
