"""``Callback``: your own code at fixed points of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import TrainingState


class Callback:
    """Hooks into a run; override those you need. ``train(..., callbacks=[...])`` accepts any object with some of them.

    Set ``state.should_stop = True`` in a hook to end the run after the step. With several processes (torchrun), each
    calls its own callbacks, and the run ends for all as soon as one asks for it.

    A checkpoint holds the random generators as they were before ``on_save`` and ``on_step_end``. A hook that draws from
    them makes a resumed run differ from an uninterrupted one: give ``generate`` a ``seed`` if it samples there.
    """

    def on_train_begin(self, state: TrainingState) -> None:
        """Called before the first step, after a checkpoint has been loaded."""

    def on_step_end(self, state: TrainingState) -> None:
        """Called after each optimizer step, with its evaluation and checkpoint done."""

    def on_log(self, state: TrainingState, line: dict[str, Any]) -> None:
        """Called after a training line of ``metrics.jsonl``; on a GPU some steps after the step it describes."""

    def on_evaluate(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """Called after an evaluation."""

    def on_save(self, state: TrainingState, path: Path) -> None:
        """Called after a checkpoint is on disk."""

    def on_train_end(self, state: TrainingState) -> None:
        """Called after the last step, also when the run was interrupted."""
