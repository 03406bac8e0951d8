"""Run the script of Phi-3's model card, with its two dicts unchanged: chats as ``messages``, metrics and model saved.

    python examples/sample_finetune.py           the embedded demo model and its chats: half a minute on a CPU
    python examples/sample_finetune.py --real    Phi-3-mini and ultrachat_200k, on a GPU

``torchrun --nproc-per-node 8 examples/sample_finetune.py --real`` trains on 8 GPUs, with 8 times the rows in a step.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import phi3lora as p3

MODEL = "microsoft/Phi-3-mini-4k-instruct"
DATASET = "HuggingFaceH4/ultrachat_200k"

training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}

peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


def load(real: bool) -> tuple[Any, Any, p3.ChatDataset, p3.ChatDataset]:
    """Return ``(model, tokenizer, train_set, eval_set)``."""
    if not real:
        return p3.demo.load()
    model, tokenizer = p3.load_model(MODEL, dtype="bfloat16", use_cache=False)
    options: dict[str, Any] = {"max_length": 2048, "on_bad_row": "skip"}
    train_set, eval_set = (
        p3.ChatDataset.load(DATASET, tokenizer, split=split, **options) for split in ("train_sft", "test_sft")
    )
    return model, tokenizer, train_set, eval_set


def save_metrics(folder: str, split: str, metrics: Mapping[str, float]) -> None:
    """Write ``{split}_results.json`` where transformers' ``Trainer`` puts it, and print it."""
    Path(folder, f"{split}_results.json").write_text(json.dumps(metrics, indent=4) + "\n")
    print(f"***** {split} metrics *****")
    for name, value in metrics.items():
        print(f"  {name:<22} = {value:,}" if isinstance(value, int) else f"  {name:<22} = {value:,.4f}")


def main(arguments: list[str] | None = None) -> None:
    """Load, adapt, train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help=f"tune {MODEL} on {DATASET}")
    real = parser.parse_args(arguments).real

    train_conf = p3.TrainingConfig(**training_config)
    peft_conf = p3.LoraConfig(**peft_config)
    if not torch.cuda.is_available():
        train_conf.bf16 = False  # slow on most CPUs

    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts; they all train

    model, tokenizer, train_set, eval_set = load(real)
    report = p3.inject_lora(model, peft_conf)
    if is_main:
        print(report)

    result = p3.train(model, train_set, train_conf, tokenizer=tokenizer)
    if not is_main:
        return
    save_metrics(train_conf.output_dir, "train", {**result.metrics, "train_samples": len(train_set)})

    found = p3.evaluate(model, eval_set, batch_size=train_conf.per_device_eval_batch_size)
    metrics = {f"eval_{name}": value for name, value in found.items()}
    save_metrics(train_conf.output_dir, "eval", {**metrics, "eval_samples": len(eval_set)})

    p3.save_adapter(model, Path(train_conf.output_dir) / "adapter.safetensors")
    print(p3.export_peft(model, Path(train_conf.output_dir) / "peft", tokenizer=tokenizer))


if __name__ == "__main__":
    main()
