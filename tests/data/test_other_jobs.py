"""A row of another job is refused with what it looks like and a way out that works; a doubtful one gets advice."""

import ast
import re

import pytest
from conftest import make_tokenizer

from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import DataError

TOKENIZER = make_tokenizer()
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "GOOD"}]
BAD = [CHAT[0], {"role": "assistant", "content": "BAD"}]
PAIR = {"chosen": "GOOD", "rejected": "BAD"}
TURNS = {"chosen": CHAT, "rejected": BAD}
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "GOOD"}]
PREFERENCES = {
    "text": {"prompt": "Q", **PAIR},
    "alpaca": {"instruction": "Q", "input": "", **PAIR},
    "another question": {"system": "Be brief.", "question": "Q", **PAIR},
    "TRL": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": BAD[1:]},
    "one turn": {"prompt": "Q", "chosen": CHAT[1], "rejected": BAD[1]},
    "TRL without a prompt": TURNS,
    "ShareGPT": {"chosen": SHAREGPT, "rejected": SHAREGPT},
    "prompt and whole chats": {"prompt": "Q", **TURNS},
    "beside messages": {"messages": CHAT, **TURNS, "score_chosen": 8.0},
    "ms-swift": {"messages": CHAT, "rejected_response": "BAD"},
    "only chosen": {"prompt": "Q", "chosen": "GOOD"},
}


def load(row, **options) -> ChatDataset:
    return ChatDataset.load([row], TOKENIZER, max_length=64, **options)


def refusal(row, **options) -> str:
    with pytest.raises(DataError, match=r"^row 1: ") as caught:
        load(row, **options)
    return str(caught.value)


def trained(chats) -> str:
    return TOKENIZER.decode([label for label in chats[0]["labels"] if label >= 0])


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_pair_is_refused_and_the_way_out_trains_the_preferred_answer(name):
    message = refusal(PREFERENCES[name])
    assert "preference pair" in message
    columns = ast.literal_eval(re.search(r"columns=(\{.*?\})", message)[1])
    chats = load(PREFERENCES[name], columns=columns)
    assert trained(chats) == "GOOD<|end|>"
    assert any("rejected" in column for column in chats.findings.unused) or name == "only chosen"


def test_a_preference_pair_of_whole_texts_is_refused_with_what_to_do():
    assert "make a 'prompt' and a 'completion'" in refusal({"chosen": "Human: Q Assistant: GOOD", "rejected": "x"})


ROWS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": {"instruction": "Q", "output": "GOOD"},
    "prompt_completion": {"prompt": "Q", "completion": "GOOD"},
    "text": {"text": "<|user|>\nQ<|end|>\n<|assistant|>\nGOOD<|end|>\n"},
}
MEDIA = ["image", "images", "audio", "audios", "video", "videos"]


def way_out(row, message):
    columns = ast.literal_eval(re.search(r"columns=(\{.*?\})", message)[1])
    assert trained(load(row, columns=columns)) == "GOOD<|end|>"


@pytest.mark.parametrize("column", MEDIA)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_media_is_refused_and_one_with_an_empty_column_is_read(name, column):
    for value in ("a.png", ["a.png"], {"bytes": b"x"}):
        row = {**ROWS[name], column: value}
        message = refusal(row)
        assert repr(column) in message and "multimodal" in message
        way_out(row, message)
        assert message == refusal(row, format=name)
    for empty in (None, [], "", float("nan")):
        assert trained(load({**ROWS[name], column: empty})) == "GOOD<|end|>"


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [True, False, "True", "false"])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_feedback_on_an_answer_is_refused(name, value, column):
    row = {**ROWS[name], column: value}
    message = refusal(row)
    assert "KTO" in message and repr(value) in message
    way_out(row, message)


@pytest.mark.parametrize("label", [0, 1, 3, "spam"])
def test_a_text_with_a_class_is_refused_and_the_class_of_a_chat_is_unused(label):
    assert "classification" in refusal({"text": "So good!", "label": label})
    assert load({**ROWS["messages"], "label": label}).findings.unused == {"label": 1}
    row = {**ROWS["prompt_completion"], "label": label}
    if label in (0, 1):
        assert "KTO" in refusal(row)
    else:
        assert load(row).findings.unused == {"label": 1}


@pytest.mark.parametrize("mark", ["<image>", "<|image_1|>", "<|audio_2|>"])
def test_a_place_of_an_image_in_a_user_s_message_is_refused_and_xml_is_not(mark):
    assert repr(mark) in refusal({"prompt": f"{mark}\nWhat is it?", "completion": "A cat."})
    assert trained(load({"prompt": "Q", "completion": f"Use {mark}."})).startswith("Use ")
    load({"prompt": "What is in <image>a.png</image>?", "completion": "A cat."})


@pytest.mark.parametrize("column", ["weight", "train", "loss_weight", "sample_weight"])
@pytest.mark.parametrize("name", ROWS)
def test_a_weight_of_a_row_other_than_one_is_refused(name, column):
    for value in (0.5, 0, 2, "0.5", False, float("inf")):
        message = refusal({**ROWS[name], column: value})
        assert repr(column) in message and repr(value) in message
    for value in (1, 1.0, True, "1", "true", None, ""):
        assert load({**ROWS[name], column: value}).findings.unused == {}
    assert load({**ROWS[name], column: "5 kg"}).findings.unused == {column: 1}, "it means something else"


def advice(question="Q", answer="GOOD"):
    chats = load({"prompt": question, "completion": answer})
    assert trained(chats) == f"{answer}<|end|>", "to the letter"
    return dict(chats.findings.advice)


ENDS = ["<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("space", ["", "\n", " "])
def test_an_answer_that_ends_in_an_end_of_turn_is_read_and_advised_on(end, space):
    chats = load({"messages": [CHAT[0], {"role": "assistant", "content": f"GOOD{end}{space}"}]})
    ((sentence, count),) = chats.findings.advice.items()
    assert repr(end) in sentence and count == 1


def test_a_pair_of_tags_is_no_end_of_turn():
    assert advice(answer="<s>30</s>") == {}
    assert advice(answer="The tag is <|end|>, I think.") == {}


TEMPLATED = {
    "[INST] Q [/INST]": ["[INST]", "[/INST]"],
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n": ["<|im_start|>"],
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>": ["<|start_header_id|>"],
    "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n": ["<start_of_turn>"],
    "### Instruction:\nQ\n\n### Response:\n": ["### Instruction:", "### Response:"],
    "USER: Q ASSISTANT:": ["ASSISTANT:"],
    "<|user|>\nQ": ["<|user|>"],
}


@pytest.mark.parametrize("prompt", TEMPLATED)
def test_a_prompt_in_another_template_is_read_and_advised_on(prompt):
    sentences = list(advice(prompt))
    assert len(sentences) == len(TEMPLATED[prompt])
    assert all(any(repr(marker) in sentence for sentence in sentences) for marker in TEMPLATED[prompt])
    assert advice("What are [1] and <b>#2</b>?") == {}
