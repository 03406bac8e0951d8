"""Tune Phi-3 on ShareGPT chats (``conversations`` of ``from`` and ``value``), in one script.

    python examples/finetune_script.py           the embedded demo model and its chats: half a minute on a CPU
    python examples/finetune_script.py --real    Phi-3-mini and a dataset from the hub, on a GPU

float16, 4 micro-batches a step, 3 epochs, a linear schedule, paged AdamW on a GPU. If a ``--real`` run is interrupted,
the same command resumes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

import phi3lora as p3

MODEL = "microsoft/Phi-3-mini-4k-instruct"
DATASET = "macadeliccc/opus_samantha"


def demo_conversations() -> list[dict[str, Any]]:
    """Return the demo's chats in ShareGPT format, as your own file may have them."""
    names = {"user": "human", "assistant": "gpt"}
    rows = map(json.loads, (p3.demo.FOLDER / "train.jsonl").read_text().splitlines()[:300])
    return [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}
        for row in rows
    ]


def training_config(real: bool) -> p3.TrainingConfig:
    """Return the settings. The demo is tiny: fewer rows a step, no need to save memory, a higher learning rate."""
    has_gpu = torch.cuda.is_available()
    paged = has_gpu and importlib.util.find_spec("bitsandbytes") is not None  # extra "qlora"
    return p3.TrainingConfig(
        output_dir="runs/finetune_script" if real else "runs/finetune_script_demo",
        resume_from_checkpoint="auto" if real else False,
        overwrite_output_dir=not real,
        num_train_epochs=3,
        per_device_train_batch_size=7 if real else 2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=real,
        learning_rate=1e-4 if real else 4e-3,
        lr_scheduler_type="linear",
        optim="paged_adamw_32bit" if paged else "adamw_torch",
        fp16=has_gpu,  # CPUs are faster in float32
        logging_steps=10,
        evaluation_strategy="steps",
        save_strategy="epoch",
        save_total_limit=1,
    )


def main(arguments: list[str] | None = None) -> None:
    """Load, adapt, train, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help=f"tune {MODEL} on {DATASET}")
    real = parser.parse_args(arguments).real

    if real:
        model, tokenizer = p3.load_model(MODEL, dtype="float16")
        chats = p3.ChatDataset.load(DATASET, tokenizer, max_length=2048, on_bad_row="skip")
    else:
        model, tokenizer = p3.load_model(p3.demo.BASE, dtype="float32")
        chats = p3.ChatDataset.load(demo_conversations(), tokenizer, max_length=128)
    train_set, eval_set = chats.split(0.05, seed=0)

    print(p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)))
    config = training_config(real)
    p3.train(model, train_set, config, eval_dataset=eval_set, tokenizer=tokenizer)

    with p3.disabled(model):
        before = p3.evaluate(model, eval_set)
    after = p3.evaluate(model, eval_set)
    print(f"{'':<16}{'before':>12}{'after':>12}")
    for name in ("loss", "perplexity", "token_accuracy"):
        print(f"{name:<16}{before[name]:>12,.4f}{after[name]:>12,.4f}")
    print(f"\n{p3.sample_answers(model, tokenizer, eval_set, count=3, max_new_tokens=128)}")
    path = p3.save_adapter(model, Path(config.output_dir) / "adapter.safetensors")
    print(f"\nadapter: {path}")
    print(f"talk to it: phi3lora chat --model {MODEL if real else 'demo'} --adapter {path}")


if __name__ == "__main__":
    main()
