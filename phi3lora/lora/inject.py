"""Injection of adapters: swap layers for their LoRA versions, freeze everything else, report what was done.

``inject_lora`` turns target names into settings for each layer (targets.py says what a name matches);
``inject_layers`` swaps the layers as the settings say. All layers are built before the first is swapped, so after an
error the model is as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from loralib.layers import LoRALayer

from ..config import LoraConfig
from ..display import html, html_table, one_line, terminal_columns, text_table, wrap
from ..errors import ConfigError, ModelError, is_int, require
from .base_values import keep_base_values, restore_base_values, trained_biases_and_buffers
from .base_weight import count_parameters, count_trainable, keep_4bit_packing, weight_shape
from .layer_state import rebind_hooks
from .layers import AdaptedLayer, Conv2d, Embedding, Linear, MergedLinear
from .targets import (
    Limits,
    candidates,
    fused_segments,
    ranks_and_alphas,
    reason_against,
    select_all_linear,
    select_targets,
    weight_readers,
)
from .wrappers import module_at, plain_name, unwrap

_CLASSES: dict[str, tuple[type[AdaptedLayer], type[nn.Module]]] = {
    "Linear": (Linear, nn.Linear),
    "MergedLinear": (MergedLinear, nn.Linear),
    "Embedding": (Embedding, nn.Embedding),
    "Conv2d": (Conv2d, nn.Conv2d),
}  # name -> the adapted class and the class of its base layer


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer."""

    module: str
    """Path in the model."""
    class_name: str
    """Class of the adapted layer."""
    shape: tuple[int, ...]
    """Shape of the frozen weight."""
    segments: tuple[str, ...]
    """Adapted segments of a fused layer; empty for others."""
    trainable_parameters: int
    """Number of entries that train."""

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        segments = [f"segments {', '.join(self.segments)}"] if self.segments else []
        facts = [self.module, f"{self.class_name} {shape}", *segments, f"{self.trainable_parameters:,} trainable"]
        return one_line("LayerReport", facts)


@dataclass(frozen=True)
class InjectionReport:
    """Result of :func:`inject_lora`; ``print`` shows it as a table, in which equal layers share a line."""

    layers: tuple[LayerReport, ...]
    """The adapted layers, in model order."""
    trainable_parameters: int
    """Number of entries that train in the whole model."""
    total_parameters: int
    """Number of entries in the whole model, adapters included."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules that ``"all-linear"`` could not adapt: path of a layer, or of a module with 3-D weights -> reason."""
    bypassed: dict[str, str] = field(default_factory=dict)
    """Adapted layers that may be bypassed: path -> the parent's class, whose code reads their weight itself."""

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return one_line("InjectionReport", [f"{len(self.layers)} layers", self._totals()])

    def __str__(self) -> str:
        lines = [self._totals(), *self._notes()]
        columns = terminal_columns()
        if self.layers:
            lines.insert(0, text_table(self._table(), columns))
        return "\n".join(part for line in lines for part in wrap(line, columns))

    def _repr_html_(self) -> str:
        return "".join(
            [html_table(self._table()), *(f"<p>{html(line)}</p>" for line in (self._totals(), *self._notes()))]
        )

    def _table(self) -> list[tuple[str, ...]]:
        """Return the table's rows, the head first; equal layers of a stack are one row."""
        counts = Counter(
            (
                _stack_name(layer.module),
                layer.class_name,
                "x".join(map(str, layer.shape)),
                ", ".join(layer.segments),
                f"{layer.trainable_parameters:,}",
            )
            for layer in self.layers
        )
        head = ("module", "class", "weight", "segments", "trainable each", "layers")
        return [head, *((*row, str(count)) for row, count in counts.items())]

    def _totals(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.3f} %)"

    def _notes(self) -> list[str]:
        """Return a line for each kind of layer that was skipped, or that may be bypassed."""
        notes = [(path, "skipped", f": {reason}") for path, reason in self.skipped.items()]
        notes += [(path, "may be bypassed:", f", whose weight {cls} reads") for path, cls in self.bypassed.items()]
        alike: dict[tuple[str, str, str], list[str]] = {}
        for path, before, after in notes:
            alike.setdefault((before, _stack_name(path), after), []).append(path)
        return [
            f"{before} {paths[0] if len(paths) == 1 else pattern}{after}"
            for (before, pattern, after), paths in alike.items()
        ]


def _stack_name(path: str) -> str:
    """Return a layer's path with ``*`` for its number: the name of all such layers of a stack."""
    return re.sub(r"\b\d+\b", "*", path)


def inject_lora(model: nn.Module, config: LoraConfig | None = None) -> InjectionReport:
    """Swap the targeted layers of ``model`` for LoRA layers, in place, and leave only the adapters trainable.

    The pretrained parameters are kept as they are (not copied), so a meta-device model works too. ``nn.Linear`` becomes
    ``Linear`` or, where it is fused, ``MergedLinear``; ``nn.Embedding`` and ``nn.Conv2d`` become ``Embedding`` and
    ``Conv2d``. Hooks and attributes of a swapped layer move to the new one. A layer that is used in several places is
    swapped in all of them. After an error the model is as it was.

    Args:
        model: any ``nn.Module``. Phi-3's fused layers are known; describe your own with ``LoraConfig(segments=...)``.
        config: what to adapt; default ``LoraConfig()``.

    Returns:
        A report: module, class, shape, segments adapted, trainable parameters, totals.

    Raises:
        ModelError: a target that matches nothing (the candidates are listed) or matches a layer that cannot be adapted;
            segments that do not add up; a model that already has adapters, of any library; tied weights as a target;
            weights that are offloaded or were made in ``torch.inference_mode()``; a layer whose ``forward`` was
            replaced.

    Example:
        >>> import torch.nn as nn, phi3lora as p3
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = p3.inject_lora(net, p3.LoraConfig(r=2, target_modules=["0"]))
        >>> report.layers[0].class_name, report.trainable_parameters
        ('Linear', 48)
    """
    config, model = LoraConfig() if config is None else config, unwrap(model)
    require(isinstance(config, LoraConfig), "config", config, "LoraConfig(...); LoraConfig(**a_dict)", ConfigError)
    _check_no_adapters(model)
    made_for_inference = [name for name, p in model.named_parameters() if p.is_inference()]
    if made_for_inference:
        raise ModelError(
            f"{made_for_inference[0]!r} was made inside torch.inference_mode(), so nothing can train through it; "
            f"load the model outside of it"
        )
    fused = fused_segments(model, config)
    limits = Limits(model, config, fused)
    if config.target_modules == "all-linear":
        selected, skipped = select_all_linear(model, fused, limits)
    else:
        selected, skipped = select_targets(model, config.target_modules, fused, limits), {}
    sizes = ranks_and_alphas(config, selected, fused)
    layers: dict[str, dict[str, Any]] = {}
    for path, names in selected.items():
        base = model.get_submodule(path)
        class_name = type(base).__name__ if isinstance(base, (nn.Embedding, nn.Conv2d)) else "Linear"
        r, lora_alpha = sizes[path]
        layers[path] = {"class": class_name, "r": r, "lora_alpha": lora_alpha, "use_rslora": config.use_rslora}
        if path in fused:
            widths, enable_lora = [*fused[path].values()], [name in names for name in fused[path]]
            layers[path].update({"class": "MergedLinear", "segments": widths, "enable_lora": enable_lora})
    return replace(inject_layers(model, layers, config), skipped=skipped)


def inject_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], config: LoraConfig) -> InjectionReport:
    """Inject adapters with each layer's own settings, as an adapter file holds them, instead of target names.

    Args:
        model: a model without adapters.
        layers: path -> ``class``, ``r``, ``lora_alpha``, ``use_rslora`` and, for a ``MergedLinear``, ``segments``
            (widths) and ``enable_lora``.
        config: dropout and which biases train; it is stored as ``model.lora_config``.

    Returns:
        A report, as :func:`inject_lora` does.

    Raises:
        ModelError: a path that is not in the model or leads to a layer of another class, tied embeddings, segments that
            do not add up, a model that already has adapters. No layer has been swapped then.
        ConfigError: an invalid rank, alpha or rsLoRA switch.
    """
    model = unwrap(model)
    _check_no_adapters(model)
    modules = dict(model.named_modules())
    for path, settings in layers.items():
        _, base_class = _CLASSES.get(str(settings.get("class")), (None, None))
        if not path or path not in modules or base_class is None:
            allowed = candidates(model, fused_segments(model, config))
            raise ModelError(f"no layer {path!r} to adapt as {settings.get('class')!r}; {allowed}")
        reason = reason_against(modules[path])
        if reason or not isinstance(modules[path], base_class):
            raise ModelError(
                f"{path!r} is of {reason or f'class {type(modules[path]).__name__}'}; it cannot be adapted as "
                f"{settings['class']!r}, which takes a plain nn.{base_class.__name__}"
            )
        own: dict[str, Any] = {name: settings.get(name) for name in ("r", "lora_alpha", "use_rslora")}
        replace(config, **own)  # validates them
        widths: Any = settings.get("segments")
        enable_lora = settings.get("enable_lora")
        lists = isinstance(widths, Sequence) and isinstance(enable_lora, Sequence)
        if settings["class"] == "MergedLinear" and not (lists and all(is_int(width, 1) for width in widths)):
            raise ModelError(f"{path!r}: segments={widths!r}, enable_lora={enable_lora!r}; allowed: two lists")
    _check_not_tied(model, layers)
    _check_not_offloaded(model, layers)
    adapted = _build(model, layers, config)
    swap_layers(model, adapted)  # only now: an error above leaves the model as it was
    keep_4bit_packing(model)
    freeze_all_but_lora(model, config.bias)
    keep_base_values(model, trained_biases_and_buffers(model))
    model.lora_config = config  # type: ignore[assignment]
    return injection_report(model)


def _build(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], config: LoraConfig) -> dict[str, AdaptedLayer]:
    """Return the adapted layers, outside the model; after an error it is unchanged."""
    restore = restorer_of_requires_grad(model)
    adapted: dict[str, AdaptedLayer] = {}
    try:
        with torch.inference_mode(False):  # else A and B could never train
            for path, settings in layers.items():
                cls, _ = _CLASSES[settings["class"]]
                more = {name: settings[name] for name in ("segments", "enable_lora") if cls is MergedLinear}
                r, alpha, rslora = settings["r"], settings["lora_alpha"], settings["use_rslora"]
                try:
                    layer = cls.adapt(model.get_submodule(path), r, alpha, config.lora_dropout, rslora, **more)
                except ModelError as error:
                    raise ModelError(f"{path!r} cannot be adapted: {error}") from error
                adapted[path] = layer
    except BaseException:  # an error of memory too
        restore()
        raise
    return adapted


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return path -> layer for every layer of ours that has an adapter; the paths have no wrapper's name in them."""
    modules = unwrap(model).named_modules()
    return {plain_name(path): m for path, m in modules if isinstance(m, AdaptedLayer) and m.r > 0}


def _check_no_adapters(model: nn.Module) -> None:
    present = [path for path, module in model.named_modules() if isinstance(module, LoRALayer)]
    if present:
        raise ModelError(
            f"the model already has {len(present)} LoRA layers (the first is {present[0]!r}); "
            f"inject once, or load the base model afresh"
        )
    for path, module in model.named_modules():
        names = {name.lower() for name in (*module._parameters, *module._modules)}
        if {"lora_a", "lora_b"} <= names or any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            raise ModelError(
                f"the model already has adapters of another library ({type(module).__name__} at {path!r}); merge them "
                f"first (PEFT: model.merge_and_unload()), or load the base model afresh"
            )


def _check_not_offloaded(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise for a weight that accelerate keeps elsewhere between forwards: an adapter made now would hold nothing."""
    for path in paths:
        names = path.split(".")
        above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
        weight: Any = above[-1].weight
        if weight.is_meta and any(hasattr(module, "_hf_hook") for module in above):
            raise ModelError(
                f"the weight of {path!r} is offloaded by accelerate (device_map, cpu_offload); load the model on one "
                f"device, for instance with device_map={{'': 0}}"
            )


def _check_not_tied(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise for one of two tied layers: its adapter could not be merged without changing the other layer."""
    owners: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in {p for p in module._parameters.values() if p is not None}:
            owners.setdefault(parameter, []).append(path)
    for path in paths:
        weight: Any = model.get_submodule(path).weight
        others = [p or "the model itself" for p in owners[weight] if p != path]
        if others:
            raise ModelError(
                f"target {path!r} shares its weight with {', '.join(others)} (tied embeddings): an adapter would "
                f"belong to both. Leave it out of target_modules, or untie the two first."
            )


def swap_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer at its path, and at every other place of the layer that it replaces.

    In eval mode torch's fused encoder reads ``linear1.weight`` itself and would bypass the adapter, so that shortcut is
    turned off in the encoders around a swapped layer.
    """
    swapped = {module_at(model, path): layer for path, layer in layers.items()}
    modules = list(model.modules())
    for module in modules:
        switches = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
        for cls, switch in switches.items():
            if isinstance(module, cls) and not swapped.keys().isdisjoint(module.modules()):
                setattr(module, switch, 0)
    for module in modules:
        for name, child in module._modules.items():
            if child is not None and unwrap(child) in swapped:  # a layer compiled on its own is compiled no more
                setattr(module, name, swapped[unwrap(child)])
    for old, layer in swapped.items():
        rebind_hooks(old, layer)


def unreached_layers(model: nn.Module) -> list[str]:
    """Return the paths of adapted layers that the last backward gave no gradient: nothing called them.

    Their parent multiplies by their weight itself, or keeps the layer that was there before somewhere else. An expert
    that no token was sent to has none either. Nothing waits for the device.
    """
    return [
        path
        for path, layer in lora_layers(model).items()
        if layer.enabled and layer.lora_B.requires_grad and layer.lora_A.grad is None and layer.lora_B.grad is None
    ]


def remove_lora(model: nn.Module) -> None:
    """Put plain layers back, with the base's own parameters; the adapters are dropped."""
    model = unwrap(model)
    restore_base_values(model)
    swap_layers(model, {path: layer.release_base() for path, layer in lora_layers(model).items()})
    if hasattr(model, "lora_config"):
        del model.lora_config


def restorer_of_requires_grad(model: nn.Module) -> Callable[[], None]:
    """Return a function that sets ``requires_grad`` of the model's present parameters to what it is now."""
    states = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for parameter, state in states.items():
            if parameter.requires_grad != state:
                parameter.requires_grad = state

    return restore


def freeze_all_but_lora(model: nn.Module, bias: str = "none") -> None:
    """Leave only the adapters trainable, and the biases that ``bias`` names, as ``mark_only_lora_as_trainable`` does.

    loralib's function goes by the substring ``lora_``; here a user's module that happens to be called ``lora_router``
    is frozen too.
    """
    trainable = set(map(id, adapter_matrices(model))) | ids_of_biases(model, bias)
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trainable


def adapter_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return ``lora_A`` and ``lora_B`` of every adapted layer."""
    return [matrix for layer in lora_layers(model).values() for matrix in (layer.lora_A, layer.lora_B)]


def ids_of_biases(model: nn.Module, bias: str) -> set[int]:
    """Return the ``id`` of each bias that ``LoraConfig.bias`` names: ``"none"``, ``"all"`` or ``"lora_only"``."""
    if bias == "all":
        return {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    layers = lora_layers(model).values() if bias == "lora_only" else ()
    return {id(getattr(layer.base_layer(), "bias", None)) for layer in layers}


def injection_report(model: nn.Module) -> InjectionReport:
    """Return the report of a model that has adapters."""
    rows, fused = [], fused_segments(model)
    for path, layer in lora_layers(model).items():
        names: tuple[str, ...] = ()
        if isinstance(layer, MergedLinear):
            known = list(fused.get(path, ()))
            known = known if len(known) == len(layer.segments) else list(map(str, range(len(layer.segments))))
            names = tuple(known[segment.position] for segment in layer.adapted_segments)
        shape = tuple(weight_shape(layer.base_layer().weight))
        rows.append(LayerReport(path, type(layer).__name__, shape, names, count_trainable(layer)))
    bypassed = weight_readers(model, [row.module for row in rows])
    return InjectionReport(tuple(rows), count_trainable(model), count_parameters(model), bypassed=bypassed)
