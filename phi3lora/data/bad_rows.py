"""Rows that cannot be trained on: the first is an error, or each is passed over and counted."""

from __future__ import annotations

import logging

from ..errors import DataError
from ..values import is_one_of, shown

logger = logging.getLogger("phi3lora")

ON_BAD_ROW = ("error", "skip")
_SHOWN = 3


class BadRows:
    """What ``ChatDataset.load(on_bad_row=...)`` does with a row that raises a ``DataError``."""

    def __init__(self, choice: str) -> None:
        if not is_one_of(choice, ON_BAD_ROW):
            raise DataError(f"on_bad_row={shown(choice)}; allowed: {', '.join(map(repr, ON_BAD_ROW))}")
        self.skips = choice == "skip"
        self.numbers: list[int] = []
        self.errors: list[DataError] = []

    def met(self, number: int, error: DataError) -> None:
        """Raise ``error``, or remember row ``number`` (counted from 1) and go on."""
        if not self.skips:
            raise error
        self.numbers.append(number)
        if len(self.errors) < _SHOWN:
            self.errors.append(error)

    def forget(self) -> None:
        """Begin a new account."""
        self.numbers, self.errors = [], []

    def report(self) -> None:
        """One warning for all that were passed over."""
        if self.numbers:
            more = f"; and {len(self.numbers) - _SHOWN} more" if len(self.numbers) > _SHOWN else ""
            logger.warning("%d bad rows skipped: %s%s", len(self.numbers), "; ".join(map(str, self.errors)), more)
