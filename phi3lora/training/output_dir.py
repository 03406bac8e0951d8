"""A run's folder belongs to one run at a time, and to one run's checkpoints.

The lock is the operating system's (flock, on the folder itself): it goes with the process, also one that is killed, so
no stale lock is ever left behind.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import TrainingConfig
from ..errors import CheckpointError
from .checkpoint import checkpoints

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("phi3lora")


@contextmanager
def locked(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder for the time of the block; it is made where it is missing, and goes again if nothing came.

    Raises:
        CheckpointError: another run holds it, in this process or another; it cannot be written.
    """
    folder = Path(output_dir)
    missing = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"output_dir={str(folder)!r} cannot be written: {error}; take another folder") from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # which unlocks
        if missing and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"output_dir={str(folder)!r} is in use by another run; wait for it, stop it, or take another folder"
        ) from None
    except OSError as error:
        logger.warning("no lock on %s (%s): a second run in it would not be noticed", folder, error)


def claim_output_dir(config: TrainingConfig, resuming: bool) -> None:
    """Refuse a folder with another run's checkpoints, or clear it if ``overwrite_output_dir`` says so."""
    for leftover in Path(config.output_dir).glob(".checkpoint-*.tmp"):  # of a save that was killed
        shutil.rmtree(leftover)
    found = check_output_dir(config, resuming)
    for path in found:
        shutil.rmtree(path)
    if found:
        (Path(config.output_dir) / "metrics.jsonl").unlink(missing_ok=True)


def check_output_dir(config: TrainingConfig, resuming: bool = False) -> list[Path]:
    """Another run's checkpoints, which ``overwrite_output_dir`` lets a new run delete; without it they are an error."""
    found = checkpoints(config.output_dir)
    if resuming or config.resume_from_checkpoint:
        return []
    if found and not config.overwrite_output_dir:
        raise CheckpointError(
            f"output_dir={config.output_dir!r} holds another run's checkpoints ({found[0].name} the newest); "
            f"set resume_from_checkpoint=True to go on with it, overwrite_output_dir=True to delete them, or take "
            f"another folder"
        )
    return found
