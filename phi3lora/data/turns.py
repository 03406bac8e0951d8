"""A turn of a chat, as its maker wrote it -> a message: role, content, whether it is trained, and its other keys."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import DataError, is_text, short_repr
from ..files import parse_json

Message = dict[str, Any]
"""``role``, ``content``, ``train`` if its row says so, and the turn's other keys, for the template."""

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "function_call": "assistant", "tool_call": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""A role in small letters -> ours."""
_CALLS = ("function_call", "tool_call")  # the content of such a turn is a call in JSON
_SPEAKERS = {name: role for name, role in ROLES.items() if name not in _CALLS}
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text", "parts")
_SWITCHES = ("train", "training", "trainable", "loss", "weight", "loss_weight", "loss_scale")
ROW_SWITCHES = ("train", "training", "trainable", "weight", "loss_weight", "loss_scale", "sample_weight")
"""Columns that may say how much a whole row is trained."""
_MASKS = ("train_detail", "training_detail", "mask", "masked", "loss_mask")
_ON_OFF: dict[Any, bool] = {0: False, 1: True, "0": False, "1": True, "0.0": False, "1.0": True}
_ON_OFF |= {"false": False, "true": True}
_TURNS_START = re.compile(r'\s*\[\s*\{\s*"')
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_PART_KEYS = ("type", "text", "value")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold what the models cannot read."""
MEDIA_IN_MESSAGES = (*MEDIA, "image_url", "input_audio")
"""Keys of messages, and of the parts of their contents, that do."""


def is_empty(value: Any) -> bool:
    """Return whether a column or key has no value: it is None, NaN, ``""``, ``[]`` or ``{}``."""
    if value is None or isinstance(value, (str, list, tuple, dict)):
        return not value
    return isinstance(value, float) and value != value


def read_turns(value: Any, number: int, column: str) -> list[Message]:
    """Return the messages of a column that holds turns: a list of dicts, one dict, or either as JSON.

    Raises:
        DataError: anything else, an unknown role, a content that is not text, a loss switch neither on nor off.
    """
    if isinstance(value, str):  # a CSV cell holds a chat as JSON
        value = json_of(value, number, repr(column), "a list of turns")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not all(map(_is_turn, value)):
        allowed = f"{'text, or ' * (column in ('prompt', 'completion'))}a list of turns (dicts)"
        raise DataError(f"row {number}: {column!r} is {short_repr(value, 60)}; allowed: {allowed}")
    return [_message(turn, number) for turn in value]


def _is_turn(value: Any) -> bool:
    return type(value) is dict or isinstance(value, Mapping)


def holds_turns(value: Any) -> bool:
    """Return whether a column is a list of turns, or text that is one as JSON."""
    if isinstance(value, str):
        if not _TURNS_START.match(value):
            return False
        try:
            value = parse_json(value)
        except ValueError:  # text that only starts like it
            return False
        return all(
            isinstance(turn, Mapping) and str(turn.get("role", turn.get("from"))).lower() in ROLES for turn in value
        )
    return not is_empty(value)


def json_of(text: str, number: int, what: str, allowed: str) -> Any:
    """Return the JSON value that ``what`` of a row holds as text."""
    try:
        return parse_json(text)
    except ValueError as error:
        got = short_repr(text, 60)
        raise DataError(f"row {number}: {what} is text but not JSON ({error}): {got}; allowed: {allowed}") from None


def text_of(value: Any, number: int, what: str) -> str:
    """Return a string, or the joined text parts of the lists that OpenAI and others write."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        parts = [_part(part, number, what) for part in value]
        if all(isinstance(part, str) for part in parts):
            value = "".join(parts)
    if not is_text(value):
        kind = type(value).__name__
        raise DataError(f"row {number}: {what} is {kind} {short_repr(value, 60)}; allowed: Unicode text")
    return value


def _part(part: Any, number: int, what: str) -> Any:
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise DataError(
            f"row {number}: {what} is a list with a part of type {short_repr(kind, 60)}; allowed: parts of type 'text' "
            f"(the models are text-only; calls of functions go into 'tool_calls', results into a 'tool' message)"
        )
    for key in part:
        if key in (*MEDIA_IN_MESSAGES, *_SWITCHES, *_MASKS) and not is_empty(part[key]):
            raise DataError(
                f"row {number}: {what} has a part with {key!r}: {short_repr(part[key], 60)}; allowed: text, "
                f"which is trained or left out with the whole message; remove the key, or the row"
            )
    return part.get("text", part.get("value"))  # "value": LLaMA-Factory's second format


def _other_keys(parts: Any) -> dict[str, Any]:
    """Return the keys of a content's parts beside their text, such as ``cache_control``, named as keys of a message."""
    found = (part for part in parts if isinstance(part, Mapping))
    return {f"content.{k}": v for part in found for k, v in part.items() if k not in _PART_KEYS and not is_empty(v)}


class _Layout(NamedTuple):
    """Which of a turn's keys hold what."""

    plain: tuple[str, str] | None  # the keys of role and content, if there are no others
    roles: tuple[str, ...]
    contents: tuple[str, ...]
    switches: tuple[str, ...]
    masks: tuple[str, ...]
    others: tuple[Any, ...]


@lru_cache(maxsize=1024)
def _layout(keys: tuple[Any, ...]) -> _Layout:
    kinds = (_ROLE_KEYS, _CONTENT_KEYS, _SWITCHES, _MASKS)
    roles, contents, switches, masks = (tuple(key for key in kind if key in keys) for kind in kinds)
    others = tuple(key for key in keys if not any(key in kind for kind in kinds))
    plain = (roles[0], contents[0]) if len(keys) == 2 and roles and contents else None
    return _Layout(plain, roles, contents, switches, masks, others)


def _message(turn: Mapping[str, Any], number: int) -> Message:
    plain, role_keys, content_keys, switches, masks, others = _layout(tuple(turn))
    if plain:  # as most turns are
        name, content = turn[plain[0]], turn[plain[1]]
        if isinstance(name, str) and name in _SPEAKERS and is_text(content):
            return {"role": _SPEAKERS[name], "content": content}
    role_key = next((key for key in role_keys if turn[key] is not None), "role")
    content_key = next((key for key in content_keys if turn[key] is not None), "content")
    name, content = turn.get(role_key), turn.get(content_key)
    lower = name.lower() if isinstance(name, str) else ""
    role = ROLES.get(lower)
    if role is None:
        keys = "" if role_keys else f" of a turn with the keys {', '.join(short_repr(key, 40) for key in turn)}"
        raise DataError(f"row {number}: role {short_repr(name, 60)}{keys}; allowed: {', '.join(ROLES)}")
    message: Message = {"role": role, "content": content}
    if lower in _CALLS:
        message.update(content="", tool_calls=_calls(content, number, lower))
    elif role == "assistant" and is_empty(content) and has_call(turn):
        message["content"] = ""
    elif not is_text(content):
        keys = "" if content_keys else f" in a turn with the keys {', '.join(short_repr(key, 40) for key in turn)}"
        message["content"] = text_of(content, number, f"the content of role {short_repr(name, 60)}{keys}")
        message.update(_other_keys(content))
    if switches or masks:
        on = _switch(turn, switches, masks, number)
        if on is not None:
            message["train"] = on
        if "loss" in switches and not isinstance(turn["loss"], bool):
            others = (*others, "loss")
    for key in others:
        if not is_empty(turn[key]):
            message[key] = turn[key]
    if len(role_keys) + len(content_keys) > 2:
        _add_doubles(message, turn, role_key, content_key, number)
    return message


def has_call(turn: Mapping[str, Any]) -> bool:
    return not (is_empty(turn.get("tool_calls")) and is_empty(turn.get("function_call")))


def _add_doubles(message: Message, turn: Mapping[str, Any], role_key: str, content_key: str, number: int) -> None:
    """Keep what a turn says twice (``role`` and ``from``, ``content`` and ``value``); refuse what contradicts."""
    for key in (*_ROLE_KEYS, *_CONTENT_KEYS):
        value, used = turn.get(key), role_key if key in _ROLE_KEYS else content_key
        if key == used or is_empty(value) or (isinstance(value, str) and value == turn[used]):
            continue
        role = ROLES.get(value.lower()) if key in _ROLE_KEYS and isinstance(value, str) else None
        if key == "value" or role not in (None, message["role"]):
            both = f"{used!r} is {short_repr(turn[used], 60)} and {key!r} is {short_repr(value, 60)}"
            raise DataError(f"row {number}: a turn says two things: {both}; allowed: one of the two keys")
        if role is None:
            message[key] = value


def _switch(turn: Mapping[str, Any], switches: Sequence[str], masks: Sequence[str], number: int) -> bool | None:
    """Return whether a turn is to be trained, as far as it says so."""
    for key in masks:
        if not is_empty(turn[key]):
            raise DataError(
                f"row {number}: {key!r} of a message is {short_repr(turn[key], 60)}; allowed: 'train': true or false "
                f"for the whole message; split the message, or write the key as 'train'"
            )
    says: dict[str, bool] = {}
    for key in switches:
        value = turn[key]
        if is_empty(value) or (key == "loss" and not isinstance(value, bool)):  # a loss that was recorded, no switch
            continue
        on = _on_off(value)
        if on is None:
            raise DataError(
                f"row {number}: {key!r} of a message is {short_repr(value, 60)}; allowed: 1 or true (trained), "
                f"0 or false (context only); a message cannot be trained in part: round it, or leave the message out"
            )
        says[key] = on
    if len(set(says.values())) > 1:
        both = " and ".join(f"{key!r} is {short_repr(turn[key], 60)}" for key in says)
        raise DataError(f"row {number}: {both} in one message, which disagree; allowed: one switch, or equal ones")
    return next(iter(says.values()), None)


def _on_off(value: Any) -> bool | None:
    key = value.strip().lower() if isinstance(value, str) else value
    return _ON_OFF.get(key) if isinstance(key, Hashable) and not isinstance(key, tuple) else None


def check_row_switch(column: str, value: Any, number: int) -> bool:
    """Return whether a column such as ``weight`` says that its row is trained as usual; one that is no switch does not.

    Raises:
        DataError: the row is to be trained less, more or not at all.
    """
    on = _on_off(value)
    try:
        is_weight = on is not None or float(value) == float(value)
    except (TypeError, ValueError, OverflowError):
        is_weight = False
    if is_weight and on is not True:
        raise DataError(
            f"row {number}: its column {column!r} is {short_repr(value, 60)}; allowed: 1 or true, because every row "
            f"counts the same here: leave the row out or repeat it, or remove the column if it means something else"
        )
    return is_weight


def _calls(value: Any, number: int, role: str) -> list[dict[str, Any]]:
    """Return the calls of a ShareGPT ``function_call`` turn in OpenAI's form."""
    allowed = '{"name": "...", "arguments": {...}} or a list of such'
    calls = json_of(value, number, f"the content of role {role!r}", allowed) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, Mapping) else calls
    is_list = isinstance(calls, Sequence) and not isinstance(calls, str) and len(calls) > 0
    if not is_list or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        got = short_repr(value, 60)
        raise DataError(f"row {number}: the content of role {role!r} is {got}; allowed: {allowed}")
    for call in calls:
        if extra := sorted(str(key) for key in call if key not in ("name", "arguments", "id")):
            raise DataError(f"row {number}: a call has the keys {', '.join(extra)}; allowed: name, arguments, id")
    return [
        {
            **({"id": call["id"]} if not is_empty(call.get("id")) else {}),
            "type": "function",
            "function": {"name": call["name"], "arguments": {} if (a := call.get("arguments")) is None else a},
        }
        for call in calls
    ]
