"""Finds the adapter that a path names, in whatever form it was left there, and loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.adapter_file import load_adapter
from ..adapters.peft_format import CONFIG_NAME, TENSORS_NAME
from ..adapters.peft_import import import_peft
from ..errors import AdapterError, as_path
from ..training.checkpoint import newest_good_checkpoint

_ALLOWED = "an adapter file, a checkpoint's folder, a run's folder, a PEFT folder"


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
    for file in ("adapter.safetensors", "lora.safetensors"):
        if (path / file).is_file():
            return path / file
    newest = newest_good_checkpoint(path)
    if newest is not None:
        return newest / "lora.safetensors"
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.pt")]) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    held = f"; it holds {', '.join(file.name for file in files)}: name one" if files else ""
    raise AdapterError(f"there is no adapter file {name!r}{held}; allowed: {_ALLOWED}")


def load_found(model: Any, path: Path) -> None:
    """Load what :func:`find_adapter` found."""
    if path.is_dir():
        import_peft(model, path)
    else:
        load_adapter(model, path)
