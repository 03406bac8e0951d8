"""The launcher against Triton's own choice of a compiled kernel, with a kernel that only records its calls."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import _async_compile
from triton.runtime.errors import OutOfResources

from phi3lora.errors import ModelError
from phi3lora.kernels import launch as launching

TRITON_FUTURE_ARGUMENTS = len(inspect.signature(_async_compile.FutureKernel).parameters)


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


class Asked:
    """Stands for a Triton kernel that is compiled in a thread: ``warmup`` returns a future."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.fn, self.error, self.arguments = type(name, (), {}), error, []

    def warmup(self, *arguments, grid, **constants):
        self.arguments.append((arguments, constants))
        future = _async_compile.active_mode.get().executor.submit(self.compile)
        return _async_compile.FutureKernel(*[lambda kernel: None] * (TRITON_FUTURE_ARGUMENTS - 1), future)

    def compile(self):
        if self.error:
            raise self.error
        self.loads = []
        return self

    @property
    def run(self):
        self.loads.append(threading.current_thread())

    def __getitem__(self, grid):
        raise self.error or AssertionError("launched")


def test_kernels_are_compiled_and_loaded_together_and_a_failure_raises_where_it_is_launched(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    x, blocks = torch.zeros(16), [{"BM": 64, "num_warps": 4}, {"BM": 32, "num_warps": 4}]
    good, bad = Asked("good"), Asked("bad", RuntimeError("no compiler"))

    def launch(kernel):
        launching.launch(kernel, blocks, lambda block: (1,), x, D=16)

    with launching.compiled_together():
        launch(good)
        launch(bad)
        other = threading.Thread(target=lambda: elsewhere.append(launching._wanted.get()))
        elsewhere: list = []
        other.start()
        other.join()
    assert elsewhere == [None]  # another thread's launches go on
    assert good.arguments == bad.arguments == [((x,), {"D": 16, **blocks[0]})]
    assert len(good.loads) == 1 and good.loads[0] is not threading.current_thread()
    assert launching._wanted.get() is None and _async_compile.active_mode.get() is None
    with pytest.raises(RuntimeError, match="no compiler"):
        launch(bad)


def test_an_interrupt_while_kernels_are_compiled_leaves_later_launches_alone(monkeypatch):
    """Else each later kernel would be sent to the threads that have ended."""

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(_async_compile, "as_completed", lambda futures: interrupted(futures) if futures else [])
    kernel = Asked("kernel")

    def warmup(*arguments, grid, **constants):
        mode, others = _async_compile.active_mode.get(), TRITON_FUTURE_ARGUMENTS - 1
        return mode.submit("key", kernel.compile, *[lambda *_: None] * others)

    monkeypatch.setattr(kernel, "warmup", warmup)
    with pytest.raises(KeyboardInterrupt), launching.compiled_together():
        launching.launch(kernel, [{"BM": 64, "num_warps": 4}], lambda block: (1,), torch.zeros(16), D=16)
    assert launching._wanted.get() is None and _async_compile.active_mode.get() is None
