"""Send Ctrl-C and SIGTERM to the real command line, run the command again, and require the same file.

    python tests/soak/signals.py                  # 5 signals: one while it starts, the others between random steps
    python tests/soak/signals.py --count 100

An interrupted ``python -m phi3lora train`` ends with the status that a shell expects (130, 143) and leaves no
``adapter.safetensors``. The same command then ends the run, and its adapter has the bytes of the uncut run's.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from soak_report import Report, main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "phi3lora" / "demo"
SETTINGS = (
    "r=2 max_steps=12 per_device_train_batch_size=1 save_strategy=steps save_steps=4 logging_steps=1 disable_tqdm=true "
    "resume_from_checkpoint=auto"
).split()
LIMIT_S = 300.0


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the command, in the folder that it writes to."""
    model = ["--model", str(DEMO / "base"), "--dtype", "float32"]
    data = ["--data", str(DEMO / "train.jsonl"), "--max-length", "64"]
    command = [sys.executable, "-m", "phi3lora", "train", *model, *data, "--set", *SETTINGS, f"output_dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=folder.parent, **output)  # type: ignore[call-overload]


def adapter(folder: Path) -> str | None:
    path = folder / "adapter.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def count_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def interrupt(number: signal.Signals, lines: int, delay_s: float, expected: str) -> tuple[str, str | None]:
    """Interrupt a run once it has logged ``lines`` and a delay has passed; finish it.

    Returns:
        How it ended, and what is wrong.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        child = start(folder)
        until = time.monotonic() + LIMIT_S
        while count_lines(folder) < lines and child.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(delay_s)
        child.send_signal(number)
        text, _ = child.communicate(timeout=LIMIT_S)
        how = f"{number.name} {delay_s:.3f} s after line {lines}, status {child.returncode}"
        steps = count_lines(folder)
        ended = "ended before" if child.returncode == 0 else "in training" if steps else "before the first step"
        is_done = adapter(folder) == expected
        allowed = (0, -number) if is_done else (128 + number, -number)  # -number: Python was starting, or ending
        if child.returncode not in allowed:
            return ended, f"{how}: {text.strip()[-300:]}"
        if not is_done and adapter(folder) is not None:
            return ended, f"{how}: it left an adapter.safetensors"
        again = start(folder)
        text, _ = again.communicate(timeout=LIMIT_S)
        if again.returncode or adapter(folder) != expected:
            wrong = f"{how}: run again, it ended with {again.returncode} and another adapter: {text.strip()[-300:]}"
            return ended, wrong
        return ended, None


def run(count: int, seed: int = 0, workers: int = 2) -> Report:
    """Interrupt ``count`` runs."""
    report, begun, choose = Report("signals"), time.perf_counter(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        whole = start(Path(place) / "run")
        text, _ = whole.communicate(timeout=LIMIT_S)
        expected = adapter(Path(place) / "run")
        if whole.returncode or expected is None:
            raise RuntimeError(f"the run that nothing interrupts ended with {whole.returncode}: {text[-500:]}")
    jobs = [
        (choose.choice([signal.SIGINT, signal.SIGTERM]), i and choose.randrange(12), choose.uniform(0, 0.2 if i else 9))
        for i in range(count)
    ]
    with ThreadPoolExecutor(workers) as pool:
        for ended, wrong in pool.map(lambda job: interrupt(*job, expected), jobs):
            report.tried[ended] += 1
            if wrong:
                report.lost.append(wrong)
    report.seconds = time.perf_counter() - begun
    return report


if __name__ == "__main__":
    sys.exit(main(run, __doc__, count=(5, "runs that are interrupted")))
