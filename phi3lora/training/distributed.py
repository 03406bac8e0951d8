"""The processes of a run (``World``), started by torchrun and joined by torch.distributed; the signals that stop it.

Every process runs the same script and the same loop, on its own share of each step's micro-batches. Few things cross:

    start            the settings, compared; the adapters, copied from rank 0
    each step        one sum of all gradients and of the loss, on the device; two flags (stop?), on the host
    evaluation       the sums of losses
    checkpoint       the random generators, to rank 0, which writes; hashes of the adapters, compared

Host values go through gloo and device tensors through NCCL, so that no message between hosts waits for a GPU. One
process exchanges nothing: every method returns at once. Time-outs are torch's (30 minutes on the host); for others,
call ``torch.distributed.init_process_group(timeout=...)`` before ``train``, which then uses that group.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Phi3LoRAError, TrainingError, error_line, short_repr
from ..processes import join, rank_and_size

logger = logging.getLogger("phi3lora")

T = TypeVar("T")


class World:
    """Process number ``rank`` of ``size``. All processes must call its methods in the same order.

    Args:
        rank, size: this process's number and the number of processes.
        host_group: the processes' group for host values; None: the default group.
    """

    def __init__(self, rank: int = 0, size: int = 1, host_group: Any = None) -> None:
        self.rank, self.size, self._host_group = rank, size, host_group
        self.step = 0
        """Optimizer step that is under way, for messages."""

    @classmethod
    def current(cls) -> World:
        """Return the world of torch.distributed if it is initialised, else the one that torchrun describes.

        Nothing is exchanged: see :func:`joined`.

        Raises:
            TrainingError: ``WORLD_SIZE`` says that there are several processes, and other variables are missing.
        """
        return cls(*rank_and_size())

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes files."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 alone and return its value on every rank. Its ``Phi3LoRAError`` is raised on all."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [make(), None]
            except Phi3LoRAError as error:
                outcome = [None, error]
        with self._together():
            dist.broadcast_object_list(outcome, src=0, group=self._host_group)
        value, raised = outcome
        if raised is not None:
            raise raised
        return value  # type: ignore[no-any-return]

    def on_main(self, do: Callable[[], T]) -> T | None:
        """Call ``do`` on rank 0 alone and return its value there, None elsewhere; no rank goes on before it is done."""
        made: list[T] = []
        self.from_main(lambda: made.append(do()))
        return made[0] if made else None

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, by rank, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(found, value, group=self._host_group)
        return found

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' numbers, in double precision."""
        return self._reduce(numbers, dist.ReduceOp.SUM) if self.size > 1 else list(numbers)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Return the largest of the ranks' numbers, position by position."""
        return self._reduce(numbers, dist.ReduceOp.MAX) if self.size > 1 else list(numbers)

    def _reduce(self, numbers: Sequence[float], how: Any) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        with self._together():
            dist.all_reduce(values, how, group=self._host_group)
        return values.tolist()

    def sum_(self, tensor: Tensor) -> None:
        """Replace a device tensor by its sum over the ranks, the same bits on each. A GPU is not waited for."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)

    def copy_from_main_(self, tensors: Sequence[Tensor]) -> None:
        """Give device tensors the values that they have on rank 0."""
        if self.size > 1:
            with self._together(), torch.no_grad():
                for tensor in tensors:
                    values = tensor.detach().contiguous()
                    dist.broadcast(values, src=0)
                    tensor.copy_(values)

    def require_equal(self, facts: Mapping[str, Any], why: str) -> None:
        """Raise a ``TrainingError`` on every rank if a fact differs between ranks; it names the ranks."""
        if self.size == 1:
            return
        everyone = self.gather(dict(facts))
        for name, value in everyone[0].items():
            others = [rank for rank, found in enumerate(everyone) if found[name] != value]
            if others:
                ranks = ", ".join(map(str, others[:8])) + (" ..." if len(others) > 8 else "")
                raise TrainingError(
                    f"{why}: {name} of rank 0 is {short_repr(value)}, of rank {others[0]} "
                    f"{short_repr(everyone[others[0]][name])} ({len(others)} of {self.size} ranks differ: {ranks})"
                )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say which rank lost the others, and at which step, when an exchange fails."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all of torch.distributed's are
            raise TrainingError(
                f"rank {self.rank} of {self.size} lost contact with the other processes at step {self.step}: "
                f"{error_line(error)}. The process that ended first has the cause; torchrun --max-restarts and "
                f"resume_from_checkpoint='auto' continue from the newest checkpoint"
            ) from error


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them after the block.

    A group that is already initialised is used, and stays. After an error the group is left as it is: processes that
    wait for each other could not take leave, and torchrun ends them.

    Args:
        device: the device of this process's model.
    """
    world = World.current()
    if world.size == 1:
        yield world
        return
    with world._together():
        is_ours = join(device)
        if "gloo" not in str(dist.get_backend_config()):
            world = World(world.rank, world.size, dist.new_group(backend="gloo"))
    level = logger.level
    if not world.is_main:
        logger.setLevel(logging.ERROR)
    try:
        yield world
    finally:
        logger.setLevel(level)
    if is_ours:
        dist.destroy_process_group()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Interrupts:
    """SIGINT and SIGTERM as a request to stop, which the loop answers after the step with a checkpoint.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread Python does not allow signal handlers, and
    the signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that came first."""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)
