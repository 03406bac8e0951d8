"""What an exported adapter is and the commands that use it, in PEFT, vLLM, llama.cpp and Ollama."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (vllm/config/lora.py)."""


@dataclass(frozen=True)
class PeftExport:
    """What :func:`export_peft` wrote; ``print`` shows it with the commands to use it."""

    path: Path
    layout: str
    rank: int
    """The largest rank in the folder: ``r``, and what a server must allow."""
    modules: tuple[str, ...]
    """Paths of the adapted modules, as the folder names them."""
    rounded: tuple[str, ...] = ()
    """Modules whose B was rounded (to 1 part in 2^24) because their scaling differs from the others'."""
    notes: tuple[str, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)
    """Tool -> the lines that use the adapter with it."""

    def __str__(self) -> str:
        """A few lines of facts, then each tool's commands."""
        lines = [f"PEFT adapter in {self.path}: {len(self.modules)} modules, layout {self.layout!r}, rank {self.rank}"]
        if self.rounded:
            lines.append(
                f"note: {len(self.rounded)} modules ({self.rounded[0]}, ...) have another scaling than the rest, by a "
                f"ratio that is no power of two: it went into their B, which rounds its last bit. "
                f"layout='pattern' keeps every bit"
            )
        lines += [f"note: {note}" for note in self.notes]
        for tool, text in self.commands.items():
            lines += ["", f"# {tool}", text]
        return "\n".join(lines)


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that holds ``rank``; None: there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def commands(path: Path, base: str | None, layout: str, rank: int, stops: Sequence[str]) -> dict[str, str]:
    """Tool -> lines; ``stops`` are the texts at which an answer ends. A tool that would be wrong is left out."""
    model = base or ("LLAMA_STYLE_BASE" if layout == "split" else "BASE_MODEL")
    lines = {"PEFT": _peft(model, path)}
    if layout == "pattern":
        return lines  # vLLM and llama.cpp know one alpha / r for all modules
    allowed = max_lora_rank(rank)
    if allowed is not None:
        lines["vLLM"] = (
            f"vllm serve {_quoted(model)} --enable-lora --lora-modules {_quoted(f'{_name(path)}={path}')} "
            f"--max-lora-rank {allowed}" + (f" --generation-config {_quoted(str(path))}" if stops else "")
        )
    gguf = _quoted(str(path / "adapter.gguf"))
    config = f"--base {_quoted(model)}" if os.path.isdir(model) else f"--base-model-id {_quoted(model)}"
    lines["llama.cpp"] = (
        f"python convert_lora_to_gguf.py {config} --outfile {gguf} {_quoted(str(path))}\n"
        f"llama-cli -m base.gguf --lora {gguf}  # base.gguf: convert_hf_to_gguf.py of the base"
    )
    modelfile = [
        "FROM ./base.gguf",
        f"ADAPTER {path / 'adapter.gguf'}",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    lines["Ollama"] = "\n".join(
        ["cat > Modelfile <<'END'", *modelfile, "END", f"ollama create {_quoted(_name(path))} -f Modelfile"]
    )
    return lines


def _peft(model: str, path: Path) -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), {path.as_posix()!r})"
    )


def _name(path: Path) -> str:
    """What a server calls the adapter."""
    return path.resolve().name or "adapter"


def _quoted(text: str) -> str:
    return shlex.quote(text)
