"""evaluate.py from the command line and from Python: names, the tutorial's numbers, same bits, nothing half."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import kstest
from tqdm import tqdm

import evaluate
from ebm.data import Dataset, scaled
from ebm.energies import ConvEnergy, MLPEnergy
from ebm.evaluation import ais, metrics
from ebm.evaluation.chains import chains
from ebm.evaluation.chains import run as run_chains
from ebm.evaluation.evaluation import Evaluation, protocol
from ebm.evaluation.likelihood import likelihood
from ebm.evaluation.ood_scores import ood
from ebm.running import checkpoint, sweep, trained
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.sgld import SGLD

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"
ROOT = Path(os.environ.get("EBM_DATA", SHARED / "data"))
TUTORIAL = Path(os.environ.get("EBM_TUTORIAL", SHARED / "tutorial")) / "MNIST.ckpt"
SMALL = [
    "bootstrap=20",
    "samples.count=16",
    "samples.steps=[2,4]",
    "chains.count=3",
    "chains.steps=40",
    "ais.temperatures=8",
    "ais.burn_in=2",
    "ais.chains=4",
    "density.cells=40",
    "density.steps=5",
]

WHOLE = "evaluation.parts=[ood,samples,classification,chains,density,likelihood]"


def run(*overrides: str) -> dict[str, Any]:
    """The numbers of an evaluation in this process, without W&B."""
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("evaluate", overrides=["wandb.mode=disabled", "device=cpu", *SMALL, *overrides])
    return json.loads((evaluate.evaluate(cfg) / "metrics.json").read_text())


def script(cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "evaluate.py"), *overrides, "device=cpu"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 grey images of two classes: bright above, bright below."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(80):
        pixels = rng.integers(0, 80, (28, 28), dtype=np.uint8)
        pixels[:14] += np.uint8(i % 2 * 150)
        pixels[14:] += np.uint8((1 - i % 2) * 150)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02}.png")
    return folder


def save_run(folder: Path, images: Path, seed: int = 0) -> Path:
    """A run directory with an untrained energy and a buffer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        energy = ConvEnergy(hidden=4)
    data = {"_target_": "ebm.data.image_folder", "root": str(images), "image_size": 28, "channels": 1}
    state = {
        "energy": energy.state_dict(),
        "energy_config": {"_target_": "ebm.energies.ConvEnergy", "shape": [1, 28, 28], "hidden": 4},
        "buffer": ReplayBuffer(
            (1, 28, 28), torch.Generator().manual_seed(1), capacity=32, policy="in_place"
        ).state_dict(),
        "config": {"data": data | {"test_fraction": 0.25, "hold_out": 16}},
        "step": 7,
        "epoch": 1,
    }
    checkpoint.save(folder / "checkpoints" / "last.pt", state)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> list[Path]:
    return [save_run(tmp_path_factory.mktemp(name), images, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def whole(runs: list[Path], cache: str, images: Path) -> dict[str, Any]:
    return run(f"checkpoint={runs[0]}", cache, f"ood.root={images}", WHOLE)


def test_names(whole: dict[str, Any], runs: list[Path]) -> None:
    for name in ("auroc", "aupr", "aupr_out", "fpr95"):
        for key in (f"{name}/noise", f"{name}/halves", f"{name}/halves/gradient_norm", f"{name}/tiny/typicality"):
            low, high = whole[f"{key}/ci95"]
            assert 0 <= low <= whole[key] + 1e-9 and whole[key] <= high + 1e-9 and high <= 1
    for key in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
        for steps in ("2", "4", "4/buffer", "real"):
            low, high = whole[f"{key}/own-n16/{steps}/ci95"]
            assert low <= whole[f"{key}/own-n16/{steps}"] <= high
    assert {"class_entropy/4", "class_entropy/4/ci95", "confidence/2", "nearest/4", "copies/4/buffer"} <= whole.keys()
    assert {"chains/rhat/all", "chains/ess/noise", "chains/same_class", "chains/steady_state"} <= whole.keys()
    assert whole["chains/rhat/all"] == max(whole[f"chains/rhat/{name}/all"] for name in ("energy", "classes", "pixels"))
    assert {"log_z/lower", "log_z/upper", "bits_per_dim/lower", "bits_per_dim/upper/ci95"} <= whole.keys()
    assert {"ais/acceptance/forward", "ais/acceptance/reverse"} <= whole.keys()
    assert "KMNIST is not in" in whole["skipped"]["ood/kmnist"]
    assert set(whole["skipped"]) == {
        f"ood/{n}" for n in ("mnist", "fashion_mnist", "kmnist", "omniglot", "svhn", "cifar10")
    } | {"classification", "density"}


def test_the_row_of_real_images_is_of_validation_images(whole: dict[str, Any], runs: list[Path]) -> None:
    data = trained.dataset_of(checkpoint.load(runs[0]))
    distances, _ = metrics.nearest(data.validation, data.train)  # all 16, in whatever order
    assert whole["nearest/real"] == pytest.approx(np.median(distances))
    of_test, _ = metrics.nearest(data.test, data.train)
    assert whole["nearest/real"] != pytest.approx(np.median(of_test))
    page = (runs[0] / "evaluation" / "all" / "report.html").read_text()
    assert "<td>validation images</td>" in page and "<td>training images</td>" not in page


def test_protocol_and_files(whole: dict[str, Any], runs: list[Path]) -> None:
    protocol = whole["protocol"]
    assert protocol["sampler"]["step_size"] == 10.0 and protocol["seed"] == 0 and protocol["step"] == 7
    assert len(protocol["weights"][0]) == len(protocol["data"]["hash"]) == 16
    assert protocol["versions"]["torch"] == version("torch")
    out = runs[0] / "evaluation" / "all"
    names = {"scores", "roc", "auroc", "examples", "quality", "samples", "nearest", "classes", "chains", "chain_strips"}
    assert {file.name for file in out.iterdir()} == {f"{n}.png" for n in names} | {"metrics.json", "report.html"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(names) and protocol["data"]["hash"] in page


def test_twice_and_on_another_batch_size_the_same_bits(
    whole: dict[str, Any], runs: list[Path], cache: str, images: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    again = run(f"checkpoint={runs[0]}", cache, f"ood.root={images}", f"out={tmp_path}", "batch_size=17", WHOLE)
    assert again == whole
    part = run(f"checkpoint={runs[0]}", cache, f"ood.root={images}", f"out={tmp_path / 'ood'}", "evaluation=ood")
    assert all(whole[key] == value for key, value in part.items() if key not in ("protocol", "skipped"))


def test_off_the_cpu_the_protocol_has_the_batch_size(runs: list[Path], tmp_path: Path) -> None:
    """There the kernels round as it has it: two such evaluations are not the same one."""
    state = checkpoint.load(runs[0])
    data, energy = trained.dataset_of(state), checkpoint.build_energy(state)
    settings = {"batch_size": 64, "ood": {"root": "data", "sets": []}, "seed": 0}
    for device, want in (("cpu", None), ("meta", 64)):  # meta: no CPU, and there without a GPU
        ev = Evaluation([energy], data, trained.sampler_of(state, {}), tmp_path, torch.device(device))
        assert protocol(ev, settings, 0, None).get("batch_size") == want


def test_each_part_says_its_name_where_no_bar_can_be_and_stdout_has_neither(
    runs: list[Path], cache: str, tmp_path: Path
) -> None:
    parts = "evaluation.parts=[ood,chains]"
    done = script(tmp_path, f"checkpoint={runs[0]}", parts, cache, "wandb.mode=disabled", *SMALL)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines.index("ood …") < lines.index("chains …")
    assert "%|" not in done.stderr and "…" not in done.stdout


def test_on_a_terminal_a_bar_counts_every_step(runs: list[Path], cache: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Of each part: what it counted at its end is what it said it would."""
    bars: list[Any] = []

    class Shown(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("ebm.evaluation.evaluation.tqdm", Shown)
    run(
        f"checkpoint={runs[0]}",
        cache,
        "evaluation.parts=[ood,samples,chains,likelihood]",
        f"out={tmp_path / 'out'}",
        "ood.sets=[noise]",
    )
    assert {bar.desc: (bar.n, bar.total) for bar in bars} == {
        "ood": (3, 3),
        "samples": (2 * 16 * (2 + 4), 2 * 16 * (2 + 4)),
        "chains": (2 * 3 * 40, 2 * 3 * 40),
        "likelihood": (3 * 8 + 2, 3 * 8 + 2),
    }


def test_ensemble(runs: list[Path], images: Path, tmp_path: Path) -> None:
    found = run(f"checkpoint=[{runs[0]},{runs[1]}]", "evaluation=scores", f"out={tmp_path}")
    assert {"auroc/noise/ensemble_mean", "auroc/noise/ensemble_spread/ci95"} <= found.keys()
    assert len(found["protocol"]["weights"]) == 2


def test_constant_and_nan_energies_are_errors_and_leave_nothing(runs: list[Path], tmp_path: Path) -> None:
    state = checkpoint.load(runs[0])
    last = [name for name in state["energy"] if name.startswith("layers.11")]
    for name in last:
        state["energy"][name] = torch.zeros_like(state["energy"][name])
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pt", state)
    with pytest.raises(ValueError, match="constant"):
        run(f"checkpoint={tmp_path / 'run'}", "evaluation=scores", f"out={tmp_path / 'out'}")
    for name in ("layers.0.weight", "layers.11.weight"):
        state["energy"][name].fill_(1e38)
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pt", state)
    with pytest.raises(ValueError, match="not finite"):
        run(f"checkpoint={tmp_path / 'run'}", "evaluation=scores", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bootstrap=1", "bootstrap must be an integer >= 2"),
        ("samples.steps=[]", "samples.steps must be a list"),
        ("samples.steps=[0]", "samples.steps must be an integer >= 1"),
        ("ood.scores=[entropy]", "ood.scores must be one of"),
        ("ood.sets=[nonsense]", "ood.sets: nonsense"),
        ("ood.sets=noise", "ood.sets must be a list"),
        ("density.cells=1000000", "density.cells=1000000 takes 64,000,000,000,000 bytes"),
        ("ood.count=1", "ood.count must be an integer >= 2"),
        ("ais.temperatures=1000000000000", "ais.temperatures=1000000000000 takes"),
        ("evaluation.parts=[fid]", "evaluation.parts must be one of"),
        ("evaluation.parts=[]", "evaluation.parts must be a list"),
        ("evaluation.name=../x", "evaluation.name must be the name of a folder"),
        ("ood.scores=5", "ood.scores must be a list"),
        ("chains.steps=abc", "chains.steps must be an integer"),
    ],
)
def test_bad_settings_name_their_key(runs: list[Path], tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        run(f"checkpoint={runs[0]}", f"out={tmp_path}", override)


@pytest.mark.parametrize("script", ["sample", "evaluate"])
def test_the_sampler_is_the_checkpoints_but_for_what_is_given(script: str) -> None:
    state = {"config": {"sampler": {"steps": 7, "step_size": 3.0, "noise_std": 0.5}}}

    def sampler(*overrides: str) -> SGLD:
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            cfg = compose(script, overrides=list(overrides))
        given: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
        return trained.sampler_of(state, given)

    found = sampler("sampler.step_size=5", "sampler.bounds=[-2,2]", "sampler.backend=eager")
    assert (found.steps, found.step_size, found.noise_std, found.bounds) == (7, 5, 0.5, (-2, 2))
    assert sampler().step_size == 3
    with pytest.raises(ValueError, match=r"sampler\._target_ must be one of"):
        sampler("sampler._target_=os.system")


def test_count_takes_the_same_images_of_every_set(runs: list[Path], tmp_path: Path) -> None:
    state = checkpoint.load(runs[0])
    data, energy = trained.dataset_of(state), checkpoint.build_energy(state)
    ev = Evaluation([energy], data, trained.sampler_of(state, {}), tmp_path, torch.device("cpu"), bootstrap=5)
    ood(ev, sets=["inverted"], scores=[], count=7)
    chosen = ev.chosen(data.test, 7)
    assert len(set(chosen.tolist())) == 7
    for name, x in (("test", data.test), ("inverted", -scaled(data.test))):
        assert ev.numbers[f"score/{name}/mean"] == pytest.approx(metrics.scores(energy, x)[chosen].mean(), abs=1e-7)
    assert [row[:2] for row in ev.sections[0].rows] == [["train", "7"], ["test", "7"], ["inverted", "7"]]


def test_a_part_from_python(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    state = checkpoint.load(runs[0])
    data, energy = trained.dataset_of(state), checkpoint.build_energy(state)
    ev = Evaluation([energy], data, trained.sampler_of(state, {}), tmp_path, torch.device("cpu"), bootstrap=5)
    ood(ev, sets=["noise", "kmnist"], scores=["typicality"], root="nowhere")
    chains(ev, count=2, steps=16, rhat=1.05)
    assert {"auroc/noise", "auroc/noise/typicality", "chains/rhat/all"} <= ev.numbers.keys()
    assert [section.title for section in ev.sections] == ["Outliers", "Chains"]
    assert ev.skipped.keys() == {"ood/kmnist"} and (tmp_path / "chains.png").is_file()
    assert "AUROC" in capsys.readouterr().out


def test_chains_from_data_start_at_random_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chains and reverse AIS chains, of test images in order: image i is i/1000 all over."""
    x = (torch.arange(1000) / 1000).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    energy, data = MLPEnergy((1, 4, 4), hidden=4), Dataset("in order", x, x)
    ev = Evaluation([energy], data, SGLD(steps=1), tmp_path, torch.device("cpu"))
    starts = {"chains": run_chains(ev, 64, 1)[-1][0][64:]}
    monkeypatch.setattr(ais, "bracket", lambda energy, base, x, *_: starts.update(ais=x) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        likelihood(ev, chains=64, temperatures=2, power=1.0, leapfrog=1, acceptance=0.8, burn_in=1)
    for images in starts.values():
        values = images[:, 0, 0, 0]
        assert len(values.unique()) == 64 and kstest(values, "uniform").pvalue > 1e-6


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((28, 28), 40 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_folders_replace_no_set_and_what_cannot_be_had_is_skipped(runs: list[Path], tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "x/test", 4), pictures(tmp_path / "y/cats", 3)
    huge, single = pictures(tmp_path / "huge", 2), pictures(tmp_path / "single", 1)
    png = bytearray((huge / "0.png").read_bytes())
    png[16:24] = struct.pack(">II", 20000, 20000)  # what its header claims
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (huge / "0.png").write_bytes(png)
    small = [f"checkpoint={runs[0]}", "evaluation.parts=[ood]", "ood.scores=[]"]
    plain = run(*small, "ood.sets=[noise]", f"out={tmp_path / 'plain'}")
    found = run(*small, f"ood.sets=[noise,{one},{other},{huge},{single},{tmp_path}/none]", f"out={tmp_path / 'out'}")
    assert {key: value for key, value in found.items() if key in plain.keys() - {"skipped", "protocol"}} == {
        key: value for key, value in plain.items() if key not in ("skipped", "protocol")
    }
    assert {"auroc/x_test", "auroc/cats"} <= found.keys()
    assert found["skipped"].keys() == {"ood/huge", "ood/single", "ood/none"}
    assert found["skipped"]["ood/huge"]


def test_images_of_one_class_have_no_entropy(runs: list[Path], tmp_path: Path) -> None:
    pictures(tmp_path / "images/only", 6)
    data = ["data=folder", f"data.root={tmp_path / 'images'}", "data.image_size=28", "data.channels=1"]
    parts = "evaluation.parts=[samples,chains]"
    found = run(f"checkpoint={runs[0]}", *data, "data.test_fraction=0.5", parts, f"out={tmp_path / 'out'}")
    assert "two classes" in found["skipped"]["samples"]
    assert "chains/rhat/all" in found and "chains/same_class" not in found


def test_few_images_are_no_samples_to_compare_with_and_two_have_no_spread(runs: list[Path], tmp_path: Path) -> None:
    pictures(tmp_path / "images/a", 3)
    pictures(tmp_path / "images/b", 5)
    data = ["data=folder", f"data.root={tmp_path / 'images'}", "data.image_size=28", "data.channels=1"]
    few = [f"checkpoint={runs[0]}", *data, f"out={tmp_path / 'out'}"]
    found = run(*few, "data.test_fraction=0.4", "evaluation.parts=[samples,ood]", "ood.sets=[noise]", "ood.scores=[]")
    assert "samples.neighbours" in found["skipped"]["samples"] and "score/test/std" in found
    with pytest.raises(ValueError, match="one test image has no spread"):
        run(*few, "data.test_fraction=0.1")


def test_a_sweep_goes_on_past_what_fails(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    small = ["evaluation.parts=[ood]", "ood.sets=[noise]", "ood.scores=[]", "wandb.mode=disabled", "device=cpu", *SMALL]
    comparison = sweep.Comparison()
    for number, path in enumerate([runs[0], tmp_path / "nowhere", runs[1]]):
        overrides = [f"checkpoint={path}", "evaluation.name=sweep", *small]
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            cfg = compose("evaluate", overrides)
        found = sweep.evaluation_job(partial(evaluate.evaluate_or_compare, cfg, number), number)
        comparison.on_job_end(cfg, SimpleNamespace(_return_value=found, overrides=overrides))
    assert f"error: job 1: {tmp_path}/nowhere does not exist" in capsys.readouterr().err
    cfg.out = str(tmp_path / "compare")
    with pytest.raises(SystemExit) as exit:
        comparison.on_multirun_end(cfg)
    assert exit.value.code == 1
    assert f"1 evaluations failed: checkpoint={tmp_path}/nowhere" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "compare/compare.json").read_text())) == 2


def test_points_in_the_plane(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = MLPEnergy((2,), hidden=8)
    for parameter in energy.layers[-1].parameters():
        parameter.data.mul_(1e-3)
    data = {"_target_": "ebm.densities.dataset", "name": "rings", "train_size": 100, "test_size": 100, "seed": 0}
    config = {"_target_": "ebm.energies.MLPEnergy", "shape": [2], "hidden": 8}
    state = {"energy": energy.state_dict(), "energy_config": config, "config": {"data": data}, "step": 0, "epoch": 0}
    checkpoint.save(tmp_path / "checkpoints" / "last.pt", state)
    found = run(f"checkpoint={tmp_path}", "evaluation=density")
    assert found["log_z"] == pytest.approx(np.log(4), abs=1e-2)  # a flat energy over a square of area 4
    assert found["nll"] == pytest.approx(np.log(4), abs=1e-2)
    assert found["kl"] == pytest.approx(np.log(4) - found["nll/truth"], abs=0.1)
    assert (tmp_path / "evaluation" / "density" / "density.png").is_file()
    found = run(
        f"checkpoint={tmp_path}", "evaluation=ood", "ood.sets=[noise,gaussian_0.1,rotated,mnist]", "ood.scores=[]"
    )
    assert "auroc/noise" in found and set(found["skipped"]) == {"ood/rotated", "ood/mnist"}


@pytest.mark.slow
def test_sweep_and_comparison(runs: list[Path], tmp_path: Path) -> None:
    done = script(tmp_path, "-m", f"checkpoint={runs[0]},nowhere,{runs[1]}", "evaluation=scores", "bootstrap=20")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()].count("error") == 2
    for folder in runs:
        assert (folder / "evaluation" / "scores" / "metrics.json").is_file()
        assert list((folder / "evaluation" / "scores" / "wandb").glob("offline-run-*"))
    out = tmp_path / "evaluation" / "compare"
    assert {file.name for file in out.iterdir()} == {"compare.json", "compare.html", "compare.png"}
    assert "auroc/noisy" in done.stdout
    done = script(tmp_path, f"compare=[{runs[0]},{runs[1]}/evaluation/scores]", "out=table")
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "table" / "compare.json").read_text())
    assert len(both) == 2 and all("auroc/tiny" in numbers for numbers in both.values())
    done = script(tmp_path, f"compare=[{runs[0]},{tmp_path}/nowhere]")
    assert done.returncode == 2 and done.stderr.startswith("error: compare:") and done.stderr.count("\n") == 1


def test_the_tutorials_scores_of_its_first_image() -> None:
    if not (ROOT / "MNIST").is_dir() or not TUTORIAL.is_file():
        pytest.skip("full MNIST or the tutorial's weights are not there")
    from ebm.data import torchvision_dataset
    from ebm.evaluation.metrics import scores
    from ebm.evaluation.outliers import outliers

    data, energy = torchvision_dataset("MNIST", str(ROOT)), checkpoint.load_energy(TUTORIAL)
    data.test = data.test[:8]
    first = {n: float(scores(energy, outliers(n, data, "", 0.3, 0))[0]) for n in ("test", "rotated", "tiny", "noisy")}
    assert first["test"] == pytest.approx(0.0304, abs=1e-3)
    assert first["rotated"] == pytest.approx(-0.0004, abs=1e-3)
    assert first["tiny"] == pytest.approx(-0.0153, abs=1e-3)
    assert -0.15 < first["noisy"] < -0.03
