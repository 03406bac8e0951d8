"""``LoraConfig`` and ``TrainingConfig`` with values and names that no one expects; what is accepted must also run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from conftest import adapted_model, chat_dataset, quiet_config, tiny_model
from damage import wild_value

import phi3lora as p3
from phi3lora.compat import ALIASES, IGNORED_LORA_ARGUMENTS, IGNORED_TRAINING_ARGUMENTS, UNSUPPORTED

_NUMBERS = (1, 2, 3, 0.1, 0.5, 0.999999, 1e-9, 1e9, 10**6, 10**12, 2**31, 2**63, 1e300, 10**30, 65536, -1, 0, 1.0, 1e18)
_WORDS = (
    "no", "steps", "epoch", "linear", "cosine", "constant", "constant_with_warmup", "sgd", "adamw_torch",
    "adamw_torch_fused", "none", "all", "lora_only", "full", "selective", "offload", "auto", "error", "loss",
    "eval_loss", "perplexity", "token_accuracy", "tensorboard", "all-linear", "q_proj", "lm_head", "True",
)  # fmt: skip


def _value(random: Random) -> Any:
    choice = random.random()
    return wild_value(random) if choice < 0.5 else random.choice(_NUMBERS if choice < 0.75 else _WORDS)


def _given(cls: type, foreign: frozenset[str], random: Random) -> dict[Any, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    given: dict[Any, Any] = {}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        odd = ("", "\x00", "\ud800", "lerning_rate", "x" * 100_000, "__init__", "self", "inert")
        others = (*ALIASES, *UNSUPPORTED, *random.sample(sorted(foreign), 5), *odd)
        given[random.choice(names if random.random() < 0.8 else others)] = _value(random)
    return given


def _said(given: dict[Any, Any]) -> str:
    def short(value: Any) -> str:
        try:
            return f"{type(value).__name__} {value!r}"[:40]
        except (RecursionError, ValueError):
            return type(value).__name__

    return ascii(", ".join(f"{str(name)[:40]}: {short(value)}" for name, value in given.items()))


def prepare_lora(good: Path) -> Callable[[], None]:
    """Nothing is needed."""
    return lambda: _inject({"r": 4})


def make_lora(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """One to three settings; then into a model."""
    given = _given(p3.LoraConfig, IGNORED_LORA_ARGUMENTS, random)
    if random.random() < 0.2:
        widths = random.choice(([16, 16], [1, -1], {"a": 32}, {"a": "b"}, [], _value(random), {"a": _value(random)}))
        given["segments"] = random.choice(({"o_proj": widths}, {"down_proj": widths}, {_word(random): widths}))
    return _said(given), lambda: _inject(given)


def _word(random: Random) -> str:
    return random.choice(("o_proj", "", "x", "layers.0.mlp.down_proj"))


def _inject(given: dict[Any, Any]) -> None:
    config = p3.LoraConfig(**given)
    assert p3.LoraConfig(**config.to_dict()).to_dict() == config.to_dict(), "does not come back"
    if config.r <= 10_000:  # a larger one needs what it asks for
        p3.inject_lora(tiny_model(), config)


def prepare_training(good: Path) -> Callable[[], None]:
    """Nothing is needed."""
    return lambda: _step({"learning_rate": 1e-3}, good / "run", True)


def make_training(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """One to three settings; then, now and then, a step."""
    given = _given(p3.TrainingConfig, IGNORED_TRAINING_ARGUMENTS, random)
    runs = random.random() < 0.35
    return f"{_said(given)}{', a step' if runs else ''}", lambda: _step(given, own / "run", runs)


def _step(given: dict[Any, Any], folder: Path, runs: bool) -> None:
    config = p3.TrainingConfig(**given)
    assert p3.TrainingConfig(**config.to_dict()).to_dict() == config.to_dict(), "does not come back"
    if not runs:
        return

    class Stop(p3.Callback):
        def on_step_end(self, state: Any) -> None:
            state.should_stop = True

    settings = {**given, "compile": False, "report_to": "none", "save_strategy": "no"}
    settings = {name: value for name, value in settings.items() if name not in ("output_dir", "torch_compile")}
    config = quiet_config(folder, **settings)
    if config.per_device_train_batch_size > 64 or config.gradient_accumulation_steps > 64:
        return  # what it asks for may take long
    p3.train(adapted_model(), chat_dataset(8), config, eval_dataset=chat_dataset(3), callbacks=[Stop()])


KINDS = {"config lora": (prepare_lora, make_lora, 10), "config training": (prepare_training, make_training, 14)}
