"""``batches``: what ``train`` consumes, for loops of your own; and the plan of an epoch behind it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .dataset import IGNORE, ChatDataset
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


# ----------------------------------------------------------------------------------------------------
# Documents -> rows of ``max_length`` tokens, and rows -> the tensors of a batch.
#
# Documents are never cut. Within a window of the shuffled order they are placed longest first, each into the fullest
# row
# that still takes it (best fit decreasing), which fills rows to 97 % and more on chat data:
#
#     max_length 8, documents of 5, 4, 3, 3 tokens  ->  [5 3] [4 3 .]
#
# Which rows there are, and their order, depends on the lengths, the seed and the epoch alone: never on batch size,
# accumulation or the number of processes.
#
#     Row [a a a b b .] in the tensors of a batch (S = 6):
#       input_ids     a a a b b pad
#       labels       -100 a a -100 b -100      the first token of a document has nothing to be predicted from
#       position_ids  0 1 2 0 1 0              0 in all padding: it must not look like a long document
#       cu_seqlens    0 3 5 6                  over the B*S tokens of the batch, end to end; padding counts as a
# document

_WINDOW = 2048  # documents placed together: enough to fill rows, few enough that the order stays random

Row = tuple[int, ...]  # the documents of one row, in order


def document_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``count`` documents in one epoch, (count,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit-decreasing rows of the positions 0 .. len(lengths) - 1; each row's lengths add up to <= max_length.

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


def epoch_rows(
    dataset: ChatDataset, *, max_length: int, packing: bool, shuffle: bool, seed: int, epoch: int
) -> list[Row]:
    """The rows of one epoch, in order.

    Raises:
        DataError: a document longer than ``max_length``.
    """
    lengths = dataset.lengths
    longest = int(lengths.max(initial=0))
    if longest > max_length:
        raise DataError(
            f"max_length={max_length}, but the dataset (loaded with max_length={dataset.max_length}) has a document "
            f"of {longest} tokens; load it with the smaller max_length, or train with {longest} or more"
        )
    order = document_order(len(dataset), seed, epoch) if shuffle else np.arange(len(dataset))
    if not packing:
        return [(int(i),) for i in order]
    rows: list[Row] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        packed = pack(lengths[window], max_length)
        if shuffle:  # best fit puts long documents first
            mixed = np.random.default_rng([seed, epoch, start]).permutation(len(packed))
            packed = [packed[i] for i in mixed]
        rows += [tuple(int(window[i]) for i in row) for row in packed]
    return rows


def collate(dataset: ChatDataset, rows: Sequence[Row], row_length: int) -> dict[str, Any]:
    """The tensors of a batch of rows, on the CPU (see the top of this file).

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` int64 (B, S); ``cu_seqlens`` int32 (documents + 1,), padding counted
        as documents; ``max_seqlen``, the longest document in tokens; ``documents``, the rows as given.
    """
    shape = (len(rows), row_length)
    input_ids = np.full(shape, dataset.pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
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
