"""Files of earlier versions, read as today's: the names that they give to parts."""

from typing import Any

PARTS = {  # that have moved
    "ebm.sampler.SGLD": "ebm.sampling.sgld.SGLD",
    "ebm.buffer.ReplayBuffer": "ebm.sampling.buffer.ReplayBuffer",
    "ebm.guard.Guard": "ebm.running.guard.Guard",
}


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A loaded checkpoint as today's version would have written it."""
    for part in state["config"].values():
        name = part.get("_target_") if isinstance(part, dict) else None
        if isinstance(name, str) and name in PARTS:
            part["_target_"] = PARTS[name]
    return state
