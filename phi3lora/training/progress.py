"""Progress of a run on the screen: a bar in a terminal, a live table in a notebook, plain lines elsewhere.

terminal     log lines above a bar, which moves with every step
notebook     a table of the log lines, redrawn in place, which the exported page keeps; at the end also the curves
pipe, file   one line a log line, without carriage returns
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..config import TrainingConfig
from ..display import Html, html, html_table, in_notebook, is_terminal, terminal_columns, wrap
from .checkpoint import TrainingState
from .result import history_rows, loss_curves

_REDRAW_S = 0.5  # between two drawings of a notebook's line of progress


class Progress:
    """Plain lines on stdout, or none if ``quiet``; the base of the other two."""

    def __init__(self, state: TrainingState, quiet: bool) -> None:
        self.state, self.quiet = state, quiet
        self._started_s, self._first_step = time.perf_counter(), state.global_step

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self) -> None:
        """Count a step."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Show a line of ``metrics.jsonl``, which is in the state's history already."""
        self.print(log_line(line, self.state.total_steps, self._remaining_s()))

    def print(self, text: str) -> None:
        """Print text, unless the run is quiet."""
        if not self.quiet:
            for line in wrap(text, terminal_columns()):
                self._print_line(line)

    def _print_line(self, line: str) -> None:
        print(line, flush=True)

    def _remaining_s(self) -> float | None:
        """Return the seconds to the end at the speed so far."""
        done = self.state.global_step - self._first_step
        elapsed_s = time.perf_counter() - self._started_s
        return elapsed_s / done * (self.state.total_steps - self.state.global_step) if done else None


class TerminalBar(Progress):
    """A bar on stderr, and the lines above it; messages of ``logging`` go above it, too."""

    def __enter__(self) -> TerminalBar:
        self._stack = ExitStack()
        total, done = self.state.total_steps, self.state.global_step
        self._bar = self._stack.enter_context(tqdm(total=total, initial=done, unit="step", dynamic_ncols=True))
        self._stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(self) -> None:
        self._bar.update(1)

    def log(self, line: Mapping[str, Any]) -> None:
        super().log(line)
        loss = line.get("loss", line.get("eval_loss"))
        if loss is not None:
            self._bar.set_postfix({"loss" if "loss" in line else "eval_loss": f"{loss:.4g}"})

    def _print_line(self, line: str) -> None:
        tqdm.write(line)


class NotebookTable(Progress):
    """A line of progress and a table of the log lines, redrawn in place."""

    def __enter__(self) -> NotebookTable:
        from IPython.display import display  # a notebook has it

        self._drawn_s = time.perf_counter()
        self._handle = display(self._html(), display_id=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(loss_curves(self.state.history))

    def step(self) -> None:
        if time.perf_counter() - self._drawn_s > _REDRAW_S:
            self._draw()

    def log(self, line: Mapping[str, Any]) -> None:
        self._draw()

    def _draw(self, below: str = "") -> None:
        self._drawn_s = time.perf_counter()
        self._handle.update(self._html(below))

    def _html(self, below: str = "") -> Any:
        from IPython.display import HTML

        done, total, remaining_s = self.state.global_step, self.state.total_steps, self._remaining_s()
        eta = f", {_clock(remaining_s)} to go" if remaining_s and done < total else ""
        bar = f'<progress value="{done}" max="{total}" style="width:300px"></progress>'
        head = f"{bar} {html(f'step {done:,} of {total:,}{eta}')}"
        table = html_table(history_rows(self.state.history)) if self.state.history else ""
        return HTML(Html(f"<div>{head}</div>{table}{below}"))


def open_progress(config: TrainingConfig, state: TrainingState, quiet: bool, is_main: bool) -> Progress:
    """Return the kind of progress that fits where the run is shown.

    ``disable_tqdm=True`` leaves plain lines, False shows the bar also where there is no terminal.
    """
    if not is_main or config.disable_tqdm:
        return Progress(state, quiet)
    if in_notebook():
        return Progress(state, quiet) if quiet else NotebookTable(state, quiet)
    if config.disable_tqdm is None and not is_terminal(sys.stderr):
        return Progress(state, quiet)
    return TerminalBar(state, quiet)


def log_line(line: Mapping[str, Any], total_steps: int, remaining_s: float | None = None) -> str:
    """Return a line of ``metrics.jsonl`` as text.

    >>> log_line({"step": 10, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_s": 3100.0}, 70, 72.0)
    'step 10/70  loss 2.5  lr 1.00e-03  3,100 tok/s  ETA 1:12'
    """
    formats = {
        "loss": "loss {:.4g}",
        "learning_rate": "lr {:.2e}",
        "grad_norm": "grad {:.3g}",
        "skipped_steps": "{} skipped",
        "tokens_per_s": "{:,.0f} tok/s",
    }
    parts = [text.format(line[key]) for key, text in formats.items() if line.get(key) is not None]
    held_out = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    shown = [
        f"{name} {value:.4g}" for name, value in held_out.items() if value is not None and not name.startswith("n_")
    ]
    if shown:
        parts.append("held out: " + ", ".join(shown))
    elif remaining_s is not None and line.get("step", 0) < total_steps:
        parts.append(f"ETA {_clock(remaining_s)}")
    return "  ".join([f"step {line.get('step', 0)}/{total_steps}", *parts])


def _clock(seconds: float) -> str:
    """Return ``"1:12"`` or ``"2:01:12"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
