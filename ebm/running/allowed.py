"""What a file may name. A checkpoint and a run's config.yaml say which parts they want and with which settings; what is
called for that is looked up here, or is the user's own. The file never chooses."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from ebm import arrays, densities
from ebm.data import image_folder, mnist5k, torchvision_dataset
from ebm.energies import ConvEnergy, MLPEnergy, ResNetEnergy
from ebm.losses import KL, Classification, ContrastiveDivergence, EnergyMatching, Twins
from ebm.optim import ExponentialDecay, PolynomialDecay, adam
from ebm.running import phases
from ebm.running.guard import Guard
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.sgld import SGLD

Part = Callable[..., Any]
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages that somebody else wrote
SHIPPED: dict[str, dict[str, Part]] = {
    "energy": {
        "ebm.energies.ConvEnergy": ConvEnergy,
        "ebm.energies.ResNetEnergy": ResNetEnergy,
        "ebm.energies.MLPEnergy": MLPEnergy,
    },
    "data": {
        "ebm.data.mnist5k": mnist5k,
        "ebm.data.torchvision_dataset": torchvision_dataset,
        "ebm.data.image_folder": image_folder,
        "ebm.arrays.dataset": arrays.dataset,
        "ebm.densities.dataset": densities.dataset,
    },
    "sampler": {"ebm.sampling.sgld.SGLD": SGLD},
    "buffer": {"ebm.sampling.buffer.ReplayBuffer": ReplayBuffer},
    "loss": {  # each of its terms
        "ebm.losses.ContrastiveDivergence": ContrastiveDivergence,
        "ebm.losses.Classification": Classification,
        "ebm.losses.EnergyMatching": EnergyMatching,
        "ebm.losses.KL": KL,
        "ebm.losses.Twins": Twins,
    },
    "optimizer": {"ebm.optim.adam": adam},
    "scheduler": {
        "ebm.optim.ExponentialDecay": ExponentialDecay,
        "ebm.optim.PolynomialDecay": PolynomialDecay,
    },
    "guard": {"ebm.running.guard.Guard": Guard},
}


def shipped(kind: str, config: Mapping[str, Any]) -> tuple[Part, dict[str, Any]]:
    """(what the `config` of a `kind` names by its `_target_`, its settings), of the parts that ship.

    Raises ValueError where it is none of them, or where a setting is no plain value.
    """
    name = str(config.get("_target_"))
    if name not in SHIPPED[kind]:
        raise ValueError(f"its {kind}, {name}, is none of {', '.join(SHIPPED[kind])}")
    return SHIPPED[kind][name], _settings(kind, config)


def energy(config: Mapping[str, Any], modules: Sequence[str] = ()) -> tuple[type[nn.Module], dict[str, Any]]:
    """As `shipped`, of an energy; or a class of the user's own, of a module that is one of `modules`, or that has been
    imported already and is no installed package's."""
    name = str(config.get("_target_"))
    module = name.rpartition(".")[0]
    trusted = [modules] if isinstance(modules, str) else modules
    if name in SHIPPED["energy"]:
        kind: Any = SHIPPED["energy"][name]
    elif module in trusted or (module in sys.modules and not _is_installed(module)):
        kind = _defined(name)
    else:
        raise ValueError(
            f"its energy, {name}, is none of ebm's: if you trust it, import its module first, or name it: "
            f"modules=[{module}]"
        )
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{name} is not an energy, an nn.Module")
    return kind, _settings("energy", config)


def check_config(config: Mapping[str, Any]) -> None:
    """ValueError for the configuration of a run, read from its file, with a part that neither ships nor is the user's
    own, in a folder of PYTHONPATH where nothing is installed, or with other than plain values."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    of_user = [folder for folder in folders if not INSTALLED & {*Path(folder).resolve().parts}]
    for of_later_phase in phases.configs(config)[1:]:
        check_config(of_later_phase)
    terms = config.get("loss", {})
    if not isinstance(terms, dict) or any(str(name).startswith("_") for name in terms):
        raise ValueError(f"loss must be terms by name, got {terms!r}")
    others = [(group, group, value) for group, value in config.items() if group not in ("loss", "phases")]
    in_loss = [("loss", f"loss.{name}", term) for name, term in terms.items() if term is not None]
    for group, key, value in [*others, *in_loss]:
        name = str(value.get("_target_")) if isinstance(value, dict) else ""
        if group in SHIPPED and name not in SHIPPED[group]:
            package = name.partition(".")[0]
            ours = ("ebm", "train", "sample", "evaluate")  # in a sweep PYTHONPATH has their folder, too
            if package in (*ours, *sys.stdlib_module_names) or PathFinder.find_spec(package, of_user) is None:
                raise ValueError(f"{key}._target_={name} neither ships nor lies in a folder of PYTHONPATH")
            _defined(name)
        _settings(key, value if isinstance(value, dict) and group in SHIPPED else {key: value})


def _settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in config.items() if key != "_target_"}
    if not _is_plain(settings):
        raise ValueError(f"the settings of its {kind} must be plain values and lists of them, got {settings}")
    return settings


def _is_plain(value: Any) -> bool:
    """Whether `value` is a number, a word, or made of such by lists and dicts, without a key that means something to
    Hydra (_target_, _args_, …) and without an interpolation."""
    if isinstance(value, dict):
        return all(type(key) is str and not key.startswith("_") and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float) or (type(value) is str and "${" not in value)


def _is_installed(module: str) -> bool:
    """Whether it is of the standard library or an installed package, as torch is."""
    file = getattr(sys.modules[module], "__file__", None)
    folders = Path(file).parts if file else ()
    package = module.partition(".")[0]
    return package in ("ebm", *sys.stdlib_module_names) or bool(INSTALLED & {*folders})


def _defined(name: str) -> Part:
    """The class or function that the package of the dotted `name` defines: not what it has imported."""
    module, _, attribute = name.rpartition(".")
    try:
        part = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    if str(getattr(part, "__module__", "")).partition(".")[0] != module.partition(".")[0]:
        raise ValueError(f"{name} is not defined in {module}")
    return part
