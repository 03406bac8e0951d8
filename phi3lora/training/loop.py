"""``train``: the loop. One place, for every precision and layout; read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks.doctor import problems
from ..checks.planned_run import PlannedRun
from ..config import TrainingConfig
from ..data.batches import Cursor
from ..data.dataset import ChatDataset, ChatStream
from ..lora.base_weight import base_format
from ..model.activations import activation_checkpointing
from ..model.backend import use_backend
from ..model.estimate import flops_per_token, mean_context_tokens
from ..model.load import model_device
from .checkpoint import Resumable, find_checkpoint, load_checkpoint
from .distributed import World
from .interrupts import Interrupts
from .logging import Reporter, draw_loss
from .optim import build_optimizer, learning_rate
from .run import Run
from .setup import (
    banner_facts,
    check_run,
    claim_output_dir,
    explained,
    locked,
    resolve_backend,
    resolve_checkpointing,
    resolve_plans,
)
from .state import TrainingState
from .step import OptimizerStep, resolve_precision, training_mode


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` returns."""

    global_step: int
    """Optimizer steps done, those before a resume included."""
    metrics: dict[str, float]
    """``train_loss``, ``train_seconds``, ``tokens``, ``tokens_per_s``, and the last evaluation's ``eval_*``."""
    history: list[dict[str, Any]]
    """The lines of ``metrics.jsonl``."""
    best_checkpoint: str | None
    """Path of the best checkpoint by ``metric_for_best_model``; None without evaluations."""
    interrupted: bool = False
    """Ended early by Ctrl-C or SIGTERM; ``resume_from_checkpoint=True`` goes on."""


def train(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    config: TrainingConfig | None = None,
    *,
    eval_dataset: ChatDataset | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
) -> TrainingResult:
    """Train the adapters of ``model`` in place.

    Args:
        model: a Phi-3 causal LM after ``inject_lora``, on the device to train on.
        train_dataset: tokenised documents, or a stream of them (which needs ``max_steps``).
        config: how to train; default ``TrainingConfig()``.
        eval_dataset: evaluated as ``eval_strategy`` says.
        tokenizer: the dataset's; puts a batch that goes wrong into words.
        callbacks: objects with some of :class:`phi3lora.Callback`'s hooks.

    Returns:
        Steps done, final metrics, the history and the best checkpoint. The model keeps its last adapters, or the best
        ones with ``load_best_model_at_end``.

    Raises:
        TrainingError: no adapters, something else trainable, a loss that stays NaN or infinite, a GPU that is full,
            one of several processes (torchrun).
        DataError: an empty dataset, documents that do not fit.
        CheckpointError: another run in ``output_dir``, or its checkpoints; nothing to resume from; another run's
            checkpoint; a checkpoint that cannot be written.
    """
    config = config or TrainingConfig()
    with ExitStack() as stack:
        check_run(model, train_dataset, eval_dataset, config)
        stack.enter_context(locked(config.output_dir))
        run = _prepare(model, train_dataset, config, eval_dataset, tokenizer, callbacks)
        state = run.state
        stack.enter_context(run.interrupts)
        stack.enter_context(explained(config, *run.checkpointing))
        stack.enter_context(training_mode(model))
        stack.enter_context(activation_checkpointing(model, run.checkpointing[0]))
        stack.enter_context(use_backend(model, run.backend))
        run.report.banner(
            banner_facts(model, run.steps, config, state, run.precision, eval_dataset, run.backend, run.checkpointing)
        )
        if run.report.warns:
            known: dict[str, Any] = {"steps": run.steps, "backend": run.backend, "precision": run.precision}
            run.report.problems(problems(PlannedRun(model, tokenizer, train_dataset, config, eval_dataset, **known)))
        stack.enter_context(run.report)  # from here on there is a bar, which print would write into
        run.tell("on_train_begin")
        if config.eval_on_start and state.global_step == 0:
            run.evaluate()
        cursor = Cursor(state.epoch, state.step_in_epoch, state.window)
        steps = run.steps.batches(
            state.global_step, cursor, model_device(model), wanted=lambda: not run.interrupts.requested
        )
        batches = stack.enter_context(closing(steps))
        started = time.perf_counter()
        for rows, micro_batches in batches:
            rate = learning_rate(config, state.global_step, state.total_steps)
            outcome = run.step(micro_batches, rate)
            run.advance(rows, outcome, rate)
            run.read_arrived()
            state.train_seconds += time.perf_counter() - started
            if run.is_due("eval", rows):
                run.evaluate()
            if run.is_due("save", rows) or run.new_best_unsaved():
                run.save()
            run.report.step_done()
            run.tell("on_step_end")
            if run.interrupts.requested or state.should_stop:
                break
            started = time.perf_counter()
        run.finish()
    if run.world.is_main:
        draw_loss(state.history, Path(config.output_dir) / "loss.png")
    best = run.best_checkpoint()
    return TrainingResult(
        state.global_step, run.metrics(), list(state.history), str(best) if best else None, run.interrupts.requested
    )


def _prepare(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    config: TrainingConfig,
    eval_dataset: ChatDataset | None,
    tokenizer: Any,
    callbacks: Sequence[Any],
) -> Run:
    """Build the parts, and go back to a checkpoint if asked."""
    checkpoint = find_checkpoint(config)
    world, device = World(), model_device(model)
    torch.manual_seed(config.seed)
    precision = resolve_precision(config, model, device)
    optimizer = build_optimizer(model, config)
    backend = resolve_backend(model, config, precision)
    steps = resolve_plans(model, train_dataset, config, backend)
    base_dtype = f"{model.get_input_embeddings().weight.dtype} {base_format(model)}".rstrip()  # type: ignore[operator]
    resumable = Resumable(model, optimizer, precision.scaler, config, steps.data_facts(), base_dtype, world.rank)
    state = load_checkpoint(checkpoint, resumable) if checkpoint else TrainingState()
    claim_output_dir(config, resuming=checkpoint is not None)
    state.total_steps = steps.total
    context = mean_context_tokens(train_dataset.first_window.lengths)
    return Run(
        interrupts=Interrupts(), model=model, config=config, steps=steps, precision=precision, state=state, world=world,
        step=OptimizerStep(model, optimizer, precision, config.max_grad_norm, world),
        report=Reporter(config, state, world.is_main), resumable=resumable, eval_dataset=eval_dataset,
        tokenizer=tokenizer, callbacks=callbacks, flops_per_token=flops_per_token(model, context),
        resumed_from=checkpoint, backend=backend,
        checkpointing=resolve_checkpointing(model, train_dataset, config, backend, precision),
    )  # fmt: skip
