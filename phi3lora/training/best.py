"""The best model of a run: which evaluation wins, which checkpoint holds it, and when to stop early."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import TrainingConfig
from ..data.dataset import ChatDataset
from ..errors import CheckpointError, TrainingError, short_repr
from ..files import write_folder
from ..inference.evaluation import ROUGE
from ..lora.base_weight import sample_base
from .checkpoint import MANIFEST, TrainingState, damage

logger = logging.getLogger("phi3lora")


def metric_name(config: TrainingConfig) -> str:
    """Return ``metric_for_best_model`` as :func:`phi3lora.evaluate` calls it."""
    return (config.metric_for_best_model or "loss").removeprefix("eval_")


def greater_is_better(config: TrainingConfig) -> bool:
    """Return whether a larger value of the metric is better; if the config does not say, its name decides."""
    if config.greater_is_better is None:
        return not metric_name(config).endswith(("loss", "perplexity"))
    return config.greater_is_better


def scores_rouge(config: TrainingConfig) -> bool:
    """Return whether the evaluations of a run let the model answer and score the answers by ROUGE."""
    return config.predict_with_generate or metric_name(config) in ROUGE


def measured_on(config: TrainingConfig, eval_dataset: ChatDataset | None, model: nn.Module) -> dict[str, Any]:
    """Return what a run's metrics belong to; metrics of something else cannot be compared with them."""
    evaluates = eval_dataset is not None and config.eval_strategy != "no"
    return {
        "metric": metric_name(config),
        "greater_is_better": greater_is_better(config),
        "eval_data": eval_dataset.fingerprint() if eval_dataset is not None and evaluates else None,
        "base": sample_base(model),
    }


class BestModel:
    """The rules of ``metric_for_best_model``, ``greater_is_better`` and early stopping, over a run's state."""

    def __init__(self, config: TrainingConfig, state: TrainingState) -> None:
        self.config, self.state = config, state

    @property
    def folder(self) -> Path | None:
        """Folder of the best checkpoint."""
        best = self.state.best_checkpoint
        return None if best is None else Path(self.config.output_dir) / best

    def metric(self, evaluation: Mapping[str, float]) -> float:
        """Return the metric from the ``eval_*`` of an evaluation.

        Raises:
            TrainingError: it is not there; ``compute_metrics`` has not returned it.
        """
        name = metric_name(self.config)
        if "eval_" + name not in evaluation:
            found = ", ".join(key.removeprefix("eval_") for key in evaluation)
            raise TrainingError(f"metric_for_best_model={name!r} is not among the metrics of the evaluation: {found}")
        return evaluation["eval_" + name]

    def beats(self, metric: float, best: float | None, by_more_than: float = 0.0) -> bool:
        """Return whether ``metric`` is better than ``best`` (None: than nothing). NaN and infinity never are."""
        if not math.isfinite(metric) or best is None or not math.isfinite(best):
            return math.isfinite(metric)
        return (metric - best) * (1.0 if greater_is_better(self.config) else -1.0) > by_more_than

    def count(self, metric: float) -> None:
        """Take an evaluation into account for early stopping."""
        state = self.state
        if self.beats(metric, state.best_metric, self.config.early_stopping_threshold):
            state.best_metric, state.evaluations_without_gain = metric, 0
        else:
            state.evaluations_without_gain += 1

    @property
    def is_out_of_patience(self) -> bool:
        """True once early stopping has ended the run."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def forget_if_not_comparable(self, measured: Mapping[str, Any]) -> bool:
        """Forget the best model so far if a resumed run measures something else; return whether it does."""
        state = self.state
        if measured["eval_data"] is None or state.measured in (None, measured):
            return False
        logger.warning("the best model so far was measured on something else: looking for a new best one")
        state.best_metric = state.best_checkpoint = state.best_checkpoint_metric = None
        state.evaluations_without_gain = 0
        return True


def adopt_best(resumed_from: Path, output_dir: str | os.PathLike[str], state: TrainingState) -> None:
    """Make sure that the best checkpoint is whole and in ``output_dir``; else the run looks for a new best one.

    A run that goes on in another folder gets a copy.
    """
    if state.best_checkpoint is None:
        return
    if not (isinstance(state.best_checkpoint, str) and re.fullmatch(r"checkpoint-\d+", state.best_checkpoint)):
        name = short_repr(state.best_checkpoint)
        raise CheckpointError(f"{str(resumed_from)!r} names {name} as the best checkpoint; allowed: checkpoint-STEP")
    path = Path(output_dir) / state.best_checkpoint
    is_itself = state.best_checkpoint == f"checkpoint-{state.global_step}"
    source = resumed_from if is_itself else resumed_from.parent / state.best_checkpoint
    reason = damage(source)
    if reason is not None:
        logger.warning("the best checkpoint %s cannot be used (%s): a later one will take its place", source, reason)
        state.best_checkpoint = state.best_checkpoint_metric = None
    elif not path.exists():
        try:
            write_folder(path, lambda copy: shutil.copytree(source, copy, dirs_exist_ok=True), marker=MANIFEST)
        except OSError as error:
            raise CheckpointError(f"the best checkpoint {str(source)!r} cannot be copied to {path}: {error}") from error
