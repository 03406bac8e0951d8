"""Time the way from rows to batches. It needs no GPU.

    python examples/benchmarks/data_speed.py                            # from a .jsonl file, on 1 and on 2 cores
    python examples/benchmarks/data_speed.py 1 8 --rows 50000 --tokenizer microsoft/Phi-3-mini-4k-instruct
    python examples/benchmarks/data_speed.py 1 2 4 --stream             # windows that 1, 2 and 4 processes share

The chats have one to four exchanges, some 700 tokens with Phi-3's table. They are made of sentences of docs/, with a
new word for every sixteenth, about as often as real text has one; every tenth answer is a call of a function in JSON.
``--tokenizer`` is a hub name or a folder; without it the demo's, of 512 tokens, makes twice as many of a text.

The columns: rows and tokens a second of ``ChatDataset.load`` with nothing cached, and with the tokens cached; the
seconds that the processor was busy, of all processes together, which a busy machine changes less; seconds for one pass
of batches, the fingerprint and the statistics. With ``--stream``: seconds for a window of ``--rows`` rows, one thread a
process, without window 0, which every process tokenises by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WINDOWS = 4
DOCS = Path(__file__).parents[2] / "docs"


def write_rows(path: Path, count: int) -> None:
    """Write ``count`` chats, the same ones each time."""
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    sentences = [s for s in re.split(r"(?<=[.:;])\s+|\n\n+", text) if len(s) > 20 and not re.search(r"[<\[]", s)]
    rng = random.Random(0)

    def say(shortest: int, longest: int) -> str:
        said: list[str] = []
        wanted = rng.randint(shortest, longest)
        while len(" ".join(said)) < wanted:
            said.append(rng.choice(sentences))
        words = " ".join(said).split(" ")
        return " ".join(word if rng.randrange(16) else rng.choice(words)[:4] + word[-4:] for word in words)

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            messages = [{"role": "system", "content": say(60, 200)}] if rng.random() < 0.6 else []
            for _ in range(rng.randint(1, 4)):
                messages.append({"role": "user", "content": say(40, 250)})
                call = json.dumps({"name": "look_up", "arguments": {"text": say(20, 80), "number": i}})
                messages.append({"role": "assistant", "content": say(100, 900) if rng.randrange(10) else call})
            file.write(json.dumps({"messages": messages}) + "\n")


def busy_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_load(cores: int, folder: str, tokenizer: str | None) -> None:
    """Print one line of the table."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import datasets

    import phi3lora as p3

    datasets.config.HF_DATASETS_CACHE = Path(folder, f"cache-{cores}")
    table = _tokenizer(tokenizer)
    figures: list[float] = []
    p3.ChatDataset.load([{"prompt": "Hi", "completion": "Hello!"}], table, max_length=99)  # imports what it needs
    for use_cache in (False, True, True):  # uncached; the second fills the cache, the third reads it
        datasets.enable_caching() if use_cache else datasets.disable_caching()
        started, busy = time.perf_counter(), busy_s()
        dataset = p3.ChatDataset.load(f"{folder}/rows.jsonl", table, max_length=4096)
        figures += [time.perf_counter() - started, busy_s() - busy]
    rows, tokens = len(dataset), dataset.statistics()["tokens"]
    dataset, seconds = copy.copy(dataset), []  # a copy has nothing computed yet
    for work in (lambda: sum(1 for _ in p3.batches(dataset, batch_size=2)), dataset.fingerprint, dataset.statistics):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    plain, plain_busy, _, _, cached, _ = figures
    print(f"{cores:>5} {rows / plain:>8,.0f} {tokens / plain:>10,.0f} {plain_busy:>8.2f}", end="")
    print(f" {rows / cached:>14,.0f} {seconds[0]:>10.2f} {seconds[1]:>13.2f} {seconds[2]:>12.3f}", flush=True)


def measure_stream(rows: int, folder: str, tokenizer: str | None) -> None:
    """Print the seconds of a window, of all but the first."""
    import torch

    import phi3lora as p3
    from phi3lora.training.distributed import joined

    path = f"{folder}/rows.jsonl"
    stream = p3.ChatDataset.load(path, _tokenizer(tokenizer), max_length=4096, streaming=True, buffer_size=rows)
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


def _tokenizer(name: str | None):
    import transformers

    import phi3lora as p3

    return p3.demo.load()[1] if name is None else transformers.AutoTokenizer.from_pretrained(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="*", default=[1, 2], help="cores, or processes of a stream")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--tokenizer")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder and options.stream:
        return measure_stream(options.rows, options.folder, options.tokenizer)
    if options.folder:
        return measure_load(*options.counts, options.folder, options.tokenizer)
    own = [__file__, "--rows", str(options.rows), *(["--tokenizer", options.tokenizer] if options.tokenizer else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if options.stream:
        own, environment["TOKENIZERS_PARALLELISM"] = [*own, "--stream"], "false"
        print("processes   s for a window   tokens in it")
    else:
        print("cores   rows/s   tokens/s   busy s  cached, rows/s  batches s  fingerprint s  statistics s")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.jsonl"), options.rows * (WINDOWS if options.stream else 1))
        for count in options.counts:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [*(torchrun if options.stream else []), *own, str(count), "--folder", folder]
            subprocess.run([sys.executable, *command], check=True, env=environment)


if __name__ == "__main__":
    main()
