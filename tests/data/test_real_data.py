"""Real instruction data in all five formats: one set of token documents. Skipped where the data is not at hand."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer

from phi3lora.data.batches import batches
from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import DataError

FOLDER = Path(__file__).parents[2].parent / "shared" / "data"
PROMPTS, TASKS = FOLDER / "mlx_prompt_completion.jsonl", FOLDER / "self_instruct_seed_tasks.jsonl"
pytestmark = pytest.mark.skipif(not (PROMPTS.is_file() and TASKS.is_file()), reason=f"no {FOLDER}")
TOKENIZER = make_tokenizer()
LONGEST = 8192


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def alpaca_rows(path):
    """Rows of instruction, input, output; without white space at their ends, which the text format cannot keep."""
    if path == PROMPTS:
        rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in read(path)]
    else:
        rows = [{"instruction": row["instruction"], **case} for row in read(path) for case in row["instances"]]
    return [{key: value.strip() for key, value in row.items()} for row in rows]


def in_format(rows, name):
    if name == "alpaca":
        return rows
    pairs = [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]
    form = {
        "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
        "text": lambda q, a: {"text": f"<|user|>\n{q}<|end|>\n<|assistant|>\n{a}<|end|>\n"},
    }[name]
    return [form(*pair) for pair in pairs]


def load(source, **options):
    return ChatDataset.load(source, TOKENIZER, **{"max_length": LONGEST, "overflow": "error", **options})


@pytest.mark.parametrize("path", [PROMPTS, TASKS], ids=lambda p: p.stem)
def test_all_five_formats_give_equal_token_documents(path):
    rows = alpaca_rows(path)
    assert len(rows) >= 144
    sets = {}
    for name in ("alpaca", "messages", "sharegpt", "prompt_completion", "text"):
        sets[name] = load(in_format(rows, name))
        assert sets[name].format == name
    assert {name: s.fingerprint() for name, s in sets.items()} == dict.fromkeys(sets, sets["alpaca"].fingerprint())
    documents = sets["alpaca"]
    assert len(documents) == len(rows)
    for row, document in zip(rows, documents, strict=True):
        trained = [label for label in document["labels"] if label >= 0]
        assert TOKENIZER.decode(trained) == row["output"] + "<|end|>"


def test_the_file_itself_loads_as_its_rows():
    assert load(PROMPTS).fingerprint() == load(read(PROMPTS)).fingerprint()


def test_rows_of_another_form_are_refused_with_their_keys():
    with pytest.raises(DataError, match=r"row 1 .*'instances'"):
        load(TASKS)


def test_splitting_and_packing_real_chats_keeps_every_prediction_and_fills_the_rows():
    rows = in_format(alpaca_rows(TASKS), "messages")
    whole = sum(label >= 0 for document in load(rows) for label in document["labels"][1:])
    for max_length in (64, 512):
        parts = load(rows, max_length=max_length, overflow="split")
        made = list(batches(parts, batch_size=4))
        assert sum(int((batch["labels"] >= 0).sum()) for batch in made) == whole
        room = sum(batch["input_ids"].numel() for batch in made)
        assert parts.statistics()["tokens"] / room > 0.97
