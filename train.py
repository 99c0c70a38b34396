"""Train an energy-based model by contrastive divergence:  python train.py [experiment=tutorial] [key=value …]
Go on with a run that was stopped or killed, bit for bit:  python train.py resume=RUN_DIR [train.epochs=100]
Many runs:  python train.py -m key=a,b …        One run on many devices:  torchrun --nproc-per-node=2 train.py …"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ebm import check, losses
from ebm.batches import Batches, noised
from ebm.data import Dataset
from ebm.evaluation import features
from ebm.files import write_whole
from ebm.running import checkpoint, cli, maintenance, phases, resume, sweep, telemetry, tracking
from ebm.running.ranks import Ranks
from ebm.running.state import Phase, Training, check_settings, default_generator
from ebm.sampling.buffer import ReplayBuffer
from ebm.transport import PairedBatches


def training_step(run: Training) -> dict[str, Tensor]:
    """One step of contrastive divergence with chains that persist (Du & Mordatch 2019, algorithm 1): scalars to log."""
    x_data, y_data, x_noise = run.batches.next()
    x_model = y_model = ages = None
    if run.phase.loss.needs_negatives:
        chains, places, ages, labels = run.buffer.draw(run.phase.chains, run.generator)
        y_model = labels if run.has_classes else None
        x_model = run.sampler(run.energy, chains, run.generator, labels=y_model)
        run.buffer.put(x_model, places, ages + run.sampler.steps, labels)

    x_noised = noised(x_data, run.phase.data_noise_std, run.sampler.bounds, run.generator)
    loss, logs = run.phase.loss(run.parallel_energy, x_noised, x_model, run.generator, y_data, y_model, x_noise)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    logs["grad_norm"] = nn.utils.clip_grad_norm_(run.energy.parameters(), run.phase.grad_norm_clip)
    run.optimizer.step()

    run.last_batch = (x_data, x_model, y_model)
    return logs if ages is None else logs | telemetry.fresh_scores(-logs.pop("e_model"), ages)


def train(cfg: DictConfig, run_dir: Path, ranks: Ranks, state: dict[str, Any] | None = None) -> int:
    """Build the parts, run the loop, leave config.yaml, metrics.jsonl, checkpoints/ and samples/ in `run_dir`.

    With the `state` of a checkpoint, go on from there. Returns the signal that stopped it, 0 for none. Each of the
    `ranks` has its share of each batch and of the chains; the first one alone writes.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    of_phases = phases.configs(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    config = phases.explicit(config, [OmegaConf.to_container(OmegaConf.create(c), resolve=True) for c in of_phases])
    cfg = OmegaConf.create(config)
    run = build(cfg, config, run_dir, ranks, state)
    intervals = maintenance.Intervals.of(config["train"], run.batches.steps_per_epoch)
    if state:
        resume.load_state(run, state, run_dir)
        if not state.get("pictures_due") and intervals.progress(run.loop) >= 1:
            raise ValueError(
                f"resume={run_dir} is complete at step {run.loop.step}: set train.epochs, max_steps or max_minutes to "
                "more to go on longer"
            )
    logged_before = None if state is None else state["tracker"]
    with (
        cli.Signals() as signals,
        tracking.Tracker(run_dir, config, logged_before, writes=ranks.first, **config["wandb"]) as tracker,
        tqdm(total=intervals.max_steps, initial=run.loop.step, dynamic_ncols=True, disable=not ranks.first) as bar,
    ):
        if ranks.first:
            write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        maintain = maintenance.Maintenance(run, run_dir, intervals, tracker, bar, **maintenance.settings(config, state))
        while True:
            due = maintain.due(signals)
            if not maintain(due):
                continue  # it went back to an earlier step
            if due.done or due.stop:
                break
            started = time.perf_counter()
            progress = intervals.progress(run.loop)
            for number in range(run.loop.phase + 1, run.phase_at(progress) + 1):
                run.start_phase(number)
                if ranks.first:
                    bar.write(f"phase {run.phase.name} from step {run.loop.step} on", file=sys.stderr)
            run.set_learning_rate(due.epoch, progress)
            logs = training_step(run)
            run.loop.add(logs)
            bar.update()
            if run.loop.step % intervals.log_every == 0 or run.loop.step % intervals.steps_per_epoch == 0:
                logs["loss"].item()  # wait for the device, as maintenance does: else the clock misses what is queued
            run.loop.seconds += time.perf_counter() - started
        if due.done:
            tracker.end(cfg.objective)
    if ranks.first and run.guard.rollbacks:
        print(f"guard        {len(run.guard.rollbacks)} rollbacks: try a lower optimizer.lr or more sampler.steps")
    if ranks.first and due.done:
        tracking.print_whereabouts(Path(__file__), run_dir, maintain.pictures, tracker)
    elif ranks.first:
        name = signal.Signals(due.stop).name
        print(f"{name}: saved at step {run.loop.step}; go on with  {cli.command(Path(__file__), resume=run_dir)}")
    return 0 if due.done else due.stop


def build(
    cfg: DictConfig, config: dict[str, Any], run_dir: Path, ranks: Ranks, state: dict[str, Any] | None
) -> Training:
    """The parts that the configuration names, on this rank's device, before any step."""
    cli.refuse_old_names(resume.flat(config))  # of a file of the user's own
    for of_phase in phases.configs(config):
        check_settings(of_phase)
    device = ranks.device(cli.pick_device(cfg.device))
    guard = instantiate(cfg.guard)
    ranks.share("train.batch_size", cfg.train.batch_size)  # refuses what is no whole number
    all_phases = build_phases(cfg, ranks)
    dataset = build_dataset(cfg, run_dir, ranks, state)
    energy, energy_config = build_energy(cfg, dataset, device)
    classes, class_shares = getattr(energy, "classes", None), getattr(energy, "class_shares", None)
    for phase in all_phases:
        phase.check(dataset.shape, classes)
    if cfg.initial_weights is not None and state is None:
        checkpoint.start_from(energy, cfg.initial_weights)
    energy.to(memory_format=torch.channels_last).to(device)  # faster convolutions
    default_generator(device).manual_seed(ranks.seed(cfg.seed))
    generator = torch.Generator(device).manual_seed(ranks.seed(cfg.seed))
    batches = PairedBatches if any(phase.loss.needs_pairs for phase in all_phases) else Batches
    order = generator if ranks.size == 1 else torch.Generator(device).manual_seed(cfg.seed)
    labels = None if classes is None else dataset.train_labels
    return Training(
        energy=energy,
        parallel_energy=ranks.wrap(energy),
        phases=all_phases,
        batches=batches(dataset.train, cfg.train.batch_size, order, ranks.rank, ranks.size, labels, dataset.flip),
        guard=guard,
        dataset=dataset,
        ranks=ranks,
        generator=generator,
        settings={
            "config": config,
            "energy_config": energy_config,
            "class_shares": class_shares,
            "class_names": None if dataset.class_names is None else dataset.class_names[:classes],
            "data_hashes": features.data_hashes(dataset),
        },
    )


def build_phases(cfg: DictConfig, ranks: Ranks) -> list[Phase]:
    """What each phase of the training sets, the first one all of it."""
    config: Any = OmegaConf.to_container(cfg)
    configs, starts = phases.configs(config), phases.starts(config)
    named = config["phases"] or {}
    anew = [config, *named.values()]
    result = []
    for i, name in enumerate(["begin", *named]):
        of_phase = OmegaConf.create(configs[i])
        settings = of_phase.train
        sampler = instantiate(of_phase.sampler, _convert_="all")
        check.number("sampler.steps", sampler.steps, 1, integer=True)  # chains that stay at noise teach nothing
        phase = Phase(
            name=name,
            start=starts[i],
            end=[*starts, 1.0][i + 1],
            sampler=sampler,
            loss=losses.Sum(instantiate(of_phase.get("loss", {}), _convert_="all")),
            scheduler=instantiate(of_phase.scheduler),
            new_buffer=partial(build_buffer, of_phase.buffer) if "buffer" in anew[i] else None,
            new_optimizer=instantiate(of_phase.optimizer, _partial_=True) if "optimizer" in anew[i] else None,
            chains=ranks.share("train.chains", settings.chains or settings.batch_size),
            **{key: settings[key] for key in ("data_noise_std", "grad_norm_clip", "warmup_steps")},
        )
        result.append(phase)
    return result


def build_dataset(cfg: DictConfig, run_dir: Path, ranks: Ranks, state: dict[str, Any] | None) -> Dataset:
    """The data set. Raises ValueError where the run that goes on had another."""
    if cfg.data._target_ is None:
        raise ValueError("data=trained is for sample.py and evaluate.py: give a data set to train on")
    dataset: Dataset = ranks.first_then_others(lambda: instantiate(cfg.data))
    with_frechet = tracking.logged_name(cfg.objective) == "val/frechet"
    if with_frechet and not (features.judge_of(dataset, cfg.judge) and len(dataset.validation) > 1):
        raise ValueError(
            "objective=frechet needs a judge, one that ships or of images with labels of two classes or more, and two "
            f"validation images or more; data set {dataset.name} lacks them"
        )
    if state and "data_hashes" in state:  # older files have none
        hashes = features.data_hashes(dataset)
        if others := [name for name, before in state["data_hashes"].items() if hashes.get(name) != before]:
            which = " and ".join(others)
            raise ValueError(f"resume={run_dir}: its {which} were others: data.root or data.file must be those")
    return dataset


def build_energy(cfg: DictConfig, dataset: Dataset, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The energy, its weights drawn from the seed, and the plain dict that builds it again."""
    config: Any = OmegaConf.to_container(cfg.energy, resolve=True)
    config["shape"] = list(dataset.shape)
    with torch.device("meta"):  # takes no memory
        weights = instantiate(config, _convert_="all").parameters()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    check.memory("energy (weights, gradients, moments)", 4 * size, device)
    with torch.random.fork_rng(devices=[]):  # constructors of modules take no generator
        torch.set_rng_state(torch.Generator().manual_seed(cfg.seed).get_state())
        energy = instantiate(config, _convert_="all")
    classes = getattr(energy, "classes", None)
    if classes is not None and (dataset.train_labels is None or int(dataset.train_labels.max()) >= classes):
        labels = "none" if dataset.train_labels is None else f"0 to {int(dataset.train_labels.max())}"
        raise ValueError(f"energy.classes={classes} needs data with labels below it; those of {dataset.name}: {labels}")
    if classes is not None and dataset.train_labels is not None:
        counts = dataset.train_labels.bincount(minlength=classes)
        energy.class_shares = (counts.double() / counts.sum()).tolist()
    return energy, config


def build_buffer(
    cfg: DictConfig, dataset: Dataset, energy: nn.Module, generator: torch.Generator, ranks: Ranks
) -> ReplayBuffer:
    """This rank's replay buffer, full of fresh chains."""
    of_data: dict[str, Any] = {name: getattr(energy, name, None) for name in ("classes", "class_shares")}
    of_data |= {"class_means": dataset.class_means, "images": (dataset.train, dataset.train_labels)}
    sizes = {key: ranks.share(f"buffer.{key}", cfg[key]) for key in ("capacity", "initial") if ranks.size > 1}
    new_buffer = instantiate(cfg, _partial_=True)
    return new_buffer(dataset.shape, generator, **of_data, **sizes)


def train_or_resume(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], goes_on: bool) -> float:
    """Train on all ranks in the first one's directory; the objective. Exits after a signal to stop.

    A run that the directory holds already is refused, unless it `goes_on`: then its configuration must be `cfg`."""
    hydras = run_dir
    given: Any = OmegaConf.to_container(cfg, resolve=True)
    try:
        with Ranks(cfg.rank_timeout_minutes, cfg.device) as ranks, ExitStack() as held:
            run_dir = ranks.from_first(lambda: run_dir)
            if hydras != run_dir:
                resume.remove_if_empty(hydras)
            state = None
            if cfg.resume is not None:
                run_dir = Path(str(cfg.resume))
                given, state = resume.resumed(given, run_dir, overrides)
            elif ranks.from_first(lambda: any(run_dir.glob("checkpoints/*.pt"))):
                if not goes_on:
                    again = cli.command(Path(__file__), resume=run_dir)
                    raise ValueError(f"{run_dir} holds a run: go on with it ({again}) or set another hydra.run.dir")
                given, state = resume.resumed(given, run_dir, None)
            if state:
                cfg = OmegaConf.create(given)
            if ranks.first:
                held.enter_context(resume.alone_in(run_dir))
            stopped_by = train(cfg, run_dir, ranks, state)
    finally:
        resume.remove_if_empty(hydras)
    if stopped_by == signal.SIGUSR2:
        signal.raise_signal(stopped_by)  # the launcher's own handler puts the job back into its queue
    if stopped_by:
        sys.exit(128 + stopped_by)
    return tracking.objective(run_dir, cfg.objective)


def launch(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] = ()) -> float:
    restarts = (os.environ.get(f"{scheduler}_RESTART_COUNT", "0") for scheduler in ("SLURM", "TORCHELASTIC"))
    with cli.one_line_errors():  # no decorator: launchers pickle this function, and that would hold a generator
        return train_or_resume(cfg, run_dir, overrides, goes_on=any(count != "0" for count in restarts))


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    run_dir, overrides = Path(job.runtime.output_dir), job.overrides.task
    if job.mode == RunMode.MULTIRUN:
        run = partial(train_or_resume, cfg, run_dir, overrides, goes_on=True)
        return sweep.training_job(run, cfg, run_dir, overrides, job.job.num)
    return launch(cfg, run_dir, overrides)


if __name__ == "__main__":
    sys.argv[1:] = resume.forced(sys.argv[1:])
    run_main(main)
