"""One page to read: tables and pictures in a single HTML file that needs nothing else."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ebm import check
from ebm.evaluation import figures
from ebm.files import whole_files

COMPARED = ("auroc", "frechet", "kernel", "class_entropy", "kl", "nll", "bits_per_dim")  # the panels of a comparison
STYLE = Path(__file__).with_name("report.css").read_text()


@dataclass
class Section:
    """A part of an evaluation: a table, what it means, and the pictures' captions by file name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    pictures: Mapping[str, str]

    def text(self) -> str:
        """The table for a screen: first column to the left, the others to the right."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        row = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
        return "\n".join([*(row.format(*line).rstrip() for line in lines), *self.notes])

    def html(self, folder: Path) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows = [row("th", self.header), *(row("td", cells) for cells in self.rows)]
        body = [f"<h2>{escape(self.title)}</h2>", "<table>", *rows, "</table>"]
        body += [f'<p class="note">{escape(note)}</p>' for note in self.notes]
        for name, caption in self.pictures.items():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            body.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
        return "\n".join(body)


def triple(numbers: Mapping[str, Any], key: str) -> list[float]:
    """(value, low, high) for a figure; all the value where there is no interval."""
    return [numbers[key], *numbers.get(f"{key}/ci95", [numbers[key]] * 2)]


def shown(numbers: Mapping[str, Any], key: str, digits: int = 4, interval: bool = False) -> str:
    """The number for a table, with its interval where it has one and that is asked for."""
    if key not in numbers:
        return "—"
    low_high = numbers.get(f"{key}/ci95") if interval else None
    between = " [" + ", ".join(f"{value:.{digits}f}" for value in low_high) + "]" if low_high else ""
    return f"{numbers[key]:.{digits}f}{between}"


def write(path: Path, title: str, sections: Sequence[Section], skipped: Mapping[str, str], protocol: Any) -> None:
    """The page at `path`, pictures embedded from its folder; what was skipped and the protocol at the end."""
    body = [section.html(path.parent) for section in sections]
    if skipped:
        rows = [f'<tr><td>{escape(k)}</td><td class="text">{escape(v)}</td></tr>' for k, v in skipped.items()]
        body += ["<h2>Skipped</h2>", "<table>", *rows, "</table>"]
    if protocol:
        body += ["<h2>Protocol</h2>", f"<pre>{escape(json.dumps(protocol, indent=2))}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>\n{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>\n'
    path.write_text(page + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")


def compare(folders: Sequence[Path], out: Path) -> None:
    """One table (compare.html, compare.json) and one figure (compare.png) in `out` of evaluations, each a folder with
    metrics.json or a run directory with evaluation/*/metrics.json, of which the newest counts.

    Raises ValueError for a folder that holds none.
    """
    runs = {folder: _newest_numbers(folder) for folder in folders}
    short = _short_names(runs)
    panels: dict[str, dict[str, dict[str, Sequence[float]]]] = {}
    rows = []
    for key in dict.fromkeys(key for numbers in runs.values() for key in numbers):
        panel, _, row = key.partition("/")
        if panel not in COMPARED or key.endswith("/ci95") or (panel == "auroc" and "/" in row):
            continue
        rows.append([key, *(shown(numbers, key) for numbers in runs.values())])
        for run, numbers in runs.items():
            if key in numbers:
                panels.setdefault(panel, {}).setdefault(short[run], {})[row or panel] = triple(numbers, key)
    check.that(rows, "compare: the evaluations hold no numbers to compare")
    pictures = {"compare.png": "Dots: values; lines: 95 % intervals."}
    section = Section("Comparison", ["", *short.values()], rows, [], pictures)
    with whole_files(out) as aside:
        figures.intervals(aside / "compare.png", panels)
        write(aside / "compare.html", "Comparison", [section], {}, {})
        numbers = {name: runs[run] for run, name in short.items()}
        (aside / "compare.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    print(f"{section.text()}\ntable        {out / 'compare.html'}\nfigure       {out / 'compare.png'}")


def _newest_numbers(folder: Path) -> dict[str, Any]:
    files = [*folder.glob("metrics.json"), *folder.glob("evaluation/*/metrics.json")]
    files = [file for file in files if file.is_file()]
    check.that(files, f"compare: {folder} holds no metrics.json of an evaluation: run it first")
    file = max(files, key=lambda file: file.stat().st_mtime_ns)
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"compare: {file} holds no numbers of an evaluation: {error}") from error


def _short_names(runs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """What each run is called beside the others: the parts of its checkpoint's path that are not in every path."""
    paths = {run: Path(numbers.get("checkpoint", run)) for run, numbers in runs.items()}
    if len(set(paths.values())) < len(paths):  # one checkpoint evaluated in several ways
        paths = {run: run for run in runs}
    in_all = set.intersection(*(set(path.parts) for path in paths.values()))
    names = {run: "/".join(part for part in path.parts if part not in in_all) for run, path in paths.items()}
    return {run: name or str(paths[run]) for run, name in names.items()}
