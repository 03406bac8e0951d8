"""The settings of a run in four sections: ``model``, ``data``, ``lora``, ``training``; names, and values from text.

A text is read by the type of its field, both in a file and after ``--set NAME=VALUE``. So ``1e-4`` is a
number where a number is wanted, ``no`` is a word for ``eval_strategy`` and False for ``packing``, and a run can be
called ``2024``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .compat import ALIASES, IGNORED_LORA_ARGUMENTS, IGNORED_TRAINING_ARGUMENTS, UNSUPPORTED, hint_at_name
from .config import SEED, SHARE, LoraConfig, Rule, TrainingConfig, setting
from .errors import ConfigError, home_path, is_int, require, short_repr

DEMO = "demo"
"""Name that stands for the embedded model, and for its data."""
_LENGTH: Rule = (lambda value: value is None or is_int(value, 2)), "a whole number >= 2"
_SOURCES: Rule = (
    lambda value: value is None or all(map(is_name, as_list(value))),
    "a name, a path, or a list of them",
)


def is_name(value: Any) -> bool:
    """Return whether a value is a text that is not empty."""
    return isinstance(value, str) and value != ""


def as_list(value: Any) -> list[Any]:
    """Return a name, or a list of names, as a list."""
    return list(value) if isinstance(value, list) else [value]


@dataclass
class ModelSettings:
    """The model of a run: arguments of ``load_model``, and the adapter to go on from."""

    name_or_path: str = setting("microsoft/Phi-3-mini-4k-instruct", (is_name, "a name"))
    """Hub name or folder of the model; ``demo``: the tiny model that comes with the package."""
    dtype: str | None = None
    """Number format: ``bfloat16``, ``float16``, ``float32`` or ``auto``; None: ``bfloat16``, or ``float32`` for
    ``demo``."""
    base_precision: str | None = None
    """Format of the frozen weights: ``nf4`` (4 bits, QLoRA), ``fp8`` (8 bits), ``nf4-fp8`` (stored as nf4, multiplied
    in fp8); None: ``dtype``."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapter: str | None = setting(None, (lambda value: value is None or is_name(value), "a path"))
    """Adapter to load (a run continues training it): a file, a checkpoint, a run's folder or a PEFT folder."""


@dataclass
class DataSettings:
    """The data of a run: arguments of ``ChatDataset.load``, and what is held out."""

    source: str | Sequence[str] | None = setting(None, _SOURCES, commas=False)
    """Files, folders, patterns or hub datasets; several are joined; ``demo``: the embedded chats."""
    eval_source: str | Sequence[str] | None = setting(None, _SOURCES, commas=False)
    """Held-out data, named like the training data; evaluated every epoch unless ``eval_strategy`` says otherwise."""
    eval_share: float = setting(0.0, SHARE)
    """Share of the rows to hold out, such as 0.05, in place of ``eval_source``."""
    split_seed: int = setting(0, SEED)
    """Seed that selects the rows for ``eval_share``."""
    split: str = "train"
    """Split of the source, or a part of one: ``train[:10%]``, ``train+test``."""
    eval_split: str = "train"
    """Split of ``eval_source``."""
    name: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: str = "auto"
    """Format of the rows: ``messages``, ``sharegpt``, ``alpaca``, ``prompt_completion``, ``text``; ``auto``: each row's
    own, recognised by its columns."""
    columns: Mapping[str, str] | None = None
    """Names of your columns, as OURS=YOURS: ``prompt=question``."""
    train_on: str = "assistant"
    """Tokens to train: ``assistant`` turns, the ``last`` one, or ``all``."""
    max_length: int | None = setting(None, _LENGTH)
    """Longest document and length of a packed row, in tokens; None: 2048, or 256 for ``demo``."""
    overflow: str = "truncate"
    """Handling of a document longer than ``max_length``: ``truncate``, ``split`` or ``error``."""
    on_bad_row: str = "error"
    """Handling of a row that cannot be used: ``error`` or ``skip``."""
    streaming: bool = False
    """Read the rows during training; needs ``max_steps``."""
    buffer_size: int = 10_000
    """Rows of a stream that are held in memory, shuffled and packed together."""


SECTIONS: dict[str, type[Any]] = {
    "lora": LoraConfig,
    "training": TrainingConfig,
    "model": ModelSettings,
    "data": DataSettings,
}
"""Section -> its settings, in the order in which a name without a section is looked up."""
_FOREIGN = {"lora": {*IGNORED_LORA_ARGUMENTS, *UNSUPPORTED}, "training": {*IGNORED_TRAINING_ARGUMENTS, *UNSUPPORTED}}
_ALIASES = {
    "model": {"name": "name_or_path", "path": "name_or_path", "model": "name_or_path"},
    "data": {
        "path": "source",
        "data": "source",
        "eval_data": "eval_source",
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
    },
    "lora": {**ALIASES, "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    "training": ALIASES,
}
_OF_THE_DATA = ("max_length", "max_seq_length", "max_seq_len")  # the rows of training follow


def setting_names(section: str) -> list[str]:
    """Return the settings of a section, in order."""
    return [f.name for f in dataclasses.fields(SECTIONS[section])]


# --- Names


def find_setting(given: str) -> tuple[str, str]:
    """Return the section and the field of a name such as ``lora.r`` or ``r``, which only one setting may have."""
    section, dot, name = given.partition(".")
    if dot and section in SECTIONS:
        return section, _setting_in(section, name)
    candidates = ["data"] if given in _OF_THE_DATA else list(SECTIONS)
    homes = [s for s in candidates if given in setting_names(s)] or [s for s in candidates if given in _names_in(s)]
    if homes == ["model", "data"]:
        raise ConfigError(f"{given!r} is a setting of the model and of the data; write model.{given} or data.{given}")
    if not homes:
        hint = hint_at_name(given, [name for section in SECTIONS for name in _own_names(section)])
        raise ConfigError(
            f"there is no setting {short_repr(given)}.{hint} `phi3lora train --help-all` lists the settings"
        )
    return homes[0], _setting_in(homes[0], given)


def _setting_in(section: str, given: str) -> str:
    """Return the field of a section that a name sets; an argument that has no effect here keeps its name."""
    if given in _names_in(section):
        return _own_names(section).get(given, given)
    others = [other for other in SECTIONS if given in setting_names(other)]
    hint = f" It belongs in the section {others[0]!r}." if others else hint_at_name(given, _own_names(section))
    allowed = ", ".join(setting_names(section))
    raise ConfigError(f"the section {section!r} has no setting {short_repr(given)}.{hint} Allowed: {allowed}")


def _own_names(section: str) -> dict[str, str]:
    """Return the names of a section's fields, and the aliases -> the field."""
    fields = setting_names(section)
    return {**dict(zip(fields, fields, strict=True)), **{a: f for a, f in _ALIASES[section].items() if f in fields}}


def _names_in(section: str) -> set[str]:
    """Return all names that a section takes: also arguments of other libraries, which its config knows."""
    return {*_own_names(section), *_FOREIGN.get(section, ())}


# --- Values by the type of their field


def read_value(section: str, name: str, raw: Any) -> Any:
    """Return a value by the type of its field. What cannot be read so is left for the field's own check to refuse."""
    known = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    if name not in known:
        return _plain_types(raw)  # an argument of another library, or unknown: the config decides
    if "Mapping[str, str]" in str(known[name].type):
        return _read_pairs(name, raw)
    if isinstance(raw, str):
        return _read_text(raw, known[name])
    if isinstance(raw, Mapping):
        return _plain_types(raw)
    return _read_list(raw, known[name]) if isinstance(raw, list) else raw


def _read_pairs(name: str, raw: Any) -> Any:
    """Return the dict that a mapping, or pairs such as ``prompt=question``, spell."""
    if isinstance(raw, str):
        raw = raw.split(",")
    if isinstance(raw, Mapping):
        return {str(key): str(value) for key, value in raw.items()}
    is_list = isinstance(raw, (list, type(None)))
    require(is_list, name, raw, "names of ours and yours, {prompt: question}", ConfigError)
    found: dict[str, str] = {}
    for pair in raw or []:
        ours, _, yours = str(pair).partition("=")
        if not ours or not yours or ours in found:
            raise ConfigError(f"--{name} {str(pair)!r}; allowed: OURS=YOURS, each of ours once (prompt=question)")
        found[ours] = yours
    return found or None


def kinds_of(setting: dataclasses.Field[Any]) -> frozenset[str]:
    """Return the types of a field: of ``"str | Sequence[str] | None"`` str, Sequence and None."""
    annotation = str(setting.type)
    while "[" in annotation:
        annotation = re.sub(r"\[[^\[\]]*\]", "", annotation)
    return frozenset(part.strip() for part in annotation.split("|"))


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[-+]?(\d(_?\d)*(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.I | re.ASCII)
_PATHS = ("name_or_path", "adapter", "source", "eval_source", "output_dir", "resume_from_checkpoint")
_NAMES_WITH_COMMAS = re.compile(r"[\w./\s-]*(,[\w./\s-]*)+")  # a regular expression may hold a comma, too: \d{1,2}


def _read_text(raw: str, setting: dataclasses.Field[Any]) -> Any:
    kinds, text = kinds_of(setting), path_in(raw) if setting.name in _PATHS else str(raw)
    if text == "" and setting.name in _PATHS:
        return text  # of an unset variable of the shell: for the field's own check to refuse
    if "None" in kinds and (text in ("", "~", "null", "None") or (text == "none" and "bool" not in kinds)):
        return None
    if "bool" in kinds:
        digits = {} if kinds & {"int", "float", "str"} else {"1": True, "0": False}
        words = {**_BOOLEANS, **digits}
        if text.lower() in words:
            return words[text.lower()]
    if kinds & {"int", "float"} and _NUMBER.fullmatch(text):
        return _number(text, whole="int" in kinds)
    if text[:1] in ("[", "{", '"'):
        return _read_json(text, kinds)
    if "Mapping" in kinds and "=" in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        return {name: _plain_types(value) for name, _, value in pairs}
    if "Sequence" in kinds and setting.metadata.get("commas", True) and _NAMES_WITH_COMMAS.fullmatch(text):
        return _read_list([part.strip() for part in text.split(",") if part.strip()], setting)
    return text


def _read_list(items: list[Any], setting: dataclasses.Field[Any]) -> list[Any]:
    """Return a list with its texts read as numbers where the field takes numbers."""
    if "int" in kinds_of(setting):
        return [_plain_types(item) for item in items]
    read = path_in if setting.name in _PATHS else str
    return [read(item) if isinstance(item, str) else item for item in items]


def path_in(text: Any) -> Any:
    """Return a path with the home folder in the place of ``~/``, which shells leave in ``--set output_dir=~/runs``."""
    if not isinstance(text, str):
        return text
    return str(home_path(text))


def _number(text: str, whole: bool = False) -> int | float:
    """Return the int or float that ``text`` spells; with ``whole`` an int where the value is one (``1e3``)."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return int(value) if whole and value.is_integer() else value


def _read_json(text: str, kinds: frozenset[str]) -> Any:
    """Return what ``text`` spells in JSON if the field takes that type; else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    takes = {"Sequence": list, "Mapping": dict, "str": str}
    return value if any(kind in kinds and isinstance(value, takes[kind]) for kind in takes) else text


_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "~": None}


def _plain_types(value: Any) -> Any:
    """Return a nested value with its plain texts read as YAML 1.2 reads them: numbers, true, false, null, or text."""
    if isinstance(value, Mapping):
        return {str(key): _plain_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_types(item) for item in value]
    if isinstance(value, Quoted) or not isinstance(value, str):
        return str(value) if isinstance(value, Quoted) else value
    return _number(value) if _NUMBER.fullmatch(value) else _WORDS.get(value, value)


class Quoted(str):
    """A text in quotes: never a number or a word such as true, where the field does not say what it takes."""


# --- What the fields mean, in words


@functools.cache
def field_help(section: str) -> dict[str, str]:
    """Return the text under each field of a section's class, without markup."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(SECTIONS[section]))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for entry, after in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and is_text:
            text = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
            texts[entry.target.id] = re.sub(r":\w+:`~?(?:phi3lora\.)?([^`]*)`", r"\1", text).replace("``", "")
    return texts
