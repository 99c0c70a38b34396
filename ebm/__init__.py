"""plain-ebm: deep energy-based models in plain PyTorch.  p(x) ∝ exp(−E(x)/T) everywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm.composition import Composed as Composed
    from ebm.energies import ConvEnergy as ConvEnergy
    from ebm.energies import MLPEnergy as MLPEnergy
    from ebm.energies import ResNetEnergy as ResNetEnergy
    from ebm.losses import ContrastiveDivergence as ContrastiveDivergence
    from ebm.running.checkpoint import load_energy as load_energy
    from ebm.sampling.buffer import ReplayBuffer as ReplayBuffer
    from ebm.sampling.chains import uniform_noise as uniform_noise
    from ebm.sampling.sgld import SGLD as SGLD

__version__ = "0.1.0"

# What users import, from here and whatever moves below:  from ebm import SGLD
HOMES = {
    "load_energy": "ebm.running.checkpoint",
    "SGLD": "ebm.sampling.sgld",
    "ReplayBuffer": "ebm.sampling.buffer",
    "ContrastiveDivergence": "ebm.losses",
    "ConvEnergy": "ebm.energies",
    "ResNetEnergy": "ebm.energies",
    "MLPEnergy": "ebm.energies",
    "Composed": "ebm.composition",
    "uniform_noise": "ebm.sampling.chains",
}


def __getattr__(name: str) -> Any:
    """At its first use: torch takes seconds to import, and the scripts' handlers of signals are there before."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'ebm' has no attribute {name!r}")
