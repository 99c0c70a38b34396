"""plain-ebm: deep energy-based models in plain PyTorch.  p(x) ∝ exp(−E(x)) everywhere."""

__version__ = "0.1.0"
