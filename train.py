"""Train an energy-based model by contrastive divergence:  python train.py [experiment=tutorial] [key=value …]"""

import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ebm import check, checkpoint, figures, metrics
from ebm.buffer import ReplayBuffer
from ebm.cli import one_line_errors, pick_device
from ebm.data import Batches, Dataset
from ebm.sampler import SGLD, uniform_noise
from ebm.tracking import Tracker


def check_numbers(cfg: DictConfig) -> None:
    """ValueError for a number of the loop that is out of range, naming its key."""
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    if cfg.train.epochs is cfg.train.max_steps is cfg.train.max_minutes is None:
        raise ValueError("one of train.epochs, train.max_steps and train.max_minutes must be set, got none")
    for key in ("epochs", "max_steps"):
        if cfg.train[key] is not None:
            check.number(f"train.{key}", cfg.train[key], 1, integer=True)
    if cfg.train.max_minutes is not None:
        check.number("train.max_minutes", cfg.train.max_minutes, 0, open_low=True)
    check.number("train.grad_norm_clip", cfg.train.grad_norm_clip, 0, open_low=True)
    for key in ("log_every", "validate_every_epochs", "sample_every_epochs", "sample_steps", "eval_batch_size"):
        check.number(f"train.{key}", cfg.train[key], 1, integer=True)


def build_energy(cfg: DictConfig, dataset: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """The energy, its weights drawn from the seed, and the plain dict that builds it again."""
    config: Any = OmegaConf.to_container(cfg.energy, resolve=True)
    config["shape"] = list(dataset.shape)
    with torch.random.fork_rng(devices=[]):  # constructors of modules take no generator
        torch.set_rng_state(torch.Generator().manual_seed(cfg.seed).get_state())
        return instantiate(config, _convert_="all"), config


def validate(energy: nn.Module, real: Tensor, noise: Tensor, noise_1024: Tensor, **how: Any) -> dict[str, float]:
    """Mean score of test images, of as many noise images, noise − real, and of 1024 noise images."""
    score_real = float(metrics.scores(energy, real, **how).mean())
    score_noise = float(metrics.scores(energy, noise, **how).mean())
    return {
        "val/cd": score_noise - score_real,
        "val/score_real": score_real,
        "val/score_noise": score_noise,
        "noise/score": float(metrics.scores(energy, noise_1024, **how).mean()),
    }


def draw_samples(
    folder: Path, step: int, energy: nn.Module, sampler: SGLD, buffer: ReplayBuffer, steps: int, seed: int
) -> dict[str, Path]:
    """PNG files of 8 chains from noise, each a strip of 8 snapshots, and of 32 random chains of the buffer."""
    device = buffer.chains.device
    generator = torch.Generator(device).manual_seed(seed)  # the same start each time, to compare over training
    noise = uniform_noise((8, *buffer.chains.shape[1:]), generator)
    every = max(steps // 8, 1)
    trace = sampler.trace(energy, noise, generator, every=every, steps=steps)[1:]
    chosen = torch.randperm(buffer.size, generator=generator, device=device)[:32]
    folder.mkdir(exist_ok=True)
    if buffer.chains.dim() != 4:  # vectors: their first two components
        file = folder / f"points_{step:06d}.png"
        points = sampler(energy, uniform_noise((2048, *buffer.chains.shape[1:]), generator), generator, steps)
        figures.points(file, {"samples": points[:, :2], "buffer": buffer.chains[: buffer.size][-2048:, :2]})
        return {"samples/points": file}
    files = {name: folder / f"{name}_{step:06d}.png" for name in ("generation", "buffer")}
    figures.strips(files["generation"], trace, [min(every * (i + 1), steps) for i in range(len(trace))])
    figures.grid(files["buffer"], buffer.chains[chosen])
    return {f"samples/{name}": file for name, file in files.items()}


def train(cfg: DictConfig, run_dir: Path) -> None:
    """Build the parts, run the loop, leave config.yaml, metrics.jsonl, checkpoints/ and samples/ in `run_dir`."""
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_numbers(cfg)
    device = pick_device(cfg.device)
    sampler: SGLD = instantiate(cfg.sampler, _convert_="all")
    loss_function = instantiate(cfg.loss, _convert_="all")
    scheduler = instantiate(cfg.scheduler)
    dataset: Dataset = instantiate(cfg.data)
    energy, energy_config = build_energy(cfg, dataset)
    energy.to(memory_format=torch.channels_last).to(device)  # faster convolutions
    optimizer: torch.optim.Optimizer = instantiate(cfg.optimizer, _partial_=True)(energy.parameters())
    generator = torch.Generator(device).manual_seed(cfg.seed)
    batches = Batches(dataset.train, cfg.train.batch_size, generator)
    buffer: ReplayBuffer = instantiate(cfg.buffer, _partial_=True)(
        dataset.shape, generator, class_means=dataset.class_means
    )
    buffer.check_count(cfg.train.batch_size)

    noise_generator = torch.Generator().manual_seed(cfg.seed + 1)  # the same noise at every validation
    val_noise = uniform_noise((len(dataset.test), *dataset.shape), noise_generator)
    noise_1024 = uniform_noise((1024, *dataset.shape), noise_generator)

    lr = optimizer.param_groups[0]["lr"]
    step, best = 0, float("inf")
    step_limits = [cfg.train.max_steps, cfg.train.epochs and cfg.train.epochs * batches.steps_per_epoch]
    max_steps = min((limit for limit in step_limits if limit), default=None)
    max_seconds = cfg.train.max_minutes and 60 * cfg.train.max_minutes
    seconds = 0.0  # of training steps alone
    sums: dict[str, Tensor] = {}  # of the logs since the last read-back, on the device
    steps_logged, seconds_logged = 0, 0.0

    with (
        Tracker(run_dir, config, **config["wandb"]) as tracker,
        tqdm(total=max_steps, unit="step", dynamic_ncols=True) as bar,
    ):
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        while True:
            epoch, position = divmod(step, batches.steps_per_epoch)
            progress = max(step / max_steps if max_steps else 0.0, seconds / max_seconds if max_seconds else 0.0)
            done = progress >= 1
            epoch_ends = step > 0 and position == 0

            if step > steps_logged and (step % cfg.train.log_every == 0 or done):
                count = step - steps_logged
                numbers = {f"train/{name}": float(total) / count for name, total in sums.items()}
                rate = count / (seconds - seconds_logged)
                numbers["train/lr"] = optimizer.param_groups[0]["lr"]
                numbers["train/images_per_s"] = rate * cfg.train.batch_size
                numbers["train/sgld_steps_per_s"] = rate * sampler.steps
                tracker.log(step, epoch, numbers)
                bar.set_postfix_str(
                    f"loss {numbers['train/loss']:.4f}, score gap {-numbers['train/cd']:+.4f}, "
                    f"{numbers['train/images_per_s']:.0f} images/s"
                )
                sums, steps_logged, seconds_logged = {}, step, seconds

            validates = done or (epoch_ends and epoch % cfg.train.validate_every_epochs == 0)
            if validates:
                numbers = validate(
                    energy, dataset.test, val_noise, noise_1024, batch_size=cfg.train.eval_batch_size, device=device
                )
                tracker.log(step, epoch, numbers)

            if done or (epoch_ends and epoch % cfg.train.sample_every_epochs == 0):
                pictures = draw_samples(
                    run_dir / "samples", step, energy, sampler, buffer, cfg.train.sample_steps, cfg.seed
                )
                for key, file in pictures.items():
                    tracker.log_picture(step, epoch, key, file)

            if validates:
                is_best, best = numbers["val/cd"] < best, min(best, numbers["val/cd"])
                state = {
                    "energy": energy.state_dict(),
                    "energy_config": energy_config,
                    "optimizer": optimizer.state_dict(),
                    "buffer": buffer.state_dict(),
                    "batches": batches.state_dict(),
                    "generator": generator.get_state(),
                    "config": config,
                    "step": step,
                    "epoch": epoch,
                    "best": best,
                }
                checkpoint.save(run_dir / "checkpoints" / "last.pt", state)
                if is_best:
                    checkpoint.save(run_dir / "checkpoints" / "best.pt", state)

            if done:
                break

            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = lr * scheduler(epoch, progress)
            x_data = batches.next()
            chains, places, ages = buffer.draw(len(x_data), generator)
            x_model = sampler(energy, chains, generator)
            buffer.put(x_model, places, ages + sampler.steps)
            loss, logs = loss_function(energy, x_data, x_model, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            logs["grad_norm"] = nn.utils.clip_grad_norm_(energy.parameters(), cfg.train.grad_norm_clip)
            optimizer.step()
            sums = {name: sums[name] + value if name in sums else value for name, value in logs.items()}
            step += 1
            bar.update()
            seconds += time.perf_counter() - start

    print_whereabouts(run_dir, pictures, tracker)


def print_whereabouts(run_dir: Path, pictures: dict[str, Path], tracker: Tracker) -> None:
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    print(f"pictures     {' '.join(str(shown / 'samples' / file.name) for file in pictures.values())}")
    print(f"checkpoint   {shown}/checkpoints/last.pt")
    if tracker.wandb_dir:
        print(f"W&B run      {tracker.wandb_dir}")
    print(f"try next     python sample.py checkpoint={shown}")
    print(f"             python evaluate.py checkpoint={shown}")


def launch(cfg: DictConfig, run_dir: Path) -> None:
    with one_line_errors():
        try:
            train(cfg, run_dir)
        finally:
            if not any(run_dir.iterdir()):
                run_dir.rmdir()  # nothing came of it: leave no empty directory


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    launch(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
