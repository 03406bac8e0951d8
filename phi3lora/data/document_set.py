"""Tokenised documents in memory: columns, indexing, ``split``, ``select``, statistics; several sets as one.

All documents lie end to end in two arrays. A set is an index into them, so ``select`` and ``split`` copy no token:

    _input_ids   a a a a b b b c c c c c     tokens of documents a, b, c; _labels likewise
    _starts      0       4     7         12
    _index       [2, 0]                      the set (c, a)

A set does not change once it is made. So its fingerprint and its counts of labels, which take a pass over all tokens,
are computed once; a copy, which may be changed, computes its own.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np

from ..config import IGNORE_INDEX
from ..display import terminal_columns, wrap
from ..errors import SEED_END, DataError, is_int, plain_value, require
from .document_text import DocumentText, dataset_html, dataset_repr, dataset_summary, document_text
from .findings import Findings
from .prefetch import Share
from .sources import distinct_names

Documents = TypeVar("Documents", bound="DocumentSet")


class DocumentSet:
    """A sequence of tokenised documents; ``d[i]`` is ``{"input_ids": [...], "labels": [...]}``."""

    known_length = True
    """True if the number of documents is known, so that an epoch ends."""
    origin: Mapping[str, Any] | None = None
    """Arguments of ``load`` (and of :meth:`split`) that give this set again; None: it was made of objects."""

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        starts: np.ndarray,
        *,
        max_length: int,
        pad_token_id: int,
        end_of_turn_id: int,
        format: str,
        rows: np.ndarray,
        truncated: np.ndarray,
        dropped_rows: int = 0,
        bad_rows: tuple[int, ...] = (),
        findings: Findings | None = None,
        source: str = "(documents)",
    ) -> None:
        # All documents end to end, and those that belong to this set. A label is its token's own id, or -100.
        self._input_ids, self._labels = input_ids, labels  # int32 (tokens,) each
        self._starts = starts  # position of each document's first token, and the end, int64 (documents + 1,)
        self._rows = rows  # number of each document's row in its source (documents,)
        self._sources = np.zeros(len(rows), dtype=np.int64)  # position of its source in ``sources`` (documents,)
        self._truncated = truncated  # whether it was cut, bool (documents,)
        self._index = np.arange(len(starts) - 1)
        self.max_length, self.format = max_length, format
        self.pad_token_id, self.end_of_turn_id = pad_token_id, end_of_turn_id
        self.dropped_rows = dropped_rows
        """Number of source rows of which truncation left nothing to train."""
        self.bad_rows = bad_rows
        """Numbers of the source rows that ``on_bad_row="skip"`` left out, source after source."""
        self.sources: tuple[str, ...] = (source,)
        """Paths and hub names (in quotes), or types, of what the rows were read from."""
        self.tokenizer: Any = None
        """The tokenizer that ``load`` was given, for :meth:`show`."""
        self.findings = findings or Findings()
        """Findings of loading the source: see ``data/findings.py``."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has of this set: all but what is computed from it."""
        return {name: value for name, value in vars(self).items() if name not in ("_digest", "_label_counts")}

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids, labels = self.document(i)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return document ``i`` without copying it: input ids (n,) and labels (n,), int32."""
        at = self._index[i]
        part = slice(self._starts[at], self._starts[at + 1])
        return self._input_ids[part], self._labels[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._starts)[self._index]

    @property
    def supervised_tokens(self) -> np.ndarray:
        """Trained tokens of each document, its first token never among them, int64 (documents,)."""
        starts = self._starts[:-1]
        untrainable = self._labels[starts] != IGNORE_INDEX  # nothing precedes a first token to predict it from
        trained: np.ndarray = self._label_counts - untrainable
        return trained[self._index]

    @cached_property
    def _label_counts(self) -> np.ndarray:
        """Labels of each document in the arrays, int64 (documents,)."""
        return np.add.reduceat(self._labels != IGNORE_INDEX, self._starts[:-1], dtype=np.int64)

    @property
    def truncated(self) -> np.ndarray:
        """Mask of the documents that were cut at ``max_length``, bool (documents,)."""
        return self._truncated[self._index]

    @property
    def max_document_tokens(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max(initial=0))

    def largest_token_id(self) -> int:
        """Return the largest token id in any document, to compare with a model's vocabulary."""
        return int(np.maximum.reduceat(self._input_ids, self._starts[:-1])[self._index].max())

    def row_number(self, i: int) -> int:
        """Return the row (counted from 1, in its source) that document ``i`` came from."""
        return int(self._rows[self._index[i]])

    def source(self, i: int) -> str:
        """Return which of :attr:`sources` document ``i`` came from. Its row number counts that source's rows."""
        return self.sources[int(self._sources[self._index[i]])]

    def documents_by_source(self) -> dict[str, int]:
        """Return the number of documents of each source."""
        counts = np.bincount(self._sources[self._index], minlength=len(self.sources)).tolist()
        return dict(zip(self.sources, counts, strict=True))

    def row_name(self, i: int) -> str:
        """Return what messages call the row of document ``i``: ``"row 3"``, or ``"row 3 of 'b.csv'"`` of several."""
        return f"row {self.row_number(i)}" + (f" of {self.source(i)}" if len(self.sources) > 1 else "")

    def row_names(self, documents: Iterable[int]) -> list[str]:
        """Return the rows of documents for messages, in order, each once: ``["3", "8"]``, or ``["3 of 'b.csv'"]``."""
        rows = sorted({(self.source(i), self.row_number(i), self.row_name(i)) for i in documents})
        return [name.removeprefix("row ") for _, _, name in rows]

    def windows(
        self: Documents,
        start: int = 0,
        *,
        endless: bool = True,
        wanted: Callable[[], bool] = lambda: True,
        share: Share | None = None,
    ) -> Generator[tuple[int, Documents]]:
        """Yield ``(n, self)``, one an epoch, from ``n = start`` on; see ``ChatStream.windows``."""
        numbers = itertools.count(start) if endless else [start]
        return ((number, self) for number in takewhile(lambda _: wanted(), numbers))

    @property
    def first_window(self: Documents) -> Documents:
        """The dataset itself."""
        return self

    def split(self: Documents, fraction: float, seed: int = 0) -> tuple[Documents, Documents]:
        """Return ``(train, eval)``: a random ``fraction`` of the documents, at least one, becomes the second set.

        Documents made of one long row (``overflow="split"``), or of a row that a mix repeats, stay together, so no
        row is in both sets. Rows of different sources are different rows, whatever their numbers.
        """
        fraction, seed = plain_value((fraction, seed))
        check_seed(seed)
        require(isinstance(fraction, float) and 0 < fraction < 1, "fraction", fraction, "0 < fraction < 1", DataError)
        keys = (self._sources * 2**40 + self._rows)[self._index]  # one for each row of each source
        rows = np.unique(keys)
        if len(rows) < 2:
            raise DataError(f"cannot split a dataset of {len(rows)} row; allowed: 2 or more")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out = np.random.default_rng([seed]).permutation(rows)[:count]
        in_second = np.isin(keys, held_out)
        both = self.select(~in_second), self.select(in_second)
        for part in both:
            part.origin = self.origin and {**self.origin, "eval_share": fraction, "split_seed": seed}
        return both

    def select(self: Documents, documents: Any) -> Documents:
        """Return the set of the given documents (their numbers in this one, or a mask); it shares this one's memory."""
        chosen = np.asarray(documents)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        selected = copy.copy(self)
        selected.origin = None
        selected._index = self._index[chosen]
        return selected

    def statistics(self) -> dict[str, Any]:
        """Count documents, tokens, supervised tokens, truncated documents, dropped and bad rows; find the longest."""
        lengths = self.lengths
        tokens, supervised = int(lengths.sum()), int(self._label_counts[self._index].sum())
        return {
            "documents": len(self),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / max(tokens, 1),
            "truncated": int(self.truncated.sum()),
            "dropped": self.dropped_rows,
            "bad": len(self.bad_rows),
            "longest": int(lengths.max(initial=0)),
            "format": self.format,
            "max_length": self.max_length,
            **self.findings.counts(),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of the documents in their order: equal exactly when the data is."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for i in range(len(self)):
            for part in self.document(i):
                digest.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return the facts by which a checkpoint recognises its data."""
        return {"documents": len(self), "fingerprint": self.fingerprint()}

    def describe(self) -> str:
        """Return a sentence for a model card."""
        s = self.statistics()
        return (
            f"{s['documents']:,} chats of {s['tokens']:,} tokens, {s['supervised_share']:.1%} of them trained; the "
            f"longest has {s['longest']:,} tokens (format `{s['format']}`)."
        )

    def show(self, i: int, tokenizer: Any = None) -> DocumentText:
        """Return document ``i`` as text: ``print`` marks its trained parts, a notebook colours them.

        Args:
            i: the document's number.
            tokenizer: the one to decode with; None: the one that the dataset was loaded with.

        Raises:
            DataError: the dataset was not made by ``load``, and no tokenizer is given.

        Example:
            >>> [text for text, is_trained in chats.show(0).pieces if not is_trained]
            ['<|user|>Which colour does the Derpa desk come in?<|end|><|assistant|>', '<|endoftext|>']
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise DataError("show: this dataset was made without a tokenizer; pass it: show(i, tokenizer)")
        return document_text(self.row_name(i), *self.document(i), tokenizer, self.end_of_turn_id)

    def summary(self) -> str:
        """Return one line about the documents, which loading logs and a run prints."""
        return dataset_summary(self)

    def __repr__(self) -> str:
        return dataset_repr(self)

    def __str__(self) -> str:
        return "\n".join(wrap(self.summary(), terminal_columns()))

    def _repr_html_(self) -> str:
        return dataset_html(self)


def joined(parts: Sequence[Documents]) -> Documents:
    """Return the documents of several sets, one set after the other. Sources of the same path are one source."""
    if len(parts) == 1:
        return parts[0]
    for name in ("pad_token_id", "end_of_turn_id"):
        if len(ids := {getattr(part, name) for part in parts}) > 1:
            raise DataError(f"datasets of different tokenizers: their {name}s are {ids}; allowed: one tokenizer")
    joined = copy.copy(parts[0])
    tokens = np.cumsum([0, *(len(part._input_ids) for part in parts)])
    documents = np.cumsum([0, *(len(part._rows) for part in parts)])
    starts = [part._starts[:-1] + first for part, first in zip(parts, tokens[:-1], strict=True)]
    joined._starts = np.concatenate([*starts, tokens[-1:]])
    joined._index = np.concatenate([part._index + first for part, first in zip(parts, documents[:-1], strict=True)])
    for name in ("_input_ids", "_labels", "_rows", "_truncated"):
        setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
    resolved = distinct_names(name for part in parts for name in part.sources)
    names = list(dict.fromkeys(resolved))
    positions = [names.index(name) for name in resolved]
    firsts = itertools.accumulate((len(part.sources) for part in parts), initial=0)
    numbered = [part._sources + first for part, first in zip(parts, firsts, strict=False)]
    joined._sources, joined.sources = np.array(positions)[np.concatenate(numbered)], tuple(names)
    joined.format = ", ".join(sorted({name for part in parts for name in part.format.split(", ")}))
    joined.max_length = max(part.max_length for part in parts)
    joined.dropped_rows = sum(part.dropped_rows for part in parts)
    joined.bad_rows = tuple(number for part in parts for number in part.bad_rows)
    joined.findings = Findings()
    for part in parts:
        joined.findings += part.findings
    return joined


def check_seed(seed: object) -> None:
    """Raise a ``DataError`` for a value that is not a seed."""
    require(is_int(seed, 0, SEED_END), "seed", seed, "a whole number >= 0, below 2**63", DataError)
