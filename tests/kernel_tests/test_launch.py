"""The launcher against Triton's own choice of a compiled kernel, with a kernel that only records its calls."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from phi3lora.errors import ModelError
from phi3lora.kernels import launch as launching


class Compiled:
    """Stands for a compiled kernel."""

    def __init__(self) -> None:
        self.calls: list = []

    def __getitem__(self, grid):
        return lambda *values: self.calls.append((grid, values))


class Kernel:
    """Stands for a Triton kernel: ``kernel[grid](...)`` compiles and returns what a later call can use."""

    arg_names = ("x", "n", "scale", "D", "BM")

    def __init__(self, largest: int) -> None:
        self.largest, self.compilations, self.compiled = largest, [], Compiled()
        self.fn = lambda: None

    def __getitem__(self, grid):
        def run(*arguments, num_warps, **constants):
            if constants["BM"] > self.largest:
                raise OutOfResources(constants["BM"], self.largest, "shared memory")
            self.compilations.append((grid, constants))
            return self.compiled

        return run


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})

    def run(kernel, x, n=7, scale=2.0, D=16):
        blocks = [{"BM": 64, "num_warps": 4}, {"BM": 32, "num_warps": 4}]
        launching.launch(kernel, blocks, lambda block: (n, block["BM"]), x, n, scale, D=D)

    return run


def test_a_second_launch_reuses_the_compiled_kernel_and_its_block(launch):
    kernel, x = Kernel(largest=32), torch.zeros(16)
    launch(kernel, x)
    launch(kernel, x, n=9, scale=3.0)
    assert kernel.compilations == [((7, 32), {"D": 16, "BM": 32})]
    assert kernel.compiled.calls == [((9, 32, 1), (x, 9, 3.0, 16, 32))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(16, dtype=torch.bfloat16)},
        {"x": torch.zeros(16)[1:]},  # not aligned to 16 bytes
        {"n": 1},
        {"n": 32},  # a multiple of 16
        {"n": 2**31},
        {"D": 32},
    ],
)
def test_what_triton_specialises_on_is_compiled_anew(launch, other):
    kernel, first = Kernel(largest=64), {"x": torch.zeros(16), "n": 7, "D": 16}
    launch(kernel, **first)
    launch(kernel, **{**first, **other})
    assert len(kernel.compilations) == 2 and not kernel.compiled.calls


def test_no_block_that_fits_is_an_error(launch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small card")
    with pytest.raises(ModelError, match="none of its blocks fits the shared memory of a small card"):
        launch(Kernel(largest=16), torch.zeros(16))
