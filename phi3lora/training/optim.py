"""Parameter groups, optimizers, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..errors import TrainingError, is_number
from ..lora.inject import lora_layers
from ..lora.layers import Embedding

logger = logging.getLogger("phi3lora")

LORA_PLUS_EMBEDDING_RATE = 1e-6
"""The peak learning rate of an adapted embedding under LoRA+, whatever the others' is; PEFT's default."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: LoRA matrices with decay, biases without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def lora_plus_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """LoRA+ (https://arxiv.org/abs/2402.12354): B learns faster than A; ``lr_factor`` says how much of the rate.

        A       1
        B       lora_plus_lr_ratio; trained biases too, without decay
        A and B of an adapted embedding: LORA_PLUS_EMBEDDING_RATE instead of the learning rate

    The groups of PEFT's ``create_loraplus_optimizer``. Groups that would be empty are left out.
    """
    ratio, decay = config.lora_plus_lr_ratio, config.weight_decay
    assert ratio is not None
    layers = lora_layers(model).values()
    faster = {id(layer.lora_B) for layer in layers}
    embeddings = {id(p) for layer in layers if isinstance(layer, Embedding) for p in (layer.lora_A, layer.lora_B)}
    parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "bias": [], "embedding": []}
    for p in model.parameters():
        if p.requires_grad:
            kind = "bias" if p.ndim <= 1 else "embedding" if id(p) in embeddings else "B" if id(p) in faster else "A"
            parts[kind].append(p)
    of_embeddings = LORA_PLUS_EMBEDDING_RATE / config.learning_rate if config.learning_rate else 0.0
    settings = {"A": (1.0, decay), "B": (ratio, decay), "bias": (ratio, 0.0), "embedding": (of_embeddings, decay)}
    return [
        {"params": parts[kind], "lr_factor": factor, "lr": config.learning_rate * factor, "weight_decay": weight_decay}
        for kind, (factor, weight_decay) in settings.items()
        if parts[kind]
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """``rate``, in each group times its ``lr_factor`` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; each takes ``found_inf``, which calls a step off on the device.

    torch's are fused: one kernel. ``adamw_bnb_8bit`` and the paged ones need bitsandbytes (training/bnb_adamw.py).
    Where there is no CUDA GPU nothing is paged, and 32-bit paged AdamW is torch's, which computes the same.

    Raises:
        TrainingError: bitsandbytes is needed and not installed.
    """
    if config.lora_plus_lr_ratio is None:
        groups = parameter_groups(model, config.weight_decay)
    else:
        groups = lora_plus_groups(model, config)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    betas = (config.adam_beta1, config.adam_beta2)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
    in_8_bits, paged = "8bit" in config.optim, config.optim.startswith("paged")
    if paged and any(p.device.type != "cuda" for group in groups for p in group["params"]):
        paged, used = False, "8-bit AdamW without pages" if in_8_bits else "torch's AdamW"
        logger.warning("paged AdamW needs a CUDA GPU: using %s", used)
    if not (in_8_bits or paged):
        return torch.optim.AdamW(groups, **settings, fused=True)
    try:
        from . import bnb_adamw
    except ModuleNotFoundError as error:
        raise TrainingError(f"optim={config.optim!r} needs bitsandbytes: pip install 'phi3lora[qlora]'") from error
    if in_8_bits:
        return bnb_adamw.AdamW8bit(groups, paged, **settings)
    return bnb_adamw.PagedAdamW(groups, **settings, fused=True)


def check_optimizer_state(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what is not of the form of this optimizer's ``state_dict``: torch loads anything, and fails in a step.

    Switches that a torch before had not are put in as this optimizer has them.

    Raises:
        ValueError: other parameters or settings, moments of another shape or with NaN in them.
        LookupError, TypeError, AttributeError: it is no such dict at all.
    """
    own = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) != len(own):
        raise ValueError(f"{len(saved['param_groups'])} groups of parameters, the run has {len(own)}")
    for group, mine in zip(saved["param_groups"], own, strict=True):
        for name, value in mine.items():
            if value is None or isinstance(value, bool):
                group.setdefault(name, value)
        wrong = [name for name in mine if name not in group or not _alike(group[name], mine[name])]
        if wrong or group["params"] != mine["params"]:
            raise ValueError(f"a group of parameters with another {(wrong or ['list of them'])[0]}")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for i, state in saved["state"].items():
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        bad = [name for name, value in tensors.items() if not torch.isfinite(value.float()).all()]
        if isinstance(optimizer, torch.optim.AdamW):
            shapes = {"step": torch.Size(), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
            found = {name: value.shape for name, value in tensors.items() if value.is_floating_point()}
            bad += [name for name in shapes if found.get(name) != shapes[name]]
        if i not in parameters or bad:
            raise ValueError(f"the state of parameter {i} has no usable {(bad or ['place'])[0]}")


def _alike(saved: Any, own: Any) -> bool:
    """Whether a setting has the form of another: both numbers, both pairs of them, or the same."""
    if isinstance(own, tuple):
        return isinstance(saved, tuple) and len(saved) == len(own) and all(map(_alike, saved, own))
    if is_number(own):
        return is_number(saved)
    return isinstance(saved, list) if isinstance(own, list) else saved is own


def optimizer_bytes(optim: str) -> float:
    """Of state, for each number that trains: two moments, in 8 bits with a float32 scale for each 256 of them."""
    if optim == "sgd":
        return 0.0
    return 2 * (1 + 4 / 256) if "8bit" in optim else 8.0


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Warm-up in steps: ``warmup_steps``, or its share or ``warmup_ratio`` of all steps, rounded up."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil(total_steps * (config.warmup_steps or config.warmup_ratio))


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The learning rate of the update after ``step`` earlier ones; as transformers' schedules of the same names.

    Example:
        >>> config = TrainingConfig(learning_rate=1.0, warmup_steps=2)
        >>> [learning_rate(config, step, 6) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    kind, peak = config.lr_scheduler_type, config.learning_rate
    if kind == "constant":
        return peak
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * step / warmup
    if kind == "constant_with_warmup":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
