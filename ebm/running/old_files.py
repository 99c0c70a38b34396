"""Files of earlier versions, read as today's."""

from typing import Any

from torch import Tensor

from ebm.running import allowed

PARTS = {  # that have moved
    "ebm.sampler.SGLD": "ebm.sampling.sgld.SGLD",
    "ebm.buffer.ReplayBuffer": "ebm.sampling.buffer.ReplayBuffer",
    "ebm.guard.Guard": "ebm.running.guard.Guard",
}
LOSS = "ebm.losses.ContrastiveDivergence"  # the one there was, of all terms
LOGS = {"contrast": "twins", "contrast_accuracy": "twins_accuracy"}


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A loaded checkpoint as today's version would have written it. What there is no more stays, to be refused."""
    config = state["config"]
    for part in config.values():
        name = part.get("_target_") if isinstance(part, dict) else None
        if isinstance(name, str) and name in PARTS:
            part["_target_"] = PARTS[name]
    for energy in (state["energy_config"], config.get("energy")):
        if isinstance(energy, dict) and energy.get("attention") is False:
            del energy["attention"]
            energy.setdefault("stem", 0)
    data = config.get("data")
    if isinstance(data, dict) and data.get("_target_") in allowed.SHIPPED["data"] and "hold_out" not in data:
        data["hold_out"] = "test"  # there were two splits
        config.setdefault("judge", None)
    for part in ("test images", "test labels"):  # no training reads them
        state.get("data_hashes", {}).pop(part, None)
    if "start" in config:
        config["initial_weights"] = config.pop("start")
    if "loop" in state:  # there was one phase
        config.setdefault("phases", None)
        state["loop"] = {"phase": 0, "phase_began": 0} | state["loop"]
    loss, training = config.get("loss"), config.get("train")
    if isinstance(loss, dict) and isinstance(training, dict) and loss.get("_target_") == LOSS:
        training["data_noise_std"] = loss.get("noise_std")
        config["loss"] = terms_of(loss, state["energy_config"].get("classes"))
        if training.get("warmup_sgld_steps") is None:
            training.pop("warmup_sgld_steps", None)
        for holder in [state["loop"], *state.get("shards", [])] if "loop" in state else []:
            holder["sums"] = sums_of(holder["sums"])
    return state


def terms_of(loss: dict[str, Any], classes: int | None) -> dict[str, Any]:
    """The terms of the one loss that there was."""
    terms: dict[str, Any] = {"contrastive_divergence": {"_target_": LOSS, "alpha": loss.get("alpha")}}
    if loss.get("kl_weight"):
        of_sampler = {name: loss.get(name) for name in ("step_size", "grad_clamp", "bounds")}
        terms["kl"] = {
            "_target_": "ebm.losses.KL",
            "weight": loss["kl_weight"],
            "steps": loss.get("kl_steps"),
            "entropy_weight": loss.get("entropy_weight"),
            **of_sampler,
        }
    if classes is not None:
        terms["classification"] = {
            "_target_": "ebm.losses.Classification",
            "weight": loss.get("classification_weight", 1.0),
        }
    contrast = loss.get("contrast")
    if isinstance(contrast, dict) and contrast.get("weight"):
        terms["twins"] = {"_target_": "ebm.losses.Twins", **contrast}
    if loss.get("energy_clamp") is not None:
        terms["energy_clamp"] = loss["energy_clamp"]
    return terms


def sums_of(sums: dict[str, Any]) -> dict[str, Any]:
    renamed = {LOGS.get(name, name): value for name, value in sums.items()}
    if isinstance(renamed.get("cd"), Tensor) and isinstance(renamed.get("energy_l2"), Tensor):
        renamed["contrastive_divergence"] = renamed["cd"] + renamed["energy_l2"]
    return renamed
