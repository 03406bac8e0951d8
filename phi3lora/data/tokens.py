r"""Rendered chats -> token ids, with every content kept to the letter.

A chat that is rendered is text of the template's and text of contents by turns. Tokenised as a whole, three things go
wrong with contents, and none of them raises an error:

    <|assistant|>\n | Say <|end|> twice | <|end|>\n      a content spells a control token, and becomes one
    <|assistant|>\n |   indented        | <|end|>\n      Phi-3's markers strip the white space to their right
    <|assistant|>\n | Was <s>20</s> 15  | <|end|>\n      so does its </s>, an ordinary added token, inside a content

So a chat with such a content is cut into *runs* of ordinary text and added tokens. Only the template's text may
contain the *protected* tokens: its own markers, and bos, eos and pad. In a content they are ordinary text. The
vocabulary's other added tokens (``<|tool_call|>``, ``<think>``, a user's ``<loc>``) are one id each in a content too,
as serving engines tokenise them, and take no white space with them. Runs are tokenised by the same model without its
added tokens. All other chats, nearly all, are tokenised as a whole.

SentencePiece tables (Phi-3's) write a space as U+2581 and put one in front of some texts; their decoder drops one at
the start. A run after a marker gets that space where the whole text has it, and an answer that starts with a space
gets one more, so that decoding the trained tokens gives the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from ..errors import DataError, error_line

_SPACE_SIGN = "\u2581"
# Unicode's White_Space, which markers strip; Python's str.isspace() has four characters more.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
_EMPTY_BPE = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass(frozen=True)
class Content:
    """A content's place in a rendered chat: characters ``start`` to ``stop``."""

    start: int
    stop: int
    is_answer: bool
    """True for an assistant's content: it keeps the white space at its ends, which a marker may strip from others."""


@dataclass(frozen=True)
class Rendered:
    """A rendered chat."""

    text: str
    contents: Sequence[Content]
    """In order."""
    trained: Sequence[tuple[int, int]]
    """Spans of characters, in order."""


@dataclass(frozen=True)
class Tokenized:
    """Token ids (n,), and the spans of tokens that overlap the trained characters."""

    input_ids: Sequence[int]
    trained: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class _Piece:
    """A run of ordinary text, or an added token: then with ``ids``."""

    start: int
    stop: int
    ids: Sequence[int] = ()
    token: str = ""
    is_template: bool = True
    prefix: str = ""  # tokenised in front of a run


class ContentTokenizer:
    """A tokenizer for rendered chats. ``protected`` holds the added tokens that no content may contain."""

    def __init__(self, tokenizer: Any, protected: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        added = {str(token): (i, token) for i, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self._flags = {text: token for text, (_, token) in added.items()}
        self._ids = {text: [i] for text, (i, _) in added.items()}
        self.protected = frozenset(protected) & added.keys()
        spelled = tokenizer.convert_ids_to_tokens([i for i, _ in added.values()])
        self.respelled = {text: spelling for text, spelling in zip(added, spelled, strict=True) if spelling != text}
        """Added tokens that the table's normaliser changes: Phi-3's may put a space into ``add_tokens(["<loc>"])``."""
        self._ordinary = _without_added_tokens(tokenizer.backend_tokenizer)
        if not self._keeps(f"a{_SPACE_SIGN}"):  # read as a space; its bytes are not
            ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in _SPACE_SIGN.encode()])
            if None not in ids:
                self._ids[_SPACE_SIGN] = ids
        self._pattern = one_of(self._ids)
        self._drops_space = not self._keeps(" a")
        flags = [self._flags[token] for token in self.protected]
        self._odd_start = self._drops_space or any(token.rstrip for token in flags)
        self._odd_end = any(token.lstrip for token in flags)
        self._prefix_at_start = self._prefix_after("")
        self._prefix_after_marker = self._prefix_after(min(self.protected, default=""))

    def tokenize(self, chats: Sequence[Rendered]) -> list[Tokenized]:
        is_odd = [any(self._is_odd(chat.text, content) for content in chat.contents) for chat in chats]
        whole = self._tokenize_whole([chat for chat, odd in zip(chats, is_odd, strict=True) if not odd])
        in_pieces = self._tokenize_in_pieces([chat for chat, odd in zip(chats, is_odd, strict=True) if odd])
        return [next(in_pieces if odd else whole) for odd in is_odd]

    def _is_odd(self, text: str, content: Content) -> bool:
        """Return whether a content would change if its chat were tokenised as a whole."""
        if self._pattern.search(text, content.start, content.stop):
            return True
        if not content.is_answer or content.start == content.stop:
            return False
        at_start = self._odd_start and text[content.start] in _WHITE_SPACE
        return at_start or (self._odd_end and text[content.stop - 1] in _WHITE_SPACE)

    def _tokenize_whole(self, chats: Sequence[Rendered]) -> Iterator[Tokenized]:
        for chat, encoding in zip(chats, self._encode([chat.text for chat in chats]), strict=True):
            spans = [_token_span(encoding.char_to_token, *span) for span in chat.trained]
            yield Tokenized(encoding.ids, spans)

    def _encode(self, texts: list[str]) -> list[Any]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()  # what the tokenizer's last call has set
        backend.no_truncation()
        backend.encode_special_tokens = False
        return _encode_batch(backend, texts)

    def _tokenize_in_pieces(self, chats: Sequence[Rendered]) -> Iterator[Tokenized]:
        cut = [self._cut(chat.text, chat.contents) for chat in chats]
        runs = [
            piece.prefix + chat.text[piece.start : piece.stop]
            for chat, pieces in zip(chats, cut, strict=True)
            for piece in pieces
            if not piece.ids
        ]
        encodings = iter(_encode_batch(self._ordinary, runs))
        for chat, pieces in zip(chats, cut, strict=True):
            ids: list[int] = []
            token_at: dict[int, int] = {}  # character -> the first token that stands for it
            for piece in pieces:
                if piece.ids:
                    tokens = [(i, piece.start, piece.stop) for i in piece.ids]
                else:
                    encoding, shift = next(encodings), piece.start - len(piece.prefix)
                    tokens = [  # a space in front stands for the first character
                        (i, max(piece.start, start + shift), max(piece.start + 1, stop + shift))
                        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
                    ]
                for i, start, stop in tokens:
                    for character in range(start, stop):
                        token_at.setdefault(character, len(ids))
                    ids.append(i)
            yield Tokenized(ids, [_token_span(token_at.get, *span) for span in chat.trained])

    def _cut(self, text: str, contents: Sequence[Content]) -> list[_Piece]:
        """Cut a chat into added tokens and the runs of ordinary text between them."""
        answers = [content for content in contents if content.is_answer]
        pieces: list[_Piece] = []
        left: _Piece | None = None
        for right in [*self._added_tokens(text, contents), None]:
            run = self._run_between(text, answers, left, right)
            pieces += [piece for piece in (run, right) if piece is not None]
            left = right
        return pieces

    def _added_tokens(self, text: str, contents: Sequence[Content]) -> Iterator[_Piece]:
        """Find the added tokens of the template's text, and those of contents that are not protected."""
        edges = [0, *(edge for content in contents for edge in (content.start, content.stop)), len(text)]
        for k in range(len(edges) - 1):
            is_template = k % 2 == 0
            for found in self._pattern.finditer(text, edges[k], edges[k + 1]):
                token = found.group()
                if is_template or token not in self.protected:
                    yield _Piece(found.start(), found.end(), self._ids[token], token, is_template)

    def _run_between(
        self, text: str, answers: Sequence[Content], left: _Piece | None, right: _Piece | None
    ) -> _Piece | None:
        """Return the run of ordinary text between two added tokens, without the white space that they strip."""
        start, stop = left.stop if left else 0, right.start if right else len(text)
        inside = [answer for answer in answers if start < answer.stop and answer.start < stop]
        if left and left.is_template and self._strips(left, "rstrip"):
            limit = inside[0].start if inside else stop
            while start < limit and text[start] in _WHITE_SPACE:
                start += 1
        if right and right.is_template and self._strips(right, "lstrip"):
            limit = inside[-1].stop if inside else start
            while limit < stop and text[stop - 1] in _WHITE_SPACE:
                stop -= 1
        if start >= stop:
            return None
        if left is None:
            prefix = self._prefix_at_start
        elif not left.is_template:
            prefix = ""
        else:
            starts_answer = bool(inside) and start == inside[0].start
            needs_space = self._drops_space and starts_answer and text[start] == " "
            prefix = " " if needs_space else self._prefix_after_marker
        return _Piece(start, stop, prefix=prefix)

    def _strips(self, piece: _Piece, side: str) -> bool:
        return piece.token in self._flags and bool(getattr(self._flags[piece.token], side))

    def _keeps(self, text: str) -> bool:
        ids = _encode_batch(self._ordinary, [text])[0].ids
        return bool(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text)

    def _prefix_after(self, marker: str) -> str:
        """Return the space that the tokenizer puts in front of text after a marker, or ``""``."""
        ids = self._encode([marker + "a"])[0].ids[bool(marker) :]
        return " " if ids == _encode_batch(self._ordinary, [" a"])[0].ids else ""


def _encode_batch(backend: Any, texts: list[str]) -> list[Any]:
    try:
        encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # tokenizers raises this very class
        what = f"the tokenizer cannot encode a chat: {error_line(error)}; is its folder damaged?"
        raise DataError(what) from error
    return encodings


def _token_span(token_at: Callable[[int], int | None], start: int, stop: int) -> tuple[int, int]:
    """Return the tokens from the first that reaches into the characters to the one that ends them.

    The last character is the end of turn's, or another added token's: one token stands for it.
    """
    first = next((token for token in map(token_at, range(start, stop)) if token is not None), None)
    last = next((token for token in map(token_at, range(stop - 1, start - 1, -1)) if token is not None), None)
    return (0, 0) if first is None or last is None else (first, last + 1)


def one_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest where several begin; nothing if there are none."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _without_added_tokens(backend: Any) -> Tokenizer:
    """Return a tokenizer with the same model that knows no added token and puts no space in front of a text."""
    try:
        parts = [json.loads(c.__getstate__()) if c else None for c in (backend.normalizer, backend.pre_tokenizer)]
    except Exception as error:  # tokenizers raises this very class for a component written in Python
        raise DataError(f"the tokenizer has a component that cannot be read: {error_line(error)}") from error
    normalizer, pre_tokenizer = map(_without_prefix, parts)
    state = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    rest = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    tokenizer = Tokenizer.from_str(json.dumps({**state, **rest, "model": _EMPTY_BPE}))
    tokenizer.model = backend.model
    return tokenizer


def _without_prefix(component: Any) -> Any:
    """Return the state of a normalizer or pre-tokenizer without the part that puts a space in front of a text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "ByteLevel":
        return {**component, "add_prefix_space": False}
    if component["type"] == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        return {**component, key: [part for part in map(_without_prefix, component[key]) if part]}
    return component
