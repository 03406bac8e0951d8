"""How objects look: one line for ``repr``, tables and marked text for terminals, HTML and SVG for notebooks.

Printed forms fit the terminal, and use colour only where there is one. HTML escapes every text: a chat may hold
``<script>``.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path
from typing import Any

from .errors import printable

Pieces = Sequence[tuple[str, bool]]
"""Pieces of a text, each with a flag: highlighted or not."""

DIVIDER = "·"
"""Stands between two tokens of a document."""

_NARROW = 20  # columns; a narrower cell has its words one below the other
_MOST_IN_REPR = 120  # characters
_ANSI = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "marked": "\x1b[32m"}
_RESET = "\x1b[0m"
_CURVE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")
_CSS = {"ok": "#2e7d32", "warning": "#b26a00", "error": "#c62828"}


# --- One line


def one_line(name: str, facts: Iterable[str]) -> str:
    """Return the ``repr`` of an object, ``"Name(fact, fact)"``, with the facts that fit in 120 characters.

    >>> one_line("ChatDataset", ["600 documents", "24,700 tokens"])
    'ChatDataset(600 documents, 24,700 tokens)'
    """
    text = printable(", ".join(facts))
    most = _MOST_IN_REPR - len(name) - 2
    return f"{name}({text if len(text) <= most else text[: most - 3] + '...'})"


def flat(text: str, most: int, keep_end: bool = False) -> str:
    """Put a text on one line, and cut it to ``most`` characters from its start, or from its end."""
    text = printable(" ".join(text.split()))
    if len(text) <= most:
        return text
    return "..." + text[3 - most :] if keep_end else text[: most - 3] + "..."


def plain(text: str) -> str:
    """Return a text for a terminal: line breaks and spaces stay, and other control characters are spelt out."""
    if text.isprintable():
        return text
    return "\n".join(
        "".join(c if unicodedata.category(c) == "Zs" else printable(c) for c in line.expandtabs(4))
        for line in text.splitlines()
    )


# --- The terminal


def terminal_columns() -> int | None:
    """Return the width of the terminal, at least 80, or of a notebook; None elsewhere, where long lines stay whole."""
    columns = shutil.get_terminal_size((100 if in_notebook() else 0, 0)).columns
    return max(80, columns) if columns else None


def in_notebook() -> bool:
    """Return whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; a process that was started with one closed has None in its place."""
    return stream is not None and stream.isatty()


def use_colour() -> bool:
    """Return whether stdout shows colours: a terminal, unless ``NO_COLOR`` is set."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, kind: str, colour: bool) -> str:
    """Return a text in the colour of ``"ok"``, ``"warning"``, ``"error"`` or ``"marked"``."""
    return f"{_ANSI[kind]}{text}{_RESET}" if colour else text


def marked(pieces: Pieces, colour: bool) -> str:
    """Return pieces as text, the highlighted ones coloured or, without colour, in double brackets."""
    return "".join(
        text if not highlighted else coloured(text, "marked", True) if colour else f"[[{text}]]"
        for text, highlighted in pieces
    )


class _Wrapper(textwrap.TextWrapper):
    """A wrapper that also breaks lines between the tokens of a document, at marks, and after the dots of a path."""

    wordsep_simple_re = re.compile(rf"(\s+)|(?<={DIVIDER})|(?=\[\[)|(?<=\]\])|(?<=[A-Za-z_*][./])(?=[A-Za-z_*])")


_ANSI_CODE = re.compile(r"\x1b\[\d*m")


def width_of(text: str) -> int:
    """Return the columns that a line takes: colour codes take none, and a Chinese character takes two."""
    shown = _ANSI_CODE.sub("", text)
    return len(shown) + sum(unicodedata.east_asian_width(c) in "WF" for c in shown if not c.isascii())


def _padded(text: str, width: int) -> str:
    return text + " " * (width - width_of(text))


def wrap(text: str, columns: int | None, *, within_words: bool = False, longest: int | None = None) -> list[str]:
    """Break a text into lines of at most ``columns``; line breaks in it stay. None breaks nothing else.

    Args:
        text: the text, with or without colour codes.
        columns: the width.
        within_words: break between tokens and after the dots of a path, too.
        longest: the longest word (a path) that stays whole; None: ``columns``.
    """
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        width = width_of(line)
        if columns is None or width <= columns:
            lines.append(line)
            continue
        most = columns if width <= len(line) else columns // 2  # textwrap takes every character for one column
        wrapper = _Wrapper if within_words else textwrap.TextWrapper
        for part in wrapper(most, break_on_hyphens=False, break_long_words=within_words).wrap(line):
            end = longest or most
            lines += [part[at : at + end] for at in range(0, len(part), end)] if width_of(part) > end else [part]
    return lines


def hanging(head: str, text: str, columns: int | None, *, more: str = "") -> str:
    """Return a head and a text beside it, whose other lines are indented below its first.

    A path that is too long for that starts a line further left. ``more`` goes below the text, broken within words.
    """
    indent = width_of(head)
    room = None if columns is None else max(20, columns - indent)
    lines = wrap(text, room, longest=columns)
    if more:
        lines += wrap(more, room, within_words=True)
    if columns is not None and width_of(lines[0]) > columns - indent:
        lines.insert(0, "")
    indents = [indent if columns is None else min(indent, max(0, columns - width_of(line))) for line in lines]
    below = "".join(f"\n{' ' * space}{line}" for space, line in zip(indents[1:], lines[1:], strict=True))
    return f"{head}{lines[0]}".rstrip() + below


def shown_path(path: str) -> str:
    """Return a path below the working directory as a relative one."""
    try:
        relative = os.path.relpath(path) if os.path.isabs(path) else path
    except FileNotFoundError:  # the working directory is gone
        return path
    return path if relative.startswith("..") else relative


def command_line(*words: str, launcher: Sequence[str] = ()) -> str:
    """Return a command of this program to paste into the shell: ``phi3lora chat ...``, or with Python's path.

    A ``launcher`` such as torchrun with its options comes before it.
    """
    installed = shutil.which("phi3lora")
    own = Path(sys.executable).with_name("phi3lora")
    if launcher:
        program = [*launcher, "-m", "phi3lora"]
    elif installed is not None and os.path.realpath(installed) == os.path.realpath(own):
        program = ["phi3lora"]
    else:
        program = [shown_path(sys.executable), "-m", "phi3lora"]
    return shlex.join([*program, *map(shown_path, words)])


_SHELL_WORD = re.compile(r"""(?:[$]?'(?:[^'\\]|\\.)*'|\\.|[^\s'\\])+""")


def shell_lines(line: str, columns: int | None) -> list[str]:
    """Break a shell command before its words, with a backslash at each line's end, so that it can be pasted.

    A quoted word stays whole.
    """
    words = _SHELL_WORD.findall(line)
    if columns is None or len(line) <= columns or " ".join(words) != line:
        return [line]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= columns:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return [*(f"{part} \\" for part in lines[:-1]), lines[-1]]


def text_facts(facts: Mapping[str, Any], columns: int | None = None) -> str:
    """Return ``name  value`` lines with the values aligned; a long value continues in the next line."""
    width = max(map(width_of, facts), default=0)
    columns = columns or terminal_columns()
    return "\n".join(hanging(f"{_padded(name, width)}  ", plain(str(value)), columns) for name, value in facts.items())


def text_table(rows: Sequence[Sequence[Any]], columns: int | None = None, *, spaced: bool = False) -> str:
    """Return rows, the head first, as aligned columns that fit: long cells continue in the next line.

    Args:
        rows: cells, which ``str`` makes texts of.
        columns: width of the table; None: the terminal's.
        spaced: put an empty line between the rows.
    """
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    widths = _fitting_widths(cells, columns or terminal_columns())
    blocks = []
    for row in cells:
        wrapped = (wrap(cell, width, within_words=True) for cell, width in zip(row, widths, strict=True))
        lines = itertools.zip_longest(*wrapped, fillvalue="")
        blocks.append("\n".join("  ".join(map(_padded, line, widths)).rstrip() for line in lines))
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([blocks[0], rule, ("\n\n" if spaced else "\n").join(blocks[1:])])


def _fitting_widths(cells: Sequence[Sequence[str]], columns: int | None) -> list[int]:
    """Return the width of each column: as wide as its cells, unless the table is then too wide.

    Then the widest columns are cut, and heads are broken where that spares them.
    """

    def width(texts: Iterable[str]) -> int:
        return max((width_of(line) for text in texts for line in text.splitlines()), default=0)

    def cut(widths: list[int], columns: int) -> list[int]:
        for _ in range(sum(widths) + 2 * (len(widths) - 1) - columns):
            widest = max(range(len(widths)), key=lambda i: (widths[i], i))
            widths[widest] -= 1
        return widths

    by_column = list(zip(*cells, strict=True))
    natural = [width(column) for column in by_column]
    if columns is None or sum(natural) + 2 * (len(natural) - 1) <= columns:
        return natural
    widths = cut(list(natural), columns)
    if min(now for now, before in zip(widths, natural, strict=True) if now < before) < _NARROW:
        widths = cut([width((*column[1:], *column[0].split())) for column in by_column], columns)
    return widths


# --- Notebooks


class Html(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


_PRE = (
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;"  # Jupyter breaks within words
    "text-align:left;font-family:monospace;background:transparent"
)
_LEFT = "text-align:left;vertical-align:top;padding:2px 8px"


def html(value: Any) -> Html:
    """Return a value as HTML: a text is escaped, and keeps its line breaks."""
    return value if isinstance(value, Html) else Html(escape(str(value)).replace("\n", "<br>"))


def html_table(rows: Sequence[Sequence[Any]]) -> Html:
    """Return rows, the head first, as a table."""
    head = "".join(f'<th style="{_LEFT}">{html(cell)}</th>' for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f'<td style="{_LEFT}">{html(cell)}</td>' for cell in row) + "</tr>" for row in rows[1:]
    )
    return Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def html_facts(title: str, facts: Mapping[str, Any]) -> Html:
    """Return a title, and a table of names and values below it."""
    body = "".join(
        f'<tr><th style="{_LEFT}">{html(name)}</th><td style="{_LEFT}">{html(value)}</td></tr>'
        for name, value in facts.items()
    )
    return Html(f"<p><b>{html(title)}</b></p><table><tbody>{body}</tbody></table>")


def html_folded(title: str, content: Html) -> Html:
    """Return a title that shows its content when it is clicked."""
    return Html(f"<details><summary>{html(title)}</summary>{content}</details>")


def html_badge(status: str) -> Html:
    """Return ``"ok"``, ``"warning"`` or ``"error"`` as a badge."""
    style = f"background:{_CSS[status]};color:#fff;border-radius:4px;padding:1px 6px"
    return Html(f'<span style="{style}">{html(status)}</span>')


def html_marked(pieces: Pieces) -> Html:
    """Return pieces as text with the highlighted ones coloured; nothing for no pieces."""
    if not pieces:
        return Html("")
    text = "".join(
        f'<mark style="background:#c8e6c9;color:#1b5e20">{escape(text)}</mark>' if highlighted else escape(text)
        for text, highlighted in pieces
    )
    return Html(f'<pre style="{_PRE}">{text}</pre>')


def svg_curves(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Html:
    """Return curves of (x, y) as a picture with a legend, both axes from their smallest to their largest value.

    Points that are not finite are left out. Without two points there is no picture.
    """
    curves = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if len(points) < 2:
        return Html("")
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    width, height, edge = 560, 250, 56

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            edge + (width - 2 * edge) * (x - left) / ((right - left) or 1),
            height - edge - (height - 2 * edge) * (y - low) / ((high - low) or 1),
        )

    parts = [
        f'<rect x="{edge}" y="{edge}" width="{width - 2 * edge}" height="{height - 2 * edge}" fill="none" '
        'stroke="#9e9e9e"/>'
    ]
    for i, (name, curve) in enumerate(curves.items()):
        colour = _CURVE_COLOURS[i % len(_CURVE_COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(curve) <= 40:
            spots = (place(*point) for point in curve)
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in spots]
        parts.append(f'<text x="{edge + 130 * i}" y="{edge - 8}" fill="{colour}">{html(name)}</text>')
    axis = 'fill="#757575"'
    parts += [
        f'<text x="{edge - 4}" y="{height - edge}" text-anchor="end" {axis}>{low:.3g}</text>',
        f'<text x="{edge - 4}" y="{edge + 10}" text-anchor="end" {axis}>{high:.3g}</text>',
        f'<text x="{edge}" y="{height - edge + 16}" {axis}>{left:g}</text>',
        f'<text x="{width - edge}" y="{height - edge + 16}" text-anchor="end" {axis}>{right:g}</text>',
        f'<text x="{width / 2:g}" y="{height - edge + 16}" text-anchor="middle" {axis}>{html(title)}</text>',
    ]
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = 'font-family="sans-serif" font-size="11"'
    return Html(f'<svg xmlns="http://www.w3.org/2000/svg" {box} {font}>{"".join(parts)}</svg>')


# --- Other libraries


def import_tqdm_quietly() -> None:
    """Import tqdm's bars for notebooks without their advice to install ipywidgets: a run's table needs none."""
    if in_notebook() and "tqdm.auto" not in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            importlib.import_module("tqdm.auto")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide, inside the block, the progress bars of transformers and datasets, and the hints of bitsandbytes.

    The bars of downloads stay. A user can ask for the others: by ``transformers.logging.set_verbosity_info()``, or by
    ``HF_HUB_DISABLE_PROGRESS_BARS=0`` and ``HF_DATASETS_DISABLE_PROGRESS_BARS=0``.
    """
    with ExitStack() as stack:
        hints = logging.getLogger("bitsandbytes")
        if hints.level == logging.NOTSET:
            hints.setLevel(logging.ERROR)
            stack.callback(hints.setLevel, logging.NOTSET)
        transformers, datasets = sys.modules.get("transformers"), sys.modules.get("datasets")
        if transformers is not None and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            own = transformers.utils.logging
            if own.is_progress_bar_enabled() and own.get_verbosity() > logging.INFO:
                hub = sys.modules["huggingface_hub"].utils
                shows_downloads = not hub.are_progress_bars_disabled()
                own.disable_progress_bar()  # also those of downloads
                if shows_downloads:
                    hub.enable_progress_bars()
                else:
                    stack.callback(hub.disable_progress_bars)
                stack.callback(own.enable_progress_bar)  # also those of downloads; runs first
        shows_bars = datasets is not None and not datasets.are_progress_bars_disabled()
        if datasets is not None and shows_bars and "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield
