"""Measure what an adapted layer costs on the CPU against a plain one: forward and backward of one fused projection.

    python examples/benchmarks/layer_speed.py

512 tokens, 3072 -> 9216 (Phi-3-mini's qkv_proj), float32, 2 threads, r = 16 on all three segments. The input requires a
gradient, as it does in every layer but the first. The layers take turns, and the best time of each counts, since other
work on the machine can only add time.
"""

from __future__ import annotations

import argparse
import sys
import time

import loralib
import torch
from torch import Tensor, nn

import phi3lora as p3


def layers(features: int, width: int) -> dict[str, nn.Module]:
    """Return the layers to compare, in train mode; the first is the reference."""
    plain = {frozen: nn.Linear(features, width).requires_grad_(not frozen) for frozen in (True, False)}
    segments = {"r": 16, "enable_lora": [True] * 3}
    adapted: dict[str, nn.Module] = {
        "phi3lora.MergedLinear": p3.MergedLinear(features, width, **segments),
        "loralib.MergedLinear": loralib.MergedLinear(features, width, **segments, merge_weights=False),
    }
    for layer in adapted.values():
        nn.init.normal_(layer.lora_B, std=0.02)
        layer.bias.requires_grad_(False)
        layer.train()
    return {"nn.Linear, weight frozen": plain[True], "nn.Linear, weight trained": plain[False], **adapted}


def seconds(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Time one forward and backward."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    started = time.perf_counter()
    layer(x).backward(dy)
    return time.perf_counter() - started


def best_seconds(tokens: int, features: int, width: int, repetitions: int) -> dict[str, float]:
    """Return the best time of each layer, after one turn of warm-up."""
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, features, requires_grad=True), torch.randn(tokens, width)
    compared = layers(features, width)
    turns = [{name: seconds(layer, x, dy) for name, layer in compared.items()} for _ in range(repetitions + 1)]
    return {name: min(turn[name] for turn in turns[1:]) for name in compared}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--features", type=int, default=3072, help="width of the input")
    parser.add_argument("--width", type=int, default=9216, help="width of the output, three equal segments")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    best = best_seconds(options.tokens, options.features, options.width, options.repetitions)
    base, trained, *_ = best.values()
    print(f"torch {torch.__version__}, {options.threads} threads, {time.strftime('%Y-%m-%d')}\n")
    print("| layer | forward + backward, ms | against weight frozen | against weight trained |\n|---|---|---|---|")
    for name, value in best.items():
        print(f"| `{name}` | {1000 * value:.0f} | {value / base:.2f} | {value / trained:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
