"""What a chat says is what is trained: to the letter, with the template's control tokens its own, on every table."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import pytest
from family import MEMBERS, full_tables, make_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_template import trained_stretches
from tokenizers import AddedToken

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.findings import Findings
from phi3lora.data.formats import Chat
from phi3lora.data.template import ChatEncoder
from phi3lora.errors import DataError

PROPERTY = settings(max_examples=40, derandomize=True, database=None)
# What no content can produce: role markers, the end of turn, and the tokens that begin, end and pad a text.
PHI3_OWN = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "<|endoftext|>"]
OWN = {
    **dict.fromkeys(["phi-3", "phi-3-legacy", "phi-3.5"], PHI3_OWN),
    "phi-3-april": PHI3_OWN[1:],
    "phi-4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"],
    "phi-4-mini": [*PHI3_OWN[:4], "<|endoftext|>"],
}
# Tokens of a template that a test does not judge: April's template has no system turn, tools come with a key.
EITHER = {"phi-3-april": ["<|system|>"], "phi-4-mini": ["<|tool|>", "<|/tool|>"]}
SPACES = [" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\x1c"]
ODD = [
    "<s>30</s>", "</s>", "<s>", "<unk>", "<0x41>", "<0x0A>", "▁", "▁▁", "Ġ", "<", "<|", "|>", "s>", "\x00", "�",
    "\ufeff", "😀", "👩\u200d👩\u200d👧", "é", "e\u0301", "क्षि", "    return x\n", "don't", "1,234", "/\n/\n",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tokenizer under test, a user's own tokens added to it, and what contents are made of."""

    name: str
    folder: str | None = None
    encoders: dict[str, ChatEncoder] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def tokenizer(self):
        tokenizer = make_tokenizer(self.name, self.folder)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<loc>", "</loc>", "<think>")])
        return tokenizer

    @functools.cached_property
    def kept(self) -> list[str]:
        """Added tokens that become their one id wherever they stand."""
        judged = [*OWN[self.name], *EITHER.get(self.name, [])]
        return sorted({str(token) for token in self.tokenizer.added_tokens_decoder.values()}.difference(judged))

    @functools.cached_property
    def contents(self) -> st.SearchStrategy[str]:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        prefixes = sorted({token[:end] for token in added for end in range(1, len(token))})
        texts, pieces = st.text(max_size=8), (added, SPACES, ODD, prefixes)
        return st.lists(st.one_of(texts, *map(st.sampled_from, pieces)), max_size=5).map("".join)

    def encoder(self, train_on: str = "assistant") -> ChatEncoder:
        if train_on not in self.encoders:
            self.encoders[train_on] = ChatEncoder(self.tokenizer, train_on)
        return self.encoders[train_on]

    def encode(self, messages: list[dict], train_on: str = "assistant", findings: Findings | None = None):
        """(ids, trained) of one chat."""
        (found,) = self.encoder(train_on).encode([Chat(messages)], [1], findings)
        ids, trained = list(found.input_ids), [bool(now) for now in found.trained]
        assert len(ids) == len(trained)
        return ids, trained

    def own_ids(self, messages: list[dict], **options) -> list[int]:
        """The ids that the tokenizer itself makes of a chat."""
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def occurrences(self, messages: list[dict]) -> dict[str, int]:
        """How often the contents spell each added token."""
        added = sorted((str(token) for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        found = [token for m in messages for token in re.findall("|".join(map(re.escape, added)), m["content"])]
        return {token: found.count(token) for token in added}


CASES = [Case(name) for name in MEMBERS]
IDS = list(MEMBERS)
if full_tables():
    CASES += [Case(name, full_tables()) for name in MEMBERS]
    IDS += [f"{name}, full table" for name in MEMBERS]
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def turns(*contents: str) -> list[dict]:
    """A chat of users' questions and assistants' answers in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@st.composite
def chats(draw, case: Case, contents: st.SearchStrategy[str] | None = None, unanswered: bool = True):
    """A chat of one to three exchanges, with or without a system prompt and a question left open."""
    contents = case.contents if contents is None else contents
    has_system = case.name != "phi-3-april" and draw(st.booleans())
    system = [{"role": "system", "content": draw(contents)}] if has_system else []
    length = 2 * draw(st.integers(1, 3)) + (draw(st.booleans()) if unanswered else 0)
    return system + turns(*(draw(contents) for _ in range(length)))


def ordinary(case: Case, character: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[str]:
    """Contents that spell no token and that no marker beside them strips."""
    if character is None:
        character = st.characters(exclude_characters="<|>▁", exclude_categories=["Cs"])
    texts = st.text(character, max_size=20)
    return st.one_of(
        texts, st.lists(st.sampled_from(["the", "price", "42", "don't", "\n", " ", "  ", "é", "x"])).map("".join)
    ).map(str.strip)


def assert_exact(case: Case, messages: list[dict]) -> None:
    """Each answer and its end of turn is trained to the letter, nothing else, and no content changes the frame."""
    findings = Findings()
    ids, trained = case.encode(messages, findings=findings)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    runs, end = trained_stretches(ids, trained), case.encoder().end_of_turn_id
    assert [case.decode(run[:-1]) for run in runs] == answers
    assert {run[-1] for run in runs} == {end} == {case.id("<|im_end|>" if case.name == "phi-4" else "<|end|>")}
    frame = case.own_ids([{**m, "content": "x"} for m in messages])
    spelled = case.occurrences(messages)
    for token in OWN[case.name]:
        assert ids.count(case.id(token)) == frame.count(case.id(token)), token
        assert findings.kept_as_text[token] == spelled[token], token
    for token in case.kept:
        assert ids.count(case.id(token)) == spelled[token], token
        assert findings.added_tokens[token] == spelled[token], token


@each_case
@PROPERTY
@given(data=st.data())
def test_every_answer_is_trained_to_the_letter_and_no_content_changes_the_template(case, data):
    messages = data.draw(chats(case))
    if messages[0] == {"role": "system", "content": ""} and case.name == "phi-3.5":
        messages = messages[1:]  # not rendered
    assert_exact(case, messages)


@each_case
def test_every_added_token_and_prefix_keeps_the_white_space_around_it(case):
    added = [str(token) for token in case.tokenizer.added_tokens_decoder.values()]
    prefixes = sorted({token[:end] for token in added for end in range(1, len(token))})
    for piece in [*added, *prefixes, *ODD]:
        around = SPACES[::3] if piece in prefixes else SPACES
        answers = ["".join(parts) for s in around for parts in ((piece, s), (s, piece), (s, piece, s), ("a", piece, s))]
        assert_exact(case, turns(*(text for answer in [piece, piece * 2, *answers] for text in (answer, answer))))


@each_case
def test_white_space_alone_and_at_the_ends_is_kept(case):
    texts = ["", *SPACES, *(a + b for a in SPACES for b in SPACES), *(a + "word" + a for a in SPACES)]
    assert_exact(case, turns(*(text for answer in texts for text in ("x", answer))))


@each_case
@PROPERTY
@given(data=st.data())
def test_a_question_is_tokenised_as_an_answer_is(case, data):
    """But for white space at its ends, which markers may strip: so they do when a question is asked."""
    content = data.draw(case.contents).strip()
    ids, trained = case.encode(turns(content, content))
    ((*answer, end),) = trained_stretches(ids, trained)
    start = ids.index(case.id("<|im_sep|>" if case.name == "phi-4" else "<|user|>")) + 1
    assert ids[start : ids.index(end)] == answer


@each_case
@PROPERTY
@given(data=st.data())
def test_generation_starts_from_what_training_had_before_the_answer(case, data):
    messages = data.draw(chats(case, unanswered=False))
    ids, trained = case.encode(messages)
    starts = [i for i, now in enumerate(trained) if now and not trained[i - 1]]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for start, turn in zip(starts, answers, strict=True):
        assert list(case.encoder().prompt_ids(Chat(messages[:turn]))) == ids[:start]


@each_case
@PROPERTY
@given(data=st.data())
def test_ordinary_chats_have_the_tokenizer_s_own_ids(case, data):
    messages = data.draw(chats(case, ordinary(case)))
    ids, _ = case.encode(messages)
    assert ids == case.own_ids(messages)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = case.own_ids(messages[:turn], add_generation_prompt=True)
            assert list(case.encoder().prompt_ids(Chat(messages[:turn]))) == prompt == ids[: len(prompt)]


@each_case
@PROPERTY
@given(data=st.data())
def test_last_trains_the_last_turn_and_all_every_token(case, data):
    messages = data.draw(chats(case))
    ids, each = case.encode(messages)
    assert case.encode(messages, "all") == (ids, [True] * len(ids))
    same, last = case.encode(messages, "last")
    assert same == ids
    assert trained_stretches(ids, last) == trained_stretches(ids, each)[-1:]
    assert last[max(i for i, now in enumerate(each) if now)]


@each_case
@PROPERTY
@given(data=st.data())
def test_turns_switched_off_are_not_trained_and_the_tokens_stay(case, data):
    messages = data.draw(chats(case))
    flagged = [
        {**m, "train": data.draw(st.booleans())} if m["role"] == "assistant" and data.draw(st.booleans()) else m
        for m in messages
    ]
    answers = [m["content"] for m in flagged if m["role"] == "assistant" and m.get("train", True)]
    if not answers:
        with pytest.raises(DataError, match="row 1: no supervised token"):
            case.encode(flagged)
        return
    ids, trained = case.encode(flagged)
    assert ids == case.encode(messages)[0]
    assert [case.decode(run[:-1]) for run in trained_stretches(ids, trained)] == answers


@each_case
@pytest.mark.parametrize("answer", ["Hello!", "x", "42 dollars", " twice", "é", "\n", "<s>30</s>", "<loc>", ""])
def test_a_template_that_puts_a_space_before_the_answer_trains_all_of_the_answer(case, answer):
    """A token may hold that space and the answer's first letters: it is trained."""
    tokenizer = make_tokenizer(case.name, case.folder)
    tokenizer.add_tokens([AddedToken("<loc>", normalized=False)])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'].title() + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
    (found,) = ChatEncoder(tokenizer).encode([Chat(turns("Hi", answer, "Bye", answer))], [1])
    runs = trained_stretches(list(found.input_ids), list(found.trained))
    assert len(runs) == 2
    for run in runs:
        assert run[-1] == tokenizer.eos_token_id
        assert case.decode(run[:-1]).removeprefix(" ") == answer.removeprefix(" ")


@each_case
def test_an_empty_system_message_is_dropped_where_the_template_drops_it(case):
    chat, empty = turns("Hi", "Hello!"), [{"role": "system", "content": ""}]
    assert case.encode(empty + chat)[0] == case.own_ids(empty + chat)
    if case.name in ("phi-3.5", "phi-3-april"):
        assert case.encode(empty + chat) == case.encode(chat)
        assert case.encoder().prompt_ids(Chat(empty + chat[:1])) == case.encoder().prompt_ids(Chat(chat[:1]))


@each_case
@PROPERTY
@given(data=st.data())
def test_the_template_s_own_rendering_read_as_text_gives_the_same_documents(case, data):
    character = st.characters(exclude_characters="<|>", exclude_categories=["Cs"])
    contents = st.one_of(
        ordinary(case, character), st.lists(st.sampled_from([*SPACES, "x", "42"]), max_size=4).map("".join)
    )
    messages = data.draw(chats(case, contents, unanswered=False))
    # Where each content starts with a line end, a text of these could be in Phi-3's style.
    starts = [message["content"].startswith(("\n", "\r\n")) for message in messages if message["content"]]
    assume(case.name not in ("phi-4", "phi-4-mini") or not starts or not all(starts))
    text = case.tokenizer.apply_chat_template(messages, tokenize=False)
    loaded = [
        ChatDataset.load([row], case.tokenizer, max_length=4096, format=name)[0]
        for row, name in (({"text": text}, "text"), ({"messages": messages}, "messages"))
    ]
    assert loaded[0] == loaded[1]
