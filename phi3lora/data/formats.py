"""Rows of a dataset, in any of five shapes, as chats: lists of ``{"role", "content"}``.

messages            {"messages": [{"role": "user", "content": "..."}, ...]}            OpenAI, ultrachat_200k
sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}        ShareGPT, Vicuna
alpaca              {"instruction": "...", "input": "...", "output": "..."}            Alpaca, Dolly-like
prompt_completion   {"prompt": "...", "completion": "..."}                             OpenAI's old form, TRL, MLX
text                {"text": "<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>"}         the Phi-3 cookbook's JSONL

Beside these, every form may have the columns ``system`` and ``tools``, and alpaca ``history``. What else a row has is
counted as unused, unless it shows that the row is for another job (``other_jobs.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import DataError, first_of, short_repr
from .findings import Findings
from .marked_text import is_templated, read_marked_text, read_templated, starts_with_role
from .other_jobs import advice_about, refuse_media, refuse_other_job
from .turns import ROW_SWITCHES, check_row_switch, has_call, holds_turns, is_empty, json_of, read_turns, text_of
from .turns import Message as Message


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

_CONTEXT = ("system", "tools", "functions")
OPTIONAL = {name: (("input", "history") if name == "alpaca" else ()) + _CONTEXT for name in COLUMNS}
"""Format -> columns that are read if a row has them. ``functions`` is an older name of ``tools``."""

_NAMES = {"conversations": "sharegpt", "prompt-completion": "prompt_completion", "chatml": "messages"}


def known_format(name: str) -> str:
    """Return ``name`` as spelled in :data:`COLUMNS`, or ``"auto"``."""
    known = _NAMES.get(name, name) if isinstance(name, str) else ""
    if known not in ("auto", *COLUMNS):
        raise DataError(f"format={short_repr(name)}; allowed: 'auto', {', '.join(map(repr, COLUMNS))}")
    return known


def check_columns(columns: Mapping[str, str] | None, format: str = "auto") -> None:
    """Raise if ``columns`` names a column that no format has, or columns that no one format has."""
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise DataError(f"columns={short_repr(columns)}; allowed: a dict of our column's name -> yours")
    known = sorted({column for name in COLUMNS for column in COLUMNS[name] + OPTIONAL[name]})
    what = f"columns={short_repr(dict(columns))}"
    for name in columns:
        if name not in known:
            raise DataError(f"{what}: {short_repr(name)} is not one of {', '.join(known)}")
    formats = _candidates(tuple(columns))
    if not formats or format not in ("auto", *formats):
        of_each = "; ".join(f"{name}: {', '.join(COLUMNS[name] + OPTIONAL[name])}" for name in COLUMNS)
        wanted = "one format" if format == "auto" else f"format {format!r}"
        raise DataError(f"{what}: not all of them are columns of {wanted}; allowed: the columns of one ({of_each})")


@lru_cache(maxsize=64)
def _candidates(mapped: tuple[str, ...]) -> tuple[str, ...]:
    """Return the formats that have all of the mapped columns."""
    return tuple(name for name in COLUMNS if set(mapped) <= {*COLUMNS[name], *OPTIONAL[name]})


def detect_format(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, number: int = 1, first: str | None = None
) -> str:
    """Return the format of a row, recognised by its keys; ``first`` is tried before the others.

    Raises:
        DataError: the row has no known format; if it looks like one of another job, the message says which.
    """
    names = columns or {}
    formats = _candidates(tuple(names))
    tried = formats if first is None or first not in formats else (first, *formats)
    for is_missing in (is_empty, lambda value: value is None):  # a form with an empty column only if no other fits
        for name in tried:
            for column in COLUMNS[name]:
                if is_missing(row.get(names.get(column, column))):
                    break
            else:
                return name
    needed = {column for name in formats for column in COLUMNS[name]}
    if absent := ", ".join(repr(theirs) for ours, theirs in names.items() if ours in needed and theirs not in row):
        raise DataError(f"row {number} has no {absent}, named by columns={dict(names)}; it has the keys {keys_of(row)}")
    if needed.isdisjoint(names):
        refuse_other_job(row, None, (), number)
    if empty := [short_repr(key, 60) for key, value in row.items() if is_empty(value)]:
        empty = [f" ({first_of(empty)} without a value)"]
    forms = "; ".join(f"{name}: {', '.join(names.get(c, c) for c in COLUMNS[name])}" for name in formats)
    raise DataError(
        f"row {number} has the keys {keys_of(row)}{''.join(empty)}, which fit no known format. Known: {forms}. "
        f"Name your columns with columns={{'prompt': 'your column', ...}} (--columns prompt=... completion=...)"
    )


def keys_of(row: Mapping[Any, Any]) -> str:
    """Return a row's keys for a message."""
    return first_of([short_repr(key, 60) for key in row], 20) or "(none)"


class _Plan(NamedTuple):
    """How the rows with the same keys are read."""

    columns: tuple[tuple[str, str], ...]  # (our name, the row's) of each column that is read
    unused: tuple[str, ...]
    switches: tuple[str, ...]  # those of the unused ones that may say how much the row is trained
    is_chosen: bool  # columns= names what is trained


@lru_cache(maxsize=1024)
def _plan(format: str, keys: tuple[Any, ...], mapped: tuple[tuple[str, str], ...]) -> _Plan:
    names, read = dict(mapped), []
    for ours in COLUMNS[format] + OPTIONAL[format]:
        theirs = names.get(ours, ours)
        # columns={"instruction": "input"} does not read "input" a second time, as the input.
        if theirs in keys and (ours in names or theirs not in names.values()):
            read.append((ours, theirs))
    unused = tuple(key for key in keys if key not in dict(read).values())
    switches = tuple(key for key in unused if key in ROW_SWITCHES)
    return _Plan(tuple(read), unused, switches, is_chosen=not set(names).isdisjoint(COLUMNS[format]))


class _Read(NamedTuple):
    """A row's columns, read by the function of its format."""

    messages: list[Message]
    prompt_messages: int
    form: str
    text: str | None = None


def to_chat(
    row: Mapping[str, Any],
    format: str,
    number: int,
    columns: Mapping[str, str] | None = None,
    findings: Findings | None = None,
) -> Chat:
    """Return one row as a checked chat, and count in ``findings`` how it was read.

    ``columns``: our column name -> the row's.

    Raises:
        DataError: columns missing, a row of another job, no text, unknown roles, roles out of order, no assistant
            turn, two system messages, a weight or a loss switch that cannot be followed.
    """
    names = columns or {}
    plan = _plan(format, tuple(row), tuple(names.items()))
    values = {ours: row[theirs] for ours, theirs in plan.columns}
    missing = [names.get(column, column) for column in COLUMNS[format] if values.get(column) is None]
    if missing:
        needed = ", ".join(map(repr, missing))
        raise DataError(f"row {number}: format {format!r} needs {needed}; the row has the keys {keys_of(row)}")
    if not plan.is_chosen:
        refuse_other_job(row, format, COLUMNS[format], number)
    unused = [key for key in plan.unused if not is_empty(row[key])]
    for key in plan.switches:
        if key in unused and check_row_switch(key, row[key], number):
            unused.remove(key)
    messages, prompt_messages, form, text = _READERS[format](values, number)
    tools = _tools(values, number)
    has_system = not is_empty(values.get("system"))
    if text is not None:
        if has_system or tools:
            raise DataError(f"row {number}: 'text' is plain text; allowed: no column 'system' or 'tools' beside it")
    else:
        if has_system:
            prompt_messages += _add_system(messages, text_of(values["system"], number, "'system'"), number)
        _check_roles(messages, number)
        refuse_media(messages, number)
    _count(Findings() if findings is None else findings, messages, prompt_messages, form, unused)
    return Chat(messages, tools, prompt_messages, text)


def _add_system(messages: list[Message], system: str, number: int) -> int:
    """Put ``system`` in front, unless it is there already, and return the number of messages that were added."""
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        return 1
    own = messages[0]["content"]
    if own not in ("", system):
        raise DataError(
            f"row {number}: the column 'system' is {short_repr(system, 60)} and the chat's system message is "
            f"{short_repr(own, 60)}; allowed: one of the two, or equal ones"
        )
    messages[0]["content"] = system
    return 0


def _tools(values: Mapping[str, Any], number: int) -> Any:
    """Return the functions of a row, None if it has none; JSON text is parsed. ``tools.py`` checks them."""
    allowed = "a list of functions as JSON schemas; remove the column if it holds something else"
    found = []
    for name in ("tools", "functions"):
        tools = values.get(name)
        if isinstance(tools, str):
            tools = json_of(tools, number, repr(name), allowed) if tools.strip() else None
        if is_empty(tools):
            continue
        if not isinstance(tools, (list, tuple, Mapping)):
            raise DataError(f"row {number}: {name!r} is {short_repr(tools, 60)}; allowed: {allowed}")
        found.append(tools)
    if len(found) > 1 and found[0] != found[1]:
        raise DataError(f"row {number}: the columns 'tools' and 'functions' differ; allowed: one of the two")
    return found[0] if found else None


def _count(findings: Findings, messages: list[Message], prompt_messages: int, form: str, unused: list[str]) -> None:
    """Count what was found in a row that is read, and remove switches that turn on what is never trained."""
    findings.rows_by_form[form] += 1
    for key in unused:
        findings.unused[str(key)] += 1
    for sentence in advice_about(messages):
        findings.advice[sentence] += 1
    for i, message in enumerate(messages):
        if "train" not in message:
            continue
        role, is_prompt = message["role"], i < prompt_messages
        if not message["train"]:
            findings.turns_switched_off += role == "assistant"
        elif role != "assistant" or is_prompt:
            del message["train"]
            what = f"the {role}'s message{' in a prompt' if is_prompt else ''}"
            findings.advice[f"{what} is switched on for training, which only train_on='all' follows"] += 1


def _from_messages(values: Mapping[str, Any], number: int) -> _Read:
    return _Read(read_turns(values["messages"], number, "messages"), 0, "messages")


def _from_sharegpt(values: Mapping[str, Any], number: int) -> _Read:
    return _Read(read_turns(values["conversations"], number, "conversations"), 0, "sharegpt")


def _from_alpaca(values: Mapping[str, Any], number: int) -> _Read:
    parts = [text_of(values["instruction"], number, "'instruction'")]
    if not is_empty(values.get("input")):
        parts.append(text_of(values["input"], number, "'input'"))
    question, answer = "\n\n".join(filter(None, parts)), text_of(values["output"], number, "'output'")
    history = _history(values.get("history"), number)
    if is_templated(question):
        if history:
            raise DataError(f"row {number}: 'instruction' is templated already; allowed: no 'history' beside it")
        return _Read(*read_templated(question, answer, number), form="alpaca as text")
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _Read([*history, *pair], 0, "alpaca")


def _history(value: Any, number: int) -> list[Message]:
    """Return LLaMA-Factory's earlier pairs of question and answer; their answers are trained like the last one."""
    if is_empty(value):
        return []
    allowed = "a list of pairs [question, answer]"
    pairs = json_of(value, number, "'history'", allowed) if isinstance(value, str) else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise DataError(f"row {number}: 'history' is {short_repr(value, 60)}; allowed: {allowed}")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text_of(text, number, "a text of 'history'")}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _from_prompt_completion(values: Mapping[str, Any], number: int) -> _Read:
    prompt, completion = values["prompt"], values["completion"]
    in_json = holds_turns(prompt) and holds_turns(completion)  # of a CSV file; one alone is a text about JSON
    if isinstance(prompt, str) and is_templated(prompt):
        if not isinstance(completion, str):
            raise DataError(f"row {number}: 'prompt' is templated already; allowed: a text as its 'completion'")
        return _Read(*read_templated(prompt, completion, number), form="prompt_completion as text")
    parts: list[list[Message]] = []
    for column, role, value in (("prompt", "user", prompt), ("completion", "assistant", completion)):
        if isinstance(value, str) and not in_json:
            parts.append([{"role": role, "content": text_of(value, number, repr(column))}])
        else:  # TRL's conversational form: each a list of messages
            parts.append(read_turns(value, number, column))
    return _Read(parts[0] + parts[1], len(parts[0]), "prompt_completion")


def _from_text(values: Mapping[str, Any], number: int) -> _Read:
    text = text_of(values["text"], number, "'text'")
    if not text.strip():
        raise DataError(f"row {number}: 'text' is empty: {text[:60]!r}; allowed: a chat, or plain text")
    if not starts_with_role(text):
        return _Read([], 0, "text as plain text", text=text)
    return _Read(read_marked_text(text, number), 0, "text")


_READERS: dict[str, Callable[[Mapping[str, Any], int], _Read]] = {
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
    previous, uses_tools = "start", False  # since the last message of the user
    for message in messages:
        role = message["role"]
        uses_tools = role != "user" and (uses_tools or role == "tool" or has_call(message))
        if previous not in _MAY_FOLLOW[role] and not (uses_tools and previous == role == "assistant"):
            order = ", ".join(m["role"] for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
            place = "first" if previous == "start" else f"after {previous!r}"
            raise DataError(
                f"row {number}: roles out of order: {role!r} {place} ({order}); allowed: an optional "
                f"'system', then alternating 'user' and 'assistant' ('tool' after 'assistant'; with tools, several "
                f"'assistant' in a row)"
            )
        previous = role
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"row {number}: a chat with no assistant turn ({len(messages)} messages): nothing to train on")
