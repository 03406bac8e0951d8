"""PEFT's ``adapter_config.json``: written, and read with everything refused that would change the arithmetic.

A module's rank and alpha are the first entry of ``rank_pattern`` and ``alpha_pattern`` whose key, a regular expression,
matches the end of its path, else ``r`` and ``lora_alpha``; its scaling is ``alpha / r``, or ``alpha / sqrt(r)`` with
``use_rslora``, so rank-stabilised scaling goes by each module's own rank.
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py (``_create_and_replace``)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import IGNORED_LORA_ARGUMENTS, UNSUPPORTED
from ..config import LoraConfig
from ..errors import AdapterError, equals, is_int, is_number, short_repr
from ..files import read_json

CONFIG_NAME = "adapter_config.json"

# Whatever they say, the tensors' names decide.
_NAMES_DECIDE = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
_READ = {"alpha_pattern", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "task_type", "use_rslora"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None, {}),
    "fan_in_fan_out": (False, True, None),  # how a base stores its weight; A and B are the same
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_WHY = {
    "bias": "trained biases are not part of an adapter here",
    "modules_to_save": "whole modules are not part of an adapter here",
    "init_lora_weights": "such an adapter belongs to a base that its initialisation changed; PEFT can convert it: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
}


@dataclass(frozen=True)
class PeftConfig:
    """What of ``adapter_config.json`` the import needs."""

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    task_type: str | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Of the module at ``path`` (as PEFT names it, without prefix)."""
        return _first(self.rank_pattern, path, self.r), _first(self.alpha_pattern, path, self.lora_alpha)

    def scaling(self, path: str) -> float:
        """What PEFT multiplies this module's adapter by."""
        rank, alpha = self.rank_and_alpha(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lora_config(self, target_modules: list[str]) -> LoraConfig:
        """The settings that all layers share, as a config of ours."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=target_modules,
            task_type=self.task_type,
        )


def _first(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's ``get_pattern_key``."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def read_config(folder: Path) -> PeftConfig:
    """``adapter_config.json`` of a folder.

    Raises:
        AdapterError: no such file, not JSON, another method than LoRA, or a setting that cannot be represented here.
    """
    path = folder / CONFIG_NAME
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable PEFT config: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{str(path)!r} holds a {type(found).__name__}; allowed: a JSON object")
    if found.get("peft_type") != "LORA":
        raise AdapterError(f"{str(path)!r}: peft_type={short_repr(found.get('peft_type'))}; allowed: 'LORA'")
    for name, value in found.items():
        _refuse_unless_neutral(path, name, value)
    config = PeftConfig(
        r=found.get("r", 8),
        lora_alpha=found.get("lora_alpha", 8),
        use_rslora=found.get("use_rslora") or False,
        lora_dropout=found.get("lora_dropout") or 0.0,
        task_type=found.get("task_type"),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
    )
    _check_patterns(path, config)
    config.lora_config(["any"])  # the other values' ranges
    return config


def _refuse_unless_neutral(path: Path, name: str, value: Any) -> None:
    if name in _READ or name in _NAMES_DECIDE:
        return
    if name in _ALLOWED:
        if not any(equals(value, allowed) and type(value) is type(allowed) for allowed in _ALLOWED[name]):
            why = f" ({_WHY[name]})" if name in _WHY else ""
            allowed = ", ".join(map(repr, _ALLOWED[name]))
            raise AdapterError(f"{str(path)!r}: {name}={short_repr(value)} cannot be imported{why}; allowed: {allowed}")
    elif name not in IGNORED_LORA_ARGUMENTS and value:
        raise AdapterError(
            f"{str(path)!r}: unknown setting {short_repr(name)[1:-1]}={short_repr(value)}; take it out of the file if it does "
            f"not change what the adapter computes"
        )


def _check_patterns(path: Path, config: PeftConfig) -> None:
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        whole = name == "rank_pattern"
        allowed = "a dict of regular expressions to " + ("whole numbers >= 1" if whole else "numbers > 0")
        if not isinstance(pattern, dict):
            raise AdapterError(f"{str(path)!r}: {name}={short_repr(pattern)}; allowed: {allowed}")
        for key, value in pattern.items():
            allows = is_int(value, 1) if whole else is_number(value) and value > 0
            try:
                re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise AdapterError(f"{str(path)!r}: {name}: {key!r} is no regular expression ({error})") from error
            if not allows:
                raise AdapterError(f"{str(path)!r}: {name}: {key!r}: {short_repr(value)}; allowed: {allowed}")


def config_dict(
    *,
    r: int,
    lora_alpha: float,
    target_modules: list[str],
    base_model: str | None,
    task_type: str | None,
    lora_dropout: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    """The contents of ``adapter_config.json``: what PEFT, transformers, vLLM and llama.cpp read, and no more."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _whole(lora_alpha),
        "lora_dropout": lora_dropout,
        "use_rslora": False,
        "target_modules": target_modules,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in alpha_pattern.items()},
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "auto_mapping": None,
        "revision": None,
    }


def _whole(number: float) -> float:
    """32.0 as 32: some readers declare alpha an int."""
    return int(number) if float(number).is_integer() else number


# ----------------------------------------------------------------------------------------------------
# One layer's adapter as loralib's classes hold it and as PEFT does: the same numbers, only moved. Exact both ways.
#
# PEFT knows one pair a module, and so does what reads its files: y += scaling * B (A x).
#
#     Linear        A (r, in)     B (out, r)      the same
#     Embedding     A (r, num)    B (dim, r)      the same, under the names lora_embedding_A and lora_embedding_B
#     MergedLinear  A' (k r, in) = lora_A         B' (out, k r): lora_B's segments on the diagonal, zeros elsewhere
#
#                   segments 2 | 1 | 1, enable_lora (True, False, True), r 1
#                       lora_B  [1]      B'  [1 0]
#                               [2]          [2 0]
#                               [3]          [0 0]    the segment that is off
#                                            [0 3]
#     Conv2d        loralib's delta is B A of shape (out*n, in*n), read as (out, in, n, n) for a kernel of n x n. As a
#                   matrix (out, in*n*n) it is B' A': n copies of lora_A on the diagonal,
#                   and lora_B read as (out, n*r*n)
#
# ``facts`` are a layer's settings as ``adapter_file.adapter_metadata`` gives them; the class and ``r`` are in it.

Facts = Mapping[str, Any]


class Pair(NamedTuple):
    """An adapter as PEFT has it: A (rank, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """PEFT's rank: k * r for a MergedLinear with k enabled segments."""
        return self.A.shape[0]

    def padded(self, rank: int) -> Pair:
        """The same product at a larger rank: rows of zeros below A, columns of zeros right of B."""
        more = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros((more, *self.A.shape[1:]))])
        B = torch.cat([self.B, self.B.new_zeros((self.B.shape[0], more, *self.B.shape[2:]))], dim=1)
        return Pair(A, B)

    def truncated(self, rank: int) -> Pair:
        """The inverse of :meth:`padded`."""
        return Pair(self.A[:rank], self.B[:, :rank])


def to_peft(facts: Facts, lora_A: Tensor, lora_B: Tensor) -> Pair:
    """loralib's tensors of one layer -> PEFT's pair."""
    if facts["class"] == "MergedLinear":
        return Pair(lora_A, _block_diagonal(facts, lora_B))
    if facts["class"] == "Conv2d":
        rows, columns = lora_A.shape  # r n, in n
        n = rows // facts["r"]
        A = torch.block_diag(*[lora_A] * n).view(n * rows, columns // n, n, n)
        return Pair(A, lora_B.reshape(-1, n * rows, 1, 1))
    return Pair(lora_A, lora_B)


def from_peft(facts: Facts, pair: Pair) -> tuple[Tensor, Tensor]:
    """PEFT's pair of a layer that :func:`to_peft` wrote (its padding may still be there) -> loralib's tensors."""
    r = facts["r"]
    if facts["class"] == "MergedLinear":
        pair = pair.truncated(r * sum(facts["enable_lora"]))
        blocks = [pair.B[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(_spans(facts))]
        return pair.A, torch.cat(blocks)
    if facts["class"] == "Conv2d":
        n = pair.A.shape[-1]
        rows, columns = r * n, pair.A.shape[1] * n
        A, B = pair.truncated(n * rows)
        return A.reshape(n * rows, n * columns)[:rows, :columns], B.reshape(-1, rows)
    pair = pair.truncated(r)
    return pair.A, pair.B


def conv_from_peft(pair: Pair) -> tuple[Tensor, Tensor]:
    """Any pair of PEFT's for a Conv2d, A (r, in, n, n) and B (out, r, 1, 1), -> loralib's tensors at the same rank."""
    r, channels, n, _ = pair.A.shape
    return pair.A.reshape(r * n, channels * n), torch.kron(pair.B[:, :, 0, 0], torch.eye(n))


def layer_pairs(
    path: str, facts: Facts, segments: Mapping[str, int] | None, lora_A: Tensor, lora_B: Tensor
) -> dict[str, Pair]:
    """One layer's tensors -> path -> pair of each module that it is in PEFT's file.

    Args:
        segments: name -> width: as the separate modules that a fused layer stands for; None: as the one module it is.
            A plain ``Linear`` on a fused matrix acts on all segments through one A: each gets a copy.
    """
    if segments is None:
        return {path: to_peft(facts, lora_A, lora_B)}
    names = _separate(path, facts, segments)
    widths = [segments[name] for name in names.values()]
    merged = facts["class"] == "MergedLinear"
    As = lora_A.split(facts["r"]) if merged else [lora_A] * len(names)
    return {at: Pair(A, B) for at, A, B in zip(names, As, lora_B.split(widths), strict=True)}


def layer_tensors(
    path: str, facts: Facts, segments: Mapping[str, int] | None, pairs: Mapping[str, Pair]
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`layer_pairs`; padding is cut off."""
    if segments is None:
        return from_peft(facts, pairs[path])
    parts = [pairs[at].truncated(facts["r"]) for at in _separate(path, facts, segments)]
    A = torch.cat([pair.A for pair in parts]) if facts["class"] == "MergedLinear" else parts[0].A
    return A, torch.cat([pair.B for pair in parts])


def _separate(path: str, facts: Facts, segments: Mapping[str, int]) -> dict[str, str]:
    """Path of each adapted segment as a module of its own -> its name."""
    parent = path[: path.rfind(".") + 1]
    enabled = facts["enable_lora"] if facts["class"] == "MergedLinear" else [True] * len(segments)
    return {parent + name: name for name, on in zip(segments, enabled, strict=True) if on}


def _spans(facts: Facts) -> list[tuple[int, int]]:
    """Output rows of the enabled segments, in order."""
    spans, start = [], 0
    for width, enabled in zip(facts["segments"], facts["enable_lora"], strict=True):
        if enabled:
            spans.append((start, start + width))
        start += width
    return spans


def _block_diagonal(facts: Facts, lora_B: Tensor) -> Tensor:
    """(sum of enabled widths, r) -> (out, k r)."""
    r, spans = facts["r"], _spans(facts)
    B = lora_B.new_zeros(sum(facts["segments"]), r * len(spans))
    blocks = lora_B.split([stop - start for start, stop in spans])
    for i, ((start, stop), block) in enumerate(zip(spans, blocks, strict=True)):
        B[start:stop, i * r : (i + 1) * r] = block
    return B
