"""Damaged model folders: load_model, then chats through the tokenizer and adapters into the model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

from conftest import chat_rows, make_tokenizer, tiny_model
from damage import damage_file, damage_json_file
from damage_tensors import damage_safetensors

import phi3lora as p3

SIZES = (0, -1, 1, 3, 2**20, 2**31, 2**40, 1.5, None, "32", True, [32], {})
ROPES = (
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, {"rope_type": "unknown"}, {}, [], 1,
    {"rope_type": "longrope", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": "x"}, "longrope",
    {"type": "su", "short_factor": "a"}, {"rope_type": "default", "rope_theta": 0, "partial_rotary_factor": 9},
)  # fmt: skip
FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), SIZES),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"), SIZES),
    **dict.fromkeys(("original_max_position_embeddings", "pad_token_id", "sliding_window", "rms_norm_eps"), SIZES),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "tie_word_embeddings", "architectures"), SIZES),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPES),
    **dict.fromkeys(("dtype", "torch_dtype"), ("float64", "int8", "x", None, 32, "auto")),
    "model_type": ("phi", "llama", "phi3", "Phi3", None, 3),
    "hidden_act": ("silu", "nothing", "gelu", None),
    "auto_map": ({"AutoConfig": "code.Config"}, "x", [1]),
    "quantization_config": (
        {"load_in_4bit": True}, {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True}, {"quant_method": None}, {"load_in_4bit": "yes"}, {"quant_method": "fp8"}, [], "4",
    ),
}  # fmt: skip
TEMPLATES = (
    "", "{{", "{% for m in messages %}", "{{ messages[0].missing.attribute }}", "{{ 1 / 0 }}", "{% raw %}", "text",
    "{{ messages | tojson }}", "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "{{ messages[99]['content'] }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{% if messages %}{{ eos_token }}{% endif %}",
)  # fmt: skip


def prepare(good: Path) -> Callable[[], None]:
    """Write a tiny model and tokenizer as transformers saves them."""
    tiny_model().save_pretrained(good)
    make_tokenizer().save_pretrained(good)
    return lambda: _use(good)


def _use(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = p3.load_model(folder, dtype="float32", device="cpu")
        p3.ChatDataset.load(chat_rows(2), tokenizer, max_length=64)
        p3.inject_lora(model, p3.LoraConfig(r=2))


def make(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Damage one or two files of the folder."""
    folder = own / "model"
    shutil.copytree(good, folder)
    names = sorted(path.name for path in folder.iterdir())
    chosen = {random.choice((*names, "config.json")) for _ in range(random.choice((1, 1, 2)))}
    return "; ".join(_damage(folder / name, random) for name in sorted(chosen)), lambda: _use(folder)


def _damage(path: Path, random: Random) -> str:
    if path.name == "config.json" and random.random() < 0.5:
        config, field = json.loads(path.read_text()), random.choice(list(FIELDS))
        config[field] = random.choice(FIELDS[field])
        path.write_text(json.dumps(config))
        return f"config.json: {field}: {str(config[field])[:60]}"
    if path.suffix == ".jinja" and random.random() < 0.7:
        template = random.choice(TEMPLATES)
        path.write_text(template)
        return f"template {template[:50]!r}"
    if path.suffix == ".safetensors":
        return damage_safetensors(path, random)
    return damage_json_file(path, random) if path.suffix == ".json" else damage_file(path, random)


KINDS = {"model": (prepare, make, 10)}
