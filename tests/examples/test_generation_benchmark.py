"""The benchmark of generation on a tiny model on the CPU: every row that does not need a GPU gives a figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "generation.py"
ROWS = [["batch-1", "mixed", "transformers-16"], ["peft-1", "peft-mixed"], ["first-answer"]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_row_has_a_figure(rows):
    environment = {**os.environ, "TINY_GENERATION": "8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *rows, "--calls", "1", "--in-process"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\| `([a-z0-9-]+)`.*? \| ([0-9,.]+) \|", output, re.M)
    assert {name for name, _ in lines} == set(rows)
    assert all(float(figure.replace(",", "")) > 0 for _, figure in lines)
