"""Everything that evolves, in one atomic file; import of foreign weights."""

import hashlib
import io
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ebm.files import rename, write_whole
from ebm.running import allowed, old_files

FORMAT = 1
WEIGHTS = Path(__file__).parents[1] / "weights"  # that ship with the package, each beside its figures
VALUES = 10**5  # at most, in a checkpoint
MARK = b"sha256:"  # and 64 hexadecimal digits: the comment at the end of the zip file that a checkpoint is


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of ours (or of the tutorial); says which file and why."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, as `write_whole` does: a zip file as torch.save writes it, whose comment is the
    SHA-256 of what stands before."""
    memory = io.BytesIO()
    torch.save({"format": FORMAT} | state, memory)
    content = memory.getbuffer()
    content[-2:] = struct.pack("<H", len(MARK) + 64)  # a zip file ends with the length of its comment
    write_whole(path, content, MARK + hashlib.sha256(content).hexdigest().encode())


def save_run(folder: Path, state: dict[str, Any], keep: int, best: bool, numbered: bool) -> None:
    """Write `folder`/last.pt; if `best`, it is best.pt as well, and if `numbered` and state["healthy"], step_….pt, of
    which the last `keep` stay. Second names of one file cost no space where the disk has hard links."""
    last = folder / "last.pt"
    save(last, state)
    step = [f"step_{state['step']:06d}.pt"] if numbered and state["healthy"] else []
    for name in ["best.pt"] * best + step:
        aside = folder / f".{name}.part"
        aside.unlink(missing_ok=True)
        try:
            os.link(last, aside)
        except OSError:
            shutil.copyfile(last, aside)
        rename(aside, folder / name)
    for old in [*healthy(folder)[:-keep], *folder.glob(".*.part")]:  # and what a killed process left
        old.unlink()


def healthy(folder: Path) -> list[Path]:
    """The checkpoints step_….pt of `folder`, which were healthy when they were taken, oldest first."""
    return sorted((file for file in folder.glob("step_*.pt") if file.stem[5:].isdecimal()), key=step_of)


def step_of(file: Path) -> int:
    """500 of step_000500.pt."""
    return int(file.stem.removeprefix("step_"))


def is_run(path: str | Path) -> bool:
    return (Path(str(path)) / "checkpoints").is_dir()


def load(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a file, the newest whole one of a run directory, or the weights that ship under a name (joint),
    on the CPU, in our format whoever wrote it. A file or folder here of that name is ./joint, unless it is a run.

    Reads tensors and plain values only (`weights_only=True`); nothing in the file is executed. Warns of every torn
    checkpoint it passes over. Raises CheckpointError for what is missing, torn or something else.
    """
    path = Path(name := str(path))
    if "/" not in name and not is_run(path) and (WEIGHTS / f"{name}.pt").is_file():
        path = WEIGHTS / f"{name}.pt"
    if not path.is_dir():
        return load_file(path)
    folder = path / "checkpoints"
    files = [folder / "last.pt", *reversed(healthy(folder)), folder / "best.pt"]
    return newest_whole([file for file in files if file.is_file()], path)


def newest_whole(files: Iterable[Path], source: Path) -> dict[str, Any]:
    """The first of `files` that is whole; a warning names each that is passed over."""
    torn: CheckpointError | None = None
    for file in files:
        try:
            return load_file(file)
        except CheckpointError as error:
            torn = error
            warnings.warn(f"{error}; passing it over", stacklevel=3)
    if torn is None:
        raise CheckpointError(f"{source} is a directory without checkpoints/last.pt: not a run")
    raise CheckpointError(f"{source} holds no whole checkpoint: {torn}") from torn


def load_file(file: Path) -> dict[str, Any]:
    """The checkpoint in one file; see `load`."""
    if not file.is_file():
        names = ", ".join(sorted(shipped.stem for shipped in WEIGHTS.glob("*.pt")))
        raise CheckpointError(
            f"{file} does not exist: give a run directory, a checkpoint file or weights that ship: {names}"
        )
    try:
        content = _stored(file.read_bytes())
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        state = _plain(state, Left(VALUES, len(content)))
    except Exception as error:  # whatever a hostile file can make its readers raise
        told = isinstance(error, (ValueError, RuntimeError, OSError, zipfile.BadZipFile)) and str(error).strip()
        # torch's own words for anything else are advice to trust the file
        reason = told.splitlines()[0][:200] if told else "it holds other things than tensors and plain values"
        raise CheckpointError(f"{file} is torn or not a checkpoint: {reason}") from error
    if isinstance(state, dict) and "pytorch-lightning_version" in state:
        state = _from_tutorial(file, state)
    elif not content.startswith(b"PK"):  # such a file may claim memory that it does not fill
        raise CheckpointError(f"{file} is not a checkpoint of plain-ebm: it has torch's format before 1.6")
    elif not isinstance(state, dict) or "energy_config" not in state or "energy" not in state:
        raise CheckpointError(f"{file} is not a checkpoint of plain-ebm: it holds no energy")
    elif state.get("format") != FORMAT:
        raise CheckpointError(f"{file} has checkpoint format {state.get('format')!r}, this version reads {FORMAT}")
    if problem := _problem(state):
        raise CheckpointError(f"{file} is not a checkpoint of plain-ebm: {problem}")
    if "buffer" in state:
        state["buffer"].setdefault("labels", torch.zeros_like(state["buffer"]["ages"]))
    try:
        return old_files.upgraded(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a checkpoint of plain-ebm, of no version: {error!r}") from error


def _stored(content: bytes) -> bytes:
    """The content of a checkpoint for torch to read: of a zip file its entries, stored anew, for torch may find others
    than Python does. ValueError for one that is not as torch.save writes it, or has another checksum than it says."""
    body, mark, digest = content[: -len(MARK) - 64], content[-len(MARK) - 64 : -64], content[-64:]
    if mark == MARK and hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its checksum does not fit its content")
    pickles = [content]
    if content.startswith(b"PK\x03\x04"):  # else torch's format before 1.6, as the tutorial's weights have it
        stored = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stored, "w") as copy:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, as no checkpoint is")
            size = sum(entry.file_size for entry in entries)
            if size > len(content):
                raise ValueError(f"it declares {size} bytes of content in a file of {len(content)}")
            for entry in entries:
                copy.writestr(entry.filename, archive.read(entry))
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
        content = stored.getvalue()
    if any(b"bytearray" in pickled for pickled in pickles):  # of any size, from nothing; torch allows it
        raise ValueError("it holds other things than tensors and plain values")
    return content


@dataclass
class Left:
    """What a file may hold yet: values, and bytes of tensors."""

    values: int
    bytes: int
    storages: set[int] = field(default_factory=set)  # counted already: tied weights lie in one


def _plain(value: Any, left: Left) -> Any:
    """`value` without what a file may hide in it: dicts, lists, tensors and plain values alone, without attributes, and
    not more than are in the file. Raises ValueError where there is something else."""
    left.values -= 1
    if left.values < 0:
        raise ValueError("it holds too many values")
    if isinstance(value, dict):
        if not all(type(key) in (str, int) for key in dict.keys(value)):
            raise ValueError("it holds a key that is neither a word nor a number")
        return {key: _plain(item, left) for key, item in dict.items(value)}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, left) for item in value)
    if type(value) is Tensor:
        if not vars(value) and _is_dense(value):
            storage = value.untyped_storage()
            left.bytes -= 0 if storage.data_ptr() in left.storages else storage.nbytes()
            left.storages.add(storage.data_ptr())
            if left.bytes >= 0:
                return value.detach()
        raise ValueError("a tensor of it is not plain, or claims more than is in the file")
    if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**64):
        return value
    raise ValueError(f"it holds a {type(value).__name__}, which is no plain value")


def _problem(state: Mapping[str, Any]) -> str:
    """What is wrong with the kinds of values in a checkpoint, or ""."""
    for key, kind in {"energy_config": dict, "energy": dict, "config": dict, "step": int, "epoch": int}.items():
        if not isinstance(state.get(key), kind):
            return f"{key} is {type(state.get(key)).__name__}, not {kind.__name__}"
    if not isinstance(state.get("data_hashes", {}), dict):
        return "data_hashes are no dict"
    for key in ("data", "sampler", "train"):
        if not isinstance(state["config"].get(key, {}), dict):
            return f"config.{key} is {type(state['config'][key]).__name__}, not dict"
    shape = state["energy_config"].get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return f"energy_config.shape is {shape!r}, not a list of sizes"
    shares = state.get("class_shares")
    if shares is not None and not (isinstance(shares, list) and all(type(s) is float and 0 <= s <= 1 for s in shares)):
        return "class_shares are no list of shares in [0, 1]"
    names, classes = state.get("class_names"), state["energy_config"].get("classes")
    if names is not None and not (isinstance(names, list) and all(type(name) is str for name in names)):
        return "class_names are no list of strings"
    if names and type(classes) is int and len(names) > classes:
        return f"it has {len(names)} class_names for {classes} classes"
    for key, value in state["energy"].items():
        if not isinstance(key, str) or not _is_dense(value):
            return f"weights {key} are no plain tensor"
    if "buffer" not in state:
        return ""
    if not isinstance(state["buffer"], dict):
        return "buffer is no dict"
    chains = state["buffer"].get("chains")
    if not (_is_dense(chains) and chains.dtype == torch.float32 and list(chains.shape[1:]) == shape):
        return f"buffer.chains are no images {tuple(shape)}"
    for key in ("ages", "labels"):
        numbers = state["buffer"].get(key, state["buffer"].get("ages"))  # older files have no labels
        if not (_is_dense(numbers) and numbers.dtype == torch.int64 and numbers.shape == chains.shape[:1]):
            return f"buffer.{key} are not a number a chain"
    return "" if bool(torch.isfinite(chains).all()) else "buffer.chains are not finite"


def _is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor whose elements are all in the file: a stride of 0 can claim any size."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _from_tutorial(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The tutorial's Lightning file. Its network returns −E: the sign is turned in the last layer."""
    prefix = "cnn.cnn_layers."
    try:
        theirs = {name: value for name, value in state["state_dict"].items() if name.startswith(prefix)}
        weights = {f"layers.{name.removeprefix(prefix)}": value for name, value in theirs.items()}
        weights |= {name: -weights[name] for name in ("layers.11.weight", "layers.11.bias")}
        hidden = len(weights["layers.2.weight"])
        shape = list(state["hyper_parameters"]["img_shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is a Lightning file of another network than the tutorial's") from error
    config = {"_target_": "ebm.energies.ConvEnergy", "shape": shape, "hidden": hidden}
    when = {"step": state.get("global_step", 0), "epoch": state.get("epoch", 0)}
    return {"energy": weights, "energy_config": config, "config": {}} | when


def build_energy(state: dict[str, Any], source: str | Path = "checkpoint", modules: Sequence[str] = ()) -> nn.Module:
    """The energy of a loaded checkpoint, in eval mode, on the CPU. Raises CheckpointError if it does not fit.

    Its class must be one of ebm's, or of a module that was imported before or is named in `modules`: a file does not
    choose what is imported.
    """
    weights = state["energy"]
    largest = max(65536, sum(value.numel() for value in weights.values()))
    try:
        kind, config = allowed.energy(state["energy_config"], modules)
        sizes = [size for value in config.values() for size in (value if isinstance(value, list) else [value])]
        if any(isinstance(size, int) and size > largest for size in sizes):
            raise ValueError(f"a size in {config} is larger than the number of its weights")
        with torch.device("meta"):  # a file that lies about its sizes does not get the memory for them
            differences = _differences(kind(**config).state_dict(), weights)
        if differences:
            raise ValueError(f"its weights are another architecture's: {differences}")
        for key, value in weights.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"weights {key} are not finite")
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave no trace of them
            energy = kind(**config)
        energy.load_state_dict(weights)
        vars(energy)["class_shares"] = shares = state.get("class_shares")
        if shares and len(shares) != (classes := getattr(energy, "classes", None)):
            raise ValueError(f"it has {len(shares)} class_shares for {classes} classes")
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError, AttributeError) as error:
        raise CheckpointError(f"{source}: its energy cannot be built: {error}") from error
    return energy.eval().to(memory_format=torch.channels_last)


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs:
            return f"{key} is {'missing' if key in ours else 'unknown'}"
        got, want = (f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") for x in (theirs[key], ours[key]))
        if got != want:
            return f"{key} is {got}, not {want}"
    return ""


def load_energy(path: str | Path, device: str | torch.device = "cpu", modules: Sequence[str] = ()) -> nn.Module:
    """E(x) (B, *shape) → (B,) in eval mode from a run directory, a checkpoint file or the tutorial's weights; see
    `build_energy`."""
    return build_energy(load(path), path, modules).to(device)


def start_from(energy: nn.Module, path: str | Path) -> None:
    """Give `energy` the weights of a checkpoint, as `load_energy` takes. Raises ValueError where they are another's."""
    weights = load_energy(path).state_dict()
    if differences := _differences(energy.state_dict(), weights):
        raise ValueError(f"initial_weights={path} holds another energy than this run's: {differences}")
    energy.load_state_dict(weights)


def input_shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, H, W) that the checkpoint's energy takes."""
    return tuple(state["energy_config"]["shape"])
