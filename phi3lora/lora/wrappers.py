"""Wrappers around a model or a part of it, whose own names are in front of every path and belong in no file.

torch.compile(model)         _orig_mod.model.layers.0.mlp.down_proj   ->  model.layers.0.mlp.down_proj
nn.DataParallel(model)       module.model.layers.0.mlp.down_proj      ->  model.layers.0.mlp.down_proj
model.model = compile(...)   model._orig_mod.layers.0.mlp.down_proj   ->  model.layers.0.mlp.down_proj
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ModelError, short_repr

_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> Any:
    """Return the module inside the wrappers of torch around ``model``; raise a ModelError if it is no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model={short_repr(model)}; allowed: a torch.nn.Module, such as load_model returns")
    while True:
        part = next((part for part in _PARTS if part in model._modules), None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            part = "module"
        if part is None:
            return model
        model = model.get_submodule(part)


def plain_name(name: str) -> str:
    """Return the path or name of a module or tensor without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def module_at(model: nn.Module, path: str) -> Any:
    """Return the module at a path, which may leave out the wrappers' parts."""
    module = unwrap(model)
    for part in plain_name(path).split("."):
        module = unwrap(getattr(module, part) if part else module)
    return module
