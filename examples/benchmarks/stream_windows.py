"""Time the windows of a stream that several processes tokenise together. It needs no GPU.

    python examples/benchmarks/stream_windows.py                   # 1, 2 and 4 processes
    python examples/benchmarks/stream_windows.py 1 8 --rows 4000   # a window's rows; each has about 160 tokens

The rows are the demo's chats, four in one, from a .jsonl file; the tokenizer is the demo's, with one thread a process.
Window 0, which every process tokenises by itself, is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import phi3lora as p3
from phi3lora.training.distributed import joined

WINDOWS = 4


def measure(rows: int, folder: str) -> None:
    """Print the seconds of a window, of all but the first."""
    _, tokenizer, _, _ = p3.demo.load()
    stream = p3.ChatDataset.load(f"{folder}/rows.jsonl", tokenizer, max_length=2048, streaming=True, buffer_size=rows)
    assert stream.first_window is not None
    with joined(torch.device("cpu"), shares_windows=True) as world:
        windows, times = stream.windows(share=world.share), []
        tokens = 0
        for _ in range(WINDOWS):
            world.meet()
            started = time.perf_counter()
            tokens = next(windows)[1].statistics()["tokens"]
            times.append(time.perf_counter() - started)
        if world.share is not None:
            world.share.end()
        if world.is_main:
            print(f"{world.size:>9} {statistics.median(times[1:]):>15.2f} {tokens:>16,}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return measure(options.rows, options.folder)
    chats = [json.loads(line)["messages"] for line in (p3.demo.FOLDER / "train.jsonl").read_text().splitlines()]
    print("processes   s for a window   tokens in it")
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "rows.jsonl").open("w") as file:
            for chat in itertools.islice(itertools.cycle(chats), options.rows * WINDOWS):
                file.write(json.dumps({"messages": 4 * chat}) + "\n")
        for count in options.processes:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            arguments = [__file__, "--rows", str(options.rows), "--folder", folder]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launch, *arguments], check=True, env=environment)


if __name__ == "__main__":
    main()
