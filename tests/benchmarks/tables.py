"""The tables of results in the pages, generated from the numbers they stand on:

python tests/benchmarks/tables.py            writes each between its <!-- table: NAME --> and <!-- end -->
python tests/benchmarks/tables.py --check    exits 1 and names the pages where text and numbers have parted

A table is a file results/NAME.json: its columns (key and heading), its rows (key and number or text, which are copied),
and the command, machine and date that made them. A row with a `card` takes what it does not give from
ebm/weights/CARD.json, or cards/CARD.json of weights that do not ship. In the columns named by `figures` cells are
formats of the keys of cards/CARD.json, as {auroc/noise:.3f}. A row with a null waits for its measurement and is left
out.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ebm import load_energy
from ebm.evaluation import features

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CARDS = Path(__file__).parent / "cards"
PAGES = [ROOT / "README.md", *sorted(page for part in ("conf", "ebm", "tests") for page in (ROOT / part).rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURES = {  # of a card: key of evaluate.py, digits
    "accuracy": ("classification/accuracy", 4),
    "calibration": ("classification/calibration_error", 4),
    "nll": ("classification/nll", 3),
    "distance": ("frechet/{judge}-n2000/256", 2),
    "kernel": ("kernel/{judge}-n2000/256", 3),
    "entropy": ("class_entropy/256", 3),
    "real": ("frechet/{judge}-n2000/real", 2),
    "half": ("auroc/tiny", 3),
    "turned": ("auroc/rotated90", 3),
    "upside_down": ("auroc/rotated", 3),
    "halves": ("auroc/halves", 3),
    "noisy": ("auroc/noisy", 3),
}
WITH_INTERVAL = ("accuracy", "distance")


def of_card(name: str) -> dict[str, str]:
    """What the card of weights says, as the cells of a row."""
    ships = ROOT / "ebm/weights" / f"{name}.json"
    card = json.loads((ships if ships.is_file() else CARDS / f"{name}.json").read_text())
    figures, judge, cells = card["figures"], card["protocol"]["judge"]["name"], {"what": f"`{name}`"}
    if "recipe" in card:
        energy = load_energy(name)
        kind = {"ConvEnergy": "cnn", "ResNetEnergy": "resnet"}[type(energy).__name__]
        parameters = sum(parameter.numel() for parameter in energy.parameters())
        cells |= {
            "data": card["recipe"]["data"].get("name", "mnist5k"),
            "network": f"{kind}, {parameters / 1000:.0f} k",
            "minutes": str(card["training_minutes"]),
        }
    other = "auroc/mnist" if judge == "fashion_mnist" else "auroc/fashion_mnist"
    for column, (key, digits) in (FIGURES | {"other": (other, 3)}).items():
        key = key.format(judge=judge)
        cells[column] = f"{figures[key]:.{digits}f}" if key in figures else ""
        if column in WITH_INTERVAL and cells[column]:
            low, high = figures[f"{key}/ci95"]
            cells[column] += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return cells


def judges() -> dict[str, Any]:
    """The judges that ship, from their cards."""
    rows = []
    for name in features.SHIPPED:
        card = json.loads((features.JUDGES / f"{name}.json").read_text())
        cells = {key: f"{card[key]:.4f}" for key in ("accuracy", "accuracy_validation")}
        minutes = f"{card['core_minutes']:.0f}, {card['machine']}"
        rows.append(
            cells
            | {"name": f"`{name}`", "images": card["images"], "minutes": minutes, "command": f"`{card['command']}`"}
        )
    headings = ("`judge=`", "learned from", "accuracy, test", "validation", "minutes of one core", "made by")
    keys = ("name", "images", "accuracy", "accuracy_validation", "minutes", "command")
    return {"columns": dict(zip(keys, headings, strict=True)), "rows": rows, "note": "CIFAR-10 as JPEG files"}


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
    table = judges() if name == "judges" else json.loads((RESULTS / f"{name}.json").read_text())
    columns = table["columns"]
    figures = {
        column: json.loads((CARDS / f"{card}.json").read_text())["figures"]
        for column, card in table.get("figures", {}).items()
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in table["rows"]:
        cells = (of_card(row["card"]) if "card" in row else {}) | row
        cells |= {column: cells[column].format_map(of) for column, of in figures.items()}
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
