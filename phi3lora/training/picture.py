"""Pictures of runs by matplotlib (extra ``plot``): ``training.png`` of one run, ``plot`` to compare several."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..display import Html, html_table, one_line, text_table
from ..errors import TrainingError, as_path, install_hint, short_repr
from .result import History, TrainingResult, curve

logger = logging.getLogger("phi3lora")

PICTURE = "training.png"
"""Name of a run's picture in its folder."""

_PANELS = (
    ("loss (nats per supervised token)", (("loss", "", "-"), ("eval_loss", "held out", "o--"))),
    ("learning rate", (("learning_rate", "", "-"),)),
    ("gradient norm", (("grad_norm", "", "-"),)),
    ("tokens/s", (("tokens_per_s", "", "-"),)),
)
"""Label of each panel's axis, and its curves: figure, suffix of its label, style."""


@dataclass(frozen=True)
class RunsPlot:
    """Curves of one or several runs: a picture in a notebook, a table in ``print``."""

    runs: dict[str, History]
    """Label of each run -> its lines of ``metrics.jsonl``."""
    figure: Any
    """The ``matplotlib.figure.Figure``."""

    def __repr__(self) -> str:
        return one_line("RunsPlot", [f"{len(self.runs)} runs: {', '.join(self.runs)}"])

    def __str__(self) -> str:
        return text_table(self._table())

    def _repr_html_(self) -> str:
        png = io.BytesIO()
        self.figure.savefig(png, format="png", dpi=90)
        data = base64.b64encode(png.getvalue()).decode()
        return Html(f'<img alt="curves of the runs" src="data:image/png;base64,{data}">{html_table(self._table())}')

    def _table(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("run", "steps", "loss", "held-out loss", "tokens/s")]
        for label, history in self.runs.items():
            steps = max((line.get("step", 0) for line in history), default=0)
            losses = (_first_and_last(history, key) for key in ("loss", "eval_loss"))
            speeds = sorted(value for _, value in curve(history, "tokens_per_s"))
            rows.append((label, f"{steps:,}", *losses, f"{speeds[len(speeds) // 2]:,.0f}" if speeds else ""))
        return rows


def plot(*runs: Any, out: str | os.PathLike[str] | None = None) -> RunsPlot:
    """Compare runs: loss and held-out loss, learning rate, gradient norm and speed over the steps.

    Args:
        runs: output folders, ``metrics.jsonl`` files, or results of :func:`train`.
        out: file to write, of a format that matplotlib knows (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The plot: a notebook shows it, ``print`` shows a table, ``.figure`` is matplotlib's.

    Raises:
        TrainingError: no run, a run without ``metrics.jsonl`` or with nothing in it, a file that cannot be written,
            or no matplotlib.

    Example:
        >>> print(p3.plot("runs/r8", "runs/r16", out="runs.png"))  # doctest: +SKIP
    """
    if not runs:
        raise TrainingError("plot: no run given; allowed: output folders, metrics.jsonl files, results of train")
    histories = _labelled([_read_run(run) for run in runs])
    drawn = RunsPlot(histories, _draw(histories))
    if out is not None:
        path = as_path(out, "out", TrainingError)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")  # else matplotlib adds a suffix
        except (OSError, ValueError) as error:  # a ValueError: a format that matplotlib does not know
            raise TrainingError(f"plot: {str(path)!r} cannot be written: {error}") from error
    return drawn


def draw_run(history: History, path: Path) -> Path | None:
    """Draw a run's curves as a PNG, and return its path.

    Returns None without matplotlib, with fewer than two points, or (logged) if the file cannot be written.
    """
    if max(len(curve(history, "loss")), len(curve(history, "eval_loss"))) < 2:
        return None
    try:
        figure = _draw({"": history})
    except TrainingError:  # no matplotlib
        return None
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        logger.error("the picture of the run could not be written: %s", error)
        return None
    return path


def _draw(runs: Mapping[str, History]) -> Any:
    """Return a figure with a panel for each kind of curve that some run has."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError(f"plot needs matplotlib ({error}): {install_hint('plot')}") from error
    panels = [
        panel for panel in _PANELS if any(curve(history, key) for history in runs.values() for key, *_ in panel[1])
    ]
    rows, columns = -(-len(panels) // 2) or 1, min(2, len(panels)) or 1
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    for i, (label, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for number, (run, history) in enumerate(runs.items()):
            for key, suffix, style in curves:
                points = curve(history, key)
                if points:
                    name = " ".join(filter(None, (run, suffix))) or "training"
                    colour = f"C{number}" if len(runs) > 1 or not suffix else "C1"
                    shown = style if len(points) > 1 else "o"  # a line through one point is invisible
                    axes.plot(*zip(*points, strict=True), shown, color=colour, linewidth=1.5, markersize=4, label=name)
        axes.set_ylabel(label)
        if i >= len(panels) - columns:
            axes.set_xlabel("optimizer step")
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if i == 0 and len(axes.lines) > 1:
            axes.legend(frameon=False)
    return figure


def _read_run(run: Any) -> tuple[Path, History]:
    """Return a run's folder and its history."""
    if isinstance(run, TrainingResult):
        return Path(run.output_dir or "run"), run.history
    path = as_path(run, "a run", TrainingError)
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise TrainingError(
            f"plot: there is no run in {short_repr(str(path))}: {error.strerror or error}; allowed: the output_dir of "
            f"train, its metrics.jsonl, or what train returned"
        ) from error
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                logger.warning("%s: its last line is half written, and left out", file)
                break
            raise TrainingError(f"plot: line {number} of {str(file)!r} is not a line of metrics: {error}") from error
    if not any(isinstance(line.get("step"), int) for line in history):
        raise TrainingError(f"plot: {str(file)!r} has no line with a step; nothing was logged there")
    return file.parent, [line for line in history if isinstance(line.get("step"), int)]


def _labelled(runs: list[tuple[Path, History]]) -> dict[str, History]:
    """Label runs by their folders' names; runs of the same name by more of their paths, or by a number."""
    paths = [path.absolute().parts[1:] for path, _ in runs]
    count = 1
    while len({path[-count:] for path in paths}) < len(set(paths)):
        count += 1
    labels = ["/".join(path[-count:]) for path in paths]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return dict(zip(labels, (history for _, history in runs), strict=True))


def _first_and_last(history: History, key: str) -> str:
    points = curve(history, key)
    if len(points) < 2:
        return f"{points[0][1]:.4g}" if points else ""
    return f"{points[0][1]:.4g} -> {points[-1][1]:.4g}"
