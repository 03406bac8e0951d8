"""Several processes take the steps of one, whatever their number; and what ends them, ends them together."""

from __future__ import annotations

import json
import os
import re
import signal
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    LIMIT_S,
    adapted_model,
    adapters_of,
    chat_dataset,
    make_tokenizer,
    quiet_config,
    randomize_adapters,
    same_tensors,
    token_documents,
)
from processes import in_processes, torchrun

import phi3lora as p3
from phi3lora.adapters.adapter_file import read_adapter
from phi3lora.data.batches import BatchPlan, StepSchedule
from phi3lora.model import load as load_module
from phi3lora.model.sharding import shard
from phi3lora.processes import join
from phi3lora.training import distributed
from phi3lora.training import step as step_module
from phi3lora.training.distributed import GradientSum, World
from phi3lora.training.loop import Callback

DATA, HELD_OUT = chat_dataset(23), chat_dataset(9)
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 4096)  # several of the tiny model's


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class After(Callback):
    """Calls ``act(state)`` after a step, on one rank or (None) on each."""

    def __init__(self, step: int, act, on_rank: int | None = None) -> None:
        self.step, self.act, self.on_rank = step, act, on_rank

    def on_step_end(self, state) -> None:
        if state.global_step == self.step and self.on_rank in (None, rank()):
            self.act(state)


def stop(state) -> None:
    state.should_stop = True


def run(folder, callback=None, *, data=DATA, eval_dataset=None, dropout=0.0, device="cpu", **settings):
    """Train in this process, from adapters of its own; return them and the result."""
    model = adapted_model(lora_dropout=dropout)
    randomize_adapters(model, seed=rank())
    model.to(device)
    sizes = {"max_steps": 20, "per_device_train_batch_size": 1}
    config = quiet_config(folder, **{**sizes, **settings})
    callbacks = [] if callback is None else [callback]
    result = p3.train(model, data, config, eval_dataset=eval_dataset, callbacks=callbacks)
    return adapters_of(model), result


def difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_close(found, expected):
    """Compare two histories; the speeds may differ."""
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"tokens_per_s"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (name, line, other)


# --- The same steps


def test_the_same_global_batch_gives_the_same_adapters_and_metrics(tmp_path, capfd):
    """A step has 4 micro-batches, the last of an epoch 3: with 4 processes one of them then has none."""
    assert len(StepSchedule(BatchPlan(DATA, 1, 64), quiet_config("unused"), DATA).steps_of_epoch(0)) % 4 == 3
    settings = {"eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 2}
    expected, alone = run(tmp_path / "1", gradient_accumulation_steps=4, **settings)
    capfd.readouterr()
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        settings.update(gradient_accumulation_steps=4 // processes, log_level="passive")
        found = in_processes(processes, lambda: run(folder, **settings))  # noqa: B023
        for adapters, result in found:
            assert difference(adapters, expected) < 1e-6
            assert same_tensors(adapters, found[0][0])
            assert result == found[0][1]
            assert_close(result.history, alone.history)
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert written == found[0][1].history
        banner = capfd.readouterr().out
        assert banner.count("trainable in") == 1
        assert f"1 x {4 // processes} rows in each of {processes} processes" in banner


@pytest.mark.slow
def test_eight_processes_take_the_steps_of_one(tmp_path):
    """The last step of an epoch has fewer micro-batches than there are processes."""
    settings = {"eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    steps = StepSchedule(BatchPlan(DATA, 1, 64), quiet_config("unused", gradient_accumulation_steps=8), DATA)
    assert len(steps.steps_of_epoch(0)[-1]) % 8
    expected, alone = run(tmp_path / "1", gradient_accumulation_steps=8, **settings)
    found = in_processes(8, lambda: run(tmp_path / "8", **settings), limit_s=250)
    for adapters, result in found:
        assert difference(adapters, expected) < 1e-6
        assert same_tensors(adapters, found[0][0])
        assert_close(result.history, alone.history)


def test_a_run_goes_from_2_processes_to_4_and_to_1(tmp_path):
    def part(step: int | None, accumulation: int, **more):
        callback = None if step is None else After(step, stop)
        return run(tmp_path / "run", callback, save_strategy="steps", gradient_accumulation_steps=accumulation, **more)

    expected, alone = run(tmp_path / "uncut", gradient_accumulation_steps=4)
    in_processes(2, part, 7, 2)
    assert {path.name for path in (tmp_path / "run" / "checkpoint-7").glob("rng*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    refused = r"gradient_accumulation_steps 2 in each of 2 processes then, 2 in each of 1 processes now"
    with pytest.raises(p3.CheckpointError, match=refused):
        part(None, 2, resume_from_checkpoint=True)
    in_processes(4, lambda: part(14, 1, resume_from_checkpoint=True))
    adapters, result = part(None, 4, resume_from_checkpoint=True)
    assert difference(adapters, expected) < 1e-6
    assert_close(result.history, alone.history)


def test_dropout_differs_by_rank_and_a_signal_to_one_stops_both_at_a_step_that_resumes_bit_for_bit(tmp_path):
    def work():
        settings = {"dropout": 0.3, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
        uncut = run(tmp_path / "uncut", **settings)
        kill = After(7, lambda state: os.kill(os.getpid(), signal.SIGTERM), on_rank=1)
        cut = run(tmp_path / "cut", kill, **settings)
        resumed = run(tmp_path / "cut", **settings, resume_from_checkpoint=True)
        return uncut, cut, resumed, torch.get_rng_state(), dist.is_initialized()

    first, second = in_processes(2, work)
    for uncut, cut, resumed, _, is_joined in (first, second):
        assert (cut[1].interrupted_by, cut[1].global_step) == (signal.SIGTERM, 7)
        assert same_tensors(resumed[0], uncut[0])
        assert_close(resumed[1].history, uncut[1].history)
        assert not is_joined
    assert same_tensors(first[0][0], second[0][0])
    assert not torch.equal(first[3], second[3])


def test_a_stream_and_a_longrope_model_are_shared_too(tmp_path):
    from test_streams import stream

    settings = {"data": stream(), "max_steps": 6, "learning_rate": 1e-3}
    expected, _ = run(tmp_path / "1", gradient_accumulation_steps=4, **settings)
    for adapters, _ in in_processes(2, lambda: run(tmp_path / "2", gradient_accumulation_steps=2, **settings)):
        assert difference(adapters, expected) < 1e-6


def test_the_best_model_is_loaded_and_early_stopping_ends_on_every_rank(tmp_path):
    def work():
        return run(
            tmp_path / "run", eval_dataset=HELD_OUT, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            early_stopping_patience=2, learning_rate=0.3, lr_scheduler_type="linear", save_strategy="steps",
        )  # fmt: skip

    (first, result), (second, other) = in_processes(2, work)
    assert result == other and result.global_step < 20 and result.best_checkpoint is not None
    saved, _ = read_adapter(Path(result.best_checkpoint) / "lora.safetensors")
    assert same_tensors(first, {name: saved[name] for name in first}) and same_tensors(second, first)


@pytest.mark.parametrize("settings", [{"lora_plus_lr_ratio": 4.0, "optim": "adamw_torch"}, {"fp16": True}], ids=str)
def test_parameter_groups_and_the_gradient_scaler_are_shared_too(tmp_path, settings):
    settings = {"max_steps": 4, "learning_rate": 1e-2, **settings}
    expected, _ = run(tmp_path / "1", gradient_accumulation_steps=4, **settings)
    (first, _), (second, _) = in_processes(2, lambda: run(tmp_path / "2", gradient_accumulation_steps=2, **settings))
    assert same_tensors(first, second)
    assert difference(first, expected) < (1e-3 if "fp16" in settings else 1e-6)


def test_a_loss_that_is_infinite_on_one_rank_skips_the_step_on_all(tmp_path):
    def work():
        calls, original = [], step_module.causal_lm_loss

        def loss(model, batch):
            calls.append(1)
            total, count = original(model, batch)
            return (total * float("inf") if len(calls) == 3 and rank() == 1 else total), count

        step_module.causal_lm_loss = loss
        return run(tmp_path / "run", max_steps=6, logging_steps=1)

    (first, result), (second, other) = in_processes(2, work)
    assert same_tensors(first, second) and result == other
    assert [line.get("skipped_steps", 0) for line in result.history if "grad_norm" in line] == [0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(values).all() for values in first.values())


# --- The sum of the gradients


class Chain(torch.nn.Module):
    """Layers that compute in an order of their own, some of them in a recomputed block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6))

    def forward(self, x, order):
        for i in order:
            x = torch.tanh(self.layers[i](x))
        return x.sum()


def gradients_of(model, orders, seed):
    """Return the loss and gradients of one backward an order: without ``GradientSum``."""
    model.zero_grad()
    total = torch.zeros(())
    for n, order in enumerate(orders):
        loss = model(torch.randn(3, 16, generator=torch.Generator().manual_seed(10 * seed + n)), order)
        loss.backward()
        total += loss.detach()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


ORDERS = [
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],  # rank 0: two micro-batches
    [[5, 3, 1, 0, 2, 4]],  # rank 1: gradients in another order
    [],  # rank 2: no micro-batch
    [[0, 1, 2, 3, 4, 5], [0, 1, 3, 5]],  # rank 3: layers 2 and 4 have none in the last backward
]


def test_gradients_are_summed_in_whatever_order_they_come(monkeypatch):
    torch.manual_seed(0)
    model = Chain()
    alone = [gradients_of(model, orders, seed) for seed, orders in enumerate(ORDERS)]
    expected = [sum(parts) for parts in zip(*(gradients for _, gradients in alone), strict=True)]

    def work():
        with distributed.joined(torch.device("cpu")) as world:
            parameters = list(model.parameters())
            sums = GradientSum(parameters, world)
            found, in_backward = [], 0
            with sums.overlapped():
                for _ in range(2):
                    model.zero_grad()
                    orders, total = ORDERS[rank()], torch.zeros(())
                    for n, order in enumerate(orders):
                        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(10 * rank() + n))
                        loss = model(x, order)
                        if n + 1 == len(orders):
                            sums.expect()
                        loss.backward()
                        in_backward += len(sums._sent) * (n + 1 < len(orders))
                        total += loss.detach()
                    early = len(sums._sent)
                    found.append((sums.finish(total), [p.grad.clone() for p in parameters]))
            hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in parameters)
            return found, early, in_backward, len(sums._buckets), hooks

    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 1024)  # a bucket a layer
    results = in_processes(4, work)
    assert [early for _, early, *_ in results] == [5, 5, 0, 1]  # the last bucket goes with the loss
    assert {(before, hooks) for _, _, before, _, hooks in results} == {(0, 0)}
    for found, _, _, buckets, _ in results:
        assert buckets == 6
        for (total, gradients), (_, first) in zip(found, results[0][0], strict=True):
            assert total.item() == pytest.approx(sum(loss.item() for loss, _ in alone), abs=1e-5)
            for gradient, same, right in zip(gradients, first, expected, strict=True):
                assert torch.equal(gradient, same)
                torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6)


def test_no_host_waits_for_its_device_before_all_have_begun_the_sums(monkeypatch):
    events = []

    class Noted(World):
        def begin_sum_(self, tensor):
            events.append("begin")

        def meet(self):
            events.append("meet")

        def wait(self, sums):
            events.append("wait")

    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 1024)
    GradientSum(list(Chain().parameters()), Noted(0, 2)).finish(torch.zeros(()))
    assert events == ["begin"] * 6 + ["meet", "wait"]


def test_over_a_fast_link_all_is_summed_after_the_backward(monkeypatch):
    """A link is as fast as its slowest rank: all sum in one way, though their own times differ."""

    def work(fast_sum):
        monkeypatch.setattr(distributed, "_BUCKET_BYTES", 1024)
        monkeypatch.setattr(distributed, "_FAST_SUM", fast_sum)
        with distributed.joined(torch.device("cpu")) as world:
            model = Chain()
            model.layers[2].bfloat16()
            parameters = list(model.parameters())
            sums = GradientSum(parameters, world)
            with sums.overlapped():
                hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in parameters)
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, 1.0 + world.rank)
                sums.expect()
                begun = [part.numel() for part in sums._parts]
                total = sums.finish(torch.tensor(0.5)).item()
            assert all(p.grad.dtype == p.dtype for p in parameters)
            return begun, hooks, total, {v for p in parameters for v in p.grad.unique().tolist()}, sums.summary

    (fast, same), (slow, _) = in_processes(2, work, 1.0), in_processes(2, work, float("inf"))
    assert fast == same
    assert fast[:4] == ([6 * (16 * 16 + 16) + 1], 0, 1.0, {3.0}) and "after the backward" in fast[4]
    assert slow[:4] == ([272] * 5 + [273], 10, 1.0, {3.0}) and "during the backward" in slow[4]


def test_the_speed_of_a_sum_is_that_of_the_slowest_rank_and_of_the_best_trial(monkeypatch):
    def work():
        with distributed.joined(torch.device("cpu")) as world:
            clock = iter([0, 9, 10, 10.5 + rank(), 20, 29, 30, 39])
            monkeypatch.setattr(distributed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
            return world.sum_speed(torch.zeros(30))

    assert in_processes(2, work) == [80.0, 80.0]  # 120 bytes in 1.5 s


def test_a_gradient_that_comes_twice_in_a_backward_is_refused(monkeypatch):
    """A reentrant recomputation runs a backward of its own: once for each layer that shares the parameters."""
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 4)  # what is sent in the backward cannot change afterwards

    def work():
        with distributed.joined(torch.device("cpu")) as world:
            layer = torch.nn.Linear(4, 4)
            sums = GradientSum(list(layer.parameters()), world)
            with sums.overlapped():
                x = torch.ones(1, 4, requires_grad=True)
                y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
                sums.expect()
                with pytest.raises(p3.TrainingError, match="a gradient came twice in one backward"):
                    y.sum().backward()
            return True

    assert in_processes(2, work) == [True, True]


# --- The plan


@pytest.mark.parametrize("boundary", [None, 20])
@pytest.mark.parametrize("packing", [True, False])
def test_every_document_is_trained_once_an_epoch_by_any_number_of_processes(packing, boundary):
    data = token_documents(np.random.default_rng(0).integers(4, 40, 101).tolist(), max_length=48)
    plan = BatchPlan(data, 2, 48, packing, boundary=boundary)
    for processes in (1, 2, 3, 8):
        config = quiet_config("unused", gradient_accumulation_steps=24 // processes, num_train_epochs=2)
        schedules = [StepSchedule(plan, config, data, process=i, processes=processes) for i in range(processes)]
        alone = list(
            StepSchedule(plan, quiet_config("unused", gradient_accumulation_steps=24, num_train_epochs=2), data).steps()
        )
        steps = list(zip(*(schedule.steps() for schedule in schedules), strict=True))
        assert len(steps) == len(alone)
        for shares, step in zip(steps, alone, strict=True):
            assert {share.tokens for share in shares} == {step.tokens}
            assert {share.supervised_tokens for share in shares} == {step.supervised_tokens}
            batches = [plan.tensors(micro) for micro in step.micro_batches]
            assert step.supervised_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
            rows = [row for share in shares for micro in share.share for row in micro]
            assert sorted(rows) == sorted(row for micro in step.micro_batches for row in micro)
            assert max(len(s.share) for s in shares) - min(len(s.share) for s in shares) <= 1
            if boundary is not None:
                for share in shares:
                    for micro in share.share:
                        assert len({bool(data.lengths[row[0]] > boundary) for row in micro}) == 1
        of_epoch = [row for shares in steps for s in shares if s.epoch_progress <= 1 for m in s.share for row in m]
        assert sorted(i for row in of_epoch for i in row) == list(range(101))


def test_a_step_is_dealt_so_that_no_process_waits_long_for_another():
    lengths = np.random.default_rng(1).integers(50, 2000, 256)
    data = token_documents(lengths.tolist(), max_length=2048)
    plan = BatchPlan(data, 4, 2048, packing=False)
    micro_batches = plan.micro_batches(0)[:32]
    work = [sum(int(lengths[i]) for micro in share for (i,) in micro) for share in plan.dealt(micro_batches, 8)]
    in_order = [sum(int(lengths[i]) for micro in micro_batches[p::8] for (i,) in micro) for p in range(8)]
    assert max(work) < 1.02 * np.mean(work) < max(in_order)
    assert plan.dealt(micro_batches, 1) == [micro_batches]


# --- One process


def test_one_process_of_torchrun_joins_nothing_and_copies_no_gradient(tmp_path, monkeypatch):
    expected, _ = run(tmp_path / "plain", max_steps=2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("a collective"))
    monkeypatch.setattr(GradientSum, "_send", lambda *_: pytest.fail("a copy"))
    joined = []
    adapters, _ = run(tmp_path / "torchrun", After(1, lambda state: joined.append(dist.is_initialized())), max_steps=2)
    assert same_tensors(adapters, expected) and joined == [False]


def test_a_world_size_without_the_rest_of_torchrun_s_variables_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(p3.TrainingError, match=r"WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT .* torchrun"):
        World.current()
    for size in ("1", "0", "", "two"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert World.current().size == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "2"), ("RANK", "-1"), ("RANK", "one"), ("MASTER_PORT", "port"), ("MASTER_PORT", "65536")],
)
def test_a_wrong_variable_of_torchrun_s_is_an_error_and_not_a_wait(monkeypatch, name, value):
    right = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65535"}
    for given in right.items():
        monkeypatch.setenv(*given)
    assert World.current().rank == 1
    monkeypatch.setenv(name, value)
    with pytest.raises(p3.TrainingError, match=f"{name}='{value}', but WORLD_SIZE=2; allowed: 0 to"):
        World.current()


def test_load_model_takes_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert load_module._own_gpu() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert load_module._own_gpu() == "cuda:3" and chosen == [3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(p3.ModelError, match=r"LOCAL_RANK=4, but there are 4 GPUs.*--nproc-per-node 4"):
        load_module._own_gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # CUDA_VISIBLE_DEVICES shows each process its own
    assert load_module._own_gpu() == "cuda"


# --- Errors


def run_out_of_memory(state) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_full_gpu_on_one_rank_ends_all_and_leaves_the_last_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    full = After(3, run_out_of_memory, on_rank=1)
    other, error = in_processes(2, lambda: run(tmp_path, full, **settings), errors=True)
    assert str(error).startswith("rank 1 of 2: CUDA out of memory. Tried to allocate 2.00 GiB. Predicted peak by mode")
    assert isinstance(other, p3.TrainingError) and "rank 0 of 2 lost contact" in str(other)
    adapters, result = run(tmp_path, resume_from_checkpoint="auto", **settings | {"gradient_accumulation_steps": 4})
    expected, _ = run(tmp_path / "uncut", gradient_accumulation_steps=4)
    assert result.global_step == 20 and difference(adapters, expected) < 1e-6


def test_processes_that_differ_or_come_apart_or_end_are_errors_of_all(tmp_path):
    def failure(folder, *arguments, **settings):
        try:
            run(tmp_path / folder, *arguments, gradient_accumulation_steps=2, **settings)
        except (p3.Phi3LoRAError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"

    def work():
        data = failure("data", data=DATA if rank() == 0 else chat_dataset(24))
        setting = failure("setting", save_steps=5 + rank())

        def nudge(state) -> None:
            next(p for p in models[0].parameters() if p.requires_grad).data.add_(1e-3)

        models = []
        original = p3.training.loop.OptimizerStep

        class Remember(original):
            def __init__(self, model, *rest) -> None:
                models.append(model)
                super().__init__(model, *rest)

        p3.training.loop.OptimizerStep = Remember
        apart = failure("apart", After(3, nudge, on_rank=1), save_strategy="steps", save_steps=4)
        kept = sorted(path.name for path in (tmp_path / "apart").glob("checkpoint-*"))
        ended = failure("ended", After(3, lambda state: 1 / 0, on_rank=1), save_strategy="steps", save_steps=2)
        return data, setting, apart, kept, ended

    first, second = in_processes(2, work)
    assert first[:4] == second[:4]
    data, setting, apart, kept, ended = first
    assert data.startswith("TrainingError: the processes do not train the same run: documents of the data of rank 0 is")
    assert "save_steps of rank 0 is 5, of rank 1 6 (1 of 2 ranks differ: 1)" in setting
    assert "the adapters are no longer the same at step 4: SHA-256 of the adapters of rank 0" in apart
    assert kept == []
    assert ended.startswith("TrainingError: rank 0 of 2 lost contact with the other processes at step")
    assert "resume_from_checkpoint='auto'" in ended
    assert "; rank 1 ended with ZeroDivisionError: division by zero. torchrun" in ended
    assert second[4].startswith("ZeroDivisionError")
    assert (tmp_path / "ended" / "checkpoint-2").is_dir()


def test_one_rank_s_refusal_ends_all_at_once(tmp_path):
    """No rank waits for one that has refused its arguments."""

    def work():
        settings = {"eval_dataset": HELD_OUT if rank() == 0 else None, "eval_strategy": "epoch"}
        return run(tmp_path / "run", max_steps=1, **settings)

    other, refused = in_processes(2, work, errors=True, limit_s=LIMIT_S)
    assert str(refused) == "eval_strategy='epoch' needs an eval_dataset"
    assert isinstance(other, p3.TrainingError)
    assert str(other) == f"rank 1 of 2 ends at step 0, and so do all: {refused}"


@pytest.mark.parametrize(
    ("fact", "values"),
    [
        ("lora_alpha", "'lora_alpha': 8.*'lora_alpha': 16"),
        ("lora_dropout", "'lora_dropout': 0.0.*'lora_dropout': 0.5"),
        ("target_modules", r"'enable_lora': \[True, True, False\].*'enable_lora': \[True, False, True\]"),
    ],
)
def test_adapters_of_one_shape_that_compute_differently_are_refused(tmp_path, fact, values):
    other = {"lora_alpha": (8, 16), "lora_dropout": (0.0, 0.5),
             "target_modules": (["q_proj", "k_proj"], ["q_proj", "v_proj"])}  # fmt: skip

    def work():
        return p3.train(adapted_model(**{fact: other[fact][rank()]}), DATA, quiet_config(tmp_path, max_steps=1))

    for error in in_processes(2, work, errors=True):
        assert isinstance(error, p3.TrainingError)
        assert re.search(f"not train the same run: the adapter of model.layers.0.* of rank 0 is.*{values}", str(error))


@pytest.mark.parametrize("stream_rank", [0, 1])
def test_a_stream_beside_documents_is_refused(tmp_path, stream_rank):
    """A stream needs one group more, for which the others would be waited for."""
    from test_streams import stream

    data = {stream_rank: stream(), 1 - stream_rank: DATA}
    for error in in_processes(2, lambda: run(tmp_path, max_steps=1, data=data[rank()]), errors=True, limit_s=LIMIT_S):
        assert "not train the same run: train_dataset of rank 0 is" in str(error)


def test_a_split_base_beside_a_whole_one_is_refused(tmp_path):
    """It would be gathered from a rank that does not take part."""

    def work():
        model = adapted_model()
        join(torch.device("cpu"))
        if rank() == 0:
            shard(model)
        return p3.train(model, DATA, quiet_config(tmp_path, max_steps=1))

    for error in in_processes(2, work, errors=True, limit_s=LIMIT_S):
        assert "not train the same run: the base of rank 0 is 'split', of rank 1 'whole'" in str(error)


def test_a_group_that_cannot_send_the_device_s_tensors_is_refused():
    def work():
        dist.init_process_group("cpu:gloo")
        with distributed.joined(torch.device("meta")):
            pass

    for error in in_processes(2, work, errors=True):
        assert isinstance(error, p3.TrainingError)
        assert "the backend 'cpu:gloo', which sends no tensors of meta; allowed: " in str(error)


@pytest.mark.parametrize("what", ["eval_dataset", "compute_metrics"])
def test_processes_that_would_evaluate_differently_are_refused(tmp_path, what):
    """One that lets the model answer and one that does not would wait for each other; other data would be mixed."""

    def work():
        config = quiet_config(tmp_path, max_steps=1, eval_on_start=True)
        given = {"eval_dataset": HELD_OUT, "compute_metrics": len, "tokenizer": make_tokenizer()}
        if rank() == 1:
            given[what] = {"eval_dataset": chat_dataset(5), "compute_metrics": None}[what]
        return p3.train(adapted_model(), DATA, config, **given)

    for error in in_processes(2, work, errors=True):
        assert isinstance(error, p3.TrainingError)
        assert f"the processes do not train the same run: {what} of rank 0 is" in str(error)


def test_a_rank_that_hangs_is_named_with_the_step_by_those_that_wait(tmp_path, monkeypatch):
    """They wait for it, and then for each other's notes, a part of the device's time-out, which is NCCL's on GPUs."""
    assert distributed._HOST_SHARE + distributed._ROLL_CALL_SHARE < 1
    monkeypatch.setattr(distributed, "_HOST_SHARE", 0.2)

    def work():
        dist.init_process_group("gloo", timeout=timedelta(seconds=25))
        return run(tmp_path / "run", After(3, lambda state: signal.pause(), on_rank=1), max_steps=9)

    errors = in_processes(3, work, errors=True, ranks=(0, 2))
    for number, error in zip((0, 2), errors, strict=True):
        assert isinstance(error, p3.TrainingError)
        assert str(error).startswith(f"rank {number} of 3 lost contact with the other processes at step 3: ")
        assert "; nothing was heard from rank 1, which hangs or was killed. torchrun --max-restarts" in str(error)


def limit_s(device: str) -> float:
    """Return how long a process may live: on a GPU, some 30 s until its first step, and 20 s for a time-out."""
    return 110 if device == "cuda" else 300


@pytest.mark.slow
def test_a_process_that_hangs_under_torchrun_says_where(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from processes import say\nimport signal\nsignal.pause()\n")
    with pytest.raises(AssertionError, match=r'(?s)rank 0: begins.*Timeout \(.*script\.py", line 3'):
        torchrun(1, script, limit_s=1)


KILLED = """
from processes import say
import os, signal
import torch
from test_distributed import rank, run
from phi3lora.training.distributed import GradientSum

say("has imported")
folder, device, killed = {folder!r}, {device!r}, {killed} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
processes, finish, calls = int(os.environ["WORLD_SIZE"]), GradientSum.finish, []

def die_in_step_7(self, total):
    calls.append(1)
    say(f"backward {{len(calls)}} done")
    if killed and len(calls) == 7 and rank() == processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, total)

GradientSum.finish = die_in_step_7
settings = dict(gradient_accumulation_steps=max(1, 4 // processes), save_strategy="steps", save_steps=2, max_steps=10)
settings |= dict(dropout=0.3, device=f"cuda:{{rank()}}" if device == "cuda" else "cpu")
adapters, result = run(folder, resume_from_checkpoint="auto", **settings)
say("has trained")
if rank() == 0:
    torch.save(({{name: values.cpu() for name, values in adapters.items()}}, len(calls)), folder + "/adapters.pt")
"""


def run_under_torchrun(folder, processes: int, device: str, killed: bool):
    """Run KILLED; return rank 0's adapters, the steps that it took after the last start, and what was printed."""
    script = Path(f"{folder}.py")
    script.write_text(KILLED.format(folder=str(folder), device=device, killed=killed))
    status, text = torchrun(processes, script, restarts=int(killed), limit_s=limit_s(device))
    assert status == 0, text
    return *torch.load(folder / "adapters.pt"), text


def test_a_process_killed_in_mid_step_is_restarted_by_torchrun_and_the_run_ends_as_if_uncut(tmp_path):
    found, steps, text = run_under_torchrun(tmp_path / "killed", 2, "cpu", killed=True)
    assert steps == 4  # from checkpoint 6 on
    assert "rank 0 of 2 lost contact with the other processes at step 7: " in text
    assert "nothing was heard from rank 1, which hangs or was killed" in text
    settings = {"gradient_accumulation_steps": 2, "dropout": 0.3, "max_steps": 10}
    (expected, _), _ = in_processes(2, lambda: run(tmp_path / "uncut", **settings))
    assert same_tensors(found, expected)


@pytest.mark.parametrize(
    ("processes", "device"),
    [
        pytest.param(8, "cpu", marks=pytest.mark.slow),
        pytest.param(torch.cuda.device_count(), "cuda", marks=[pytest.mark.gpu, needs_gpus]),
    ],
)
def test_one_of_many_processes_is_killed(tmp_path, processes, device):
    """The others end by themselves, and not because torchrun kills them too."""
    found, steps, text = run_under_torchrun(tmp_path / "killed", processes, device, killed=True)
    expected, _, _ = run_under_torchrun(tmp_path / "uncut", processes, device, killed=False)
    assert steps == 4
    assert difference(found, expected) < (1e-6 if device == "cuda" else 1e-12)
    assert "forcefully exiting" not in text, text


HANGS = """
from processes import say
import signal, sys
from datetime import timedelta
import torch.distributed as dist
from test_distributed import rank, run
from phi3lora.training.distributed import GradientSum

say("has imported")
settings = dict(device=f"cuda:{{rank()}}" if {device!r} == "cuda" else "cpu", optim={optim!r})
run({folder!r} + "-first", max_steps=1, **settings)  # compiles kernels, which may take longer than the time-out
finish, calls = GradientSum.finish, []

def hang_in_step_3(self, total):
    calls.append(1)
    say(f"backward {{len(calls)}} done")
    if len(calls) == 3 and rank() == 1:
        signal.pause()  # until torchrun ends the process
        sys.exit(1)
    return finish(self, total)

GradientSum.finish = hang_in_step_3
dist.init_process_group({backend!r}, timeout=timedelta(seconds=20))
say("has joined")
run({folder!r}, max_steps=9, **settings)
"""


@pytest.mark.parametrize(
    ("device", "optim"),
    [
        pytest.param("cpu", "adamw_torch", marks=pytest.mark.slow),
        pytest.param("cuda", "adamw_torch", marks=[pytest.mark.gpu, needs_gpus]),
        pytest.param("cuda", "adamw_8bit", marks=[pytest.mark.gpu, needs_gpus]),
    ],
)
def test_torchrun_ends_when_a_rank_hangs_inside_a_step(tmp_path, device, optim):
    """On GPUs the others' hosts speak before NCCL's watchdog, also those whose optimizer waits for its GPU."""
    script = tmp_path / "script.py"
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    script.write_text(HANGS.format(folder=str(tmp_path / "run"), device=device, backend=backend, optim=optim))
    status, text = torchrun(2, script, limit_s=limit_s(device))
    assert status != 0, text
    assert "rank 0 of 2 lost contact with the other processes at step 3: " in text, text
    assert "nothing was heard from rank 1, which hangs or was killed" in text
    assert "forcefully exiting" not in text and "Watchdog caught" not in text, text


ON_GPUS = """
from processes import say
import os, signal
import torch
from test_distributed import HELD_OUT, After, rank, run

say("has imported")
folder, device = {folder!r}, f"cuda:{{rank()}}"
processes = int(os.environ["WORLD_SIZE"])
settings = dict(gradient_accumulation_steps=4 // processes, optim="sgd", max_steps=10, device=device)
settings |= dict(eval_dataset=HELD_OUT, eval_strategy="steps", eval_steps=5, save_strategy="epoch")
kill = After(6, lambda state: os.kill(os.getpid(), signal.SIGTERM), on_rank=processes - 1)
assert run(folder, kill, **settings)[1].global_step == 6
say("was stopped")
adapters, result = run(folder, resume_from_checkpoint=True, **settings)
if rank() == 0:
    torch.save({{name: values.cpu() for name, values in adapters.items()}}, folder + "/adapters.pt")
"""


@pytest.mark.gpu
@needs_gpus
def test_several_gpus_train_as_one(tmp_path):
    found = []
    for processes in (1, 2, 4):
        if processes <= torch.cuda.device_count():
            folder, script = tmp_path / f"run-{processes}", tmp_path / f"script-{processes}.py"
            script.write_text(ON_GPUS.format(folder=str(folder)))
            status, text = torchrun(processes, script, limit_s=limit_s("cuda"))
            assert status == 0, text
            found.append(torch.load(folder / "adapters.pt"))
    assert all(difference(adapters, found[0]) < 1e-5 for adapters in found)


# --- Checks before a run, and the command line


def test_doctor_and_the_command_line_speak_once(tmp_path, monkeypatch, capsys):
    """Rank 0 checks the run of all processes; train's other processes print nothing and write no adapter."""
    from phi3lora.__main__ import main

    chats = str(p3.demo.FOLDER / "train.jsonl")
    model, tokenizer = adapted_model(), make_tokenizer()
    alone = p3.doctor(model, tokenizer, DATA, quiet_config(tmp_path / "a"), try_steps=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    first = p3.doctor(model, tokenizer, DATA, quiet_config(tmp_path / "a"), try_steps=False)
    steps = [int(report["time"].text.split(" steps")[0]) for report in (alone, first)]
    assert len(first.findings) == len(alone.findings) and steps == [15, 9]
    monkeypatch.setenv("RANK", "1")
    report = p3.doctor(model, tokenizer, DATA, quiet_config(tmp_path / "a"))
    assert report.ok and report.findings == () and str(report) == ""
    capsys.readouterr()
    assert main(["doctor", "--model", "no such model", "--data", chats]) == 0
    assert capsys.readouterr() == ("", "")
