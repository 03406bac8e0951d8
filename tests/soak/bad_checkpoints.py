"""Damaged checkpoints: train(resume_from_checkpoint=...).

The manifest's SHA-256 finds most damage. Files of tensors, which may come from anyone, are also tried with a manifest
that lists them as they are.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from conftest import adapted_model, chat_dataset, quiet_config, stop_at
from damage import damage_json_file
from damage_tensors import damage_pickle, damage_safetensors, never_executes

import phi3lora as p3

RUN = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
    "warmup_steps": 1, "packing": True,
}  # fmt: skip
JSON_FILES = ("manifest.json", "trainer_state.json", "lora_config.json")
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth")


@functools.cache
def _model() -> Any:
    return adapted_model()


def _train(folder: Path, callbacks: list[p3.Callback] | None = None, **changes: Any) -> Any:
    config = quiet_config(folder, **{**RUN, **changes})
    model = copy.deepcopy(_model())
    return p3.train(model, chat_dataset(8), config, eval_dataset=chat_dataset(3), callbacks=callbacks or [])


def _resume(folder: Path, **changes: Any) -> None:
    result = _train(folder, **changes)
    assert result.global_step >= 3, f"ends at step {result.global_step} of 3"


def prepare(good: Path) -> Callable[[], None]:
    """Write a run of two checkpoints that stopped before its end."""
    _train(good / "run", [stop_at(2)])

    def resume() -> None:
        for folder in (good / "run").glob("checkpoint-*"):
            _update_manifest(folder)
        shutil.copytree(good / "run", good / "again")
        _resume(good / "again", resume_from_checkpoint=True)
        shutil.rmtree(good / "again")

    return resume


def make(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Damage one file of the newest checkpoint."""
    shutil.copytree(good / "run", own / "run")
    folder = own / "run" / "checkpoint-2"
    name = random.choice((*JSON_FILES, *PICKLES, "lora.safetensors"))
    path = folder / name
    if name in JSON_FILES:
        description = damage_json_file(path, random)
    else:
        description = damage_pickle(path, random, own) if name in PICKLES else damage_safetensors(path, random)
        if random.random() < 0.8:
            description += ", in the manifest"
            _update_manifest(folder)
    changes: dict[str, Any] = {"resume_from_checkpoint": random.choice((True, "auto", str(folder)))}
    if random.random() < 0.3:
        changes["resume_with_changes"] = True
    if random.random() < 0.3:
        changes["load_best_model_at_end"] = True
    return f"{name}: {description}", never_executes(lambda: _resume(own / "run", **changes), own)


def _update_manifest(folder: Path) -> None:
    """List the present SHA-256 of each file in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["sha256"]:
        if (folder / name).is_file():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


KINDS = {"checkpoint": (prepare, make, 20)}
