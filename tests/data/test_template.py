"""What a template makes of a chat, and templates that give no right mask. test_exactness.py has the properties."""

from itertools import groupby

import pytest
from conftest import PHI3_TEMPLATE, TEMPLATES, chat_rows, make_tokenizer
from tokenizers import AddedToken, models
from transformers import ByT5Tokenizer

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.findings import Findings
from phi3lora.data.formats import Chat
from phi3lora.data.template import ChatEncoder
from phi3lora.errors import DataError

END = {"phi-3": "<|end|>", "phi-4": "<|im_end|>", "phi-4-mini": "<|end|>"}


def encoded(tokenizer, messages, train_on="assistant", findings=None):
    """(ids, trained) of one chat."""
    (result,) = ChatEncoder(tokenizer, train_on).encode([Chat(messages)], [1], findings)
    return result.input_ids, result.trained


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_stretches(ids, trained):
    """The runs of trained tokens."""
    pairs = zip(ids, trained, strict=True)
    return [[token for token, _ in run] for now, run in groupby(pairs, key=lambda pair: pair[1]) if now]


def control_tokens(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.added_tokens_decoder]


each_template = pytest.mark.parametrize("name", END)


@each_template
@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_is_no_marker_of_the_template_is_one_id_in_a_content(name, special):
    tokenizer = make_tokenizer(name)
    tokenizer.add_tokens([AddedToken(t, special=special, rstrip=True) for t in ("<|call|>", "<loc>")])
    answer = "<loc>  A <|call|>\n<loc>"
    chat = [{"role": "user", "content": "a <|call|> b <|end|><s>"}, {"role": "assistant", "content": answer}]
    findings = Findings()
    (stretch,) = trained_stretches(*encoded(tokenizer, chat, findings=findings))
    assert decode(tokenizer, stretch) == answer + END[name]
    assert control_tokens(tokenizer, stretch) == ["<loc>", "<|call|>", "<loc>", END[name]]
    assert findings.added_tokens == {"<|call|>": 2, "<loc>": 2}
    spelled = {"phi-3": ["<|end|>", "<s>"], "phi-4": [], "phi-4-mini": ["<|end|>"]}[name]
    assert findings.kept_as_text == dict.fromkeys(spelled, 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_user_s_own_token_is_one_id_in_questions_and_answers(name):
    tokenizer, rows = make_tokenizer(name), [{"prompt": "Where is <loc>?", "completion": "At <loc>Ankara</loc>."}]
    first, as_text = len(tokenizer), name != "phi-3-legacy"
    tokenizer.add_tokens([token if as_text else AddedToken(token, normalized=False) for token in ("<loc>", "</loc>")])
    dataset = ChatDataset.load(rows, tokenizer, max_length=64)
    assert [i for i in dataset[0]["input_ids"] if i >= first] == [first, first, first + 1]
    assert dataset.findings.added_tokens == {"<loc>": 2, "</loc>": 1}


def test_a_token_that_the_table_spells_with_a_space_is_refused_with_the_way_out():
    """Added as plain text, a token goes through tokenizer.json's normaliser, which puts a space into it."""
    tokenizer = make_tokenizer("phi-3-legacy")
    tokenizer.add_tokens(["<loc>", "</loc>"])
    ids, trained = encoded(tokenizer, HELLO)
    assert [decode(tokenizer, s) for s in trained_stretches(ids, trained)] == ["Hello!<|end|>"]
    with pytest.raises(DataError, match=r"'<loc>'.*normalized=False"):
        encoded(tokenizer, [HELLO[0], {"role": "assistant", "content": "At <loc>Ankara</loc>."}])


def test_a_system_prompt_that_the_template_drops_is_refused_with_the_way_out():
    row = {"system": "Answer in French.", "prompt": "Good day?", "completion": "Bonjour."}
    with pytest.raises(DataError, match=r"row 1: message 1: .*'system'; .*message of the user"):
        ChatDataset.load([row], make_tokenizer("phi-3-april"), max_length=64)


def test_train_false_excludes_a_prompt_from_train_on_all():
    chat = [
        {"role": "user", "content": "one", "train": False},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    tokenizer = make_tokenizer("phi-4-mini")
    (stretch,) = trained_stretches(*encoded(tokenizer, chat, "all"))
    assert (
        decode(tokenizer, stretch) == "<|assistant|>two<|end|><|user|>three<|end|><|assistant|>four<|end|><|endoftext|>"
    )


@each_template
def test_the_end_of_turn_token_is_read_from_the_template(name):
    tokenizer = make_tokenizer(name)
    assert tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).end_of_turn_id) == END[name]
    other = "</s>" if name == "phi-3" else "<|endofprompt|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(END[name], other)
    assert tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).end_of_turn_id) == other


@each_template
def test_a_batch_of_chats_encodes_as_its_chats_one_by_one(name):
    some = [row["messages"] for row in chat_rows(6)]
    some[2] = [{"role": "user", "content": "<|end|> and <s>"}, {"role": "assistant", "content": "</s>!"}]
    encoder = ChatEncoder(make_tokenizer(name))
    together = encoder.encode(list(map(Chat, some)), range(1, 7))
    assert together == [encoder.encode([Chat(chat)], [9])[0] for chat in some]


def test_a_template_with_a_beginning_of_text_keeps_it_once_and_untrained():
    tokenizer = make_tokenizer()
    chat = chat_rows(1)[0]["messages"]
    ids, trained = encoded(tokenizer, chat)
    tokenizer.chat_template = "{{ bos_token }}" + PHI3_TEMPLATE
    assert encoded(tokenizer, chat) == ([tokenizer.bos_token_id, *ids], [False, *trained])


def test_a_template_that_trims_contents_trains_the_trimmed_answer():
    tokenizer = make_tokenizer("phi-4-mini")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    chat = [{"role": "user", "content": "  Hi "}, {"role": "assistant", "content": " Hello! \n"}]
    assert [decode(tokenizer, s) for s in trained_stretches(*encoded(tokenizer, chat))] == ["Hello!<|end|>"]


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
    "a role skipped": (PHI3_TEMPLATE.replace("'system'", "'sys'"), [SYSTEM, *HELLO], "row 4: .*'system'"),
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
