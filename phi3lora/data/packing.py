"""Documents -> rows of ``max_length`` tokens, and rows -> the tensors of a batch.

Documents are never cut. Within a window of the shuffled order they are placed longest first, each into the fullest row
that still takes it (best fit decreasing), which fills rows to 97 % and more on chat data:

    max_length 8, documents of 5, 4, 3, 3 tokens  ->  [5 3] [4 3 .]

Which rows there are, and their order, depends on the lengths, the seed and the epoch alone: never on batch size,
accumulation or the number of processes.

    Row [a a a b b .] in the tensors of a batch (S = 6):
      input_ids     a a a b b pad
      labels       -100 a a -100 b -100      the first token of a document has nothing to be predicted from
      position_ids  0 1 2 0 1 0              0 in all padding: it must not look like a long document
      cu_seqlens    0 3 5 6                  over the B*S tokens of the batch, end to end; padding counts as a document
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .dataset import IGNORE, ChatDataset

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
