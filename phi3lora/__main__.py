"""``python -m phi3lora`` and ``phi3lora``: see cli/options.py for the options, cli/commands.py for what they do."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence

from .cli.options import parse
from .errors import Phi3LoRAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 an error in words, 130 Ctrl-C, 143 SIGTERM.

    Wrong usage ends the process with 2, as argparse does.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        from .cli.commands import run_command  # loads torch

        status = run_command(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe is handled
        return status
    except (Phi3LoRAError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # of `phi3lora ... | head`: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        print(_fitting(f"phi3lora: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("phi3lora: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _fitting(line: str) -> str:
    """Return the line in pieces that fit the terminal; in a pipe or a file it stays one line."""
    if not sys.stderr.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
