"""A function for each command. This file loads torch and the rest of the package."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter_file import adapter_path, load_adapter, save_adapter
from ..adapters.gguf import export_gguf, find_converters
from ..adapters.hub import push_to_hub
from ..adapters.merge import save_merged
from ..adapters.peft_export import export_peft
from ..adapters.peft_import import import_peft, peft_folder
from ..checks.doctor import doctor
from ..data.dataset import ChatDataset
from ..data.formats import check_columns, known_format
from ..data.sources import find_sources
from ..demo import BASE, FOLDER
from ..demo.show import run_demo
from ..display import command_line, shell_lines, shown_path, terminal_columns, text_facts
from ..errors import AdapterError, ConfigError, DataError, is_number
from ..files import try_folder
from ..inference.evaluation import evaluate, sample_answers
from ..inference.generation import generate
from ..lora.base_weight import require_bitsandbytes
from ..lora.inject import inject_lora
from ..model.load import check_load_settings, check_revision, load_model, load_tokenizer
from ..processes import rank_and_size
from ..run_file import Run, read_run
from ..run_settings import DEMO, DataSettings, as_list
from ..training.best import scores_rouge
from ..training.checkpoint import find_checkpoint
from ..training.loop import run_training
from ..training.output_folder import check_output_dir, record_path
from ..training.picture import plot
from ..training.setup import PlannedRun, check_config
from .given_adapter import base_of, find_adapter, is_loadable
from .speed import speed_shown
from .starter import write_starter

logger = logging.getLogger("phi3lora")


def run_command(options: argparse.Namespace) -> int:
    """Run the parsed command and return the exit status. With several processes (torchrun), only the first prints."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each retry; the error says it all
    if rank_and_size()[0] == 0:
        return _COMMANDS[options.command](options)
    if options.command != "train":
        return 0
    with contextlib.redirect_stdout(io.StringIO()):
        return _train(options)


def _demo(options: argparse.Namespace) -> int:
    reached = run_demo(options.seeds, options.output_dir, options.random_init)
    if not options.random_init:
        adapter = f"{options.output_dir}/seed-{options.seeds[0]}/adapter.safetensors"
        print(text_facts({"talk to it": _chat_command(DEMO, adapter)}))
    return 0 if reached != options.random_init else 1


# --- Runs


def _read(options: argparse.Namespace) -> Run:
    """Return the settings; a model that is not named is the base that the adapter names."""
    file, out = getattr(options, "file", None), getattr(options, "out", None)
    run = read_run(file, options.settings, out)
    adapter = getattr(options, "folder", run.model.adapter)
    if adapter is None or "name_or_path" in run.given["model"]:
        return run
    try:
        base = base_of(find_adapter(adapter))
    except AdapterError:  # the command refuses it
        return run
    name, ours = base.get("name_or_path"), run.model.name_or_path
    if name is None or not is_loadable(name, base.get("revision")):
        names = "names no base" if name is None else f"names the base {name!r}, which cannot be loaded"
        logger.warning("%s %s: the model is %s; --model takes another", adapter, names, ours)
        return run
    if name != ours:
        logger.warning("the model is %s, the base that %s names; --model takes another", name, adapter)
    named = [(f"model.{key}", value) for key, value in base.items() if key not in run.given["model"]]
    return read_run(file, [*options.settings, *named], out)


def _train(options: argparse.Namespace) -> int:
    run = _read(options)
    config, is_main = run.training, rank_and_size()[0] == 0
    out = adapter_path(run.out or Path(config.output_dir) / "adapter.safetensors")
    goes_on = bool(config.resume_from_checkpoint or config.overwrite_output_dir)
    if is_main:
        check_output_dir(config)
        find_checkpoint(config)
        if not (goes_on and run.out is None):  # else the file is the run's own
            _check_free(out, options.overwrite)
    model, tokenizer, chats, held_out = _load_run(run)
    result = run_training(PlannedRun(model, chats, config, held_out, tokenizer), tells_next=False)
    if result.interrupted_by is not None:  # the exit status that a shell gives a process that a signal ended
        if is_main:
            start = "true" if result.checkpoint else "auto"  # before the first step there is no checkpoint yet
            words = ["train", str(record_path(config.output_dir)), "--set", f"resume_from_checkpoint={start}"]
            out_options = ["--out", run.out, *(["--overwrite"] if options.overwrite else [])] if run.out else []
            again = command_line(*words, *out_options, launcher=_launcher())
            line = f"phi3lora: interrupted after step {result.global_step}, before {out} was written. To continue:"
            print(f"{line}\n{again}", file=sys.stderr)
        return 128 + result.interrupted_by
    if is_main:
        path = str(save_adapter(model, out))
        chat = _chat_command(run.model.name_or_path, path)
        print(text_facts({"adapter": shown_path(path), "talk to it": chat}))
    return 0


def _chat_command(model: str, adapter: str) -> str:
    """Return the command that starts a chat with an adapter, in lines that fit a terminal after "talk to it"."""
    columns = terminal_columns()
    chat = command_line("chat", "--model", model, "--adapter", adapter)
    return "\n".join(shell_lines(chat, columns and columns - len("talk to it  ")))


def _launcher() -> list[str]:
    """Return the words of torchrun that start as many processes again; none for one process."""
    size = rank_and_size()[1]
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    nodes = ["--nnodes", str(size // of_node)] if of_node < size else []
    return ["torchrun", *nodes, "--nproc-per-node", str(of_node)] if size > 1 else []


def _doctor(options: argparse.Namespace) -> int:
    run = _read(options)
    model, tokenizer, chats, held_out = _load_run(run)
    memory = options.device_memory_gib
    report = doctor(model, tokenizer, chats, run.training, eval_dataset=held_out, device_memory_gib=memory)
    print(f"\n{report}")
    return 0 if report.ok else 1


def _evaluate(options: argparse.Namespace) -> int:
    run = _read(options)
    if any(name == "data.source" for name, _ in options.settings):  # in the place of what the file holds out
        run.data.eval_source, run.data.eval_share = None, 0.0
    elif not (run.data.eval_source or run.data.eval_share) and run.data.source not in (None, DEMO):
        logger.warning(
            "%s holds no data out (eval_source, eval_share): what is measured is %s, its training data. Name other "
            "data with --data FILE", options.file, run.data.source,
        )  # fmt: skip
    tokens = options.max_new_tokens
    if tokens != options.parser.get_default("max_new_tokens") and not (options.rouge or options.samples):
        logger.warning("--max-new-tokens %d has no effect without --rouge or --samples: nothing is answered", tokens)
    _check_data(run)
    adapter = _check_model(run)
    if options.file and not any(name == "model.adapter" for name, _ in options.settings):
        with contextlib.suppress(AdapterError):  # the run has not written an adapter yet
            logger.warning(
                "what is measured is %s, not the adapter %s that the run wrote; --adapter %s measures that",
                f"the run's first adapter, {adapter}" if adapter else f"{run.model.name_or_path} without an adapter",
                find_adapter(run.training.output_dir), run.training.output_dir,
            )  # fmt: skip
    tokenizer = load_tokenizer(_model_path(run), revision=run.model.revision)
    if run.data.eval_source or run.data.eval_share:  # of a run file: what its run held out
        dataset = _load_both(run, tokenizer)[1]
    else:
        dataset = _load_data(run.data, run.data.source, run.data.split, tokenizer, is_held_out=True)
    assert dataset is not None
    model, tokenizer = _load_model(run, adapter)
    answers = {"rouge": True, "tokenizer": tokenizer, "max_new_tokens": options.max_new_tokens} if options.rouge else {}
    print(json.dumps(evaluate(model, dataset, batch_size=options.batch_size, **answers), indent=1))
    if options.samples:
        limits = {"count": options.samples, "max_new_tokens": options.max_new_tokens}
        print(f"\n{sample_answers(model, tokenizer, dataset, **limits)}")
    return 0


def _load_run(run: Run) -> tuple[Any, Any, ChatDataset, ChatDataset | None]:
    """Return the model with adapters, its tokenizer, the training data and the held-out data.

    The model comes last: whatever is wrong with the settings or the data is refused before its weights are read.
    """
    config, data = run.training, run.data
    _check_data(run)
    has_held_out = bool(data.eval_source or data.eval_share)
    wanted = ["eval_strategy", "eval_on_start", "predict_with_generate"]
    wanted += ["metric_for_best_model"] if scores_rouge(config) else []
    needing = [f"{name}={value!r}" for name in wanted if (value := getattr(config, name)) not in ("no", False, None)]
    if needing and not has_held_out:
        raise ConfigError(
            f"{', '.join(needing)}: there is no held-out data; name it (--eval-data FILE), or hold out a share of the "
            f"rows (--eval-share 0.05)"
        )
    if data.streaming and config.max_steps <= 0:
        raise ConfigError("streaming=True needs max_steps > 0: the number of rows is not known")
    check_config(config, has_held_out)
    try:
        adapter = _check_model(run)
    except AdapterError as error:
        raise AdapterError(f"{error}. A run goes on from --adapter; the file to write is --out") from error
    chats, held_out = _load_both(run, load_tokenizer(_model_path(run), revision=run.model.revision))
    model, tokenizer = _load_model(run, adapter)
    if adapter is None:
        torch.manual_seed(config.seed)  # of the adapters' first numbers
        print(inject_lora(model, run.lora))
    else:
        _check_same_adapter(run, model.lora_config)
    return model, tokenizer, chats, held_out


def _check_same_adapter(run: Run, theirs: Any) -> None:
    """Refuse settings of an adapter that the one to go on from does not have."""
    for name in run.given["lora"]:
        ours, other = getattr(run.lora, name, None), getattr(theirs, name, None)
        if name in theirs.to_dict() and ours != other:
            raise ConfigError(
                f"{name}={ours!r}, but the adapter {run.model.adapter!r} has {name}={other!r}, and a run keeps the "
                f"adapter's settings; leave {name} out, or start without --adapter"
            )


# --- Data and models


def _check_data(run: Run) -> None:
    """Refuse data that is not named or not there, before a tokenizer is downloaded."""
    data = run.data
    if not data.source:
        raise ConfigError("there is no data: name a chat file (--data FILE, or data: in a run file); --data demo works")
    check_columns(dict(data.columns) if data.columns else None, known_format(data.format))
    find_sources(_paths(data.source), data.split, data.name, data.revision, data.streaming)
    if data.eval_source:
        find_sources(_paths(data.eval_source, is_held_out=True), data.eval_split, data.name, data.revision)


def _paths(source: Any, is_held_out: bool = False) -> Any:
    """Return the source with the embedded chats in the place of ``demo``."""
    embedded = str(FOLDER / ("eval.jsonl" if is_held_out else "train.jsonl"))
    paths = [embedded if name == DEMO else name for name in as_list(source)]
    return paths[0] if len(paths) == 1 else paths


def _load_both(run: Run, tokenizer: Any) -> tuple[ChatDataset, ChatDataset | None]:
    """Return the training data and the held-out data."""
    data = run.data
    chats = _load_data(data, data.source, data.split, tokenizer)
    if data.eval_source:
        return chats, _load_data(data, data.eval_source, data.eval_split, tokenizer, is_held_out=True)
    return chats.split(float(data.eval_share), data.split_seed) if data.eval_share else (chats, None)


def _load_data(data: DataSettings, source: Any, split: str, tokenizer: Any, is_held_out: bool = False) -> ChatDataset:
    same = ("max_length", "name", "format", "columns", "overflow", "train_on", "revision", "on_bad_row")
    options: dict[str, Any] = {name: getattr(data, name) for name in same}
    if data.streaming and not is_held_out:
        options |= {"streaming": True, "buffer_size": data.buffer_size}
    chats = ChatDataset.load(_paths(source, is_held_out), tokenizer, split=split, **options)
    if chats.origin is not None and DEMO in as_list(source):
        read = as_list(chats.origin["source"])
        names = [DEMO if name == DEMO else path for name, path in zip(as_list(source), read, strict=True)]
        chats.origin = {**chats.origin, "source": names if len(names) > 1 else names[0]}
    return chats


def _model_path(run: Run) -> str:
    """Return the embedded model's folder in the place of ``demo``."""
    return str(BASE) if run.model.name_or_path == DEMO else run.model.name_or_path


def _check_model(run: Run) -> Path | None:
    """Refuse settings of ``load_model`` and an adapter that is not there; return the adapter that was found."""
    check_revision(_model_path(run), run.model.revision)
    check_load_settings(dtype=run.model.dtype, base_precision=run.model.base_precision)
    if run.model.base_precision in ("nf4", "nf4-fp8"):
        require_bitsandbytes()
    if run.model.adapter is None:
        return None
    return find_adapter(run.model.adapter)


def _load_model(run: Run, adapter: Path | None, **options: Any) -> tuple[Any, Any]:
    """Return the model, with the adapter if there is one, and the tokenizer."""
    model, tokenizer = load_model(
        _model_path(run),
        dtype=str(run.model.dtype),
        base_precision=run.model.base_precision,
        revision=run.model.revision,
        parallel=run.training.parallel,
        **options,
    )
    model.origin["name_or_path"] = DEMO if run.model.name_or_path == DEMO else model.origin["name_or_path"]
    if adapter is not None:
        (import_peft if adapter.is_dir() else load_adapter)(model, adapter)
        model.origin["adapter"] = os.path.abspath(adapter)
    return model, tokenizer


def _init(options: argparse.Namespace) -> int:
    if not options.file.endswith((".yaml", ".yml")):
        raise ConfigError(f"the run file {options.file!r} is to be YAML; allowed: *.yaml, *.yml")
    _check_free(Path(options.file), options.overwrite)
    memory = options.device_memory_gib
    if memory is not None and not (is_number(memory) and memory > 0):
        raise ConfigError(f"--device-memory-gib {memory:g}; allowed: a number > 0")
    run = read_run(None, options.settings)
    Path(options.file).parent.mkdir(parents=True, exist_ok=True)
    write_starter(Path(options.file), run, _model_path(run), memory)
    print(f"{options.file}: edit it, then {command_line('train', options.file)}")
    return 0


# --- What happens to an adapter


def _chat(options: argparse.Namespace) -> int:
    for name in ("stdin", "stdout"):
        if getattr(sys, name) is None:
            raise ConfigError(f"a chat reads lines from stdin and prints answers to stdout, and {name} is closed")
    run = _read(options)
    adapter = _check_model(run)
    model, tokenizer = _load_model(run, adapter)
    names = ("max_new_tokens", "temperature", "top_p")
    settings = {name: getattr(options, name) for name in names}
    if settings["top_p"] != 1 and settings["temperature"] == 0:
        logger.warning("--top-p %g has no effect: at --temperature 0 the likeliest token is taken", options.top_p)
        settings["top_p"] = 1.0
    start = [{"role": "system", "content": options.system}] if options.system else []
    chat = list(start)
    print("One line is one turn; /clear starts a new chat, an empty line ends it.", flush=True)
    try:
        while text := input("> ").strip():
            if text == "/clear":
                chat = list(start)
                continue
            chat.append({"role": "user", "content": text})
            try:
                with speed_shown(tokenizer):
                    answer = generate(model, tokenizer, chat, stream=True, **settings)
            except DataError as error:
                if len(chat) == len(start) + 1:
                    raise
                logger.warning("%s. This turn is left out; /clear starts a new chat", error)
                chat.pop()
                continue
            chat.append({"role": "assistant", "content": answer})
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        return 128 + signal.SIGINT
    return 0


def _merge(options: argparse.Namespace) -> int:
    run, out = _read(options), Path(options.out)
    _check_free(out, options.overwrite)
    gguf = _gguf_folder(options)
    model, tokenizer = _load_model(run, _required_adapter(run))
    print(save_merged(model, tokenizer, out))
    if gguf is not None:
        print(f"\n{export_gguf(out, gguf)}")
    return 0


def _gguf_folder(options: argparse.Namespace) -> Path | None:
    """Return the folder for GGUF files, if they are asked for, after a look whether they can be made."""
    if not options.gguf:
        return None
    find_converters()
    folder = Path(f"{options.out.rstrip('/')}-gguf")
    _check_free(folder, options.overwrite)
    return folder


def _export(options: argparse.Namespace) -> int:
    run, out = _read(options), Path(options.out)
    _check_free(out, options.overwrite)
    gguf = _gguf_folder(options)
    model, tokenizer = _load_model(run, _required_adapter(run), device="cpu")
    base = options.base_model or (None if options.layout == "split" else _model_path(run))
    print(export_peft(model, out, tokenizer=tokenizer, layout=options.layout, base_model=base))
    if gguf is not None:
        print(f"\n{export_gguf(out, gguf, base=_model_path(run))}")
    return 0


def _import(options: argparse.Namespace) -> int:
    run, out = _read(options), adapter_path(options.out)
    _check_free(out, options.overwrite)
    _check_model(run)
    folder = peft_folder(options.folder)
    model, _ = _load_model(run, None, device="cpu")
    print(import_peft(model, folder))
    print(f"adapter: {save_adapter(model, out)}")
    return 0


def _required_adapter(run: Run) -> Path:
    found = _check_model(run)
    if found is None:
        raise AdapterError("there is no adapter; name one with --adapter")
    return found


def _push(options: argparse.Namespace) -> int:
    print(push_to_hub(options.folder, options.repository, private=not options.public, commit_message=options.message))
    return 0


def _plot(options: argparse.Namespace) -> int:
    out = Path(options.out or "runs.png")
    _check_free(out, options.overwrite)
    print(f"{plot(*options.runs, out=out)}\npicture: {out}")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo, "doctor": _doctor, "init": _init, "train": _train, "evaluate": _evaluate, "chat": _chat,
    "merge": _merge, "export": _export, "import": _import, "push": _push, "plot": _plot,
}  # fmt: skip


# --- Helpers


def _check_free(path: Path, overwrite: bool) -> None:
    """Refuse a path that cannot be written, and without ``--overwrite`` a file or a folder with files."""
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise ConfigError(f"{str(path)!r} exists; --overwrite replaces it, or choose another name")
    try:
        try_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}; choose another name") from error
