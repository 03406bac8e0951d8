"""What a turn says is in its message: role, content, whether it is trained, and every other key."""

import copy
import json

import numpy as np
import pytest
from conftest import make_tokenizer

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.findings import Findings
from phi3lora.data.formats import to_chat
from phi3lora.data.turns import ROLES
from phi3lora.errors import DataError

TOKENIZER = make_tokenizer()
USER, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}
CALL = {"name": "stock", "arguments": {"sku": "A7"}}


def read(*turns, findings=None):
    return to_chat({"messages": list(turns)}, "messages", 7, None, findings).messages


def refusal(*turns) -> str:
    with pytest.raises(DataError) as caught:
        read(*turns)
    assert str(caught.value).startswith("row 7: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_known_in_small_and_in_capital_letters(name):
    role = ROLES[name]
    content = json.dumps(CALL) if name.endswith("_call") else "x"
    before = {"system": [], "user": [], "assistant": [USER], "tool": [USER, ANSWER]}[role]
    after = {"system": [USER, ANSWER], "user": [ANSWER], "assistant": [], "tool": []}[role]
    for spelled in (name, name.capitalize(), name.upper()):
        found = read(*before, {"role": spelled, "content": content}, *after)
        assert found[len(before)]["role"] == role
        assert found == read(*before, {"from": spelled, "value": content}, *after)


KEYS = [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("speaker", "text")]


@pytest.mark.parametrize("keys", [*KEYS, ("role", "parts")])
def test_other_makers_keys_of_role_and_content_are_read(keys):
    chat = [dict(zip(keys, (m["role"], m["content"]), strict=True)) for m in (USER, ANSWER)]
    if keys[1] == "parts":  # Gemini
        chat = [{**turn, "parts": [{"text": turn["parts"]}]} for turn in chat]
    assert read(*chat) == [USER, ANSWER]
    filled = [{**dict.fromkeys(("role", "from", "content", "value", "text", "parts")), **turn} for turn in chat]
    assert read(*filled) == [USER, ANSWER], "a table fills the keys that a row lacks with None"
    assert to_chat({"conversations": chat}, "sharegpt", 1).messages == [USER, ANSWER]


@pytest.mark.parametrize("key", ["image", "images", "audio", "video", "image_url", "input_audio"])
def test_media_in_a_message_or_beside_a_part_s_text_are_refused(key):
    for turns in ([{**USER, key: ["a.png"]}, ANSWER], [USER, {**ANSWER, key: "a.png"}]):
        assert repr(key) in refusal(*turns)
    for part in ({"type": "text", "text": "x", key: "a.png"}, {"text": "x", key: {"url": "a.png"}}):
        assert repr(key) in refusal({**USER, "content": [part]}, ANSWER)
    assert read({**USER, key: None}, {**ANSWER, "content": [{"text": "x", key: None}]})[1]["content"] == "x"


def test_a_loss_switch_of_a_part_is_refused_and_its_other_keys_are_kept_for_the_count():
    for key in ("train", "weight", "loss", "mask"):
        assert repr(key) in refusal(USER, {**ANSWER, "content": [{"type": "text", "text": "x", key: 0}]})
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "y"}]
    found = read({**USER, "content": parts}, ANSWER)[0]
    assert found == {"role": "user", "content": "xy", "content.cache_control": {"type": "ephemeral"}}


def test_a_turn_without_a_role_is_refused_with_its_keys():
    assert "role None of a turn with the keys 'Role', 'content'" in refusal({"Role": "user", "content": "x"}, ANSWER)


def test_a_turn_that_says_two_things_is_refused_and_one_that_says_one_twice_is_read():
    assert read({**USER, "from": "human", "value": "Where?", "text": "Where?"}, ANSWER) == [USER, ANSWER]
    assert "'assistant'" in refusal({**USER, "from": "assistant"}, ANSWER)
    assert "'There?'" in refusal({**USER, "value": "There?"}, ANSWER)
    assert read({**USER, "text": "<b>Where?</b>"}, ANSWER)[0] == {**USER, "text": "<b>Where?</b>"}


PARTS = [
    [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}],
    [{"type": "input_text", "text": "Where?"}],
    [{"type": "output_text", "text": "Where?", "annotations": []}],
    [{"type": "text", "value": "Where?"}],
    [{"text": "Where?"}],
    [{"type": "text", "text": "Where?", "image_url": None}],
    ["Whe", "re?"],
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_text_parts_of_every_maker_are_joined(parts):
    assert read({**USER, "content": parts}, ANSWER) == [USER, ANSWER]
    row = {"instruction": parts, "output": "Here."}
    assert to_chat(row, "alpaca", 1).messages == [USER, ANSWER]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "tool_use", "thinking", "refusal", "file"])
def test_a_part_that_is_not_text_is_refused_by_its_type(kind):
    message = refusal({**USER, "content": [{"type": "text", "text": "Where?"}, {"type": kind, kind: {}}]}, ANSWER)
    assert repr(kind) in message and "allowed: parts of type 'text'" in message


SWITCHES = ("train", "training", "trainable", "weight", "loss_weight", "loss_scale")
ON, OFF = (1, 1.0, True, "1", "1.0", "true", "True"), (0, 0.0, False, "0", "0.0", "false", "False", np.int64(0))
CASES = [(switch, value) for switch in SWITCHES for value in (*ON, *OFF)] + [("loss", True), ("loss", False)]


@pytest.mark.parametrize(("switch", "value"), CASES)
def test_every_maker_s_switch_turns_the_training_of_an_answer_on_and_off(switch, value):
    findings, on = Findings(), value not in OFF
    turns = [USER, {**ANSWER, switch: value}]
    assert read(*turns, findings=findings) == [USER, {**ANSWER, "train": on}]
    assert findings.turns_switched_off == (not on)
    speech = [{"from": m["role"], "value": m["content"], **({switch: value} if m is turns[1] else {})} for m in turns]
    assert to_chat({"conversations": speech}, "sharegpt", 1).messages == read(*turns)
    row = {"prompt": turns[:1], "completion": turns[1:]}
    assert to_chat(row, "prompt_completion", 1).messages == read(*turns)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", [0.5, 2, -1, "0.3", "yes", [1], {"a": 1}, float("inf")], ids=str)
def test_a_fraction_or_another_value_of_a_switch_is_refused(switch, value):
    message = refusal(USER, {**ANSWER, switch: value})
    assert repr(switch) in message and repr(value) in message and "allowed: 1 or true" in message


@pytest.mark.parametrize("value", [None, "", float("nan"), []], ids=str)
def test_an_empty_switch_is_none(value):
    assert read(USER, {**ANSWER, "train": value, "weight": value}) == [USER, ANSWER]


def test_two_switches_agree_or_are_refused():
    assert read(USER, {**ANSWER, "train": False, "weight": 0}) == [USER, {**ANSWER, "train": False}]
    message = refusal(USER, {**ANSWER, "train": True, "weight": 0})
    assert "'train' is True" in message and "'weight' is 0" in message


@pytest.mark.parametrize("mask", ["train_detail", "training_detail", "masked", "mask", "loss_mask"])
def test_a_mask_of_part_of_a_message_is_refused(mask):
    message = refusal(USER, {**ANSWER, mask: [{"begin_offset": 0, "end_offset": 2, "train": False}]})
    assert repr(mask) in message and "'train'" in message
    assert read(USER, {**ANSWER, mask: None}) == [USER, ANSWER]


def test_a_loss_that_somebody_noted_is_no_switch():
    assert read(USER, {**ANSWER, "loss": 1.25}) == [USER, {**ANSWER, "loss": 1.25}]


def test_a_switch_on_another_s_turn_is_kept_if_off_and_named_if_on():
    findings = Findings()
    assert read({**USER, "weight": 0}, ANSWER, findings=findings) == [{**USER, "train": False}, ANSWER]
    assert findings == Findings(rows_by_form=findings.rows_by_form)
    assert read({**USER, "weight": 1}, ANSWER, findings=findings) == [USER, ANSWER]
    (sentence,) = findings.advice
    assert (
        "the user's message is switched on" in sentence
        and "train_on='all'" in sentence
        and findings.turns_switched_off == 0
    )


def test_an_answer_in_a_prompt_that_is_switched_on_is_named_and_not_trained():
    findings, prompt = Findings(), [USER, {**ANSWER, "weight": 1}, {**USER, "weight": 0}]
    chat = to_chat({"prompt": prompt, "completion": [{**ANSWER, "weight": 1}]}, "prompt_completion", 1, None, findings)
    assert chat.messages == [USER, ANSWER, {**USER, "train": False}, {**ANSWER, "train": True}]
    (sentence,) = findings.advice
    assert "the assistant's message in a prompt is switched on" in sentence and "train_on='all'" in sentence


def test_an_answer_with_weight_0_is_context_only():
    wrong, right = {**ANSWER, "content": "Quito", "weight": 0}, {**ANSWER, "content": "Lima.", "weight": 1}
    chats = ChatDataset.load([{"messages": [USER, wrong, USER, right]}], TOKENIZER, max_length=64)
    assert TOKENIZER.decode([label for label in chats[0]["labels"] if label >= 0]) == "Lima.<|end|>"
    assert chats.statistics()["turns_switched_off"] == 1 and "1 assistant turns switched off" in repr(chats)


@pytest.mark.parametrize(("train_on", "count"), [("assistant", 1), ("last", 1), ("all", 0)])
def test_a_last_turn_that_is_not_trained_is_counted(train_on, count):
    rows = [{"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER]}]
    chats = ChatDataset.load(rows, TOKENIZER, max_length=64, train_on=train_on)
    assert chats.statistics()["unanswered_last_turns"] == count
    assert ("1 last turn without an answer, not trained" in repr(chats)) == bool(count)


def test_other_keys_that_hold_something_are_passed_on():
    keys = {"name": "Ada", "reasoning_content": "Hm.", "score": 0, "flag": False, "tool_calls": [{"id": "1"}]}
    empty = {"refusal": None, "audio": "", "annotations": [], "extra": float("nan"), "function_call": None}
    assert read(USER, {**ANSWER, **keys, **empty}) == [USER, {**ANSWER, **keys}]


CALLS = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}]}
CALLS_OR_LEGACY = [CALLS, {"function_call": {"name": "stock", "arguments": "{}"}}]


@pytest.mark.parametrize("call", CALLS_OR_LEGACY, ids=["tool_calls", "function_call"])
def test_an_answer_that_calls_needs_no_content_and_results_of_parallel_calls_follow(call):
    result = {"role": "tool", "tool_call_id": "1", "content": "7"}
    for content in ({"content": None}, {}, {"content": ""}, {"content": float("nan")}):
        found = read(USER, {"role": "assistant", **content, **call}, result, {**result, "tool_call_id": "2"}, ANSWER)
        assert found == [
            USER, {"role": "assistant", "content": "", **call}, result, {**result, "tool_call_id": "2"}, ANSWER,
        ]  # fmt: skip
    again = read(USER, {"role": "assistant", **call}, result, {"role": "assistant", **call}, result, ANSWER)
    assert [m["role"] for m in again] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert "NoneType" in refusal(USER, {"role": "assistant", "content": None})
    assert "NoneType" in refusal({"role": "user", "content": None, **call}, ANSWER)


def test_a_misspelt_key_of_a_content_is_named():
    message = refusal(USER, {"role": "assistant", "contnet": "Hello!"})
    assert "the content of role 'assistant' in a turn with the keys 'role', 'contnet' is NoneType None" in message


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("many", [False, True])
def test_sharegpt_s_function_call_is_a_call_in_openai_s_form(role, many):
    calls = [CALL, {"name": "price", "arguments": '{"sku": 1}'}] if many else [CALL]
    for value in (calls if many else CALL, json.dumps(calls if many else CALL)):
        chat = [{"from": "human", "value": "Where?"}, {"from": role, "value": value, "weight": 0}]
        chat += [{"from": "observation", "value": "7"}, {"from": "gpt", "value": "Here."}]
        found = to_chat({"conversations": chat}, "sharegpt", 1).messages
        functions = [{"type": "function", "function": call} for call in calls]
        assert found[1] == {"role": "assistant", "content": "", "train": False, "tool_calls": functions}
        assert found[2:] == [{"role": "tool", "content": "7"}, ANSWER]


@pytest.mark.parametrize("value", ["stock()", "[]", "{}", '{"name": 5}', '"stock"', '{"name": "a", "color": 1}', None])
def test_a_function_call_that_is_none_is_refused(value):
    message = refusal(USER, {"role": "function_call", "content": value})
    assert "allowed: " in message and "arguments" in message


def test_the_caller_s_turns_are_left_as_they_were():
    turns = [{"from": "human", "value": "Where?", "weight": 1}, {"from": "function_call", "value": dict(CALL), "id": 3}]
    before = copy.deepcopy(turns)
    read(*turns)
    assert turns == before
