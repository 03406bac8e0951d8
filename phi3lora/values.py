"""Plain values as users and files give them: questions that every value answers, and words for any value.

A value may be anything: an integer of 5,000 digits, a list nested 100,000 deep, an array that is neither true nor
false, text that is not Unicode. What asks here gets an answer, so that the reader can refuse by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import Phi3LoRAError

SEED_END = 2**63
"""Seeds are below: what every generator here takes, and a signed number in any file."""
_SHOWN = 300
_LONGEST_NAME = 255  # bytes, of a file on every usual system; of a longer one even "is it there" is an error


def shown(value: object, most: int = _SHOWN) -> str:
    """``repr`` for a message: of any value, never long, always printable."""
    try:
        text = repr(value)
    except Exception:  # RecursionError, ValueError (too many digits), and whatever an object of the user's raises
        text = f"<{type(value).__name__}>"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}..."


def same(a: object, b: object) -> bool:
    """Whether ``a == b``; what cannot say so (an array, a tensor) is another value."""
    try:
        return bool(a == b)
    except Exception:  # as many kinds as there are classes: numpy's ValueError, torch's RuntimeError, RecursionError
        return False


def is_one_of(value: object, allowed: Iterable[object]) -> bool:
    """``value in allowed``, for any value."""
    return any(same(value, one) for one in allowed)


def is_number(value: object) -> bool:
    """A finite number that float arithmetic takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def is_count(value: object, least: int, end: int = 2**63) -> bool:
    """A whole number from ``least`` up to, not including, ``end``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end


def is_text(value: object) -> bool:
    """A string that can be written to a file."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_path(value: object) -> bool:
    """Something that a file system can be asked about."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    try:
        name = os.fspath(value)
        parts = os.fsencode(name).split(b"/")
    except (TypeError, UnicodeEncodeError):
        return False
    return isinstance(name, str) and "\0" not in name and all(len(part) <= _LONGEST_NAME for part in parts)


def as_path(value: Any, what: str, error: type[Phi3LoRAError]) -> Path:
    """``value`` as a path, or an ``error`` that names ``what``."""
    if not is_path(value):
        raise error(f"{what} cannot be {shown(value)}; allowed: a path, names of at most {_LONGEST_NAME} bytes")
    return Path(value)


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, which refuses with a ValueError whatever it refuses."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The JSON of a file; OSError or ValueError where there is none."""
    return parse_json(path.read_bytes().decode("utf-8"))


def told(error: BaseException) -> str:
    """An error in a line: its text, and its kind where the text alone says little (``KeyError: 'state'``)."""
    text = str(error).strip().partition("\n")[0][:_SHOWN].encode("utf-8", "backslashreplace").decode()
    return text if isinstance(error, (Phi3LoRAError, OSError)) else f"{type(error).__name__}: {text}"
