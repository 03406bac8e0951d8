"""The exceptions, tests of values that come from users and files, and values and errors in words.

A message names the thing, the value, the allowed values and the way out.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

SEED_END = 2**63
"""Upper bound of seeds, exclusive: every generator and every file format here takes a seed below it."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_CHARACTERS = 300  # of a value in a message
_MAX_NAME_BYTES = 255  # of a file's name on every usual system; even asking whether a longer one exists is an error
_HUB_NAME = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)  # the rule of huggingface_hub


class Phi3LoRAError(ValueError):
    """Base of all errors that the caller can fix: a setting, a file, a dataset, a model.

    Its text is one line of printable characters, whatever the names and texts of files in it are.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(Phi3LoRAError):
    """A field of ``LoraConfig`` or ``TrainingConfig`` that does not exist or cannot have the given value."""


class ModelError(Phi3LoRAError):
    """A model or layer that cannot be loaded, adapted or run as asked."""


class DataError(Phi3LoRAError):
    """A dataset, row or chat that cannot be trained on."""


class AdapterError(Phi3LoRAError):
    """An adapter file that cannot be read or does not fit the model."""


class CheckpointError(Phi3LoRAError):
    """A training checkpoint that is missing, damaged or from another run."""


class TrainingError(Phi3LoRAError):
    """A run that cannot start or go on: nothing to train, a loss that stays NaN."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'q_proj'?"`` for the candidate closest to ``name``, or ``""`` if none is close.

    A candidate whose words have ``name`` as their initials comes first: ``learning_rate`` for ``lr``.
    """
    names, letters = list(candidates), name.strip("-")
    close = [each for each in names if len(letters) > 1 and "".join(re.findall(r"(?<![a-z])[a-z]", each)) == letters]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def printable(text: str) -> str:
    r"""Return ``text`` with ``\n``, ``\x1b`` and every other character that is not printable spelt out.

    Otherwise a name or text from an untrusted file could clear the terminal or fake a line of a log.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_repr(value: object, most: int = _MAX_CHARACTERS) -> str:
    """Return the ``repr`` of a value for a message, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def first_of(items: Sequence[object], most: int = 5) -> str:
    """Return the first items in words: ``"3, 8, 9 and 4 more"``."""
    text = ", ".join(map(str, items[:most]))
    return text + (f" and {len(items) - most:,} more" if len(items) > most else "")


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: ``"1 row"``, ``"2,661 rows"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def require(is_allowed: bool, name: str, value: object, allowed: str, error: type[Phi3LoRAError]) -> None:
    """Raise an ``error`` with the name of a value, the value and the allowed ones, unless ``is_allowed``."""
    if not is_allowed:
        raise error(f"{name}={short_repr(value)}; allowed: {allowed}")


def error_line(error: BaseException) -> str:
    """Return an error's first line, after its type if the text alone says little (``KeyError: 'state'``)."""
    text = ValueError.__str__(error) if isinstance(error, Phi3LoRAError) else str(error)
    text = printable(text.strip().partition("\n")[0][:_MAX_CHARACTERS])
    return text if isinstance(error, (Phi3LoRAError, OSError)) else f"{type(error).__name__}: {text}"


def plain_value(value: Any) -> Any:
    """Return a value in Python's own types, inside lists and dicts too.

    Numbers, arrays and tensors of NumPy and torch become numbers and lists, and a member of an enum its value::

        np.int64(8) -> 8    torch.tensor(0.5) -> 0.5    np.arange(2) -> [0, 1]    SchedulerType.COSINE -> "cosine"
    """
    if isinstance(value, Enum):
        return plain_value(value.value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_value(item) for item in value)
    return value


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float; a bool is not a number, nor is an int beyond every float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_int(value: object, least: int, end: int = 2**63) -> bool:
    """Return whether a value is an int with ``least <= value < end``; a bool is not an int."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end


def is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is a string that can be encoded as UTF-8; half of a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def is_path(value: object) -> bool:
    """Return whether a value is a path that a file system can look up; an empty text is not."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    name = os.fspath(value)
    are_short = all(len(os.fsencode(part)) <= _MAX_NAME_BYTES for part in name.split("/"))
    return name != "" and "\0" not in name and are_short


def is_hub_name(text: str) -> bool:
    """Return whether ``text`` can be a name on the hub: ``name`` or ``owner/name``."""
    return _HUB_NAME.fullmatch(text) is not None and "--" not in text and ".." not in text


def home_path(value: Any) -> Any:
    """Return a path's text with the home folder in the place of ``~/``; other values as they are."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def as_path(value: Any, what: str, error: type[Phi3LoRAError]) -> Path:
    """Return ``value`` as a path, or raise an ``error`` that names ``what``."""
    if not is_path(value):
        raise error(f"{what} cannot be {short_repr(value)}; allowed: a path, names of at most {_MAX_NAME_BYTES} bytes")
    return Path(home_path(os.fspath(value)))


def install_hint(extra: str) -> str:
    """Return the command that installs an extra of this package, which is not on the package index.

    In a clone it is ``pip install -e ".[plot]"``; after an installation from git it names that address; from a wheel
    it names the packages of the extra.
    """
    clone = Path(__file__).parents[1]
    if (clone / "pyproject.toml").is_file():
        return f'pip install -e ".[{extra}]"' + ("" if clone == Path.cwd() else f" (in {clone})")
    try:
        installed = metadata.distribution("phi3lora")
    except metadata.PackageNotFoundError:  # a copied folder
        return f"install the packages of the extra {extra!r} in phi3lora's pyproject.toml"
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return f'pip install "phi3lora[{extra}] @ {origin["vcs_info"]["vcs"]}+{origin["url"]}"'
    requirements = [line.partition(";") for line in installed.requires or []]
    names = [name.strip() for name, _, marker in requirements if re.search(rf"extra == ['\"]{extra}['\"]", marker)]
    return f"pip install {' '.join(map(shlex.quote, names))}"
