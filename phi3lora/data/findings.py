"""Findings of a load: unused columns, rows by form, turns not trained, tokens kept as text, doubtful rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import counted, first_of, short_repr

_NAMED = 8  # of the unused columns, or of the tokens


@dataclass
class Findings:
    """Counts by name, which add up over rows, batches and sources."""

    rows_by_form: Counter[str] = field(default_factory=Counter)
    """Rows of each form: a format's name, or how a row was read instead (``"prompt_completion as text"``)."""
    unused: Counter[str] = field(default_factory=Counter)
    """Columns (``"id"``) and keys of messages (``"messages.name"``) that nothing was made of, and in how many rows."""
    turns_switched_off: int = 0
    """Assistant turns that their row excludes from training (``"train": false``, ``"weight": 0``)."""
    unanswered_last_turns: int = 0
    """Last turns of chats that no assistant turn answers, which are not trained."""
    kept_as_text: Counter[str] = field(default_factory=Counter)
    """Control tokens that a content spells, which were tokenised as ordinary text, and how often."""
    added_tokens: Counter[str] = field(default_factory=Counter)
    """Other added tokens of the vocabulary that a content spells, each encoded as its one id, and how often."""
    advice: Counter[str] = field(default_factory=Counter)
    """Sentences about doubtful rows, and how many rows each is about."""

    def __iadd__(self, other: Findings) -> Findings:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        return self

    def counts(self) -> dict[str, Any]:
        """Return the counts by field, as plain dicts and numbers."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(self.counts())

    @classmethod
    def from_json(cls, text: str) -> Findings:
        found = cls()
        for name, value in json.loads(text).items():
            setattr(found, name, Counter(value) if isinstance(value, dict) else value)
        return found

    def describe(self) -> list[str]:
        """Return one phrase for each kind of finding, for the line that loading logs."""
        phrases = []
        if len(self.rows_by_form) > 1 or any(" as " in form for form in self.rows_by_form):
            phrases.append("rows by form: " + ", ".join(f"{name} {n:,}" for name, n in self.rows_by_form.most_common()))
        if self.turns_switched_off:
            phrases.append(f"{self.turns_switched_off:,} assistant turns switched off by their rows")
        if self.unanswered_last_turns:
            phrases.append(f"{counted(self.unanswered_last_turns, 'last turn')} without an answer, not trained")
        for what, counts in (
            ("unused", self.unused),
            ("kept as text", self.kept_as_text),
            ("added tokens", self.added_tokens),
        ):
            if counts:
                named = [f"{short_repr(name, 40)} ({n:,})" for name, n in counts.most_common()]
                phrases.append(f"{what}: {first_of(named, _NAMED)}")
        return phrases
