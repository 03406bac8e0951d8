"""CUDA graphs of the decoder against the same kernels launched one by one."""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import packed_batch, random_documents, randomize_adapters, tiny_model, token_documents
from torch.nn.functional import cosine_similarity

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.kernels import decoder, recording
from phi3lora.kernels.recording import Recordings
from phi3lora.lora.base_weight import quantize_base
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.backend import use_backend

# --- Which micro-batches are recorded


class Counting(Recordings):
    """Recordings that count what they record, and compute it as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0

    def _record(self, decode, parameters, inputs):
        self.recorded += 1
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB") if self.recorded > 1 else KeyError(1)


def call(recordings: Recordings, tokens: int, state: int = 0) -> torch.Tensor:
    weight = torch.ones(1, requires_grad=True)
    return recordings(lambda p, h: h * p[0], [weight], {"h": torch.ones(tokens)}, state)


def test_the_second_micro_batch_of_a_shape_is_recorded():
    recordings = Counting()
    for tokens in (3, 4, 5):
        assert call(recordings, tokens).shape == (tokens,)
    assert recordings.recorded == 0
    with pytest.raises(KeyError):
        call(recordings, 4)


def test_another_state_begins_again():
    recordings = Counting()
    call(recordings, 3)
    call(recordings, 3, state=1)
    assert recordings.recorded == 0


def test_without_memory_for_a_recording_a_run_goes_on_and_says_so_once(caplog):
    recordings = Counting()
    recordings.recorded = 1
    caplog.set_level(logging.WARNING, "phi3lora")
    for _ in range(4):
        assert call(recordings, 3).tolist() == [1, 1, 1]
    assert recordings.recorded == 2
    assert [r.getMessage() for r in caplog.records] == [
        "micro-batches are not replayed from CUDA graphs: RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB"
    ]


def test_a_failed_recording_is_freed_before_the_layers_are_launched():
    held = []

    class Failing(Recordings):
        def _record(self, decode, parameters, inputs):
            activations = torch.ones(1)
            held.append(weakref.ref(activations))
            raise RuntimeError("CUDA out of memory")

    recordings, weight = Failing(), torch.ones(1)
    freed = [recordings(lambda p, h: not held or held[0]() is None, [weight], {"h": weight}, 0) for _ in range(2)]
    assert held and all(freed)


@pytest.mark.parametrize("free_bytes", [99, 100])
def test_layers_are_recorded_only_if_launched_ones_fit_beside_them(monkeypatch, caplog, free_bytes):
    reserved = iter([50, 150])
    monkeypatch.setattr(recording, "recorded", lambda *_: nullcontext(SimpleNamespace(replay=lambda: None)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 1000))
    caplog.set_level(logging.WARNING, "phi3lora")
    recordings = Recordings()
    assert call(recordings, 3).tolist() == call(recordings, 3).tolist() == [1, 1, 1]
    assert len(recordings._by_shape) == (free_bytes == 100)
    assert ("too little memory" in caplog.text) == (free_bytes == 99)


def test_a_smaller_adapter_in_the_same_memory_is_another_state():
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(r=8))
    layer = model.model.layers[0].mlp.down_proj
    before = decoder._state(model.model, decoder._adapted(model.model))
    assert before == decoder._state(model.model, decoder._adapted(model.model))
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data[:4], layer.lora_B.data[:, :4]
    assert before != decoder._state(model.model, decoder._adapted(model.model))


def test_no_more_than_a_few_shapes_are_recorded(monkeypatch):
    monkeypatch.setattr(recording, "_MOST_SHAPES", 0)
    recordings = Counting()
    for _ in range(3):
        call(recordings, 3)
    assert recordings.recorded == 0


def test_all_graphs_of_a_device_are_recorded_on_one_stream(monkeypatch):
    made, used = [], []

    def make_stream(device):
        made.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    def use_stream(stream):
        used.append(stream)
        return nullcontext()

    graph = SimpleNamespace(capture_begin=lambda **options: None, capture_end=lambda: None)
    monkeypatch.setattr(recording, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", use_stream)
    for index in (0, 1, 0, 0):
        with recording.recorded(torch.device("cuda", index)) as found:
            assert found is graph
    assert made == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert used[0] is used[2] is used[3] and used[0] is not used[1]


def test_an_interrupt_while_recording_is_not_hidden_by_the_end_of_the_recording(monkeypatch):
    def capture_end():
        raise RuntimeError("capturing stream has unjoined work")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(capture_begin=lambda **options: None, capture_end=capture_end)
    monkeypatch.setattr(recording, "_STREAMS", {torch.device("cuda", 0): stream})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(KeyboardInterrupt), recording.recorded(torch.device("cuda", 0)):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="unjoined"), recording.recorded(torch.device("cuda", 0)):
        pass


# --- On a GPU

DEVICE = "cuda"
ROW = 128


def adapted(base: str | None = None, **lora):
    model = tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    model = model.to(DEVICE, torch.bfloat16)
    if base is not None:
        quantize_base(model, base)
    p3.inject_lora(model, p3.LoraConfig(**{"r": 8, **lora}))
    randomize_adapters(model, std=0.1)
    return model.train()


def batches(layout: str, n: int) -> list[dict]:
    """Return micro-batches of different tokens; chats also differ in the number of their documents."""
    if layout == "full rows":
        return [packed_batch([random_documents(ROW, seed=seed)] * 2, ROW) for seed in range(n)]
    rows = ([100, 20], [30, 30, 30, 20, 10], [30, 90], [64, 50, 10])
    return [packed_batch([random_documents(*rows[seed % 4], seed=seed)], ROW) for seed in range(n)]


@contextmanager
def installed(model, mode: str = "none"):
    """Install the fused layers, as for a run, and yield their recordings."""
    with activation_checkpointing(model, mode), use_backend(model) as backend:
        assert backend.kind == "fused"
        yield decoder._RECORDINGS[model.get_decoder()]


def gradients(model, *micro_batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in micro_batches:
        p3.causal_lm_loss(model, batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, exact: bool) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if exact:
            assert torch.equal(found[name], gradient), name
        else:  # another kernel computes the attention of packed documents where cuDNN's package is installed
            assert cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.999, name


@pytest.mark.gpu
@pytest.mark.parametrize("base", [None, "nf4", "fp8"])
@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("layout", ["full rows", "chats"])
def test_replayed_layers_have_the_same_gradients(layout, mode, base):
    model, data = adapted(base), batches(layout, 7)
    with activation_checkpointing(model, mode):
        expected = [gradients(model, batch) for batch in data]  # nothing is installed, so nothing is recorded
    with installed(model, mode) as recordings:
        found = [gradients(model, batch) for batch in data]
        assert len(recordings._by_shape) == (1 if layout == "full rows" else 2)
    for i in range(len(data)):
        assert_same(found[i], expected[i], exact=layout == "full rows")


@pytest.mark.gpu
def test_gradients_of_several_micro_batches_add_up():
    model, data = adapted(), batches("full rows", 4)
    expected = gradients(model, *data)
    with installed(model, "offload") as recordings:
        gradients(model, *data)
        found = gradients(model, *data)
        assert recordings._by_shape
    assert_same(found, expected, exact=True)


@pytest.mark.gpu
def test_a_hook_on_a_parameter_sees_each_gradient_once():
    model, data = adapted(), batches("full rows", 4)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    expected, seen = [gradients(model, batch)[name] for batch in data], []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with installed(model):
        for batch in data:
            gradients(model, batch)
    assert [torch.equal(a, b) for a, b in zip(seen, expected, strict=True)] == [True] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "offload"])
def test_changes_of_adapters_between_steps_count(monkeypatch, mode):
    """New numbers, an adapter switched off, another scaling, a frozen matrix, other memory."""
    model, data = adapted(), batches("full rows", 3)
    layer = model.model.layers[1].mlp.down_proj
    changes = [
        lambda: None,
        lambda: randomize_adapters(model, seed=1),
        lambda: setattr(layer, "enabled", False),
        lambda: setattr(layer, "scaling", 3.0),
        lambda: setattr(layer, "enabled", True),
        lambda: layer.lora_A.requires_grad_(False),
        lambda: setattr(layer.lora_B, "data", layer.lora_B.data * 2),
    ]
    with installed(model, mode) as recordings:
        for change in changes:
            change()
            with monkeypatch.context() as patch:
                patch.setattr(decoder, "MOST_TOKENS", 0)
                expected = [gradients(model, batch) for batch in data]
            found = [gradients(model, batch) for batch in data]
            assert recordings._by_shape
            for i in range(len(data)):
                assert_same(found[i], expected[i], exact=True)


@pytest.mark.gpu
def test_a_backward_after_another_forward_is_refused():
    model, (batch, other) = adapted(), batches("full rows", 2)
    with installed(model):
        gradients(model, batch)
        gradients(model, batch)
        loss, _ = p3.causal_lm_loss(model, batch)
        p3.causal_lm_loss(model, other)[0].backward()
        with pytest.raises(ModelError, match="its own backward, once"):
            loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "offload"])
def test_a_run_trains_the_same_adapters(tmp_path, monkeypatch, mode):
    data = token_documents([ROW] * 24, supervised=1)  # with fewer the launched kernels compute less of the last layer

    def trained(folder: str) -> dict[str, torch.Tensor]:
        model = adapted()
        config = p3.TrainingConfig(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_accumulation_steps=2, activation_checkpointing=mode, bf16=True, save_strategy="no",
        )  # fmt: skip
        p3.train(model, data, config)
        return p3.lora_state_dict(model)

    found = trained("recorded")
    monkeypatch.setattr(decoder, "MOST_TOKENS", 0)
    expected = trained("launched")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
