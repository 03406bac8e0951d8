"""Rows of a dataset, in any of five shapes, as chats: lists of ``{"role", "content"}``.

messages            {"messages": [{"role": "user", "content": "..."}, ...]}            OpenAI, ultrachat_200k
sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}        ShareGPT, Vicuna
alpaca              {"instruction": "...", "input": "...", "output": "..."}            Alpaca, Dolly-like
prompt_completion   {"prompt": "...", "completion": "..."}                             OpenAI's old form, TRL, MLX
text                {"text": "<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>"}         the Phi-3 cookbook's JSONL
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, is_text, short_repr
from ..files import parse_json
from .findings import Findings

Message = dict[str, Any]
"""``role``, ``content``, ``train`` if its row says so, and the row's other keys, for the template."""


@dataclass(frozen=True)
class Chat:
    """One row, read. Which of its keys a template renders is for ``ChatEncoder`` to find out."""

    messages: list[Message]
    tools: Any = None
    """Functions that the assistant may call, in OpenAI's JSON schema."""
    prompt_messages: int = 0
    """Number of leading messages that are a prompt: not trained, unless ``train_on="all"``."""
    text: str | None = None
    """Plain text for continued pretraining, which no template touches; ``messages`` is empty then."""


COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> required columns, in the order in which the formats are tried."""

_OPTIONAL = {"alpaca": ("input", "system"), "prompt_completion": ("system",), "sharegpt": ("system",)}
_NAMES = {"conversations": "sharegpt", "prompt-completion": "prompt_completion", "chatml": "messages"}
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "function_response": "tool", "observation": "tool",
}  # fmt: skip
_PHI3_TURN = re.compile(
    r"<\|(system|user|assistant|tool)\|>(.*?)(?:<\|end\|>|(?=<\|(?:system|user|assistant)\|>)|\Z)", re.S
)
_PHI4_TURN = re.compile(r"<\|im_start\|>(\w+)<\|im_sep\|>(.*?)(?:<\|im_end\|>|\Z)", re.S)


def known_format(name: str) -> str:
    """Return ``name`` as spelled in :data:`COLUMNS`, or ``"auto"``."""
    known = _NAMES.get(name, name) if isinstance(name, str) else ""
    if known not in ("auto", *COLUMNS):
        raise DataError(f"format={short_repr(name)}; allowed: 'auto', {', '.join(map(repr, COLUMNS))}")
    return known


def detect_format(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, number: int = 1) -> str:
    """Return the format of a row, recognised by its keys."""
    names = columns or {}
    for name, needed in COLUMNS.items():
        if all(row.get(names.get(column, column)) is not None for column in needed):
            return name
    forms = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    raise DataError(
        f"row {number} has the keys {_keys(row)}, which is no known format. Known: {forms}. "
        f"Name your columns with columns={{'prompt': 'your column', ...}}"
    )


def _keys(row: Mapping[Any, Any]) -> str:
    more = f" and {len(row) - 20} more" if len(row) > 20 else ""
    return (", ".join(short_repr(key, 60) for key in list(row)[:20]) or "(none)") + more


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raise if a key of ``columns`` is a column of no format."""
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise DataError(f"columns={short_repr(columns)}; allowed: a dict of our column's name -> yours")
    known = sorted({c for needed in (*COLUMNS.values(), *_OPTIONAL.values()) for c in needed})
    for name in columns:
        if name not in known:
            raise DataError(f"columns={short_repr(dict(columns))}: {short_repr(name)} is not one of {', '.join(known)}")


def to_chat(
    row: Mapping[str, Any],
    format: str,
    number: int,
    columns: Mapping[str, str] | None = None,
    findings: Findings | None = None,
) -> Chat:
    """Return one row as a checked chat. ``columns``: our column name -> the row's.

    Raises:
        DataError: columns missing, no text, unknown roles, roles out of order, no assistant turn.
    """
    names = dict(columns or {})
    values = {name: row.get(names.get(name, name)) for name in (*COLUMNS[format], *_OPTIONAL.get(format, ()))}
    missing = ", ".join(repr(names.get(c, c)) for c in COLUMNS[format] if values[c] is None)
    if missing:
        raise DataError(f"row {number}: format {format!r} needs {missing}; the row has the keys {_keys(row)}")
    messages = _CONVERTERS[format](values, number)
    if values.get("system") not in (None, ""):
        messages.insert(0, {"role": "system", "content": _text(values["system"], number, "'system'")})
    _check_roles(messages, number)
    return Chat(messages)


def _text(value: Any, number: int, what: str) -> str:
    """Return a string, or the joined text parts of OpenAI's list form."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        parts = [p["text"] for p in value if isinstance(p, Mapping) and p.get("type") == "text" and "text" in p]
        if len(parts) == len(value) and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not is_text(value):
        kind = type(value).__name__
        raise DataError(f"row {number}: {what} is {kind} {short_repr(value, 60)}; allowed: Unicode text")
    return value


def _is_empty(value: Any) -> bool:
    """Return whether an optional column has no value: it is None, ``""``, ``[]``, ``{}``, False or 0."""
    return value is None or (isinstance(value, (str, list, tuple, dict, int, float)) and not value)


def _turns(value: Any, number: int, column: str) -> list[Mapping[str, Any]]:
    if isinstance(value, str):  # a CSV cell holds a chat as JSON
        try:
            value = parse_json(value)
        except ValueError as error:
            what = f"row {number}: {column!r} is text but not JSON ({error})"
            raise DataError(f"{what}; allowed: a list of turns") from None
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"row {number}: {column!r} is {short_repr(value, 60)}; allowed: a list of turns (dicts)")
    return list(value)


def _role(name: Any, number: int) -> str:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"row {number}: role {short_repr(name, 60)}; allowed: {', '.join(_ROLES)}")
    return role


def _from_messages(values: Mapping[str, Any], number: int) -> list[Message]:
    messages = []
    for turn in _turns(values["messages"], number, "messages"):
        message: Message = {
            "role": _role(turn.get("role"), number),
            "content": _text(turn.get("content"), number, f"the content of role {short_repr(turn.get('role'), 60)}"),
        }
        if any(not _is_empty(turn.get(name)) for name in ("tool_calls", "function_call")):
            raise DataError(f"row {number}: a message with tool_calls; allowed: content as the template renders it")
        train = turn.get("train")
        if train is not None:
            if train not in (0, 1):  # True and False are 1 and 0
                raise DataError(f"row {number}: 'train' of a message is {short_repr(train, 60)}; allowed: true, false")
            message["train"] = bool(train)
        messages.append(message)
    return messages


def _from_sharegpt(values: Mapping[str, Any], number: int) -> list[Message]:
    turns = []
    for turn in _turns(values["conversations"], number, "conversations"):
        role = turn.get("from", turn.get("role"))
        turns.append({"role": role, "content": turn.get("value", turn.get("content")), "train": turn.get("train")})
    return _from_messages({"messages": turns}, number)


def _from_alpaca(values: Mapping[str, Any], number: int) -> list[Message]:
    question = _text(values["instruction"], number, "'instruction'")
    if not _is_empty(values.get("input")):
        question += "\n\n" + _text(values["input"], number, "'input'")
    answer = _text(values["output"], number, "'output'")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_prompt_completion(values: Mapping[str, Any], number: int) -> list[Message]:
    messages: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = values[column]
        if isinstance(value, str):
            messages.append({"role": role, "content": _text(value, number, repr(column))})
        else:  # TRL's conversational form: each a list of messages
            messages += _from_messages({"messages": value}, number)
    return messages


def _from_text(values: Mapping[str, Any], number: int) -> list[Message]:
    text = _text(values["text"], number, "'text'")
    bare = text.strip().removeprefix("<s>").removesuffix("<|endoftext|>").strip()
    turn = _PHI4_TURN if "<|im_start|>" in bare else _PHI3_TURN
    messages = [{"role": _role(m[1], number), "content": m[2].strip()} for m in turn.finditer(bare)]
    if not messages or turn.sub("", bare).strip():
        raise DataError(
            f"row {number}: 'text' is not a chat in Phi-3's markers: {text[:60]!r}; allowed: "
            f"'<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>' (or Phi-4's <|im_start|> form), no text outside"
        )
    return messages


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}

_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_roles(messages: list[Message], number: int) -> None:
    previous = "start"
    for message in messages:
        role = message["role"]
        if previous not in _MAY_FOLLOW[role]:
            order = ", ".join(m["role"] for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
            raise DataError(
                f"row {number}: roles out of order: {role!r} after {previous!r} ({order}); allowed: an optional "
                f"'system', then alternating 'user' and 'assistant' ('tool' after 'assistant')"
            )
        previous = role
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"row {number}: a chat with no assistant turn ({len(messages)} messages): nothing to train on")
