"""Rows from public reports of training on the wrong thing: each gives the right value, or a refusal that helps."""

from __future__ import annotations

import json
import re
from itertools import groupby

import pandas
import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken

from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import DataError

PHI3_NAMES = ["phi-3", "phi-3-legacy", "phi-3.5"]
EVERY_NAME = [*PHI3_NAMES, "phi-3-april", "phi-4", "phi-4-mini"]


def load(source, tokenizer, **options) -> ChatDataset:
    return ChatDataset.load(source, tokenizer, **{"max_length": 512, **options})


def documents(source, tokenizer, **options) -> list[dict]:
    return list(load(source, tokenizer, **options))


def trained(source, tokenizer, **options) -> list[list[str]]:
    """The trained spans of each document, decoded."""
    spans = []
    for document in documents(source, tokenizer, **options):
        runs = groupby(document["labels"], key=lambda label: label != -100)
        spans.append([tokenizer.decode(list(run), clean_up_tokenization_spaces=False) for now, run in runs if now])
    return spans


def text_of(source, tokenizer) -> str:
    """The only document, decoded."""
    (document,) = documents(source, tokenizer)
    return tokenizer.decode(document["input_ids"], clean_up_tokenization_spaces=False)


def chat(*contents: str, system: str | None = None) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [*([] if system is None else [{"role": "system", "content": system}]), *turns]}


def ends(name: str) -> str:
    return "<|im_end|>" if name == "phi-4" else "<|end|>"


STOCK = {"type": "function", "function": {"name": "stock"}}
SYSTEM_TOOLS = '[{"name":"stock","description":"Units in stock","parameters":{"sku":{"type":"str"}}}]'
CALL = '<|tool_call|>[{"name":"stock","arguments":{"sku":"A7"}}]<|/tool_call|>'


def test_tools_of_a_system_message_reach_the_template_and_the_call_s_markers_are_tokens():
    tokenizer = make_tokenizer("phi-4-mini")
    row = chat("How many A7 are left?", CALL, system="You can use tools.")
    row["messages"][0]["tools"] = SYSTEM_TOOLS
    assert trained([row], tokenizer) == [[f"{CALL}<|end|>"]]
    assert f"<|system|>You can use tools.<|tool|>{SYSTEM_TOOLS}<|/tool|><|end|><|user|>" in text_of([row], tokenizer)
    (document,) = documents([row], tokenizer)
    for token in ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"):
        assert document["input_ids"].count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert document["input_ids"] == tokenizer.apply_chat_template(row["messages"], return_dict=False)


def test_a_column_of_tools_is_rendered_in_the_family_s_own_place():
    tokenizer = make_tokenizer("phi-4-mini")
    row = {**chat("How many A7 are left?", "stock(A7)"), "tools": [STOCK]}
    assert trained([row], tokenizer) == [["stock(A7)<|end|>"]]
    system = re.fullmatch(r"<\|system\|>.*<\|tool\|>(.*)<\|/tool\|><\|end\|><\|user\|>.*", text_of([row], tokenizer))
    assert "stock" in json.dumps(json.loads(system[1]))


TOOL_ROWS = {
    "a column": {**chat("How many?", "stock(A7)"), "tools": [STOCK]},
    "a system message's": {
        "messages": [{"role": "system", "content": "x", "tools": SYSTEM_TOOLS}, *chat("How many?", "7")["messages"]]
    },
    "calls": {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **STOCK}]},
        ]
    },
}


@pytest.mark.parametrize("name", [*PHI3_NAMES, "phi-3-april", "phi-4"])
@pytest.mark.parametrize("kind", TOOL_ROWS)
def test_tools_that_the_template_does_not_render_are_refused_by_name(name, kind):
    key = "tool_calls" if kind == "calls" else "tools"
    with pytest.raises(DataError, match=rf"row 2\b.*{key}.*\b(use|write|describe|allowed)\b") as refusal:
        load([chat("Hi", "Hello!"), TOOL_ROWS[kind]], make_tokenizer(name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_user_s_own_token_is_one_id_in_questions_and_answers(name):
    tokenizer, rows = make_tokenizer(name), [chat("Where is <loc>?", "At <loc>Ankara</loc>.")]
    first = len(tokenizer)
    as_text = name != "phi-3-legacy"
    tokenizer.add_tokens([token if as_text else AddedToken(token, normalized=False) for token in ("<loc>", "</loc>")])
    dataset = load(rows, tokenizer)
    assert trained(rows, tokenizer) == [[f"At <loc>Ankara</loc>.{ends(name)}"]]
    assert [i for i in dataset[0]["input_ids"] if i >= first] == [first, first, first + 1]
    assert dataset.findings.added_tokens == {"<loc>": 2, "</loc>": 1}


def test_a_token_that_the_table_spells_with_a_space_is_refused_with_the_way_out():
    """Added as plain text, a token goes through tokenizer.json's normaliser, which puts a space into it."""
    tokenizer = make_tokenizer("phi-3-legacy")
    tokenizer.add_tokens(["<loc>", "</loc>"])
    assert trained([chat("Where?", "In Ankara.")], tokenizer) == [["In Ankara.<|end|>"]]
    with pytest.raises(DataError, match=r"'<loc>'.*normalized=False"):
        load([chat("Where is <loc>?", "At <loc>Ankara</loc>.")], tokenizer)


@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("answer", ["Price: <s>20</s> 15 euros", "</s>", "<s>30</s>", "</s> x", " <s> a </s>\r\n b "])
def test_html_s_strikethrough_is_trained_to_the_letter(name, answer):
    assert trained([chat("Price?", answer)], make_tokenizer(name)) == [[answer + ends(name)]]


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss_weight"])
def test_a_turn_of_weight_zero_is_context_alone(key):
    tokenizer = make_tokenizer("phi-4-mini")
    plain = chat("Capital of Peru?", "Quito", "Sure?", "Sorry: Lima.")
    row = {"messages": [dict(m) for m in plain["messages"]]}
    row["messages"][1][key], row["messages"][3][key] = 0, 1
    assert trained([row], tokenizer) == [["Sorry: Lima.<|end|>"]]
    dataset = load([row], tokenizer)
    assert dataset[0]["input_ids"] == load([plain], tokenizer)[0]["input_ids"]
    assert dataset.findings.turns_switched_off == 1
    assert "1 assistant turns switched off" in repr(dataset)
    row["messages"][1][key] = 0.5
    with pytest.raises(DataError, match=rf"row 1: '{key}' of a message is 0\.5; allowed: "):
        load([row], tokenizer)


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if name != "phi-3-april"])
def test_a_system_column_beside_the_messages_is_the_system_message(name):
    tokenizer, plain = make_tokenizer(name), chat("Good day?", "Bonjour.")
    with_system = chat("Good day?", "Bonjour.", system="Answer in French.")
    row = {"system": "Answer in French.", **plain}
    assert documents([row], tokenizer) == documents([with_system], tokenizer) != documents([plain], tokenizer)


def test_a_system_prompt_that_the_template_drops_is_refused():
    row = {"system": "Answer in French.", **chat("Good day?", "Bonjour.")}
    with pytest.raises(DataError, match=r"row 1: message 1: .*'system'; .*message of the user"):
        load([row], make_tokenizer("phi-3-april"))


@pytest.mark.parametrize(
    "history", [[["How tall is the door?", "2 metres."]], '[["How tall is the door?", "2 metres."]]']
)
def test_alpaca_s_history_comes_before_its_question(history):
    tokenizer = make_tokenizer("phi-4-mini")
    row = {
        "instruction": "And in feet?",
        "input": "",
        "output": "About 6.6 ft.",
        "system": "Be exact.",
        "history": history,
    }
    same = chat("How tall is the door?", "2 metres.", "And in feet?", "About 6.6 ft.", system="Be exact.")
    assert documents([row], tokenizer) == documents([same], tokenizer)


def test_columns_win_over_recognition_and_the_column_left_out_is_named():
    tokenizer, rows = make_tokenizer(), [{"instruction": "Q", "output": "draft", "final": "reviewed"}]
    columns = {"prompt": "instruction", "completion": "final"}
    dataset = load(rows, tokenizer, columns=columns)
    assert trained(rows, tokenizer, columns=columns) == [["reviewed<|end|>"]]
    assert dataset.format == "prompt_completion"
    assert dataset.findings.unused == {"output": 1}
    assert "output" in repr(dataset)
    with pytest.raises(DataError, match=r"row 1\b.*'last'.*columns="):
        load(rows, tokenizer, columns={"prompt": "instruction", "completion": "last"})


@pytest.mark.parametrize("name", EVERY_NAME)
def test_the_model_card_s_empty_system_message_is_rendered_as_the_template_does(name):
    tokenizer = make_tokenizer(name)
    rows = [chat("Hi", "Hello!", system=""), chat("Bye", "See you.", system="Be brief.")]
    if name == "phi-3-april":
        rows.pop()
    loaded = documents(rows, tokenizer)
    assert trained(rows, tokenizer) == [["Hello!" + ends(name)], ["See you." + ends(name)]][: len(rows)]
    own = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    assert [document["input_ids"] for document in loaded] == own
    drops = name in ("phi-3.5", "phi-3-april")
    assert (loaded[0] == documents([chat("Hi", "Hello!")], tokenizer)[0]) == drops


@pytest.mark.parametrize("name", PHI3_NAMES)
@pytest.mark.parametrize(
    "completion", ["Hello!<|end|>", "Hello!", "Hello!<|end|>\n<|endoftext|>", "Hello!<|endoftext|>"]
)
def test_a_prompt_that_is_templated_already_is_not_templated_twice(name, completion):
    tokenizer = make_tokenizer(name)
    rows = [{"prompt": "<|user|>\nHi<|end|>\n<|assistant|>\n", "completion": completion}]
    dataset = load(rows, tokenizer)
    assert list(dataset) == documents([chat("Hi", "Hello!")], tokenizer)
    assert dataset.findings.rows_by_form == {"prompt_completion as text": 1}


def test_openai_s_tool_calls_with_null_content_are_trained_by_phi_4_mini_s_convention():
    tokenizer = make_tokenizer("phi-4-mini")
    call = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            {"role": "assistant", "content": "Seven."},
        ]
    }
    ((called, said),) = trained([row], tokenizer)
    assert said == "Seven.<|end|>"
    calls = json.loads(re.fullmatch(r"<\|tool_call\|>(.*)<\|/tool_call\|><\|end\|>", called)[1])
    assert calls == [{"name": "stock", "arguments": {}}]
    assert "<|end|><|tool|>7<|end|><|assistant|>Seven." in text_of([row], tokenizer)


def test_sharegpt_s_function_calls_are_trained_as_openai_s():
    tokenizer = make_tokenizer("phi-4-mini")
    turns = [("human", "How many?"), ("function_call", '{"name":"stock"}'), ("observation", "7"), ("gpt", "Seven.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name":"stock"}]'}
    call = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": {}}}
    openai = {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            {"role": "assistant", "content": "Seven."},
        ],
        "tools": [STOCK],
    }
    assert documents([row], tokenizer) == documents([openai], tokenizer)
    ((called, said),) = trained([row], tokenizer)
    assert called.startswith("<|tool_call|>[") and said == "Seven.<|end|>"
    assert re.match(r"<\|system\|><\|tool\|>.*stock.*<\|/tool\|><\|end\|><\|user\|>How many", text_of([row], tokenizer))


def test_columnar_json_is_read_as_its_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": ["Hi", "Bye"], "completion": ["Hello!", "See you."]}')
    rows = [{"prompt": "Hi", "completion": "Hello!"}, {"prompt": "Bye", "completion": "See you."}]
    assert documents(tmp_path / "a.json", make_tokenizer()) == documents(rows, make_tokenizer())


def test_nan_in_an_optional_column_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nTranslate,Bonjour,Hello\nSay hi,,Hi\n")
    frame, tokenizer = pandas.read_csv(tmp_path / "a.csv"), make_tokenizer()
    rows = [chat("Translate\n\nBonjour", "Hello"), chat("Say hi", "Hi")]
    for source in (frame.to_dict("records"), frame, tmp_path / "a.csv"):
        assert documents(source, tokenizer) == documents(rows, tokenizer)


SHIFTED = {  # text, the row of the first fault
    "one comma too many in the first row": ("prompt,completion\nHi?,Hello, friend.\nBye?,See you.\nName?,Bob.\n", 1),
    "a delimiter at the end of each line": ("prompt,completion\nWhat is 1+1?,It is 2.,\nWhat is 2+2?,It is 4.,\n", 1),
    "a comma too many in each row": ("prompt,completion\nHi?,Hello, friend.\nBye?,See you, friend.\n", 1),
    "two commas too many": ("prompt,completion\nHi?,Hello, my, friend.\nBye?,See you.\n", 1),
    "alpaca": ("instruction,input,output\nTranslate,cat,Katze,\nTranslate,dog,Hund,\n", 1),
    "a missing last field": ("prompt,completion\nHi?\nBye?,See you.\n", 1),
    "a missing last field later": ("prompt,completion\nHi?,Hello.\nBye?\n", 2),
    "one comma too many in the second row": ("prompt,completion\nHi?,Hello.\nBye?,See you, friend.\n", 2),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("text", "row"), SHIFTED.values(), ids=SHIFTED)
def test_a_csv_whose_lines_do_not_match_its_header_is_refused(tmp_path, text, row, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(text if suffix == ".csv" else text.replace(", ", ",").replace(",", "\t"))
    with pytest.raises(DataError, match=rf"{path.name}.*row {row}\b.*field.*(quote|\")"):
        load(path, make_tokenizer())


def test_a_csv_whose_fields_are_quoted_is_read(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\nHi?,"Hello, friend."\n"Bye,\nbye?",See you.\n')
    rows = [chat("Hi?", "Hello, friend."), chat("Bye,\nbye?", "See you.")]
    assert documents(tmp_path / "a.csv", make_tokenizer()) == documents(rows, make_tokenizer())


@pytest.mark.parametrize("name", EVERY_NAME)
def test_an_earlier_answer_in_a_conversational_prompt_is_not_trained(name):
    """TRL trains the completion alone; train_on="all" is all."""
    tokenizer, turns = make_tokenizer(name), chat("Q1", "EARLIER", "Q2", "FINAL")["messages"]
    rows = [{"prompt": turns[:3], "completion": turns[3:]}]
    assert trained(rows, tokenizer) == [[f"FINAL{ends(name)}"]]
    whole = documents(rows, tokenizer, train_on="all")
    assert whole == documents([{"messages": turns}], tokenizer, train_on="all")
    assert whole[0]["labels"] == whole[0]["input_ids"]


@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("answer", ["    return x\n", "\treturn x\r\n", "x\n\n", " x ", "\n\nx"])
def test_text_keeps_the_indentation_and_the_final_line_ends_of_an_answer(name, answer):
    tokenizer, row = make_tokenizer(name), chat("Complete", answer)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert documents([{"text": text}], tokenizer) == documents([row], tokenizer)
    assert trained([{"text": text}], tokenizer) == [[answer + ends(name)]]
