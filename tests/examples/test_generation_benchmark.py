"""The benchmark of generation on a tiny model on the CPU: every row that does not need a GPU gives a figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "generation.py"
ROWS = [
    ["batch-1", "mixed", "transformers-16"], ["peft-1", "peft-mixed"], ["first-answer"], ["cpu-bf16"],
    ["cpu-peft-float32"],
]  # fmt: skip


def printed_by(*arguments: str) -> str:
    environment = {**os.environ, "TINY_GENERATION": "8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_row_has_a_figure(rows):
    output = printed_by(*rows, "--calls", "1", "--in-process")
    lines = re.findall(r"^\| `([a-z0-9-]+)`.*? \| ([0-9,.]+) \|", output, re.M)
    assert {name for name, _ in lines} == set(rows)
    assert all(float(figure.replace(",", "")) > 0 for _, figure in lines)


def test_a_row_out_of_time_is_named_and_those_after_it_are_tried():
    output = printed_by("batch-1", "transformers-1", "--limit-s", "0.05")
    assert re.findall(r"^\| `([a-z0-9-]+)` \| out of time", output, re.M) == ["batch-1", "transformers-1"]
