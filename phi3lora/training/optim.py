"""Parameter groups, optimizers, and transformers' learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..display import quiet_libraries
from ..errors import TrainingError, install_hint, short_repr
from ..lora.inject import lora_layers
from ..lora.layers import Embedding

logger = logging.getLogger("phi3lora")

_DEFAULT_WARMUP = 0.05
_SET_BY_US = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

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
    """Refuse moments that are missing or have another shape: the next step would fail, or write past their end."""
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
    """Return the steps of warm-up: ``warmup_steps``, or a share of all steps rounded up; by default 5 %, rounded down.

    A warm-up of one step is a step at rate 0, so a run of fewer than 20 steps has none by default.
    """
    if config.lr_scheduler_type == "constant":
        return 0
    if config.warmup_steps is None or config.warmup_ratio is None:
        return int(total_steps * _DEFAULT_WARMUP)
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil(total_steps * (config.warmup_steps or config.warmup_ratio))


Schedule = Callable[[int], float]
"""Optimizer steps done -> learning rate of the next one."""


def schedule(config: TrainingConfig, total_steps: int) -> Schedule:
    """Return the learning rate as a function of the step alone, so that a resumed run needs no state of it.

    The function is the ``lr_lambda`` of transformers' scheduler of that name, times the peak learning rate.

    Raises:
        TrainingError: ``lr_scheduler_kwargs`` that the schedule does not take, or lacks.

    Example:
        >>> config = TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2)
        >>> [schedule(config, 6)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    kind, peak, given = config.lr_scheduler_type, config.learning_rate, dict(config.lr_scheduler_kwargs or {})
    if peak == 0:
        return lambda step: 0.0
    warmup = warmup_steps(config, total_steps)
    if not given and (usual := _usual_factor(kind, warmup, total_steps)) is not None:
        return lambda step: peak * usual(step)
    with quiet_libraries():  # it imports peft and bitsandbytes, where they are installed
        from transformers import optimization
    functions: dict[Any, Any] = optimization.TYPE_TO_SCHEDULER_FUNCTION
    parameters = inspect.signature(functions[kind]).parameters
    own = [name for name in parameters if name not in _SET_BY_US]
    required = [name for name in own if parameters[name].default is inspect.Parameter.empty]
    # It reads the peak from the optimizer, for a smallest rate that is not a share of it.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    try:
        if wrong := [name for name in given if name not in own] or [name for name in required if name not in given]:
            raise ValueError(f"{wrong[0]} is {'not known' if wrong[0] in given else 'missing'}")
        with warnings.catch_warnings():  # about num_stable_steps, since get_scheduler passes the total on, too
            warnings.simplefilter("ignore", UserWarning)
            scheduler: Any = optimization.get_scheduler(kind, stand_in, warmup, total_steps, given)
        factor = scheduler.lr_lambdas[0]
        for step in (0, warmup, (warmup + total_steps) // 2, total_steps - 1):  # each part of the schedule fails alone
            factor(step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise TrainingError(
            f"lr_scheduler_type={kind!r} with lr_scheduler_kwargs={short_repr(given)}: {error}; allowed: "
            f"{', '.join(name + ' (required)' * (name in required) for name in own) or 'no arguments'}"
        ) from error
    return lambda step: peak * factor(step)


def _usual_factor(kind: str, warmup: int, total_steps: int) -> Callable[[int], float] | None:
    """Return step -> share of the peak rate for the four commonest schedules; None for others.

    transformers computes the same numbers, but importing its schedules takes seconds where peft and bitsandbytes are
    installed.
    """
    decay_steps = max(1, total_steps - warmup)
    after_warmup: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, (total_steps - step) / decay_steps),
        "cosine": lambda step: max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / decay_steps)))),
    }
    if kind not in after_warmup:
        return None
    return lambda step: step / warmup if step < warmup else after_warmup[kind](step)
