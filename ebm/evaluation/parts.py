"""The parts of an evaluation by name, and what their settings may be."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ebm import check
from ebm.evaluation.chains import chains
from ebm.evaluation.classification import classification
from ebm.evaluation.density import density
from ebm.evaluation.likelihood import likelihood
from ebm.evaluation.ood_scores import OTHER_SCORES, ood
from ebm.evaluation.outliers import keys_of
from ebm.evaluation.samples import samples

PARTS: dict[str, Callable[..., None]] = {"ood": ood, "samples": samples, "classification": classification}
PARTS |= {"chains": chains, "density": density, "likelihood": likelihood}
# Of what is an integer, by section and key.
LEAST = {"ais": {"burn_in": 0, "chains": 2, "temperatures": 1}, "samples": {"count": 8, "neighbours": 1}}
LEAST |= {"chains": {"count": 2, "steps": 16}, "density": {"cells": 2, "steps": 1}}


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError for one of the settings of conf/evaluate.yaml that is out of range, naming its key."""
    check.number("seed", settings["seed"], 0, 2**63 - 3, integer=True)
    check.number("noise_std", settings["noise_std"], 0)
    check.number("batch_size", settings["batch_size"], 1, integer=True)
    check.number("bootstrap", settings["bootstrap"], 2, integer=True)
    check.optional("ood.count", settings["ood"]["count"], 2, integer=True)
    check.number("chains.rhat", settings["chains"]["rhat"], 1)
    check.number("ais.power", settings["ais"]["power"], 0, open_low=True)
    for section, keys in LEAST.items():
        for key, low in keys.items():
            check.number(f"{section}.{key}", settings[section][key], low, integer=True)
    steps = settings["samples"]["steps"]
    check.that(isinstance(steps, list) and steps, f"samples.steps must be a list of numbers of steps, got {steps!r}")
    for number in steps:
        check.number("samples.steps", number, 1, integer=True)
    name, parts, sets = settings["evaluation"]["name"], settings["evaluation"]["parts"], settings["ood"]["sets"]
    _check_names("evaluation.parts", parts, PARTS)
    check.that(parts, f"evaluation.parts must be a list of {', '.join(PARTS)}, got []")
    _check_names("ood.scores", settings["ood"]["scores"], OTHER_SCORES)
    check.that(Path(str(name)).name == name, f"evaluation.name must be the name of a folder, got {name!r}")
    check.that(isinstance(sets, list), f"ood.sets must be a list of names, got {sets!r}")
    keys_of(sets)
    cells, temperatures = settings["density"]["cells"], settings["ais"]["temperatures"]
    check.memory(f"density.cells={cells}", 64 * cells**2)
    check.memory(f"ais.temperatures={temperatures}", 8 * temperatures)


def _check_names(key: str, names: Any, accepted: Collection[str]) -> None:
    check.that(isinstance(names, list), f"{key} must be a list of {', '.join(accepted)}, got {names!r}")
    for name in names:
        check.choice(key, name, tuple(accepted))
