"""Packed batches for your own loop (``batches``), and the schedule of a run's optimizer steps (``StepSchedule``).

    documents -> packed rows -> micro-batches of ``batch_size`` rows -> optimizer steps

Documents are never cut. The shuffled documents are taken 2,048 at a time. The longest is placed first, and each goes
into the fullest row that still has room for it (best fit decreasing), which fills rows to 97 % and more on chat data:

    max_length 8, documents of 5, 4, 3, 3 tokens  ->  [5 3] [4 3 .]

The rows depend on the documents' lengths, the seed, the epoch and the packing settings, never on batch size,
accumulation or the number of processes. So does their order, except that a longrope ``boundary`` interleaves whole
micro-batches. The steps depend on the data and the configuration alone, so a run can continue from any :class:`Cursor`.

A step has ``gradient_accumulation_steps`` micro-batches for each process. The step comes first, its division among the
processes second: 2 processes that accumulate 4 micro-batches take the steps of 1 process that accumulates 8.

The row [a a a b b .] in the tensors of a batch (B = 1, S = 6):

    input_ids     a a a b b pad
    labels       -100 a a -100 b -100      nothing precedes a document's first token to predict it from
    position_ids  0 1 2 0 1 0              0 in all padding: it must not look like a long document
    cu_seqlens    0 3 5 6                  over the B*S tokens of the batch, end to end; padding counts as a document
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import IGNORE_INDEX, TrainingConfig
from ..errors import CheckpointError, DataError, is_int, plain_value, require
from .dataset import ChatDataset, ChatStream, require_dataset
from .document_set import check_seed
from .prefetch import Share, pinned, prefetched

logger = logging.getLogger("phi3lora")

PackedRow = tuple[int, ...]  # the documents of one row of a batch, in order
MicroBatch = list[PackedRow]  # the rows of one forward pass

_PACKED_TOGETHER = 2048  # documents: enough to fill rows, few enough that the order stays random
_STEPS_AHEAD = 2
_ATTENTION_SHARE = 1 / 40_000
"""Work of a pair of tokens in attention relative to that of a token elsewhere: 1 / 12 hidden sizes."""


def batches(
    dataset: ChatDataset | ChatStream,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    packing: bool = True,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    boundary: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one epoch of batches, as ``train`` consumes them.

    Args:
        dataset: tokenised documents, or a stream, which is read once, window after window.
        max_length: tokens in a packed row; None: the dataset's.
        batch_size: rows in a batch: packed rows, or documents with ``packing=False``.
        packing: fill rows with whole documents, which do not see each other; False: one document a row, padded.
        seed, epoch: fix the order of the documents.
        shuffle: False: in the dataset's order (which packing changes within 2,048 documents, to fill rows).
        boundary: for longrope models, ``original_max_position_embeddings``: documents up to that many tokens and longer
            ones never share a batch.

    Yields:
        dict of CPU tensors ``input_ids``, ``labels``, ``position_ids`` (B, S) int64 and ``cu_seqlens`` int32, with
        ``max_seqlen`` and ``documents`` (which documents each row holds).

    Raises:
        DataError: an empty dataset, ``batch_size`` < 1, a document longer than ``max_length``.
    """
    require_dataset("dataset", dataset)
    first = dataset.first_window
    if len(first) == 0:
        raise DataError("the dataset is empty: it has no documents")
    row_length = dataset.max_length if max_length is None else max_length
    batch_size, row_length, seed, epoch = plain_value((batch_size, row_length, seed, epoch))
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", row_length, 1), ("epoch", epoch, 0)):
        require(is_int(value, least), name, value, f"a whole number >= {least}", DataError)
    check_seed(seed)
    plan = BatchPlan(first, batch_size, row_length, packing, shuffle, seed, boundary)
    plan.check_lengths()  # now, not when the first batch is asked for
    plans = ((dataclasses.replace(plan, dataset=window), n) for n, window in dataset.windows(endless=False))
    return (plan.tensors(micro) for plan, number in plans for micro in plan.micro_batches(epoch + number))


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Return best-fit-decreasing rows of the positions 0 .. len(lengths) - 1. No row exceeds ``max_length`` tokens.

    Example:
        >>> pack([3, 5, 4, 3], max_length=8)
        [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: the first that is large enough is the fullest
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (int(lengths[i]), 0))
        left, row = room.pop(at) if at < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - int(lengths[i]), row))
    return rows


def collate(dataset: ChatDataset, rows: Sequence[PackedRow], row_length: int) -> dict[str, Any]:
    """Return the tensors of a batch of packed rows, on the CPU (layout: see the top of this file).

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` int64 (B, S); ``cu_seqlens`` int32 (documents + 1,), padding counted
        as documents; ``max_seqlen``, the longest document in tokens; ``documents``, the rows as given.
    """
    shape = (len(rows), row_length)
    input_ids = np.full(shape, dataset.pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    edges = [0]
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            ids, targets = dataset.document(i)
            end = at + len(ids)
            input_ids[b, at:end] = ids
            labels[b, at + 1 : end] = targets[1:]
            position_ids[b, at:end] = np.arange(len(ids))
            edges.append(b * row_length + end)
            at = end
        if at < row_length:
            edges.append((b + 1) * row_length)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "cu_seqlens": torch.tensor(edges, dtype=torch.int32),
        "max_seqlen": int(np.diff(edges).max()),
        "documents": list(rows),
    }


@dataclass(frozen=True)
class BatchPlan:
    """The documents of every micro-batch of an epoch. Their tensors are made on request.

    ``boundary`` (tokens) keeps documents up to that length and longer ones in different micro-batches: longrope models
    choose their rotary factors by the largest position in a batch. ``fixed_shape`` pads a short micro-batch
    to ``batch_size`` rows, for compiled graphs.
    """

    dataset: ChatDataset
    batch_size: int
    max_length: int
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    boundary: int | None = None
    fixed_shape: bool = False

    def check_lengths(self) -> None:
        """Raise a ``DataError`` if a document is longer than a row."""
        longest = int(self.lengths.max(initial=0))
        if longest > self.max_length:
            raise DataError(
                f"max_length={self.max_length}, but the dataset (loaded with max_length={self.dataset.max_length}) "
                f"has a document of {longest} tokens; load it with the smaller value, or train with {longest} or more"
            )

    def micro_batches(self, epoch: int) -> list[MicroBatch]:
        """Return the micro-batches of an epoch, each of at most ``batch_size`` rows."""
        self.check_lengths()
        lengths = self.lengths
        is_long = lengths > (math.inf if self.boundary is None else self.boundary)
        groups: list[list[MicroBatch]] = []
        for documents in (np.flatnonzero(~is_long), np.flatnonzero(is_long)):
            rows = self._packed_rows(documents, lengths, epoch)
            groups.append([rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)])
        longest = max(map(len, groups))
        return [  # the rarer kind is spread evenly over the epoch
            micro
            for i in range(longest)
            for group in groups
            for micro in group[i * len(group) // longest : (i + 1) * len(group) // longest]
        ]

    def _packed_rows(self, documents: np.ndarray, lengths: np.ndarray, epoch: int) -> list[PackedRow]:
        """Return the rows of these documents in the order of the epoch."""
        if self.shuffle:
            documents = documents[np.random.default_rng([self.seed, epoch]).permutation(len(documents))]
        if not self.packing:
            return [(int(i),) for i in documents]
        rows: list[PackedRow] = []
        for start in range(0, len(documents), _PACKED_TOGETHER):
            together = documents[start : start + _PACKED_TOGETHER]
            packed = pack(lengths[together], self.max_length)
            if self.shuffle:  # best fit puts long documents first
                mixed = np.random.default_rng([self.seed, epoch, start]).permutation(len(packed))
                packed = [packed[i] for i in mixed]
            rows += [tuple(int(together[i]) for i in row) for row in packed]
        return rows

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return self.dataset.lengths

    @cached_property
    def supervised_tokens(self) -> np.ndarray:
        """Supervised tokens of each document, int64 (documents,)."""
        return self.dataset.supervised_tokens

    def dealt(self, micro_batches: list[MicroBatch], processes: int) -> list[list[MicroBatch]]:
        """Return each process's micro-batches of a step, balanced by tokens and by attention's squares of lengths.

        Places go round (process 0 has places 0, P, 2 P, ...) and keep their numbers of rows. Rows of the same kind
        (see ``boundary``) fill the places, the costliest row first, each where there is least work so far:

            2 processes, places of 2 rows, work  [9 8] [3 2]  ->  process 0: [9 2], process 1: [8 3]
        """
        if processes == 1:
            return [micro_batches]
        lengths, boundary = self.lengths, math.inf if self.boundary is None else self.boundary

        def work_of(row: PackedRow) -> float:
            each = lengths[list(row)].astype(np.float64)
            return float((each + _ATTENTION_SHARE * each**2).sum())

        work, filled = [0.0] * processes, [MicroBatch() for _ in micro_batches]
        is_long = [bool(micro and lengths[micro[0][0]] > boundary) for micro in micro_batches]
        for kind in (False, True):
            places = [i for i, its_kind in enumerate(is_long) if its_kind is kind]
            free: dict[int, list[int]] = {}
            for i in places:
                free.setdefault(i % processes, []).append(i)
            by_work = sorted(((work_of(row), row) for i in places for row in micro_batches[i]), key=lambda x: -x[0])
            least = [(work[process], process) for process in free]
            heapq.heapify(least)
            for amount, row in by_work:
                _, process = heapq.heappop(least)
                place = free[process][0]
                filled[place].append(row)
                work[process] += amount
                if len(filled[place]) == len(micro_batches[place]):
                    free[process].pop(0)
                if free[process]:
                    heapq.heappush(least, (work[process], process))
        return [filled[process::processes] for process in range(processes)]

    def tensors(self, micro: MicroBatch) -> dict[str, Any]:
        """Return the batch of these rows: ``max_length`` tokens wide when packing, else as its longest document is."""
        if self.fixed_shape:
            micro = micro + [()] * (self.batch_size - len(micro))
        if self.packing:
            return collate(self.dataset, micro, self.max_length)
        return collate(self.dataset, micro, max(int(self.lengths[i]) for row in micro for i in row))


class Cursor(NamedTuple):
    """Position of a run in its data: what a checkpoint records."""

    epoch: int = 0  # of the next step; of a stream, the window's number
    step_in_epoch: int = 0  # number of steps of that epoch already done
    window: str | None = None  # fingerprint of the stream's window that the cursor is inside; None at its start


START = Cursor()


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer step, and the cursor after it."""

    plan: BatchPlan  # makes their tensors
    micro_batches: list[MicroBatch]  # of all processes
    share: list[MicroBatch]  # of this process; in the last step of an epoch possibly fewer, or none
    tokens: int  # of all processes, padding not counted
    supervised_tokens: int  # of all processes
    idle: int  # micro-batches that another process has more than this one
    ends_epoch: bool  # or a stream's window
    epoch_progress: float  # epochs done after this step, with fraction
    next_cursor: Cursor


@dataclass(frozen=True)
class StepSchedule:
    """The optimizer steps of a run. A stream's window is treated as an epoch.

    ``plan`` belongs to the dataset, or to a stream's first window. ``check_window`` raises if a later window does not
    fit the model. ``process`` of ``processes`` takes its share of every step; with ``share`` they also tokenise a
    stream's windows together.
    """

    plan: BatchPlan
    config: TrainingConfig
    dataset: ChatDataset | ChatStream
    check_window: Callable[[ChatDataset], None] = lambda window: None
    process: int = 0
    processes: int = 1
    share: Share | None = None

    def steps_of_epoch(self, epoch: int, plan: BatchPlan | None = None) -> list[list[MicroBatch]]:
        """Return the micro-batches of each step. The last step of an epoch may have fewer."""
        if epoch == 0 and (plan is None or plan == self.plan):
            return self._first_epoch
        return self._steps_of_epoch(epoch, plan or self.plan)

    @cached_property
    def _first_epoch(self) -> list[list[MicroBatch]]:
        """Steps of epoch 0, which are asked for before the first step and again by it."""
        return self._steps_of_epoch(0, self.plan)

    def _steps_of_epoch(self, epoch: int, plan: BatchPlan) -> list[list[MicroBatch]]:
        micro = plan.micro_batches(epoch)
        count = self.config.gradient_accumulation_steps * self.processes
        return [micro[i : i + count] for i in range(0, len(micro), count)]

    @cached_property
    def total(self) -> int:
        """Number of optimizer steps of the whole run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        epochs = self.config.num_train_epochs
        whole = int(epochs)
        steps = sum(len(self.steps_of_epoch(epoch)) for epoch in range(whole))
        if epochs > whole:  # as in transformers, ceil(epochs * steps): 1.1 - 1 is more than 0.1, 1.1 * 10 is 11
            last = len(self.steps_of_epoch(whole))
            steps += math.ceil(epochs * last) - whole * last
        return steps

    def steps(
        self, steps_done: int = 0, cursor: Cursor = START, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[Step]:
        """Yield the steps from ``cursor`` to the end of the run. A stream's next window is prefetched.

        ``steps_done`` counts the optimizer steps before the cursor. ``wanted`` is asked while the run waits
        for a stream's window; False ends the iteration.

        Raises:
            CheckpointError: the stream's window that the cursor is in has changed.
        """
        left, first = self.total - steps_done, cursor.step_in_epoch
        if left <= 0:
            return

        def make_windows(wanted: Callable[[], bool]) -> Generator[tuple[int, ChatDataset]]:
            return self.dataset.windows(cursor.epoch, wanted=wanted, share=self.share)

        is_stream = not self.dataset.known_length
        with closing(prefetched(make_windows, 1, wanted) if is_stream else make_windows(wanted)) as windows:
            for epoch, window in windows:
                if is_stream:
                    self.check_window(window)
                fingerprint = window.fingerprint() if is_stream else None
                if first and fingerprint != cursor.window:
                    what = f"window {epoch} of the stream is not what it was when the checkpoint was made"
                    if not self.config.resume_with_changes:
                        raise CheckpointError(f"{what}; set resume_with_changes=True to continue anyway")
                    logger.warning("%s", what)
                plan = self.plan if window is self.plan.dataset else dataclasses.replace(self.plan, dataset=window)
                lengths, supervised = plan.lengths, plan.supervised_tokens
                steps = self.steps_of_epoch(epoch, plan)
                for i in range(first, min(len(steps), first + left)):
                    ends_epoch = i + 1 == len(steps)
                    documents = [d for micro in steps[i] for row in micro for d in row]
                    shares = plan.dealt(steps[i], self.processes)
                    yield Step(
                        plan=plan,
                        micro_batches=steps[i],
                        share=shares[self.process],
                        idle=max(map(len, shares)) - len(shares[self.process]),
                        tokens=int(lengths[documents].sum()),
                        supervised_tokens=int(supervised[documents].sum()),
                        ends_epoch=ends_epoch,
                        epoch_progress=epoch + (i + 1) / len(steps),
                        next_cursor=Cursor(epoch + 1) if ends_epoch else Cursor(epoch, i + 1, fingerprint),
                    )
                    left -= 1
                first = 0
                if left <= 0:
                    return

    def batches(
        self, steps_done: int, cursor: Cursor, device: torch.device, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[tuple[Step, list[dict[str, Any]]]]:
        """Yield each step of :meth:`steps` with the tensors of this process's share, two steps prefetched.

        The tensors are on the CPU, pinned for a CUDA ``device``. Close the generator (``contextlib.closing``) when
        leaving early; see :func:`phi3lora.data.prefetch.prefetched`.
        """

        def make(wanted: Callable[[], bool]) -> Iterator[tuple[Step, list[dict[str, Any]]]]:
            for step in self.steps(steps_done, cursor, wanted):
                yield step, [pinned(step.plan.tensors(micro), device) for micro in step.share]

        return prefetched(make, _STEPS_AHEAD, wanted)

    def data_facts(self) -> dict[str, Any]:
        """Return what determines the batches beside the configuration. A checkpoint records it."""
        return {**self.dataset.identity(), "row_length": self.plan.max_length, "boundary": self.plan.boundary}
