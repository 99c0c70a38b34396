"""One page to read: tables and pictures in a single HTML file that needs nothing else."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ebm import figures

COMPARED = ("auroc", "frechet", "kid", "class_entropy", "kl", "nll", "bits_per_dim")  # the panels of a comparison
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: #222 }
table { display: block; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0; font-size: 13px }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.text { white-space: normal; text-align: left }
figure { margin: 1.5em 0 } img { max-width: 100%; height: auto } figcaption, .note { color: #555; font-size: 13px }
pre { font-size: 12px; background: #f6f6f6; padding: 1em; overflow-x: auto }
"""


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
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        cells = [
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        return "\n".join(["  ".join(line).rstrip() for line in cells] + list(self.notes))

    def html(self, folder: Path) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = [f"<h2>{escape(self.title)}</h2>", "<table>", row("th", self.header)]
        body += [row("td", cells) for cells in self.rows] + ["</table>"]
        body += [f'<p class="note">{escape(note)}</p>' for note in self.notes]
        for name, caption in self.pictures.items():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            body.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
        return "\n".join(body)


def write(
    path: Path, title: str, sections: Sequence[Section], skipped: Mapping[str, str], protocol: Mapping[str, Any]
) -> None:
    """The page at `path`, pictures embedded from its folder; what was skipped and the protocol at the end."""
    body = [section.html(path.parent) for section in sections]
    if skipped:
        body += ["<h2>Skipped</h2>", "<table>"]
        body += [f'<tr><td>{escape(k)}</td><td class="text">{escape(v)}</td></tr>' for k, v in skipped.items()]
        body.append("</table>")
    if protocol:
        body += ["<h2>Protocol</h2>", f"<pre>{escape(json.dumps(protocol, indent=2))}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
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
        if not files:
            raise ValueError(f"compare: {folder} holds no metrics.json of an evaluation: run it first")
        runs[folder] = json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())
    paths = {run: Path(numbers.get("checkpoint", run)) for run, numbers in runs.items()}
    if len(set(paths.values())) < len(paths):  # one checkpoint evaluated in several ways
        paths = {run: run for run in runs}
    alike = {part for part in paths[folders[0]].parts if all(part in path.parts for path in paths.values())}
    short = {
        run: "/".join(part for part in path.parts if part not in alike) or str(path) for run, path in paths.items()
    }
    panels: dict[str, dict[str, dict[str, Sequence[float]]]] = {}
    rows: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for numbers in runs.values() for key in numbers):
        panel, _, row = key.partition("/")
        if panel not in COMPARED or key.endswith("/ci95") or (panel == "auroc" and "/" in row):
            continue
        rows[key] = [key, *(f"{numbers[key]:.4f}" if key in numbers else "—" for numbers in runs.values())]
        for run, numbers in runs.items():
            if key in numbers:
                triple = [numbers[key], *numbers.get(f"{key}/ci95", [numbers[key]] * 2)]
                panels.setdefault(panel, {}).setdefault(short[run], {})[row or panel] = triple
    if not rows:
        raise ValueError("compare: the evaluations hold no numbers to compare")
    figures.intervals(out / "compare.png", panels)
    pictures = {"compare.png": "Dots: values; lines: 95 % intervals."}
    section = Section("Comparison", ["", *(short[run] for run in runs)], list(rows.values()), [], pictures)
    write(out / "compare.html", "Comparison", [section], {}, {})
    (out / "compare.json").write_text(json.dumps({short[run]: runs[run] for run in runs}, indent=2) + "\n")
    print(f"{section.text()}\ntable        {out / 'compare.html'}\nfigure       {out / 'compare.png'}")
