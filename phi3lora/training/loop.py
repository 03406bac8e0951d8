"""``train``: the loop. One place, for every precision and layout; read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.files import load_adapter_state, read_adapter
from ..config import TrainingConfig
from ..data.dataset import ChatDataset
from ..errors import TrainingError
from ..inference.evaluation import evaluate
from ..model.activations import activation_checkpointing
from ..model.flops import flops_per_token, peak_flops
from ..model.loading import model_device
from .callbacks import HOOKS
from .checkpoint import Resumable, find_checkpoint, load_checkpoint, rotate, save_checkpoint
from .distributed import World
from .interrupts import Interrupts
from .late_values import LateValues
from .optim import build_optimizer, learning_rate
from .precision import Precision, resolve_precision
from .report import Reporter, draw_loss
from .setup import banner_facts, check_run, claim_output_dir, resolve_plans
from .state import TrainingState
from .step import OptimizerStep
from .steps import StepPlan, StepRows, is_due


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
    train_dataset: ChatDataset,
    config: TrainingConfig | None = None,
    *,
    eval_dataset: ChatDataset | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
) -> TrainingResult:
    """Train the adapters of ``model`` in place.

    Args:
        model: a Phi-3 causal LM after ``inject_lora``, on the device to train on.
        train_dataset: tokenised documents.
        config: how to train; default ``TrainingConfig()``.
        eval_dataset: evaluated as ``eval_strategy`` says.
        tokenizer: the dataset's; puts a batch that goes wrong into words.
        callbacks: objects with some of :class:`phi3lora.Callback`'s hooks.

    Returns:
        Steps done, final metrics, the history and the best checkpoint. The model keeps its last adapters, or the best
        ones with ``load_best_model_at_end``.

    Raises:
        TrainingError: no adapters, something else trainable, a loss that stays NaN or infinite.
        DataError: an empty dataset, documents that do not fit.
        CheckpointError: another run's checkpoints in ``output_dir``, nothing to resume from, another run's checkpoint.
    """
    config = config or TrainingConfig()
    run = _prepare(model, train_dataset, config, eval_dataset, tokenizer, callbacks)
    state, world = run.state, run.world
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(_training_mode(model))
        stack.enter_context(activation_checkpointing(model, str(config.activation_checkpointing)))
        stack.enter_context(_compiled_layers(model, config.compile))
        stack.enter_context(run.report)
        run.report.banner(banner_facts(model, run.steps, config, state, run.precision, eval_dataset))
        run.tell("on_train_begin", interrupts)
        if config.eval_on_start and state.global_step == 0:
            run.evaluate(interrupts)
        for rows in run.steps.remaining(state):
            started = time.perf_counter()
            micro_batches = [run.steps.plan.tensors(micro) for micro in rows.micro_batches]
            rate = learning_rate(config, state.global_step, state.total_steps)
            outcome = run.step(micro_batches, rate)
            run.advance(rows, outcome.values, outcome.count, rate)
            run.read_arrived(interrupts)
            if run.is_due("eval", rows):
                run.evaluate(interrupts)
            state.train_seconds += time.perf_counter() - started
            if run.is_due("save", rows) or run.new_best_unsaved():
                run.save(interrupts)
            run.report.step_done()
            run.tell("on_step_end", interrupts)
            if interrupts.requested or state.should_stop:
                break
        run.finish(interrupts)
    if world.is_main:
        draw_loss(state.history, Path(config.output_dir) / "loss.png")
    best = str(Path(config.output_dir) / state.best_checkpoint) if state.best_checkpoint else None
    return TrainingResult(state.global_step, run.metrics(), list(state.history), best, interrupts.requested)


@dataclass
class _Note:
    """What is known of a step when it starts; its loss arrives later."""

    step: int
    epoch: float
    rate: float
    count: int
    tokens: int
    log: bool
    rows: StepRows


@dataclass
class _Run:
    """The parts of a run, and what happens around a step."""

    model: nn.Module
    config: TrainingConfig
    steps: StepPlan
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
    late: LateValues[_Note] = field(default_factory=LateValues)
    last_eval: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    saved_at: int = -1
    clock: tuple[float, int] = field(default_factory=lambda: (time.perf_counter(), 0))

    def tell(self, hook: str, interrupts: Interrupts, *details: Any) -> None:
        """Call a hook of every callback; Ctrl-C inside one is a request like any other."""
        assert hook in HOOKS
        try:
            for callback in self.callbacks:
                method = getattr(callback, hook, None)
                if method is not None:
                    method(self.state, *details)
        except KeyboardInterrupt:
            interrupts.requested = True

    def is_due(self, what: str, rows: StepRows) -> bool:
        """Whether a log line, an evaluation or a checkpoint belongs to the step just done."""
        strategy = getattr(self.config, {"log": "logging_strategy"}.get(what, f"{what}_strategy"))
        every = getattr(self.config, {"log": "logging_steps"}.get(what, f"{what}_steps"))
        return is_due(strategy, every or self.config.logging_steps, self.state, rows.ends_epoch)

    def advance(self, rows: StepRows, values: torch.Tensor, count: int, rate: float) -> None:
        """Move the cursor past a step; its numbers are read when they have arrived."""
        state = self.state
        state.global_step += 1
        state.epoch, state.step_in_epoch = rows.next_cursor
        state.epoch_progress = rows.epoch_progress
        state.tokens_seen += rows.tokens
        log = self.is_due("log", rows) or (self.config.logging_first_step and state.global_step == 1)
        self.late.add(values, _Note(state.global_step, rows.epoch_progress, rate, count, state.tokens_seen, log, rows))

    def read_arrived(self, interrupts: Interrupts, wait: bool = False) -> None:
        """Count and log the steps whose numbers are here; stop a run whose loss stays NaN."""
        state = self.state
        for (loss_sum, norm, skipped), note in self.late.arrived(wait):
            overflow = self.precision.scaler.is_enabled() and torch.isfinite(torch.tensor(loss_sum))
            if skipped and not overflow:  # a float16 overflow is the scaler's business
                state.nonfinite_in_a_row += 1
                state.nonfinite_total += 1
                self._give_up_if_hopeless(note, loss_sum, norm)
            elif not skipped:
                state.nonfinite_in_a_row = 0
                state.loss_sum, state.loss_count = state.loss_sum + loss_sum, state.loss_count + note.count
                state.run_loss_sum += loss_sum
                state.run_loss_count += note.count
            if note.log:
                self._log(note, norm, interrupts)

    def _give_up_if_hopeless(self, note: _Note, loss_sum: float, norm: float) -> None:
        self.report.say(f"step {note.step}: loss {loss_sum / note.count}, gradient norm {norm}: skipped")
        limit = min(self.config.max_nonfinite_steps, self.state.total_steps)
        if self.state.nonfinite_in_a_row < limit:
            return
        documents = [i for micro in note.rows.micro_batches for row in micro for i in row]
        dataset = self.steps.plan.dataset
        text = ""
        if self.tokenizer is not None:
            text = f" First document: {self.tokenizer.decode(dataset[documents[0]]['input_ids'])[:200]!r}."
        raise TrainingError(
            f"the loss or gradient was NaN or infinite {self.state.nonfinite_in_a_row} steps in a row, the last "
            f"at step {note.step} (loss {loss_sum / note.count}, gradient norm {norm}; rows "
            f"{sorted({dataset.row_number(i) for i in documents})[:16]} of the data).{text} The adapters are as before "
            f"these steps. Lower learning_rate ({self.config.learning_rate}), use bf16 instead of fp16, or look at the "
            f"base weights; max_nonfinite_steps={self.config.max_nonfinite_steps} sets the patience"
        )

    def _log(self, note: _Note, norm: float, interrupts: Interrupts) -> None:
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
        self.tell("on_log", interrupts, line)

    def evaluate(self, interrupts: Interrupts) -> None:
        """One evaluation: a line, the best metric, early stopping."""
        assert self.eval_dataset is not None
        config, state = self.config, self.state
        self.read_arrived(interrupts, wait=True)
        with self.precision.autocast():
            found = evaluate(self.model, self.eval_dataset, batch_size=config.per_device_eval_batch_size)
        self.last_eval = {f"eval_{name}": value for name, value in found.items()}
        self.evaluated_at = state.global_step
        self.report.line({"step": state.global_step, "epoch": round(state.epoch_progress, 4), **self.last_eval})
        metric = self._metric()
        gain = 0.0 if state.best_metric is None else self._sign() * (metric - state.best_metric)
        if state.best_metric is None or gain > config.early_stopping_threshold:
            state.best_metric, state.evaluations_without_gain = metric, 0
        else:
            state.evaluations_without_gain += 1
        if config.early_stopping_patience and state.evaluations_without_gain >= config.early_stopping_patience:
            self.report.say(
                f"step {state.global_step}: no better for {state.evaluations_without_gain} evaluations, stopping"
            )
            state.should_stop = True
        self.tell("on_evaluate", interrupts, self.last_eval)
        self.clock = (time.perf_counter(), state.tokens_seen)

    def _metric(self) -> float:
        name = "eval_" + (self.config.metric_for_best_model or "loss").removeprefix("eval_")
        if name not in self.last_eval:
            raise TrainingError(
                f"metric_for_best_model={self.config.metric_for_best_model!r}; allowed: "
                f"{', '.join(key.removeprefix('eval_') for key in self.last_eval)}"
            )
        return self.last_eval[name]

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

    def save(self, interrupts: Interrupts) -> None:
        """A checkpoint, then the rotation of old ones."""
        self.read_arrived(interrupts, wait=True)
        state = self.state
        if self._beats_every_checkpoint():
            state.best_checkpoint, state.best_checkpoint_metric = f"checkpoint-{state.global_step}", self._metric()
        path = save_checkpoint(self.resumable, state)
        self.saved_at = state.global_step
        rotate(self.config.output_dir, self.config.save_total_limit, state.best_checkpoint)
        self.tell("on_save", interrupts, path)
        self.clock = (time.perf_counter(), state.tokens_seen)

    def finish(self, interrupts: Interrupts) -> None:
        """The last numbers, evaluation and checkpoint; the best adapters if asked for."""
        config, state = self.config, self.state
        self.read_arrived(interrupts, wait=True)
        complete = not interrupts.requested
        if complete and config.eval_strategy != "no" and self.evaluated_at != state.global_step:
            self.evaluate(interrupts)
        wanted = config.save_strategy != "no" or not complete
        if self.world.is_main and wanted and self.saved_at != state.global_step and state.global_step > 0:
            self.save(interrupts)
        if complete and config.load_best_model_at_end and state.best_checkpoint:
            path = Path(config.output_dir) / state.best_checkpoint / "lora.safetensors"
            load_adapter_state(self.model, read_adapter(path)[0], str(path))
            self.report.say(f"the adapters are those of {state.best_checkpoint} (best {self._metric_name()})")
        self.tell("on_train_end", interrupts)

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


def _prepare(
    model: nn.Module,
    train_dataset: ChatDataset,
    config: TrainingConfig,
    eval_dataset: ChatDataset | None,
    tokenizer: Any,
    callbacks: Sequence[Any],
) -> _Run:
    """Check everything that can be checked, build the parts, and go back to a checkpoint if asked."""
    check_run(model, train_dataset, eval_dataset, config)
    checkpoint = find_checkpoint(config)
    claim_output_dir(config, resuming=checkpoint is not None)
    world, device = World(), model_device(model)
    torch.manual_seed(config.seed)
    precision = resolve_precision(config, model, device)
    optimizer = build_optimizer(model, config)
    steps = resolve_plans(model, train_dataset, config)
    resumable = Resumable(model, optimizer, precision.scaler, config, steps.data_facts(), world.rank)
    state = load_checkpoint(checkpoint, resumable) if checkpoint else TrainingState()
    state.total_steps = steps.total
    context = float((train_dataset.lengths**2).sum() / (2 * train_dataset.lengths.sum()))
    return _Run(
        model=model, config=config, steps=steps, precision=precision, state=state, world=world,
        step=OptimizerStep(model, optimizer, precision, config.max_grad_norm, world),
        report=Reporter(config, state, world.is_main), resumable=resumable, eval_dataset=eval_dataset,
        tokenizer=tokenizer, callbacks=callbacks, flops_per_token=flops_per_token(model, context),
        saved_at=state.global_step if checkpoint else -1,
    )  # fmt: skip


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """``model.train()`` for the time of the block, then every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _compiled_layers(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Each decoder layer through ``torch.compile`` for the time of the block."""
    layers = list(model.get_decoder().layers) if enabled else []  # type: ignore[operator]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
