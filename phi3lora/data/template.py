"""A chat -> token ids and, for each token, whether it is trained.

Masks go by span, never by token id. Phi-3's padding token is its ``<|endoftext|>``. A mask that hides a token by id
hides it where it ends a turn too, and the model never learns to stop. The spans come from the chat template itself:
rendering the same roles with placeholders for contents gives the template's own text, the literals.

    literals   "<|user|>\n"      "<|end|>\n<|assistant|>\n"          "<|end|>\n<|endoftext|>"
    contents                 Hi                               Hello!
    full       <|user|>\n    Hi  <|end|>\n<|assistant|>\n    Hello!  <|end|>\n<|endoftext|>
    trained                                                  ^^^^^^^^^^^^^

Three conditions are checked. ``full``, the rendered chat, alternates between literals and contents. The text before
an assistant's content is the prompt that generation starts from. A special token follows the content: the end of turn
(``<|end|>``; ``<|im_end|>`` in Phi-4), which is trained with it. ``full`` is tokenised once, with offsets. A token is
trained if it starts inside a span. The template's final ``<|endoftext|>`` is not trained.

A content that spells a special token (``"<|end|>"``) is escaped: it is tokenised by itself, with special tokens
switched off, and becomes ordinary tokens. A chat cannot smuggle in control tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError, error_line, short_repr
from .findings import Findings
from .formats import Chat, Message


@dataclass(frozen=True)
class EncodedChat:
    """A tokenised chat."""

    input_ids: Sequence[int]  # (n,)
    trained: Sequence[bool]  # (n,)


@dataclass(frozen=True)
class _Rendered:
    text: str
    spans: list[tuple[int, int]]  # characters that are trained
    escaped: list[tuple[int, int]]  # characters of contents that spell control tokens


class ChatEncoder:
    """An encoder of chats: renders them with one tokenizer's template and tokenises them.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        train_on: ``"assistant"`` (every assistant turn), ``"last"`` (the last one) or ``"all"`` (every token).

    Raises:
        DataError: no chat template, a slow tokenizer, a template without end-of-turn token, an unknown ``train_on``.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"the tokenizer {name!r} has no chat_template; use an instruct model's tokenizer")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"the tokenizer {name!r} is not a fast one: character offsets are needed")
        if train_on not in ("assistant", "last", "all"):
            raise DataError(f"train_on={short_repr(train_on)}; allowed: 'assistant', 'last', 'all'")
        self.tokenizer, self.train_on = tokenizer, train_on
        added = tokenizer.added_tokens_decoder.values()
        special = sorted({str(token) for token in added} - {""}, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        # An added token that is not flagged as special cannot be switched off, so text that spells it is cut in two.
        not_special = [str(token) for token in added if not token.special]
        self._not_special = re.compile("|".join(map(re.escape, not_special)) or r"(?!)")
        self._literals: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER-REWSNA"}]
        closing = self._closing(self._apply_template(chat, 0).partition("ANSWER-REWSNA")[2])
        if closing is None:
            raise DataError(f"the chat template of {name!r} closes an assistant turn with no special token")
        self._end_of_turn = closing.group(1)
        self.end_of_turn_id: int = tokenizer.convert_tokens_to_ids(self._end_of_turn)
        """Token that closes an assistant turn."""

    def encode(
        self, chats: Sequence[Chat], numbers: Sequence[int], findings: Findings | None = None
    ) -> list[EncodedChat]:
        """Tokenise checked chats (see ``formats.to_chat``). ``numbers`` are their rows', for error messages.

        Raises:
            DataError: a chat that the template refuses or does not render in full, or without a supervised token.
        """
        rendered = [self._render(chat.messages, number) for chat, number in zip(chats, numbers, strict=True)]
        encoded = []
        for (ids, starts), chat, number in zip(self._tokenize(rendered), rendered, numbers, strict=True):
            edges = [edge for span in chat.spans for edge in span]
            trained = [bisect_right(edges, start) % 2 == 1 for start in starts]
            if not any(trained):
                raise DataError(
                    f"row {number}: no supervised token (train_on={self.train_on!r}, 'train' of its messages)"
                )
            if self.train_on != "all":
                after = [*trained[1:], False]
                ends = {ids[i] for i in range(len(ids)) if trained[i] and not after[i]}
                assert ends == {self.end_of_turn_id}, "a trained turn lost its end-of-turn token"
            encoded.append(EncodedChat(ids, trained))
        return encoded

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from which an answer to ``messages`` is generated: those before the answer in training."""
        ((ids, _),) = self._tokenize([self._render(messages, 0, prompt=True)])
        return ids

    def _tokenize(self, rendered: Sequence[_Rendered]) -> list[tuple[list[int], list[int]]]:
        """Return token ids of each chat, and the character at which each token starts.

        An escaped stretch is tokenised by itself, as ordinary text.
        """
        pieces: tuple[list[str], list[str]] = ([], [])  # texts with control tokens, escaped texts
        order = []  # (chat, first character, index into pieces, index into that list)
        for i, chat in enumerate(rendered):
            edges = [0, *(edge for stretch in chat.escaped for edge in stretch), len(chat.text)]
            for k, (start, stop) in enumerate(pairwise(edges)):
                if start < stop:
                    order.append((i, start, k % 2, len(pieces[k % 2])))
                    pieces[k % 2].append(chat.text[start:stop])
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        tokens = [self._ids(pieces[0], **options), {"input_ids": [], "offset_mapping": []}]
        if pieces[1]:
            tokens[1] = self._ids(pieces[1], split_special_tokens=True, **options)
        result: list[tuple[list[int], list[int]]] = [([], []) for _ in rendered]
        for i, shift, kind, place in order:
            result[i][0].extend(tokens[kind]["input_ids"][place])
            result[i][1].extend(shift + start for start, _ in tokens[kind]["offset_mapping"][place])
        return result

    def _ids(self, texts: list[str], **options: Any) -> Any:
        try:
            return self.tokenizer(texts, **options)
        except Exception as error:  # tokenizers raises this very class; transformers raises any, for odd settings
            raise DataError(
                f"the tokenizer cannot encode a chat: {error_line(error)}; is its folder damaged?"
            ) from error

    def _render(self, messages: Sequence[Message], number: int, prompt: bool = False) -> _Rendered:
        """Render a chat, and find its trained and its escaped characters."""
        plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        text = self._apply_template(plain, number, add_generation_prompt=prompt)
        literals = self._find_literals(tuple(m["role"] for m in messages), number, prompt)
        trained = set() if prompt else self._trained_turns(messages)
        spans: list[tuple[int, int]] = []
        escaped: list[tuple[int, int]] = []
        position = turn_start = 0
        for i, message in enumerate(messages):
            start = position + len(literals[i])
            given = message["content"]  # a template may strip white space at its ends
            candidates = (given, given.strip(), given.rstrip(), given.lstrip())
            content = next((c for c in candidates if text.startswith(c + literals[i + 1], start)), None)
            if content is None or not text.startswith(literals[i], position):
                raise DataError(
                    f"row {number}: the chat template does not render message {i + 1} as it is; "
                    f"got {text[position : start + 60]!r}"
                )
            position = start + len(content)
            closing = self._closing(literals[i + 1])
            end = position + (closing.end() if closing else 0)
            if i in trained:
                spans.append((turn_start if self.train_on == "all" else start, end))
            if self._special.search(content):
                # Leading white space is not escaped: the marker before it may absorb it.
                first = start + len(content) - len(content.lstrip())
                cuts = [start + found.start() + 1 for found in self._not_special.finditer(content)]
                escaped += pairwise([first, *cuts, position])
            turn_start = end
        return _Rendered(text, spans, escaped)

    def _trained_turns(self, messages: Sequence[Message]) -> set[int]:
        """Return the indices of the messages that are trained."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.train_on == "last":
            turns = turns[-1:]
        elif self.train_on == "all":
            turns = list(range(turns[-1] + 1))
        return {i for i in turns if messages[i].get("train", True)}

    def _apply_template(self, messages: Iterable[Message], number: int, **options: Any) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            return text
        except Exception as error:  # a template is a program by the model's author: it may raise anything
            what = str(error) if isinstance(error, TemplateError) else error_line(error)
            raise DataError(f"row {number}: the chat template refuses the chat: {what}") from error

    def _closing(self, literal: str) -> re.Match[str] | None:
        """Match the special token that ``literal`` begins with, after optional white space."""
        return re.match(rf"\s*({self._special.pattern})", literal)

    def _find_literals(self, roles: tuple[str, ...], number: int, prompt: bool = False) -> list[str]:
        """Return the template's own text around the contents, len(roles) + 1 pieces. Checked once per roles."""
        if (roles, prompt) in self._literals:
            return self._literals[roles, prompt]
        chat = [{"role": role, "content": f"CONTENT-{i}-TNETNOC"} for i, role in enumerate(roles)]
        text = self._apply_template(chat, number, add_generation_prompt=prompt)
        literals, position = [], 0
        for i, message in enumerate(chat):
            start = text.find(message["content"], position)
            if start < 0:
                raise DataError(f"row {number}: the chat template does not render the role {message['role']!r}")
            is_answer = message["role"] == "assistant" and not prompt
            if is_answer and self._apply_template(chat[:i], number, add_generation_prompt=True) != text[:start]:
                raise DataError(
                    f"row {number}: the chat template renders the turns before message {i + 1} differently when "
                    f"generating and when complete, so no mask can be right; use the model's own template"
                )
            literals.append(text[position:start])
            position = start + len(message["content"])
        literals.append(text[position:])
        for i, role in enumerate(roles):
            closing = self._closing(literals[i + 1])
            found = None if closing is None else closing.group(1)
            if role == "assistant" and not prompt and found != self._end_of_turn:
                raise DataError(
                    f"row {number}: the chat template closes message {i + 1} with {found!r} and another assistant turn "
                    f"with {self._end_of_turn!r}; allowed: one end-of-turn token for all"
                )
        self._literals[roles, prompt] = literals
        return literals
