"""Injection of adapters: match target names, swap layers for their LoRA versions, freeze everything else.

Phi-3 fuses the projections that Llama-style models keep apart, so of Llama's names only ``o_proj`` and ``down_proj``
exist in it. Here the other names select segments of the fused layer:

    q_proj, k_proj, v_proj  ->  rows of qkv_proj        heads*head_dim | kv_heads*head_dim | kv_heads*head_dim
    gate_proj, up_proj      ->  rows of gate_up_proj    intermediate | intermediate

    ["q_proj", "v_proj", "o_proj"]  ->  qkv_proj: MergedLinear(enable_lora=[True, False, True]), o_proj: Linear

``inject_lora`` turns target names into settings for each layer; ``inject_layers`` swaps the layers as the settings say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn as nn
from loralib.layers import LoRALayer
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from ..config import LoraConfig
from ..errors import ModelError, did_you_mean, is_int
from .base_weight import count_parameters, keep_4bit_packing, plain_linear_classes, weight_shape
from .layers import AdaptedLayer, Conv2d, Embedding, Linear, MergedLinear

Segments = dict[str, int]
"""Name -> width of a fused layer's segments, in the order of the output's columns; unnamed ones are "0", "1", ..."""

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


@dataclass(frozen=True)
class InjectionReport:
    """Result of :func:`inject_lora`; ``print`` shows it as a table, with equal layers of a stack in one line."""

    layers: tuple[LayerReport, ...]
    """The adapted layers, in model order."""
    trainable_parameters: int
    """Number of entries that train in the whole model."""
    total_parameters: int
    """Number of entries in the whole model, adapters included."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Linear layers that ``"all-linear"`` skipped: path -> reason."""

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __str__(self) -> str:
        counts = Counter(
            (
                re.sub(r"\b\d+\b", "*", layer.module),
                layer.class_name,
                "x".join(map(str, layer.shape)),
                ", ".join(layer.segments),
                f"{layer.trainable_parameters:,}",
            )
            for layer in self.layers
        )
        rows = [("module", "class", "weight", "segments", "trainable each", "layers")]
        rows += [(*row, str(count)) for row, count in counts.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.3f} %)")
        lines += [f"skipped {path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def inject_lora(model: nn.Module, config: LoraConfig | None = None) -> InjectionReport:
    """Swap the targeted layers of ``model`` for LoRA layers, in place, and leave only the adapters trainable.

    The pretrained parameters are kept as they are (not copied), so a meta-device model works too. ``nn.Linear`` becomes
    ``Linear`` or, where it is fused, ``MergedLinear``; ``nn.Embedding`` and ``nn.Conv2d`` become ``Embedding`` and
    ``Conv2d``.

    Args:
        model: any ``nn.Module``. Phi-3's fused layers are known; describe your own with ``LoraConfig(segments=...)``.
        config: what to adapt; default ``LoraConfig()``.

    Returns:
        A report: module, class, shape, segments adapted, trainable parameters, totals.

    Raises:
        ModelError: a target that matches nothing (the candidates are listed) or matches a layer that cannot be adapted;
            segments that do not add up; a model that already has adapters; tied embeddings as a target.

    Example:
        >>> import torch.nn as nn, phi3lora as p3
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = p3.inject_lora(net, p3.LoraConfig(r=2, target_modules=["0"]))
        >>> report.layers[0].class_name, report.trainable_parameters
        ('Linear', 48)
    """
    config = config or LoraConfig()
    _check_no_adapters(model)
    fused = fused_segments(model, config)
    if config.target_modules == "all-linear":
        selected, skipped = _select_all_linear(model, fused)
    else:
        selected, skipped = _select_targets(model, config.target_modules, fused), {}
    layers: dict[str, dict[str, Any]] = {}
    for path, names in selected.items():
        base = model.get_submodule(path)
        class_name = type(base).__name__ if isinstance(base, (nn.Embedding, nn.Conv2d)) else "Linear"
        shared = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
        layers[path] = {"class": class_name, **shared}
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
    _check_no_adapters(model)
    modules = dict(model.named_modules())
    for path, settings in layers.items():
        _, base_class = _CLASSES.get(str(settings.get("class")), (None, None))
        if not path or path not in modules or base_class is None:
            candidates = _candidates(model, fused_segments(model, config))
            raise ModelError(f"no layer {path!r} to adapt as {settings.get('class')!r}; {candidates}")
        if not (_is_adaptable(modules[path]) and isinstance(modules[path], base_class)):
            raise ModelError(
                f"{path!r} is of class {_class_of(modules[path])}; it cannot be adapted as {settings['class']!r}, "
                f"which takes a plain nn.{base_class.__name__}"
            )
        own: dict[str, Any] = {name: settings.get(name) for name in ("r", "lora_alpha", "use_rslora")}
        replace(config, **own)  # validates them
        widths: Any = settings.get("segments")
        enable_lora = settings.get("enable_lora")
        lists = isinstance(widths, Sequence) and isinstance(enable_lora, Sequence)
        if settings["class"] == "MergedLinear" and not (lists and all(is_int(width, 1) for width in widths)):
            raise ModelError(f"{path!r}: segments={widths!r}, enable_lora={enable_lora!r}; allowed: two lists")
    _check_not_tied(model, layers)
    keep_4bit_packing(model)
    adapted: dict[str, AdaptedLayer] = {}
    for path, settings in layers.items():
        cls, _ = _CLASSES[settings["class"]]
        more = {name: settings[name] for name in ("segments", "enable_lora") if cls is MergedLinear}
        r, alpha, rslora = settings["r"], settings["lora_alpha"], settings["use_rslora"]
        adapted[path] = cls.adapt(model.get_submodule(path), r, alpha, config.lora_dropout, rslora, **more)
    for path, layer in adapted.items():  # swapped only now: an error above leaves the model as it was
        swap_layer(model, path, layer)
    freeze_all_but_lora(model, config.bias)
    model.lora_config = config  # type: ignore[assignment]
    return injection_report(model)


def unwrap(model: nn.Module) -> Any:
    """Return the model inside the wrappers of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    A wrapper puts its own name (``_orig_mod.``, ``module.``) in front of every path.
    """
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return path -> layer for every layer of ours that has an adapter."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer) and m.r > 0}


def fused_segments(model: nn.Module, config: LoraConfig | None = None) -> dict[str, Segments]:
    """Return path -> segments for each fused layer: Phi-3's own, and those that ``config.segments`` describes.

    Without ``config``, the one that the model's adapters were injected with is used, if any.
    """
    fused: dict[str, Segments] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Phi3Attention):
            sizes: Any = module.config
            q = sizes.num_attention_heads * module.head_dim
            kv = sizes.num_key_value_heads * module.head_dim
            fused[prefix + "qkv_proj"] = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        elif isinstance(module, Phi3MLP):
            width = module.config.intermediate_size
            fused[prefix + "gate_up_proj"] = {"gate_proj": width, "up_proj": width}
    described: Any = getattr(config or getattr(model, "lora_config", None), "segments", None) or {}
    for suffix, widths in described.items():
        named = dict(widths) if isinstance(widths, Mapping) else {str(i): width for i, width in enumerate(widths)}
        paths = [path for path, module in model.named_modules() if _matches(path, suffix)]
        if not paths:
            raise ModelError(f"segments: {suffix!r} matches no module; {_candidates(model, fused)}")
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


def _select_targets(model: nn.Module, targets: str | Sequence[str], fused: dict[str, Segments]) -> dict[str, set[str]]:
    """Return path -> names of the segments to adapt (none where not fused) of the targeted layers, in model order."""
    # A target can name a module, for all its segments, or one named segment, as if that were a module of its own.
    nameable = [(path, path, set(fused.get(path, ()))) for path, _ in model.named_modules() if path]
    for path, segments in fused.items():
        parent = path[: path.rfind(".") + 1]
        nameable += [(parent + name, path, {name}) for name in segments if not name.isdigit()]
    selected: dict[str, set[str]] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        matches = [(path, names) for full_name, path, names in nameable if _matches(full_name, target)]
        if not matches:
            guess = did_you_mean(target, {full_name.rpartition(".")[2] for full_name, _, _ in nameable})
            raise ModelError(f"target_modules: {target!r} matches nothing.{guess} {_candidates(model, fused)}")
        for path, names in matches:
            module = model.get_submodule(path)
            if not _is_adaptable(module):
                raise ModelError(
                    f"target {target!r} matches {path!r} of class {_class_of(module)}; "
                    f"allowed: nn.Linear, Linear4bit, nn.Embedding, nn.Conv2d. {_candidates(model, fused)}"
                )
            selected.setdefault(path, set()).update(names)
    return {path: selected[path] for path, _ in model.named_modules() if path in selected}


def _select_all_linear(model: nn.Module, fused: dict[str, Segments]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return path -> segment names for every ``nn.Linear`` but the output head; path -> reason for those skipped."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    selected: dict[str, set[str]] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or not isinstance(module, nn.Linear) or module is head or _matches(path, "lm_head"):
            continue
        if _is_adaptable(module):
            selected[path] = set(fused.get(path, ()))
        else:
            skipped[path] = f"class {_class_of(module)}"
    if not selected:
        example = "".join(f"; {path!r} is of {reason}" for path, reason in list(skipped.items())[:1])
        raise ModelError(
            f"target_modules='all-linear' matches nothing: {type(model).__name__} has no nn.Linear inside{example}"
        )
    return selected, skipped


def _matches(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _is_adaptable(module: nn.Module) -> bool:
    return type(module) in (*plain_linear_classes(), nn.Embedding, nn.Conv2d)  # a subclass may compute differently


def _class_of(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name}: load the model in 4 bits (base_precision='nf4') or 16" if name == "Linear8bitLt" else name


def _candidates(model: nn.Module, fused: dict[str, Segments]) -> str:
    """Return ``Candidates: ...``: the last part of the path of every adaptable layer, and the segments' names."""
    names = [path.rpartition(".")[2] for path, module in model.named_modules() if path and _is_adaptable(module)]
    names += [name for segments in fused.values() for name in segments if not name.isdigit()]
    return f"Candidates: {', '.join(dict.fromkeys(names)) or 'none: no nn.Linear, nn.Embedding or nn.Conv2d inside'}"


def _check_no_adapters(model: nn.Module) -> None:
    present = [path for path, module in model.named_modules() if isinstance(module, LoRALayer)]
    if present:
        raise ModelError(
            f"the model already has {len(present)} LoRA layers (the first is {present[0]!r}); "
            f"inject once, or load the base model afresh"
        )


def _check_not_tied(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise for one of two tied layers: its adapter could not be merged without changing the other layer."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            owners.setdefault(id(module.weight), []).append(path)
    for path in paths:
        others = [p for p in owners[id(model.get_submodule(path).weight)] if p != path]
        if others:
            raise ModelError(
                f"target {path!r} shares its weight with {', '.join(others)} (tied embeddings): an adapter would "
                f"belong to both. Leave it out of target_modules, or untie the two first."
            )


def swap_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` at ``path``.

    In eval mode torch's fused encoder reads ``linear1.weight`` itself and would bypass the adapter, so that shortcut is
    turned off in the layer's ancestors.
    """
    names = path.split(".")
    for depth in range(len(names)):
        ancestor = model.get_submodule(".".join(names[:depth]))
        if isinstance(ancestor, nn.TransformerEncoderLayer):
            ancestor.activation_relu_or_gelu = 0
        elif isinstance(ancestor, nn.TransformerEncoder):
            ancestor.use_nested_tensor = False
    setattr(model.get_submodule(".".join(names[:-1])), names[-1], layer)


def remove_lora(model: nn.Module) -> None:
    """Put plain layers back, with the base's own parameters; the adapters are dropped."""
    for path, layer in lora_layers(model).items():
        swap_layer(model, path, layer.base_layer())
    if hasattr(model, "lora_config"):
        del model.lora_config


def freeze_all_but_lora(model: nn.Module, bias: str = "none") -> None:
    """Leave only the adapters trainable, and the biases that ``bias`` names, as ``mark_only_lora_as_trainable`` does.

    loralib's function goes by the substring ``lora_``; here a user's module that happens to be called ``lora_router``
    is frozen too.
    """
    layers = lora_layers(model).values()
    trainable = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    if bias == "all":
        trainable |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    elif bias == "lora_only":
        trainable |= {id(getattr(layer.base_layer(), "bias", None)) for layer in layers}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trainable


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
        trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        rows.append(LayerReport(path, type(layer).__name__, shape, names, trainable))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return InjectionReport(tuple(rows), trainable, count_parameters(model))
