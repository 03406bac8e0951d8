"""The product of one row and a packed nf4 weight, in Triton's interpreter, which lacks PTX: it is interpreted here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import require_four_bit

pytest.importorskip("triton")
require_four_bit()
from bitsandbytes.functional import quantize_4bit  # noqa: E402
from test_decoder import loop_bounds  # noqa: E402, F401
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from phi3lora.kernels import few_rows  # noqa: E402
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
    for i, entry in enumerate(few_rows._TABLE):
        registers[f"${9 + i}"] = np.full_like(registers["$8"], entry % 2**32)

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
                assert names[3] == "0xEA"
                registers[target] = (values[0] & values[1]) | values[2]
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("size, blocksize", [((10, 192), 64), ((8, 1152), 128)])  # rows and words beside whole programs
def test_a_row_times_a_packed_weight_equals_the_product_with_the_dequantised_one(
    size, blocksize, nested, dtype, monkeypatch
):
    def interpreted(text, constraints, arguments, dtype, is_pure, pack):
        words = arguments[0]
        kind = tl.block_type(tl.float32, words.type.shape)
        decoded = run_ptx(few_rows._DECODE.value, words.handle.data.view(np.uint32))
        return tuple(tl.core.tensor(interpreter.TensorHandle(part, tl.float32), kind) for part in decoded)

    monkeypatch.setattr(few_rows.tl, "inline_asm_elementwise", interpreted)
    torch.manual_seed(0)
    quantised = quantize_4bit(torch.randn(size), blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    weight = few_rows.with_plain_scales(Nf4(*quantised))
    x = torch.randn(1, size[1]).to(dtype)
    A = torch.randn(5, size[1]).to(dtype)
    for adapter in (few_rows.NO_ADAPTER, replace(few_rows.NO_ADAPTER, A=A, r=5)):
        y, z = few_rows._nf4_row(x, weight, adapter)
        expected = x.float() @ weight.dequantize().float().t()
        torch.testing.assert_close(y[0].float(), expected, rtol=0.02, atol=0.05)
        if adapter:
            torch.testing.assert_close(z[0], x @ A.t(), rtol=0.02, atol=0.05)
        else:
            assert z is None


@pytest.mark.parametrize("quant_type, dtype", [("fp4", torch.bfloat16), ("nf4", torch.float32)])
def test_other_weights_and_rows_go_through_bitsandbytes_kernel(quant_type, dtype, monkeypatch):
    calls = []

    def gemv_4bit(x, packed, shape, absmax, code, blocksize):
        calls.append((list(shape), absmax.dtype, blocksize))
        return x.new_zeros(1, shape[0])

    monkeypatch.setattr(torch.ops.bitsandbytes, "gemv_4bit", gemv_4bit)  # on a CPU it takes no vector
    weight = few_rows.with_plain_scales(Nf4(*quantize_4bit(torch.randn(8, 128), blocksize=64, quant_type=quant_type)))
    assert few_rows._nf4_row(torch.randn(1, 128, dtype=dtype), weight)[0].shape == (1, 1, 8)
    assert calls == [([8, 128], torch.float32, 64)]


def test_scales_that_cross_rows_are_left_to_dequantisation():
    weight = Nf4(*quantize_4bit(torch.randn(8, 96), blocksize=64, quant_type="nf4"))
    x = torch.randn(1, 96)
    y, _ = few_rows._nf4_row(x, few_rows.with_plain_scales(weight))
    assert torch.equal(y[0], weight.matmul(x))
