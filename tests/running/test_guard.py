"""The guard sees trainings that diverge in a way, and at a step, that are known, and none that is calm."""

import json

import pytest
import torch
from PIL import Image
from test_resume import SMALL, assert_equal, assert_same_run, checkpoint, go, images, records, resume  # noqa: F401
from torch import nn

from ebm.running.guard import TESTS, Guard

BARS = [*SMALL, "energy.hidden=8", "sampler.steps=5", "train.max_steps=60", "train.log_every=5", "guard.warmup_steps=0"]


class Slope(nn.Module):
    """E(x) = θ · mean of x. Images are noise, whose mean is 0 within 0.02, data are of one grey, −0.97. Chains go down
    by step_size·θ/64 a step. Where they all but stand, every training step adds lr to θ, and E(chains) − E(data) is
    0.97·θ: they never catch up."""

    def __init__(self, shape, start=0.0, **_):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x):
        return self.slope * x.flatten(1).mean(dim=1)


SLOPE = [override for override in SMALL if override != "train.log_every=7"]
SLOPE += ["energy._target_=test_guard.Slope", "+energy.start=0", "loss.contrastive_divergence.alpha=0"]
SLOPE += ["train.data_noise_std=0", "scheduler.gamma=1", "buffer.policy=in_place", "buffer.reinit_probability=0"]
SLOPE += ["buffer.capacity=16", "sampler.noise_std=0", "sampler.step_size=1e-9", "train.max_steps=60"]
SLOPE += ["train.log_every=5", "guard.warmup_steps=0"]
HELD = ["optimizer.lr=1e-9", "sampler.grad_clamp=null"]  # θ stays where it starts
TOO_FEW_STEPS = [*HELD, "energy.start=160", "sampler.step_size=0.004", "buffer.reinit_probability=0.1"]

# The step at which each test fires by itself: the third read-back over its limit, five steps between two. A read-back
# has the mean over its steps of what depends on θ: θ = lr·(step − 3). Numbers over the limits: at the first of them.
FAULTS = {
    "not_finite": (5, ["optimizer.lr=2e38"]),  # θ is infinite after two steps
    "score_gap": (50, ["optimizer.lr=0.0095"]),  # 0.97·lr·37 = 0.34, from 0.02
    "gap_trend": (35, ["optimizer.lr=0.0095"]),  # 0.97·lr·20 = 0.18
    "energy_magnitude": (35, ["optimizer.lr=0.52"]),  # 0.97·lr·22 = 11
    "saturation": (40, [*HELD, "energy.start=1", "sampler.step_size=1.7"]),  # chains shifted by 30·2·1.7/64: 0.8 at −1
    "clamp_share": (30, ["optimizer.lr=0.11"]),  # θ/64 = 0.034, the clamp is at 0.03
    "noise_score": (12, ["optimizer.lr=1e-9", "energy.start=-1"]),  # at the first validation
    "fresh_chains": (15, TOO_FEW_STEPS),  # old chains are 3.2 lower for every time they were drawn
}


def all_but(name):
    """Overrides by which the guard makes the one test alone."""
    return [f"guard.{other}=null" for other in TESTS if other != name]


def events(run_dir):
    return [line for line in records(run_dir) if "guard/saw" in line]


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """80 pictures of one grey, 4/255: 64 to train, 4 steps an epoch."""
    folder = tmp_path_factory.mktemp("grey")
    for i in range(80):
        Image.new("L", (8, 8), 4).save(folder / f"{i}.png")
    return f"data.root={folder}"


@pytest.mark.parametrize("name", FAULTS)
def test_sees_a_fault_at_the_step_where_it_must(tmp_path, grey, capsys, name):
    """Each test alone; the limits are the defaults'."""
    step, fault = FAULTS[name]
    with pytest.raises(SystemExit) as exit:
        go(tmp_path / "run", *SLOPE, *fault, *all_but(name), grey, "guard.action=stop")
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: the training diverged at step {step} ({name}: ")
    assert "lower optimizer.lr or raise sampler.steps" in error
    (event,) = events(tmp_path / "run")
    assert event["step"] == step and event["guard/saw"].startswith(name) and event["guard/action"] == "stop"


CALM = [*BARS, "train.max_steps=100", "sampler.steps=20"]


@pytest.mark.parametrize("seed", range(3))
def test_does_not_fire_on_a_calm_training(tmp_path, images, seed):  # noqa: F811
    go(tmp_path / "run", *CALM, images, f"seed={seed}")
    assert events(tmp_path / "run") == []
    assert sum("train/loss" in line for line in records(tmp_path / "run")) == 20  # that were watched


def test_watching_changes_nothing(tmp_path, images):  # noqa: F811
    for action in ("rollback", "off"):
        go(tmp_path / action, *CALM, images, f"guard.action={action}")
    one, two = checkpoint.load(tmp_path / "rollback"), checkpoint.load(tmp_path / "off")
    assert torch.equal(one["generator"], two["generator"])
    assert all(torch.equal(one["energy"][key], two["energy"][key]) for key in one["energy"])


def test_does_not_fire_where_chains_from_noise_arrive(tmp_path, grey):
    """The fault of fresh_chains, but for steps that take every chain to −1 at once."""
    go(tmp_path / "run", *SLOPE, *TOO_FEW_STEPS, *all_but("fresh_chains"), grey, "sampler.step_size=1")
    assert events(tmp_path / "run") == []
    assert any("chain/score_fresh" in line for line in records(tmp_path / "run"))


RESCUED = [*BARS, "optimizer.lr=10", "guard.lr_factor=1e-4", "train.save_every_steps=10", "train.keep=9"]


def test_a_rollback_rescues_the_training(tmp_path, images):  # noqa: F811
    """lr 10 diverges to infinity at once; after a rollback with lr 10⁻³ it goes on to the end. With a stop after
    the rollback it has the same bits, so that the guard's history, seed and learning rate are in the checkpoint."""
    go(tmp_path / "run", *RESCUED, images)
    (event,) = events(tmp_path / "run")
    assert event["guard/saw"].startswith("not_finite") and event["guard/action"] == "rollback"
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 60 and state["healthy"] and state["guard"]["rollbacks"] == [[event["step"], 0]]
    assert all(bool(torch.isfinite(value).all()) for value in state["energy"].values())
    rates = [line["train/lr"] for line in records(tmp_path / "run") if "train/lr" in line]
    assert max(rates) <= 1e-3

    go(tmp_path / "parts", *RESCUED, images, "train.max_steps=60")
    folder = tmp_path / "parts/checkpoints"
    (folder / "last.pt").unlink()
    for file in checkpoint.healthy(folder):
        if checkpoint.step_of(file) > 30:
            file.unlink()
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "run", tmp_path / "parts")


def test_a_stop_does_not_change_where_a_rollback_goes(tmp_path, images):  # noqa: F811
    """Only what is saved every so many steps is gone back to, not what a stop or the clock has written."""
    fires = [*BARS, images, "train.save_every_steps=6", "guard.energy_magnitude=0", "guard.patience=1"]
    fires += ["guard.warmup_steps=20", "guard.max_rollbacks=1"]  # at step 20, and after the rollback there again
    with pytest.raises(SystemExit):
        go(tmp_path / "whole", *fires)
    go(tmp_path / "parts", *fires, "train.max_steps=19", "train.save_every_minutes=1e-9")
    with pytest.raises(SystemExit):
        resume(tmp_path / "parts", "train.max_steps=60", "train.save_every_minutes=10")
    one, two = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "parts")
    assert one["guard"]["rollbacks"] == [[20, 18]]
    for part in ("step", "guard", "energy", "generator", "default_generator"):
        assert_equal(one[part], two[part], part)


def test_rollbacks_come_to_an_end(tmp_path, images, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        go(tmp_path / "run", *BARS, images, "optimizer.lr=1e6", "guard.max_rollbacks=2")
    assert "2 rollbacks before" in capsys.readouterr().err
    assert [event["guard/action"] for event in events(tmp_path / "run")] == ["rollback", "rollback", "stop"]
    assert checkpoint.load(tmp_path / "run")["step"] == 0  # healthy, and with the rollbacks in its history


def test_warns_and_goes_on(tmp_path, grey, capsys):
    go(tmp_path / "run", *SLOPE, *TOO_FEW_STEPS, *all_but("fresh_chains"), grey, "guard.action=warn")
    seen = events(tmp_path / "run")
    assert [event["step"] for event in seen] == [15, 30, 45, 60]
    assert all(event["guard/action"] == "warn" for event in seen)
    assert "fresh_chains: chains from noise end" in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 60 and not state["healthy"]
    assert checkpoint.step_of(checkpoint.healthy(tmp_path / "run/checkpoints")[-1]) == 0  # the last was not healthy


def test_off_still_refuses_nan(tmp_path, images, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as exit:
        go(tmp_path / "run", *BARS, images, "optimizer.lr=10", "guard.action=off")
    assert exit.value.code == 2 and "is " in capsys.readouterr().err.strip().splitlines()[-1]


def test_goes_further_back_where_a_rollback_did_not_help():
    guard = Guard()
    assert guard.before(500) == 501  # any checkpoint so far
    guard.rolled_back(500, 400)
    assert guard.before(480) == 400  # 400 led to 480: one before it
    assert guard.before(560) == 400  # half as far again, with the learning rate halved: 400 was on the way, too
    assert guard.before(601) == 602  # twice as far: a divergence of its own
    guard.rolled_back(480, 200)
    assert guard.before(300) == 200 and guard.lr_scale == 0.25


def numbers(real=0.0, fake=0.0, **chain):
    chain = {"saturation": 0.8, "saturation_real": 0.8, "clamp_share": 0.0} | chain
    return {"train/score_real": real, "train/score_fake": fake} | {f"chain/{key}": v for key, v in chain.items()}


def test_patience_warm_up_and_limits():
    guard = Guard(patience=2, warmup_steps=100, score_gap=0.5, gap_trend=None)
    assert guard.check(80, numbers(real=9)) is None and guard.healthy  # not yet
    assert guard.check(100, numbers(real=0.1)) is None and guard.healthy
    assert guard.check(110, numbers(real=0.55)) is None and guard.healthy  # 0.45 above the lowest
    assert guard.check(120, numbers(real=0.9)) is None and not guard.healthy  # the first time
    assert guard.check(140, numbers(real=0.1)) is None and guard.healthy
    assert guard.check(160, numbers(fake=0.9)) is None
    assert guard.check(180, numbers(fake=0.9)).startswith("score_gap: the score gap between real images and chains")
    assert guard.check(200, {"val/score_noise": 1.0, "val/score_real": 0.5}).startswith("noise_score: noise scores 0.5")
    assert Guard(score_gap=None, gap_trend=None).check(400, numbers(real=9)) is None
    assert guard.check(0, numbers(real=float("nan"))) == "not_finite: train/score_real is nan"


def test_check_finite():
    energy = torch.nn.Linear(2, 1)
    assert Guard().check_finite(energy, torch.zeros(3)) is None
    assert Guard().check_finite(energy, torch.tensor([float("nan")])) == "not_finite: chains is not finite"
    torch.nn.init.constant_(energy.bias, float("inf"))
    assert Guard().check_finite(energy, torch.zeros(3)) == "not_finite: bias is not finite"


def test_state_round_trip():
    guard, other = Guard(warmup_steps=0), Guard(warmup_steps=0)
    for step in range(5):
        guard.check(step, numbers(real=step))
    guard.rolled_back(5, 3)
    guard.check(6, numbers(real=7))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for step in range(7, 12):
        assert guard.check(step, numbers(real=8)) == other.check(step, numbers(real=8))
    assert guard.state_dict() == other.state_dict() and guard.lr_scale == other.lr_scale == 0.5


@pytest.mark.parametrize(
    "bad",
    [
        {"action": "panic"},
        {"max_rollbacks": -1},
        {"lr_factor": 0},
        {"patience": 0},
        {"score_gap": "much"},
        {"warmup_steps": 1.5},
        {"fresh_chains": float("nan")},
    ],
)
def test_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=f"guard.{next(iter(bad))} must be"):
        Guard(**bad)
