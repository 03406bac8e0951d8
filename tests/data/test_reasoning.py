"""The family's reasoning members: a system prompt of their template's own, and thoughts between <think> and </think>.

The templates are restated from public text: the model cards' formats, and
https://docs.unsloth.ai/models/tutorials/phi-4-reasoning-how-to-run-and-fine-tune.
"""

import functools

import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken

import phi3lora as p3

BUILT_IN = "You are Phi. Write <think> {Thought section} </think> {Solution section}."
TURN = "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
SYSTEM = f"{{{{ '<|im_start|>system<|im_sep|>{BUILT_IN}<|im_end|>' }}}}"
NEXT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
HAS_SYSTEM = "messages[0]['role'] == 'system'"
# Phi-4-reasoning and -plus, in three editions: the row's system prompt replaces the built-in one; it is ignored; and
# one that loses all other turns of a chat that has a system prompt.
REPLACED = f"{{% if not {HAS_SYSTEM} %}}{SYSTEM}{{% endif %}}{{% for message in messages %}}{TURN}{{% endfor %}}{NEXT}"
IGNORED = (
    SYSTEM
    + "{% for message in messages %}{% if message['role'] != 'system' %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + NEXT
)
LOST = (
    f"{{% if not {HAS_SYSTEM} %}}{SYSTEM}{{% endif %}}{{% for message in messages %}}{{% if {HAS_SYSTEM} %}}{SYSTEM}"
    f"{{% else %}}{TURN}{{% endif %}}{{% endfor %}}{NEXT}"
)
# Phi-4-mini-reasoning adds the row's system prompt to its own.
MINI = (
    f"{{{{ '<|system|>{BUILT_IN}' }}}}{{% for message in messages %}}{{% if message['role'] == 'system' %}}"
    "{{ ' ' + message['content'] }}{% if 'tools' in message and message['tools'] is not none %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{% endif %}{% endfor %}{{ '<|end|>' }}"
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Not the family's: earlier thoughts are cut out of the history; the answer's first thought is begun by the prompt.
CUT = REPLACED.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
BEGUN = REPLACED.replace(NEXT, NEXT.replace("<|im_sep|>' }}", "<|im_sep|><think>\n' }}"))
TEMPLATES = {"replaced": REPLACED, "ignored": IGNORED, "lost": LOST, "mini": MINI, "cut": CUT, "begun": BEGUN}

THOUGHT = "<think>\n6 times 7?\n</think>\n\n42."
END = {"mini": "<|end|>"}


@functools.cache
def reasoning(name, **flags):
    tokenizer = make_tokenizer("phi-4-mini" if name == "mini" else "phi-4")
    markers = ["<think>", "</think>"] + (
        ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"] if name == "mini" else []
    )
    tokenizer.add_tokens(
        [AddedToken(marker, normalized=False, **flags) for marker in markers],
        special_tokens=flags.get("special", False),
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def chat(*contents, system=None):
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(contents)
    return {"messages": start + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def load(row, tokenizer, **options):
    return p3.ChatDataset.load([row], tokenizer, max_length=2048, **options)[0]


def trained(row, tokenizer, **options):
    """The text of the trained tokens, and their ids."""
    ids = [label for label in load(row, tokenizer, **options)["labels"] if label != -100]
    return tokenizer.decode(ids, skip_special_tokens=False), ids


FLAGS = [{"special": False}, {"special": True}]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ["replaced", "ignored", "lost", "mini", "cut"])
def test_a_thought_is_trained_and_its_markers_are_one_token_each(name, flags):
    tokenizer = reasoning(name, **flags)
    text, ids = trained(chat("6 x 7?", THOUGHT), tokenizer)
    assert text == THOUGHT + END.get(name, "<|im_end|>")
    for marker in ("<think>", "</think>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(marker)) == 1


@pytest.mark.parametrize("name", ["replaced", "ignored", "lost", "mini"])
def test_the_built_in_system_prompt_is_what_the_template_writes(name):
    tokenizer, row = reasoning(name, special=False), chat("6 x 7?", THOUGHT)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert BUILT_IN in text
    assert load(row, tokenizer)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_system_prompt_replaces_the_built_in_one_or_follows_it():
    row = chat("6 x 7?", THOUGHT, system="Be brief.")
    whole = {name: load(row, reasoning(name, special=False))["input_ids"] for name in ("replaced", "mini")}
    text = {name: reasoning(name, special=False).decode(ids) for name, ids in whole.items()}
    assert text["replaced"].startswith("<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user")
    assert text["mini"].startswith(f"<|system|>{BUILT_IN} Be brief.<|end|><|user|>")
    assert trained(row, reasoning("mini", special=False))[0] == THOUGHT + "<|end|>"


@pytest.mark.parametrize("name, named", [("ignored", "'system'"), ("lost", "'user'|'system'")])
def test_a_system_prompt_that_the_template_loses_is_refused_by_name(name, named):
    with pytest.raises(p3.DataError, match=f"row 1: .*(?:{named})"):
        load(chat("6 x 7?", THOUGHT, system="Be brief."), reasoning(name, special=False))


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("name", ["replaced", "ignored", "mini"])
def test_thoughts_of_earlier_turns_stay(name, train_on):
    tokenizer = reasoning(name, special=False)
    row, end = chat("6 x 7?", THOUGHT, "Sure?", "<think>yes</think>Yes."), END.get(name, "<|im_end|>")
    last = "<think>yes</think>Yes." + end
    assert trained(row, tokenizer, train_on=train_on)[0] == (last if train_on == "last" else THOUGHT + end + last)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_thoughts_that_the_template_cuts_out_of_the_history_are_refused(train_on):
    tokenizer, row = reasoning("cut", special=False), chat("6 x 7?", THOUGHT, "Sure?", THOUGHT)
    with pytest.raises(p3.DataError, match=r"row 1: .*message 2 "):
        load(row, tokenizer, train_on=train_on)
    row["messages"][1]["content"] = "42."
    assert trained(row, tokenizer)[0] == f"42.<|im_end|>{THOUGHT}<|im_end|>"


def test_a_prompt_that_begins_the_thought_for_the_answer_is_refused():
    with pytest.raises(p3.DataError, match=r"row 1: .*differently when generating"):
        load(chat("6 x 7?", THOUGHT), reasoning("begun", special=False))


@pytest.mark.parametrize("name", ["replaced", "mini"])
def test_a_thought_in_a_key_of_its_own_is_refused_by_name(name):
    row = chat("6 x 7?", "42.")
    row["messages"][1]["reasoning_content"] = "6 times 7?"
    with pytest.raises(p3.DataError, match=r"row 1: .*'reasoning_content'"):
        load(row, reasoning(name, special=False))


def test_mini_reasoning_takes_tools_as_phi4_mini_does():
    tokenizer = reasoning("mini", special=False)
    row = {**chat("6 x 7?", "<think>call</think>"), "tools": [{"name": "product"}]}
    row["messages"][1]["tool_calls"] = [{"name": "product", "arguments": {"a": 6, "b": 7}}]
    text, ids = trained(row, tokenizer)
    assert (
        text
        == '<think>call</think><|tool_call|>[{"name": "product", "arguments": {"a": 6, "b": 7}}]<|/tool_call|><|end|>'
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|tool_call|>")) == 1
    assert tokenizer.decode(load(row, tokenizer)["input_ids"]).startswith(
        f'<|system|>{BUILT_IN} <|tool|>[{{"name": "product"}}]<|/tool|><|end|>'
    )
