"""Set-up before the first step: ``PlannedRun`` resolves a run's settings, ``check_run`` validates it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..checks.spans import TrainedSpans, trained_spans
from ..config import TrainingConfig
from ..data.batches import BatchPlan, StepSchedule
from ..data.dataset import ChatDataset, ChatStream, require_dataset
from ..display import shown_path
from ..errors import ConfigError, DataError, TrainingError, counted, first_of, require
from ..inference.decoding import longest_answers
from ..inference.evaluation import METRICS, ROUGE, check_documents, rouge_scorer
from ..lora.base_weight import base_format, count_parameters, count_trainable
from ..lora.inject import adapter_matrices, lora_layers
from ..lora.wrappers import unwrap
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


class PlannedRun:
    """A run before it starts: the arguments of ``train``, and what follows from them together, resolved on first use.

    A property that cannot be resolved raises the ``Phi3LoRAError`` that ``train`` would.

    Args:
        model, train_dataset, config, eval_dataset, tokenizer, compute_metrics: the arguments of ``train``.
        device_memory_gib: memory of the card that memory is predicted for; None: the card that the model is on.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: ChatDataset | ChatStream,
        config: TrainingConfig,
        eval_dataset: ChatDataset | None = None,
        tokenizer: Any = None,
        compute_metrics: Any = None,
        device_memory_gib: float | None = None,
    ) -> None:
        require_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            require_dataset("eval_dataset", eval_dataset)
        require(isinstance(config, TrainingConfig), "config", config, "TrainingConfig(...) or None", ConfigError)
        self.model: Any = unwrap(model)
        self.train_dataset, self.dataset = train_dataset, train_dataset.first_window
        self.config, self.eval_dataset, self.tokenizer = config, eval_dataset, tokenizer
        self.compute_metrics, self.device_memory_gib = compute_metrics, device_memory_gib
        self.world = World.current()
        """The processes that train together."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def precision(self) -> Precision:
        """Dtype of the forward."""
        return resolve_precision(self.config, self.model, model_device(self.model))

    @cached_property
    def backend(self) -> Backend:
        """Way in which the decoder layers are computed, and why."""
        offload = self.config.activation_checkpointing == "offload"
        with self.precision.autocast():
            return choose_backend(self.model, compile=self.config.compile, offload=offload, training=True)

    @cached_property
    def steps(self) -> StepSchedule:
        """Order of documents, rows, batches and steps, and the share of one process among several."""
        self._require_documents()
        config, world = self.config, self.world
        plan = BatchPlan(
            self.dataset,
            batch_size=config.per_device_train_batch_size,
            max_length=config.max_length or self.train_dataset.max_length,
            packing=config.packing,
            seed=config.seed if config.data_seed is None else config.data_seed,
            boundary=longrope_boundary(self.model.config),
            fixed_shape=config.packing and self.backend.kind == "compiled",
        )
        check = partial(check_documents, self.model, name="train_dataset", row_length=config.max_length)
        return StepSchedule(plan, config, self.train_dataset, check, world.rank, world.size, world.share)

    @property
    def parts(self) -> int:
        """Number of processes over which the frozen weights are split; 1: each has them all."""
        split = sharded_base(self.model)
        if split is not None:
            return split.size
        return self.world.size if self.config.parallel == "fsdp" else 1

    @property
    def has_answers(self) -> bool:
        """True if the evaluations let the model answer."""
        return scores_rouge(self.config) or self.compute_metrics is not None

    @property
    def answer_cache_tokens(self) -> int:
        """Tokens, of all rows together, that the answers of an evaluation hold keys and values of; 0: no answers."""
        config, chats = self.config, self.eval_dataset
        evaluates = config.eval_strategy != "no" or config.eval_on_start
        if chats is None or not evaluates or not self.has_answers:
            return 0
        count = min(len(chats), config.eval_max_samples or len(chats))
        prompt = range(chats.max_document_tokens)
        (answer,) = longest_answers(self.model, [prompt], config.eval_max_new_tokens)
        return min(config.per_device_eval_batch_size, count) * (len(prompt) + answer)

    @cached_property
    def memory_backend(self) -> Backend:
        """Backend of the decoder layers on the card that memory is predicted for."""
        elsewhere = self.device_memory_gib is not None and model_device(self.model).type != "cuda"
        if elsewhere and self.config.compile is None and self.precision.name != "fp32":
            return Backend("fused")
        return self.backend

    @cached_property
    def memory(self) -> MemoryPlan:
        """Predicted peak memory by activation checkpointing mode."""
        return self.predict_memory()

    def predict_memory(self, base_precision: str | None = None) -> MemoryPlan:
        """Predict the peaks of the largest micro-batch and of an evaluation, with the base in another precision."""
        config, dataset = self.config, self.train_dataset
        limit = config.max_length or dataset.max_length
        width = limit if config.packing else min(limit, dataset.max_document_tokens)
        tokens, optimizer = config.per_device_train_batch_size * width, optimizer_bytes(config.optim)
        sizes = tokens, self.memory_backend.kind, optimizer, base_precision, self.parts, self.answer_cache_tokens
        with self.precision.autocast():
            plan = plan_memory(self.model, *sizes)
        return plan if self.device_memory_gib is None else replace(plan, available_gib=self.device_memory_gib)

    @cached_property
    def checkpointing(self) -> str:
        """Activation checkpointing mode; ``"auto"`` is resolved to the fastest one that fits."""
        mode = str(self.config.activation_checkpointing)
        if mode == "auto":
            mode = self.memory.fastest_that_fits()
            if mode == "offload" and self.memory_backend.kind == "compiled":
                mode = "full"
        return mode

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the dataset; of a stream, of its first window."""
        self._require_documents()
        return self.dataset.statistics()

    @cached_property
    def spans(self) -> TrainedSpans:
        """Spans of trained tokens."""
        self._require_documents()
        return trained_spans(self.dataset)

    def _require_documents(self) -> None:
        if len(self.dataset) == 0:
            raise DataError("the dataset is empty: it has no documents")


def interval(every: float, total_steps: int) -> int:
    """Return the steps from one log line, evaluation or checkpoint to the next; ``every`` may be a share."""
    return math.ceil(every * total_steps) if every < 1 else int(every)


# --- Validation


def check_run(run: PlannedRun) -> None:
    """Raise if the run cannot succeed: nothing to train, something else trainable, data that does not fit the model.

    Raises:
        TrainingError: the model, the settings or the environment.
        DataError: the datasets.
    """
    model, config, eval_dataset = run.model, run.config, run.eval_dataset
    layers = lora_layers(model)
    if not layers:
        raise TrainingError("the model has no adapters to train; call inject_lora(model, LoraConfig(...)) first")
    if not any(layer.enabled for layer in layers.values()):
        raise TrainingError(
            "the adapters are off inside a disabled(model) or merged(model) block; leave the block first"
        )
    require_causal_lm(model)
    adapters = set(map(id, adapter_matrices(model)))
    others = [name for name, p in run.trained.items() if id(p) not in adapters and not name.endswith("bias")]
    if others or not run.trained:
        raise TrainingError(
            f"only adapters may be trainable, but {first_of(others, 3) or 'nothing'} is; "
            f"inject_lora freezes the rest, or call mark_only_lora_as_trainable(model)"
        )
    frozen_for_good = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if frozen_for_good is not None:
        raise TrainingError(
            f"{frozen_for_good} was made inside torch.inference_mode(), so that no gradient can pass through it; load "
            f"the model outside of it"
        )
    for name, parameter in run.trained.items():
        if id(parameter) in adapters and parameter.dtype.itemsize < 4:
            raise TrainingError(
                f"{name} is {parameter.dtype}; adapters train in float32. Cast the base model before inject_lora, "
                f"not after"
            )
    check_config(config, eval_dataset is not None, run.compute_metrics is not None)
    if eval_dataset is not None and not eval_dataset.known_length:
        raise TrainingError("eval_dataset is a stream, whose length is not known; pass stream.take(1000)")
    if not run.train_dataset.known_length and config.max_steps <= 0:
        raise TrainingError("train_dataset is a stream, whose length is not known; set max_steps to a number > 0")
    if run.has_answers and run.tokenizer is None:
        raise TrainingError("predict_with_generate, ROUGE and compute_metrics need a tokenizer")
    _check_split(run)
    check_documents(model, run.dataset, "train_dataset", config.max_length)
    if eval_dataset is not None:
        check_documents(model, eval_dataset, "eval_dataset", None)


def check_config(config: TrainingConfig, has_eval_dataset: bool, has_compute_metrics: bool = False) -> None:
    """Raise a TrainingError for settings that cannot work, whatever the model and the data are."""
    if not has_eval_dataset and (config.eval_strategy != "no" or config.eval_on_start):
        setting = "eval_on_start=True" if config.eval_on_start else f"eval_strategy={config.eval_strategy!r}"
        raise TrainingError(f"{setting} needs an eval_dataset")
    known = (*METRICS, *ROUGE)
    if not has_compute_metrics and metric_name(config) not in known:
        allowed = f"{', '.join(known)}, or one that train(..., compute_metrics=...) returns"
        raise TrainingError(f"metric_for_best_model={config.metric_for_best_model!r}; allowed: {allowed}")
    if scores_rouge(config):
        rouge_scorer()  # raises if its package is missing
    if not has_eval_dataset and (scores_rouge(config) or has_compute_metrics):
        raise TrainingError("predict_with_generate, ROUGE and compute_metrics need an eval_dataset")
    schedule(config, max(config.max_steps, 1))  # raises for arguments that it does not take
    check_trackers(config)


def _check_split(run: PlannedRun) -> None:
    """Raise if the frozen weights cannot be split over the processes, where they are to be."""
    is_split = sharded_base(run.model) is not None
    if run.config.parallel == "ddp" and is_split:
        raise TrainingError(
            "parallel='ddp', but the model was loaded with parallel='fsdp'; allowed: 'fsdp', 'auto', or another load"
        )
    if run.parts > 1 and run.config.compile:
        raise TrainingError("compile=True with parallel='fsdp'; allowed: None, False (gathering cannot be compiled)")
    if run.parts > 1 and not is_split:
        for layer in run.model.get_decoder().layers:
            shardable_tensors(layer)


# --- The model of a run


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


# --- The banner


def banner_facts(run: PlannedRun, state: TrainingState, gradients: str | None = None) -> dict[str, Any]:
    """Return the lines of the banner: name -> every value that was resolved or inherited."""
    model, config, steps, memory = run.model, run.config, run.steps, run.memory
    use_packed_attention(model)
    base = base_format(model)
    split = f", base split over {run.parts} processes" if run.parts > 1 else ""
    rows = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} rows"
    if run.world.size > 1:
        rows += f" in each of {run.world.size} processes"
    width = f"packed to {steps.plan.max_length} tokens" if steps.plan.packing else "one document each, padded"
    warmup = warmup_steps(config, steps.total)
    lora_plus = "" if config.lora_plus_lr_ratio is None else f" (LoRA+: B times {config.lora_plus_lr_ratio:g})"
    peaks = f"; predicted peak by mode: {memory}" if memory.available_gib is not None else ""
    defaults, off = config.not_given()
    lora_config = getattr(model, "lora_config", None)
    facts = {
        "model": f"{type(model).__name__}, {count_parameters(model):,} parameters, {count_trainable(model):,} "
        f"trainable in {len(lora_layers(model))} layers" + (f", base in {base}" if base else "") + split,
        "device": f"{model_device(model)}, {run.precision.name}, "
        f"attention {attention_in_words(model, run.backend.kind == 'fused')}, layers {run.backend}",
        "memory": f"activation checkpointing {run.checkpointing}{peaks}",
        "train data": steps.dataset.summary(),
        "eval data": None if run.eval_dataset is None else run.eval_dataset.summary(),
        "step": f"{rows}, {width}",
        "steps": f"{steps.total:,} ({state.global_step:,} done)",
        "optimizer": f"{config.optim}, {config.lr_scheduler_type} from {config.learning_rate:g}{lora_plus}, "
        f"{counted(warmup, 'warm-up step')}, weight decay {config.weight_decay:g}, gradient clipped to "
        f"{config.max_grad_norm:g}",
        "gradients": gradients,
        "seed": f"{config.seed} (data {steps.plan.seed})",
        "output": shown_path(config.output_dir),
        "defaults": defaults or None,
        "LoRA defaults": (lora_config.not_given()[0] or None) if lora_config is not None else None,
        "default: off": off or None,
        "without effect": ", ".join(config.inert) or None,
        "longrope": longrope_note(model.config) if steps.plan.boundary else None,
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
def explain_out_of_memory(run: PlannedRun) -> Iterator[None]:
    """Turn torch's out-of-memory error inside the block into a TrainingError that lists the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        world, config = run.world, run.config
        request = f"rank {world.rank} of {world.size}: " if world.size > 1 else ""
        request += str(error).partition("\n")[0]
        mode, rows = run.checkpointing, config.per_device_train_batch_size
        ways = []
        if mode in ("none", "selective"):
            ways.append('activation_checkpointing="full" (or "auto")')
        if mode != "offload":
            ways.append('activation_checkpointing="offload"')
        if rows > 1:
            steps = config.gradient_accumulation_steps * rows // (rows // 2)
            ways.append(f"per_device_train_batch_size={rows // 2}, gradient_accumulation_steps={steps} (the same step)")
        if world.size > 1 and run.parts == 1:
            ways.append('parallel="fsdp"')
        ways += ["a shorter max_length", 'load_model(..., base_precision="nf4")']
        raise TrainingError(
            f"{request} Predicted peak by mode: {run.memory}. This run has activation_checkpointing={mode!r} and "
            f"micro-batches of {rows} rows. Ways out: {'; '.join(ways)}"
        ) from error
