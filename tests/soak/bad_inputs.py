"""Give damaged files, settings and rows to every reader: each must raise ``Phi3LoRAError`` or accept its input.

    python tests/soak/bad_inputs.py                                  # 10,000 inputs
    python tests/soak/bad_inputs.py --only config --count 500        # some kinds
    python tests/soak/bad_inputs.py --only "data file" --replay 17   # one input again, with its traceback

Each input is made from its kind and a number alone. Forked children of this process, which has done the imports and
tried every good input, handle them one after another. Unhandled is an exception of another family, a child that dies,
an input that takes more than ``--limit-s`` seconds or more than 1 GiB of memory. A child that dies is replaced.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from damage import make_reproducible  # noqa: E402

import phi3lora as p3  # noqa: E402

LIMIT_BYTES = 2**30
ADDRESS_SPACE_BYTES = 4 * 2**30  # beyond what the child starts with; the system refuses more

Job = tuple[str, int]
"""An input: the name of its kind and its number."""


@dataclass
class Kind:
    """One kind of input."""

    prepare: Callable[[Path], Callable[[], object]]
    """Writes the good inputs into a folder and returns a function that reads them."""
    make: Callable[[Random, Path, Path], tuple[str, Callable[[], object]]]
    """(random, folder of the good inputs, own folder) -> a description of the damage and a function that reads it."""
    share: int
    """Weight among all inputs."""


@dataclass
class Figures:
    """Results of one kind."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    peak_bytes: int = 0
    slowest_s: float = 0.0
    total_s: float = 0.0
    unhandled: list[str] = field(default_factory=list)

    def add(self, job: Job, description: str, outcome: str, peak_bytes: int, seconds: float) -> None:
        self.tried += 1
        self.peak_bytes, self.slowest_s = max(self.peak_bytes, peak_bytes), max(self.slowest_s, seconds)
        self.total_s += seconds
        if outcome == "accepted":
            self.accepted += 1
        elif outcome.startswith("refused: "):
            self.refused += 1
        else:
            self.unhandled.append(f"{job[0]} {job[1]} ({description[:200]}): {outcome}")


@dataclass
class Report:
    """Results of a run."""

    kinds: dict[str, Figures]
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(figures.tried for figures in self.kinds.values())

    @property
    def unhandled(self) -> list[str]:
        return [line for figures in self.kinds.values() for line in figures.unhandled]

    def __str__(self) -> str:
        lines = [f"{'':24}   tried  refused  accepted  unhandled  peak MiB  slowest s      s"]
        for name, f in self.kinds.items():
            lines.append(
                f"{name:24}{f.tried:8,}{f.refused:9,}{f.accepted:10,}{len(f.unhandled):11,}"
                f"{f.peak_bytes / 2**20:10,.0f}{f.slowest_s:11.1f}{f.total_s:7.0f}"
            )
        lines.append(f"bad inputs {self.tried:,}, unhandled {len(self.unhandled)}, {self.seconds:.0f} s")
        return "\n".join(lines + self.unhandled)


def handle(kind: Kind, job: Job, good: Path, describe: Callable[[str], object]) -> str:
    """Read one input and return ``"refused: ..."`` or ``"accepted"``; raise anything else."""
    name, number = job
    own = Path(tempfile.mkdtemp(dir=good.parent))  # a child that dies leaves it to its parent
    try:
        description, read = kind.make(Random(f"{name} {number}"), good / name, own)
        describe(description)
        torch.manual_seed(number)
        try:
            read()
        except p3.Phi3LoRAError as error:
            str(error).encode()  # a message that cannot be printed is a fault
            return f"refused: {error}"
        return "accepted"
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _isolate() -> None:
    """Ask no hub whether a bad name is a repository, use no threads that a fork left behind, print no warnings."""
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _memory_bytes(name: str) -> int:
    """Return a line of /proc/self/status: VmSize, VmRSS or VmHWM, the peak of VmRSS."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _handle_all(kinds: dict[str, Kind], jobs: list[Job], good: Path, limit_s: float, out: int, log: Path) -> None:
    """The child: write a line of JSON to ``out`` before and after each input; tracebacks of a hang go to ``log``."""
    with os.fdopen(out, "w", buffering=1) as lines, log.open("w") as errors:
        _isolate()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors.fileno(), 2)
        faulthandler.enable(errors)
        limit = _memory_bytes("VmSize") + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for job in jobs:
            errors.truncate(0)
            faulthandler.dump_traceback_later(limit_s, exit=True, file=errors)
            _reset_peak()
            before, started = _memory_bytes("VmRSS"), time.perf_counter()
            try:
                outcome = handle(kinds[job[0]], job, good, lambda said: lines.write(json.dumps(said) + "\n"))
            except BaseException as error:
                frames = traceback.extract_tb(error.__traceback__)
                where = next((f for f in reversed(frames) if "phi3lora/" in f.filename), frames[-1])
                outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:300]}"
            faulthandler.cancel_dump_traceback_later()
            peak = max(0, _memory_bytes("VmHWM") - before)
            if peak > LIMIT_BYTES:
                outcome = f"takes {peak / 2**20:,.0f} MiB ({outcome[:300]})"
            lines.write(json.dumps([outcome[:600], peak, time.perf_counter() - started]) + "\n")


def _try_all(
    kinds: dict[str, Kind], jobs: list[Job], good: Path, limit_s: float, log: Path
) -> Iterator[tuple[Any, ...]]:
    """Yield ``(job, description, outcome, peak bytes, seconds)`` of every job; fork another child where one dies."""
    while jobs:
        readable, out = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _handle_all(kinds, jobs, good, limit_s, out, log)
            finally:
                os._exit(0)
        os.close(out)
        description = ""
        with os.fdopen(readable) as lines:
            for line in map(json.loads, lines):
                if isinstance(line, str):
                    description = line
                    continue
                yield jobs.pop(0), description, *line
        os.waitpid(child, 0)
        if jobs:
            trace = log.read_text(errors="replace")
            what = f"hangs: more than {limit_s:g} s" if "Timeout (" in trace else "the process died"
            yield jobs.pop(0), description, f"{what}: {trace.rpartition('Thread ')[2].strip()[:1500]}", 0, 0.0


def all_kinds() -> dict[str, Kind]:
    """Return every kind of input by its name."""
    import bad_adapters
    import bad_checkpoints
    import bad_configs
    import bad_data
    import bad_models

    modules = (bad_adapters, bad_checkpoints, bad_configs, bad_data, bad_models)
    return {name: Kind(*parts) for module in modules for name, parts in module.KINDS.items()}


def run(kinds: dict[str, Kind], count: int, seed: int = 0, workers: int = 2, limit_s: float = 20.0) -> Report:
    """Try at least ``count`` inputs, spread over ``kinds`` by their shares."""
    started = time.perf_counter()
    report = Report({name: Figures() for name in kinds})
    total = sum(kind.share for kind in kinds.values())
    jobs = [
        (name, seed * 1_000_000 + i)
        for name, kind in kinds.items()
        for i in range(-(-count * kind.share // total))
    ]  # fmt: skip
    Random(seed).shuffle(jobs)  # so that the children finish together
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(workers) as pool:
        good = Path(place) / "good"
        prepare(kinds, good)

        def work(worker: int) -> None:
            for job, *result in _try_all(kinds, jobs[worker::workers], good, limit_s, Path(place) / f"log-{worker}"):
                report.kinds[job[0]].add(job, *result)

        list(pool.map(work, range(workers)))
    report.seconds = time.perf_counter() - started
    return report


def prepare(kinds: dict[str, Kind], good: Path) -> None:
    """Write the good inputs of each kind and read them: they must be accepted."""
    for name, kind in kinds.items():
        (good / name).mkdir(parents=True)
        random.seed(0)  # a checkpoint holds the states of these
        np.random.seed(0)
        read = kind.prepare(good / name)
        make_reproducible(good / name)
        read()


def replay(kinds: dict[str, Kind], number: int) -> None:
    """Handle one input of each of ``kinds`` in this process."""
    _isolate()
    with tempfile.TemporaryDirectory() as place:
        prepare(kinds, Path(place) / "good")
        for name, kind in kinds.items():
            outcome = handle(kind, (name, number), Path(place) / "good", lambda said: print(said[:2000]))
            print(f"{name} {number}: {outcome}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name begins so")
    parser.add_argument("--replay", type=int, help="the one input of this number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=20.0)
    options = parser.parse_args(arguments)
    kinds = {name: kind for name, kind in all_kinds().items() if name.startswith(options.only)}
    if not kinds:
        parser.error(f"--only {options.only}: no such kind; allowed: {', '.join(all_kinds())}")
    if options.replay is not None:
        replay(kinds, options.replay)
        return 0
    report = run(kinds, options.count, options.seed, options.workers, options.limit_s)
    print(report)
    return 1 if report.unhandled else 0


if __name__ == "__main__":
    sys.exit(main())
