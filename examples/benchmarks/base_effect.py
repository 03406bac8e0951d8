"""Measure what a quantised base changes: tune the demo on float32, fp8, nf4 and nf4-fp8 weights, side by side.

    python examples/benchmarks/base_effect.py            # about two minutes on 2 CPU cores; writes base_effect.png

On a CPU the fp8 products use the same rounded numbers as on a GPU (e4m3, one scale per row of weight, activation and
gradient) and sum them in float32; a GPU that multiplies fp8 sums them in another order. nf4 (bitsandbytes, double
quantisation) rounds only the weights, and nf4-fp8 then multiplies them in fp8. The script prints the error of the
weights, the loss of each run, exact match and loss on the held-out chats, and the cosine between each adapter's
gradient and the exact one.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

import phi3lora as p3
from phi3lora.demo.show import LORA, TRAINING, score
from phi3lora.lora.base_weight import Fp8Linear, base_weight_of, multiply_in_fp8, nf4_linear

ROWS = [json.loads(line) for line in (p3.demo.FOLDER / "eval.jsonl").read_text().splitlines()]


def nf4_fp8_linear(base: nn.Linear) -> nn.Linear:
    """Return ``base`` in nf4, multiplied in fp8."""
    layer = nf4_linear(base)
    multiply_in_fp8(layer)
    return layer


# Layer by layer, because quantize_base needs a GPU for fp8.
FORMATS: dict[str, Any] = {
    "float32": None, "fp8": Fp8Linear.from_linear, "nf4": nf4_linear, "nf4-fp8": nf4_fp8_linear,
}  # fmt: skip


def set_format(model: Any, base: str) -> None:
    """Put the decoder's linear layers in one of ``FORMATS``."""
    for path, layer in list(model.model.named_modules()):
        if FORMATS[base] is not None and type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, FORMATS[base](layer))


def demo_model(base: str) -> tuple[Any, Any, Any, Any]:
    """Return the demo with adapters, on a base in one of ``FORMATS``."""
    model, tokenizer, train_set, eval_set = p3.demo.load()
    set_format(model, base)
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    return model, tokenizer, train_set, eval_set


def weight_errors(base: str) -> tuple[float, float]:
    """Return the median layer's relative error of the base's weights against float32, and the bits per weight."""
    exact, found = (
        [base_weight_of(m) for m in demo_model(name)[0].model.modules() if isinstance(m, nn.Linear)]
        for name in ("float32", base)
    )
    pairs = [(a.dequantize(), b.dequantize()) for a, b in zip(exact, found, strict=True)]
    error = statistics.median(((b - a).norm() / a.norm()).item() for a, b in pairs)
    return error, 8 * sum(b.nbytes for b in found) / sum(a.numel() for a, _ in pairs)


def tuned(
    base: str, folder: Path, steps: int = TRAINING["max_steps"]
) -> tuple[list[float], float, float, dict[str, torch.Tensor]]:
    """Tune; return the loss of each step, exact match, held-out loss and the adapters."""
    model, tokenizer, train_set, eval_set = demo_model(base)
    settings = {**TRAINING, "max_steps": steps, "logging_steps": 1, "log_level": "error", "disable_tqdm": True}
    config = p3.TrainingConfig(output_dir=str(folder / base), **settings)
    history = p3.train(model, train_set, config).history
    losses = [line["loss"] for line in history if "loss" in line]
    held_out = p3.evaluate(model, eval_set)["loss"]
    return losses, score(model, tokenizer, ROWS).exact, held_out, p3.lora_state_dict(model)


def gradients(base: str, adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of each adapter on one batch, at the given adapters."""
    model, _, train_set, _ = demo_model(base)
    model.load_state_dict(adapters, strict=False)
    loss, count = p3.causal_lm_loss(model, next(iter(p3.batches(train_set, batch_size=4))))
    (loss / count).backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Plot the losses over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--", ":", "-."), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=f"{name} base")
    axes.set(xlabel="step", ylabel="training loss, nats a token", yscale="log", title="The demo on four bases")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Tune on each base, compare and plot."""
    runs = {base: tuned(base, folder) for base in FORMATS}
    print("step   " + "".join(f"{base:>12}" for base in runs))
    for step in (0, 9, 19, 39, TRAINING["max_steps"] - 1):
        print(f"{step + 1:4}   " + "".join(f"{losses[step]:12.4f}" for losses, *_ in runs.values()))
    halfway = tuned("float32", folder, 10)[3]
    for base, (_, exact, held_out, _) in runs.items():
        print(f"\n{base}: exact match on {len(ROWS)} questions {exact:.1%}, held-out loss {held_out:.5f}")
        if base == "float32":
            continue
        error, bits = weight_errors(base)
        print(f"weights off by {error:.1%}, {bits:.2f} bits a number")
        for when, adapters in (("after 10 steps", halfway), ("at the end", runs[base][3])):
            exactly, rounded = gradients("float32", adapters), gradients(base, adapters)
            cosines = {name: cosine_similarity(rounded[name], g, dim=0).item() for name, g in exactly.items()}
            worst = min(cosines, key=lambda name: cosines[name])
            median = statistics.median(cosines.values())
            print(f"gradient cosine by adapter {when}: median {median:.4f}, lowest {cosines[worst]:.4f} ({worst})")
    draw({base: losses for base, (losses, *_) in runs.items()}, folder / "base_effect.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
