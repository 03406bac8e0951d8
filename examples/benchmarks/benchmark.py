"""Measure speed and memory of LoRA training at Phi-3-mini's shape on this machine's GPU, through ``phi3lora.train``.

    python examples/benchmarks/benchmark.py                    # every mode, each in its own process
    python examples/benchmarks/benchmark.py bf16 chat-bf16     # some modes
    python examples/benchmarks/benchmark.py --peers            # also other libraries that do the same work (peers.py)
    python examples/benchmarks/benchmark.py bf16 --gpus 0 1 2  # plain python, and torchrun with 1 and 2 processes; it
                                                               # also compares the adapters of all processes, by hash

Weights and token ids are random, because speed does not depend on them. r = 16 on all four projections; 4 rows of 2,048
tokens a step, every token trained (see ``docs/performance.md``). A step is timed with CUDA events at its ends, data
loader and optimizer included; the result is the median of the steps after warm-up. "share" is the speed divided by the
sum of what the same GPUs make by themselves (``--gpus 0 ...``; without 0, by the first run's speed for each GPU).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import phi3lora as p3
from phi3lora.lora.base_weight import quantize_base
from phi3lora.model.estimate import flops_per_token, peak_flops, plan_memory
from phi3lora.model.sharding import join_processes, shard
from phi3lora.training import distributed
from phi3lora.training.distributed import World, digest

SHAPES: dict[str, dict[str, Any]] = {
    "phi-3-mini": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": 2047},
    "phi-4": {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
              "num_key_value_heads": 10, "vocab_size": 100352},
}  # fmt: skip
SHAPES["phi-3-mini-128k"] = {
    **SHAPES["phi-3-mini"], "sliding_window": None, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
                        "short_factor": [1.0] * 48, "long_factor": [16.0] * 48},
}  # fmt: skip
ROWS, ROW_TOKENS = 4, 2048
LONG_ROW, LONG_STEPS, LONG_WARMUP = 65536, 4, 1
"""Tokens of a row from which a mode measures few steps, because one takes 10 s or more."""
MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"base_precision": "fp8"},
    "bf16-selective": {"activation_checkpointing": "selective"},
    "bf16-full": {"activation_checkpointing": "full"},
    "bf16-offload": {"activation_checkpointing": "offload"},
    "nf4": {"base_precision": "nf4"},
    "nf4-offload": {"base_precision": "nf4", "activation_checkpointing": "offload"},
    "nf4-fp8": {"base_precision": "nf4-fp8"},
    "nf4-fp8-offload": {"base_precision": "nf4-fp8", "activation_checkpointing": "offload"},
    "nf4-1-row": {"base_precision": "nf4", "activation_checkpointing": "offload", "rows": 1},
    "phi-4-nf4-1-row": {"base_precision": "nf4", "activation_checkpointing": "offload", "rows": 1, "shape": "phi-4"},
    "phi-4-nf4-fp8-1-row": {
        "base_precision": "nf4-fp8",
        "activation_checkpointing": "offload",
        "rows": 1,
        "shape": "phi-4",
    },
    "nf4-65536": {
        "base_precision": "nf4",
        "activation_checkpointing": "offload",
        "rows": 1,
        "row_tokens": 65536,
        "shape": "phi-3-mini-128k",
    },
    "nf4-131072": {
        "base_precision": "nf4",
        "activation_checkpointing": "offload",
        "rows": 1,
        "row_tokens": 131072,
        "shape": "phi-3-mini-128k",
    },
    "fp8-full": {"activation_checkpointing": "full", "base_precision": "fp8"},
    "chat-bf16": {"chat": True},
    "chat-fp8": {"chat": True, "base_precision": "fp8"},
    "bf16-dropout": {"lora_dropout": 0.05},
    "bf16-auto": {"activation_checkpointing": "auto"},
    "bf16-compiled": {"compile": True},
    "bf16-plain": {"compile": False},
    "phi-4-sharded": {"shape": "phi-4", "activation_checkpointing": "full", "parallel": "fsdp"},
}


def random_model(shape: str, base_precision: str | None = None, parallel: str | None = None) -> Any:
    """Return a ``Phi3ForCausalLM`` of one of ``SHAPES`` with random bf16 weights, the same in every process.

    It is on the process's GPU, or the CPU where there is none, or with ``parallel="fsdp"`` split over all GPUs while
    it is made.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = Phi3Config(**{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **SHAPES[shape]})
    with torch.device("meta"):
        model = Phi3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)

    def make(module: Any) -> None:
        module.to_empty(device=device)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.02)
            else:
                parameter.data.fill_(1.0)
        if base_precision is not None and module is not model.lm_head:
            quantize_base(module, base_precision)

    if parallel == "fsdp" and join_processes(device) > 1:
        shard(model, prepare=make)
    else:
        for layer in model.model.layers:
            make(layer)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        make(module)
    return model.eval()


def random_chats(documents: list[int], vocabulary: int, row_tokens: int = ROW_TOKENS) -> p3.ChatDataset:
    """Return a dataset of documents of the given lengths, every token trained."""
    ids = np.random.default_rng(0).integers(0, vocabulary, sum(documents), dtype=np.int32)
    return p3.ChatDataset(
        ids, ids.copy(), np.concatenate([[0], np.cumsum(documents)]), max_length=row_tokens, pad_token_id=0,
        end_of_turn_id=0, format="random", rows=np.arange(len(documents)) + 1,
        truncated=np.zeros(len(documents), dtype=bool),
    )  # fmt: skip


def document_lengths(chat: bool, steps: int, rows: int = ROWS, row_tokens: int = ROW_TOKENS) -> list[int]:
    """Return full rows, or chat lengths: lognormal with median 350 tokens and sigma 0.8, cut to 32..2048."""
    if not chat:
        return [row_tokens] * (rows * steps)
    generator, lengths = np.random.default_rng(0), []
    while sum(lengths) < 1.05 * ROWS * ROW_TOKENS * steps:
        lengths.append(int(np.clip(generator.lognormal(np.log(350), 0.8), 32, ROW_TOKENS)))
    return lengths


class StepTimes(p3.Callback):
    """Record a CUDA event at the end of each step, without making the device wait."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_step_s = 0.0
        self.events: list[tuple[torch.cuda.Event, int]] = []

    def on_step_end(self, state: Any) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append((event, state.tokens_seen))
        if len(self.events) == 1:
            torch.cuda.synchronize()
            self.first_step_s = time.perf_counter() - self.started

    def tokens_per_s(self, warmup: int) -> float:
        torch.cuda.synchronize()
        steps = list(zip(self.events[warmup:], self.events[warmup + 1 :], strict=False))
        return statistics.median(1000 * (b - a) / e.elapsed_time(f) for (e, a), (f, b) in steps)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes of each sum of gradients that begins inside the block."""
    sizes: list[int] = []
    begin = World.begin_sum_

    def counting(world: World, tensor: torch.Tensor) -> Any:
        sizes.append(tensor.nbytes)
        return begin(world, tensor)

    World.begin_sum_ = counting  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        World.begin_sum_ = begin  # type: ignore[method-assign]


def same_everywhere(model: Any) -> bool:
    """Return whether the adapters have the same bits in all processes."""
    if join_processes(torch.device("cuda", torch.cuda.current_device())) == 1:
        return True
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, digest({name: p for name, p in model.named_parameters() if p.requires_grad}))
    return len(set(hashes)) == 1


@contextmanager
def profiled(folder: str | None, mode: str) -> Iterator[None]:
    """With a folder, write the milliseconds of every kernel, summed over all steps, to ``folder/mode.txt``."""
    if folder is None:
        yield
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda k: -k.device_time_total)
    lines = [f"{k.device_time_total / 1000:10.2f} ms {k.count:7}  {k.key[:150]}" for k in kernels]
    Path(folder, f"{mode}.txt").write_text("\n".join(lines))


def measure(mode: str, steps: int, warmup: int, folder: str, profile: str | None = None) -> dict[str, Any]:
    """Measure one mode in this process, or in this and the others that torchrun started with it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = dict(MODES[mode])
    chat, dropout = options.pop("chat", False), options.pop("lora_dropout", 0.0)
    rows, row_tokens = options.pop("rows", ROWS), options.pop("row_tokens", ROW_TOKENS)
    base = options.pop("base_precision", None), options.get("parallel")
    model = random_model(options.pop("shape", "phi-3-mini"), *base)
    p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout))
    lengths = document_lengths(chat, steps * processes, rows, row_tokens)
    chats = random_chats(lengths, model.config.vocab_size, row_tokens)
    predicted = plan_memory(model, rows * row_tokens, "fused" if options.get("compile") is None else "plain").peak_gib
    torch.cuda.reset_peak_memory_stats()
    times = StepTimes()
    config = p3.TrainingConfig(
        output_dir=folder, per_device_train_batch_size=rows, max_steps=steps, save_strategy="no", bf16=True,
        logging_steps=10, log_level="error", disable_tqdm=True, **options,
    )  # fmt: skip
    with profiled(profile, mode), counted_bytes() as sizes:
        result = p3.train(model, chats, config, callbacks=[times])
    speed = times.tokens_per_s(warmup)
    context = float((chats.lengths.astype(float) ** 2).sum() / (2 * chats.lengths.sum()))
    flops = flops_per_token(model, context) * speed
    peak = peak_flops(torch.device("cuda"))
    return {
        "mode": mode,
        "tok_per_s": round(speed),
        "tflops": round(flops / 1e12),
        "mfu": round(flops / peak / processes, 3) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "predicted_gib": round(predicted.get(config.activation_checkpointing, 0), 1),
        "first_step_s": round(times.first_step_s, 1),
        "loss": round(result.metrics["train_loss"], 3),
        "reduced_mb": round(sum(sizes) / result.global_step / 1e6, 1),
        "sums": len(sizes) // result.global_step,
        "same": same_everywhere(model),
    }


def measure_apart(
    script: str, arguments: list[str], limit_s: float, gpus: int = 0, card: int = 0
) -> dict[str, Any] | str:
    """Run a script with ``--in-process`` in its own process on one GPU, or with ``gpus`` under torchrun on so many.

    ``card`` is the position of the one GPU among the visible ones; torchrun takes the first ``gpus``.

    Returns:
        The JSON object that it prints last, or in words why there is none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    chosen = visible[:gpus] if gpus else visible[card : card + 1]  # Trainer would use all
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(chosen)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus else []
    command = [sys.executable, *torchrun, script, *arguments, "--in-process"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"ran past {limit_s:.0f} s"
        finally:
            end_group(process)
    if process.returncode:
        print(errors[-3000:], file=sys.stderr)
        return f"failed: {(errors.strip().splitlines() or [process.returncode])[-1]}"
    figures = [line for line in output.splitlines() if line.startswith('{"')]
    return json.loads(figures[-1]) if figures else "ended without a figure"  # type: ignore[no-any-return]


def measure_all(arguments: list[str], limit_s: float, gpus: int, cards: int) -> list[dict[str, Any] | str]:
    """Measure a mode under torchrun on ``gpus``, or with 0 in plain Python on each of ``cards``, all at once."""

    def measured(card: int) -> dict[str, Any] | str:
        with tempfile.TemporaryDirectory() as folder:
            return measure_apart(__file__, [*arguments, "--folder", f"{folder}/run"], limit_s, gpus, card)

    with ThreadPoolExecutor(cards) as pool:
        return list(pool.map(measured, range(1 if gpus else cards)))


def in_columns(result: dict[str, Any], share: float) -> str:
    """Return the columns of one run's line, from its speed on."""
    r = result
    return (
        f"{r['tok_per_s']:>10,} {share:>6.3f} {r['tflops']:>8} {r['mfu'] or '':>6} {r['peak_gib']:>10} "
        f"{r['predicted_gib'] or '':>10} {r['first_step_s']:>14} {r['loss']:>7} {r['reduced_mb'] or '':>8} "
        f"{r['sums'] or '':>6}" + ("" if r["same"] else "  THE ADAPTERS DIFFER BETWEEN PROCESSES")
    )


def end_group(process: subprocess.Popen[str], grace_s: float = 10) -> None:
    """End a process that was started with ``start_new_session``, and all in its group, so that none keeps GPU memory.

    They get SIGTERM first, on which torchrun ends its workers, and SIGKILL when the process has not ended in time.
    """
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def steps_of(mode: str, steps: int | None, warmup: int | None) -> tuple[int, int]:
    """Return a mode's steps and how many of them are warm-up; None: the mode's own number."""
    is_long = MODES[mode].get("row_tokens", ROW_TOKENS) >= LONG_ROW
    steps = steps or (LONG_STEPS if is_long else 24)
    warmup = (LONG_WARMUP if is_long else 8) if warmup is None else warmup
    if steps < warmup + 2:
        raise SystemExit(f"--steps {steps}; allowed: at least --warmup + 2 = {warmup + 2}, the first step has no start")
    return steps, warmup


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modes", nargs="*", default=list(MODES), metavar="MODE", help=f"one or more of {', '.join(MODES)}"
    )
    parser.add_argument("--steps", type=int, help=f"default: 24; {LONG_STEPS} for rows of {LONG_ROW:,} tokens or more")
    parser.add_argument("--warmup", type=int, help=f"steps before the measured ones; default: 8, or {LONG_WARMUP}")
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="processes under torchrun; 0: plain python, on each GPU that the largest N uses, all of them at once",
    )
    parser.add_argument(
        "--bucket-mib",
        type=int,
        help="gradients that several processes add up at a time; 1000: all at once, after the backward; default: as "
        "training does, which measures the link",
    )
    parser.add_argument("--limit-s", type=float, default=300, help="time limit of one mode's process")
    parser.add_argument("--profile", metavar="FOLDER", help="write each mode's kernel times to FOLDER (slows the host)")
    parser.add_argument("--peers", action="store_true", help="also run peers.py in the same call")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.modes) - set(MODES)
    if unknown:
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; allowed: {', '.join(MODES)}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    if options.in_process:
        if options.bucket_mib is not None:
            distributed._BUCKET_BYTES, distributed._FAST_SUM = options.bucket_mib * 2**20, math.inf
        mode = options.modes[0]
        steps, warmup = steps_of(mode, options.steps, options.warmup)
        result = measure(mode, steps, warmup, options.folder, options.profile)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        "mode              GPUs      tok/s  share  TFLOP/s    MFU   peak GiB  predicted   first step s    loss  MB sum "
        " parts"
    )
    settings = [f"--{name}={value}" for name in ("steps", "warmup") if (value := getattr(options, name)) is not None]
    buckets = [] if options.bucket_mib is None else ["--bucket-mib", str(options.bucket_mib)]
    profile = ["--profile", options.profile] if options.profile else []
    cards = max(*options.gpus, 1)
    for mode in options.modes:
        own: list[float] = []  # the speed of each GPU by itself
        for gpus in options.gpus:
            results = measure_all([mode, *settings, *buckets, *profile], options.limit_s, gpus, cards)
            for card, result in enumerate(results):
                name = f"{mode:<16} {gpus or f'GPU {card}':>5}"
                if isinstance(result, str):
                    print(f"{name} {result}", flush=True)
                    continue
                own = own or [result["tok_per_s"] / max(gpus, 1)] * cards
                if gpus == 0:
                    own[card] = result["tok_per_s"]
                linear = sum(own[:gpus]) if gpus else own[0]
                print(name, in_columns(result, result["tok_per_s"] / linear), flush=True)
    if options.peers:
        return subprocess.run([sys.executable, str(Path(__file__).with_name("peers.py")), *settings]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
