"""A training in phases: what each sets anew, when it begins, and that a stop in any of them leaves no trace."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_resume import SMALL, assert_equal, assert_same_run, go, images, records, resume  # noqa: F401

from ebm.running import allowed, checkpoint, phases, trained

FINISH = "{share: 0.25, sampler: {steps: 5}, buffer: {policy: fifo, initial: 8}, optimizer: {lr: 4e-3}, "
FINISH += "scheduler: {_target_: ebm.optim.PolynomialDecay, final_factor: 0.0, power: 1}, "
FINISH += "train: {chains: 4, warmup_steps: 3}}"
TWO = "phases={middle: {share: 0.25, loss: {contrastive_divergence: {alpha: 0.01}}}, finish: " + FINISH + "}"
STEPS = "train.max_steps=40"  # the middle begins at step 20, the finish at 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):  # noqa: F811
    path = tmp_path_factory.mktemp("phases") / "whole"
    go(path, *SMALL, images, TWO, STEPS, "train.log_every=1", "train.save_every_steps=1", "train.keep=99")
    return path


def test_what_a_phase_sets(whole):
    """The first has the settings of the whole, each later one those before it and its own; what none names goes on."""
    states = {step: checkpoint.load(whole / f"checkpoints/step_{step:06d}.pt") for step in range(41)}
    assert [states[step]["loop"]["phase"] for step in (0, 20, 21, 30, 31, 40)] == [0, 0, 1, 1, 2, 2]
    assert [record["train/phase"] for record in records(whole) if "train/phase" in record] == [0] * 20 + [1] * 10 + [
        2
    ] * 10
    sizes = [len(states[step]["buffer"]["chains"]) for step in (0, 30, 31, 32, 39, 40)]
    assert sizes == [48, 48, 12, 16, 44, 48]  # it starts anew with 8, and has 4 more a step
    assert set(states[31]["buffer"]["ages"].tolist()) <= {0, 5} and states[30]["buffer"]["ages"].max() > 5
    moments = [states[step]["optimizer"]["state"][0]["step"].item() for step in (20, 30, 31, 40)]
    assert moments == [20, 30, 1, 10]
    rates = [record["train/lr"] for record in records(whole) if "train/lr" in record]
    epochs = [step // 4 for step in range(30)]
    assert rates[:30] == pytest.approx([1e-3 * 0.97**epoch for epoch in epochs])
    warm = [1 / 3, 2 / 3, *[1] * 8]
    assert rates[30:] == pytest.approx([4e-3 * w * (1 - i / 10) for i, w in enumerate(warm)])


def test_what_a_phase_built_goes_on_in_the_next(tmp_path, images):  # noqa: F811
    """Its buffer, optimizer and rate, also where the run was stopped in the next, or the next began with it."""
    last = "last: {share: 0.25, loss: {contrastive_divergence: {alpha: 0.01}}}}"
    three = "phases={finish: " + FINISH + ", " + last
    often = ["train.log_every=1", "train.keep=99"]
    go(tmp_path / "whole", *SMALL, images, three, STEPS, *often, "train.save_every_steps=1")
    states = [checkpoint.load(tmp_path / f"whole/checkpoints/step_{step:06d}.pt") for step in (30, 31, 40)]
    assert [len(state["buffer"]["chains"]) for state in states] == [48, 48, 48]
    assert [state["optimizer"]["state"][0]["step"].item() for state in states] == [10, 11, 20]
    assert [state["optimizer"]["param_groups"][0]["lr"] for state in states[1:]] == pytest.approx([4e-3 / 3, 4e-4])
    go(tmp_path / "parts", *SMALL, images, three, STEPS, *often, "train.save_every_steps=34")
    (tmp_path / "parts/checkpoints/step_000034.pt").replace(tmp_path / "parts/checkpoints/last.pt")
    for file in checkpoint.healthy(tmp_path / "parts/checkpoints"):
        file.unlink()
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    at_once = "phases={finish: " + FINISH.replace("0.25", "0.01") + ", " + last.replace("0.25", "0.5")
    go(tmp_path / "run", *SMALL, images, at_once, "train.max_steps=4", *often, "train.save_every_steps=1")
    state = checkpoint.load(tmp_path / "run")
    assert state["loop"]["phase"] == 2 and len(state["buffer"]["chains"]) == 8 + 2 * 4


@pytest.mark.parametrize("at", [11, 20, 21, 27, 30, 31, 36])
def test_a_stop_in_any_phase_leaves_no_trace(tmp_path, images, whole, at):  # noqa: F811
    parts = tmp_path / "parts"
    go(parts, *SMALL, images, TWO, STEPS, "train.log_every=1", f"train.save_every_steps={at}", "train.keep=99")
    (parts / f"checkpoints/step_{at:06d}.pt").replace(parts / "checkpoints/last.pt")
    for file in checkpoint.healthy(parts / "checkpoints"):
        file.unlink()
    resume(parts)
    assert checkpoint.load(parts)["step"] == 40
    assert_same_run(whole, parts)


def test_a_phase_that_changes_nothing_changes_nothing(tmp_path, images):  # noqa: F811
    go(tmp_path / "one", *SMALL, images, "train.max_steps=12")
    same = "phases={same: {share: 0.5, loss: {contrastive_divergence: {alpha: 0.1}}}}"
    go(tmp_path / "two", *SMALL, images, "train.max_steps=12", same)
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    for part in ("energy", "optimizer", "buffer", "generator"):
        assert_equal(one[part], two[part], part)


def test_by_the_clock(tmp_path, images):  # noqa: F811
    """Where the clock ends the training it parts it, too, and the phase is the checkpoint's, not the new limit's."""
    go(tmp_path / "run", *SMALL, images, TWO, "train.epochs=null", "train.max_steps=null", "train.max_minutes=0.005")
    state = checkpoint.load(tmp_path / "run")
    assert state["loop"]["phase"] == 2 and 0 < state["loop"]["phase_began"] < state["step"]
    resume(tmp_path / "run", "train.max_minutes=0.02")
    longer = checkpoint.load(tmp_path / "run")
    assert longer["step"] > state["step"] and longer["loop"]["phase_began"] == state["loop"]["phase_began"]


def test_a_rollback_to_the_phase_before(tmp_path, images):  # noqa: F811
    """What diverges in a phase goes back to the one before, with its parts, and comes through with half of the rate."""
    wild = "phases={wild: {share: 0.5, optimizer: {lr: 1e18}, buffer: {policy: fifo, initial: 16}}}"
    often = ["train.log_every=1", "train.save_every_steps=9", "guard.lr_factor=1e-21", "guard.warmup_steps=1000"]
    go(tmp_path / "run", *SMALL, images, wild, "train.max_steps=40", *often)
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 40 and state["loop"]["phase"] == 1
    ((diverged, restored),) = state["guard"]["rollbacks"]
    assert diverged > 20 and restored == 18
    seen = [record["train/phase"] for record in records(tmp_path / "run") if "train/phase" in record]
    assert seen[18:20] == [0, 0] and seen.count(0) >= 20 and seen[-1] == 1


def test_the_sampler_of_a_checkpoint_is_its_phases(whole):
    given = {"_target_": "ebm.sampling.sgld.SGLD"}
    states = [checkpoint.load(whole / f"checkpoints/step_{step:06d}.pt") for step in (30, 40)]
    assert [trained.sampler_of(state, given).steps for state in states] == [2, 5]
    del states[1]["loop"]  # as in a file that ships
    assert trained.sampler_of(states[1], given).steps == 5


REFUSED = {
    "{a: {share: 0.5}}": "phases.a must set something anew",
    "{a: {sampler: {steps: 3}}}": "phases.a.share must be a number in (0, 1], got None",
    "{a: {share: 0, sampler: {steps: 3}}}": "phases.a.share",
    "{a: {share: .nan, sampler: {steps: 3}}}": "phases.a.share",
    "{a: {share: 0.6, sampler: {steps: 3}}, b: {share: 0.4, sampler: {steps: 3}}}": "shares of all phases must be less",
    "{a: {share: 0.5, energy: {hidden: 8}}}": "phases.a.energy cannot change",
    "{a: {share: 0.5, data: {hold_out: 9}}}": "phases.a.data cannot change",
    "{a: {share: 0.5, seed: 1}}": "phases.a.seed cannot change",
    "{a: {share: 0.5, train: {batch_size: 8}}}": "phases.a.train sets batch_size, and may set chains",
    "{a: {share: 0.5, sampler: {step: 3}}}": "phases.a.sampler sets step, and may set",
    "{a: {share: 0.5, sampler: 3}}": "phases.a.sampler must be settings",
    "{a: 3}": "phases must be settings by the name",
    "[a]": "phases must be settings by the name",
    "{a: {share: 0.5, sampler: {steps: 0}}}": "sampler.steps must be an integer >= 1",
    "{a: {share: 0.5, buffer: {policy: lifo}}}": "buffer.policy must be one of",
    "{a: {share: 0.5, buffer: {policy: fifo, initial: 8}}}": "buffer.initial must be at least",
    "{a: {share: 0.5, optimizer: {lr: -1}}}": "optimizer.lr",
    "{a: {share: 0.5, loss: {contrastive_divergence: null}}}": "loss must be a list of terms",
    "{a: {share: 0.5, loss: {classification: {_target_: ebm.losses.Classification}}}}": "energy with classes",
    "{a: {share: 0.5, train: {warmup_steps: -1}}}": "train.warmup_steps",
}


@pytest.mark.parametrize("bad", REFUSED)
def test_refused_before_any_step(tmp_path, images, capsys, bad):  # noqa: F811
    with pytest.raises(SystemExit):
        go(tmp_path / "run", *SMALL, images, f"phases={bad}")
    assert REFUSED[bad] in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


@given(st.lists(st.floats(0.01, 1), min_size=0, max_size=5), st.floats(0.05, 0.95))
def test_starts_part_the_training(weights, rest):
    """Against a running sum; each phase is as long as its share."""
    shares = [weight / sum(weights) * rest for weight in weights]
    config = {"phases": {str(i): {"share": share, "sampler": {}} for i, share in enumerate(shares)}}
    starts = [*phases.starts(config), 1.0]
    assert starts[0] == 0 and starts == sorted(starts)
    lengths = [b - a for a, b in pairwise(starts)]
    assert lengths == pytest.approx([1 - math.fsum(shares), *shares])


def test_a_file_that_names_another_function_in_a_phase_is_refused():
    config = {"loss": {}, "phases": {"a": {"share": 0.5, "scheduler": {"_target_": "os.system", "command": "true"}}}}
    with pytest.raises(ValueError, match=r"os\.system"):
        allowed.check_config(config)


def test_a_run_without_a_phase_ships_as_before():
    assert phases.configs({"loss": {"a": {}}, "seed": 3}) == [{"loss": {"a": {}}, "seed": 3}]
