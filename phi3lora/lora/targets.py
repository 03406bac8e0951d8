"""Target names: the layers and segments that each selects, and the layers that can be adapted.

Phi-3 fuses the projections that Llama-style models keep apart, so of Llama's names only ``o_proj`` and ``down_proj``
exist in it. Here the other names select segments of the fused layer:

    q_proj, k_proj, v_proj  ->  rows of qkv_proj        heads*head_dim | kv_heads*head_dim | kv_heads*head_dim
    gate_proj, up_proj      ->  rows of gate_up_proj    intermediate | intermediate

    ["q_proj", "v_proj", "o_proj"]  ->  qkv_proj: MergedLinear(enable_lora=[True, False, True]), o_proj: Linear

A name in a list is a suffix of a path; a single string with other characters is a regular expression that a whole path
matches, as in PEFT (https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py,
``check_target_module_exists``). ``exclude_modules``, ``layers_to_transform``, ``rank_pattern`` and ``alpha_pattern``
match paths in the same way, and segments' names like paths of modules of their own.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch.nn as nn

from ..config import LoraConfig
from ..errors import ModelError, did_you_mean
from .base_weight import count_parameters, plain_linear_classes, weight_shape
from .layer_state import computed_weights
from .wrappers import module_at, plain_name

_PHI3 = "transformers.models.phi3.modeling_phi3"

Segments = dict[str, int]
"""Name -> width of a fused layer's segments, in the order of the output's columns; unnamed ones are "0", "1", ..."""


def fused_segments(model: nn.Module, config: LoraConfig | None = None) -> dict[str, Segments]:
    """Return path -> segments for each fused layer: Phi-3's own, and those that ``config.segments`` describes.

    Without ``config``, the one that the model's adapters were injected with is used, if any.
    """
    fused: dict[str, Segments] = {}
    phi3: Any = sys.modules.get(_PHI3)  # not loaded: no module is of its classes, and loading it takes seconds
    for path, module in model.named_modules() if phi3 is not None else ():
        prefix = f"{path}." if path else ""
        if isinstance(module, phi3.Phi3Attention):
            sizes: Any = module.config
            q = sizes.num_attention_heads * module.head_dim
            kv = sizes.num_key_value_heads * module.head_dim
            fused[prefix + "qkv_proj"] = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        elif isinstance(module, phi3.Phi3MLP):
            width = module.config.intermediate_size
            fused[prefix + "gate_up_proj"] = {"gate_proj": width, "up_proj": width}
    described: Any = getattr(config or getattr(model, "lora_config", None), "segments", None) or {}
    for suffix, widths in described.items():
        named = dict(widths) if isinstance(widths, Mapping) else {str(i): width for i, width in enumerate(widths)}
        paths = [path for path, module in model.named_modules() if _matches(path, suffix)]
        if not paths:
            raise ModelError(f"segments: {suffix!r} matches no module; {candidates(model, fused)}")
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, nn.Linear):
                raise ModelError(f"segments: {path!r} is of class {type(module).__name__}; allowed: nn.Linear")
            if sum(named.values()) != module.out_features or min(named.values()) < 1:
                raise ModelError(
                    f"segments of {path!r}: {named} add up to {sum(named.values())}; "
                    f"allowed: positive widths that add up to out_features={module.out_features}"
                )
            fused[path] = named
    return fused


def sibling(path: str, name: str) -> str:
    """Return the path of a module ``name`` beside the one at ``path``: ``"layers.0.q_proj"`` for a segment."""
    return path[: path.rfind(".") + 1] + name


def plainly_named_segments(model: nn.Module) -> dict[str, Segments]:
    """Return :func:`fused_segments` by paths without the names of wrappers."""
    return {plain_name(path): segments for path, segments in fused_segments(model).items()}


class Limits:
    """The limits that ``exclude_modules`` and ``layers_to_transform`` set to the targets.

    Raises:
        ModelError: an excluded name that matches nothing, a layer number that the model does not have.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, fused: Mapping[str, Segments]) -> None:
        exclude: Any = config.exclude_modules or []
        self._excluded: list[str] = [exclude] if isinstance(exclude, str) else exclude
        self._is_one_string = isinstance(exclude, str)
        layers: Any = config.layers_to_transform  # a list by now
        self._layers: list[int] | None = layers
        self._patterns: Any = config.layers_pattern or ["[^.]*"]
        names = [name for name, _, _ in _nameable(model, fused)]
        for pattern in self._excluded:
            if not any(matches(name, pattern, self._is_one_string) for name in names):
                guess = did_you_mean(pattern, {name.rpartition(".")[2] for name in names})
                raise ModelError(f"exclude_modules: {pattern!r} matches nothing.{guess} {candidates(model, fused)}")
        numbers = {number for name in names if (number := self._number(name)) is not None}
        for number in self._layers or []:
            if number not in numbers:
                has = f"0 to {max(numbers)}" if numbers else "no layer with a number"
                raise ModelError(f"layers_to_transform: there is no layer {number}; {type(model).__name__} has {has}")

    def left(self, path: str, segments: set[str]) -> set[str] | None:
        """Return the segments of a layer that may be adapted; None: the layer may not be."""
        if self._leaves_out(path):
            return None
        left = {name for name in segments if not self._leaves_out(sibling(path, name))}
        return None if segments and not left else left

    def number_none(self, paths: Iterable[str]) -> bool:
        """Return whether ``layers_to_transform`` is set and no path is in a layer with a number."""
        return self._layers is not None and all(self._number(path) is None for path in paths)

    def _leaves_out(self, name: str) -> bool:
        if self._layers is not None and self._number(name) not in self._layers:
            return True
        return any(matches(name, pattern, self._is_one_string) for pattern in self._excluded)

    def _number(self, name: str) -> int | None:
        """Return the number of the layer that a module is in: the first in its path, not an expert's further in."""
        found = (re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)\.", name) for pattern in self._patterns)
        return next((int(match[1]) for match in found if match), None)


def _nameable(model: nn.Module, fused: Mapping[str, Segments]) -> list[tuple[str, str, set[str]]]:
    """Return what a target can name, as (name, path, segments): a module for all its segments, or one of these."""
    # A module that stands in several places has a name for each; it is known by the first.
    first = {module: path for path, module in model.named_modules()}
    places = [(path, first[module]) for path, module in model.named_modules(remove_duplicate=False) if path]
    names = [(name, path, set(fused.get(path, ()))) for name, path in places]
    for path, segments in fused.items():
        names += [(sibling(path, name), path, {name}) for name in segments if not name.isdigit()]
    return names


def select_targets(
    model: nn.Module, targets: str | Sequence[str], fused: dict[str, Segments], limits: Limits
) -> dict[str, set[str]]:
    """Return path -> names of the segments to adapt (none where not fused) of the targeted layers, in model order."""
    nameable = _nameable(model, fused)
    selected: dict[str, set[str]] = {}
    unnumbered: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        is_one = isinstance(targets, str)
        matched = [(path, names) for full_name, path, names in nameable if matches(full_name, target, is_one)]
        if not matched:
            guess = did_you_mean(target, {"all-linear"} | {name.rpartition(".")[2] for name, _, _ in nameable})
            if target == "all-linear":
                guess = " As one string, not in a list, it means every linear layer."
            parameters = [(name, tuple(p.shape)) for name, p in model.named_parameters() if _matches(name, target)]
            if parameters:
                guess = " {!r} is a parameter of shape {}; only layers can be adapted.".format(*parameters[0])
            raise ModelError(f"target_modules: {target!r} matches nothing.{guess} {candidates(model, fused)}")
        if limits.number_none([path for path, _ in matched]):
            unnumbered.append(target)
        for path, names in matched:
            left = limits.left(path, names)
            if left is None:
                continue
            if reason := reason_against(model.get_submodule(path)):
                raise ModelError(
                    f"target {target!r} matches {path!r} of {reason}; "
                    f"allowed: nn.Linear, Linear4bit, nn.Embedding, nn.Conv2d. {candidates(model, fused)}"
                )
            selected.setdefault(path, set()).update(left)
    if not selected:
        raise ModelError("exclude_modules and layers_to_transform leave none of the targets; allow some of them")
    if unnumbered:
        raise ModelError(
            f"layers_to_transform leaves out the target {unnumbered[0]!r}, which is in no layer with a number; remove "
            f"the target, or name the layers in target_modules instead (such as 'layers.0.self_attn.o_proj')"
        )
    return {path: selected[path] for path, _ in model.named_modules() if path in selected}


def select_all_linear(
    model: nn.Module, fused: dict[str, Segments], limits: Limits
) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return path -> segment names for every ``nn.Linear`` but the output head; path -> reason for what is skipped."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    selected: dict[str, set[str]] = {}
    skipped: dict[str, str] = {}
    limited = False
    for path, module in model.named_modules():
        if not path or not isinstance(module, nn.Linear) or module is head or _matches(path, "lm_head"):
            continue
        left = limits.left(path, set(fused.get(path, ())))
        limited |= left is None
        if left is None:
            continue
        if reason := reason_against(module):
            skipped[path] = reason
        else:
            selected[path] = left
    if not selected:
        if limited:
            raise ModelError("exclude_modules and layers_to_transform leave no linear layer; allow some of them")
        example = "".join(f"; {path!r} is of {reason}" for path, reason in list(skipped.items())[:1])
        raise ModelError(
            f"target_modules='all-linear' matches nothing: {type(model).__name__} has no nn.Linear inside{example}"
        )
    return selected, skipped | _experts(model)


def _experts(model: nn.Module) -> dict[str, str]:
    """Return path -> reason for modules that keep stacks of matrices as parameters, as mixtures of experts do."""
    stacks = {
        path: [p for p in module._parameters.values() if p is not None and p.dim() >= 3 and min(p.shape) > 1]
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.") and not isinstance(module, nn.modules.conv._ConvNd)
    }
    entries = sum(weight_shape(p).numel() for parameters in stacks.values() for p in parameters)
    share = 100 * entries / max(count_parameters(model), 1)
    return {
        path: f"stacked matrices ({', '.join('x'.join(map(str, p.shape)) for p in parameters)}), no linear layers; "
        f"such parameters are {share:.1f} % of the model"
        for path, parameters in stacks.items()
        if parameters
    }


def _matches(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def matches(path: str, name: str, is_one_string: bool) -> bool:
    """Return whether a suffix matches a path; a single string may also be a regular expression for the whole path."""
    return _matches(path, name) or (is_one_string and re.fullmatch(name, path) is not None)


def ranks_and_alphas(
    config: LoraConfig, selected: Mapping[str, set[str]], fused: Mapping[str, Segments]
) -> dict[str, tuple[int, float]]:
    """Return path -> (r, lora_alpha): by the first key of each pattern that matches the end of the path, as in PEFT.

    Raises:
        ModelError: a key that matches no adapted layer; segments of one fused layer that would differ in rank or alpha.
    """
    found: dict[str, Any] = dict.fromkeys(selected, ())
    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        pattern: Mapping[str, float] = getattr(config, field)
        unused = set(pattern)
        for path, segments in selected.items():
            names = {name: sibling(path, name) for name in fused.get(path, ()) if name in segments} or {path: path}
            keys = {
                n: next((k for k in pattern if _ends_with(path, k) or _ends_with(at, k)), "") for n, at in names.items()
            }
            values = {name: pattern.get(key, default) for name, key in keys.items()}
            unused -= set(keys.values())
            if len(set(values.values())) > 1:
                raise ModelError(
                    f"{field} gives the segments of {path!r} different values, {values}; a fused layer has one for "
                    f"all: give the same value to {', '.join(values)}"
                )
            found[path] += (next(iter(values.values())),)
        if unused:
            key = min(unused)
            is_late = any(_ends_with(path, key) for path in selected)
            late = ", that no earlier key matches; put it before that" if is_late else ""
            raise ModelError(f"{field}: {key!r} matches none of the adapted layers{late}: {', '.join(_ends(selected))}")
    return found


def _ends_with(path: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _ends(paths: Iterable[str]) -> list[str]:
    """Return the last parts of paths, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


_WAYS_OUT = {
    "Linear8bitLt": "load the model in 4 bits (base_precision='nf4') or 16",
    "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention multiplies by its weight itself",
}  # class -> a remedy, or why there is none


def reason_against(module: nn.Module) -> str | None:
    """Return why a module is not a layer that can be adapted, as ``class X: ...``, or None if it is one."""
    name = type(module).__name__
    if type(module) not in (*plain_linear_classes(), nn.Embedding, nn.Conv2d):  # a subclass may compute differently
        way_out = "remove its parametrizations first" if hasattr(module, "parametrizations") else _WAYS_OUT.get(name)
        return f"class {name}" + (f": {way_out}" if way_out else "")
    if computed := computed_weights(module):
        return (
            f"class {name}, whose weight is computed from {', '.join(computed)}: remove_weight_norm, "
            f"remove_spectral_norm or prune.remove first"
        )
    return None


def candidates(model: nn.Module, fused: Mapping[str, Segments]) -> str:
    """Return ``Candidates: ...``: the last part of the path of every adaptable layer, and the segments' names."""
    names = [path.rpartition(".")[2] for path, module in model.named_modules() if path and not reason_against(module)]
    names += [name for segments in fused.values() for name in segments if not name.isdigit()]
    return f"Candidates: {', '.join(dict.fromkeys(names)) or 'none: no nn.Linear, nn.Embedding or nn.Conv2d inside'}"


# ----------------------------------------------------------------------------------------------------
# Parents that read a layer's weight instead of calling the layer: F.linear(x, self.proj.weight)


def weight_readers(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return path -> the parent's class for layers whose weight the parent's code reads itself.

    What such code computes has no adapter. It may be one branch of several, so this is a reason to look, no proof.
    """
    found = {}
    for path in paths:
        parent = module_at(model, path.rpartition(".")[0])
        cls: Any = type(parent)
        own = vars(parent).get("forward")
        own = getattr(own, "func", getattr(own, "__func__", own))  # of a partial or a bound method
        reads = _weights_read_by(cls) | (_weights_read_in(own) if inspect.isfunction(own) else set())
        if path.rpartition(".")[2] in reads:
            found[path] = cls.__name__
    return found


@functools.cache
def _weights_read_by(cls: type) -> frozenset[str]:
    """Return the names X of all ``self.X.weight`` that the methods of a module class compute with."""
    methods = [
        inspect.unwrap(method)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not any(word in name for word in ("init", "reset", "tie"))
    ]
    return frozenset().union(*(_weights_read_in(m) for m in methods if not m.__module__.startswith("torch.")))


def _weights_read_in(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names X of all ``....X.weight`` in a function, but for ``....X.weight.dtype`` and the like."""
    code = [(step.opname, step.argval) for step in dis.get_instructions(function)]
    facts = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda", "data_ptr"}
    found = set()
    for i in range(1, len(code) - 1):
        reads = code[i - 1][0] == code[i][0] == "LOAD_ATTR" and code[i][1] == "weight"
        is_test = any(name == "isinstance" for _, name in code[max(i - 4, 0) : i])
        if reads and code[i + 1][1] not in facts and not is_test:
            found.add(str(code[i - 1][1]))
    return frozenset(found)
