"""A base split over two processes computes what the whole one does, bit for bit, in a part of the memory."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from conftest import (
    adapted_model,
    chat_dataset,
    make_tokenizer,
    packed_batch,
    random_documents,
    randomize_adapters,
    require_four_bit,
    save_checkpoint,
    tiny_model,
)  # fmt: skip
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import phi3lora as p3
from phi3lora.lora.base_weight import Fp8Linear, base_format, is_4bit, quantize_base, sample_base, stored_tensors
from phi3lora.model.activations import MODES, activation_checkpointing
from phi3lora.model.sharding import SMALLEST_BYTES, shard, shardable_tensors, sharded, sharded_base, unshard

BATCH = packed_batch([random_documents(11, 6), random_documents(9, 5, 3)], 18)
OTHER = packed_batch([random_documents(12, 3, seed=1)], 18)


def run_on_ranks(function, folder, size: int = 2, *arguments) -> None:
    """Call ``function(rank, *arguments)`` in processes of one gloo group; an error in any is an error here."""
    torch.multiprocessing.start_processes(
        _on_rank, (function, size, folder / "rendezvous", arguments), nprocs=size, start_method="fork"
    )


def _on_rank(rank, function, size, rendezvous, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def make_model(base: str = "dense", layers: int = 3):
    """A model with adapters and dropout whose weights are all large enough to be split."""
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=layers)
    if base == "nf4":
        quantize_base(model, "nf4")
    for layer in model.model.layers if base == "fp8" else ():
        for parent, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"),
                             (layer.mlp, "down_proj")):  # fmt: skip
            setattr(parent, name, Fp8Linear.from_linear(getattr(parent, name)))
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["qkv_proj", "down_proj"]))
    randomize_adapters(model)
    return model.train()


def loss_and_gradients(model, mode: str, batches=(BATCH, OTHER)):
    """Accumulate two batches as a training step does; also a loss without gradients, as an evaluation computes."""
    model.zero_grad()
    torch.manual_seed(1)
    losses = []
    with activation_checkpointing(model, mode):
        for batch in batches:
            loss, _ = p3.causal_lm_loss(model, batch, fused=False)
            loss.backward()
            losses.append(loss.detach())
    with torch.no_grad():
        losses.append(p3.causal_lm_loss(model, BATCH, fused=False)[0])
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert [loss.item() for loss in found[0]] == [loss.item() for loss in expected[0]]
    assert found[1].keys() == expected[1].keys() and len(found[1]) >= 4
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def frozen_state(model):
    return {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor) and "lora_" not in n}


def check_equal(rank, cases):
    for base, mode, layers in cases:
        whole, split = make_model(base, layers), make_model(base, layers)
        before = frozen_state(split)
        expected = [loss_and_gradients(whole, mode) for _ in range(2)]
        with sharded(split):
            for step in expected:
                assert_same(loss_and_gradients(split, mode), step)
        after = frozen_state(split)
        assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())
        assert_same(loss_and_gradients(split, mode), expected[0])


@pytest.mark.parametrize("size", [2, 3])
def test_losses_and_gradients_are_those_of_the_whole_base(tmp_path, size):
    cases = [("dense", mode, 3) for mode in MODES] + [("fp8", "none", 3), ("fp8", "full", 3), ("dense", "none", 1)]
    run_on_ranks(check_equal, tmp_path, size, cases if size == 2 else cases[:1])


def test_losses_and_gradients_are_those_of_the_whole_nf4_base(tmp_path):
    require_four_bit()
    run_on_ranks(check_equal, tmp_path, 2, [("nf4", "none", 3), ("nf4", "full", 3)])


def check_memory(rank):
    model = make_model(layers=5)
    layers = list(model.model.layers)
    weights = [[m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]
    each = sum(w.nbytes for w in weights[0])
    held, allowed = [], 0

    def measure(*_):
        held.append(sum(ws[0].untyped_storage().nbytes() for ws in weights))

    with sharded(model) as base:
        assert base.part_bytes == pytest.approx(5 * each / 2, rel=0.01)
        assert base.buffer_bytes == pytest.approx(2 * each, rel=0.01)
        allowed = base.buffer_bytes
        measure()
        assert held.pop() == 0
        hooks = [layer.self_attn.register_forward_hook(measure) for layer in layers]
        for mode in ("none", "full"):
            loss_and_gradients(model, mode)
        for hook in hooks:
            hook.remove()
    assert len(held) >= 5 * (3 + 5)  # 3 forwards in either mode, and 2 recomputations in the second
    assert max(held) <= allowed
    for layer in layers:  # whole again, each in its own storage: what save_pretrained needs
        assert not (layer._forward_hooks or layer._forward_pre_hooks)
        assert len({m.weight.untyped_storage().data_ptr() for m in layer.modules() if isinstance(m, nn.Linear)}) == 4


def test_two_layers_are_in_memory_at_a_time(tmp_path):
    run_on_ranks(check_memory, tmp_path)


def check_idle(rank, mode):
    whole, split = make_model(), make_model()
    expected = loss_and_gradients(whole, mode)
    with sharded(split) as base:
        if rank == 0:
            assert_same(loss_and_gradients(split, mode), expected)
        else:  # this rank has no batches in this step
            for backward in (True, True, False):
                base.idle(backward)
        assert_same(loss_and_gradients(split, mode), expected)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_rank_without_a_batch_takes_part(tmp_path, mode):
    run_on_ranks(check_idle, tmp_path, 2, mode)


def check_inference(rank):
    def answers(model):
        return p3.evaluate(model, chat_dataset()), p3.generate(model, make_tokenizer(), "Hi", max_new_tokens=4)

    whole, split = adapted_model(), adapted_model()
    base = shard(split)
    assert sharded_base(split) is base and sharded_base(whole) is None
    assert answers(split) == answers(whole)
    with sharded(split) as same:  # a model that was split before stays so
        assert same is base
    with pytest.raises(p3.Phi3LoRAError, match="split over the processes already"):
        shard(split)
    with pytest.raises(p3.AdapterError, match=r"split over processes.*load the model whole in one process"):
        p3.save_merged(split, None, "unused")
    with pytest.raises(p3.AdapterError, match="split over processes"), p3.merged(split):
        pass
    unshard(split)
    unshard(split)
    assert sharded_base(split) is None and answers(split) == answers(whole)


def test_evaluate_and_generate_inside(tmp_path):
    run_on_ranks(check_inference, tmp_path)


def check_adapters_added_later(rank):
    whole, split = (tiny_model(hidden_size=64, intermediate_size=128) for _ in range(2))
    shard(split.requires_grad_(False))
    for model in (whole, split):
        p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
        randomize_adapters(model)
    assert_same(loss_and_gradients(split.train(), "none"), loss_and_gradients(whole.train(), "none"))


def test_adapters_can_be_injected_into_a_split_base(tmp_path):
    run_on_ranks(check_adapters_added_later, tmp_path)


def check_loading(rank, folder, base_precision):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        split, _ = p3.load_model(folder, dtype="float32", device="cpu", base_precision=base_precision, parallel="fsdp")
    whole, _ = p3.load_model(folder, dtype="float32", device="cpu", base_precision=base_precision, parallel="ddp")
    base = sharded_base(split)
    assert base is not None and base.size == 2 and sharded_base(whole) is None
    assert base.part_bytes > 3 * 64 * 64 * (4 if base_format(whole) != "nf4" else 0.5)
    for model in (whole, split):
        p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
        randomize_adapters(model)
    assert sample_base(split) == sample_base(whole)
    for mode in ("none", "full"):
        assert_same(loss_and_gradients(split.train(), mode), loss_and_gradients(whole.train(), mode))


@pytest.mark.parametrize("stored", ["dense", "4 bits"])
@pytest.mark.parametrize("base_precision", [None, "nf4"])
def test_a_model_is_split_while_it_is_loaded(tmp_path, base_precision, stored):
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    save_checkpoint(model, tmp_path / "dense")
    if base_precision or stored == "4 bits":
        require_four_bit()
    if stored == "4 bits":
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map="cpu", **options)
        save_checkpoint(quantised, tmp_path / "4 bits")
    run_on_ranks(check_loading, tmp_path, 2, tmp_path / stored, base_precision)


def check_fp8_warning(rank, folder):
    class Count(logging.Handler):
        messages: ClassVar[list[str]] = []

        def emit(self, record):
            self.messages.append(record.getMessage())

    logging.getLogger("phi3lora").addHandler(Count(logging.WARNING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        split, _ = p3.load_model(folder, device="cpu", base_precision="fp8", parallel="fsdp")
    assert base_format(split) == "" and sharded_base(split) is not None
    assert sum("base_precision='fp8' is not possible here" in message for message in Count.messages) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may multiply fp8")
def test_fp8_where_it_is_not_possible_is_one_warning(tmp_path):
    run_on_ranks(check_fp8_warning, tmp_path, 2, save_checkpoint(tiny_model(), tmp_path / "model"))


def test_one_process_loads_a_whole_model(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    folder = save_checkpoint(tiny_model(), tmp_path / "model")
    assert sharded_base(p3.load_model(folder, device="cpu", parallel="fsdp")[0]) is None
    with pytest.raises(p3.Phi3LoRAError, match="parallel='zero3'; allowed: None, 'auto', 'ddp', 'fsdp'"):
        p3.load_model(folder, parallel="zero3")


def check_shared(rank):
    whole, split = make_model(), make_model()
    for model in (whole, split):
        first, second = model.model.layers[:2]
        second.mlp.down_proj.weight = first.mlp.down_proj.weight
    with sharded(split):
        emptied = [n for n, p in split.named_parameters() if p.untyped_storage().nbytes() == 0]
        names = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj"]
        expected = {f"model.layers.{i}.{name}.weight" for i in range(3) for name in names}
        assert set(emptied) == {*expected, "model.layers.2.mlp.down_proj.weight"}
        assert_same(loss_and_gradients(split, "none"), loss_and_gradients(whole, "none"))


def test_small_and_shared_tensors_stay_whole(tmp_path):
    run_on_ranks(check_shared, tmp_path)


def test_the_tables_that_nf4_weights_share_stay_whole():
    require_four_bit()
    model = make_model("nf4")
    found = [t for layer in model.model.layers for t in shardable_tensors(layer)]
    assert sum(is_4bit(t) for t in found) == 12 and min(t.nbytes for t in found) >= SMALLEST_BYTES
    tables = {id(t) for m in model.modules() if isinstance(m, nn.Linear) and is_4bit(m.weight)
              for t in stored_tensors(m) if t.numel() in (16, 256) and math.prod(t.shape) < 257}  # fmt: skip
    assert tables and not tables & {id(t) for t in found}


class OtherWeight(nn.Parameter):
    """A parameter with a layout of its own, as other quantisation packages have."""


def test_what_cannot_be_split_is_refused():
    layer = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(p3.Phi3LoRAError, match=r"0\.weight trains; only frozen"):
        shardable_tensors(layer)
    layer[0].weight = OtherWeight(torch.ones(32, 32), requires_grad=False)
    with pytest.raises(p3.Phi3LoRAError, match=r"a OtherWeight, which cannot be split.*'fp8' or 'nf4'"):
        shardable_tensors(layer)


# --- On two GPUs: NCCL and the fused layers


def check_on_gpus(rank, rendezvous):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    def measure(base, mode, split):
        with torch.device("cuda"):
            model = tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=6).to(torch.bfloat16)
        if base is not None:
            quantize_base(model, base)
        p3.inject_lora(model, p3.LoraConfig(r=16, lora_alpha=32))
        randomize_adapters(model)
        if split:
            shard(model)
        found = []
        with torch.autocast("cuda", torch.bfloat16), activation_checkpointing(model.train(), mode):
            for _ in range(3):
                model.zero_grad()
                loss, _ = p3.causal_lm_loss(model, BATCH)
                loss.backward()
                found.append(
                    {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
                )
        return found

    for base in (None, "fp8", "nf4"):
        for mode in MODES:
            for whole, split in zip(measure(base, mode, False), measure(base, mode, True), strict=True):
                for name, tensor in whole.items():
                    difference = (split[name] - tensor).norm() / tensor.norm()
                    # Recomputed layers are called in the same way, the others add a product to the stream elsewhere.
                    assert difference <= (0 if mode in ("full", "offload") else 0.05), (base, mode, name, difference)
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_compute_what_one_with_the_whole_base_does(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.start_processes(check_on_gpus, (tmp_path / "rendezvous",), nprocs=2, start_method="spawn")


@pytest.mark.slow
def test_the_fused_layers_compute_the_same(tmp_path):
    """In Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the test on two GPUs does more")
    run_on_ranks(check_fused, tmp_path)


def check_fused(rank):
    from triton.runtime import interpreter

    sys.path.insert(0, str(Path(__file__).parents[1] / "kernel_tests"))
    import test_decoder

    interpreter._patch_lang_tensor = test_decoder._patched
    whole, split = (test_decoder.adapted(hidden_size=64, intermediate_size=64) for _ in range(2))
    expected = test_decoder.hidden_and_gradients(whole, True, "full")
    with sharded(split):
        found = test_decoder.hidden_and_gradients(split, True, "full")
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
