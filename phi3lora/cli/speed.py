"""The speed of a streamed answer, for a person at a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from ..display import is_terminal


class _WatchedText:
    """A text stream that passes everything on, and keeps the text and the time of its first part."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.first_at = stream, "", 0.0

    def write(self, text: str) -> int:
        if text and not self.text:
            self.first_at = time.perf_counter()
        self.text += text
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def speed_shown(tokenizer: Any) -> Iterator[None]:
    """Show the speed of the answer that the block prints, in a dim line on stderr; nothing unless both are terminals.

    The tokens are those of the printed text, so a token that only ends the answer does not count::

        23 tokens in 0.31 s (74 tok/s), the first after 0.05 s
    """
    if not (is_terminal(sys.stdout) and is_terminal(sys.stderr)):
        yield
        return
    watched = _WatchedText(sys.stdout)
    started = time.perf_counter()
    with redirect_stdout(watched):
        yield
    seconds, text = time.perf_counter() - started, watched.text.removesuffix("\n")  # print's own
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    if tokens:
        first = watched.first_at - started
        line = f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.3g} tok/s), the first after {first:.2f} s"
        print(line if "NO_COLOR" in os.environ else f"\x1b[2m{line}\x1b[0m", file=sys.stderr)
