"""A run as it would start: model, data, settings and what follows from them, worked out when first asked for."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import nn

from ..config import TrainingConfig
from ..data.dataset import ChatDataset
from ..data.streaming import ChatStream, documents_at_hand
from ..errors import DataError
from ..model.estimate import MemoryPlan
from ..model.load import model_device
from ..training.plan import StepPlan
from ..training.setup import checkpointing_mode, layer_path, plan_step_memory, resolve_plans
from ..training.step import Precision, resolve_precision
from .spans import TrainedSpans, trained_spans


class PlannedRun:
    """What the checks look at. A property that cannot be worked out raises the ``Phi3LoRAError`` that ``train`` would.

    Args:
        model, tokenizer, dataset, config, eval_dataset: as for ``train``; of a stream the first window is looked at.
        device_memory_gib: of a card that the run is planned for; None: the one that the model is on.
        known: properties of the below that the caller has worked out already.
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
        self.train_dataset, self.dataset = dataset, documents_at_hand(dataset)
        self.eval_dataset, self.device_memory_gib = eval_dataset, device_memory_gib
        vars(self).update(known)

    @cached_property
    def precision(self) -> Precision:
        return resolve_precision(self.config, self.model, model_device(self.model))

    @cached_property
    def path(self) -> tuple[str, str]:
        """How the layers are computed, and why."""
        return layer_path(self.model, self.config, self.precision)

    @cached_property
    def steps(self) -> StepPlan:
        self._require_documents()
        return resolve_plans(self.model, self.train_dataset, self.config, self.path[0])

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Of the dataset."""
        self._require_documents()
        return self.dataset.statistics()

    def _require_documents(self) -> None:
        if len(self.dataset) == 0:
            raise DataError("the dataset is empty: it has no documents")

    @cached_property
    def spans(self) -> TrainedSpans:
        return trained_spans(self.dataset)

    @cached_property
    def memory_path(self) -> str:
        """How the layers will be computed on the card that memory is predicted for."""
        elsewhere = self.device_memory_gib is not None and model_device(self.model).type != "cuda"
        if elsewhere and self.config.compile is None and self.precision.name != "fp32":
            return "fused"
        return self.path[0]

    def memory(self, base_precision: str | None = None) -> MemoryPlan:
        """Predicted peaks with the base as it is loaded, or in ``"fp8"`` or ``"nf4"``."""
        run = (self.model, self.train_dataset, self.config, self.memory_path, self.precision)
        plan = plan_step_memory(*run, base_precision)
        if self.device_memory_gib is not None:
            plan = dataclasses.replace(plan, available_gib=self.device_memory_gib)
        return plan

    @cached_property
    def checkpointing(self) -> str:
        """The activation checkpointing mode, ``"auto"`` resolved."""
        return checkpointing_mode(self.config, self.memory(), self.memory_path)

    @cached_property
    def end_of_turn(self) -> str:
        """The end-of-turn token in words."""
        return token_text(self.tokenizer, self.dataset.end_of_turn_id)


def token_text(tokenizer: Any, token_id: int | None) -> str:
    """``<|end|> (32007)``, or the number alone."""
    if token_id is None:
        return "none"
    return f"token {token_id}" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"
