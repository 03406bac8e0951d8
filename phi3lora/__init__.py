"""phi3lora: LoRA fine-tuning of the Phi-3 family on chat data, in plain PyTorch on loralib::

import phi3lora as p3

model, tokenizer = p3.load_model("microsoft/Phi-3-mini-4k-instruct")
print(p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32)))
chats = p3.ChatDataset.load("support.jsonl", tokenizer, max_length=2048)
p3.train(model, chats, p3.TrainingConfig(output_dir="runs/support", learning_rate=2e-4), tokenizer=tokenizer)
p3.save_adapter(model, "support.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .display import import_tqdm_quietly

if TYPE_CHECKING:  # for type checkers and editors; __getattr__ below imports a name when it is first used
    from loralib import lora_state_dict, mark_only_lora_as_trainable

    from . import demo
    from .adapters.adapter_file import load_adapter, save_adapter
    from .adapters.comparison import compare
    from .adapters.gguf import GgufExport, export_gguf
    from .adapters.hub import push_to_hub, write_model_card
    from .adapters.merge import MergeReport, merged, save_merged
    from .adapters.named import delete_adapter, disabled, list_adapters, set_adapter
    from .adapters.peft_export import PeftExport, export_peft
    from .adapters.peft_import import import_peft
    from .checks.doctor import doctor
    from .checks.report import DoctorReport, Finding
    from .config import LoraConfig, TrainingConfig
    from .data.batches import batches
    from .data.dataset import ChatDataset, ChatStream
    from .errors import AdapterError, CheckpointError, ConfigError, DataError, ModelError, Phi3LoRAError, TrainingError
    from .inference.evaluation import evaluate, sample_answers
    from .inference.generation import generate
    from .lora.inject import InjectionReport, inject_lora
    from .lora.layers import Conv2d, Embedding, Linear, MergedLinear
    from .model.forward import causal_lm_loss
    from .model.load import load_model
    from .training.callbacks import Callback
    from .training.loop import train
    from .training.picture import plot
    from .training.result import TrainingResult

__version__ = "0.1.0"

__all__ = [
    "AdapterError", "Callback", "ChatDataset", "ChatStream", "CheckpointError", "ConfigError", "Conv2d",
    "DataError", "DoctorReport", "Embedding", "Finding", "GgufExport", "InjectionReport", "Linear", "LoraConfig",
    "MergeReport", "MergedLinear", "ModelError", "PeftExport", "Phi3LoRAError", "TrainingConfig", "TrainingError",
    "TrainingResult", "batches", "causal_lm_loss", "compare", "delete_adapter", "demo", "disabled", "doctor",
    "evaluate", "export_gguf", "export_peft", "generate", "import_peft", "inject_lora", "list_adapters",
    "load_adapter", "load_model", "lora_state_dict", "mark_only_lora_as_trainable", "merged", "plot", "push_to_hub",
    "sample_answers", "save_adapter", "save_merged", "set_adapter", "train", "write_model_card",
]  # fmt: skip

_HOMES = {
    "loralib": "lora_state_dict mark_only_lora_as_trainable",
    ".adapters.adapter_file": "load_adapter save_adapter",
    ".adapters.comparison": "compare",
    ".adapters.gguf": "GgufExport export_gguf",
    ".adapters.hub": "push_to_hub write_model_card",
    ".adapters.merge": "MergeReport merged save_merged",
    ".adapters.named": "delete_adapter disabled list_adapters set_adapter",
    ".adapters.peft_export": "PeftExport export_peft",
    ".adapters.peft_import": "import_peft",
    ".checks.doctor": "doctor",
    ".checks.report": "DoctorReport Finding",
    ".config": "LoraConfig TrainingConfig",
    ".data.batches": "batches",
    ".data.dataset": "ChatDataset ChatStream",
    ".errors": "AdapterError CheckpointError ConfigError DataError ModelError Phi3LoRAError TrainingError",
    ".inference.evaluation": "evaluate sample_answers",
    ".inference.generation": "generate",
    ".lora.inject": "InjectionReport inject_lora",
    ".lora.layers": "Conv2d Embedding Linear MergedLinear",
    ".model.forward": "causal_lm_loss",
    ".model.load": "load_model",
    ".training.callbacks": "Callback",
    ".training.loop": "train",
    ".training.picture": "plot",
    ".training.result": "TrainingResult",
}
"""Module -> the public names that it defines."""
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used."""
    import_tqdm_quietly()
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
        globals()[name] = value
        return value
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
