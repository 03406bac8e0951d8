"""The one exception family. A message names the thing, the value got, what is allowed, and the way out."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Phi3LoRAError(ValueError):
    """Something the caller can put right: a setting, a file, a dataset, a model. Catch this one for all of ours."""


class ConfigError(Phi3LoRAError):
    """A field of ``LoraConfig`` or ``TrainingConfig`` that does not exist or cannot have the value given."""


class ModelError(Phi3LoRAError):
    """A model or layer that cannot be loaded, adapted or run as asked."""


class DataError(Phi3LoRAError):
    """A dataset, row or chat that cannot be trained on."""


class AdapterError(Phi3LoRAError):
    """An adapter file that is unreadable or does not belong to the model at hand."""


class CheckpointError(Phi3LoRAError):
    """A training checkpoint that is missing, damaged or of another run."""


class TrainingError(Phi3LoRAError):
    """A run that cannot go on: a loss that stays NaN, nothing to train."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean 'q_proj'?"`` for the candidate closest to ``name``, or ``""`` when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


# ----------------------------------------------------------------------------------------------------
# Plain values as users and files give them: questions that every value answers, and words for any value.
#
# A value may be anything: an integer of 5,000 digits, a list nested 100,000 deep, an array that is neither true nor
# false, text that is not Unicode. What asks here gets an answer, so that the reader can refuse by name.

SEED_END = 2**63
"""Seeds are below: what every generator here takes, and a signed number in any file."""
_SHOWN = 300
_LONGEST_NAME = 255  # bytes, of a file on every usual system; of a longer one even "is it there" is an error


def short_repr(value: object, most: int = _SHOWN) -> str:
    """``repr`` for a message: of any value, never long, always printable."""
    try:
        text = repr(value)
    except Exception:  # RecursionError, ValueError (too many digits), and whatever an object of the user's raises
        text = f"<{type(value).__name__}>"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}..."


def equals(a: object, b: object) -> bool:
    """Whether ``a == b``; what cannot say so (an array, a tensor) is another value."""
    try:
        return bool(a == b)
    except Exception:  # as many kinds as there are classes: numpy's ValueError, torch's RuntimeError, RecursionError
        return False


def is_one_of(value: object, allowed: Iterable[object]) -> bool:
    """``value in allowed``, for any value."""
    return any(equals(value, one) for one in allowed)


def is_number(value: object) -> bool:
    """A finite number that float arithmetic takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def is_int(value: object, least: int, end: int = 2**63) -> bool:
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
        raise error(f"{what} cannot be {short_repr(value)}; allowed: a path, names of at most {_LONGEST_NAME} bytes")
    return Path(value)


def error_line(error: BaseException) -> str:
    """An error in a line: its text, and its kind where the text alone says little (``KeyError: 'state'``)."""
    text = str(error).strip().partition("\n")[0][:_SHOWN].encode("utf-8", "backslashreplace").decode()
    return text if isinstance(error, (Phi3LoRAError, OSError)) else f"{type(error).__name__}: {text}"
