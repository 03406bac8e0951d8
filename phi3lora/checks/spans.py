"""Stretches of trained tokens in a dataset, found for many documents at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.dataset import IGNORE, ChatDataset
from ..errors import DataError

SAMPLE = 100_000
"""Documents looked at, evenly spread; a smaller dataset is looked at whole."""
_AT_ONCE = 2048


@dataclass(frozen=True)
class TrainedSpans:
    """The maximal stretches of tokens with a label, in order, (spans,) each."""

    document: np.ndarray
    """The document's number in the dataset."""
    start: np.ndarray
    """The first token's place in the document."""
    length: np.ndarray
    """Tokens."""
    last_token: np.ndarray
    """Its id."""
    cut: np.ndarray
    """Whether the document was cut where the span ends, so that its end of turn is not there."""
    documents: int
    """How many were looked at."""
    other_labels: int
    """Labels that are not their own token's id."""

    def rows(self, dataset: ChatDataset, chosen: np.ndarray) -> list[int]:
        """Row numbers in the source of the spans that ``chosen``, a mask, picks."""
        return sorted({dataset.row_number(int(i)) for i in self.document[chosen]})


def trained_spans(dataset: ChatDataset, sample: int = SAMPLE) -> TrainedSpans:
    """The spans of at most ``sample`` documents.

    Raises:
        DataError: an empty dataset.

    Example (labels as letters, ``.`` for -100): ``. a b . . c`` has the spans (start 1, length 2) and (start 5,
    length 1).
    """
    if len(dataset) == 0:
        raise DataError("the dataset is empty: it has no documents")
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), sample)).astype(np.int64)
    parts = [_spans_of(dataset, chosen[at : at + _AT_ONCE]) for at in range(0, len(chosen), _AT_ONCE)]
    *columns, other = zip(*parts, strict=True)
    document, start, length, last_token, cut = map(np.concatenate, columns)
    return TrainedSpans(document, start, length, last_token, cut, documents=len(chosen), other_labels=sum(other))


def _spans_of(dataset: ChatDataset, chosen: np.ndarray) -> tuple[Any, ...]:
    """The fields of :class:`TrainedSpans`, but ``documents``, for these documents."""
    pairs = [dataset.document(int(i)) for i in chosen]
    ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    lengths = np.array([len(document) for document, _ in pairs])
    ends = lengths.cumsum()
    first, last = np.zeros(len(ids), bool), np.zeros(len(ids), bool)  # of a document
    first[ends - lengths], last[ends - 1] = True, True
    trained = labels != IGNORE
    starts = np.flatnonzero(trained & (first | ~np.roll(trained, 1)))
    stops = np.flatnonzero(trained & (last | ~np.roll(trained, -1))) + 1
    place = np.searchsorted(ends, starts, side="right")  # which of the documents
    shortened = dataset.truncated[chosen] | (lengths == dataset.max_length)
    cut = (stops == ends[place]) & shortened[place]
    other = int((trained & (labels != ids)).sum())
    return chosen[place], starts - (ends - lengths)[place], stops - starts, ids[stops - 1], cut, other
