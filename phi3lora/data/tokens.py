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
added tokens.

Words recur, so the runs of most tokenizers are cut further, before each space that follows another character, and each
word is tokenised once. The tokens of a batch are then looked up with numpy, which is several times faster than
tokenising the texts:

    run      "So it is, so it is"
    words    "So" " it" " is," " so" " it" " is"      five are tokenised, " it" is looked up
    numbers  0    1     2      3     1     4

:func:`_cuts_at_spaces` says of which tokenizers this is true. With another one, chats are tokenised as a whole, except
those with a content as above.

SentencePiece tables (Phi-3's) write a space as U+2581 and put one in front of some texts; their decoder drops one at
the start. A run after a marker gets that space where the whole text has it, and an answer that starts with a space
gets one more, so that decoding the trained tokens gives the answer.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from ..errors import DataError, error_line

_SPACE_SIGN = "\u2581"
# Unicode's White_Space, which markers strip; Python's str.isspace() has four characters more.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
_SPACE_TO_SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_SIGN}
_EMPTY_BPE = {"type": "BPE", "vocab": {}, "merges": []}
_WORD = re.compile(r"\s*\S+(?:[^\S ]\s*\S+)*(?:[^\S ]\s*)?|\s+")
"""A text up to the next space that follows a character other than white space."""
_JOINED = 64  # words tokenised by one call, which takes longer than any of them
_REMEMBERED = 2**18  # words, some 100 bytes each
# Patterns of pre-tokenizers that begin a piece at each such space, because no alternative has a space behind another
# character: cl100k (Phi-4), o200k (Phi-4-mini) and that of the demo's tokenizer.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_KNOWN_SPLITS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?\p{L}+| ?[^\s\p{L}]+|\s",
}


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
    """Token ids int32 (n,), and the spans of tokens that overlap the trained characters."""

    input_ids: np.ndarray
    trained: Sequence[tuple[int, int]]


class _Added(NamedTuple):
    """An added token's place in a rendered chat."""

    start: int
    stop: int
    token: str
    is_template: bool
    """True in the template's own text."""


_Piece = tuple[int, int, str, str]
"""Characters start to stop; the added token there, or "" for a run; what is tokenised in front of a run."""


class ContentTokenizer:
    """A tokenizer for rendered chats. ``protected`` holds the added tokens that no content may contain."""

    def __init__(self, tokenizer: Any, protected: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        added = {str(token): (i, token) for i, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self._strip_left = {text for text, (_, token) in added.items() if token.lstrip}
        self._strip_right = {text for text, (_, token) in added.items() if token.rstrip}
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
        self._cuts_at_spaces = _cuts_at_spaces(self._ordinary)
        self._words = _Words(self._ordinary, self._ids, self._cuts_at_spaces)
        self._in_literal: dict[str, list[tuple[int, int, str]]] = {}  # added tokens of a text of the template's
        self._odd_start = self._drops_space or not self.protected.isdisjoint(self._strip_right)
        self._odd_end = not self.protected.isdisjoint(self._strip_left)
        self._prefix_at_start = self._prefix_after("")
        self._prefix_after_marker = self._prefix_after(min(self.protected, default=""))

    def tokenize(self, chats: Sequence[Rendered]) -> list[Tokenized]:
        in_pieces = [self._cuts_at_spaces or self._is_odd(chat) for chat in chats]
        whole = self._tokenize_whole([chat for chat, cut in zip(chats, in_pieces, strict=True) if not cut])
        pieces = self._tokenize_in_pieces([chat for chat, cut in zip(chats, in_pieces, strict=True) if cut])
        return [next(pieces if cut else whole) for cut in in_pieces]

    def _is_odd(self, chat: Rendered) -> bool:
        """Return whether a content would change if its chat were tokenised as a whole."""
        for content in chat.contents:
            if self._pattern.search(chat.text, content.start, content.stop):
                return True
            if content.is_answer and content.start < content.stop:
                ends = chat.text[content.start], chat.text[content.stop - 1]
                if (self._odd_start and ends[0] in _WHITE_SPACE) or (self._odd_end and ends[1] in _WHITE_SPACE):
                    return True
        return False

    def _tokenize_whole(self, chats: Sequence[Rendered]) -> Iterator[Tokenized]:
        for chat, encoding in zip(chats, self._encode([chat.text for chat in chats]), strict=True):
            spans = [_token_span(encoding.char_to_token, *span) for span in chat.trained]
            yield Tokenized(np.array(encoding.ids, dtype=np.int32), spans)

    def _encode(self, texts: list[str]) -> list[Any]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()  # what the tokenizer's last call has set
        backend.no_truncation()
        backend.encode_special_tokens = False
        return _encode_batch(backend, texts)

    def _tokenize_in_pieces(self, chats: Sequence[Rendered]) -> Iterator[Tokenized]:
        """Look up the words of all chats at once, as if their texts stood end to end, a character apart."""
        words: list[Any] = []
        runs: list[tuple[int, int, int]] = []  # words of each piece, its first character, characters put in front
        bases = [0]  # first character of each chat's text
        for chat in chats:
            for start, stop, token, prefix in self._cut(chat.text, chat.contents):
                text = prefix + chat.text[start:stop]
                found = [(token,)] if token else _WORD.findall(text) if self._cuts_at_spaces else [text]
                words += found
                runs.append((len(found), bases[-1] + start, len(prefix)))
            bases.append(bases[-1] + len(chat.text) + 1)
        ids, token_at = self._words.look_up(words, np.array(runs, dtype=np.int64).reshape(-1, 3))
        trained = [(base + a, base + b) for base, c in zip(bases, chats, strict=False) for a, b in c.trained]
        spans = iter(
            zip(token_at([a for a, _ in trained], "right"), token_at([b for _, b in trained], "left"), strict=True)
        )
        for chat, (start, stop) in zip(chats, pairwise(token_at(bases, "right")), strict=True):
            yield Tokenized(ids[start:stop], [(a - start, b - start) for a, b in islice(spans, len(chat.trained))])

    def _cut(self, text: str, contents: Sequence[Content]) -> Iterator[_Piece]:
        """Cut a chat into added tokens and the runs of ordinary text between them."""
        answers = [content for content in contents if content.is_answer]
        starts, stops = [answer.start for answer in answers], [answer.stop for answer in answers]
        left: _Added | None = None
        start = 0
        for right in (*self._added_tokens(text, contents), None):
            stop = right.start if right else len(text)
            if start < stop:
                inside = answers[bisect_right(stops, start) : bisect_left(starts, stop)]
                start, stop = self._without_white_space(text, inside, left, right, start, stop)
                if start < stop:
                    yield start, stop, "", self._prefix(text, inside, left, start)
            if right:
                yield right.start, right.stop, right.token, ""
                left, start = right, right.stop

    def _added_tokens(self, text: str, contents: Sequence[Content]) -> list[_Added]:
        """Find the added tokens of the template's text, and those of contents that are not protected."""
        found: list[_Added] = []
        position = 0
        for content in contents:
            found += self._tokens_of_template(text[position : content.start], position)
            for m in self._pattern.finditer(text, content.start, content.stop):
                if m.group() not in self.protected:
                    found.append(_Added(m.start(), m.end(), m.group(), is_template=False))
            position = content.stop
        return found + self._tokens_of_template(text[position:], position)

    def _tokens_of_template(self, literal: str, position: int) -> list[_Added]:
        if literal not in self._in_literal:
            found = self._pattern.finditer(literal)
            self._in_literal[literal] = [(m.start(), m.end(), m.group()) for m in found]
        return [
            _Added(position + start, position + stop, token, True) for start, stop, token in self._in_literal[literal]
        ]

    def _without_white_space(
        self, text: str, inside: Sequence[Content], left: _Added | None, right: _Added | None, start: int, stop: int
    ) -> tuple[int, int]:
        """Return a run's start and stop without the white space that the markers around it strip, answers' excepted."""
        if left and left.is_template and left.token in self._strip_right:
            limit = inside[0].start if inside else stop
            while start < limit and text[start] in _WHITE_SPACE:
                start += 1
        if right and right.is_template and right.token in self._strip_left:
            limit = inside[-1].stop if inside else start
            while limit < stop and text[stop - 1] in _WHITE_SPACE:
                stop -= 1
        return start, stop

    def _prefix(self, text: str, inside: Sequence[Content], left: _Added | None, start: int) -> str:
        """Return what is tokenised in front of a run that begins at ``start``."""
        if left is None:
            return self._prefix_at_start
        if not left.is_template:
            return ""
        starts_answer = bool(inside) and start == inside[0].start
        needs_space = self._drops_space and starts_answer and text[start] == " "
        return " " if needs_space else self._prefix_after_marker

    def _keeps(self, text: str) -> bool:
        ids = _encode_batch(self._ordinary, [text])[0].ids
        return bool(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text)

    def _prefix_after(self, marker: str) -> str:
        """Return the space that the tokenizer puts in front of text after a marker, or ``""``."""
        ids = self._encode([marker + "a"])[0].ids[bool(marker) :]
        return " " if ids == _encode_batch(self._ordinary, [" a"])[0].ids else ""


class _Words:
    """The words met so far, by number, and their tokens end to end. An added token is the word ``(token,)``."""

    def __init__(self, ordinary: Tokenizer, added: dict[str, list[int]], join: bool) -> None:
        self._ordinary, self._added, self._join = ordinary, added, join
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str | tuple[str], int] = {}
        self._characters = np.empty(0, np.int64)  # of each word
        self._first = np.zeros(1, np.int64)  # of each word's tokens, and the end
        self._ids = np.empty(0, np.int32)
        self._add([(token,) for token in self._added], list(self._added.values()))

    def _add(self, words: list[Any], tokens: list[list[int]]) -> None:
        first = len(self._numbers)
        self._numbers.update(zip(words, range(first, first + len(words)), strict=True))
        lengths = [len(word if isinstance(word, str) else word[0]) for word in words]
        ends = self._first[-1] + np.cumsum(list(map(len, tokens)), dtype=np.int64)
        self._characters = np.append(self._characters, np.array(lengths, dtype=np.int64))
        self._first = np.append(self._first, ends)
        self._ids = np.append(self._ids, np.array(list(chain.from_iterable(tokens)), dtype=np.int32))

    def _tokenize(self, words: set[str]) -> None:
        """Tokenise new words: those that begin with a space many at once, as a text that is cut at spaces."""
        joined = [word for word in words if self._join and word[0] == " " and not word[-1].isspace()]
        texts = [joined[i : i + _JOINED] for i in range(0, len(joined), _JOINED)]
        tokens: list[list[int]] = []
        for text, found in zip(texts, _encode_batch(self._ordinary, ["".join(text) for text in texts]), strict=True):
            starts, ids = [start for start, _ in found.offsets], found.ids
            edges = [bisect_left(starts, end) for end in accumulate(map(len, text), initial=0)]
            tokens += [ids[start:stop] for start, stop in pairwise(edges)]
        others = list(words.difference(joined))
        self._add([*joined, *others], [*tokens, *(found.ids for found in _encode_batch(self._ordinary, others))])

    def look_up(self, words: list[Any], runs: np.ndarray) -> tuple[np.ndarray, Callable[[list[int], str], list[int]]]:
        """Return the token ids of ``words``, int32 (tokens,), and a function from characters to tokens.

        ``runs`` int64 (runs, 3): words in each run, its first character, and the number of characters in front of it
        that are not the text's: its first character stands for them. ``token_at(characters, "right")`` gives the first
        token that ends after each character, ``"left"`` the first that does not begin before it.
        """
        new = set(words).difference(self._numbers)
        if new and len(self._numbers) > _REMEMBERED:
            self._forget()
            new = set(words).difference(self._numbers)
        if new:
            self._tokenize(new)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        words_of_run, first_character, in_front = runs.T
        characters, counts = self._characters[numbers], self._first[numbers + 1] - self._first[numbers]
        before = np.cumsum(characters) - characters  # characters of the words before
        shift = first_character - in_front - before[np.cumsum(words_of_run) - words_of_run]
        starts = before + np.repeat(shift, words_of_run)
        lowest = np.repeat(first_character, words_of_run)
        tokens_before = np.append(0, np.cumsum(counts))
        ids = self._ids[np.arange(tokens_before[-1]) + np.repeat(self._first[numbers] - tokens_before[:-1], counts)]

        def token_at(edges: list[int], side: str) -> list[int]:
            at = np.array(edges, dtype=np.int64)
            following = np.searchsorted(np.maximum(starts, lowest), at)  # the first word from the edge on
            found = tokens_before[following]
            last = np.maximum(following - 1, 0)
            for i in np.flatnonzero((following > 0) & (starts[last] + characters[last] > at)) if len(words) else ():
                word = last[i]  # the edge is inside it
                (encoding,) = _encode_batch(self._ordinary, [words[word]])
                places = np.array(encoding.offsets, dtype=np.int64) + starts[word]
                if side == "right":
                    inside = np.searchsorted(np.maximum(places[:, 1], lowest[word] + 1), at[i], side="right")
                else:
                    inside = np.searchsorted(np.maximum(places[:, 0], lowest[word]), at[i], side="left")
                found[i] = tokens_before[word] + inside
            return [int(token) for token in found]

        return ids, token_at


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
        parts = [_state(backend.normalizer), _state(backend.pre_tokenizer)]
    except Exception as error:  # tokenizers raises this very class for a component written in Python
        raise DataError(f"the tokenizer has a component that cannot be read: {error_line(error)}") from error
    normalizer, pre_tokenizer = map(_without_prefix, parts)
    state = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    rest = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    tokenizer = Tokenizer.from_str(json.dumps({**state, **rest, "model": _EMPTY_BPE}))
    tokenizer.model = backend.model
    return tokenizer


def _cuts_at_spaces(ordinary: Tokenizer) -> bool:
    """Return whether a text has the same tokens if it is cut before each space that follows a character.

    Byte pair encoding works inside the pieces of a pre-tokenizer. Either a piece begins at each such space, or, with
    one piece (SentencePiece), no token has the sign of a space behind another character, so that no merge reaches over
    the cut.
    """
    model = ordinary.model
    if not isinstance(model, BPE) or model.dropout:
        return False
    normalizers = _steps(_state(ordinary.normalizer), "normalizers")
    splits = _steps(_state(ordinary.pre_tokenizer), "pretokenizers")
    if any(split["type"] == "ByteLevel" for split in splits):
        patterns = [split["pattern"].get("Regex") for split in splits if split["type"] == "Split"]
        is_known = {split["type"] for split in splits} <= {"Digits", "Punctuation", "Split", "ByteLevel"}
        return not normalizers and is_known and bool(patterns) and _KNOWN_SPLITS.issuperset(patterns)
    is_known = normalizers in ([], [_SPACE_TO_SIGN]) and all(split["type"] == "Metaspace" for split in splits)
    if not is_known or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocabulary = ordinary.get_vocab(with_added_tokens=False)
    has_signs = vocabulary.keys() >= {_SPACE_SIGN, *(f"<0x{byte:02X}>" for byte in _SPACE_SIGN.encode())}
    reaches_over = re.compile(f"[^{_SPACE_SIGN}]{_SPACE_SIGN}")
    return bool(model.byte_fallback) and has_signs and not any(map(reaches_over.search, vocabulary))


def _steps(component: Any, key: str) -> list[Any]:
    """Return the steps of the state of a normalizer or pre-tokenizer."""
    if component is None or component["type"] != "Sequence":
        return [component] if component else []
    return [step for part in component[key] for step in _steps(part, key)]


def _state(component: Any) -> Any:
    return None if component is None else json.loads(component.__getstate__())


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
