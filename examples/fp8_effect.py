"""What an fp8 base changes: the demo tuned on float32 and on fp8 weights, side by side.

    python examples/fp8_effect.py            # about a minute on 2 CPU cores; writes fp8_effect.png

On a CPU the fp8 products are the same rounded numbers (e4m3, a scale for each row of weight, activation and gradient)
summed in float32; a GPU that multiplies fp8 sums them in its own order. Printed: the loss of both tunings, exact match
on the held-out questions, and how far the fp8 gradient of each adapter turns away from the exact one.
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
from phi3lora.model.frozen import Fp8Linear

ROWS = [json.loads(line) for line in (p3.demo.FOLDER / "eval.jsonl").read_text().splitlines()]


def demo_model(fp8: bool) -> tuple[Any, Any, Any]:
    """The demo with adapters, on a float32 or an fp8 base."""
    model, tokenizer, train_set, _ = p3.demo.load()
    if fp8:
        for path, layer in list(model.model.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, name = path.rpartition(".")
                setattr(model.model.get_submodule(parent), name, Fp8Linear.of(layer))
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    return model, tokenizer, train_set


def tuned(
    fp8: bool, folder: Path, steps: int = TRAINING["max_steps"]
) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Losses by step, exact match afterwards, and the tuned adapters."""
    model, tokenizer, train_set = demo_model(fp8)
    settings = {**TRAINING, "max_steps": steps, "logging_steps": 1, "log_level": "error", "disable_tqdm": True}
    config = p3.TrainingConfig(output_dir=str(folder / ("fp8" if fp8 else "float32")), **settings)
    history = p3.train(model, train_set, config).history
    losses = [line["loss"] for line in history if "loss" in line]
    return losses, score(model, tokenizer, ROWS).exact, p3.lora_state_dict(model)


def gradients(fp8: bool, adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of one batch, at the given adapters."""
    model, _, train_set = demo_model(fp8)
    model.load_state_dict(adapters, strict=False)
    loss, count = p3.causal_lm_loss(model, next(iter(p3.batches(train_set, batch_size=4))))
    (loss / count).backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Both losses over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=f"{name} base")
    axes.set(xlabel="step", ylabel="training loss, nats a token", yscale="log", title="The demo on two bases")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Tune twice, compare, draw."""
    losses, exact = {}, {}
    for name, fp8 in (("float32", False), ("fp8", True)):
        losses[name], exact[name], at_the_end = tuned(fp8, folder)
    print("step       float32        fp8")
    for step in (0, 9, 19, 39, len(losses["fp8"]) - 1):
        print(f"{step + 1:4} {losses['float32'][step]:13.4f} {losses['fp8'][step]:10.4f}")
    print(f"exact match on {len(ROWS)} questions: float32 {exact['float32']:.1%}, fp8 {exact['fp8']:.1%}")
    for when, adapters in (("after 10 steps", tuned(False, folder, 10)[2]), ("at the end", at_the_end)):
        exactly, rounded = gradients(False, adapters), gradients(True, adapters)
        cosines = {name: cosine_similarity(rounded[name], g, dim=0).item() for name, g in exactly.items()}
        worst = min(cosines, key=lambda name: cosines[name])
        median = statistics.median(cosines.values())
        print(f"gradient cosine by adapter {when}: median {median:.4f}, lowest {cosines[worst]:.4f} ({worst})")
    draw(losses, folder / "fp8_effect.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
