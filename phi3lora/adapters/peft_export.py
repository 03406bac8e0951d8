"""Export as a PEFT folder: ``adapter_model.safetensors``, ``adapter_config.json`` and commands that use them.

Three layouts of one adapter:

    "uniform"  every module padded with zeros to one rank R, so that one r and one alpha are right for all of them;
               PEFT, transformers, vLLM and llama.cpp compute the same
    "pattern"  each module at its own rank and alpha (rank_pattern, alpha_pattern): the smallest file; PEFT,
               transformers and vLLM 0.32 or later read it, llama.cpp ignores the patterns without a warning
    "split"    q_proj, k_proj, v_proj, gate_proj, up_proj instead of the fused layers, for a base whose fused layers
               were split (llama-style); padded like "uniform"

In "uniform" and "split" one scaling s = alpha / R holds for all modules. If a module's scaling differs, the ratio is
multiplied into its B: exact when it is a power of two, else rounded, which the result reports.

The header of the tensors keeps how the layers were built (key ``phi3lora``, as in ``adapter_file.py``), so that
:func:`import_peft` restores our own folders exactly.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

from torch import nn
from transformers import GenerationConfig

from ..display import one_line
from ..errors import AdapterError, as_path, printable
from ..files import tensor_file, write_folder
from ..inference.generation import stop_token_ids
from ..lora.inject import lora_layers
from ..lora.layers import Conv2d
from ..lora.targets import plainly_named_segments, sibling
from ..lora.wrappers import plain_name, unwrap
from ..model.load import longrope_boundary, longrope_note
from .adapter_file import HEADER_KEY, adapter_metadata, adapter_state_dict, check_finite, written
from .hub import add_card, is_local, model_card
from .peft_format import CONFIG_NAME, PATTERN_NOTE, PREFIX, TENSORS_NAME, Pair, to_modules
from .peft_import import is_plain_convolution
from .serving import VLLM_RANKS, Exported, adapter_commands, fits_modelfile, llama_cpp_settings, max_lora_rank

LAYOUTS = ("uniform", "pattern", "split")


@dataclass(frozen=True)
class PeftExport(Exported):
    """The result of :func:`export_peft`; ``print`` shows it with the commands that use the adapter."""

    path: Path
    layout: str
    rank: int
    """Largest rank in the folder: ``r``, and what a server must allow."""
    modules: tuple[str, ...]
    """Paths of the adapted modules, as the folder names them."""
    rounded: tuple[str, ...] = ()
    """Modules whose B was rounded (to 1 part in 2^24) because their scaling differs from the others'."""
    notes: tuple[str, ...] = ()
    """Warnings about the base, the layout and the servers."""
    commands: dict[str, str] = field(default_factory=dict)
    """Tool -> command lines that use the adapter with it."""

    def __repr__(self) -> str:
        facts = [str(self.path), f"{len(self.modules)} modules", f"layout {self.layout!r}", f"rank {self.rank}"]
        return one_line("PeftExport", facts)

    def _lines(self) -> list[str]:
        """Return what the folder holds, and the notes."""
        where = printable(str(self.path))
        lines = [f"PEFT adapter in {where}: {len(self.modules)} modules, layout {self.layout!r}, rank {self.rank}"]
        if self.rounded:
            lines.append(
                f"note: {len(self.rounded)} modules ({self.rounded[0]}, ...) have a scaling that differs, and "
                f"the ratio is not a power of two: multiplying it into their B rounded the last bit. "
                f"layout='pattern' keeps every bit"
            )
        return lines + [f"note: {note}" for note in self.notes]


class _Module(NamedTuple):
    """One module of the folder."""

    pair: Pair
    scaling: float
    layer: str
    """Path of the layer that it comes from."""


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    layout: str = "uniform",
    base_model: str | os.PathLike[str] | None = None,
) -> PeftExport:
    """Write the adapters as a PEFT folder, which PEFT, transformers, vLLM, llama.cpp and Ollama use.

    Args:
        model: a model with adapters; it is not changed. Tensors are written in float32.
        path: the folder, replaced as a whole once it is on disk: files of an earlier export go, others stay. A model
            card is written where there is none and the base is known; :func:`write_model_card` writes a fuller one,
            with data and metrics.
        tokenizer: saved beside the adapter, with a ``generation_config.json`` that has every stop token.
        layout: ``"uniform"`` (one rank for all, right everywhere), ``"pattern"`` (each module's own rank, for PEFT,
            transformers and vLLM alone) or ``"split"`` (``q_proj``, ``k_proj``, ... for a base whose fused layers were
            split).
        base_model: hub name or folder of the base, for the config and the commands; None: the place it was loaded
            from (with ``"split"``: unknown). A folder is valid only on this machine, and the result says so.

    Returns:
        What was written; ``print`` shows it with the commands for each tool.

    Raises:
        AdapterError: no adapters; trained biases, adapters that are disabled or merged, and layers that PEFT cannot
            express (by name); NaN or infinite values; another layout; a path that is a file or cannot be written (an
            earlier export there is unchanged).

    Example:
        >>> exported = p3.export_peft(model, "support-peft", tokenizer=tokenizer)
        >>> exported.rank  # q, k and v of r = 8 side by side in qkv_proj
        48
        >>> print(exported.commands["vLLM"].partition("--max")[2])
        -lora-rank 64 --generation-config support-peft
    """
    path, model = as_path(path, "a PEFT folder", AdapterError), unwrap(model)
    _check_exportable(model, path, layout)
    metadata = adapter_metadata(model)
    layers = metadata["layers"]
    segments = _named_segments(model, layers) if layout == "split" else {}
    modules = {}
    for at, layer in lora_layers(model).items():
        A, B = (tensor.detach().cpu().float() for tensor in (layer.lora_A, layer.lora_B))
        for name, pair in to_modules(at, layers[at], segments.get(at), A, B).items():
            modules[name] = _Module(pair, layer.scaling, at)
    ratios: dict[str, float] = {}
    if layout != "pattern":
        modules, ratios = _uniform(modules)
    given = None if base_model is None else os.fspath(base_model)
    base_model = given or (None if layout == "split" else getattr(model, "name_or_path", None)) or None
    config = _peft_config(model, modules, _target_modules(model, layers, segments, set(modules)), base_model)
    tensors = {}
    for at, module in modules.items():
        is_embedding = at in layers and layers[at]["class"] == "Embedding"
        start, end = ("lora_embedding_", "") if is_embedding else ("lora_", ".weight")
        for side, tensor in zip("AB", module.pair, strict=True):
            tensors[f"{PREFIX}{at}.{start}{side}{end}"] = tensor.contiguous()
    header = json.dumps({**metadata, "layout": layout, "segments": segments, "ratios": ratios})
    stops = [] if tokenizer is None else tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    has_patterns = bool(config["rank_pattern"] or config["alpha_pattern"])

    def write(folder: Path) -> None:
        (folder / TENSORS_NAME).write_bytes(tensor_file(".safetensors", tensors, {HEADER_KEY: header}))
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
            tokenizer.save_pretrained(folder)
            GenerationConfig(eos_token_id=stop_token_ids(tokenizer), **ids).save_pretrained(folder)
        if base_model:
            lora = getattr(model, "lora_config", None)
            add_card(folder, path, model_card(folder, path.resolve().name, base_model, lora=lora))

    with written(f"the export {str(path)!r}"):
        write_folder(path, write, marker=CONFIG_NAME)
    rank = max(len(module.pair.A) for module in modules.values())
    rounded = tuple(at for at, m in modules.items() if math.frexp(ratios.get(m.layer, 1.0))[0] != 0.5)  # not 2^n
    notes, commands = _notes_and_commands(model, tokenizer, path, layout, rank, base_model, stops, has_patterns)
    return PeftExport(path, layout, rank, tuple(modules), rounded, tuple(map(printable, notes)), commands)


def _check_exportable(model: nn.Module, path: Path, layout: str) -> None:
    if layout not in LAYOUTS:
        raise AdapterError(f"layout={layout!r}; allowed: {', '.join(map(repr, LAYOUTS))}")
    layers = lora_layers(model)
    if not layers:
        raise AdapterError("the model has no adapters to export; call inject_lora(model, config) or load_adapter first")
    if path.exists() and not path.is_dir():
        raise AdapterError(f"cannot export to {str(path)!r}, which is a file; allowed: a folder, new or existing")
    if (path / "config.json").exists():
        raise AdapterError(
            f"cannot export to {str(path)!r}, which holds a model (config.json): transformers would apply the adapter "
            f"whenever it loads that model; use another folder"
        )
    biases = [name for name in adapter_state_dict(model) if name.endswith("bias")]
    if biases:
        raise AdapterError(
            f"trained biases ({biases[0]}, ...) cannot be exported: vLLM and llama.cpp refuse or ignore them; "
            f"use save_merged or save_adapter, or freeze biases that were not trained"
        )
    check_finite(adapter_state_dict(model), "the adapter")
    for at, layer in layers.items():
        obstacles = [
            (not at, "PEFT adapts modules inside a model, and this layer is the model itself"),
            (not layer.enabled, "it is disabled or merged; leave the disabled(model) or merged(model) block first"),
            (getattr(layer, "fan_in_fan_out", False), "PEFT expects no transposed weight (fan_in_fan_out=True)"),
            (getattr(layer, "max_norm", None) is not None, "PEFT would apply its max_norm to the adapter too"),
            (
                isinstance(layer, Conv2d) and not is_plain_convolution(layer.conv),
                "PEFT's adapters support no groups, dilation or padding mode",
            ),
        ]
        for is_met, obstacle in obstacles:
            if is_met:
                raise AdapterError(f"{at or 'the model'!r} cannot be exported: {obstacle}")


def _named_segments(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return path -> {name: width} of the fused layers among ``layers``, to be split."""
    fused = plainly_named_segments(model)
    named = {path: fused[path] for path in layers if path in fused and not any(n.isdigit() for n in fused[path])}
    for path, settings in layers.items():
        if settings["class"] == "MergedLinear" and list(named.get(path, {}).values()) != settings["segments"]:
            raise AdapterError(
                f"layout='split': the segments of {path!r} have no names; give them in LoraConfig(segments=...), "
                f"or use layout='uniform'"
            )
    return named


def _uniform(modules: Mapping[str, _Module]) -> tuple[dict[str, _Module], dict[str, float]]:
    """Bring every module to the largest rank and the commonest scaling.

    Returns:
        The modules; layer -> ratio of its scaling to the common one, where they differ.
    """
    rank = max(len(module.pair.A) for module in modules.values())
    scaling = mode(module.scaling for module in modules.values())
    ratios = {m.layer: m.scaling / scaling for m in modules.values() if m.scaling != scaling}
    uniform = {}
    for at, (pair, _, layer) in modules.items():
        uniform[at] = _Module(Pair(pair.A, pair.B * ratios.get(layer, 1.0)).padded(rank), scaling, layer)
    return uniform, ratios


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return regular expression -> value: a path's last part where all such modules agree, else the whole path."""
    by_name: dict[str, set[float]] = {}
    for at, value in values.items():
        by_name.setdefault(at.rpartition(".")[2], set()).add(value)
    pattern = {}
    for at, value in values.items():
        name = at.rpartition(".")[2]
        if value != default:
            pattern[re.escape(name) if len(by_name[name]) == 1 else f"^{re.escape(at)}"] = value
    return pattern


def _target_modules(
    model: nn.Module, layers: Mapping[str, Any], segments: Mapping[str, Mapping[str, int]], adapted: set[str]
) -> list[str]:
    """Return the last parts of the paths if they select just the adapted modules of the base, else whole paths."""
    paths = [plain_name(path) for path, _ in model.named_modules()]
    base = {at for at in paths if at not in segments and at.rpartition(".")[0] not in layers}
    base |= {sibling(path, name) for path, names in segments.items() for name in names}
    names = {path.rpartition(".")[2] for path in adapted}
    return sorted(names if {path for path in base if path.rpartition(".")[2] in names} == adapted else adapted)


def _peft_config(
    model: nn.Module, modules: Mapping[str, _Module], target_modules: list[str], base_model: str | None
) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``: what PEFT, transformers, vLLM and llama.cpp read, and no more."""
    ranks = {at: len(module.pair.A) for at, module in modules.items()}
    alphas = {at: module.scaling * len(module.pair.A) for at, module in modules.items()}
    alphas = {at: int(alpha) if float(alpha).is_integer() else alpha for at, alpha in alphas.items()}  # vLLM: an int
    r, alpha = mode(ranks.values()), mode(alphas.values())
    lora_config = getattr(model, "lora_config", None)
    generates = hasattr(model, "prepare_inputs_for_generation")  # PEFT wraps a model by its task
    return {
        "peft_type": "LORA",
        "task_type": getattr(lora_config, "task_type", "CAUSAL_LM") if generates else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": getattr(lora_config, "lora_dropout", 0.0),
        "use_rslora": False,
        "target_modules": target_modules,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "auto_mapping": None,
        "revision": None,
    }


def _notes_and_commands(
    model: Any,
    tokenizer: Any,
    path: Path,
    layout: str,
    rank: int,
    base_model: str | None,
    stops: Sequence[str],
    has_patterns: bool,
) -> tuple[list[str], dict[str, str]]:
    """Return notes about the engines, and tool -> commands."""
    notes = [PATTERN_NOTE] if has_patterns else []
    config = getattr(model, "config", None)
    base = base_model or ("LLAMA_STYLE_BASE" if layout == "split" else "BASE_MODEL")
    is_phi3 = getattr(config, "model_type", None) == "phi3"
    boundary = longrope_boundary(config) if is_phi3 else None
    llama_cpp = llama_cpp_settings(config, tokenizer, base) if is_phi3 and not has_patterns else None
    if layout == "split":
        notes.append("for a base with q_proj, k_proj, ... in place of fused layers; not for Phi-3's own checkpoint")
    if max_lora_rank(rank) is None:
        notes.append(f"rank {rank} is more than vLLM allows ({VLLM_RANKS[-1]}); use save_merged there")
    if boundary is not None:
        notes.append(f"{longrope_note(config)}; vLLM takes the long ones when --max-model-len is past the boundary")
    if llama_cpp is not None:
        notes += llama_cpp.notes
        if llama_cpp.overrides:
            notes.append("Ollama has no --override-kv: export_gguf writes those keys into the base's file")
    if is_local(base_model):
        way_out = "for others, give its name on the hub: base_model='owner/name'"
        notes.append(f"the base is recorded as {base_model}, a folder on this machine; {way_out}")
    if odd := [stop for stop in stops if not fits_modelfile(stop)]:
        notes.append(f"a Modelfile cannot hold the stop texts {', '.join(map(repr, odd))}; give them in the request")
    if is_phi3 and not stops:
        notes.append("no tokenizer was given: the server must know where an answer ends (the template's end of turn)")
    commands = adapter_commands(path, base, rank, stops, boundary, llama_cpp)
    return notes, commands if is_phi3 else {"PEFT": commands["PEFT"]}  # the servers know no other model's fused layers
