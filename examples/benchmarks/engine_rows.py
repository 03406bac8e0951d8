"""The rows that ``engines.py`` prints, and the table that sums them up for ``docs/interoperability.md``."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from engine_servers import Refused

import phi3lora as p3

RIGHT = 2e-4
Measurement = tuple[float, int, int]
"""Largest difference, likeliest tokens that are the same, prompts."""


@dataclass(frozen=True)
class Row:
    """A case of the table."""

    layout: str
    word: str
    """"right", "rounded", "refused", "wrong" (a row that shows a fault of an engine) or "WRONG" (a fault of ours)."""
    measured: Measurement = (0.0, 0, 0)


class Report:
    """Prints a line for each case; adds the lines up; knows which cases failed."""

    def __init__(self, engine: str, work: Path) -> None:
        self.engine, self.work = engine, f"{work}/"
        self.rows: list[Row] = []
        self.failed: list[str] = []

    def row(
        self,
        names: tuple[str, str, str],
        measure: Callable[[], Measurement],
        *,
        is_rounded: bool = False,
        may_refuse: bool = False,
        may_differ: bool = False,
    ) -> bool:
        """Print a line of the table: model, adapter, layout, result. Return whether the engine, or we, refused.

        ``may_refuse``: the layout is not for this engine. ``may_differ``: the row shows what goes wrong without our
        export or our options.
        """
        layout, refused = names[2], False
        try:
            largest, agreed, asked = measure()
            is_right = largest <= RIGHT and agreed == asked
            word = "rounded" if is_rounded else "right" if is_right else "wrong" if may_differ else "WRONG"
            self.rows.append(Row(layout, word, (largest, agreed, asked)))
            cell = f"{word:<8}{largest:.1e}  {agreed} of {asked}"
        except (Refused, p3.Phi3LoRAError) as error:
            refused, word = True, "refused"
            self.rows.append(Row(layout, word))
            cell = f"refused: {' '.join(str(error).replace(self.work, '').split())[:160]}"
        if word == "WRONG" or (refused and not may_refuse):
            self.failed.append(" ".join(names))
        print("{:<15}{:<8}{:<31}".format(*names) + cell, flush=True)
        return refused

    def count(self, what: str, same: int, asked: int, unit: str, may_differ: bool = False) -> None:
        """Print how many answers, or chats, are the same."""
        if same < asked and not may_differ:
            self.failed.append(what)
        print(f"{what:<40}{same} of {asked} {unit}", flush=True)

    def summary(self) -> str:
        """Return the rows added up, a line for each layout, in Markdown."""
        lines = [f"| layout | {self.engine} |", "|---|---|"]
        for layout in dict.fromkeys(row.layout for row in self.rows):
            rows = [row for row in self.rows if row.layout == layout]
            words = dict.fromkeys(row.word for row in rows)
            cells = [_cell(word, [row.measured for row in rows if row.word == word], len(rows)) for word in words]
            lines.append(f"| {layout} | {'; '.join(cells)} |")
        return "\n".join(lines)


def _cell(word: str, measured: list[Measurement], of: int) -> str:
    """Return what the rows of one layout and one result have in common."""
    differences = [largest for largest, _, _ in measured]
    if word == "rounded":
        agreed, asked = sum(a for _, a, _ in measured), sum(n for _, _, n in measured)
        return f"largest difference {max(differences):.2g}, likeliest token the same in {agreed} of {asked}"
    cell = f"{word} in {len(measured)} of {of}"
    if word == "right":
        cell += f", largest difference {max(differences):.1e}".replace("e-0", "e-")
    elif word != "refused":
        cell += f", {min(differences):.2g} to {max(differences):.2g}"
    return cell


def heading(engine: str, version_command: list[str]) -> str:
    """Return the date, the commit and the versions. SystemExit if the engine's command cannot be run."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        done = subprocess.run(version_command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"cannot run the engine: {error}; give the folder of its commands as --bin") from error
    shown = (done.stdout.strip() or done.stderr.strip()).splitlines()[0]
    ours = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return f"{time.strftime('%Y-%m-%d')}, commit {git.stdout.strip() or 'unknown'}, {', '.join(ours)}; {engine} {shown}"
