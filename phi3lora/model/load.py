"""``load_model``: a Hugging Face model and its tokenizer, checked before the weights are read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..display import quiet_libraries
from ..errors import ModelError, error_line, home_path, is_hub_name, is_int, is_number, is_path, require, short_repr
from ..lora.base_weight import PRECISIONS, keep_4bit_packing, quantize_base, require_bitsandbytes, usable_precision
from .attention import NAME as PACKED_ATTENTION
from .attention import register
from .sharding import join_processes, shard

logger = logging.getLogger("phi3lora")

_SUPPORTED = (
    "every checkpoint that transformers loads as Phi3ForCausalLM: Phi-3-mini-4k/128k, Phi-3-medium-4k/128k, "
    "Phi-3.5-mini, Phi-4, Phi-4-mini and the reasoning members of both"
)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "dtype": (*_DTYPES, "auto"),
    "base_precision": (None, *PRECISIONS),
    "parallel": (None, "auto", "ddp", "fsdp"),
    "attn_implementation": (PACKED_ATTENTION, "sdpa", "eager"),
    "use_cache": (True, False),
}
"""Settings of ``load_model`` -> their allowed values."""
_MAX_LAYERS = 1000  # the family's largest model has 40; transformers builds every layer before it looks for weights
_MAX_LABELS = 10_000  # a list of their names is built even for a model that has none


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    base_precision: str | None = None,
    parallel: str | None = None,
    attn_implementation: str = PACKED_ATTENTION,
    use_cache: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model of the Phi-3 family and its tokenizer.

    Args:
        name_or_path: a hub name (``"microsoft/Phi-3-mini-4k-instruct"``) or a local folder.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, the torch dtype, or ``"auto"`` (the checkpoint's own).
        device: the model's device; None: the GPU if there is one, else the CPU. Under torchrun each process has the GPU
            of its ``LOCAL_RANK``.
        base_precision: None: the frozen weights stay in ``dtype``; ``"nf4"``: 4 bits and a quarter of the memory,
            quantised one by one as they are read, on any device (QLoRA); ``"fp8"``: e4m3 with a scale for each row,
            faster on GPUs that multiply it (Hopper, Ada and later); ``"nf4-fp8"``: stored as nf4, multiplied in fp8.
            On other devices a warning says that the products are in 16 bits. A checkpoint that bitsandbytes stored in
            4 bits is loaded as it is, with None, ``"nf4"`` or ``"nf4-fp8"``.
        parallel: ``"fsdp"``, under torchrun: each process keeps its part of every decoder layer, so that a model larger
            than one GPU can be loaded; ``"auto"``, ``"ddp"`` or None: each has the whole model.
        attn_implementation: ``"phi3lora"`` (packed rows, torch's fastest kernels), ``"sdpa"`` or ``"eager"``.
        use_cache: the config's default. Training never uses the cache, generation always does.
        revision: branch, tag or commit on the hub; a folder has none.
        trust_remote_code: run code from the repository; never needed for the supported models.

    Returns:
        ``(model, tokenizer)``, the model in ``eval()`` mode.

    Raises:
        ModelError: nothing loadable there, files that are damaged or lack weights, not a Phi-3 model, a checkpoint
            quantised in another way, 4 bits without bitsandbytes, a folder with an ``adapter_config.json`` or with
            adapters among its weights (``save_pretrained`` of an injected model), or a setting that is not one of the
            above.

    Example:
        >>> model, tokenizer = p3.load_model("microsoft/Phi-3-mini-4k-instruct")  # doctest: +SKIP
    """
    dtype = str(dtype).removeprefix("torch.")
    check_load_settings(
        dtype=dtype,
        base_precision=base_precision,
        parallel=parallel,
        attn_implementation=attn_implementation,
        use_cache=use_cache,
    )
    if not is_path(name_or_path):
        raise ModelError(f"load_model: name_or_path={short_repr(name_or_path)}; allowed: a hub name or a folder")
    device = _available_device(device)
    torch_dtype = _DTYPES.get(dtype)  # None for "auto"

    name = home_path(os.fspath(name_or_path))
    config = read_model_config(name, revision)
    _check_no_adapter(name, revision)
    _check_sizes(Path(name), config)
    splits = parallel == "fsdp" and join_processes(device) > 1
    if splits:  # on the CPU the weights are the file's own pages, which all processes of a node share
        in_4_bits = _options_for_4_bits(name, config, None, torch_dtype, torch.device("cpu"))
    else:
        in_4_bits = _options_for_4_bits(name, config, base_precision, torch_dtype, device)
    register()
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = {"dtype": torch_dtype or "auto", "attn_implementation": attn_implementation, **in_4_bits}
    tokenizer = load_tokenizer(name, **source)
    model = _read_weights(name, source, use_cache, options)
    if longrope_boundary(model.config) is not None:
        logger.info(longrope_note(model.config))
    place = os.path.abspath(name) if os.path.isdir(name) else name
    model.origin = {"name_or_path": place, "dtype": dtype, "base_precision": base_precision, "revision": revision}
    model.checkpoint_tokens = frozenset(tokenizer.get_added_vocab())  # doctor tells later ones by it
    if splits:
        return _split(model, device, usable_precision(base_precision, device)), tokenizer
    if usable := usable_precision(base_precision, device):
        for layer in model.get_decoder().layers:  # one by one: the GPU never holds more than one in 16 bits
            quantize_base(layer.to(device), usable)
    keep_4bit_packing(model)
    return model.to(device).eval(), tokenizer


def check_load_settings(**settings: Any) -> None:
    """Refuse values that ``load_model`` does not take.

    Raises:
        ModelError: the setting, its value, and what is allowed.
    """
    for name, value in settings.items():
        allowed = ", ".join(map(repr, _ALLOWED[name]))
        require(value in _ALLOWED[name], f"load_model: {name}", value, allowed, ModelError)


def _split(model: Any, device: torch.device, base_precision: str | None) -> Any:
    """Move a model to ``device``, where each process keeps its part of every decoder layer; one layer at a time."""

    def prepare(layer: nn.Module) -> None:
        layer.to(device)
        if base_precision is not None:
            quantize_base(layer, base_precision)

    keep_4bit_packing(model)
    shard(model.requires_grad_(False), prepare)
    decoder = model.get_decoder()
    for part in (*(m for m in decoder.children() if m is not decoder.layers), model.get_output_embeddings()):
        part.to(device)
    return model.eval()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that ``load_model`` returns, and no weights. It pads with eos if it has no padding token.

    Raises:
        ModelError: nothing loadable there, or not a Phi-3 model's.
    """
    read_model_config(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # half-written files, odd fields: transformers has an error for each
        raise ModelError(f"cannot load {short_repr(name)}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _available_device(device: Any) -> torch.device:
    """Return ``device``, or the default one, after putting an empty tensor there."""
    if device is None:
        device = _own_gpu() if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"load_model: device={short_repr(device)}: {error_line(error)}; allowed: an available device of torch's, "
            f"such as 'cpu' or 'cuda'"
        ) from error


def _own_gpu() -> str:
    """Return the GPU of this process, and make it torch's current one: under torchrun that of its ``LOCAL_RANK``."""
    rank, gpus = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not rank.isdecimal() or gpus == 1:  # one: the launcher shows each process its own
        return "cuda"
    if int(rank) >= gpus:
        raise ModelError(
            f"load_model: LOCAL_RANK={rank}, but there are {gpus} GPUs, one for each process; start at most "
            f"{gpus} processes here (torchrun --nproc-per-node {gpus})"
        )
    torch.cuda.set_device(int(rank))
    return f"cuda:{rank}"


def check_revision(name: str, revision: str | None) -> None:
    """Raise a ModelError for a revision of a folder."""
    if revision is not None and os.path.isdir(name):
        raise ModelError(
            f"revision={short_repr(revision)} is for a model of the hub, and {short_repr(name)} is a folder; leave it "
            f"out, or name a folder that holds that revision"
        )


def read_model_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``, by which ``load_model`` refuses it or not; no other file is read.

    Raises:
        ModelError: nothing there, or not a Phi-3 model's.
    """
    check_revision(name, revision)
    _check_is_folder_or_hub_name(name)
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
        model_type, layers = config.get("model_type"), config.get("num_hidden_layers", 32)
    except Exception as error:  # no such file, or not a JSON object: transformers has an error for each
        if isinstance(error, OSError) and "couldn't connect" in str(error):  # its chain of causes is of no use here
            raise ModelError(
                f"cannot load {short_repr(name)}: there is no such folder here, and the hub cannot be reached. Check "
                f"the connection, name a folder, or try the embedded model: phi3lora.demo.BASE, --model demo"
            ) from None
        raise ModelError(f"cannot load {short_repr(name)}: {error}") from error
    if model_type != "phi3":
        raise ModelError(
            f"{short_repr(name)} has model_type {short_repr(model_type)}; supported: {_SUPPORTED} (model_type 'phi3')"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    shares = [scope.get("partial_rotary_factor") for scope in (config, rope) if isinstance(scope, dict)]
    for key, value, is_allowed, allowed in (
        ("num_hidden_layers", layers, is_int(layers, 1, _MAX_LAYERS + 1), f"1 to {_MAX_LAYERS}"),
        ("num_labels", labels := config.get("num_labels") or 0, is_int(labels, 0, _MAX_LABELS), f"0 to {_MAX_LABELS}"),
        *(("partial_rotary_factor", x, x is None or (is_number(x) and 0 < x <= 1), "0 to 1") for x in shares),
    ):
        if not is_allowed:
            raise ModelError(f"{short_repr(name)} has {key} {short_repr(value)}; allowed: {allowed}")
    return config


def _check_is_folder_or_hub_name(name: str) -> None:
    """Raise for what cannot be a model: a file, a folder without ``config.json``, a path that does not exist."""
    if os.path.isdir(name):  # unlike Path's, these functions are False for a path that is too long
        if os.path.exists(os.path.join(name, "config.json")):
            return
        why = (
            "it is a folder without a config.json, so it holds no model. To use an adapter, load its base first "
            "(--model BASE --adapter FOLDER)"
        )
    elif os.path.exists(name):
        why = "it is a file; allowed: a model's folder, or a name on the hub"
    elif is_hub_name(name):
        return
    else:
        why = "there is no such folder, and it cannot be a name on the hub ('owner/name')"
    raise ModelError(f"cannot load {short_repr(name)}: {why}")


def _check_no_adapter(name: str, revision: str | None) -> None:
    """Raise if there is an ``adapter_config.json``: transformers would add that adapter, even to a merged model."""
    if find_adapter_config_file(name, revision=revision) is not None:
        raise ModelError(
            f"{short_repr(name)} holds an adapter_config.json beside its config.json, and an adapter must not be "
            f"applied twice. Load the base and call import_peft(model, folder), or, if this is a merged model, move "
            f"adapter_config.json and adapter_model.* out of the folder"
        )


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Raise if ``config.json`` describes more numbers than the files hold.

    transformers would build them, and fill them with random numbers, before it notices: a damaged size can take all
    memory.
    """
    files = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern) if path.is_file()]
    hidden, heads = config.get("hidden_size", 3072), config.get("num_attention_heads", 32)
    kv, vocabulary = config.get("num_key_value_heads") or heads, config.get("vocab_size", 32064)
    inner, head_dim = config.get("intermediate_size", 8192), config.get("head_dim")
    layers = config.get("num_hidden_layers", 32)
    sizes = (hidden, heads, kv, vocabulary, inner, head_dim or 1, layers)
    if not files or not all(is_int(size, 1) for size in sizes):
        return  # on the hub, or for transformers to refuse
    head_dim = head_dim or hidden // heads
    largest = hidden * max(vocabulary, 2 * inner, head_dim * (heads + 2 * kv))
    total = hidden * (vocabulary + layers * (3 * inner + 2 * head_dim * (heads + kv)))
    stored_bytes = sum(path.stat().st_size for path in files)
    for what, described in (("a matrix", largest), (f"{layers} layers", total)):
        if described > 2 * stored_bytes:  # two entries per byte: 4 bits each
            raise ModelError(
                f"cannot load {short_repr(str(folder))}: its config.json describes {what} of {described:,} numbers, "
                f"but its files hold {stored_bytes:,} bytes"
            )


def _options_for_4_bits(
    name: str, config: dict[str, Any], base_precision: str | None, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Any]:
    """Return the options with which ``from_pretrained`` gives 4-bit weights on ``device``; empty for other weights."""
    stored = config.get("quantization_config")
    if stored is not None and not (isinstance(stored, dict) and stored.get("load_in_4bit")):
        raise ModelError(
            f"{name!r} has quantization_config {short_repr(stored)}; allowed: none (16 or 32 bits), or bitsandbytes "
            f"with load_in_4bit"
        )
    if stored is not None and base_precision == "fp8":
        raise ModelError(f"base_precision='fp8': {name!r} is already in 4 bits; allowed: None, 'nf4', 'nf4-fp8'")
    if stored is None and base_precision not in ("nf4", "nf4-fp8"):
        return {}
    require_bitsandbytes()
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if stored is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or config.get("dtype") or config.get("torch_dtype"),
        )
    return options


def _read_weights(name: str, source: dict[str, Any], use_cache: bool, options: dict[str, Any]) -> Any:
    """Read the model with transformers; every weight must be in the files."""
    try:
        config = AutoConfig.from_pretrained(name, **source)
        config.use_cache = use_cache
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, config=config, output_loading_info=True, **source, **options
            )
        model, loading_info = loaded
    except Exception as error:  # half-written files, other shapes, odd fields: transformers has an error for each
        raise ModelError(f"cannot load {short_repr(name)}: {error}") from error
    adapters = sorted(key for key in loading_info["unexpected_keys"] if "lora_" in key)
    if adapters:
        raise ModelError(
            f"{short_repr(name)} holds {len(adapters)} tensors of adapters, {adapters[0]!r} first: a model saved by "
            f"save_pretrained or transformers' Trainer with its adapters, which would be dropped. Load the base, "
            f"call inject_lora with the same settings, then model.load_state_dict(safetensors.torch.load_file(file), "
            f"strict=False); save_adapter and save_merged write what load_adapter and load_model read"
        )
    missing = sorted(loading_info["missing_keys"])
    if missing:  # from_pretrained fills these with random numbers
        raise ModelError(
            f"cannot load {short_repr(name)}: {len(missing)} weights are not in its files, {missing[0]!r} first"
        )
    return model


def longrope_boundary(config: Any) -> int | None:
    """Return the length in tokens past which a 128k model uses its long rotary factors; None for other models."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def longrope_note(config: Any) -> str:
    """Say which lengths use which rotary factors."""
    boundary = longrope_boundary(config)
    return (
        f"longrope: documents of up to {boundary} tokens train the short rotary factors, longer ones the long factors; "
        f"an adapter is right for the lengths it was trained on"
    )


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device
