"""Train Phi-3-mini's shape on the demo's chats with each base precision, and print the learning curves side by side.

    python examples/benchmarks/learning_curves.py bf16 fp8                        # a GPU: 150 steps of 4 x 2,048 tokens
    python examples/benchmarks/learning_curves.py bf16 fp8 --shape tiny --steps 20 --row-tokens 64       # a CPU

Each precision trains in its own process, from the same random bf16 weights and adapters, on the same batches. Adapters
on a random base learn which words are frequent and a little more. The table has the mean loss of each ten steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from base_effect import FORMATS, set_format
from benchmark import ROW_TOKENS, ROWS, SHAPES, measure_apart, random_model

import phi3lora as p3

SHAPES["tiny"] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1536, "pad_token_id": 0,
}  # fmt: skip
BASES = ["bf16", *(name for name in FORMATS if name != "float32")]


def losses(base: str, shape: str, steps: int, row_tokens: int, learning_rate: float, folder: str) -> list[float]:
    """Train on one base and return the loss of each step."""
    precision = None if base == "bf16" else base
    on_gpu = torch.cuda.is_available()
    model = random_model(shape, precision if on_gpu else None)
    if precision and not on_gpu:  # quantize_base needs a GPU for fp8
        set_format(model, precision)
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(r=64))
    _, _, chats, _ = p3.demo.load()
    config = p3.TrainingConfig(
        output_dir=folder, per_device_train_batch_size=ROWS, max_length=row_tokens, max_steps=steps, seed=0, bf16=True,
        learning_rate=learning_rate, logging_steps=1, save_strategy="no", log_level="error", disable_tqdm=True,
    )  # fmt: skip
    return [line["loss"] for line in p3.train(model, chats, config).history if "loss" in line]


def table(curves: dict[str, list[float]]) -> str:
    """Return the mean loss of each ten steps in Markdown, and the largest gap to the first curve."""
    lines = [f"| steps | {' | '.join(curves)} |", "|---" * (1 + len(curves)) + "|"]
    first, gaps = next(iter(curves)), []
    for start in range(0, len(curves[first]), 10):
        means = {base: mean(curve[start : start + 10]) for base, curve in curves.items()}
        end = min(start + 10, len(curves[first]))
        lines.append(f"| {start + 1}-{end} | " + " | ".join(f"{value:.4f}" for value in means.values()) + " |")
        gaps += [(abs(value - means[first]), base, f"{start + 1}-{end}") for base, value in means.items()]
    gap, base, where = max(gaps)
    return "\n".join([*lines, "", f"Largest gap to {first}: {gap:.4f} ({base}, steps {where})"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", choices=BASES, metavar="BASE", help=f"one or more of {', '.join(BASES)}")
    parser.add_argument("--shape", default="phi-3-mini", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--row-tokens", type=int, default=ROW_TOKENS)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--limit-s", type=float, default=300, help="time limit of one base's process")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes: dict[str, Any] = {n: getattr(options, n) for n in ("shape", "steps", "row_tokens", "learning_rate")}
    if options.in_process:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"losses": losses(options.bases[0], folder=str(Path(folder, "run")), **sizes)}))
        return 0
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    curves: dict[str, list[float]] = {}
    for base in options.bases:
        result = measure_apart(__file__, [base, *settings], options.limit_s)
        if isinstance(result, str):
            print(f"{base}: {result}")
            return 1
        curves[base] = result["losses"]
        print(f"{base}: loss {mean(curves[base][-10:]):.4f} at the end", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{options.shape}, {options.steps} steps of {ROWS} x {options.row_tokens} tokens, {device}\n\n{table(curves)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
