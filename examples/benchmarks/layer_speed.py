"""Measure what adapted layers cost: forward and backward against a plain layer, and calls without gradients.

    python examples/benchmarks/layer_speed.py
    python examples/benchmarks/layer_speed.py --calls --device cuda

The first table is of one fused projection on the CPU: 512 tokens, 3072 -> 9216 (Phi-3-mini's qkv_proj), float32,
2 threads, r = 16 on all three segments. The input requires a gradient, as it does in every layer but the first.

``--calls`` shows microseconds a call without gradients (on a CPU, of its own time), for 1 to 2,048 rows, in float32 and
bf16: of qkv_proj with q and v adapted, and of a decoder layer's four projections together. The columns are the base
alone; our layers called as they are; our layers in an ``eval_mode`` block, as in ``generate`` and ``evaluate``; and
PEFT's layers, which adapt a fused projection as one.

The layers take turns, and the best time of each counts, since other work on the machine can only add time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import loralib
import torch
from torch import Tensor, nn

import phi3lora as p3
from phi3lora.model.forward import eval_mode


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


# --- Calls without gradients


class Projections(nn.Module):
    """The four projections of a decoder layer, each called with an input of its own."""

    def __init__(self, features: int, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        inner = features * 8 // 3 // 8 * 8
        options = {"bias": False, "dtype": dtype, "device": device}
        self.qkv_proj, self.o_proj = nn.Linear(features, width, **options), nn.Linear(features, features, **options)
        self.gate_up_proj, self.down_proj = (
            nn.Linear(features, 2 * inner, **options),
            nn.Linear(inner, features, **options),
        )

    def call(self, inputs: dict[int, Tensor], names: tuple[str, ...]) -> None:
        """Call some of them."""
        for name in names:
            layer = getattr(self, name)
            layer(inputs[layer.in_features])


ALL = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CASES = {"q and v": (("qkv_proj",), ["q", "v"]), "all four": (ALL, "all-linear")}
"""Targets by name: the projections that are called, and our ``target_modules``."""
COLUMNS = ("base", "phi3lora", "phi3lora, eval_mode", "PEFT")


def adapted(options: argparse.Namespace, dtype: torch.dtype, case: str) -> dict[str, Projections]:
    """Return the projections without adapters, with ours and, if it is installed, with PEFT's."""
    names, targets = CASES[case]
    made = {name: Projections(options.features, options.width, dtype, options.device) for name in COLUMNS}
    third, half = options.width // 3, made["base"].gate_up_proj.out_features // 2
    segments = {"qkv_proj": {"q": third, "k": third, "v": options.width - 2 * third}, "gate_up_proj": [half, half]}
    ours = made["phi3lora"]
    p3.inject_lora(ours, p3.LoraConfig(r=16, target_modules=targets, segments=segments))
    made["phi3lora, eval_mode"] = ours
    try:
        import peft
    except ImportError:
        del made["PEFT"]
    else:
        config = peft.LoraConfig(r=16, target_modules=list(names))
        made["PEFT"] = peft.get_peft_model(made["PEFT"], config).base_model.model
    for layers in made.values():
        layers.eval()
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return made


def microseconds(call: Callable[[], None], device: str, at_least_s: float) -> float:
    """Time a call: the mean of as many as fill the time."""
    clock, count = time.process_time if device == "cpu" else time.perf_counter, 1
    while True:
        started = clock()
        for _ in range(count):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        spent = clock() - started
        if spent >= at_least_s:
            return 1e6 * spent / count
        count *= 2


@torch.no_grad()
def print_calls(options: argparse.Namespace) -> None:
    """Print a table row for each dtype, target and number of rows."""
    print(f"| dtype | targets | rows | {' us | '.join(COLUMNS)} us | base / eval_mode | PEFT / eval_mode |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for dtype in (torch.float32, torch.bfloat16):
        for case, (names, _) in CASES.items():
            made = adapted(options, dtype, case)
            for rows in options.rows:
                widths = {getattr(made["base"], name).in_features for name in names}
                inputs = {n: torch.randn(rows, n, dtype=dtype, device=options.device) for n in widths}
                calls = {column: partial(layers.call, inputs, names) for column, layers in made.items()}
                best = dict.fromkeys(made, float("inf"))
                for column in [*made] * options.repetitions:
                    with eval_mode(made[column]) if column.endswith("eval_mode") else torch.no_grad():
                        calls[column]()
                        spent = microseconds(calls[column], options.device, options.seconds)
                    best[column] = min(best[column], spent)
                print(_row(str(dtype)[6:], case, rows, best), flush=True)


def _row(dtype: str, case: str, rows: int, best: dict[str, float]) -> str:
    kept, peft = best["phi3lora, eval_mode"], best.get("PEFT")
    times = " | ".join(f"{best[column]:,.0f}" if column in best else "-" for column in COLUMNS)
    ratio = "-" if peft is None else f"{peft / kept:.2f}"
    return f"| {dtype} | {case} | {rows:,} | {times} | {best['base'] / kept:.2f} | {ratio} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--features", type=int, default=3072, help="width of the input")
    parser.add_argument("--width", type=int, default=9216, help="width of the output, three equal segments")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", action="store_true", help="the table of calls without gradients")
    parser.add_argument("--device", default="cpu", help="of the calls")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 2048], help="of the calls")
    parser.add_argument("--seconds", type=float, default=0.02, help="time that a measurement of calls fills at least")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    print(f"torch {torch.__version__}, {device}, {options.threads} threads, {time.strftime('%Y-%m-%d')}\n")
    if options.calls:
        print_calls(options)
        return 0
    best = best_seconds(options.tokens, options.features, options.width, options.repetitions)
    base, trained, *_ = best.values()
    print("| layer | forward + backward, ms | against weight frozen | against weight trained |\n|---|---|---|---|")
    for name, value in best.items():
        print(f"| `{name}` | {1000 * value:.0f} | {value / base:.2f} | {value / trained:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
