"""Evaluate an energy by one pinned protocol:  python evaluate.py checkpoint=RUN_DIR [evaluation=ood] [key=value …]

Runs of evaluations that are there already, in one table and one figure:  python evaluate.py compare=[RUN_A,RUN_B]
"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ebm import check
from ebm.evaluation import report
from ebm.evaluation.evaluation import Evaluation, protocol
from ebm.evaluation.parts import PARTS, check_settings
from ebm.files import whole_files
from ebm.running import checkpoint, tracking, trained
from ebm.running.cli import one_line_errors, output_folder, pick_device
from ebm.running.sweep import evaluation_job


def arguments_of(settings: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each part takes, by its name: its section of the settings, and what it needs of the checkpoint."""
    ood, data, chains = settings["ood"], settings["data"], settings["chains"]
    roots = (ood["root"], data.get("root"), trained.data_config(state).get("root"), "data")  # the first that is given
    root, background = next(root for root in roots if root), trained.background_of(state, data)
    ood = ood | {"root": root, "noise_std": settings["noise_std"], "background": background}
    samples = settings["samples"] | {"buffer": state.get("buffer")}
    densities = {"density": settings["density"], "likelihood": settings["ais"]}
    return {"ood": ood, "samples": samples, "classification": {}, "chains": chains} | densities


def evaluate(cfg: DictConfig, number: int | None = None) -> Path:
    """Run the parts and write what they found, all or nothing, to the folder returned. `number`: of a sweep's job."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    check_settings(settings)
    device = pick_device(cfg.device)
    given = settings["checkpoint"]
    paths = [str(path) for path in (given if isinstance(given, list) else [given])]
    check.that(paths, "checkpoint must be a run directory, a checkpoint file or a list of them, got []")
    states = [checkpoint.load(path) for path in paths]
    energies = []
    for path, state in zip(paths, states, strict=True):
        energies.append(checkpoint.build_energy(state, path, settings["modules"]).to(device))
        if checkpoint.input_shape(state) != checkpoint.input_shape(states[0]):
            raise ValueError(f"checkpoint: {path} takes other images than {paths[0]}, they make no ensemble")
    state = states[0]
    dataset = trained.dataset_of(state, cfg.data.root) if cfg.data._target_ is None else instantiate(cfg.data)
    trained.check_shape(dataset, state)
    for split, x in (("train", dataset.train), ("test", dataset.test)):
        check.that(len(x) >= 2, f"data set {dataset.name}: one {split} image has no spread, at least 2 are needed")
    name = settings["evaluation"]["name"]
    out = folder_of(settings["out"], paths[0], name, number)
    sampler = trained.sampler_of(state, settings["sampler"])
    shared = {key: settings[key] for key in ("seed", "bootstrap", "batch_size", "judge", "cache")}
    arguments = arguments_of(settings, state)
    with whole_files(out) as aside:
        ev = Evaluation(energies, dataset, sampler, aside, device, **shared)
        for part in settings["evaluation"]["parts"]:
            PARTS[part](ev, **arguments[part])
        made_by = protocol(ev, settings, state["step"], state.get("class_shares"))
        numbers = ev.numbers | {"checkpoint": paths[0], "skipped": ev.skipped, "protocol": made_by}
        title = f"{name}: {Path(paths[0]).name} on {dataset.name}"
        report.write(aside / "report.html", title, ev.sections, ev.skipped, made_by)
        (aside / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    pictures = {Path(name).stem: out / name for section in ev.sections for name in section.pictures}
    tracking.log_evaluation(out, numbers, pictures, settings, **settings["wandb"])
    for key, reason in ev.skipped.items():
        print(f"skipped      {key}: {reason}")
    print(f"numbers      {out / 'metrics.json'}")
    print(f"pictures     {' '.join(str(file) for file in pictures.values())}")
    print(f"report       {out / 'report.html'}")
    return out


def folder_of(out: str | None, path: str, name: str, number: int | None) -> Path:
    """Where an evaluation is written; a sweep's jobs that would share a folder get one each below it."""
    below = "" if number is None or (out is None and checkpoint.is_run(path)) else f"/{number}"
    return output_folder(out and f"{out}{below}", path, f"evaluation/{name}{below}")


def evaluate_or_compare(cfg: DictConfig, number: int | None = None) -> str:
    """The folder of an evaluation, "" of a comparison."""
    if cfg.compare is None:
        return str(evaluate(cfg, number))
    given = cfg.compare if OmegaConf.is_list(cfg.compare) else [cfg.compare]
    check.that(given, "compare must be a list of evaluations, or of runs that have one, got []")
    report.compare([Path(str(path)) for path in given], output_folder(cfg.out, ".", "evaluation/compare"))
    return ""


def launch(cfg: DictConfig) -> str:
    with one_line_errors():
        return evaluate_or_compare(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> str | None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    if job.mode == RunMode.MULTIRUN:
        return evaluation_job(partial(evaluate_or_compare, cfg, job.job.num), job.job.num)
    return launch(cfg)


if __name__ == "__main__":
    run_main(main)
