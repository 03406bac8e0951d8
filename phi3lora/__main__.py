"""``python -m phi3lora``: demo, doctor, train, chat, export."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from . import (
    ChatDataset,
    LoraConfig,
    Phi3LoRAError,
    TrainingConfig,
    doctor,
    export_peft,
    generate,
    inject_lora,
    load_adapter,
    load_model,
    save_adapter,
    train,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="phi3lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_doctor(commands)
    _add_train(commands)
    _add_chat(commands)
    _add_export(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except Phi3LoRAError as error:
        print(f"phi3lora: {error}", file=sys.stderr)
        return 1


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="tune the embedded tiny model and show what it learned")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random-init", action="store_true", help="the control: random base weights; should fail")
    parser.add_argument("--output-dir", default="runs/demo")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from .demo.show import run

    reached = run(options.seeds, options.output_dir, options.random_init)
    return 0 if reached != options.random_init else 1


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run is made of."""
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub name or folder")
    parser.add_argument("--data", required=True, help="a .jsonl, .json, .csv or .parquet file, or a hub dataset")
    parser.add_argument("--eval-share", type=float, default=0.0, help="share of the rows held out")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens in a document and in a packed row")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of LoraConfig, TrainingConfig"
    )


def _load_run(options: argparse.Namespace) -> tuple[Any, Any, ChatDataset, ChatDataset | None, TrainingConfig]:
    """Model with adapters, tokenizer, training data, held-out data, configuration."""
    lora, training = _split_settings(options.set)
    config = TrainingConfig(**training)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    print(inject_lora(model, LoraConfig(**lora)))
    chats = ChatDataset.load(options.data, tokenizer, max_length=options.max_length)
    held_out = None
    if options.eval_share:
        chats, held_out = chats.split(options.eval_share)
    return model, tokenizer, chats, held_out, config


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="look at a run before it starts; exit status 1 if something is wrong")
    _add_run_arguments(parser)
    parser.add_argument("--device-memory-gib", type=float, metavar="GIB", help="ask about a card with that much memory")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    model, tokenizer, chats, held_out, config = _load_run(options)
    memory = options.device_memory_gib
    report = doctor(model, tokenizer, chats, config, eval_dataset=held_out, device_memory_gib=memory)
    print(f"\n{report}")
    return 0 if report.ok else 1


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="tune a model on a chat file")
    _add_run_arguments(parser)
    parser.add_argument("--adapter", help="where to write the adapter; default: OUTPUT_DIR/adapter.safetensors")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    model, tokenizer, chats, held_out, config = _load_run(options)
    result = train(model, chats, config, eval_dataset=held_out, tokenizer=tokenizer)
    path = save_adapter(model, options.adapter or f"{config.output_dir}/adapter.safetensors")
    print(json.dumps(result.metrics, indent=1))
    print(f"adapter: {path}")
    return 0


def _split_settings(pairs: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``NAME=VALUE`` settings, values as JSON where they are JSON, by the config they belong to."""
    lora_names = {f.name for f in dataclasses.fields(LoraConfig)}
    lora: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        (lora if name in lora_names else training)[name] = value
    return lora, training


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to a model, with an adapter or without")
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub name or folder")
    parser.add_argument("--adapter", help="an adapter file of ours, or a training checkpoint's folder")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest of this total probability")
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if options.adapter:
        load_adapter(model, _adapter_file(options.adapter))
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    start = [{"role": "system", "content": options.system}] if options.system else []
    chat = list(start)
    print("One line a turn; /clear begins anew, an empty line ends the chat.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return 0
        if text == "/clear":
            chat = list(start)
            continue
        chat.append({"role": "user", "content": text})
        answer = generate(model, tokenizer, chat, max_new_tokens=options.max_new_tokens, stream=True, **sampling)
        chat.append({"role": "assistant", "content": answer})


def _adapter_file(path: str) -> Path:
    """``path``, or the adapter in it if it is a checkpoint's folder."""
    return Path(path) / "lora.safetensors" if Path(path).is_dir() else Path(path)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="an adapter file as a PEFT folder, for PEFT, vLLM, llama.cpp, Ollama")
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub name or folder")
    parser.add_argument("--adapter", required=True, help="an adapter file of ours")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--layout", choices=("uniform", "pattern", "split"), default="uniform")
    parser.add_argument("--base-model", help="what the folder names as its base; default: MODEL, with split nothing")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    model, tokenizer = load_model(options.model, device="cpu")
    load_adapter(model, options.adapter)
    base = options.base_model or (None if options.layout == "split" else options.model)
    print(export_peft(model, options.out, tokenizer=tokenizer, layout=options.layout, base_model=base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
