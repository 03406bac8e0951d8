"""The engines that serve a model or an adapter: the commands, and the arguments that each needs besides the files.

llama.cpp's converters and its tokenizer guess what no file of a Phi-3 folder says, and guess wrongly without a warning:

    what                             its guess                                     told by
    white space after Phi-3's        kept, unless general.name contains "phi-3"    --model-name; model_name in the
    markers, which transformers      or "phi3"; the folder's name loses its        front matter of README.md
    strips                           hyphens
    the begin token before a chat    added to a SentencePiece vocabulary           add_bos_token in
                                                                                   tokenizer_config.json, --override-kv
    a space before the text after    added to a SentencePiece vocabulary           --override-kv
    a marker
    longrope's rotary factors        the long ones, if the context that it is      -c; Ollama: num_ctx
                                     given (default: the model's whole length)
                                     is past the boundary

Sources, llama.cpp b10359: src/llama-vocab.cpp (``_contains_any(model_name, {"phi-3", "phi3"})``, ``add_space_prefix``),
src/llama-model.cpp (``get_rope_factors``), conversion/phi.py (``Phi3MiniModel.set_vocab``). vLLM chooses longrope's
factors by ``--max-model-len``. https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..display import html, html_marked, shell_lines, terminal_columns, wrap
from ..errors import printable
from ..inference.generation import stop_token_ids
from ..model.load import longrope_boundary

logger = logging.getLogger("phi3lora")

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of vLLM's ``--max-lora-rank`` (vllm/config/lora.py)."""

SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = (
    "tokenizer.json", SENTENCEPIECE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
"""Names of a tokenizer's files; those of an earlier tokenizer do not stay beside another's."""
_ADD_BOS, _ADD_SPACE = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
_PHI3_NAME = re.compile("phi-?3", re.I)
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens that llama.cpp looks up in the vocabulary of a model called phi-3; it fails to load one without them."""


_PROGRAMS = ("vllm ", "python ", "llama-server ", "llama-cli ", "ollama ", "hf ")


class Exported:
    """A written folder and the commands that use it; ``print`` shows both."""

    commands: dict[str, str]

    def _lines(self) -> list[str]:
        """Return what the folder holds, and the notes."""
        raise NotImplementedError

    def __str__(self) -> str:
        columns = terminal_columns()
        lines = [part for line in self._lines() for part in wrap(line, columns)]
        for tool, text in self.commands.items():
            lines += ["", f"# {tool}"]
            for line in text.splitlines():  # lines of Python and of a Modelfile stay whole
                lines += shell_lines(line, columns) if line.startswith(_PROGRAMS) else [line]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html(line)}</p>" for line in self._lines()]
        parts += [f"<p><b>{html(tool)}</b></p>{html_marked(((text, False),))}" for tool, text in self.commands.items()]
        return "".join(parts)


@dataclass(frozen=True)
class LlamaCppSettings:
    """Settings of a model that llama.cpp and Ollama would guess wrongly."""

    model_name: str
    """Value of ``--model-name``, the ``general.name`` in the GGUF file."""
    context: int | None
    """Longest context with the model's short rotary factors; None: any length that the model has."""
    overrides: dict[str, bool]
    """Keys of the GGUF file that the converter would leave out or set wrongly."""
    notes: tuple[str, ...]
    """Differences that no setting removes."""

    @property
    def context_option(self) -> str:
        """``-c`` after a space, or nothing."""
        return "" if self.context is None else f" -c {self.context}"

    @property
    def options(self) -> str:
        """Options of ``llama-server`` and ``llama-cli``, each after a space."""
        return self.context_option + "".join(
            f" --override-kv {key}=bool:{value}".lower() for key, value in self.overrides.items()
        )


def llama_cpp_settings(config: Any, tokenizer: Any, base_model: str) -> LlamaCppSettings:
    """Return what llama.cpp must be told.

    Args:
        config: the model's config.
        tokenizer: its tokenizer; None: the name is the base's, and nothing else about tokens is known.
        base_model: hub name or folder of the base.
    """
    notes, boundary = [], longrope_boundary(config)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp switches the sliding window off: the same up to {window} tokens, another function past them"
        )
    if boundary is not None:
        notes.append(
            f"llama.cpp and Ollama use the long rotary factors if their context is past {boundary} tokens; -c and "
            f"num_ctx {boundary} keep the short ones, for an adapter that was trained on documents up to that length"
        )
    overrides: dict[str, bool] = {}
    if tokenizer is not None:
        overrides = _overrides(tokenizer)
        if _strips(tokenizer) and not _can_strip(tokenizer):
            notes.append("llama.cpp keeps white space at the edges of a message; transformers strips it after a marker")
    name = model_name(tokenizer, base_model)
    if tokenizer is None and "phi" not in name.lower():
        notes.append(
            f"llama.cpp's --model-name is the base's, {name}, because no tokenizer was given; it must contain phi-3 "
            f"for the vocabulary of Phi-3 and Phi-3.5, and must not for Phi-4's"
        )
    return LlamaCppSettings(name, boundary, overrides, tuple(notes))


def model_name(tokenizer: Any, base_model: str) -> str:
    """Return the ``general.name`` with which llama.cpp tokenises as transformers does: the base's, if it can be."""
    name = re.split(r"[/\\]", base_model.rstrip("/\\"))[-1] or "model"
    if tokenizer is None:
        return name
    if _strips(tokenizer) and _can_strip(tokenizer):
        return name if _PHI3_NAME.search(name) else f"Phi-3 {name}"
    return _PHI3_NAME.sub("phi", name)


def _strips(tokenizer: Any) -> bool:
    """Return whether the tokenizer strips the white space that follows a marker of the template."""
    end = stop_token_ids(tokenizer)[0]
    return any(t.rstrip for i, t in tokenizer.added_tokens_decoder.items() if t.special or i == end)


def _can_strip(tokenizer: Any) -> bool:
    """Return whether llama.cpp can be made to strip it: only for the vocabulary of Phi-3 and Phi-3.5."""
    return set(_PHI3_TOKENS).issubset(tokenizer.get_vocab())


def _overrides(tokenizer: Any) -> dict[str, bool]:
    """Return key -> value of what the converter, given the tokenizer's own files, would get wrong."""
    overrides = {}
    is_sentencepiece = sentencepiece_file(tokenizer) is not None
    says = _saved_settings(tokenizer).get("add_bos_token")
    converter_adds_bos = _adds_bos(tokenizer) if says is None and not is_sentencepiece else says is not False
    if converter_adds_bos:
        overrides[_ADD_BOS] = False
    if is_sentencepiece:
        end = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[0])
        after = tokenizer.tokenize(f"{end}a", add_special_tokens=False)[1]
        if not after.startswith("▁"):
            overrides[_ADD_SPACE] = False
    return overrides


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


# ----------------------------------------------------------------------------------------------------
# A tokenizer's files


def sentencepiece_file(tokenizer: Any) -> Path | None:
    """Return the ``tokenizer.model`` beside the files that a tokenizer was read from, if there is one."""
    candidates = [getattr(tokenizer, "vocab_file", None) or ""]
    if tokenizer.name_or_path:  # "": a tokenizer that was read from no folder
        candidates.append(os.path.join(tokenizer.name_or_path, SENTENCEPIECE))
    return next(
        (Path(path) for path in candidates if os.path.basename(path) == SENTENCEPIECE and os.path.isfile(path)), None
    )


def _saved_settings(tokenizer: Any) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` that a tokenizer was read from; empty if it was read from no folder.

    A folder that is gone is empty too. The place of ``tokenizer.model``, which the tokenizer keeps, is the right one
    for a hub name with another revision or cache folder.
    """
    vocabulary = sentencepiece_file(tokenizer)
    place = str(tokenizer.name_or_path) if vocabulary is None else str(vocabulary.parent)
    try:
        settings: dict[str, Any] = get_tokenizer_config(place, local_files_only=True) if place else {}
    except OSError:  # a path where nothing is
        return {}
    return settings


def restore_tokenizer_files(tokenizer: Any, folder: Path) -> None:
    """Put back what ``tokenizer.save_pretrained(folder)`` leaves out and older readers need.

    transformers 5 saves ``tokenizer.json`` alone, under the class ``TokenizersBackend``. llama.cpp's converter reads
    Phi-3's vocabulary from ``tokenizer.model``, and Phi-4's if the class is ``GPT2Tokenizer``; transformers 4 knows
    neither the class. Beside Phi-3's ``config.json`` transformers 5 reads ``tokenizer.json`` whatever the class.
    """
    source, path = sentencepiece_file(tokenizer), folder / "tokenizer_config.json"
    if source is not None:
        shutil.copyfile(source, folder / SENTENCEPIECE)
    elif os.path.isabs(name := str(tokenizer.name_or_path)) and not os.path.exists(name):
        logger.warning(
            "the folder that the tokenizer was read from is gone, %s: its %s, if it had one, is not copied",
            printable(name),
            SENTENCEPIECE,
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = _saved_settings(tokenizer).get("tokenizer_class")
    if base is not None and base != "TokenizersBackend":
        settings["tokenizer_class"] = base
    elif source is None and settings.get("tokenizer_class") == "TokenizersBackend" and _is_byte_level(tokenizer):
        settings["tokenizer_class"] = "GPT2Tokenizer"
    if not _adds_bos(tokenizer):
        settings["add_bos_token"] = False
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_byte_level(tokenizer: Any) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])


# ----------------------------------------------------------------------------------------------------
# Commands


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` of vLLM that fits ``rank``, or None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def adapter_commands(
    path: Path, base: str, rank: int, stops: Sequence[str], boundary: int | None, llama_cpp: LlamaCppSettings | None
) -> dict[str, str]:
    """Return tool -> command lines that use a PEFT folder.

    Names and texts are quoted for the shell; those that no line can hold are left out.

    Args:
        path: the folder.
        base: hub name or folder of the base.
        rank: its largest rank.
        stops: the texts at which an answer ends.
        boundary: of a longrope model.
        llama_cpp: what llama.cpp must be told; None: it cannot use this adapter.
    """
    folder, name = str(path), path.resolve().name or "adapter"
    lines = {
        "PEFT": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {path.as_posix()!r})"
    }
    allowed = max_lora_rank(rank)
    if allowed is not None:
        lines["vLLM"] = (
            f"vllm serve {quote(base)} --enable-lora --lora-modules {quote(_vllm_module(name, folder))} "
            f"--max-lora-rank {allowed}"
            + (f" --generation-config {quote(folder)}" if stops else "")
            + (f" --max-model-len {boundary}" if boundary is not None else "")
        )
    if llama_cpp is None:
        return lines
    gguf = str(path / "adapter.gguf")
    if Path(base).is_dir():
        base_folder, option, first = base, "--base", []
    else:
        base_folder, option, first = "base", "--base-model-id", [f"hf download {quote(base)} --local-dir base"]
    of_model = f"--model-name {quote(llama_cpp.model_name)} --outfile base.gguf {quote(base_folder)}"
    of_adapter = f"{option} {quote(base)} --outfile {quote(gguf)} {quote(folder)}"
    lines["llama.cpp"] = "\n".join([
        *first,
        f"python $LLAMA_CPP/convert_hf_to_gguf.py {of_model}",
        f"python $LLAMA_CPP/convert_lora_to_gguf.py {of_adapter}",
        f"llama-server -m base.gguf --lora {quote(gguf)}{llama_cpp.options}",
    ])  # fmt: skip
    if gguf.isprintable() and not llama_cpp.overrides:
        text = modelfile("./base.gguf", gguf, None, llama_cpp.context, stops)
        lines["Ollama"] = f"cat > Modelfile <<'END'\n{text}END\nollama create {ollama_name(path)} -f Modelfile"
    return lines


def _vllm_module(name: str, folder: str) -> str:
    """Return a value of vLLM's ``--lora-modules``, which splits ``name=path`` at every = and takes a comma for JSON."""
    if any(character in name + folder for character in "=,"):
        return json.dumps({"name": name, "path": folder}, ensure_ascii=False)
    return f"{name}={folder}"


def ollama_name(path: Path) -> str:
    """Return a folder's name with the characters that Ollama allows in a model's: ASCII letters, digits, ``_ - .``"""
    name = re.sub(r"[^a-z0-9_.-]+", "-", path.resolve().name.lower())
    return re.sub(r"\.{2,}", ".", name).strip("-.")[:80] or "model"


def modelfile(base: str, adapter: str | None, template: str | None, context: int | None, stops: Sequence[str]) -> str:
    """Return an Ollama Modelfile. Stop texts that it cannot hold are left out."""
    lines = [f"FROM {base}"]
    lines += [] if adapter is None else [f"ADAPTER {adapter}"]
    lines += [] if template is None else [f'TEMPLATE """{template}"""']
    lines += [] if context is None else [f"PARAMETER num_ctx {context}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if fits_modelfile(stop)]
    return "\n".join(lines) + "\n"


def fits_modelfile(stop: str) -> bool:
    """Return whether a line of a Modelfile can hold a stop text."""
    return '"' not in stop and stop.isprintable()


def ollama_template(tokenizer: Any) -> str | None:
    """Return the chat template in Ollama's language, Go's text/template; None if it does more than frame each turn.

    Each role's text before and after a content is read off a rendered chat, then compared on other chats.

    Example:
        ``{{ range .Messages }}{{ if eq .Role "user" }}<|user|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>``
    """
    contents = {"system": "SYS-TEM", "user": "US-ER", "assistant": "ANS-WER"}
    end = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[0])

    def render(*roles: str) -> str:
        messages = [{"role": role, "content": contents[role]} for role in roles]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    try:
        text = render("system", "user", "assistant", "user")
        match = re.fullmatch(f"(.*)SYS-TEM(.*)US-ER(.*)ANS-WER(.*)US-ER({re.escape(end)}\\s*)(.*)", text, re.S)
        if match is None or match[5] not in match[2] or any(word in text for word in ("{{", '"""')):
            return None
        after, prompt = match[5], match[6]
        before = {"system": match[1]}
        for role, literal in (("user", match[2]), ("assistant", match[3]), ("user", match[4])):
            if not literal.startswith(after) or before.setdefault(role, literal[len(after) :]) != literal[len(after) :]:
                return None
        chats = [("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user")]
        for roles in chats:
            if render(*roles) != "".join(before[role] + contents[role] + after for role in roles) + prompt:
                return None
    except TemplateError:
        return None
    turns = [f'if eq .Role "{role}" }}}}{literal}{{{{ .Content }}}}{after}' for role, literal in before.items()]
    return "{{ range .Messages }}{{ " + "{{ else ".join(turns) + "{{ end }}{{ end }}" + prompt


def quote(text: str) -> str:
    """Return ``text`` as a word of a POSIX shell, or of bash and zsh if characters of it must be spelt out."""
    if text.isprintable():
        return shlex.quote(text)
    codes = (c if c.isprintable() and c not in "'\\" else f"\\U{ord(c):08x}" for c in text)
    return f"$'{''.join(codes)}'"
