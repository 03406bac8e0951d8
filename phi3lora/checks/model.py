"""Checks of the model: which layers are adapted, what trains, and how it is computed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import first_of
from ..lora.base_weight import base_format, count_parameters, count_trainable, weight_shape
from ..lora.inject import adapter_matrices, ids_of_biases, lora_layers
from ..lora.layers import MergedLinear
from ..lora.targets import fused_segments, weight_readers
from ..model.attention import attention_in_words
from ..model.load import model_device
from ..training.setup import PlannedRun, check_run
from ..training.step import has_instructions
from .report import Finding, error, ok, warning


def check_run_is_accepted(planned: PlannedRun) -> Finding:
    check_run(planned)
    limits = "" if planned.train_dataset.known_length else "; only the stream's first window was checked"
    return ok(f"train() accepts this model, data and configuration{limits}")


def check_targets(planned: PlannedRun) -> Finding:
    """Check that the decoder's linear layers are adapted, the same ones in every layer of the stack."""
    model, adapted = planned.model, lora_layers(planned.model)
    if not adapted:
        return error("no layer is adapted; call inject_lora(model, LoraConfig(...)) first")
    linear = {id(m): path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    decoder = [linear[id(m)] for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    not_adapted = [path for path in decoder if path not in adapted]
    weights = {path: weight_shape(model.get_submodule(path).weight).numel() for path in decoder}
    share = sum(weights[path] for path in decoder if path in adapted) / max(sum(weights.values()), 1)
    trainable = count_trainable(model)
    text = (
        f"{', '.join(_target_names(planned, adapted))} in {len(adapted)} layers, {100 * share:.0f} % of the decoder's "
        f"linear weights; {trainable:,} parameters train, {100 * trainable / count_parameters(model):.3f} %"
    )
    names = {path.rpartition(".")[2] for path in adapted}
    missing = list(dict.fromkeys(path.rpartition(".")[2] for path in not_adapted))
    if missing:
        text += f"; not adapted: {', '.join(missing)}"
    if names <= {"o_proj", "down_proj"}:
        return warning(
            f"{text}. In Phi-3, Llama's target names match only these two; "
            f"inject_lora(target_modules='all-linear') adapts all"
        )
    lora: Any = getattr(model, "lora_config", None)
    asked_for = lora is not None and (lora.layers_to_transform is not None or lora.exclude_modules is not None)
    if names & set(missing) and not asked_for:
        return warning(f"{text}: adapted in some layers of the stack, not in others ({first_of(not_adapted, 2)})")
    return ok(text)


def _target_names(planned: PlannedRun, adapted: dict[str, Any]) -> list[str]:
    """Return the last part of each adapted path, with its segments if only some are: ``qkv_proj (q_proj, v_proj)``."""
    config = getattr(planned.model, "lora_config", None)
    fused = fused_segments(planned.model, config) if config is not None else {}
    names: dict[str, None] = {}
    for path, layer in adapted.items():
        name = path.rpartition(".")[2]
        if isinstance(layer, MergedLinear) and not all(layer.enable_lora):
            segments = list(fused.get(path, ())) or list(map(str, range(len(layer.segments))))
            name += f" ({', '.join(s for s, on in zip(segments, layer.enable_lora, strict=True) if on)})"
        names[name] = None
    return list(names)


def check_trainable_parameters(planned: PlannedRun) -> Finding:
    model, layers = planned.model, lora_layers(planned.model)
    adapters = set(map(id, adapter_matrices(model)))
    bias = getattr(getattr(model, "lora_config", None), "bias", "all")
    biases = ids_of_biases(model, bias)
    unexpected = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters | biases]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and id(p) in adapters]
    off = [path for path, layer in layers.items() if not layer.enabled]
    if unexpected:
        return error(
            f"{len(unexpected)} base parameters require a gradient ({first_of(unexpected, 2)}) with bias={bias!r}; "
            f"set requires_grad=False on them"
        )
    if frozen:
        return error(f"{len(frozen)} adapter parameters do not require a gradient ({first_of(frozen, 2)})")
    if off:
        return warning(f"{len(off)} of {len(layers)} adapters are switched off ({first_of(off, 2)}) and will not learn")
    return ok("nothing but adapters requires a gradient" + (f", and biases ({bias!r})" if biases else ""))


def check_weight_readers(planned: PlannedRun) -> Finding:
    """Check that no parent multiplies by the weight of an adapted layer, past its adapter."""
    found = weight_readers(planned.model, lora_layers(planned.model))
    if found:
        return warning(
            f"{', '.join(sorted(set(found.values())))} reads the weight of {len(found)} adapted layers itself "
            f"({first_of(list(found), 2)}): what it computes with it has no adapter and gives it no gradient; call the "
            f"layer there, or leave it out of target_modules"
        )
    return ok("every parent calls its adapted layers")


def check_layers(planned: PlannedRun) -> Finding:
    backend = planned.backend
    device, config = model_device(planned.model), planned.config
    attention = attention_in_words(planned.model, backend.kind == "fused")
    text = f"{device}, attention {attention}, layers {backend}"
    if device.type == "cuda" and backend.kind != "fused" and config.compile is None:
        return warning(f"{text}: the fused kernels would be faster")
    return ok(text)


def check_precision(planned: PlannedRun) -> Finding:
    weight = planned.model.get_input_embeddings().weight
    name, dtype = planned.precision.name, str(weight.dtype).removeprefix("torch.")
    base = base_format(planned.model)
    text = f"{name} forward, base weights {dtype}" + (f" and {base}" if base else "") + ", adapters and moments float32"
    if (name, dtype) == ("fp16", "bfloat16"):
        return warning(f"{text}: weights made in bfloat16 overflow in float16; set bf16=True, fp16=False")
    if (name, dtype) == ("bf16", "float16"):
        return warning(f"{text}: float16 weights lose 3 of their bits in bfloat16; load with dtype='bfloat16'")
    on_cpu = model_device(planned.model).type == "cpu" and planned.device_memory_gib is None
    if on_cpu and name != "fp32" and not has_instructions(name):
        return warning(
            f"{text}: this CPU has no instructions for {name}, which makes it at least 8 times slower than float32; "
            f"load with dtype='float32', without {name}=True"
        )
    return ok(text)
