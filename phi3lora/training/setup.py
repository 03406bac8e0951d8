"""Before the first step: what can be checked is checked, what is resolved is told."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..data.batches import BatchPlan, StepSchedule
from ..data.dataset import ChatDataset, ChatStream
from ..errors import CheckpointError, DataError, TrainingError
from ..inference.evaluation import METRICS
from ..lora.base_weight import base_format, count_parameters
from ..lora.inject import lora_layers
from ..model.attention import use_packed_attention
from ..model.backend import Backend, choose_backend
from ..model.estimate import MemoryPlan, plan_memory
from ..model.load import longrope_boundary, longrope_note, model_device
from .checkpoint import checkpoints
from .distributed import require_one_process
from .logging import check_trackers
from .optim import optimizer_bytes, warmup_steps
from .state import TrainingState
from .step import Precision


def check_run(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    eval_dataset: ChatDataset | None,
    config: TrainingConfig,
) -> None:
    """Raise before any work is lost: nothing to train, something else trainable, data that does not fit the model."""
    require_one_process()
    layers = lora_layers(model)
    if not layers:
        raise TrainingError("the model has no adapters to train; call inject_lora(model, LoraConfig(...)) first")
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name, p in trainable.items() if id(p) not in adapters and not name.endswith("bias")]
    if others or not trainable:
        raise TrainingError(
            f"only adapters may be trainable, but {', '.join(others[:3]) or 'nothing'} is; "
            f"inject_lora freezes the rest, or call mark_only_lora_as_trainable(model)"
        )
    for name, parameter in trainable.items():
        if id(parameter) in adapters and parameter.dtype.itemsize < 4:
            raise TrainingError(
                f"{name} is {parameter.dtype}; adapters train in float32. Cast the base model before inject_lora, "
                f"not after"
            )
    if eval_dataset is None and (config.eval_strategy != "no" or config.eval_on_start):
        setting = "eval_on_start=True" if config.eval_on_start else f"eval_strategy={config.eval_strategy!r}"
        raise TrainingError(f"{setting} needs an eval_dataset")
    if eval_dataset is not None and not eval_dataset.known_length:
        raise TrainingError("eval_dataset is a stream, which has no end to evaluate to; give stream.take(1000), say")
    if not train_dataset.known_length and config.max_steps <= 0:
        raise TrainingError("a stream's length is not known, and max_steps is not set; set max_steps to a number > 0")
    metric = (config.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in METRICS:
        raise TrainingError(f"metric_for_best_model={config.metric_for_best_model!r}; allowed: {', '.join(METRICS)}")
    check_trackers(config)
    check_documents(model, train_dataset.first_window, "train_dataset", config.max_length)
    if eval_dataset is not None:
        check_documents(model, eval_dataset, "eval_dataset", None)


def check_documents(model: nn.Module, dataset: ChatDataset, name: str, row_length: int | None) -> None:
    """Raise where documents do not fit the model or, if it is given, the rows."""
    model_config: Any = model.config
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: it has no documents")
    longest = int(dataset.lengths.max())
    if longest > model_config.max_position_embeddings:
        raise DataError(
            f"{name} has a document of {longest} tokens; the model allowed "
            f"{model_config.max_position_embeddings}. Load the dataset with a smaller max_length"
        )
    if row_length is not None and longest > row_length:
        raise DataError(
            f"max_length={row_length}, but {name} (loaded with max_length={dataset.max_length}) has a "
            f"document of {longest} tokens; load it with the smaller max_length, or leave max_length out"
        )
    if dataset.largest_token_id() >= model_config.vocab_size:
        raise DataError(
            f"{name} has token id {dataset.largest_token_id()}; the model's vocabulary has "
            f"{model_config.vocab_size}. Tokenise with the model's own tokenizer"
        )


def resolve_backend(model: nn.Module, config: TrainingConfig, precision: Precision) -> Backend:
    """Choose how the decoder layers of a run are computed."""
    with precision.autocast():
        offload = config.activation_checkpointing == "offload"
        return choose_backend(model, compile=config.compile, offload=offload, training=True)


def resolve_checkpointing(
    model: nn.Module, dataset: ChatDataset | ChatStream, config: TrainingConfig, backend: Backend, precision: Precision
) -> tuple[str, MemoryPlan]:
    """The activation checkpointing mode, ``"auto"`` resolved to the fastest that fits, and the prediction behind it."""
    plan = plan_step_memory(model, dataset, config, backend, precision)
    return checkpointing_mode(config, plan, backend), plan


def plan_step_memory(
    model: nn.Module,
    dataset: ChatDataset | ChatStream,
    config: TrainingConfig,
    backend: Backend,
    precision: Precision,
    base_precision: str | None = None,
) -> MemoryPlan:
    """The prediction for the largest micro-batch of a run."""
    limit = config.max_length or dataset.max_length
    width = limit if config.packing else min(limit, dataset.max_document_tokens)
    tokens = config.per_device_train_batch_size * width
    with precision.autocast():
        return plan_memory(model, tokens, backend.kind, optimizer_bytes(config.optim), base_precision)


def checkpointing_mode(config: TrainingConfig, plan: MemoryPlan, backend: Backend) -> str:
    """The mode that is configured, ``"auto"`` resolved."""
    mode = str(config.activation_checkpointing)
    if mode == "auto":
        mode = plan.fastest_that_fits()
        if mode == "offload" and backend.kind == "compiled":
            mode = "full"
    return mode


def resolve_plans(
    model: nn.Module, train_dataset: ChatDataset | ChatStream, config: TrainingConfig, backend: Backend
) -> StepSchedule:
    """The order of documents, rows, batches and steps."""
    plan = BatchPlan(
        train_dataset.first_window,
        batch_size=config.per_device_train_batch_size,
        max_length=config.max_length or train_dataset.max_length,
        packing=config.packing,
        seed=config.seed if config.data_seed is None else config.data_seed,
        boundary=longrope_boundary(model.config),
        fixed_shape=config.packing and backend.kind == "compiled",
    )
    check = partial(check_documents, model, name="train_dataset", row_length=config.max_length)
    return StepSchedule(plan, config, train_dataset, check)


def banner_facts(
    model: nn.Module,
    steps: StepSchedule,
    config: TrainingConfig,
    state: TrainingState,
    precision: Precision,
    eval_dataset: ChatDataset | None,
    backend: Backend,
    checkpointing: tuple[str, MemoryPlan],
) -> dict[str, Any]:
    """Name -> value of everything that was resolved or inherited."""
    use_packed_attention(model)
    plan, model_config = steps.plan, model.config
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = base_format(model)
    rows = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} rows"
    width = f"packed to {plan.max_length} tokens" if plan.packing else "one document each, padded"
    warmup = warmup_steps(config, steps.total) if config.lr_scheduler_type != "constant" else 0
    faster = "" if config.lora_plus_lr_ratio is None else f" (LoRA+: B times {config.lora_plus_lr_ratio:g})"
    facts = {
        "model": f"{type(model).__name__}, {count_parameters(model):,} parameters, {trainable:,} trainable "
        f"in {len(lora_layers(model))} layers" + (f", base in {base}" if base else ""),
        "device": f"{model_device(model)}, {precision.name}, attention {model_config._attn_implementation}, "  # type: ignore[union-attr]
        f"layers {backend}",
        "memory": f"activation checkpointing {checkpointing[0]}"
        + (f"; predicted peak by mode: {checkpointing[1]}" if checkpointing[1].available_gib is not None else ""),
        "train data": steps.dataset,
        "eval data": eval_dataset,
        "step": f"{rows}, {width}",
        "steps": f"{steps.total:,} ({state.global_step:,} done)",
        "optimizer": f"{config.optim}, {config.lr_scheduler_type} from {config.learning_rate:g}{faster}, "
        f"{warmup} warm-up steps, weight decay {config.weight_decay:g}, gradient clipped to {config.max_grad_norm:g}",
        "seed": f"{config.seed} (data {plan.seed})",
        "output": config.output_dir,
        "without effect": ", ".join(config.inert) or None,
        "longrope": longrope_note(model_config) if plan.boundary else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


# ----------------------------------------------------------------------------------------------------
# A run's folder belongs to one run at a time, and to one run's checkpoints.
#
# The lock is the operating system's (flock, on the folder itself): it goes with the process, also one that is killed,
# so
# no stale lock is ever left behind.

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


# ----------------------------------------------------------------------------------------------------
# CUDA out of memory, in words: what was wanted, what there was, and the setting to change.


@contextmanager
def explained(config: TrainingConfig, mode: str, plan: MemoryPlan) -> Iterator[None]:
    """Turn torch's error inside the block into a :class:`TrainingError` that says the way out.

    Args:
        config: of the run.
        mode: the activation checkpointing that is on.
        plan: what each mode was predicted to take.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).partition("\n")[0]
        raise TrainingError(f"{wanted} Predicted peak by mode: {plan}. {_way_out(config, mode)}") from error


def _way_out(config: TrainingConfig, mode: str) -> str:
    ways = []
    if mode in ("none", "selective"):
        ways.append('activation_checkpointing="full" (or "auto")')
    if mode != "offload":
        ways.append('activation_checkpointing="offload"')
    rows, half = config.per_device_train_batch_size, config.per_device_train_batch_size // 2
    if half:
        steps = config.gradient_accumulation_steps * rows // half
        ways.append(f"per_device_train_batch_size={half}, gradient_accumulation_steps={steps} (the same step)")
    ways.append("a shorter max_length")
    ways.append('load_model(..., base_precision="nf4")')
    return f"Now: activation_checkpointing={mode!r}, {rows} rows. Ways out: {'; '.join(ways)}"
