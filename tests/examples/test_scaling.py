"""The cost model: bytes of the library's own model, gathers of a real step, predictions near the measurements."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from processes import in_processes

import phi3lora as p3
from phi3lora.model import sharding
from phi3lora.model.activations import activation_checkpointing

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def sizes(script):
    return {shape: script["bytes_of"](shape) for shape in ("phi-3-mini", "phi-4")}


def test_bytes_are_those_of_the_adapters_and_of_the_layers(sizes):
    assert sizes["phi-3-mini"].gradients == 4 * 29_884_416
    whole = 5120 * (5120 + 2 * 1280) + 5120 * 5120 + 3 * 5120 * 17920
    assert sizes["phi-4"].layer["bf16"] == 2 * whole
    assert sizes["phi-4"].layer["nf4"] == pytest.approx(whole / 2, rel=0.05)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_step_gathers_as_often_as_the_model_says(script, mode):
    def gathered() -> tuple[int, int]:
        model, _, chats, _ = p3.demo.load()
        p3.inject_lora(model)
        layers = len(model.model.layers)
        sharding.join_processes(next(model.parameters()).device)
        batch = next(p3.batches(chats, batch_size=1))
        calls, gather = [], sharding._all_gather
        sharding._all_gather = lambda *args, **options: calls.append(1) or gather(*args, **options)
        sharding.shard(model)
        with activation_checkpointing(model, mode):
            for _ in range(2):
                calls.clear()  # the first forward also gathers the first two layers
                p3.causal_lm_loss(model, batch)[0].backward()
        return layers, len(calls)

    for layers, calls in in_processes(2, gathered):
        assert calls == script["gathers"](layers) > 0


def test_predictions_are_near_what_gpus_did(script, sizes):
    for run in script["RUNS"]:
        predicted = script["tokens_per_s"](run, sizes[run.shape], run.gpus)
        assert predicted == pytest.approx(run.together, rel=0.03), run


def test_more_gpus_are_faster_in_all_and_slower_each(script, sizes):
    for run in script["RUNS"]:
        speeds = [script["tokens_per_s"](run, sizes[run.shape], n, 50e9) for n in script["GPUS"]]
        assert speeds == sorted(speeds) and speeds[0] == pytest.approx(run.one_gpu)
        each = [speed / n for speed, n in zip(speeds, script["GPUS"], strict=True)]
        assert each == sorted(each, reverse=True)


def test_it_prints_assumptions_predictions_and_measurements(script, capsys):
    script["main"](["--network-gbits", "100"])
    text = capsys.readouterr().out
    assert "H100 80GB HBM3" in text and "100 Gbit/s" in text and "119.5" in text
    for gpus in script["GPUS"]:
        assert f"{gpus}" in text
    assert "61,869" in text and "13,532" in text
