"""Every row format gives the same chat; every bad row is named by its number and its keys."""

import json

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.formats import COLUMNS, detect_format, known_format, to_chat
from phi3lora.errors import DataError

TOKENIZER = make_tokenizer()
QUESTION, ANSWER = "Where is it?", "On its way."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
ROWS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "output": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "text": {"text": f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n{ANSWER}<|end|>\n"},
}
TOOL_CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "weather()"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


def refusal(row, format="messages", number=7, columns=None) -> str:
    with pytest.raises(DataError) as caught:
        to_chat(row, format, number, columns)
    return str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_format_is_recognised_and_gives_the_same_chat(name):
    row = {"id": 5, "source": "mail", **ROWS[name]}
    assert detect_format(row) == name
    assert to_chat(row, name, 1).messages == CHAT


def test_a_forced_format_wins_over_the_columns_that_would_be_recognised():
    forced = {"prompt": "forced?", "completion": "yes"}
    chats = ChatDataset.load([{**ROWS["messages"], **forced}], TOKENIZER, max_length=64, format="prompt_completion")
    assert chats.format == "prompt_completion"
    assert list(chats) == list(ChatDataset.load([forced], TOKENIZER, max_length=64))


def test_a_column_that_is_present_but_empty_does_not_decide_the_format():
    """``datasets`` fills the columns that a row lacks with None."""
    assert detect_format({"messages": None, "prompt": "a", "completion": "b"}) == "prompt_completion"


def test_other_spellings_of_a_format_are_known_and_unknown_ones_list_the_allowed():
    spellings = {"conversations": "sharegpt", "prompt-completion": "prompt_completion", "chatml": "messages"}
    assert {name: known_format(name) for name in spellings} == spellings
    assert known_format("auto") == "auto"
    with pytest.raises(DataError, match=r"format='csv'.*'auto'.*'messages'.*'text'"):
        known_format("csv")


TURNS = st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TURNS, st.none() | st.text(min_size=1, max_size=20))
def test_messages_and_sharegpt_keep_every_role_and_character_of_a_chat(turns, system):
    chat = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    other = {"user": "human", "assistant": "gpt", "system": "system"}
    conversation = [{"from": other[m["role"]], "value": m["content"]} for m in chat]
    assert to_chat({"messages": chat}, "messages", 1).messages == chat
    assert to_chat({"conversations": conversation}, "sharegpt", 1).messages == chat
    without_system = conversation if system is None else conversation[1:]
    assert to_chat({"conversations": without_system, "system": system}, "sharegpt", 1).messages == chat
    as_cell = {"messages": json.dumps(chat)}  # a CSV cell
    assert to_chat(as_cell, "messages", 1).messages == chat


@pytest.mark.parametrize("tool", ["observation", "function_response", "tool"])
@pytest.mark.parametrize("model", ["gpt", "chatgpt", "bing", "bard", "model"])
def test_a_sharegpt_speaker_has_the_role_it_had_in_its_dataset(model, tool):
    speakers = ["human", model, tool, model]
    turns = [{"from": who, "value": m["content"]} for who, m in zip(speakers, TOOL_CHAT, strict=True)]
    assert to_chat({"conversations": turns}, "sharegpt", 1).messages == TOOL_CHAT
    assert to_chat({"conversations": TOOL_CHAT}, "sharegpt", 1).messages == TOOL_CHAT, "role and content are known too"


def test_a_turn_keeps_whether_it_is_trained():
    for flag, kept in ((False, False), (0, False), (True, True)):
        turns = [{**CHAT[0], "weight": 1}, {**CHAT[1], "train": flag}]
        expected = [CHAT[0], {**CHAT[1], "train": kept}]
        assert to_chat({"messages": turns}, "messages", 1).messages == expected
        speech = [{"from": m["role"], "value": m["content"], "train": m.get("train")} for m in turns]
        assert to_chat({"conversations": speech}, "sharegpt", 1).messages == expected
        assert to_chat({"prompt": turns[:1], "completion": turns[1:]}, "prompt_completion", 1).messages == expected
    assert to_chat({"messages": [CHAT[0], {**CHAT[1], "train": None}]}, "messages", 1).messages == CHAT


def test_a_content_of_text_parts_is_their_text_joined():
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    assert to_chat({"messages": [{"role": "user", "content": parts}, CHAT[1]]}, "messages", 1).messages == CHAT
    assert to_chat({"instruction": parts, "output": ANSWER}, "alpaca", 1).messages == CHAT


def test_trl_s_conversational_prompt_and_completion_join_to_one_chat():
    row = {"prompt": [{"role": "system", "content": "Be brief."}, CHAT[0]], "completion": [CHAT[1]]}
    assert detect_format(row) == "prompt_completion"
    assert to_chat(row, "prompt_completion", 1).messages == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert to_chat({"prompt": QUESTION, "completion": [CHAT[1]]}, "prompt_completion", 1).messages == CHAT


@pytest.mark.parametrize("name", ["sharegpt", "alpaca", "prompt_completion"])
def test_a_system_column_becomes_the_system_message_and_an_empty_one_none(name):
    system = {"role": "system", "content": "Be brief."}
    assert to_chat({**ROWS[name], "system": "Be brief."}, name, 1).messages == [system, *CHAT]
    assert to_chat({**ROWS[name], "system": ""}, name, 1).messages == CHAT
    for system in (float("nan"), {"a": 1}):  # pandas has NaN in empty cells: not a system prompt "nan"
        assert "row 7" in refusal({**ROWS[name], "system": system}, name)


def test_alpaca_s_input_follows_the_instruction_after_an_empty_line():
    chat = to_chat({"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}, "alpaca", 1).messages
    assert chat[0]["content"] == "Translate.\n\nBonjour"
    assert to_chat({"instruction": QUESTION, "input": "", "output": ANSWER}, "alpaca", 1).messages == CHAT


PHI3_TEXTS = {
    "the cookbook's": f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n{ANSWER}<|end|>",
    "bos and eos": f"<s><|user|>\n{QUESTION}<|end|>\n<|assistant|>\n{ANSWER}<|end|>\n<|endoftext|>",
    "no line ends": f"<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|>",
    "no end of turn": f"<|user|>\n{QUESTION}\n<|assistant|>\n{ANSWER}",
    "phi-4s": f"<|im_start|>user<|im_sep|>{QUESTION}<|im_end|><|im_start|>assistant<|im_sep|>{ANSWER}<|im_end|>",
    "phi-4's, cut": f"<|im_start|>user<|im_sep|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant<|im_sep|>\n{ANSWER}",
}


@pytest.mark.parametrize("text", PHI3_TEXTS.values(), ids=PHI3_TEXTS)
def test_text_in_phi_3_and_phi_4_markers_is_read_as_the_chat_it_renders(text):
    assert to_chat({"text": text}, "text", 1).messages == CHAT


def test_text_keeps_all_four_roles_and_line_ends_inside_a_turn():
    text = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in [{"role": "system", "content": "a\n\nb"}])
    text += "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in TOOL_CHAT)
    assert to_chat({"text": text}, "text", 1).messages == [{"role": "system", "content": "a\n\nb"}, *TOOL_CHAT]


PHI3_TURNS = f"<|user|>\n{QUESTION}<|end|>\nSTRAY<|assistant|>\n{ANSWER}<|end|>"
PHI4_TURNS = f"{PHI3_TEXTS['phi-4s']} stray"


@pytest.mark.parametrize("text", ["no marker", "", f"stray {PHI3_TEXTS['no line ends']}", PHI3_TURNS, PHI4_TURNS])
def test_text_with_words_outside_the_turns_is_refused_and_not_dropped(text):
    message = refusal({"text": text}, "text")
    assert "row 7" in message and "<|user|>" in message


@pytest.mark.parametrize("name", ROWS)
def test_columns_maps_our_names_to_the_row_s(name):
    columns = {ours: f"my_{ours}" for ours in COLUMNS[name]}
    row = {columns[ours]: value for ours, value in ROWS[name].items()}
    assert detect_format(row, columns) == name
    assert to_chat(row, name, 1, columns).messages == CHAT
    message = refusal({"wrong": 1}, name, columns=columns)
    assert message.startswith("row 7") and "the keys 'wrong'" in message
    assert "'my_" in message, "what is missing is named as the file would spell it"
    if name == "alpaca":  # the optional columns too
        row, columns = {**row, "extra": "Now.", "rules": "Brief."}, {**columns, "input": "extra", "system": "rules"}
        contents = [m["content"] for m in to_chat(row, name, 1, columns).messages]
        assert contents == ["Brief.", f"{QUESTION}\n\nNow.", ANSWER]


def test_a_name_in_columns_that_no_format_has_is_refused():
    with pytest.raises(DataError, match=r"'question' is not one of .*completion.*prompt"):
        ChatDataset.load([ROWS["messages"]], TOKENIZER, max_length=64, columns={"question": "prompt"})


def test_an_unknown_format_shows_the_row_s_keys_and_what_each_format_needs():
    with pytest.raises(DataError) as caught:
        detect_format({"question": "a", "reply": "b"})
    message = str(caught.value)
    assert "'question', 'reply'" in message
    assert all(column in message for needed in COLUMNS.values() for column in needed)
    assert "columns=" in message


ORDERS = [
    "assistant",
    "user, user, assistant",
    "user, system, assistant",
    "system, assistant",
    "user, tool, assistant",
    "user, assistant, tool, user, assistant",
]


@pytest.mark.parametrize("order", [*ORDERS, "user", "system, user", ""])
def test_roles_out_of_order_or_without_an_assistant_are_refused(order):
    message = refusal({"messages": [{"role": role, "content": "x"} for role in order.split(", ") if role]})
    assert message.startswith("row 7")
    assert "roles out of order" in message and f"({order})" in message if order in ORDERS else "no assistant" in message


@pytest.mark.parametrize("role", ["usr", None, 3])
def test_an_unknown_role_is_refused_and_the_known_ones_are_listed(role):
    message = refusal({"messages": [{"role": role, "content": "x"}, CHAT[1]]})
    assert f"row 7: role {role!r}" in message
    assert "user" in message and "gpt" in message


IMAGE = [{"type": "image_url", "image_url": "x.png"}, {"type": "text", "text": "What is it?"}]
HALF_A_SURROGATE_PAIR = "half \ud83d"  # legal in JSON: an emoji cut in half


@pytest.mark.parametrize("content", [None, 3, float("nan"), IMAGE, [], ["x"], HALF_A_SURROGATE_PAIR], ids=ascii)
def test_content_that_is_not_text_is_refused_with_its_type(content):
    message = refusal({"messages": [{"role": "user", "content": content}, CHAT[1]]})
    assert "row 7" in message and type(content).__name__ in message
    assert "row 7" in refusal({**ROWS["alpaca"], "output": content}, "alpaca")
    assert "row 7" in refusal({**ROWS["prompt_completion"], "prompt": content}, "prompt_completion")


@pytest.mark.parametrize("value", ["not JSON", "[1, 2]", [1], 5], ids=repr)
@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_turns_that_are_not_a_list_of_dicts_are_refused_with_the_column(name, value):
    message = refusal({COLUMNS[name][0]: value}, name)
    assert "row 7" in message and "list of turns" in message


def test_a_tool_role_is_rendered_if_the_template_knows_it_and_refused_otherwise():
    known = make_tokenizer("phi-4-mini")
    document = ChatDataset.load([{"messages": TOOL_CHAT}], known, max_length=64)[0]
    assert known.decode(document["input_ids"]).count("<|tool|>rain<|end|>") == 1
    trained = known.decode([label for label in document["labels"] if label >= 0])
    assert trained == "weather()<|end|>It rains.<|end|>"
    with pytest.raises(DataError, match=r"row 2: .*role 'tool'"):
        ChatDataset.load([{"messages": CHAT}, {"messages": TOOL_CHAT}], TOKENIZER, max_length=64)


def test_the_caller_s_rows_are_left_as_they_were():
    row = {"messages": [{**CHAT[0]}, {**CHAT[1], "train": True, "weight": 1}]}
    before = json.dumps(row)
    ChatDataset.load([row], TOKENIZER, max_length=64)
    assert json.dumps(row) == before
