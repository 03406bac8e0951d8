"""What the tests of the examples share: the real branch with the demo in the place of what it would download."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3lora as p3
from phi3lora.adapters import merge as merging


class Asked:
    """What an example asked ``load_model``, ``ChatDataset.load`` and ``train`` for."""

    def __init__(self) -> None:
        self.models: list[tuple[Any, dict[str, Any]]] = []
        self.datasets: list[tuple[Any, dict[str, Any]]] = []
        self.configs: list[p3.TrainingConfig] = []


def stand_in(monkeypatch: Any, rows: Callable[[], list[dict[str, Any]]], documents: int = 60) -> Asked:
    """Each hub model is the demo's, each dataset the first ``documents`` of ``rows()``, each run two steps long."""
    asked, load_model, train = Asked(), p3.load_model, p3.train
    load = p3.ChatDataset.load

    def load_demo(name, *, dtype="bfloat16", base_precision=None, **options):
        asked.models.append((name, {"dtype": dtype, "base_precision": base_precision, **options}))
        local = name if Path(name).is_dir() else p3.demo.BASE  # what the example wrote itself is loaded
        return load_model(local, dtype="float32", device="cpu", base_precision=base_precision)

    def load_rows(source, tokenizer, **options):
        asked.datasets.append((source, options))
        return load(rows()[:documents], tokenizer, max_length=p3.demo.MAX_LENGTH)

    def train_two_steps(model, dataset, config, **options):
        asked.configs.append(config)
        short = {"max_steps": 2, "bf16": False, "fp16": False, "disable_tqdm": True, "logging_steps": 1}
        return train(model, dataset, dataclasses.replace(config, **short), **options)

    monkeypatch.setattr(p3, "load_model", load_demo)
    monkeypatch.setattr(merging, "load_model", load_demo)
    monkeypatch.setattr(p3.ChatDataset, "load", load_rows)
    monkeypatch.setattr(p3, "train", train_two_steps)
    return asked
