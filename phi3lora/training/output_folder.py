"""The output folder of a run: one run at a time in it, the checkpoints of one run, which of them stay; ``run.yaml``.

A folder's checkpoints are one line of steps. A run that goes back to an earlier one, or skips a damaged one, renames
the newer ones (``checkpoint-8.set-aside``), so that neither rotation nor a resume mistakes them for its own.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import LoraConfig, TrainingConfig
from ..errors import CheckpointError
from ..files import fsync, remove, try_folder, write_atomic
from ..lora.inject import lora_layers
from ..run_file import is_record, run_text
from ..run_settings import setting_names
from .checkpoint import checkpoints, step_of
from .picture import PICTURE
from .setup import PlannedRun

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("phi3lora")

RECORD = "run.yaml"
"""Name of the file in the output folder that has the settings of the run, as resolved, and runs again."""
_FILES = ("metrics.jsonl", PICTURE)
"""Files of a run, beside its checkpoints and its record, that another run would overwrite."""


# --- The lock


class OutputFolder:
    """The output folder of a run, with a lock on it: a second run in it is refused.

    The lock is the operating system's (``flock`` on the folder), so it ends with the process, even a killed one. It
    belongs to the folder and not to its name, so :meth:`keep` looks whether the name still means the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Create the folder and lock it.

        Raises:
            CheckpointError: another run holds it, in this process or another; it cannot be written.
        """
        _release_locks_in_forked_children()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self._descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"output_dir={str(self.folder)!r} cannot be written: {error}; use another folder"
            ) from error
        _LOCKED.add(self)
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise CheckpointError(
                f"output_dir={str(self.folder)!r} is in use by another run; wait for it, stop it, or use another folder"
            ) from None
        except OSError as error:
            logger.warning("cannot lock %s (%s): a second run in it would go unnoticed", self.folder, error)

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def is_held(self) -> bool:
        """Return whether the folder of this name is still the one that was locked."""
        try:
            return self._descriptor is not None and os.path.samestat(os.stat(self.folder), os.fstat(self._descriptor))
        except OSError:
            return False

    def keep(self) -> None:
        """Create and lock the folder again if it was deleted or replaced.

        Raises:
            CheckpointError: another run has made it and uses it, or has left checkpoints in it.
        """
        if self.is_held():
            return
        self.release()
        self.acquire()
        found = checkpoints(self.folder)
        if found:
            self.release()
            raise CheckpointError(
                f"output_dir={str(self.folder)!r} was deleted or replaced during the run and now holds another run's "
                f"checkpoints (the newest is {found[0].name}); nothing is written there"
            )
        logger.warning("%s was deleted or replaced during the run: its earlier checkpoints are gone", self.folder)


_LOCKED: weakref.WeakSet[OutputFolder] = weakref.WeakSet()


def _release_all() -> None:
    for output in list(_LOCKED):
        output.release()


@functools.cache
def _release_locks_in_forked_children() -> None:
    """Close the locked folders in every child from now on; a child that outlives the run would keep the lock."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_release_all)


@contextmanager
def locked(output_dir: str | os.PathLike[str]) -> Iterator[OutputFolder]:
    """Create the output folder and hold a lock on it inside the block; an empty folder that was created is removed."""
    output = OutputFolder(Path(output_dir))
    is_new = not output.folder.exists()
    output.acquire()
    try:
        yield output
    finally:
        output.release()
        if is_new and output.folder.is_dir() and not any(output.folder.iterdir()):
            output.folder.rmdir()


# --- Another run's files


def claim_output_dir(config: TrainingConfig, resuming: bool) -> None:
    """Make the folder this run's: refuse another run's checkpoints, or delete them if the config says so."""
    folder = Path(config.output_dir)
    for leftover in folder.glob(".checkpoint-*.tmp"):  # of a run killed while saving
        try:
            remove(leftover)
        except OSError as error:
            logger.warning("%s, left by a killed run, cannot be deleted: %s", leftover, error)
    found, goes_on = check_output_dir(config), resuming and _resumes_here(config)
    files = [folder / name for name in _FILES]
    if found or (config.overwrite_output_dir and not goes_on):
        found += [*folder.glob("checkpoint-*.set-aside*"), *files]
    try:
        for path in found:
            remove(path)
        for path in [] if goes_on else [path for path in files if path.is_file()]:
            names = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
            kept = path.rename(next(name for name in names if not name.exists()))
            logger.warning("%s is of an earlier run: renamed to %s", path, kept.name)
    except OSError as error:
        raise CheckpointError(
            f"output_dir={config.output_dir!r} holds an earlier run's files that cannot be removed: {error}; use "
            f"another folder"
        ) from error


def check_output_dir(config: TrainingConfig) -> list[Path]:
    """Return the checkpoints that this run would delete; refuse them unless ``overwrite_output_dir`` is set.

    A folder that cannot be written is refused, too. No file is left in it.
    """
    try:
        try_folder(Path(config.output_dir))
    except OSError as error:
        raise CheckpointError(
            f"output_dir={config.output_dir!r} cannot be written to: {error.strerror}; use another folder"
        ) from error
    found = [] if _resumes_here(config) else checkpoints(config.output_dir)
    if found and not config.overwrite_output_dir:
        raise CheckpointError(
            f"output_dir={config.output_dir!r} holds another run's checkpoints (the newest is {found[0].name}); "
            f"set resume_from_checkpoint=True to continue it, overwrite_output_dir=True to delete them, or use "
            f"another folder"
        )
    return found


def _resumes_here(config: TrainingConfig) -> bool:
    """Return whether the run is to go on from a checkpoint in its own output folder, if there is one."""
    selected = config.resume_from_checkpoint
    if selected is True or selected == "auto":
        return True
    return bool(selected) and Path(str(selected)).parent.resolve() == Path(config.output_dir).resolve()


# --- Which checkpoints stay


def rotate(
    output_dir: str | os.PathLike[str], keep: int | None, best: str | None, saved: Path | None = None
) -> list[Path]:
    """Delete the oldest checkpoints until ``keep`` remain, and return the deleted ones.

    The checkpoint that was just ``saved`` (None: the newest) and the one called ``best`` always stay; so do the
    targets of their links. Checkpoints newer than ``saved`` are not this run's. If one is a link, only the link goes.
    """
    paths = checkpoints(output_dir)
    if keep is None or not paths:
        return []
    paths = paths[paths.index(saved) if saved in paths else 0 :]
    protected = {path.resolve() for path in paths if path == paths[0] or path.name == best}
    others = [path for path in paths if path.resolve() not in protected]
    deleted = others[max(0, keep - len(protected)) :]
    for path in deleted:
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a deletion that is cut short leaves no half one
        try:
            path.rename(hidden)
            remove(hidden)
        except OSError as error:
            left = path if os.path.lexists(path) else hidden
            raise CheckpointError(
                f"save_total_limit={keep}: the old checkpoint {path.name} cannot be deleted: {error}. Delete "
                f"{str(left)!r} yourself; continue_on_save_error=True lets a run continue"
            ) from error
    return deleted


def set_aside_newer(output_dir: str | os.PathLike[str], step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, from which a run goes on, and return the new paths.

    They are damaged, or belong to a branch that the run leaves. ``resume_from_checkpoint`` still accepts their paths.
    """
    renamed = []
    for path in checkpoints(output_dir):
        if step_of(path) <= step:
            break
        names = (f"{path.name}.set-aside{f'-{i}' if i else ''}" for i in itertools.count())
        target = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
        try:
            path.rename(target)
            fsync(target.parent)
        except OSError as error:
            raise CheckpointError(
                f"{str(path)!r} is newer than step {step}, from which this run goes on, and cannot be renamed: "
                f"{error}. Move it, or use another output_dir"
            ) from error
        logger.warning("%s is newer than step %d, from which this run goes on: renamed to %s", path, step, target.name)
        renamed.append(target)
    return renamed


# --- The settings of the run


def record_path(output_dir: str | os.PathLike[str]) -> Path:
    """Return the path of a run's record: ``run.yaml``, or ``run-1.yaml`` beside one that a user wrote."""
    names = itertools.chain([RECORD], (f"run-{i}.yaml" for i in itertools.count(1)))
    paths = (Path(output_dir, name) for name in names)
    return next(path for path in paths if not os.path.lexists(path) or is_record(path))


def write_record(run: PlannedRun, resumed: bool) -> None:
    """Write what is known of a run into its output folder, and say in the file what is not known.

    ``load_model`` and ``ChatDataset.load`` leave what they were given in ``origin``. Models and rows that were made in
    Python have none; then a resumed run leaves the file of its start as it is.
    """
    model, config, path = run.model, run.config, record_path(run.config.output_dir)
    unknown: list[str] = []
    source = getattr(model, "origin", None)
    if source is None:
        unknown.append("model: not known, as it was made in Python. Fill in name_or_path.")
    elif not (resumed or source.get("adapter")) and any(layer.lora_B.any() for layer in lora_layers(model).values()):
        unknown.append("adapter: not known; the run went on from adapters that were trained before. Fill in adapter.")
    data = _data_section(run.train_dataset.origin, run.eval_dataset, unknown)
    if unknown and resumed and path.exists():
        return
    lora = getattr(model, "lora_config", None) or LoraConfig()
    text = run_text(source or {}, data, lora, config, unknown=unknown)
    try:
        write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.error("the settings of the run could not be written: %s", error)
    else:
        if path.name != RECORD:
            logger.warning("%s is yours and stays as it is: the run's settings, as resolved, are in %s", RECORD, path)


def _data_section(origin: Mapping[str, Any] | None, eval_dataset: Any, unknown: list[str]) -> dict[str, Any]:
    """Return the section ``data``, and add what is not known of it."""
    if origin is None:
        unknown.append("data: not known, as the rows were chosen or made in Python. Fill in source.")
        return {}
    names = setting_names("data")
    data = {name: value for name, value in origin.items() if name in names and value is not None}
    if eval_dataset is None or ("eval_share" in origin and eval_dataset.origin == origin):  # two parts of one split
        return data
    held_out = eval_dataset.origin
    options = {
        name: value for name, value in origin.items() if name not in ("source", "split", "streaming", "buffer_size")
    }
    if held_out is None or any(held_out.get(name) != value for name, value in options.items()):
        unknown.append("held-out data: not known, or loaded with other options. Fill in eval_source or eval_share.")
        return data
    return {**data, "eval_source": held_out["source"], "eval_split": held_out["split"]}
