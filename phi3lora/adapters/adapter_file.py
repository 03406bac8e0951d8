"""Adapter files: what ``lora_state_dict`` returns, with the settings that are needed to load it safely.

``.safetensors``: the tensors under loralib's names; the header's key ``phi3lora`` says how each layer is built, so a
wrong scaling, rank or segment layout is an error at load. ``.pt``: ``torch.save(lora.lora_state_dict(model), path)`` as
loralib writes it, with the same settings in one more member of its zip archive, which ``torch.load`` skips; earlier
versions wrote them to ``<path>.json``. A ``.pt`` of loralib's own loads too.

``load_state_dict(..., strict=False)`` raises no error, so we check its result: no unexpected key, no missing LoRA key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import AdapterError, ConfigError, Phi3LoRAError, as_path, error_line, first_of, is_int, short_repr
from ..files import parse_json, parse_tensors, read_json, tensor_file, write_atomic
from ..lora.base_values import base_values, changed_buffers, keep_base_values, put_base_values
from ..lora.inject import inject_layers, lora_layers, remove_lora, restorer_of_requires_grad
from ..lora.layers import MergedLinear
from ..lora.targets import plainly_named_segments
from ..lora.wrappers import plain_name, unwrap
from .named import DEFAULT, LoadedAdapters, check_outside_blocks, list_adapters, loading_inactive
from .peft_format import CONFIG_NAME, TENSORS_NAME

logger = logging.getLogger("phi3lora")

HEADER_KEY = "phi3lora"
_FORMAT = 1
_LAYER_SETTINGS = ("class", "r", "lora_alpha", "use_rslora", "segments", "enable_lora")
FILES_IN_FOLDERS = ("adapter.safetensors", "lora.safetensors")
"""Names of the adapter file in a run's folder and in a checkpoint's."""
_NEWER = ". A newer version of phi3lora may have written it: update this one"
_SHA256 = "sha256"
"""Key in an older ``<path>.json`` of the checksum of the ``.pt`` that it describes."""


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter: each LoRA layer's A and B, and the biases that train or were trained.

    The layers are found by class, not by the substring ``lora_``: a user's module called ``lora_router`` is not
    included. With ``bias="none"`` and no such module the result equals ``loralib.lora_state_dict(model)``, without the
    names that wrappers such as ``torch.compile``'s put in front.
    """
    state, kept = {}, base_values(unwrap(model))
    for path, layer in lora_layers(model).items():
        prefix = f"{path}." if path else ""
        state[prefix + "lora_A"] = layer.lora_A.detach()
        state[prefix + "lora_B"] = layer.lora_B.detach()
    for name, parameter in unwrap(model).named_parameters():
        if name.endswith("bias") and (parameter.requires_grad or plain_name(name) in kept):
            state[plain_name(name)] = parameter.detach()
    return state


def adapter_metadata(model: nn.Module) -> dict[str, Any]:
    """Return how the adapter is built: the format, the config that was injected, and each layer's own settings."""
    layers = {}
    for path, layer in lora_layers(model).items():
        settings: dict[str, Any] = {
            "class": type(layer).__name__,
            "r": layer.r,
            "lora_alpha": layer.lora_alpha,
            "use_rslora": layer.use_rslora,
        }
        if isinstance(layer, MergedLinear):
            settings["segments"] = list(layer.segments)
            settings["enable_lora"] = layer.enable_lora
        layers[path] = settings
    config = getattr(unwrap(model), "lora_config", None)
    return {"format": _FORMAT, "config": config.to_dict() if config else None, "layers": layers}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the active adapter to ``path``: ``.safetensors``, or ``.pt``, each with its settings inside.

    The file is on disk when this returns. If the process is killed or the disk is full, an earlier file is unchanged.
    A and B are saved, and the biases that train or were trained. A warning names what else was trained and is not in
    the file: other parameters that require a gradient (a new head, say), and buffers that changed since the injection
    (batch norm's statistics).

    Returns:
        The path written.

    Raises:
        AdapterError: a model without adapters, another suffix, a path that cannot be written; trained biases inside
            ``disabled``, where the base's own are in their place.
    """
    path, model = adapter_path(path), unwrap(model)
    if not lora_layers(model):
        raise AdapterError("the model has no adapters to save; call inject_lora(model, config) first")
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    if any(name.endswith("bias") for name in state):
        check_outside_blocks(model, "save_adapter of trained biases")
    _warn_of_what_is_left_out(model, state, path)
    metadata = {HEADER_KEY: json.dumps(adapter_metadata(model))}
    with written(repr(str(path)), "file there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = tensor_file(path.suffix, state, metadata)
        write_atomic(path, lambda file: file.write_bytes(data))
        if path.suffix == ".pt":
            _sidecar(path).unlink(missing_ok=True)  # an older version's, for the file that was here
    return path


@contextmanager
def written(what: str, kind: str = "one there") -> Iterator[None]:
    """Raise an AdapterError if the block cannot write ``what``; it says that an earlier ``kind`` is unchanged."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"{what} cannot be written: {error_line(error)}; an earlier {kind} is unchanged") from error


def _warn_of_what_is_left_out(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    left_out = [name for name in map(plain_name, trained) if name not in state]
    for what, names in (("trained parameters", left_out), ("buffers that changed in training", changed_buffers(model))):
        if names:
            advice = "save them with torch.save too, and load them after load_adapter"
            logger.warning("%s leaves out %s: %s; %s", path, what, ", ".join(names), advice)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Load an adapter file into ``model`` and check what ``strict=False`` does not.

    A model without adapters gets those that the file describes first. On an error the model is unchanged.

    Args:
        model: with adapters or without.
        path: an adapter file of ours or loralib's.
        name: the adapter's name. If the active adapter has it (``inject_lora``'s is ``"default"``), its numbers are
            replaced. Under another name the adapter is built as the file describes and stays inactive until
            ``set_adapter(model, name)``; an inactive one of that name is replaced.

    Raises:
        AdapterError: no such file, not an adapter file, keys or shapes that do not match (the message names them), or
            layers built differently (rank, alpha, rsLoRA, segments); inside ``disabled`` or ``merged``; trained biases
            beside other adapters.
        ModelError: the file's targets match nothing in this model.
    """
    state, metadata = read_adapter(path)
    install_adapter(model, state, metadata, os.fspath(path), name)


def install_adapter(
    model: Any, state: dict[str, Tensor], metadata: dict[str, Any] | None, source: str, name: str
) -> None:
    """Load ``state`` into the adapter called ``name``, or into a new one built from ``metadata``; all or nothing.

    ``metadata`` is that of :func:`adapter_metadata`; ``source`` is for messages.
    """
    if not (isinstance(name, str) and name):
        raise AdapterError(f"an adapter cannot be called {short_repr(name)}; allowed: a string that is not empty")
    model = unwrap(model)
    check_outside_blocks(model, "load_adapter")
    state = {plain_name(key): tensor for key, tensor in state.items()}  # older files may name wrappers
    if metadata is not None:
        metadata = {**metadata, "layers": {plain_name(path): layer for path, layer in metadata["layers"].items()}}
    loaded = list_adapters(model)
    if loaded.get(name):
        _load_checked(model, state, metadata, source)
        return
    if metadata is None or metadata["config"] is None:
        raise AdapterError(f"{source!r} does not say how to build its layers; call inject_lora(model, config) first")
    if not loaded:
        _inject_and_load(model, state, metadata, source)
        model.lora_adapters = LoadedAdapters(active=name)
        return
    biases = [key for key in (*state, *adapter_state_dict(model)) if key.endswith("bias")]
    if biases:
        raise AdapterError(
            f"trained biases ({first_of(biases, 3)}) belong to the base, which {name!r} would share with "
            f"{', '.join(map(repr, loaded))}; allowed beside other adapters: bias='none'"
        )
    with loading_inactive(model, name):
        _inject_and_load(model, state, metadata, source)


def _inject_and_load(model: nn.Module, state: dict[str, Tensor], metadata: dict[str, Any], source: str) -> None:
    """Inject the file's layers into a plain model and load them; on an error the model is plain again."""
    fused = plainly_named_segments(model)
    for layer, settings in metadata["layers"].items():
        widths = list(fused[layer].values()) if layer in fused else settings.get("segments")
        if settings.get("class") == "MergedLinear" and settings.get("segments") != widths:  # of perhaps the same shapes
            got = short_repr(settings.get("segments"))
            raise AdapterError(
                f"{source!r}: {layer} has segments {got} in the settings; allowed in this model: {widths}"
            )
        lora_A, r = state.get(f"{layer}.lora_A"), settings.get("r")
        if lora_A is None:
            raise AdapterError(f"{source!r} is incomplete: missing in the file: {layer}.lora_A")
        if is_int(r, 1) and r > max(lora_A.shape, default=0):  # a layer of that rank could take any amount of memory
            shape = tuple(lora_A.shape)
            raise AdapterError(f"{source!r}: {layer} has r={r} in the settings, and a lora_A of shape {shape}")
    restore = restorer_of_requires_grad(model)
    actual = {plain_name(path): path for path, _ in model.named_modules()}
    layers = {actual.get(path, path): settings for path, settings in metadata["layers"].items()}
    try:
        try:
            inject_layers(model, layers, LoraConfig(**metadata["config"]))
        except ConfigError as error:
            raise AdapterError(f"{source!r}: its settings cannot be used: {error}") from error
        _load_checked(model, state, metadata, source)
    except Phi3LoRAError:
        remove_lora(model)
        restore()
        raise


def _load_checked(model: nn.Module, state: dict[str, Tensor], metadata: dict[str, Any] | None, source: str) -> None:
    """Compare the settings of layers that both have, then load; keys and shapes are compared with the tensors."""
    if metadata is None:
        logger.warning("%s carries no settings: alpha and segments cannot be checked against the model's", source)
    theirs, ours = (metadata or {}).get("layers", {}), adapter_metadata(model)["layers"]
    for layer in theirs.keys() & ours.keys():
        wrong = [
            f"{name} {theirs[layer].get(name)!r} in the file, {value!r} in the model"
            for name, value in ours[layer].items()
            if theirs[layer].get(name) != value
        ]
        if wrong:
            raise AdapterError(f"{source!r} was made for other adapters: {layer}: {'; '.join(wrong)}")
    load_adapter_state(model, state, source)


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Call ``load_state_dict(strict=False)`` and check its result; ``source`` is for messages.

    Biases that an earlier adapter brought and this one has not get the base's values again.

    Raises:
        AdapterError: unexpected or missing keys, other shapes, NaN, infinite values or integers. Nothing is loaded.
    """
    model = unwrap(model)
    actual = {plain_name(key): key for key in model.state_dict()}
    own, needed = {plain_name(key): tensor for key, tensor in model.state_dict().items()}, adapter_state_dict(model)
    trainable = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    reset = {k: v for k, v in base_values(model).items() if k in needed and k not in trainable and k not in state}
    state = {**state, **reset}
    kinds = {
        "not in the model": [key for key in state if key not in own or not (key in needed or key.endswith("bias"))],
        "missing in the file": [key for key in needed if key not in state],
        "other shape": [
            f"{key}: {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the model"
            for key, tensor in state.items()
            if key in own and tensor.shape != own[key].shape
        ],
    }
    problems = [f"{kind}: {first_of(keys, 3)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise AdapterError(f"{source!r} does not fit the model's adapters: " + "; ".join(problems))
    check_finite(state, source)
    put_base_values(model, {k: v for k, v in base_values(model).items() if k not in reset})
    keep_base_values(model, [key for key in state if key.endswith("bias") and key not in reset])
    result = model.load_state_dict({actual[key]: tensor for key, tensor in state.items()}, strict=False)
    assert not result.unexpected_keys and not set(map(plain_name, result.missing_keys)) & set(needed)


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raise AdapterError for integers, NaN and infinite values; ``source`` is for messages."""
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{source!r} holds {key} as {tensor.dtype}; allowed: a floating-point dtype")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{source!r} holds NaN or infinite values in {key}")


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return an adapter file's tensors, on the CPU, and its metadata if it has any. No code in the file is executed."""
    path = adapter_path(path)
    if not path.is_file():
        raise AdapterError(f"there is no adapter file {str(path)!r}")
    try:
        data = path.read_bytes()  # once: tensors and settings are those of one file
        state, header = parse_tensors(data, path.suffix)
        metadata = parse_json(header[HEADER_KEY]) if HEADER_KEY in header else None
        if path.suffix == ".pt" and metadata is None:
            metadata = _read_sidecar(path, hashlib.sha256(data).hexdigest())
        if metadata is not None:
            metadata["config"] = metadata.get("config") or None
            _check_known(metadata)
            if not all(isinstance(value, dict) for value in (*metadata["layers"].values(), metadata["config"] or {})):
                raise TypeError
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable adapter file: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise AdapterError(f"{str(path)!r}: the settings stored with the tensors are not phi3lora's") from error
    return state, metadata


def _check_known(metadata: dict[str, Any]) -> None:
    """Raise ValueError for settings of a format that this version does not know: they may change what is computed."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"its settings have the format {short_repr(metadata.get('format'))}; allowed: {_FORMAT}{_NEWER}"
        )
    for where, settings, known in (
        ("its settings", metadata, ("format", "config", "layers")),
        *((repr(path), layer, _LAYER_SETTINGS) for path, layer in metadata["layers"].items()),
    ):
        if unknown := [short_repr(key, 60) for key in settings if key not in known]:
            raise ValueError(f"{where} has the unknown {first_of(unknown)}; allowed: {', '.join(known)}{_NEWER}")


def _read_sidecar(path: Path, digest: str) -> Any:
    """Return the settings beside a ``.pt`` of an older version, or None; settings of another file do not count."""
    metadata = read_json(_sidecar(path)) if _sidecar(path).is_file() else {}
    if metadata.get(_SHA256) not in (None, digest):
        logger.warning("%s was made for another %s: its settings are not used", _sidecar(path), path.name)
        return None
    return {key: value for key, value in metadata.items() if key != _SHA256} or None


def adapter_path(value: object) -> Path:
    """Return ``value`` as a path that an adapter file can have, or raise an AdapterError."""
    path = as_path(value, "an adapter file", AdapterError)
    if (path / CONFIG_NAME).is_file() or (path.name == TENSORS_NAME and path.with_name(CONFIG_NAME).is_file()):
        raise AdapterError(f"{str(path)!r} is in PEFT's format; load its folder with import_peft(model, folder)")
    if path.is_dir():
        inside = next((path / name for name in FILES_IN_FOLDERS if (path / name).is_file()), None)
        hint = f" in it, {str(inside)!r}" if inside else ": *.safetensors, *.pt"
        raise AdapterError(f"{str(path)!r} is a folder; allowed: the adapter file{hint}")
    if path.suffix not in (".safetensors", ".pt"):
        name = path.name or str(path)
        raise AdapterError(f"an adapter file cannot be called {name!r}; allowed: *.safetensors, *.pt")
    return path


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")
