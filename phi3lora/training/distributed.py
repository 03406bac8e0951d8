"""The processes of a run (``World``), started by torchrun and joined by torch.distributed.

Every process runs the same script and the same loop, on its own share of each step's micro-batches. Few things cross:

    start            errors of single ranks; the settings, compared; the adapters, copied from rank 0; some sums of
                     zeros, to time them
    each step        one sum of all gradients and of the loss, on the device; two barriers and two flags, on the host
    evaluation       the sums of losses
    checkpoint       the random generators, to rank 0, which writes; hashes of the adapters, compared
    stream           a digest of the next window's rows, compared, and each rank's part of its tokens, in a background
                     thread

Host values go through gloo and device tensors through NCCL, so that no message between hosts waits for a GPU. One
process exchanges nothing: every method returns at once. Time-outs are torch's (30 minutes); for others, call
``torch.distributed.init_process_group(timeout=...)`` before ``train``, which then uses that group. The host's is a
fifth shorter than NCCL's, so that a process says which rank is missing before NCCL's watchdog takes notice: the
watchdog would delay the process's exit for a minute, to write its own report, and then abort it. For the same reason no
host waits for its device before all hosts have begun the sums of the step: it would wait for ever, and say nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.prefetch import NotWanted
from ..errors import Phi3LoRAError, TrainingError, error_line, short_repr
from ..processes import join, rank_and_size

logger = logging.getLogger("phi3lora")

T = TypeVar("T")

_HOST_SHARE, _ROLL_CALL_SHARE = 0.8, 0.1  # of the device's time-out
_ROLL_CALL_S = 3.0  # or less, if the share is less
_BUCKET_BYTES = 32 * 2**20  # smaller ones slow the matrix products beside them more
_FAST_SUM = 50e9  # bytes/s; NVLink: over 100e9, PCIe: at most 25e9, sockets: 5e9. So the CPU (gloo) always overlaps
_TRIALS = 4  # the first one also connects the devices
_WORLDS = itertools.count()  # the same number in every process, because they call train equally often
OTHER_RUN = "the processes do not train the same run"


class World:
    """Process number ``rank`` of ``size``. All processes must call its methods in the same order.

    Args:
        rank, size: this process's number and the number of processes.
        host_group: the processes' group for host values; None: the default group.
        store: where a process notes why it ends, for the others' messages; None: nowhere.
        roll_call_s: seconds to wait for the others' notes.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        host_group: Any = None,
        store: Any = None,
        roll_call_s: float = _ROLL_CALL_S,
    ) -> None:
        self.rank, self.size, self._host_group, self._store = rank, size, host_group, store
        self._roll_call_s = roll_call_s
        self.share: WindowShare | None = None
        """Part of a stream's windows that this process tokenises; None: all."""
        self._notes = f"phi3lora/ended/{next(_WORLDS)}" if store is not None else ""
        self._has_ended = False
        self.step = 0
        """Optimizer step that is under way, for messages."""

    @classmethod
    def current(cls) -> World:
        """Return the world of torch.distributed if it is initialised, else the one that torchrun describes.

        Nothing is exchanged: see :func:`joined`.
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

    def on_each(self, do: Callable[[], object]) -> None:
        """Call ``do`` on every rank. If it raises a ``Phi3LoRAError`` on some, no rank goes on."""
        own: Phi3LoRAError | None = None
        try:
            do()
        except Phi3LoRAError as error:
            own = error
        everyone = self.gather(None if own is None else error_line(own))
        if own is not None:
            raise own
        for rank, why in enumerate(everyone):
            if why is not None:
                raise TrainingError(f"rank {rank} of {self.size} ends at step {self.step}, and so do all: {why}")

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

    def meet(self) -> None:
        """Wait on the host until every rank is here: before work on the device that waits for the others."""
        if self.size > 1:
            with self._together():
                dist.barrier(group=self._host_group)

    def begin_sum_(self, tensor: Tensor) -> Any:
        """Begin to replace a device tensor by its sum over the ranks, the same bits on each; return a work handle."""
        with self._together():
            return dist.all_reduce(tensor, async_op=True)

    def sum_speed(self, tensor: Tensor) -> float:
        """Return the bytes/s at which a device tensor of zeros is added up over the ranks, the same on each.

        The fastest of several trials counts, on the rank where it was slowest: a hiccup changes nothing.
        """
        seconds = []
        for _ in range(_TRIALS):
            self.meet()
            started = time.perf_counter()
            work = self.begin_sum_(tensor)
            self.meet()  # takes less time than a large sum, which travels meanwhile
            self.wait([work])
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
            seconds.append(time.perf_counter() - started)
        return tensor.nbytes / self.largest([min(seconds)])[0]

    def wait(self, sums: Sequence[Any]) -> None:
        """Let what follows on the device wait for sums that were begun. A GPU is not waited for."""
        with self._together():
            for work in sums:
                work.wait()

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
        if self.size > 1:
            _compare(self.gather(dict(facts)), why)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say which rank lost the others, at which step, and who is missing, when an exchange fails."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all of torch.distributed's are
            raise TrainingError(
                f"rank {self.rank} of {self.size} lost contact with the other processes at step {self.step}: "
                f"{error_line(error)}; {self._cause()}. torchrun --max-restarts and resume_from_checkpoint='auto' "
                f"continue from the newest checkpoint"
            ) from error

    def note_end(self, why: str) -> None:
        """Leave a note for the other ranks of why this one ends; the first one stays."""
        if self._store is not None and not self._has_ended:
            self._has_ended = True
            with suppress(RuntimeError):  # the process that keeps the store has gone
                self._store.set(f"{self._notes}/{self.rank}", why)

    def _cause(self) -> str:
        """Return what the other ranks' notes say. One that has left none after some seconds hangs, or was killed."""
        self.note_end("")
        causes, silent = [], [rank for rank in range(self.size) if rank != self.rank]
        until = time.monotonic() + self._roll_call_s
        try:
            while silent and time.monotonic() < until:
                for rank in [rank for rank in silent if self._store.check([f"{self._notes}/{rank}"])]:
                    silent.remove(rank)
                    if why := self._store.get(f"{self._notes}/{rank}").decode():
                        causes.append(f"rank {rank} ended with {why}")
                time.sleep(0.05)
        except (RuntimeError, AttributeError):  # no store, or its process has gone
            silent = []
        if silent:
            listed = ", ".join(map(str, silent[:8])) + (" ..." if len(silent) > 8 else "")
            causes.append(f"nothing was heard from rank {listed}, which hangs or was killed")
        return "; ".join(causes) or "the process that ended first has the cause"


@contextmanager
def joined(device: torch.device, shares_windows: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them after the block.

    A group that is already initialised is used, and stays. After an error the group is left as it is: processes that
    wait for each other could not take leave, and torchrun ends them. With ``shares_windows`` they tokenise the windows
    of a stream together.
    """
    world = World.current()
    if world.size == 1:
        yield world
        return
    with world._together():
        is_ours = join(device)
        store = dist.distributed_c10d._get_default_store()
        timeout = _backend_of(device).options._timeout
        # A thread needs a group of its own: its messages must not meet those of another.
        groups = [dist.new_group(backend="gloo", timeout=_HOST_SHARE * timeout)]
        roll_call_s = min(_ROLL_CALL_S, _ROLL_CALL_SHARE * timeout.total_seconds())
        world = World(world.rank, world.size, groups[0], store, roll_call_s)
    kind = "a stream" if shares_windows else "documents in memory"
    world.require_equal({"train_dataset": kind}, OTHER_RUN)  # before a group that only a stream needs
    if shares_windows:
        with world._together():
            groups.append(dist.new_group(backend="gloo", timeout=_HOST_SHARE * timeout))
        world.share = WindowShare(world, groups[1])
    level = logger.level
    if not world.is_main:
        logger.setLevel(logging.ERROR)
    try:
        yield world
    except BaseException as error:
        line, kind = error_line(error), type(error).__name__
        world.note_end(line if line.startswith(kind) else f"{kind}: {line}")
        raise
    finally:
        logger.setLevel(level)
    for group in [None] if is_ours else groups:
        dist.destroy_process_group(group)


def _backend_of(device: torch.device) -> Any:
    """Return what sends a device's tensors in the default group, which the caller may have initialised otherwise."""
    try:
        return dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise TrainingError(
            f"the process group was initialised with the backend {dist.get_backend_config()!r}, which sends no tensors "
            f"of {device.type}; allowed: 'gloo' on the CPU, 'cpu:gloo,cuda:nccl' on GPUs; or leave init_process_group "
            f"out, because train calls it"
        ) from error


class GradientSum:
    """The sum of the gradients over the ranks, which over a slow link travels while the backward still computes.

    One float32 buffer holds the gradients in the order in which a backward makes them, the last layer's first:

        [gradients of the last layers | ... | gradients of the first layers, sum of the losses]
          bucket 0, sent first                the last bucket, sent when the backward is over

    A bucket is sent when its gradients are there and the bucket before it has been sent. So all ranks send them in one
    order, whatever the order in which their gradients come. A parameter without a gradient counts as zero, and so does
    all that a rank without a micro-batch sends. One process sends nothing. The parameters come in the forward's order.

    Over a fast link all is one bucket, sent after the backward, whose products it would slow by more than its own time.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self.world = world
        self._buckets: list[list[nn.Parameter]] = []
        self._sums: list[Tensor] = []  # of each parameter's gradient, in the order of the buckets
        self._parts: list[Tensor] = []  # of the buffer, one a bucket
        self._awaited: list[set[nn.Parameter]] = []  # of each bucket but the last, in a step's last backward
        self._sent: list[Any] = []
        self.summary: str | None = None
        """When the gradients are added up, and how fast, for the banner; None: nothing was measured."""
        if world.size == 1:
            return
        for parameter in reversed(parameters):
            if not self._buckets or 4 * sum(map(torch.numel, self._buckets[-1])) >= _BUCKET_BYTES:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
        sizes = [sum(map(torch.numel, bucket)) for bucket in self._buckets]
        self._buffer = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
        sums = torch.split(self._buffer[:-1], [p.numel() for p in reversed(parameters)])
        self._sums = [values.view_as(p) for values, p in zip(sums, reversed(parameters), strict=True)]
        self._parts = list(torch.split(self._buffer, [*sizes[:-1], sizes[-1] + 1]))

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Over a slow link, send buckets during the backwards in the block that follow a call of :meth:`expect`."""
        if len(self._buckets) > 1:
            speed, when = self.world.sum_speed(self._buffer), "during"
            if speed >= _FAST_SUM:
                self._buckets, self._parts = [list(itertools.chain(*self._buckets))], [self._buffer]
                when = "after"
            self.summary = f"{self._buffer.nbytes / 1e6:.1f} MB added up {when} the backward, at {speed / 1e9:.1f} GB/s"
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))  # type: ignore[no-untyped-call]
            for number, bucket in enumerate(self._buckets[:-1])
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def expect(self) -> None:
        """Say that the next backward makes the step's last gradients."""
        self._awaited = [set(bucket) for bucket in self._buckets[:-1]]

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if not self._awaited:
            return
        if parameter not in self._awaited[number]:
            raise TrainingError(
                "a gradient came twice in one backward: layers that are recomputed share an adapter; allowed with "
                "several processes: activation_checkpointing='none', 'selective' or 'full'"
            )
        self._awaited[number].remove(parameter)  # type: ignore[arg-type]
        while len(self._sent) < len(self._buckets) - 1 and not self._awaited[len(self._sent)]:
            self._send()

    def _send(self, *more: Tensor) -> None:
        """Copy the next bucket's gradients into the buffer, and begin to add up that part of it over the ranks."""
        number = len(self._sent)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._buckets[number]]
        torch.cat([*(gradient.flatten() for gradient in gradients), *more], out=self._parts[number])
        self._sent.append(self.world.begin_sum_(self._parts[number]))

    def finish(self, total: Tensor) -> Tensor:
        """Send what is left, replace every gradient by its sum over the ranks, and return the sum of ``total`` ()."""
        if not self._buckets:
            return total
        while len(self._sent) < len(self._buckets) - 1:
            self._send()
        self._send(total.view(1))
        self.world.meet()  # from here on a host may wait for its device: all have begun these sums
        self.world.wait(self._sent)
        self._awaited, self._sent = [], []
        for parameter, values in zip(itertools.chain(*self._buckets), self._sums, strict=True):
            parameter.grad = values if values.dtype == parameter.dtype else values.to(parameter.dtype)
        return self._parts[-1][-1]


class WindowShare:
    """A process's part of the windows of a stream (``data.prefetch.Share``), which a background thread tokenises.

    The threads run ahead of the steps, and not all equally far when the run ends: :meth:`end` takes the turns that
    other ranks have begun and this one has not.
    """

    def __init__(self, world: World, group: Any) -> None:
        self.rank, self.size, self._world, self._group = world.rank, world.size, world, group
        self._lock, self._turns, self._has_ended = threading.Lock(), 0, False

    def part(self, items: Sequence[T]) -> Sequence[T]:
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def exchange(self, value: T) -> list[T]:
        with self._lock:
            if self._has_ended:
                raise NotWanted
            self._turns += 1
        return self._turn(value)

    def _turn(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._world._together():
            dist.all_gather_object(found, value, group=self._group)
        if any(given is None for given in found):
            with self._lock:
                self._has_ended = True
            raise NotWanted
        return found

    def require_equal(self, facts: Mapping[str, Any], why: str) -> None:
        _compare(self.exchange(dict(facts)), why)

    def leave(self) -> None:
        with suppress(NotWanted, TrainingError):  # if contact is lost, the main thread raises it
            self.exchange(None)

    def end_after_error(self, kind: type[BaseException] | None, *error: object) -> None:
        """Take no more turns after an error: the others do not know of it yet, and would be waited for."""
        if kind is not None:
            with self._lock:
                self._has_ended = True

    def end(self) -> None:
        """End the turns on all ranks, whose main threads call this after the same step."""
        with self._lock:
            self._has_ended = True
        for _ in range(self._turns, int(self._world.largest([self._turns])[0])):
            with suppress(NotWanted):
                self._turn(None)


def _compare(everyone: Sequence[Mapping[str, Any]], why: str) -> None:
    """Raise a ``TrainingError`` if a fact of the ranks differs; it names the ranks."""
    for name, value in everyone[0].items():
        others = [rank for rank, found in enumerate(everyone) if found[name] != value]
        if others:
            ranks = ", ".join(map(str, others[:8])) + (" ..." if len(others) > 8 else "")
            raise TrainingError(
                f"{why}: {name} of rank 0 is {short_repr(value)}, of rank {others[0]} "
                f"{short_repr(everyone[others[0]][name])} ({len(others)} of {len(everyone)} ranks differ: {ranks})"
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
