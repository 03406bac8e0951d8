"""Which rows belong to which optimizer step, how many steps there are, and what is due at one."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import TrainingConfig
from ..data.batches import BatchPlan, Row
from ..data.dataset import ChatDataset
from ..data.prefetch import prefetched
from ..data.streaming import ChatStream
from ..errors import CheckpointError
from .state import TrainingState

logger = logging.getLogger("phi3lora")


@dataclass(frozen=True)
class StepRows:
    """The micro-batches of one step, as rows of documents, and where the cursor stands after it."""

    plan: BatchPlan
    """Whose documents they are."""
    micro_batches: list[list[Row]]
    tokens: int
    ends_epoch: bool
    epoch_progress: float
    next_cursor: tuple[int, int]
    window: str | None
    """Fingerprint of the stream's window that the cursor is then in; None: at a window's start, or no stream."""


@dataclass(frozen=True)
class StepPlan:
    """Steps of a run: a function of the data and the config alone, so a run can go on from any cursor.

    A stream's window plays an epoch's part.
    """

    plan: BatchPlan
    """Of the dataset, or of a stream's first window."""
    config: TrainingConfig
    stream: ChatStream | None = None
    check: Callable[[ChatDataset], None] = lambda window: None
    """Raises where a stream's later window does not fit the model."""

    def steps_of_epoch(self, epoch: int, plan: BatchPlan | None = None) -> list[list[list[Row]]]:
        """Step -> its micro-batches. The last step of an epoch may have fewer."""
        micro, count = (plan or self.plan).micro_batches(epoch), self.config.gradient_accumulation_steps
        return [micro[i : i + count] for i in range(0, len(micro), count)]

    @cached_property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        whole, fraction = divmod(self.config.num_train_epochs, 1)
        steps = sum(len(self.steps_of_epoch(epoch)) for epoch in range(int(whole)))
        if fraction:
            steps += math.ceil(fraction * len(self.steps_of_epoch(int(whole))))
        return steps

    def remaining(self, state: TrainingState, stop: threading.Event | None = None) -> Iterator[StepRows]:
        """The steps from the state's cursor to the end of the run, or until ``stop`` is set and a window is missing.

        Raises:
            CheckpointError: the stream's window that the cursor is in is not what it was.
        """
        left, first = self.total - state.global_step, state.step_in_epoch
        if left <= 0:
            return
        with closing(self._plans(state.epoch, stop or threading.Event())) as plans:
            for epoch, plan in plans:
                lengths, steps = plan.dataset.lengths, self.steps_of_epoch(epoch, plan)
                window = plan.dataset.fingerprint() if self.stream is not None else None
                if first:
                    self._check_window(state, window)
                for i in range(first, min(len(steps), first + left)):
                    ends = i + 1 == len(steps)
                    left -= 1
                    yield StepRows(
                        plan=plan,
                        micro_batches=steps[i],
                        tokens=int(sum(lengths[d] for micro in steps[i] for row in micro for d in row)),
                        ends_epoch=ends,
                        epoch_progress=epoch + (i + 1) / len(steps),
                        next_cursor=(epoch + 1, 0) if ends else (epoch, i + 1),
                        window=None if ends else window,
                    )
                first = 0
                if left <= 0:
                    return

    def _check_window(self, state: TrainingState, window: str | None) -> None:
        if window == state.window:
            return
        what = f"window {state.epoch} of the stream is not what it was when the checkpoint was made"
        if not self.config.resume_with_changes:
            raise CheckpointError(f"{what}: its rows are others. Set resume_with_changes=True to go on all the same")
        logger.warning("%s", what)

    def _plans(self, start: int, stop: threading.Event) -> Generator[tuple[int, BatchPlan]]:
        """Each epoch's number and plan, for ever; of a stream, the next window is made while this one is trained on."""
        if self.stream is None:
            for epoch in itertools.count(start):
                yield epoch, self.plan
            return
        made_until = self.stream.windows(start, wanted=lambda: not stop.is_set())
        with closing(prefetched(made_until, 1, stop)) as windows:
            for number, window in windows:
                self.check(window)
                yield number, dataclasses.replace(self.plan, dataset=window)

    def data_facts(self) -> dict[str, Any]:
        """What fixes the batches beside the config: a checkpoint of other facts belongs to another run."""
        dataset, plan = self.plan.dataset, self.plan
        facts = {
            "documents": len(dataset),
            "fingerprint": dataset.fingerprint(),
            "row_length": plan.max_length,
            "boundary": plan.boundary,
        }
        return facts if self.stream is None else {**facts, "buffer_size": self.stream.buffer_size}


def is_due(strategy: str, every: float, state: TrainingState, ends_epoch: bool) -> bool:
    """Whether the step just done is one for a log line, an evaluation or a checkpoint."""
    if strategy == "epoch":
        return ends_epoch
    interval = math.ceil(every * state.total_steps) if every < 1 else int(every)
    return strategy == "steps" and state.global_step % interval == 0
