"""What a checkpoint says of the training behind its energy: the sampler, and the data. They are parts that ship."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm import check
from ebm.data import Dataset
from ebm.running import allowed, phases
from ebm.running.checkpoint import CheckpointError, input_shape
from ebm.sampling.sgld import SGLD

MNIST = {"_target_": "ebm.data.torchvision_dataset", "name": "MNIST", "root": "data"}  # the tutorial's weights say none


def sampler_of(state: Mapping[str, Any], given: Mapping[str, Any]) -> SGLD:
    """The sampler of a loaded checkpoint, but for the settings `given` (those that are not `trained`)."""
    ours = "ebm.sampling.sgld.SGLD"
    check.choice("sampler._target_", given.get("_target_", ours), (ours,))
    changes = {key: value for key, value in given.items() if value != "trained" and key != "_target_"}
    try:
        config = phases.configs({"sampler": {}} | state["config"])
        of_phase = config[state["loop"]["phase"] if "loop" in state else -1]
        _, settings = allowed.shipped("sampler", {"_target_": ours} | of_phase["sampler"])
        return SGLD(**settings | changes)
    except (TypeError, LookupError) as error:  # the file names a setting or a phase that there is none of
        raise CheckpointError(f"the checkpoint's sampler cannot be built: {error}") from error


def data_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the data that a loaded checkpoint was trained on."""
    return dict(state["config"].get("data", MNIST))


def background_of(state: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The colour behind transparent pixels: that of the data `given`, where these settings have a `_target_`, or of
    the data that the checkpoint was trained on."""
    config = data_config(state) if given["_target_"] is None else given
    return str(config.get("background", "black"))


def data_name(state: Mapping[str, Any]) -> str:
    """What the checkpoint's data are called: their name, their folder or file, or the function that returns them."""
    config = data_config(state)
    named = (config[key] for key in ("name", "root", "file") if key in config)
    return str(next(named, str(config.get("_target_")).rpartition(".")[2]))


def dataset_of(state: Mapping[str, Any], root: str | None = None) -> Dataset:
    """The data set that a loaded checkpoint was trained on, from the folder `root` (None: where it lay). Its validation
    images are never the test images: of one that was trained with hold_out=test, they are some of what it learned from.
    """
    try:
        build, settings = allowed.shipped("data", data_config(state))
    except ValueError as error:
        raise ValueError(f"the checkpoint was trained on data of its own: give data= ({error})") from error
    if settings.get("hold_out") == "test":
        del settings["hold_out"]
    lay_in = settings.get("root")
    if "root" in settings and root is not None:
        settings["root"] = root
    elif lay_in not in (None, MNIST["root"]) and not Path(str(lay_in)).exists():
        raise ValueError(f"the checkpoint's data lay in {lay_in}, which is not here: give data.root=")
    try:
        return build(**settings)
    except TypeError as error:  # the file names a setting that there is none of
        raise CheckpointError(f"the checkpoint's data set cannot be built: {error}") from error


def check_shape(dataset: Dataset, state: Mapping[str, Any]) -> Dataset:
    """The data set; ValueError where its images are not of the shape that the checkpoint's energy takes."""
    if dataset.shape != (shape := input_shape(state)):
        raise ValueError(f"data set {dataset.name} has images {dataset.shape}, the energy takes {shape}")
    return dataset
