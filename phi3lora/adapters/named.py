"""Several adapters on one base: which of them acts, which wait, and none of them for a while.

The acting adapter is the model's own: its layers are in the tree and its ``lora_A``, ``lora_B`` are Parameters under
loralib's names, so the state dict, an optimizer, ``train`` and ``save_adapter`` see it and no other. The others wait in
``model.lora_adapters``, outside the tree: their layers, without the base's parameters. To switch, layers change places;
no number is copied or computed, so switching back is exact:

    "support" acts    o_proj = Linear(r=8: weight, lora_A, lora_B)     down_proj = nn.Linear(weight)
    "poems" waits     {down_proj: Linear(r=4: lora_A, lora_B)}

    "poems" acts      o_proj = nn.Linear(weight)     down_proj = Linear(r=4: weight, lora_A, lora_B)
    "support" waits   {o_proj: Linear(r=8: lora_A, lora_B)}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import LoraConfig
from ..errors import AdapterError, did_you_mean
from ..lora.inject import lora_layers, remove_lora, swap_layer

DEFAULT = "default"
"""What an adapter is called that was not given a name."""


@dataclass
class _Waiting:
    """An adapter that does not act."""

    config: LoraConfig | None
    layers: dict[str, Any]
    """Path -> LoRA layer with its adapters alone."""


@dataclass
class _Adapters:
    """``model.lora_adapters``."""

    acting: str = DEFAULT
    waiting: dict[str, _Waiting] = field(default_factory=dict)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, exactly, for the time of the block: every adapter is passed by, no weight is touched.

    Example:
        >>> with p3.disabled(model):
        ...     before = p3.evaluate(model, chats)
    """
    enabled = {layer: layer.enabled for layer in lora_layers(model).values()}
    for layer in enabled:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, state in enabled.items():
            layer.enabled = state


def list_adapters(model: nn.Module) -> dict[str, bool]:
    """Name -> whether it acts, of every adapter that is loaded, the acting one first.

    Example:
        >>> p3.list_adapters(model)
        {'default': True}
    """
    if not lora_layers(model):
        return {}
    adapters = _adapters(model)
    return {adapters.acting: True, **dict.fromkeys(adapters.waiting, False)}


def set_adapter(model: nn.Module, name: str) -> None:
    """Let another loaded adapter act; the one that acted waits, with whatever training made of it.

    Adapters may differ in rank, alpha, dropout, targets and segments. The layers that are adapted are other objects
    afterwards; A and B of an adapter stay the same Parameters, so an optimizer made for it goes on when it acts again.

    Raises:
        AdapterError: no adapter of that name (the loaded ones are listed); inside ``disabled`` or ``merged``.

    Example:
        >>> path = p3.save_adapter(model, "support.safetensors")
        >>> p3.load_adapter(model, path, name="support")
        >>> p3.set_adapter(model, "support")
        >>> p3.list_adapters(model)
        {'support': True, 'default': False}
    """
    known = list_adapters(model)
    _refuse_unknown(known, name)
    if known[name]:
        return
    _refuse_inside_blocks(model)
    adapters = _adapters(model)
    adapters.waiting[adapters.acting] = _take_off(model)
    _put_on(model, adapters.waiting.pop(name))
    adapters.acting = name


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop a loaded adapter. Of the last one the base model stays, its layers plain and frozen.

    Raises:
        AdapterError: no adapter of that name; it acts while others wait; the last one inside ``disabled`` or
            ``merged``.

    Example:
        >>> p3.delete_adapter(model, "default")
        >>> p3.list_adapters(model)
        {}
    """
    known = list_adapters(model)
    _refuse_unknown(known, name)
    adapters = _adapters(model)
    if not known[name]:
        del adapters.waiting[name]
    elif adapters.waiting:
        others = ", ".join(map(repr, adapters.waiting))
        raise AdapterError(f"the adapter {name!r} acts; call set_adapter with another first, one of {others}")
    else:
        _refuse_inside_blocks(model)
        remove_lora(model)
        del model.lora_adapters


def call_acting(model: nn.Module, name: str) -> None:
    """Give the acting adapter its name."""
    _adapters(model).acting = name


@contextmanager
def apart(model: nn.Module, name: str) -> Iterator[None]:
    """The plain base for the time of the block; the adapter that the block puts into it waits as ``name`` afterwards.

    What acted acts again, and what trained trains; also after an error, when nothing new waits.

    Raises:
        AdapterError: inside ``disabled`` or ``merged``; the acting adapter trains biases, which are the base's own.
    """
    _refuse_inside_blocks(model)
    adapters = _adapters(model)
    config = getattr(model, "lora_config", None)
    all_biases = [p for path, p in model.named_parameters() if path.endswith("bias")]
    if any(p.requires_grad or (config and config.bias != "none") for p in all_biases):
        raise AdapterError(
            f"the adapter {adapters.acting!r} trains biases of the base, which others would share; "
            f"allowed beside others: bias='none'"
        )
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    acting = _take_off(model)
    try:
        yield
        adapters.waiting[name] = _take_off(model)
    finally:
        _put_on(model, acting)
        for parameter, state in trains.items():
            parameter.requires_grad = state


def _adapters(model: nn.Module) -> _Adapters:
    if not hasattr(model, "lora_adapters"):
        model.lora_adapters = _Adapters()  # type: ignore[assignment]
    return model.lora_adapters  # type: ignore[return-value]


def _take_off(model: nn.Module) -> _Waiting:
    """Plain layers in the tree; the acting adapter's, out of it."""
    waiting = _Waiting(getattr(model, "lora_config", None), lora_layers(model))
    for path, layer in waiting.layers.items():
        swap_layer(model, path, layer.take_off())
    if hasattr(model, "lora_config"):
        del model.lora_config
    return waiting


def _put_on(model: nn.Module, adapter: _Waiting) -> None:
    """The adapter's layers over the plain ones."""
    for path, layer in adapter.layers.items():
        layer.put_on(model.get_submodule(path))
        swap_layer(model, path, layer)
    if adapter.config is not None:
        model.lora_config = adapter.config  # type: ignore[assignment]


def _refuse_unknown(known: dict[str, bool], name: str) -> None:
    if name not in known:
        loaded = ", ".join(map(repr, known)) or "none; load_adapter(model, path, name) loads one"
        raise AdapterError(f"no adapter is called {name!r}.{did_you_mean(str(name), known)} Loaded: {loaded}")


def _refuse_inside_blocks(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        if layer.merged or not layer.enabled:
            block = "merged(model)" if layer.merged else "disabled(model)"
            raise AdapterError(f"adapters cannot change places inside a {block} block; leave it first")
