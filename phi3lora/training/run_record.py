"""``run.yaml`` in the output folder: the settings of a run, as resolved, which run again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import LoraConfig
from ..files import write_atomic
from ..lora.inject import lora_layers
from ..run_file import run_text
from ..run_settings import field_names
from .setup import PlannedRun

logger = logging.getLogger("phi3lora")

NAME = "run.yaml"


def write_record(run: PlannedRun, resumed: bool) -> None:
    """Write what is known of a run into its output folder, and say in the file what is not known.

    ``load_model`` and ``ChatDataset.load`` leave what they were given in ``origin``. Models and rows that were made in
    Python have none; then a resumed run leaves the file of its start as it is.
    """
    model, config, path = run.model, run.config, Path(run.config.output_dir, NAME)
    unknown: list[str] = []
    source = getattr(model, "origin", None)
    if source is None:
        unknown.append("model: not known, as it was made in Python. Fill in name_or_path.")
    elif not (resumed or source.get("adapter")) and any(layer.lora_B.any() for layer in lora_layers(model).values()):
        unknown.append("adapter: not known; the run went on from adapters that were trained before. Fill in adapter.")
    data = _data_section(run.train_dataset.origin, run.eval_dataset, unknown)
    if unknown and resumed and path.exists():
        return
    lora = getattr(model, "lora_config", None) or LoraConfig()
    text = run_text(source or {}, data, lora, config, unknown=unknown)
    try:
        write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.error("the settings of the run could not be written: %s", error)


def _data_section(origin: Mapping[str, Any] | None, eval_dataset: Any, unknown: list[str]) -> dict[str, Any]:
    """Return the section ``data``, and add what is not known of it."""
    if origin is None:
        unknown.append("data: not known, as the rows were chosen or made in Python. Fill in source.")
        return {}
    names = field_names("data")
    data = {name: value for name, value in origin.items() if name in names and value is not None}
    if eval_dataset is None or eval_dataset.origin == origin:
        return data
    held_out = eval_dataset.origin
    options = {name: value for name, value in origin.items() if name not in ("source", "split", "streaming")}
    if held_out is None or any(held_out.get(name) != value for name, value in options.items()):
        unknown.append("held-out data: not known, or loaded with other options. Fill in eval_source or eval_share.")
        return data
    return {**data, "eval_source": held_out["source"], "eval_split": held_out["split"]}
