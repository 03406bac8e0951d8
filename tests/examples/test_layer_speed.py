"""The table of layer speeds: every layer has a row, and the plain one is 1.00."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "layer_speed.py"


def test_it_prints_a_row_for_each_layer(monkeypatch, capsys):
    sizes = ["--tokens", "4", "--features", "8", "--width", "12", "--repetitions", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    names = [row[0] for row in rows]
    assert names == [
        "| `nn.Linear, weight frozen`", "| `nn.Linear, weight trained`", "| `phi3lora.MergedLinear`",
        "| `loralib.MergedLinear`",
    ]  # fmt: skip
    assert rows[0][2] == "1.00"
    assert torch.get_num_threads() == 1


def test_calls_have_a_row_for_each_dtype_target_and_number_of_rows(monkeypatch, capsys):
    sizes = ["--features", "24", "--width", "36", "--repetitions", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--calls", "--rows", "1", "5", "--seconds", "0", *sizes])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "float" in line]
    assert [row[:3] for row in rows] == [
        [f"| {dtype}", case, n]
        for dtype in ("float32", "bfloat16")
        for case in ("q and v", "all four")
        for n in ("1", "5")
    ]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)
