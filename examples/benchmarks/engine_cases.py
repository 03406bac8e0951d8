"""The models and adapters that ``engines.py`` exports: tiny random ones, and the tuned demo."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_metadata
from phi3lora.demo.show import LORA, TRAINING
from phi3lora.lora.inject import inject_layers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "demo_model")]
from family import full_tables, make_tokenizer  # noqa: E402
from sentencepiece_model import write_sentencepiece_model  # noqa: E402

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256, "factor": 2.0,
        "short_factor": [1.0] * 16, "long_factor": [1.0 + i for i in range(16)],
    },
    "original_max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "grouped-query": {"num_key_value_heads": 2},
    "multi-head": {},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "partial-rotary": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "longrope": LONGROPE,
    "window-32": {"sliding_window": 32},
}
"""Name -> changes to the config of :func:`save_base`."""
AS_LLAMA = ("grouped-query", "multi-head", "tied")
"""Models that are also a llama: it has no partial rotary, no Phi-3 longrope and no window."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8},
    "some": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "use_rslora": True},
    "unequal": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj", "gate_proj"]},
}
"""Name -> LoraConfig. In "unequal" each layer then gets a rank and an alpha of its own."""


def save_base(folder: Path, changes: dict[str, Any]) -> None:
    """Save a random model of 2 layers with large weights, and the demo's tokenizer."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 1536, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "original_max_position_embeddings": 512, "pad_token_id": 3, "eos_token_id": 3, "bos_token_id": 1,
    }  # fmt: skip
    model = Phi3ForCausalLM(Phi3Config(**{**values, **changes}))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(p3.demo.BASE / name, folder / name)


def save_base_with_tokenizer(folder: Path, table: str) -> Any:
    """Save a random model with a vocabulary that is built as Phi-3's is, and return the tokenizer as it is loaded."""
    tokenizer = make_tokenizer(table, full_tables())
    save_base(folder, {"vocab_size": len(tokenizer)})
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    write_sentencepiece_model(folder)
    return p3.load_model(folder, dtype="float32", device="cpu")[1]


def adapted(base: Path, adapter: str) -> tuple[Any, Any]:
    """Return the model with random adapters, and its tokenizer."""
    model, tokenizer = p3.load_model(base, dtype="float32", device="cpu")
    config = p3.LoraConfig(**ADAPTERS[adapter])
    torch.manual_seed(0)
    p3.inject_lora(model, config)
    if adapter == "unequal":
        layers = adapter_metadata(model)["layers"]
        for i, layer in enumerate(layers.values()):
            layer |= {"r": 1 + i % 5, "lora_alpha": 3 + 2 * i}
        model, _ = p3.load_model(base, dtype="float32", device="cpu")
        inject_layers(model, layers, config)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            torch.nn.init.normal_(parameter, std=0.15)
    return model, tokenizer


def save_as_llama(base: Path, folder: Path) -> None:
    """Save the same function as a llama: fused layers split, by plain slicing."""
    phi3, _ = p3.load_model(base, dtype="float32", device="cpu")
    c = phi3.config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "pad_token_id", "eos_token_id",
        "bos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(c, name) for name in names}))
    kv = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    fused = {
        "qkv_proj": {"q_proj": c.hidden_size, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
    }
    state = {}
    for key, weight in phi3.state_dict().items():
        name = key.split(".")[-2]
        parts = fused.get(name, {name: len(weight)})
        for part, rows in zip(parts, weight.split(list(parts.values())), strict=True):
            state[key.replace(name, part)] = rows
    llama.load_state_dict(state)
    llama.save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copyfile(path, folder / path.name)


def tuned_demo(folder: Path) -> tuple[Any, Any, list[str], list[str]]:
    """Return the tuned demo, its tokenizer, 50 held-out questions and its own answers; print how many are right."""
    torch.manual_seed(0)
    model, tokenizer, train_set, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    config = p3.TrainingConfig(output_dir=str(folder / "run"), seed=0, log_level="error", **TRAINING)
    p3.train(model, train_set, config, tokenizer=tokenizer)
    rows = [json.loads(line) for line in (p3.demo.FOLDER / "eval.jsonl").read_text().splitlines()][:50]
    questions = [row["messages"][0]["content"] for row in rows]
    answers = p3.generate(model, tokenizer, questions, max_new_tokens=64)
    exact = sum(answer == row["messages"][-1]["content"] for answer, row in zip(answers, rows, strict=True))
    print(f"the tuned demo: {exact} of {len(rows)} held-out answers right")
    return model, tokenizer, questions, answers


def chats_to_tokenise() -> list[list[dict[str, str]]]:
    """Return 200 chats: 150 of the demo's, and 50 of odd contents."""
    lines = (p3.demo.FOLDER / "train.jsonl").read_text().splitlines()
    odd = ["  two  spaces", "\n\nlines\n", "a\tb", "1,234.56 €", "naïve café", "日本語", "x" * 40, "", " ", "</s> <s>"]
    contents = [odd[i % 10] + " and " * (i // 10) + odd[i // 10] for i in range(50)]
    return [json.loads(line)["messages"] for line in lines[:150]] + [[{"role": "user", "content": c}] for c in contents]
