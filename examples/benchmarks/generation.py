"""Measure generation: new tokens a second, ours beside transformers, PEFT and a compiled static cache.

    python examples/benchmarks/generation.py                  # every row that can run here; markdown tables
    python examples/benchmarks/generation.py batch-1 peft-1   # some rows
    python examples/benchmarks/generation.py cpu-bf16         # of those that need no GPU

Rows of one model share a process. A row that fails or exceeds its time limit is named, and those after it go on in a
new process.

On a GPU the model has Phi-3-mini's shape and random bf16 weights; adapters of r = 16 on all four projections are on,
unless the row says merged. Prompts have 128 random tokens and answers 128, greedy, and nothing stops them early.
``mixed`` answers 256 prompts with 16 to 256 tokens each, as if a stop token ended them; peers compute all 256 and only
the tokens that count are counted. tok/s counts new tokens and includes prefill, CUDA graphs and all else that a call
does; it is the best of several calls after one to warm up. ``first-answer`` is the first call after the model was
loaded: seconds for a prompt of 128 tokens and one new token, then for 128, with Triton's cache of compiled kernels
empty, and then full.

On the CPU the model is the embedded one, with adapters of r = 8 on all four projections: 16 prompts of 24 tokens, or
one, with 48 new tokens each, on one thread. Calls with the adapters on and off take turns, 8 of each, half a second
long. tok/s is by the process's own time and the best of them; the ratio is the median of the turns' ratios, because
other work on a machine slows both calls of a turn. ``cpu-peft`` rows are transformers' loop with PEFT's adapters.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
import transformers
from benchmark import end_group, random_model
from peers import adapt_by_peft, tiny_model
from torch import Tensor
from transformers import GenerationConfig

import phi3lora as p3
from phi3lora.inference import decoding
from phi3lora.lora.base_weight import quantize_base
from phi3lora.model.forward import eval_mode

TINY = int(os.environ.get("TINY_GENERATION", "0"))
"""Prompts of ``mixed`` on a tiny model on the CPU, to test this script; 0: the real measurement."""
PROMPT_TOKENS, NEW_TOKENS = (8, 4) if TINY else (128, 128)
MIXED = [2 + i % 5 for i in range(TINY)] or [16 + (37 * i) % 241 for i in range(256)]
"""Lengths of the answers to the mixed prompts: 16 to 256 tokens."""


def random_weights(base_precision: str | None = None) -> Any:
    """Return the random model without adapters."""
    if not TINY:
        return random_model("phi-3-mini", base_precision)
    model = tiny_model().requires_grad_(False).eval()
    if base_precision is not None:
        quantize_base(model, base_precision)
    return model


def adapted_model(base_precision: str | None = None) -> Any:
    """Return the random model with adapters that are not zero."""
    model = random_weights(base_precision)
    p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.01)
    return model.eval()


def peft_model() -> Any:
    """Return the random model with PEFT's adapters."""
    return adapt_by_peft(random_weights()).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "adapters": adapted_model,
    "nf4": lambda: adapted_model("nf4"),
    "fp8": lambda: adapted_model("fp8"),
    "merged": random_weights,
    "peft": peft_model,
}


def random_prompts(count: int, vocabulary: int = 100 if TINY else 32000) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (count, PROMPT_TOKENS), generator=generator).tolist()


def ours(
    model: Any, prompts: list[list[int]], slots: int, lengths: Sequence[int] | None = None, new: int = NEW_TOKENS
) -> int:
    """Answer the prompts with phi3lora and return the number of new tokens."""
    stream = decoding.Stream
    if lengths is not None:

        class Ending(stream):  # type: ignore[misc, valid-type]
            def _ends(self, number: int) -> bool:
                return len(self.answers[number]) == lengths[number]

        decoding.Stream = Ending  # type: ignore[misc]
    try:
        with eval_mode(model):
            new = new if lengths is None else max(lengths)
            answers = decoding.decode(model, prompts, max_new_tokens=new, slots=slots, stops=[])
    finally:
        decoding.Stream = stream  # type: ignore[misc]
    assert [len(answer) for answer in answers] == list(lengths or [new] * len(prompts))
    return sum(map(len, answers))


def by_transformers(
    model: Any, prompts: list[list[int]], slots: int, lengths: Sequence[int] | None = None, new: int = NEW_TOKENS,
    **options: Any,
) -> int:  # fmt: skip
    """Answer the prompts with transformers' ``generate`` and return the number of new tokens that count."""
    new = new if lengths is None else max(lengths)
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    for first in range(0, len(prompts), slots):
        ids = torch.tensor(prompts[first : first + slots], device=model.device)
        with torch.no_grad():
            output: Tensor = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        assert output.shape[1] == ids.shape[1] + new
    return new * len(prompts) if lengths is None else sum(lengths)


Row = tuple[str, Callable[..., int], int, dict[str, Any]]
STATIC = {"cache_implementation": "static"}
ROWS: dict[str, Row] = {  # rows of one model are measured in one process
    "batch-1": ("adapters", ours, 1, {}),
    "batch-16": ("adapters", ours, 16, {}),
    "batch-64": ("adapters", ours, 64, {}),
    "mixed": ("adapters", ours, 256, {"lengths": MIXED}),
    "transformers-1": ("adapters", by_transformers, 1, {}),
    "transformers-16": ("adapters", by_transformers, 16, {}),
    "nf4-1": ("nf4", ours, 1, {}),
    "nf4-16": ("nf4", ours, 16, {}),
    "fp8-1": ("fp8", ours, 1, {}),
    "fp8-16": ("fp8", ours, 16, {}),
    "merged-1": ("merged", ours, 1, {}),
    "transformers-merged-1": ("merged", by_transformers, 1, {}),
    "transformers-merged-16": ("merged", by_transformers, 16, {}),
    "peft-1": ("peft", by_transformers, 1, {}),
    "peft-16": ("peft", by_transformers, 16, {}),
    "peft-mixed": ("peft", by_transformers, 256, {"lengths": MIXED}),
    "compiled-merged-1": ("merged", by_transformers, 1, STATIC),
}
CPU_ROWS: dict[str, tuple[torch.dtype, int, Callable[..., int]]] = {  # dtype, prompts, loop; a process for each
    "cpu-float32": (torch.float32, 16, ours),
    "cpu-bf16": (torch.bfloat16, 16, ours),
    "cpu-float32-1": (torch.float32, 1, ours),
    "cpu-bf16-1": (torch.bfloat16, 1, ours),
    "cpu-peft-float32": (torch.float32, 16, by_transformers),
    "cpu-peft-bf16": (torch.bfloat16, 16, by_transformers),
}
NAMES = [*ROWS, "first-answer", *CPU_ROWS]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], int]) -> tuple[int, float]:
    """Return what a call returns, and its seconds."""
    synchronize()
    started = time.perf_counter()
    count = call()
    synchronize()
    return count, time.perf_counter() - started


def measure(names: Sequence[str], calls: int) -> None:
    """Measure rows of one model in this process; print a line of the table as soon as it is known."""
    model = MODELS[ROWS[names[0]][0]]()
    for name in names:
        _, answer, slots, options = ROWS[name]
        if TINY and "lengths" in options:
            options = {"lengths": options["lengths"][:TINY]}
        prompts = random_prompts(len(options.get("lengths", range(slots))))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        call = partial(answer, model, prompts, slots, **options)
        _, first_s = timed(call)
        best = max(count / seconds for count, seconds in (timed(call) for _ in range(calls)))
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        print(f"| `{name}` | {best:,.1f} | {peak:.1f} | {first_s:.1f} |", flush=True)


def first_answer() -> None:
    """Print the seconds of a new process's first answers: of one token, then of 128."""
    model, (prompt,) = adapted_model(), random_prompts(1)
    with eval_mode(model):
        for count in (1, NEW_TOKENS):
            _, s = timed(lambda n=count: len(decoding.decode(model, [prompt], max_new_tokens=n, slots=1, stops=[])))
            print(f"| `first-answer`, {count} new tokens | {count / s:,.1f} | | {s:.2f} |", flush=True)


def measure_on_cpu(name: str, calls: int) -> None:
    """Print a line of the CPU's table: with the adapters on, with them off, and the ratio."""
    torch.set_num_threads(1)
    dtype, count, answer = CPU_ROWS[name]
    model, _, chats, _ = p3.demo.load()
    prompts = [chats[i]["input_ids"][:24] for i in range(len(chats)) if len(chats[i]["input_ids"]) >= 24][:count]
    model = model.to(dtype)
    if answer is ours:
        p3.inject_lora(model, p3.LoraConfig(r=8))
        off = partial(p3.disabled, model)
    else:
        model = adapt_by_peft(model, r=8).eval()
        off = model.disable_adapter
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(std=0.01)
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(1 if TINY else 4 * calls):
        for state, switch in (("on", nullcontext), ("off", off)):
            with switch():
                started = time.process_time()
                tokens = answer(model, prompts, count, new=4 if TINY else 48)
                speeds[state].append(tokens / (time.process_time() - started))
    ratio = statistics.median(on / off for on, off in zip(speeds["on"], speeds["off"], strict=True))
    print(f"| `{name}` | {max(speeds['on']):,.0f} | {max(speeds['off']):,.0f} | {ratio:.2f} |", flush=True)


def run_apart(names: Sequence[str], options: argparse.Namespace, environment: dict[str, str] | None = None) -> None:
    """Run rows in a process of their own, which prints a line for each; go on in a new one after a row that fails."""
    waiting = list(names)
    for name in [name for name in names if "peft" in name and importlib.util.find_spec("peft") is None]:
        print(f"| `{waiting.pop(waiting.index(name))}` | not installed: peft | | |", flush=True)
    while waiting:
        command = [sys.executable, __file__, *waiting, "--calls", str(options.calls), "--in-process"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}), start_new_session=True
        ) as process:
            try:
                for line in _lines(process, options.limit_s):
                    print(line, end="", flush=True)
                    name = line.removeprefix("| `").partition("`")[0]
                    waiting = waiting[1:] if waiting[:1] == [name] else waiting
                with suppress(subprocess.TimeoutExpired):
                    process.wait(options.limit_s)
            finally:
                end_group(process)
        if waiting:
            why = "out of time" if process.returncode < 0 else f"exit status {process.returncode}"
            print(f"| `{waiting.pop(0)}` | {why} | | |", flush=True)


def _lines(process: subprocess.Popen[str], limit_s: float) -> Iterator[str]:
    """Yield what a process prints; end it when a line takes longer than the limit."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(limit_s, end_group, [process])
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def main() -> int:
    gpu = bool(TINY) or torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"one or more of {', '.join(NAMES)}")
    parser.add_argument("--calls", type=int, default=2, help="measured calls, of which the best counts")
    parser.add_argument("--limit-s", type=float, default=150, help="time limit of a row, loading its model included")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or (NAMES if gpu else list(CPU_ROWS))
    unknown = set(names) - set(NAMES)
    if unknown:
        parser.error(f"unknown row {', '.join(sorted(unknown))}; allowed: {', '.join(NAMES)}")
    if options.in_process:
        measure_here(names, options.calls)
        return 0
    on_gpu, on_cpu = [name for name in names if name not in CPU_ROWS], [name for name in names if name in CPU_ROWS]
    if on_gpu and not gpu:
        parser.error(f"{', '.join(on_gpu)}: a CUDA device is needed")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")
    if on_gpu:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a tiny model on the CPU"
        print(f"\n{card}\n\n| row | new tok/s | peak GiB | first call, s |\n|---|---|---|---|", flush=True)
    for model in MODELS:
        run_apart([name for name in on_gpu if name in ROWS and ROWS[name][0] == model], options)
    if "first-answer" in on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("empty", "full"):
                print(f"| Triton's cache of kernels {state} | | | |", flush=True)
                run_apart(["first-answer"], options, {"TRITON_CACHE_DIR": folder})
    if on_cpu:
        print("\n| row on the CPU | adapters on, new tok/s | base alone | ratio |\n|---|---|---|---|", flush=True)
    for name in on_cpu:
        run_apart([name], options, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    return 0


def measure_here(names: Sequence[str], calls: int) -> None:
    """Measure rows of one model in this process."""
    if names[0] in CPU_ROWS:
        measure_on_cpu(names[0], calls)
    elif names[0] == "first-answer":
        first_answer()
    else:
        measure(names, calls)


if __name__ == "__main__":
    sys.exit(main())
