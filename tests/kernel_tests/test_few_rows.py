"""The product of one row and a packed nf4 weight, in Triton's interpreter, which lacks PTX: it is interpreted here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import require_four_bit

pytest.importorskip("triton")
require_four_bit()
from bitsandbytes.functional import quantize_4bit  # noqa: E402
from test_decoder import loop_bounds  # noqa: E402, F401
from triton.runtime import interpreter  # noqa: E402

from phi3lora.kernels import few_rows, nf4  # noqa: E402
from phi3lora.lora.weight_formats import Nf4  # noqa: E402


def prmt(a, b, selectors):
    """Pick four bytes of the eight in b:a; a selector's top bit asks for the sign of its byte instead."""
    pool = np.stack([(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)])
    result = np.zeros_like(selectors)
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pool, (selector & np.uint32(7))[None].astype(np.int64), 0)[0]
        byte = np.where(selector & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def run_ptx(text, words):
    """Return the eight outputs of the decoding instructions for an array of words."""
    registers, outputs = {"$8": words.astype(np.uint32)}, {}

    def value(name):
        known = registers.get(name)
        return np.full_like(registers["$8"], int(name, 0)) if known is None else known

    for line in text[text.index("e, f;") + 5 : -1].split(";"):
        operation, _, rest = line.strip().partition(" ")
        if operation == "mov.b32":
            halves = value(rest.rpartition(",")[2].strip())
            registers["e"], registers["f"] = halves & np.uint32(0xFFFF), halves >> np.uint32(16)
        elif operation:
            target, *names = (name.strip() for name in rest.split(","))
            values = [value(name) for name in names]
            if operation == "cvt.f32.f16":
                outputs[int(target[1:])] = values[0].astype(np.uint16).view(np.float16).astype(np.float32)
            elif operation == "lop3.b32":
                assert names[3] == "0xCA"  # the second where the first has a one, else the third
                registers[target] = (values[0] & values[1]) | (~values[0] & values[2])
            else:
                known = {"and.b32": np.bitwise_and, "shr.u32": np.right_shift, "prmt.b32": prmt}
                registers[target] = known[operation](*values)
    return [outputs[i] for i in range(8)]


def test_the_instructions_give_the_table_s_values_in_the_order_of_columns():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    code = np.array(few_rows._NF4_CODE, dtype=np.float16)
    decoded = run_ptx(few_rows._DECODE.value, words)
    for column in range(8):
        nibble = (words >> np.uint32(8 * (column // 2) + (4 if column % 2 == 0 else 0))) & np.uint32(15)
        assert np.array_equal(decoded[column], code[nibble].astype(np.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU; test_decoding.py tests it there")
@pytest.mark.parametrize("size", [(40, 192), (16, 1088)])
def test_a_row_times_a_packed_weight_equals_the_product_with_the_dequantised_one(size, monkeypatch):
    def interpreted(text, constraints, arguments, dtype, is_pure, pack):
        wrap = interpreter.TensorHandle
        from triton import language as tl

        decoded = run_ptx(few_rows._DECODE.value, arguments[0].handle.data.view(np.uint32))
        shape = arguments[0].type.shape
        return tuple(tl.core.tensor(wrap(part, tl.float32), tl.block_type(tl.float32, shape)) for part in decoded)

    monkeypatch.setattr(few_rows.tl, "inline_asm_elementwise", interpreted)
    torch.manual_seed(0)
    weight = Nf4(*quantize_4bit(torch.randn(size), blocksize=64, quant_type="nf4", compress_statistics=True))
    assert nf4.is_supported(weight.packed, weight.state)
    x = torch.randn(1, size[1]).bfloat16()
    expected = x.float() @ weight.dequantize().float().t()
    monkeypatch.setattr(few_rows, "NF4_BLOCKS", [{"BN": 8, "WORDS": 16, "num_warps": 4}])
    y = few_rows._nf4_row(x, weight)
    torch.testing.assert_close(y[0].float(), expected, rtol=0.02, atol=0.05)
