"""``doctor``: check a run before it starts, and leave the model as it was, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..data.dataset import ChatDataset, ChatStream
from ..errors import Phi3LoRAError, TrainingError, is_number, plain_value, require
from ..model.sharding import sharded_base
from ..processes import rank_and_size
from ..training.checkpoint import rng_state, set_rng_state
from ..training.setup import PlannedRun
from . import documents, rows, settings
from . import model as model_checks
from .report import DoctorReport, Finding, error, warning
from .trial import Trial, check_gradient_flow

CHECKS: dict[str, Callable[[PlannedRun], Finding]] = {
    "run": model_checks.check_run_is_accepted,
    "targets": model_checks.check_targets,
    "frozen": model_checks.check_trainable_parameters,
    "bypassed": model_checks.check_weight_readers,
    "rows": rows.check_forms,
    "columns": rows.check_columns,
    "kept as text": rows.check_kept_as_text,
    "added tokens": rows.check_added_tokens,
    "advice": rows.check_advice,
    "supervised": documents.check_supervised_share,
    "preview": documents.preview_first_document,
    "end of turn": documents.check_end_of_turn,
    "empty answers": documents.check_empty_answers,
    "padding": documents.check_padding,
    "lengths": documents.check_lengths,
    "packing": documents.check_packing,
    "longrope": documents.check_longrope,
    "layers": model_checks.check_layers,
    "precision": model_checks.check_precision,
    "settings": settings.check_settings,
    "memory": settings.check_memory,
    "scaling": settings.check_scaling,
    "learning rate": settings.check_learning_rate,
    "schedule": settings.check_schedule,
    "amount": settings.check_amount,
    "saving": settings.check_saving,
    "output": settings.check_output,
    "disk": settings.check_disk,
}
"""Name of a finding -> the check that makes it, in the order of the report."""

_NOT_BEFORE_TRAINING = ("run", "preview", "layers", "output")  # train raises these itself, or its banner shows them


def doctor(
    model: nn.Module,
    tokenizer: Any,
    dataset: ChatDataset | ChatStream,
    config: TrainingConfig | None = None,
    *,
    eval_dataset: ChatDataset | None = None,
    device_memory_gib: float | None = None,
    try_steps: bool = True,
    compute_metrics: Any = None,
) -> DoctorReport:
    """Check a run before it starts: targets, masks, lengths, memory, disk, time, and whether gradients arrive.

    With several processes (torchrun), rank 0 checks the run for all. The others return a report without findings,
    whose text is empty.

    Weights, gradients, modes and random generators (torch, CUDA, NumPy, Python) are restored bit for bit, and no file
    is left behind.

    Args:
        model: a Phi-3 causal LM after ``inject_lora``, on the device where it will train.
        tokenizer: the dataset's tokenizer; None: checks that need it are shortened.
        dataset: the dataset for ``train``; of a stream, the first window is checked.
        config: the configuration for ``train``; default ``TrainingConfig()``.
        eval_dataset: the evaluation dataset for ``train``.
        device_memory_gib: memory of a card, in GiB, to compare the prediction with; None: that of the model's GPU.
        try_steps: run two optimizer steps on copies of the adapters, which takes seconds and also gives the predicted
            time. A model that was loaded split over several processes tries none.
        compute_metrics: the function for ``train``; it is not called.

    Returns:
        A report. ``print`` shows it, ``.ok`` is False if a finding is an error, ``.findings`` has each line's name,
        status (``"ok"``, ``"warning"``, ``"error"``) and text, ``report["memory"]`` is one of them. Faults are
        findings, not exceptions.

    Raises:
        TrainingError: ``device_memory_gib`` is not a number > 0.

    Example:
        >>> report = p3.doctor(model, tokenizer, chats)
        >>> report.ok, report["end of turn"].status
        (True, 'ok')
    """
    device_memory_gib = plain_value(device_memory_gib)
    is_allowed = device_memory_gib is None or (is_number(device_memory_gib) and device_memory_gib > 0)
    require(is_allowed, "device_memory_gib", device_memory_gib, "None, or a number > 0 (GiB)", TrainingError)
    if rank_and_size()[0] > 0:
        return DoctorReport(())
    run = (model, dataset, TrainingConfig() if config is None else config, eval_dataset, tokenizer, compute_metrics)
    planned = PlannedRun(*run, device_memory_gib)
    with _restored(model):
        findings = [_run_check(name, check, planned) for name, check in CHECKS.items()]
        findings += _run_trial_checks(planned, try_steps, can_run=findings[0].status == "ok")
    return DoctorReport(tuple(findings))


def problems(planned: PlannedRun) -> list[Finding]:
    """Return the findings that ``train`` prints before it starts: errors and warnings of the checks without a step."""
    findings = [_run_check(name, check, planned) for name, check in CHECKS.items() if name not in _NOT_BEFORE_TRAINING]
    return [dataclasses.replace(finding, details=()) for finding in findings if finding.status != "ok"]


def _run_check(name: str, check: Callable[[PlannedRun], Finding], planned: PlannedRun) -> Finding:
    """Return a check's finding; an error if the check cannot be made."""
    try:
        finding = check(planned)
    except (Phi3LoRAError, OSError) as why:
        finding = error(str(why))
    return dataclasses.replace(finding, name=name)


def _run_trial_checks(planned: PlannedRun, try_steps: bool, can_run: bool) -> list[Finding]:
    """Return the two findings that need optimizer steps."""
    trial: Trial | None = None
    split = sharded_base(planned.model)
    if not try_steps:
        flow = warning("not tried (try_steps=False)")
    elif split is not None and split.size > 1:
        flow = warning(f"not tried: the base is split over {split.size} processes, and only one of them checks the run")
    elif not can_run:
        flow = warning("not tried: fix the error of 'run' first")
    else:
        try:
            flow, trial = check_gradient_flow(planned)
        except Phi3LoRAError as why:
            flow = error(str(why))
    time = _run_check("time", lambda planned: settings.estimate_time(planned, trial), planned)
    return [dataclasses.replace(flow, name="gradient flow"), time]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore generators, the attention implementation and small buffers (longrope's factors) after the block."""
    generators = rng_state()
    implementation = getattr(model.config, "_attn_implementation", None)
    modules = [m for m in model.modules() if not isinstance(m, nn.Linear)]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                module._buffers[name] = buffer  # transformers 5.17 replaces the tensor
        if getattr(model.config, "_attn_implementation", None) != implementation:
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        set_rng_state(generators)
