"""The parser of the command line. Nothing here loads torch, so that ``--help`` answers at once.

Options of settings are made from the fields of the four dataclasses: name, type, default, and the help text under the
field.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import did_you_mean
from ..run_file import versions
from ..run_settings import SECTIONS, field_help, kinds_of

_EXAMPLES = {
    "demo": ("tune the embedded tiny model and show what it learned", "phi3lora demo --seeds 0"),
    "doctor": (
        "check a run before it starts; exit status 1 if it has errors",
        "phi3lora doctor --model demo --data demo",
    ),
    "init": (
        "write a commented run file that fits a model and your card",
        "phi3lora init run.yaml --model demo --data demo",
    ),
    "train": (
        "tune a model on chats",
        "phi3lora train --model demo --data demo --eval-data demo \\\n"
        "      --set output_dir=runs/try learning_rate=1e-3 max_steps=70\n"
        "  phi3lora train run.yaml --set learning_rate=1e-4",
    ),
    "evaluate": (
        "measure the loss, and ROUGE of answers, on held-out chats",
        "phi3lora evaluate --model demo --adapter runs/try --data demo",
    ),
    "chat": ("talk to a model, with or without an adapter", "phi3lora chat --model demo --adapter runs/try"),
    "merge": (
        "write a plain model with the adapter merged into its weights",
        "phi3lora merge --model demo --adapter runs/try --out try-merged",
    ),
    "export": (
        "write an adapter as a PEFT folder, for PEFT, vLLM, llama.cpp, Ollama",
        "phi3lora export --model demo --adapter runs/try --out try-peft",
    ),
    "import": (
        "write a PEFT folder's adapter as an adapter file",
        "phi3lora import try-peft --model demo --out try.safetensors",
    ),
    "push": (
        "upload an adapter or a merged model to the Hugging Face hub",
        "phi3lora merge --model demo --adapter runs/try --out try-merged\n  phi3lora push try-merged you/try",
    ),
    "plot": ("draw the curves of runs into one picture", "phi3lora plot runs/try --out try.png"),
}
"""Command -> what it does, and an example that works on the embedded model."""

_STATUSES = """exit status:
  0 done   1 an error, in one line   2 wrong usage
  130 Ctrl-C   143 SIGTERM: `train` then has a checkpoint to resume from"""

_COMMON = """
    r lora_alpha lora_dropout target_modules output_dir overwrite_output_dir learning_rate num_train_epochs max_steps
    per_device_train_batch_size gradient_accumulation_steps eval_strategy eval_steps save_steps resume_from_checkpoint
""".split()
"""Settings of the sections lora and training that ``train --help`` shows; ``--help-all`` shows the rest."""
_NAMES = {
    "model.name_or_path": "model", "model.revision": "model-revision", "data.revision": "data-revision",
    "data.source": "data", "data.eval_source": "eval-data",
}  # fmt: skip
"""Options that are not called like their field."""
_HIDDEN = ("training.max_length", "training.gradient_checkpointing", "lora.modules_to_save")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line. It ends the process for ``--help``, ``--version`` and wrong usage."""
    spelt = [_with_dashes(argument) for argument in arguments]
    parser = build_parser(shows_all="--help-all" in spelt)
    if not spelt:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if not spelt[0].startswith("-") and spelt[0] not in _EXAMPLES:
        close = did_you_mean(spelt[0], _EXAMPLES)
        parser.error(f"there is no command {spelt[0]!r}.{close} Commands: {', '.join(_EXAMPLES)}")
    options, unknown = parser.parse_known_args(spelt)
    if unknown:
        _refuse(options.parser, unknown)
    return options


def _refuse(command: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End the process with the command's usage and, for the first unknown option, the nearest one."""
    names = [name for name in command._option_string_actions if name.startswith("--")]
    option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
    close = did_you_mean(option, names) if option is not None else ""
    listing = "--help-all" if "--help-all" in names else "--help"
    command.error(f"unrecognized arguments: {' '.join(unknown)}.{close} `{command.prog} {listing}` lists the options")


def _with_dashes(argument: str) -> str:
    """Return ``--learning-rate`` for ``--learning_rate``."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def build_parser(shows_all: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands. ``shows_all``: the help has every setting, not the usual ones alone."""
    parser = argparse.ArgumentParser(
        prog="phi3lora",
        description="LoRA fine-tuning of the Phi-3 family on chat data.",
        epilog=f"`phi3lora COMMAND --help` has an example of each.\n\n{_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (does, example) in _EXAMPLES.items():
        command = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(settings=[], parser=command)
        _ARGUMENTS[name](command, shows_all)
    return parser


def _version() -> str:
    found = {**versions(), "Python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in found.items())


# --- The arguments of each command


def _demo(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    command.add_argument("--random-init", action="store_true", help="control: random base weights, which should fail")
    command.add_argument("--output-dir", type=_path, default="runs/demo", metavar="DIR", help="default: runs/demo")


def _run(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument(
        "file", nargs="?", type=_path, metavar="RUN.yaml", help="file of settings; options override it"
    )
    _add_settings(command, "model")
    _add_settings(command, "data")
    _add_settings(command, "lora", shows_all)
    _add_settings(command, "training", shows_all)
    command.add_argument(
        "--set", nargs="+", action=_SetAction, default=argparse.SUPPRESS, metavar="NAME=VALUE", help="set any setting"
    )
    command.add_argument("--help-all", action="help", help="show the help with every setting")
    command.usage = f"{command.prog} [RUN.yaml] [OPTION ...]"


def _doctor(command: argparse.ArgumentParser, shows_all: bool) -> None:
    _run(command, shows_all)
    command.add_argument("--device-memory-gib", type=float, metavar="GIB", help="memory of another card to plan for")


def _train(command: argparse.ArgumentParser, shows_all: bool) -> None:
    _run(command, shows_all)
    _add_out(command, "adapter file to write; default: OUTPUT_DIR/adapter.safetensors", required=False)


def _init(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument(
        "file", nargs="?", type=_path, default="run.yaml", metavar="RUN.yaml", help="the file to write"
    )
    _add_settings(command, "model", only=("name_or_path", "base_precision", "revision"))
    _add_settings(command, "data", only=("source", "max_length"))
    command.add_argument("--device-memory-gib", type=float, metavar="GIB", help="memory of another card to plan for")
    _add_overwrite(command)


def _evaluate(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument(
        "file", nargs="?", type=_path, metavar="RUN.yaml", help="a run's settings: its model and held-out data"
    )
    _add_settings(command, "model")
    _add_settings(
        command, "data", leave_out=("eval_source", "eval_share", "eval_split", "split_seed", "streaming", "buffer_size")
    )
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows in a batch; default: 8")
    command.add_argument("--rouge", action="store_true", help="also let the model answer, and score the answers")
    command.add_argument("--samples", type=int, default=0, metavar="N", help="also show N answers and their references")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of the longest answer")


def _chat(command: argparse.ArgumentParser, shows_all: bool) -> None:
    _add_settings(command, "model")
    command.add_argument("--system", metavar="TEXT", help="a system prompt")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of the longest answer")
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest token"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="total probability of the tokens to sample from"
    )


def _merge(command: argparse.ArgumentParser, shows_all: bool) -> None:
    _add_settings(command, "model", leave_out=("base_precision",))
    _add_out(command, "folder to write")
    _add_gguf(command, "the model")


def _export(command: argparse.ArgumentParser, shows_all: bool) -> None:
    _add_settings(command, "model", leave_out=("dtype", "base_precision"))
    _add_out(command, "folder to write")
    command.add_argument(
        "--layout", choices=("uniform", "pattern", "split"), default="uniform",
        help="uniform (default): right in every tool; pattern: for PEFT and vLLM; split: for q_proj, k_proj, ...",
    )  # fmt: skip
    command.add_argument(
        "--base-model", type=_path, metavar="NAME", help="base to name in the folder; default: --model"
    )
    _add_gguf(command, "the adapter and its base")


def _add_gguf(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--gguf", action="store_true", help=f"also convert {what} for llama.cpp and Ollama, into the folder OUT-gguf"
    )


def _import(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument("folder", type=_path, metavar="PEFT_FOLDER", help="folder to read")
    _add_settings(command, "model", leave_out=("dtype", "base_precision", "adapter"))
    _add_out(command, "adapter file to write, .safetensors or .pt")


def _push(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument("folder", type=_path, metavar="FOLDER", help="adapter, PEFT or merged model folder")
    command.add_argument("repository", type=_path, metavar="OWNER/NAME", help="repository on the hub")
    command.add_argument("--public", action="store_true", help="if the repository has to be created, make it public")
    command.add_argument("--message", metavar="TEXT", help="message of the commit")


def _plot(command: argparse.ArgumentParser, shows_all: bool) -> None:
    command.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="a run's folder or its metrics.jsonl")
    _add_out(command, "picture to write (.png, .svg, .pdf); default: runs.png", required=False)


_ARGUMENTS = {
    "demo": _demo, "doctor": _doctor, "init": _init, "train": _train, "evaluate": _evaluate, "chat": _chat,
    "merge": _merge, "export": _export, "import": _import, "push": _push, "plot": _plot,
}  # fmt: skip


def _add_out(command: argparse.ArgumentParser, text: str, required: bool = True) -> None:
    command.add_argument("--out", required=required, type=_path, metavar="PATH", help=text)
    _add_overwrite(command)


def _path(text: str) -> str:
    """Return an option's text; an empty one, of an unset variable of the shell, is wrong usage."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text; allowed: a name or a path")
    return text


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


# --- Options from fields


class _SettingAction(argparse.Action):
    """Appends ``(section.field, value)`` to ``settings``; a field of several values adds up over its mentions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = "false" if option_string is not None and option_string.startswith("--no-") else "true"
        settings = dict(namespace.settings) if isinstance(values, list) else {}
        if self.dest in settings:
            values = [*settings[self.dest], *values]
            namespace.settings = [pair for pair in namespace.settings if pair[0] != self.dest]
        namespace.settings = [*namespace.settings, (self.dest, values)]


class _SetAction(argparse.Action):
    """Appends the pairs of ``--set NAME=VALUE ...`` to ``settings``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for pair in values:
            name, equals, value = pair.partition("=")
            if not (name and equals):
                parser.error(f"--set {pair!r}; allowed: NAME=VALUE (a run file goes before --set)")
            namespace.settings = [*namespace.settings, (name.replace("-", "_"), value)]


def _add_settings(
    command: argparse.ArgumentParser,
    section: str,
    shows_all: bool = True,
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> None:
    """Add an option for each field of a section."""
    group = command.add_argument_group(f"{section} settings" + ("" if shows_all else " (--help-all shows the others)"))
    texts = field_help(section)
    for setting in dataclasses.fields(SECTIONS[section]):
        path, name = f"{section}.{setting.name}", setting.name
        if path in _HIDDEN or name in leave_out or (only and name not in only):
            continue
        kinds = kinds_of(setting)
        text = _short_help(texts.get(name, ""), setting)
        options: dict[str, Any] = {"metavar": _metavar(kinds)}
        flags = [f"--{_NAMES.get(path, name.replace('_', '-'))}"]
        if "bool" in kinds and not kinds & {"str", "int", "float"}:
            flags.append(flags[0].replace("--", "--no-", 1))
            options = {"nargs": 0}
        elif "Sequence" in kinds or "Mapping" in kinds:
            options["nargs"] = "+"
        if path == "data.name":
            flags.append("--config-name")
        shown = shows_all or name in _COMMON
        group.add_argument(
            *flags, dest=path, action=_SettingAction, default=argparse.SUPPRESS,
            help=text if shown else argparse.SUPPRESS, **options,
        )  # fmt: skip


def _short_help(text: str, setting: dataclasses.Field[Any]) -> str:
    """Return the first sentence of a field's text, and its default."""
    sentence = text.split(". ")[0].rstrip(".")
    if sentence[1:2].islower() and not sentence.startswith(("True", "None", "False")):
        sentence = sentence[0].lower() + sentence[1:]
    default = setting.default
    if default is dataclasses.MISSING or default is None or "None" in sentence:
        return sentence.replace("%", "%%")
    return f"{sentence} (default: {default})".replace("%", "%%")


def _metavar(kinds: frozenset[str]) -> str:
    for kind, word in (("Mapping", "NAME=VALUE"), ("Sequence", "NAME"), ("str", "TEXT"), ("float", "X"), ("int", "N")):
        if kind in kinds:
            return word
    return "VALUE"
