"""``LoraConfig`` and ``TrainingConfig``: the settings of a run, under the names that PEFT and transformers give them.

Dicts written for those libraries work unchanged: ``LoraConfig(**peft_config)``, ``TrainingConfig(**training_config)``.
An argument without effect here is accepted and listed in ``.inert``, which ``train`` prints. An unknown argument, a
value out of range and an unsupported feature are a :class:`ConfigError` (compat.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .compat import (
    IGNORED_LORA_ARGUMENTS,
    IGNORED_TRAINING_ARGUMENTS,
    accept_foreign_arguments,
    field_names,
    hint_at_name,
)
from .display import html_facts, html_folded, one_line, text_facts
from .errors import SEED_END, ConfigError, home_path, is_int, is_number, is_path, plain_value, require

IGNORE_INDEX = -100
"""Label of a token that is not trained, as in torch and transformers. Supervised tokens have any other label."""


# --- Values


def _names(value: Any) -> list[Any]:
    """Return one name, or an iterable of names, as a list; anything else as ``[None]``, which no rule allows."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else [None]


def _are_targets(value: Any) -> bool:
    """Return whether a value is a string that may be a regular expression, or a list of names; neither is empty."""
    if isinstance(value, str):
        return _are_regexes([value])
    return bool(value) and all(isinstance(name, str) and name for name in value)


def _are_indices(values: Iterable[Any]) -> bool:
    return all(is_int(value, 0) for value in values)


def _are_regexes(values: Iterable[Any]) -> bool:
    """Return whether all values are regular expressions, and none is empty."""
    try:
        return all(isinstance(value, str) and value and re.compile(value) for value in values)
    except re.error:
        return False


def _are_segments(value: object) -> bool:
    """Return whether a value has the form of ``LoraConfig.segments``. Injection checks that the widths add up."""

    def valid(suffix: Any, widths: Any) -> bool:
        names, numbers = ([suffix, *widths], [*widths.values()]) if isinstance(widths, Mapping) else ([suffix], widths)
        are_widths = isinstance(numbers, (list, tuple)) and numbers and all(is_int(number, 1) for number in numbers)
        return all(isinstance(name, str) for name in names) and bool(are_widths)

    return isinstance(value, Mapping) and all(valid(suffix, widths) for suffix, widths in value.items())


# --- Rules

Rule = tuple[Callable[[Any], bool], str]
"""Test of a value, and the allowed values in words."""


def _optional(rule: Rule) -> Rule:
    accepts, allowed = rule
    return (lambda value: value is None or accepts(value)), f"None or {allowed}"


def _choice(*allowed: Any) -> Rule:
    """Return the rule of one of some values; 0 and 1 are none of them where True and False are."""

    def accepts(value: Any) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)

    return accepts, ", ".join(map(repr, allowed))


def _pattern(rule: Rule, what: str) -> Rule:
    """Return the rule of a dict with regular expressions as keys, whose values have a rule of their own."""

    def accepts(value: Any) -> bool:
        return isinstance(value, Mapping) and _are_regexes(value) and all(map(rule[0], value.values()))

    return accepts, f"a dict: regular expression -> {what}"


_COUNT: Rule = (lambda value: is_int(value, 1)), "a whole number >= 1"
_RANK: Rule = (lambda value: is_int(value, 1, 2**16 + 1)), "a whole number from 1 to 65,536"
_POSITIVE: Rule = (lambda value: is_number(value) and value > 0), "a number > 0"
_NOT_NEGATIVE: Rule = (lambda value: is_number(value) and value >= 0), "a number >= 0"
SHARE: Rule = (lambda value: is_number(value) and 0 <= value < 1), "0 <= x < 1"
SEED: Rule = (lambda value: is_int(value, 0, SEED_END)), "a whole number >= 0, below 2**63"
_NAME: Rule = _optional((lambda value: isinstance(value, str), "a name"))
_SWITCH: Rule = (lambda value: isinstance(value, bool)), "True, False"
_OPTIONAL_SWITCH: Rule = _choice(None, True, False)
_INTERVAL: Rule = (
    lambda value: is_number(value) and value > 0 and (value < 1 or float(value).is_integer()),
    "a whole number >= 1, or a share of all steps in (0, 1)",
)
_STRATEGY = _choice("no", "steps", "epoch")
_TARGETS: Rule = (
    _are_targets, "'all-linear', a list of module-name suffixes that is not empty, or a regular expression",
)  # fmt: skip
_NOTHING: Rule = (
    lambda value: value is None,
    "None (training whole modules is not supported; adapters on them are: target_modules)",
)
_SEGMENTS: Rule = _optional((_are_segments, "a dict: suffix -> list of widths, or name -> width"))
_EXCLUDED: Rule = _optional((_are_targets, "a list of suffixes, or a regular expression"))
_LAYERS: Rule = _optional((_are_indices, "the number of a layer, from 0, or a list of them"))
_LAYER_LISTS: Rule = _optional((_are_regexes, "a name, a regular expression, or a list of them"))
_RATIO: Rule = _optional((lambda value: is_number(value) and value >= 1, "a number >= 1"))
_ARGUMENTS: Rule = _optional((lambda value: isinstance(value, Mapping), "a dict of the schedule's arguments"))
_ROW_TOKENS: Rule = _optional((lambda value: is_int(value, 1, 2**24 + 1), "1 to 2**24; a row is allocated whole"))
_WARM_UP: Rule = _optional(
    (
        lambda value: (is_number(value) and value == 0) or _INTERVAL[0](value),
        "0, a whole number, or a share of all steps in (0, 1)",
    )
)
_TASKS = _choice(
    "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None,
)  # fmt: skip
_CHECKPOINTING = _choice("none", "selective", "full", "offload", "auto", None, True, False)
_OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd",
)  # fmt: skip
_SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
_TRACKERS = ("none", "all", "tensorboard", "wandb", "trackio", "mlflow")
_REPORT_TO: Rule = (
    lambda value: all(name in _TRACKERS for name in value),
    f"{', '.join(map(repr, _TRACKERS))}, or a list of them",
)
_START: Rule = (
    lambda value: value is None or isinstance(value, bool) or is_path(value),
    "False, True, 'auto', a path",
)
_MAX_EPOCHS = 10_000


def setting(default: Any, rule: Rule, **metadata: Any) -> Any:
    """Return a field of a dataclass with a rule for its values; ``metadata`` are further notes on it."""
    how = {"default_factory": dict} if default is dict else {"default": default}
    return field(**how, metadata={"rule": rule, **metadata})


def check_fields(settings: Any, where: str, normalised: Callable[[str, Any], Any] = lambda name, value: value) -> None:
    """Give each field of a dataclass its normalised value, or raise if its rule does not allow it."""
    for item in fields(settings):
        given = getattr(settings, item.name)
        value = normalised(item.name, plain_value(given))
        rule = item.metadata.get("rule") or (_SWITCH if item.type == "bool" else None)
        if rule is not None:
            require(rule[0](value), f"{where}{item.name}", given, rule[1], ConfigError)
        setattr(settings, item.name, value)


class _Config:
    given: frozenset[str]
    """Names of the fields that were passed to the constructor; the others have their defaults, or follow from these."""
    inert: tuple[str, ...]
    """Arguments that were given and have no effect here."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a name that is no field: nothing would read the value."""
        known = field_names(type(self))
        if name not in (*known, "given", "inert"):
            hint = hint_at_name(name, known, "lora" if "r" in known else "training")
            raise ConfigError(f"{type(self).__name__} has no field {name!r}.{hint}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        changed, _ = self._settings()
        return one_line(type(self).__name__, [f"{name}={value!r}" for name, value in changed.items()])

    def __str__(self) -> str:
        changed, others = self._settings()
        names = ", ".join(f"{name}={value}" for name, value in others.items())
        return f"{type(self).__name__}\n{text_facts({**changed, 'defaults': names})}"

    def _repr_html_(self) -> str:
        changed, others = self._settings()
        return html_facts(type(self).__name__, changed) + html_folded("defaults", html_facts("", others))

    def _settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings that differ from the defaults, and the others."""
        changed: dict[str, Any] = {}
        others: dict[str, Any] = {}
        defaults = type(self)()
        for name in field_names(type(self)):
            value = getattr(self, name)
            (others if value == getattr(defaults, name) else changed)[name] = value
        return changed, others

    def not_given(self) -> tuple[str, str]:
        """Return the settings that were not given: those that are on with their values, and the names of the others."""
        values = {name: getattr(self, name) for name in field_names(type(self)) if name not in self.given}
        off = [name for name, value in values.items() if value is None or value is False or value in ([], {})]
        on = [f"{name}={value}" for name, value in values.items() if name not in off]
        return ", ".join(on), ", ".join(off)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, in field order; ``type(config)(**config.to_dict())`` is an equal config."""
        values = {name: getattr(self, name) for name in field_names(type(self))}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=list))
        return plain


# --- The two configs


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return the factor of an adapter's output: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.

    https://arxiv.org/abs/2106.09685, section 4.1; rsLoRA: https://arxiv.org/abs/2312.03732.
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


@accept_foreign_arguments(IGNORED_LORA_ARGUMENTS)
@dataclass(repr=False)
class LoraConfig(_Config):
    """Layers to adapt, and how, under PEFT's names. ``LoraConfig(**peft_config)`` accepts a dict made for PEFT.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested) or a value outside its range.
    """

    r: int = setting(16, _RANK)
    """Rank of each adapter, >= 1."""
    lora_alpha: float = setting(32, _POSITIVE)
    """Numerator of the adapter's scale: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``. If
    it is not given, it is ``2 * r``."""
    lora_dropout: float = setting(0.0, SHARE)
    """Probability of dropping an entry of the adapter's input, in [0, 1)."""
    bias: str = setting("none", _choice("none", "all", "lora_only"))
    """Biases to train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers)."""
    target_modules: str | Sequence[str] = setting("all-linear", _TARGETS)
    """Layers to adapt: ``"all-linear"`` (every linear layer except the output head), a list of module-name suffixes, or
    a string: one suffix, or a regular expression that matches a whole path. On Phi-3's fused projections ``q_proj,
    k_proj, v_proj`` and ``gate_proj, up_proj`` select segments."""
    task_type: str | None = setting("CAUSAL_LM", _TASKS)
    """PEFT's task type, recorded for other tools."""
    modules_to_save: None = setting(None, _NOTHING)
    """Modules to train whole, which is not supported: only None is allowed."""
    use_rslora: bool = False
    """Rank-stabilised scaling, https://arxiv.org/abs/2312.03732."""
    segments: Mapping[str, Mapping[str, int] | Sequence[int]] | None = setting(None, _SEGMENTS)
    """Fused layers of your own model: suffix -> widths of its segments along the output, named
    (``{"qkv": {"q": 64, "k": 16, "v": 16}}``, each name then a valid target) or not (``{"qkv": (64, 16, 16)}``)."""
    exclude_modules: str | Sequence[str] | None = setting(None, _EXCLUDED)
    """Targets to leave out: layers and segments, named as in ``target_modules``."""
    layers_to_transform: int | Sequence[int] | None = setting(None, _LAYERS)
    """Indices of the decoder layers to adapt, from 0; None: all."""
    layers_pattern: str | Sequence[str] | None = setting(None, _LAYER_LISTS)
    """Names of the module lists that ``layers_to_transform`` counts in, such as ``"layers"``; None: the first number in
    a path is the layer's index."""
    rank_pattern: Mapping[str, int] = setting(dict, _pattern(_RANK, "rank"))
    """Ranks of certain layers: a dict from a regular expression for the end of a path, such as ``"o_proj"`` or
    ``"layers.0.mlp.down_proj"``, to a rank. The first match counts; the other layers have rank ``r``."""
    alpha_pattern: Mapping[str, float] = setting(dict, _pattern(_POSITIVE, "lora_alpha > 0"))
    """``lora_alpha`` of certain layers: a dict like ``rank_pattern``. The other layers have ``lora_alpha``."""

    def __post_init__(self) -> None:
        check_fields(self, "LoraConfig: ", self._normalised)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"LoraConfig: layers_pattern={self.layers_pattern!r} needs layers_to_transform")
        if "lora_alpha" not in self.given:
            self.lora_alpha = 2 * self.r
        if self.segments is not None:
            self.segments = {
                suffix: dict(widths) if isinstance(widths, Mapping) else list(widths)
                for suffix, widths in self.segments.items()
            }

    def _normalised(self, name: str, value: Any) -> Any:
        """Return a field's value with several names as a list, no value as None, no pattern as an empty one."""
        if name in ("rank_pattern", "alpha_pattern"):
            return {} if value is None else value
        if name == "modules_to_save":
            return None if value in ([], ()) else value
        if name in ("target_modules", "exclude_modules") and isinstance(value, str):
            return value if value or name == "target_modules" else None
        if name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            names = [value] if isinstance(value, int) else [] if value is None else _names(value)
            return names or None
        return _names(value) if name == "target_modules" else value

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output, see :func:`lora_scaling`."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)


@accept_foreign_arguments(IGNORED_TRAINING_ARGUMENTS)
@dataclass(repr=False)
class TrainingConfig(_Config):
    """Training settings, under transformers' names. ``TrainingConfig(**training_config)`` accepts a dict made for it.

    The defaults are right for LoRA; docs/training.md lists those that differ from transformers'. A step is an optimizer
    step; ``logging_steps``, ``eval_steps`` and ``save_steps`` in (0, 1) are shares of all steps.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested), a value outside its range, a contradiction.
    """

    output_dir: str = setting("phi3lora_output", (is_path, "a path"))
    """Folder for checkpoints, ``metrics.jsonl`` and ``training.png``."""
    overwrite_output_dir: bool = False
    """Delete another run's checkpoints in ``output_dir`` and start afresh."""
    per_device_train_batch_size: int = setting(8, _COUNT)
    """Rows in a micro-batch: packed rows of ``max_length`` tokens, or documents with ``packing=False``."""
    per_device_eval_batch_size: int = setting(8, _COUNT)
    """Rows in an evaluation micro-batch."""
    gradient_accumulation_steps: int = setting(1, _COUNT)
    """Micro-batches in one optimizer step; the loss is the mean over all their supervised tokens together."""
    num_train_epochs: float = setting(3.0, _POSITIVE)
    """Passes over the data, unless ``max_steps`` > 0."""
    max_steps: int = setting(-1, (lambda value: is_int(value, -1), "a whole number; -1 to count in epochs"))
    """Optimizer steps of the run; -1: ``num_train_epochs`` decides."""
    learning_rate: float = setting(2e-4, _NOT_NEGATIVE)
    """Peak learning rate."""
    lora_plus_lr_ratio: float | None = setting(None, _RATIO)
    """Learning rate of every B as a multiple of ``learning_rate``, such as 16 (LoRA+, https://arxiv.org/abs/2402.12354);
    None: A and B both learn at ``learning_rate``."""
    lr_scheduler_type: str = setting("cosine", _choice(*_SCHEDULES))
    """Schedule of the learning rate, as transformers names and computes it: ``"linear"``, ``"cosine"``,
    ``"constant"`` (no warm-up), ``"constant_with_warmup"``, ``"cosine_with_restarts"``, ``"polynomial"``,
    ``"inverse_sqrt"``, ``"cosine_with_min_lr"``, ``"cosine_warmup_with_min_lr"``, ``"warmup_stable_decay"``."""
    lr_scheduler_kwargs: Mapping[str, Any] | None = setting(None, _ARGUMENTS)
    """Further arguments of the schedule, such as ``{"min_lr": 1e-5}`` for ``"cosine_with_min_lr"``."""
    warmup_steps: float | None = setting(None, _WARM_UP)
    """Steps of linear warm-up, or a share of all steps in (0, 1); None: ``warmup_ratio`` if that is given, else 5 % of
    the steps. The 5 % are rounded down, so a run of fewer than 20 steps has no warm-up."""
    warmup_ratio: float | None = setting(None, _optional(SHARE))
    """Warm-up as a share of all steps, rounded up; ``warmup_steps`` > 0 takes precedence."""
    optim: str = setting("adamw_torch", _choice(*_OPTIMIZERS))
    """Optimizer: ``"adamw_torch"`` or ``"adamw_torch_fused"`` (both fused where torch supports it), ``"sgd"``, or with
    bitsandbytes (extra ``qlora``) ``"adamw_bnb_8bit"`` or ``"adamw_8bit"`` (8-bit moments), ``"paged_adamw_32bit"`` or
    ``"paged_adamw_8bit"`` (moments that move to host memory when the GPU is full)."""
    weight_decay: float = setting(0.0, _NOT_NEGATIVE)
    """Decoupled weight decay of the LoRA matrices; biases have none."""
    adam_beta1: float = setting(0.9, SHARE)
    """Decay of AdamW's running mean of the gradient."""
    adam_beta2: float = setting(0.999, SHARE)
    """Decay of AdamW's running mean of the squared gradient."""
    adam_epsilon: float = setting(1e-8, _POSITIVE)
    """Constant in AdamW's denominator."""
    max_grad_norm: float = setting(1.0, (is_number, "a number; 0 for no clipping"))
    """Largest global 2-norm of the gradient, to which a larger one is clipped; 0 or less: no clipping."""
    max_nonfinite_steps: int = setting(5, _COUNT)
    """Skipped steps in a row that end the run; a step with a NaN or infinite loss or gradient is skipped."""
    bf16: bool = False
    """bfloat16 autocast; with neither ``bf16`` nor ``fp16`` the model's own dtype decides."""
    fp16: bool = False
    """float16 autocast with a gradient scaler."""
    seed: int = setting(42, SEED)
    """Seed of dropout, and of the order of the documents unless ``data_seed`` is set."""
    data_seed: int | None = setting(None, _optional(SEED))
    """Seed of the order of the documents; None: ``seed``."""
    packing: bool = True
    """Fill rows of ``max_length`` tokens with whole documents, which do not see each other; False: one document a
    row."""
    max_length: int | None = setting(None, _ROW_TOKENS)
    """Tokens in a row; None: the dataset's ``max_length``."""
    activation_checkpointing: str | bool | None = setting(None, _CHECKPOINTING)
    """Activations that the backward recomputes to save memory: ``"none"``, ``"selective"`` (the feed-forward parts),
    ``"full"`` (whole decoder layers), ``"offload"`` (whole layers, whose inputs wait in host memory), or ``"auto"``:
    the fastest of these that fits the GPU."""
    gradient_checkpointing: bool | None = setting(None, _OPTIONAL_SWITCH)
    """transformers' switch for ``activation_checkpointing``: True means ``"full"``, unless that names another mode, and
    False ``"none"``."""
    compile: bool | None = setting(None, _OPTIONAL_SWITCH)
    """Use of ``torch.compile``: True compiles transformers' decoder layers, False runs them as they are, None uses the
    fused kernels on a GPU where they support the model, and else transformers' layers as they are."""
    parallel: str | None = setting("auto", _choice("auto", "ddp", "fsdp", None))
    """Base in a run of several processes (torchrun): ``"ddp"`` (whole in each process), ``"fsdp"`` (split over them) or
    ``"auto"`` (as the model was loaded). None is ``"auto"``. With one process the setting has no effect."""
    logging_strategy: str = setting("steps", _STRATEGY)
    """When to log: ``"no"`` (never), ``"steps"`` (every ``logging_steps``) or ``"epoch"`` (after each epoch)."""
    logging_steps: float = setting(10, _INTERVAL)
    """Steps between two log lines."""
    logging_first_step: bool = False
    """Log the first step, too."""
    log_level: str = setting("passive", _choice("passive", "detail", "debug", "info", "warning", "error", "critical"))
    """Verbosity: ``"warning"`` silences the banner and the log lines; ``"error"`` and ``"critical"`` also silence the
    findings of :func:`phi3lora.doctor` at the start of a run."""
    disable_tqdm: bool | None = setting(None, _OPTIONAL_SWITCH)
    """True: no progress bar; False: a progress bar everywhere; None: a progress bar in a terminal only."""
    report_to: str | Sequence[str] = setting("none", _REPORT_TO)
    """Trackers: ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"mlflow"``, a list of them, ``"all"`` (those that are
    installed) or ``"none"`` (extra ``tracking``)."""
    run_name: str | None = setting(None, _NAME)
    """Name of the run in the trackers; None: they choose one."""
    project: str = setting("phi3lora", ((lambda value: isinstance(value, str) and value != ""), "a name"))
    """Project of the run in wandb (unless ``WANDB_PROJECT`` is set) and Trackio, and its experiment in MLflow."""
    eval_strategy: str = setting("no", _STRATEGY)
    """When to evaluate: ``"no"`` (never), ``"steps"`` (every ``eval_steps``) or ``"epoch"`` (after each epoch)."""
    eval_steps: float | None = setting(0.1, _optional(_INTERVAL))
    """Steps between two evaluations, or a share of all steps in (0, 1). None, or not given while ``logging_steps`` is:
    ``logging_steps``."""
    predict_with_generate: bool = False
    """Let the model answer in each evaluation, and score the answers by ROUGE (``eval_rouge1``, ``eval_rouge2``,
    ``eval_rougeL``). It also answers if ``metric_for_best_model`` is a ROUGE, and for ``compute_metrics``."""
    eval_max_samples: int | None = setting(100, _optional(_COUNT))
    """Chats to answer in an evaluation, from the first; None: all."""
    eval_max_new_tokens: int = setting(256, _COUNT)
    """Longest answer in an evaluation, in tokens."""
    eval_on_start: bool = False
    """Evaluate before the first step, too."""
    save_strategy: str = setting("steps", _STRATEGY)
    """When to save a checkpoint: ``"no"`` (never), ``"steps"`` (every ``save_steps``) or ``"epoch"`` (after each
    epoch)."""
    save_steps: float = setting(500, _INTERVAL)
    """Steps between two checkpoints."""
    save_total_limit: int | None = setting(None, _optional(_COUNT))
    """Number of checkpoints to keep, the best one always among them; None: all."""
    load_best_model_at_end: bool = False
    """Restore the best adapter at the end; until then each new best one is saved as a checkpoint."""
    metric_for_best_model: str | None = setting(None, _NAME)
    """Metric that decides which adapter is best, with or without ``eval_``: ``loss``, ``perplexity``,
    ``token_accuracy``, ``rouge1``, ``rouge2``, ``rougeL``, or one that ``compute_metrics`` returns; None: ``loss``."""
    greater_is_better: bool | None = setting(None, _OPTIONAL_SWITCH)
    """True if a larger metric is better; None: False for ``perplexity`` and names that end in ``loss``, True for the
    others."""
    early_stopping_patience: int | None = setting(None, _optional(_COUNT))
    """Evaluations in a row without a better metric after which the run ends; None: no early stopping."""
    early_stopping_threshold: float = setting(0.0, _NOT_NEGATIVE)
    """Smallest improvement of the metric that counts as better."""
    continue_on_save_error: bool = False
    """Continue when a checkpoint cannot be written (a full disk, say); False: the error ends the run."""
    resume_from_checkpoint: bool | str | None = setting(False, _START)
    """Start of the run: False (from scratch), True (the newest good checkpoint, which must exist), ``"auto"`` (the
    newest good one, or from scratch if there is none), or a checkpoint's path."""
    resume_with_changes: bool = False
    """Resume even if the data, the settings or the versions of torch and transformers differ from the checkpoint's. The
    differences are reported, and the run no longer equals the interrupted one bit for bit."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None or self.warmup_ratio is not None:
            self.warmup_steps = 0 if self.warmup_steps is None else self.warmup_steps
            self.warmup_ratio = 0.0 if self.warmup_ratio is None else self.warmup_ratio
        if "logging_steps" in self.given and "eval_steps" not in self.given:
            self.eval_steps = None
        check_fields(self, "TrainingConfig: ", self._normalised)
        self.report_to = [name for name in self.report_to if name != "none"]
        if self.max_steps <= 0:
            allowed = f"at most {_MAX_EPOCHS:,}; set max_steps for a longer run"
            epochs = self.num_train_epochs
            require(epochs <= _MAX_EPOCHS, "TrainingConfig: num_train_epochs", epochs, allowed, ConfigError)
        self._resolve_activation_checkpointing()
        if self.bf16 and self.fp16:
            raise ConfigError("TrainingConfig: bf16=True and fp16=True are mutually exclusive; set one to False")
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.eval_strategy == "no":
            raise ConfigError(
                "TrainingConfig: load_best_model_at_end and early_stopping_patience need evaluations; "
                "set eval_strategy to 'steps' or 'epoch'"
            )

    def _normalised(self, name: str, value: Any) -> Any:
        if name == "report_to":
            return [] if value is None else _names(value)
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return home_path(value) if name in ("output_dir", "resume_from_checkpoint") else value

    def _resolve_activation_checkpointing(self) -> None:
        """Make ``activation_checkpointing`` and ``gradient_checkpointing``, its switch, agree."""
        mode, switch = self.activation_checkpointing, self.gradient_checkpointing
        if isinstance(mode, bool):
            mode = "full" if mode else "none"
        if mode is not None and switch is not None and switch != (mode != "none"):
            raise ConfigError(
                f"TrainingConfig: activation_checkpointing={self.activation_checkpointing!r} and "
                f"gradient_checkpointing={switch!r} disagree; set one of them"
            )
        self.activation_checkpointing = mode or ("full" if switch else "none")
        self.gradient_checkpointing = self.activation_checkpointing != "none"
        names = {"activation_checkpointing", "gradient_checkpointing"}
        if names & self.given:
            self.given |= names
