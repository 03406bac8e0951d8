"""Feed damaged files, settings and rows to every reader, and ask for ``Phi3LoRAError`` or success, nothing else.

    python tests/soak/bad_inputs.py                              # 10,000 inputs
    python tests/soak/bad_inputs.py --only configs --count 500   # one kind
    python tests/soak/bad_inputs.py --only configs --replay 17   # one input again, with its traceback

Each input is made from its kind and a number alone and handled in a forked child of this process, which has paid for
the imports and tried every good input first. Unhandled is: an exception of another family, a child that dies, more than
``--limit-s`` seconds, more than 1 GiB of memory beyond what the child had. A child that dies is replaced.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from damage import settle  # noqa: E402

import phi3lora as p3  # noqa: E402

GIB = 2**30
_ROOM = 4 * GIB  # where the child's memory ends for good: what is larger is refused by the system


@dataclass
class Kind:
    """One kind of input."""

    prepare: Callable[[Path], Callable[[], object]]
    """Make the good inputs in a folder; what reads them, once, to show that undamaged they are accepted."""
    make: Callable[[Random, Path, Path], tuple[str, Callable[[], object]]]
    """(random, folder of the good ones, folder of its own) -> what was damaged, and what reads it."""
    share: int
    """Of all inputs, as a weight."""


@dataclass
class Figures:
    """Of one kind."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    peak: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    unhandled: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was tried, and what went wrong."""

    kinds: dict[str, Figures]
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(figures.tried for figures in self.kinds.values())

    @property
    def unhandled(self) -> list[str]:
        return [line for figures in self.kinds.values() for line in figures.unhandled]

    def __str__(self) -> str:
        heads = ("tried", 8), ("refused", 9), ("accepted", 10), ("unhandled", 11), ("peak MiB", 10), ("slowest s", 11)
        lines = [" " * 24 + "".join(f"{head:>{width}}" for head, width in (*heads, ("s", 7)))]
        for name, f in self.kinds.items():
            lines.append(
                f"{name:24}{f.tried:8,}{f.refused:9,}{f.accepted:10,}{len(f.unhandled):11,}"
                f"{f.peak / 2**20:10,.0f}{f.slowest[0]:11.1f}{f.seconds:7.0f}"
            )
        lines.append(f"bad inputs {self.tried:,}, unhandled {len(self.unhandled)}, {self.seconds:.0f} s")
        return "\n".join(lines + self.unhandled)


Job = tuple[str, int]


def handle(kind: Kind, job: Job, good: Path, say: Callable[[str], object] = lambda _: None) -> str:
    """One input: ``"refused: ..."`` or ``"accepted"``; anything else is raised. ``say`` hears what it is first."""
    name, number = job
    own = Path(tempfile.mkdtemp(prefix="bad_input_"))
    try:
        said, read = kind.make(Random(f"{name} {number}"), good / name, own)
        say(said)
        torch.manual_seed(number)
        try:
            read()
        except p3.Phi3LoRAError as error:
            str(error).encode()  # a message that cannot be printed tells no one anything
            return f"refused: {error}"
        return "accepted"
    finally:
        shutil.rmtree(own, ignore_errors=True)


# --- The child


class _Child:
    """Handles its jobs one after another, and writes a line before and after each."""

    def __init__(self, kinds: dict[str, Kind], jobs: list[Job], good: Path, limit_s: float, log: Path) -> None:
        self.jobs, self.log = list(jobs), log
        out, into = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(into)
            self.pipe = os.fdopen(out)
            return
        os.close(out)
        try:
            with os.fdopen(into, "w", buffering=1) as lines, log.open("w") as errors:
                _by_itself()
                faulthandler.enable(errors)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors.fileno(), 2)
                limit = _memory("VmSize") + _ROOM
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                for job in self.jobs:
                    self._try(kinds[job[0]], job, good, limit_s, lines, errors)
        finally:
            os._exit(0)

    def _try(self, kind: Kind, job: Job, good: Path, limit_s: float, lines: IO[str], errors: IO[str]) -> None:
        def tell(**facts: Any) -> None:
            lines.write(json.dumps(facts) + "\n")

        errors.truncate(0)
        faulthandler.dump_traceback_later(limit_s, exit=True, file=errors)
        _reset_peak()
        before, started = _memory("VmRSS"), time.perf_counter()
        try:
            outcome = handle(kind, job, good, lambda said: tell(said=said))
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next((f for f in reversed(frames) if "phi3lora/" in f.filename), frames[-1])
            outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:300]}"
        faulthandler.cancel_dump_traceback_later()
        peak = max(0, _memory("VmHWM") - before)
        if peak > GIB:
            outcome = f"takes {peak / GIB:.1f} GiB ({outcome[:300]})"
        tell(outcome=outcome[:600], peak=peak, seconds=time.perf_counter() - started)

    def end(self) -> None:
        """Wait for it; one that lives on is killed."""
        self.pipe.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
        finally:
            os.waitpid(self.pid, 0)


def _by_itself() -> None:
    """No hub is asked whether a bad name is a repository; no pool of threads is waited for that a fork left behind."""
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _reset_peak() -> None:
    """VmHWM starts again from now."""
    Path("/proc/self/clear_refs").write_text("5")


# --- The parent


class _Run:
    """Children, their jobs, and what comes of them."""

    def __init__(self, kinds: dict[str, Kind], good: Path, place: Path, limit_s: float) -> None:
        self.kinds, self.good, self.place, self.limit_s = kinds, good, place, limit_s
        self.report = Report({name: Figures() for name in kinds})
        self.selector = selectors.DefaultSelector()
        self.said: dict[int, str] = {}
        self.started: dict[int, float] = {}

    def start(self, jobs: list[Job]) -> None:
        if jobs:
            log = self.place / f"log-{time.monotonic_ns()}"
            child = _Child(self.kinds, jobs, self.good, self.limit_s, log)
            self.said[child.pid], self.started[child.pid] = "", time.monotonic()
            self.selector.register(child.pipe, selectors.EVENT_READ, child)

    def until_done(self) -> None:
        while self.selector.get_map():
            ready = {key.data for key, _ in self.selector.select(timeout=1.0)}
            for key in list(self.selector.get_map().values()):
                child = key.data
                late = time.monotonic() - self.started[child.pid] > self.limit_s + 10  # not even its watchdog runs
                line = child.pipe.readline() if child in ready else ""
                if line:
                    self._hear(child, json.loads(line))
                elif child in ready or late:
                    self._bury(child)

    def _hear(self, child: _Child, facts: dict[str, Any]) -> None:
        if "said" in facts:
            self.said[child.pid] = facts["said"]
            return
        self._count(child, facts["outcome"], facts["peak"], facts["seconds"])
        self.started[child.pid] = time.monotonic()

    def _count(self, child: _Child, outcome: str, peak: int, seconds: float) -> None:
        name, number = child.jobs.pop(0)
        figures = self.report.kinds[name]
        figures.tried, figures.peak = figures.tried + 1, max(figures.peak, peak)
        figures.seconds, figures.slowest = figures.seconds + seconds, max(figures.slowest, (seconds, number))
        if outcome == "accepted":
            figures.accepted += 1
        elif outcome.startswith("refused: "):
            figures.refused += 1
        else:
            figures.unhandled.append(f"{name} {number} ({self.said[child.pid][:200]}): {outcome}")
        self.said[child.pid] = ""

    def _bury(self, child: _Child) -> None:
        """It is through, or it died over an input."""
        self.selector.unregister(child.pipe)
        child.end()
        if child.jobs:
            told = child.log.read_text(errors="replace")
            seconds = time.monotonic() - self.started[child.pid]
            what = f"hangs: longer than {self.limit_s:g} s" if seconds >= self.limit_s else "the process died"
            self._count(child, f"{what}: {told.rpartition('Thread ')[2].strip()[:1500]}", 0, seconds)
        self.start(child.jobs)


def all_kinds() -> dict[str, Kind]:
    """Name -> kind, of every reader."""
    import bad_adapters
    import bad_checkpoints
    import bad_configs
    import bad_data
    import bad_models

    modules = (bad_adapters, bad_checkpoints, bad_configs, bad_data, bad_models)
    return {name: Kind(*parts) for module in modules for name, parts in module.KINDS.items()}


def run(
    kinds: dict[str, Kind], count: int, seed: int = 0, workers: int = 2, limit_s: float = 20.0, first: int = 0
) -> Report:
    """Try ``count`` inputs, spread over ``kinds`` by their shares."""
    started = time.perf_counter()
    total = sum(kind.share for kind in kinds.values())
    jobs: list[Job] = []
    for name, kind in kinds.items():
        jobs += [(name, seed * 1_000_000 + first + i) for i in range(-(-count * kind.share // total))]
    Random(seed).shuffle(jobs)  # so that the children are done at the same time
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        prepare(kinds, good)
        trial = _Run(kinds, good, Path(place), limit_s)
        for worker in range(workers):
            trial.start(jobs[worker::workers])
        trial.until_done()
    trial.report.seconds = time.perf_counter() - started
    return trial.report


def prepare(kinds: dict[str, Kind], good: Path) -> None:
    """The good inputs of each kind, and a look that they are accepted: else nothing would be learnt from bad ones."""
    for name, kind in kinds.items():
        (good / name).mkdir(parents=True)
        random.seed(0)  # a checkpoint holds the states of these
        np.random.seed(0)
        read = kind.prepare(good / name)
        settle(good / name)
        read()


def replay(kinds: dict[str, Kind], number: int) -> None:
    """One input of each of ``kinds`` in this process."""
    _by_itself()
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        prepare(kinds, good)
        for name, kind in kinds.items():
            _reset_peak()
            before = _memory("VmRSS")
            print(f"{name} {number}:", handle(kind, (name, number), good, lambda said: print(said[:2000])))
            print(f"peak {(_memory('VmHWM') - before) / 2**20:,.0f} MiB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose name begins so")
    parser.add_argument("--replay", type=int, help="the one input of this number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=20.0)
    options = parser.parse_args(arguments)
    kinds = {name: kind for name, kind in all_kinds().items() if name.startswith(options.only or "")}
    if not kinds:
        parser.error(f"--only {options.only}: no such kind; there are {', '.join(all_kinds())}")
    if options.replay is not None:
        replay(kinds, options.replay)
        return 0
    report = run(kinds, options.count, options.seed, options.workers, options.limit_s)
    print(report)
    return 1 if report.unhandled else 0


if __name__ == "__main__":
    sys.exit(main())
