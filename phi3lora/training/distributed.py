"""The processes of a run. Today there is one; the loop, the loader and the checkpoints ask here who they are."""

from __future__ import annotations

from dataclasses import dataclass


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
