"""``TrainingResult``, the last lines that a run prints, and tables and curves of its history."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainingConfig
from ..display import (
    Html,
    command_line,
    html_facts,
    html_table,
    one_line,
    shell_lines,
    shown_path,
    svg_curves,
    terminal_columns,
    text_facts,
)
from ..errors import counted
from ..run_settings import DEMO
from .checkpoint import TrainingState

History = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``."""

_EMBEDDED = Path(__file__).parents[1] / "demo" / "base"
_MOST_ROWS = 100  # of a table of the history
_NAMES = 13  # columns of the names before the last lines of a run
_COLUMNS = {
    "step": ("step", ",.0f"),
    "loss": ("loss", ".4g"),
    "eval_loss": ("held-out loss", ".4g"),
    "learning_rate": ("learning rate", ".2e"),
    "grad_norm": ("gradient norm", ".4g"),
    "tokens_per_s": ("tokens/s", ",.0f"),
}
"""Figure of a line -> head of its column, and its format."""


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of :func:`train`. ``print`` shows it in a few lines, a notebook with its curves."""

    global_step: int
    """Optimizer steps done, including those before a resume."""
    metrics: dict[str, float]
    """``train_loss``, ``train_seconds``, ``tokens``, ``tokens_per_s``, and the last evaluation's ``eval_*``."""
    history: list[dict[str, Any]]
    """Lines of ``metrics.jsonl``."""
    best_checkpoint: str | None
    """Path of the best checkpoint by ``metric_for_best_model``; None if no evaluated step was saved."""
    interrupted: bool = False
    """True if Ctrl-C or SIGTERM ended the run; ``resume_from_checkpoint=True`` continues it."""
    interrupted_by: int | None = None
    """Number of that signal: 2 for Ctrl-C, 15 for SIGTERM."""
    output_dir: str = ""
    """Folder of the run."""
    first_loss: float | None = None
    """Loss of the first step, before the adapters had changed."""
    checkpoint: str | None = None
    """Checkpoint with the adapters that the model has now; None if they were not saved."""

    def __repr__(self) -> str:
        facts = [counted(self.global_step, "step"), *(f"{name} {value}" for name, value in self._figures().items())]
        return one_line("TrainingResult", ["interrupted", *facts] if self.interrupted else facts)

    def __str__(self) -> str:
        return text_facts(self.facts())

    def _repr_html_(self) -> str:
        rows = html_table(history_rows(self.history)) if self.history else ""
        return Html(html_facts("TrainingResult", self.facts()) + loss_curves(self.history) + rows)

    def facts(self) -> dict[str, str]:
        """Return the lines of the printed form: name -> text."""
        seconds = self.metrics.get("train_seconds", 0.0)
        steps = f"{counted(self.global_step, 'step')}, {self.metrics.get('tokens', 0):,.0f} tokens in {seconds:,.0f} s"
        skipped = max((line.get("skipped_steps", 0) for line in self.history), default=0)
        if skipped:
            steps += f"; {skipped:,} skipped, because the loss or its gradient was not finite"
        facts = {
            "interrupted" if self.interrupted else "done": steps,
            **self._figures(),
            "best": self.best_checkpoint and shown_path(self.best_checkpoint),
            "checkpoint": self.checkpoint and shown_path(self.checkpoint),
        }
        return {name: text for name, text in facts.items() if text}

    def _figures(self) -> dict[str, str]:
        """Return the loss and the held-out loss: the first, the last, and their steps."""
        figures = {}
        for name, key in (("loss", "loss"), ("held out", "eval_loss")):
            points = curve(self.history, key)
            if key == "loss" and self.first_loss is not None and points and points[0][0] > 1:
                points.insert(0, (1, self.first_loss))
            if len(points) > 1:
                (first, before), (last, after) = points[0], points[-1]
                figures[name] = f"{before:.4g} -> {after:.4g} (steps {first:,} and {last:,})"
            elif points:
                figures[name] = f"{points[0][1]:.4g} (step {points[0][0]:,})"
        return figures


def result_of(
    state: TrainingState,
    config: TrainingConfig,
    last_eval: Mapping[str, float],
    best: Path | None,
    stopped_by: int | None,
) -> TrainingResult:
    """Return the result of a run from its last state, evaluation and best checkpoint, and the signal that ended it."""
    last = Path(config.output_dir) / f"checkpoint-{state.global_step}"
    saved = best if config.load_best_model_at_end and stopped_by is None else last
    metrics = {
        "train_loss": state.run_loss_sum / state.run_loss_count if state.run_loss_count else math.nan,
        "train_seconds": state.train_seconds,
        "tokens": state.tokens_seen,
        "tokens_per_s": state.tokens_seen / max(state.train_seconds, 1e-9),
        **last_eval,
    }
    return TrainingResult(
        global_step=state.global_step,
        metrics=metrics,
        history=list(state.history),
        best_checkpoint=str(best) if best else None,
        interrupted=stopped_by is not None,
        interrupted_by=stopped_by,
        output_dir=config.output_dir,
        first_loss=state.first_loss,
        checkpoint=str(saved) if saved is not None and saved.is_dir() else None,
    )


def closing_facts(model: Any, result: TrainingResult) -> dict[str, str]:
    """Return the last lines of a run: its outcome, where the adapter is, and what to type next."""
    base, columns = (getattr(model, "origin", None) or {}).get("name_or_path"), terminal_columns()
    if result.interrupted:
        command = "the same call with resume_from_checkpoint=True continues the run"
    elif result.checkpoint is None or base is None:
        command = f"p3.save_adapter(model, {shown_path(os.path.join(result.output_dir, 'adapter.safetensors'))!r})"
    else:
        model_name = DEMO if Path(base) == _EMBEDDED else base
        command = command_line("chat", "--model", model_name, "--adapter", result.checkpoint)
        command = "\n".join(shell_lines(command, columns and columns - _NAMES))
    where = "in the model only" if result.checkpoint is None else shown_path(result.checkpoint)
    outcome = {name: text for name, text in result.facts().items() if name != "checkpoint"}
    return {**outcome, "adapter": where, "next": command}


def curve(history: History, key: str) -> list[tuple[int, float]]:
    """Return the steps and the values of one figure."""
    return [(line["step"], line[key]) for line in history if "step" in line and line.get(key) is not None]


def loss_curves(history: History) -> Html:
    """Return the loss and the held-out loss as a picture; nothing with fewer than two points."""
    curves = {"loss": curve(history, "loss"), "held-out loss": curve(history, "eval_loss")}
    return svg_curves("step", {name: points for name, points in curves.items() if points})


def history_rows(history: History) -> list[list[str]]:
    """Return the history as rows, the head first: one a step, and of a long run 100 of them, evenly spread."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in history:
        by_step.setdefault(line.get("step", 0), {}).update({k: v for k, v in line.items() if v is not None})
    columns = {key: column for key, column in _COLUMNS.items() if any(key in line for line in by_step.values())}
    lines = list(by_step.values())
    if len(lines) > _MOST_ROWS:
        lines = [lines[round(i * (len(lines) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    head = [name for name, _ in columns.values()]
    return [
        head,
        *([format(line[key], form) if key in line else "" for key, (_, form) in columns.items()] for line in lines),
    ]
