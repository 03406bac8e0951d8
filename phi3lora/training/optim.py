"""Parameter groups, optimizers, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..errors import TrainingError, install_hint
from ..lora.inject import lora_layers
from ..lora.layers import Embedding

logger = logging.getLogger("phi3lora")

LORA_PLUS_EMBEDDING_RATE = 1e-6
"""Peak learning rate of an adapted embedding under LoRA+, whatever ``learning_rate`` is; PEFT's default."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: LoRA matrices with weight decay, biases without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def lora_plus_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of LoRA+ (https://arxiv.org/abs/2402.12354), where B learns faster than A.

    A group's rate is the learning rate times its ``lr_factor``::

        A                             1
        B, and trained biases         lora_plus_lr_ratio (biases without weight decay)
        A and B of an embedding       LORA_PLUS_EMBEDDING_RATE / learning_rate

    These are the groups of PEFT's ``create_loraplus_optimizer``. Empty groups are left out.
    """
    ratio, decay = config.lora_plus_lr_ratio, config.weight_decay
    assert ratio is not None
    layers = lora_layers(model).values()
    fast = {id(layer.lora_B) for layer in layers}
    embeddings = {id(p) for layer in layers if isinstance(layer, Embedding) for p in (layer.lora_A, layer.lora_B)}
    parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "bias": [], "embedding": []}
    for p in model.parameters():
        if p.requires_grad:
            kind = "bias" if p.ndim <= 1 else "embedding" if id(p) in embeddings else "B" if id(p) in fast else "A"
            parts[kind].append(p)
    embedding_factor = LORA_PLUS_EMBEDDING_RATE / config.learning_rate if config.learning_rate else 0.0
    settings = {"A": (1.0, decay), "B": (ratio, decay), "bias": (ratio, 0.0), "embedding": (embedding_factor, decay)}
    return [
        {"params": parts[kind], "lr_factor": factor, "lr": config.learning_rate * factor, "weight_decay": weight_decay}
        for kind, (factor, weight_decay) in settings.items()
        if parts[kind]
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to ``rate`` times its ``lr_factor``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the AdamW or SGD that ``config.optim`` names.

    torch's are fused: one kernel for all parameters. The 8-bit ones (https://arxiv.org/abs/2110.02861) and the paged
    ones (https://arxiv.org/abs/2305.14314, section 3: the driver moves moments to the host when the GPU is full) are
    bitsandbytes' own, and wait for the GPU in every step. Paging needs a CUDA GPU: elsewhere the 8-bit one is not
    paged, and ``paged_adamw_32bit`` is torch's AdamW, which computes the same.

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
        from bitsandbytes import optim
    except ImportError as error:
        raise TrainingError(f"optim={config.optim!r} needs bitsandbytes: {install_hint('qlora')}") from error
    if in_8_bits:
        kind: Any = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    else:
        kind = optim.PagedAdamW32bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


def convert_optimizer_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Convert, in place, the saved moments of torch's AdamW for bitsandbytes' 32-bit one, or the other way round.

    ``paged_adamw_32bit`` is bitsandbytes' on a CUDA GPU and torch's elsewhere; version 0.1.0 used torch's on both.
    """
    names = {"exp_avg": "state1", "exp_avg_sq": "state2"}  # torch's -> bitsandbytes'
    to_torch = isinstance(optimizer, torch.optim.AdamW)
    if to_torch:
        names = {new: old for old, new in names.items()}
    others = [state for state in saved["state"].values() if names.keys() <= state.keys()]
    for state in others:
        for old, new in names.items():
            state[new] = state.pop(old)
        state["step"] = torch.tensor(float(state["step"])) if to_torch else int(state["step"])
    if others:
        saved["param_groups"] = optimizer.state_dict()["param_groups"]


def check_optimizer_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments that are missing or have another shape: the next step would fail, or write past their end.

    Raises:
        ValueError: a moment is missing or has another shape than its parameter.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    for index, state in saved["state"].items():
        moment = parameters[index].shape
        shapes = {"exp_avg": moment, "exp_avg_sq": moment, "step": torch.Size()}
        for name, shape in (shapes if is_torch else {"state1": moment, "state2": moment}).items():
            found = getattr(state.get(name), "shape", None)
            if found != shape:
                raise ValueError(f"{name} of parameter {index} is {found and tuple(found)}; allowed: {tuple(shape)}")


def optimizer_bytes(optim: str) -> float:
    """Return the bytes of optimizer state for each trainable number.

    AdamW keeps two moments of 4 bytes each, or of 1 byte with a float32 scale for each 256 of them.
    """
    if optim == "sgd":
        return 0.0
    return 2 * (1 + 4 / 256) if "8bit" in optim else 8.0


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Return the warm-up in steps: ``warmup_steps``, or a share of all steps rounded up."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil(total_steps * (config.warmup_steps or config.warmup_ratio))


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of the update after ``step`` earlier ones, as transformers' schedule of the same name.

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
