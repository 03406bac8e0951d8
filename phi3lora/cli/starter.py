"""``init``: a commented run file whose batch, precision and checkpointing fit the model and the card."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import LoraConfig, TrainingConfig
from ..demo.show import LORA, TRAINING
from ..files import write_atomic
from ..lora.inject import inject_lora
from ..model.estimate import GIB, MemoryPlan, plan_memory
from ..model.load import read_model_config
from ..run_file import Run, scalar
from ..run_settings import DEMO, SECTIONS, field_help, setting_names

_ROWS = 8  # of a step
_SHOWN = {
    "model": ("name_or_path", "dtype", "base_precision"),
    "data": ("source", "eval_share", "max_length"),
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules"),
    "training": (
        "output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size",
        "gradient_accumulation_steps", "activation_checkpointing", "eval_strategy", "seed",
    ),
}  # fmt: skip
"""Settings that the file sets; the others follow as comments, with their defaults."""
_NEVER = ("modules_to_save", "gradient_checkpointing", "adapter", "source", "task_type")
_WIDTH = 80


def write_starter(path: Path, run: Run, model_path: str, memory_gib: float | None) -> None:
    """Write a file for the model and the data of ``run``, and a card (None: the GPU that is here, if there is one).

    Only ``config.json`` of the model at ``model_path``, a folder or a hub name, is read.
    """
    read_model_config(model_path, run.model.revision)
    config = AutoConfig.from_pretrained(model_path, revision=run.model.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    inject_lora(model, LoraConfig())
    if memory_gib is not None:
        card = f"a card of {memory_gib:g} GiB"
    elif torch.cuda.is_available():
        memory_gib, card = torch.cuda.mem_get_info()[1] / GIB, torch.cuda.get_device_name()
    else:
        card = "a CPU"
    longest = run.data.max_length or 2048
    precision, rows, plan = _fit(model, longest, run.model.base_precision, memory_gib)
    is_demo = run.model.name_or_path == DEMO
    values: dict[str, dict[str, Any]] = {
        "model": {**dataclasses.asdict(run.model), "base_precision": precision},
        "data": {
            "source": run.data.source or (DEMO if is_demo else "chats.jsonl"),
            "eval_share": 0.05,
            "max_length": longest,
        },
        "lora": {},
        "training": {
            "output_dir": "runs/demo" if is_demo else "runs/first",
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": _ROWS // rows,
            "activation_checkpointing": "auto",
            "eval_strategy": "epoch",
        },
    }
    if is_demo:  # as `phi3lora demo` trains: a tiny model takes a higher rate and smaller steps
        values["lora"] = {name: LORA[name] for name in ("r", "lora_alpha")}
        values["training"] |= {name: TRAINING[name] for name in ("learning_rate", "per_device_train_batch_size")}
        values["training"]["gradient_accumulation_steps"] = 1
    head = [
        f"Settings for {run.model.name_or_path} ({parameters / 1e9:.2g} B parameters) and {card}.",
        *([f"Predicted peak memory by activation checkpointing mode: {plan}."] if memory_gib is not None else []),
        f"Check them with `phi3lora doctor {path}`, then `phi3lora train {path}`.",
    ]
    text = "\n".join(textwrap.fill(line, _WIDTH, initial_indent="# ", subsequent_indent="#   ") for line in head)
    text += "\n" + "".join(_section(section, values[section]) for section in ("model", "data", "lora", "training"))
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def _fit(
    model: Any, longest: int, base_precision: str | None, memory_gib: float | None
) -> tuple[str | None, int, MemoryPlan]:
    """Return the precision of the base and the rows of a micro-batch that fit, and the memory they take.

    The base stays in 16 bits if it and one row fit, else it is in 4 bits. The rows are as many as fit without
    recomputing whole layers.
    """
    weights_gib = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad) / GIB

    def plan(precision: str | None, rows: int) -> MemoryPlan:
        adapters = plan_memory(model, rows * longest, base_precision=precision)
        peaks = {mode: gib + weights_gib for mode, gib in adapters.peak_gib.items()}  # a model on meta weighs nothing
        return MemoryPlan(peaks, memory_gib)

    precisions = [base_precision] if base_precision else [None, "nf4"]
    precision = next((p for p in precisions if plan(p, 1).fits("full")), precisions[-1])
    rows = next((n for n in (8, 4, 2) if memory_gib is not None and plan(precision, n).fits("selective")), 1)
    return precision, rows, plan(precision, rows)


def _section(section: str, values: Mapping[str, Any]) -> str:
    defaults = {"lora": LoraConfig(), "training": TrainingConfig()}.get(section) or SECTIONS[section]()
    texts, shown = field_help(section), _SHOWN[section]
    lines = ["", f"{section}:"]
    for name in shown:
        value = values.get(name, getattr(defaults, name))
        lines += [*_comment(texts[name], "  # "), f"  {name}: {scalar(value)}"]
    lines += ["", "  # Other settings, at their defaults:"]
    for name in setting_names(section):
        if name not in shown and name not in _NEVER and name in texts:
            first = texts[name].split(". ")[0].rstrip(".")
            lines += [f"  # {name}: {scalar(getattr(defaults, name))}", *_comment(first, "  #     ")]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
