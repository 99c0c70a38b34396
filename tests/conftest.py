"""Shared by the tests: where the data and the published weights are, runs to look at, and the scripts as commands."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ebm.running.resume import flat

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts
for key in [key for key in os.environ if key.startswith("WANDB")]:
    del os.environ[key]  # what the developer has set
TINY = ["energy.hidden=4", "buffer.capacity=256", "sampler.steps=2", "train.batch_size=16", "train.sample_steps=8"]


def on_cpu(overrides: Sequence[str]) -> list[str]:
    """The overrides, with device=cpu where they name no device: what is tested is the same where there is a GPU."""
    return [*overrides, *([] if any(override.startswith("device=") for override in overrides) else ["device=cpu"])]


def run_script(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    script, *rest = arguments
    return subprocess.run(
        [sys.executable, str(ROOT / script), *on_cpu(rest)],
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        env=environment | {"HYDRA_FULL_ERROR": "0"},
    )


def run(script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """What `python script overrides` does, in this process: seconds faster than another one."""
    name = Path(script).stem
    module = importlib.import_module(name)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(name, [o for o in on_cpu(overrides) if not o.startswith("hydra.run.")])
        try:
            if name == "train":
                run_dir = next(Path(override[14:]) for override in overrides if override.startswith("hydra.run.dir="))
                run_dir.mkdir()
                module.launch(cfg, run_dir)
            else:
                module.launch(cfg)
        except SystemExit as exit:
            code = int(exit.code or 0)
    return subprocess.CompletedProcess([script, *overrides], code, out.getvalue(), err.getvalue())


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), result.stderr
    for word in words:
        assert word in line, line


def bytes_of(x: Tensor) -> NDArray[np.uint8]:
    """Images (N, C, H, W) in [−1, 1] as a picture has them, (N, H, W, 3)."""
    x = ((x.float() + 1) * 127.5).round().byte()
    return (torch.cat([x, x, x], dim=1) if x.shape[1] == 1 else x).permute(0, 2, 3, 1).numpy()


def tiles(picture: Image.Image, size: tuple[int, int], factor: int = 1, columns: int = 8) -> NDArray[np.uint8]:
    """The images (N, height, width, 3) of `size` that a picture is made of, row by row: every pixel a square of
    `factor`, two white pixels between images."""
    whole = np.asarray(picture.convert("RGB"))
    pixels, (height, width) = whole[::factor, ::factor], size
    assert np.array_equal(pixels.repeat(factor, axis=0).repeat(factor, axis=1), whole)
    assert pixels.shape[1] == columns * (width + 2) - 2 and (pixels.shape[0] + 2) % (height + 2) == 0
    corners = [(y, x) for y in range(0, pixels.shape[0], height + 2) for x in range(0, pixels.shape[1], width + 2)]
    return np.stack([pixels[y : y + height, x : x + width] for y, x in corners])


def settings_of(*overrides: str) -> dict[str, Any]:
    """The configuration of `python train.py overrides`, under dotted keys."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return flat(OmegaConf.to_container(compose("train", list(overrides)), resolve=True))


def with_younger(settings: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an older run, and those that are younger and in today's as their defaults."""
    defaults = settings_of("~experiment")
    younger = {key: value for key, value in defaults.items() if key in today and key not in settings}
    return younger | dict(settings)


@pytest.fixture
def figures_saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The matplotlib figures that the test saves."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


@pytest.fixture(scope="session")
def data_root() -> Path:
    root = Path(os.environ.get("EBM_DATA", ROOT / "../shared/data")).resolve()
    if not (root / "MNIST/raw").is_dir():
        pytest.skip("no MNIST: set EBM_DATA to a folder that holds MNIST/raw")
    return root


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 (JPEG) as data=folder reads it: 50 images of each class, and 10 to test with."""
    archive = Path(os.environ.get("EBM_DATA", ROOT / "../shared/data")) / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("no CIFAR-10: set EBM_DATA to a folder that holds cifar10-jpeg.tar.xz")
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(archive) as files:
        few = [file for file in files if file.isdir() or file.name.endswith("00.jpg")]
        files.extractall(folder, few, filter="data")
    return folder


@pytest.fixture(scope="session")
def published() -> Path:
    file = Path(os.environ.get("EBM_TUTORIAL", ROOT / "../shared/tutorial")).resolve() / "MNIST.ckpt"
    if not file.is_file():
        pytest.skip("no published weights: set EBM_TUTORIAL to the folder of the tutorial's MNIST.ckpt")
    return file


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train.py` on the embedded digits: 30 steps with a small network."""
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = [*TINY, "train.max_steps=30", "train.log_every=10", f"hydra.run.dir={path}"]
    result = run_script("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    (path / "stdout.txt").write_text(result.stdout)
    (path / "stderr.txt").write_text(result.stderr)
    return path
