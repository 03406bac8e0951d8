r"""Text in the markers of Phi-3's or Phi-4's template -> messages; also a prompt that is templated already.

    <|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>
    <|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>

A content is what stands between its markers, to the letter. What the markers' own style adds is no content: one line
end after a role marker, if each turn of the text has one, and white space at the end of a turn whose end is not marked.
"""

from __future__ import annotations

import re

from ..errors import DataError
from .turns import Message, read_turns

_ROLE_MARKER = re.compile(r"\s*(?:<s>)?\s*(?:<\|(?:system|user|assistant|tool)\|>|<\|im_start\|>)")
_PHI3_TURN = re.compile(
    r"<\|(system|user|assistant|tool)\|>(.*?)(?:(<\|end\|>)|(?=<\|(?:system|user|assistant)\|>)|\Z)", re.S
)
_PHI4_TURN = re.compile(r"<\|im_start\|>(\w+)<\|im_sep\|>(.*?)(?:(<\|im_end\|>)|(?=<\|im_start\|>)|\Z)", re.S)
_LINE_END = re.compile(r"\r?\n")
_SYSTEM_TOOLS = re.compile(r"(.*)<\|tool\|>(.*)<\|/tool\|>\s*", re.S)  # Phi-4-mini's, inside the system turn
_END_OF = {"<|assistant|>": "<|end|>", "<|im_start|>assistant<|im_sep|>": "<|im_end|>"}  # by assistant marker
_ASSISTANT, _ENDS = tuple(_END_OF), tuple(_END_OF.values())
_EOS = "<|endoftext|>"


def starts_with_role(text: str) -> bool:
    """Return whether a text starts with a role marker, so that it is a chat."""
    return _ROLE_MARKER.match(text) is not None


def read_marked_text(text: str, number: int) -> list[Message]:
    """Return the messages of a text that is a chat as a whole.

    Raises:
        DataError: there are words outside the turns, or the last turn is the start of an answer.
    """
    messages, _ = _messages(text, number, "'text'")
    if _bare(text).endswith(_ASSISTANT):
        raise DataError(f"row {number}: 'text' ends where an answer begins: {text[-60:]!r}; allowed: a whole chat")
    return messages


def is_templated(prompt: str) -> bool:
    """Return whether a prompt ends with the template's own markers: where an answer begins, or where a turn ends."""
    end = prompt.rstrip()
    return end[-2:] == "|>" and (
        end.endswith(_ASSISTANT) or (end.endswith((*_ENDS, _EOS)) and starts_with_role(prompt))
    )


def read_templated(prompt: str, answer: str, number: int) -> tuple[list[Message], int]:
    """Return the messages of a templated prompt and its answer, and how many of them are the prompt's.

    Raises:
        DataError: the two together are no whole chat; rendered once more they would have the markers twice.
    """
    end = prompt.rstrip()
    marker = next((m for m in _ASSISTANT if end.endswith(m)), None)
    head = end.removesuffix(marker) if marker else prompt
    space = prompt[len(end) :] if marker else ""  # after the marker: the template's own
    messages, style = _messages(head, number, "a prompt with the template's markers")
    if marker is None:
        marker = _ASSISTANT[1 if "<|im_start|>" in prompt else 0]
        answer = answer.lstrip().removeprefix(marker)
    body = answer.rstrip()
    if not body.removesuffix(_EOS).rstrip().endswith(_END_OF[marker]):
        answer = (body.removesuffix(_EOS) if body.endswith(_EOS) else answer) + _END_OF[marker]
    if style and (space or not _LINE_END.match(answer)):
        marker += "\n"  # like the other markers, so that the answer's own line end is not cut
    answers, _ = _messages(marker + answer, number, "an answer with the template's markers", style)
    return messages + answers, len(messages)


def _bare(text: str) -> str:
    return text.strip().removeprefix("<s>").removesuffix(_EOS).strip()


def _messages(text: str, number: int, what: str, cut_line_end: bool | None = None) -> tuple[list[Message], bool]:
    """Return the messages of a text, and whether a line end was cut after each role marker.

    ``cut_line_end`` None: if each turn has one.
    """
    bare = _bare(text)
    turn = _PHI4_TURN if "<|im_start|>" in bare else _PHI3_TURN
    found = [(m[1], m[2] if m[3] else m[2].rstrip()) for m in turn.finditer(bare)]
    if not found or turn.sub("", bare).strip():
        raise DataError(
            f"row {number}: {what} is not a chat in Phi-3's markers: {text[:60]!r}; allowed: "
            f"'<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>' (or Phi-4's <|im_start|> form), no text outside"
        )
    if cut_line_end is None:
        cut_line_end = all(_LINE_END.match(content) for _, content in found if content)
    turns = []
    for role, content in found:
        turn_content = _LINE_END.sub("", content, count=1) if cut_line_end and _LINE_END.match(content) else content
        tools = _SYSTEM_TOOLS.fullmatch(turn_content) if role == "system" else None
        turns.append({"role": role, "content": tools[1] if tools else turn_content, "tools": tools and tools[2]})
    return read_turns(turns, number, "text"), cut_line_end
