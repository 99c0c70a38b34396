"""train.py, sample.py and evaluate.py as a user runs them, and every error a user can make."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, bytes_of, run, run_script, tiles
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

import evaluate
from ebm.energies import ConvEnergy, MLPEnergy
from ebm.evaluation import figures
from ebm.running import trained
from ebm.running.checkpoint import load, load_energy, save
from ebm.running.cli import command, writable
from ebm.running.tracking import Tracker
from ebm.sampling.chains import chain_generators, uniform_noise

TRAIN_KEYS = {
    *("train/loss", "train/contrastive_divergence", "train/cd", "train/energy_l2", "train/score_real"),
    *("train/score_fake", "train/lr", "train/grad_norm", "train/images_per_s", "train/sgld_steps_per_s"),
    "train/phase",
}
VAL_KEYS = {"val/cd", "val/score_real", "val/score_noise", "noise/score"}


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- train.py


def test_run_directory(run_dir):
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt", "wandb"):
        assert (run_dir / name).exists(), name
    assert {path.name for path in (run_dir / "samples").iterdir()} == {
        "generation_000030.png",
        "buffer_000030.png",
    }


def test_pictures_are_of_the_end_of_the_run(run_dir, tmp_path):
    """32 of the buffer's chains, and chains from noise by the last energy, a column a step."""
    chains = {x.tobytes() for x in bytes_of(load(run_dir)["buffer"]["chains"])}
    with Image.open(run_dir / "samples/buffer_000030.png") as picture:
        shown = [x.tobytes() for x in tiles(picture, (28, 28), factor=3)]
    assert len(set(shown)) == 32 and set(shown) <= chains
    generator = torch.Generator().manual_seed(0)
    start = uniform_noise((8, 1, 28, 28), generator)
    trace = trained.sampler_of(load(run_dir), {}).trace(load_energy(run_dir), start, generator, every=1, steps=8)
    figures.strips(tmp_path / "again.png", trace[1:], list(range(1, 9)))
    found, again = (
        np.asarray(Image.open(path)) for path in (run_dir / "samples/generation_000030.png", tmp_path / "again.png")
    )
    assert found.shape == again.shape and np.abs(found.astype(int) - again).max() <= 1


def test_metrics_have_the_stable_names(run_dir):
    lines = records(run_dir)
    training, validation = ([line for line in lines if key in line] for key in ("train/loss", "val/cd"))
    assert [line["step"] for line in training] == [10, 20, 30]
    assert all(set(line) == TRAIN_KEYS | {"step", "epoch"} for line in training)
    assert [line["step"] for line in validation] == [30] and set(validation[0]) == VAL_KEYS | {"step", "epoch"}
    for line in training:
        assert line["train/loss"] == pytest.approx(line["train/cd"] + line["train/energy_l2"], abs=1e-6)
        assert line["train/cd"] == pytest.approx(line["train/score_fake"] - line["train/score_real"], abs=1e-6)
    assert validation[0]["val/cd"] == pytest.approx(validation[0]["val/score_noise"] - validation[0]["val/score_real"])
    rates = [1.2e-3 * (0.02 + 0.98 * (1 - step / 30) ** 2) for step in (9, 19, 29)]
    assert [line["train/lr"] for line in training] == pytest.approx(rates)


def test_says_where_things_lie_and_what_to_try(run_dir):
    out = (run_dir / "stdout.txt").read_text()
    for word in (
        "generation_000030.png",
        "checkpoints/last.pt",
        "offline-run",
        "python sample.py",
        "python evaluate.py",
    ):
        assert word in out
    bar = (run_dir / "stderr.txt").read_text()
    assert "loss" in bar and "score gap" in bar and "images/s" in bar


@pytest.mark.parametrize(
    "name", ["run", "a/b-1", "a b,c=d[e]{f}", "it's", 'say "hi"', "é", "2026", "1e5", "1_0", "#*?!~"]
)
def test_printed_commands_reach_hydra_as_they_are_meant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, script, override = shlex.split(command(tmp_path / "train.py", resume=tmp_path / name))
    assert (python, script) == ("python", "train.py")
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert parsed.key_or_group == "resume" and parsed.value() == name


@pytest.mark.slow
def test_printed_commands_run_where_the_user_stands(tmp_path):
    """Also where Hydra changes the working directory, and W&B's files are elsewhere."""
    limits = [*TINY, "train.max_steps=2", "device=cpu", "hydra.job.chdir=true", "wandb.dir=its files"]
    done = run_script("train.py", *limits, 'hydra.run.dir="a b/c,d=e"', "wandb.mode=offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line[13:] for line in done.stdout.splitlines()]
    sampling, evaluating = (line for line in printed if line.startswith("python "))
    (syncing,) = (line for line in printed if line.startswith("wandb sync "))
    listed = subprocess.run(["bash", "-c", syncing.replace("wandb sync", "ls -d")], cwd=tmp_path, capture_output=True)
    assert listed.returncode == 0 and listed.stdout.startswith(b"its files/wandb/offline-run-")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = {sampling: "num_samples=2 steps=2", evaluating: "evaluation=scores bootstrap=2 wandb.mode=disabled"}
    for line, more in small.items():
        shell = ["bash", "-c", f"{line} {more} device=cpu hydra.job.chdir=true"]
        done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a b", "its files"}
    assert {"sampling", "evaluation", "config.yaml"} <= {path.name for path in (tmp_path / "a b/c,d=e").iterdir()}


def test_wandbs_variables_hold_unless_the_config_says_otherwise(tmp_path, monkeypatch):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings: Any = OmegaConf.to_container(compose("train").wandb)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, {}, **settings) as tracker:
        assert tracker.run is None
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "theirs"))
    (tmp_path / "theirs").mkdir()
    for folder, said in ((tmp_path / "theirs", {}), (tmp_path / "ours", {"dir": str(tmp_path / "ours")})):
        with Tracker(tmp_path, {}, **settings | {"mode": "offline"} | said) as tracker:
            assert tracker.wandb_dir.parent == folder / "wandb"
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "loud")
    with pytest.raises(ValueError, match=r"WANDB_MODE.*'loud'"):
        Tracker(tmp_path, {}, **settings)


def test_wandb_holds_the_same(run_dir):
    """The offline run read back by W&B's own tool."""
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in TRAIN_KEYS | VAL_KEYS | {"samples/generation", "samples/buffer"}:
        assert key in done.stdout, key
    assert "step 30" in done.stdout or "step 30" in "".join(  # the caption
        path.read_text(errors="ignore") for path in offline.rglob("*.json")
    )
    media = {path.name.split("_")[0] for path in (offline / "files/media/images/samples").iterdir()}
    assert media == {"generation", "buffer"}


def test_same_seed_same_bits_and_another_seed_another_run(tmp_path):
    arguments = ["train.py", *TINY, "train.max_steps=6", "train.log_every=2", "wandb.mode=disabled"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = run(*arguments, f"seed={seed}", f"hydra.run.dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    a, b, c = (load(tmp_path / name) for name in "abc")
    for key, value in a["energy"].items():
        assert torch.equal(value, b["energy"][key])
    assert torch.equal(a["buffer"]["chains"], b["buffer"]["chains"]) and torch.equal(a["generator"], b["generator"])
    assert not torch.equal(a["buffer"]["chains"], c["buffer"]["chains"])

    def numbers(name: str) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if not k.endswith("per_s")} for line in records(tmp_path / name)]

    assert numbers("a") == numbers("b") and numbers("a") != numbers("c")
    assert not (tmp_path / "a/wandb").exists()


def test_the_clock_has_no_part_in_the_default():
    """With train.max_minutes the seconds of the first, slow steps enter the learning rate: no two runs are alike."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("train").train.max_minutes is None


GROUPS = {
    "data": {
        "mnist5k": [],
        "mnist": ["data.root={root}"],
        "fashion_mnist": ["data.root={root}"],
        "folder": ["data.root={images}"],
        "arrays": ["data.file={arrays}"],
        "plane": ["energy=mlp", "data.name=pinwheel"],
    },
    "energy": {"cnn": [], "resnet": [], "mlp": []},
    "experiment": {
        "quick": [],
        "tutorial": ["data.root={root}", "buffer.capacity=256", "buffer.initial=16"],
        "joint": ["data.root={root}"],
        "residual": ["data.root={root}", "energy.width=2"],
        "clothes": ["data.root={root}"],
        "plane": [],
        "plane_matching": ["sampler.noise_std=0.1"],
        "cifar10": ["data=folder", "data.root={images}", "energy.width=2", "energy.stem=2", "train.chains=8"],
        "cifar10_divergence": ["data=folder", "data.root={images}", "energy.width=2", "energy.stem=2"],
    },
    "loss": {
        "contrastive_divergence": [],
        "[contrastive_divergence,classification]": ["energy.classes=10"],
        "[contrastive_divergence,kl]": [],
        "[contrastive_divergence,twins]": ["loss.twins.rotation=90"],
        "twins": ["loss.twins.flip=0.5", "train.log_every=1"],
        "energy_matching": ["sampler.start=normal", "sampler.bounds=null"],
        "kl": [],
    },
    "+ablation": {
        **{name: [] for name in ("none", "kl", "augmented", "informative", "annealed")},
        **{name: ["energy.width=2"] for name in ("residual_plain", "scales", "spectral_norm")},
    },
    "guard": {"default": []},
    "scheduler": {"exponential": [], "polynomial": []},
}


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """A folder of 24 images of 20×24 pixels, RGB."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def arrays_file(tmp_path_factory):
    """60 grey images of 28×28 pixels of three classes."""
    file = tmp_path_factory.mktemp("arrays") / "mine.npz"
    rng = np.random.default_rng(0)
    np.savez(file, train=rng.integers(0, 256, (60, 28, 28), dtype=np.uint8), train_labels=np.arange(60) % 3)
    return file


FIXTURES = {"root": "data_root", "images": "image_root", "arrays": "arrays_file"}


@pytest.mark.parametrize("group, option", [(group, option) for group, options in GROUPS.items() for option in options])
def test_every_config_trains_two_steps(group, option, tmp_path, request):
    extra = GROUPS[group][option]
    values = {name: request.getfixturevalue(of) for name, of in FIXTURES.items() if f"{{{name}}}" in "".join(extra)}
    of_resnet = option == "resnet" or "energy.width=2" in extra
    small = [argument for argument in TINY if not (of_resnet and "hidden" in argument)]
    arguments = [argument.format(**values) for argument in extra]
    path = tmp_path / "run"
    result = run(
        "train.py",
        f"{group}={option}",
        *small,
        *arguments,
        "train.max_steps=2",
        "wandb.mode=disabled",
        f"hydra.run.dir={path}",
    )
    assert result.returncode == 0, result.stderr
    assert load(path)["step"] == 2
    shape = load(path)["energy_config"]["shape"]
    assert load_energy(path)(torch.zeros(3, *shape)).shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [*GROUPS["experiment"], *(f"quick +ablation={name}" for name in GROUPS["+ablation"])]
)
def test_every_recipe_as_it_stands_makes_a_step(recipe, tmp_path, data_root, request):
    """Its sizes, too."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", f"experiment={recipe}".split())
    if recipe.startswith("cifar10"):
        given = ["data=folder", f"data.root={request.getfixturevalue('cifar10_folder')}"]
    else:
        given = [f"data.root={data_root}"] if "root" in cfg.data else []
    limits = ["train.epochs=null", "train.max_steps=1", "train.sample_steps=1", "wandb.mode=disabled"]
    result = run("train.py", *f"experiment={recipe}".split(), *given, *limits, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in records(tmp_path / "run") if "train/loss" in line]
    assert line["step"] == 1 and np.isfinite(list(line.values())).all()
    needs_negatives = cfg.loss.get("contrastive_divergence") is not None
    assert load(tmp_path / "run")["buffer"]["ages"].max() == needs_negatives * cfg.sampler.steps


@pytest.mark.slow
def test_training_options_together(tmp_path):
    """KL term, twins, augmented chains from class means, annealed steps, warm-up; a residual net."""
    path = tmp_path / "run"
    result = run(
        "train.py",
        "energy=resnet",
        "energy.width=2",
        "energy.spectral_norm=true",
        "energy.scales=2",
        "loss=[contrastive_divergence,kl,twins]",
        "loss.contrastive_divergence.alpha=0",
        "loss.kl.steps=2",
        "loss.twins.weight=0.5",
        "loss.twins.rotation=90",
        "loss.twins.flip=0.5",
        "buffer.init=class_means",
        "buffer.reinit_probability=0",
        "buffer.capacity=16",
        "train.batch_size=16",
        "buffer.augment.probability=0.5",
        "sampler.steps=5",
        "sampler.final_step_size=5",
        "sampler.final_noise_std=0.001",
        "train.warmup_steps=4",
        "optimizer.lr=1e-3",
        "scheduler=exponential",
        "train.max_steps=6",
        "train.log_every=1",
        "train.sample_steps=8",
        "wandb.mode=disabled",
        f"hydra.run.dir={path}",
    )
    assert result.returncode == 0, result.stderr
    logged = [line for line in records(path) if "train/lr" in line]
    assert [line["train/lr"] for line in logged] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert all(line["train/energy_l2"] == 0 for line in logged)
    terms = ("train/contrastive_divergence", "train/kl", "train/twins")
    for line in logged:
        assert line["train/loss"] == pytest.approx(sum(map(line.get, terms)), abs=1e-5)
    assert load(path)["buffer"]["ages"].tolist() == [6 * 5] * 16


@pytest.mark.slow
def test_a_run_starts_from_weights_that_ship_and_moves_a_part_of_its_chains(tmp_path):
    path = tmp_path / "run"
    result = run(
        "train.py",
        *TINY,
        "energy.hidden=32",
        "initial_weights=quick",
        "train.chains=4",
        "buffer.policy=fifo",
        "buffer.reinit_probability=0.5",
        "buffer.initial=16",
        "train.max_steps=40",
        "train.save_every_steps=10",
        "train.keep=9",
        "train.log_every=1",
        "wandb.mode=disabled",
        f"hydra.run.dir={path}",
    )
    assert result.returncode == 0, result.stderr
    first, ours = load(path / "checkpoints/step_000000.pt"), load("quick")["energy"]
    assert all(torch.equal(value, ours[key]) for key, value in first["energy"].items())
    sizes = [load(path / f"checkpoints/step_{step:06d}.pt")["buffer"]["chains"].shape[0] for step in (0, 10, 20, 30)]
    assert sizes == [16, 56, 96, 136]  # 4 a step
    reached = [line["chain/fresh_reached"] for line in records(path) if "chain/fresh_reached" in line]
    assert len(reached) > 30 and all(0 <= share <= 1 for share in reached)

    result = run("train.py", *TINY, "initial_weights=quick", f"hydra.run.dir={tmp_path / 'other'}")
    assert_one_line_error(result, "initial_weights=quick", "layers.0.bias", "(16,)", "(2,)")
    result = run("train.py", "initial_weights=nothing", f"hydra.run.dir={tmp_path / 'other'}")
    assert_one_line_error(result, "nothing does not exist", "joint")


def untrained_run(folder: Path, shape: list[int], data: dict[str, Any]) -> Path:
    config = {"_target_": "ebm.energies.MLPEnergy", "shape": shape, "hidden": 4}
    energy = MLPEnergy(shape, hidden=4).state_dict()
    state = {"energy": energy, "energy_config": config, "config": {"data": data}, "step": 0, "epoch": 0}
    save(folder / "checkpoints/last.pt", state)
    return folder


DATA = {  # of every option, and of a function of the user's own: the images' shape and what else is to be given
    **dict.fromkeys(("mnist", "fashion_mnist"), ([1, 28, 28], ["data.root={root}"])),
    "plane": ([2], ["data.test_size=99"]),
    "mnist5k": ([1, 28, 28], []),
    "folder": ([3, 32, 32], ["data.root={images}"]),
    "arrays": ([1, 28, 28], ["data.file={arrays}"]),
    "trained": ([1, 28, 28], []),
    "own": ([1, 16, 16], ["hydra.searchpath=[file://{own}]"]),
}


@pytest.mark.parametrize("option", DATA)
def test_every_data_set_in_sample_and_evaluate(option, tmp_path, request, monkeypatch):
    (tmp_path / "mine.py").write_text(readme_block("python", "def stripes"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.yaml").write_text("_target_: mine.stripes\n")
    monkeypatch.syspath_prepend(tmp_path)
    shape, extra = DATA[option]
    path = untrained_run(tmp_path / "run", shape, {"_target_": "ebm.data.mnist5k"})
    values = {name: request.getfixturevalue(of) for name, of in FIXTURES.items() if f"{{{name}}}" in "".join(extra)}
    arguments = [f"checkpoint={path}", f"data={option}", "device=cpu"]
    arguments += [argument.format(**values, own=tmp_path) for argument in extra]
    result = run("sample.py", *arguments, "num_samples=2", "steps=2", f"out={tmp_path / 'samples'}")
    assert result.returncode == 0, result.stderr
    if len(shape) == 3:
        result = run(
            "sample.py", *arguments, "num_samples=2", "steps=2", "init=denoise", f"out={tmp_path / 'denoised'}"
        )
        assert result.returncode == 0, result.stderr
    small = ["ood.sets=[noise,mnist]", "ood.scores=[]", "bootstrap=2", "chains.count=2", "chains.steps=16"]
    small += ["density.cells=9", "density.steps=2", "ais.chains=2", "ais.temperatures=2", "ais.burn_in=1"]
    parts = "[ood,classification,density,likelihood" + (
        ",chains]" if len(shape) == 1 else "]"
    )  # of images: their classifier
    result = run(
        "evaluate.py", *arguments, *small, f"evaluation.parts={parts}", "wandb.mode=disabled", f"out={tmp_path / 'out'}"
    )
    assert result.returncode == 0, result.stderr
    assert "auroc/noise" in json.loads((tmp_path / "out/metrics.json").read_text())


def test_every_data_set_is_tested_or_needs_a_download():
    assert {path.stem for path in (ROOT / "conf/data").glob("*.yaml")} - set(DATA) == {"cifar10", "torchvision"}


# The files of conf/ that are no option of a group above, and where they are run.
RUN_ELSEWHERE = {
    **dict.fromkeys(("train", "sample", "evaluate", "sampler/trained"), "every test here"),
    **dict.fromkeys(("data/cifar10", "data/torchvision", "data/trained"), "above"),
    **{f"hydra/{name}": "running/test_sweeps.py" for name in ("launcher/slurm", "sweeper/tpe")},
    "wandb_sweep": "running/test_sweeps.py",
}
EVALUATIONS = sorted(path.stem for path in (ROOT / "conf/evaluation").glob("*.yaml"))


def test_every_file_of_the_configuration_is_run():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", return_hydra_config=True)
    defaults = {f"{group}/{name}" for group, name in cfg.hydra.runtime.choices.items() if isinstance(name, str)}
    options = {
        f"{group}/{name}" for group in GROUPS for option in GROUPS[group] for name in option.strip("[]").split(",")
    }
    run_here = (
        defaults | {option.removeprefix("+") for option in options} | {f"evaluation/{name}" for name in EVALUATIONS}
    )
    files = {str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert files - run_here == set(RUN_ELSEWHERE)
    for name, where in RUN_ELSEWHERE.items():
        assert not where.endswith(".py") or name.split("/")[-1] in (ROOT / "tests" / where).read_text()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_is_run(name, run_dir, tmp_path):
    """As it stands its settings are accepted; small, it runs the parts that it names."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", [f"evaluation={name}"])
    evaluate.check_settings(OmegaConf.to_container(cfg, resolve=True))
    small = ["bootstrap=2", "samples.count=16", "samples.steps=[2]", "chains.count=2", "chains.steps=16"]
    small += ["ais.chains=2", "ais.temperatures=2", "ais.burn_in=1", "wandb.mode=disabled", f"out={tmp_path / 'out'}"]
    result = run("evaluate.py", f"checkpoint={run_dir}", f"evaluation={name}", *small)
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (
        numbers["protocol"]["evaluation"] == {"name": name, "parts": list(cfg.evaluation.parts)}
        and cfg.evaluation.name == name
    )
    kinds = {key.split("/")[0] for key in numbers}
    shown = {"ood": "auroc", "samples": "frechet", "chains": "chains", "likelihood": "log_z"}
    for part in cfg.evaluation.parts:
        assert part in numbers["skipped"] or shown.get(part, "log_z") in kinds


def test_cifar10_composes_and_says_how_to_get_it(tmp_path):
    (tmp_path / "file").write_text("")
    run_dir = f"hydra.run.dir={tmp_path / 'run'}"
    result = run("train.py", "data=cifar10", f"data.root={tmp_path / 'file'}", run_dir)
    assert_one_line_error(result, "CIFAR10", "data.root", "data=mnist5k")


def test_every_number_of_the_tutorial_is_a_default():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["experiment=tutorial"])
    assert (cfg.data.name, cfg.data.hold_out) == ("MNIST", "test") and cfg.energy.hidden == 32
    sampler = cfg.sampler
    assert (sampler.steps, sampler.step_size, sampler.noise_std, sampler.grad_clamp) == (60, 10.0, 0.005, 0.03)
    buffer = cfg.buffer
    assert (buffer.capacity, buffer.initial, buffer.reinit_probability, buffer.policy) == (8192, 128, 0.05, "fifo")
    assert (cfg.loss.contrastive_divergence.alpha, cfg.train.data_noise_std) == (0.1, 0.005)
    assert (cfg.optimizer.lr, cfg.optimizer.beta1, cfg.optimizer.beta2) == (1e-4, 0.0, 0.999)
    assert cfg.scheduler.gamma == 0.97
    train = cfg.train
    assert (train.epochs, train.batch_size, train.grad_norm_clip, train.eval_batch_size) == (60, 128, 0.1, 256)
    assert (train.max_steps, train.max_minutes) == (None, None)
    assert (train.validate_every_epochs, train.sample_every_epochs, train.sample_steps) == (1, 5, 256)


@pytest.mark.parametrize("recipe", sorted(set(GROUPS["experiment"]) - {"tutorial"}))
def test_every_other_recipe_holds_validation_images_out(recipe):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("train", [f"experiment={recipe}"]).data.hold_out in (None, 500)


def test_limits_hold_together(tmp_path):
    path = tmp_path / "run"
    arguments = ["train.max_steps=1000000", "train.epochs=1000", "train.max_minutes=0.03", "wandb.mode=disabled"]
    result = run("train.py", *TINY, *arguments, f"hydra.run.dir={path}")
    assert result.returncode == 0, result.stderr
    last = [line for line in records(path) if "train/lr" in line][-1]
    assert last["step"] < 1000
    assert last["train/lr"] < 0.15e-3  # the schedule ran to its end, the time limit's


# --- sample.py


def test_sample_from_noise(run_dir, tmp_path, figures_saved):
    arguments = ["num_samples=20", "steps=16", f"checkpoint={run_dir}"]
    for name, extra in [("a", []), ("b", ["batch_size=8"]), ("c", ["seed=1"]), ("d", ["sampler.step_size=1"])]:
        result = (run_script if name == "a" else run)("sample.py", *arguments, *extra, f"out={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    x = {name: np.load(tmp_path / name / "samples.npz")["samples"] for name in "abcd"}
    assert x["a"].shape == (20, 1, 28, 28) and x["a"].dtype == np.float32 and np.abs(x["a"]).max() <= 1
    assert np.array_equal(x["a"], x["b"])
    assert not np.array_equal(x["a"], x["c"]) and not np.array_equal(x["a"], x["d"])
    samples = bytes_of(torch.from_numpy(x["b"]))
    with Image.open(tmp_path / "b/grid.png") as grid:
        assert np.array_equal(tiles(grid, (28, 28), factor=3, columns=4), samples)
    with Image.open(tmp_path / "b/chains.gif") as gif:
        assert gif.n_frames == 17
        gif.seek(16)
        assert np.abs(tiles(gif, (28, 28), factor=2)[:20].astype(int) - samples).max() <= 2  # a palette of 256
    (axes,) = figures_saved[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["step 0", *map(str, range(2, 17, 2))]
    strips = tiles(Image.fromarray(axes.images[0].get_array()), (28, 28), columns=9)
    start = uniform_noise((8, 1, 28, 28), chain_generators(1, 8))
    assert np.array_equal(strips[::9], bytes_of(start)) and np.array_equal(strips[8::9], samples[:8])


def test_sample_from_buffer_and_from_images(run_dir, tmp_path):
    arguments = [f"checkpoint={run_dir / 'checkpoints/last.pt'}", "steps=1", "sampler.noise_std=0"]
    out = tmp_path / "buffer"
    result = run("sample.py", *arguments, "init=buffer", "num_samples=9", "sampler.step_size=1e-9", f"out={out}")
    assert result.returncode == 0, result.stderr
    x, chains = np.load(out / "samples.npz")["samples"], load(run_dir)["buffer"]["chains"].numpy()
    assert all(np.abs(chains - image).max(axis=(1, 2, 3)).min() < 1e-6 for image in x)

    images = tmp_path / "images.npz"
    np.savez(images, samples=np.zeros((5, 1, 28, 28), np.float32))
    out = tmp_path / "images"
    result = run("sample.py", *arguments, "init=images", f"images={images}", f"out={out}")
    assert result.returncode == 0, result.stderr
    assert np.load(out / "samples.npz")["samples"].shape == (5, 1, 28, 28)


def test_denoise_published_weights_gain_psnr(published, data_root, tmp_path):
    result = run(
        "sample.py",
        f"checkpoint={published}",
        "init=denoise",
        "num_samples=16",
        "steps=30",
        f"data.root={data_root}",
        f"out={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("σ 0.3"))
    noisy, median, bilateral, restored = map(float, line.split()[2:])
    assert restored > max(noisy + 2, median, bilateral)
    assert (tmp_path / "denoised.png").is_file()


# --- evaluate.py


@pytest.mark.slow
def test_evaluate_published_weights(published, data_root, tmp_path):
    result = run_script(
        "evaluate.py",
        f"checkpoint={published}",
        f"data.root={data_root}",
        f"out={tmp_path}",
        "evaluation=scores",
        "bootstrap=20",
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    sets = ("train", "test", "noise", "noisy", "rotated", "tiny")
    assert {f"score/{name}/{kind}" for name in sets for kind in ("mean", "std")} <= set(numbers)
    assert {f"auroc/{name}" for name in sets} <= set(numbers)
    assert numbers["score/noise/mean"] == pytest.approx(-17.88, abs=0.05)
    assert -0.01 < numbers["score/train/mean"] < 0.005
    means = [numbers[f"score/{name}/mean"] for name in ("test", "rotated", "tiny", "noisy", "noise")]
    assert means == sorted(means, reverse=True)
    assert numbers["auroc/noise"] == 1 and numbers["auroc/test"] == 0.5
    assert numbers["auroc/tiny"] == pytest.approx(0.84, abs=0.02)
    for name in sets:
        assert name in result.stdout


def test_example_images_stand_over_their_own_scores(run_dir, tmp_path, monkeypatch):
    drawn, draw = [], figures.scored_images
    monkeypatch.setattr(figures, "scored_images", lambda *what: (drawn.extend(what), draw(*what)))
    result = run(
        "evaluate.py",
        f"checkpoint={run_dir}",
        "evaluation=scores",
        "ood.sets=[constant,tiny]",
        "bootstrap=2",
        "wandb.mode=disabled",
        f"out={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    _, pictures, scores = drawn
    assert set(pictures) == {"test", "constant", "tiny"}
    with torch.no_grad():
        for name, x in pictures.items():
            assert (-load_energy(run_dir)(x)).tolist() == pytest.approx(scores[name].tolist(), abs=1e-5), name


@pytest.mark.slow
def test_evaluate_batch_size_changes_nothing(run_dir, tmp_path):
    for size in (256, 40):
        out = tmp_path / str(size)
        result = run("evaluate.py", f"checkpoint={run_dir}", f"batch_size={size}", f"out={out}", "evaluation=scores")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "256/metrics.json").read_text() == (tmp_path / "40/metrics.json").read_text()


# --- bad input


@pytest.mark.parametrize(
    "override, words",
    [
        ("sampler.steps=abc", ["sampler.steps", "'abc'", "integer"]),
        ("sampler.steps=-1", ["sampler.steps", "-1"]),
        ("sampler.steps=0", ["sampler.steps", "0"]),
        ("sampler=trained", ["sampler.step_size", "'trained'"]),
        ("optimizer.lr=0", ["optimizer.lr"]),
        ("optimizer.lr=nan", ["optimizer.lr"]),
        ("buffer.capacity=0", ["buffer.capacity"]),
        ("buffer.capacity=64", ["buffer.capacity", "batch size"]),
        ("loss.contrastive_divergence.alpha=x", ["loss.contrastive_divergence.alpha"]),
        ("energy.hidden=1.5", ["energy.hidden"]),
        ("train.batch_size=100000", ["train.batch_size", "4000"]),
        ("data.hold_out=none", ["data.hold_out", "null", "test", "integer in [1, 4499]", "'none'"]),
        ("buffer.capacity=1000000000000", ["buffer.capacity", "3,152,000,000,000,000 bytes"]),
        ("energy.hidden=1000000", ["energy", "bytes"]),
        ("data=plane energy=mlp data.train_size=1000000000000", ["data.train_size", "bytes"]),
        ("train.max_steps=0", ["train.max_steps"]),
        ("train.chains=0", ["train.chains"]),
        ("train.chains=9000", ["train.chains", "buffer.capacity", "8192"]),
        ("train.log_every=zero", ["train.log_every"]),
        ("device=tpu9", ["device", "tpu9"]),
        ("seed=-1", ["seed"]),
        ("wandb.mode=loud", ["wandb.mode", "WANDB_MODE", "offline"]),
        ("data=folder", ["data.root"]),
        ("data=plane energy=mlp loss=[contrastive_divergence,twins]", ["loss.twins", "(2,)"]),
        ("loss=[contrastive_divergence,classification]", ["loss.classification", "energy.classes"]),
        ("loss=[energy_matching]", ["sampler.start=normal sampler.bounds=null", "got sampler.start=uniform"]),
        ("loss=[]", ["loss must be"]),
    ],
)
def test_train_refuses(override, words, tmp_path):
    path = tmp_path / "run"
    result = run("train.py", *override.split(), f"hydra.run.dir={path}")
    assert_one_line_error(result, *words)
    assert not path.exists()


def test_mistyped_key_is_refused(tmp_path):
    result = run_script("train.py", "sampler.stepz=3", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 1 and "stepz" in result.stderr and "Traceback" not in result.stderr


def test_full_traceback_on_request(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "sampler.steps=abc", f"hydra.run.dir={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HYDRA_FULL_ERROR": "1"})
    assert result.returncode == 1 and "Traceback" in result.stderr and "sampler.steps" in result.stderr


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_checkpoints_that_are_none(script, run_dir, tmp_path):
    last = (run_dir / "checkpoints/last.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(last[: len(last) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    other = load(run_dir) | {"energy": ConvEnergy(hidden=8).state_dict()}
    torch.save(other, tmp_path / "other.pt")
    (tmp_path / "directory").mkdir()
    for name, word in [
        ("missing.pt", "does not exist"),
        ("directory", "not a run"),
        ("truncated.pt", "not a checkpoint"),
        ("text.pt", "not a checkpoint"),
        ("empty.pt", "not a checkpoint"),
        ("list.pt", "not a checkpoint"),
        ("other.pt", "architecture"),
    ]:
        result = run(script, f"checkpoint={tmp_path / name}", f"out={tmp_path / 'out'}")
        assert_one_line_error(result, name, word)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["num_samples=0"], ["num_samples"]),
        (["num_samples=10000000000"], ["num_samples=10000000000", "bytes"]),
        (["frames=1000000000", "steps=1000000000"], ["frames", "bytes"]),
        (["steps=ten"], ["steps", "'ten'"]),
        (["batch_size=-3"], ["batch_size"]),
        (["init=somewhere"], ["init", "noise"]),
        (["init=images"], ["images"]),
        (["init=images", "images=nowhere.npz"], ["nowhere.npz", "does not exist"]),
        (["init=images", "images={tmp}/wrong_size.npz"], ["wrong_size.npz", "(N, 1, 28, 28)"]),
        (["init=images", "images={tmp}/out_of_range.npz"], ["out_of_range.npz", "[-1, 1]"]),
        (["init=buffer", "num_samples=100000"], ["num_samples", "256"]),
        (["sampler.step_size=-1"], ["sampler.step_size"]),
        (["steps=2", "sampler.noise_std=1e39", "sampler.bounds=null"], ["not finite", "sampler.step_size"]),
        (["out={tmp}/wrong_size.npz"], ["out", "directory"]),
        (["out=5"], ["out", "directory"]),
        (["weights=2"], ["weights"]),
        (["device=meta"], ["device", "meta"]),
    ],
)
def test_sample_refuses(overrides, words, run_dir, tmp_path):
    np.savez(tmp_path / "wrong_size.npz", samples=np.zeros((2, 1, 14, 14), np.float32))
    np.savez(tmp_path / "out_of_range.npz", samples=np.full((2, 1, 28, 28), 255, np.float32))
    arguments = [argument.format(tmp=tmp_path) for argument in overrides]
    result = run("sample.py", f"checkpoint={run_dir}", f"out={tmp_path / 'out'}", *arguments)
    assert_one_line_error(result, *words)
    assert not (tmp_path / "out").exists()


def test_data_of_another_size_is_refused(run_dir, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("L", (9, 9), i).save(images / f"{i}.png")
    arguments = ["data=folder", f"data.root={images}", "data.image_size=9", "data.channels=1"]
    result = run("evaluate.py", f"checkpoint={run_dir}", *arguments, f"out={tmp_path / 'out'}")
    assert_one_line_error(result, "(1, 9, 9)", "(1, 28, 28)")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_reads_well(script):
    result = run_script(script, "--help")
    assert result.returncode == 0
    for word in ("python " + script, "seed"):
        assert word in result.stdout


def test_images_too_large_for_this_machine(image_root, tmp_path):
    arguments = ["data=folder", f"data.root={image_root}", "data.image_size=1000000"]
    result = run("train.py", *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_line_error(result, "data.image_size=1000000", "72,000,000,000,000 bytes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, folder",
    [
        ("train.py hydra.run.dir", "file/below"),
        ("train.py -m hydra.sweep.dir", "file"),
        ("sample.py hydra.run.dir", "file"),
    ],
)
def test_output_folders_that_cannot_be(command, folder, tmp_path):
    (tmp_path / "file").write_text("")
    script, *arguments = f"{command}={tmp_path / folder}".split()
    result = run_script(script, *arguments)
    assert_one_line_error(result, folder)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_a_directory_that_cannot_be_written_to(tmp_path):
    for folder in ("/proc", "/proc/below"):  # root, too, can make nothing there
        with pytest.raises(ValueError, match=f"hydra.run.dir={folder} must be a directory that can be written to"):
            writable("hydra.run.dir", folder)
    writable("hydra.run.dir", tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())


def test_errors_of_a_real_command(tmp_path):
    """One subprocess for what the other refusals do in this process."""
    result = run_script("train.py", "sampler.steps=abc", f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_line_error(result, "sampler.steps", "'abc'")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    result = run_script("sample.py", "checkpoint=nowhere.pt")
    assert_one_line_error(result, "nowhere.pt", "does not exist")


def readme_block(language: str, word: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if word in block)


def test_readme_data_and_energy_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(readme_block("python", "def stripes"))
    for group, name, text in [
        ("data", "stripes", "_target_: mine.stripes\n"),
        ("energy", "shallow", "_target_: mine.Shallow\nhidden: 8\n"),
    ]:
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config-dir",
        str(tmp_path),
        "data=stripes",
        "energy=shallow",
    ]
    command += [
        "device=cpu",
        "train.max_steps=3",
        "train.sample_steps=8",
        "buffer.capacity=256",
        "wandb.mode=disabled",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    state = load(tmp_path / "run")
    assert state["energy_config"] == {"_target_": "mine.Shallow", "hidden": 8, "shape": [1, 16, 16]}
    assert state["energy"]["layers.3.weight"].shape == (1, 8 * 8 * 8)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("sample.py", ["num_samples=64", "steps=2"]),
        ("sample.py", ["init=inpaint", "num_samples=8", "steps=2", "data=mnist5k"]),
        ("evaluate.py", ["evaluation=scores", "data=mnist5k", "bootstrap=2", "wandb.mode=disabled"]),
    ],
)
def test_a_full_disk_leaves_the_outputs_that_were_there(tmp_path, script, more):
    """RLIMIT_FSIZE makes write() fail midway, as a full disk does."""
    out = tmp_path / "out"
    arguments = [*more, "device=cpu", f"out={out}"]
    assert run(script, *arguments).returncode == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert max(map(len, before.values())) > 5000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        result = run(script, *arguments, "seed=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(result, f"{out} cannot be written (File too large)")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


WAIT = "import pathlib, time\ndef wait(**_):\n    pathlib.Path('waiting').touch()\n    time.sleep(600)\n"
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "module", "command"),
    [
        (SIGINT, "hydra", ["train.py"]),  # while it imports
        (SIGTERM, "hydra", ["sample.py"]),
        (SIGINT, "hydra", ["evaluate.py"]),
        (SIGTERM, "waits", ["train.py", "data._target_=waits.wait"]),
        pytest.param(
            SIGINT,
            "waits",
            ["train.py", "-m", "data._target_=waits.wait", "seed=0,1", "hydra.sweep.dir=sweep"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SIGINT, "waits", ["sample.py", "init=denoise", "data._target_=waits.wait"], marks=pytest.mark.slow
        ),
        pytest.param(SIGTERM, "waits", ["evaluate.py", "data._target_=waits.wait"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_there_is_anything_to_save(tmp_path, number, module, command):
    """One line, the exit code that shells give, and nothing left; of a sweep, the summary of what there is."""
    (tmp_path / f"{module}.py").write_text(WAIT + "wait()\n" * (module == "hydra"))
    script, *overrides = command
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *overrides],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, error = process.communicate()
    assert process.returncode == 128 + number and error == f"{number.name}: stopped\n"
    left = {path.name for path in tmp_path.iterdir()} - {"waiting", f"{module}.py", "__pycache__"}
    if "-m" in command:
        assert left == {"sweep"} and "2 jobs, 2 failed" in out
        assert "it was cut off" in out and "it ended before it began" in out
    else:
        assert left == set() and out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP")
@pytest.mark.parametrize(
    "script, given, found",
    [
        *((script, {}, "PASSIVE") for script in ("train.py", "sample.py", "evaluate.py")),
        ("train.py", {"OMP_WAIT_POLICY": "active"}, "ACTIVE"),
    ],
)
def test_torchs_threads_wait_without_spinning_unless_the_user_says_so(script, given, found):
    """As OpenMP itself says when torch loads it."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--cfg", "job"],
        capture_output=True,
        text=True,
        env=environment | given | {"OMP_DISPLAY_ENV": "true"},
    )
    assert f"OMP_WAIT_POLICY = '{found}'" in result.stderr
