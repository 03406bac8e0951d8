"""An adapter as a file: what ``lora_state_dict`` gives, and how to read it back without surprises.

``.safetensors``: the tensors under loralib's names, and in the header (key ``phi3lora``) how each layer is built, so a
wrong scaling, rank or segment layout is caught at load. ``.pt``: ``torch.save(lora.lora_state_dict(model), path)`` as
loralib writes it, with the same facts in ``<path>.json`` beside it. A bare ``.pt`` of loralib's own loads too.

``load_state_dict(..., strict=False)`` never complains; so after it nothing may be unexpected and no LoRA key missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import AdapterError, Phi3LoRAError, as_path, is_text, short_repr
from ..files import parse_json, read_json, read_pickled, read_safetensors, write_atomic
from ..lora.inject import inject_layers, lora_layers, remove_lora
from ..lora.layers import MergedLinear
from .named import DEFAULT, apart, call_acting, list_adapters

logger = logging.getLogger("phi3lora")

HEADER_KEY = "phi3lora"
_FORMAT = 1
_DIGEST = "sha256"  # of the ``.pt`` that a sidecar belongs to


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter: each LoRA layer's A and B, and the biases that were trained (``bias != "none"``).

    By module, not by the substring ``lora_``: a module of the user's called ``lora_router`` is not in it. With
    ``bias="none"`` and no such module it equals ``loralib.lora_state_dict(model)``.
    """
    state = {}
    for path, layer in lora_layers(model).items():
        prefix = f"{path}." if path else ""
        state[prefix + "lora_A"] = layer.lora_A.detach()
        state[prefix + "lora_B"] = layer.lora_B.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            state[name] = parameter.detach()
    return state


def adapter_metadata(model: nn.Module) -> dict[str, Any]:
    """How the adapters are built: format, the config that injected them, and each layer's own settings."""
    layers = {}
    for path, layer in lora_layers(model).items():
        facts: dict[str, Any] = {
            "class": type(layer).__name__,
            "r": layer.r,
            "lora_alpha": layer.lora_alpha,
            "use_rslora": layer.use_rslora,
        }
        if isinstance(layer, MergedLinear):
            facts["segments"] = list(layer.segments)
            facts["enable_lora"] = layer.enable_lora
        layers[path] = facts
    config = getattr(model, "lora_config", None)
    return {"format": _FORMAT, "config": config.to_dict() if config else None, "layers": layers}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the adapters to ``path``: ``.safetensors``, or ``.pt`` (with ``<path>.json`` beside it).

    On return they are on disk. Killed on the way, or on a full disk, what was there before is whole.

    Returns:
        The path written.

    Raises:
        AdapterError: a model without adapters, another suffix, a place that cannot be written.
    """
    path = as_path(path, "an adapter file", AdapterError)
    if not lora_layers(model):
        raise AdapterError("the model has no adapters to save; call inject_lora(model, config) first")
    _check_suffix(path)
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    facts = adapter_metadata(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", HEADER_KEY: json.dumps(facts)}
            write_atomic(path, lambda at: save_file(state, at, metadata=metadata))
        else:
            write_atomic(path, lambda at: torch.save(state, at))
            text = json.dumps({**facts, _DIGEST: _sha256(path)})
            write_atomic(_sidecar(path), lambda at: at.write_text(text))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: how torch.save tells of a full disk
        raise AdapterError(f"{str(path)!r} cannot be written: {error}; what was there before is whole") from error
    return path


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Load adapters into ``model`` with ``strict=False``, then hold them to what strict would have asked.

    A model without adapters is injected first, as the file says. On an error the model is as it was.

    Args:
        model: with adapters or without.
        path: an adapter file of ours or loralib's.
        name: of the adapter. Where the acting one is called so (``inject_lora``'s is ``"default"``), its numbers are
            replaced; under another name it waits beside it, built as the file says, until ``set_adapter(model, name)``.
            One that already waits under that name is replaced.

    Raises:
        AdapterError: no such file, not an adapter file, keys or shapes that do not match (it says which), or layers
            built otherwise (rank, alpha, rsLoRA, segments). Beside others: trained biases, inside ``disabled`` or
            ``merged``.
        ModelError: the file's targets match nothing in this model.
    """
    path = as_path(path, "an adapter file", AdapterError)
    check_name(name)
    state, facts = read_adapter(path)
    if (facts or {}).get("config") is None and not list_adapters(model).get(name):
        raise AdapterError(f"{str(path)!r} does not say how to build its layers; call inject_lora(model, config) first")
    install_adapter(model, state, facts, path, name)


def check_name(name: object) -> None:
    """Refuse what cannot be an adapter's name."""
    if not (is_text(name) and name):
        raise AdapterError(f"an adapter cannot be called {short_repr(name)}; allowed: a string that is not empty")


def install_adapter(
    model: nn.Module, state: dict[str, Tensor], facts: dict[str, Any] | None, path: Path, name: str = DEFAULT
) -> None:
    """Load ``state`` into the adapters called ``name``, or into new ones built as ``facts`` say; all or nothing.

    ``facts`` are those of :func:`adapter_metadata`, with a config unless ``name`` acts; ``path`` is for messages.
    """
    loaded = list_adapters(model)
    if loaded.get(name):
        _load_checked(model, state, facts, path)
    elif not loaded:
        _inject_and_load(model, state, facts, path)
        call_acting(model, name)
    else:
        biases = [key for key in state if key.endswith("bias")]
        if biases:
            raise AdapterError(
                f"{str(path)!r} holds trained biases of the base ({_few(biases)}), which "
                f"{', '.join(map(repr, loaded))} would share; load it into a model of its own"
            )
        with apart(model, name):
            _inject_and_load(model, state, facts, path)


def _inject_and_load(model: nn.Module, state: dict[str, Tensor], facts: dict[str, Any] | None, path: Path) -> None:
    """A model without adapters gets those of the file, or is as it was."""
    assert facts is not None
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        inject_layers(model, facts["layers"], LoraConfig(**facts["config"]))
        _load_checked(model, state, facts, path)
    except Phi3LoRAError:
        remove_lora(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trainable[name]
        raise


def _load_checked(model: nn.Module, state: dict[str, Tensor], facts: dict[str, Any] | None, path: Path) -> None:
    if facts is None:
        logger.warning("%s carries no settings: alpha and segments cannot be checked against the model's", path)
    else:
        _check_facts(path, facts["layers"], adapter_metadata(model)["layers"])
    load_adapter_state(model, state, str(path))


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """The checked ``load_state_dict(strict=False)``; ``name`` is for messages."""
    own = model.state_dict()
    needed = adapter_state_dict(model)
    unexpected = [key for key in state if key not in own or not (key in needed or key.endswith("bias"))]
    missing = [key for key in needed if key not in state]
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    if unexpected or missing or shapes:
        problems = [f"not in the model: {_few(unexpected)}"] if unexpected else []
        problems += [f"missing in the file: {_few(missing)}"] if missing else []
        problems += [f"other shape: {_few(shapes)}"] if shapes else []
        raise AdapterError(f"{name!r} does not fit the model's adapters: " + "; ".join(problems))
    whole = [f"{key} ({tensor.dtype})" for key, tensor in state.items() if not tensor.is_floating_point()]
    if whole:
        raise AdapterError(f"{name!r} holds other numbers than floating-point ones in {_few(whole)}")
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise AdapterError(f"{name!r} holds NaN or infinite values in {_few(bad)}")
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not set(result.missing_keys) & set(needed)


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of an adapter file, on the CPU, and its facts if it carries any. Executes nothing from the file."""
    path = as_path(path, "an adapter file", AdapterError)
    _check_suffix(path)
    if not path.is_file():
        raise AdapterError(f"no such adapter file: {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            state, metadata = read_safetensors(path)
            facts = parse_json(metadata[HEADER_KEY]) if HEADER_KEY in metadata else None
            says = HEADER_KEY in metadata
        else:
            state = read_pickled(path)
            says, facts = _sidecar_facts(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable adapter file: {error}") from error
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise AdapterError(f"{str(path)!r} does not hold a dict of tensors")
    if says and not _is_facts(facts):
        raise AdapterError(f"{str(path)!r}: the settings beside the tensors are not phi3lora's")
    return state, facts


def says_how_it_is_built(path: Path) -> bool:
    """Whether a ``.safetensors`` file is an adapter of ours, by its header alone: the file may be a whole model."""
    try:
        with safe_open(path, framework="pt") as file:
            return HEADER_KEY in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def _is_facts(value: Any) -> bool:
    """Whether it has the form of :func:`adapter_metadata`."""
    if not isinstance(value, dict) or not isinstance(value.get("layers"), dict):
        return False
    config = value.get("config")
    return all(isinstance(layer, dict) for layer in value["layers"].values()) and isinstance(config, (dict, type(None)))


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".pt"):
        raise AdapterError(f"an adapter file cannot be called {path.name!r}; allowed: *.safetensors, *.pt")


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sidecar_facts(path: Path) -> tuple[bool, Any]:
    """Whether a ``.pt`` has settings beside it, and those; they may be another file's that had this name before."""
    if not _sidecar(path).is_file():
        return False, None
    facts = read_json(_sidecar(path))
    if isinstance(facts, dict) and _DIGEST in facts and facts.pop(_DIGEST) != _sha256(path):
        logger.warning("%s was made for another %s: its settings are not used", _sidecar(path), path.name)
        return False, None
    return True, facts


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_facts(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compare the settings of layers that both have; keys and shapes are compared with the tensors."""
    for layer in theirs.keys() & ours.keys():
        wrong = [
            f"{name} {theirs[layer].get(name)!r} in the file, {value!r} in the model"
            for name, value in ours[layer].items()
            if theirs[layer].get(name) != value
        ]
        if wrong:
            raise AdapterError(f"{str(path)!r} was made for other adapters: {layer}: {'; '.join(wrong)}")


def _few(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
