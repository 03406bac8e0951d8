"""Argument names of other libraries: PEFT's ``LoraConfig``, transformers' ``TrainingArguments``, TRL's ``SFTConfig``.

With these tables, dicts written for those libraries work unchanged. A foreign name is an alias of a field, ignored, or
unsupported: accepted only at a value that changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from .errors import ConfigError, did_you_mean, short_repr

T = TypeVar("T")

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "torch_compile": "compile",
    "loraplus_lr_ratio": "lora_plus_lr_ratio",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
"""Foreign name -> the field that it sets."""

IGNORED_TRAINING_ARGUMENTS = frozenset(
    """
    accelerator_config activation_checkpointing_kwargs average_tokens_across_devices batch_eval_metrics
    bf16_full_eval chars_per_token dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_batch_size
    dataset_kwargs dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug dispatch_batches do_eval do_predict do_train eval_accumulation_steps
    eval_do_concat_batches eval_packing eval_use_gather_object fp16_backend fp16_full_eval fp16_opt_level
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap gradient_checkpointing_kwargs half_precision_backend
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token include_for_metrics
    include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second jit_mode_eval label_names
    length_column_name liger_kernel_config local_rank log_level_replica log_on_each_node logging_dir
    logging_nan_inf_filter mp_parameters num_of_sequences pad_to_multiple_of pad_token padding_free past_index
    prediction_loss_only push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope
    remove_unused_columns restore_callback_states_from_checkpoint router_aux_loss_coef save_on_each_node
    save_safetensors shuffle_dataset skip_memory_metrics split_batches tf32 torch_compile_backend
    torch_compile_mode torch_empty_cache_steps torchdynamo tpu_metrics_debug tpu_num_cores trackio_bucket_id
    trackio_space_id trackio_static_space_id trust_remote_code use_cache use_ipex use_legacy_prediction_loop
    use_liger use_liger_kernel use_mps_device xpu_backend
    """.split()
)
"""Training arguments that have no effect here, whatever their value."""

IGNORED_LORA_ARGUMENTS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config megatron_config
    megatron_core peft_version qalora_group_size revision runtime_config
    """.split()
)
"""Arguments of PEFT's ``LoraConfig`` that have no effect here, whatever their value."""

_SWITCHES = """
    activation_offloading auto_find_batch_size dataloader_drop_last enable_jit_checkpoint ensure_weight_tying
    fan_in_fan_out full_determinism group_by_length ignore_data_skip lora_bias no_cuda push_to_hub save_only_model
    sortish_sampler use_bdlora use_cpu use_dora use_qalora
"""
_OPTIONS = """
    alora_invocation_tokens arrow_config chat_template_path deepspeed generation_config generation_max_length
    kasa_config layer_replication lora_ga_config modules_to_save monteclora_config neftune_noise_alpha
    optim_target_modules parallelism_config trainable_token_indices trainable_tokens velora_config
"""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_SWITCHES.split(), (False, None)),
    **dict.fromkeys(_OPTIONS.split(), (None,)),
    "label_smoothing_factor": (0, 0.0, None),
    "fsdp": (None, "", [], False),
    "fsdp_config": (None, {}),
    "optim_args": (None, ""),
    "eval_delay": (0, None),
    "train_sampling_strategy": ("random", None),
    "dataset_text_field": ("text", None),
    "assistant_only_loss": (True, None),
    "completion_only_loss": (True, None),
    "packing_strategy": ("bfd", None),
    "truncation_mode": ("keep_start", None),
    "loss_type": ("nll", "chunked_nll", None),
    "eos_token": (None, "<|end|>", "<|endoftext|>", "<|im_end|>"),
    "model_init_kwargs": (None, {}),
    "generation_num_beams": (1, None),
    "target_parameters": (None, []),
    "init_lora_weights": (True, None),
    "peft_type": ("LORA", None),
}
"""Argument that would change the result -> its accepted values, which change nothing."""

_TRAIN_ON_ALL = "ChatDataset.load(..., train_on='all') trains every token, and the default the assistant's alone"
_ADAPT_THE_EMBEDDING = "add 'embed_tokens' and 'lm_head' to target_modules: LoRA trains the rows of the tokens met"
INSTEAD = {
    "push_to_hub": "call phi3lora.push_to_hub(folder, name) after training",
    "train_sampling_strategy": "packing=True needs no grouping by length",
    "group_by_length": "packing=True wastes less on padding than grouping by length",
    "dataloader_drop_last": "every document is trained in every epoch",
    "dataset_text_field": "ChatDataset.load(..., columns={'text': 'your_column'}) names the column",
    "assistant_only_loss": _TRAIN_ON_ALL,
    "completion_only_loss": _TRAIN_ON_ALL,
    "packing_strategy": "rows take whole documents; for 'bfd_split', ChatDataset.load(..., overflow='split')",
    "truncation_mode": "ChatDataset.load(..., overflow='split') keeps both ends of a long document",
    "eos_token": "the token that ends a turn comes from the chat template, and is trained",
    "activation_offloading": "activation_checkpointing='offload' keeps the inputs of the layers in host memory",
    "model_init_kwargs": "give them to load_model",
    "chat_template_path": "set tokenizer.chat_template before ChatDataset.load",
    "generation_max_length": "eval_max_new_tokens limits the answers of an evaluation",
    "generation_num_beams": "the answers of an evaluation are greedy",
    "generation_config": "the answers of an evaluation are greedy; eval_max_new_tokens limits them",
    "use_dora": "DoRA needs the norm of W + BA in every step, which loralib's layers never form (docs/layers.md)",
    "use_cpu": "load_model(..., device='cpu') trains on the CPU",
    "no_cuda": "load_model(..., device='cpu') trains on the CPU",
    "trainable_token_indices": _ADAPT_THE_EMBEDDING,
    "trainable_tokens": _ADAPT_THE_EMBEDDING,
    "full_determinism": "call torch.use_deterministic_algorithms(True) before train",
}
"""Unsupported argument -> the way to get what it asks for."""


_CALLED_HERE = {
    "lora.r": "lora_r lora_rank rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target_modules lora_target lora_attn_modules lora_target_linear target_linear",
    "model.name_or_path": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.adapter": "lora_model_dir adapter_name_or_path",
    "model.dtype": "torch_dtype compute_dtype precision mixed_precision",
    "model.base_precision": "load_in_4bit load_in_8bit quantization_bit use_4bit quantization bnb_4bit_quant_type",
    "data.source": "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file train_data",
    "data.eval_source": "eval_dataset validation_file val_data test_datasets",
    "data.eval_share": "val_set_size val_size test_size",
    "data.max_length": "sequence_len cutoff_len model_max_length block_size",
    "data.train_on": "train_on_inputs train_on_input train_on_prompt train_on_responses_only mask_history",
    "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.num_train_epochs": "epochs n_epochs num_epochs",
    "training.max_steps": "total_steps",
    "training.learning_rate": "lr peak_lr",
    "training.lr_scheduler_type": "lr_scheduler scheduler",
    "training.lr_scheduler_kwargs": "cosine_min_lr_ratio",
    "training.optim": "optimizer optimizer_type",
    "training.max_grad_norm": "gradient_clipping grad_clip clip_grad clip_grad_norm",
    "training.packing": "sample_packing packed pad_to_sequence_len",
    "training.activation_checkpointing": "enable_activation_checkpointing enable_activation_offloading",
    "training.logging_steps": "log_every_n_steps log_every",
    "training.eval_steps": "eval_every evals_per_epoch",
    "training.save_steps": "save_every saves_per_epoch",
    "training.save_total_limit": "keep_last_n_checkpoints",
    "training.project": "wandb_project project_name",
    "training.run_name": "wandb_name wandb_run_id",
    "training.report_to": "use_wandb",
    "training.seed": "random_seed",
    "training.resume_from_checkpoint": "auto_resume_from_checkpoints",
}
CALLED_HERE = {name: ours for ours, names in _CALLED_HERE.items() for name in names.split()}
"""Name in axolotl, torchtune, LLaMA-Factory and others -> the section and the field that it is here, for messages."""
ATTENTION_SETTINGS = frozenset(
    """
    attn_implementation eager_attention flash_attention flash_attention_2 flash_attn flash_attn_2 sdp_attention
    sdpa_attention use_flash_attention use_flash_attention_2 use_flash_attn xformers_attention
    """.split()
)
"""Names by which others choose the attention, which no config has here."""
_IN_PYTHON = {"lora": "LoraConfig", "training": "TrainingConfig", "model": "load_model", "data": "ChatDataset.load"}


def hint_at_name(name: str, known: Iterable[str], section: str | None = None) -> str:
    """Return a sentence about the setting that an unknown name may mean, or ``""``.

    Args:
        name: a name that is not in ``known``.
        known: the allowed names.
        section: the section that ``known`` is, of a config in Python; None: of a run's settings.
    """
    if name in ATTENTION_SETTINGS:
        return " load_model chooses the attention (attn_implementation); its default uses torch's fastest kernels."
    ours = CALLED_HERE.get(name)
    if ours is None:
        return did_you_mean(name, known)
    home, _, field = ours.partition(".")
    if section is None:
        return f" Here it is called {ours}."
    if home == section:
        return f" Did you mean {field!r}?"
    return f" Here it is called {field!r} and belongs to {_IN_PYTHON[home]}, not to {_IN_PYTHON[section]}."


def field_names(cls: type[Any]) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def _translate_arguments(
    cls: type[Any], given: Mapping[str, Any], ignored: frozenset[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return ``given`` under the names of ``cls``'s fields, and the names that have no effect here."""
    fields = field_names(cls)
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    without_effect: list[str] = []
    for name, value in given.items():
        own = ALIASES.get(name, name)
        if own in fields:
            if own in values and values[own] != value:
                raise ConfigError(
                    f"{cls.__name__}: {given_as[own]}={short_repr(values[own])} and {name}={short_repr(value)} are "
                    f"one setting with two values; give one of them"
                )
            values[own], given_as[own] = value, name
        elif name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                allowed = " or ".join(map(repr, UNSUPPORTED[name]))
                raise ConfigError(
                    f"{cls.__name__}: {name}={short_repr(value)} is not supported; allowed: {allowed}. Leave it out"
                    + (f"; {INSTEAD[name]}" if name in INSTEAD else "")
                )
            without_effect.append(name)
        elif name in ignored:
            without_effect.append(name)
        else:
            known = [*fields, *(alias for alias, field in ALIASES.items() if field in fields)]
            section = "lora" if "r" in fields else "training"
            raise ConfigError(
                f"{cls.__name__} has no field {name!r} (value {short_repr(value)})."
                f"{hint_at_name(name, known, section)} Allowed: {', '.join(sorted(fields))}"
            )
    return values, tuple(sorted(without_effect))


def accept_foreign_arguments(ignored: frozenset[str]) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass so that its constructor accepts foreign names, too; ``.inert`` has those without effect."""

    def decorate(cls: type[T]) -> type[T]:
        generated: Callable[..., None] = cls.__init__

        @functools.wraps(generated)
        def __init__(self: Any, /, *args: Any, **given: Any) -> None:
            values, self.inert = _translate_arguments(cls, given, ignored)
            self.given = frozenset([*field_names(cls)[: len(args)], *values])
            generated(self, *args, **values)

        cast(Any, cls).__init__ = __init__
        return cls

    return decorate
