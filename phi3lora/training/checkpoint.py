"""Training checkpoints: whole or absent on disk, verified before use, and enough to resume bit for bit.

    output_dir/checkpoint-{step}/
      lora.safetensors      the adapters (load_adapter reads this file too)
      lora_config.json      how the adapters are built
      trainer_state.json    TrainingState, TrainingConfig, the dataset's fingerprint, a sample of the base, versions
      history.jsonl         all log lines, if there are more than 1,000: see history.py
      optimizer.pt          moments
      scheduler.pt          step and learning rate (schedules are functions of the step), gradient scaler
      rng_state_{rank}.pth  torch, CUDA, NumPy and Python generators, as tensors and plain numbers
      manifest.json         SHA-256 of each file above but history.jsonl, whose SHA-256 is in trainer_state.json

A checkpoint is written to a hidden temporary folder, every file and the folder are fsynced, and only then is the folder
renamed: a crash at any moment leaves the earlier checkpoints intact. It is read with ``weights_only=True``, so nothing
in it is executed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ..adapters.adapter_file import adapter_metadata, load_adapter_state, read_adapter, save_adapter
from ..config import TrainingConfig
from ..errors import AdapterError, CheckpointError, error_line, first_of, is_int, printable, short_repr
from ..files import read_json, read_pickled, sha256_of, write_folder
from ..lora.base_weight import base_format
from .history import HISTORY, HistoryFile, read_history
from .optim import check_optimizer_state, convert_optimizer_state

logger = logging.getLogger("phi3lora")

_NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
"""Name of the file with the checksums of a checkpoint's files, which is written last."""
_FORMAT = 1  # of a checkpoint
_LAST_LINES = 1000  # of the history, in trainer_state.json
_REQUIRED = ("lora.safetensors", "lora_config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt")

# The errors that a file with unexpected contents causes when it is read.
_UNEXPECTED = (OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)

# Settings that a resumed run may change without resume_with_changes. max_steps and num_train_epochs also move the rest
# of the learning-rate schedule; compile and checkpointing of activations change speed, memory and rounding.
_MAY_CHANGE = frozenset(
    """
    activation_checkpointing compile continue_on_save_error disable_tqdm early_stopping_patience
    early_stopping_threshold eval_max_new_tokens eval_max_samples eval_on_start eval_steps eval_strategy
    gradient_checkpointing load_best_model_at_end log_level logging_first_step logging_steps logging_strategy
    max_nonfinite_steps max_steps num_train_epochs output_dir overwrite_output_dir parallel
    per_device_eval_batch_size predict_with_generate project report_to resume_from_checkpoint resume_with_changes
    run_name save_steps save_strategy save_total_limit
    """.split()
)
_COMPARED_APART = ("optim", "gradient_accumulation_steps")


@dataclass
class TrainingState:
    """Counters and history of a run, as JSON types.

    Checkpoints hold it in ``trainer_state.json``. Callbacks receive it and may set ``should_stop``.
    """

    total_steps: int = 0
    """Optimizer steps in the whole run."""
    global_step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next step, counted from 0 (for a stream: its window)."""
    step_in_epoch: int = 0
    """Steps of that epoch already done. With ``epoch`` this is the data cursor."""
    window: str | None = None
    """Fingerprint of the stream's window that the cursor is in; None without a stream and at a window's start."""
    epoch_progress: float = 0.0
    """Epochs done, with a fraction."""
    tokens_seen: int = 0
    """Tokens of documents trained on, without padding."""
    train_seconds: float = 0.0
    """Seconds of training, summed over interruptions."""
    loss_sum: float = 0.0
    """Sum of token losses since the last log line, skipped steps excluded."""
    loss_count: int = 0
    """Supervised tokens in ``loss_sum``."""
    run_loss_sum: float = 0.0
    """Sum of token losses over the whole run, skipped steps excluded."""
    run_loss_count: int = 0
    """Supervised tokens in ``run_loss_sum``."""
    first_loss: float | None = None
    """Mean loss of the first step, before any update; None if it was skipped, and in checkpoints of version 0.1.0."""
    nonfinite_in_a_row: int = 0
    """Non-finite steps in a row up to the latest one, float16 overflows that the scaler handles excluded."""
    nonfinite_total: int = 0
    """Non-finite steps in the whole run, counted in the same way."""
    best_metric: float | None = None
    """Metric that the next evaluation must beat by more than ``early_stopping_threshold``."""
    best_checkpoint: str | None = None
    """Name of the best checkpoint's folder in ``output_dir``."""
    best_checkpoint_metric: float | None = None
    """Metric of the best checkpoint."""
    evaluations_without_gain: int = 0
    """Evaluations since ``best_metric`` was last beaten."""
    measured: dict[str, Any] | None = None
    """Metric, evaluation data and base that the best metrics belong to. None in checkpoints of version 0.1.0."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``metrics.jsonl``. Callbacks may add lines; those that are there are written already."""
    should_stop: bool = False
    """Set to True in a callback to end the run after this step."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without ``should_stop`` and with the last 1,000 lines of ``history``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "should_stop"}
        return {**values, "history": self.history[-_LAST_LINES:]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """Return the state that :meth:`to_dict` described; keys of another version are ignored."""
        names = {f.name for f in dataclasses.fields(cls)} - {"should_stop"}
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass
class Resumable:
    """The parts of a run that a checkpoint saves, and restores in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainingConfig
    data: dict[str, Any]
    """Facts that fix the batches: the dataset's fingerprint and size, the row length."""
    measured: dict[str, Any]
    """Metric, evaluation data (None: not evaluated) and base that the run's metrics belong to."""
    rank: int = 0
    """Number of this process; each has its own random generators."""
    processes: int = 1
    """Number of processes of the run."""
    generators: Sequence[dict[str, Any]] = ()
    """:func:`rng_state` of every process, by rank, to save; empty: of this one, the only one."""
    lines: HistoryFile | None = None
    """``metrics.jsonl``, which checkpoints share."""

    @property
    def base_dtype(self) -> str:
        """Dtype of the frozen weights, and their storage format if they are quantised."""
        return f"{self.model.get_input_embeddings().weight.dtype} {base_format(self.model)}".rstrip()  # type: ignore[operator]


# --- Writing


def save_checkpoint(run: Resumable, state: TrainingState) -> Path:
    """Write ``output_dir/checkpoint-{step}`` and return when it is on disk. A checkpoint of that name is replaced.

    Raises:
        CheckpointError: it cannot be written; the earlier checkpoints are intact.
    """
    folder = Path(run.config.output_dir)
    final = folder / f"checkpoint-{state.global_step}"
    try:
        write_folder(final, lambda temporary: _write_files(run, state, temporary), marker=MANIFEST, replaces=["*"])
    except (OSError, RuntimeError, AdapterError) as error:
        # torch.save says on a full disk: "[enforce fail at inline_container.cc:672] . unexpected pos 33088 vs 32980"
        reason = f"the disk took only a part of a file ({error})" if "unexpected pos" in str(error) else error
        goes_on = "the run continues" if run.config.continue_on_save_error else "continue_on_save_error=True continues"
        raise CheckpointError(
            f"checkpoint {str(final)!r} could not be written: {reason}. {_free_space(folder)}; the earlier checkpoints "
            f"are whole; {goes_on} without it"
        ) from error
    return final


def _write_files(run: Resumable, state: TrainingState, folder: Path) -> None:
    """Write the files of a checkpoint, the manifest last."""
    save_adapter(run.model, folder / "lora.safetensors")
    trainer_state = {
        "state": state.to_dict(),
        "config": run.config.to_dict(),
        "data": run.data,
        "base_dtype": run.base_dtype,
        "base_sample": run.measured["base"],
        "processes": run.processes,
        "versions": _versions(),
    }
    assert run.lines is not None
    run.lines.sync()
    if len(state.history) > _LAST_LINES:
        trainer_state["history"] = run.lines.attach(folder / HISTORY)
    _write_json(folder / "lora_config.json", adapter_metadata(run.model))
    _write_json(folder / "trainer_state.json", trainer_state)
    # torch's own state_dict: bitsandbytes' overrides it with a nested format, for FSDP.
    torch.save(torch.optim.Optimizer.state_dict(run.optimizer), folder / "optimizer.pt")
    rates = [group["lr"] for group in run.optimizer.param_groups]
    scheduler = {"last_step": state.global_step, "learning_rates": rates, "scaler": run.scaler.state_dict()}
    torch.save(scheduler, folder / "scheduler.pt")
    for rank, generators in enumerate(run.generators or [rng_state()]):
        torch.save(generators, folder / f"rng_state_{rank}.pth")
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != HISTORY}
    _write_json(folder / MANIFEST, {"format": _FORMAT, "sha256": files})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return f"the folder cannot be read ({error})"


# --- Finding


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage(path: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None if every file matches the manifest."""
    try:
        manifest = read_json(path / MANIFEST)
        files = manifest["sha256"]
        if (number := manifest.get("format")) != _FORMAT:
            return f"its {MANIFEST} has the format {short_repr(number)}, of another version; allowed: {_FORMAT}"
        unlisted = [name for name in _REQUIRED if name not in files]
        if unlisted:
            return f"its manifest does not list {unlisted[0]}"
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{printable(name)} is missing"
            if sha256_of(path / name) != expected:
                return f"{printable(name)} has changed since it was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"no readable {MANIFEST} ({error_line(error)})"
    return None


def newest_good_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint that is whole, and warn of each damaged one that is newer."""
    for old in Path(output_dir).glob(".checkpoint-*.old"):  # left by a crash between the two renames of write_folder
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not target.exists() and damage(old) is None:
            old.rename(target)
    for path in checkpoints(output_dir):
        reason = damage(path)
        if reason is None:
            return path
        logger.warning("skipping the damaged checkpoint %s: %s", path, reason)
    return None


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` selects, which must be whole; None for a new run."""
    selected = config.resume_from_checkpoint
    if not selected:
        return None
    if selected is True or selected == "auto":
        found = newest_good_checkpoint(config.output_dir)
        if found is None and selected is True:
            raise CheckpointError(
                f"resume_from_checkpoint=True, but {config.output_dir!r} has no good checkpoint; "
                f"'auto' starts from scratch when there is none"
            )
        return found
    path = Path(selected)
    reason = damage(path) if path.is_dir() else "no such folder"
    if reason is not None:
        inside = first_of([repr(str(found)) for found in checkpoints(path)])
        hint = f"; it holds checkpoints, allowed: one of {inside}" if inside else ""
        raise CheckpointError(f"cannot resume from {short_repr(str(path))}: {reason}{hint}")
    return path


# --- Reading


def load_checkpoint(path: Path, run: Resumable) -> TrainingState:
    """Restore adapters, optimizer, scaler and random generators from a checkpoint, and return its state.

    Raises:
        CheckpointError: it is unreadable, or belongs to another run (the message lists the differences).
        AdapterError: its adapters do not fit the model.
    """
    try:
        about = read_json(path / "trainer_state.json")
        _check_same_run(path, about, run)
        state = TrainingState.from_dict(about["state"])
        if "history" in about:
            state.history = _read_history(path, about)
        optimizer = read_pickled(path / "optimizer.pt")
        scheduler = read_pickled(path / "scheduler.pt")
        is_new = run.rank >= _processes_of(about)  # it keeps its seed
        generators = rng_state() if is_new else read_pickled(path / f"rng_state_{run.rank}.pth")
        convert_optimizer_state(optimizer, run.optimizer)
        check_optimizer_state(optimizer, run.optimizer)
        run.optimizer.load_state_dict(optimizer)
        run.scaler.load_state_dict(scheduler["scaler"])
        tensors, _ = read_adapter(path / "lora.safetensors")
        load_adapter_state(run.model, tensors, str(path))
        set_rng_state(generators)
        return state
    except (CheckpointError, AdapterError):
        raise
    except _UNEXPECTED as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {error_line(error)}") from error


def _read_history(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all log lines of a checkpoint, or the last ones: without the others the run still goes on exactly."""
    try:
        return read_history(path, about["history"])
    except (OSError, ValueError) as error:
        logger.warning("%s: all log lines but the last %d are lost: %s", path, _LAST_LINES, error_line(error))
        return list(about["state"]["history"])


def _check_same_run(path: Path, about: dict[str, Any], run: Resumable) -> None:
    """Refuse a checkpoint of other adapters or ``optim``, and other differences unless the user allows them."""
    saved, current = read_json(path / "lora_config.json"), adapter_metadata(run.model)
    changes = _changes(about, run)
    dropout = [(facts.get("config") or {}).get("lora_dropout") for facts in (saved, current)]
    if dropout[0] != dropout[1]:
        changes.append(f"lora_dropout {short_repr(dropout[0])} then, {dropout[1]!r} now")
    if changes and run.config.resume_with_changes:
        logger.warning("resuming %s although it belongs to another run: %s", path, "; ".join(changes))
        changes = []
    if about["config"].get("optim") != run.config.optim:  # one optimizer cannot use another's state
        changes.append(f"optim {short_repr(about['config'].get('optim'))} then, {run.config.optim!r} now")
    if saved["layers"] != current["layers"]:
        layers = {**saved["layers"], **current["layers"]}
        names = [name for name in layers if saved["layers"].get(name) != current["layers"].get(name)]
        then, now = (short_repr(facts["layers"].get(names[0])) for facts in (saved, current))
        changes.append(f"adapters of {len(names)} layers, {names[0]}: {then} then, {now} now")
    if changes:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of another run: {'; '.join(changes)}. Resume with the settings it was made "
            f"with, start from scratch in another output_dir, or (same adapters and optim) set resume_with_changes=True"
        )


def _shown(value: object) -> str:
    """Return the ``repr`` of a value for a message; of a digest its first 12 characters."""
    return repr(value[:12]) if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value) else short_repr(value)


def _changes(about: dict[str, Any], run: Resumable) -> list[str]:
    """Describe every difference in settings, data, base weights and versions."""
    changes = [
        f"{name} {short_repr(about['config'].get(name))} then, {value!r} now"
        for name, value in run.config.to_dict().items()
        if name not in (*_MAY_CHANGE, *_COMPARED_APART) and about["config"].get(name) != value
    ]
    accumulated, processes = about["config"].get("gradient_accumulation_steps"), _processes_of(about)
    if accumulated != run.config.gradient_accumulation_steps * run.processes / processes:
        of = ["" if processes == run.processes else f" in each of {n} processes" for n in (processes, run.processes)]
        changes.append(
            f"gradient_accumulation_steps {short_repr(accumulated)}{of[0]} then, "
            f"{run.config.gradient_accumulation_steps}{of[1]} now"
        )
    changes += [
        f"{name} of the data {_shown(about['data'].get(name))} then, {_shown(value)} now"
        for name, value in run.data.items()
        if about["data"].get(name) != value
    ]
    if about["base_dtype"] != run.base_dtype:
        changes.append(f"base weights {about['base_dtype']} then, {run.base_dtype} now")
    elif about.get("base_sample", run.measured["base"]) != run.measured["base"]:
        then, now = _shown(about["base_sample"]), _shown(run.measured["base"])
        changes.append(f"numbers of the base weights (SHA-256 of a sample) {then} then, {now} now")
    was, now = (about["state"].get("measured") or {}).get("eval_data"), run.measured["eval_data"]
    if None not in (was, now) and was != now:
        changes.append(f"fingerprint of the evaluation data {_shown(was)} then, {_shown(now)} now")
    for package, now in _versions().items():
        then = about.get("versions", {}).get(package, now)
        if then.partition("+")[0] != now.partition("+")[0]:  # another build (+cpu, +cu130) is the same version
            changes.append(f"{package} {then} then, {now} now")
    return changes


def _processes_of(about: dict[str, Any]) -> int:
    """Return the number of processes that made a checkpoint; version 0.1.0 knew only one."""
    processes = about.get("processes", 1)
    if not is_int(processes, 1):
        raise ValueError(f"processes is {short_repr(processes)}; allowed: a whole number >= 1")
    return int(processes)


def _versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


# --- Random generators


def rng_state() -> dict[str, Any]:
    """Return the state of every generator that a run may draw from, as tensors and numbers."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generators from :func:`rng_state`; CUDA states apply to as many devices as there are."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    version, *numbers = state["python"].tolist()
    random.setstate((version, tuple(numbers), state["python_gauss"]))
    position, has_gauss, cached = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
