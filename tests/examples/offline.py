"""Shared by the tests of the examples: their ``--real`` branch, with the demo in place of what it would download."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3lora as p3
from phi3lora.adapters import merge


class Calls:
    """Arguments that an example gave to ``load_model``, ``ChatDataset.load`` and ``train``."""

    def __init__(self) -> None:
        self.models: list[tuple[Any, dict[str, Any]]] = []
        self.datasets: list[tuple[Any, dict[str, Any]]] = []
        self.configs: list[p3.TrainingConfig] = []


def replace_downloads(monkeypatch: Any, rows: Callable[[], list[dict[str, Any]]], documents: int = 60) -> Calls:
    """Load the demo for every hub model and some ``rows()`` for every dataset, and train for two steps."""
    calls, load_model, load_dataset, train = Calls(), p3.load_model, p3.ChatDataset.load, p3.train

    def load_demo(name, *, dtype="bfloat16", base_precision=None, **options):
        calls.models.append((name, {"dtype": dtype, "base_precision": base_precision, **options}))
        local = name if Path(name).is_dir() else p3.demo.BASE  # a folder is what the example wrote itself
        return load_model(local, dtype="float32", device="cpu", base_precision=base_precision)

    def load_rows(source, tokenizer, **options):
        calls.datasets.append((source, options))
        return load_dataset(rows()[:documents], tokenizer, max_length=p3.demo.MAX_LENGTH)

    def train_two_steps(model, dataset, config, **options):
        calls.configs.append(config)
        short = {"max_steps": 2, "bf16": False, "fp16": False, "disable_tqdm": True, "logging_steps": 1}
        return train(model, dataset, dataclasses.replace(config, **short), **options)

    monkeypatch.setattr(p3, "load_model", load_demo)
    monkeypatch.setattr(merge, "load_model", load_demo)
    monkeypatch.setattr(p3.ChatDataset, "load", load_rows)
    monkeypatch.setattr(p3, "train", train_two_steps)
    return calls
