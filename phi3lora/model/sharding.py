"""The frozen weights of the decoder layers, split over the GPUs of a run, for a base that does not fit on one.

Each rank keeps ``1 / size`` of every layer's bytes. A layer's weights are gathered from all ranks before its forward
and again before its backward, and dropped when the next layer has its own:

    time ->          layer 0 computes    layer 1 computes    layer 2 computes
    communication    gather 1            gather 2            gather 3
    in memory        0, 1                1, 2                2, 3             two layers, whatever the model's depth

Bytes are bytes: dense, fp8 and nf4 weights with their scales travel in one uint8 buffer a layer. Adapters, norms, the
embedding and the output head stay whole on every rank (Phi-4-mini's tied embedding is the family's largest: 1.2 GB).

How it works. Every tensor of a layer becomes a view of that layer's buffer, once. Dropping a layer resizes the buffer's
*storage* to 0 bytes; gathering it resizes the storage back and fills it. Parameters, buffers and what autograd saved
for the backward share that storage, so they all see the weights again. The layers, the kernels and the checkpointing
need not know. FSDP (https://arxiv.org/abs/2304.11277) frees its parameters in the same way.

Two places gather: a hook before a layer's forward, and a node of the autograd graph on a layer's output, which the
backward reaches first. They are called in the same order on all ranks, because each gather needs them all: every rank
must compute equally many forwards and backwards. A rank with no batch left takes part with :meth:`ShardedBase.idle`.

While the weights are split, only forward and backward can read them; ``tensor.make_whole()``, called by all ranks,
gathers the layer of a tensor for one other look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ModelError, error_line
from ..lora.base_weight import is_4bit, stored_tensors
from ..processes import join

SMALLEST_BYTES = 2048
"""Smaller tensors stay whole: they are few, and bitsandbytes shares its tables among all weights."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_ALIGNMENT = 256  # bytes; what the caching allocator gives, and more than any kernel asks for


@dataclass
class _Layer:
    """One layer's weights: this rank's part of the bytes, and the buffer for all of them."""

    part: Tensor  # (bytes / size,) uint8
    whole: Tensor  # (bytes,) uint8, whose storage is empty unless the layer is gathered
    tensors: list[Tensor]  # views of ``whole``
    is_whole: bool = False  # gathered, or being gathered
    gather: Any = None  # the unfinished gather

    def drop(self) -> None:
        self.finish()
        self.whole.untyped_storage().resize_(0)
        self.is_whole = False

    def finish(self) -> None:
        """Let what follows on this stream wait for the gather."""
        if self.gather is not None:
            self.gather.wait()
            self.gather = None


class ShardedBase:
    """The frozen linear weights of ``layers``, split over the ranks of a process group.

    Args:
        layers: decoder layers in the order in which they compute, with the same weights on every rank.
        group: the process group; None: all ranks.
        prepare: called with each layer before it is split; it leaves the layer on this rank's device.
        embedding: what computes the first layer's input; if it learns, all layers have a backward.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        group: dist.ProcessGroup | None = None,
        prepare: Callable[[nn.Module], object] = lambda layer: None,
        embedding: nn.Module | None = None,
    ) -> None:
        self.group, self.lost, self._embedding = group, "", embedding
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._modules = list(layers)
        self._layers: list[_Layer] = []
        uses = Counter(id(m.weight) for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in layers:
            shardable_tensors(layer)  # refuse before anything is changed
        for i, layer in enumerate(layers):
            prepare(layer)
            # A weight that two modules share stays whole.
            self._layers.append(self._split([t for t in shardable_tensors(layer) if uses[id(t)] <= 1]))
            for tensor in self._layers[i].tensors:
                tensor.make_whole = partial(self.use, i, i)  # type: ignore[attr-defined]
        self._hooks = [
            hook
            for i, layer in enumerate(self._modules)
            for hook in (
                layer.register_forward_pre_hook(partial(self._before_forward, i)),
                layer.register_forward_hook(partial(self._after_forward, i)),
            )
        ]

    @torch.no_grad()
    def _split(self, tensors: list[Tensor]) -> _Layer:
        """Move a layer's tensors into one buffer, and keep this rank's part of it."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        part_bytes = -(-end // (self.size * _ALIGNMENT)) * _ALIGNMENT
        whole = torch.zeros(part_bytes * self.size, dtype=torch.uint8, device=tensors[0].device if tensors else None)
        for start, tensor in zip(starts, tensors, strict=True):
            strides = torch.empty_like(tensor, device="meta").stride()  # its own, if it is dense
            flat = whole[start : start + tensor.nbytes].view(tensor.dtype)
            view = flat.as_strided(tensor.shape, strides, flat.storage_offset())
            view.copy_(tensor.data)
            tensor.data = view
        layer = _Layer(whole[self.rank * part_bytes : (self.rank + 1) * part_bytes].clone(), whole, tensors)
        layer.drop()
        return layer

    # --- Gathering

    def use(self, i: int, ahead: int) -> None:
        """Gather layer i, start to gather the layer that is used after it, and drop all others.

        Raises:
            ModelError: the weights were given up, or another rank has ended without taking part.
        """
        if self.lost:
            raise ModelError(self.lost)
        try:
            self._gather(i, ahead)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all of torch.distributed's are
            raise ModelError(
                f"rank {self.rank} of {self.size} lost contact with the other processes while it gathered the weights "
                f"of layer {i}: {error_line(error)}. If none was killed, they made unequal calls: with a split "
                f"base every process must call generate, evaluate or the model equally often, not rank 0 alone"
            ) from error

    def _gather(self, i: int, ahead: int) -> None:
        for j, layer in enumerate(self._layers):
            if layer.is_whole and j not in (i, ahead):
                layer.drop()
        for j in (i, ahead):
            layer = self._layers[j]
            if not layer.is_whole and layer.tensors:
                layer.whole.untyped_storage().resize_(layer.whole.numel())
                # Asynchronous: it starts when the kernels queued so far are done, so that the memory which a dropped
                # layer has left is free, and runs beside those that are queued from here on.
                layer.gather = _all_gather(layer.whole, layer.part, group=self.group, async_op=True)
                layer.is_whole = True
        self._layers[i].finish()

    def _use_in_forward(self, i: int) -> None:
        last = len(self._layers) - 1
        if i < last:
            self.use(i, i + 1)
        else:  # the backward begins with the last two layers; another forward with the first
            self.use(i, max(i - 1, 0) if torch.is_grad_enabled() else 0)

    def _use_in_backward(self, i: int) -> None:
        last = len(self._layers) - 1
        self.use(i, i - 1 if i else min(1, last))  # the next forward begins with the first two layers

    def _before_forward(self, i: int, *_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._use_in_forward(i)
        else:  # a recomputation
            self._use_in_backward(i)

    def _after_forward(self, i: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._after_forward(i, module, inputs, part) for part in output)
        if isinstance(output, Tensor) and output.requires_grad:
            return _GatherInBackward.apply(output, self, i)  # type: ignore[no-untyped-call]
        return output

    def idle(self, backward: bool) -> None:
        """Take part in the gathers of the other ranks' forward, and of their ``backward``, without computing."""
        count = len(self._layers)
        with torch.set_grad_enabled(backward):
            for i in range(count):
                self._use_in_forward(i)
        first = next((i for i, part in enumerate([self._embedding, *self._modules]) if _learns(part)), count + 1)
        for i in reversed(range(max(first - 1, 0), count)) if backward else ():
            self._use_in_backward(i)

    # --- The end

    def restore(self) -> None:
        """Make all weights whole on every rank and remove the hooks; it needs the memory of the whole model.

        All ranks call it together.
        """
        for layer in self._layers:
            if not layer.is_whole and layer.tensors:
                layer.whole.untyped_storage().resize_(layer.whole.numel())
                _all_gather(layer.whole, layer.part, group=self.group)
            layer.finish()
            for tensor in layer.tensors:
                tensor.data = tensor.data.clone()
                del tensor.make_whole  # type: ignore[attr-defined]
        for hook in self._hooks:
            hook.remove()
        self._layers.clear()

    def abandon(self, why: str) -> None:
        """Give the weights up, where other ranks may be gone: from here on every forward raises ``why``."""
        self.lost = why
        for layer in self._layers:
            layer.gather = None

    @property
    def part_bytes(self) -> int:
        """Bytes of this rank's parts."""
        return sum(layer.part.nbytes for layer in self._layers)

    @property
    def absent_bytes(self) -> int:
        """Bytes of the layers that this rank does not hold now."""
        return sum((0 if layer.is_whole else layer.whole.nbytes) - layer.part.nbytes for layer in self._layers)

    @property
    def buffer_bytes(self) -> int:
        """Largest bytes of the gathered layers."""
        return 2 * max((layer.whole.nbytes for layer in self._layers), default=0)


def _learns(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


class _GatherInBackward(torch.autograd.Function):
    """The identity; its backward gathers the layer whose output this is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: ShardedBase, i: int) -> Tensor:
        ctx.base, ctx.i = base, i
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        ctx.base._use_in_backward(ctx.i)
        return dx, None, None


def shardable_tensors(layer: nn.Module) -> list[Tensor]:
    """Return the tensors of a layer that :class:`ShardedBase` splits: those of its frozen linear weights.

    Raises:
        ModelError: a weight that trains, or one in a format that cannot be moved as bytes.
    """
    found: list[Tensor] = []
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        if weight.requires_grad:
            raise ModelError(f"{path}.weight trains; only frozen weights can be split over the processes")
        if type(weight) is not nn.Parameter and not is_4bit(weight):
            raise ModelError(
                f"{path}.weight is a {type(weight).__name__}, which cannot be split over the processes; allowed: dense "
                f"weights and base_precision='fp8' or 'nf4'"
            )
        found += [t for t in stored_tensors(module) if t.nbytes >= SMALLEST_BYTES]
    return found


# --- Models


def sharded_base(model: Any) -> ShardedBase | None:
    """Return the split weights of a model; None: it is whole."""
    get_decoder = getattr(model, "get_decoder", None)  # other modules have adapters too
    base: ShardedBase | None = None if get_decoder is None else vars(get_decoder()).get("_sharded_base")
    return base


def join_processes(device: torch.device) -> int:
    """Return the number of processes that torchrun started, and let them find each other if they have not yet."""
    join(device)
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model: Any, prepare: Callable[[nn.Module], object] = lambda layer: None) -> ShardedBase:
    """Split the frozen weights of a model's decoder layers over all processes, until :func:`unshard`.

    Args:
        model: a causal LM with the same weights in every process.
        prepare: called with each layer before it is split; it leaves the layer on this process's device.

    Raises:
        ModelError: the model is split already; a weight that cannot be split.
    """
    if sharded_base(model) is not None:
        raise ModelError("the model's weights are split over the processes already")
    decoder = model.get_decoder()
    decoder._sharded_base = base = ShardedBase(decoder.layers, None, prepare, model.get_input_embeddings())
    return base


def unshard(model: Any) -> None:
    """Make a split model whole on every rank; all ranks call it together. A whole model is left as it is."""
    base = sharded_base(model)
    if base is not None:
        base.restore()
        del model.get_decoder()._sharded_base


@contextmanager
def sharded(model: Any) -> Iterator[ShardedBase]:
    """Split a model's frozen weights for the block; a model that is split already stays so.

    After the block the model is whole again. After an exception it is not, because other ranks may be gone: its
    forward then raises a :class:`ModelError`.
    """
    base = sharded_base(model)
    if base is not None:
        yield base
        return
    base = shard(model)
    try:
        yield base
    except BaseException as error:
        base.abandon(
            f"the weights are split over {base.size} processes whose run ended with {type(error).__name__}; load the "
            f"model again"
        )
        raise
    unshard(model)
