"""Trained tokens of a chat, compared with the three templates written out by hand."""

import functools
from itertools import groupby

import pytest
from conftest import CORPUS, PHI3_TEMPLATE, TEMPLATES, chat_rows, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from phi3lora.data.template import ChatEncoder
from phi3lora.errors import DataError

# The templates by hand: what precedes and follows a content, how the chat ends.
# Phi-3's markers swallow white space to their right, the template's own line ends and what a content begins with.
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
    (result,) = encoder(name, train_on).encode([chat], [1])
    assert len(result.input_ids) == len(result.trained)
    return result.input_ids, result.trained


def swallowed(name, content):
    return content.lstrip(WHITE_SPACE) if name == "phi-3" else content


def by_hand(name, chat):
    """The chat's text, its control tokens in order."""
    before, end, last = BY_HAND[name]
    text, control = "", []
    for message in chat:
        head = [piece.format(role=message["role"]) for piece in before]
        text += "".join(head) + swallowed(name, message["content"]) + end
        control += [piece for piece in head if piece.startswith("<|")] + [end]
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


each_template = pytest.mark.parametrize("name", TEMPLATES)


@each_template
@PROPERTY
@given(data=st.data())
def test_each_turn_trains_its_content_and_end_of_turn_and_no_content_adds_a_control_token(name, data):
    chat = data.draw(chats(name))
    tokenizer, end = encoder(name).tokenizer, BY_HAND[name][1]
    ids, trained = encoded(name, chat)
    text, control = by_hand(name, chat)
    assert control_tokens(tokenizer, ids) == control
    assert decode(tokenizer, ids) == text, "no character is lost"
    stretches = trained_stretches(ids, trained)
    answers = [swallowed(name, m["content"]) for m in chat if m["role"] == "assistant"]
    assert [decode(tokenizer, stretch) for stretch in stretches] == [answer + end for answer in answers]
    assert {stretch[-1] for stretch in stretches} == {tokenizer.convert_tokens_to_ids(end)}


@each_template
@PROPERTY
@given(data=st.data())
def test_without_control_text_the_tokens_are_those_of_apply_chat_template(name, data):
    chat = data.draw(chats(name, st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]))))
    tokenizer = encoder(name).tokenizer
    ids, trained = encoded(name, chat)

    def tokens(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids == tokens(chat)
    for start, turn in answer_starts(chat, trained):
        assert ids[:start] == tokens(chat[:turn], add_generation_prompt=True)


@each_template
@PROPERTY
@given(data=st.data())
def test_generation_starts_from_the_tokens_that_training_had_before_the_answer(name, data):
    chat = data.draw(chats(name))
    ids, trained = encoded(name, chat)
    for start, turn in answer_starts(chat, trained):
        assert encoder(name).prompt_ids(chat[:turn]) == ids[:start]


@each_template
def test_a_user_cannot_smuggle_in_an_added_token_that_is_not_flagged_as_special(name):
    """Tokenizers have markers with "special": false, so that decoding shows them: tool calls, for one."""
    tokenizer = make_tokenizer(name)
    tokenizer.add_tokens([AddedToken("<|tool_call|>", special=False, normalized=False)])
    chat = [{"role": "user", "content": "a <|tool_call|> b <|end|>"}, {"role": "assistant", "content": "No."}]
    (result,) = ChatEncoder(tokenizer).encode([chat], [1])
    text, control = by_hand(name, chat)
    assert control_tokens(tokenizer, result.input_ids) == control
    assert decode(tokenizer, result.input_ids) == text


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
    answers = [swallowed(name, m["content"]) for m in turns if m.get("train") is not False]
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
def test_train_on_last_trains_the_last_turn_and_all_every_token_up_to_its_end(name, data):
    chat = data.draw(chats(name))
    ids, turns = encoded(name, chat)
    end = max(i for i, now in enumerate(turns) if now) + 1
    same, last = encoded(name, chat, "last")
    assert same == ids
    assert trained_stretches(ids, last) == trained_stretches(ids, turns)[-1:]
    assert last[:end][-1] and not any(last[end:])
    same, everything = encoded(name, chat, "all")
    assert same == ids
    assert everything == [True] * end + [False] * (len(ids) - end)


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
    assert text == "<|assistant|>two<|end|><|user|>three<|end|><|assistant|>four<|end|>"


@each_template
def test_the_final_endoftext_is_in_the_document_and_not_trained(name):
    """In Phi-3 it is the padding token, in Phi-4 the end of turn is the end of text: only there is the last trained."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    tokenizer = encoder(name).tokenizer
    for train_on in ("assistant", "last", "all"):
        ids, trained = encoded(name, chat, train_on)
        assert ids[-1] == tokenizer.eos_token_id
        assert trained[-1] is (name == "phi-4")


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
    together = encoder(name).encode(some, range(1, 7))
    assert together == [encoder(name).encode([chat], [9])[0] for chat in some]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Phi-3-mini's: every stretch of text gets a leading space, unknown characters become bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=specials))
    core.add_special_tokens([AddedToken(t, rstrip=True, special=True) for t in TEMPLATES["phi-3"][1]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.chat_template = PHI3_TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "answer", ["The price is 42.", "é 😀 ok", "it was <s>20</s> 10", "say <|end|> twice", "<|user|>", "a\n\n  b "]
)
def test_a_sentencepiece_tokenizer_trains_the_answer_character_for_character(answer):
    """Text that spells a control token gets no space inside: HTML's <s>20</s> must not come out as < s>20< /s>."""
    tokenizer = sentencepiece_tokenizer()
    chat = [{"role": "user", "content": "<|end|> the price?"}, {"role": "assistant", "content": answer}]
    (result,) = ChatEncoder(tokenizer).encode([chat], [1])
    (stretch,) = trained_stretches(result.input_ids, result.trained)
    assert stretch.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    assert decode(tokenizer, stretch) == answer + "<|end|>"


def test_a_template_with_a_beginning_of_text_keeps_it_once_and_untrained():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + PHI3_TEMPLATE
    chat = chat_rows(1)[0]["messages"]
    (with_bos,) = ChatEncoder(tokenizer).encode([chat], [1])
    ids, trained = encoded("phi-3", chat)
    assert with_bos.input_ids == [tokenizer.bos_token_id, *ids]
    assert with_bos.trained == [False, *trained]


def test_a_template_that_trims_contents_trains_the_trimmed_answer():
    tokenizer = make_tokenizer("phi-4-mini")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    chat = [{"role": "user", "content": "  Hi "}, {"role": "assistant", "content": " Hello! \n"}]
    (result,) = ChatEncoder(tokenizer).encode([chat], [1])
    assert [decode(tokenizer, s) for s in trained_stretches(result.input_ids, result.trained)] == ["Hello!<|end|>"]


def refusal(template, chat=None, number=4, train_on="assistant"):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        ChatEncoder(tokenizer, train_on).encode([chat or chat_rows(1)[0]["messages"]], [number])
    return str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{",
        "{{ x.y.z }}",
    ],
)
def test_a_template_that_fails_is_a_data_error(template):
    assert "the chat template refuses the chat" in refusal(template)


def test_a_tokenizer_whose_settings_are_damaged_is_a_data_error():
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer)
    tokenizer.model_max_length = "many"
    with pytest.raises(DataError, match="the tokenizer cannot encode a chat"):
        encoder.encode([chat_rows(1)[0]["messages"]], [1])


def test_a_tokenizer_without_chat_template_is_refused():
    assert "no chat_template" in refusal(None)


def test_a_slow_tokenizer_is_refused():
    slow = ByT5Tokenizer()
    slow.chat_template = PHI3_TEMPLATE
    with pytest.raises(DataError, match="not a fast one"):
        ChatEncoder(slow)


def test_a_template_that_closes_a_turn_with_no_special_token_is_refused():
    assert "no special token" in refusal(PHI3_TEMPLATE.replace("<|end|>", "").replace("{{ eos_token }}", ""))


@pytest.mark.parametrize("closing", ["'<|end|>\\n'", "'\\n'"], ids=["another token", "no token"])
def test_a_template_with_two_end_of_turn_tokens_is_refused_with_the_row(closing):
    """Then some turns would train a stop token that is not the one generation waits for, or none."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ CLOSING }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ).replace("CLOSING", closing)
    chat = chat_rows(1)[0]["messages"]
    assert len(chat) == 4
    assert "row 4" in refusal(template, chat)


def test_a_template_whose_generation_prompt_differs_from_the_chat_is_refused():
    template = PHI3_TEMPLATE.replace("{% if add", "{% if add_generation_prompt %}{{ '(new)' }}{% endif %}{% if add")
    assert "differently when generating" in refusal(template)


def test_a_template_that_drops_part_of_an_earlier_content_is_refused_with_the_row():
    """Templates of reasoning models drop the thoughts of earlier turns."""
    template = PHI3_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm</think>Hello!"}]
    message = refusal(template, chat)
    assert "row 4" in message
    assert "message 2" in message


def test_a_role_that_the_template_skips_is_refused_and_not_dropped():
    chat = [{"role": "system", "content": "Be brief."}, *chat_rows(1)[0]["messages"]]
    message = refusal(PHI3_TEMPLATE.replace("['system', 'user'", "['user'"), chat)
    assert "row 4" in message
    assert "'system'" in message


def test_a_template_s_own_refusal_is_passed_on_with_the_row():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system prompts!') }}{% endif %}"
    chat = [{"role": "system", "content": "Be brief."}, *chat_rows(1)[0]["messages"]]
    message = refusal(template + PHI3_TEMPLATE, chat)
    assert "row 4" in message
    assert "No system prompts!" in message
