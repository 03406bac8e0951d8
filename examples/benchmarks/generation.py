"""Measure generation on one GPU: new tokens a second, ours beside transformers, PEFT and a compiled static cache.

    python examples/benchmarks/generation.py                  # every row, each in its own process; a markdown table
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
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark import measure_apart, random_model
from torch import Tensor
from transformers import GenerationConfig

import phi3lora as p3
from phi3lora.inference import decoding
from phi3lora.model.forward import eval_mode

PROMPT_TOKENS, NEW_TOKENS = 128, 128
MIXED = [16 + (37 * i) % 241 for i in range(256)]
"""Lengths of the answers to the mixed prompts: 16 to 256 tokens."""


def adapted_model(base_precision: str | None = None) -> Any:
    """Return the random model with adapters that are not zero."""
    model = random_model("phi-3-mini", base_precision)
    p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.01)
    return model.eval()


def merged_model() -> Any:
    """Return a model without adapters, which is what merging leaves."""
    return random_model("phi-3-mini")


def peft_model() -> Any:
    """Return the model with PEFT's adapters."""
    from peers import adapt_by_peft

    return adapt_by_peft(random_model("phi-3-mini")).eval()


def random_prompts(count: int, vocabulary: int = 32000) -> list[list[int]]:
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
        ids = torch.tensor(prompts[first : first + slots], device="cuda")
        with torch.no_grad():
            output: Tensor = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        assert output.shape[1] == ids.shape[1] + new
    return NEW_TOKENS * len(prompts) if lengths is None else sum(lengths)


def nf4() -> Any:
    return adapted_model("nf4")


def fp8() -> Any:
    return adapted_model("fp8")


Row = tuple[Callable[[], Any], Callable[..., int], int, dict[str, Any]]
STATIC = {"cache_implementation": "static"}
ROWS: dict[str, Row] = {
    "batch-1": (adapted_model, ours, 1, {}),
    "batch-16": (adapted_model, ours, 16, {}),
    "batch-64": (adapted_model, ours, 64, {}),
    "mixed": (adapted_model, ours, 256, {"lengths": MIXED}),
    "mixed-128-rows": (adapted_model, ours, 128, {"lengths": MIXED}),
    "nf4-1": (nf4, ours, 1, {}),
    "nf4-16": (nf4, ours, 16, {}),
    "fp8-1": (fp8, ours, 1, {}),
    "fp8-16": (fp8, ours, 16, {}),
    "merged-1": (merged_model, ours, 1, {}),
    "transformers-1": (adapted_model, by_transformers, 1, {}),
    "transformers-16": (adapted_model, by_transformers, 16, {}),
    "transformers-merged-1": (merged_model, by_transformers, 1, {}),
    "transformers-merged-16": (merged_model, by_transformers, 16, {}),
    "peft-1": (peft_model, by_transformers, 1, {}),
    "peft-16": (peft_model, by_transformers, 16, {}),
    "peft-mixed": (peft_model, by_transformers, 256, {"lengths": MIXED}),
    "compiled-merged-1": (merged_model, by_transformers, 1, STATIC),
    "compiled-peft-1": (peft_model, by_transformers, 1, STATIC),
}


def timed(call: Callable[[], int]) -> tuple[int, float]:
    """Return what a call returns, and its seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    count = call()
    torch.cuda.synchronize()
    return count, time.perf_counter() - started


def measure(name: str, calls: int) -> dict[str, Any]:
    """Measure one row in this process."""
    if name == "first-answer":
        model, (prompt,) = adapted_model(), random_prompts(1)
        with eval_mode(model):
            seconds = [
                timed(lambda n=n: len(decoding.decode(model, [prompt], max_new_tokens=n, slots=1, stops=[])))[1]
                for n in (1, NEW_TOKENS)
            ]
        return {"seconds": [round(s, 2) for s in seconds]}
    make_model, answer, slots, options = ROWS[name]
    model = make_model()
    prompts = random_prompts(len(options.get("lengths", range(slots))))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, warm_up_s = timed(lambda: answer(model, prompts, slots, **options))
    best = max(
        count / seconds
        for count, seconds in (timed(lambda: answer(model, prompts, slots, **options)) for _ in range(calls))
    )
    peak = torch.cuda.max_memory_allocated()
    assert torch.cuda.memory_allocated() <= before + 2**26 or answer is not ours, "the cache was not freed"
    return {"tok_per_s": round(best, 1), "peak_gib": round(peak / 2**30, 1), "warm_up_s": round(warm_up_s, 1)}


def main() -> int:
    names = [*ROWS, "first-answer"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names, metavar="ROW", help=f"one or more of {', '.join(names)}")
    parser.add_argument("--calls", type=int, default=2, help="measured calls, of which the best counts")
    parser.add_argument("--limit-s", type=float, default=90, help="time limit of one row's process")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"unknown row {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    if options.in_process:
        print(json.dumps(measure(options.names[0], options.calls)))
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| row | new tok/s | peak GiB | first call, s |\n|---|---|---|---|")
    settings = ["--calls", str(options.calls)]
    for name in options.names:
        if name == "first-answer":
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                for cache in ("empty", "full"):
                    print(
                        f"| `{name}`, Triton's cache {cache} | {measure_apart(__file__, [name], options.limit_s)} | | |"
                    )
                del os.environ["TRITON_CACHE_DIR"]
            continue
        r = measure_apart(__file__, [name, *settings], options.limit_s)
        text = f"{r} | | " if isinstance(r, str) else f"{r['tok_per_s']:,} | {r['peak_gib']} | {r['warm_up_s']}"
        print(f"| `{name}` | {text} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
