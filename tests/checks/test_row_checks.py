"""What loading found in the rows, as the doctor shows it; tokens that the checkpoint does not know."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from conftest import make_tokenizer, save_checkpoint, tiny_model
from faulty import chats_of, examine, fresh_model

import phi3lora as p3
from phi3lora.data.findings import Findings

CASES = {  # name -> (findings, name of the check, status, text)
    "one form": ({"rows_by_form": {"alpaca": 9}}, "rows", "ok", r"read as 'alpaca' \(9\)$"),
    "mixed forms": (
        {"rows_by_form": {"messages": 1200, "sharegpt": 1}}, "rows", "ok", r"'messages' \(1,200\), 'sharegpt' \(1\)",
    ),
    "turns switched off": ({"turns_switched_off": 3}, "rows", "ok", "; 3 assistant turns switched off"),
    "unanswered turns": ({"unanswered_last_turns": 1}, "rows", "ok", "; 1 last turn without an answer, not trained"),
    "columns without a bearing": (
        {"unused": {"id": 9, "questionId": 2, "messages.name": 1}}, "columns", "ok", r"'id' \(9\), 'questionId' \(2\)",
    ),
    "context": (
        {"unused": {"id": 9, "system_prompt": 4, "retrievedContext": 1}}, "columns", "warning",
        r"'id' \(9\), 'system_prompt' \(4\).*the model sees nothing of 'system_prompt', 'retrievedContext';",
    ),
    "a name with a line end": ({"unused": {"a\n\x1b[31m": 1}}, "columns", "ok", r"'a\\n\\x1b\[31m' \(1\)$"),
    "nothing unused": ({}, "columns", "ok", "no column"),
    "control tokens": ({"kept_as_text": {"<s>": 2, "</s>": 1}}, "kept as text", "warning", r"'<s>' \(2\), '</s>'"),
    "no control tokens": ({}, "kept as text", "ok", "no content spells"),
    "added tokens": ({"added_tokens": {"<think>": 2}}, "added tokens", "ok", r"'<think>' \(2\), each one id"),
    "no added tokens": ({}, "added tokens", "ok", "no content holds"),
    "advice": ({"advice": {"an answer looks like a template": 2}}, "advice", "warning", "2 rows: an answer looks"),
    "no advice": ({}, "advice", "ok", "no row is doubtful"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_finding_of_the_load_is_shown(tmp_path, case):
    given, name, status, text = CASES[case]
    chats = chats_of("yes", "no")
    chats.findings = Findings(
        **{key: Counter(value) if isinstance(value, dict) else value for key, value in given.items()}
    )
    found = examine(tmp_path, dataset=chats)[name]
    assert found.status == status and re.search(text, found.text), found
    assert re.search(text, examine(tmp_path, dataset=chats, tokenizer=None)[name].text)


HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
FAULTY_ROWS = {  # name -> (row, name of the check, status, text)
    "an unused column": ({"prompt": "a", "completion": "b", "id": 3}, "columns", "ok", r"not used: 'id' \(1\)"),
    "unused context": ({"prompt": "a", "completion": "b", "context": "c"}, "columns", "warning", "of 'context'"),
    "an unused key": (
        {"messages": [{**HI, "name": "Bob"}, HELLO]},
        "columns", "ok", r"messages\.name",
    ),
    "a turn switched off": (
        {"messages": [HI, {**HELLO, "weight": 0}, HI, HELLO]},
        "rows", "ok", r"read as 'messages' \(1\); 1 assistant turn switched off",
    ),
    "rendered already": (
        {"prompt": "<|user|>\nHi<|end|>\n<|assistant|>\n", "completion": "b"},
        "rows", "ok", "prompt_completion as text",
    ),
    "a marker in a content": (
        {"prompt": "a <|end|>", "completion": "b"}, "kept as text", "warning", r"'<\|end\|>' \(1\)",
    ),
    "another end of turn": (
        {"prompt": "a", "completion": "b<|im_end|>"}, "advice", "warning", r"1 row: .*<\|im_end\|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY_ROWS)
def test_the_fault_of_a_row_is_shown(tmp_path, case):
    row, name, status, text = FAULTY_ROWS[case]
    found = examine(tmp_path, dataset=p3.ChatDataset.load([row], make_tokenizer(), max_length=128))[name]
    assert found.status == status and re.search(text, found.text), found


def test_mixed_forms_are_counted(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [HI, HELLO]}] * 3
    found = examine(tmp_path, dataset=p3.ChatDataset.load(rows, make_tokenizer(), max_length=64))["rows"]
    assert found.status == "ok" and "'prompt_completion' (3)" in found.text and "'messages' (3)" in found.text


# --- Tokens that the checkpoint does not know


def with_tokens(*names, special=False):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(names), special_tokens=special)
    return tokenizer


def added_tokens(tmp_path, tokenizer, model=None, prompt="Where is <loc>?", answer="There.", **lora):
    chats = p3.ChatDataset.load([{"prompt": prompt, "completion": answer}] * 4, tokenizer, max_length=64)
    if model is not None:
        p3.inject_lora(model, p3.LoraConfig(r=4, **lora))
    return examine(tmp_path, model or fresh_model(**lora), chats, tokenizer)["added tokens"]


def test_a_new_token_with_a_frozen_row_is_a_warning_with_its_id_and_the_way_out(tmp_path):
    tokenizer = with_tokens("<loc>", "<never met>")
    found = added_tokens(tmp_path, tokenizer)
    assert found.status == "warning"
    for text in (
        f"new to the checkpoint: '<loc>' ({tokenizer.convert_tokens_to_ids('<loc>')}), whose",
        "'embed_tokens' and 'lm_head'",
    ):
        assert text in found.text
    assert added_tokens(tmp_path, tokenizer, prompt="Where?").status == "ok"


def test_an_adapted_embedding_trains_the_rows_and_a_frozen_head_is_named_where_it_writes_the_token(tmp_path):
    targets = ["qkv_proj", "embed_tokens"]
    for answer, lora, names_the_head in (
        ("There.", targets, False), ("At <loc>.", targets, True), ("At <loc>.", [*targets, "lm_head"], False),
    ):  # fmt: skip
        found = added_tokens(tmp_path, with_tokens("<loc>"), answer=answer, target_modules=lora)
        assert found.status == "ok" and "new to the checkpoint" in found.text
        assert ("'lm_head'" in found.text) == names_the_head


def test_a_tied_embedding_takes_no_adapter_so_the_way_out_is_another(tmp_path):
    found = added_tokens(tmp_path, with_tokens("<loc>"), tiny_model(tie_word_embeddings=True))
    assert found.status == "warning" and "tied" in found.text and "target_modules" not in found.text


def test_a_row_that_the_model_was_resized_by_is_new_even_for_a_special_token(tmp_path):
    tokenizer = with_tokens("<loc>", special=True)
    model = tiny_model(vocab_size=len(tokenizer) - 1)
    assert added_tokens(tmp_path, tokenizer, tiny_model(vocab_size=len(tokenizer))).status == "ok"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert added_tokens(tmp_path, tokenizer, model).status == "warning"


@pytest.mark.parametrize("load", ["load_model", "transformers"])
def test_the_tokens_of_a_checkpoint_s_own_tokenizer_are_known(tmp_path, load):
    tokenizer = with_tokens("<loc>")
    folder = save_checkpoint(tiny_model(), tmp_path / "base")
    tokenizer.save_pretrained(folder)
    for name, status in ((None, "ok"), ("<new>", "warning")):
        model, loaded = p3.load_model(folder, dtype="float32", device="cpu")
        if load == "transformers":
            del model.checkpoint_tokens
        if name:
            loaded.add_tokens([name])
        found = added_tokens(tmp_path, loaded, model, prompt=f"Where is <loc> {name}?")
        assert found.status == status, found
        assert "<loc>" not in found.text.partition("new to the checkpoint")[2]


def test_a_token_that_only_a_later_tokenizer_has_is_new_to_the_model(tmp_path):
    model, loaded = p3.load_model(save_checkpoint(tiny_model(), tmp_path / "base"), dtype="float32", device="cpu")
    loaded.add_tokens(["<loc>"])
    loaded.save_pretrained(tmp_path / "later")
    later = type(loaded).from_pretrained(tmp_path / "later")
    assert added_tokens(tmp_path, later, model).status == "warning"


def test_an_id_beyond_the_embedding_is_an_error_with_the_way_out(tmp_path):
    tokenizer = with_tokens("<loc>")
    chats = p3.ChatDataset.load([{"prompt": "<loc>", "completion": "Hi"}] * 4, tokenizer, max_length=64)
    model = tiny_model(vocab_size=len(tokenizer) - 1)
    p3.inject_lora(model, p3.LoraConfig(r=4))
    found = examine(tmp_path, model, chats, tokenizer)["run"]
    assert found.status == "error" and re.search(r"token id \d+;.*resize_token_embeddings", found.text), found
