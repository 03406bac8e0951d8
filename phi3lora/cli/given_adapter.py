"""The adapter that ``--adapter`` names: its file or PEFT folder, and the base that it was made for."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapters.adapter_file import FILES_IN_FOLDERS
from ..adapters.peft_format import CONFIG_NAME, TENSORS_NAME, peft_folders_in
from ..errors import AdapterError, ConfigError, ModelError, as_path, first_of
from ..files import read_json
from ..model.load import read_model_config
from ..run_file import is_record, read_run
from ..run_settings import DEMO
from ..training.checkpoint import newest_good_checkpoint
from ..training.output_folder import record_path

_ADAPTERS = "an adapter file, a checkpoint's folder, a run's folder, a PEFT folder"


def find_adapter(name: str) -> Path:
    """Return the adapter file, or the PEFT folder, that ``name`` is or holds.

    A run's folder has the adapter that the run wrote at its end; if it has not ended, its newest good checkpoint's.

    Raises:
        AdapterError: there is none.
    """
    path = as_path(name, "an adapter", AdapterError)
    if path.is_file():
        is_peft = path.name == TENSORS_NAME and path.with_name(CONFIG_NAME).is_file()
        return path.parent if is_peft else path
    if (path / CONFIG_NAME).is_file():
        return path
    for file in FILES_IN_FOLDERS:
        if (path / file).is_file():
            return path / file
    inside = peft_folders_in(path)
    if not any(name.startswith("checkpoint-") for name in inside):  # such are another trainer's, not damaged ones
        newest = newest_good_checkpoint(path)
        if newest is not None:
            return newest / "lora.safetensors"
    if inside:
        raise AdapterError(
            f"there is no adapter in {name!r} itself; it holds the PEFT folders {', '.join(inside)}: name one"
        )
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.pt")]) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    held = [file.name for file in files] or [file.parent.name for file in sorted(path.glob("*/adapter.safetensors"))]
    others = f"; it holds {first_of(held)}: name one" if held else ""
    raise AdapterError(f"there is no adapter file {name!r}{others}; allowed: {_ADAPTERS}")


def base_of(adapter: Path) -> dict[str, str]:
    """Return the ``name_or_path`` and ``revision`` of an adapter's base, as far as they are known.

    A PEFT folder names them in its config. An adapter file does not, but the ``run.yaml`` of the run that wrote it is
    in its folder or, for a checkpoint's, in the one above.
    """
    if adapter.is_dir():
        try:
            config = read_json(adapter / CONFIG_NAME)
            found = {"name_or_path": config.get("base_model_name_or_path") or config.get("model")}  # PEFT, mlx-lm
            found["revision"] = config.get("revision")
        except (OSError, ValueError, AttributeError):  # the import says what is wrong with it
            return {}
    else:
        records = map(record_path, adapter.absolute().parents[:2])
        record = next(filter(is_record, records), None)
        try:
            model = {} if record is None else read_run(str(record)).given["model"]
        except ConfigError:  # of another version
            return {}
        found = {name: model.get(name) for name in ("name_or_path", "revision")}
    named = {name: value for name, value in found.items() if isinstance(value, str) and value}
    if os.path.isdir(named.get("name_or_path", "")):
        named.pop("revision", None)  # a folder has none
    return named if "name_or_path" in named else {}


def is_loadable(name: str, revision: str | None) -> bool:
    """Return whether a base is there and ``load_model`` takes it; Unsloth's, for one, are llama-style copies."""
    try:
        return name == DEMO or bool(read_model_config(name, revision))
    except ModelError:
        return False
