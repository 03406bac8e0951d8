"""``doctor``: what can go wrong silently is looked at before a run, and the model is left as it was, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..data.dataset import ChatDataset
from ..data.streaming import ChatStream
from ..errors import Phi3LoRAError, TrainingError
from ..training.checkpoint import rng_state, set_rng_state
from . import adapters, documents, settings
from . import settings as resources
from .findings import DoctorReport, Finding, Verdict, error, warning
from .planned_run import PlannedRun
from .trial import Trial, gradient_flow

Check = Callable[[PlannedRun], Verdict]

CHECKS: dict[str, Check] = {
    "run": adapters.run,
    "targets": adapters.targets,
    "frozen": adapters.frozen,
    "supervised": documents.supervised,
    "preview": documents.preview,
    "end of turn": documents.end_of_turn,
    "empty answers": documents.empty_answers,
    "padding": documents.padding,
    "lengths": documents.lengths,
    "packing": documents.packing,
    "longrope": documents.longrope,
    "layers": adapters.layers,
    "precision": adapters.precision,
    "memory": resources.memory,
    "scaling": settings.scaling,
    "learning rate": settings.learning_rate,
    "schedule": settings.schedule,
    "saving": settings.saving,
    "output": resources.output,
    "disk": resources.disk,
}
"""Name of a finding -> the function that makes it, in the order of the report."""

_SAID_ELSEWHERE = ("run", "preview", "layers", "output")  # train() raises those itself, or its banner has them


def doctor(
    model: nn.Module,
    tokenizer: Any,
    dataset: ChatDataset | ChatStream,
    config: TrainingConfig | None = None,
    *,
    eval_dataset: ChatDataset | None = None,
    device_memory_gib: float | None = None,
    try_steps: bool = True,
) -> DoctorReport:
    """Look at a run before it starts: targets, masks, lengths, memory, disk, time, and whether gradients arrive.

    Weights, gradients, modes and random generators (torch, CUDA, NumPy, Python) are afterwards what they were, bit for
    bit, and no file is left anywhere.

    Args:
        model: a Phi-3 causal LM after ``inject_lora``, where it will train.
        tokenizer: the dataset's; None: what needs words is left out.
        dataset: what ``train`` would get; of a stream the first window is looked at.
        config: what ``train`` would get; default ``TrainingConfig()``.
        eval_dataset: what ``train`` would get.
        device_memory_gib: a card's memory in GiB to hold the prediction against; None: that of the model's GPU.
        try_steps: run two optimizer steps on copies of the adapters (seconds; they also give the predicted time).

    Returns:
        A report. ``print`` shows it, ``.ok`` is False where something is an error, ``.findings`` has each line's name,
        status (``"ok"``, ``"warning"``, ``"error"``) and text, ``report["memory"]`` is one of them. Faults are
        findings, not exceptions.

    Raises:
        TrainingError: ``device_memory_gib`` is not a number > 0.

    Example:
        >>> report = p3.doctor(model, tokenizer, chats)
        >>> report.ok, report["end of turn"].status
        (True, 'ok')
    """
    if device_memory_gib is not None and not device_memory_gib > 0:
        raise TrainingError(f"device_memory_gib={device_memory_gib!r}; allowed: None, or a number > 0 (GiB)")
    planned = PlannedRun(model, tokenizer, dataset, config or TrainingConfig(), eval_dataset, device_memory_gib)
    with _left_as_it_was(model):
        findings = [_finding(name, check, planned) for name, check in CHECKS.items()]
        findings += _measured(planned, try_steps, can_run=findings[0].status == "ok")
    return DoctorReport(tuple(findings))


def problems(planned: PlannedRun) -> list[Finding]:
    """The findings that are not ok of the checks that take no step: what ``train`` says before it starts."""
    checks = {name: check for name, check in CHECKS.items() if name not in _SAID_ELSEWHERE}
    found = [_finding(name, check, planned) for name, check in checks.items()]
    return [dataclasses.replace(finding, details=()) for finding in found if finding.status != "ok"]


def _finding(name: str, check: Check, planned: PlannedRun) -> Finding:
    """What a check says, or why it could not be made."""
    try:
        verdict = check(planned)
    except (Phi3LoRAError, OSError) as why:
        verdict = error(str(why))
    return Finding(name, *verdict)


def _measured(planned: PlannedRun, try_steps: bool, can_run: bool) -> list[Finding]:
    """The two findings that need a step."""
    trial: Trial | None = None
    if not try_steps:
        verdict = warning("not tried (try_steps=False)")
    elif not can_run:
        verdict = warning("not tried: mend the run first")
    else:
        try:
            verdict, trial = gradient_flow(planned)
        except Phi3LoRAError as why:
            verdict = error(str(why))
    time = _finding("time", lambda planned: resources.duration(planned, trial), planned)
    return [Finding("gradient flow", *verdict), time]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Generators, attention implementation and small buffers (a longrope's factors) as before after the block."""
    generators = rng_state()
    implementation = getattr(model.config, "_attn_implementation", None)
    others = [m for m in model.modules() if not isinstance(m, nn.Linear)]
    buffers = [(m, name, b, b.clone()) for m in others for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                module._buffers[name] = buffer  # transformers 5.17 gives it another tensor
        if getattr(model.config, "_attn_implementation", None) != implementation:
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        set_rng_state(generators)
