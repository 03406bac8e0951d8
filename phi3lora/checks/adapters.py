"""Which layers are adapted, what trains, and how it is computed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data.streaming import ChatStream
from ..lora.base_weight import base_format, count_parameters, weight_shape
from ..lora.inject import fused_segments, lora_layers
from ..lora.layers import MergedLinear
from ..model.load import model_device
from ..training.setup import check_run
from ..training.step import has_instructions
from .findings import Verdict, error, listed, ok, warning
from .planned_run import PlannedRun


def run(planned: PlannedRun) -> Verdict:
    """What ``train`` would refuse."""
    check_run(planned.model, planned.train_dataset, planned.eval_dataset, planned.config)
    seen = "; of the stream its first window was looked at" if isinstance(planned.train_dataset, ChatStream) else ""
    return ok(f"train() takes this model, data and configuration{seen}")


def targets(planned: PlannedRun) -> Verdict:
    """Which linear layers of the decoder are adapted, and which are not."""
    model: Any = planned.model
    adapted = lora_layers(model)
    if not adapted:
        return error("no layer is adapted; call inject_lora(model, LoraConfig(...)) first")
    linear = {id(m): path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    decoder = [linear[id(m)] for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    on, off = _names(planned, adapted), [path for path in decoder if path not in adapted]
    weights = {path: weight_shape(model.get_submodule(path).weight).numel() for path in decoder}
    share = sum(weights[path] for path in decoder if path in adapted) / max(sum(weights.values()), 1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{', '.join(on)} in {len(adapted)} layers, {100 * share:.0f} % of the decoder's linear weights"
    text += f"; {trainable:,} parameters train, {100 * trainable / count_parameters(model):.3f} %"
    missing = list(dict.fromkeys(path.rpartition(".")[2] for path in off))
    if missing:
        text += f"; not adapted: {', '.join(missing)}"
    if {path.rpartition(".")[2] for path in adapted} <= {"o_proj", "down_proj"}:
        return warning(
            f"{text}. Llama's names matched literally leave Phi-3 with these; "
            f"inject_lora(target_modules='all-linear') adapts all"
        )
    if set(missing) & {path.rpartition(".")[2] for path in adapted}:
        return warning(f"{text}: some layers of the stack have adapters where others have none ({listed(off, 2)})")
    return ok(text)


def _names(planned: PlannedRun, adapted: dict[str, Any]) -> list[str]:
    """``qkv_proj (q_proj, v_proj)``: the last part of each adapted path, with the segments where not all are."""
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


def frozen(planned: PlannedRun) -> Verdict:
    """Nothing but adapters, and the biases that were asked for, has a gradient; and every adapter has."""
    model, layers = planned.model, lora_layers(planned.model)
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    biases = getattr(getattr(model, "lora_config", None), "bias", "all")
    declared: set[int] = set()
    if biases == "lora_only":
        declared = {id(layer.frozen_bias()) for layer in layers.values()}
    elif biases == "all":
        declared = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters | declared]
    still = [n for n, p in model.named_parameters() if not p.requires_grad and id(p) in adapters]
    if strangers:
        return error(
            f"{len(strangers)} base parameters require a gradient ({listed(strangers, 2)}) with bias={biases!r}; "
            f"set requires_grad=False on them"
        )
    if still:
        return error(f"{len(still)} adapter parameters do not require a gradient ({listed(still, 2)})")
    if any(not layer.enabled for layer in layers.values()):
        off = [path for path, layer in layers.items() if not layer.enabled]
        return warning(f"{len(off)} of {len(layers)} adapters are switched off ({listed(off, 2)}): they will not learn")
    return ok("nothing but adapters requires a gradient" + (f", and biases ({biases!r})" if declared else ""))


def layers(planned: PlannedRun) -> Verdict:
    """How attention and layers are computed, and why not faster."""
    path, why = planned.path
    device, config = model_device(planned.model), planned.config
    model_config: Any = planned.model.config
    text = f"{device}, attention {model_config._attn_implementation}, layers {path}" + (f" ({why})" if why else "")
    if device.type == "cuda" and path != "fused" and config.compile is None:
        return warning(f"{text}: the fused passes would be faster")
    return ok(text)


def precision(planned: PlannedRun) -> Verdict:
    """What the forward computes in, whether the base weights were made for it, and whether a CPU has it."""
    weight = planned.model.get_input_embeddings().weight  # type: ignore[operator]
    name, dtype = planned.precision.name, str(weight.dtype).removeprefix("torch.")
    base = base_format(planned.model)
    text = f"{name} forward, base weights {dtype}" + (f" and {base}" if base else "") + ", adapters and moments float32"
    if (name, dtype) == ("fp16", "bfloat16"):
        return warning(f"{text}: weights made in bfloat16 overflow in float16; set bf16=True, fp16=False")
    if (name, dtype) == ("bf16", "float16"):
        return warning(f"{text}: float16 weights lose 3 of their bits in bfloat16; load with dtype='bfloat16'")
    here = model_device(planned.model).type == "cpu" and planned.device_memory_gib is None
    if here and name != "fp32" and not has_instructions(name):
        return warning(
            f"{text}: this CPU has no instructions for {name}, which is then 8 times slower than float32 or more; "
            f"load with dtype='float32', without {name}=True"
        )
    return ok(text)
