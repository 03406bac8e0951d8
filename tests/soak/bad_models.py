"""A model folder, damaged: load_model, then one chat through the tokenizer."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from bad_adapters import damage_safetensors
from conftest import chat_rows, make_tokenizer, tiny_model
from damage import damage_file, damaged_json, wild_value

import phi3lora as p3

_SIZES = (0, -1, 1, 3, 2**20, 2**31, 2**40, 2**63, 10**400, 1.5, None, "32", True, [32], {})
_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "original_max_position_embeddings", "pad_token_id", "sliding_window", "rms_norm_eps",
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "hidden_act", "tie_word_embeddings",
    "dtype", "torch_dtype", "model_type", "architectures", "quantization_config", "auto_map", "head_dim",
)  # fmt: skip
_ROPES = (
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, {"rope_type": "unknown"}, {},
    {"rope_type": "longrope", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": "x"}, [], "longrope", 1,
    {"type": "su", "short_factor": "a"}, {"rope_type": "default", "rope_theta": 0, "partial_rotary_factor": 9},
)  # fmt: skip
_QUANTIZED = (
    {"load_in_4bit": True}, {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, [], "4",
    {"load_in_8bit": True}, {"quant_method": None}, {"load_in_4bit": "yes"}, {"quant_method": "fp8"},
)  # fmt: skip
_TEMPLATES = (
    "", "{{", "{% for m in messages %}", "{{ messages[0].missing.attribute }}", "{{ 1 / 0 }}", "{% raw %}", "text",
    "{% for i in range(99999999) %}{{ i }}{% endfor %}", "{{ messages | tojson }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "{{ messages[99]['content'] }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "\x00", "{% if messages %}{{ eos_token }}{% endif %}",
)  # fmt: skip


def prepare(good: Path) -> Callable[[], None]:
    """A tiny model and tokenizer as transformers saves them."""
    tiny_model().save_pretrained(good)
    make_tokenizer().save_pretrained(good)
    return lambda: _use(good)


def _use(folder: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = p3.load_model(folder, **{"dtype": "float32", "device": "cpu", **options})
        p3.ChatDataset.load(chat_rows(2), tokenizer, max_length=64)
        p3.inject_lora(model, p3.LoraConfig(r=2))


def make(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """One file of the folder, or two."""
    folder = own / "model"
    shutil.copytree(good, folder)
    names = sorted(path.name for path in folder.iterdir())
    chosen = {random.choice((*names, "config.json")) for _ in range(random.choice((1, 1, 2)))}
    said = [_damage(folder / name, random) for name in sorted(chosen)]
    return "; ".join(said), lambda: _use(folder)


def _damage(path: Path, random: Random) -> str:
    if not path.is_file():
        return ""
    if path.name == "config.json" and random.random() < 0.5:
        return _odd_config(path, random)
    if path.suffix == ".safetensors":
        return damage_safetensors(path, random)
    if path.suffix == ".jinja" and random.random() < 0.7:
        template = random.choice(_TEMPLATES)
        path.write_text(template)
        return f"template {template[:50]!r}"
    if path.suffix == ".json" and random.random() < 0.7:
        said, text = damaged_json(json.loads(path.read_text()), random)
        path.write_bytes(text.encode(errors="surrogatepass"))
        return f"{path.name}: {said}"
    return damage_file(path, random)


def _odd_config(path: Path, random: Random) -> str:
    """A field that decides on sizes."""
    config = json.loads(path.read_text())
    name = random.choice(_FIELDS)
    odd = {"quantization_config": _QUANTIZED, "rope_parameters": _ROPES, "rope_scaling": _ROPES}
    odd |= {"hidden_act": ("silu", "nothing", "gelu", None), "auto_map": ({"AutoConfig": "code.Config"}, "x", [1])}
    odd |= {
        "model_type": ("phi", "llama", "phi3", "Phi3", None, 3),
        "dtype": ("float64", "int8", "x", None, 32, "auto"),
    }
    config[name] = random.choice(odd.get(name, _SIZES))
    path.write_text(json.dumps(config))
    return f"config.json: {name}: {str(config[name])[:60]}"


def make_argument(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Options of ``load_model`` that are none."""
    value = wild_value(random)
    names = ("folder", "dtype", "device", "base_precision", "attn_implementation", "use_cache")
    name = random.choice(names)
    said = f"{name}: a {type(value).__name__}"
    if name == "folder":
        return said, lambda: _use(value if not isinstance(value, str) or "/" in value else own / "nothing")
    return said, lambda: _use(good, **{name: value})


KINDS = {"model": (prepare, make, 10), "model arguments": (prepare, make_argument, 2)}
