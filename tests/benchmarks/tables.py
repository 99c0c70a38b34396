"""The tables of results in the pages, generated from the numbers they stand on:

python tests/benchmarks/tables.py            writes each between its <!-- table: NAME --> and <!-- end -->
python tests/benchmarks/tables.py --check    exits 1 and names the pages where text and numbers have parted

A table is a file results/NAME.json: its columns (key and heading), its rows (key and number or text, which are copied),
and the command, machine and date that made them. A row with a `card` takes what it does not give from
ebm/weights/CARD.json, or cards/CARD.json of weights that do not ship: of the first seed, which is the one that ships,
or as `seeds` says, the median of `all` with all of them, or a row for `each`. In the columns named by `figures` cells
are formats of the keys of cards/CARD.json, as {auroc/noise:.3f}. A row with a null, or whose card is not there yet,
waits for its measurement and is left out.
"""

import json
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from ebm.evaluation import features
from ebm.running import checkpoint

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
    "blurred": ("auroc/blurred", 3),
    "stays": ("chains/same_class/labelled", 3),
    "any": ("frechet/{judge}-n2000/256/any", 1),
    "any_entropy": ("class_entropy/256/any", 3),
    "kl": ("kl", 3),
}
WITH_INTERVAL = ("accuracy", "distance")  # of one seed
NETWORKS = {"ConvEnergy": "cnn", "ResNetEnergy": "resnet", "MLPEnergy": "mlp"}


def card_of(name: str) -> dict[str, Any] | None:
    """The card of weights that ship, or of others; None where there is none yet."""
    files = [file for folder in (checkpoint.WEIGHTS, CARDS) if (file := folder / f"{name}.json").is_file()]
    return json.loads(files[0].read_text()) if files else None


def cell(column: str, key: str, digits: int, numbers: list[dict[str, Any]]) -> str:
    """A number of one seed; of several the median, and all where they differ."""
    if key not in numbers[0]:
        return ""
    texts = [f"{of_seed[key]:.{digits}f}" for of_seed in numbers]
    if len(numbers) == 1 and column in WITH_INTERVAL:
        low, high = numbers[0][f"{key}/ci95"]
        return f"{texts[0]} [{low:.{digits}f}, {high:.{digits}f}]"
    middle = median(of_seed[key] for of_seed in numbers)
    return texts[0] if len(set(texts)) == 1 else f"{middle:.{digits}f} ({', '.join(texts)})"


def of_card(name: str, card: dict[str, Any], seeds: list[str]) -> dict[str, str]:
    """What the card of weights says of these seeds, as the cells of a row."""
    numbers, cells = [card["numbers"][seed] for seed in seeds], {"what": f"`{name}`", "seed": ", ".join(seeds)}
    if "command" in card:
        file = checkpoint.WEIGHTS / f"{name}.pt"
        energy = checkpoint.load_energy(file)
        parameters = sum(parameter.numel() for parameter in energy.parameters())
        cells |= {
            "data": checkpoint.load(file)["config"]["data"].get("name", "mnist5k"),
            "network": f"{NETWORKS[type(energy).__name__]}, {parameters / 1000:.0f} k",
            "minutes": cell("minutes", "minutes", 1, [{"minutes": card["minutes"][seed]} for seed in seeds]),
            "rollbacks": str(sum(len(card["guard"][seed]) for seed in seeds)),
        }
    judge = (card["protocol"]["judge"] or {"name": None})["name"]
    other = "auroc/mnist" if judge == "fashion_mnist" else "auroc/fashion_mnist"
    for column, (key, digits) in (FIGURES | {"other": (other, 3)}).items():
        cells[column] = cell(column, key.format(judge=judge), digits, numbers)
    cells["distance"] = cells["distance"] or f"KL {cells['kl']} nats"  # of points in the plane
    return cells


def filled(row: dict[str, Any], seeds: str) -> list[dict[str, Any]]:
    """The row, with what its card says of the `first` seed or of `all`, or a row for `each`; none without the card."""
    if "card" not in row:
        return [row]
    if not (card := card_of(row["card"])):
        return []
    every = list(card["numbers"])
    wanted = {"first": [every[:1]], "all": [every], "each": [[seed] for seed in every]}[seeds]
    return [of_card(row["card"], card, those) | row for those in wanted]


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
        column: next(iter(json.loads((CARDS / f"{card}.json").read_text())["numbers"].values()))
        for column, card in table.get("figures", {}).items()
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for cells in [cells for row in table["rows"] for cells in filled(row, table.get("seeds", "first"))]:
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
