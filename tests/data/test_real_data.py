"""Real instruction data in all five formats: one set of token documents, and it trains. Skipped without the data."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer

import phi3lora as p3

FOLDER = Path(__file__).parents[2].parent / "shared" / "data"
PROMPTS, TASKS = FOLDER / "mlx_prompt_completion.jsonl", FOLDER / "self_instruct_seed_tasks.jsonl"
pytestmark = pytest.mark.skipif(not (PROMPTS.is_file() and TASKS.is_file()), reason=f"no {FOLDER}")
TOKENIZER = make_tokenizer()


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def alpaca_rows(path):
    """Rows of instruction, input, output."""
    if path == PROMPTS:
        return [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in read(path)]
    return [{"instruction": row["instruction"], **case} for row in read(path) for case in row["instances"]]


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
    return p3.ChatDataset.load(source, TOKENIZER, **{"max_length": 8192, "overflow": "error", **options})


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


def test_a_real_chat_file_trains_without_a_code_change(tmp_path):
    model, tokenizer, _, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=4))
    chats = p3.ChatDataset.load(PROMPTS, tokenizer, max_length=256).select(range(40))
    assert chats.format == "prompt_completion"
    before = p3.evaluate(model, chats)["loss"]
    config = p3.TrainingConfig(
        output_dir=tmp_path / "run", max_steps=8, per_device_train_batch_size=2, learning_rate=5e-3,
        lr_scheduler_type="constant", log_level="error", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    p3.train(model, chats, config)
    assert p3.evaluate(model, chats)["loss"] < before - 0.5
