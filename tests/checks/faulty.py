"""Tiny runs for the doctor, healthy or with one fault."""

from __future__ import annotations

from conftest import chat_dataset, make_tokenizer, quiet_config, tiny_model

import phi3lora as p3

LONG = "hello " * 60  # an answer that max_length cuts


def fresh_model(**lora):
    """A tiny model as inject_lora leaves it."""
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    return model


def healthy_config(folder, **changes):
    return quiet_config(folder, **{"learning_rate": 1e-3, "max_steps": 4, **changes})


def examine(tmp_path, model=None, dataset=None, tokenizer=None, settings=None, **options):
    """Return the report, by default without optimizer steps."""
    options.setdefault("try_steps", False)
    changes = dict(settings or {})
    config = healthy_config(changes.pop("output_dir", tmp_path / "run"), **changes)
    chats = chat_dataset() if dataset is None else dataset
    return p3.doctor(model or fresh_model(), tokenizer or make_tokenizer(), chats, config, **options)


def chats_of(*answers, max_length=128, **options):
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in answers]
    rows = [{"messages": chat} for chat in turns]
    return p3.ChatDataset.load(rows, make_tokenizer(), max_length=max_length, **options)


def with_base_gradient():
    model = fresh_model()
    model.model.layers[1].mlp.down_proj.weight.requires_grad = True
    return model


def with_frozen_adapter(name="lora_B"):
    model = fresh_model()
    getattr(model.model.layers[0].mlp.down_proj, name).requires_grad = False
    return model


def with_disabled_layer():
    model = fresh_model()
    model.model.layers[1].self_attn.qkv_proj.enabled = False
    return model
