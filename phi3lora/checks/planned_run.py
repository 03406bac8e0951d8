"""``PlannedRun``: a run before it starts, its settings resolved as ``train`` resolves them, each on first use."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import nn

from ..config import TrainingConfig
from ..data.batches import StepSchedule
from ..data.dataset import ChatDataset, ChatStream
from ..errors import DataError
from ..model.backend import Backend
from ..model.estimate import MemoryPlan
from ..model.load import model_device
from ..training.setup import checkpointing_mode, plan_step_memory, resolve_backend, resolve_plans
from ..training.step import Precision, resolve_precision
from .spans import TrainedSpans, trained_spans


class PlannedRun:
    """The subject of all checks. A property that cannot be resolved raises the ``Phi3LoRAError`` of ``train``.

    Args:
        model, tokenizer, dataset, config, eval_dataset: the arguments of ``train``; of a stream, the first window is
            checked.
        device_memory_gib: memory of the card that the run is planned for; None: the card that the model is on.
        known: properties that the caller has resolved already.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: ChatDataset | ChatStream,
        config: TrainingConfig,
        eval_dataset: ChatDataset | None = None,
        device_memory_gib: float | None = None,
        **known: Any,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.train_dataset, self.dataset = dataset, dataset.first_window
        self.eval_dataset, self.device_memory_gib = eval_dataset, device_memory_gib
        vars(self).update(known)

    @cached_property
    def precision(self) -> Precision:
        """Precision of the forward."""
        return resolve_precision(self.config, self.model, model_device(self.model))

    @cached_property
    def backend(self) -> Backend:
        """How the decoder layers are computed."""
        return resolve_backend(self.model, self.config, self.precision)

    @cached_property
    def steps(self) -> StepSchedule:
        """Order of documents, rows, batches and steps."""
        self._require_documents()
        return resolve_plans(self.model, self.train_dataset, self.config, self.backend)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the dataset."""
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

    @cached_property
    def memory_backend(self) -> Backend:
        """Way the layers will be computed on the card that memory is predicted for."""
        elsewhere = self.device_memory_gib is not None and model_device(self.model).type != "cuda"
        if elsewhere and self.config.compile is None and self.precision.name != "fp32":
            return Backend("fused")
        return self.backend

    def memory(self, base_precision: str | None = None) -> MemoryPlan:
        """Predict the peaks with the base as it is loaded, or in ``"fp8"`` or ``"nf4"``."""
        run = (self.model, self.train_dataset, self.config, self.memory_backend, self.precision)
        plan = plan_step_memory(*run, base_precision)
        if self.device_memory_gib is not None:
            plan = dataclasses.replace(plan, available_gib=self.device_memory_gib)
        return plan

    @cached_property
    def checkpointing(self) -> str:
        """Activation checkpointing mode, with ``"auto"`` resolved."""
        return checkpointing_mode(self.config, self.memory(), self.memory_backend)

    @cached_property
    def end_of_turn(self) -> str:
        """End-of-turn token, for messages."""
        return token_text(self.tokenizer, self.dataset.end_of_turn_id)


def token_text(tokenizer: Any, token_id: int | None) -> str:
    """Return a token for messages: ``<|end|> (32007)``, or ``token 32007`` without a tokenizer."""
    if token_id is None:
        return "none"
    return f"token {token_id}" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"
