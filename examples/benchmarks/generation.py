"""Measure generation on one GPU: new tokens a second, ours beside transformers, PEFT and a compiled static cache.

    python examples/benchmarks/generation.py                  # every row, a process for each model; a markdown table
    python examples/benchmarks/generation.py batch-1 peft-1   # some rows

The model has Phi-3-mini's shape and random bf16 weights; adapters of r = 16 on all four projections are on, unless the
row says merged. Prompts have 128 random tokens and answers 128, greedy, and nothing stops them early. ``mixed`` answers
256 prompts with 16 to 256 tokens each, as if a stop token ended them; peers compute all 256 and only the tokens that
count are counted. tok/s counts new tokens and includes prefill, CUDA graphs and all else that a call does; it is the
best of several calls after one to warm up. ``first-answer`` is the first call after the model was loaded: seconds for a
prompt of 128 tokens and one new token, then for 128, with Triton's cache of compiled kernels empty, and then full.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from benchmark import random_model
from peers import adapt_by_peft, tiny_model
from torch import Tensor
from transformers import GenerationConfig

import phi3lora as p3
from phi3lora.inference import decoding
from phi3lora.model.forward import eval_mode

TINY = int(os.environ.get("TINY_GENERATION", "0"))
"""Prompts of ``mixed`` on a tiny model on the CPU, to test this script; 0: the real measurement."""
PROMPT_TOKENS, NEW_TOKENS = (8, 4) if TINY else (128, 128)
MIXED = [2 + i % 5 for i in range(TINY)] or [16 + (37 * i) % 241 for i in range(256)]
"""Lengths of the answers to the mixed prompts: 16 to 256 tokens."""


def random_weights(base_precision: str | None = None) -> Any:
    """Return the random model without adapters."""
    return tiny_model().eval() if TINY else random_model("phi-3-mini", base_precision)


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


def ours(model: Any, prompts: list[list[int]], slots: int, lengths: Sequence[int] | None = None) -> int:
    """Answer the prompts with phi3lora and return the number of new tokens."""
    stream = decoding.Stream
    if lengths is not None:

        class Ending(stream):  # type: ignore[misc, valid-type]
            def _ends(self, number: int) -> bool:
                return len(self.answers[number]) == lengths[number]

        decoding.Stream = Ending  # type: ignore[misc]
    try:
        with eval_mode(model):
            new = NEW_TOKENS if lengths is None else max(lengths)
            answers = decoding.decode(model, prompts, max_new_tokens=new, slots=slots, stops=[])
    finally:
        decoding.Stream = stream  # type: ignore[misc]
    assert [len(answer) for answer in answers] == list(lengths or [NEW_TOKENS] * len(prompts))
    return sum(map(len, answers))


def by_transformers(
    model: Any, prompts: list[list[int]], slots: int, lengths: Sequence[int] | None = None, **options: Any
) -> int:
    """Answer the prompts with transformers' ``generate`` and return the number of new tokens that count."""
    new = NEW_TOKENS if lengths is None else max(lengths)
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    for first in range(0, len(prompts), slots):
        ids = torch.tensor(prompts[first : first + slots], device=model.device)
        with torch.no_grad():
            output: Tensor = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        assert output.shape[1] == ids.shape[1] + new
    return NEW_TOKENS * len(prompts) if lengths is None else sum(lengths)


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


def run_apart(arguments: list[str], limit_s: float, environment: dict[str, str] | None = None) -> None:
    """Run this script in a process of its own, which prints lines of the table; say so where it fails."""
    command = [sys.executable, __file__, *arguments, "--in-process"]
    try:
        subprocess.run(command, check=True, timeout=limit_s, env={**os.environ, **(environment or {})})
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"| {arguments[0]} and those after it | {type(error).__name__} | | |", flush=True)


def main() -> int:
    names = [*ROWS, "first-answer"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names, metavar="ROW", help=f"one or more of {', '.join(names)}")
    parser.add_argument("--calls", type=int, default=2, help="measured calls, of which the best counts")
    parser.add_argument("--limit-s", type=float, default=150, help="time limit of one model's process")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"unknown row {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    if not (TINY or torch.cuda.is_available()):
        parser.error("a CUDA device is needed")
    if options.in_process and options.names == ["first-answer"]:
        first_answer()
        return 0
    if options.in_process:
        measure(options.names, options.calls)
        return 0
    card = "CPU" if TINY else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| row | new tok/s | peak GiB | first call, s |\n|---|---|---|---|", flush=True)
    for model in MODELS:
        chosen = [name for name in options.names if name in ROWS and ROWS[name][0] == model]
        if chosen:
            run_apart([*chosen, "--calls", str(options.calls)], options.limit_s)
    if "first-answer" in options.names:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("empty", "full"):
                print(f"| Triton's cache of kernels {state} | | | |", flush=True)
                run_apart(["first-answer"], options.limit_s, {"TRITON_CACHE_DIR": folder})
    return 0


if __name__ == "__main__":
    sys.exit(main())
