"""Model cards, and uploads of adapters and merged models to the Hugging Face hub.

Only :func:`push_to_hub` sends anything. It uploads the files that :data:`PUBLISHED` names and refuses a folder that
holds others: a training run's folder also has optimizer state, generators and perhaps the data.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from jinja2 import Template
from safetensors import SafetensorError, safe_open

from ..config import LoraConfig, TrainingConfig
from ..data.dataset import ChatDataset, ChatStream
from ..errors import AdapterError, as_path, first_of, printable
from ..files import is_leftover, read_json, write_atomic
from ..model.load import load_tokenizer
from .adapter_file import HEADER_KEY, written
from .peft_format import CONFIG_NAME, PATTERN_NOTE, TENSORS_NAME
from .serving import model_name

logger = logging.getLogger("phi3lora")

PUBLISHED = (
    "README.md", "LICENSE*", "NOTICE*", "*.safetensors", "*.safetensors.index.json", "adapter_config.json",
    "config.json", "generation_config.json", "lora_config.json", "merge_report.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "loss.png", "training.png", "*.gguf",
)  # fmt: skip
"""Names of the files that are uploaded; a folder with others is refused."""

_RESULTS = {
    "loss": ("loss", "Loss"), "perplexity": ("perplexity", "Perplexity"),
    "token_accuracy": ("accuracy", "Accuracy of the next token"), "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"), "rougeL": ("rouge", "ROUGE-L"),
}  # fmt: skip
"""Metric of ``evaluate`` -> the hub's type of it, and its name in the card's front matter."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NEVER_SENT = (".git/*", ".cache/huggingface/*")  # upload_folder leaves these out
_LORA_ROWS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "exclude_modules", "layers_to_transform",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip
_TRAINING_ROWS = (
    "learning_rate", "lora_plus_lr_ratio", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "warmup_ratio", "optim", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "packing", "max_length", "bf16", "fp16", "seed",
)  # fmt: skip

_CARD = """---
{{ card_data }}
---

# {{ title }}

This is {{ kind }}, made with phi3lora.

{% if note %}Note: {{ note }}.

{% endif %}{% if data %}## Data

{{ data }}

{% endif %}{% for heading, column, rows in tables if rows %}## {{ heading }}

| {{ column }} | value |
|---|---|
{% for name, value in rows %}| {{ name }} | {{ value }} |
{% endfor %}
{% endfor %}## How to load it

{% if merged %}It is a plain transformers model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`phi3lora.load_model(folder)` loads it too, to be tuned further.
{% else %}With phi3lora:

```python
import phi3lora as p3

folder = "."  # this folder, or huggingface_hub.snapshot_download("owner/name")
model, tokenizer = p3.load_model({{ base }})
{{ load }}
```

{% if for_peft %}With peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = "."  # this folder, or huggingface_hub.snapshot_download("owner/name")
model = AutoModelForCausalLM.from_pretrained({{ base }})
model = PeftModel.from_pretrained(model, folder)
```
{% else %}For peft, load it so and write its format with `p3.export_peft(model, folder)`.
{% endif %}{% endif %}
## Versions

{{ versions }}
"""
"""The card, as a Jinja template."""


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
    """Write ``README.md`` into a folder with an adapter or a merged model.

    The card has the front matter that the hub reads. It says what the model is, on which data and how it was trained,
    its metrics, and how to load it. Only the last part of a local path is written.

    Args:
        path: the folder: ``export_peft``'s, one with a file of ``save_adapter``, or ``save_merged``'s.
        base_model: hub name or folder of the base.
        dataset: hub name or file of the data, or the dataset itself for its statistics.
        lora, training: tables of hyperparameters.
        metrics: name -> number, as ``evaluate`` and ``TrainingResult.metrics`` have them; other values are left out.
            Those of an evaluation also go into the front matter as the hub's results, if ``dataset`` says on what.
        language: ISO 639 code, or several.
        license: the hub's identifier, such as ``"mit"``.
        merged: the folder is a whole model, not an adapter.

    Returns:
        The path of the card.

    Raises:
        AdapterError: the folder holds no adapter (with ``merged``: no model), or the card cannot be written.
        ModelError: a merged model's tokenizer cannot be loaded.
    """
    folder = as_path(path, "a folder", AdapterError)
    files = _adapter_files(folder)
    if merged and not _holds_model(folder):
        raise AdapterError(f"{str(folder)!r} holds no merged model (config.json and *.safetensors); see save_merged")
    if not merged and not files:
        raise AdapterError(f"{str(folder)!r} holds no adapter; save_adapter or export_peft writes one (or merged=True)")
    tokenizer = load_tokenizer(str(folder)) if merged and (folder / "tokenizer.json").is_file() else None
    facts = {"tokenizer": tokenizer, "dataset": dataset, "lora": lora, "training": training, "metrics": metrics}
    title = folder.resolve().name
    text = model_card(folder, title, base_model, **facts, language=language, license=license, merged=merged)  # type: ignore[arg-type]
    card = folder / "README.md"
    with written(repr(str(card)), "card"):
        write_atomic(card, lambda file: file.write_text(text, encoding="utf-8"))
    return card


def add_card(folder: Path, target: Path, text: str) -> None:
    """Write a card into a folder that will replace ``target``. A card that is there stays; if it differs, say so."""
    present = target / "README.md"
    if not present.exists():
        (folder / "README.md").write_text(text, encoding="utf-8")
    elif present.read_text(encoding="utf-8", errors="replace") != text:
        logger.warning("%s stays as it is; write_model_card(...) replaces it", present)


def model_card(
    folder: Path,
    title: str,
    base_model: str | os.PathLike[str],
    *,
    dataset: str | ChatDataset | ChatStream | None = None,
    lora: LoraConfig | None = None,
    training: TrainingConfig | None = None,
    metrics: Mapping[str, Any] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    merged: bool = False,
    tokenizer: Any = None,
) -> str:
    """Return the text of the card of a folder: :func:`write_model_card` without its checks, under a given title.

    Args:
        tokenizer: of a merged model: ``model_name`` in the front matter becomes the name of its GGUF file, by which
            llama.cpp knows how to tokenise.
    """
    files = _adapter_files(folder)
    own, for_peft = [name for name in files if name != TENSORS_NAME], TENSORS_NAME in files
    link, is_on_hub = _link(base_model), _is_hub_name(base_model)
    results = _eval_results(dataset, metrics or {})
    front_matter = ModelCardData(
        base_model=str(base_model) if is_on_hub else None,
        library_name="transformers" if merged else "peft" if for_peft else "phi3lora",
        tags=["lora", "phi3lora"],
        pipeline_tag="text-generation",
        datasets=[dataset] if isinstance(dataset, str) and _is_hub_name(dataset) else None,
        language=[language] if isinstance(language, str) else list(language) if language else None,
        license=license,
        model_name=title if results else None,  # of the results: to_yaml moves it beside them
        eval_results=results,
    ).to_yaml()
    if tokenizer is not None:
        own_name = {"model_name": model_name(tokenizer, str(base_model))}
        front_matter = yaml.safe_dump(own_name, allow_unicode=True, width=10**6) + front_matter
    data = None
    if dataset is not None:
        data = _link(dataset, "datasets/") if isinstance(dataset, str) else _markdown(dataset.describe())
    numbers = [
        (_markdown(name), f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, value in (metrics or {}).items()
        if type(value) in (int, float)
    ]
    text: str = Template(_CARD, keep_trailing_newline=True).render(
        card_data=front_matter,
        title=_markdown(title),
        note=PATTERN_NOTE if _has_patterns(folder) else None,
        kind=f"{link} with a LoRA adapter merged into its weights" if merged else f"a LoRA adapter for {link}",
        data=data,
        tables=[
            ("Hyperparameters", "setting", [*_rows(lora, _LORA_ROWS), *_rows(training, _TRAINING_ROWS)]),
            ("Metrics", "metric", numbers),
        ],
        merged=merged,
        base=json.dumps(str(base_model) if is_on_hub else Path(base_model).name),
        load=_loading_line(own),
        for_peft=for_peft,
        versions=_versions(),
    )
    return text


def _has_patterns(folder: Path) -> bool:
    """Return whether a PEFT folder's config gives modules ranks or alphas of their own."""
    try:
        config = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):  # no PEFT folder, or one that PEFT itself will refuse
        return False
    return isinstance(config, dict) and bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def _loading_line(own: Sequence[str]) -> str:
    """Return the line of Python that loads the first of our adapter files, or PEFT's if there is none."""
    if not own:
        return "p3.import_peft(model, folder)"
    is_plain = re.fullmatch(r"[\w.-]+", own[0])
    file = f'f"{{folder}}/{own[0]}"' if is_plain else f"folder + {json.dumps('/' + own[0])}"
    return f"p3.load_adapter(model, {file})"


def _versions() -> str:
    names = ("phi3lora", "torch", "transformers", "loralib")  # phi3lora has none in a clone that is not installed
    return ", ".join(f"{name} {p.version}" for name in names for p in islice(distributions(name=name), 1))


def _eval_results(dataset: Any, metrics: Mapping[str, Any]) -> list[EvalResult] | None:
    """Return the metrics of an evaluation in the hub's form, which wants a dataset; None if there are none."""
    if dataset is None:
        return None
    kind = "custom"
    name = printable(Path(dataset).name) if isinstance(dataset, str) else "chats"
    if _is_hub_name(dataset):
        kind = name = dataset
    about: dict[str, Any] = {"task_type": "text-generation", "dataset_type": kind, "dataset_name": name}
    found = []
    for key, value in metrics.items():
        plain = key.removeprefix("eval_")
        is_own = key != plain and not plain.startswith("n_")  # a metric of compute_metrics
        if (plain in _RESULTS or is_own) and type(value) in (int, float) and math.isfinite(value):
            metric, label = _RESULTS.get(plain, (printable(plain), printable(plain)))
            found.append(EvalResult(**about, metric_type=metric, metric_name=label, metric_value=value))
    return found or None


def push_to_hub(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a folder with an adapter or a merged model to the Hugging Face hub, in one commit.

    Args:
        path: the folder; it holds only files of :data:`PUBLISHED` names, no folders and no links.
        repo_id: ``"you/name"``; created if it does not exist.
        private: True: a repository that has to be created is private.
        token: with write access; None: the one that ``hf auth login`` stored.
        commit_message: default ``"Upload with phi3lora"``.
        endpoint: address of another hub.

    Returns:
        The commit's address.

    Raises:
        AdapterError: a folder without adapter or model, or with other files or links; an ``adapter_config.json`` that
            names a folder on this machine as the base; the hub cannot be reached, refuses the token or has no such
            repository.

    Example:
        >>> p3.push_to_hub("support-peft", "you/support")  # doctest: +SKIP
    """
    folder = as_path(path, "a folder", AdapterError)
    if not (_adapter_files(folder) or _holds_model(folder)):
        raise AdapterError(
            f"{str(folder)!r} holds neither an adapter nor a model; save_adapter, export_peft and save_merged write one"
        )
    names = _published_names(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, folder / name) for name in names],
            commit_message=commit_message or "Upload with phi3lora",
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise AdapterError(
            f"{str(folder)!r} was not uploaded to {repo_id!r} at {api.endpoint}: {' '.join(str(cause).split())}; "
            f"the token needs write access: give token=, or run 'hf auth login'"
        ) from error
    return str(commit.commit_url)


def is_local(name: str | None) -> bool:
    """Return whether a base's name is a path that exists here, or that can be no name on the hub."""
    if name is None or "://" in name or _is_hub_name(name):
        return False
    return "/" in name or "\\" in name or os.path.exists(name)


def _is_hub_name(name: Any) -> bool:
    """Return whether ``name`` is ``owner/name``, and not a path that exists here."""
    return isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def _adapter_files(folder: Path) -> list[str]:
    """Return the names of the adapter files in a folder: PEFT's first, if its config is there, then ours."""
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {str(folder)!r}")
    names = [TENSORS_NAME] if all((folder / name).is_file() for name in (TENSORS_NAME, CONFIG_NAME)) else []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:  # the header alone: the file may be a large model
                if path.name != TENSORS_NAME and HEADER_KEY in (file.metadata() or {}):
                    names.append(path.name)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    return names


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _published_names(folder: Path) -> list[str]:
    """Return the names of the files to send.

    Raises:
        AdapterError: files of other names than :data:`PUBLISHED`; links, whose targets may be anything; a config that
            reveals a local path.
    """
    found = [file for file in sorted(folder.rglob("*")) if file.is_symlink() or not file.is_dir()]
    found = [file for file in found if not is_leftover(file.name)]
    linked = {file.relative_to(folder).as_posix() for file in found if file.is_symlink()}
    names = [file.relative_to(folder).as_posix() for file in found]
    names = [name for name in names if not any(fnmatch(name, pattern) for pattern in _NEVER_SENT)]
    if links := [name for name in names if name in linked]:
        raise AdapterError(
            f"{str(folder)!r} holds links, which are not followed: {first_of(links)}. Allowed: files. Replace "
            f"each by the file that it leads to, if you want to publish that"
        )
    others = [name for name in names if "/" in name or not any(fnmatch(name, pattern) for pattern in PUBLISHED)]
    if others:
        raise AdapterError(
            f"{str(folder)!r} holds files that should not be published: {first_of(others)}. Allowed: "
            f"{', '.join(PUBLISHED)}. export_peft and save_merged write a folder to publish; or copy the files into one"
        )
    try:
        base = read_json(folder / CONFIG_NAME)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # no PEFT folder, or one that PEFT itself will refuse
        return names
    if isinstance(base, str) and is_local(base) and not _HUB_NAME.fullmatch(base):
        raise AdapterError(
            f"{str(folder / CONFIG_NAME)!r} names {base!r} as the base, a folder on this machine; allowed: its name on "
            f"the hub. Write the folder again with export_peft(..., base_model='owner/name')"
        )
    return names


def _link(name: str | os.PathLike[str], kind: str = "") -> str:
    """Return a link to the hub, or the last part of a local path."""
    if _is_hub_name(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{printable(Path(name).name).replace('`', chr(39))}`"


def _markdown(text: str) -> str:
    """Return a text as Markdown that shows it as it is, on one line, also in a cell of a table."""
    return re.sub(r"[\\`\[\]<>|]", r"\\\g<0>", printable(text))


def _rows(config: LoraConfig | TrainingConfig | None, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the settings that are not None, and of ``max_steps`` and ``num_train_epochs`` the one that counts."""
    values = {} if config is None else config.to_dict()
    unused = "num_train_epochs" if values.get("max_steps", 0) > 0 else "max_steps"
    rows = [(name, values[name]) for name in names if name != unused and values.get(name) not in (None, {})]
    return [
        (name, _markdown(", ".join(map(str, value)) if isinstance(value, list) else str(value))) for name, value in rows
    ]
