"""Damaged adapter files (``.safetensors``, ``.pt``, an older one's ``.json``) and PEFT folders: the readers."""

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
from conftest import adapted_model, adapters_of, same_tensors, tiny_model
from damage import damage_json_file
from damage_tensors import damage_pickle, damage_safetensors, never_executes
from safetensors.torch import load_file, save_file

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_metadata

FUSED = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
STATES = ("plain", "same", "beside")


@functools.cache
def _models() -> dict[str, Any]:
    """Models without adapters, with the file's layers adapted, and with other layers adapted."""
    return {
        "plain": tiny_model(),
        "same": adapted_model(**FUSED),
        "beside": adapted_model(target_modules=["down_proj"]),
    }


def read_into(load: Callable[..., object], path: Path, state: str) -> None:
    """Load into a model; after an error the model must be as it was."""
    model = copy.deepcopy(_models()[state])
    before, names = adapters_of(model), p3.list_adapters(model)
    try:
        load(model, path, name="other" if state == "beside" else "default")
    except p3.Phi3LoRAError:
        assert same_tensors(adapters_of(model), before) and p3.list_adapters(model) == names, "changed by a refusal"
        raise
    assert all(torch.isfinite(tensor).all() for tensor in adapters_of(model).values()), "not finite and accepted"


def prepare_safetensors(good: Path) -> Callable[[], None]:
    path = p3.save_adapter(adapted_model(**FUSED), good / "a.safetensors")
    return lambda: [read_into(p3.load_adapter, path, state) for state in STATES]


def make_safetensors(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    path, state = own / "a.safetensors", random.choice(STATES)
    shutil.copy(good / "a.safetensors", path)
    return damage_safetensors(path, random), lambda: read_into(p3.load_adapter, path, state)


def prepare_pt(good: Path) -> Callable[[], None]:
    """Write a ``.pt`` with its settings inside, and one with them beside it, as earlier versions did."""
    model = adapted_model(**FUSED)
    new, old = p3.save_adapter(model, good / "new" / "a.pt"), good / "old" / "a.pt"
    old.parent.mkdir()
    torch.save(torch.load(new, weights_only=True), old)
    beside = {**adapter_metadata(model), "sha256": hashlib.sha256(old.read_bytes()).hexdigest()}
    (good / "old" / "a.pt.json").write_text(json.dumps(beside))
    return lambda: [read_into(p3.load_adapter, path, state) for state in STATES for path in (new, old)]


def make_pt(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Damage the JSON beside the file or the file itself, most often without the JSON, whose checksum ends it early."""
    path, state, is_old = own / "a.pt", random.choice(STATES), random.random() < 0.6
    shutil.copy(good / ("old" if is_old else "new") / "a.pt", path)
    if is_old:
        shutil.copy(good / "old" / "a.pt.json", own)
    if is_old and random.random() < 0.6:
        description = damage_json_file(own / "a.pt.json", random)
    else:
        if random.random() < 0.7:
            (own / "a.pt.json").unlink(missing_ok=True)
        description = damage_pickle(path, random, own)
    return description, never_executes(lambda: read_into(p3.load_adapter, path, state), own)


def prepare_peft(good: Path) -> Callable[[], None]:
    """Write our three layouts, two of them also without our header, and one as ``.bin``."""
    model = adapted_model(**FUSED)
    for layout in ("uniform", "pattern", "split"):
        p3.export_peft(model, good / layout, layout=layout, base_model="base")
    for layout in ("split", "uniform"):
        shutil.copytree(good / layout, good / f"{layout}-theirs")
        tensors = good / f"{layout}-theirs" / "adapter_model.safetensors"
        save_file(load_file(tensors), tensors)
    shutil.copytree(good / "uniform", good / "bin")
    torch.save(load_file(good / "bin" / "adapter_model.safetensors"), good / "bin" / "adapter_model.bin")
    (good / "bin" / "adapter_model.safetensors").unlink()
    return lambda: [read_into(p3.import_peft, folder, "plain") for folder in sorted(good.iterdir())]


def make_peft(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    source, state, folder = random.choice(sorted(good.iterdir())), random.choice(STATES), own / "peft"
    shutil.copytree(source, folder)
    if random.random() < 0.5:
        description = damage_json_file(folder / "adapter_config.json", random)
    elif source.name == "bin":
        description = damage_pickle(folder / "adapter_model.bin", random, own)
    else:
        description = damage_safetensors(folder / "adapter_model.safetensors", random)
    return f"{source.name}: {description}", never_executes(lambda: read_into(p3.import_peft, folder, state), own)


KINDS = {
    "adapter safetensors": (prepare_safetensors, make_safetensors, 12),
    "adapter pt": (prepare_pt, make_pt, 12),
    "adapter peft": (prepare_peft, make_peft, 14),
}
