"""Several adapters on one base: one is active, the others are kept beside the model, and all can be disabled.

The active adapter is part of the model: its layers are in the module tree and its ``lora_A``, ``lora_B`` are Parameters
under loralib's names, so the state dict, an optimizer, ``train`` and ``save_adapter`` see only that one. The inactive
ones are in ``model.lora_adapters``, outside the tree: their LoRA layers, without the base's parameters. Switching
exchanges layer objects. No number is copied or computed, so switching back gives the same logits bit for bit:

    "support" is active      o_proj = Linear(r=8: weight, lora_A, lora_B)     down_proj = nn.Linear(weight)
    "poems" is inactive      {down_proj: Linear(r=4: lora_A, lora_B)}

    "poems" is active        o_proj = nn.Linear(weight)     down_proj = Linear(r=4: weight, lora_A, lora_B)
    "support" is inactive    {o_proj: Linear(r=8: lora_A, lora_B)}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn

from ..config import LoraConfig
from ..errors import AdapterError, did_you_mean
from ..lora.base_values import put_base_values, take_base_values, with_base_values
from ..lora.inject import lora_layers, remove_lora, restorer_of_requires_grad, swap_layers
from ..lora.layer_state import replaced_methods
from ..lora.wrappers import module_at, unwrap

DEFAULT = "default"
"""Default adapter name."""

_DISABLED: WeakSet[nn.Module] = WeakSet()
"""Models inside a ``disabled`` block, with adapters or without."""

_Adapter = tuple[LoraConfig | None, dict[str, Any]]
"""A detached adapter: its config, if it has one, and path -> LoRA layer without the base's parameters."""


@dataclass
class LoadedAdapters:
    """The value of ``model.lora_adapters``."""

    active: str = DEFAULT
    inactive: dict[str, _Adapter] = field(default_factory=dict)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable every adapter inside the block: the model computes exactly what its base does.

    No weight is changed. Trained biases and buffers (batch norm's statistics) have the base's values inside the block.

    Raises:
        AdapterError: inside ``merged``, where the weights are not the base's.

    Example:
        >>> with p3.disabled(model):
        ...     before = p3.evaluate(model, chats)
    """
    model = unwrap(model)
    if any(layer.merged for layer in lora_layers(model).values()):
        raise AdapterError("disabled(model) inside a merged(model) block would not be the base; leave that block first")
    was_disabled = model in _DISABLED
    with switched_off(model), with_base_values(model):
        _DISABLED.add(model)
        try:
            yield
        finally:
            if not was_disabled:
                _DISABLED.discard(model)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let every adapted layer compute as its base layer inside the block."""
    enabled = {layer: layer.enabled for layer in lora_layers(model).values()}
    for layer in enabled:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, state in enabled.items():
            layer.enabled = state


def list_adapters(model: nn.Module) -> dict[str, bool]:
    """Return name -> whether it is active, for every loaded adapter, the active one first.

    Example:
        >>> p3.list_adapters(model)
        {'default': True}
    """
    model = unwrap(model)
    if not lora_layers(model):
        return {}
    adapters = _adapters(model)
    return {adapters.active: True, **dict.fromkeys(adapters.inactive, False)}


def set_adapter(model: nn.Module, name: str) -> None:
    """Activate another loaded adapter; the one that was active keeps its numbers and becomes inactive.

    Adapters may differ in rank, alpha, dropout, targets and segments. The adapted layers are other objects afterwards.
    A and B of an adapter stay the same Parameters, so an optimizer made for it is valid again when it is active again.

    Raises:
        AdapterError: no adapter of that name (the message lists those loaded); inside ``disabled`` or ``merged``.

    Example:
        >>> path = p3.save_adapter(model, "support.safetensors")
        >>> p3.load_adapter(model, path, name="support")
        >>> p3.set_adapter(model, "support")
        >>> p3.list_adapters(model)
        {'support': True, 'default': False}
    """
    model = unwrap(model)
    if _is_active(model, name):
        return
    check_outside_blocks(model, "set_adapter")
    _check_methods(model)
    adapters = _adapters(model)
    adapters.inactive[adapters.active] = _detach_active(model)
    _attach(model, adapters.inactive.pop(name))
    adapters.active = name


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete a loaded adapter. Deleting the last one leaves the base model, with plain, frozen layers.

    Raises:
        AdapterError: no adapter of that name; it is active while others are loaded; it is the last one, inside
            ``disabled`` or ``merged``.

    Example:
        >>> p3.delete_adapter(model, "default")
        >>> p3.list_adapters(model)
        {}
    """
    model = unwrap(model)
    is_active, adapters = _is_active(model, name), _adapters(model)
    if not is_active:
        del adapters.inactive[name]
    elif adapters.inactive:
        others = ", ".join(map(repr, adapters.inactive))
        raise AdapterError(f"the adapter {name!r} is active; first call set_adapter with another one: {others}")
    else:
        check_outside_blocks(model, "delete_adapter")
        _check_methods(model)
        remove_lora(model)
        del model.lora_adapters


@contextmanager
def loading_inactive(model: nn.Module, name: str) -> Iterator[None]:
    """Make the model a plain base inside the block, and keep the adapter that the block injects as inactive ``name``.

    Afterwards the active adapter is active again and ``requires_grad`` is as before. The same holds after an error,
    when nothing is added.
    """
    _check_methods(model)
    adapters = _adapters(model)
    restore = restorer_of_requires_grad(model)
    active, kept = _detach_active(model), take_base_values(model)
    try:
        yield
        adapters.inactive[name] = _detach_active(model)
    finally:
        _attach(model, active)
        put_base_values(model, kept)
        restore()


def _adapters(model: Any) -> LoadedAdapters:
    if not hasattr(model, "lora_adapters"):
        model.lora_adapters = LoadedAdapters()
    adapters: LoadedAdapters = model.lora_adapters
    return adapters


def _detach_active(model: Any) -> _Adapter:
    """Put plain layers into the tree and return the active adapter."""
    config, layers = getattr(model, "lora_config", None), lora_layers(model)
    swap_layers(model, {path: layer.release_base() for path, layer in layers.items()})
    if config is not None:
        del model.lora_config
    return config, layers


def _attach(model: Any, adapter: _Adapter) -> None:
    """Put the adapter's layers into the tree, around the plain ones."""
    config, layers = adapter
    for path, layer in layers.items():
        layer.attach_base(module_at(model, path))
    swap_layers(model, layers)
    if config is not None:
        model.lora_config = config


def _is_active(model: nn.Module, name: str) -> bool:
    """Return whether the loaded adapter ``name`` is active; raise AdapterError if there is none."""
    loaded = list_adapters(model)
    if name not in loaded:
        names = ", ".join(map(repr, loaded)) or "none; load_adapter(model, path, name) loads one"
        raise AdapterError(f"there is no adapter {name!r}.{did_you_mean(str(name), loaded)} Loaded: {names}")
    return loaded[name]


def _check_methods(model: nn.Module) -> None:
    """Raise AdapterError if a method was replaced on an adapted layer, which is about to leave the model."""
    for path, layer in lora_layers(model).items():
        if replaced := replaced_methods(layer):
            raise AdapterError(
                f"{', '.join(replaced)} of {path!r} was replaced on that layer, and another adapter has a layer of its "
                f"own; put the method back first, or use a forward hook"
            )


def check_outside_blocks(model: nn.Module, function: str) -> None:
    """Raise AdapterError inside a ``merged`` or ``disabled`` block; ``function`` is for the message."""
    layers = lora_layers(model).values()
    merged = any(layer.merged for layer in layers)
    if merged or unwrap(model) in _DISABLED or not all(layer.enabled for layer in layers):
        block = "merged(model)" if merged else "disabled(model)"
        raise AdapterError(f"{function} cannot be used inside a {block} block; leave the block first")
