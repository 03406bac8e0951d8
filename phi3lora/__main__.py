"""``python -m phi3lora`` and ``phi3lora``: see cli/options.py for the options, cli/commands.py for what they do."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence

from .cli.options import parse
from .display import is_terminal
from .errors import Phi3LoRAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 an error in words, 130 Ctrl-C, 143 SIGTERM.

    Help, ``--version`` and wrong usage end the process with 0 or 2, as argparse does; output that nobody reads any
    more (``phi3lora ... | head``) ends it with 141.
    """
    _take_any_text()
    try:
        status = _run(arguments)
    except SystemExit:  # argparse's
        if (lost := _flush()) is None:
            raise
        return _status_of(lost)
    except BrokenPipeError as error:
        _flush()
        return _status_of(error)
    lost = _flush()
    return status if lost is None else _status_of(lost)


def _take_any_text() -> None:
    """Spell out characters that the terminal's encoding lacks, and leave wrong bytes of its input to be refused."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        from .cli.commands import run_command  # loads torch

        return run_command(options)
    except BrokenPipeError:
        raise
    except (Phi3LoRAError, OSError) as error:
        _tell(str(error))
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 128 + signal.SIGINT


def _flush() -> OSError | None:
    """Write out what was printed, and return the error of a stream that cannot be written.

    Such a stream goes to ``os.devnull`` from then on: Python flushes it again at exit, and would report it there.
    """
    lost = None
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: closed by `>&-`
                stream.flush()
        except OSError as error:
            lost = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return lost


def _status_of(lost: OSError) -> int:
    """Return the exit status after output was lost: silently where nobody reads it, in words on a full disk."""
    if isinstance(lost, BrokenPipeError):
        return 128 + signal.SIGPIPE
    _tell(f"the output cannot be written: {lost}")
    _flush()
    return 1


def _tell(message: str) -> None:
    """Print a message on the error stream: in lines that fit a terminal, as one line in a pipe or a file.

    Where that stream takes nothing either, the exit status has to do.
    """
    if sys.stderr is None:  # closed by `2>&-`; print would take it for standard output
        return
    line = f"phi3lora: {message}"
    if is_terminal(sys.stderr):
        width = max(40, shutil.get_terminal_size().columns)
        line = textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
