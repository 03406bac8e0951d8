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
(``<|end|>``; ``<|im_end|>`` in Phi-4), which is trained with it. A token is trained if it overlaps a span. The
template's final ``<|endoftext|>`` is not trained, unless ``train_on="all"``.

The tokens of the literals, and bos, eos and pad, are protected: a content that spells one keeps it as text
(``data/tokens.py``), so a chat cannot smuggle in control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..errors import DataError, error_line, require, short_repr
from .findings import Findings
from .formats import Chat, Message
from .tokens import Content, ContentTokenizer, Rendered, one_of
from .tools import ToolStyle, has_tools

_ANSWER = "ANSWER-REWSNA"
_PROMPT = "prompt"  # "train" of a message that is part of a prompt
_PLAIN_KEYS = frozenset(("role", "content", "train"))
_MEANINGFUL = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that change what the model learns: never left out."""


@dataclass(frozen=True, eq=False)
class EncodedChat:
    """A tokenised chat."""

    ids: np.ndarray  # int32 (n,)
    mask: np.ndarray  # whether each token is trained, bool (n,)

    @property
    def input_ids(self) -> list[int]:
        return list(self.ids.tolist())

    @property
    def trained(self) -> list[bool]:
        return list(self.mask.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedChat):
            return NotImplemented
        return np.array_equal(self.ids, other.ids) and np.array_equal(self.mask, other.mask)


@dataclass(frozen=True)
class _Turn:
    start: int  # character after the turn before
    content: int  # first character of the content
    end: int  # character after the end of turn


class ChatEncoder:
    """An encoder of chats: renders them with one tokenizer's template and tokenises them.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        train_on: ``"assistant"`` (every assistant turn), ``"last"`` (the last one) or ``"all"`` (every token).

    Raises:
        DataError: no chat template, a slow tokenizer, a template without end-of-turn token, an unknown ``train_on``.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        allowed = "a tokenizer of transformers, such as load_model returns"
        require(hasattr(tokenizer, "chat_template"), "tokenizer", tokenizer, allowed, DataError)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"the tokenizer {name!r} has no chat_template; use an instruct model's tokenizer")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"the tokenizer {name!r} is not a fast one: character offsets are needed")
        if train_on not in ("assistant", "last", "all"):
            raise DataError(f"train_on={short_repr(train_on)}; allowed: 'assistant', 'last', 'all'")
        self.tokenizer, self.train_on = tokenizer, train_on
        self._added = one_of({str(token) for token in tokenizer.added_tokens_decoder.values()} - {""})
        self._first_token = re.compile(rf"\s*({self._added.pattern})")
        self._literals: dict[object, list[str]] = {}
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
        closing = self._closing(self._apply_template(chat, 0).partition(_ANSWER)[2])
        if closing is None:
            raise DataError(f"the chat template of {name!r} closes an assistant turn with no special token")
        self._end_of_turn = closing.group(1)
        self.end_of_turn_id: int = tokenizer.convert_tokens_to_ids(self._end_of_turn)
        """Token that closes an assistant turn."""

    def encode(
        self, chats: Sequence[Chat], numbers: Sequence[int], findings: Findings | None = None
    ) -> list[EncodedChat]:
        """Tokenise checked chats (see ``formats.to_chat``). ``numbers`` are their rows', for error messages.

        Tokens and keys that were not used as they stand are counted in ``findings``.

        Raises:
            DataError: a chat that the template refuses or does not render in full, or without a supervised token.
        """
        findings = Findings() if findings is None else findings
        rendered = [self._render(chat, number, findings) for chat, number in zip(chats, numbers, strict=True)]
        encoded = []
        for chat, number in zip(self._content_tokenizer.tokenize(rendered), numbers, strict=True):
            ids, mask = chat.input_ids, np.zeros(len(chat.input_ids), dtype=bool)
            for start, stop in chat.trained:
                mask[start:stop] = True
            if not mask.any():
                raise DataError(
                    f"row {number}: no supervised token (train_on={self.train_on!r}, 'train' of its messages)"
                )
            if self.train_on != "all":
                ends = set(ids[[stop - 1 for _, stop in chat.trained]].tolist())
                assert ends == {self.end_of_turn_id}, "a trained turn lost its end-of-turn token"
            encoded.append(EncodedChat(ids, mask))
        return encoded

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Return the tokens from which an answer to ``chat`` is generated: those before the answer in training."""
        (tokenized,) = self._content_tokenizer.tokenize([self._render(chat, 0, Findings(), prompt=True)])
        return list(tokenized.input_ids.tolist())

    def decode(self, ids: Sequence[int]) -> str:
        """Return a generated answer as text, without the template's own tokens and bos, eos, pad and unk.

        Other tokens stay, whether the vocabulary flags them as special or not: an answer reads as a content does, with
        its ``<|tool_call|>`` and ``<think>``.
        """
        text: str = self.tokenizer.decode([i for i in ids if i not in self._hidden_ids], skip_special_tokens=False)
        return text

    @cached_property
    def _hidden_ids(self) -> set[int]:
        hidden = {*self._content_tokenizer.protected, self.tokenizer.unk_token} - {None}
        return {self.tokenizer.convert_tokens_to_ids(token) for token in hidden}

    @cached_property
    def _content_tokenizer(self) -> ContentTokenizer:
        return ContentTokenizer(self.tokenizer, self._protected())

    @cached_property
    def _tool_style(self) -> ToolStyle:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return ToolStyle(self._apply_template, added, self._content_tokenizer.protected)

    def _protected(self) -> set[str]:
        """Return the tokens that only the template may write: its markers and end of turn, and bos, eos and pad.

        A template that brings its own system prompt may mention ``<think>`` and ``</think>`` there. Tokens that come in
        such pairs enclose part of a content, so they are no markers.
        """
        known = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        written = {self._end_of_turn}
        for roles in (("user", "assistant", "user"), ("system", "user", "assistant", "user")):
            chat = [{"role": role, "content": f"CONTENT-{i}-TNETNOC"} for i, role in enumerate(roles)]
            try:
                text = self._apply_template(chat, 0, add_generation_prompt=True)
            except DataError:  # some templates have no system messages
                continue
            written.update(self._added.findall(text))
        markers = {token for token in written if not known & _counterparts(token)}
        always = (self._end_of_turn, self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return markers | {token for token in always if token}

    def _render(self, chat: Chat, number: int, findings: Findings, prompt: bool = False) -> Rendered:
        """Render a chat, and find its contents and its trained spans."""
        if chat.text is not None:
            return self._plain_text(chat.text, number, findings)
        if has_tools(chat):
            chat = self._tool_style.place(chat, number)
        messages, tools = self._for_template(chat, number, findings), chat.tools or None
        text = self._apply_template(messages, number, tools=tools, add_generation_prompt=prompt)
        literals = self._find_literals(messages, tools, number, prompt)
        contents: list[Content] = []
        turns: list[_Turn] = []
        position = turn_start = 0
        for i, message in enumerate(messages):
            start = position + len(literals[i])
            content = self._as_rendered(message["content"], literals[i + 1], text, start)
            if content is None or not text.startswith(literals[i], position):
                raise DataError(
                    f"row {number}: the chat template does not render message {i + 1} as it is; "
                    f"got {text[position : start + 60]!r}"
                )
            position = start + len(content)
            closing = self._closing(literals[i + 1])
            end = position + (closing.end() if closing else 0)
            contents.append(Content(start, position, is_answer=message["role"] == "assistant"))
            turns.append(_Turn(turn_start, start, end))
            turn_start = end
            self._count_tokens(content, number, findings)
        if prompt:
            return Rendered(text, contents, [])
        findings.unanswered_last_turns += self.train_on != "all" and messages[-1]["role"] != "assistant"
        return Rendered(text, contents, self._trained_spans(messages, turns, text))

    def _as_rendered(self, content: str, after: str, text: str, start: int) -> str | None:
        """Return the content that ``text`` has from ``start`` up to ``after``: a template may strip white space."""
        for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(candidate, start) and text.startswith(after, start + len(candidate)):
                return candidate
        return None

    def _trained_spans(self, messages: Sequence[Message], turns: Sequence[_Turn], text: str) -> list[tuple[int, int]]:
        """Return the characters that are trained. A message that says ``"train": False`` never is."""
        if self.train_on == "all":
            edges = [0]
            for turn, message in zip(turns, messages, strict=True):
                if message.get("train") is False:  # with the line end after it, which its marker may absorb
                    after = text[turn.end :]
                    edges += [turn.start, turn.end + len(after) - len(after.lstrip())]
            spans = zip(edges[::2], [*edges[1::2], len(text)], strict=True)
            return [(start, stop) for start, stop in spans if start < stop]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") != _PROMPT]
        chosen = answers[-1:] if self.train_on == "last" else answers
        return [(turns[i].content, turns[i].end) for i in chosen if messages[i].get("train", True)]

    def _plain_text(self, text: str, number: int, findings: Findings) -> Rendered:
        """Lay out a text of continued pretraining: bos if the tokenizer puts one in front of texts, text, eos."""
        if self.train_on != "all":
            raise DataError(
                f"row {number}: 'text' is not a chat in the family's markers: {short_repr(text, 60)}; allowed: "
                f"'<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>' (or Phi-4's <|im_start|> form), "
                f"or train_on='all' to train plain text"
            )
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token or self._end_of_turn
        has_bos = bos is not None and self.tokenizer("a")["input_ids"][0] == bos
        start = len(self.tokenizer.bos_token) if has_bos else 0
        self._count_tokens(text, number, findings)
        whole = (self.tokenizer.bos_token if has_bos else "") + text + eos
        return Rendered(whole, [Content(start, start + len(text), is_answer=True)], [(0, len(whole))])

    def _count_tokens(self, content: str, number: int, findings: Findings) -> None:
        for token in self._added.findall(content):
            is_protected = token in self._content_tokenizer.protected
            spelling = self._content_tokenizer.respelled.get(token)
            if spelling is not None and not is_protected:
                raise DataError(
                    f"row {number}: a content has the added token {token!r}, which this tokenizer's normaliser made "
                    f"{spelling!r}, so its text would change; add it as AddedToken({token!r}, normalized=False)"
                )
            (findings.kept_as_text if is_protected else findings.added_tokens)[token] += 1

    def _for_template(self, chat: Chat, number: int, findings: Findings) -> list[Message]:
        """Return the messages as the template takes them: with no key beside the content that it does not render.

        Such a key is refused if it bears meaning, and counted if not. What an assistant's other keys become is made
        part of its content.
        """
        tools = chat.tools or None
        messages = [
            {**m, "train": _PROMPT} if i < chat.prompt_messages and m.get("train", True) else m
            for i, m in enumerate(chat.messages)
        ]
        if messages and _is_empty_system(messages[0]):
            rest = messages[1:]
            if self._render_alike(messages, rest, tools, number):  # Phi-3.5 leaves out an empty one
                messages = rest
        if all(m.keys() <= _PLAIN_KEYS for m in messages):
            return messages
        for i, message in enumerate(messages):
            for key in sorted(message.keys() - _PLAIN_KEYS):
                rest = [*messages]
                rest[i] = {name: value for name, value in messages[i].items() if name != key}
                if self._may_render(key) and not self._render_alike(messages, rest, tools, number):
                    continue
                if key in _MEANINGFUL:
                    raise DataError(
                        f"row {number}: the chat template does not render {key!r} of message {i + 1} (role "
                        f"{message['role']!r}); allowed: a template that does, or plain text in the content"
                    )
                findings.unused[f"messages.{key}"] += 1
                messages = rest
            if message["role"] == "assistant" and not messages[i].keys() <= _PLAIN_KEYS:
                messages = self._fold(messages, i, tools, number)
        return messages

    def _fold(self, messages: list[Message], i: int, tools: Any, number: int) -> list[Message]:
        """Replace an assistant message with other keys by one whose content is what the template makes of them."""
        before = self._apply_template(messages[:i], number, tools=tools, add_generation_prompt=True)
        text = self._apply_template(messages[: i + 1], number, tools=tools)
        end = text.find(self._end_of_turn, len(before))
        folded: Message = {"role": "assistant", "content": text[len(before) : end]}
        if "train" in messages[i]:
            folded["train"] = messages[i]["train"]
        replaced = [*messages[:i], folded, *messages[i + 1 :]]
        is_same = end >= 0 and self._apply_template(replaced[: i + 1], number, tools=tools) == text
        if not text.startswith(before) or not is_same:
            keys = ", ".join(sorted(messages[i].keys() - _PLAIN_KEYS))
            raise DataError(
                f"row {number}: the chat template renders message {i + 1} ({keys}) in a way that cannot be masked; "
                f"allowed: plain text in its content"
            )
        return replaced

    def _may_render(self, key: str) -> bool:
        """Return False if the template surely never reads a key of a message."""
        return key in self._template_words or not self._template_words.isdisjoint(("items", "tojson", "values"))

    @cached_property
    def _template_words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", str(self.tokenizer.chat_template)))

    def _render_alike(self, one: list[Message], other: list[Message], tools: Any, number: int) -> bool:
        """Return whether two chats give the same text."""
        text = self._apply_template(one, number, tools=tools)
        try:
            return text == self._apply_template(other, number, tools=tools)
        except DataError:  # the template needs what the other lacks
            return False

    def _apply_template(self, messages: Sequence[Message], number: int, **options: Any) -> str:
        plain = [{key: value for key, value in m.items() if key != "train"} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(plain, tokenize=False, **options)
            return text
        except Exception as error:  # a template is a program by the model's author: it may raise anything
            what = str(error) if isinstance(error, TemplateError) else error_line(error)
            row = f"row {number}: the" if number else "with a plain question and answer, the"
            raise DataError(f"{row} chat template refuses the chat: {what}") from error

    def _closing(self, literal: str) -> re.Match[str] | None:
        """Match the special token that ``literal`` begins with, after optional white space."""
        return self._first_token.match(literal)

    def _find_literals(self, messages: Sequence[Message], tools: Any, number: int, prompt: bool) -> list[str]:
        """Return the template's own text around the contents, len(messages) + 1 pieces.

        Messages of the same roles have the same literals, unless the template renders other keys of theirs.
        """
        roles = tuple(m["role"] for m in messages)
        is_plain = tools is None and all(m.keys() <= _PLAIN_KEYS for m in messages)
        if is_plain and (roles, prompt) in self._literals:
            return self._literals[roles, prompt]
        chat = [{**m, "content": f"CONTENT-{i}-TNETNOC"} for i, m in enumerate(messages)]
        text = self._apply_template(chat, number, tools=tools, add_generation_prompt=prompt)
        literals, position = [], 0
        for i, message in enumerate(chat):
            start = text.find(message["content"], position)
            if start < 0:
                raise DataError(
                    f"row {number}: message {i + 1}: the chat template does not render the role {message['role']!r}; "
                    f"write its content into a message of the user, or use a tokenizer whose template renders the role"
                )
            is_answer = message["role"] == "assistant" and not prompt
            if (
                is_answer
                and self._apply_template(chat[:i], number, tools=tools, add_generation_prompt=True) != text[:start]
            ):
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
        if is_plain:
            self._literals[roles, prompt] = literals
        return literals


def _is_empty_system(message: Message) -> bool:
    return message["role"] == "system" and message["content"] == "" and message.keys() <= _PLAIN_KEYS


def _counterparts(token: str) -> set[str]:
    """Return the tokens that would close or open what a token opens or closes: ``</think>`` for ``<think>``."""
    spellings = {token.replace("<|", "<|/", 1), token.replace("<", "</", 1), token.replace("/", "", 1)}
    return spellings - {token}
