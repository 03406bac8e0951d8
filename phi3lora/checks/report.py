"""Findings of the checks, and the report that prints them."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Details = tuple[tuple[str, bool], ...]
"""Pieces of the text below a finding's line, each with a flag: highlighted or not."""

DIVIDER = "·"
"""Stands between two tokens of a document."""

_COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_HIGHLIGHT, _RESET = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    """Name of the check."""
    status: str
    """``"ok"``, ``"warning"`` or ``"error"``."""
    text: str
    """One line."""
    details: Details = ()
    """A table or a document below the line: pieces of text, each with a flag: highlighted or not."""

    def __str__(self) -> str:
        return self.lines(len(self.name), _use_colour(), _terminal_columns())

    def lines(self, width: int, colour: bool, columns: int | None = None) -> str:
        """Return the printed form: status, name padded to ``width``, text; details indented below.

        Text longer than ``columns`` continues in the next line, aligned; None: lines are not broken.
        """
        status = f"{self.status:<7}"
        head = f"{_COLOURS[self.status]}{status}{_RESET}" if colour else status
        before, after = (_HIGHLIGHT, _RESET) if colour else ("[[", "]]")
        details = "".join(before + text + after if highlighted else text for text, highlighted in self.details)
        indent = width + 11
        lines = _wrap(self.text, columns, indent)
        lines += [part for line in details.splitlines() for part in _wrap(line, columns, indent, is_detail=True)]
        return f"{head}  {self.name:<{width}}  " + ("\n" + " " * indent).join(lines)


def ok(text: str, details: Details = ()) -> Finding:
    """Return the still unnamed finding that nothing is wrong."""
    return Finding("", "ok", text, details)


def warning(text: str, details: Details = ()) -> Finding:
    """Return the still unnamed finding that the run would work, but perhaps not as intended."""
    return Finding("", "warning", text, details)


def error(text: str, details: Details = ()) -> Finding:
    """Return the still unnamed finding that the run would fail, or train something other than intended."""
    return Finding("", "error", text, details)


@dataclass(frozen=True)
class DoctorReport:
    """Findings of :func:`phi3lora.doctor`. ``print`` shows them all, ``print(report["memory"])`` one of them."""

    findings: tuple[Finding, ...]
    """One finding a check, in the order of the checks."""

    @property
    def ok(self) -> bool:
        """True if no finding is an error; warnings may be intended."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that would make the run fail, or train something other than intended."""
        return tuple(f for f in self.findings if f.status == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that may not be intended."""
        return tuple(f for f in self.findings if f.status == "warning")

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]

    def render(self, colour: bool = False, columns: int | None = None) -> str:
        """Return the report as text.

        Args:
            colour: use ANSI codes; False: highlighted text is in double brackets.
            columns: width at which lines are broken; None: they are not broken.
        """
        if not self.findings:
            return ""
        width = max(len(f.name) for f in self.findings)
        kinds = {"error": len(self.errors), "warning": len(self.warnings)}
        counts = ", ".join(f"{count or 'no'} {kind}{'s' * (count != 1)}" for kind, count in kinds.items())
        return "\n".join([*(f.lines(width, colour, columns) for f in self.findings), counts])

    def __str__(self) -> str:
        return self.render(_use_colour(), _terminal_columns())


def _use_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _terminal_columns() -> int:
    """Return the terminal's width, 110 (a notebook's) without a terminal, and at least 80, a table's width."""
    return max(80, shutil.get_terminal_size((110, 24)).columns)


class _DetailsWrapper(textwrap.TextWrapper):
    """A wrapper that also breaks lines between the tokens of a document, and at the ends of its trained parts."""

    wordsep_simple_re = re.compile(rf"(\s+)|(?<={DIVIDER})|(?=\[\[)|(?<=\]\])")


def _wrap(line: str, columns: int | None, indent: int, is_detail: bool = False) -> list[str]:
    if columns is None or len(line) + indent <= columns:
        return [line]
    wrapper = _DetailsWrapper if is_detail else textwrap.TextWrapper
    return wrapper(max(20, columns - indent), break_long_words=is_detail, break_on_hyphens=False).wrap(line)


def first_of(items: Sequence[object], most: int = 5) -> str:
    """Return the first items in words: ``"3, 8, 9 and 4 more"``."""
    text = ", ".join(map(str, items[:most]))
    return text + (f" and {len(items) - most:,} more" if len(items) > most else "")
