"""Make a judge that ships (ebm/evaluation/judges), on two cores in an hour or less:

python tests/benchmarks/judge.py mnist data        # ROOT as data.root has it: torchvision's files
python tests/benchmarks/judge.py fashion_mnist data
python tests/benchmarks/judge.py cifar10 data      # or a folder of CIFAR-10's images, train/ and test/

Learns from the training images alone; the judge of MNIST without those that mnist5k, which are of MNIST's, validates
and tests with. Writes NAME.pt, the weights in half precision, and NAME.json, accuracy and how it was made, to OUT or
ebm/evaluation/judges, and prints the hash that ebm/evaluation/features.py pins.
"""

import json
import sys
import time
from pathlib import Path

import torch

from ebm.data import Dataset, image_folder, mnist5k, torchvision_dataset
from ebm.evaluation.features import JUDGES, Classifier, standardise, train_classifier, weights_hash
from ebm.evaluation.metrics import in_batches

HOW = {
    "mnist": {"epochs": 20, "shift": 2},
    "fashion_mnist": {"epochs": 40, "shift": 2, "flip": 0.5},
    "cifar10": {"epochs": 20, "shift": 4, "flip": 0.5},
}


def without(data: Dataset, others: list[torch.Tensor]) -> None:
    """Take `others`, bytes, out of the training images."""
    known = {image.numpy().tobytes() for x in others for image in x}
    stays = torch.tensor([image.numpy().tobytes() not in known for image in data.train])
    data.train, data.train_labels = data.train[stays], data.train_labels[stays]


def accuracy(net: Classifier, x: torch.Tensor, labels: torch.Tensor) -> float:
    return (in_batches(net, x, device=device).argmax(dim=1) == labels).double().mean().item()


name, root, *out = sys.argv[1:]
folder = Path(out[0]) if out else JUDGES
device = "cuda" if torch.cuda.is_available() else "cpu"
if (Path(root) / "train").is_dir():
    data = image_folder(root, image_size=32, channels=3)
else:
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    data = torchvision_dataset(names[name], root)
if name == "mnist":
    small = mnist5k()
    without(data, [small.validation, small.test])
began = time.process_time()
how = {"blocks": 2, "batch_size": 256, "seed": 0} | HOW[name]
with torch.autocast(device, torch.bfloat16, cache_enabled=False):  # a cache would keep the weights of the first step
    net = train_classifier(data, **how, device=device)
net.half().float()  # what the file holds
standardise(net, data.train, device)
net.half().float()
weights = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
card = {
    "accuracy": accuracy(net, data.test, data.test_labels),
    "accuracy_validation": accuracy(net, data.validation, data.validation_labels),
    "images": len(data.train),
    "how": how,
    "command": f"python tests/benchmarks/judge.py {name} data",
    "core_minutes": round((time.process_time() - began) / 60, 1),
    "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    "weights": weights_hash(net.cpu().state_dict()),
}
folder.mkdir(exist_ok=True, parents=True)
torch.save({key: value.cpu().contiguous() for key, value in weights.items()}, folder / f"{name}.pt")
(folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
print(json.dumps(card))
