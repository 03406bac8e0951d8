"""``LoraConfig`` and ``TrainingConfig`` with wrong values and names; what is accepted must also run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from conftest import adapted_model, chat_dataset, quiet_config, stop_at, tiny_model
from damage import PLAIN_VALUES

import phi3lora as p3

NUMBERS = (1, 2, 3, 0.1, 0.5, 0.999999, 1e-9, 1e9, 10**6, 10**12, 2**31, 1e300, 65536, -1, 0, 1.0, 1e18)
WORDS = (
    "no", "steps", "epoch", "linear", "cosine", "constant", "constant_with_warmup", "sgd", "adamw_torch",
    "adamw_torch_fused", "none", "all", "lora_only", "full", "selective", "offload", "auto", "error", "loss",
    "eval_loss", "perplexity", "token_accuracy", "tensorboard", "all-linear", "q_proj", "lm_head", "True",
)  # fmt: skip
OTHER_NAMES = (
    "", "lerning_rate", "rank", "evaluation_strategy", "torch_compile", "gradient_checkpointing", "deepspeed",
    "use_cpu", "dataloader_num_workers", "push_to_hub", "task_type", "modules_to_save", "inference_mode", "__init__",
)  # fmt: skip


def _settings(cls: type, random: Random) -> dict[str, Any]:
    """Draw one to three settings."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {
        random.choice(names if random.random() < 0.8 else OTHER_NAMES): random.choice(
            random.choice((PLAIN_VALUES, PLAIN_VALUES, NUMBERS, WORDS))
        )
        for _ in range(random.choice((1, 1, 1, 2, 3)))
    }


def _described(settings: dict[str, Any]) -> str:
    return ascii(", ".join(f"{name}={value!r}"[:60] for name, value in settings.items()))


def prepare_lora(good: Path) -> Callable[[], None]:
    return lambda: _inject({"r": 4})


def make_lora(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    settings = _settings(p3.LoraConfig, random)
    if random.random() < 0.2:
        widths = random.choice(([16, 16], [1, -1], {"a": 32}, {"a": "b"}, [], *PLAIN_VALUES))
        settings["segments"] = {random.choice(("o_proj", "", "x", "layers.0.mlp.down_proj")): widths}
    return _described(settings), lambda: _inject(settings)


def _inject(settings: dict[str, Any]) -> None:
    config = p3.LoraConfig(**settings)
    assert p3.LoraConfig(**config.to_dict()).to_dict() == config.to_dict(), "does not survive to_dict"
    if config.r <= 10_000:  # a larger one is allocated as asked
        p3.inject_lora(tiny_model(), config)


def prepare_training(good: Path) -> Callable[[], None]:
    return lambda: _train_a_step({"learning_rate": 1e-3}, good / "run")


def make_training(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    settings = _settings(p3.TrainingConfig, random)
    folder = own / "run" if random.random() < 0.35 else None
    return _described(settings) + (", a step" if folder else ""), lambda: _train_a_step(settings, folder)


def _train_a_step(settings: dict[str, Any], folder: Path | None) -> None:
    config = p3.TrainingConfig(**settings)
    assert p3.TrainingConfig(**config.to_dict()).to_dict() == config.to_dict(), "does not survive to_dict"
    if folder is None:
        return
    settings = {**settings, "compile": False, "report_to": "none", "save_strategy": "no"}
    settings = {name: value for name, value in settings.items() if name not in ("output_dir", "torch_compile")}
    config = quiet_config(folder, **settings)
    sizes = (config.per_device_train_batch_size, config.gradient_accumulation_steps, (config.max_length or 0) / 64)
    if max(sizes) <= 64:  # more takes the time and memory that it asks for
        p3.train(adapted_model(), chat_dataset(8), config, eval_dataset=chat_dataset(3), callbacks=[stop_at(1)])


KINDS = {"config lora": (prepare_lora, make_lora, 10), "config training": (prepare_training, make_training, 14)}
