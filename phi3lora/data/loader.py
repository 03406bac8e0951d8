"""``batches``: what ``train`` consumes, for loops of your own; and the plan of an epoch behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .dataset import ChatDataset
from .packing import Row, collate, epoch_rows
from .streaming import ChatStream


@dataclass(frozen=True)
class BatchPlan:
    """Which rows make which micro-batch of an epoch; the tensors are made when asked for.

    ``boundary`` (tokens) keeps documents up to that length and longer ones in different micro-batches: longrope models
    choose their rotary factors by the largest position in a batch. ``fixed_shape`` fills an epoch's last micro-batch
    up with rows of padding, for compiled graphs.
    """

    dataset: ChatDataset
    batch_size: int
    max_length: int
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    boundary: int | None = None
    fixed_shape: bool = False

    def micro_batches(self, epoch: int) -> list[list[Row]]:
        """The micro-batches of an epoch, each a list of at most ``batch_size`` rows."""
        if self.boundary is None:
            return self._grouped(self.dataset, None, epoch)
        lengths = self.dataset.lengths
        groups = []
        for belongs in (lengths <= self.boundary, lengths > self.boundary):
            members = belongs.nonzero()[0]
            if len(members):
                groups.append(self._grouped(self.dataset.select(members), members, epoch))
        mixed: list[list[Row]] = []
        longest = max(map(len, groups), default=0)
        for i in range(longest):  # spread the rarer kind evenly over the epoch
            for group in groups:
                mixed += group[i * len(group) // longest : (i + 1) * len(group) // longest]
        return mixed

    def _grouped(self, dataset: ChatDataset, members: Any, epoch: int) -> list[list[Row]]:
        rows = epoch_rows(
            dataset, max_length=self.max_length, packing=self.packing, shuffle=self.shuffle, seed=self.seed, epoch=epoch
        )
        if members is not None:
            rows = [tuple(int(members[i]) for i in row) for row in rows]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def tensors(self, rows: list[Row]) -> dict[str, Any]:
        """The batch of these rows: ``max_length`` tokens wide when packing, else as wide as its longest document."""
        if self.fixed_shape:
            rows = rows + [()] * (self.batch_size - len(rows))
        if self.packing:
            return collate(self.dataset, rows, self.max_length)
        lengths = self.dataset.lengths
        return collate(self.dataset, rows, max(int(lengths[i]) for row in rows for i in row))


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
    """One epoch of batches, as ``train`` consumes them.

    Args:
        dataset: tokenised documents; of a stream one pass, window after window.
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
    if not isinstance(dataset, ChatStream) and len(dataset) == 0:
        raise DataError("the dataset is empty: it has no documents")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size!r}; allowed: a whole number >= 1")
    if max_length is not None and max_length < 1:
        raise DataError(f"max_length={max_length!r}; allowed: a whole number >= 1")
    options = (batch_size, max_length or dataset.max_length, packing, shuffle, seed, boundary)
    if not isinstance(dataset, ChatStream):
        plan = BatchPlan(dataset, *options)
        return (plan.tensors(rows) for rows in plan.micro_batches(epoch))
    plans = ((BatchPlan(window, *options), number) for number, window in dataset.windows(endless=False))
    return (plan.tensors(rows) for plan, number in plans for rows in plan.micro_batches(epoch + number))
