"""The weights that ship: what stands beside them is true."""

import json

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run

from ebm.evaluation import features
from ebm.running import checkpoint

NAMES = sorted(file.stem for file in checkpoint.WEIGHTS.glob("*.pt"))


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_beside_them(name):
    file, beside = checkpoint.WEIGHTS / f"{name}.pt", json.loads((checkpoint.WEIGHTS / f"{name}.json").read_text())
    state = checkpoint.load(name)
    assert file.stat().st_size < 5e6
    assert set(state) - {"class_shares"} == {"format", "energy", "energy_config", "config", "step", "epoch"}
    assert [features.weights_hash(state["energy"])] == beside["protocol"]["weights"]
    written = torch.load(file, weights_only=True)["config"]  # in the names of the version that wrote it
    assert beside["recipe"] == {part: written[part] for part in beside["recipe"]}
    assert (beside["steps"], beside["recipe"]["seed"]) == (state["step"], state["config"]["seed"])
    assert checkpoint.load_energy(name)(torch.zeros(2, 1, 28, 28)).shape == (2,)


def test_sample_without_an_argument(tmp_path):
    result = run("sample.py", "steps=2", "num_samples=4", f"out={tmp_path / 'out'}")
    assert result.returncode == 0 and (tmp_path / "out/grid.png").is_file(), result.stderr


def test_a_name_that_is_none(tmp_path):
    result = run("sample.py", "checkpoint=minst", f"out={tmp_path / 'out'}")
    assert_one_line_error(result, "minst", "weights that ship: " + ", ".join(NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_their_figures_are_found_again(name, data_root, tmp_path):
    beside = json.loads((checkpoint.WEIGHTS / f"{name}.json").read_text())
    data = "fashion_mnist" if name.startswith("fashion_mnist") else "mnist"
    samples = "samples," if data == "mnist" else ""  # another classifier would take a minute to train
    result = run(
        "evaluate.py",
        f"checkpoint={name}",
        f"data={data}",
        f"data.root={data_root}",
        f"out={tmp_path / 'out'}",
        f"evaluation.parts=[ood,{samples}classification]",
        "ood.scores=[]",
        "ood.sets=[rotated90,halves,mnist,fashion_mnist]",
        "samples.count=256",
        "samples.steps=[64]",
        "bootstrap=2",
        "wandb.mode=disabled",
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert numbers["protocol"]["data"] == beside["protocol"]["data"]
    again = [key for key in numbers if key.startswith(("auroc/", "classification/")) and not key.endswith("ci95")]
    assert len(again) >= 5  # and train and test
    for key in again:  # another machine rounds otherwise
        assert numbers[key] == pytest.approx(beside["figures"][key], abs=2e-3), key
    if samples:
        low, high = beside["figures"]["frechet/classifier-n256/64/ci95"]
        assert low - (high - low) < numbers["frechet/classifier-n256/64"] < high + (high - low)


def test_the_package_takes_them_along():
    assert "weights/*" in (ROOT / "pyproject.toml").read_text()
