"""Files of earlier versions are read as today's, and what has another name now is refused with the new one."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_one_line_error, run, run_script, settings_of, with_younger

from ebm.running import checkpoint, trained
from ebm.running.cli import RENAMED, refuse_old_names
from ebm.running.resume import flat

# A run of the version whose checkpoints have `loss.contrast`, six steps: the command in today's names.
OLD = Path(__file__).with_name("run_of_0.1.0")
TERMS = ["loss=[contrastive_divergence,kl,classification,twins]", "loss.twins.weight=2", "loss.twins.rotation=180"]
TERMS += ["loss.kl.weight=0.2", "loss.classification.weight=3", "train.data_noise_std=0.01"]
ENERGY = ["energy=resnet", "energy.width=2", "energy.levels=2", "energy.stem=0", "energy.classes=10"]
SIZES = ["energy.temperature=0.1", "buffer.capacity=16", "train.batch_size=8", "sampler.steps=2"]
LOOP = ["train.sample_steps=4", "train.log_every=4", "train.max_steps=6", "train.validate_every_epochs=100000"]
COMMAND = ["device=cpu", "data.hold_out=test", *ENERGY, *SIZES, *TERMS, *LOOP]


def test_its_configuration_is_that_of_the_same_command_today():
    today = settings_of(*COMMAND)
    assert with_younger(flat(checkpoint.load(OLD)["config"]), today) == today


def test_its_test_images_are_for_evaluations_alone():
    """It chose by them, and had no others held out: those that are today were among its training images."""
    data = trained.dataset_of(checkpoint.load(OLD))
    assert [len(x) for x in (data.train, data.validation, data.test)] == [4000, 500, 500]


def test_it_goes_on(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    result = run_script("train.py", f"resume={tmp_path / 'run'}", "train.max_steps=9", "wandb.mode=disabled")
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in logged if "train/loss" in row]
    assert [row["step"] for row in rows] == [4, 6, 8, 9]
    terms = [f"train/{name}" for name in ("contrastive_divergence", "kl", "classification", "twins")]
    for row in rows[2:]:  # the sums of two steps came with the checkpoint
        assert row["train/loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-5)
    again = checkpoint.load(tmp_path / "run")
    assert again["step"] == 9 and "attention" not in again["energy_config"]
    assert "_target_" not in again["config"]["loss"]


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_refused_with_the_new(old):
    argument = old if "=" in old else f"{old}=1"
    with pytest.raises(ValueError, match=r"is now|is no more"):
        refuse_old_names(["seed=1", f"++{argument}"])
    with pytest.raises(ValueError, match=r"is now|is no more"):  # of a sweep, or within a section
        refuse_old_names([old.replace("=", "=quick,") if "=" in old else f"{old}.weight=1"])


def test_names_of_today_are_not(tmp_path):
    refuse_old_names([*COMMAND, "data=plane", "data=fashion_mnist", "experiment=joint", "scheduler=polynomial"])


def test_in_a_command_and_in_a_file(tmp_path):
    result = run_script("train.py", "loss.contrast.weight=2", f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_line_error(result, "loss.contrast is now loss.twins")
    result = run("train.py", "+loss.alpha=0.2", f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_line_error(result, "loss.alpha is now loss.contrastive_divergence.alpha")
