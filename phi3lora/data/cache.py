"""Tokenised chats kept on disk by ``datasets``: the same rows, tokenizer and options are tokenised once.

The chats are a ``Dataset.from_generator`` whose fingerprint is a digest of everything that their tokens depend on, this
library's own code included; what cannot be digested is not kept. How long documents are cut comes after, so
``max_length`` and ``overflow`` may change. ``datasets`` decides where they lie (``HF_DATASETS_CACHE``) and whether
anything is kept at all (``datasets.disable_caching()``).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from . import formats, sources, template
from .template import EncodedChat

logger = logging.getLogger("phi3lora")

NumberedChat = tuple[int, EncodedChat]

SMALLEST_BYTES = 2**20  # less is tokenised in less than the second that importing datasets takes
_MODULES = (formats.__file__, sources.__file__, template.__file__, __file__)
_CHATS_AT_ONCE = 1000


def cache_key(found: Path | Iterable[Any], tokenizer: Any, **options: Any) -> str | None:
    """A digest of the rows, the tokenizer, the options and the code; None: these chats are not to be kept.

    Args:
        found: what ``sources.find_source`` found. Files and ``datasets.Dataset`` of :data:`SMALLEST_BYTES` and more
            are kept; their contents count, not their names.
        tokenizer: one of transformers' own classes, whose template does not ask for the time.
        options: values with a ``repr`` that tells them apart.
    """
    rows = _rows_digest(found)
    tokenizer_facts = _tokenizer_facts(tokenizer) if rows else None
    if tokenizer_facts is None:
        return None
    code = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in _MODULES]
    versions = [transformers.__version__, tokenizers.__version__]
    facts = [rows, tokenizer_facts, sorted((name, repr(value)) for name, value in options.items()), code, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _rows_digest(found: Path | Iterable[Any]) -> str | None:
    if isinstance(found, Path):
        if found.stat().st_size < SMALLEST_BYTES:
            return None
        return found.suffix.lower() + hashlib.sha256(found.read_bytes()).hexdigest()
    fingerprint = getattr(found, "_fingerprint", None)  # a datasets.Dataset has one
    return fingerprint if fingerprint and found.data.nbytes >= SMALLEST_BYTES else None  # type: ignore[attr-defined]


def _tokenizer_facts(tokenizer: Any) -> list[Any] | None:
    own_class = not type(tokenizer).__module__.startswith("transformers.")
    if own_class or "strftime_now" in str(tokenizer.chat_template):
        return None
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # tokenizers raises this very class for a part that is written in Python
        return None
    del state["truncation"], state["padding"]  # what the last call left there
    return [state, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.split_special_tokens]


def kept(chats: Generator[NumberedChat], key: str | None) -> Iterator[NumberedChat]:
    """The same chats: those kept under ``key``, else ``chats``, which are then kept.

    What ``chats`` raises is raised as it is, and nothing is kept.
    """
    if key is None:
        return chats
    import datasets

    if not datasets.is_caching_enabled():
        return chats
    features = {"number": datasets.Value("int64")}
    features["input_ids"] = datasets.List(datasets.Value("int32"))
    features["trained"] = datasets.List(datasets.Value("bool"))

    def records() -> Iterator[dict[str, Any]]:
        for number, chat in chats:
            yield {"number": number, "input_ids": chat.input_ids, "trained": chat.trained}

    try:
        table = datasets.Dataset.from_generator(records, features=datasets.Features(features), fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
    except OSError as error:
        if inspect.getgeneratorstate(chats) != inspect.GEN_CREATED:
            raise
        logger.warning("tokenised chats cannot be kept in datasets' cache: %s", error)
        return chats
    return _chats(table)


def _chats(table: Any) -> Iterator[NumberedChat]:
    for part in table.with_format("numpy").iter(_CHATS_AT_ONCE):
        for number, input_ids, trained in zip(part["number"], part["input_ids"], part["trained"], strict=True):
            yield int(number), EncodedChat(input_ids, trained)
