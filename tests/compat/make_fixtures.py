"""Write the files in ``fixtures/`` with the version that is installed; those kept there are of phi3lora 0.1.0.

    python tests/compat/make_fixtures.py FOLDER

A run of six steps on the demo: its adapter as ``.safetensors``, as ``.pt`` with its JSON, and as PEFT folders; and the
checkpoint of the same run stopped after three steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import phi3lora as p3

LORA: dict[str, Any] = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
TRAINING: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
    "save_steps": 3, "log_level": "error", "disable_tqdm": True,
}  # fmt: skip


def run(folder: Path, callbacks: list[p3.Callback], **settings: Any) -> tuple[Any, Any]:
    """Train the demo and return the model and the result."""
    torch.manual_seed(0)
    model, _, train_set, eval_set = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    config = p3.TrainingConfig(output_dir=str(folder), **TRAINING, **settings)
    small = eval_set.select(range(8))
    return model, p3.train(model, train_set, config, eval_dataset=small, callbacks=callbacks)


class StopAtThree(p3.Callback):
    def on_step_end(self, state: Any) -> None:
        state.should_stop = state.global_step == 3


def main(folder: Path) -> None:
    model, _ = run(folder / "whole", [])
    p3.save_adapter(model, folder / "adapter.safetensors")
    p3.save_adapter(model, folder / "adapter.pt")
    for layout in ("uniform", "pattern"):
        p3.export_peft(model, folder / f"peft-{layout}", layout=layout, base_model="microsoft/Phi-3-mini-4k-instruct")
    run(folder / "stopped", [StopAtThree()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
