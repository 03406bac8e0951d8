"""Every row format gives the same chat; every bad row is named by its number and its keys."""

import json

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.findings import Findings
from phi3lora.data.formats import COLUMNS, OPTIONAL, Chat, check_columns, detect_format, known_format, to_chat
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


def trained(row, tokenizer=TOKENIZER, **options) -> str:
    document = ChatDataset.load([row], tokenizer, max_length=256, **options)[0]
    return tokenizer.decode([label for label in document["labels"] if label >= 0])


def load(rows, **options) -> ChatDataset:
    return ChatDataset.load(rows, TOKENIZER, max_length=256, **options)


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


@settings(max_examples=30, derandomize=True)
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


SYSTEM = {"role": "system", "content": "Be brief."}
PROMPTS = {"a text": (QUESTION, CHAT[:1]), "a message": (CHAT[0], CHAT[:1]), "messages": (CHAT[:1], CHAT[:1])}
PROMPTS |= {"a chat so far": ([SYSTEM, *CHAT, CHAT[0]], [SYSTEM, *CHAT, CHAT[0]])}


@pytest.mark.parametrize("completion", [ANSWER, CHAT[1], [CHAT[1]]], ids=["text", "message", "messages"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_and_a_completion_join_to_one_chat_of_which_the_completion_is_trained(prompt, completion):
    given, messages = PROMPTS[prompt]
    row = {"prompt": given, "completion": completion}
    assert detect_format(row) == "prompt_completion"
    chat = to_chat(row, "prompt_completion", 1)
    assert chat.messages == [*messages, CHAT[1]]
    assert chat.prompt_messages == len(messages)
    if messages[0] != SYSTEM:
        chat = to_chat({**row, "system": "Be brief."}, "prompt_completion", 1)
        assert chat.messages == [SYSTEM, *messages, CHAT[1]]
        assert chat.prompt_messages == len(messages) + 1


def test_turns_in_a_cell_as_json_are_turns_and_a_text_about_json_is_a_text():
    cells = {"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])}
    turns = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert to_chat(cells, "prompt_completion", 1) == to_chat(turns, "prompt_completion", 1)
    for column, text in (*cells.items(), ("completion", '[{"name": "stock"}]'), ("completion", "[{")):
        row = {**ROWS["prompt_completion"], column: text}
        role = "user" if column == "prompt" else "assistant"
        assert {"role": role, "content": text} in to_chat(row, "prompt_completion", 1).messages


def test_answers_inside_a_prompt_are_not_trained_and_those_of_alpaca_s_history_are():
    prompt = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "EARLIER"}, CHAT[0]]
    row = {"prompt": prompt, "completion": [CHAT[1]]}
    assert trained(row) == f"{ANSWER}<|end|>"
    assert list(load([row], train_on="all")) == list(load([{"messages": [*prompt, CHAT[1]]}], train_on="all"))
    row = {"instruction": QUESTION, "input": "", "output": ANSWER, "history": [["Q1", "EARLIER"]]}
    assert trained(row) == f"EARLIER<|end|>{ANSWER}<|end|>"
    assert to_chat({**row, "system": "Be brief."}, "alpaca", 1).messages == [SYSTEM, *prompt, CHAT[1]]
    assert trained({**row, "history": json.dumps(row["history"])}) == trained(row)
    for empty in ([], None, "", float("nan")):
        assert to_chat({**row, "history": empty}, "alpaca", 1).messages == CHAT
    for history in ([["Q1"]], "EARLIER", 5, [["Q1", None]], [{"role": "user"}]):
        assert "row 7: " in (message := refusal({**row, "history": history}, "alpaca")) and "'history'" in message


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt_completion", "text"])
def test_a_system_column_beside_a_system_message_is_equal_or_refused(name):
    row = {
        "messages": {"messages": [SYSTEM, *CHAT]},
        "sharegpt": {"conversations": [SYSTEM, *CHAT]},
        "prompt_completion": {"prompt": [SYSTEM, CHAT[0]], "completion": ANSWER},
        "text": {"text": f"<|system|>\nBe brief.<|end|>\n{ROWS['text']['text']}"},
    }[name]
    assert to_chat({**row, "system": "Be brief."}, name, 1) == to_chat(row, name, 1)
    message = refusal({**row, "system": "Be long."}, name)
    assert "row 7" in message and "'Be long.'" in message and "'Be brief.'" in message


def test_a_system_column_takes_the_place_of_an_empty_system_message():
    chat = [{"role": "system", "content": ""}, *CHAT]
    assert to_chat({"messages": chat, "system": "Be brief."}, "messages", 1).messages == [SYSTEM, *CHAT]
    assert to_chat({"messages": chat}, "messages", 1).messages == chat


TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"sku": {"type": "string"}}}}]


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_has_tools_as_a_list_or_as_json(name, column):
    for value in (TOOLS, json.dumps(TOOLS)):
        assert to_chat({**ROWS[name], column: value}, name, 1).tools == TOOLS
    for empty in (None, "", "[]", [], float("nan"), " "):
        assert to_chat({**ROWS[name], column: empty}, name, 1).tools is None
    assert f"row 7: {column!r} is text but not JSON" in refusal({**ROWS[name], column: "stock, price"}, name)
    assert f"row 7: {column!r} is 5" in refusal({**ROWS[name], column: 5}, name)
    assert "differ" in refusal({**ROWS[name], "tools": TOOLS, "functions": [{"name": "price"}]}, name)


def test_plain_text_is_kept_to_the_letter_and_has_no_context():
    for text in ("  Once upon a time\n", "no marker", f"stray {PHI3_TEXTS['no line ends']}"):
        assert to_chat({"text": text}, "text", 1) == Chat([], text=text)
        assert "plain text" in refusal({"text": text, "system": "Be brief."}, "text")
    assert "row 7: 'text' is empty" in refusal({"text": " \n"}, "text")


@pytest.mark.parametrize("name", ROWS)
def test_a_system_column_becomes_the_system_message_and_an_empty_one_none(name):
    system = {"role": "system", "content": "Be brief."}
    assert to_chat({**ROWS[name], "system": "Be brief."}, name, 1).messages == [system, *CHAT]
    for empty in ("", None, float("nan"), [], {}):  # pandas has NaN in empty cells
        assert to_chat({**ROWS[name], "system": empty}, name, 1).messages == CHAT
    assert "row 7: 'system' is dict" in refusal({**ROWS[name], "system": {"a": 1}}, name)


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
    chat = [{"role": "system", "content": "a\n\nb"}, *TOOL_CHAT]
    for newline in ("", "\n", "\r\n"):
        text = "".join(f"<|{m['role']}|>{newline}{m['content']}<|end|>{newline}" for m in chat)
        assert to_chat({"text": text}, "text", 1).messages == chat


PHI3_TURNS = f"<|user|>\n{QUESTION}<|end|>\nSTRAY<|assistant|>\n{ANSWER}<|end|>"
PHI4_TURNS = f"{PHI3_TEXTS['phi-4s']} stray"


@pytest.mark.parametrize("text", [PHI3_TURNS, PHI4_TURNS, "<|im_start|>user\nChatML<|im_end|>"])
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


@pytest.mark.parametrize("name", ROWS)
def test_optional_columns_can_be_mapped_too(name):
    chat = to_chat({**ROWS[name], "sp": "Be brief.", "fn": TOOLS}, name, 1, {"system": "sp", "tools": "fn"})
    assert chat.messages == [SYSTEM, *CHAT] and chat.tools == TOOLS


def test_columns_win_over_the_columns_that_would_be_recognised():
    row = {"instruction": QUESTION, "output": "draft", "final": ANSWER}
    chats = load([row], columns={"prompt": "instruction", "completion": "final"})
    assert chats.format == "prompt_completion"
    assert list(chats) == list(load([ROWS["messages"]]))
    assert chats.findings.unused == {"output": 1}
    row = {**ROWS["messages"], "body": f"<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|>"}
    assert load([row], columns={"text": "body"}).format == "text"


def test_a_column_that_is_mapped_is_not_read_a_second_time_under_its_own_name():
    columns = {"instruction": "input", "output": "system"}
    assert to_chat({"input": QUESTION, "system": ANSWER}, "alpaca", 1, columns).messages == CHAT


def test_names_in_columns_that_no_format_has_are_refused():
    with pytest.raises(DataError, match=r"'question' is not one of .*completion.*prompt"):
        load([ROWS["messages"]], columns={"question": "prompt"})
    for columns, format in (({"messages": "a", "output": "b"}, "auto"), ({"prompt": "a"}, "alpaca")):
        with pytest.raises(DataError, match=r"not all of them are columns of .*allowed: .*alpaca: instruction, output"):
            load([ROWS["messages"]], columns=columns, format=format)
    check_columns({column: column for column in COLUMNS["alpaca"] + OPTIONAL["alpaca"]}, "alpaca")


@pytest.mark.parametrize("columns", [{"input": "contxt"}, {"system": "contxt"}, {"completion": "contxt"}])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_mapped_column_that_no_row_has_is_refused(columns, on_bad_row):
    rows = [ROWS["prompt_completion"] if "completion" in columns else ROWS["alpaca"]] * 3
    with pytest.raises(DataError, match="'contxt'"):
        load(rows, columns=columns, on_bad_row=on_bad_row)
    with pytest.raises(DataError, match="'contxt'"):
        load(rows, columns=columns, streaming=True).first_window  # noqa: B018
    with pytest.raises(DataError, match="Did you mean 'context'" if "completion" not in columns else "'contxt'"):
        load([{**row, "context": ""} for row in rows], columns=columns, on_bad_row=on_bad_row)
    if "completion" not in columns:
        assert len(load([*rows, {**rows[0], "contxt": "Now."}], columns=columns)) == 4, "one row has it"


def test_rows_of_several_formats_are_read_each_in_its_own():
    rows = [ROWS["alpaca"], *(ROWS[name] for name in ROWS), ROWS["alpaca"]]
    chats = load(rows)
    assert chats.format == "alpaca, messages, prompt_completion, sharegpt, text"
    assert chats.findings.rows_by_form == {**dict.fromkeys(ROWS, 1), "alpaca": 3}
    assert list(chats) == [load([ROWS["messages"]])[0]] * len(rows)
    cells = [{column: row.get(column, "") for each in ROWS.values() for column in each} for row in rows]
    assert list(load(cells)) == list(chats), "in a CSV file the other columns are empty"
    with pytest.raises(DataError, match=r"row 2: format 'alpaca' needs 'instruction', 'output'"):
        load(rows, format="alpaca")


def test_the_first_row_s_format_is_tried_first():
    both = {**ROWS["messages"], **ROWS["alpaca"]}
    assert load([ROWS["alpaca"], both]).format == "alpaca"
    assert load([ROWS["messages"], both]).format == "messages"
    stream = load([ROWS["alpaca"], ROWS["alpaca"], ROWS["messages"], both], streaming=True, buffer_size=2)
    assert [window.format for _, window in stream.windows(endless=False)] == ["alpaca", "messages"]


def test_columns_that_hold_something_and_are_not_read_are_counted():
    row = {"id": 0, "source": "mail", "note": "", "score": None, "rating": float("nan"), "tags": [], **ROWS["messages"]}
    assert load([row, {**row, "note": "x"}]).findings.unused == {"id": 2, "source": 2, "note": 1}
    assert load([{**row, "system": "Be brief."}]).findings.unused == {"id": 1, "source": 1}


def test_nothing_is_counted_of_a_row_that_is_refused():
    findings = Findings()
    with pytest.raises(DataError):
        to_chat({"id": 5, "messages": [CHAT[0], {**CHAT[1], "train": False}, CHAT[1]]}, "messages", 1, None, findings)
    assert findings == Findings()


def test_an_unknown_format_shows_the_row_s_keys_and_what_each_format_needs():
    with pytest.raises(DataError) as caught:
        detect_format({"question": "a", "reply": "b"})
    message = str(caught.value)
    assert "'question', 'reply'" in message
    assert all(column in message for needed in COLUMNS.values() for column in needed)
    assert "columns=" in message


ORDERS = [
    "assistant",
    "user, assistant, assistant",
    "user, assistant, tool, assistant, user, assistant, assistant",
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
    assert ("'assistant' first (" in message) == order.startswith("assistant") and "'start'" not in message


def test_with_tools_several_assistant_turns_may_follow_one_another():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
    user, said, result, answer = TOOL_CHAT
    for chat in ([user, said, call, result, answer], [user, call, call, result, result, answer, answer]):
        assert to_chat({"messages": chat}, "messages", 1).messages == chat


@pytest.mark.parametrize("role", ["usr", None, 3])
def test_an_unknown_role_is_refused_and_the_known_ones_are_listed(role):
    message = refusal({"messages": [{"role": role, "content": "x"}, CHAT[1]]})
    assert f"row 7: role {role!r}" in message
    assert "user" in message and "gpt" in message


IMAGE = [{"type": "image_url", "image_url": "x.png"}, {"type": "text", "text": "What is it?"}]
HALF_A_SURROGATE_PAIR = "half \ud83d"  # legal in JSON: an emoji cut in half


@pytest.mark.parametrize("content", [None, 3, float("nan"), IMAGE, [], [1], HALF_A_SURROGATE_PAIR], ids=ascii)
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


def test_a_row_whose_columns_have_no_value_says_so_and_one_of_another_type_says_what_is_allowed():
    with pytest.raises(DataError, match=r"keys 'messages', 'id' \('messages' without a value\), which fit no known"):
        detect_format({"messages": None, "id": 3})
    for value in (b"Q", 42):
        with pytest.raises(DataError, match=r"'prompt' is .*; allowed: text, or a list of turns"):
            to_chat({"prompt": value, "completion": "A"}, "prompt_completion", 1)
