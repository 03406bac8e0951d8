"""Datasets in one line and as a table; a document as text, with its trained parts marked.

A decoder may drop the space that its first token begins with. So the end of turn is decoded first, and taken away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..config import IGNORE_INDEX
from ..display import (
    DIVIDER,
    Html,
    Pieces,
    html,
    html_facts,
    html_marked,
    marked,
    one_line,
    terminal_columns,
    use_colour,
    wrap,
)
from ..errors import counted, first_of

_NAMED = 8  # of a dataset's sources
_PREVIEW_TOKENS = 30  # at each end of a shortened piece


# --- A dataset


def dataset_summary(dataset: Any) -> str:
    """Return one line with all there is to know about the documents of a ``ChatDataset``."""
    sizes, form, notes = _dataset_facts(dataset)
    return f"ChatDataset({'; '.join([', '.join([*sizes, form, *notes]), *dataset.findings.describe()])})"


def dataset_repr(dataset: Any) -> str:
    """Return the same line, cut to the length of a ``repr``."""
    sizes, form, notes = _dataset_facts(dataset)
    return one_line("ChatDataset", [*sizes, *notes, *dataset.findings.describe(), form])


def dataset_html(dataset: Any) -> str:
    """Return the statistics as a table, and the first document as text."""
    facts = {name.replace("_", " "): _in_words(name, x) for name, x in dataset.statistics().items() if x}
    first = dataset.show(0)._repr_html_() if dataset.tokenizer is not None and len(dataset) else ""
    return Html(html_facts("ChatDataset", facts) + first)


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count:,})" for key, count in value.items())
    return f"{value:.1%}" if name.endswith("share") else f"{value:,}" if isinstance(value, int) else str(value)


def _dataset_facts(dataset: Any) -> tuple[list[str], str, list[str]]:
    """Return phrases: sizes, the format, and what else there is to say."""
    s = dataset.statistics()
    sizes = [
        counted(s["documents"], "document"),
        counted(s["tokens"], "token"),
        f"{100 * s['supervised_share']:.1f} % supervised",
    ]
    sizes.append(f"longest {s['longest']:,} of {s['max_length']:,}")
    notes = []
    if len(dataset.sources) > 1:
        named = [f"{name} {count:,}" for name, count in dataset.documents_by_source().items()]
        notes.append(f"documents by source: {first_of(named, _NAMED)}")
    if s["truncated"] or s["dropped"]:
        notes.append(f"{s['truncated']:,} truncated")
    if s["dropped"]:
        notes.append(f"{counted(s['dropped'], 'row')} dropped because nothing trained was left")
    if s["bad"]:
        notes.append(f"{counted(s['bad'], 'bad row')} skipped")
    return sizes, f"format {s['format']!r}", notes


# --- A document


@dataclass(frozen=True)
class DocumentText:
    """One document of a dataset as text: ``print`` marks the trained parts, a notebook colours them."""

    name: str
    """Name of the row that it came from."""
    pieces: tuple[tuple[str, bool], ...]
    """Parts of the text in order, each with a flag: trained or not."""
    tokens: int
    trained_tokens: int

    def __repr__(self) -> str:
        return one_line("DocumentText", [*self._facts(), repr("".join(text for text, _ in self.pieces))])

    def __str__(self) -> str:
        text = marked(self.pieces, use_colour())
        return "\n".join([", ".join(self._facts()), *wrap(text, terminal_columns(), within_words=True)])

    def _repr_html_(self) -> str:
        return Html(f"<p>{html(', '.join(self._facts()))}</p>{html_marked(self.pieces)}")

    def _facts(self) -> list[str]:
        return [self.name, f"{self.tokens:,} tokens", f"{self.trained_tokens:,} trained"]


def document_text(name: str, ids: np.ndarray, labels: np.ndarray, tokenizer: Any, end_of_turn_id: int) -> DocumentText:
    """Return a document of ``ids`` (n,) and ``labels`` (n,) as text; the end of turn is any token to decode before."""
    edges, flags = _spans(labels)
    texts = _texts_between(edges, ids.tolist(), tokenizer, end_of_turn_id)
    pieces = tuple((_visible(text), trained) for text, trained in zip(texts, flags, strict=True))
    return DocumentText(name, pieces, len(ids), int((labels != IGNORE_INDEX).sum()))


def divided_text(ids: np.ndarray, labels: np.ndarray, tokenizer: Any, end_of_turn_id: int) -> Pieces:
    """Return a document's pieces with a divider before each token that no space begins; long ones are shortened.

    A marker is one piece (``<|end|>``), its spelling is not (``<·|·end·|·>``).
    """
    edges, flags = _spans(labels)
    pieces = []
    for (start, stop), trained in zip(pairwise(edges), flags, strict=True):
        part = ids[start:stop].tolist()
        if len(part) > 2 * _PREVIEW_TOKENS:
            head, tail = part[:_PREVIEW_TOKENS], part[-_PREVIEW_TOKENS:]
            texts = [*_token_texts(head, tokenizer, end_of_turn_id), " [...]"]
            texts += _token_texts(tail, tokenizer, end_of_turn_id)
        else:
            texts = _token_texts(part, tokenizer, end_of_turn_id)
        shown = ""
        for text in texts:
            is_apparent = not shown or shown.endswith("\n") or text[:1].isspace()
            shown += text if is_apparent else DIVIDER + text
        pieces.append((_visible(shown), trained))
    return tuple(pieces)


def _spans(labels: np.ndarray) -> tuple[list[int], list[bool]]:
    """Return the edges of the parts that are trained and those that are not, and which are: spans + 1 and spans."""
    trained = labels != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(labels)]
    return edges, [bool(trained[start]) for start in edges[:-1]]


def _visible(text: str) -> str:
    """Spell out characters that are not printable; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _token_texts(ids: Sequence[int], tokenizer: Any, first: int) -> list[str]:
    """Return the text that each token adds; tokens that share a character (an emoji's bytes) are one text."""
    return list(_texts_between(range(len(ids) + 1), ids, tokenizer, first, whole_characters=True))


def _texts_between(
    edges: Iterable[int], ids: Sequence[int], tokenizer: Any, first: int, whole_characters: bool = False
) -> Iterable[str]:
    """Yield the text from each edge to the next; with ``whole_characters`` only where no character is cut."""
    before = ""
    for stop in edges:
        text = tokenizer.decode([first, *ids[:stop]], clean_up_tokenization_spaces=False)
        if stop == 0:
            before = text
        elif not whole_characters or not text.endswith("\ufffd") or stop == len(ids):
            yield text[len(before) :]
            before = text
