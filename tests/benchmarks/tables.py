"""The tables of results in the pages, generated from the numbers they stand on:

python tests/benchmarks/tables.py            writes each between its <!-- table: NAME --> and <!-- end -->
python tests/benchmarks/tables.py --check    exits 1 and names the pages where text and numbers have parted

A table is a file results/NAME.json: its columns (key and heading), its rows (key and number or text, which are copied),
and the command, machine and date that made them. A row with a `card` takes what it does not give from
ebm/weights/CARD.json. A row with a null waits for its measurement and is left out. `quality_time` comes from
.readme/quality_time.json, which quality.py writes.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ebm import load_energy

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *sorted(page for part in ("conf", "ebm", "tests") for page in (ROOT / part).rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURES = {  # of a card: key of evaluate.py, digits
    "accuracy": ("classification/accuracy", 4),
    "calibration": ("classification/calibration_error", 4),
    "nll": ("classification/nll", 3),
    "distance": ("frechet/classifier-n2000/256", 2),
    "buffer": ("frechet/classifier-n2000/64/buffer", 2),
    "real": ("frechet/classifier-n2000/real", 2),
    "half": ("auroc/tiny", 3),
    "turned": ("auroc/rotated90", 3),
    "upside_down": ("auroc/rotated", 3),
    "halves": ("auroc/halves", 3),
    "noisy": ("auroc/noisy", 3),
}
WITH_INTERVAL = ("accuracy", "distance")


def of_card(name: str) -> dict[str, str]:
    """What the card of weights that ship says, as the cells of a row."""
    card = json.loads((ROOT / "ebm/weights" / f"{name}.json").read_text())
    figures, data = card["figures"], card["recipe"]["data"].get("name", "mnist5k")
    energy = load_energy(name)
    kind = {"ConvEnergy": "cnn", "ResNetEnergy": "resnet"}[type(energy).__name__]
    parameters = sum(parameter.numel() for parameter in energy.parameters())
    cells = {
        "what": f"`{name}`",
        "data": data,
        "network": f"{kind}, {parameters / 1000:.0f} k",
        "minutes": str(card["training_minutes"]),
    }
    other = "auroc/mnist" if data == "FashionMNIST" else "auroc/fashion_mnist"
    for column, (key, digits) in (FIGURES | {"other": (other, 3)}).items():
        cells[column] = f"{figures[key]:.{digits}f}" if key in figures else ""
        if column in WITH_INTERVAL and cells[column]:
            low, high = figures[f"{key}/ci95"]
            cells[column] += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return cells


def quality_time() -> dict[str, Any]:
    """The last point of each run of .readme/quality_time.json."""
    numbers = json.loads((ROOT / ".readme/quality_time.json").read_text())
    rows = []
    for name, (distance, entropy) in (("real digits", numbers["real"]), ("published weights", numbers["published"])):
        rows.append({"what": name, "step": "", "noise": f"{distance:.1f}", "entropy": f"{entropy:.3f}", "buffer": ""})
    for name, points in numbers.items():
        if name in ("real", "published"):
            continue
        recipe, _, seed = name.rpartition(" ")
        last = points[-1]
        rows.append(
            {
                "what": f"{recipe}, seed {seed[-1]}",
                "step": last["step"],
                "noise": f"{last['noise'][0]:.1f}",
                "entropy": f"{last['noise'][1]:.3f}",
                "buffer": f"{last['buffer'][0]:.1f}",
            }
        )
    headings = ("", "training steps", "distance, from noise", "class entropy", "distance of the buffer's chains")
    return {
        "columns": dict(zip(("what", "step", "noise", "entropy", "buffer"), headings, strict=True)),
        "rows": rows,
        "command": "python tests/benchmarks/quality.py data MNIST.ckpt quality_time.png NAME=MS:RUN_A,RUN_B,RUN_C …",
        "date": "2026-11-24",
        "note": "1,000 samples, 256 steps from noise",
    }


def origin(table: dict[str, Any]) -> str:
    """The line below a table: what the numbers are, and by which command, where and when they were made."""
    commands = table.get("command", [])
    commands = [commands] if isinstance(commands, str) else commands
    made = ["by " + ", ".join(f"`{command}`" for command in commands)] if commands else []
    made += [f"on {table['machine']}"] if "machine" in table else []
    made += [table["date"]] if "date" in table else []
    note = [table["note"]] if "note" in table else []
    return ". ".join(part[0].upper() + part[1:] for part in [*note, ", ".join(made)] if part) + "."


def rendered(name: str) -> str:
    """The table as Markdown, its origin below it."""
    table = quality_time() if name == "quality_time" else json.loads((RESULTS / f"{name}.json").read_text())
    columns = table["columns"]
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in table["rows"]:
        cells = (of_card(row["card"]) if "card" in row else {}) | row
        if None not in cells.values():
            lines.append("| " + " | ".join(str(cells[key]) for key in columns) + " |")
    return "\n".join(lines) + "\n\n" + origin(table) + "\n"


def generated(text: str) -> str:
    """The page with its tables as the numbers have them."""
    return MARKED.sub(lambda found: f"{found[1]}{rendered(found[2])}{found[3]}", text)


def main(check: bool) -> int:
    parted = 0
    for page in PAGES:
        text = page.read_text()
        fresh = generated(text)
        if fresh == text:
            continue
        if check:
            parted += 1
            print(f"{os.path.relpath(page, ROOT)} is not what the numbers say; tests/benchmarks/tables.py writes it")
        else:
            page.write_text(fresh)
            print(f"wrote {os.path.relpath(page, ROOT)}")
    return int(parted > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
