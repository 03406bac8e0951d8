"""Check and time a base that is split over GPUs: losses against the whole base, what gathering costs, and FSDP2.

    torchrun --nproc-per-node 2 examples/benchmarks/sharding_check.py             # Phi-4's shape, 8 of its 40 layers
    torchrun --nproc-per-node 2 examples/benchmarks/sharding_check.py --layers 4 --steps 6

It prints the loss and the gradient's norm of one micro-batch of 4 x 2,048 tokens, and the milliseconds of a forward and
backward, for each way to hold the same bf16 base:

    whole            every GPU has all of it
    split            phi3lora/model/sharding.py
    FSDP2            torch's fully_shard on each layer, adapters ignored, with prefetching in both directions

then the same for fp8 and nf4, which FSDP2 cannot split, and the time of one layer's gather with nothing beside it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmark import SHAPES, random_chats, random_model
from torch.distributed.fsdp import fully_shard

import phi3lora as p3
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.backend import use_backend
from phi3lora.model.sharding import join_processes, sharded_base


def adapted(base_precision: str | None, parallel: str | None) -> Any:
    """Return a model of the shape "some layers" with adapters, the same on every rank."""
    model = random_model("some layers", base_precision, parallel)
    torch.manual_seed(1)
    p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def with_fsdp2(model: Any) -> Any:
    """Split each decoder layer of a model with torch's FSDP2."""
    layers = list(model.model.layers)
    for layer in layers:
        adapters = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, ignored_params=adapters)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    # A root above the layers lets them share their streams. It is the model, because the fused layers accept no hook on
    # the decoder; the loss does not call the model, so that what its forward would set up is set up here.
    fully_shard(model, ignored_params=set(model.parameters()))
    model._get_fsdp_state()._lazy_init()
    return model


def measure(make: Callable[[], Any], batch: Any, mode: str, steps: int) -> str:
    """Return a line: loss, gradient norm, median milliseconds of a forward and backward, peak memory."""
    gc.collect()  # hooks and layers refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = make()
        times = []
        with torch.autocast("cuda", torch.bfloat16), activation_checkpointing(model, mode), use_backend(model) as used:
            for _ in range(steps):
                dist.barrier()
                torch.cuda.synchronize()
                started = time.perf_counter()
                model.zero_grad()
                loss, count = p3.causal_lm_loss(model, batch)
                (loss / count).backward()
                torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - started))
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
    text = f"loss {loss.item() / count:.6f}  gradient {norm.item():.6e}  {statistics.median(times[2:]):8.1f} ms"
    return f"{text}  peak {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB  layers {used}"


def gather_ms(base: Any) -> tuple[float, float]:
    """Return the median milliseconds of gathering one layer, and its GiB."""
    times = []
    for i in range(12):
        base.use(i % 2, i % 2)
        base.use(2, 2)
        torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        base.use(i % 2, i % 2)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:]), base.buffer_bytes / 2 / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bases", nargs="+", default=["bf16", "fp8", "nf4"], choices=["bf16", "fp8", "nf4"])
    options = parser.parse_args()
    SHAPES["some layers"] = {**SHAPES["phi-4"], "num_hidden_layers": options.layers}
    random_model("some layers")  # sets the GPU of this process
    device = torch.device("cuda", torch.cuda.current_device())
    size = join_processes(device)
    rank = dist.get_rank()
    batch = next(p3.batches(random_chats(4 * [2048], 100352), batch_size=4, max_length=2048))

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    say(
        f"{torch.cuda.get_device_name()}, {size} processes, torch {torch.__version__}, {options.layers} layers of phi-4"
    )
    for mode in ("full", "none"):
        for base in (None if name == "bf16" else name for name in options.bases):
            for name, make in {
                "whole": lambda base=base: adapted(base, None),
                "split": lambda base=base: adapted(base, "fsdp"),
                "FSDP2": lambda base=base: with_fsdp2(adapted(base, None)),
            }.items():
                if name != "FSDP2" or base is None:
                    say(f"{mode:<5} {base or 'bf16':<5} {name:<6} {measure(make, batch, mode, options.steps)}")
    split = sharded_base(adapted(None, "fsdp"))
    ms, gib = gather_ms(split)
    speed = gib * 2**30 * (size - 1) / size / ms / 1e6
    say(f"gather of one layer, {gib:.2f} GiB: {ms:.2f} ms, {speed:.0f} GB/s received")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
