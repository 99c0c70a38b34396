"""Two processes that train one model are one training."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run
from omegaconf import OmegaConf
from test_resume import MATCHING, SMALL, assert_equal, checkpoint, go, images, processes, records, resume  # noqa: F401

from ebm.energies import ConvEnergy
from ebm.losses import KL, ContrastiveDivergence, EnergyMatching, Sum, Twins
from ebm.running import ranks
from ebm.running.cli import Signals


def as_rank(rank: int, size: int, port: int, function, *arguments) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*arguments)


def started(size: int, function, *arguments) -> list:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [processes.Process(target=as_rank, args=(r, size, port, function, *arguments)) for r in range(size)]
    for child in children:
        child.start()
    return children


def together(size: int, function, *arguments) -> None:
    children = started(size, function, *arguments)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * size


def energy_and_batch() -> tuple[ConvEnergy, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = ConvEnergy((1, 8, 8), hidden=4)
    return energy, torch.rand(16, 1, 8, 8, generator=generator), torch.rand(16, 1, 8, 8, generator=generator)


LOSSES = {
    "divergence": Sum({"cd": ContrastiveDivergence(), "kl": KL(0.5, entropy_weight=0)}),
    "matching": Sum({"matching": EnergyMatching()}),
    "twins": Sum({"twins": Twins(shift=0.2)}),
    "all": Sum({"cd": ContrastiveDivergence(), "twins": Twins(shift=0.2), "matching": EnergyMatching()}),
}


def loss_of_share(name: str, energy, rank: int, size: int) -> torch.Tensor:
    _, data, model = energy_and_batch()
    mine = slice(rank, None, size)
    loss, _ = LOSSES[name](energy, data[mine], model[mine], torch.Generator(), x_noise=model[mine])
    return loss


def half_a_step(folder: Path, name: str) -> None:
    with ranks.Ranks() as own:
        energy, _, _ = energy_and_batch()
        averaged = own.wrap(energy)
        loss_of_share(name, averaged, own.rank, own.size).backward()
        torch.save({name: p.grad for name, p in energy.named_parameters()}, folder / f"{own.rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_the_averaged_gradient_is_that_of_the_whole_batch(tmp_path, name):
    """Whose loss is the mean of the two halves'."""
    together(2, half_a_step, tmp_path, name)
    energy, _, _ = energy_and_batch()
    (sum(loss_of_share(name, energy, rank, 2) for rank in (0, 1)) / 2).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, parameter in energy.named_parameters():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("more", [["buffer.policy=fifo", "buffer.initial=16"], MATCHING])
def test_two_ranks_train_stop_and_go_on_bit_for_bit(tmp_path, images, more):  # noqa: F811
    """29 steps, then 40; and from there on one rank, and that on two again."""
    phase = "{share: 0.4, sampler: {steps: 3}, optimizer: {lr: 2e-3}, train: {chains: 8}}"
    more = [*more, f"phases={{finish: {phase}}}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    together(2, go, whole, *SMALL, images, *more, "train.max_steps=40")
    together(2, go, parts, *SMALL, images, *more, "train.max_steps=40", "train.save_every_steps=29")
    os.replace(parts / "checkpoints/step_000029.pt", parts / "checkpoints/last.pt")
    for file in checkpoint.healthy(parts / "checkpoints"):
        file.unlink()
    together(2, resume, parts)
    one, two = checkpoint.load(whole), checkpoint.load(parts)
    for part in ("energy", "optimizer", "buffer", "batches", "generator", "guard"):
        assert_equal(one[part], two[part], part)
    for a, b in zip(one["shards"], two["shards"], strict=True):
        assert_equal(a, b)
    assert not torch.equal(one["shards"][0]["generator"], one["shards"][1]["generator"])
    assert records(whole) == records(parts)
    assert len(one["buffer"]["chains"]) == 48 and len(one["shards"]) == 2

    resume(parts, "train.max_steps=45")
    assert "shards" not in checkpoint.load(parts) and len(checkpoint.load(parts)["buffer"]["chains"]) == 48
    together(2, resume, parts, "train.max_steps=50")
    steps = [line["step"] for line in records(parts) if "train/loss" in line]
    assert steps == [7, 14, 21, 28, 35, 40, 42, 45, 49, 50] and len(checkpoint.load(parts)["shards"]) == 2


class Rank(ranks.Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_chains_are_dealt_anew_none_lost_the_oldest_first():
    """A fifo of two full shards of 6, each written round to its place 2, and dealt to three ranks."""
    written = [torch.tensor([4, 5, 0, 1, 2, 3]) * 2, torch.tensor([4, 5, 0, 1, 2, 3]) * 2 + 1]  # when
    generator = torch.Generator().manual_seed(1)
    shards = [
        {
            "buffer": {"chains": when.float(), "ages": when, "labels": when, "front": 2},
            "generator": generator.get_state(),
            "sums": {},
        }
        for when in written
    ]
    state = {"step": 9, "loop": {"sums": {}}} | ranks.merged(shards)
    for rank in (0, 1):
        mine = ranks.redistributed(state, Rank(rank, 2), 6, generator)["buffer"]
        assert torch.equal(mine["ages"], written[rank]) and mine["front"] == 2
    dealt = [ranks.redistributed(state, Rank(rank, 3), 4, generator) for rank in range(3)]
    assert [part["buffer"]["ages"].tolist() for part in dealt] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert all(part["buffer"]["front"] == 0 for part in dealt)
    alone = ranks.redistributed(state, Rank(0, 1), 12, generator)["buffer"]
    assert alone["ages"].tolist() == list(range(12)) and alone["front"] == 0
    with pytest.raises(ValueError, match="2 ranks had 12 chains, the buffer holds 5"):
        ranks.redistributed(state | {"buffer": {"chains": torch.zeros(5), "front": 0}}, Rank(0, 2), 6, generator)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other(tmp_path, images):  # noqa: F811
    children = started(2, go, tmp_path / "run", *SMALL, images, "train.max_steps=1000000", "train.log_every=1")
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert all(child.is_alive() for child in children)
    os.kill(children[1].pid, signal.SIGKILL)
    children[0].join(120)
    assert children[0].exitcode not in (None, 0)
    assert checkpoint.load(tmp_path / "run")["shards"]


def test_a_signal_to_one_rank_stops_both_and_saves(tmp_path, images):  # noqa: F811
    children = started(2, go, tmp_path / "run", *SMALL, images, "train.max_steps=1000000", "train.log_every=1")
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert all(child.is_alive() for child in children)
    os.kill(children[1].pid, signal.SIGTERM)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [143, 143]
    assert checkpoint.load(tmp_path / "run")["step"] == records(tmp_path / "run")[-1]["step"]


def test_torchrun_passes_on_a_signal_that_its_ranks_had_already(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signals.stop == signal.SIGTERM


def test_two_ranks_roll_back_alike(tmp_path, images):  # noqa: F811
    overrides = [*SMALL, images, "optimizer.lr=10", "train.max_steps=30", "train.log_every=5", "guard.max_rollbacks=1"]
    overrides += ["guard.warmup_steps=0", "guard.patience=1"]
    children = started(2, go, tmp_path / "run", *overrides)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [2, 2]
    assert [line["guard/action"] for line in records(tmp_path / "run") if "guard/action" in line] == [
        "rollback",
        "stop",
    ]


def test_numbers_that_the_ranks_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(ranks.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match=r"buffer\.capacity must be a multiple of the 3 ranks, got 8192"):
        ranks.Ranks().share("buffer.capacity", 8192)
    with pytest.raises(ValueError, match="rank_timeout_minutes must be a number > 0"):
        ranks.Ranks(0)


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    from ebm.running.sweep import TrainingSweep

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        TrainingSweep().on_multirun_start(OmegaConf.create({"hydra": {"launcher": {}}}))
    assert exit.value.code == 2 and "-m under torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path):
    """torchrun: one directory, one W&B run; what is trained is sampled from as ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(ROOT / "train.py"), *TINY]
    done = subprocess.run(
        [*command, "device=cpu", "train.max_steps=10", "train.log_every=5"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (run_dir,) = (tmp_path / "runs").glob("*/*")
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [5, 10] and checkpoint.load(run_dir)["step"] == 10
    out = f"out={tmp_path / 'out'}"
    assert run("sample.py", f"checkpoint={run_dir}", "init=buffer", "num_samples=8", "steps=2", out).returncode == 0


@pytest.mark.slow
def test_signals_to_torchrun(tmp_path, images):  # noqa: F811
    """SIGUSR1 to it and its ranks, as conf/README.md has Slurm send it, saves; and ranks whose torchrun was killed end,
    saved, by themselves."""
    torchrun = f"trap '' USR1; exec {sys.executable} -m torch.distributed.run --nproc-per-node=2"
    arguments = [*SMALL, images, "train.max_steps=1000000", "train.log_every=1"]
    arguments += ["train.validate_every_epochs=1000000", "train.save_every_steps=null", f"hydra.run.dir={tmp_path}/run"]
    process = subprocess.Popen(
        ["bash", "-c", f'{torchrun} "$@"', "bash", str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # in sessions of their own
    for number in (process.pid, *map(int, children)):
        os.kill(number, signal.SIGUSR1)
    while checkpoint.load(tmp_path / "run")["step"] == 0:
        assert process.poll() is None
    process.kill()
    assert "SIGTERM: saved at step" in process.communicate()[0]  # to the end of what the ranks have to say
    assert checkpoint.load(tmp_path / "run")["step"] == records(tmp_path / "run")[-1]["step"]
