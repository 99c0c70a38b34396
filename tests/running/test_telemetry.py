"""Statistics of chains against closed forms."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, run

import train
from ebm.energies import ConvEnergy
from ebm.evaluation.metrics import scores
from ebm.losses import ContrastiveDivergence
from ebm.running.pictures import draw_samples
from ebm.running.telemetry import chain_statistics, fresh_scores
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD


def test_chain_statistics_of_a_linear_energy():
    """E = Σ w·x has the gradient w everywhere: every number is known."""
    w = torch.tensor([0.01, 0.05, -0.5, 0.0]).view(1, 2, 2)

    class Linear(torch.nn.Module):
        def forward(self, x):
            return (x * w).flatten(1).sum(dim=1)

    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer((1, 2, 2), generator, capacity=40, policy="in_place")
    buffer.ages[:] = torch.arange(40)
    x_model = torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 1, 2, 2).repeat(40, 1, 1, 1)
    sampler = SGLD(step_size=10.0, noise_std=0.005, grad_clamp=0.03, bounds=(-1, 1))
    got = chain_statistics(sampler, Linear(), buffer, torch.zeros(40, 1, 2, 2), x_model)
    step = 10 * np.sqrt(0.01**2 + 2 * 0.03**2)
    want = {"age_mean": 19.5, "age_median": 19.0, "saturation": 0.5, "saturation_real": 0.0, "clamp_share": 0.5}
    want |= {"step_length": step, "noise_length": 0.01}
    assert {name: float(value) for name, value in got.items()} == pytest.approx(want)


@pytest.mark.parametrize("final", [None, 0.001])
def test_the_short_run_of_the_pictures_is_one_of_its_own(tmp_path, final):
    """An annealed sampler ends a run of 8 steps without noise; after 8 of 64 steps it has nearly all of it."""

    class Squares(torch.nn.Module):
        def forward(self, x):
            return x.square().flatten(1).sum(dim=1)

    energy, generator = Squares(), torch.Generator().manual_seed(0)
    buffer = ReplayBuffer((1, 8, 8), generator, capacity=8, policy="in_place")
    sampler = SGLD(steps=8, step_size=0.1, noise_std=0.3, grad_clamp=None, final_noise_std=final)
    images, loop = buffer.chains.clone(), SimpleNamespace(step=3)
    dataset = SimpleNamespace(test=images, validation=images)
    training = SimpleNamespace(
        energy=energy,
        sampler=sampler,
        buffer=buffer,
        dataset=dataset,
        device=torch.device("cpu"),
        loop=loop,
        phase=SimpleNamespace(loss=ContrastiveDivergence()),
    )
    _, numbers, _ = draw_samples(training, tmp_path, steps=64, seed=5)
    generator = torch.Generator().manual_seed(5)
    noise = uniform_noise((8, 1, 8, 8), generator)
    short = scores(energy, sampler(energy, noise, generator)).mean()
    assert numbers["chain/score_short_run"] == pytest.approx(short, rel=1e-5)
    assert numbers["chain/short_long_gap"] == numbers["chain/score_long_run"] - numbers["chain/score_short_run"]
    noise = uniform_noise((8, 1, 8, 8), generator.manual_seed(5))
    after_8_of_64 = sampler.trace(energy, noise, generator, steps=64)[8]
    assert (short == pytest.approx(scores(energy, after_8_of_64).mean(), rel=1e-5)) == (final is None)


def test_chain_statistics_leave_the_energy_alone():
    energy = ConvEnergy((1, 8, 8), 4).train()
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer((1, 8, 8), generator, capacity=8, policy="in_place")
    x = buffer.chains.clone()
    state = generator.get_state()
    for sampler in (SGLD(), SGLD(bounds=None, grad_clamp=None, noise_std="langevin", steps=0)):
        got = chain_statistics(sampler, energy, buffer, x, x)
        assert all(bool(torch.isfinite(value)) for value in got.values())
    assert energy.training and all(p.requires_grad and p.grad is None for p in energy.parameters())
    assert torch.equal(generator.get_state(), state) and torch.equal(buffer.chains, x) and not x.requires_grad


def test_fresh_scores():
    scores, ages = torch.tensor([1.0, 2.0, 3.0, 0.0, -9.0, 9.0]), torch.tensor([30, 60, 90, 0, 0, 0])
    got = fresh_scores(scores, ages)  # the old: 2 ± 0.82
    assert {name: float(value) for name, value in got.items()} == {
        "fresh": 3,
        "old": 3,
        "fresh_score": 0,
        "fresh_reached": 2,
    }
    nothing_old = fresh_scores(scores, torch.zeros(6, dtype=torch.int64))
    assert nothing_old["fresh"] == 6 and nothing_old["old"] == 0 and nothing_old["fresh_reached"] == 0


def test_the_clock_waits_for_the_device_at_the_end_of_a_log_interval(tmp_path, monkeypatch):
    """A device that does its work only when it is waited for, in a second: 5 steps of 16 images a second."""
    now, item = [0.0], torch.Tensor.item

    def wait(tensor):
        now[0] += sys._getframe(1).f_globals["__name__"] == "train"  # the loss; Adam's counts are not of the device
        return item(tensor)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.Tensor, "item", wait, raising=False)
    points = ("data=plane", "energy=mlp", "device=cpu", "wandb.mode=disabled")
    limits = ("train.max_steps=10", "train.log_every=5")
    result = run("train.py", *TINY, *points, *limits, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["train/images_per_s"] for row in logged if "train/images_per_s" in row] == [80, 80]
