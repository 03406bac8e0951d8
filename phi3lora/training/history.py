"""The log lines of a run on disk: ``metrics.jsonl`` grows by whole lines, and checkpoints share it.

A checkpoint holds every line up to its step. Up to 1,000 they are in its ``trainer_state.json``. Writing 100,000 into
every checkpoint took 5.5 s, so in a longer run a checkpoint also has ``history.jsonl``: a hard link to
``metrics.jsonl`` (a copy where there are no links), of which so many bytes are the checkpoint's:

    metrics.jsonl                     {"step": 1, ...} {"step": 2, ...} {"step": 3, ...}
    checkpoint-2/history.jsonl        |------------- "bytes": 94 -----|   the rest is not its own
    checkpoint-2/trainer_state.json   "history": {"bytes": 94, "sha256": of these bytes}

A file that checkpoints share is never shortened or written over. A run that starts or resumes makes a new one and
renames it to ``metrics.jsonl``, so that a power cut leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..files import parse_json, write_atomic

logger = logging.getLogger("phi3lora")

HISTORY = "history.jsonl"
"""The file's name in a checkpoint."""


class HistoryFile:
    """``metrics.jsonl``, which holds the ``history`` of a run's state: lines are appended, and never change.

    A full disk ends the file, not the run: checkpoints then get their own copy of the lines.
    """

    def __init__(self, path: Path, state: Any) -> None:
        self.path, self.state = path, state
        self._file: BinaryIO | None = None
        self._lines, self._last = 0, list[dict[str, Any]]()  # that were written, and the last of them
        self._bytes, self._sha256 = 0, hashlib.sha256()

    def start(self) -> None:
        """Write the history so far to a new file and open it."""
        self.close()
        data = _encode(self.state.history)
        try:
            write_atomic(self.path, lambda file: file.write_bytes(data))
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            return self._give_up(error)
        self._lines, self._last = len(self.state.history), self.state.history[-1:]
        self._bytes, self._sha256 = len(data), hashlib.sha256(data)

    def append(self) -> None:
        """Write the lines that were added to the history since the last call."""
        if self._file is None:
            return
        history = self.state.history
        if history[self._lines - 1 : self._lines] != self._last:  # a callback has taken lines out
            return self.start()
        data = _encode(history[self._lines :])
        try:
            if self._file.write(data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            return self._give_up(error)
        self._lines, self._last, self._bytes = len(history), history[-1:], self._bytes + len(data)
        self._sha256.update(data)

    def sync(self) -> None:
        """Make sure that the file is in its place, complete and on disk."""
        self.append()
        if self._file is not None and not self._is_in_place(self._file):
            self.start()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def attach(self, target: Path) -> dict[str, Any]:
        """Give a checkpoint the lines so far, as ``target``, and return what :func:`read_history` needs."""
        if self._file is None:
            data = _encode(self.state.history)
            target.write_bytes(data)
            return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            os.link(self.path, target)
        except OSError:  # no links on this file system, or too many
            with open(self.path, "rb") as file:
                target.write_bytes(file.read(self._bytes))
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_in_place(self, file: BinaryIO) -> bool:
        """Return whether the path still names the file that was written; somebody may have deleted or edited it."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(file.fileno())) and there.st_size == self._bytes

    def _give_up(self, error: OSError) -> None:
        logger.error("%s is no longer written: %s", self.path, error)
        if self._file is not None:
            try:
                self._file.truncate(self._bytes)  # to the last whole line
            except OSError as why:
                logger.error("%s may end in half a line: %s", self.path, why)
        self.close()


def read_history(folder: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a checkpoint, which :meth:`HistoryFile.attach` described.

    Raises:
        OSError, ValueError: the file is missing, or its first bytes have changed.
    """
    with open(folder / HISTORY, "rb") as file:
        data = file.read(int(facts["bytes"]))
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{HISTORY} has changed since it was written")
    return [parse_json(line) for line in data.splitlines()]


def _encode(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
