"""Tiny models, chats, and a few helpers. The tokenizers are in family.py."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, line by line; read by Triton's import
os.environ.pop("COLUMNS", None)  # set in pytest-xdist's workers; a pipe has no width, and lines stay whole
import hypothesis
from family import PHI3_TEMPLATE, PHI4_MINI_TEMPLATE, TEMPLATES, make_tokenizer  # noqa: F401
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

import phi3lora as p3
from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import install_hint

torch.set_num_threads(1)  # tests run in parallel processes; also makes float sums repeatable
hypothesis.settings.register_profile(  # no limit of time: a machine may be busy
    "phi3lora", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("phi3lora")
_STARTED_S = time.monotonic()
LIMIT_S = 120.0  # for what takes moments; only what hangs takes so long, on a busy machine too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limit-s", type=float, help="skip the tests that have not begun after so many seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu without one. With one, warnings of other packages (torch's compiler) are not errors."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit_s = item.config.getoption("--limit-s")
    if limit_s is not None and time.monotonic() - _STARTED_S > limit_s:
        pytest.skip("out of time")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw no picture, which takes longer than the steps of a test. Tests of pictures override this."""
    monkeypatch.setattr("phi3lora.training.loop.draw_run", lambda history, path: None)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait for the disk: no test cuts the power of this machine. Tests of files override this."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def require_four_bit() -> None:
    """Skip the module where nf4 cannot run: no bitsandbytes, or none of its 4-bit kernels for this CPU."""
    reason = f"nf4 needs bitsandbytes: {install_hint('qlora')}"
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=reason)
    pytest.importorskip("accelerate", reason=reason)
    try:
        bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(torch.ones(8, 8)))
    except Exception as error:
        pytest.skip(f"bitsandbytes has no 4-bit kernels here: {error}", allow_module_level=True)


def until(condition: Callable[[], object]) -> bool:
    """Wait for a condition; return whether it came true within ``LIMIT_S``."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def prefetch_threads() -> list[str]:
    """Return the names of the threads that prefetch for training."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("phi3lora-prefetch")]


def tiny_config(**changes) -> Phi3Config:
    """Return the config of a Phi-3 of 2 layers, hidden 32, 4 query heads and 2 key/value heads."""
    values = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "original_max_position_embeddings": 512, "pad_token_id": 3, "eos_token_id": 3, "bos_token_id": 1,
    }  # fmt: skip
    return Phi3Config(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> Phi3ForCausalLM:
    """Return a random model of :func:`tiny_config`, in eval mode."""
    torch.manual_seed(seed)
    return Phi3ForCausalLM(tiny_config(**changes)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Phi3ForCausalLM:
    return tiny_model()


def chat_rows(count: int = 24) -> list[dict]:
    """Return short chats of one or two turns and different lengths."""
    rows = []
    for i in range(count):
        turns = [("user", f"What is item {i}?"), ("assistant", f"It is number {i * 7}." + " Really." * (i % 4))]
        if i % 3 == 0:
            turns += [("user", "Say hello."), ("assistant", "hello " * (i % 5 + 1))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


@pytest.fixture
def rows() -> list[dict]:
    return chat_rows()


def adapted_model(seed: int = 0, dtype: torch.dtype = torch.float32, head_scale: float = 10.0, changes=None, **lora):
    """Return a tiny model with adapters of rank 4 whose lora_B is not zero; ``head_scale`` spreads the logits."""
    model = tiny_model(**(changes or {})).to(dtype)
    torch.manual_seed(seed)
    model.lm_head.weight.data.mul_(head_scale)
    p3.inject_lora(model, p3.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@functools.cache
def chat_dataset(count: int = 24, max_length: int = 64, **options):
    """Return :func:`chat_rows` as a dataset."""
    return p3.ChatDataset.load(chat_rows(count), make_tokenizer(), max_length=max_length, **options)


def adapters_of(model) -> dict[str, torch.Tensor]:
    """Return copies of every lora_A and lora_B."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Compare two dicts of tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet_config(folder, **settings):
    """Return a TrainingConfig that prints nothing, logs every step and, by default, saves nothing."""
    quiet = {"disable_tqdm": True, "log_level": "error", "logging_steps": 1, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return p3.TrainingConfig(output_dir=folder, **{**quiet, **sizes, **settings})


def on(act, step: int | None = None, hook: str = "on_step_end") -> p3.Callback:
    """Return a callback that calls ``act(state, ...)`` in a hook, at one step or (None) at each."""
    callback = p3.Callback()

    def call(state, *details) -> None:
        if step in (None, state.global_step):
            act(state, *details)

    setattr(callback, hook, call)
    return callback


def stop(state) -> None:
    """Ask a run to end after the present step."""
    state.should_stop = True


def interrupt(*arguments, **options) -> None:
    """End a run as Ctrl-C in a callback does."""
    raise KeyboardInterrupt


def stop_at(step: int) -> p3.Callback:
    """Return a callback that ends a run after a step."""
    return on(stop, step)


def randomize_adapters(module: torch.nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Draw every ``lora_A`` and ``lora_B`` anew: B starts at zero, where an adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(values)


def packed_batch(rows: list[list[list[int]]], row_length: int) -> dict:
    """Pack rows of documents (token ids, all supervised) as ``phi3lora.batches`` does, padded to ``row_length``."""
    shape = (len(rows), row_length)
    input_ids, position_ids = torch.full(shape, 3), torch.zeros(shape, dtype=torch.long)
    labels, edges = torch.full(shape, -100), [0]
    for b, documents in enumerate(rows):
        at = 0
        for ids in documents:
            span = slice(at, at + len(ids))
            input_ids[b, span] = torch.tensor(ids)
            labels[b, at + 1 : span.stop] = torch.tensor(ids[1:])
            position_ids[b, span] = torch.arange(len(ids))
            edges.append(b * row_length + span.stop)
            at = span.stop
        if at < row_length:
            edges.append((b + 1) * row_length)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "cu_seqlens": torch.tensor(edges, dtype=torch.int32),
        "max_seqlen": int(torch.tensor(edges).diff().max()),
    }


def random_documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return documents of the given lengths, made of random token ids in the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 500, (n,), generator=generator).tolist() for n in lengths]


def lively_model(seed: int = 0, **changes) -> Phi3ForCausalLM:
    """Return a :func:`tiny_model` with large weights, so that a leak between documents changes every digit."""
    model = tiny_model(seed, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def save_checkpoint(model: Phi3ForCausalLM, folder, **options):
    """Save a model and its tokenizer as a checkpoint and return the folder."""
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


# Members of the family that attend differently, as changes to :func:`tiny_config`.
ATTENTION_VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "partial-rotary": {"partial_rotary_factor": 0.5},
    "sliding-window": {"sliding_window": 4},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        }
    },
}  # fmt: skip


def token_documents(lengths, seed: int = 0, max_length: int | None = None, supervised: float = 0.5) -> ChatDataset:
    """Return a dataset of random tokens in documents of the given lengths, of which about a share is supervised."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 300, sum(lengths), dtype=np.int32)
    labels = np.where(random.random(len(ids)) < supervised, ids, -100).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    labels[starts[:-1]] = ids[starts[:-1]]
    return ChatDataset(
        ids, labels, starts, max_length=max_length or max(lengths), pad_token_id=3, end_of_turn_id=4, format="messages",
        rows=np.arange(1, len(lengths) + 1), truncated=np.zeros(len(lengths), dtype=bool),
    )  # fmt: skip


def longrope_model(boundary: int = 40, **options):
    """Return an :func:`adapted_model` whose rotary factors change past ``boundary`` tokens, which its logits show."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": boundary,
        "short_factor": [1.0] * 4, "long_factor": [40.0] * 4, "factor": 8.0,
    }  # fmt: skip
    changes = {"rope_parameters": rope, "original_max_position_embeddings": boundary}
    model = adapted_model(changes=changes, **options)
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.weight.data.mul_(15)
    return model
