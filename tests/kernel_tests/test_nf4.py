"""Our kernel for nf4 weights against bitsandbytes' own: the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import require_four_bit

pytest.importorskip("triton")
require_four_bit()
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit  # noqa: E402

from phi3lora.kernels import fp8, nf4  # noqa: E402
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(64, 128), (640, 512), (200, 64)])
def test_nf4_to_fp8_is_the_weight_over_its_rows_scales(device, transposed, size):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU")
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(size, device=device) * 0.02, compress_statistics=True, quant_type="nf4")
    weight = as_documented(packed, state)
    scale = weight.abs().amax(1, keepdim=True) / 448
    exact = (weight / scale).t() if transposed else weight / scale
    found = nf4.dequantize_to_fp8(packed, state, scale, transposed, torch.float32)
    torch.testing.assert_close(found, exact.contiguous(), rtol=1e-6, atol=1e-4)
    if device == "cuda":
        found = nf4.dequantize_to_fp8(packed, state, scale, transposed).float()
        assert ((found - exact).abs() <= exact.abs() / 16 + 2**-9).all()  # half a step of e4m3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [(128, 256), (48, 80), (1, 33)])
def test_transpose_moves_every_byte(device, size):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU")
    q = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    assert torch.equal(fp8.transpose(q), q.t().contiguous())


def test_other_packings_are_left_to_bitsandbytes():
    weight = torch.randn(64, 96)
    for settings in ({"quant_type": "fp4"}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}):
        packed, state = quantize_4bit(weight, **{"compress_statistics": True, "quant_type": "nf4", **settings})
        assert not nf4.is_supported(packed, state)
        assert torch.equal(Nf4(packed, state).dequantize(), dequantize_4bit(packed, state))
    odd = torch.randn(33, 48)  # ends inside a block
    assert not nf4.is_supported(*quantize_4bit(odd, compress_statistics=True, quant_type="nf4"))
