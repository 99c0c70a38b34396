"""What is due between two steps, against the sets of steps that the settings say; and that nothing else is done."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebm.data import Dataset
from ebm.running.maintenance import Due, Intervals, Maintenance, what_is_due
from ebm.running.ranks import Ranks
from ebm.running.state import Loop

SOMETIME = st.integers(1, 7)


def due_at(intervals: Intervals, step: int, **other: object) -> Due:
    calm = {"since_save": 0.0, "fresh": step > 0, "stop": 0, "save": False, "pictures_left": False}
    return what_is_due(intervals, Loop(step=step), **(calm | other))


@given(per_epoch=SOMETIME, log=SOMETIME, validate=SOMETIME, sample=SOMETIME, save=SOMETIME, end=st.integers(1, 60))
def test_each_is_due_at_its_multiples_and_at_the_end(per_epoch, log, validate, sample, save, end):
    intervals = Intervals(per_epoch, log, validate, sample, max_steps=end, save_every_steps=save)
    found = [due_at(intervals, step) for step in range(end + 1)]

    def at(name: str) -> set[int]:
        return {step for step, due in enumerate(found) if getattr(due, name)}

    steps = range(1, end + 1)
    assert at("done") == {end}
    assert at("read_back") == {step for step in steps if step % log == 0} | {end}
    assert at("validate") == {step for step in steps if step % (per_epoch * validate) == 0} | {end}
    assert at("pictures") == {step for step in steps if step % (per_epoch * sample) == 0} | {end}
    assert at("numbered") == {step for step in [0, *steps] if step % save == 0}
    assert at("save") == (at("numbered") - {0}) | at("validate") | at("pictures")
    assert [due.epoch for due in found] == [step // per_epoch for step in range(end + 1)]


def test_without_save_every_steps_validations_are_what_is_rolled_back_to():
    intervals = Intervals(steps_per_epoch=5, validate_every_epochs=2, max_steps=23)
    assert [step for step in range(24) if due_at(intervals, step).numbered] == [0, 10, 20]


def test_what_was_maintained_before_its_checkpoint_is_not_again():
    intervals = Intervals(steps_per_epoch=5, log_every=5, sample_every_epochs=1, save_every_steps=5)
    assert due_at(intervals, 5) == Due(1, False, 0, True, True, True, True, True)
    assert due_at(intervals, 5, fresh=False) == Due(1, False, 0, False, False, False, False, True)


def test_pictures_that_are_left_come_without_another_validation():
    intervals = Intervals(steps_per_epoch=5, max_steps=10)
    due = due_at(intervals, 10, fresh=False, pictures_left=True)
    assert (due.done, due.validate, due.pictures, due.save) == (True, False, True, True)


def test_signals_and_clocks():
    intervals = Intervals(steps_per_epoch=100, max_seconds=60, save_every_seconds=9)
    assert not due_at(intervals, 3, since_save=8.9).save
    assert due_at(intervals, 3, since_save=9.0).save
    assert due_at(intervals, 3, save=True).save
    assert (due_at(intervals, 3, stop=15).stop, due_at(intervals, 3, stop=15).save) == (15, True)
    assert what_is_due(intervals, Loop(3, 59.0), 0, True, 0, False, False).done is False
    assert what_is_due(intervals, Loop(3, 60.0), 0, True, 0, False, False).done is True


def test_intervals_of_a_configuration():
    settings = {"log_every": 2, "validate_every_epochs": 3, "sample_every_epochs": 4, "save_every_steps": None}
    settings |= {"save_every_minutes": 0.5, "max_minutes": None, "max_steps": 30, "epochs": 5}
    assert Intervals.of(settings, 7) == Intervals(7, 2, 3, 4, max_steps=30, save_every_seconds=30)
    assert Intervals.of(settings | {"max_steps": None}, 7).max_steps == 35
    assert Intervals.of(settings | {"epochs": None, "max_steps": None, "max_minutes": 2}, 7).max_seconds == 120
    assert Intervals.of(settings | {"epochs": None, "max_steps": None}, 7).max_steps == math.inf


def test_nothing_is_done_that_is_not_due(tmp_path):
    """The parts are there, but would fail if they were asked for anything."""
    images = Dataset("none", torch.zeros(2, 3), torch.zeros(2, 3))
    training = SimpleNamespace(loop=Loop(), dataset=images, guard=None, ranks=Ranks())
    sizes = {"seed": 0, "sample_steps": 1, "eval_batch_size": 1, "keep": 1}
    maintenance = Maintenance(training, tmp_path, Intervals(5), tracker=None, bar=None, **sizes)
    assert maintenance(Due(0, False, 0, False, False, False, False, False))
    assert not any(tmp_path.iterdir())
    with pytest.raises(AttributeError):
        maintenance(Due(0, False, 0, True, False, False, False, False))
