"""An adapter or a merged model for others: a model card, and a folder on the Hugging Face hub.

Nothing is sent anywhere but by :func:`push_to_hub`, and that sends what its list names and refuses a folder with more:
a training run's folder also holds optimizer state, generators and, maybe, the data.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from ..config import LoraConfig, TrainingConfig
from ..data.dataset import ChatDataset, ChatStream
from ..errors import AdapterError, is_path
from ..files import read_json
from .adapter_file import is_adapter_file

PUBLISHED = (
    "README.md", "LICENSE*", "NOTICE*", "*.safetensors", "*.safetensors.index.json", "adapter_config.json",
    "config.json", "generation_config.json", "lora_config.json", "merge_report.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "loss.png",
)  # fmt: skip
"""Names that may leave; a folder with others is refused."""

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""By which peft knows an adapter."""

_LEFT_OUT = (".git/*", ".cache/huggingface/*")  # which upload_folder never sends
_LORA_ROWS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules")
_TRAINING_ROWS = (
    "learning_rate", "lora_plus_lr_ratio", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "packing", "max_length", "bf16", "fp16", "seed",
)  # fmt: skip


def write_model_card(
    path: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    dataset: str | ChatDataset | ChatStream | None = None,
    lora: LoraConfig | None = None,
    training: TrainingConfig | None = None,
    metrics: Mapping[str, Any] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    merged: bool = False,
) -> Path:
    """Write ``README.md`` into a folder with an adapter, or with a merged model.

    The front matter has what the hub reads; the text says what it is, what it was trained on and how, what it reached
    and how to load it. Of local paths only the last part is written.

    Args:
        path: the folder: ``export_peft``'s, one with a file of ``save_adapter``, or ``save_merged``'s.
        base_model: hub name or folder of the base.
        dataset: hub name or file of the data, or the dataset itself for its figures.
        lora, training: tables of hyperparameters.
        metrics: name -> number, as ``evaluate`` and ``TrainingResult.metrics`` have them; what is no number is left
            out.
        language: ISO 639 code, or several.
        license: the hub's identifier, ``"mit"``, say.
        merged: the folder is a whole model, not an adapter.

    Returns:
        The path of the card.

    Raises:
        AdapterError: the folder holds no adapter (with ``merged``: no model).
    """
    folder = Path(path)
    files = adapter_files(folder)
    if merged and not _holds_model(folder):
        raise AdapterError(f"{str(folder)!r} holds no merged model (config.json and *.safetensors); see save_merged")
    if not merged and not files:
        raise AdapterError(f"{str(folder)!r} holds no adapter; save_adapter or export_peft writes one (or merged=True)")
    hub_dataset = [dataset] if isinstance(dataset, str) and _is_hub_name(dataset) else None
    data = ModelCardData(
        base_model=str(base_model) if _is_hub_name(base_model) else None,
        library_name="transformers" if merged else "peft" if PEFT_FILES[0] in files else "phi3lora",
        tags=["lora", "phi3lora"],
        pipeline_tag="text-generation",
        datasets=hub_dataset,
        language=[language] if isinstance(language, str) else list(language) if language else None,
        license=license,
    )
    base = _shown(base_model)
    kind = f"{base} with a LoRA adapter merged into its weights" if merged else f"a LoRA adapter for {base}"
    parts = [f"# {folder.resolve().name}", f"This is {kind}, made with phi3lora."]
    if dataset is not None:
        parts += ["## Data", _data_text(dataset)]
    settings = [*_rows(lora, _LORA_ROWS), *_rows(training, _TRAINING_ROWS)]
    if settings:
        parts += ["## Hyperparameters", _table("setting", settings)]
    numbers = [(name, _number(value)) for name, value in (metrics or {}).items() if _is_number(value)]
    if numbers:
        parts += ["## Metrics", _table("metric", numbers)]
    parts += ["## How to load it", *(_load_merged() if merged else _load_adapter(files, base))]
    parts += ["## Versions", _versions()]
    card = folder / "README.md"
    card.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def push_to_hub(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a folder with an adapter or a merged model to the Hugging Face hub.

    Args:
        path: the folder; only files of :data:`PUBLISHED` names, directly in it.
        repo_id: ``"you/name"``; made if it does not exist.
        private: whether a repository that is made is private.
        token: with write access; None: the one that ``hf auth login`` stored.
        commit_message: of the one commit.
        endpoint: another hub's address.

    Returns:
        The commit's address.

    Raises:
        AdapterError: a folder without adapter or model, or with files that should not leave; an ``adapter_config.json``
            that names a folder of this machine as the base; the hub cannot be reached, refuses the token or has no such
            repository.

    Example:
        >>> p3.push_to_hub("support-peft", "you/support")  # doctest: +SKIP
    """
    folder = Path(path)
    if not (adapter_files(folder) or _holds_model(folder)):
        raise AdapterError(
            f"{str(folder)!r} holds neither an adapter nor a model; save_adapter, export_peft and save_merged "
            f"write them"
        )
    _refuse_what_should_stay(folder)
    _refuse_a_local_base(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload with phi3lora",
            allow_patterns=list(PUBLISHED),
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"{str(folder)!r} was not uploaded to {repo_id!r}: {_reason(error, api.endpoint)}"
        ) from error
    return str(commit.commit_url)


def adapter_files(folder: Path) -> list[str]:
    """Names of the adapter files in a folder: PEFT's first, if its configuration is there, then ours."""
    if not folder.is_dir():
        raise AdapterError(f"no such folder: {str(folder)!r}")
    found = [PEFT_FILES[0]] if all((folder / name).is_file() for name in PEFT_FILES) else []
    others = [file for file in sorted(folder.glob("*.safetensors")) if file.name != PEFT_FILES[0]]
    return found + [file.name for file in others if is_adapter_file(file)]


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _refuse_what_should_stay(folder: Path) -> None:
    """Everything in the folder is on the list, or is what the hub's client leaves out itself."""
    inside = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if not file.is_dir()]
    others = [
        name
        for name in inside
        if not any(fnmatch(name, pattern) for pattern in _LEFT_OUT)
        and ("/" in name or not any(fnmatch(name, pattern) for pattern in PUBLISHED))
    ]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise AdapterError(
            f"{str(folder)!r} holds files that should not leave: {shown}. Allowed: {', '.join(PUBLISHED)}. "
            f"Copy what is to be published into a folder of its own"
        )


def _refuse_a_local_base(folder: Path) -> None:
    """Where only this machine could find the base, and its path would be told to all."""
    file = folder / PEFT_FILES[1]
    if not file.is_file():
        return
    try:
        base = read_json(file)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):  # not ours to judge: what it is wrong for, peft says
        return
    if is_local(base) and not _has_hub_form(base):
        raise AdapterError(
            f"{str(file)!r} names {base!r} as the base, a folder of this machine; allowed: its name on the hub. "
            f"Write the folder again with export_peft(..., base_model='owner/name')"
        )


def _reason(error: Exception, endpoint: str) -> str:
    """What went wrong with the hub, and the way out."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to upload"
    if status in (401, 403):
        return f"{endpoint} refuses the token ({status}); give token= with write access there, or run 'hf auth login'"
    if status == 404:
        return f"{endpoint} has no such repository or owner, or the token may not see it"
    if isinstance(cause, HTTPError) and status is None:
        return f"{endpoint} cannot be reached ({cause})"
    return " ".join(str(cause).split())


def _has_hub_form(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _is_hub_name(name: Any) -> bool:
    """``owner/name``, and not a path that exists here."""
    return is_path(name) and isinstance(name, str) and _has_hub_form(name) and not Path(name).exists()


def is_local(name: Any) -> bool:
    """A path that exists here, or one that could be no hub name."""
    if not (isinstance(name, str) and name) or "://" in name or not is_path(name) or _is_hub_name(name):
        return False
    return "/" in name or "\\" in name or Path(name).exists()


def _shown(name: str | os.PathLike[str]) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_name(name) else f"`{Path(name).name}`"


def _data_text(dataset: str | ChatDataset | ChatStream) -> str:
    if isinstance(dataset, (ChatDataset, ChatStream)):
        return dataset.describe()
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if _is_hub_name(dataset) else _shown(dataset)


def _rows(config: LoraConfig | TrainingConfig | None, names: Sequence[str]) -> list[tuple[str, str]]:
    """Those settings that say something: not None, and of ``max_steps`` and epochs the one that counts."""
    values = {} if config is None else config.to_dict()
    if values.get("max_steps", 0) > 0:
        del values["num_train_epochs"]
    else:
        values.pop("max_steps", None)
    shown = [(name, values[name]) for name in names if values.get(name) is not None]
    return [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in shown]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(name: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([f"| {name} | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _load_adapter(files: list[str], base: str) -> list[str]:
    """With phi3lora, and with peft where the folder has its files."""
    own = [name for name in files if name != PEFT_FILES[0]]
    load = f'p3.load_adapter(model, f"{{folder}}/{own[0]}")' if own else "p3.import_peft(model, folder)"
    name = base.partition("]")[0].strip("[`")
    where = 'folder = "."  # this folder, or huggingface_hub.snapshot_download("owner/name")'
    parts = [
        "With phi3lora:",
        f'```python\nimport phi3lora as p3\n\n{where}\nmodel, tokenizer = p3.load_model("{name}")\n{load}\n```',
    ]
    if PEFT_FILES[0] in files:
        parts += [
            "With peft:",
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'{where}\nmodel = AutoModelForCausalLM.from_pretrained("{name}")\n'
            "model = PeftModel.from_pretrained(model, folder)\n```",
        ]
    else:
        parts.append("For peft, load it so and write its format with `p3.export_peft(model, folder)`.")
    return parts


def _load_merged() -> list[str]:
    return [
        "It is a plain transformers model:",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```",
        "`phi3lora.load_model(folder)` loads it too, to be tuned further.",
    ]


def _versions() -> str:
    found = []
    for name in ("phi3lora", "torch", "transformers", "loralib"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
            continue
    return ", ".join(found)
