"""benchmarks/colour.py: three recipes at the same price, and their table."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted_and_compares_equal_minutes(tmp_path, cifar10_folder, data_root):
    out, where = tmp_path / "out", ["--others", str(data_root), "--device", "cpu"]
    tiny = ["data.image_size=16", "energy.width=2", "energy.stem=2", "train.batch_size=32"]

    def command(minutes, *arguments):
        script = str(ROOT / "tests/benchmarks/colour.py")
        return [sys.executable, script, str(out), str(cifar10_folder), str(minutes), *where, *tiny, *arguments]

    metrics = out / "matching/metrics.jsonl"
    kept = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(0.2, "--only", "matching"), start_new_session=True, **kept) as first:
        while not metrics.is_file() or not metrics.read_text():
            assert first.poll() is None
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGINT)  # Ctrl-C
        said, _ = first.communicate()  # until the last of both has closed it
    assert first.returncode != 0 and "SIGINT: saved at step" in said and not (out / "colour.json").exists()

    subprocess.run(command(0.2), check=True)
    table = json.loads((out / "colour.json").read_text())
    assert [row["what"] for row in table["rows"]] == ["matching", "matching_then_divergence", "divergence"]
    for row in table["rows"]:
        assert row.keys() == table["columns"].keys()
        assert float(row["distance"]) > float(row["real"]) > 0 and float(row["in_blurred"]) > 0

    other = subprocess.run(command(0.3), capture_output=True, text=True)
    assert other.returncode != 0 and "holds runs of 0.2 minutes" in other.stderr
