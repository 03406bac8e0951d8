"""Measure how fast this GPU multiplies matrices: the ceiling of ``benchmark.py``'s 16-bit modes.

    python examples/benchmarks/product_speed.py

The script runs only the frozen products of one Phi-3-mini layer, forward and backward of 8,192 tokens in bf16: ten
times after two seconds of rest, then continuously for some seconds, as in training. A card at its power limit lowers
its clock, so the two differ. Then it times alternatives with the same numbers: a second copy of the weights in the
other orientation, the other BLAS library, and the transposed product.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

SHAPES = ((3072, 9216), (3072, 3072), (3072, 16384), (8192, 3072))
"""(in, out) of qkv, o, gate/up and down."""


def tflops(products: Sequence[Callable[[], object]], flops: float, seconds: float | None) -> float:
    """Return the TFLOP/s of running ``products`` repeatedly for ``seconds``, or ten times if None."""
    torch.cuda.synchronize()
    started, rounds = time.perf_counter(), 0
    while rounds == 0 or (seconds is not None and time.perf_counter() - started < seconds):
        for _ in range(10):
            for product in products:
                product()
        rounds += 10
        torch.cuda.synchronize()
    return flops * rounds / (time.perf_counter() - started) / 1e12


def clock_and_power() -> str:
    """Return the clock and power that ``nvidia-smi`` reports, or an empty string without it."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each sustained measurement")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    place = {"device": "cuda", "dtype": torch.bfloat16}
    W = [torch.randn(width, features, **place) * 0.02 for features, width in SHAPES]
    W_t = [w.t().contiguous() for w in W]
    X = [torch.randn(options.tokens, features, **place) for features, _ in SHAPES]
    dY = [torch.randn(options.tokens, width, **place) for _, width in SHAPES]
    kinds = {
        "x W'": [lambda x=x, w=w: x @ w.t() for x, w in zip(X, W, strict=True)],
        "dy W": [lambda dy=dy, w=w: dy @ w for dy, w in zip(dY, W, strict=True)],
        "x W', W kept transposed": [lambda x=x, w=w: x @ w for x, w in zip(X, W_t, strict=True)],
        "dy W, W kept transposed": [lambda dy=dy, w=w: dy @ w.t() for dy, w in zip(dY, W_t, strict=True)],
        "(W x')'": [lambda x=x, w=w: (w @ x.t()).t() for x, w in zip(X, W, strict=True)],
    }
    flops = float(sum(2 * options.tokens * features * width for features, width in SHAPES))
    step = kinds["x W'"] + kinds["dy W"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; TFLOP/s")
    tflops(step, 2 * flops, None)
    time.sleep(2)
    print(f"{'forward and backward, after a rest':<48} {tflops(step, 2 * flops, None):6.0f}")
    with_clock = tflops(step, 2 * flops, options.seconds)
    print(f"{'forward and backward, sustained':<48} {with_clock:6.0f}   {clock_and_power()}")
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for name, products in kinds.items():
            print(f"{f'{name}, {library}, sustained':<48} {tflops(products, flops, options.seconds):6.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
