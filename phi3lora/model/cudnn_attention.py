"""Causal attention over packed documents by cuDNN, whose kernels for it are the fastest on Hopper.

Torch's own call of these kernels builds cuDNN's graph anew every time, in 40 to 70 ms
(https://github.com/pytorch/pytorch/pull/191576). This file calls them through NVIDIA's package nvidia-cudnn-frontend,
an extra, and keeps the graphs: building one takes a tenth of a second, the first of a process two seconds.

A graph is made for a number of documents, a longest document and a number of tokens, for which it reserves memory. All
are rounded up, the first two to powers of two, so that a run needs few graphs; empty documents fill the number up.
Nothing is padded: cuDNN gets the offset in the tensor, counted in numbers, at which each document begins.

      documents of 3 and 2 tokens           cu_seqlens   0  3  5
      the same, rounded up to 4             starts       0  3  5  5  5      lengths  3 2 0 0
      rows of 8 numbers (H * D)             offsets      0 24 40 40 40

cuDNN takes one table of offsets for q and its gradient, and one for k and its gradient (seen on 9.19: with q in rows
wider than the gradient's, the gradient is wrong without an error). So all tensors here are contiguous.

Source: https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html

Shapes: N tokens, H heads, H_kv key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import error_line

logger = logging.getLogger("phi3lora")

_FEWEST = 8
"""Documents of the smallest graph."""
_SHORTEST = 256
"""Longest document of the smallest graph, in tokens."""

# Numbers by which a graph knows its tensors.
_Q, _K, _V, _OUT, _STATS, _DOUT, _DQ, _DK, _DV, _LENGTHS, _Q_OFFSETS, _K_OFFSETS, _STATS_OFFSETS = range(1, 14)


@functools.cache
def is_available(device: torch.device) -> bool:
    """Return whether the package works and ``device`` is a Hopper GPU or later; one warning if it is broken."""
    if device.type != "cuda" or importlib.util.find_spec("cudnn") is None:
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        importlib.import_module("cudnn").pygraph  # noqa: B018  # another package of this name has none
        _handle(device.index or 0)
    except Exception as error:  # it loads cuDNN itself, which may be missing or too old in many ways
        _warn("nvidia-cudnn-frontend cannot be used", error)
        return False
    return True


def _warn(what: str, error: Exception) -> None:
    logger.warning("%s (%s): attention of packed documents runs by torch's kernels", what, error_line(error))


class Documents:
    """The documents of a micro-batch in the form that cuDNN reads, made once for all layers."""

    def __init__(self, cu_seqlens: Tensor, longest: int) -> None:
        documents = cu_seqlens.numel() - 1
        self.count = max(_FEWEST, 1 << (documents - 1).bit_length())
        self.longest = max(_SHORTEST, 1 << (longest - 1).bit_length())
        end = cu_seqlens[-1:].expand(self.count - documents)
        self.starts = torch.cat([cu_seqlens, end])  # (count + 1,) int32
        self.lengths = self.starts.diff()  # (count,)
        self._offsets: dict[int, Tensor] = {}

    def offsets(self, width: int) -> Tensor:
        """Return where each document begins in rows of ``width`` numbers, int32 (count + 1,)."""
        if width not in self._offsets:
            self._offsets[width] = self.starts * width
        return self._offsets[width]


def cudnn_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None = None
) -> Tensor | None:
    """Return causal attention inside each document, (N, H, D); None where cuDNN has no kernel for it, with a warning.

    Args:
        q, k, v: (N, H, D) and (N, H_kv, D), in 16 bits.
        documents: the documents, end to end.
        scale: factor of the scores.
        window: a token sees itself and the ``window - 1`` before it; None: all before it.
    """
    N, H, D = q.shape
    heads = (q.get_device(), q.dtype, H, k.shape[1], D)
    few = max(1024, (1 << N.bit_length()) // 8)
    sizes = (documents.count, documents.longest, -(-N // few) * few)
    graphs = _graphs(*heads, *sizes, scale, window) if q.numel() < 2**31 else None  # an offset is an int32
    if graphs is None:
        return None
    out: Tensor = _CudnnAttention.apply(q, k, v, documents, graphs)  # type: ignore[no-untyped-call]
    return out


@functools.cache
def _graphs(
    device: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, *settings: Any
) -> tuple[_Graph, _Graph] | None:
    """Return the graphs of attention and of its backward."""
    shape = (device, dtype, heads, kv_heads, head_dim, *settings)
    try:
        return _Graph(False, *shape), _Graph(True, *shape)
    except Exception as error:  # cuDNN says what it does not support by errors of its own
        what = f"{heads} and {kv_heads} heads of {head_dim}, window {settings[-1]}"
        _warn(f"cuDNN has no attention for {what}", error)
        return None


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, graphs: tuple[_Graph, _Graph]
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, stats = torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
        graphs[0].run({_Q: q, _K: k, _V: v, _OUT: out, _STATS: stats}, documents)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.documents, ctx.backward_graph = documents, graphs[1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = {_Q: q, _K: k, _V: v, _OUT: out, _STATS: stats, _DOUT: dout.contiguous()}
        ctx.backward_graph.run({**tensors, _DQ: dq, _DK: dk, _DV: dv}, ctx.documents)
        return dq, dk, dv, None, None


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


class _Graph:
    """One of cuDNN's graphs: attention of one shape, or its backward."""

    def __init__(
        self, backward: bool, device: int, dtype: torch.dtype, H: int, kv_heads: int, D: int, count: int, longest: int,
        tokens: int, scale: float, window: int | None,
    ) -> None:  # fmt: skip
        self.cudnn = cudnn = importlib.import_module("cudnn")
        self.device, self.handle = device, _handle(device)
        self.widths = {_Q_OFFSETS: H * D, _K_OFFSETS: kv_heads * D, _STATS_OFFSETS: H}
        types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.graph = cudnn.pygraph(
            io_data_type=types[dtype], intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT, handle=self.handle,
        )  # fmt: skip

        def integers(uid: int, length: int) -> Any:
            shape = {"dim": (length, 1, 1, 1), "stride": (1, 1, 1, 1)}
            return self.graph.tensor(**shape, data_type=cudnn.data_type.INT32).set_uid(uid)

        offsets = {uid: integers(uid, count + 1) for uid in self.widths}
        heads = {uid: (kv_heads, _K_OFFSETS) if uid in (_K, _V, _DK, _DV) else (H, _Q_OFFSETS) for uid in range(1, 10)}

        def place(uid: int) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
            """Return the sizes, strides and offsets of a tensor (N, heads, D), seen as documents."""
            if uid == _STATS:
                return (count, H, longest, 1), (longest * H, 1, H, 1), offsets[_STATS_OFFSETS]
            h, at = heads[uid]
            return (count, h, longest, D), (longest * h * D, D, h * D, 1), offsets[at]

        def given(uid: int) -> Any:
            dim, stride, at = place(uid)
            type_ = {"data_type": cudnn.data_type.FLOAT} if uid == _STATS else {}
            return self.graph.tensor(dim=dim, stride=stride, **type_).set_uid(uid).set_ragged_offset(at)

        lengths = integers(_LENGTHS, count)
        options = {
            "attn_scale": scale, "use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths,
            "diagonal_band_right_bound": 0, **({} if window is None else {"diagonal_band_left_bound": window}),
        }  # fmt: skip
        qkv = {"q": given(_Q), "k": given(_K), "v": given(_V)}
        if backward:
            others = {"o": given(_OUT), "dO": given(_DOUT), "stats": given(_STATS)}
            totals = {"max_total_seq_len_q": tokens, "max_total_seq_len_kv": tokens}
            results = self.graph.sdpa_backward(**qkv, **others, **totals, **options)
        else:
            results = self.graph.sdpa(**qkv, generate_stats=True, **options)
        for uid, node in zip((_DQ, _DK, _DV) if backward else (_OUT, _STATS), results, strict=True):
            dim, stride, at = place(uid)
            node.set_output(True).set_uid(uid).set_dim(dim).set_stride(stride).set_ragged_offset(at)
            if uid == _STATS:
                node.set_data_type(cudnn.data_type.FLOAT)
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace_bytes = max(1, self.graph.get_workspace_size())

    def run(self, tensors: dict[int, Tensor], documents: Documents) -> None:
        """Compute into the outputs among ``tensors``, which are keyed by the graph's numbers."""
        pointers = {uid: tensor.data_ptr() for uid, tensor in tensors.items()}
        pointers[_LENGTHS] = documents.lengths.data_ptr()
        pointers.update({uid: documents.offsets(width).data_ptr() for uid, width in self.widths.items()})
        stream = torch.cuda.current_stream(self.device)
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=stream.device)
        with torch.cuda.device(self.device):
            self.cudnn.set_stream(handle=self.handle, stream=stream.cuda_stream)
            self.graph.execute(pointers, workspace.data_ptr(), handle=self.handle)
