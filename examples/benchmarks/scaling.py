"""Predict the speed of training on 1 to 512 GPUs from one GPU's step times and the links' speed. It needs no GPU.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --network-gbits 3200    # nodes with eight 400 Gbit/s cards

Bytes come from the library's own model, made on the meta device; times from the measurements below. For n GPUs:

    whole base    step = compute + reduce(all gradients) over a fast link, else
                         compute + max(reduce(last bucket of gradients), reduce(all gradients) - backward)
    split base    step = compute + reduce(all gradients); in forward and backward each layer takes
                  max(compute + busy, gather(next layer's bytes))

    reduce(b) = 2 (n - 1) / n * b / bandwidth + 2 (n - 1) * hop       ring all-reduce, while the backward computes
    backward  = BACKWARD * compute                                    one micro-batch a step
    gather(b) =   (n - 1) / n * b / bandwidth +   (n - 1) * hop       ring all-gather, while the layer before computes
    busy      = BUSY * (n - 1) / n * b / NVLINK                       what a gather takes from the kernels beside it
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from benchmark import ROW_TOKENS, ROWS, SHAPES
from torch import nn

import phi3lora as p3
from phi3lora.model.estimate import _STORED_BYTES
from phi3lora.model.sharding import shardable_tensors
from phi3lora.training.distributed import _BUCKET_BYTES, _FAST_SUM

WHERE = """2026-11-27, torch 2.11.0+cu130, H200s of one host; NOTES.md has the hosts and commits
  benchmark.py MODE --gpus 0 2 4; of fp8 on 4 GPUs and of phi-4-sharded only the first GPU was measured by itself
  torchrun --nproc-per-node 2 sharding_check.py: 8 of Phi-4's 40 layers, 4 x 2,048 tokens, two H100 80GB HBM3"""
GPUS = (1, 2, 8, 64, 512)
NODE_GPUS = 8
NVLINK = 238e9  # bytes a second that a GPU receives: one layer of Phi-4, 0.63 GiB, gathered by 2 GPUs in 1.43 ms
HOP_S = 10e-6  # assumed
BACKWARD = 0.5  # of a step, assumed: the frozen weights have no gradients
TOKENS = ROWS * ROW_TOKENS
FORWARD_S = (250.5e-3 - 192.8e-3) / 8  # a layer of Phi-4: 8 layers with full checkpointing, and without
BUSY = (260.5e-3 - 250.5e-3) / (12 * 1.43e-3)  # time that bf16's 12 gathers cost those 8 layers, of their own time


class Measured(NamedTuple):
    """A mode of benchmark.py: tokens a second of one GPU by itself (the mean of all), and of all together."""

    mode: str
    one_gpu: int
    together: int
    shape: str = "phi-3-mini"
    is_split: bool = False
    gpus: int = 2


RUNS = [
    Measured("bf16", 31_238, 61_869),
    Measured("chat-bf16", 32_639, 64_437),
    Measured("fp8", 42_598, 84_288),
    Measured("nf4", 30_770, 60_950),
    Measured("phi-4-sharded", 7_207, 13_532, "phi-4", is_split=True),
    Measured("bf16", 31_167, 122_071, gpus=4),
    Measured("chat-bf16", 32_338, 128_622, gpus=4),
    Measured("fp8", 41_785, 164_980, gpus=4),
    Measured("phi-4-sharded", 7_207, 26_966, "phi-4", is_split=True, gpus=4),
]
SPLIT_MS = {  # checkpointing, base: milliseconds of 8 layers of Phi-4 with a whole base, and split over 2 GPUs
    ("full", "bf16"): (250.5, 260.5), ("full", "fp8"): (174.8, 183.3), ("full", "nf4"): (256.3, 262.8),
    ("none", "bf16"): (192.8, 198.9), ("none", "fp8"): (136.7, 146.3), ("none", "nf4"): (196.6, 201.0),
}  # fmt: skip


class Bytes(NamedTuple):
    """Bytes that cross the links: the adapters' float32 gradients, and a layer's frozen weights by format."""

    gradients: int
    layers: int
    layer: dict[str, float]


def bytes_of(shape: str) -> Bytes:
    """Count the bytes of a shape of benchmark.py with r = 16 on all four projections."""
    from transformers import Phi3Config, Phi3ForCausalLM

    with torch.device("meta"):
        model: Any = Phi3ForCausalLM(Phi3Config(**SHAPES[shape])).to(torch.bfloat16)
    p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32))
    layer = model.model.layers[0]
    weights = [m.weight.shape for m in layer.modules() if isinstance(m, nn.Linear)]
    stored = {base: sum(count(*shape) for shape in weights) for base, count in _STORED_BYTES.items()}
    dense = float(sum(t.nbytes for t in shardable_tensors(layer)))
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return Bytes(gradients, len(model.model.layers), {"bf16": dense, **stored})


def gathers(layers: int) -> int:
    """Return the gathers of a micro-batch: two a layer, but two layers stay whole at each turn of direction."""
    return 2 * max(layers - 2, 0)


def ring_s(size: float, gpus: int, network: float, rounds: int) -> float:
    """Return the seconds of a ring over all GPUs: 1 round is an all-gather, 2 an all-reduce. ``network``: bytes/s."""
    bandwidth = NVLINK if gpus <= NODE_GPUS else min(NVLINK, network)
    return rounds * (gpus - 1) * (size / gpus / bandwidth + HOP_S)


def tokens_per_s(run: Measured, size: Bytes, gpus: int, network: float = NVLINK) -> float:
    """Return the predicted speed of all GPUs with one micro-batch a step."""
    compute = TOKENS / run.one_gpu
    reduction = ring_s(size.gradients, gpus, network, rounds=2)
    if not run.is_split and reduction * _FAST_SUM > size.gradients:
        last = ring_s(size.gradients % _BUCKET_BYTES, gpus, network, rounds=2)
        reduction = max(last, reduction - BACKWARD * compute)
    step = compute + reduction
    if run.is_split and gpus > 1:
        gather = ring_s(size.layer["bf16"], gpus, network, rounds=1)
        busy = BUSY * (gpus - 1) / gpus * size.layer["bf16"] / NVLINK
        added = [max(busy, gather - own) for own in (FORWARD_S, compute / size.layers - FORWARD_S)]
        step += gathers(size.layers) / 2 * sum(added)
    return gpus * TOKENS / step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network-gbits", type=float, nargs="+", default=[400, 25], help="of a node, to the others")
    options = parser.parse_args(arguments)
    networks = " or ".join(f"{gbits:,.0f}" for gbits in options.network_gbits)
    sizes = {shape: bytes_of(shape) for shape in ("phi-3-mini", "phi-4")}

    print(f"""Measured: {WHERE}
Assumed:
  {NODE_GPUS} GPUs a node; NVLink {NVLINK / 1e9:.0f} GB/s received by each, as measured between 2
  {networks} Gbit/s between a node and the others; {HOP_S * 1e6:.0f} us for each hop of a ring
  a gather takes {BUSY:.2f} of its time over NVLink from the kernels beside it (8 layers, bf16, full)
  a reduction of {_FAST_SUM / 1e9:.0f} GB/s or more follows the backward, and so does one with a split base
  the backward, {BACKWARD:.0%} of a step, hides a slower one but for its last bucket, at no cost
  one micro-batch of {TOKENS:,} tokens a GPU and step (accumulation reduces no more often)
  not counted: cards that slow each other, uneven rows, reading data, other traffic. NCCL's trees have fewer hops""")
    print("\nBytes a step          reduced, MB   gathered by each GPU of 2, 8, 512, GiB")
    print(f"phi-3-mini, any base {sizes['phi-3-mini'].gradients / 1e6:12.1f}      0")
    for base, layer in sizes["phi-4"].layer.items():
        gathered = "".join(f"{gathers(40) * layer * (n - 1) / n / 2**30:8.1f}" for n in (2, 8, 512))
        print(f"phi-4 split, {base:<7} {sizes['phi-4'].gradients / 1e6:12.1f}{gathered}")

    for gbits in options.network_gbits:
        print(f"\nPredicted tok/s and share of linear, {gbits:,.0f} Gbit/s between nodes")
        print("GPUs             " + "".join(f"{n:>19,}" for n in GPUS))
        for run in (run for run in RUNS if run.gpus == 2 and "(" not in run.mode):
            found = [tokens_per_s(run, sizes[run.shape], n, gbits * 1e9 / 8) for n in GPUS]
            cells = (f"{t:>12,.0f} ({t / n / run.one_gpu:.2f})" for n, t in zip(GPUS, found, strict=True))
            print(f"{run.mode:<17}" + "".join(cells))

    print("\n                GPUs   predicted   measured   measured / predicted   share of linear, measured")
    for run in RUNS:
        predicted, share = tokens_per_s(run, sizes[run.shape], run.gpus), run.together / run.gpus / run.one_gpu
        speeds = f"{predicted:>8,.0f} {run.together:>10,} {run.together / predicted:>16.3f} {share:>22.3f}"
        print(f"{run.mode:<17} {run.gpus}    {speeds}")
    print("\n8 layers split, ms predicted   measured   measured / predicted")
    for (checkpointing, base), (whole, split) in SPLIT_MS.items():
        predicted = whole + 1000 * gathers(8) * BUSY * sizes["phi-4"].layer[base] / 2 / NVLINK
        print(f"{checkpointing:<5} {base:<11} {predicted:>8.1f} {split:>10.1f} {split / predicted:>16.3f}")


if __name__ == "__main__":
    main()
