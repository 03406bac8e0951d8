"""``python -m phi3lora``: demo, doctor, train, chat, export."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from . import (
    ChatDataset,
    DataError,
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
from .data.formats import check_columns, known_format
from .data.sources import find_sources
from .model.load import load_tokenizer
from .processes import rank_and_size

_ADAPTER_HELP = "an adapter file, a training checkpoint's folder, or the output folder of the train command"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status. Of several processes (torchrun) only the first prints."""
    options = _parser().parse_args(arguments)
    try:
        if rank_and_size()[0] == 0:
            return int(options.run(options))
        if options.run is not _train:
            return 0
        with contextlib.redirect_stdout(io.StringIO()):
            return int(options.run(options))
    except Phi3LoRAError as error:
        print(f"phi3lora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("phi3lora: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub name or folder")
    run = argparse.ArgumentParser(add_help=False, parents=[model])  # what doctor and train share
    run.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        help="files, folders, patterns or hub datasets; several are joined",
    )
    run.add_argument("--split", default="train", help="split or part of one: train, train[:10%%], train+test")
    run.add_argument("--name", "--config-name", metavar="NAME", help="configuration of a hub dataset")
    run.add_argument("--format", default="auto", help="messages, sharegpt, alpaca, prompt_completion or text")
    run.add_argument(
        "--columns", nargs="+", action="extend", default=[], metavar="OURS=YOURS", help="prompt=question for instance"
    )
    run.add_argument("--train-on", default="assistant", help="assistant (default), last or all")
    run.add_argument("--overflow", default="truncate", help="of a long document: truncate (default), split or error")
    run.add_argument("--eval-share", type=float, default=0.0, help="share of the rows held out for evaluation")
    run.add_argument("--max-length", type=int, default=2048, help="tokens in a document and in a packed row")
    run.add_argument("--dtype", default="bfloat16")
    run.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of LoraConfig, TrainingConfig")

    parser = argparse.ArgumentParser(prog="phi3lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="tune the embedded tiny model and show what it learned")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    demo.add_argument("--random-init", action="store_true", help="the control: random base weights; should fail")
    demo.add_argument("--output-dir", default="runs/demo")
    demo.set_defaults(run=_demo)

    check = commands.add_parser(
        "doctor", parents=[run], help="check a run before it starts; exit status 1 if it has errors"
    )
    check.add_argument("--device-memory-gib", type=float, metavar="GIB", help="memory of another card to plan for")
    check.set_defaults(run=_doctor)

    tune = commands.add_parser("train", parents=[run], help="tune a model on a chat file")
    tune.add_argument("--adapter", help="the file to write; default: OUTPUT_DIR/adapter.safetensors")
    tune.set_defaults(run=_train)

    chat = commands.add_parser("chat", parents=[model], help="talk to a model, with or without an adapter")
    chat.add_argument("--adapter", help=_ADAPTER_HELP)
    chat.add_argument("--system", help="a system prompt")
    chat.add_argument("--dtype", default="bfloat16")
    chat.add_argument("--max-new-tokens", type=int, default=256)
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    chat.add_argument("--top-p", type=float, default=1.0, help="total probability of the tokens to sample from")
    chat.set_defaults(run=_chat)

    export = commands.add_parser(
        "export", parents=[model], help="write an adapter as a PEFT folder, for PEFT, vLLM, llama.cpp, Ollama"
    )
    export.add_argument("--adapter", required=True, help=_ADAPTER_HELP)
    export.add_argument("--out", required=True, help="the folder to write")
    export.add_argument("--layout", choices=("uniform", "pattern", "split"), default="uniform")
    export.add_argument("--base-model", help="the base that the folder names; default: MODEL, none for split")
    export.set_defaults(run=_export)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo.show import run_demo

    reached = run_demo(options.seeds, options.output_dir, options.random_init)
    return 0 if reached != options.random_init else 1


def _load_run(options: argparse.Namespace) -> tuple[Any, Any, ChatDataset, ChatDataset | None, TrainingConfig]:
    """Return the model with adapters, its tokenizer, the training data, the held-out data and the configuration.

    The model comes last: whatever is wrong with the settings or the data is refused before its weights are read.
    """
    settings = dict(map(_parse_setting, options.set))
    lora = LoraConfig(**{f.name: settings.pop(f.name) for f in dataclasses.fields(LoraConfig) if f.name in settings})
    config = TrainingConfig(**settings)
    chats, held_out = _load_data(options)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    torch.manual_seed(config.seed)  # of the adapters' first numbers
    print(inject_lora(model, lora))
    return model, tokenizer, chats, held_out, config


def _load_data(options: argparse.Namespace) -> tuple[ChatDataset, ChatDataset | None]:
    """Return the training data and the held-out data."""
    columns = _parse_columns(options.columns)
    check_columns(columns, known_format(options.format))
    source = options.data if len(options.data) > 1 else options.data[0]
    find_sources(source, options.split, options.name)  # a missing one is refused before a tokenizer is downloaded
    chats = ChatDataset.load(
        source,
        load_tokenizer(options.model),
        max_length=options.max_length,
        split=options.split,
        name=options.name,
        format=options.format,
        columns=columns,
        overflow=options.overflow,
        train_on=options.train_on,
    )
    return chats.split(options.eval_share) if options.eval_share else (chats, None)


def _parse_columns(pairs: list[str]) -> dict[str, str] | None:
    """Return our column's name -> the data's, of ``OURS=YOURS`` each."""
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, _, yours = pair.partition("=")
        if not ours or not yours or ours in columns:
            raise DataError(f"--columns {pair!r}; allowed: OURS=YOURS, each of ours once (prompt=question)")
        columns[ours] = yours
    return columns or None


def _doctor(options: argparse.Namespace) -> int:
    model, tokenizer, chats, held_out, config = _load_run(options)
    report = doctor(model, tokenizer, chats, config, eval_dataset=held_out, device_memory_gib=options.device_memory_gib)
    print(f"\n{report}")
    return 0 if report.ok else 1


def _train(options: argparse.Namespace) -> int:
    model, tokenizer, chats, held_out, config = _load_run(options)
    result = train(model, chats, config, eval_dataset=held_out, tokenizer=tokenizer)
    print(json.dumps(result.metrics, indent=1))
    path = options.adapter or f"{config.output_dir}/adapter.safetensors"
    if result.interrupted_by is not None:  # the exit status that a shell gives a process that a signal ended
        print(
            f"phi3lora: interrupted after step {result.global_step}, so {path} was not written; "
            f"--set resume_from_checkpoint=true continues the run",
            file=sys.stderr,
        )
        return 128 + result.interrupted_by
    if rank_and_size()[0] == 0:
        print(f"adapter: {save_adapter(model, path)}")
    return 0


def _parse_setting(pair: str) -> tuple[str, Any]:
    """Return the name and the value of ``NAME=VALUE``; a value that is not JSON is text."""
    name, _, text = pair.partition("=")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, {"True": True, "False": False, "None": None}.get(text, text)


def _chat(options: argparse.Namespace) -> int:
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if options.adapter:
        load_adapter(model, _adapter_file(options.adapter))
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    start = [{"role": "system", "content": options.system}] if options.system else []
    chat = list(start)
    print("One line is one turn; /clear starts a new chat, an empty line ends it.")
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


def _adapter_file(name: str) -> Path:
    """Return the adapter file that ``name`` is, or that is in the folder ``name``."""
    path = Path(name)
    if not path.is_dir():
        return path
    trained = path / "adapter.safetensors"
    return trained if trained.exists() else path / "lora.safetensors"


def _export(options: argparse.Namespace) -> int:
    model, tokenizer = load_model(options.model, device="cpu")
    load_adapter(model, _adapter_file(options.adapter))
    base = options.base_model or (None if options.layout == "split" else options.model)
    print(export_peft(model, options.out, tokenizer=tokenizer, layout=options.layout, base_model=base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
