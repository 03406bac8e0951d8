"""The demo: a tiny Phi-3 learns a support bot's voice. Scores before, after, and with the adapter switched off."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter_file import save_adapter
from ..adapters.named import disabled
from ..config import LoraConfig, TrainingConfig
from ..display import text_facts, text_table
from ..inference.generation import generate
from ..lora.inject import inject_lora
from ..training.loop import run_training
from ..training.setup import PlannedRun
from . import FOLDER, load

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3, "max_steps": 70, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine",
    "warmup_steps": 5, "logging_steps": 2, "save_strategy": "no", "overwrite_output_dir": True,
}  # fmt: skip
EXAMPLES = 5  # held-out questions whose answers are printed


@dataclass(frozen=True)
class Score:
    """Answers to the held-out questions, and the shares of right ones."""

    answers: list[str]
    """Answers, in the questions' order."""
    exact: float
    """Share of answers equal to the target, word for word."""
    content: float
    """Share of answers that contain the right fact."""
    plain: float
    """Share of answers in the base's own words."""


def frozen_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters but the adapters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name:
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def score(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> Score:
    """Answer the held-out questions greedily and score the answers."""
    answers = generate(model, tokenizer, [row["messages"][:-1] for row in rows], max_new_tokens=64, batch_size=64)
    pairs = list(zip(answers, rows, strict=True))
    exact = sum(answer == row["messages"][-1]["content"] for answer, row in pairs)
    content = sum(row["answer"] in answer for answer, row in pairs)
    plain = sum(answer == row["answer"] for answer, row in pairs)
    return Score(answers, exact / len(rows), content / len(rows), plain / len(rows))


def run_demo(seeds: list[int], output_dir: str, random_init: bool = False) -> bool:
    """Tune once for each seed and print the scores; return whether every seed reached 95 % exact match."""
    for seed in seeds:
        TrainingConfig(seed=seed)  # refuses a value that is not a seed, before a tuning begins
    started = time.perf_counter()
    rows = [json.loads(line) for line in (FOLDER / "eval.jsonl").read_text().splitlines()]
    table = []
    for i, seed in enumerate(seeds):
        table.append((seed, *_tune(seed, rows, f"{output_dir}/seed-{seed}", random_init, full=i == 0)))
    cells: list[tuple[str, ...]] = [("seed", "exact match", "right fact", "adapter off: the base's own words")]
    for seed, before, after, off in table:
        pairs = ((before.exact, after.exact), (before.content, after.content), (before.plain, off.plain))
        cells.append((str(seed), *(f"{first:.1%} -> {last:.1%}" for first, last in pairs)))
    print(f"\n{len(rows)} held-out questions\n{text_table(cells)}")
    reached = all(after.exact >= 0.95 for _, _, after, _ in table)
    print(f"\n{time.perf_counter() - started:.0f} s; adapters and pictures of the runs in {output_dir}/")
    if random_init:
        print("control: random base weights and the same tuning; the knowledge is the base's, so this should fail")
    return reached


def _tune(
    seed: int, rows: list[dict[str, Any]], folder: str, random_init: bool, full: bool
) -> tuple[Score, Score, Score]:
    """Tune once; return the scores before, after, and after with the adapter switched off."""
    torch.manual_seed(seed)
    model, tokenizer, train_set, eval_set = load(random_init=random_init)
    before, hash_before = score(model, tokenizer, rows), frozen_hash(model)
    torch.manual_seed(seed)
    report = inject_lora(model, LoraConfig(**LORA))
    extra: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10} if full else {"log_level": "warning"}
    print(f"{report}\n" if full else f"\nseed {seed}")
    config = TrainingConfig(output_dir=folder, seed=seed, **TRAINING, **extra)
    run_training(PlannedRun(model, train_set, config, eval_set, tokenizer), tells_next=False)
    after = score(model, tokenizer, rows)
    with disabled(model):
        off = score(model, tokenizer, rows)
    path = save_adapter(model, Path(folder) / "adapter.safetensors")
    if full:
        for i in range(0, len(rows), max(1, len(rows) // EXAMPLES)):
            question = rows[i]["messages"][-2]["content"]
            print(f"\n{text_facts({'question': question, 'before': before.answers[i], 'after': after.answers[i]})}")
        print(f"\nadapter: {path} ({path.stat().st_size / 2**10:.0f} KiB)")
    print(f"frozen weights, SHA-256: {hash_before} before, {frozen_hash(model)} after")
    return before, after, off
