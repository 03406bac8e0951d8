"""Where a run stands: everything the loop knows between two steps, as plain JSON types."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
        """The state that :meth:`to_dict` described; keys of a later version are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
