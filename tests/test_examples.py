"""The README's examples of library use, run as they stand there."""

import re

import torch
from conftest import ROOT

from ebm.running import checkpoint

SECTION = (ROOT / "README.md").read_text().split("\n## As a library\n")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def names_of(word, tmp_path, monkeypatch):
    """What the one example that holds `word` leaves behind, run in a directory where there is nothing else."""
    monkeypatch.chdir(tmp_path)
    (example,) = [example for example in EXAMPLES if word in example]
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    assert not list(tmp_path.iterdir())
    return names


def test_each_is_under_ten_lines():
    assert len(EXAMPLES) == 4
    assert all(len([line for line in example.splitlines() if line]) < 10 for example in EXAMPLES)


def test_score_a_batch(tmp_path, monkeypatch):
    scores = names_of("scores =", tmp_path, monkeypatch)["scores"]
    assert scores.shape == (100,) and abs(scores.mean()) < 0.1  # noise scores −21


def test_sample_ten_images(tmp_path, monkeypatch):
    samples = names_of("samples =", tmp_path, monkeypatch)["samples"]
    assert samples.shape == (10, 1, 28, 28) and samples.abs().max() <= 1
    assert checkpoint.load_energy("quick")(samples).mean() < 0.1


def test_an_energy_of_ones_own(tmp_path, monkeypatch):
    """Of the ring's density r·exp(−50(r − 0.7)²) over r, mean 0.7 + 1/70 and standard deviation near 0.1."""
    radius = names_of("ring =", tmp_path, monkeypatch)["points"].norm(dim=1)
    assert abs(radius.mean() - 0.714) < 0.03 and abs(radius.std() - 0.1) < 0.02


def test_compose_two(tmp_path, monkeypatch):
    names = names_of("Composed(", tmp_path, monkeypatch)
    x = checkpoint.load_energy("quick")
    assert names["thin"].mean() < -0.8 and names["bold"].mean() > -0.7  # digits: −0.74
    assert x(names["thin"]).mean() < 0.1 and x(names["bold"]).mean() < 0.1
