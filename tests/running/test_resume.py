"""A run that is stopped, killed or out of disk goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

import train
from ebm.data import Dataset
from ebm.running import checkpoint, pictures
from ebm.running.resume import alone_in, forced

SMALL = ["device=cpu", "data=folder", "data.image_size=8", "data.channels=1", "energy.hidden=2", "buffer.capacity=48"]
SMALL += [
    "sampler.steps=2",
    "train.batch_size=16",
    "train.sample_steps=4",
    "train.log_every=7",
    "wandb.mode=disabled",
    "optimizer.lr=1e-3",
]
SMALL += [
    "train.validate_every_epochs=3",
    "train.sample_every_epochs=1000",
    "scheduler=exponential",
    "train.max_minutes=null",
]
CLOCKS = ("train/images_per_s", "train/sgld_steps_per_s")
processes = multiprocessing.get_context("forkserver")  # children with the modules loaded: no seconds of imports
processes.set_forkserver_preload(["train"])


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """A folder of 80 small pictures of two classes: 64 to train, 4 steps an epoch."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(80):
        picture = np.zeros((8, 8), dtype=np.uint8)
        picture[:, rng.integers(8)] = picture[rng.integers(8)] = 255
        file = folder / str(i % 2) / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(file)
    return f"data.root={folder}"


def go(run_dir: Path, *overrides: str) -> None:
    """`python train.py …` in this process."""
    run_dir.mkdir(exist_ok=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", list(overrides))
    train.launch(cfg, run_dir, overrides)


def child(run_dir: Path, *overrides: str):
    process = processes.Process(target=go, args=(run_dir, *overrides))
    process.start()
    return process


def resume(run_dir: Path, *overrides: str) -> None:
    go(run_dir.with_name("unused"), *forced([f"resume={run_dir}", *overrides]))


def records(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit, but for clocks and what depends on them."""
    one, two = checkpoint.load(a), checkpoint.load(b)
    for state in (one, two):
        del state["tracker"]["bytes"], state["loop"]["seconds"], state["loop"]["seconds_logged"]
        state["config"]["train"] = None
    assert_equal(one, two)
    assert records(a) == records(b)


def assert_equal(a, b, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


FIFO = ["buffer.policy=fifo", "buffer.initial=16", "buffer.init=class_means"]


MATCHING = ["loss=[energy_matching]", "sampler.start=normal", "sampler.bounds=null", "data.flip=0.5"]
BOTH = ["loss=[energy_matching,contrastive_divergence]", "buffer.data_share=0.5", *MATCHING[1:], "+loss.kl=null"]
FOLLOWS = ["loss=[contrastive_divergence,kl]", "phases={finish: {share: 0.1, sampler: {step_size: 3, start: normal}}}"]


@pytest.mark.parametrize(
    "more", [[], FIFO, [*FIFO, "energy.classes=2"], [*FIFO, "train.chains=4"], MATCHING, BOTH, FOLLOWS]
)
def test_a_stop_in_mid_epoch_leaves_no_trace(tmp_path, images, more):
    """29 steps, then 40: neither is a multiple of the 4 steps of an epoch or of log_every."""
    go(tmp_path / "whole", *SMALL, images, *more, "train.max_steps=40")
    go(tmp_path / "parts", *SMALL, images, *more, "train.max_steps=40", "train.save_every_steps=29")
    state = tmp_path / "parts/checkpoints/step_000029.pt"
    state.replace(tmp_path / "parts/checkpoints/last.pt")
    for file in checkpoint.healthy(tmp_path / "parts/checkpoints"):
        file.unlink()
    assert checkpoint.load(tmp_path / "parts")["step"] == 29
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "unused").exists()  # no empty directory of the second start
    steps = [line["step"] for line in records(tmp_path / "parts") if "train/loss" in line]
    assert steps == [7, 14, 21, 28, 35, 40]


def test_a_longer_run_is_that_run(tmp_path, images):
    """Stopped at 16 steps and made longer, it has the weights and the next records of one that knew at once."""
    go(tmp_path / "whole", *SMALL, images, "train.epochs=null", "train.max_steps=33")
    go(tmp_path / "parts", *SMALL, images, "train.epochs=null", "train.max_steps=16")
    resume(tmp_path / "parts", "train.max_steps=33")
    one, two = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "parts")
    for part in ("energy", "optimizer", "buffer", "batches", "generator"):
        assert_equal(one[part], two[part], part)
    of_16 = [line for line in records(tmp_path / "parts") if line["step"] == 16]  # what its end was logged with
    assert [line for line in records(tmp_path / "parts") if line not in of_16] == records(tmp_path / "whole")


def test_resuming_a_complete_run_says_so(tmp_path, images, capsys):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=4")
    with pytest.raises(SystemExit) as exit:
        resume(tmp_path / "run")
    assert exit.value.code == 2 and "complete at step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("energy.hidden=4", "energy.hidden is 2 there and 4 here"),
        ("energy=resnet", "energy._target_ is ebm.energies.ConvEnergy there and ebm.energies.ResNetEnergy here"),
        ("buffer.capacity=64", "buffer.capacity is 48 there and 64 here"),
        ("data=mnist5k", "data._target_ is"),
        ("data.hold_out=test", "data.hold_out is None there and test here"),
        ("train.batch_size=8", "train.batch_size is 16 there and 8 here"),
        ("optimizer.lr=1", "optimizer.lr is 0.001 there and 1 here"),
        ("seed=3", "seed is 0 there and 3 here"),
        ("experiment=tutorial", "leave out experiment=tutorial"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path_factory, images, capsys, override, message):
    run_dir = tmp_path_factory.getbasetemp() / "refused"
    if not run_dir.exists():
        go(run_dir, *SMALL, images, "train.max_steps=2")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        resume(run_dir, override, "train.max_steps=9")
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_second_start_does_not_touch_the_first_run(tmp_path, images, capsys, monkeypatch):
    go(tmp_path / "whole", *SMALL, images, "train.max_steps=9")
    run_dir = tmp_path / "run"
    go(run_dir, *SMALL, images, "train.max_steps=6")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for overrides in (["train.max_steps=6"], ["energy.hidden=4"]):
        with pytest.raises(SystemExit) as exit:
            go(run_dir, *SMALL, images, *overrides)
        assert exit.value.code == 2 and f"resume={run_dir}) or set another hydra.run.dir" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its cluster has put the job back into the queue
    with pytest.raises(SystemExit):
        go(run_dir, *SMALL, images, "energy.hidden=4")
    assert "energy.hidden is 2 there and 4 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    go(run_dir, *SMALL, images, "train.max_steps=9")
    assert torch.equal(checkpoint.load(tmp_path / "whole")["generator"], checkpoint.load(run_dir)["generator"])
    assert [line["step"] for line in records(run_dir) if "train/loss" in line] == [6, 7, 9]


def test_what_a_start_without_a_checkpoint_left_is_begun_anew(tmp_path, images):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1')
    go(tmp_path / "run", *SMALL, images, "train.max_steps=2")
    assert records(tmp_path / "run")[0]["step"] == 2


def test_the_data_may_move_but_not_change(tmp_path, images, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for split in ("train", "val", "test"):
        shutil.copytree(images.removeprefix("data.root="), old / split)
    go(tmp_path / "run", *SMALL, f"data.root={old}", "train.max_steps=2")
    old.rename(new)
    resume(tmp_path / "run", f"data.root={new}", "train.max_steps=4")
    other = Image.fromarray(np.full((8, 8), 7, dtype=np.uint8))
    other.save(new / "test/1/1.png")  # which no training reads
    resume(tmp_path / "run", f"data.root={new}", "train.max_steps=6")
    for split, changed in (("val", "validation images"), ("train", "training images and validation images")):
        other.save(new / split / "1/1.png")
        with pytest.raises(SystemExit) as exit:
            resume(tmp_path / "run", f"data.root={new}", "train.max_steps=8")
        assert exit.value.code == 2 and f"its {changed} were others" in capsys.readouterr().err


class WithoutTest(Dataset):
    """A data set whose test images nobody may ask for."""

    def __getattribute__(self, name: str) -> Any:
        assert not name.startswith("test"), "a training read its test images"
        return super().__getattribute__(name)


def test_no_training_reads_test_images(tmp_path, images, monkeypatch):
    """Validation, pictures, guard, the objective's distance and a resume without them: the bits of a run with them."""
    more = [*SMALL, images, "energy.classes=2", "loss=[contrastive_divergence,classification]", "train.max_steps=20"]
    more += ["objective=frechet", f"cache={tmp_path / 'cache'}", "train.save_every_steps=13"]
    more += ["train.validate_every_epochs=1", "train.sample_every_epochs=2"]
    go(tmp_path / "whole", *more)

    def without_test(config: Any, **how: Any) -> Any:
        part = instantiate(config, **how)
        if isinstance(part, Dataset):
            part.__class__ = WithoutTest
        return part

    monkeypatch.setattr(train, "instantiate", without_test)
    go(tmp_path / "parts", *more)
    (tmp_path / "parts/checkpoints/step_000013.pt").replace(tmp_path / "parts/checkpoints/last.pt")
    resume(tmp_path / "parts", f"cache={tmp_path / 'cache'}")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_key_that_the_run_does_not_have(tmp_path, images, capsys):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=2")
    with pytest.raises(SystemExit):
        resume(tmp_path / "run", "train.max_stesp=9")
    assert "leave out train.max_stesp=9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resume(tmp_path / "run", "~wandb")
    assert "leave out ~wandb" in capsys.readouterr().err


HOSTILE_STATES = {
    "loop.step is 'x'": {"loop": {"step": "x"}},
    "loop.best is None": {"loop": {"best": None}},
    "guard.rollbacks is 5": {"guard": {"rollbacks": 5}},
    "strikes or rollbacks are others": {"guard": {"strikes": {}}},
    "position in the epoch is 0.5": {"batches": {"position": 0.5}},
    "not one of the 64 training images": {"batches": {"order": torch.zeros(0, dtype=torch.int64), "position": 0}},
    "class means are those of other data": {"buffer": {"class_means": torch.zeros(3)}},
    "ranks had": {"shards": [{"size": 10**12, "front": 0}, {"size": -(10**12), "front": 0}]},
    "KeyError('tracker')": {"tracker": None},
    "no place": {"tracker": {"bytes": -5}},
    "'x' is no id of a W&B run": {"tracker": {"wandb_id": "$(x)"}},
}


@pytest.mark.parametrize("reason", HOSTILE_STATES)
def test_states_of_other_kinds_are_refused_in_one_line(tmp_path, tmp_path_factory, images, capsys, reason):
    base = tmp_path_factory.getbasetemp() / "hostile"
    if not base.exists():
        go(base, *SMALL, images, "train.max_steps=2")
    shutil.copytree(base, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run")
    for key, value in HOSTILE_STATES[reason].items():
        state[key] = state[key] | value if isinstance(value, dict) else value
    checkpoint.save(tmp_path / "run/checkpoints/last.pt", state)
    with pytest.raises(SystemExit) as exit:
        resume(tmp_path / "run", "train.max_steps=4")
    assert exit.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) < 2000


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        ("", None, "would write where links lead: metrics.jsonl"),
        ("wandb", {"fork_from": "x"}, "its wandb has settings that there are none of: fork_from"),
        ("scheduler", {"_target_": "torch.hub.load", "gamma": 1}, "neither ships nor lies in a folder of PYTHONPATH"),
        ("scheduler", None, "neither ships"),
        ("data", {"root": {"_target_": "os.getcwd"}}, "plain values"),
        ("cache", "${oc.env:HOME}", "plain values"),
    ],
)
def test_a_run_directory_of_others_writes_and_calls_nothing_else(
    tmp_path, images, capsys, monkeypatch, group, value, message
):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=2")
    victim, last = tmp_path / "victim", tmp_path / "run/checkpoints/last.pt"
    victim.write_text("precious")
    if group:
        state = checkpoint.load(last)
        old = state["config"][group]
        state["config"][group] = old | value if isinstance(value, dict) else value
        checkpoint.save(last, state)
    else:
        (tmp_path / "run/metrics.jsonl").unlink()
        (tmp_path / "run/metrics.jsonl").symlink_to(victim)
    monkeypatch.setenv("PYTHONPATH", str(Path(torch.__file__).parents[1]))  # as clusters' modules set it
    with pytest.raises(SystemExit) as exit:
        resume(tmp_path / "run", "train.max_steps=4")
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert victim.read_text() == "precious"


def test_one_process_at_a_time(tmp_path, images, capsys):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=2")
    with alone_in(tmp_path / "run"), pytest.raises(SystemExit) as exit:
        resume(tmp_path / "run", "train.max_steps=4")
    assert exit.value.code == 2 and "is being trained by another process" in capsys.readouterr().err
    resume(tmp_path / "run", "train.max_steps=4")


def test_metrics_that_were_cut_off_lose_the_torn_line_alone(tmp_path, images):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=4")
    file = tmp_path / "run/metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines)[:-9])
    resume(tmp_path / "run", "train.max_steps=8")
    assert file.read_bytes().splitlines(keepends=True)[: len(lines) - 1] == lines[:-1]
    assert records(tmp_path / "run")[-1]["step"] == 8


DROPOUT = """
import torch, ebm.energies
class Dropped(ebm.energies.MLPEnergy):
    def __init__(self, shape, hidden, rate, **more):
        super().__init__(shape, hidden, 1)
        self.layers.insert(2, torch.nn.Dropout(rate))
"""


def test_an_energy_that_draws_goes_on_as_if_nothing_had_been(tmp_path, images, monkeypatch):
    (tmp_path / "own_dropout.py").write_text(DROPOUT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = [*SMALL, images, "energy._target_=own_dropout.Dropped", "+energy.rate=0.5"]
    go(tmp_path / "whole", *own, "train.max_steps=20")
    torch.rand(7)  # whatever else has drawn
    go(tmp_path / "parts", *own, "train.max_steps=20", "train.save_every_steps=13")
    (tmp_path / "parts/checkpoints/step_000013.pt").replace(tmp_path / "parts/checkpoints/last.pt")
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("what", ["draw_samples", "frechet"])
def test_what_fails_at_the_end_loses_nothing(tmp_path, images, monkeypatch, what):
    more = [*SMALL, images, "train.max_steps=8", "objective=frechet", f"cache={tmp_path / 'cache'}"]
    go(tmp_path / "whole", *more)
    with monkeypatch.context() as broken:
        broken.setattr(pictures, what, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(tmp_path / "run", *more)
    assert checkpoint.load(tmp_path / "run")["step"] == 8
    resume(tmp_path / "run", f"cache={tmp_path / 'cache'}")  # the pictures and the distance are still due
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert records(tmp_path / "run")[-1]["val/frechet"] > 0


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, images):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the classifier is not kept"):
        go(tmp_path / "run", *SMALL, images, "train.max_steps=2", "objective=frechet", f"cache={tmp_path}/file/cache")
    assert records(tmp_path / "run")[-1]["val/frechet"] > 0


def test_not_a_run(tmp_path, images, capsys):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as exit:
            resume(path)
        assert exit.value.code == 2 and "not the directory of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, images):
    """SIGKILL, ten times, each time resumed: the bits of a run that was left alone."""
    often = [*SMALL, images, "train.max_steps=600", "train.save_every_steps=3", "train.keep=2"]
    go(tmp_path / "whole", *often)
    run_dir, moments, killed = tmp_path / "killed", random.Random(), 0
    while killed < 10:
        started = (run_dir / "checkpoints/last.pt").exists()
        process = child(*([run_dir.with_name("unused"), f"resume={run_dir}"] if started else [run_dir, *often]))
        before = checkpoint.load(run_dir)["step"] if started else 0
        time.sleep(0.2)
        while process.is_alive() and not (run_dir / "checkpoints/last.pt").exists():
            time.sleep(0.01)
        while process.is_alive() and checkpoint.load(run_dir)["step"] == before:  # some of them get on
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        assert process.is_alive(), f"it ended after {killed} kills: more steps are needed"
        process.kill()
        process.join()
        killed += 1
        assert process.exitcode == -signal.SIGKILL
    process = child(run_dir.with_name("unused"), f"resume={run_dir}")
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "whole", run_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(tmp_path, images, number, code):
    process = child(tmp_path / "run", *SMALL, images, "train.max_steps=100000", "train.log_every=1")
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    step = checkpoint.load(tmp_path / "run")["step"]
    assert step == records(tmp_path / "run")[-1]["step"] > 0  # log_every is 1: the last step was saved
    resume(tmp_path / "run", f"train.max_steps={step + 3}")
    go(tmp_path / "whole", *SMALL, images, "train.log_every=1", f"train.max_steps={step + 3}")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_ends_at_once(tmp_path, images):
    """In the middle of a step of 10⁷ SGLD steps."""
    process = child(tmp_path / "run", *SMALL, images, "sampler.steps=10000000")
    while not (tmp_path / "run/checkpoints/last.pt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130
    assert checkpoint.load(tmp_path / "run")["step"] == 0


def test_slurms_signal_saves_and_goes_on(tmp_path, images):
    process = child(
        tmp_path / "run",
        *SMALL,
        images,
        "train.max_steps=100000",
        "train.validate_every_epochs=100000",
        "train.save_every_steps=null",
        "train.log_every=1",
    )
    last, metrics = tmp_path / "run/checkpoints/last.pt", tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.01)
    assert checkpoint.load(last)["step"] == 0
    os.kill(process.pid, signal.SIGUSR1)
    while checkpoint.load(last)["step"] == 0:
        time.sleep(0.01)
    assert process.is_alive()
    process.kill()
    process.join()


def test_saves_by_the_clock(tmp_path, images, monkeypatch):
    steps = []
    monkeypatch.setattr(checkpoint, "save_run", lambda folder, state, *how: steps.append((state["step"], how[-1])))
    go(tmp_path / "run", *SMALL, images, "train.max_steps=6", "train.save_every_minutes=1e-9")
    assert list(dict.fromkeys(steps)) == [(0, True), *((step, False) for step in range(1, 7))]  # (step, numbered)


def fill_up(log: Path, run_dir: Path, *overrides: str) -> None:
    sys.stderr = log.open("w")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    go(run_dir, *overrides)


def test_a_full_disk_stops_with_the_last_whole_checkpoint(tmp_path, images):
    go(tmp_path / "run", *SMALL, images, "train.max_steps=8")
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()
    assert len(before) > 20_000
    process = processes.Process(
        target=fill_up, args=(tmp_path / "log", tmp_path / "unused", f"resume={tmp_path / 'run'}", "train.max_steps=16")
    )
    process.start()
    process.join()
    assert process.exitcode == 2
    error = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert error.startswith("error: ") and "last.pt cannot be written (File too large)" in error
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before
    assert {path.name for path in (tmp_path / "run/checkpoints").glob(".*")} == set()
    resume(tmp_path / "run", "train.max_steps=16")  # with room again
    go(tmp_path / "whole", *SMALL, images, "train.max_steps=16")
    assert torch.equal(checkpoint.load(tmp_path / "whole")["generator"], checkpoint.load(tmp_path / "run")["generator"])


@pytest.mark.slow
def test_the_command_and_wandb(tmp_path, images):
    """`python train.py resume=…` in a process of its own: the W&B run goes on under its id, rows count on."""
    small = [override for override in SMALL if not override.startswith("wandb")]
    run_dir = tmp_path / "run"
    go(run_dir, *small, images, "train.max_steps=8")
    first = checkpoint.load(run_dir)["tracker"]
    root = shutil.copytree(images.removeprefix("data.root="), tmp_path / "moved")  # a key that the default data lack
    result = run_script("train.py", f"resume={run_dir}", f"data.root={root}", "train.max_steps=12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"moved", "run"}  # Hydra's own directory is not left empty
    second = checkpoint.load(run_dir)["tracker"]
    assert second["wandb_id"] == first["wandb_id"] and second["rows"] > first["rows"]
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{first['wandb_id']}"))) == 2
    assert [line["step"] for line in records(run_dir) if "val/cd" in line] == [8, 12]
