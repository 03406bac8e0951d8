"""The state of a layer beside its numbers: hooks, a user's attributes, methods replaced on the instance.

A layer is swapped for another object when adapters are injected, switched or removed. This state moves to the new one
where it means the same there; the rest is refused by name:

    moves       hooks of every kind, accelerate's ``_hf_hook``, attributes, buffers, submodules, the mode
    refused     a method replaced on the instance (``forward``), which is bound to the old object
                a weight that is computed from other tensors (weight norm, pruning), a weight that is offloaded
                an attribute with a name that the adapted layer uses itself

Both layers hold the same dictionaries of hooks, so a hook's handle still removes it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import nn

ADAPTER_PARAMETERS = ("lora_A", "lora_B")
"""Names of an adapter's own parameters; a layer's other parameters are the base layer's."""

_ADAPTER_NAMES = frozenset({
    *ADAPTER_PARAMETERS, "r", "lora_alpha", "use_rslora", "lora_dropout", "scaling", "enabled", "merged",
    "merge_weights", "fan_in_fan_out", "segments", "enable_lora", "conv",
})  # fmt: skip
"""Attributes of an adapted layer beside the state of its base layer."""

_CONTENTS = ("_parameters", "_buffers", "_modules")
INNER_STATE = frozenset({
    *_CONTENTS, "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
})  # fmt: skip
"""State that stays on a layer which is kept inside the adapted one."""


def share_state(source: nn.Module, layer: nn.Module, skip: Collection[str] = ()) -> None:
    """Give ``layer`` the state of ``source`` but for adapters and ``skip``: the same objects, no copies."""
    for name, value in vars(source).items():
        if name in skip or name in _ADAPTER_NAMES or _is_bound_to_instance(source, name):
            continue
        if name in _CONTENTS:
            getattr(layer, name).update({key: item for key, item in value.items() if key not in _ADAPTER_NAMES})
        elif name == "_non_persistent_buffers_set":
            layer._non_persistent_buffers_set |= value
        else:
            vars(layer)[name] = value


def strip_state(layer: nn.Module) -> None:
    """Leave only the adapter on ``layer``; what was shared with another layer stays there."""
    for name in _CONTENTS:
        content = getattr(layer, name)
        for key in content.keys() - _ADAPTER_NAMES:
            del content[key]
    layer._non_persistent_buffers_set.clear()
    for name in vars(layer).keys() - _ADAPTER_NAMES - INNER_STATE - {"training"}:
        if not _is_bound_to_instance(layer, name):  # rebind_hooks takes those
            delattr(layer, name)


def rebind_hooks(old: nn.Module, layer: nn.Module) -> None:
    """Bind to ``layer``, which replaces ``old`` in a model, the hooks that hold the module they run on."""
    for hook in layer._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is old:  # type: ignore[attr-defined]
            hook.module = weakref.ref(layer)  # type: ignore[attr-defined]
    if _has_hf_hook(old):
        del vars(old)["_old_forward"]
        method = MethodType(type(layer).forward, layer)
        forward = functools.partial(vars(old).pop("forward").func, layer)
        vars(layer).update(_old_forward=method, forward=functools.update_wrapper(forward, method))


def replaced_methods(layer: nn.Module) -> list[str]:
    """Return the names of methods that were replaced on this instance; accelerate's ``forward`` does not count."""
    methods = {name: value for name, value in vars(layer).items() if _is_bound_to_instance(layer, name)}
    if _has_hf_hook(layer):
        del methods["forward"]  # it calls _old_forward, which is checked
    replaced = [name for name, value in methods.items() if not _is_own_method(layer, name, value)]
    return ["forward" if name == "_old_forward" else name for name in replaced]


def reason_against_state(base: nn.Module, adapted_class: type[nn.Module]) -> str | None:
    """Return why the state of ``base`` cannot move to a layer of ``adapted_class``, with the way out, or None."""
    replaced = replaced_methods(base)
    if "_compiled_call_impl" in replaced:
        return "it was compiled by its own compile(), which would bypass an adapter; compile it after inject_lora"
    if replaced:
        return (
            f"{', '.join(replaced)} of this instance was replaced and would go on with the layer that was there; "
            f"replace it after inject_lora, or use a forward hook"
        )
    contents = (base._parameters, base._buffers, base._modules)
    names = {*vars(base), *(name for content in contents for name in content)}
    taken = sorted(n for n in names if n in _ADAPTER_NAMES or hasattr(adapted_class, n) > hasattr(type(base), n))
    if taken:
        return f"it has an attribute {taken[0]!r}, which adapted layers use themselves; rename it"
    return None


def computed_weights(layer: nn.Module) -> list[str]:
    """Return the names of the tensors that ``weight`` and ``bias`` are computed from, where these are not parameters.

    If such tensors are not on the layer itself, ``"elsewhere"`` stands for them.
    """
    return [
        ", ".join(part for part in (*layer._parameters, *layer._buffers) if part.startswith(f"{name}_")) or "elsewhere"
        for name in ("weight", "bias")
        if name not in layer._parameters and (name == "weight" or hasattr(layer, name))
    ]


def _is_bound_to_instance(layer: nn.Module, name: str) -> bool:
    """Return whether an attribute of the instance stands in for a method of its class."""
    return name in ("_old_forward", "_compiled_call_impl") or callable(getattr(type(layer), name, None))


def _has_hf_hook(layer: nn.Module) -> bool:
    """Return whether accelerate's ``add_hook_to_module`` made the instance's ``forward``."""
    forward: Any = vars(layer).get("forward")
    return "_old_forward" in vars(layer) and isinstance(forward, functools.partial) and forward.args == (layer,)


def _is_own_method(layer: nn.Module, name: str, value: Any) -> bool:
    """Return whether a value is the class's own method, which accelerate and torch leave behind on an instance."""
    own = getattr(type(layer), name.replace("_old_forward", "forward"), None)
    return value is None or (getattr(value, "__self__", None) is layer and value.__func__ is own)
