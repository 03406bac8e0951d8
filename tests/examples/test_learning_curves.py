"""Learning curves of two bases, tiny and on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "learning_curves.py"


def test_bf16_and_fp8_learn_side_by_side():
    tiny = ["--shape", "tiny", "--steps", "12", "--row-tokens", "64", "--learning-rate", "0.01"]
    done = subprocess.run([sys.executable, SCRIPT, "bf16", "fp8", *tiny], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["steps", "---", "1-10", "11-12"]
    assert [name.strip() for name in rows[0][1:]] == ["bf16", "fp8"]
    (bf16, fp8), (bf16_later, fp8_later) = ([float(value) for value in row[1:]] for row in rows[2:])
    assert bf16_later < bf16 and fp8_later < fp8
    assert 0 < abs(bf16 - fp8) < 0.1
    assert "Largest gap to bf16: " in done.stdout
