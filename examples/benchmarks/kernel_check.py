"""Look for a compiler bug in the fused kernels: machine code that reads a register which nothing has written.

    python examples/benchmarks/kernel_check.py                        # the family's shapes, r 8, 64 and 128: an hour
    python examples/benchmarks/kernel_check.py demo --r 8             # one shape

No GPU is needed. The kernels of a decoder layer are recorded instead of launched: forward and backward, with and
without dropout, with adapters on all projections and on q and v alone. Each kernel that multiplies is then compiled for
Hopper in every block size that fits there, and disassembled with the tools that come with Triton. NOTES.md has the
results. Registers are tracked by name only, so a register that was written for another purpose is not detected.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import random_chats
from transformers import Phi3Config, Phi3ForCausalLM

import phi3lora as p3
from phi3lora.kernels.decoder import fused_decoder
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.attention import use_packed_attention
from phi3lora.model.backend import Backend, use_backend

SHAPES: dict[str, dict[str, Any]] = {
    "phi-3-mini": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "phi-3-medium": {
        "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40, "num_key_value_heads": 10,
    },
    "phi-4-mini": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "demo": {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 6, "num_key_value_heads": 6},
    **{
        f"width-{width}": {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2,
                           "num_key_value_heads": 2}
        for width in (32, 64, 128, 256)
    },
}  # fmt: skip
TARGETS: tuple[str | list[str], ...] = ("all-linear", ["q_proj", "v_proj"])
SHARED_BYTES = 232_448  # shared memory of a block on an H100
_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """A kernel launch: signature, constants and number of warps."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for two launches of the same machine code."""
        parts = (self.signature, self.constants)
        return (self.kernel.fn.__name__, self.warps, *(tuple(sorted(part.items(), key=str)) for part in parts))


@contextmanager
def recorded() -> Iterator[dict[tuple[Any, ...], Launch]]:
    """Record kernel launches in the dict instead of launching, once per kernel and block size."""
    from phi3lora.kernels import low_rank, norm, rotary, swiglu
    from phi3lora.kernels import reduce as sums

    found: dict[tuple[Any, ...], Launch] = {}

    def record(kernel: Any, blocks: Sequence[dict[str, int]], grid: Any, *arguments: Any, **constants: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants and name not in blocks[0]]
        given = dict(zip(names, arguments, strict=True))
        signature = {name: _type(value) for name, value in given.items() if value is not None}
        nothing = {name: None for name, value in given.items() if value is None}
        for block in blocks:
            options = {name: value for name, value in block.items() if name != "num_warps"}
            launch = Launch(kernel, signature, {**nothing, **constants, **options}, block["num_warps"])
            found[launch.key] = launch

    modules = (low_rank, norm, rotary, sums, swiglu)
    real = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = record  # type: ignore[attr-defined]
        yield found
    finally:
        for module, launch in zip(modules, real, strict=True):
            module.launch = launch  # type: ignore[attr-defined]


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def record_steps(shape: str, r: int) -> dict[tuple[Any, ...], Launch]:
    """Return the kernels of a layer's forward and backward."""
    config = Phi3Config(vocab_size=512, num_hidden_layers=1, pad_token_id=0, eos_token_id=1, **SHAPES[shape])
    batch = next(p3.batches(random_chats([11, 6], 512, row_tokens=32), batch_size=1))
    with recorded() as found:
        for targets in TARGETS:
            for dropout in (0.0, 0.1):
                model = Phi3ForCausalLM(config).to(torch.bfloat16)
                p3.inject_lora(model, p3.LoraConfig(r=r, lora_dropout=dropout, target_modules=targets))
                use_packed_attention(model)
                for mode in ("none", "full"):
                    with activation_checkpointing(model.train(), mode), use_backend(model, Backend("fused")):
                        fused_decoder(model, batch).float().sum().backward()
    return found


def machine_code(launch: Launch) -> str | None:
    """Return the SASS for Hopper, or None if the block does not fit there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.warps})
    if compiled.metadata.shared > SHARED_BYTES:
        return None
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(disassembler), "-c", file.name], capture_output=True, text=True, check=True).stdout


def read_and_never_written(sass: str) -> dict[int, str]:
    """Map the number of each uniform register that is read but never written to the first instruction that reads it."""
    written: set[int] = set()
    read: dict[int, str] = {}
    for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass):
        operation, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        sources = operands
        if operation.startswith(("U", "R2UR", "S2UR", "VOTEU", "REDUX")):
            for number in _uniform(operands[0]):
                count = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
                written.update(range(number, number + count))
            sources = operands[1:]
        numbers = [number for operand in sources for number in _uniform(operand)]
        if operation.startswith("HGMMA"):  # four registers describe both operands, or the last two the second
            first = _uniform(re.search(r"gdesc\[(UR\d+)\]", text)[1])[0]  # type: ignore[index]
            numbers = list(range(first if operands[1].startswith("gdesc") else first + 2, first + 4))
        for number in numbers:
            read.setdefault(number, text.strip())
    return {number: text for number, text in read.items() if number not in written}


def _uniform(operand: str) -> list[int]:
    return [int(number) for number in re.findall(r"\bUR(\d+)\b", operand)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"one or more of {', '.join(SHAPES)}"
    )
    parser.add_argument("--r", type=int, nargs="+", default=[8, 64, 128])
    options = parser.parse_args(arguments)
    launches: dict[tuple[Any, ...], Launch] = {}
    for shape in options.shapes:
        for r in options.r:
            launches.update(record_steps(shape, r))
    checked = faulty = 0
    for launch in launches.values():
        sass = machine_code(launch) if "dot(" in inspect.getsource(launch.kernel.fn) else None
        if sass is not None:
            checked += 1
            for number, text in read_and_never_written(sass).items():
                faulty += 1
                print(f"{launch.kernel.fn.__name__} {launch.constants}: UR{number} is never written: {text}")
    print(f"{checked} kernels, {faulty} reads of a register that nothing writes")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
