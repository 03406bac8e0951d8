"""``PlannedRun``: a run before it starts, the subject of all checks."""

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
from ..training.setup import Resolved, answer_cache_tokens, checkpointing_mode, plan_step_memory, resolve
from .spans import TrainedSpans, trained_spans


class PlannedRun:
    """A run's model, data and settings, and what follows from them, resolved as ``train`` resolves it on first use.

    A property that cannot be resolved raises the ``Phi3LoRAError`` that ``train`` would.

    Args:
        model, tokenizer, dataset, config, eval_dataset: the arguments of ``train``; of a stream, the first window is
            checked.
        device_memory_gib: memory of the card that the run is planned for; None: the card that the model is on.
        resolved: the resolved settings, if the caller has them already.
        compute_metrics: the argument of ``train``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: ChatDataset | ChatStream,
        config: TrainingConfig,
        eval_dataset: ChatDataset | None = None,
        device_memory_gib: float | None = None,
        resolved: Resolved | None = None,
        compute_metrics: Any = None,
    ) -> None:
        self.model: Any = model
        self.tokenizer, self.config = tokenizer, config
        self.train_dataset, self.dataset = dataset, dataset.first_window
        self.eval_dataset, self.device_memory_gib = eval_dataset, device_memory_gib
        self._resolved, self.compute_metrics = resolved, compute_metrics

    @cached_property
    def resolved(self) -> Resolved:
        """Precision, backend, steps, memory and checkpointing mode of the run on the model's own device."""
        return self._resolved or resolve(
            self.model, self.train_dataset, self.config, cache_tokens=self.answer_cache_tokens
        )

    @property
    def answer_cache_tokens(self) -> int:
        """Tokens that the answers of an evaluation hold keys and values of; 0: no answers."""
        return answer_cache_tokens(self.config, self.eval_dataset, self.compute_metrics)

    @property
    def steps(self) -> StepSchedule:
        """Order of documents, rows, batches and steps."""
        self._require_documents()
        return self.resolved.steps

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
        """Backend of the decoder layers on the card that memory is predicted for."""
        elsewhere = self.device_memory_gib is not None and model_device(self.model).type != "cuda"
        if elsewhere and self.config.compile is None and self.resolved.precision.name != "fp32":
            return Backend("fused")
        return self.resolved.backend

    def memory(self, base_precision: str | None = None) -> MemoryPlan:
        """Predict the peaks with the base as it is loaded, or in another ``base_precision``."""
        run = (self.model, self.train_dataset, self.config, self.memory_backend, self.resolved.precision)
        plan = plan_step_memory(*run, base_precision, self.answer_cache_tokens)
        if self.device_memory_gib is not None:
            plan = dataclasses.replace(plan, available_gib=self.device_memory_gib)
        return plan

    @cached_property
    def checkpointing(self) -> str:
        """Activation checkpointing mode on the card that memory is predicted for, with ``"auto"`` resolved."""
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
