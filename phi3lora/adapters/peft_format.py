"""PEFT's format: ``adapter_config.json``, and one pair of tensors (A, B) per module.

The config. A module's rank and alpha are the first entry of ``rank_pattern`` and ``alpha_pattern`` whose key, a regular
expression, matches the end of its path, else ``r`` and ``lora_alpha``. Its scaling is ``alpha / r``, or ``alpha /
sqrt(r)`` with ``use_rslora``, where r is the module's own rank.
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py (``_create_and_replace``)

The tensors. A module computes y += scaling * B (A x). loralib's layers hold the same numbers in another arrangement;
the conversion only moves them, so it is exact in both directions:

    Linear        A (r, in)     B (out, r)      the same
    Embedding     A (r, num)    B (dim, r)      the same, under the names lora_embedding_A and lora_embedding_B
    MergedLinear  A' (k r, in) = lora_A         B' (out, k r): lora_B's segments on the diagonal, zeros elsewhere

                  segments 2 | 1 | 1, enable_lora (True, False, True), r 1
                      lora_B  [1]      B'  [1 0]
                              [2]          [2 0]
                              [3]          [0 0]    the segment without an adapter
                                           [0 3]

    Conv2d        loralib's delta is B A of shape (out*n, in*n), viewed as (out, in, n, n) for an n x n kernel. As a
                  matrix (out, in*n*n) it is B' A': A' has n copies of lora_A on its diagonal, B' is lora_B viewed as
                  (out, n*r*n)

``settings`` are those of one layer in ``adapter_file.adapter_metadata``: its class, ``r``, segments and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import IGNORED_LORA_ARGUMENTS, UNSUPPORTED
from ..config import LoraConfig, lora_scaling
from ..errors import short_repr
from ..files import read_json
from ..lora.product import adapted_segments, block_diagonal
from ..lora.targets import sibling

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Start of every tensor's name."""
PATTERN_NOTE = (
    "rank_pattern and alpha_pattern: PEFT, transformers and vLLM (0.32 or later) read them; llama.cpp, Ollama and "
    "SGLang ignore them silently and compute another function"
)
"""Note about the engines, in the report and the card of an export in the layout "pattern"."""

_MOST_KEYS, _MOST_CHARACTERS, _MOST_REPEATS = 5000, 300, 3

Settings = Mapping[str, Any]

_READ = {
    "alpha_pattern", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "task_type", "use_rslora",
    "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules",  # the tensors' names replace these
}  # fmt: skip
_ALLOWED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None, {}),
    "fan_in_fan_out": (False, True, None),  # how a base stores its weight; A and B are the same
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
_WHY = {
    "bias": "trained biases are not part of an adapter here",
    "modules_to_save": "whole modules are not part of an adapter here",
    "init_lora_weights": "such an adapter belongs to a base that its initialisation changed; PEFT can convert one of "
    "PiSSA, OLoRA or CorDA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
}


@dataclass(frozen=True)
class PeftConfig:
    """The fields of ``adapter_config.json`` that determine what an adapter computes."""

    common: LoraConfig
    """Settings of every module that no pattern matches; its target modules are not those of the folder."""
    rank_pattern: Sequence[tuple[re.Pattern[str], int]]
    alpha_pattern: Sequence[tuple[re.Pattern[str], float]]
    targets: Sequence[str] = ()
    """Suffixes of the modules that the tensors should cover in every layer; none where the config says it otherwise."""
    base: str = ""
    """Name of the base model, ``""`` if the config has none."""

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Return the rank and alpha of the module at ``path`` (without prefix), as PEFT's ``get_pattern_key`` does."""

        def first(pattern: Sequence[tuple[re.Pattern[str], Any]], default: Any) -> Any:
            return next((value for key, value in pattern if key.match(path)), default)

        return first(self.rank_pattern, self.common.r), first(self.alpha_pattern, self.common.lora_alpha)

    def scaling(self, path: str) -> float:
        """Return the factor by which PEFT multiplies the adapter of the module at ``path``."""
        rank, alpha = self.rank_and_alpha(path)
        return lora_scaling(rank, alpha, self.common.use_rslora)

    def lora_config(self, paths: Iterable[str]) -> LoraConfig:
        """Return the common settings as a config of ours, with the last parts of ``paths`` as target modules."""
        return replace(self.common, target_modules=sorted({path.rpartition(".")[2] for path in paths}))


def read_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        ValueError: no such file, not JSON, another method than LoRA, or a setting that has no counterpart here.
    """
    if not (folder / CONFIG_NAME).exists():
        raise ValueError(f"it has no {CONFIG_NAME}, so it is no PEFT folder; load_adapter loads adapter files")
    try:
        found = read_json(folder / CONFIG_NAME)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME} is not a readable PEFT config: {error}") from error
    if found.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG_NAME}: peft_type={short_repr(found.get('peft_type'))}; allowed: 'LORA'")
    for name, value in found.items():
        _check_setting(name, value)
    common = LoraConfig(
        r=found.get("r", 8),
        lora_alpha=found.get("lora_alpha", 8),
        use_rslora=found.get("use_rslora") or False,
        lora_dropout=found.get("lora_dropout") or 0.0,
        task_type=found.get("task_type"),
        target_modules=["any"],
    )
    patterns = []
    for name, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = found.get(name) or {}
        try:
            if len(pattern) > _MOST_KEYS:
                raise ValueError(f"{len(pattern):,} keys; the modules of a model have fewer")
            for value in pattern.values():
                replace(common, **{field: value})  # validates it
            patterns.append([(_compiled(key), value) for key, value in pattern.items()])
        except (AttributeError, TypeError, re.error, ValueError) as error:
            allowed = f"a dict of regular expressions to values of {field}, at most {_MOST_KEYS:,}"
            raise ValueError(f"{CONFIG_NAME}: {name}={short_repr(pattern)}: {error}; allowed: {allowed}") from error
    targets, base = found.get("target_modules"), found.get("base_model_name_or_path")
    is_limited = any(found.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    names = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) and not is_limited else []
    return PeftConfig(common, patterns[0], patterns[1], names, base if isinstance(base, str) else "")


def peft_folders_in(folder: Path) -> list[str]:
    """Return the names of the PEFT folders inside a folder that is not one itself, as another trainer writes them."""
    if (folder / CONFIG_NAME).is_file():
        return []
    return sorted((path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")), key=lambda name: (len(name), name))


def _compiled(key: str) -> re.Pattern[str]:
    """Return the key as PEFT matches it. ValueError for one that could take hours on a path of 60 characters."""
    if len(key) > _MOST_CHARACTERS or len(re.findall(r"[*+{]", key)) > _MOST_REPEATS or re.search(r"\)[*+{]", key):
        what = f"at most {_MOST_CHARACTERS} characters, {_MOST_REPEATS} of * + {{, and none of them after a group"
        raise ValueError(f"the key {short_repr(key, 60)} takes too long to match; allowed: {what}")
    return re.compile(rf"(.*\.)?({key})$")


def _check_setting(name: str, value: Any) -> None:
    """Raise ValueError for a setting that would change what the adapter computes and has no counterpart here."""
    if name in _READ:
        return
    if name in _ALLOWED:
        if value not in _ALLOWED[name]:
            why = f" ({_WHY[name]})" if name in _WHY else ""
            allowed = ", ".join(map(repr, _ALLOWED[name]))
            raise ValueError(f"{CONFIG_NAME}: {name}={short_repr(value)} cannot be imported{why}; allowed: {allowed}")
    elif value and name not in IGNORED_LORA_ARGUMENTS:
        raise ValueError(
            f"{CONFIG_NAME}: unknown setting {short_repr(name)[1:-1]}={short_repr(value)}; remove it from the file if "
            f"it does not change what the adapter computes"
        )


class Pair(NamedTuple):
    """A module's adapter in PEFT's arrangement: A (rank, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    def padded(self, rank: int) -> Pair:
        """Return the same product at a larger rank: rows of zeros below A, columns of zeros right of B."""
        more = rank - self.A.shape[0]
        A = torch.cat([self.A, self.A.new_zeros((more, *self.A.shape[1:]))])
        B = torch.cat([self.B, self.B.new_zeros((self.B.shape[0], more, *self.B.shape[2:]))], dim=1)
        return Pair(A, B)

    def truncated(self, rank: int) -> Pair:
        """Return the first ``rank`` rows of A and columns of B: the inverse of :meth:`padded`."""
        return Pair(self.A[:rank], self.B[:, :rank])


def to_modules(
    path: str, settings: Settings, split: Mapping[str, int] | None, lora_A: Tensor, lora_B: Tensor
) -> dict[str, Pair]:
    """Convert one layer's tensors to PEFT's: path -> pair of each module.

    Args:
        split: name -> width, to write the separate modules (``q_proj``, ...) that a fused layer stands for; None: to
            write it as one module. A plain ``Linear`` on a fused matrix has one A for all: each module gets a copy.
    """
    if split is not None:
        names, merged = _module_names(path, settings, split), settings["class"] == "MergedLinear"
        As = torch.split(lora_A, settings["r"]) if merged else [lora_A] * len(names)
        Bs = torch.split(lora_B, [split[name] for name in names.values()])
        return {at: Pair(A, B) for at, A, B in zip(names, As, Bs, strict=True)}
    if settings["class"] == "MergedLinear":
        return {path: Pair(lora_A, block_diagonal(lora_B, settings["segments"], settings["enable_lora"]))}
    if settings["class"] == "Conv2d":
        height, width = lora_A.shape  # r n, in n
        n = height // settings["r"]
        A = torch.block_diag(*[lora_A] * n)  # type: ignore[no-untyped-call]
        return {path: Pair(A.view(n * height, width // n, n, n), lora_B.reshape(-1, n * height, 1, 1))}
    return {path: Pair(lora_A, lora_B)}


def from_modules(
    path: str, settings: Settings, split: Mapping[str, int] | None, pairs: Mapping[str, Pair]
) -> tuple[Tensor, Tensor]:
    """Convert what :func:`to_modules` returned, perhaps padded, back to one layer's lora_A and lora_B."""
    r = settings["r"]
    if split is not None:
        parts = [pairs[at].truncated(r) for at in _module_names(path, settings, split)]
        A = torch.cat([pair.A for pair in parts]) if settings["class"] == "MergedLinear" else parts[0].A
        return A, torch.cat([pair.B for pair in parts])
    pair = pairs[path]
    if settings["class"] == "MergedLinear":
        segments = adapted_segments(settings["segments"], settings["enable_lora"], r)
        B = torch.cat([pair.B[segment.columns, segment.rows_of_A] for segment in segments])
        return pair.A[: segments[-1].rows_of_A.stop], B
    if settings["class"] == "Conv2d":
        n = pair.A.shape[-1]
        height, width = r * n, pair.A.shape[1] * n
        A, B = pair.truncated(n * height)
        return A.reshape(n * height, n * width)[:height, :width], B.reshape(-1, height)
    return pair.truncated(r)


def conv_from_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """Convert any pair for a convolution, A (r, in, n, n) and B (out, r, 1, 1), to loralib's tensors of rank r."""
    r, channels, n, _ = pair.A.shape
    return pair.A.reshape(r * n, channels * n), torch.kron(pair.B[:, :, 0, 0], torch.eye(n))


def _module_names(path: str, settings: Settings, split: Mapping[str, int]) -> dict[str, str]:
    """Return path -> name of each adapted segment as a module of its own."""
    enabled = settings["enable_lora"] if settings["class"] == "MergedLinear" else [True] * len(split)
    return {sibling(path, name): name for name, on in zip(split, enabled, strict=True) if on}
