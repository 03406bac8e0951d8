"""A run between its steps: what is told, logged, evaluated and saved, and when."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter_file import load_adapter_state, read_adapter
from ..config import TrainingConfig
from ..data.batches import Step, StepSchedule
from ..data.dataset import ChatDataset
from ..errors import CheckpointError, TrainingError
from ..inference.evaluation import evaluate
from ..model.backend import Backend
from ..model.estimate import MemoryPlan, peak_flops
from ..model.load import model_device
from .checkpoint import Resumable, rotate, save_checkpoint
from .distributed import World
from .interrupts import Interrupts
from .logging import LateValues, Reporter
from .state import HOOKS, TrainingState
from .step import OptimizerStep, Precision, StepOutcome

logger = logging.getLogger("phi3lora")


@dataclass
class _Note:
    """What is known of a step when it starts; its loss arrives later."""

    step: int
    epoch: float
    rate: float
    count: int
    tokens: int
    log: bool
    rows: Step


@dataclass
class Run:
    """The parts of a run, and what happens around a step."""

    interrupts: Interrupts
    model: nn.Module
    config: TrainingConfig
    steps: StepSchedule
    step: OptimizerStep
    precision: Precision
    state: TrainingState
    report: Reporter
    resumable: Resumable
    world: World
    eval_dataset: ChatDataset | None
    tokenizer: Any
    callbacks: Sequence[Any]
    flops_per_token: float
    resumed_from: Path | None
    backend: Backend
    checkpointing: tuple[str, MemoryPlan]
    late: LateValues[_Note] = field(default_factory=LateValues)
    last_eval: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    saved_at: int = -1
    clock: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        """Take up where the history ends."""
        self.clock = (time.perf_counter(), self.state.tokens_seen)
        if self.resumed_from is not None:
            self.saved_at = self.state.global_step
        for line in self.state.history:
            if "eval_loss" in line:
                self.evaluated_at = line["step"]
                values = {name: value for name, value in line.items() if name.startswith("eval_")}
                self.last_eval = {name: math.nan if value is None else value for name, value in values.items()}

    def tell(self, hook: str, *details: Any) -> None:
        """Call a hook of every callback; Ctrl-C inside one is a request like any other."""
        assert hook in HOOKS
        try:
            for callback in self.callbacks:
                method = getattr(callback, hook, None)
                if method is not None:
                    method(self.state, *details)
        except KeyboardInterrupt:
            self.interrupts.requested = True

    def is_due(self, what: str, rows: Step) -> bool:
        """Whether a log line, an evaluation or a checkpoint belongs to the step just done."""
        config = self.config
        strategy, every = {
            "log": (config.logging_strategy, config.logging_steps),
            "eval": (config.eval_strategy, config.eval_steps or config.logging_steps),
            "save": (config.save_strategy, config.save_steps),
        }[what]
        return is_due(strategy, every, self.state, rows.ends_epoch)

    def advance(self, rows: Step, outcome: StepOutcome, rate: float) -> None:
        """Move the cursor past a step; its numbers are read when they have arrived."""
        state = self.state
        state.global_step += 1
        state.epoch, state.step_in_epoch, state.window = rows.next_cursor
        state.epoch_progress = rows.epoch_progress
        state.tokens_seen += rows.tokens
        first = self.config.logging_first_step and state.global_step == 1
        last = self.config.logging_strategy != "no" and state.global_step == state.total_steps
        log = first or last or self.is_due("log", rows)
        note = _Note(state.global_step, rows.epoch_progress, rate, outcome.count, state.tokens_seen, log, rows)
        self.late.add(outcome.values, note)

    def read_arrived(self, wait: bool = False) -> None:
        """Count and log the steps whose numbers are here; stop a run whose loss stays NaN."""
        state = self.state
        for (loss_sum, norm, skipped), note in self.late.arrived(wait):
            if skipped and not (math.isfinite(loss_sum) and self.precision.can_scale_down()):
                state.nonfinite_in_a_row += 1
                state.nonfinite_total += 1
                self._give_up_if_hopeless(note, loss_sum, norm)
            elif not skipped:
                state.nonfinite_in_a_row = 0
                state.loss_sum, state.loss_count = state.loss_sum + loss_sum, state.loss_count + note.count
                state.run_loss_sum += loss_sum
                state.run_loss_count += note.count
            if note.log:
                self._log(note, norm)

    def _give_up_if_hopeless(self, note: _Note, loss_sum: float, norm: float) -> None:
        documents = [i for micro in note.rows.micro_batches for row in micro for i in row]
        dataset = note.rows.plan.dataset
        rows = sorted({dataset.row_number(i) for i in documents})
        some = f"{rows[:16]}{' ...' if len(rows) > 16 else ''}"
        said = f"loss {loss_sum / note.count}, gradient norm {norm}; rows {some}"
        logger.warning("step %d is skipped: %s of the data", note.step, said)
        limit = min(self.config.max_nonfinite_steps, self.state.total_steps)
        if self.state.nonfinite_in_a_row < limit:
            return
        text = ""
        if self.tokenizer is not None:
            text = f" First document: {self.tokenizer.decode(dataset[documents[0]]['input_ids'])[:200]!r}."
        raise TrainingError(
            f"the loss or gradient was NaN or infinite {self.state.nonfinite_in_a_row} steps in a row, the last "
            f"at step {note.step} ({said} of the data).{text} The adapters are as before these steps. Lower "
            f"learning_rate ({self.config.learning_rate}), use bf16 instead of fp16, or look at the base weights; "
            f"max_nonfinite_steps={self.config.max_nonfinite_steps} sets the patience"
        )

    def _log(self, note: _Note, norm: float) -> None:
        state, (then, tokens_then), now = self.state, self.clock, time.perf_counter()
        rate = (note.tokens - tokens_then) / max(now - then, 1e-9)
        self.clock = (now, note.tokens)
        line: dict[str, Any] = {"step": note.step, "epoch": round(note.epoch, 4)}
        if state.loss_count:
            line["loss"] = state.loss_sum / state.loss_count
        line.update(learning_rate=note.rate, grad_norm=norm, tokens=note.tokens, tokens_per_s=rate)
        if state.nonfinite_total:
            line["skipped_steps"] = state.nonfinite_total
        device = model_device(self.model)
        if device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            peak = peak_flops(device)
            if peak is not None:
                line["mfu"] = rate * self.flops_per_token / peak
        state.loss_sum, state.loss_count = 0.0, 0
        self.report.line(line)
        self.tell("on_log", line)

    def evaluate(self) -> None:
        """One evaluation: a line, the best metric, early stopping."""
        assert self.eval_dataset is not None
        config, state = self.config, self.state
        self.read_arrived(wait=True)
        with self.precision.autocast():
            found = evaluate(self.model, self.eval_dataset, batch_size=config.per_device_eval_batch_size)
        self.last_eval = {f"eval_{name}": value for name, value in found.items()}
        self.evaluated_at = state.global_step
        self.report.line({"step": state.global_step, "epoch": round(state.epoch_progress, 4), **self.last_eval})
        metric = self._metric()
        best = state.best_metric
        if best is None or self._sign() * (metric - best) > config.early_stopping_threshold or math.isnan(best):
            state.best_metric, state.evaluations_without_gain = metric, 0
        else:
            state.evaluations_without_gain += 1
        if config.early_stopping_patience and state.evaluations_without_gain >= config.early_stopping_patience:
            self.report.say(
                f"step {state.global_step}: no better for {state.evaluations_without_gain} evaluations, stopping"
            )
            state.should_stop = True
        self.tell("on_evaluate", self.last_eval)
        self.clock = (time.perf_counter(), state.tokens_seen)

    def _metric(self) -> float:
        return self.last_eval["eval_" + (self.config.metric_for_best_model or "loss").removeprefix("eval_")]

    def _sign(self) -> float:
        greater = self.config.greater_is_better
        if greater is None:
            greater = (self.config.metric_for_best_model or "loss").removeprefix("eval_") not in ("loss", "perplexity")
        return 1.0 if greater else -1.0

    def _beats_every_checkpoint(self) -> bool:
        """Whether the evaluation just made beats that of every checkpoint."""
        best, here = self.state.best_checkpoint_metric, self.evaluated_at == self.state.global_step
        return here and (best is None or self._sign() * (self._metric() - best) > 0)

    def new_best_unsaved(self) -> bool:
        """Whether the best model yet would be lost without a checkpoint now."""
        return self.config.load_best_model_at_end and self._beats_every_checkpoint()

    def save(self) -> None:
        """A checkpoint, then the rotation of old ones."""
        self.read_arrived(wait=True)
        state = self.state
        best = state.best_checkpoint, state.best_checkpoint_metric
        if self._beats_every_checkpoint():
            state.best_checkpoint, state.best_checkpoint_metric = f"checkpoint-{state.global_step}", self._metric()
        try:
            path = save_checkpoint(self.resumable, state)
        except CheckpointError as error:
            state.best_checkpoint, state.best_checkpoint_metric = best
            if not self.config.continue_on_save_error:
                raise
            logger.error("step %d: %s", state.global_step, error)
            return
        self.saved_at = state.global_step
        rotate(self.config.output_dir, self.config.save_total_limit, state.best_checkpoint)
        self.tell("on_save", path)
        self.clock = (time.perf_counter(), state.tokens_seen)

    def finish(self) -> None:
        """The last numbers, evaluation and checkpoint; the best adapters if asked for."""
        config, state = self.config, self.state
        self.read_arrived(wait=True)
        complete = not self.interrupts.requested
        unsaved = self.saved_at != state.global_step
        if complete and config.eval_strategy != "no" and self.evaluated_at != state.global_step:
            self.evaluate()
            unsaved = True  # a checkpoint of this step does not know the evaluation
        wanted = config.save_strategy != "no" or not complete
        if self.world.is_main and wanted and unsaved and state.global_step > 0:
            self.save()
        best = self.best_checkpoint()
        if complete and config.load_best_model_at_end and best is not None and not best.is_dir():
            self.report.say(f"the best checkpoint {best} is gone: the adapters are the last step's")
        elif complete and config.load_best_model_at_end and best is not None:
            path = best / "lora.safetensors"
            load_adapter_state(self.model, read_adapter(path)[0], str(path))
            self.report.say(f"the adapters are those of {state.best_checkpoint} (best {self._metric_name()})")
        self.tell("on_train_end")

    def best_checkpoint(self) -> Path | None:
        """The best checkpoint's folder: in ``output_dir``, or beside the checkpoint that was resumed from."""
        if self.state.best_checkpoint is None:
            return None
        here = Path(self.config.output_dir) / self.state.best_checkpoint
        if here.exists() or self.resumed_from is None:
            return here
        return self.resumed_from.parent / self.state.best_checkpoint

    def _metric_name(self) -> str:
        return f"{self.config.metric_for_best_model or 'loss'} {self.state.best_checkpoint_metric:.4g}"

    def metrics(self) -> dict[str, float]:
        """The run in a few figures."""
        state = self.state
        figures = {
            "train_loss": state.run_loss_sum / state.run_loss_count if state.run_loss_count else float("nan"),
            "train_seconds": state.train_seconds,
            "tokens": state.tokens_seen,
            "tokens_per_s": state.tokens_seen / max(state.train_seconds, 1e-9),
        }
        return {**figures, **self.last_eval}


def is_due(strategy: str, every: float, state: TrainingState, ends_epoch: bool) -> bool:
    """Return whether a log line, an evaluation or a checkpoint follows the step just done."""
    if strategy == "epoch":
        return ends_epoch
    interval = math.ceil(every * state.total_steps) if every < 1 else int(every)
    return strategy == "steps" and state.global_step % interval == 0
