"""Other libraries' names for settings: PEFT's ``LoraConfig``, transformers' ``TrainingArguments`` (4 and 5), TRL's.

One table, so that dicts written for them work as they are. A name is ours, an alias, without effect here, or off.
"""

from __future__ import annotations

from typing import Any

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "torch_compile": "compile",
    "loraplus_lr_ratio": "lora_plus_lr_ratio",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
}
"""Another name for a field of ours."""

INERT_TRAINING = frozenset(
    """
    accelerator_config activation_checkpointing_kwargs average_tokens_across_devices batch_eval_metrics
    bf16_full_eval dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_kwargs dataset_num_proc dataset_text_field ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug do_eval do_predict do_train
    eval_accumulation_steps eval_do_concat_batches eval_packing eval_use_gather_object fp16_backend fp16_full_eval
    fp16_opt_level full_determinism gradient_checkpointing_kwargs group_by_length half_precision_backend
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token include_for_metrics
    include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second jit_mode_eval label_names
    length_column_name liger_kernel_config local_rank log_level_replica log_on_each_node logging_dir
    logging_nan_inf_filter no_cuda past_index prediction_loss_only project ray_scope remove_unused_columns
    restore_callback_states_from_checkpoint save_on_each_node save_safetensors skip_memory_metrics split_batches
    tf32 torch_compile_backend torch_compile_mode torch_empty_cache_steps torchdynamo trackio_bucket_id
    trackio_space_id trackio_static_space_id use_cache use_cpu use_ipex use_legacy_prediction_loop use_liger_kernel
    use_mps_device
    """.split()
)
"""Names that say nothing to this library, whatever their value."""

INERT_LORA = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config inference_mode layers_pattern loftq_config
    megatron_config megatron_core peft_type peft_version qalora_group_size revision runtime_config
    """.split()
)
"""The same, of PEFT's."""

SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "label_smoothing_factor": (0, 0.0, None),
    "neftune_noise_alpha": (None,),
    "deepspeed": (None,),
    "fsdp": (None, "", [], False),
    "fsdp_config": (None, {}),
    "parallelism_config": (None,),
    "push_to_hub": (False, None),
    "auto_find_batch_size": (False, None),
    "optim_args": (None, ""),
    "optim_target_modules": (None,),
    "lr_scheduler_kwargs": (None, {}),
    "enable_jit_checkpoint": (False, None),
    "save_only_model": (False, None),
    "ignore_data_skip": (False, None),
    "eval_delay": (0, None),
    "train_sampling_strategy": ("random", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "exclude_modules": (None, [], ""),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "init_lora_weights": (True, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "modules_to_save": (None,),
}
"""Names that would change the result: accepted only at the values that switch them off."""
