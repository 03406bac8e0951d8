"""Findings of the checks, and the report that prints them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..display import (
    Html,
    Pieces,
    coloured,
    hanging,
    html,
    html_badge,
    html_marked,
    html_table,
    marked,
    one_line,
    terminal_columns,
    use_colour,
)

_COLUMNS = 110  # of a report without a terminal


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    """Name of the check."""
    status: str
    """``"ok"``, ``"warning"`` or ``"error"``."""
    text: str
    """One line."""
    details: Pieces = ()
    """A table or a document below the line: pieces of text, each with a flag: highlighted or not."""

    def __str__(self) -> str:
        return self.lines(len(self.name), use_colour(), terminal_columns() or _COLUMNS)

    def __repr__(self) -> str:
        return one_line("Finding", [f"{self.name}: {self.status}", self.text])

    def _repr_html_(self) -> str:
        return html_table([["", "check", "finding"], self.html_row()])

    def lines(self, width: int, colour: bool, columns: int | None = None) -> str:
        """Return the printed form: status, name padded to ``width``, text; details indented below.

        Text longer than ``columns`` continues in the next line, aligned; None: lines are not broken.
        """
        head = f"{coloured(f'{self.status:<7}', self.status, colour)}  {self.name:<{width}}  "
        return hanging(head, self.text, columns, more=marked(self.details, colour))

    def html_row(self) -> list[Any]:
        """Return status, name, and text with its details, for a table."""
        return [
            html_badge(self.status),
            html(self.name.replace(" ", "\xa0")),
            Html(html(self.text) + html_marked(self.details)),
        ]


ok = partial(Finding, "", "ok")
"""The still unnamed finding that nothing is wrong."""
warning = partial(Finding, "", "warning")
"""The still unnamed finding that the run would work, but perhaps not as intended."""
error = partial(Finding, "", "error")
"""The still unnamed finding that the run would fail, or train something other than intended."""


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
        return "\n".join([*(f.lines(width, colour, columns) for f in self.findings), self._counts()])

    def _counts(self) -> str:
        kinds = {"error": len(self.errors), "warning": len(self.warnings)}
        return ", ".join(f"{count or 'no'} {kind}{'s' * (count != 1)}" for kind, count in kinds.items())

    def __str__(self) -> str:
        return self.render(use_colour(), terminal_columns() or _COLUMNS)

    def __repr__(self) -> str:
        names = [f"{f.status}: {f.name}" for f in (*self.errors, *self.warnings)]
        return one_line("DoctorReport", [f"{len(self.findings)} checks", self._counts(), *names])

    def _repr_html_(self) -> str:
        return html_table([["", "check", "finding"], *(f.html_row() for f in self.findings)]) + html(self._counts())
