"""Adapters merged into the weights: inside a ``with`` block, or permanently into a plain Hugging Face directory.

    W' = round(float32(W) + scaling * B A)        one rounding, to the base's dtype

In bf16 that rounding matters: an adapter's change is often smaller than the last bit of a weight. So
:func:`save_merged` measures its effect and compares the merged model's logits with the adapted model's. For a quantised
base (fp8, nf4) W is the dequantised weight that the forward multiplied by; ``base=`` merges into the dense weights
instead.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from ..data.formats import Chat
from ..data.template import ChatEncoder
from ..display import html_facts, one_line, quiet_libraries, terminal_columns, wrap
from ..errors import AdapterError, ModelError, as_path, error_line
from ..files import write_folder
from ..inference.generation import stop_token_ids
from ..lora.base_weight import base_weight_of, is_stored_from
from ..lora.inject import lora_layers
from ..lora.layer_state import ADAPTER_PARAMETERS
from ..lora.weight_formats import Dense
from ..lora.wrappers import plain_name, unwrap
from ..model.forward import eval_mode
from ..model.load import load_model
from ..model.sharding import sharded_base
from .adapter_file import adapter_state_dict, written
from .hub import add_card, model_card
from .named import check_outside_blocks, switched_off
from .peft_format import CONFIG_NAME
from .serving import TOKENIZER_FILES, restore_tokenizer_files

logger = logging.getLogger("phi3lora")

PROMPTS = (
    "What is the capital of France?",
    "Write a short apology to a customer whose order came late.",
    "List three prime numbers larger than 50.",
    "Translate to German: the weather is fine today.",
)
"""Default prompts on which :func:`save_merged` compares the merged model with the adapted one."""

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Files of an earlier model that would be read beside the new one's, or before them."""


@dataclass(frozen=True)
class MergeReport:
    """Differences between a merged model and the adapted one, over all positions of the prompts."""

    max_logit_difference: float
    """Largest absolute difference of two logits."""
    mean_kl: float
    """Kullback-Leibler divergence of the merged model's next-token distribution from the adapted one's, in nats."""
    greedy_agreement: float
    """Share of positions where both have the same most likely token."""
    positions: int
    """Number of tokens in all prompts."""
    dtype: str
    """Dtype of the merged weights."""

    def __repr__(self) -> str:
        return one_line("MergeReport", [f"rounded to {self.dtype}", *(f"{k} {v}" for k, v in self._figures().items())])

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self._figures().items())
        text = f"merged in float32, rounded once to {self.dtype}; {self.positions} positions against the adapted model"
        return "\n".join(wrap(f"{text}: {figures}", terminal_columns()))

    def _repr_html_(self) -> str:
        positions = {"positions compared with the adapted model": f"{self.positions:,}"}
        title = f"Merged in float32, rounded once to {self.dtype}"
        return html_facts(title, {**positions, **self._figures()})

    def _figures(self) -> dict[str, str]:
        return {
            "largest logit difference": f"{self.max_logit_difference:.2e}",
            "mean KL": f"{self.mean_kl:.2e} nats",
            "same likeliest token": f"{self.greedy_agreement:.1%}",
        }


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapter into the weights inside the block; restore the weights bit for bit after it.

    Inside, a forward costs as much as the base model's, and the state dict has the merged weights. A copy of each
    adapted weight is kept until the block ends.

    Raises:
        AdapterError: a quantised base, whose weights cannot be changed in place; a model that is merged already, or
            split over processes.

    Example:
        >>> with p3.merged(model):
        ...     answer = p3.generate(model, tokenizer, "Hello!", max_new_tokens=4)
    """
    _refuse_split(model)
    layers = lora_layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise AdapterError(f"{path!r} is merged already; leave the first merged(model) block before the next")
        if isinstance(layer, nn.Linear) and not isinstance(base_weight_of(layer), Dense):
            raise AdapterError(f"{path!r} has a quantised weight, which cannot be merged in place; use save_merged")
    enabled = [layer for layer in layers.values() if layer.enabled]
    before = {layer: layer.base_layer().weight.detach().clone() for layer in enabled}
    try:
        with torch.no_grad():
            for layer in enabled:
                weight = layer.base_layer().weight
                weight.copy_(_merged_weight(layer, weight))
                layer.merged = True
        with switched_off(model):
            yield
    finally:
        with torch.no_grad():
            for layer, weight in before.items():
                layer.base_layer().weight.copy_(weight)
                layer.merged = False


def save_merged(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> MergeReport:
    """Write a plain ``Phi3ForCausalLM`` directory that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        model: a Phi-3 causal LM with adapters; it is not changed.
        tokenizer: saved beside the weights, with the ``tokenizer.model`` of the folder that it was read from, and the
            source of the stop tokens in ``generation_config.json``; None: no tokenizer is saved, and the model's own
            stop tokens are kept.
        path: the directory, replaced as a whole once it is on disk: the files of an earlier model go, others stay.
            ``merge_report.json`` is written into it too, and a model card where there is none and the base is known.
        base: the checkpoint that a quantised base was made from: the adapters are merged into its dense weights.
        prompts: texts on which both models are compared; without a tokenizer as many rows of random tokens are used.

    Returns:
        The differences between the merged model and the adapted one.

    Raises:
        AdapterError: a model without adapters; inside ``merged`` or ``disabled``; an output head of its own that the
            config calls tied; a folder of ``export_peft``; a directory that cannot be written (an earlier model is
            unchanged).
        ModelError: ``base`` cannot be loaded or is another model than the one that was tuned.
    """
    model = unwrap(model)
    if not lora_layers(model):
        raise AdapterError("the model has no adapters to merge; call inject_lora(model, config) or load_adapter first")
    _refuse_split(model)
    check_outside_blocks(model, "save_merged")
    _check_head(model)
    path = as_path(path, "a merged model's folder", AdapterError)
    if (path / CONFIG_NAME).exists():
        raise AdapterError(
            f"{str(path)!r} holds a PEFT adapter ({CONFIG_NAME}), which would be applied to the merged model "
            f"once more; use another folder"
        )
    plain = _plain_model(model, base)
    plain.generation_config = _generation_config(model, tokenizer)
    if plain.config.output_attentions:
        plain.set_attn_implementation("eager")  # transformers saves the flag with no other; this choice is not saved
    report = _compare(model, plain, tokenizer, prompts)

    def write(folder: Path) -> None:
        with quiet_libraries():
            plain.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            restore_tokenizer_files(tokenizer, folder)
        name = os.fspath(base) if base is not None else getattr(model, "name_or_path", None)
        if name:
            lora, title = getattr(model, "lora_config", None), path.resolve().name
            add_card(folder, path, model_card(folder, title, name, lora=lora, merged=True, tokenizer=tokenizer))
        (folder / "merge_report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")

    replaces = _WEIGHTS if tokenizer is None else (*_WEIGHTS, *TOKENIZER_FILES)
    with written(f"the merged model {os.fspath(path)!r}"):
        write_folder(path, write, marker="config.json", replaces=replaces)
    return report


def _refuse_split(model: nn.Module) -> None:
    if sharded_base(model) is not None:
        raise AdapterError(
            "the model's weights are split over processes (parallel='fsdp') and cannot be merged; save the adapter, "
            "load the model whole in one process, load_adapter, and merge there"
        )


def _merged_weight(layer: Any, weight: Tensor, as_linear: bool = False) -> Tensor:
    """Return ``weight`` plus the layer's delta: added in float32, rounded to the weight's dtype.

    ``as_linear``: the weight is (out, in) even if the layer's own is stored transposed (``fan_in_fan_out``).
    """
    delta = layer.delta().to(weight.device)
    merged_weight: Tensor = weight.float() + (delta.t() if as_linear and layer.fan_in_fan_out else delta)
    return merged_weight.to(weight.dtype)


def _plain_model(model: Any, base: str | os.PathLike[str] | None) -> Any:
    """Return a model without adapters whose weights have them merged; parameters without an adapter are shared."""
    dtype = model.get_input_embeddings().weight.dtype
    if base is not None:
        plain, _ = load_model(base, dtype=dtype, device=model.get_input_embeddings().weight.device)
        _check_same_base(model, plain, os.fspath(base))
        with torch.no_grad():
            for path, layer in lora_layers(model).items():
                weight = plain.get_submodule(path).weight
                weight.copy_(_merged_weight(layer, weight, isinstance(layer, nn.Linear)))
            for name, value in adapter_state_dict(model).items():
                if name.endswith("bias"):
                    plain.get_parameter(name).copy_(value)
        return plain
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    for path, module in ((plain_name(path), module) for path, module in model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        weight = module.weight if isinstance(module, nn.Embedding) else base_weight_of(module).dequantize()
        for name in [name for name in state if name.startswith(f"{path}.") and name != f"{path}.bias"]:
            del state[name]
        if getattr(module, "r", 0):
            weight = _merged_weight(module, weight.detach(), isinstance(module, nn.Linear))
        state[f"{path}.weight"] = weight.detach().to(dtype)
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.model.rotary_emb = model.model.rotary_emb
    return plain.requires_grad_(False).eval()


def _check_head(model: Any) -> None:
    """Raise if the output head has a weight of its own and the config says that it is the input embeddings'."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    if not model.config.tie_word_embeddings or head.weight is embedding:
        return
    if getattr(head, "r", 0) or not head.weight.equal(embedding):
        raise AdapterError(
            "the output head has a weight of its own, but model.config.tie_word_embeddings is True, so the head would "
            "be lost in the merged model; set model.config.tie_word_embeddings = False"
        )


def _check_same_base(model: Any, plain: Any, base: str) -> None:
    """Raise ModelError if the frozen weights are not those of the checkpoint ``base``, stored as the model has them."""
    if model.config.tie_word_embeddings != plain.config.tie_word_embeddings:
        raise ModelError(f"base={base!r} is another model than the one that was tuned: tie_word_embeddings differs")
    weights, trained = plain.state_dict(), adapter_state_dict(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            key, last = plain_name(name), name.rpartition(".")[2]
            if last in ADAPTER_PARAMETERS or key in trained:
                continue
            dense = weights.get(key)
            stored = base_weight_of(module) if isinstance(module, nn.Linear) and last == "weight" else Dense(parameter)
            if dense is None or not is_stored_from(stored, dense):
                raise ModelError(f"base={base!r} is another model than the one that was tuned: {key} differs")


def _generation_config(model: Any, tokenizer: Any) -> Any:
    """Return a copy of the model's generation settings that transformers saves, with the tokenizer's stop tokens."""
    config = copy.deepcopy(model.generation_config)
    if not config.do_sample:  # these have no effect, and transformers refuses to save them
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            setattr(config, name, None)
    if tokenizer is not None:
        config.eos_token_id = stop_token_ids(tokenizer)
    try:
        config.validate(strict=True)
    except ValueError as error:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        logger.warning("only the token ids of model.generation_config are saved: %s", error_line(error))
        config = GenerationConfig(**ids)
    return config


@torch.no_grad()
def _compare(model: Any, plain: Any, tokenizer: Any, prompts: Sequence[str]) -> MergeReport:
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(model.config.vocab_size, (len(prompts), 32), generator=generator).tolist()
    else:
        encoder = ChatEncoder(tokenizer)
        token_ids = [encoder.prompt_ids(Chat([{"role": "user", "content": prompt}])) for prompt in prompts]
    device = model.get_input_embeddings().weight.device
    largest, kl, agreed, positions = 0.0, 0.0, 0, 0
    with eval_mode(model), eval_mode(plain):
        for prompt_ids in token_ids:
            input_ids = torch.tensor([prompt_ids], device=device)  # (1, S)
            want = model(input_ids=input_ids, use_cache=False).logits[0].float()  # (S, V)
            got = plain(input_ids=input_ids, use_cache=False).logits[0].float()  # (S, V)
            largest = max(largest, (want - got).abs().max().item())
            kl += F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum").item()
            agreed += int((want.argmax(-1) == got.argmax(-1)).sum())
            positions += len(prompt_ids)
    dtype = str(plain.dtype).removeprefix("torch.")
    return MergeReport(largest, max(0.0, kl / positions), agreed / positions, positions, dtype)
