"""The processes of a run. Today there is one; the loop, the loader and the checkpoints ask here who they are."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import TrainingError


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes. ``sum_over_ranks`` is where a count becomes the whole step's."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum_over_ranks(self, count: int) -> int:
        """The sum of every process's ``count``: with one process, itself."""
        return count


def require_one_process() -> None:
    """Refuse to be one of several: each would train a copy of its own, in the same folder.

    Raises:
        TrainingError: torchrun, or another launcher that sets ``WORLD_SIZE``, started more than one process.
    """
    said = os.environ.get("WORLD_SIZE", "")
    if said.isdecimal() and int(said) > 1:
        raise TrainingError(
            f"WORLD_SIZE={said}, one of {said} processes; allowed: 1, which trains on one GPU. Start it with plain "
            f"python or torchrun --nproc_per_node=1, and choose the GPU with CUDA_VISIBLE_DEVICES"
        )
