"""Text in the family's markers is read to the letter; a prompt that is templated already is not templated again."""

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import trained

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.formats import to_chat
from phi3lora.errors import DataError

TOKENIZERS = {name: make_tokenizer(name) for name in ("phi-3", "phi-4", "phi-4-mini")}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}


def phi3(chat, newline="\n"):
    return "".join(f"<|{m['role']}|>{newline}{m['content']}<|end|>{newline}" for m in chat)


def phi4(chat, newline=""):
    return "".join(f"<|im_start|>{m['role']}<|im_sep|>{newline}{m['content']}<|im_end|>{newline}" for m in chat)


STYLES = [(phi3, ""), (phi3, "\n"), (phi3, "\r\n"), (phi4, ""), (phi4, "\n")]


def read(text):
    return to_chat({"text": text}, "text", 7).messages


CONTENTS = st.text("ab \n\r\t<|>", max_size=12).filter(lambda text: not text.startswith(("\r", "\n")))


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3), st.sampled_from(STYLES))
def test_a_content_is_what_stands_between_its_markers_to_the_letter(turns, style):
    render, newline = style
    pairs = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
    chat = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    assert read(render(chat, newline)) == chat
    assert read(f"\n<s>{render(chat, newline)}<|endoftext|>\n") == chat


@pytest.mark.parametrize("name", ["phi-4", "phi-4-mini"])
def test_indentation_and_the_final_line_end_of_an_answer_are_trained(name):
    render = phi4 if name == "phi-4" else phi3
    code = {"role": "assistant", "content": "    return x\n"}
    text = {"text": render([USER, code], "")}
    pair = {"prompt": "Hi", "completion": code["content"]}
    assert trained(text, TOKENIZERS[name]).startswith("    return x\n<|")
    assert trained(text, TOKENIZERS[name]) == trained(pair, TOKENIZERS[name])


def test_a_line_end_is_the_markers_own_only_if_each_turn_has_one():
    one = "<|user|>Hi<|end|><|assistant|>\nHello!<|end|>"
    assert read(one) == [USER, {**ANSWER, "content": "\nHello!"}]
    assert read(phi3([USER, {**ANSWER, "content": "\nHello!"}])) == [USER, {**ANSWER, "content": "\nHello!"}]
    empty = [{"role": "system", "content": ""}, USER, ANSWER]
    assert read("<|system|><|end|>" + phi3(empty[1:])) == empty, "an empty turn has no say"


@pytest.mark.parametrize("end", ["", "\n", "  \n"])
def test_white_space_before_an_end_that_is_not_marked_is_no_content(end):
    assert read(f"<|user|>\nHi{end}<|assistant|>\nHello!{end}") == [USER, ANSWER]
    assert read(f"<|im_start|>user<|im_sep|>Hi{end}<|im_start|>assistant<|im_sep|>Hello!{end}") == [USER, ANSWER]


@pytest.mark.parametrize("render", [phi3, phi4])
def test_a_text_that_ends_where_an_answer_begins_is_refused(render):
    marker = render([ANSWER]).partition("Hello!")[0]
    with pytest.raises(DataError, match="row 7: 'text' ends where an answer begins"):
        read(render([USER, ANSWER, USER]) + marker)


def test_tools_in_the_system_turn_are_the_message_s_tools():
    chat = [{**SYSTEM, "content": 'Be brief.<|tool|>[{"name": "stock"}]<|/tool|>'}, USER, ANSWER]
    assert read(phi3(chat, "")) == [{**SYSTEM, "tools": '[{"name": "stock"}]'}, USER, ANSWER]


PAIRS = {"prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output")}


def pair(name, prompt, answer):
    return to_chat(dict(zip(PAIRS[name], (prompt, answer), strict=True)), name, 7)


@pytest.mark.parametrize("end", ["", "end", "end\n", "end and eos", "eos"])
@pytest.mark.parametrize(("render", "newline"), STYLES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_templated_prompt_is_read_as_the_chat_that_it_is(name, render, newline, end):
    chat = [SYSTEM, USER, {**ANSWER, "content": "EARLIER"}, USER]
    marker, _, closing = render([ANSWER], newline).partition("Hello!")
    closing = closing.strip()
    after = {"": "", "end": closing, "end\n": f"{closing}\n", "end and eos": f"{closing}\n<|endoftext|>"}.get(end)
    prompt, answer = render(chat, newline) + marker, "Hello!" + ("<|endoftext|>" if after is None else after)
    for spelled in (prompt, f"<s>{prompt}", prompt.rstrip()):
        found = pair(name, spelled, answer)
        assert found.messages == [*chat, ANSWER]
        assert found.prompt_messages == len(chat)
    split_before_the_marker = pair(name, render(chat, newline), marker + answer)
    assert (split_before_the_marker.messages, split_before_the_marker.prompt_messages) == ([*chat, ANSWER], len(chat))
    without_marker = pair(name, render(chat, newline), answer)
    assert (without_marker.messages, without_marker.prompt_messages) == ([*chat, ANSWER], len(chat))


@pytest.mark.parametrize("answer", ["    return x\n", " Hello!", "\n\nHello!", ""], ids=repr)
@pytest.mark.parametrize("newline", ["", "\n"])
def test_the_answer_to_a_templated_prompt_is_kept_to_the_letter(answer, newline):
    found = pair("prompt_completion", phi3([USER], newline) + f"<|assistant|>{newline}", answer)
    assert found.messages == [USER, {**ANSWER, "content": answer}]


@pytest.mark.parametrize(("render", "newline"), STYLES)
def test_an_answer_with_further_turns_is_read_to_its_end(render, newline):
    marker, _, closing = render([ANSWER], newline).partition("Hello!")
    further = [USER, {**ANSWER, "content": "Again!"}]
    answer = "Hello!" + closing + render(further, newline)
    for prompt in (render([USER], newline) + marker, (render([USER], newline) + marker).rstrip()):
        found = pair("prompt_completion", prompt, answer)
        assert (found.messages, found.prompt_messages) == ([USER, ANSWER, *further], 1)


def test_a_templated_row_trains_the_answer_once_and_says_how_it_was_read():
    row = {"prompt": "<|user|>\nHi<|end|>\n<|assistant|>\n", "completion": "Hello!<|end|>"}
    chats = ChatDataset.load([row], TOKENIZERS["phi-3"], max_length=64)
    assert list(chats) == list(
        ChatDataset.load([{"prompt": "Hi", "completion": "Hello!"}], TOKENIZERS["phi-3"], max_length=64)
    )
    assert chats.format == "prompt_completion"
    assert chats.findings.rows_by_form == {"prompt_completion as text": 1}
    assert "rows by form: prompt_completion as text 1" in repr(chats)
    assert not chats.findings.kept_as_text and not chats.findings.advice


def test_a_templated_prompt_stands_beside_nothing_that_would_be_templated():
    prompt = phi3([USER]) + "<|assistant|>\n"
    with pytest.raises(DataError, match="row 7: 'prompt' is templated already; allowed: a text"):
        pair("prompt_completion", prompt, [ANSWER])
    with pytest.raises(DataError, match="row 7: 'instruction' is templated already; allowed: no 'history'"):
        to_chat({"instruction": prompt, "output": "Hello!", "history": [["Q", "A"]]}, "alpaca", 7)


@pytest.mark.parametrize(
    "prompt", ["Hi <|assistant|>", "Hi\n<|im_start|>assistant<|im_sep|>", "<|user|>Hi<|end|>x<|assistant|>"]
)
def test_a_prompt_that_is_templated_in_part_is_refused(prompt):
    with pytest.raises(DataError, match=r"row 7: a prompt with the template's markers is not a chat.*no text outside"):
        pair("prompt_completion", prompt, "Hello!")
