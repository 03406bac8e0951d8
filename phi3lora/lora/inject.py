"""Walk a module tree, match target names, swap layers for their LoRA versions, freeze everything else.

Phi-3 fuses what llama-style trees keep apart, so of llama names only ``o_proj`` and ``down_proj`` exist there.
Here the others select segments of the fused layer:

    q_proj, k_proj, v_proj  ->  rows of qkv_proj        heads*head_dim | kv_heads*head_dim | kv_heads*head_dim
    gate_proj, up_proj      ->  rows of gate_up_proj    intermediate | intermediate

    ["q_proj", "v_proj", "o_proj"]  ->  qkv_proj: MergedLinear(enable_lora=[True, False, True]), o_proj: Linear
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import loralib as lora
import torch.nn as nn
from loralib.layers import LoRALayer
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from ..config import LoraConfig
from ..errors import ModelError, did_you_mean
from .base_weight import count_parameters, keep_4bit_packing, plain_linear_classes, weight_shape
from .layers import AdaptedLayer, Conv2d, Embedding, Linear, MergedLinear

Segments = dict[str, int]  # name of a segment -> its width, in the order of the output's columns


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer."""

    module: str
    """Its path in the model."""
    class_name: str
    shape: tuple[int, ...]
    """Of the frozen weight."""
    segments: tuple[str, ...]
    """The adapted segments of a fused layer; empty for others."""
    trainable_parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What :func:`inject_lora` did; ``print`` shows it as a table, equal layers of a stack in one line."""

    layers: tuple[LayerReport, ...]
    trainable_parameters: int
    total_parameters: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Linear-like modules that ``"all-linear"`` passed over: path -> why."""

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __str__(self) -> str:
        def row_of(layer: LayerReport) -> tuple[str, str, str, str, str]:
            path = ".".join("*" if part.isdigit() else part for part in layer.module.split("."))
            shape, segments = "x".join(map(str, layer.shape)), ", ".join(layer.segments)
            return path, layer.class_name, shape, segments, f"{layer.trainable_parameters:,}"

        counts = Counter(row_of(layer) for layer in self.layers)
        rows = [("module", "class", "weight", "segments", "trainable each", "layers")]
        rows += [(*row, str(count)) for row, count in counts.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.3f} %)")
        lines += [f"passed over {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def inject_lora(model: nn.Module, config: LoraConfig | None = None) -> InjectionReport:
    """Swap the targeted layers of ``model`` for LoRA layers, in place, and leave only those trainable.

    The pretrained parameters are kept as they are (not copied), so a meta-device model works too. ``nn.Linear`` becomes
    ``Linear`` or, where it is fused, ``MergedLinear``; ``nn.Embedding`` and ``nn.Conv2d`` become theirs.

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
    _refuse_second_injection(model)
    fused = fused_segments(model, config)
    chosen, skipped = _select(model, config, fused)
    _refuse_tied(model, chosen)
    keep_4bit_packing(model)
    for path, names in chosen.items():
        base = model.get_submodule(path)
        swap_layer(model, path, _adapted(base, config, fused.get(path), names))
    freeze_all_but_lora(model, config.bias)
    model.lora_config = config  # type: ignore[assignment]
    return injection_report(model, fused, skipped)


def inject_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], config: LoraConfig) -> InjectionReport:
    """:func:`inject_lora` with each layer's own settings, as a file describes them, instead of target names.

    Args:
        model: a model without adapters.
        layers: path -> ``class``, ``r``, ``lora_alpha``, ``use_rslora`` and, of a ``MergedLinear``, ``segments``
            (widths) and ``enable_lora``: what ``adapters.adapter_file.adapter_metadata`` gives.
        config: dropout and which biases train; it stays as ``model.lora_config``.

    Returns:
        A report, as :func:`inject_lora`.

    Raises:
        ModelError: a path that is not in the model or leads to a layer of another kind, tied embeddings, segments that
            do not add up, a model that already has adapters. No layer has been swapped then.
        ConfigError: a rank, alpha or rsLoRA switch that cannot be.
    """
    _refuse_second_injection(model)
    modules = dict(model.named_modules())
    for path, facts in layers.items():
        kind = _BASE_OF.get(str(facts.get("class")))
        if not path or path not in modules or kind is None:
            candidates = _candidates(model, fused_segments(model, config))
            raise ModelError(f"no layer {path!r} to adapt as {facts.get('class')!r}; {candidates}")
        if not (_is_adaptable(modules[path]) and isinstance(modules[path], kind)):
            raise ModelError(
                f"{path!r} is {_why_not(modules[path])}; it cannot be adapted as {facts['class']!r}, "
                f"which takes a plain nn.{kind.__name__}"
            )
    _refuse_tied(model, layers)
    swapped = {path: _adapted_as(modules[path], path, facts, config) for path, facts in layers.items()}
    keep_4bit_packing(model)
    for path, layer in swapped.items():
        swap_layer(model, path, layer)
    freeze_all_but_lora(model, config.bias)
    model.lora_config = config  # type: ignore[assignment]
    return injection_report(model, fused_segments(model, config))


_BASE_OF: dict[str, type[nn.Module]] = {
    "Linear": nn.Linear,
    "MergedLinear": nn.Linear,
    "Embedding": nn.Embedding,
    "Conv2d": nn.Conv2d,
}


def _adapted_as(base: nn.Module, path: str, facts: Mapping[str, Any], config: LoraConfig) -> nn.Module:
    """The LoRA version of ``base`` that ``facts`` describe."""
    settings: dict[str, Any] = {name: facts.get(name) for name in ("r", "lora_alpha", "use_rslora")}
    own = replace(config, **settings)
    if facts["class"] != "MergedLinear":
        return _adapted(base, own, None, set())
    widths, enabled = facts.get("segments"), facts.get("enable_lora")
    counts = isinstance(widths, (list, tuple)) and all(type(width) is int for width in widths)
    if not (counts and isinstance(enabled, (list, tuple)) and len(enabled) == len(widths) and any(enabled)):  # type: ignore[arg-type]
        raise ModelError(
            f"{path!r}: segments={widths!r}, enable_lora={enabled!r}; allowed: a width and a bool for each"
        )
    segments = {str(i): width for i, width in enumerate(widths)}  # type: ignore[arg-type]
    return _adapted(base, own, segments, {str(i) for i, on in enumerate(enabled) if on})


def _refuse_second_injection(model: nn.Module) -> None:
    present = [path for path, module in model.named_modules() if isinstance(module, LoRALayer)]
    if present:
        raise ModelError(
            f"the model already has {len(present)} LoRA layers (the first is {present[0]!r}); "
            f"inject once, or load the base model afresh"
        )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> layer, for every layer of ours that has adapters."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer) and m.r > 0}


def fused_segments(model: nn.Module, config: LoraConfig) -> dict[str, Segments]:
    """Path of each fused layer -> its segments: Phi-3's own and those that ``config.segments`` describes."""
    fused: dict[str, Segments] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Phi3Attention):
            q = module.config.num_attention_heads * module.head_dim
            kv = module.config.num_key_value_heads * module.head_dim
            fused[prefix + "qkv_proj"] = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        elif isinstance(module, Phi3MLP):
            width = module.config.intermediate_size
            fused[prefix + "gate_up_proj"] = {"gate_proj": width, "up_proj": width}
    for suffix, widths in (config.segments or {}).items():
        named = dict(widths) if hasattr(widths, "keys") else {str(i): width for i, width in enumerate(widths)}
        paths = [path for path, module in model.named_modules() if _matches(path, suffix)]
        if not paths:
            raise ModelError(f"segments: {suffix!r} matches no module; {_candidates(model, fused)}")
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, nn.Linear):
                raise ModelError(f"segments: {path!r} is a {type(module).__name__}; allowed: nn.Linear")
            if sum(named.values()) != module.out_features or min(named.values()) < 1:
                raise ModelError(
                    f"segments of {path!r}: {named} add up to {sum(named.values())}; "
                    f"allowed: positive widths that add up to out_features={module.out_features}"
                )
            fused[path] = named
    return fused


def _matches(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _select(
    model: nn.Module, config: LoraConfig, fused: dict[str, Segments]
) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Path of each layer to adapt -> names of its segments to adapt (empty: not fused); and what was passed over."""
    if config.target_modules == "all-linear":
        return _select_all_linear(model, fused)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    modules = {path: module for path, module in model.named_modules() if path}
    chosen: dict[str, set[str]] = {}
    for target in targets:
        found = False
        for path, module in modules.items():
            names = set(fused.get(path, ()))
            if not _matches(path, target):
                parent = path.rpartition(".")[0]
                names = {n for n in names if not n.isdigit() and _matches(f"{parent}.{n}" if parent else n, target)}
                if not names:
                    continue
            if not _is_adaptable(module):
                raise ModelError(
                    f"target {target!r} matches {path!r}, {_why_not(module)}; "
                    f"allowed: nn.Linear, Linear4bit, nn.Embedding, nn.Conv2d. {_candidates(model, fused)}"
                )
            found = True
            chosen.setdefault(path, set()).update(names)
        if not found:
            known = {path.rpartition(".")[2] for path in modules} | {n for s in fused.values() for n in s}
            raise ModelError(
                f"target_modules: {target!r} matches nothing.{did_you_mean(target, known)} {_candidates(model, fused)}"
            )
    return {path: chosen[path] for path in modules if path in chosen}, {}


def _select_all_linear(model: nn.Module, fused: dict[str, Segments]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Every ``nn.Linear`` but the output head."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    chosen: dict[str, set[str]] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or not isinstance(module, nn.Linear) or module is head or _matches(path, "lm_head"):
            continue
        if type(module) in plain_linear_classes():
            chosen[path] = set(fused.get(path, ()))
        else:
            skipped[path] = _why_not(module)
    if not chosen:
        passed_over = "".join(f"; {path!r} is {why}" for path, why in list(skipped.items())[:1])
        raise ModelError(
            f"target_modules='all-linear' matches nothing: {type(model).__name__} has no nn.Linear inside{passed_over}"
        )
    return chosen, skipped


def _is_adaptable(module: nn.Module) -> bool:
    """Exactly these classes: a subclass may multiply in its own way."""
    return type(module) in (*plain_linear_classes(), nn.Embedding, nn.Conv2d)


def _why_not(module: nn.Module) -> str:
    """What a linear layer that cannot be adapted is."""
    name = type(module).__name__
    if name == "Linear8bitLt":
        return "a Linear8bitLt: load the model in 4 bits (base_precision='nf4') or 16 instead of 8"
    return f"a {name}, not a plain nn.Linear"


def _candidates(model: nn.Module, fused: dict[str, Segments]) -> str:
    """``Candidates: ...``: the last part of the path of every layer that can be adapted, and the segments' names."""
    names = [path.rpartition(".")[2] for path, module in model.named_modules() if path and _is_adaptable(module)]
    names += [name for segments in fused.values() for name in segments if not name.isdigit()]
    return f"Candidates: {', '.join(dict.fromkeys(names)) or 'none: no nn.Linear, nn.Embedding or nn.Conv2d inside'}"


def _refuse_tied(model: nn.Module, chosen: Iterable[str]) -> None:
    """An adapter on one of two tied layers could not be merged without changing the other."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            owners.setdefault(id(module.weight), []).append(path)
    for path in chosen:
        paths = owners[id(model.get_submodule(path).weight)]
        if len(paths) > 1:
            raise ModelError(
                f"target {path!r} shares its weight with {', '.join(p for p in paths if p != path)} (tied embeddings): "
                f"an adapter would belong to both. Leave it out of target_modules, or untie the two first."
            )


def _adapted(base: nn.Module, config: LoraConfig, segments: Segments | None, names: set[str]) -> nn.Module:
    """The LoRA version of ``base``."""
    r, alpha, dropout, rslora = config.r, config.lora_alpha, config.lora_dropout, config.use_rslora
    if isinstance(base, nn.Embedding):
        return Embedding.adapt(base, r, alpha, use_rslora=rslora)
    if isinstance(base, nn.Conv2d):
        return Conv2d.adapt(base, r, alpha, dropout, rslora)
    assert isinstance(base, nn.Linear)
    if not segments:
        return Linear.adapt(base, r, alpha, dropout, rslora)
    enable = [name in names for name in segments]
    return MergedLinear.adapt(base, r, alpha, dropout, rslora, segments=tuple(segments.values()), enable_lora=enable)


def swap_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` where ``path`` leads."""
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, layer)
    _avoid_fused_encoder(model, path)


def remove_lora(model: nn.Module) -> None:
    """Put plain layers back, with the base's own parameters; the adapters are dropped."""
    for path, layer in lora_layers(model).items():
        swap_layer(model, path, layer.base_layer())
    if hasattr(model, "lora_config"):
        del model.lora_config


def _avoid_fused_encoder(model: nn.Module, path: str) -> None:
    """In eval torch's fused encoder reads ``linear1.weight`` itself, past the adapter; turn that shortcut off."""
    parts = path.split(".")
    for depth in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if isinstance(ancestor, nn.TransformerEncoderLayer):
            ancestor.activation_relu_or_gelu = 0
        elif isinstance(ancestor, nn.TransformerEncoder):
            ancestor.use_nested_tensor = False


def freeze_all_but_lora(model: nn.Module, bias: str = "none") -> None:
    """Only adapters (and the biases asked for) stay trainable.

    loralib's ``mark_only_lora_as_trainable`` goes by the substring ``lora_``; a module of the user's that happens to be
    called ``lora_router`` is frozen here too.
    """
    lora.mark_only_lora_as_trainable(model, bias)
    layers = lora_layers(model).values()
    keep = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    if bias == "all":
        keep |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    elif bias == "lora_only":
        keep |= {id(getattr(layer.base_layer(), "bias", None)) for layer in layers}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in keep


def injection_report(
    model: nn.Module, fused: dict[str, Segments] | None = None, skipped: dict[str, str] | None = None
) -> InjectionReport:
    """The report of a model that has adapters."""
    rows = []
    for path, layer in lora_layers(model).items():
        names: tuple[str, ...] = ()
        if isinstance(layer, MergedLinear):
            known = tuple((fused or {}).get(path, ())) or tuple(map(str, range(len(layer.segments))))
            names = tuple(name for name, on in zip(known, layer.enable_lora, strict=True) if on)
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        shape = tuple(weight_shape(layer.base_layer().weight))
        rows.append(LayerReport(path, type(layer).__name__, shape, names, trained))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return InjectionReport(tuple(rows), trainable, count_parameters(model), skipped or {})
