"""Training checkpoints: written whole or not at all, checked before use, and enough to go on bit for bit.

    output_dir/checkpoint-{step}/
      lora.safetensors     the adapters (also a file for load_adapter)
      lora_config.json     how they are built
      trainer_state.json   TrainingState, the TrainingConfig, the dataset's fingerprint, versions
      optimizer.pt         moments
      scheduler.pt         step and learning rate (schedules are functions of the step), gradient scaler
      rng_state_{rank}.pth torch, CUDA, NumPy and Python generators, all as tensors
      manifest.json        SHA-256 of each file above

Written into a hidden temporary folder, each file and the folder fsynced, then renamed: a checkpoint renamed before its
data is on disk is not saved. Read with ``weights_only=True``: nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ..adapters.adapter_file import adapter_metadata, load_adapter_state, read_adapter, save_adapter
from ..config import TrainingConfig
from ..errors import AdapterError, CheckpointError, error_line, short_repr
from ..files import fsync, read_json, read_pickled, sha256_of
from .optim import check_optimizer_state
from .state import TrainingState

logger = logging.getLogger("phi3lora")

_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_ALWAYS = ("lora.safetensors", "lora_config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt")

# What reading a file of a known form meets where the form is another: JSON and pickles of any types.
_UNEXPECTED = (OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)

# Settings that may differ between the run that saved and the run that resumes: when to stop, look, save and say.
_MAY_CHANGE = frozenset(
    """
    activation_checkpointing compile continue_on_save_error disable_tqdm early_stopping_patience
    early_stopping_threshold eval_on_start eval_steps eval_strategy gradient_checkpointing load_best_model_at_end
    log_level logging_first_step logging_steps logging_strategy max_nonfinite_steps max_steps num_train_epochs
    output_dir overwrite_output_dir per_device_eval_batch_size report_to resume_from_checkpoint resume_with_changes
    run_name save_steps save_strategy save_total_limit
    """.split()
)


@dataclass
class Resumable:
    """What a checkpoint saves and restores in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    config: TrainingConfig
    data: dict[str, Any]
    """What fixes the batches: the dataset's fingerprint and size, the row length."""
    base_dtype: str
    """Of the frozen weights, and their format where it is another."""
    rank: int = 0


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders, newest first."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def save_checkpoint(run: Resumable, state: TrainingState) -> Path:
    """Write ``output_dir/checkpoint-{step}``; on return it is on disk. An older one of that name is replaced.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are whole.
    """
    folder = Path(run.config.output_dir)
    final = folder / f"checkpoint-{state.global_step}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_files(run, state, temporary)
        for path in temporary.iterdir():
            fsync(path)
        fsync(temporary)
        _rename_over(temporary, final)
    except (OSError, RuntimeError, AdapterError) as error:  # RuntimeError: how torch.save tells of a full disk
        raise CheckpointError(
            f"checkpoint {str(final)!r} could not be written: {error}. {_free(folder)}; the earlier checkpoints are "
            f"whole. continue_on_save_error=True lets a run go on without it"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_files(run: Resumable, state: TrainingState, folder: Path) -> None:
    """Everything in a checkpoint, the manifest last."""
    save_adapter(run.model, folder / "lora.safetensors")
    _write_json(folder / "lora_config.json", adapter_metadata(run.model))
    _write_json(folder / "trainer_state.json", _about(run, state))
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    rates = [group["lr"] for group in run.optimizer.param_groups]
    scheduler = {"last_step": state.global_step, "learning_rates": rates, "scaler": run.scaler.state_dict()}
    torch.save(scheduler, folder / "scheduler.pt")
    torch.save(rng_state(), folder / f"rng_state_{run.rank}.pth")
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    _write_json(folder / _MANIFEST, {"format": 1, "sha256": files})


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return f"the folder cannot be read ({error})"


def _rename_over(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``; what had it goes only after."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _undo_cut_replacements(folder: Path) -> None:
    """Where a replacement was cut between its two renames, the older checkpoint gets its name back."""
    for old in folder.glob(".checkpoint-*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if not target.exists() and damage(old) is None:
            old.rename(target)


def _about(run: Resumable, state: TrainingState) -> dict[str, Any]:
    return {
        "state": state.to_dict(),
        "config": run.config.to_dict(),
        "data": run.data,
        "base_dtype": run.base_dtype,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is whole."""
    try:
        files = read_json(path / _MANIFEST)["sha256"]
        unlisted = [name for name in _ALWAYS if name not in files]
        if unlisted:
            return f"its manifest lists no {unlisted[0]}"
        for name, expected in files.items():
            if Path(name).name != name or "\0" in name:
                return f"its manifest names {name!r}, outside the folder"
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256_of(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"no readable {_MANIFEST} ({error_line(error)})"
    return None


def newest_good_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning each."""
    _undo_cut_replacements(Path(output_dir))
    for path in checkpoints(output_dir):
        why = damage(path)
        if why is None:
            return path
        logger.warning("passing over %s: %s", path, why)
    return None


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """What ``resume_from_checkpoint`` asks for; None for a fresh start.

    Raises:
        CheckpointError: it asks for a checkpoint and there is no good one.
    """
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True or wanted == "auto":
        found = newest_good_checkpoint(config.output_dir)
        if found is None and wanted is True:
            raise CheckpointError(
                f"resume_from_checkpoint=True, but {config.output_dir!r} has no good checkpoint; "
                f"'auto' starts afresh when there is none"
            )
        return found
    path = Path(wanted)
    why = damage(path) if path.is_dir() else "no such folder"
    if why is not None:
        raise CheckpointError(f"cannot resume from {short_repr(str(path))}: {why}")
    return path


def load_checkpoint(path: Path, run: Resumable) -> TrainingState:
    """Put a whole checkpoint's adapters, optimizer, scaler and generators back.

    Raises:
        CheckpointError: it is of another run (what differs is listed) or not readable.
        AdapterError: its adapters do not fit the model.
    """
    try:
        about = read_json(path / "trainer_state.json")
        _check_same_run(path, about, run)
        state = TrainingState.from_dict(about["state"])
        optimizer = read_pickled(path / "optimizer.pt")
        check_optimizer_state(optimizer, run.optimizer)
        scheduler = read_pickled(path / "scheduler.pt")
        generators = read_pickled(path / f"rng_state_{run.rank}.pth")
    except CheckpointError:
        raise
    except _UNEXPECTED as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {error_line(error)}") from error
    tensors, _ = read_adapter(path / "lora.safetensors")
    load_adapter_state(run.model, tensors, str(path))
    try:
        run.optimizer.load_state_dict(optimizer)
        run.scaler.load_state_dict(scheduler["scaler"])
        set_rng_state(generators)
        return state
    except _UNEXPECTED as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} does not hold what a run needs: {error_line(error)}"
        ) from error


def _check_same_run(path: Path, about: dict[str, Any], run: Resumable) -> None:
    """Refuse a checkpoint of other adapters; one of other data, settings or versions unless the user says so."""
    facts, ours = read_json(path / "lora_config.json"), adapter_metadata(run.model)
    changes = _changes(about, run)
    dropout = [config.get("lora_dropout") for config in (facts.get("config") or {}, ours.get("config") or {})]
    if dropout[0] != dropout[1]:
        changes.append(f"lora_dropout {short_repr(dropout[0])} then, {dropout[1]!r} now")
    if changes and run.config.resume_with_changes:
        logger.warning("resuming %s although it is of another run: %s", path, "; ".join(changes))
        changes = []
    if about["config"].get("optim") != run.config.optim:  # whose state cannot be another's
        changes.append(f"optim {short_repr(about['config'].get('optim'))} then, {run.config.optim!r} now")
    if facts["layers"] != ours["layers"]:
        names = [n for n in {**facts["layers"], **ours["layers"]} if facts["layers"].get(n) != ours["layers"].get(n)]
        first = names[0]
        then, now = facts["layers"].get(first), ours["layers"].get(first)
        changes.append(f"adapters of {len(names)} layers, {first}: {short_repr(then)} then, {short_repr(now)} now")
    if changes:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of another run: {'; '.join(changes)}. Resume with what it was made with, "
            f"start afresh in another output_dir, or (same adapters and optim) set resume_with_changes=True"
        )


def _changes(about: dict[str, Any], run: Resumable) -> list[str]:
    """What of the settings, the data, the base and the versions is not as it was."""
    changes = [
        f"{name} {short_repr(about['config'].get(name))} then, {value!r} now"
        for name, value in run.config.to_dict().items()
        if name not in _MAY_CHANGE and name != "optim" and about["config"].get(name) != value
    ]
    changes += [
        f"{name} of the data {short_repr(about['data'].get(name))} then, {value!r} now"
        for name, value in run.data.items()
        if about["data"].get(name) != value
    ]
    if about["base_dtype"] != run.base_dtype:
        changes.append(f"base weights {short_repr(about['base_dtype'])[1:-1]} then, {run.base_dtype} now")
    for package, now in _versions().items():
        then = about.get("versions", {}).get(package, now)
        if then.partition("+")[0] != now.partition("+")[0]:  # another build (+cpu, +cu130) is the same version
            changes.append(f"{package} {short_repr(then)[1:-1]} then, {now} now")
    return changes


def rotate(output_dir: str | os.PathLike[str], keep: int | None, best: str | None) -> list[Path]:
    """Delete the oldest checkpoints beyond ``keep``, never the one called ``best`` nor the newest; those deleted."""
    if keep is None:
        return []
    deleted = []
    paths = checkpoints(output_dir)
    protected = {path.name for path in paths[:1]} | {best}
    kept = sum(path.name in protected for path in paths)
    for path in paths:
        if path.name in protected:
            continue
        if kept < keep:
            kept += 1
            continue
        shutil.rmtree(path)
        deleted.append(path)
    return deleted


def rng_state() -> dict[str, Any]:
    """The state of every generator a run may draw from, as tensors."""
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
    """Put back what :func:`rng_state` gave. CUDA's states apply to as many devices as there are."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    version, *numbers = state["python"].tolist()
    random.setstate((version, tuple(numbers), state["python_gauss"]))
    position, has_gauss, cached = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
