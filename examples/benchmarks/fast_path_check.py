"""Compare the fused kernels with transformers' own layers at Phi-3-mini's dimensions, on this machine's GPU.

    python examples/benchmarks/fast_path_check.py

Two layers with random bf16 weights, r = 16. The script prints the loss of both and the lowest cosine between an
adapter's two gradients, on full rows and on packed chats, and then for the fused kernels on quantised bases.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmark import SHAPES, document_lengths, random_chats, random_model
from torch.nn.functional import cosine_similarity

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_state_dict

LORA = {"r": 16, "lora_alpha": 32}


def loss_and_gradients(model: Any, batch: dict[str, Any], fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of a batch and the gradient of each adapter."""
    model.zero_grad()
    loss, count = p3.causal_lm_loss(model, batch, fused=fused)
    (loss / count).backward()
    gradients = {name: p.grad.flatten().double() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item() / count, gradients


def compare(name: str, found: Any, expected: Any) -> None:
    """Print both losses and the lowest cosine in one line."""
    cosines = {n: cosine_similarity(found[1][n], g, dim=0).item() for n, g in expected[1].items()}
    worst = min(cosines, key=lambda n: cosines[n])
    print(f"{name:<16} loss {found[0]:.6f} against {expected[0]:.6f}; lowest cosine {cosines[worst]:.5f} ({worst})")


def main() -> None:
    """Compare on full rows and on packed chats, then on quantised bases."""
    SHAPES["two layers"] = {**SHAPES["phi-3-mini"], "num_hidden_layers": 2}
    model = random_model("two layers").train()
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    adapters = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    for chat in (False, True):
        data = random_chats(document_lengths(chat, 2), model.config.vocab_size)
        batch = next(iter(p3.batches(data, batch_size=4)))
        plain = loss_and_gradients(model, batch, fused=False)
        compare("packed chats" if chat else "full rows", loss_and_gradients(model, batch, fused=True), plain)
    for precision in ("fp8", "nf4", "nf4-fp8"):
        model = random_model("two layers", precision)
        p3.inject_lora(model, p3.LoraConfig(**LORA))
        model.load_state_dict(adapters, strict=False)
        compare(f"{precision}, chats", loss_and_gradients(model.train(), batch, fused=True), plain)


if __name__ == "__main__":
    main()
