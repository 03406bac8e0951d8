"""Cut the power at every step of what is written: rebuild what a disk may then hold, and require what had been saved.

    python tests/soak/power_cuts.py                 # every step of four runs, two states of the disk each
    python tests/soak/power_cuts.py --most 60       # a seeded choice of the steps

A disk keeps what was flushed and an unknown part of the rest. So a child process writes, and at each of its operations
on a folder (open for writing, rename, exchange, link, mkdir, remove, fsync) records the tree: which file each name
leads to, and each file's bytes. After a cut at that step,

    a folder has the names of its last fsync, or those of any later step
    a file has the bytes of its last fsync, or, if it has changed since, those of now, a beginning of them, or zeros

each folder and file on its own, drawn at random, which allows more than a file system with a journal does. Whatever
is drawn, a checkpoint or file whose save had returned must be readable, and a folder that is being replaced must be
the old one or the new one, or not be there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import adapted_model
from kill_points import (
    _fork,
    _wait,
    check_adapter_files,
    check_checkpoints,
    check_exports,
    count_saved,
    exports,
    prepare,
    rerun,
    whole_run,
)
from soak_report import Report, main

import phi3lora as p3
from phi3lora import files

STATES = 2  # of the disk, drawn for each step
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}

Names = dict[str, int]
"""Names in a folder -> number of the file or folder."""


@dataclass
class Step:
    """The disk when the power goes: what is certain, and what may be there too."""

    returned: int
    """How many saves had returned."""
    root: int
    folders: dict[int, list[Names]]
    """Number of a folder -> its names at its last fsync and at each step since."""
    bytes: dict[int, tuple[bytes, bytes]]
    """Number of a file -> its bytes at its last fsync, and now."""


@dataclass
class Recorder:
    """Records the steps of this process in a folder."""

    folder: Path
    saved: Path
    """Has a line for each save that returned."""
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers: dict[int, int] = {}  # inode -> number; an inode may be used again
        self.next = 0
        self.now: dict[int, Names | bytes] = {}
        self.folders: dict[int, list[Names]] = {}
        self.flushed: dict[int, bytes] = {}
        self.busy = False
        self.pool: dict[bytes, bytes] = {}
        self.root = self._look()
        for number, value in self.now.items():  # what was there before is on disk
            if isinstance(value, dict):
                self.folders[number] = [value]
            else:
                self.flushed[number] = value

    def install(self) -> None:
        """Record from now on, until the process ends."""
        real_fsync, real_exchange = os.fsync, files._exchange

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.step()
            real_fsync(descriptor)
            if path.startswith(str(self.folder)) and not self.busy:
                number = self.numbers[os.fstat(descriptor).st_ino]
                value = self.now[number]
                if isinstance(value, dict):
                    self.folders[number] = [value]
                else:
                    self.flushed[number] = value
            self.step()

        def exchange(one: Path, other: Path) -> bool:
            self.step()
            return real_exchange(one, other)

        os.fsync, files._exchange = fsync, exchange
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.step()

    def step(self) -> None:
        """Record the disk before the next operation."""
        if self.busy:
            return
        self.busy = True
        self._look()
        for number, value in self.now.items():
            if isinstance(value, dict):
                versions = self.folders.setdefault(number, [{}])
                if versions[-1] != value:
                    versions.append(value)
        contents = {n: (self.flushed.get(n, b""), v) for n, v in self.now.items() if isinstance(v, bytes)}
        contents.update({n: (v, v) for n, v in self.flushed.items() if n not in contents})  # removed, perhaps
        folders = {number: list(versions) for number, versions in self.folders.items()}
        self.steps.append(Step(count_saved(self.saved), self.root, folders, contents))
        self.busy = False

    def _look(self) -> int:
        """Read the tree; return the number of its root."""
        found: dict[int, int] = {}
        self.now = {}

        def look(path: str) -> int:
            inode = os.lstat(path).st_ino
            if inode not in found:
                found[inode] = self.numbers.get(inode, self.next)
                self.next += found[inode] == self.next
            number = found[inode]
            if os.path.isdir(path):
                self.now[number] = {name: look(os.path.join(path, name)) for name in sorted(os.listdir(path))}
            elif number not in self.now:
                with open(path, "rb") as file:
                    data = file.read()
                self.now[number] = self.pool.setdefault(data, data)
            return number

        root = look(str(self.folder))
        self.numbers = found
        return root


def rebuild(step: Step, choose: random.Random, path: Path) -> None:
    """Write a state that the disk may have after a cut at ``step``."""
    files_made: dict[int, bytes] = {}

    def content(number: int) -> bytes:
        flushed, now = step.bytes.get(number, (b"", b""))
        if flushed == now:
            return now
        return choose.choice([flushed, now, now[: choose.randrange(len(now) + 1)], bytes(len(now))])

    def write(number: int, at: Path) -> None:
        if number not in step.folders:
            at.write_bytes(files_made.setdefault(number, content(number)))
            return
        at.mkdir()
        for name, inner in choose.choice(step.folders[number]).items():
            write(inner, at / name)

    write(step.root, path)


# --- What is written, and what must be there


def save_adapters(folder: Path, saved: Path) -> None:
    """Write adapter files over older ones."""
    for name in ("adapter.safetensors", "adapter.pt"):
        p3.save_adapter(adapted_model(seed=1), folder / name)
        with saved.open("a") as file:
            file.write(f"{name}\n")


Check = Callable[[Path, int], None]
KINDS: dict[str, tuple[Callable[[Path, Path], object], Check]] = {
    "whole run": (whole_run, lambda folder, saved: check_checkpoints("whole run", folder, saved)),
    "rerun": (rerun, lambda folder, saved: check_checkpoints("rerun", folder, saved)),
    "adapter files": (save_adapters, check_adapter_files),
    "exports": (lambda folder, saved: exports(folder, saved), lambda folder, saved: check_exports(folder)),
}


def cut(name: str, most: int | None, seed: int) -> tuple[int, list[str]]:
    """Write, then rebuild and check the states of the disk; return their number and what is wrong."""
    write, check = KINDS[name]
    choose, wrong, tried = random.Random(f"{name} {seed}"), [], 0
    with tempfile.TemporaryDirectory() as place:
        folder, saved, disk = Path(place) / "run", Path(place) / "saved", Path(place) / "disk"
        prepare(name, folder)
        recorder = Recorder(folder, saved)
        recorder.install()
        write(folder, saved)
        recorder.step()
        recorder.busy = True
        steps = recorder.steps if most is None else choose.sample(recorder.steps, min(most, len(recorder.steps)))
        for step in steps:
            for _ in range(STATES):
                tried += 1
                rebuild(step, choose, disk)
                try:
                    check(disk, step.returned)
                except Exception as error:
                    wrong.append(f"{name}, step {recorder.steps.index(step)}: {type(error).__name__}: {error}"[:300])
                shutil.rmtree(disk)
    return tried, wrong


def run(most: int | None = None, seed: int = 0, workers: int = 2, kinds: Sequence[str] = tuple(KINDS)) -> Report:
    """Try all steps of each kind, or a seeded choice of ``most``, each kind in a child of its own."""
    report, started = Report("power cuts"), time.perf_counter()
    torch.set_num_threads(1)

    def work(name: str) -> tuple[int, list[str]]:
        with tempfile.TemporaryDirectory() as place:
            out, log = Path(place) / "out", Path(place) / "log"
            status = _wait(_fork(lambda: out.write_text(json.dumps(cut(name, most, seed))), log), 1200)
            if status:
                return 0, [f"{name} ended with {status}: {log.read_text(errors='replace').strip()[-300:]}"]
            tried, wrong = json.loads(out.read_text())
            return tried, wrong

    with ThreadPoolExecutor(workers) as pool:
        for name, (tried, wrong) in zip(kinds, pool.map(work, kinds), strict=True):
            report.tried[name] = tried
            report.lost += wrong
    report.seconds = time.perf_counter() - started
    return report


if __name__ == "__main__":
    sys.exit(main(run, __doc__, most=(None, "a seeded choice of so many steps of each kind; default: all")))
