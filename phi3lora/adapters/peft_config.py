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
from typing import Any

from ..config import LoraConfig
from ..errors import AdapterError
from ..foreign_names import INERT_LORA, SWITCHED_OFF
from ..values import is_count, is_number, read_json, same, shown

CONFIG_NAME = "adapter_config.json"

# Whatever they say, the tensors' names decide.
_NAMES_DECIDE = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
_READ = {"alpha_pattern", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "task_type", "use_rslora"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    **SWITCHED_OFF,
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
        raise AdapterError(f"{str(path)!r}: peft_type={shown(found.get('peft_type'))}; allowed: 'LORA'")
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
        if not any(same(value, allowed) and type(value) is type(allowed) for allowed in _ALLOWED[name]):
            why = f" ({_WHY[name]})" if name in _WHY else ""
            allowed = ", ".join(map(repr, _ALLOWED[name]))
            raise AdapterError(f"{str(path)!r}: {name}={shown(value)} cannot be imported{why}; allowed: {allowed}")
    elif name not in INERT_LORA and value:
        raise AdapterError(
            f"{str(path)!r}: unknown setting {shown(name)[1:-1]}={shown(value)}; take it out of the file if it does "
            f"not change what the adapter computes"
        )


def _check_patterns(path: Path, config: PeftConfig) -> None:
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        whole = name == "rank_pattern"
        allowed = "a dict of regular expressions to " + ("whole numbers >= 1" if whole else "numbers > 0")
        if not isinstance(pattern, dict):
            raise AdapterError(f"{str(path)!r}: {name}={shown(pattern)}; allowed: {allowed}")
        for key, value in pattern.items():
            allows = is_count(value, 1) if whole else is_number(value) and value > 0
            try:
                re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise AdapterError(f"{str(path)!r}: {name}: {key!r} is no regular expression ({error})") from error
            if not allows:
                raise AdapterError(f"{str(path)!r}: {name}: {key!r}: {shown(value)}; allowed: {allowed}")


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
