"""The pages' tables are what the cards and benchmark files say."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import tables


def test_text_and_numbers_agree():
    script = [sys.executable, str(ROOT / "tests/benchmarks/tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["ebm/weights", "tests/benchmarks"])  # of cards, of a file
def test_a_changed_digit_is_seen(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / page / "README.md").read_text()
    table = text.index("<!-- table: ")
    digit = re.compile(r"\d").search(text, text.index("\n|---", table))
    assert digit and digit.start() < text.index("<!-- end -->", table)
    changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
    copy = tmp_path / "README.md"
    copy.write_text(changed)
    monkeypatch.setattr(tables, "PAGES", [copy])
    assert tables.main(check=True) == 1
    assert "README.md is not what the numbers say" in capsys.readouterr().out
    assert copy.read_text() == changed  # a check writes nothing
    tables.main(check=False)
    assert copy.read_text() == text


def test_of_several_seeds_the_median_and_each(monkeypatch):
    numbers = {"0": 1.97, "1": 1.8, "2": 1.846}
    card = {
        "protocol": {"judge": {"name": "mnist"}},
        "numbers": {
            seed: {"frechet/mnist-n2000/256": value, "frechet/mnist-n2000/256/ci95": [1, 2], "auroc/halves": 0.9}
            for seed, value in numbers.items()
        },
    }
    monkeypatch.setattr(tables, "card_of", {"mine": card}.get)
    distances = {
        seeds: [cells["distance"] for cells in tables.filled({"card": "mine"}, seeds)]
        for seeds in ("first", "all", "each")
    }
    assert distances == {
        "first": ["1.97 [1.00, 2.00]"],
        "all": ["1.85 (1.97, 1.80, 1.85)"],
        "each": ["1.97 [1.00, 2.00]", "1.80 [1.00, 2.00]", "1.85 [1.00, 2.00]"],
    }
    assert tables.filled({"card": "mine"}, "all")[0]["halves"] == "0.900"  # the same of all
    assert tables.filled({"card": "not there yet"}, "all") == []


def test_every_file_of_results_is_shown_on_a_page():
    shown = {name for page in tables.PAGES for _, name, _ in tables.MARKED.findall(page.read_text())}
    assert {file.stem for file in tables.RESULTS.glob("*.json")} <= shown
