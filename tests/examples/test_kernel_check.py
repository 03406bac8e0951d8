"""The look for a compiler's fault: it finds the one that was met, and none where all is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import kernel_check

WHOLE = """
        /*0010*/                   USHF.R.U32.HI UR10, URZ, 0x4, UR8 ;
        /*0020*/                   S2UR UR8, SR_CgaCtaId ;
        /*0030*/                   UIADD3 UR4, UP0, UR10, 0x20, URZ ;
        /*0040*/              @!P0 UIMAD.WIDE UR6, UR4, 0x4, URZ ;
        /*0050*/                   UMOV UR5, 0x40000040 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4].tnspB, RZ, !UPT ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR4].tnspB, R24 ;
        /*0080*/                   STS.128 [R38+UR8], R52 ;
"""
FAULTY = WHOLE.replace("UP0, UR10, 0x20", "UP0, UR12, 0x20")  # as ptxas 12.8.93 did


def test_a_register_that_nothing_writes_is_found_with_its_reader():
    assert kernel_check.read_and_never_written(WHOLE) == {}
    assert kernel_check.read_and_never_written(FAULTY) == {12: "UIADD3 UR4, UP0, UR12, 0x20, URZ"}
    without = WHOLE.replace("UMOV UR5", "UMOV UR50")
    assert list(kernel_check.read_and_never_written(without)) == [5]


def test_a_layer_s_passes_are_recorded_and_launched_again_afterwards():
    found = kernel_check.record_steps("width-64", 8)
    names = {launch.kernel.fn.__name__ for launch in found.values()}
    assert {"_norm_forward", "_norm_backward", "_rotary_forward", "_swiglu_backward", "_low_rank_gradients"} <= names
    from phi3lora.kernels import launch, norm

    assert norm.launch is launch.launch
