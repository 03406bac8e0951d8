"""The base's own biases and buffers, copied before training may change them.

An adapter is A and B, but training can also change biases (``bias="all"``) and buffers (batch norm's statistics).
``model.lora_base_values`` has the values that these had in the base, so that ``disabled`` and ``delete_adapter`` give
the base exactly and ``save_adapter`` knows what changed. Weights loaded after the injection are the base's: the copies
are made again then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer_state import ADAPTER_PARAMETERS
from .wrappers import plain_name

_ATTRIBUTE = "lora_base_values"


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> the base's own value of each bias and buffer that was copied."""
    values: dict[str, Tensor] = model.__dict__.get(_ATTRIBUTE, {})
    return values


def keep_base_values(model: nn.Module, names: Iterable[str]) -> None:
    """Copy the values that these biases and buffers have now, unless they were copied before."""
    kept, current = base_values(model), _current_values(model)
    new = {name: current[name].detach().clone() for name in names if name not in kept and not current[name].is_meta}
    put_base_values(model, {**kept, **new})


def trained_biases_and_buffers(model: nn.Module) -> list[str]:
    """Return the names of the biases that train, and of the buffers in the state dict that training may change."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):  # its buffers are a quantised weight's
            own = module._buffers.keys() - module._non_persistent_buffers_set
            names += [f"{path}.{name}" if path else name for name in own if module._buffers[name] is not None]
    return list(map(plain_name, names))


def changed_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers that differ from the base's."""
    kept, buffers = base_values(model), {plain_name(name): buffer for name, buffer in model.named_buffers()}
    return [name for name, value in kept.items() if name in buffers and not buffers[name].to(value).equal(value)]


@contextmanager
def with_base_values(model: nn.Module) -> Iterator[None]:
    """Give the biases and buffers the base's values inside the block.

    Storages are exchanged, not written: a graph made before the block has its own values in its backward.
    """
    current = _current_values(model)
    own = {name: current[name].data for name in base_values(model) if name in current}
    for name in own:
        current[name].data = base_values(model)[name].to(current[name], copy=True)
    try:
        yield
    finally:
        for name, value in own.items():
            current[name].data = value.to(current[name])


def restore_base_values(model: nn.Module) -> None:
    """Give the biases and buffers the base's values for good."""
    kept = take_base_values(model)
    for name, tensor in _current_values(model).items():
        if name in kept:
            tensor.data = kept[name].to(tensor)


def take_base_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the copies, which the model then no longer has."""
    kept: dict[str, Tensor] = model.__dict__.pop(_ATTRIBUTE, {})
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_again_after_base]:
        del hooks[key]
    return kept


def put_base_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the copies; the inverse of :func:`take_base_values`."""
    take_base_values(model)
    if values:
        setattr(model, _ATTRIBUTE, values)
        model.register_load_state_dict_post_hook(_keep_again_after_base)  # type: ignore[no-untyped-call]


def _current_values(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _keep_again_after_base(model: nn.Module, incompatible_keys: Any) -> None:
    """Make the copies again if base weights were loaded, and not an adapter alone."""
    kept, missing = base_values(model), set(incompatible_keys.missing_keys)
    loaded = (name for name in model.state_dict() if name not in missing)
    if any(plain_name(name) not in kept and name.rpartition(".")[2] not in ADAPTER_PARAMETERS for name in loaded):
        current = _current_values(model)
        setattr(model, _ATTRIBUTE, {name: current[name].detach().clone() for name in kept if name in current})
