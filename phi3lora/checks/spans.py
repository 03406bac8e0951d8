"""Spans of trained tokens in a dataset, found for many documents at once.

With labels as letters and ``.`` for -100, the document ``. a b . . c`` has two spans: start 1, length 2 and start 5,
length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import IGNORE_INDEX
from ..data.dataset import ChatDataset

_SAMPLE = 100_000  # documents examined, evenly spread; a smaller dataset is examined whole
_CHUNK = 2048  # documents examined at once


@dataclass(frozen=True)
class TrainedSpans:
    """The maximal runs of tokens with a label, in order; arrays are (spans,)."""

    document: np.ndarray
    """Number of the span's document in the dataset."""
    start: np.ndarray
    """Position of the first token in its document."""
    length: np.ndarray
    """Number of tokens."""
    last_token: np.ndarray
    """Id of the last token."""
    cut: np.ndarray
    """True where the document was cut at the span's end, so that its end of turn is missing."""
    documents: int
    """Number of documents examined."""
    wrong_labels: int
    """Number of labels that are not their own token's id."""

    def rows(self, dataset: ChatDataset, chosen: np.ndarray) -> list[str]:
        """Return the names of the rows of the spans that the mask ``chosen`` selects."""
        return dataset.row_names(self.document[chosen].tolist())


def trained_spans(dataset: ChatDataset, sample: int = _SAMPLE) -> TrainedSpans:
    """Find the trained spans of at most ``sample`` documents; the dataset must have one."""
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), sample)).astype(np.int64)
    parts = [_spans_of(dataset, chosen[at : at + _CHUNK]) for at in range(0, len(chosen), _CHUNK)]
    *columns, wrong = zip(*parts, strict=True)
    document, start, length, last_token, cut = map(np.concatenate, columns)
    return TrainedSpans(document, start, length, last_token, cut, documents=len(chosen), wrong_labels=sum(wrong))


def _spans_of(dataset: ChatDataset, chosen: np.ndarray) -> tuple[Any, ...]:
    """Return the fields of :class:`TrainedSpans`, without ``documents``, for the documents ``chosen``."""
    pairs = [dataset.document(int(i)) for i in chosen]
    ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    lengths = np.array([len(document) for document, _ in pairs])
    ends = lengths.cumsum()
    first, last = np.zeros(len(ids), bool), np.zeros(len(ids), bool)  # the first and the last token of a document
    first[ends - lengths], last[ends - 1] = True, True
    trained = labels != IGNORE_INDEX
    starts = np.flatnonzero(trained & (first | ~np.roll(trained, 1)))
    stops = np.flatnonzero(trained & (last | ~np.roll(trained, -1))) + 1
    at = np.searchsorted(ends, starts, side="right")  # (spans,) index into chosen
    shortened = dataset.truncated[chosen] | (lengths == dataset.max_length)
    cut = (stops == ends[at]) & shortened[at]
    wrong = int((trained & (labels != ids)).sum())
    return chosen[at], starts - (ends - lengths)[at], stops - starts, ids[stops - 1], cut, wrong
