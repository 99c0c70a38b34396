"""Score data sets with an energy:  python evaluate.py checkpoint=RUN_DIR [data.root=…] [key=value …]"""

import json

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from ebm import check, checkpoint, figures, metrics
from ebm.cli import one_line_errors, output_folder, pick_device
from ebm.data import Dataset, scaled
from ebm.sampler import uniform_noise
from sample import dataset_of


def outliers(dataset: Dataset, noise_std: float, seed: int) -> dict[str, Tensor]:
    """The tutorial's sets, each (N, C, H, W): train and test images, uniform noise, and the test images with
    N(0, noise_std²) noise, rotated by 180°, and at half size in the lower right corner of a black image."""
    generator = torch.Generator().manual_seed(seed)
    test = scaled(dataset.test)
    tiny = torch.full_like(test, -1)
    half = test[..., ::2, ::2]
    tiny[..., -half.shape[-2] :, -half.shape[-1] :] = half
    return {
        "train": dataset.train,
        "test": dataset.test,
        "noise": uniform_noise(test.shape, generator),
        "noisy": (test + noise_std * torch.randn(test.shape, generator=generator)).clamp(-1, 1),
        "rotated": test.rot90(2, dims=(-2, -1)),
        "tiny": tiny,
    }


def evaluate(cfg: DictConfig) -> None:
    batch_size = check.number("batch_size", cfg.batch_size, 1, integer=True)
    check.number("seed", cfg.seed, 0, 2**63 - 2, integer=True)
    check.number("noise_std", cfg.noise_std, 0)
    device = pick_device(cfg.device)
    state = checkpoint.load(cfg.checkpoint)
    energy = checkpoint.build_energy(state, cfg.checkpoint).to(device)
    dataset = dataset_of(cfg, state)
    sets = outliers(dataset, cfg.noise_std, cfg.seed)
    scores = {name: metrics.scores(energy, x, batch_size, device) for name, x in sets.items()}

    numbers: dict[str, float] = {}
    for name, values in scores.items():
        numbers[f"score/{name}/mean"] = float(values.mean())
        numbers[f"score/{name}/std"] = float(values.std())
    for name, values in scores.items():
        numbers[f"auroc/{name}"] = metrics.auroc(scores["test"], values)

    out = output_folder(cfg.out, cfg.checkpoint, "evaluation")
    figures.scores(out / "scores.png", scores)
    if len(dataset.shape) == 3:
        shown = {name: scaled(x[:4]) for name, x in sets.items() if name != "train"}
        figures.scored_images(out / "examples.png", shown, {name: scores[name][:4] for name in shown})
    (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{'set':10}{'images':>8}{'score':>10}{'± std':>9}{'AUROC':>9}")
    for name, values in scores.items():
        mean, std, auroc = (numbers[key] for key in (f"score/{name}/mean", f"score/{name}/std", f"auroc/{name}"))
        print(f"{name:10}{len(values):8}{mean:10.4f}{std:9.4f}{auroc:9.4f}")
    print(f"score: −E(x), higher is more likely.  AUROC: of the {dataset.name} test images against the set")
    print(f"numbers      {out / 'metrics.json'}")
    print(f"pictures     {' '.join(str(file) for file in sorted(out.glob('*.png')))}")


def launch(cfg: DictConfig) -> None:
    with one_line_errors():
        evaluate(cfg)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    launch(cfg)


if __name__ == "__main__":
    main()
