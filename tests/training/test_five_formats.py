"""A chat file that no one here wrote trains, in each of the five formats, without a code change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import phi3lora as p3

DATA = Path(__file__).parents[3] / "shared" / "data" / "mlx_prompt_completion.jsonl"


def in_format(name: str, prompt: str, completion: str) -> dict:
    return {
        "prompt_completion": {"prompt": prompt, "completion": completion},
        "alpaca": {"instruction": prompt, "input": "", "output": completion},
        "sharegpt": {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": completion}]},
        "messages": {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
        },
        "text": {"text": f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{completion}<|end|>"},
    }[name]


@pytest.mark.skipif(not DATA.is_file(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["prompt_completion", "alpaca", "sharegpt", "messages", "text"])
def test_a_real_chat_file_trains_in_each_format(name, tmp_path):
    rows = [json.loads(line) for line in DATA.read_text().splitlines()][:40]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(in_format(name, **row)) + "\n" for row in rows))
    model, tokenizer, _, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=4))
    chats = p3.ChatDataset.load(path, tokenizer, max_length=256)
    assert chats.format == name
    before = p3.evaluate(model, chats)["loss"]
    config = p3.TrainingConfig(
        output_dir=tmp_path / "run", max_steps=8, per_device_train_batch_size=2, learning_rate=5e-3,
        lr_scheduler_type="constant", log_level="error", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    p3.train(model, chats, config)
    assert p3.evaluate(model, chats)["loss"] < before - 0.5
