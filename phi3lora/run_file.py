"""A run as a file: ``run.yaml`` (or JSON) with the sections ``model``, ``data``, ``lora`` and ``training``.

    model: demo                       a text is name_or_path, the first field
    data: {source: support.jsonl, eval_share: 0.05}
    lora: {r: 16}
    training: {output_dir: runs/support, learning_rate: 1e-4}

A value is read by the type of its field, in the file and in ``--set NAME=VALUE`` alike. In YAML 1.1 itself ``1e-4`` is
a text, ``no`` is False, ``12:30`` is 750 and ``2024-01-01`` a date: here they are what the field takes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .compat import hint_at_name
from .config import LoraConfig, TrainingConfig, check_fields
from .errors import ConfigError, require, short_repr
from .run_settings import (
    DEMO,
    SECTIONS,
    DataSettings,
    ModelSettings,
    Quoted,
    find_setting,
    is_name,
    path_in,
    read_value,
    setting_names,
)

logger = logging.getLogger("phi3lora")

_NOT_RECORDED = ("resume_from_checkpoint", "resume_with_changes", "overwrite_output_dir", "gradient_checkpointing")
_KEYS = ("model", "data", "lora", "training", "out", "versions")
_DEMO_MAX_LENGTH = 256  # demo.MAX_LENGTH; this file imports no library


@dataclass
class Run:
    """The settings of a run, from a file, from options, or both."""

    model: ModelSettings
    data: DataSettings
    lora: LoraConfig
    training: TrainingConfig
    out: str | None = None
    """Adapter file to write; None: ``adapter.safetensors`` in the output folder."""
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section -> the settings that were given, by name."""
    file: str | None = None
    """The file that was read."""


# --- From a file and options to the settings


def read_run(path: str | None, options: Sequence[tuple[str, Any]] = (), out: str | None = None) -> Run:
    """Return the settings of a file, with those of the command line in their place where both have one.

    Args:
        path: a YAML or JSON file; None: none.
        options: names, with or without their section (``lora.r``), and values; texts are read by their field's type.
        out: the adapter file to write.

    Raises:
        ConfigError: a file that cannot be read, an unknown name, two values for one setting, a value out of range.
    """
    where = "" if path is None else f"{path}{' and the options' if options else ''}: "
    content = {} if path is None else _read_file(path)
    sections = _read_settings(_settings_of(path, content), f"{path}: ")
    for section, values in _read_settings((name, _joined(name, value)) for name, value in options).items():
        sections[section].update(values)
    lora, training, model, data = (sections[name] for name in SECTIONS)
    row_length = training.get("max_length")
    if row_length is not None:
        data.setdefault("max_length", row_length)
    if data.get("eval_source") or data.get("eval_share"):
        training.setdefault("eval_strategy", "epoch")  # who holds data out wants it evaluated
    try:
        run = Run(ModelSettings(**model), DataSettings(**data), LoraConfig(**lora), TrainingConfig(**training))
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    run.out = path_in(content.get("out")) if out is None else out
    run.given, run.file = sections, path
    _resolve(run, where)
    return run


def _joined(given: str, value: Any) -> Any:
    """Return the values of ``--target-modules q_proj v_proj`` as one text, as ``--set`` gives them."""
    if isinstance(value, list) and find_setting(given)[1] not in ("source", "eval_source", "columns"):
        return ",".join(value)
    return value


def _read_settings(given: Iterable[tuple[str, Any]], where: str = "") -> dict[str, dict[str, Any]]:
    """Return section -> name -> value of settings, each read by the type of its field."""
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for shown, raw in given:
        try:
            section, name = find_setting(shown)
            value = read_value(section, name, raw)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        if name in found[section] and found[section][name] != value:
            values = short_repr(value), short_repr(found[section][name])
            raise ConfigError(
                f"{where}{shown}={values[0]} and {name}={values[1]} are two values of one setting; give one of them"
            )
        found[section][name] = value
    return found


def _resolve(run: Run, where: str) -> None:
    """Resolve the settings that are None, and check those of the two sections that do not check themselves."""
    is_demo = run.model.name_or_path == DEMO
    run.model.dtype = run.model.dtype or ("float32" if is_demo else "bfloat16")
    data = run.data
    if data.max_length is None:
        data.max_length = _DEMO_MAX_LENGTH if is_demo else 2048
    check_fields(run.model, f"{where}model.")
    check_fields(data, f"{where}data.")
    require(run.out is None or is_name(run.out), f"{where}out", run.out, "a path", ConfigError)
    if data.eval_source and data.eval_share:
        raise ConfigError(f"{where}eval_source and eval_share={data.eval_share:g} exclude each other; give one of them")
    if data.streaming and data.eval_share:
        raise ConfigError(f"{where}a stream cannot be split: name held-out data (eval_source) in place of eval_share")
    for name, needed in (("eval_split", "eval_source"), ("split_seed", "eval_share"), ("buffer_size", "streaming")):
        value = getattr(data, name)
        if value != getattr(DataSettings, name) and not getattr(data, needed):
            logger.warning("%sdata.%s=%r has no effect without %s", where, name, value, needed)


# --- Reading the file


def _read_file(path: str) -> Mapping[str, Any]:
    """Return the sections of a file, and its other keys, as they stand in it."""
    content = _parse(path)
    if not isinstance(content, Mapping):
        found = "is empty" if content is None else f"holds {short_repr(content)}"
        raise ConfigError(f"{path}: it {found}; allowed: the sections {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            hint = hint_at_name(str(key), _KEYS)
            homes = [section for section in SECTIONS if key in setting_names(section)]
            if homes and not hint:
                hint = f" It belongs in the section {homes[0]!r}."
            raise ConfigError(f"{path}: there is no section {short_repr(key)}.{hint} Allowed: {', '.join(_KEYS)}")
    _warn_of_versions(path, content.get("versions"))
    return content


def _settings_of(path: str | None, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names, with their section, and the values of a file; a text or a list is a section's first field."""
    for section in SECTIONS:
        values = content.get(section)
        if values is None:
            continue
        if section in ("model", "data") and isinstance(values, (str, list)):
            values = {setting_names(section)[0]: values}
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: {section} is {short_repr(values)}; allowed: names and values")
        for name, value in values.items():
            yield f"{section}.{name}", value


def _parse(path: str) -> Any:
    """Return the content of a YAML or JSON file, with every plain scalar of YAML as text."""
    if not path.endswith((".yaml", ".yml", ".json")):
        raise ConfigError(f"the run file {path!r} is not called *.yaml or *.json; data is named by --data")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no run file {path!r}; `phi3lora init {path}` writes one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the run file {path!r} cannot be read: {error}") from error
    try:
        if path.endswith(".json"):
            return json.loads(text, object_pairs_hook=_unique)
        return _yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the run file {path!r} cannot be read: {' '.join(str(error).split())}") from error


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _yaml(text: str) -> Any:
    import yaml  # 30 ms that --help need not wait for

    # Reads plain scalars as texts; empty ones and null as None; a key that is given twice is an error.
    loader_class: Any = type("Loader", (yaml.SafeLoader,), {})

    def scalar(loader: Any, node: Any) -> str:
        value: str = loader.construct_scalar(node)
        return value if node.style is None else Quoted(value)

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        for key, _ in pairs:
            if isinstance(key, (dict, list)):
                line = node.start_mark.line + 1
                raise ValueError(f"line {line}: {key!r} is no name; a text with braces needs quotes")
        return _unique(pairs)

    kept = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    loader_class.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] in kept]
        for first, pairs in loader_class.yaml_implicit_resolvers.items()
    }
    loader_class.add_constructor("tag:yaml.org,2002:str", scalar)
    loader_class.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, loader_class)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem} ({error.context or 'not YAML'})") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace('in "<unicode string>", ', "at ")) from error


def _warn_of_versions(path: str, recorded: Any) -> None:
    """Say which packages have another version than when the file was written."""
    if not isinstance(recorded, Mapping):
        return
    now = versions()
    changed = [f"{name} {then} (here {now[name]})" for name, then in recorded.items() if now.get(name, then) != then]
    if changed:
        logger.warning("%s was written with %s", path, ", ".join(changed))


# --- Writing


def scalar(value: Any) -> str:
    """Return a value as YAML spells it on one line."""
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")


def versions() -> dict[str, str]:
    """Return the installed versions of what a run's numbers depend on."""
    found = {}
    for package in ("phi3lora", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a clone that is not installed
            found[package] = "not installed"
    return found


_RECORD_HEAD = "# The settings of a run, as resolved."


def is_record(path: Path) -> bool:
    """Return whether a file is one that :func:`run_text` made, and not a user's."""
    try:
        with path.open("rb") as file:
            return file.read(len(_RECORD_HEAD)) == _RECORD_HEAD.encode()
    except OSError:
        return False


def run_text(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    lora: LoraConfig,
    training: TrainingConfig,
    *,
    unknown: Sequence[str] = (),
) -> str:
    """Return the text of a file that runs again with these settings; ``unknown`` says what has to be filled in.

    How the run was started (``resume_from_checkpoint``, ``overwrite_output_dir``) is left out: the file starts a run of
    its own, and deletes nothing. ``activation_checkpointing`` says what ``gradient_checkpointing`` does.
    """
    import yaml

    settings = {name: value for name, value in training.to_dict().items() if name not in _NOT_RECORDED}
    content: dict[str, Any] = {"model": dict(model), "data": dict(data), "lora": lora.to_dict(), "training": settings}
    content["versions"] = versions()
    head = [f"{_RECORD_HEAD} To run it again, in a new folder:", "# phi3lora train run.yaml --set output_dir=NEW"]
    lines = "".join(f"{line}\n" for line in (*head, *(f"# {sentence}" for sentence in unknown)))
    return lines + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))
