"""What a check says: ok, warning or error in one line, and the report of them all."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Details = tuple[tuple[str, bool], ...]  # pieces of text below the line, and which of them stand out

_COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_STANDS_OUT, _RESET = "\x1b[32m", "\x1b[0m"


class Verdict(NamedTuple):
    """What a check returns."""

    status: str
    text: str
    details: Details = ()


def ok(text: str, details: Details = ()) -> Verdict:
    """As it should be."""
    return Verdict("ok", text, details)


def warning(text: str, details: Details = ()) -> Verdict:
    """The run would go, perhaps not as meant."""
    return Verdict("warning", text, details)


def error(text: str, details: Details = ()) -> Verdict:
    """The run would fail, or train something else than meant."""
    return Verdict("error", text, details)


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    status: str
    """``"ok"``, ``"warning"`` or ``"error"``."""
    text: str
    """One line."""
    details: Details = ()
    """A table or a document below it: pieces of text, and which of them stand out."""

    def __str__(self) -> str:
        return self.lines(len(self.name), _wants_colour(), _columns())

    def lines(self, width: int, colour: bool, columns: int | None = None) -> str:
        """As printed: status, name (padded to ``width``), text; details indented below.

        What is longer than ``columns`` goes on in the next line, under the text; None: it is one line.
        """
        status = f"{self.status:<7}"
        head = f"{_COLOURS[self.status]}{status}{_RESET}" if colour else status
        marks = (_STANDS_OUT, _RESET) if colour else ("[[", "]]")
        below = "".join(marks[0] + text + marks[1] if out else text for text, out in self.details)
        indent = width + 11
        rows = [line for row in (self.text, *below.splitlines()) for line in _wrapped(row, columns, indent)]
        return f"{head}  {self.name:<{width}}  " + ("\n" + " " * indent).join(rows)


@dataclass(frozen=True)
class DoctorReport:
    """What :func:`phi3lora.doctor` found; ``print`` shows it; ``report["memory"]`` is one finding, to print too."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No errors. Warnings may be meant."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What would fail or train something else than meant."""
        return tuple(f for f in self.findings if f.status == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may not be meant."""
        return tuple(f for f in self.findings if f.status == "warning")

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]

    def render(self, colour: bool = False, columns: int | None = None) -> str:
        """The report as text.

        Args:
            colour: with ANSI codes; else what stands out is in double brackets.
            columns: where lines are broken; None: nowhere.
        """
        width = max((len(f.name) for f in self.findings), default=0)
        counts = f"{_count(self.errors, 'error')}, {_count(self.warnings, 'warning')}"
        return "\n".join([*(f.lines(width, colour, columns) for f in self.findings), counts])

    def __str__(self) -> str:
        return self.render(_wants_colour(), _columns())


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _columns() -> int:
    """Of the terminal; as many as a notebook shows where there is none, and never fewer than a table has."""
    return max(80, shutil.get_terminal_size((110, 24)).columns)


def _wrapped(row: str, columns: int | None, indent: int) -> list[str]:
    if columns is None or len(row) + indent <= columns:
        return [row]
    return textwrap.wrap(row, max(20, columns - indent), break_long_words=False, break_on_hyphens=False)


def _count(findings: tuple[Finding, ...], what: str) -> str:
    return f"{len(findings) or 'no'} {what}{'' if len(findings) == 1 else 's'}"


def listed(items: list[str] | list[int], most: int = 5) -> str:
    """``"3, 8, 9 and 4 more"``."""
    shown = ", ".join(map(str, items[:most]))
    return shown + (f" and {len(items) - most:,} more" if len(items) > most else "")
