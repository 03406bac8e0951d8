"""Our kernel for nf4 weights against bitsandbytes' own: the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import require_four_bit

pytest.importorskip("triton")
require_four_bit()
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit  # noqa: E402

from phi3lora.kernels import nf4  # noqa: E402
from phi3lora.lora.base_weight import Nf4  # noqa: E402

ON_THE_CPU = [("cpu", torch.float16), ("cpu", torch.float32)]  # Triton's interpreter cuts bf16 off, it does not round
ON_A_GPU = [("cuda", torch.bfloat16), ("cuda", torch.float16), ("cuda", torch.float32)]
CASES = [
    pytest.param(*case, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU"))
    for case in ON_THE_CPU
] + [pytest.param(*case, marks=pytest.mark.gpu) for case in ON_A_GPU]
SIZES = [(64, 96), (3072, 256), (33, 64), (640, 512)]  # one block of scales and several, with a rest


def as_documented(packed, state) -> torch.Tensor:
    """By bitsandbytes' table and scales; its kernel for AVX-512 (0.50.2) errs where rows end inside a block of 64."""
    scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).repeat_interleave(state.blocksize)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    return (state.code[codes.long()] * scales).view(state.shape).to(state.dtype)


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_numbers_as_bitsandbytes(device, dtype, size):
    torch.manual_seed(0)
    weight = torch.randn(size, dtype=dtype, device=device) * 0.02
    weight[0, :64] = 0  # a block without a scale
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert nf4.is_supported(packed, state)
    found = nf4.dequantize(packed, state)
    assert found.dtype == dtype and torch.equal(found, as_documented(packed, state))
    if size[1] % state.blocksize == 0 or device == "cuda":
        assert torch.equal(found, dequantize_4bit(packed, state))


def test_other_packings_are_left_to_bitsandbytes():
    weight = torch.randn(64, 96)
    for settings in ({"quant_type": "fp4"}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}):
        packed, state = quantize_4bit(weight, **{"compress_statistics": True, "quant_type": "nf4", **settings})
        assert not nf4.is_supported(packed, state)
        assert torch.equal(Nf4(packed, state).dequantize(), dequantize_4bit(packed, state))
    odd = torch.randn(33, 48)  # ends inside a block
    assert not nf4.is_supported(*quantize_4bit(odd, compress_statistics=True, quant_type="nf4"))
