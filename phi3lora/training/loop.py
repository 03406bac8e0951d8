"""``train``: the training loop, for every precision and every way of computing the layers.

    for each optimizer step:
        take its micro-batches        a background thread has collated them already
        forward, backward, update     step.py; torch's optimizers never wait for the GPU
        log                           the losses that have arrived; the GPU may be some steps behind
        evaluate, save                where they are due

:func:`train` shows the whole run. :class:`_Run` below it holds what the loop carries from step to step.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter_file import adapter_metadata, load_adapter_state, read_adapter
from ..checks.doctor import problems
from ..checks.report import Finding
from ..config import TrainingConfig
from ..data.batches import Cursor, Step
from ..data.dataset import ChatDataset, ChatStream
from ..errors import CheckpointError, TrainingError, require
from ..inference.evaluation import ComputeMetrics, evaluate
from ..model.estimate import flops_per_token, mean_context_tokens
from ..model.load import model_device
from ..model.sharding import sharded_base
from .best import BestModel, adopt_best, measured_on, scores_rouge
from .callbacks import Callback
from .checkpoint import (
    Resumable,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    rng_state,
    save_checkpoint,
)
from .distributed import OTHER_RUN, digest, joined
from .interrupts import Interrupts
from .learning import learned_nothing
from .logging import DeferredMetrics, Reporter, StepRecord, report_skipped
from .optim import build_optimizer, schedule
from .output_folder import (
    OutputFolder,
    check_output_dir,
    claim_output_dir,
    locked,
    rotate,
    set_aside_newer,
    write_record,
)
from .picture import PICTURE, draw_run
from .result import TrainingResult, closing_facts, result_of
from .setup import PlannedRun, banner_facts, check_run, explain_out_of_memory, interval, prepared, usual_torch
from .step import OptimizerStep

logger = logging.getLogger("phi3lora")


def train(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    config: TrainingConfig | None = None,
    *,
    eval_dataset: ChatDataset | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[Callback | Any] = (),
    compute_metrics: ComputeMetrics | None = None,
) -> TrainingResult:
    """Train the adapters of ``model`` in place.

    Under torchrun every process calls this with the same arguments, each on its own device. The processes share the
    steps, end with the same adapters and return the same result.

    Args:
        model: a Phi-3 causal LM after ``inject_lora``, on the device to train on.
        train_dataset: tokenised documents, or a stream of them (which needs ``max_steps``).
        config: training settings; default ``TrainingConfig()``.
        eval_dataset: documents for the evaluations that ``eval_strategy`` asks for.
        tokenizer: the dataset's tokenizer, for the checks before the run, for answers in evaluations, and to quote a
            document whose loss stays NaN.
        callbacks: objects with some of the hooks of :class:`phi3lora.Callback`.
        compute_metrics: a function of the model's own answers to ``eval_dataset``, as in :func:`phi3lora.evaluate`;
            what it returns is logged as ``eval_*`` and may be ``metric_for_best_model``.

    Returns:
        Steps done, final metrics, the history and the best checkpoint. The model keeps the last adapters, or the best
        ones with ``load_best_model_at_end``.

    Raises:
        TrainingError: no adapters, other trainable parameters, a loss that stays NaN or infinite, a GPU out of memory;
            processes that differ, or one that has ended.
        DataError: an empty dataset, documents that do not fit.
        CheckpointError: ``output_dir`` is in use or holds another run's checkpoints; there is nothing to resume from;
            a checkpoint belongs to another run or cannot be written.
    """
    is_list = isinstance(callbacks, Sequence) and not any(isinstance(callback, type) for callback in callbacks)
    require(is_list, "callbacks", callbacks, "a list of objects with hooks of Callback, no classes", TrainingError)
    settings = TrainingConfig() if config is None else config
    planned = PlannedRun(model, train_dataset, settings, eval_dataset, tokenizer, compute_metrics)
    return run_training(planned, callbacks)


def run_training(
    planned: PlannedRun, callbacks: Sequence[Callback | Any] = (), tells_next: bool = True
) -> TrainingResult:
    """Train as :func:`train` does; without ``tells_next`` the caller tells the user what to type next."""
    model, config = planned.model, copy.copy(planned.config)
    planned.config = config
    config.output_dir = os.path.abspath(config.output_dir)  # a callback may change the working directory
    with ExitStack() as stack:
        stack.enter_context(usual_torch())
        is_stream = not planned.train_dataset.known_length
        world = planned.world = stack.enter_context(joined(model_device(model), is_stream))
        world.on_each(lambda: check_run(planned))
        world.require_equal({"the base": "whole" if sharded_base(model) is None else "split"}, OTHER_RUN)
        output = world.on_main(lambda: stack.enter_context(locked(config.output_dir)))
        run = _Run(planned, callbacks, output)
        state, report = run.state, run.report
        stack.enter_context(run.interrupts)
        stack.enter_context(explain_out_of_memory(planned))
        if planned.parts == 1:  # a split base's gathers need the link themselves
            stack.enter_context(run.optimizer_step.gradients.overlapped())
        stack.enter_context(prepared(model, planned.checkpointing, planned.backend, planned.parts))
        report.facts(banner_facts(planned, state, run.optimizer_step.gradients.summary))
        if report.warns:
            report.findings(problems(planned))
        stack.enter_context(report)  # opens the progress bar: print would write into it from here on
        world.on_main(lambda: write_record(planned, resumed=run.saved_at >= 0))
        run.call_hooks("on_train_begin")
        if config.eval_on_start and state.global_step == 0:
            run.evaluate()
        run.agree_to_stop()
        batches = stack.enter_context(closing(run.batches()))
        if world.share is not None:
            stack.push(world.share.end_after_error)
        started = time.perf_counter()
        for step, micro_batches in batches:
            rate = run.schedule(state.global_step)
            world.step = state.global_step + 1
            values = run.optimizer_step(micro_batches, rate, step.supervised_tokens, step.idle)
            run.advance(step, values, rate)
            run.log_ready()
            state.train_seconds += time.perf_counter() - started
            if is_due(config.eval_strategy, config.eval_steps or config.logging_steps, state, step.ends_epoch):
                run.evaluate()
            must_save = config.load_best_model_at_end and run.is_best()
            if must_save or is_due(config.save_strategy, config.save_steps, state, step.ends_epoch):
                run.save()
            report.advance()
            run.call_hooks("on_step_end")
            if run.agree_to_stop():
                break
            started = time.perf_counter()
        run.finish()
        run.agree_to_stop()
        result = world.from_main(lambda: result_of(state, config, run.last_eval, run.best.folder, run.stopped_by))
    problem = learned_nothing(model, config, state) if report.warns and not result.interrupted else None
    if problem is not None:
        report.findings([Finding("run", "warning", problem)])
    report.facts(closing_facts(model, result) if tells_next else result.facts())
    return result


def is_due(strategy: str, every: float, state: TrainingState, ends_epoch: bool) -> bool:
    """Return whether a log line, an evaluation or a checkpoint belongs to the step just done.

    ``every`` counts steps; below 1, it is a share of all steps.
    """
    if strategy == "epoch":
        return ends_epoch
    return strategy == "steps" and state.global_step % interval(every, state.total_steps) == 0


class _Run:
    """The parts of a run, and what happens between two optimizer steps."""

    def __init__(self, planned: PlannedRun, callbacks: Sequence[Callback | Any], output: OutputFolder | None) -> None:
        """Build the parts, and restore them from a checkpoint if the config says so. Rank 0 has the output folder."""
        model, config, world = planned.model, planned.config, planned.world
        self.model: nn.Module = model
        self.planned, self.config, self.world = planned, config, world
        self.callbacks, self.output = callbacks, output
        self.interrupts, self.pending = Interrupts(), DeferredMetrics()
        self.stopped_by: int | None = None
        world.on_main(lambda: check_output_dir(config))
        resumed_from = world.from_main(lambda: find_checkpoint(config))
        torch.manual_seed(config.seed + world.rank)  # each process drops out other entries
        precision, steps = planned.precision, planned.steps
        _ = planned.memory  # resolved here, before the run allocates: it asks how much memory is free
        optimizer = build_optimizer(model, config)
        self.optimizer_step = OptimizerStep(model, optimizer, precision, config.max_grad_norm, world)
        facts = steps.data_facts(), measured_on(config, planned.eval_dataset, model)
        self.resumable = Resumable(model, optimizer, precision.scaler, config, *facts, world.rank, world.size)
        self._require_same_run()
        self.state = load_checkpoint(resumed_from, self.resumable) if resumed_from else TrainingState()
        world.on_main(lambda: claim_output_dir(config, resuming=resumed_from is not None))
        world.on_main(lambda: set_aside_newer(config.output_dir, self.state.global_step))
        self.state.total_steps, self.schedule = steps.total, schedule(config, steps.total)
        self.best = BestModel(config, self.state)
        context_tokens = mean_context_tokens(planned.dataset.lengths)
        flops = flops_per_token(model, context_tokens) / world.size
        self.report = Reporter(config, self.state, flops, world.is_main)
        self.resumable.lines = self.report.lines
        self.saved_at = self.state.global_step if resumed_from else -1
        self.evaluated_at, self.last_eval = -1, dict[str, float]()
        if resumed_from:
            self._recall_evaluations(resumed_from)

    def _require_same_run(self) -> None:
        """Refuse processes that would train different runs, and give all the adapters of rank 0."""
        of_process = ("disable_tqdm", "log_level", "project", "report_to", "run_name")
        facts = {name: value for name, value in self.config.to_dict().items() if name not in of_process}
        facts |= {f"{name} of the data": value for name, value in self.resumable.data.items()}
        facts |= {f"{name} of the evaluations": value for name, value in self.resumable.measured.items()}
        planned = self.planned
        facts["precision"], facts["device"] = planned.precision.name, model_device(self.model).type
        facts["eval_dataset"] = None if planned.eval_dataset is None else planned.eval_dataset.fingerprint()
        facts["compute_metrics"] = "given" if planned.compute_metrics is not None else None
        facts["trainable parameters"] = [(name, tuple(p.shape)) for name, p in self.planned.trained.items()]
        for path, adapter in adapter_metadata(self.model)["layers"].items():
            dropout: Any = self.model.get_submodule(path).lora_dropout
            facts[f"the adapter of {path}"] = {**adapter, "lora_dropout": dropout.p}
        self.world.require_equal(facts, OTHER_RUN)
        self.world.copy_from_main_(list(self.planned.trained.values()))

    def _recall_evaluations(self, resumed_from: Path) -> None:
        """Restore the last evaluation and the best checkpoint, unless they were measured on something else."""
        state = self.state
        if self.best.forget_if_not_comparable(self.resumable.measured):
            return
        for line in state.history:
            if "eval_loss" in line:
                self.evaluated_at = line.get("step", -1)
                values = {name: value for name, value in line.items() if name.startswith("eval_")}
                self.last_eval = {name: math.nan if value is None else value for name, value in values.items()}
        self.world.on_main(lambda: adopt_best(resumed_from, self.config.output_dir, state))
        best = self.world.from_main(lambda: (state.best_checkpoint, state.best_checkpoint_metric))
        state.best_checkpoint, state.best_checkpoint_metric = best
        if self.best.is_out_of_patience:
            self.report.print(
                f"early stopping ended this run at step {state.global_step}; a larger early_stopping_patience than "
                f"{self.config.early_stopping_patience} continues it"
            )
            state.should_stop = True

    def batches(self) -> Generator[tuple[Step, list[dict[str, Any]]]]:
        """Yield the steps that are left, with their micro-batches; none if early stopping has ended the run before."""
        state = self.state
        if state.should_stop:
            return
        cursor = Cursor(state.epoch, state.step_in_epoch, state.window)
        batches, device = self.planned.steps.batches, model_device(self.model)
        # With several processes, none stops alone while it waits for data: they agree after a step.
        yield from batches(
            state.global_step, cursor, device, lambda: self.world.size > 1 or not self.interrupts.requested
        )

    def agree_to_stop(self) -> bool:
        """Return whether the run ends here: on every rank, if a signal or a callback says so on one."""
        numbers = self.world.largest([self.interrupts.signal or 0, self.state.should_stop])
        self.stopped_by, self.state.should_stop = int(numbers[0]) or None, bool(numbers[1])
        if self.stopped_by is not None and not self.interrupts.requested:
            name = signal.Signals(self.stopped_by).name
            logger.warning("%s in another process: saving a checkpoint, then stopping", name)
            self.interrupts.signal = self.stopped_by
        return self.stopped_by is not None or self.state.should_stop

    def call_hooks(self, hook: str, *details: Any) -> None:
        """Call a hook of every callback. Ctrl-C inside one is a request to stop, as it is elsewhere."""
        try:
            for callback in self.callbacks:
                method = getattr(callback, hook, None)
                if method is not None:
                    method(self.state, *details)
        except KeyboardInterrupt:
            self.interrupts.signal = signal.SIGINT

    def advance(self, step: Step, values: Tensor, rate: float) -> None:
        """Move the data cursor past a step, and queue its loss for logging."""
        state, config = self.state, self.config
        state.global_step += 1
        state.epoch, state.step_in_epoch, state.window = step.next_cursor
        state.epoch_progress = step.epoch_progress
        state.tokens_seen += step.tokens
        first = config.logging_first_step and state.global_step == 1
        last = config.logging_strategy != "no" and state.global_step == state.total_steps
        log = first or last or is_due(config.logging_strategy, config.logging_steps, state, step.ends_epoch)
        record = StepRecord(step, state.global_step, rate, state.tokens_seen, log)
        self.pending.add(values, record)

    def log_ready(self, wait: bool = False) -> None:
        """Count the steps whose losses have arrived (``wait``: all), log those that are due, stop if they stay NaN."""
        state = self.state
        for (loss_sum, norm, skipped), record in self.pending.ready(wait):
            if not skipped:
                state.nonfinite_in_a_row = 0
                if record.number == 1:
                    state.first_loss = loss_sum / record.step.supervised_tokens
                state.loss_sum += loss_sum
                state.loss_count += record.step.supervised_tokens
                state.run_loss_sum += loss_sum
                state.run_loss_count += record.step.supervised_tokens
            elif not (math.isfinite(loss_sum) and self.planned.precision.can_scale_down()):
                state.nonfinite_in_a_row += 1
                state.nonfinite_total += 1
                report_skipped(record, loss_sum, norm, self.config, state, self.planned.tokenizer)
            if not record.log:
                continue
            line: dict[str, Any] = {"step": record.number, "epoch": round(record.step.epoch_progress, 4)}
            if state.loss_count:
                line["loss"] = state.loss_sum / state.loss_count
            line.update(learning_rate=record.learning_rate, grad_norm=norm, tokens=record.tokens_seen)
            if state.nonfinite_total:
                line["skipped_steps"] = state.nonfinite_total
            line.update(self.report.speed(record.tokens_seen, model_device(self.model)))
            state.loss_sum, state.loss_count = 0.0, 0
            self.report.log(line)
            self.call_hooks("on_log", line)

    def evaluate(self) -> None:
        """Evaluate, log the result, update the best metric, and stop early if it no longer improves."""
        planned, config, state = self.planned, self.config, self.state
        assert planned.eval_dataset is not None
        self.log_ready(wait=True)
        with planned.precision.autocast():
            found = evaluate(
                self.model,
                planned.eval_dataset,
                batch_size=config.per_device_eval_batch_size,
                rouge=scores_rouge(config),
                compute_metrics=planned.compute_metrics,
                tokenizer=planned.tokenizer,
                max_samples=config.eval_max_samples,
                max_new_tokens=config.eval_max_new_tokens,
                world=self.world,
            )
        self.evaluated_at = state.global_step
        self.last_eval = {f"eval_{name.removeprefix('eval_')}": value for name, value in found.items()}
        self.report.log({"step": state.global_step, "epoch": round(state.epoch_progress, 4), **self.last_eval})
        state.measured = self.resumable.measured
        self.best.count(self.best.metric(self.last_eval))
        if self.best.is_out_of_patience:
            count = state.evaluations_without_gain
            self.report.print(f"step {state.global_step}: no improvement in {count} evaluations, stopping")
            state.should_stop = True
        self.call_hooks("on_evaluate", self.last_eval)
        self.report.restart_clock()

    def is_best(self) -> bool:
        """Return whether the model has just been evaluated, and is better than every checkpoint."""
        if self.evaluated_at != self.state.global_step:
            return False
        return self.best.beats(self.best.metric(self.last_eval), self.state.best_checkpoint_metric)

    def save(self) -> None:
        """Write a checkpoint and delete old ones beyond ``save_total_limit``."""
        self.log_ready(wait=True)
        state = self.state
        previous_best = state.best_checkpoint, state.best_checkpoint_metric
        if self.is_best():
            state.best_checkpoint = f"checkpoint-{state.global_step}"
            state.best_checkpoint_metric = self.best.metric(self.last_eval)
        self._require_same_adapters()
        path, self.resumable.generators = None, self.world.gather(rng_state())
        try:
            path = self.world.from_main(self._write_checkpoint)
            self.saved_at = state.global_step
            limits = self.config.save_total_limit, state.best_checkpoint, path
            self.world.on_main(lambda: rotate(self.config.output_dir, *limits))
        except CheckpointError as error:
            if path is None:
                state.best_checkpoint, state.best_checkpoint_metric = previous_best
            if not self.config.continue_on_save_error:
                raise
            logger.error("step %d: %s", state.global_step, error)
            if path is None:
                return
        self.call_hooks("on_save", path)
        self.report.restart_clock()

    def _write_checkpoint(self) -> Path:
        assert self.output is not None
        self.output.keep()
        return save_checkpoint(self.resumable, self.state)

    def _require_same_adapters(self) -> None:
        """Refuse to save adapters that have come apart: a process would go on from what it had not trained."""
        if self.world.size > 1:
            facts = {"SHA-256 of the adapters": digest(self.planned.trained)}
            self.world.require_equal(facts, f"the adapters are no longer the same at step {self.state.global_step}")

    def finish(self) -> None:
        """Log, evaluate and save the last step, load the best adapters if the config says so, and draw the curves."""
        config, state = self.config, self.state
        if self.world.share is not None:
            self.world.share.end()
        self.log_ready(wait=True)
        self.agree_to_stop()
        complete = self.stopped_by is None
        unsaved = self.saved_at != state.global_step
        if complete and config.eval_strategy != "no" and self.evaluated_at != state.global_step:
            self.evaluate()
            unsaved = True  # a checkpoint of this step does not have the evaluation yet
        if unsaved and state.global_step > 0 and (config.save_strategy != "no" or not complete):
            self.save()
        best = self.best.folder
        if complete and config.load_best_model_at_end:
            if best is None:
                self.report.print("no checkpoint has a finite metric: the adapters are those of the last step")
            elif self.world.from_main(best.is_dir):
                path = best / "lora.safetensors"
                self.world.on_main(lambda: load_adapter_state(self.model, read_adapter(path)[0], str(path)))
                self.world.copy_from_main_(list(self.planned.trained.values()))
                metric = f"{config.metric_for_best_model or 'loss'} {state.best_checkpoint_metric:.4g}"
                self.report.print(f"loaded the adapters of {state.best_checkpoint} (best {metric})")
            else:
                self.report.print(f"the best checkpoint {best} is gone: the adapters are those of the last step")
        self.call_hooks("on_train_end")
        if self.output is not None and self.output.is_held():
            draw_run(state.history, self.output.folder / PICTURE)
