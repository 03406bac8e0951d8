"""Set-up before the first step: validate the run, resolve its settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..data.batches import BatchPlan, StepSchedule
from ..data.dataset import ChatDataset, ChatStream
from ..display import shown_path
from ..errors import TrainingError
from ..inference.evaluation import METRICS, ROUGE, check_documents, rouge_scorer
from ..lora.base_weight import base_format, count_parameters
from ..lora.inject import lora_layers
from ..model.activations import activation_checkpointing
from ..model.attention import attention_in_words, use_packed_attention
from ..model.backend import Backend, choose_backend, use_backend
from ..model.estimate import MemoryPlan, plan_memory
from ..model.forward import require_causal_lm, train_mode
from ..model.load import longrope_boundary, longrope_note, model_device
from ..model.sharding import shardable_tensors, sharded, sharded_base
from .best import metric_name, scores_rouge
from .checkpoint import TrainingState
from .distributed import World
from .optim import optimizer_bytes, schedule, warmup_steps
from .step import Precision, resolve_precision
from .trackers import check_trackers

logger = logging.getLogger("phi3lora")


# --- Validation


def check_run(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    eval_dataset: ChatDataset | None,
    config: TrainingConfig,
    tokenizer: Any = None,
    compute_metrics: Any = None,
) -> None:
    """Raise if the run cannot succeed: nothing to train, something else trainable, data that does not fit the model.

    Raises:
        TrainingError: the model, the settings or the environment.
        DataError: the datasets.
    """
    layers = lora_layers(model)
    if not layers:
        raise TrainingError("the model has no adapters to train; call inject_lora(model, LoraConfig(...)) first")
    if not any(layer.enabled for layer in layers.values()):
        raise TrainingError(
            "the adapters are off inside a disabled(model) or merged(model) block; leave the block first"
        )
    require_causal_lm(model)
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name, p in trainable.items() if id(p) not in adapters and not name.endswith("bias")]
    if others or not trainable:
        raise TrainingError(
            f"only adapters may be trainable, but {', '.join(others[:3]) or 'nothing'} is; "
            f"inject_lora freezes the rest, or call mark_only_lora_as_trainable(model)"
        )
    frozen_for_good = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if frozen_for_good is not None:
        raise TrainingError(
            f"{frozen_for_good} was made inside torch.inference_mode(), so that no gradient can pass through it; load "
            f"the model outside of it"
        )
    for name, parameter in trainable.items():
        if id(parameter) in adapters and parameter.dtype.itemsize < 4:
            raise TrainingError(
                f"{name} is {parameter.dtype}; adapters train in float32. Cast the base model before inject_lora, "
                f"not after"
            )
    if eval_dataset is None and (config.eval_strategy != "no" or config.eval_on_start):
        setting = "eval_on_start=True" if config.eval_on_start else f"eval_strategy={config.eval_strategy!r}"
        raise TrainingError(f"{setting} needs an eval_dataset")
    if eval_dataset is not None and not eval_dataset.known_length:
        raise TrainingError("eval_dataset is a stream, whose length is not known; pass stream.take(1000)")
    if not train_dataset.known_length and config.max_steps <= 0:
        raise TrainingError("train_dataset is a stream, whose length is not known; set max_steps to a number > 0")
    known = (*METRICS, *ROUGE)
    if compute_metrics is None and metric_name(config) not in known:
        allowed = f"{', '.join(known)}, or one that train(..., compute_metrics=...) returns"
        raise TrainingError(f"metric_for_best_model={config.metric_for_best_model!r}; allowed: {allowed}")
    if scores_rouge(config):
        rouge_scorer()  # raises if its package is missing
    if scores_rouge(config) or compute_metrics is not None:
        missing = "an eval_dataset" if eval_dataset is None else "a tokenizer" if tokenizer is None else None
        if missing:
            raise TrainingError(f"predict_with_generate, ROUGE and compute_metrics need {missing}")
    schedule(config, max(config.max_steps, 1))  # raises for arguments that it does not take
    check_trackers(config)
    check_split(model, config)
    check_documents(model, train_dataset.first_window, "train_dataset", config.max_length)
    if eval_dataset is not None:
        check_documents(model, eval_dataset, "eval_dataset", None)


def check_split(model: Any, config: TrainingConfig) -> None:
    """Raise if the frozen weights cannot be split over the processes, where they are to be."""
    if config.parallel == "ddp" and sharded_base(model) is not None:
        raise TrainingError(
            "parallel='ddp', but the model was loaded with parallel='fsdp'; allowed: 'fsdp', 'auto', or another load"
        )
    if base_parts(model, config) == 1:
        return
    if config.compile:
        raise TrainingError("compile=True with parallel='fsdp'; allowed: None, False (gathering cannot be compiled)")
    if sharded_base(model) is None:
        for layer in model.get_decoder().layers:
            shardable_tensors(layer)


def base_parts(model: Any, config: TrainingConfig) -> int:
    """Return the number of processes over which a run splits the frozen weights; 1: each has them all."""
    split = sharded_base(model)
    if split is not None:
        return split.size
    return World.current().size if config.parallel == "fsdp" else 1


# --- Resolved settings


@dataclass(frozen=True)
class Resolved:
    """Settings of a run that follow from model, data and config together."""

    precision: Precision
    """Dtype of the forward."""
    backend: Backend
    """How the decoder layers are computed, and why."""
    steps: StepSchedule
    """Order of documents, rows, batches and steps."""
    memory: MemoryPlan
    """Predicted peak memory by activation checkpointing mode."""
    checkpointing: str
    """Activation checkpointing mode, ``"auto"`` resolved."""
    world: World
    """The processes that train together."""


def resolve(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    config: TrainingConfig,
    world: World | None = None,
    cache_tokens: int = 0,
) -> Resolved:
    """Resolve every setting that the config leaves open.

    Args:
        model, train_dataset, config: those of ``train``.
        world: the processes; None: those that torchrun describes.
        cache_tokens: what :func:`answer_cache_tokens` returns.
    """
    world = world or World.current()
    precision = resolve_precision(config, model, model_device(model))
    backend = resolve_backend(model, config, precision)
    steps = resolve_plans(model, train_dataset, config, backend, world)
    memory = plan_step_memory(model, train_dataset, config, backend, precision, cache_tokens=cache_tokens)
    return Resolved(precision, backend, steps, memory, checkpointing_mode(config, memory, backend), world)


@contextmanager
def prepared(model: nn.Module, checkpointing: str, backend: Backend, parts: int = 1) -> Iterator[None]:
    """Prepare a model to train for the block. This is the one place that fixes the order.

    The user has quantised the base and injected the adapters before. Here the base is split over ``parts`` processes;
    then the layers are told what to recompute, and then how to compute: the fused and the compiled layers read the
    switches before.
    """
    split = sharded(model) if parts > 1 else nullcontext()
    with split, train_mode(model), activation_checkpointing(model, checkpointing), use_backend(model, backend):
        yield


def resolve_backend(model: nn.Module, config: TrainingConfig, precision: Precision) -> Backend:
    """Choose how the decoder layers of a run are computed."""
    with precision.autocast():
        offload = config.activation_checkpointing == "offload"
        return choose_backend(model, compile=config.compile, offload=offload, training=True)


def plan_step_memory(
    model: nn.Module,
    dataset: ChatDataset | ChatStream,
    config: TrainingConfig,
    backend: Backend,
    precision: Precision,
    base_precision: str | None = None,
    cache_tokens: int = 0,
) -> MemoryPlan:
    """Predict the peak memory of a run, with the base in another precision if one is given.

    It is that of the largest micro-batch, or that of an evaluation with ``cache_tokens``.
    """
    limit = config.max_length or dataset.max_length
    width = limit if config.packing else min(limit, dataset.max_document_tokens)
    tokens = config.per_device_train_batch_size * width
    with precision.autocast():
        parts = base_parts(model, config)
        optimizer = optimizer_bytes(config.optim)
        return plan_memory(model, tokens, backend.kind, optimizer, base_precision, parts, cache_tokens)


def answer_cache_tokens(config: TrainingConfig, eval_dataset: ChatDataset | None, compute_metrics: Any = None) -> int:
    """Return the tokens, of all rows together, that the answers of an evaluation hold keys and values of; 0: none."""
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if eval_dataset is None or not evaluates or not (scores_rouge(config) or compute_metrics is not None):
        return 0
    chats = min(len(eval_dataset), config.eval_max_samples or len(eval_dataset))
    tokens: int = eval_dataset.max_document_tokens + config.eval_max_new_tokens
    return min(config.per_device_eval_batch_size, chats) * tokens


def checkpointing_mode(config: TrainingConfig, memory: MemoryPlan, backend: Backend) -> str:
    """Return the configured activation checkpointing mode; ``"auto"`` becomes the fastest one that fits."""
    mode = str(config.activation_checkpointing)
    if mode == "auto":
        mode = memory.fastest_that_fits()
        if mode == "offload" and backend.kind == "compiled":
            mode = "full"
    return mode


def resolve_plans(
    model: nn.Module,
    train_dataset: ChatDataset | ChatStream,
    config: TrainingConfig,
    backend: Backend,
    world: World | None = None,
) -> StepSchedule:
    """Return the order of documents, rows, batches and steps, and the share of one process among several."""
    world = world or World()
    plan = BatchPlan(
        train_dataset.first_window,
        batch_size=config.per_device_train_batch_size,
        max_length=config.max_length or train_dataset.max_length,
        packing=config.packing,
        seed=config.seed if config.data_seed is None else config.data_seed,
        boundary=longrope_boundary(model.config),
        fixed_shape=config.packing and backend.kind == "compiled",
    )
    check = partial(check_documents, model, name="train_dataset", row_length=config.max_length)
    return StepSchedule(plan, config, train_dataset, check, world.rank, world.size, world.share)


def banner_facts(
    model: nn.Module, config: TrainingConfig, resolved: Resolved, state: TrainingState, eval_dataset: ChatDataset | None
) -> dict[str, Any]:
    """Return the lines of the banner: name -> every value that was resolved or inherited."""
    use_packed_attention(model)
    steps, memory = resolved.steps, resolved.memory
    model_config: Any = model.config
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base, parts = base_format(model), base_parts(model, config)
    split = f", base split over {parts} processes" if parts > 1 else ""
    rows = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} rows"
    if resolved.world.size > 1:
        rows += f" in each of {resolved.world.size} processes"
    width = f"packed to {steps.plan.max_length} tokens" if steps.plan.packing else "one document each, padded"
    warmup = warmup_steps(config, steps.total)
    lora_plus = "" if config.lora_plus_lr_ratio is None else f" (LoRA+: B times {config.lora_plus_lr_ratio:g})"
    peaks = f"; predicted peak by mode: {memory}" if memory.available_gib is not None else ""
    defaults, off = config.not_given()
    lora_config = getattr(model, "lora_config", None)
    facts = {
        "model": f"{type(model).__name__}, {count_parameters(model):,} parameters, {trainable:,} trainable "
        f"in {len(lora_layers(model))} layers" + (f", base in {base}" if base else "") + split,
        "device": f"{model_device(model)}, {resolved.precision.name}, "
        f"attention {attention_in_words(model, resolved.backend.kind == 'fused')}, layers {resolved.backend}",
        "memory": f"activation checkpointing {resolved.checkpointing}{peaks}",
        "train data": steps.dataset.summary(),
        "eval data": None if eval_dataset is None else eval_dataset.summary(),
        "step": f"{rows}, {width}",
        "steps": f"{steps.total:,} ({state.global_step:,} done)",
        "optimizer": f"{config.optim}, {config.lr_scheduler_type} from {config.learning_rate:g}{lora_plus}, "
        f"{warmup} warm-up steps, weight decay {config.weight_decay:g}, gradient clipped to {config.max_grad_norm:g}",
        "seed": f"{config.seed} (data {steps.plan.seed})",
        "output": shown_path(config.output_dir),
        "defaults": defaults or None,
        "LoRA defaults": (lora_config.not_given()[0] or None) if lora_config is not None else None,
        "default: off": off or None,
        "without effect": ", ".join(config.inert) or None,
        "longrope": longrope_note(model_config) if steps.plan.boundary else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


# --- The caller's torch


@contextmanager
def usual_torch() -> Iterator[None]:
    """Undo, inside the block, what an earlier cell may have set: gradients off, a default device, a default dtype."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # only then: it costs a little in every call
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


# --- Out of memory


@contextmanager
def explain_out_of_memory(model: nn.Module, config: TrainingConfig, resolved: Resolved) -> Iterator[None]:
    """Turn torch's out-of-memory error inside the block into a TrainingError that lists the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        world = resolved.world
        request = f"rank {world.rank} of {world.size}: " if world.size > 1 else ""
        request += str(error).partition("\n")[0]
        mode, rows = resolved.checkpointing, config.per_device_train_batch_size
        ways = []
        if mode in ("none", "selective"):
            ways.append('activation_checkpointing="full" (or "auto")')
        if mode != "offload":
            ways.append('activation_checkpointing="offload"')
        if rows > 1:
            steps = config.gradient_accumulation_steps * rows // (rows // 2)
            ways.append(f"per_device_train_batch_size={rows // 2}, gradient_accumulation_steps={steps} (the same step)")
        if world.size > 1 and base_parts(model, config) == 1:
            ways.append('parallel="fsdp"')
        ways += ["a shorter max_length", 'load_model(..., base_precision="nf4")']
        raise TrainingError(
            f"{request} Predicted peak by mode: {resolved.memory}. This run has activation_checkpointing={mode!r} and "
            f"micro-batches of {rows} rows. Ways out: {'; '.join(ways)}"
        ) from error
