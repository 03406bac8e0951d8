"""Where a run stands: everything the loop knows between two steps, as plain JSON types."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..errors import is_int, is_number, is_path, is_text, short_repr


@dataclass
class TrainingState:
    """Saved in each checkpoint as ``trainer_state.json``; callbacks get it too and may set ``should_stop``."""

    total_steps: int = 0
    """Optimizer steps of the whole run."""
    global_step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """The epoch that the next step belongs to, from 0."""
    step_in_epoch: int = 0
    """Steps of that epoch already done: the data cursor."""
    window: str | None = None
    """Of a stream: the fingerprint of the window that the cursor is in, to know it again."""
    epoch_progress: float = 0.0
    """Epochs done, with fraction."""
    tokens_seen: int = 0
    """Tokens of documents trained on, padding not counted."""
    train_seconds: float = 0.0
    """Seconds of training, of all the run's processes so far."""
    loss_sum: float = 0.0
    """Of the steps since the last log line that were not skipped."""
    loss_count: int = 0
    """Their supervised tokens."""
    run_loss_sum: float = 0.0
    """Of the whole run."""
    run_loss_count: int = 0
    nonfinite_in_a_row: int = 0
    nonfinite_total: int = 0
    best_metric: float | None = None
    best_checkpoint: str | None = None
    """The folder's name in ``output_dir``."""
    best_checkpoint_metric: float | None = None
    evaluations_without_gain: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of ``metrics.jsonl``."""
    should_stop: bool = False
    """Set it in a callback to end the run after this step."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types; :meth:`from_dict` takes them back."""
        values = dataclasses.asdict(self)
        del values["should_stop"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """The state that :meth:`to_dict` described; keys of a later version are left out.

        Raises:
            ValueError: a value that its field cannot have.
        """
        known = {f.name: f.default for f in dataclasses.fields(cls) if f.name != "should_stop"}
        state = {name: value for name, value in values.items() if name in known}
        for name, value in state.items():
            if not _may_be(name, value, known[name]):
                raise ValueError(f"{name} is {short_repr(value)}")
        return cls(**state)


def _may_be(name: str, value: Any, default: Any) -> bool:
    """Whether a field can hold the value: what the loop does with it is known to work then."""
    if name == "history":
        return isinstance(value, list) and all(map(_is_line, value))
    if name == "window":
        return value is None or is_text(value)
    if name == "best_checkpoint":
        return value is None or (is_path(value) and PurePath(value).name == value)
    if isinstance(default, int):
        return is_int(value, 0)
    if name in ("best_metric", "best_checkpoint_metric") and isinstance(value, float):
        return True  # NaN too: a metric may be
    return value is None if default is None and not is_number(value) else is_number(value)


def _is_line(line: Any) -> bool:
    """A line of ``metrics.jsonl``; a number that is not finite is None there. A callback's own lines are its own."""
    if not isinstance(line, dict):
        return False
    numbers = {name: value for name, value in line.items() if name == "loss" or str(name).startswith("eval_")}
    known = all(value is None or is_number(value) for value in numbers.values())
    return known and (not numbers or is_int(line.get("step"), 0))


# ----------------------------------------------------------------------------------------------------
# Hooks into a run. Subclass and override what you need; ``state.should_stop = True`` ends the run after the step.


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
