"""Hooks into a run. Subclass and override what you need; ``state.should_stop = True`` ends the run after the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .state import TrainingState


class Callback:
    """Every hook does nothing. ``train(..., callbacks=[...])`` takes any objects that have some of them."""

    def on_train_begin(self, state: TrainingState) -> None:
        """Before the first step, after a resume."""

    def on_step_end(self, state: TrainingState) -> None:
        """After each optimizer step and what was due at it."""

    def on_log(self, state: TrainingState, line: dict[str, Any]) -> None:
        """After a line of ``metrics.jsonl``; on a GPU some steps after the one it speaks of."""

    def on_evaluate(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, state: TrainingState, path: Path) -> None:
        """After a checkpoint is on disk."""

    def on_train_end(self, state: TrainingState) -> None:
        """After the last step, also of an interrupted run."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""The hooks' names."""
