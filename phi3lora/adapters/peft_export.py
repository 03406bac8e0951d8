"""An adapter as a folder of PEFT's, ``adapter_model.safetensors`` and ``adapter_config.json``, and back.

Three layouts of one adapter:

    "uniform"  every module padded with zeros to one rank R, so that one r and one alpha are right for all of them: what
               PEFT, transformers, vLLM and llama.cpp compute alike
    "pattern"  each module at its own rank and alpha (rank_pattern, alpha_pattern): the smallest; only PEFT and
               transformers read it, llama.cpp ignores the patterns without a word
    "split"    q_proj, k_proj, v_proj, gate_proj, up_proj instead of the fused layers, for a base whose fused layers
               were split (llama-style); padded like "uniform"

In the first and the last, s = alpha / R is one scaling for all. A module with another scaling has the ratio multiplied
into its B: exact when it is a power of two, else rounded, which the result says.

The header of our files keeps how the layers were (key ``phi3lora``, as in ``files.py``), so our own folders come back
as they were. Without it, or when the tensors or the config were changed since, what PEFT would compute counts.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..config import LoraConfig
from ..errors import AdapterError, as_path
from ..inference.generation import stop_token_ids
from ..lora.inject import InjectionReport, fused_segments, injection_report, lora_layers
from ..lora.layers import Conv2d, Embedding
from ..model.load import longrope_boundary, longrope_note
from .adapter_file import HEADER_KEY, adapter_metadata, adapter_state_dict, check_name, install_adapter
from .hub import is_local, write_model_card
from .named import DEFAULT
from .peft_format import CONFIG_NAME, Pair, config_dict, layer_pairs
from .peft_import import TENSORS_NAME, plain_convolution, read_peft

LAYOUTS = ("uniform", "pattern", "split")


class _Module(NamedTuple):
    """One module of the folder to write."""

    pair: Pair
    scaling: float
    layer: str
    """Path of the layer that it comes from."""
    embedding: bool


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    layout: str = "uniform",
    base_model: str | None = None,
) -> PeftExport:
    """Write the adapters as a PEFT folder, which PEFT, transformers, vLLM, llama.cpp and Ollama use.

    Args:
        model: a model with adapters; it is left as it is. Tensors are written in float32.
        path: the folder; files of an earlier export in it are replaced. A model card is written where there is none and
            the base is known; :func:`write_model_card` writes a fuller one, with data and metrics.
        tokenizer: saved beside the adapter, with a ``generation_config.json`` that has every stop token.
        layout: ``"uniform"`` (one rank for all, right everywhere), ``"pattern"`` (each module's own rank, for PEFT and
            transformers alone) or ``"split"`` (``q_proj``, ``k_proj``, ... for a base whose fused layers were split).
        base_model: hub name or folder of the base, for the config and the commands; None: where the model was loaded
            from (with ``"split"``: unknown). A folder is right on this machine alone: the result says so.

    Returns:
        What was written; ``print`` shows it with the commands for each tool.

    Raises:
        AdapterError: no adapters; trained biases, adapters that are switched off or merged, and layers that PEFT cannot
            express (by name); NaN or infinite values; another layout; a path that is a file.

    Example:
        >>> exported = p3.export_peft(model, "support-peft", tokenizer=tokenizer)
        >>> exported.rank  # q, k and v of r = 8 side by side in qkv_proj
        24
        >>> print(exported.commands["vLLM"].partition("--max")[2])
        -lora-rank 32 --generation-config support-peft
    """
    path = Path(path)
    _check_exportable(model, path, layout)
    facts = adapter_metadata(model)
    segments = _named_segments(model, facts["layers"]) if layout == "split" else {}
    modules = _modules(model, facts["layers"], segments)
    base_model = base_model or (None if layout == "split" else getattr(model, "name_or_path", None)) or None
    if layout == "pattern":
        settings = _patterns(modules)
        written = {at: module.pair for at, module in modules.items()}
        ratios: dict[str, float] = {}
    else:
        written, ratios, settings = _uniform(modules)
    config = config_dict(
        **settings,
        target_modules=_targets(_tree(model, facts["layers"], segments), set(modules)),
        base_model=base_model,
        task_type=_task(model),
        lora_dropout=getattr(getattr(model, "lora_config", None), "lora_dropout", 0.0),
    )
    path.mkdir(parents=True, exist_ok=True)
    header = json.dumps({**facts, "layout": layout, "segments": segments, "ratios": ratios})
    tensors = {key: t for at, pair in written.items() for key, t in _keys(at, pair, modules[at].embedding).items()}
    save_file(tensors, path / TENSORS_NAME, metadata={"format": "pt", HEADER_KEY: header})
    (path / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stops = _save_tokenizer(tokenizer, path)
    if base_model and not (path / "README.md").exists():
        write_model_card(path, base_model=base_model, lora=getattr(model, "lora_config", None))
    rank = max(pair.rank for pair in written.values())
    return _told(model, path, layout, rank, modules, ratios, base_model, stops)


def import_peft(model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT) -> InjectionReport:
    """Load a PEFT folder: ours (any layout, bit for bit as it was) or one that PEFT wrote.

    A fused module's adapter becomes a ``Linear`` of its rank on the fused matrix; ``q_proj, k_proj, v_proj, gate_proj,
    up_proj`` become segments of the fused layers. A model without adapters gets those it needs; one with adapters must
    have the same. On an error the model is as it was. Nothing from the folder is executed.

    Args:
        model: the base that the adapter was made for, or that base with matching adapters.
        path: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or a ``.bin`` of tensors
            only).
        name: of the adapter, as in :func:`load_adapter`: beside others it waits until ``set_adapter(model, name)``.

    Returns:
        The report of the model's acting adapters, as :func:`inject_lora` gives it.

    Raises:
        AdapterError: unreadable or damaged files; what has no counterpart here, by name (another ``peft_type``, DoRA,
            trained biases, ``modules_to_save``, PiSSA and other initialisations that change the base, ...); modules,
            ranks or shapes that do not fit; NaN or infinite values.
        ModelError: a layer that cannot be adapted, tied embeddings.

    Example:
        >>> p3.export_peft(model, "support-peft").layout
        'uniform'
        >>> report = p3.import_peft(model, "support-peft")
    """
    path = as_path(path, "a PEFT folder", AdapterError)
    check_name(name)
    state, facts = read_peft(model, path)
    install_adapter(model, state, facts, path, name)
    return injection_report(model, fused_segments(model, getattr(model, "lora_config", None) or LoraConfig()))


def _check_exportable(model: nn.Module, path: Path, layout: str) -> None:
    layers = lora_layers(model)
    if layout not in LAYOUTS:
        raise AdapterError(f"layout={layout!r}; allowed: {', '.join(map(repr, LAYOUTS))}")
    if not layers:
        raise AdapterError("the model has no adapters to export; call inject_lora(model, config) or load_adapter first")
    if path.exists() and not path.is_dir():
        raise AdapterError(f"cannot export to {str(path)!r}, which is a file; allowed: a folder, new or old")
    biases = [name for name in adapter_state_dict(model) if name.endswith("bias")]
    if biases:
        raise AdapterError(
            f"trained biases ({biases[0]}, ...) have no place in these folders: vLLM and llama.cpp refuse or ignore "
            f"them; use save_merged or save_adapter, train with bias='none', or freeze biases that were not trained"
        )
    for at, layer in layers.items():
        why = _why_not(at, layer)
        if why:
            raise AdapterError(f"{at or 'the model'!r} cannot be exported: {why}")


def _why_not(at: str, layer: Any) -> str | None:
    """What keeps a layer out of a PEFT folder."""
    if not at:
        return "PEFT adapts modules inside a model, and this layer is the model itself"
    if layer.lora_A.is_meta:
        return "its tensors are on the meta device, without values"
    if not layer.enabled:
        return "it is switched off or merged; leave the disabled(model) or merged(model) block first"
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out=True, a transposed weight that nn.Linear in PEFT has not"
    if isinstance(layer, Embedding) and layer.max_norm is not None:
        return "an embedding with max_norm, which PEFT applies to the adapter too"
    if isinstance(layer, Conv2d) and not plain_convolution(layer.conv):
        return f"{layer.conv}: PEFT's adapters know no groups, dilation or padding mode"
    if not all(torch.isfinite(t).all() for t in (layer.lora_A, layer.lora_B)):
        return "it holds NaN or infinite values"
    return None


def _named_segments(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Fused layers among ``layers`` -> name -> width of their segments."""
    fused = fused_segments(model, getattr(model, "lora_config", None) or LoraConfig())
    named = {path: fused[path] for path in layers if path in fused and not any(n.isdigit() for n in fused[path])}
    for path, facts in layers.items():
        if facts["class"] == "MergedLinear" and list(named.get(path, {}).values()) != facts["segments"]:
            raise AdapterError(
                f"layout='split': the segments of {path!r} have no names; give them in LoraConfig(segments=...), "
                f"or use layout='uniform'"
            )
    return named


def _modules(model: nn.Module, layers: Mapping[str, Any], segments: Mapping[str, Any]) -> dict[str, _Module]:
    """Path in the folder -> what is written there, before padding."""
    modules = {}
    for path, layer in lora_layers(model).items():
        A, B = (t.detach().cpu().float() for t in (layer.lora_A, layer.lora_B))
        for at, pair in layer_pairs(path, layers[path], segments.get(path), A, B).items():
            modules[at] = _Module(pair, layer.scaling, path, isinstance(layer, Embedding))
    return modules


def _uniform(modules: Mapping[str, _Module]) -> tuple[dict[str, Pair], dict[str, float], dict[str, Any]]:
    """Every pair at the largest rank and commonest scaling; layer -> ratio of its own to that; the settings."""
    rank = max(module.pair.rank for module in modules.values())
    scaling = Counter(module.scaling for module in modules.values()).most_common(1)[0][0]
    ratios = {m.layer: m.scaling / scaling for m in modules.values() if m.scaling != scaling}
    written = {at: Pair(m.pair.A, m.pair.B * ratios.get(m.layer, 1.0)).padded(rank) for at, m in modules.items()}
    settings = {"r": rank, "lora_alpha": scaling * rank, "rank_pattern": {}, "alpha_pattern": {}}
    return written, ratios, settings


def _patterns(modules: Mapping[str, _Module]) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for the modules that have others."""
    ranks = {at: module.pair.rank for at, module in modules.items()}
    alphas = {at: module.scaling * module.pair.rank for at, module in modules.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {"r": r, "lora_alpha": alpha, "rank_pattern": _pattern(ranks, r), "alpha_pattern": _pattern(alphas, alpha)}


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Regular expression -> value: by a path's last part where all such modules agree, else by the whole path."""
    by_name: dict[str, set[Any]] = {}
    for at, value in values.items():
        by_name.setdefault(at.rpartition(".")[2], set()).add(value)
    pattern = {}
    for at, value in values.items():
        name = at.rpartition(".")[2]
        if value != default:
            pattern[re.escape(name) if len(by_name[name]) == 1 else f"^{re.escape(at)}"] = value
    return pattern


def _tree(model: nn.Module, layers: Mapping[str, Any], segments: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    """Paths of the modules of the base that the folder is for."""
    for path, _ in model.named_modules():
        inside = path.rpartition(".")[0] in layers  # an adapter's own parts
        if path and path not in segments and not inside:
            yield path
    for path, names in segments.items():
        yield from (path[: path.rfind(".") + 1] + name for name in names)


def _targets(tree: Iterable[str], adapted: set[str]) -> list[str]:
    """``target_modules``: last parts of paths where they select just the adapted modules, else whole paths."""
    names = {path.rpartition(".")[2] for path in adapted}
    selected = {path for path in tree if path.rpartition(".")[2] in names}
    return sorted(names if selected == adapted else adapted)


def _task(model: nn.Module) -> str | None:
    """PEFT wraps a model by its task; one that cannot generate has none."""
    config = getattr(model, "lora_config", None)
    return getattr(config, "task_type", "CAUSAL_LM") if hasattr(model, "prepare_inputs_for_generation") else None


def _keys(at: str, pair: Pair, embedding: bool) -> dict[str, Tensor]:
    """PEFT's names of the two tensors."""
    start, end = (
        (f"base_model.model.{at}.lora_embedding_", "") if embedding else (f"base_model.model.{at}.lora_", ".weight")
    )
    return {f"{start}A{end}": pair.A.contiguous(), f"{start}B{end}": pair.B.contiguous()}


def _save_tokenizer(tokenizer: Any, path: Path) -> list[str]:
    """Write it and the stop tokens; their texts."""
    if tokenizer is None:
        return []
    stops = stop_token_ids(tokenizer)
    tokenizer.save_pretrained(path)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(path)
    return tokenizer.convert_ids_to_tokens(stops)


def _told(
    model: Any,
    path: Path,
    layout: str,
    rank: int,
    modules: Mapping[str, _Module],
    ratios: Mapping[str, float],
    base_model: str | None,
    stops: list[str],
) -> PeftExport:
    """What the caller should know."""
    notes = []
    config = getattr(model, "config", None)
    phi3 = getattr(config, "model_type", None) == "phi3"
    if layout == "pattern":
        notes.append("rank_pattern and alpha_pattern: PEFT and transformers read them, vLLM and llama.cpp do not")
    if layout == "split":
        notes.append(
            "for a base whose fused layers were split into q_proj, k_proj, ...; not for Phi-3's own checkpoint"
        )
    if max_lora_rank(rank) is None:
        notes.append(f"rank {rank} is more than vLLM takes ({VLLM_RANKS[-1]}); use save_merged there")
    if config is not None and longrope_boundary(config) is not None:
        notes.append(f"{longrope_note(config)}; vLLM takes the long ones when --max-model-len is past the boundary")
    if is_local(base_model):
        notes.append(
            f"the base on record is {base_model}, a folder of this machine; for others, give its name on the hub: "
            f"base_model='owner/name'"
        )
    if phi3 and not stops:
        notes.append("no tokenizer was given: the server must know where an answer ends (the template's end of turn)")
    lines = commands(path, base_model, layout, rank, stops)
    rounded = tuple(at for at, m in modules.items() if math.frexp(ratios.get(m.layer, 1.0))[0] != 0.5)
    tools = lines if phi3 else {"PEFT": lines["PEFT"]}
    return PeftExport(path, layout, rank, tuple(modules), rounded, tuple(notes), tools)


# ----------------------------------------------------------------------------------------------------
# What an exported adapter is and the commands that use it, in PEFT, vLLM, llama.cpp and Ollama.

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (vllm/config/lora.py)."""


@dataclass(frozen=True)
class PeftExport:
    """What :func:`export_peft` wrote; ``print`` shows it with the commands to use it."""

    path: Path
    layout: str
    rank: int
    """The largest rank in the folder: ``r``, and what a server must allow."""
    modules: tuple[str, ...]
    """Paths of the adapted modules, as the folder names them."""
    rounded: tuple[str, ...] = ()
    """Modules whose B was rounded (to 1 part in 2^24) because their scaling differs from the others'."""
    notes: tuple[str, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)
    """Tool -> the lines that use the adapter with it."""

    def __str__(self) -> str:
        """A few lines of facts, then each tool's commands."""
        lines = [f"PEFT adapter in {self.path}: {len(self.modules)} modules, layout {self.layout!r}, rank {self.rank}"]
        if self.rounded:
            lines.append(
                f"note: {len(self.rounded)} modules ({self.rounded[0]}, ...) have another scaling than the rest, by a "
                f"ratio that is no power of two: it went into their B, which rounds its last bit. "
                f"layout='pattern' keeps every bit"
            )
        lines += [f"note: {note}" for note in self.notes]
        for tool, text in self.commands.items():
            lines += ["", f"# {tool}", text]
        return "\n".join(lines)


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that holds ``rank``; None: there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def commands(path: Path, base: str | None, layout: str, rank: int, stops: Sequence[str]) -> dict[str, str]:
    """Tool -> lines; ``stops`` are the texts at which an answer ends. A tool that would be wrong is left out."""
    model = base or ("LLAMA_STYLE_BASE" if layout == "split" else "BASE_MODEL")
    lines = {"PEFT": _peft(model, path)}
    if layout == "pattern":
        return lines  # vLLM and llama.cpp know one alpha / r for all modules
    allowed = max_lora_rank(rank)
    if allowed is not None:
        lines["vLLM"] = (
            f"vllm serve {_quoted(model)} --enable-lora --lora-modules {_quoted(f'{_name(path)}={path}')} "
            f"--max-lora-rank {allowed}" + (f" --generation-config {_quoted(str(path))}" if stops else "")
        )
    gguf = _quoted(str(path / "adapter.gguf"))
    config = f"--base {_quoted(model)}" if os.path.isdir(model) else f"--base-model-id {_quoted(model)}"
    lines["llama.cpp"] = (
        f"python convert_lora_to_gguf.py {config} --outfile {gguf} {_quoted(str(path))}\n"
        f"llama-cli -m base.gguf --lora {gguf}  # base.gguf: convert_hf_to_gguf.py of the base"
    )
    modelfile = [
        "FROM ./base.gguf",
        f"ADAPTER {path / 'adapter.gguf'}",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    lines["Ollama"] = "\n".join(
        ["cat > Modelfile <<'END'", *modelfile, "END", f"ollama create {_quoted(_name(path))} -f Modelfile"]
    )
    return lines


def _peft(model: str, path: Path) -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), {path.as_posix()!r})"
    )


def _name(path: Path) -> str:
    """What a server calls the adapter."""
    return path.resolve().name or "adapter"


def _quoted(text: str) -> str:
    return shlex.quote(text)
