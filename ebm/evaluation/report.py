"""One page to read: tables and pictures in a single HTML file that needs nothing else."""

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ebm.evaluation import figures
from ebm.files import whole_files
from ebm.running.tracking import last_values

COMPARED = ("auroc", "frechet", "kid", "class_entropy", "kl", "nll", "bits_per_dim")  # the panels of a comparison
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
    runs = {}
    for folder in folders:
        files = [file for pattern in ("metrics.json", "evaluation/*/metrics.json") for file in folder.glob(pattern)]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"compare: {folder} holds no metrics.json of an evaluation: run it first")
        file = max(files, key=lambda file: file.stat().st_mtime_ns)
        try:
            runs[folder] = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"compare: {file} holds no numbers of an evaluation: {error}") from error
    paths = {run: Path(numbers.get("checkpoint", run)) for run, numbers in runs.items()}
    if len(set(paths.values())) < len(paths):  # one checkpoint evaluated in several ways
        paths = {run: run for run in runs}
    alike = {part for part in paths[folders[0]].parts if all(part in path.parts for path in paths.values())}
    short = {run: "/".join(p for p in path.parts if p not in alike) or str(path) for run, path in paths.items()}
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
    if not rows:
        raise ValueError("compare: the evaluations hold no numbers to compare")
    pictures = {"compare.png": "Dots: values; lines: 95 % intervals."}
    section = Section("Comparison", ["", *short.values()], rows, [], pictures)
    with whole_files(out) as aside:
        figures.intervals(aside / "compare.png", panels)
        write(aside / "compare.html", "Comparison", [section], {}, {})
        numbers = {name: runs[run] for run, name in short.items()}
        (aside / "compare.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    print(f"{section.text()}\ntable        {out / 'compare.html'}\nfigure       {out / 'compare.png'}")


def sweep(folder: Path, objective: str, started: Mapping[int, Sequence[str]]) -> int:
    """Of a sweep's jobs, the directories in `folder` that hold a job.json, and those `started`, by number: summary.csv
    (overrides, last metrics, why it failed), samples.png, coordinates.png and summary.html with both; the table on the
    screen. How many jobs failed."""
    jobs = {file.parent: json.loads(file.read_text()) for file in folder.rglob("job.json")}
    never = {"objective": None, "error": "it ended before it began"}
    for number in started.keys() - {job["number"] for job in jobs.values()}:
        jobs[folder / str(number)] = never | {"number": number, "overrides": started[number]}
    jobs = dict(sorted(jobs.items(), key=lambda item: item[1]["number"]))
    if not jobs:
        return 0
    given = {run: dict(override.split("=", 1) for override in job["overrides"]) for run, job in jobs.items()}
    keys = list(dict.fromkeys(key for values in given.values() for key in values))
    swept = [key for key in keys if len({values.get(key) for values in given.values()}) > 1]
    numbers = {run: last_values(run) for run in jobs}
    logged = list(dict.fromkeys(key for values in numbers.values() for key in values))
    settings = {run: [_short(given[run].get(key, "—")) for key in swept] for run in jobs}
    told = [key for key in dict.fromkeys((objective, "val/cd", "train/cd", "chain/saturation")) if key in logged]
    rows, tiles = [], {}
    for run, job in jobs.items():
        rows.append([run.name, *settings[run], *(shown(numbers[run], key) for key in told), job["error"] or "ok"])
        label = "\n".join([f"job {run.name}", *(f"{key}={x}" for key, x in zip(swept, settings[run], strict=True))])
        files = [*sorted(run.glob("samples/points_*.png")), *sorted(run.glob("samples/generation_*.png"))]
        tiles[label] = (files[-1] if files else None, job["error"])
    pictures = {"samples.png": "The last samples of every job; a red title: it failed."}
    if swept:
        pictures = {"coordinates.png": f"Every job's overrides and its {objective}; grey: it failed."} | pictures
    failed = sum(job["error"] is not None for job in jobs.values())
    notes = [f"{len(jobs)} jobs, {failed} failed"]
    section = Section("Sweep", ["job", *swept, *told, "state"], rows, notes, pictures)
    with whole_files(folder) as aside:
        with open(aside / "summary.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["job", *keys, "objective", *logged, "error"])
            for run, job in jobs.items():
                cells = [*map(given[run].get, keys), job["objective"], *map(numbers[run].get, logged), job["error"]]
                writer.writerow([run.name, *cells])
        figures.contact_sheet(aside / "samples.png", tiles)
        if swept:
            results = ["nan" if job["objective"] is None else f"{job['objective']:.4g}" for job in jobs.values()]
            lines = [[*settings[run], result] for run, result in zip(jobs, results, strict=True)]
            figures.parallel_coordinates(aside / "coordinates.png", [*swept, objective], lines)
        write(aside / "summary.html", f"Sweep {folder.name}", [section], {}, {})
    print(f"{section.text()}\ntable        {folder / 'summary.csv'}\nreport       {folder / 'summary.html'}")
    return failed


def _short(value: str) -> str:
    """0.0203 of 0.020304864388351435."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
