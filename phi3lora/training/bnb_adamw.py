"""AdamW with smaller moments, by bitsandbytes: 8 bits a number, or in paged memory. Imported only where it is used.

Paged memory is CUDA's unified memory: the driver moves pages to the host when the GPU is full, and back when they are
touched (https://arxiv.org/abs/2305.14314, section 3). bitsandbytes has its own AdamW for it, which waits for the GPU
after every parameter; here the pages are tensors on the GPU like any others, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import get_paged
from torch import Tensor, nn

from .logging import LateValues

MIN_PAGED_NUMBERS = 100_000
"""Smaller tensors are not worth pages; bitsandbytes' own limit."""


def in_pages(tensor: Tensor) -> Tensor:
    """A copy of a CUDA tensor in paged memory; a small one as it is. bitsandbytes has no call that frees pages."""
    if tensor.numel() < MIN_PAGED_NUMBERS:
        return tensor
    with torch.cuda.device(tensor.device):
        pages = get_paged(*tensor.shape, dtype=tensor.dtype, device=tensor.device)  # says it is on the CPU
        on_gpu: Tensor = torch.as_tensor(_CudaArray(pages), device=tensor.device)
    assert on_gpu.data_ptr() == pages.data_ptr(), "a view, not a copy"
    return on_gpu.copy_(tensor)


class _CudaArray:
    """The memory of a contiguous tensor, offered as a GPU's.

    Source: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    def __init__(self, tensor: Tensor) -> None:
        self._keep = tensor
        kind = {torch.float32: "<f4", torch.uint8: "|u1"}[tensor.dtype]
        data = (tensor.data_ptr(), False)  # not read-only
        self.__cuda_array_interface__ = {"shape": tuple(tensor.shape), "typestr": kind, "data": data, "version": 2}


class PagedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, its moments in paged memory: the same arithmetic and the same checkpoints."""

    _paged = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the first one after building or loading moves the moments into pages."""
        if not self._paged:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._page_moments(parameter)
            self._paged = True
        return super().step(closure)

    def _page_moments(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:  # what torch's first fused step makes
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["exp_avg"], state["exp_avg_sq"] = in_pages(state["exp_avg"]), in_pages(state["exp_avg_sq"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what it loads is paged by the next step."""
        super().load_state_dict(state_dict)
        self._paged = False


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' 8-bit AdamW (https://arxiv.org/abs/2110.02861), with steps that can be called off on the device.

    Like torch's fused optimizers it takes ``found_inf``: a step with it set changes neither parameters nor state.
    bitsandbytes' kernels know no such flag, so each parameter and its moments are copied before the update and selected
    after it: memory for one parameter at a time, about 30 bytes of traffic a number and a dozen short launches a
    parameter. The count of steps, which the kernels want from the host, is corrected at the next step, when the flag
    has long arrived: that step's forward and backward were queued after it.

    Args:
        groups: as for any torch optimizer.
        paged: put the moments of larger tensors into paged memory (CUDA only).
        settings: ``lr``, ``betas``, ``eps``.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets found_inf and does not wait for it
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], paged: bool = False, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._paged = paged
        self._skips: LateValues[list[dict[str, Any]]] = LateValues()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update, or none where ``found_inf`` is not zero. In place of bitsandbytes', which waits for the GPU."""
        self._uncount_skipped()
        skip = None if self.found_inf is None else self.found_inf.reshape(1).bool()
        counted = []
        for g, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, g, i)
                with _unchanged_where(skip, parameter, self.state[parameter]):
                    self.update_step(group, parameter, g, i)
                counted.append(self.state[parameter])
        if skip is not None:
            self._skips.add(skip, counted)

    def _uncount_skipped(self) -> None:
        """Take back the counts of a step that was skipped."""
        for (skipped,), counted in self._skips.arrived(wait=True):
            for state in counted if skipped else ():
                state["step"] -= 1

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros for one moment of a parameter."""
        zeros = torch.zeros_like(p, dtype=dtype)
        return in_pages(zeros) if self._paged else zeros

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with counts that are right. (bitsandbytes' own nests the moments for FSDP.)"""
        self._uncount_skipped()
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes'; paged again where this optimizer is."""
        super().load_state_dict(state_dict, move_to_device)
        for state in self.state.values() if self._paged else ():
            state["state1"], state["state2"] = in_pages(state["state1"]), in_pages(state["state2"])


@contextmanager
def _unchanged_where(skip: Tensor | None, parameter: nn.Parameter, state: dict[str, Any]) -> Iterator[None]:
    """Whatever the block makes of a parameter and its moments, they are as before if ``skip`` (1,) says so."""
    if skip is None:
        yield
        return
    moments = [state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state]
    before = [tensor.clone() for tensor in (parameter, *moments)]
    assert parameter.grad is not None
    parameter.grad.masked_fill_(skip, 0.0)  # kernels look 8-bit values up by index, which NaN has not
    yield
    for tensor, old in zip((parameter, *moments), before, strict=True):
        torch.where(skip, old, tensor, out=tensor)
