"""mlx-lm's adapter folders: ``adapters.safetensors``, and an ``adapter_config.json`` of its own.

A module computes y += scale * (x a) b, with a (in, rank) and b (rank, out): PEFT's A and B transposed, and an alpha of
scale * rank. Embeddings have a (num, rank) and b (rank, dim), which transpose to PEFT's in the same way. The config is
that of the training run; ``fine_tune_type`` and ``lora_parameters`` alone say what the tensors mean.
https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/tuner/lora.py

Versions before 0.14.2 (June 2024) had an alpha too, and multiplied by scale * alpha / rank. Later ones ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import LoraConfig
from ..errors import is_int, is_number, short_repr
from ..files import read_json, read_tensors
from .peft_format import CONFIG_NAME, PeftConfig

MLX_TENSORS_NAME = "adapters.safetensors"


def is_mlx_folder(folder: Path) -> bool:
    """Return whether mlx-lm wrote a folder: its tensors are there, or its config is."""
    try:
        config = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return (folder / MLX_TENSORS_NAME).is_file()
    is_mlx = (folder / MLX_TENSORS_NAME).is_file() or "lora_parameters" in config
    return is_mlx and "peft_type" not in config


def read_mlx_folder(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the settings, and the tensors under PEFT's names.

    Raises:
        ValueError: files that cannot be read, another method than LoRA, settings or tensors that do not fit.
    """
    try:
        found = read_json(folder / CONFIG_NAME)
        kind = found.get("fine_tune_type", "lora")
        parameters = found.get("lora_parameters")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{CONFIG_NAME} is not a readable mlx-lm config: {error}") from error
    if kind != "lora":
        raise ValueError(f"{CONFIG_NAME}: fine_tune_type={short_repr(kind)} of mlx-lm; allowed: 'lora'")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{CONFIG_NAME}: lora_parameters={short_repr(parameters)}; allowed: mlx-lm's rank and scale")
    values: list[Any] = [parameters.get(name) for name in ("rank", "scale", "dropout")]
    rank, scale, dropout = values
    if not is_int(rank, 1) or not is_number(scale):
        raise ValueError(
            f"{CONFIG_NAME}: lora_parameters has rank {short_repr(rank)} and scale {short_repr(scale)}; allowed: a "
            f"positive int and a number"
        )
    if parameters.get("alpha") is not None:
        _check_alpha(found, parameters)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout or 0.0, target_modules=["any"])
    if not (folder / MLX_TENSORS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*adapters.*"))
        held = f"; it holds {', '.join(others)}: give one of them, in safetensors, that name" if others else ""
        raise ValueError(f"it has mlx-lm's {CONFIG_NAME} and no {MLX_TENSORS_NAME}{held}")
    try:
        tensors, _ = read_tensors(folder / MLX_TENSORS_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{MLX_TENSORS_NAME} is not a readable safetensors: {error}") from error
    renamed = {}
    for name, tensor in tensors.items():
        path, _, side = name.rpartition(".")
        if side not in ("lora_a", "lora_b") or tensor.dim() != 2:
            raise ValueError(
                f"{name!r} {tuple(tensor.shape)} in {MLX_TENSORS_NAME} cannot be imported; allowed: matrices called "
                f"*.lora_a and *.lora_b (DoRA's m and layers of experts have no counterpart here)"
            )
        renamed[f"{path}.lora_{side[-1].upper()}.weight"] = tensor.t().contiguous()
    return PeftConfig(config, [], []), renamed


def _check_alpha(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for an alpha that may or may not have scaled the adapter.

    Only versions that ignore an alpha, 0.19 and later, write ``fine_tune_type``.
    """
    rank, scale, alpha = (parameters[name] for name in ("rank", "scale", "alpha"))
    if alpha == rank or "fine_tune_type" in config:
        return
    if not is_number(alpha):
        raise ValueError(f"{CONFIG_NAME}: lora_parameters has alpha {short_repr(alpha)}; allowed: a number")
    raise ValueError(
        f"{CONFIG_NAME}: lora_parameters has alpha {alpha:g}: mlx-lm before 0.14.2 scaled the adapter by "
        f"scale * alpha / rank, {scale * alpha / rank:g}, and later versions by scale alone, {scale:g}; set "
        f"scale to your version's and remove alpha"
    )
