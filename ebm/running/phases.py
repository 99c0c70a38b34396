"""The phases of a training: its last parts, and what each sets anew."""

from collections.abc import Mapping, Sequence
from typing import Any

from ebm import check

PARTS = ("sampler", "buffer", "loss", "optimizer", "scheduler")
SETTINGS = ("chains", "grad_norm_clip", "data_noise_std", "warmup_steps")  # of `train`


def check_phases(config: Mapping[str, Any]) -> None:
    """ValueError for phases of a configuration, {name: {share, part: {key: value}}}, that are none, naming the key.

    The shares, each in (0, 1), are together less than 1; the network and the data are those of the whole training.
    """
    phases = config.get("phases") or {}
    if not isinstance(phases, Mapping) or not all(isinstance(phase, Mapping) for phase in phases.values()):
        raise ValueError(f"phases must be settings by the name of a phase, got {phases!r}")
    for name, phase in phases.items():
        key = f"phases.{name}"
        check.number(f"{key}.share", phase.get("share"), 0, 1, open_low=True)
        if len(phase) < 2:
            raise ValueError(f"{key} must set something anew besides its share: one of {', '.join(PARTS)}, train")
        for part, settings in phase.items():
            if part == "share":
                continue
            if part not in (*PARTS, "train"):
                raise ValueError(f"{key}.{part} cannot change in a training: a phase sets {', '.join(PARTS)}, train")
            if not isinstance(settings, Mapping):
                raise ValueError(f"{key}.{part} must be settings by name, got {settings!r}")
            known = SETTINGS if part == "train" else config.get(part, {})
            unknown = [
                name for name in settings if name not in known and not (part == "loss" or "_target_" in settings)
            ]
            if unknown:
                raise ValueError(f"{key}.{part} sets {', '.join(unknown)}, and may set {', '.join(known)}")
    if sum(phase["share"] for phase in phases.values()) >= 1:
        raise ValueError("the shares of all phases must be less than 1 together: the training begins without them")


def starts(config: Mapping[str, Any]) -> list[float]:
    """The share of the training that is over when each phase begins; 0 of the first, which has no name."""
    shares = [phase["share"] for phase in (config.get("phases") or {}).values()]
    return [0.0, *(1 - sum(shares[i:]) for i in range(len(shares)))]


def configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configuration of each phase: the one before, but for what it sets. Settings with a `_target_` are a part's
    whole, and a term of the loss that is null is left out. Raises ValueError as `check_phases` does."""
    check_phases(config)
    result = [{key: value for key, value in config.items() if key != "phases"}]
    for phase in (config.get("phases") or {}).values():
        changes = {key: value for key, value in phase.items() if key != "share"}
        merged = _merged(result[-1], changes)
        merged["loss"] = {name: term for name, term in merged.get("loss", {}).items() if term is not None}
        result.append(merged)
    return result


def explicit(config: Mapping[str, Any], of_phases: Sequence[Any]) -> dict[str, Any]:
    """The configuration, resolved, with what its phases set by following another setting written into them: `of_phases`
    are those of an unresolved one, each resolved."""
    result = dict(config)
    for i, name in enumerate(config.get("phases") or {}, start=1):
        follows = _differences(configs(result)[i], of_phases[i])
        if follows:
            result["phases"] = {**result["phases"], name: _merged(result["phases"][name], follows)}
    return result


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be merged into `before` for the values of `after`."""
    result: dict[str, Any] = {}
    for key, value in after.items():
        inner = before.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        differs = _differences(inner, value) if both else value  # type: ignore[arg-type]
        if differs if both else value != inner:
            result[key] = differs
    return result


def _merged(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(before)
    for key, value in changes.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and "_target_" not in value:
            value = _merged(inner, value)
        result[key] = value
    return result
