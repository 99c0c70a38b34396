"""Train an energy-based model by contrastive divergence:  python train.py [experiment=tutorial] [key=value …]
Go on with a run that was stopped or killed, bit for bit:  python train.py resume=RUN_DIR [train.epochs=100]
Many runs:  python train.py -m key=a,b …        One run on many devices:  torchrun --nproc-per-node=2 train.py …"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import atexit
import fcntl
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ebm import check
from ebm.data import Batches, Dataset
from ebm.energies import labels_in_proportion
from ebm.evaluation import features, figures, metrics
from ebm.files import whole_files, write_whole
from ebm.running import checkpoint, named, sweep, telemetry, tracking
from ebm.running.cli import Signals, cause_of, command, from_here, one_line_errors, pick_device, writable
from ebm.running.guard import Guard
from ebm.running.ranks import Ranks, merged, redistributed
from ebm.running.tracking import Tracker
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.chains import chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD

# What may differ when a run is resumed; anything else would make it another run.
MAY_CHANGE = re.compile(
    r"cache|device|objective|rank_timeout_minutes|data\.root|sampler\.(threads|backend)|(guard|wandb)\..*"
    r"|train\.(?!batch_size|chains|grad_norm_clip).*"
)
MAY_BE_NULL = ["epochs", "max_steps", "max_minutes", "save_every_steps", "save_every_minutes"]
MAY_BE_NULL += ["warmup_sgld_steps", "chains"]


@dataclass
class Loop:
    """Where the training is: what evolves besides the parts."""

    step: int = 0
    seconds: float = 0.0  # of training steps alone
    best: float = math.inf  # val/cd
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the logs since the last read-back, on the device
    steps_logged: int = 0
    seconds_logged: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if type(state[name]) is not type(value):
                raise TypeError(f"loop.{name} is {state[name]!r}")
        vars(self).update({name: state[name] for name in vars(self)})


def check_numbers(cfg: DictConfig) -> None:
    """ValueError for a number of the loop that is out of range, naming its key."""
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    if cfg.objective != "frechet" and str(cfg.objective).partition("/")[0] not in ("train", "val", "chain", "noise"):
        raise ValueError(f"objective must be frechet or the name of a logged number, as val/cd, got {cfg.objective!r}")
    if cfg.train.epochs is cfg.train.max_steps is cfg.train.max_minutes is None:
        raise ValueError("one of train.epochs, train.max_steps and train.max_minutes must be set, got none")
    for key, value in cfg.train.items():
        if value is not None or key not in MAY_BE_NULL:
            real = key in ("max_minutes", "save_every_minutes", "grad_norm_clip")  # the others are whole numbers
            least = 0 if real or key == "warmup_steps" else 1
            check.number(f"train.{key}", value, least, open_low=real, integer=not real)


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


def read_back(loop: Loop, chains: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The means of the logs since the last read-back and statistics of the chains, over all ranks, in one transfer
    from the device."""
    count = loop.step - loop.steps_logged
    means = {f"train/{name}": total / count for name, total in loop.sums.items()}
    means |= {f"chain/{name}": value for name, value in chains.items()}
    values = ranks.mean(torch.stack([value.float() for value in means.values()])).tolist()
    numbers = dict(zip(means, values, strict=True))
    fresh, old, score, reached = (numbers.pop(f"train/{name}") for name in telemetry.OF_FRESH)  # a step
    if fresh > 0 and old > 0:
        numbers["chain/score_fresh"] = score / fresh
        numbers["chain/fresh_reached"] = reached / fresh
        numbers["chain/score_old"] = (numbers["train/score_fake"] * (fresh + old) - score) / old
    return numbers


def validate(energy: nn.Module, real: Tensor, noise: Tensor, noise_1024: Tensor, **how: Any) -> dict[str, float]:
    """Mean score of test images, of as many noise images, noise − real, and of 1024 noise images."""
    score_real, score_noise, score = (float(metrics.scores(energy, x, **how).mean()) for x in (real, noise, noise_1024))
    of_test = {"val/cd": score_noise - score_real, "val/score_real": score_real, "val/score_noise": score_noise}
    return of_test | {"noise/score": score}


def draw_samples(
    folder: Path, step: int, energy: nn.Module, sampler: SGLD, buffer: ReplayBuffer, real: Tensor, cfg: DictConfig
) -> tuple[dict[str, Path], dict[str, float], dict[str, metrics.Array]]:
    """PNG files in `folder`: 8 chains from noise, each a strip of 8 snapshots; 32 random chains of the buffer;
    histograms of scores and ages. Numbers: how well the long chains mix, and how far short ones fall behind them. And
    the scores of chains in the buffer and of real images."""
    device, steps = buffer.chains.device, cfg.train.sample_steps
    generator = torch.Generator(device).manual_seed(cfg.seed)  # the same start each time, to compare over training
    noise = uniform_noise((8, *buffer.chains.shape[1:]), generator)
    every = max(steps // 256, 1)
    labels = labels_in_proportion(energy, 8, device)
    trace = sampler.trace(energy, noise, generator, every=every, steps=steps, labels=labels)
    shown = sorted({-(-i * (len(trace) - 1) // 8) for i in range(1, 9)})
    chosen = torch.randperm(buffer.size, generator=generator, device=device)
    images = real.dim() == 4
    keys = ["samples/generation", "samples/buffer"] if images else ["samples/points"]
    names = {key: f"{key}_{step:06d}.png" for key in [*keys, "chain/state"]}
    scored = {"buffer": buffer.chains[chosen[:512]], "real": real[:512]}
    scores = {name: metrics.scores(energy, x, device=device) for name, x in scored.items()}
    with whole_files(folder) as aside:
        for name in names.values():
            (aside / name).parent.mkdir(exist_ok=True)
        if images:
            figures.strips(aside / names["samples/generation"], trace[shown], [min(every * i, steps) for i in shown])
            figures.grid(aside / names["samples/buffer"], buffer.chains[chosen[:32]])
        else:  # vectors: their first two components
            points = sampler(energy, uniform_noise((2048, *real.shape[1:]), generator), generator, steps)
            held = buffer.chains[: buffer.size][-2048:]
            figures.points(aside / names["samples/points"], {"samples": points[:, :2], "buffer": held[:, :2]})
        figures.chain_state(aside / names["chain/state"], scores, buffer.ages[: buffer.size].cpu().numpy())
    settled = trace[len(trace) // 2 :]  # the way down from noise is not the chain's law
    along = metrics.scores(energy, settled.flatten(0, 1), device=device).reshape(len(settled), -1)
    short_run = trace[min(-(-sampler.steps // every), len(trace) - 1)]
    short, long = float(metrics.scores(energy, short_run, device=device).mean()), float(along[-1].mean())
    numbers = {"chain/score_short_run": short, "chain/score_long_run": long, "chain/short_long_gap": long - short}
    if len(along) >= 16 and bool((along.std(axis=0) > 0).all()):
        numbers["chain/ess"] = metrics.effective_sample_size(along.T)
        numbers["chain/split_rhat"] = metrics.split_rhat(along.T)
    return {key: folder / name for key, name in names.items()}, numbers, scores


def frechet(energy: nn.Module, sampler: SGLD, dataset: Dataset, cfg: DictConfig, device: torch.device) -> float:
    """The distance of 256 samples, train.sample_steps steps from noise, to the test images, in the features of the data
    set's classifier: what evaluate.py calls frechet/classifier-n256/STEPS."""
    count, steps = min(256, len(dataset.test)), cfg.train.sample_steps
    start = uniform_noise((count, *dataset.shape), chain_generators(cfg.seed + 1, count))
    generators = chain_generators(cfg.seed, count, device)
    labels = labels_in_proportion(energy, count)
    x = trace_in_batches(sampler.trace, energy, start, generators, cfg.train.eval_batch_size, steps, steps, labels)[-1]
    classifier, _ = features.cached_classifier(dataset, cfg.cache, device)
    return metrics.frechet(*(features.features_of(classifier, images, device=device) for images in (dataset.test, x)))


def default_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of the device: dropout takes no other."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


def restore(
    parts: Mapping[str, Any], generator: torch.Generator, state: dict[str, Any], source: Path, ranks: Ranks
) -> None:
    """Give the parts and the generators their states back. Raises CheckpointError where one does not fit."""
    try:
        if not isinstance(state["tracker"], dict):
            raise TypeError("tracker is no dict")
        state = redistributed(state, ranks, parts["buffer"].capacity, generator)
        groups = parts["optimizer"].state_dict()["param_groups"]  # settings are the run's, not the file's
        lr = state["optimizer"]["param_groups"][0]["lr"]  # of the last step
        groups[0]["lr"] = check.number("its optimizer's lr", lr, 0)
        state["optimizer"] = {"state": state["optimizer"]["state"], "param_groups": groups}
        for name, part in parts.items():
            part.load_state_dict(state[name])
        parts["batches"].generator.set_state(state["order_generator"])  # alone, the one generator
        generator.set_state(state["generator"])
        if "default_generator" in state:  # older files have none
            default_generator(generator.device).set_state(state["default_generator"])
        for parameter, moments in parts["optimizer"].state.items():
            for key, value in moments.items():
                if (value.numel() > 1 and value.shape != parameter.shape) or not bool(torch.isfinite(value).all()):
                    raise ValueError(f"the optimizer's {key} is not finite or of another shape than its weights")
        parts["loop"].sums = {name: value.to(generator.device) for name, value in parts["loop"].sums.items()}
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{source}: its checkpoint does not fit this run: {error!r}") from error


def roll_back(run_dir: Path, parts: Mapping[str, Any], generator: torch.Generator, seed: int, ranks: Ranks) -> None:
    """Back to the last checkpoint that was healthy when it was taken, weights, optimizer and chains, with another
    seed. Where the rollback before did not help for long, to one before the checkpoint that it went back to."""
    guard, loop = parts["guard"], parts["loop"]
    files = checkpoint.healthy(run_dir / "checkpoints")
    earlier = [file for file in files if checkpoint.step_of(file) < guard.before(loop.step)] or files[:1]
    state = checkpoint.newest_whole(reversed(earlier), run_dir)
    diverged, seconds = loop.step, loop.seconds
    restore({name: part for name, part in parts.items() if name != "guard"}, generator, state, run_dir, ranks)
    loop.seconds_logged += seconds - loop.seconds  # the time is spent: only the steps come back
    loop.seconds = seconds
    guard.rolled_back(diverged, loop.step)
    for each in (generator, default_generator(generator.device)):
        each.manual_seed((seed + 1_000_003 * len(guard.rollbacks)) % 2**63)
    for file in files if ranks.first else []:
        if checkpoint.step_of(file) > loop.step:
            file.unlink()


def train(cfg: DictConfig, run_dir: Path, ranks: Ranks, state: dict[str, Any] | None = None) -> int:
    """Build the parts, run the loop, leave config.yaml, metrics.jsonl, checkpoints/ and samples/ in `run_dir`.

    With the `state` of a checkpoint, go on from there. Returns the signal that stopped it, 0 for none. Each of the
    `ranks` has its share of each batch and of the chains; the first one alone writes.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_numbers(cfg)
    device = ranks.device(pick_device(cfg.device))
    sampler: SGLD = instantiate(cfg.sampler, _convert_="all")
    check.number("sampler.steps", sampler.steps, 1, integer=True)  # chains that stay at noise teach nothing
    loss_function = instantiate(cfg.loss, _convert_="all")
    scheduler = instantiate(cfg.scheduler)
    guard: Guard = instantiate(cfg.guard)
    if cfg.data._target_ is None:
        raise ValueError("data=trained is for sample.py and evaluate.py: give a data set to train on")
    dataset: Dataset = ranks.first_then_others(lambda: instantiate(cfg.data))
    if cfg.objective == "frechet" and not (features.has_classes(dataset) and len(dataset.test) > 1):
        raise ValueError(
            "objective=frechet needs images with labels of two classes or more, for its features come from their "
            f"classifier, and two test images or more; data set {dataset.name} lacks them"
        )
    if OmegaConf.select(cfg, "loss.contrast.weight") and len(dataset.shape) != 3:
        raise ValueError(f"loss.contrast.weight must be 0 for data of shape {dataset.shape}: it turns images")
    data_hashes = features.data_hashes(dataset)
    before = state["data_hashes"] if state and "data_hashes" in state else data_hashes  # older files have none
    if others := [name for name, was in before.items() if data_hashes.get(name) != was]:
        raise ValueError(f"resume={run_dir}: its {' and '.join(others)} were others; data.root must be where those lie")
    energy, energy_config = build_energy(cfg, dataset, device)
    if cfg.start is not None and state is None:
        checkpoint.start_from(energy, cfg.start)
    energy.to(memory_format=torch.channels_last).to(device)  # faster convolutions
    averaged = ranks.wrap(energy)
    optimizer: torch.optim.Optimizer = instantiate(cfg.optimizer, _partial_=True)(energy.parameters())
    seed, batch_size = ranks.seed(cfg.seed), ranks.share("train.batch_size", cfg.train.batch_size)
    generator = torch.Generator(device).manual_seed(seed)
    shared = generator if ranks.size == 1 else torch.Generator(device).manual_seed(cfg.seed)  # the data's order
    classes, class_shares = (getattr(energy, name, None) for name in ("classes", "class_shares"))
    y_train = None if classes is None else dataset.train_labels
    batches = Batches(dataset.train, cfg.train.batch_size, shared, ranks.rank, ranks.size, y_train)
    own = {} if ranks.size == 1 else {k: ranks.share(f"buffer.{k}", cfg.buffer[k]) for k in ("capacity", "initial")}
    new_buffer = instantiate(cfg.buffer, _partial_=True)
    of_data = {"class_means": dataset.class_means, "classes": classes, "class_shares": class_shares}
    buffer: ReplayBuffer = new_buffer(dataset.shape, generator, **of_data, **own)
    advanced = ranks.share("train.chains", cfg.train.chains or cfg.train.batch_size)
    check.number("train.chains", advanced, 1, batch_size, integer=True)
    if advanced < batch_size and buffer.policy != "fifo":
        raise ValueError(f"train.chains={cfg.train.chains}, less than the batch, needs buffer.policy=fifo")
    buffer.check_count(advanced)

    noise_generator = torch.Generator().manual_seed(cfg.seed + 1)  # the same noise at every validation
    val_noise = uniform_noise((len(dataset.test), *dataset.shape), noise_generator)
    noise_1024 = uniform_noise((1024, *dataset.shape), noise_generator)

    lr = optimizer.param_groups[0]["lr"]
    first_sgld_steps = cfg.train.warmup_sgld_steps or sampler.steps
    step_limits = [cfg.train.max_steps, cfg.train.epochs and cfg.train.epochs * batches.steps_per_epoch]
    max_steps = min((limit for limit in step_limits if limit), default=math.inf)
    max_seconds = 60 * (cfg.train.max_minutes or math.inf)
    save_every_steps = cfg.train.save_every_steps or math.inf
    save_every_seconds = 60 * (cfg.train.save_every_minutes or math.inf)
    default_generator(device).manual_seed(seed)
    loop = Loop()
    parts: dict[str, Any] = {"energy": energy, "optimizer": optimizer, "buffer": buffer, "batches": batches}
    parts |= {"guard": guard, "loop": loop}
    if state:
        restore(parts, generator, state, run_dir, ranks)
        if not state.get("pictures_due") and max(loop.step / max_steps, loop.seconds / max_seconds) >= 1:
            raise ValueError(f"resume={run_dir} is complete at step {loop.step}: set train.epochs, max_steps or "
                             "max_minutes to more to go on longer")  # fmt: skip
    maintained = loop.step  # a checkpoint is taken after the maintenance of its step: that is not done again
    pictures_due = bool(state and state.get("pictures_due"))  # it was cut off between its last save and their drawing
    save_now = True  # a run can always be resumed, with the limits of this start, and rolled back
    saved_at = time.monotonic()
    x_data = x_model = torch.empty(0)  # of the last step
    y_model: Tensor | None = None

    def write_checkpoint(epoch: int, best: bool, numbered: bool) -> None:
        snapshot = {name: part.state_dict() for name, part in parts.items()}
        snapshot |= {"generator": generator.get_state(), "default_generator": default_generator(device).get_state()}
        snapshot |= {"energy_config": energy_config, "class_shares": class_shares, "data_hashes": data_hashes}
        snapshot |= {"tracker": tracker.state_dict(), "config": config, "step": loop.step, "epoch": epoch}
        snapshot |= {"healthy": guard.healthy, "pictures_due": pictures_due}
        snapshot |= {"class_names": dataset.class_names and dataset.class_names[:classes]}
        if ranks.size > 1:
            own = {name: snapshot[name] for name in ("buffer", "generator", "default_generator")}
            shards = ranks.gather(own | {"sums": loop.sums})
            snapshot |= {"order_generator": shared.get_state()} | merged(shards)
        if ranks.first:
            checkpoint.save_run(run_dir / "checkpoints", snapshot, cfg.train.keep, best, numbered)

    with (
        Signals() as signals,
        Tracker(run_dir, config, **config["wandb"], state=state and state["tracker"], writes=ranks.first) as tracker,
        tqdm(total=max_steps, initial=loop.step, unit="step", dynamic_ncols=True, disable=not ranks.first) as bar,
    ):
        if ranks.first:
            write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        while True:
            waited = time.monotonic() - saved_at
            # What is each rank's own; all else they find alike.
            stop, save, loop.seconds, waited = ranks.largest(signals.stop, signals.save, loop.seconds, waited)
            step = loop.step
            epoch, position = divmod(step, batches.steps_per_epoch)
            progress = max(step / max_steps, loop.seconds / max_seconds)
            done = progress >= 1
            due = step > maintained
            epoch_ends = due and position == 0
            reads = due and (step % cfg.train.log_every == 0 or done)
            of_epoch = epoch_ends and epoch % cfg.train.validate_every_epochs == 0
            validates = of_epoch or (done and not pictures_due)
            pictures_due = pictures_due or done or (epoch_ends and epoch % cfg.train.sample_every_epochs == 0)
            # What a rollback goes back to must not depend on when a run was stopped, or on the clock.
            numbered = step % save_every_steps == 0 or (save_every_steps == math.inf and of_epoch)
            asked = save_now or save > 0 or stop > 0
            saves = validates or pictures_due or asked or (due and numbered) or waited >= save_every_seconds
            trouble, is_best = None, False

            if reads:
                state_of_chains = telemetry.chain_statistics(sampler, energy, buffer, x_data, x_model, y_model)
                numbers = read_back(loop, state_of_chains, ranks)
                rate = (step - loop.steps_logged) / (loop.seconds - loop.seconds_logged)
                numbers["train/lr"] = optimizer.param_groups[0]["lr"]
                numbers["train/images_per_s"] = rate * cfg.train.batch_size
                numbers["train/sgld_steps_per_s"] = rate * sampler.steps
                trouble = guard.check(step, numbers)
                if trouble is None or not trouble.startswith("not_finite"):
                    for kind in ("train/", "chain/"):
                        of_kind = {name: value for name, value in numbers.items() if name.startswith(kind)}
                        tracker.log(step, epoch, of_kind)
                    bar.set_postfix_str(
                        f"loss {numbers['train/loss']:.4f}, score gap {-numbers['train/cd']:+.4f}, "
                        f"{numbers['train/images_per_s']:.0f} images/s"
                    )
                if step % cfg.train.log_every == 0:  # the last, odd interval goes on if the run is made longer
                    loop.sums, loop.steps_logged, loop.seconds_logged = {}, step, loop.seconds

            if trouble is None and saves:
                trouble = guard.check_finite(energy, buffer.chains[: buffer.size])
                if ranks.largest(trouble is not None)[0]:
                    trouble = trouble or "not_finite: a chain of another rank is not finite"

            halts = trouble is not None and guard.decide(trouble) != "warn"
            if validates and not halts:
                how = {"batch_size": cfg.train.eval_batch_size, "device": device}
                numbers = ranks.from_first(partial(validate, energy, dataset.test, val_noise, noise_1024, **how))
                tracker.log(step, epoch, numbers)
                trouble = trouble or guard.check(step, numbers)
                is_best = guard.healthy and numbers["val/cd"] < loop.best
                loop.best = numbers["val/cd"] if is_best else loop.best

            if trouble:
                action = guard.decide(trouble)
                tracker.alert(step, epoch, trouble, action)
                if ranks.first:
                    tqdm.write(f"guard: step {step}: {trouble}: {action}", file=sys.stderr)
                if action == "stop":
                    raise ValueError(
                        f"the training diverged at step {step} ({trouble}), {len(guard.rollbacks)} rollbacks before: "
                        "lower optimizer.lr or raise sampler.steps; the checkpoints step_*.pt and best.pt were healthy"
                    )
                if action == "rollback":
                    roll_back(run_dir, parts, generator, seed, ranks)
                    maintained, save_now = loop.step, True
                    bar.n = loop.step
                    continue

            if saves:
                write_checkpoint(epoch, is_best, numbered)
                save_now = signals.save = False
                saved_at = time.monotonic()
            if pictures_due:  # after the save: what fails here loses nothing
                if ranks.first:
                    pictures, numbers, scores = draw_samples(run_dir, step, energy, sampler, buffer, dataset.test, cfg)
                    tracker.log(step, epoch, numbers)
                    energies = {f"energy/{name}": -value for name, value in scores.items()}
                    tracker.log_media(step, epoch, pictures, energies)
                    if done and cfg.objective == "frechet":
                        tracker.log(step, epoch, {"frechet": frechet(energy, sampler, dataset, cfg, device)})
                pictures_due = False
                write_checkpoint(epoch, is_best, numbered)

            if done or stop:
                break

            start = time.perf_counter()
            warm = min((step + 1) / (cfg.train.warmup_steps or 1), 1)
            optimizer.param_groups[0]["lr"] = lr * warm * guard.lr_scale * scheduler(epoch, progress)
            sgld_steps = round(first_sgld_steps + warm * (sampler.steps - first_sgld_steps))
            x_data, y_data = batches.next()  # this rank's part
            chains, places, ages, labels = buffer.draw(advanced, generator)
            y_model = None if classes is None else labels
            x_model = sampler(energy, chains, generator, sgld_steps, labels=y_model)
            buffer.put(x_model, places, ages + sgld_steps, labels)
            if advanced < batch_size:
                x_model, ages, labels = buffer.newest(batch_size)
                ages, y_model = ages - sgld_steps, None if classes is None else labels
            loss, logs = loss_function(averaged, x_data, x_model, generator, y_data, y_model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            logs["grad_norm"] = nn.utils.clip_grad_norm_(energy.parameters(), cfg.train.grad_norm_clip)
            optimizer.step()
            logs |= telemetry.fresh_scores(-logs.pop("e_model"), ages)
            loop.sums = {name: loop.sums[name] + value if name in loop.sums else value for name, value in logs.items()}
            loop.step += 1
            bar.update()
            if loop.step % cfg.train.log_every == 0 or loop.step % batches.steps_per_epoch == 0:
                loss.item()  # waits for the device, as maintenance does; between, the clock misses what is queued
            loop.seconds += time.perf_counter() - start
        if done:
            tracker.end(cfg.objective)

    if ranks.first and done:
        print_whereabouts(run_dir, pictures, tracker)
    elif ranks.first:
        name = signal.Signals(int(stop)).name
        print(f"{name}: saved at step {loop.step}; go on with  {command(Path(__file__), resume=run_dir)}")
    return 0 if done else int(stop)


def print_whereabouts(run_dir: Path, pictures: dict[str, Path], tracker: Tracker) -> None:
    print(f"pictures     {' '.join(str(from_here(file)) for file in pictures.values())}")
    print(f"checkpoint   {from_here(run_dir / 'checkpoints/last.pt')}")
    if tracker.wandb_dir:
        parts = shlex.quote(str(from_here(tracker.wandb_dir.parent)))  # a run that was resumed has several
        print(f"W&B run      {tracker.wandb_dir}")
        print(f"             {tracker.url or f'wandb sync {parts}/offline-run-*-{tracker.wandb_id}'}")
    print(f"try next     {command(Path(__file__).with_name('sample.py'), checkpoint=run_dir)}")
    print(f"             {command(Path(__file__).with_name('evaluate.py'), checkpoint=run_dir)}")


def resumed(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] | None) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration of the run in `run_dir` under the `overrides` given now (None: all of `cfg` counts), and its
    newest whole checkpoint. Raises ValueError, with what differs, for what would make it another run."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"resume={run_dir} is not the directory of a run: it has no config.yaml")
    if links := [path.name for path in run_dir.iterdir() if path.is_symlink()]:
        raise ValueError(
            f"resume={run_dir} would write where links lead: {', '.join(links)}; put what they lead to there"
        )
    state = checkpoint.load(run_dir)
    if "loop" not in state:
        raise ValueError(f"resume={run_dir}: its checkpoint holds an energy, but no state to go on from")
    given = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    ours: Any = given
    if overrides is not None:
        try:
            named.check_config(state["config"])
        except ValueError as error:
            raise ValueError(f"resume={run_dir}: its configuration is refused: {error}") from error
        ours = OmegaConf.create(state["config"])
    for key in given.keys() - ours.keys():  # of an older run
        ours[key] = given[key]
    for override in overrides or []:
        key = override.partition("=")[0].lstrip("+~")
        if override.startswith("~") or OmegaConf.select(ours, key, default=ours) is ours:
            given_as = override.removeprefix("++")
            raise ValueError(f"resume={run_dir} goes on with the run's own configuration: leave out {given_as}")
        OmegaConf.update(ours, key, OmegaConf.select(given, key), merge=False)
    ours.resume = None
    ours.wandb.dir, ours.cache = given.wandb.dir, given.cache  # the file does not choose where else is written
    if unknown := ours.wandb.keys() - given.wandb.keys():
        raise ValueError(f"resume={run_dir}: its wandb has settings that there are none of: {', '.join(unknown)}")
    was, now = flat(state["config"]), flat(OmegaConf.to_container(ours))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    refused = [f"{k} is {was.get(k)} there and {now.get(k)} here" for k in changed if not MAY_CHANGE.fullmatch(k)]
    if refused:
        raise ValueError(f"resume={run_dir} would be another run: {'; '.join(refused)}")
    return DictConfig(ours), state


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def start(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], goes_on: bool) -> float:
    """Train or resume, on all ranks in the first one's directory; the objective. Exits after a signal to stop.

    A run that the directory holds already is refused, unless it `goes_on`: then its configuration must be `cfg`."""
    hydras = run_dir
    try:
        with Ranks(cfg.rank_timeout_minutes, cfg.device) as ranks, ExitStack() as held:
            run_dir = ranks.from_first(lambda: run_dir)
            if hydras != run_dir:
                remove_if_empty(hydras)
            state = None
            if cfg.resume is not None:
                run_dir = Path(str(cfg.resume))
                cfg, state = resumed(cfg, run_dir, overrides)
            elif ranks.from_first(lambda: any(run_dir.glob("checkpoints/*.pt"))):
                if not goes_on:
                    again = command(Path(__file__), resume=run_dir)
                    raise ValueError(f"{run_dir} holds a run: go on with it ({again}) or set another hydra.run.dir")
                cfg, state = resumed(cfg, run_dir, None)
            if ranks.first:
                held.enter_context(alone_in(run_dir))
            stopped_by = train(cfg, run_dir, ranks, state)
    finally:
        remove_if_empty(hydras)
    if stopped_by == signal.SIGUSR2:
        signal.raise_signal(stopped_by)  # the launcher's own handler puts the job back into its queue
    if stopped_by:
        sys.exit(128 + stopped_by)
    return tracking.objective(run_dir, cfg.objective)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """ValueError where another process trains in this directory. The lock goes with the process, however it ends."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{run_dir} is being trained by another process: stop that one first") from None
        yield
    finally:
        os.close(folder)


def remove_if_empty(run_dir: Path) -> None:
    for folder in (run_dir, *run_dir.parents[:2]):  # runs/DATE/TIME
        if folder.is_dir() and folder != Path.cwd() and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of it: leave no empty directory


def launch(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] = ()) -> float:
    counts = (os.environ.get(f"{scheduler}_RESTART_COUNT", "0") for scheduler in ("SLURM", "TORCHELASTIC"))
    with one_line_errors():  # no decorator: launchers pickle this function, and that would hold a generator
        return start(cfg, run_dir, overrides, goes_on=any(count != "0" for count in counts))


def job_of_sweep(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], number: int) -> float | None:
    """As `launch`, but a failure goes to job.json, for the sweep's summary, and the sweep on; None then.

    A job that was cut off goes on where it was when it is started again in its directory, as a cluster's requeued
    job is, and one that is complete is done.
    """
    file = run_dir / "job.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    job: dict[str, Any] = {"number": number, "overrides": list(overrides), "objective": None, "error": "it was cut off"}
    with one_line_errors():
        if before.get("overrides", job["overrides"]) != job["overrides"]:
            atexit.unregister(sweep.summarise)  # the summary there is the other sweep's
            raise ValueError(f"{run_dir} holds another job already (job.json says which): set another hydra.sweep.dir")
    if before.get("objective") is not None:
        return before["objective"]
    write_whole(file, json.dumps(job).encode())
    try:
        cfg.wandb.group = cfg.wandb.group or "/".join(run_dir.parts[-3:-1])  # DATE/TIME
        cfg.wandb.name = cfg.wandb.name or " ".join(overrides)
        job["objective"] = start(cfg, run_dir, overrides, goes_on=True)
        job["error"] = None
    except Exception as error:  # whatever a job can die of
        job["error"] = " ".join(str(cause_of(error)).split()) or type(error).__name__
        job["traceback"] = traceback.format_exc()
        print(f"error: job {number}: {job['error']} ({file} has the traceback)", file=sys.stderr)
    write_whole(file, json.dumps(job).encode())
    return job["objective"]


class Sweep(Callback):
    """Says in one line where the output folder cannot be made, and sums a sweep up after its last job; the exit code is
    1 where a job failed."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = config.hydra.launcher
        with one_line_errors():
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise ValueError(
                    "-m under torchrun would run the whole sweep once a rank: start torchrun once a job, or leave it "
                    "out and sweep with one device a job"
                )
            if 60 * launcher.get("timeout_min", math.inf) <= launcher.get("signal_delay_s", 0):
                raise ValueError(
                    f"hydra.launcher.timeout_min={launcher.timeout_min} must be more than the warning before its end, "
                    f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} seconds: no job would get on"
                )
            writable("hydra.sweep.dir", config.hydra.sweep.dir)
        self.jobs: dict[int, list[str]] = {}
        note_jobs(get_class(launcher._target_), self.jobs)
        # Also where the launcher or the sweeper itself ends with an error, as Optuna's without a single whole trial:
        atexit.register(sweep.summarise, Path(config.hydra.sweep.dir), config.objective, self.jobs)
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # for jobs in other processes

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(sweep.summarise)
        with one_line_errors():
            if sweep.summarise(Path(config.hydra.sweep.dir), config.objective, self.jobs):
                sys.exit(1)


def note_jobs(launcher: Any, jobs: dict[int, list[str]]) -> None:
    """Let the class of a launcher note the overrides of the `jobs` that it starts, by number: no file tells of one that
    dies before it begins, and Hydra tells nobody."""
    launch = launcher.launch

    def noted(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        jobs.update(enumerate(map(list, job_overrides), initial_job_idx))
        return launch(self, job_overrides, initial_job_idx)

    launcher.launch = noted


def forced(arguments: Sequence[str]) -> list[str]:
    """The command line; where it resumes a run, with ++ before each key, which is the run's: the default configuration,
    which Hydra reads, may not have it."""
    resumes = any(argument.startswith("resume=") for argument in arguments)
    return [re.sub(r"^(?!hydra\.)(?=\w+\.[\w.]+=)", "++", argument) if resumes else argument for argument in arguments]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    run_dir, overrides = Path(job.runtime.output_dir), job.overrides.task
    if job.mode == RunMode.MULTIRUN:
        return job_of_sweep(cfg, run_dir, overrides, job.job.num)
    return launch(cfg, run_dir, overrides)


if __name__ == "__main__":
    sys.argv[1:] = forced(sys.argv[1:])
    run_main(main)
