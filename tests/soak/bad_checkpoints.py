"""Checkpoints, damaged, before and behind the manifest's SHA-256: train(resume_from_checkpoint=...)."""

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

import torch
from bad_adapters import _never_runs, damage_pickle, damage_safetensors
from conftest import adapted_model, chat_dataset, quiet_config
from damage import damage_file, damaged_json, wild_value

import phi3lora as p3

RUN = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
    "warmup_steps": 1, "packing": True,
}  # fmt: skip
_JSON = ("manifest.json", "trainer_state.json", "lora_config.json")
_PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth")


@functools.cache
def _model() -> Any:
    return adapted_model()


def _train(folder: Path, **changes: Any) -> Any:
    config = quiet_config(folder, **{**RUN, **changes})
    return p3.train(copy.deepcopy(_model()), chat_dataset(8), config, eval_dataset=chat_dataset(3))


def prepare(good: Path) -> Callable[[], None]:
    """A run with two checkpoints, to go on from."""

    class Stop(p3.Callback):
        def on_step_end(self, state: Any) -> None:
            state.should_stop = state.global_step == 2

    config = quiet_config(good / "run", **RUN)
    p3.train(copy.deepcopy(_model()), chat_dataset(8), config, eval_dataset=chat_dataset(3), callbacks=[Stop()])

    def goes_on() -> None:
        for folder in (good / "run").glob("checkpoint-*"):
            _sum_again(folder)
        shutil.copytree(good / "run", good / "again")
        assert _train(good / "again", resume_from_checkpoint=True).global_step == 3
        shutil.rmtree(good / "again")

    return goes_on


def make(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """One file of the newest checkpoint; half of the time its SHA-256 is then right again."""
    shutil.copytree(good / "run", own / "run")
    folder = own / "run" / "checkpoint-2"
    name = random.choice((*_JSON, *_PICKLES, "trainer_state.json", "lora.safetensors"))
    path = folder / name
    if name in _JSON and random.random() < 0.8:
        said, text = damaged_json(json.loads(path.read_text()), random)
        path.write_bytes(text.encode(errors="surrogatepass"))
    elif name == "lora.safetensors":
        said = damage_safetensors(path, random)
    elif name in _PICKLES:
        said = _damage_state(path, random) if random.random() < 0.6 else damage_pickle(path, random, own)
    else:
        said = damage_file(path, random)
    said = f"{name}: {said}"
    if name != "manifest.json" and random.random() < 0.8:
        said += ", with its sum"
        _sum_again(folder)
    changes: dict[str, Any] = {"resume_from_checkpoint": random.choice((True, "auto", str(folder)))}
    if random.random() < 0.3:
        changes["resume_with_changes"] = True
    if random.random() < 0.3:
        changes["load_best_model_at_end"] = True
    return said, _never_runs(lambda: _goes_on(own / "run", changes), own)


def _goes_on(folder: Path, changes: dict[str, Any]) -> None:
    result = _train(folder, **changes)
    assert result.global_step >= 3, f"ends at step {result.global_step} of 3"


def _sum_again(folder: Path) -> None:
    """The manifest lists what is there now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["sha256"]:
        if (folder / name).is_file():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _damage_state(path: Path, random: Random) -> str:
    """Somewhere in a nested dict of tensors and numbers: another value, key, shape or dtype."""
    state = torch.load(path, weights_only=True)
    holder, key, value, said = None, None, state, "$"
    while isinstance(value, (dict, list)) and value and (holder is None or random.random() < 0.85):
        holder = value
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        value, said = value[key], f"{said}.{key}"
    assert holder is not None
    how = random.randrange(4)
    if how == 0:
        del holder[key]
        said += " taken out"
    elif how == 1 and isinstance(value, torch.Tensor):
        shape = random.choice(((), (0,), (3,), (*value.shape, 2), tuple(value.shape)[::-1]))
        holder[key] = torch.zeros(shape, dtype=random.choice((value.dtype, torch.float32, torch.int64, torch.uint8)))
        said += f": {shape} {holder[key].dtype}"
    elif how == 2 and isinstance(value, torch.Tensor) and value.numel():
        holder[key] = value.clone()
        numbers = (float("nan"), float("inf"), -1.0) if value.is_floating_point() else (0, 255)
        holder[key].view(-1)[random.randrange(value.numel())] = random.choice(numbers)
        said += ": a number in it"
    else:
        plain = (None, True, 0, -1, 10**400, 2**63, 1.5, float("nan"), "text", b"\xff", [], {}, (), [1, 2], {"a": 1})
        holder[key] = random.choice((*plain, torch.ones(3), torch.zeros(1).expand(2**17, 2**17), {None: None}))
        said += f": {str(holder[key])[:40]}" if not isinstance(holder[key], torch.Tensor) else ": another tensor"
    torch.save(state, path)
    return said


def make_argument(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """``resume_from_checkpoint`` as something else; checkpoints' names in the folder that are none."""
    shutil.copytree(good / "run", own / "run")
    if random.random() < 0.5:
        odd = random.choice(
            ("checkpoint-", "checkpoint--1", "checkpoint-" + "9" * 200, "checkpoint-03", "checkpoint-٣")
        )
        (own / "run" / "checkpoint-2").rename(own / "run" / odd)
        return f"a folder called {odd}", lambda: _goes_on(own / "run", {"resume_from_checkpoint": True})
    value = wild_value(random)
    changes = {"resume_from_checkpoint": value, "overwrite_output_dir": True}
    return f"resume_from_checkpoint: {type(value)}", lambda: _goes_on(own / "run", changes)


KINDS = {"checkpoint": (prepare, make, 20), "checkpoint arguments": (prepare, make_argument, 2)}
