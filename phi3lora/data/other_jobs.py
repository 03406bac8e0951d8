"""Rows that are not chats to train on, which are refused by what they look like, and doubtful ones: advice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError, short_repr
from .turns import MEDIA, MEDIA_IN_MESSAGES, ROLES, Message, is_empty

_REJECTED = ("rejected", "rejected_response", "rejected_responses", "rejected_messages")
_LABELS = ("label", "kto_tag")
_MEDIA_MARK = re.compile(r"<image>|<\|(?:image|audio)_\d+\|>")
_ENDS = (
    "<|end|>", "<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end_of_turn|>",
    "<end_of_turn>", "<eos>",
)  # fmt: skip
"""End-of-turn markers, this family's and others'."""
_MARKERS = (
    "[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "### Instruction:",
)  # fmt: skip
_ROLE_STARTS = ("<|assistant|>", "<|im_start|>")
_MAP = "name the columns to train on with columns={'prompt': 'your column', 'completion': 'your column'}"
_ANSWER_STARTS = ("### Response:", "### Assistant:", "### Answer:", "ASSISTANT:", "\nAssistant:", "[/INST]")


@lru_cache(maxsize=1024)
def _suspects(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key for key in (*_REJECTED, *_LABELS, *MEDIA) if key in keys)


def refuse_other_job(row: Mapping[str, Any], form: str | None, needed: Sequence[str], number: int) -> None:
    """Raise if a row's columns are those of preference pairs, of classification, or of images, audio or video.

    ``form`` is the format that it would be read as, None if there is none, and ``needed`` are the columns of that.
    """
    suspects = {key: row[key] for key in _suspects(tuple(row)) if not is_empty(row[key])}
    if form is None and not is_empty(row.get("chosen")) and not suspects:
        suspects["chosen"] = row["chosen"]
    if not suspects:
        return
    anyway = f"columns={ {column: column for column in needed} } reads it anyway" if form else ""
    for column, value in suspects.items():
        what = f"row {number}: its column {column!r} is {short_repr(value, 60)}: it looks like "
        if column in _REJECTED or column == "chosen":
            raise DataError(f"{what}half of a preference pair (DPO), not a chat to train on; {_preferred(row, anyway)}")
        if column in MEDIA:
            raise DataError(f"{what}multimodal data, but the models are text-only; remove the row, or {anyway or _MAP}")
        is_flag = isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))
        if form not in (None, "text") and (is_flag or (form == "prompt_completion" and value in (0, 1))):
            good = f"keep the rows that are marked good and remove the column, or {anyway}, good and bad alike"
            raise DataError(f"{what}feedback on an answer (KTO), not a chat to train on; {good}")
        if form == "text":
            raise DataError(f"{what}classification of 'text'; make the label an answer, or {anyway}")


def _preferred(row: Mapping[str, Any], anyway: str) -> str:
    """Return how to train on the preferred answer of a pair alone."""
    chosen = row.get("chosen")
    if anyway:
        return anyway
    if is_empty(chosen):
        return _MAP
    is_turns = not isinstance(chosen, str) or chosen.lstrip().startswith(("[", "{"))
    turns = chosen if isinstance(chosen, Sequence) else [chosen]
    first = turns[0].get("role", turns[0].get("from")) if isinstance(turns[0], Mapping) else None
    starts_with_answer = isinstance(first, str) and ROLES.get(first.lower()) == "assistant"
    question = next((c for c in ("prompt", "question", "query", "input") if not is_empty(row.get(c))), None)
    if is_turns and not starts_with_answer:
        columns = {"messages": "chosen"}
    elif not is_empty(row.get("instruction")):
        columns = {"output": "chosen"}
    elif question == "prompt":
        columns = {"completion": "chosen"}
    elif question is not None:
        columns = {"prompt": question, "completion": "chosen"}
    else:
        return "make a 'prompt' and a 'completion' of 'chosen' to train on the preferred answer"
    return f"columns={columns} trains on the preferred answer alone"


def refuse_media(messages: Sequence[Message], number: int) -> None:
    """Raise if a message holds an image or a sound, or one of the user has a place for it."""
    for message in messages:
        if len(message) > 2 and (key := next((key for key in MEDIA_IN_MESSAGES if key in message), None)):
            raise DataError(
                f"row {number}: a message of role {message['role']!r} has {key!r}: {short_repr(message[key], 60)}; the "
                f"models are text-only: remove the row, or the key"
            )
        content = message["content"]
        if "<" not in content or message["role"] != "user":
            continue
        mark = _MEDIA_MARK.search(content)
        if mark and not (mark[0] == "<image>" and "</image>" in content):  # with its end it is XML
            raise DataError(
                f"row {number}: a user message has {mark[0]!r}, the place of an image or a sound: "
                f"{short_repr(content, 60)}; the models are text-only: remove the row, or the mark"
            )


def advice_about(messages: Sequence[Message]) -> set[str]:
    """Return a sentence for each thing about a chat that is probably not meant."""
    advice = set()
    for message in messages:
        content, role = message["content"], message["role"]
        end = content.rstrip()
        if role == "assistant":
            if end[-1:] == ">" and (found := _at_end(end, _ENDS)) and (found != "</s>" or "<s>" not in end):
                advice.add(  # "<s>20</s>" is HTML
                    f"an answer ends in {found!r}, which is trained as part of the answer, and the template adds its "
                    f"own end of turn: remove it from the rows"
                )
            if content[:2] == "<|" and content.startswith(_ROLE_STARTS):
                advice.add("an answer starts with a role marker, which is trained as text: pass the bare answer")
            continue
        if "<" in content or "[" in content or "#" in content:
            advice.update(
                f"a {role} message has {marker!r}, a marker of a chat template, as text inside this model's own "
                f"template: pass the bare question, or the whole chat as 'text'"
                for marker in _MARKERS
                if marker in content
            )
        if found := _at_end(end, _ANSWER_STARTS):
            advice.add(f"a {role} message ends in {found.strip()!r}, where another template's answer begins")
    return advice


def _at_end(text: str, markers: tuple[str, ...]) -> str | None:
    return next((m for m in markers if text.endswith(m)), None) if text.endswith(markers) else None
