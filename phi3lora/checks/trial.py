"""Two real optimizer steps on copies of the adapters, to see whether every adapter learns; on a GPU a third, timed.

``lora_B`` starts at zero. So the first step moves every ``lora_B`` and no ``lora_A``, whose gradient passes through
``lora_B``; the second step moves every ``lora_A``. (For an embedding it is the other way round.) Each segment of a
fused layer is checked by itself. The original tensors are set aside and restored, so not one of their bits changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import IGNORE_INDEX
from ..data.batches import PackedRow, collate
from ..errors import first_of
from ..lora.inject import lora_layers
from ..lora.layers import Embedding, MergedLinear
from ..model.backend import PLAIN
from ..model.estimate import flops_per_token, mean_context_tokens
from ..model.load import model_device
from ..training.setup import PlannedRun, prepared
from ..training.step import OptimizerStep, resolve_precision
from .report import Finding, error, ok, warning

_MAX_FLOPS = {"cpu": 1e11, "cuda": 3e14}  # of a step: it takes seconds on either device
_LEARNING_RATE = 1e-3
_MAX_ATTEMPTS = 24  # at the two steps in fp16: each overflow halves the gradient scale


@dataclass(frozen=True)
class Trial:
    """Outcome of the two steps."""

    losses: tuple[float, ...]
    """Mean loss before each step; fewer than two if a step could not be taken."""
    unmoved: tuple[list[str], list[str]]
    """Adapter matrices that should have moved by the first step, and by the second, and did not."""
    tokens: int
    """Tokens in a step."""
    flops: float
    """Operations in a step."""
    seconds: float
    """Duration of the fastest step; others may have waited for kernels that were compiled or recorded."""


def check_gradient_flow(planned: PlannedRun) -> tuple[Finding, Trial | None]:
    try:
        trial = _run_trial(planned)
    except torch.OutOfMemoryError:
        return error("out of memory in the first step; the 'memory' finding shows what fits"), None
    losses = " -> ".join(f"{loss:.3g}" for loss in trial.losses)
    if len(trial.losses) < 2 or not all(map(math.isfinite, trial.losses)):
        return error(f"loss {losses or 'unknown'}: it or its gradient is not finite; check weights and precision"), None
    for step, unmoved in enumerate(trial.unmoved, start=1):
        if unmoved:
            text = f"{len(unmoved)} adapter matrices have not moved after step {step} of 2 ({first_of(unmoved, 2)})"
            return error(f"{text}: they are switched off, detached, or no gradient reaches them"), trial
    text = f"every adapter moved in 2 steps of {trial.tokens:,} tokens, loss {losses}"
    guessing = math.log(planned.model.config.vocab_size)
    if trial.losses[0] > guessing + 1:
        return warning(f"{text}: worse than guessing ({guessing:.3g}); does the tokenizer belong to the model?"), trial
    return ok(text), trial


def _run_trial(planned: PlannedRun) -> Trial:
    """Run the two steps; the adapters and every gradient are restored before it returns."""
    model = planned.model
    rows = _trial_rows(planned)
    lengths = planned.dataset.lengths[[i for row in rows for i in row]]
    batch = collate(planned.dataset, rows, max(int(planned.dataset.lengths[list(row)].sum()) for row in rows))
    supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    flops = int(lengths.sum()) * flops_per_token(model, mean_context_tokens(lengths))
    losses: list[float] = []
    unmoved: list[list[str]] = []
    seconds = math.inf
    precision = resolve_precision(planned.config, model, model_device(model))  # with its own gradient scaler
    with _copied_adapters(planned) as trained, torch.enable_grad():
        optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
        step = OptimizerStep(model, optimizer, precision, planned.config.max_grad_norm)
        is_slow = planned.backend.kind == "compiled"  # compiling takes longer than two steps
        before = {name: part.detach().clone() for name, part, _ in _adapter_parts(model)}
        with prepared(model, planned.checkpointing, PLAIN if is_slow else planned.backend):
            for _ in range(_MAX_ATTEMPTS):
                started = time.perf_counter()
                loss, _, skipped = step([batch], _LEARNING_RATE, supervised).tolist()
                seconds = min(seconds, time.perf_counter() - started)
                if skipped and math.isfinite(loss) and precision.can_scale_down():
                    continue
                losses.append(math.nan if skipped else loss / supervised)
                if not skipped:
                    unmoved.append(_unmoved_parts(model, before, first_step=not unmoved))
                if skipped or len(losses) == 2:
                    break
            if len(losses) == 2 and planned.backend.kind == "fused":  # the second may have been recorded
                started = time.perf_counter()
                step([batch], _LEARNING_RATE, supervised).tolist()
                seconds = min(seconds, time.perf_counter() - started)
    unmoved += [[], []]
    return Trial(tuple(losses), (unmoved[0], unmoved[1]), int(lengths.sum()), flops, seconds)


def _trial_rows(planned: PlannedRun) -> list[PackedRow]:
    """Return as much of the first micro-batch as takes seconds, and at least one document."""
    device = model_device(planned.model).type
    lengths = planned.dataset.lengths
    room = _MAX_FLOPS.get(device, 1e11) / flops_per_token(planned.model, mean_context_tokens(lengths))  # tokens
    rows: list[PackedRow] = []
    for row in planned.steps.steps_of_epoch(0)[0][0]:
        taken: list[int] = []
        for i in row:
            if (rows or taken) and lengths[i] > room:
                break
            taken.append(i)
            room -= lengths[i]
        if taken:
            rows.append(tuple(taken))
    return rows


def _adapter_parts(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield each adapter matrix, or its part for each segment: name, values, and whether it starts at zero.

    A part is named ``"...qkv_proj.lora_B of segment 0"``.
    """
    for path, layer in lora_layers(model).items():
        zero = "lora_A" if isinstance(layer, Embedding) else "lora_B"
        for name in ("lora_A", "lora_B"):
            matrix = getattr(layer, name)
            if not isinstance(layer, MergedLinear):
                yield f"{path}.{name}", matrix, name == zero
                continue
            for segment in layer.adapted_segments:
                part = matrix[segment.rows_of_A if name == "lora_A" else segment.rows_of_B]
                yield f"{path}.{name} of segment {segment.position}", part, name == zero


def _unmoved_parts(model: nn.Module, before: dict[str, Tensor], first_step: bool) -> list[str]:
    """Name the parts that have not changed: after the first step, only of those that start at zero."""
    parts = [(name, part) for name, part, zero in _adapter_parts(model) if zero or not first_step]
    moved = torch.stack([(part.detach() != before[name]).any() for name, part in parts]).tolist()
    return [name for (name, _), has_moved in zip(parts, moved, strict=True) if not has_moved]


@contextmanager
def _copied_adapters(planned: PlannedRun) -> Iterator[list[nn.Parameter]]:
    """Give what trains copies of its values inside the block; restore its own tensors and gradients afterwards."""
    originals = [(p, p.data, p.grad) for p in planned.trained.values()]
    try:
        for parameter, values, _ in originals:
            parameter.data, parameter.grad = values.clone(), None
        yield [parameter for parameter, _, _ in originals]
    finally:
        for parameter, values, gradient in originals:
            parameter.data, parameter.grad = values, gradient
