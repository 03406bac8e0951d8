"""Import of a PEFT folder: convert it to loralib's tensors and each layer's settings, load it like an adapter file.

    PEFT's module                                  becomes
    a linear layer, fused or not                   Linear of its rank, on the whole (fused) matrix
    q_proj, k_proj, ... of a fused layer           segments of one MergedLinear, padded to one rank where they differ
    an embedding, a convolution                    Embedding, Conv2d
    mlx-lm's tensors (``mlx_format.py``)           the same, after they are named and transposed as PEFT's
    what export_peft wrote                         the layers it was written from, bit for bit

The model changes only after the whole folder has been checked. The functions that read it raise ValueError;
:func:`import_peft` turns that into an AdapterError with the folder's path.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig, lora_scaling
from ..errors import AdapterError, as_path, error_line, is_hub_name
from ..files import parse_json, read_tensors
from ..lora.inject import InjectionReport, injection_report
from ..lora.layers import Conv2d
from ..lora.targets import plainly_named_segments, sibling
from ..lora.wrappers import module_at, plain_name, unwrap
from .adapter_file import HEADER_KEY, check_finite, install_adapter
from .mlx_format import MLX_TENSORS_NAME, is_mlx_folder, read_mlx_folder
from .named import DEFAULT, check_outside_blocks
from .peft_format import (
    CONFIG_NAME,
    PREFIX,
    TENSORS_NAME,
    Pair,
    PeftConfig,
    conv_from_pair,
    from_modules,
    peft_folders_in,
    read_config,
    to_modules,
)

logger = logging.getLogger("phi3lora")

_PICKLE_NAME = "adapter_model.bin"
_KEY = re.compile(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|embedding_([AB])(?:\.default)?)")
_UNUSABLE = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "modules_to_save": "a whole module",
    "trainable_tokens": "trained tokens",
    ".bias": "a trained bias",
}

Adapter = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and metadata, as ``adapter_file.read_adapter`` returns them."""


def import_peft(model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT) -> InjectionReport:
    """Load a PEFT folder: ours (any layout, bit for bit as it was) or one that PEFT, Unsloth or mlx-lm wrote.

    A fused module's adapter becomes a ``Linear`` of its rank on the fused matrix; ``q_proj, k_proj, v_proj, gate_proj,
    up_proj`` become segments of the fused layers. A model without adapters gets those it needs; one with adapters must
    have the same. On an error the model is unchanged. No code in the folder is executed.

    Args:
        model: the base that the adapter was made for, or that base with matching adapters.
        path: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or a ``.bin`` that holds
            tensors only); or mlx-lm's, with ``adapters.safetensors``.
        name: the adapter's name, as in :func:`load_adapter`: beside other adapters it stays inactive until
            ``set_adapter(model, name)``.

    Returns:
        The report of the model's active adapter, as :func:`inject_lora` gives it.

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
    folder, model = peft_folder(path), unwrap(model)
    check_outside_blocks(model, "import_peft")
    try:
        if is_mlx_folder(folder):
            config, tensors = read_mlx_folder(folder)
            check_finite(tensors, MLX_TENSORS_NAME)
            tensors, header = {key: tensor.float() for key, tensor in tensors.items()}, None
        else:
            config = read_config(folder)
            tensors, header = _read_tensors(folder)
        pairs = _pairs(model, tensors, config)
        adapter = None if header is None else _restore_export(folder, header, config, pairs)
        state, metadata = adapter or _convert(model, config, pairs)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot import {str(folder)!r}: {error}") from error
    install_adapter(model, state, metadata, str(folder), name)
    _warn_of_doubts(model, folder, config, pairs)
    return injection_report(model)


def peft_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder to import; raise an AdapterError if it is none, or holds PEFT folders."""
    folder = as_path(path, "a PEFT folder", AdapterError)
    if not folder.is_dir():
        found = " (it is a file)" if folder.is_file() else ""
        raise AdapterError(
            f"there is no folder {str(folder)!r}{found}; allowed: a local PEFT folder "
            f"(from the hub: hf download NAME --local-dir DIR); load_adapter loads adapter files"
        )
    if inside := peft_folders_in(folder):
        raise AdapterError(f"{str(folder)!r} is no PEFT folder, it holds some: import one of {', '.join(inside)}")
    return folder


def _warn_of_doubts(model: nn.Module, folder: Path, config: PeftConfig, pairs: Mapping[str, Pair]) -> None:
    """Warn of targets without tensors, as of a folder that is not whole, and of a base by another name."""
    have = Counter(name.rpartition(".")[2] for name in pairs)
    modules = (plain_name(path).rpartition(".")[2] for path, _ in model.named_modules())
    there = Counter([*modules, *(name for segments in plainly_named_segments(model).values() for name in segments)])
    missing = [t for t in config.targets if not any(path == t or path.endswith(f".{t}") for path in pairs)]
    fewer = [f"{t!r} in {have[t]} of {there[t]}" for t in config.targets if 0 < have[t] < there[t]]
    if missing:
        logger.warning("%s has no tensors for %s, which its config targets too", folder, ", ".join(map(repr, missing)))
    if fewer:
        logger.warning("%s adapts %s layers; its config targets all of them", folder, ", ".join(fewer))
    ours = getattr(getattr(model, "config", None), "_name_or_path", "")
    are_hub_names = all("/" in name and is_hub_name(name) for name in (config.base, ours)) and not os.path.isdir(ours)
    if are_hub_names and _base_name(config.base) != _base_name(ours):
        why = "if their weights differ, so will the answers"
        logger.warning("%s was made for %r, and this model is %r; %s", folder, config.base, ours, why)


def _base_name(name: str) -> str:
    """Return a hub name without its owner and without what marks a quantised copy."""
    return re.sub(r"(-unsloth)?(-bnb-4bit)?$", "", name.partition("/")[2].lower())


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors in float32, on the CPU, and the header that :func:`export_peft` writes, if it is there."""
    path = next((folder / name for name in (TENSORS_NAME, _PICKLE_NAME) if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"it has no {TENSORS_NAME}; a PEFT folder has it beside {CONFIG_NAME}, not in shards")
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, ValueError) as error:
        is_pickle = path.name == _PICKLE_NAME
        kind = f"pickle of tensors only (in PEFT, save one you trust as {TENSORS_NAME})" if is_pickle else "safetensors"
        raise ValueError(f"{path.name} is not a readable {kind}: {error}") from error
    check_finite(tensors, path.name)
    return {key: tensor.float() for key, tensor in tensors.items()}, metadata.get(HEADER_KEY)


def _pairs(model: nn.Module, tensors: Mapping[str, Tensor], config: PeftConfig) -> dict[str, Pair]:
    """Group the tensors by module: path as the folder names it -> A and B. Every key must be used."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            _check_base_weight(model, key, tensor)
        elif found.setdefault(match[1].removeprefix(PREFIX), {}).setdefault(match[2] or match[3], tensor) is not tensor:
            raise ValueError(f"{key!r} appears twice, under different names")
    if not found:
        raise ValueError("it has no tensors called *.lora_A.weight")
    pairs = {}
    for path, sides in found.items():
        if len(sides) < 2:
            raise ValueError(f"{path!r} has only lora_{', '.join(sides)}; it needs both A and B")
        (A, B), rank = (sides["A"], sides["B"]), config.rank_and_alpha(path)[0]
        if A.dim() < 2 or A.dim() != B.dim() or A.shape[0] != rank or B.shape[1] != rank:
            raise ValueError(
                f"{path!r} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"the config says rank {rank}; allowed: A ({rank}, in), B (out, {rank})"
            )
        pairs[path] = Pair(A, B)
    return pairs


def _check_base_weight(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor equals the model's: PEFT saves an embedding's weight beside its adapter."""
    for part, kind in _UNUSABLE.items():
        if part in key:
            raise ValueError(f"{key!r} is {kind}, which cannot be imported")
    weights = dict(model.named_parameters(remove_duplicate=False))
    weight = weights.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    if weight is None:
        raise ValueError(f"unknown tensor {key!r}; allowed: *.lora_A.weight, *.lora_B.weight")
    if weight.shape != tensor.shape or not torch.equal(weight.detach().cpu().float(), tensor):
        raise ValueError(
            f"{key!r} {tuple(tensor.shape)} is a base weight that differs from the model's {tuple(weight.shape)}: "
            f"the adapter belongs to another base or came with trained or resized embeddings"
        )


# ----------------------------------------------------------------------------------------------------
# A folder that export_peft wrote


def _restore_export(folder: Path, header: str, config: PeftConfig, pairs: Mapping[str, Pair]) -> Adapter | None:
    """Return the layers that our header describes; None, with a warning, if the folder was changed since."""
    try:
        metadata = parse_json(header)
        state = _restore_layers(metadata, config, pairs)
        settings = metadata["config"] or config.lora_config(metadata["layers"]).to_dict()
        LoraConfig(**settings)
        return state, {"format": metadata["format"], "config": settings, "layers": metadata["layers"]}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        logger.warning(
            "%s has changed since export_peft wrote it (%s): imported as PEFT would compute it",
            folder,
            error_line(error),
        )
        return None


def _restore_layers(metadata: dict[str, Any], config: PeftConfig, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Return the tensors under loralib's names. ValueError unless exporting them would give these pairs again."""
    state, seen = {}, set()
    for path, layer in metadata["layers"].items():
        split, ratio = metadata["segments"].get(path), metadata["ratios"].get(path, 1.0)
        scaling = lora_scaling(layer["r"], layer["lora_alpha"], layer["use_rslora"])
        A, B = from_modules(path, layer, split, pairs)
        B = B / ratio
        tolerance = 0 if ratio == 1 else 1e-6
        for at, pair in to_modules(path, layer, split, A, B * ratio).items():
            seen.add(at)
            for again, stored in zip(pair.padded(len(pairs[at].A)), pairs[at], strict=True):
                if again.shape != stored.shape or not torch.allclose(again, stored, rtol=tolerance, atol=0):
                    raise ValueError(f"other tensors in {at!r}")
            if not math.isclose(config.scaling(at) * ratio, scaling, rel_tol=1e-6):
                raise ValueError(f"{at!r} is scaled by {config.scaling(at)}")
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = A.contiguous(), B.contiguous()
    if seen != pairs.keys():
        raise ValueError(f"other modules: {sorted(seen ^ pairs.keys())[0]!r}")
    return state


# ----------------------------------------------------------------------------------------------------
# Any other folder


def _convert(model: nn.Module, config: PeftConfig, pairs: Mapping[str, Pair]) -> Adapter:
    fused = plainly_named_segments(model)
    layers: dict[str, dict[str, Any]] = {}
    state: dict[str, Tensor] = {}
    for path, names in _find_layers(model, fused, pairs).items():
        layer, name = module_at(model, path), names.pop(None, None)
        if name is None:
            layers[path], (A, B) = _merged_linear(layer, list(fused[path].values()), names, config, pairs)
        elif names:
            raise ValueError(f"it adapts both {path!r} and a part of it, {next(iter(names.values()))!r}")
        else:
            r, alpha = config.rank_and_alpha(name)
            kind, (A, B) = _whole_layer(name, layer, pairs[name])
            layers[path] = {"class": kind, "r": r, "lora_alpha": alpha, "use_rslora": config.common.use_rslora}
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = A, B
    return state, {"format": 1, "config": config.lora_config(pairs).to_dict(), "layers": layers}


def _find_layers(
    model: nn.Module, fused: Mapping[str, Mapping[str, int]], pairs: Mapping[str, Pair]
) -> dict[str, dict[int | None, str]]:
    """Return path in the model -> {segment (None: the whole layer): name in the folder}.

    A folder that was made for the inner model (``layers.0...``) or a compiled one (``_orig_mod``) fits as well.
    """
    known: dict[str, tuple[str, int | None]] = {}
    for path, segments in fused.items():
        known.update({sibling(path, name): (path, i) for i, name in enumerate(segments) if not name.isdigit()})
    known.update({plain_name(path): (plain_name(path), None) for path, _ in model.named_modules() if path})
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    layers: dict[str, dict[int | None, str]] = {}
    for name in pairs:
        plain = plain_name(name)
        at = next((p for p in (plain, inner + plain, plain.removeprefix(inner)) if p in known), None)
        if at is None:
            raise ValueError(f"it adapts {name!r}, which is not in the model ({type(model).__name__})")
        path, segment = known[at]
        if layers.setdefault(path, {}).setdefault(segment, name) != name:
            raise ValueError(f"it adapts {at!r} twice")
    return layers


def _whole_layer(name: str, layer: nn.Module, pair: Pair) -> tuple[str, tuple[Tensor, Tensor]]:
    """Return the class of ours for a module that is a layer of its own, and loralib's tensors."""
    base = layer.conv if isinstance(layer, Conv2d) else layer
    if isinstance(base, nn.Embedding):
        return "Embedding", _checked_pair(name, pair, (base.num_embeddings,), base.embedding_dim)
    if isinstance(base, nn.Linear):
        return "Linear", _checked_pair(name, pair, (base.in_features,), base.out_features)
    if isinstance(base, nn.Conv2d) and is_plain_convolution(base):
        shape = (base.in_channels, *base.kernel_size)
        return "Conv2d", conv_from_pair(_checked_pair(name, pair, shape, base.out_channels))
    allowed = "Linear, Embedding, Conv2d (with no groups, no dilation, zero padding)"
    raise ValueError(f"it adapts {name!r}, a {type(base).__name__}; allowed: {allowed}")


def _checked_pair(name: str, pair: Pair, a_shape: tuple[int, ...], out: int) -> Pair:
    """Return the pair. ValueError unless A is (r, *a_shape) and B (out, r), with a 1 x 1 kernel in a convolution."""
    if pair.A.shape[1:] != a_shape or pair.B.shape != (out, len(pair.A), *(1,) * (len(a_shape) - 1)):
        raise ValueError(
            f"{name!r} has A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}; "
            f"allowed for this part of the model: A (r, {', '.join(map(str, a_shape))}), B ({out}, r)"
        )
    return pair


def is_plain_convolution(base: nn.Conv2d) -> bool:
    """Return whether PEFT computes a convolution's adapter as loralib does: it passes on stride and padding alone."""
    return base.groups == 1 and set(base.dilation) == {1} and base.padding_mode == "zeros"


def _merged_linear(
    layer: Any, widths: list[int], names: Mapping[int | None, str], config: PeftConfig, pairs: Mapping[str, Pair]
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Convert separate q_proj, k_proj, ... to the settings and tensors of one ``MergedLinear`` on the fused layer.

    ``names``: position of a segment -> its module in the folder. Where ranks or alphas differ, all are padded to the
    largest rank and the ratio of the scalings is multiplied into B.
    """
    ordered = [(names[i], width) for i, width in enumerate(widths) if i in names]
    ranks_and_alphas = {config.rank_and_alpha(name) for name, _ in ordered}
    r, scaling = max(rank for rank, _ in ranks_and_alphas), config.scaling(ordered[0][0])
    alpha, use_rslora = r * scaling, False
    if len(ranks_and_alphas) == 1:
        alpha, use_rslora = ranks_and_alphas.pop()[1], config.common.use_rslora
    padded = []
    for name, width in ordered:
        A, B = _checked_pair(name, pairs[name], (layer.in_features,), width)
        ratio = config.scaling(name) / scaling
        if math.frexp(ratio)[0] != 0.5:  # not a power of two
            logger.info("the scaling of %s is rounded into its B", name)
        padded.append(Pair(A, B * ratio).padded(r))
    settings = {
        "class": "MergedLinear",
        "segments": widths,
        "enable_lora": [i in names for i in range(len(widths))],
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
    }
    return settings, (torch.cat([pair.A for pair in padded]), torch.cat([pair.B for pair in padded]))
