"""The one exception family. A message names the thing, the value got, what is allowed, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Phi3LoRAError(ValueError):
    """Something the caller can put right: a setting, a file, a dataset, a model. Catch this one for all of ours."""


class ConfigError(Phi3LoRAError):
    """A field of ``LoraConfig`` or ``TrainingConfig`` that does not exist or cannot have the value given."""


class ModelError(Phi3LoRAError):
    """A model or layer that cannot be loaded, adapted or run as asked."""


class DataError(Phi3LoRAError):
    """A dataset, row or chat that cannot be trained on."""


class AdapterError(Phi3LoRAError):
    """An adapter file that is unreadable or does not belong to the model at hand."""


class CheckpointError(Phi3LoRAError):
    """A training checkpoint that is missing, damaged or of another run."""


class TrainingError(Phi3LoRAError):
    """A run that cannot go on: a loss that stays NaN, nothing to train."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean 'q_proj'?"`` for the candidate closest to ``name``, or ``""`` when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
