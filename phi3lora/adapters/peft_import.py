"""A PEFT folder read into the form of an adapter file of ours: loralib's tensors and each layer's settings.

    PEFT's module                                  becomes
    a linear layer, fused or not                   Linear at its rank, on the whole (fused) matrix
    q_proj, k_proj, ... of a fused layer           segments of one MergedLinear, padded to one rank where they differ
    an embedding, a convolution                    Embedding, Conv2d
    what export_peft wrote                         the layers it was written from, bit for bit

Nothing in the model is changed here; what cannot be represented is refused by name.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import AdapterError
from ..files import parse_json, read_pickled, read_safetensors
from ..lora.inject import fused_segments
from ..lora.layers import Conv2d
from .adapter_file import HEADER_KEY
from .peft_format import Pair, PeftConfig, conv_from_peft, layer_pairs, layer_tensors, read_config

logger = logging.getLogger("phi3lora")

TENSORS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<path>.+)\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight|embedding_(?P<e_side>[AB])(?:\.default)?)"
)
_UNUSABLE = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "modules_to_save": "a whole module",
    "trainable_tokens": "trained tokens",
    ".bias": "a trained bias",
}


class Entry(NamedTuple):
    """One module of the folder."""

    pair: Pair
    embedding: bool


Adapter = tuple[dict[str, Tensor], dict[str, Any]]


def read_peft(model: nn.Module, folder: Path) -> Adapter:
    """The tensors and facts (as ``files.read_adapter`` gives them) of a PEFT folder, for ``model``.

    Raises:
        AdapterError: what :func:`import_peft` refuses.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"no such folder: {str(folder)!r}; allowed: a local PEFT folder "
            f"(from the hub: hf download NAME --local-dir DIR)"
        )
    config = read_config(folder)
    tensors, header = _read_tensors(folder)
    entries = _entries(model, folder, tensors, config)
    exported = None if header is None else _as_exported(folder, header, config, entries)
    return exported or _as_layers(model, folder, config, entries)


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Key -> tensor, on the CPU, and what our own header says, if it is there. Executes nothing from the file."""
    path, pickle, header = folder / TENSORS_NAME, folder / _PICKLE_NAME, None
    if not path.is_file() and not pickle.is_file():
        raise AdapterError(
            f"{str(folder)!r} has no {TENSORS_NAME}; a PEFT folder has it beside its config, in one piece"
        )
    try:
        if path.is_file():
            tensors, metadata = read_safetensors(path)
            header = metadata.get(HEADER_KEY)
        else:
            path = pickle
            tensors = read_pickled(path)
    except (OSError, ValueError) as error:
        if path is pickle:
            raise AdapterError(
                f"{str(path)!r} cannot be read without running code from it, or is damaged: {error}. "
                f"Where you trust it, load it in PEFT and save it as {TENSORS_NAME}"
            ) from error
        raise AdapterError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{str(path)!r} does not hold a dict of tensors")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{str(path)!r}: {key!r} is {tensor.dtype} with NaN, infinite or whole numbers")
    return {key: tensor.float() for key, tensor in tensors.items()}, header


def _entries(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], config: PeftConfig) -> dict[str, Entry]:
    """Path as the folder names it -> its pair; every key is accounted for, every rank is the config's."""
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, bool] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            _accept_base_weight(model, folder, key, tensor)
            continue
        path = match["path"].removeprefix(_PREFIX)
        sides = found.setdefault(path, {})
        side, embedding = match["side"] or match["e_side"], match["e_side"] is not None
        if side in sides or embeddings.setdefault(path, embedding) != embedding:
            raise AdapterError(f"{str(folder)!r}: {key!r} is there twice under different names")
        sides[side] = tensor
    if not found:
        raise AdapterError(f"{str(folder)!r} has no tensors called *.lora_A.weight")
    entries = {}
    for path, sides in found.items():
        if sides.keys() != {"A", "B"}:
            raise AdapterError(f"{str(folder)!r}: {path!r} has only lora_{next(iter(sides))}; it needs both A and B")
        entry, rank = Entry(Pair(sides["A"], sides["B"]), embeddings[path]), config.rank_and_alpha(path)[0]
        A, B = entry.pair
        if A.dim() < 2 or A.dim() != B.dim() or A.shape[0] != rank or B.shape[1] != rank:
            raise AdapterError(
                f"{str(folder)!r}: {path!r} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"the config says rank {rank}; allowed: A ({rank}, in), B (out, {rank})"
            )
        entries[path] = entry
    return entries


def _accept_base_weight(model: nn.Module, folder: Path, key: str, tensor: Tensor) -> None:
    """PEFT saves an embedding's own weight beside its adapter: fine where it is the model's, else refused."""
    for part, what in _UNUSABLE.items():
        if part in key:
            raise AdapterError(f"{str(folder)!r}: {key!r} is {what}, which cannot be imported")
    weights = dict(model.named_parameters(remove_duplicate=False))
    weight = weights.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if weight is None:
        raise AdapterError(f"{str(folder)!r}: unknown tensor {key!r}; allowed: *.lora_A.weight, *.lora_B.weight")
    if weight.shape != tensor.shape or not torch.equal(weight.detach().cpu().float(), tensor):
        raise AdapterError(
            f"{str(folder)!r}: {key!r} {tuple(tensor.shape)} is a base weight that differs from the model's "
            f"{tuple(weight.shape)}: the adapter belongs to another base or came with trained or resized embeddings"
        )


# --- What export_peft wrote


def _as_exported(folder: Path, header: str, config: PeftConfig, entries: Mapping[str, Entry]) -> Adapter | None:
    """The layers that our header describes; None, with a warning, when it does not describe what is in the folder."""
    pairs = {path: entry.pair for path, entry in entries.items()}
    try:
        facts = parse_json(header)
        state = _restored(facts, config, pairs)
        own = facts["config"] or config.lora_config(_last_parts(facts["layers"])).to_dict()
        LoraConfig(**own)
        layers = {"format": facts["format"], "config": own, "layers": facts["layers"]}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        logger.warning(
            "%s was changed since export_peft wrote it (%s): imported as what PEFT would compute", folder, error
        )
        return None
    return state, layers


def _restored(facts: dict[str, Any], config: PeftConfig, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors under loralib's names. ValueError unless exporting them again gives the same pairs and scaling."""
    state, seen = {}, set()
    for path, layer in facts["layers"].items():
        segments = facts["segments"].get(path)
        scaling = layer["lora_alpha"] / (math.sqrt(layer["r"]) if layer["use_rslora"] else layer["r"])
        ratio = facts["ratios"].get(path, 1.0)
        A, B = layer_tensors(path, layer, segments, pairs)
        B = B / ratio
        for at, again in layer_pairs(path, layer, segments, A, B * ratio).items():
            seen.add(at)
            padded = again.padded(pairs[at].rank)
            same = all(
                torch.equal(*both) if ratio == 1 else torch.allclose(*both, rtol=1e-6, atol=0)
                for both in zip(padded, pairs[at], strict=True)
            )
            if not same:
                raise ValueError(f"other tensors in {at!r}")
            if not math.isclose(config.scaling(at) * ratio, scaling, rel_tol=1e-6):
                raise ValueError(f"{at!r} is scaled by {config.scaling(at)}")
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = A.contiguous(), B.contiguous()
    if seen != pairs.keys():
        raise ValueError(f"other modules: {sorted(seen ^ pairs.keys())[0]!r}")
    return state


# --- Any other folder


class _Place(NamedTuple):
    """Where a module of the folder is in the model."""

    path: str
    segment: int | None = None


def _as_layers(model: nn.Module, folder: Path, config: PeftConfig, entries: Mapping[str, Entry]) -> Adapter:
    """Each module of the folder as a layer of ours."""
    fused = fused_segments(model, getattr(model, "lora_config", None) or LoraConfig())
    places = _places(model, folder, fused, entries)
    layers: dict[str, dict[str, Any]] = {}
    state: dict[str, Tensor] = {}
    groups: dict[str, dict[int, str]] = {}
    for name, place in places.items():
        if place.segment is not None:
            groups.setdefault(place.path, {})[place.segment] = name
            continue
        r, alpha = config.rank_and_alpha(name)
        kind, (A, B) = _checked(folder, name, model.get_submodule(place.path), entries[name])
        layers[place.path] = {"class": kind, "r": r, "lora_alpha": alpha, "use_rslora": config.use_rslora}
        state[f"{place.path}.lora_A"], state[f"{place.path}.lora_B"] = A, B
    for path, names in groups.items():
        if path in layers:
            raise AdapterError(f"{str(folder)!r} adapts both {path!r} and a part of it, {next(iter(names.values()))!r}")
        layer = model.get_submodule(path)
        layers[path], (A, B) = _merged(folder, path, layer, fused[path], names, config, entries)
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = A, B
    return state, {"format": 1, "config": config.lora_config(_last_parts(entries)).to_dict(), "layers": layers}


def _last_parts(paths: Iterable[str]) -> list[str]:
    """Target names for a config: it describes the layers, it is not what builds them."""
    return sorted({path.rpartition(".")[2] for path in paths})


def _places(
    model: nn.Module, folder: Path, fused: Mapping[str, Mapping[str, int]], entries: Mapping[str, Entry]
) -> dict[str, _Place]:
    """Name in the folder -> place in the model. A folder made on the inner model (``layers.0...``) fits as well."""
    known = {}
    for path, segments in fused.items():
        parent = path[: path.rfind(".") + 1]
        known.update({parent + name: _Place(path, i) for i, name in enumerate(segments) if not name.isdigit()})
    known.update({path: _Place(path) for path, _ in model.named_modules() if path})
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    places: dict[str, _Place] = {}
    for name in entries:
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
        at = next((p for p in (plain, inner + plain, plain.removeprefix(inner)) if p in known), None)
        if at is None:
            raise AdapterError(f"{str(folder)!r} adapts {name!r}, which is not in the model ({type(model).__name__})")
        if known[at] in places.values():
            raise AdapterError(f"{str(folder)!r} adapts {at!r} twice")
        places[name] = known[at]
    return places


def _checked(folder: Path, name: str, module: nn.Module, entry: Entry) -> tuple[str, tuple[Tensor, Tensor]]:
    """The class of ours for a module, and loralib's tensors."""
    a_rest: tuple[int, ...]
    if isinstance(module, nn.Embedding):
        kind, a_rest, out = "Embedding", (module.num_embeddings,), module.embedding_dim
    elif isinstance(module, nn.Linear):
        kind, a_rest, out = "Linear", (module.in_features,), module.out_features
    elif isinstance(module, (nn.Conv2d, Conv2d)):
        base = module.conv if isinstance(module, Conv2d) else module
        kind, a_rest, out = "Conv2d", (base.in_channels, *base.kernel_size), base.out_channels
        if not plain_convolution(base):
            raise AdapterError(f"{str(folder)!r}: {name!r}: {base}; allowed: no groups, no dilation, zero padding")
    else:
        raise AdapterError(
            f"{str(folder)!r} adapts {name!r}, a {type(module).__name__}; allowed: Linear, Embedding, Conv2d"
        )
    A, B = entry.pair
    ones = (1,) * (A.dim() - 2)
    if (entry.embedding != (kind == "Embedding")) or A.shape[1:] != a_rest or B.shape != (out, A.shape[0], *ones):
        raise AdapterError(
            f"{str(folder)!r}: {name!r} has A {tuple(A.shape)} and B {tuple(B.shape)}; for this {kind} of the model "
            f"allowed: A (r, {', '.join(map(str, a_rest))}), B ({out}, r)"
        )
    return kind, conv_from_peft(entry.pair) if kind == "Conv2d" else (A, B)


def plain_convolution(base: nn.Conv2d) -> bool:
    """Whether PEFT computes a convolution's adapter as loralib does: it passes on stride and padding alone."""
    return base.groups == 1 and set(base.dilation) == {1} and base.padding_mode == "zeros"


def _merged(
    folder: Path,
    path: str,
    layer: Any,
    segments: Mapping[str, int],
    names: Mapping[int, str],
    config: PeftConfig,
    entries: Mapping[str, Entry],
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Adapters of separate q_proj, k_proj, ... as one ``MergedLinear`` of the fused layer that stands for them."""
    settings = {i: config.rank_and_alpha(name) for i, name in names.items()}
    widths = list(segments.values())
    facts: dict[str, Any] = {"class": "MergedLinear", "segments": widths}
    facts["enable_lora"] = [i in names for i in range(len(widths))]
    if len(set(settings.values())) == 1:
        r, alpha = next(iter(settings.values()))
        facts |= {"r": r, "lora_alpha": alpha, "use_rslora": config.use_rslora}
    else:
        r = max(rank for rank, _ in settings.values())
        facts |= {"r": r, "lora_alpha": r * config.scaling(names[min(names)]), "use_rslora": False}
    As, Bs = [], []
    for i in sorted(names):
        A, B = entries[names[i]].pair
        if entries[names[i]].embedding or A.shape[1:] != (layer.in_features,) or B.shape != (widths[i], len(A)):
            raise AdapterError(
                f"{str(folder)!r}: {names[i]!r} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                f"for this part of {path!r} allowed: A (r, {layer.in_features}), B ({widths[i]}, r)"
            )
        ratio = config.scaling(names[i]) / config.scaling(names[min(names)])
        if math.frexp(ratio)[0] != 0.5:
            logger.info("%s: the scaling of %s is rounded into its B", folder, names[i])
        A, B = Pair(A, B * ratio).padded(r)
        As.append(A)
        Bs.append(B)
    return facts, (torch.cat(As), torch.cat(Bs))
