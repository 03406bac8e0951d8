"""Trained tokens of a chat, compared with the three templates written out by hand."""

import functools
import re
from itertools import groupby

import pytest
from conftest import PHI3_TEMPLATE, chat_rows, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from phi3lora.data.findings import Findings
from phi3lora.data.formats import Chat
from phi3lora.data.template import ChatEncoder
from phi3lora.errors import DataError

# The templates by hand: what precedes and follows a content, how the chat ends.
# Phi-3's markers swallow white space to their right: the template's own line ends, and what a question begins with.
BY_HAND = {
    "phi-3": (["<|{role}|>"], "<|end|>", ["<|endoftext|>"]),
    "phi-4": (["<|im_start|>", "{role}", "<|im_sep|>"], "<|im_end|>", []),
    "phi-4-mini": (["<|{role}|>"], "<|end|>", ["<|endoftext|>"]),
}
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

CONTROL = [
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>",
    "<|endoftext|>", "<s>", "</s>", "<unk>", "<|", "|>", "<", "end|>", "<|end|>\n<|assistant|>\n",
]  # fmt: skip
SPACES = [" ", "\n", "  \n\n", "\t", "\u3000", "\x1c", "\r\n"]
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(CONTROL),
    st.sampled_from(SPACES),
    st.sampled_from(["😀", "👩‍👩‍👧", "é", "क्षि"]),
)
CONTENTS = st.lists(PIECES, max_size=4).map("".join)
PLAIN = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]))  # spells no control token
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


@functools.cache
def encoder(name: str, train_on: str = "assistant") -> ChatEncoder:
    return ChatEncoder(make_tokenizer(name), train_on)


@st.composite
def chats(draw, name: str, contents=CONTENTS):
    """A chat the template knows: a system prompt or none, one to three exchanges, now and then a tool."""
    chat = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": draw(contents)})
        chat.append({"role": "assistant", "content": draw(contents)})
        if name != "phi-3" and draw(st.booleans()):
            chat.append({"role": "tool", "content": draw(contents)})
            chat.append({"role": "assistant", "content": draw(contents)})
    return chat + ([{"role": "user", "content": draw(contents)}] if draw(st.booleans()) else [])


def encoded(name, chat, train_on="assistant"):
    """(ids, trained) of one chat."""
    (result,) = encoder(name, train_on).encode([Chat(chat)], [1])
    assert len(result.input_ids) == len(result.trained)
    return result.input_ids, result.trained


def kept(name, message):
    """A content as its tokens spell it: an answer to the letter, another without the white space a marker swallows."""
    swallows = name == "phi-3" and message["role"] != "assistant"
    return message["content"].lstrip(WHITE_SPACE) if swallows else message["content"]


def spelled(name, content):
    """The added tokens that a content spells and that are no markers of the template: each is one id."""
    own = {*BY_HAND[name][2], BY_HAND[name][1], "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_sep|>"}
    added = [str(token) for token in encoder(name).tokenizer.added_tokens_decoder.values()]
    found = re.findall("|".join(map(re.escape, added)), content)
    return [token for token in found if token not in own | {"<s>", "<|endoftext|>"}]


def by_hand(name, chat):
    """The chat's text, its added tokens in order."""
    before, end, last = BY_HAND[name]
    text, control = "", []
    for message in chat:
        head = [piece.format(role=message["role"]) for piece in before]
        text += "".join(head) + kept(name, message) + end
        control += [piece for piece in head if piece.startswith("<|")] + spelled(name, message["content"]) + [end]
    return text + "".join(last), control + last


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_stretches(ids, trained):
    """The runs of trained tokens."""
    pairs = zip(ids, trained, strict=True)
    return [[token for token, _ in run] for now, run in groupby(pairs, key=lambda pair: pair[1]) if now]


def answer_starts(chat, trained):
    """(first trained token, message) of each assistant turn."""
    starts = [i for i, now in enumerate(trained) if now and not trained[i - 1]]
    return zip(starts, [i for i, m in enumerate(chat) if m["role"] == "assistant"], strict=True)


def control_tokens(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.added_tokens_decoder]


each_template = pytest.mark.parametrize("name", BY_HAND)


@each_template
@PROPERTY
@given(data=st.data())
def test_each_turn_trains_its_content_and_end_of_turn_and_no_content_adds_a_marker(name, data):
    chat = data.draw(chats(name))
    tokenizer, end = encoder(name).tokenizer, BY_HAND[name][1]
    ids, trained = encoded(name, chat)
    text, control = by_hand(name, chat)
    assert control_tokens(tokenizer, ids) == control
    assert decode(tokenizer, ids) == text, "no character is lost"
    stretches = trained_stretches(ids, trained)
    answers = [m["content"] for m in chat if m["role"] == "assistant"]
    assert [decode(tokenizer, stretch) for stretch in stretches] == [answer + end for answer in answers]
    for start, turn in answer_starts(chat, trained):
        assert encoder(name).prompt_ids(Chat(chat[:turn])) == ids[:start], (
            "generation starts from what training had before"
        )
    assert {stretch[-1] for stretch in stretches} == {tokenizer.convert_tokens_to_ids(end)}


@each_template
@PROPERTY
@given(data=st.data())
def test_without_control_text_the_tokens_are_those_of_apply_chat_template(name, data):
    chat = data.draw(chats(name, PLAIN))
    for message in chat:  # phi-3's markers would swallow white space that an answer begins with
        message["content"] = message["content"].lstrip()
    tokenizer = encoder(name).tokenizer
    ids, trained = encoded(name, chat)

    def tokens(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids == tokens(chat)
    for start, turn in answer_starts(chat, trained):
        assert ids[:start] == tokens(chat[:turn], add_generation_prompt=True)


@each_template
@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_is_no_marker_of_the_template_is_one_id_in_a_content(name, special):
    tokenizer = make_tokenizer(name)
    tokenizer.add_tokens([AddedToken(t, special=special, rstrip=True) for t in ("<|call|>", "<loc>")])
    answer = "<loc>  A <|call|>\n<loc>"
    chat = [{"role": "user", "content": "a <|call|> b <|end|><s>"}, {"role": "assistant", "content": answer}]
    findings = Findings()
    (result,) = ChatEncoder(tokenizer).encode([Chat(chat)], [1], findings)
    (stretch,) = trained_stretches(result.input_ids, result.trained)
    assert decode(tokenizer, stretch) == answer + BY_HAND[name][1]
    assert control_tokens(tokenizer, stretch) == ["<loc>", "<|call|>", "<loc>", BY_HAND[name][1]]
    assert findings.added_tokens == {"<|call|>": 2, "<loc>": 2}
    assert findings.kept_as_text == ({"<s>": 1} if name == "phi-4" else {"<s>": 1, "<|end|>": 1})


@each_template
@PROPERTY
@given(data=st.data())
def test_turns_that_carry_train_false_are_not_trained_and_the_tokens_stay(name, data):
    chat = data.draw(chats(name))
    plain, _ = encoded(name, chat)
    turns = [m for m in chat if m["role"] == "assistant"]
    flags = data.draw(st.lists(st.sampled_from([True, False, None]), min_size=len(turns), max_size=len(turns)))
    for message, flag in zip(turns, flags, strict=True):
        if flag is not None:
            message["train"] = flag
    answers = [m["content"] for m in turns if m.get("train") is not False]
    if not answers:
        with pytest.raises(DataError, match="row 1: no supervised token"):
            encoded(name, chat)
        return
    ids, trained = encoded(name, chat)
    assert ids == plain
    texts = [decode(encoder(name).tokenizer, stretch) for stretch in trained_stretches(ids, trained)]
    assert texts == [answer + BY_HAND[name][1] for answer in answers]


@each_template
@PROPERTY
@given(data=st.data())
def test_train_on_last_trains_the_last_turn_and_all_every_token(name, data):
    chat = data.draw(chats(name))
    ids, turns = encoded(name, chat)
    end = max(i for i, now in enumerate(turns) if now) + 1
    assert ids[-1] == encoder(name).tokenizer.eos_token_id
    assert (end == len(ids)) == (name == "phi-4" and chat[-1]["role"] == "assistant"), "<|endoftext|> is not trained"
    same, last = encoded(name, chat, "last")
    assert same == ids
    assert trained_stretches(ids, last) == trained_stretches(ids, turns)[-1:]
    assert last[:end][-1] and not any(last[end:])
    same, everything = encoded(name, chat, "all")
    assert same == ids
    assert all(everything)


def test_train_false_excludes_a_prompt_from_train_on_all():
    chat = [
        {"role": "user", "content": "one", "train": False},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    ids, trained = encoded("phi-4-mini", chat, "all")
    (stretch,) = trained_stretches(ids, trained)
    text = decode(encoder("phi-4-mini").tokenizer, stretch)
    assert text == "<|assistant|>two<|end|><|user|>three<|end|><|assistant|>four<|end|><|endoftext|>"


@each_template
def test_the_end_of_turn_token_is_read_from_the_template(name):
    tokenizer = make_tokenizer(name)
    assert tokenizer.convert_ids_to_tokens(encoder(name).end_of_turn_id) == BY_HAND[name][1]
    tokenizer.chat_template = tokenizer.chat_template.replace(BY_HAND[name][1], "</s>")
    assert tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).end_of_turn_id) == "</s>"


@each_template
def test_a_batch_of_chats_encodes_as_its_chats_one_by_one(name):
    some = [row["messages"] for row in chat_rows(6)]
    some[2] = [{"role": "user", "content": "<|end|> and <s>"}, {"role": "assistant", "content": "</s>!"}]
    together = encoder(name).encode(list(map(Chat, some)), range(1, 7))
    assert together == [encoder(name).encode([Chat(chat)], [9])[0] for chat in some]


@pytest.mark.parametrize(
    "answer", ["The price is 42.", "é 😀 ok", "it was <s>20</s> 10", "say <|end|> twice", "<|user|>", "a\n\n  b "]
)
def test_a_sentencepiece_tokenizer_trains_the_answer_character_for_character(answer):
    """Text that spells a control token gets no space inside: HTML's <s>20</s> must not come out as < s>20< /s>."""
    tokenizer = make_tokenizer("phi-3-legacy")
    chat = [{"role": "user", "content": "<|end|> the price?"}, {"role": "assistant", "content": answer}]
    (result,) = ChatEncoder(tokenizer).encode([Chat(chat)], [1])
    (stretch,) = trained_stretches(result.input_ids, result.trained)
    assert stretch.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    assert decode(tokenizer, stretch) == answer + "<|end|>"


def test_a_template_with_a_beginning_of_text_keeps_it_once_and_untrained():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + PHI3_TEMPLATE
    chat = chat_rows(1)[0]["messages"]
    (with_bos,) = ChatEncoder(tokenizer).encode([Chat(chat)], [1])
    ids, trained = encoded("phi-3", chat)
    assert with_bos.input_ids == [tokenizer.bos_token_id, *ids]
    assert with_bos.trained == [False, *trained]


def test_a_template_that_trims_contents_trains_the_trimmed_answer():
    tokenizer = make_tokenizer("phi-4-mini")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    chat = [{"role": "user", "content": "  Hi "}, {"role": "assistant", "content": " Hello! \n"}]
    (result,) = ChatEncoder(tokenizer).encode([Chat(chat)], [1])
    assert [decode(tokenizer, s) for s in trained_stretches(result.input_ids, result.trained)] == ["Hello!<|end|>"]


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TWO_CLOSINGS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ CLOSING }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system prompts!') }}{% endif %}"
NEW_PROMPT = "{% if add_generation_prompt %}{{ '(new)' }}{% endif %}{% if add"
REFUSED = {  # template, chat, words of the message
    "none": (None, HELLO, "no chat_template"),
    "an error": ("{{ 1 / 0 }}", HELLO, "the chat template refuses the chat"),
    "its own refusal": (NO_SYSTEM + PHI3_TEMPLATE, [SYSTEM, *HELLO], "row 4: .*No system prompts!"),
    "not Jinja": ("{{", HELLO, "the chat template refuses the chat"),
    "no end of turn": (PHI3_TEMPLATE.replace("<|end|>", "").replace("{{ eos_token }}", ""), HELLO, "no special token"),
    "another end of turn": (TWO_CLOSINGS.replace("CLOSING", "'<|end|>\\n'"), HELLO * 2, r"row 4: .*'<\|end\|>'"),
    "an end of turn only in the last": (TWO_CLOSINGS.replace("CLOSING", "'\\n'"), HELLO * 2, r"row 4: .*'<\|user\|>'"),
    "a prompt that differs": (PHI3_TEMPLATE.replace("{% if add", NEW_PROMPT), HELLO, "differently when generating"),
    "thoughts of earlier turns dropped": (
        PHI3_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"),
        [HELLO[0], {"role": "assistant", "content": "hm</think>Hello!"}],
        "row 4: .*message 2",
    ),
    "a role skipped": (PHI3_TEMPLATE.replace("['system', 'user'", "['user'"), [SYSTEM, *HELLO], "row 4: .*'system'"),
}


@pytest.mark.parametrize(("template", "chat", "words"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_gives_no_right_mask_is_refused_with_the_row(template, chat, words):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        ChatEncoder(tokenizer).encode([Chat(chat)], [4])


def test_a_slow_or_damaged_tokenizer_is_refused():
    slow, damaged = ByT5Tokenizer(), make_tokenizer()
    slow.chat_template = PHI3_TEMPLATE
    with pytest.raises(DataError, match="not a fast one"):
        ChatEncoder(slow)
    encoder = ChatEncoder(damaged)
    damaged.backend_tokenizer.model = models.WordLevel({"a": 0}, unk_token="missing")
    with pytest.raises(DataError, match="the tokenizer cannot encode a chat"):
        encoder.encode([Chat(HELLO)], [1])
