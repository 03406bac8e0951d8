"""Two real optimizer steps on copies of the adapters: do they all learn?

``lora_B`` starts at zero, so the first step moves every ``lora_B`` and, having no gradient through it, no ``lora_A``;
the second moves every ``lora_A`` (an embedding's the other way round). In a fused layer each segment counts by itself.
The originals are put aside and put back, so not one bit of them changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Row, collate
from ..lora.inject import lora_layers
from ..lora.layers import Embedding, MergedLinear
from ..model.activations import activation_checkpointing
from ..model.estimate import flops_per_token, mean_context_tokens
from ..model.load import model_device
from ..training.step import OptimizerStep, resolve_precision, training_mode
from .findings import Verdict, error, listed, ok, warning
from .planned_run import PlannedRun

_LARGEST_FLOPS = {"cpu": 1e11, "cuda": 3e14}  # of a step: seconds, on either
_RATE = 1e-3
_ATTEMPTS = 24  # of a step in fp16: each halves the scale that overflowed


@dataclass(frozen=True)
class Trial:
    """Two steps that were run."""

    losses: tuple[float, ...]
    """Mean loss before each step; shorter where a step could not be done."""
    still: tuple[list[str], list[str]]
    """What should have moved and did not, after the first step and after the second."""
    tokens: int
    flops: float
    seconds: float
    """Of the faster step: the other may have waited for a kernel to be compiled, or for another process."""


def gradient_flow(planned: PlannedRun) -> tuple[Verdict, Trial | None]:
    """Whether the loss is finite and every adapter learns."""
    if not any(layer.enabled for layer in lora_layers(planned.model).values()):
        return error("every adapter is switched off: nothing would learn"), None
    try:
        trial = run_trial(planned)
    except torch.OutOfMemoryError:
        return error("out of memory in the first step; see the memory line for what fits"), None
    losses = " -> ".join(f"{loss:.3g}" for loss in trial.losses)
    if len(trial.losses) < 2 or not all(map(math.isfinite, trial.losses)):
        return error(
            f"loss {losses or 'of no step'}, it or its gradient is not finite: look at weights, precision"
        ), None
    for step, still in enumerate(trial.still, start=1):
        if still:
            text = f"{len(still)} adapter matrices have not moved after step {step} of 2 ({listed(still, 2)})"
            return error(f"{text}: switched off, detached, or nothing reaches them"), trial
    text = f"every adapter moved in 2 steps of {trial.tokens:,} tokens, loss {losses}"
    guessing = math.log(planned.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if trial.losses[0] > guessing + 1:
        return warning(f"{text}: worse than guessing ({guessing:.3g}); are tokenizer and model each other's?"), trial
    return ok(text), trial


def run_trial(planned: PlannedRun) -> Trial:
    """The two steps; the adapters and every gradient are as before when it returns."""
    model: Any = planned.model
    rows = _trial_rows(planned)
    documents = [i for row in rows for i in row]
    lengths = planned.dataset.lengths[documents]
    batch = collate(planned.dataset, rows, max(int(planned.dataset.lengths[list(row)].sum()) for row in rows))
    flops = int(lengths.sum()) * flops_per_token(model, mean_context_tokens(lengths))
    losses: list[float] = []
    still: list[list[str]] = []
    seconds = math.inf
    precision = resolve_precision(planned.config, model, model_device(model))  # with a scaler of its own
    with _copied_adapters(model) as trained, training_mode(model), torch.enable_grad():
        optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0, fused=True)
        fused = planned.path[0] == "fused"
        step = OptimizerStep(model, optimizer, precision, planned.config.max_grad_norm, fused=fused)
        before = _parts(model)
        with activation_checkpointing(model, planned.checkpointing):
            for _ in range(_ATTEMPTS):
                started = time.perf_counter()
                outcome = step([batch], _RATE)
                loss, _, skipped = outcome.values.tolist()
                seconds = min(seconds, time.perf_counter() - started)
                if skipped and math.isfinite(loss) and precision.can_scale_down():
                    continue
                if skipped:
                    losses.append(math.nan)
                    break
                losses.append(loss / outcome.count)
                still.append(_unmoved(model, before, first=not still))
                if len(losses) == 2:
                    break
    still += [[], []]
    return Trial(tuple(losses), (still[0], still[1]), int(lengths.sum()), flops, seconds)


def _trial_rows(planned: PlannedRun) -> list[Row]:
    """Of the first micro-batch as much as takes seconds, one document at least."""
    device = model_device(planned.model).type
    lengths = planned.dataset.lengths
    room = _LARGEST_FLOPS.get(device, 1e11) / flops_per_token(planned.model, mean_context_tokens(lengths))
    rows: list[Row] = []
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


def _parts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of each adapter matrix, by segment in a fused layer: ``"...qkv_proj.lora_B of segment 0"`` -> values."""
    return {name: part.detach().clone() for name, part, _ in _live_parts(model)}


def _live_parts(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, values, and whether it is the one of its pair that starts at zero."""
    for path, layer in lora_layers(model).items():
        zero = "lora_A" if isinstance(layer, Embedding) else "lora_B"
        for name in ("lora_A", "lora_B"):
            matrix = getattr(layer, name)
            if not isinstance(layer, MergedLinear):
                yield f"{path}.{name}", matrix, name == zero
                continue
            sizes = [layer.r] * len(layer.spans) if name == "lora_A" else [stop - start for start, stop in layer.spans]
            segments = [i for i, on in enumerate(layer.enable_lora) if on]
            for segment, part in zip(segments, matrix.split(sizes), strict=True):
                yield f"{path}.{name} of segment {segment}", part, name == zero


def _unmoved(model: nn.Module, before: dict[str, Tensor], first: bool) -> list[str]:
    """What is as it was: of the matrices that start at zero after the first step, of all after the second."""
    parts = [(name, part) for name, part, zero in _live_parts(model) if zero or not first]
    moved = torch.stack([(part.detach() != before[name]).any() for name, part in parts]).tolist()
    return [name for (name, _), has in zip(parts, moved, strict=True) if not has]


@contextmanager
def _copied_adapters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """What trains, with copies for values for the time of the block; then its own tensors and gradients again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    aside = [(p, p.data, p.grad) for p in trained]
    try:
        for parameter, values, _ in aside:
            parameter.data, parameter.grad = values.clone(), None
        yield trained
    finally:
        for parameter, values, gradient in aside:
            parameter.data = values
            parameter.grad = gradient
