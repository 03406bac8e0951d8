"""The two dicts of a run as dataclasses: ``LoraConfig(**peft_config)`` and ``TrainingConfig(**training_config)``.

``LoraConfig`` keeps PEFT's and loralib's names, ``TrainingConfig`` keeps transformers' (4 and 5), so dicts written for
those work as they are. A name without meaning here is accepted and kept in ``.inert`` (the run's banner lists it); a
name that exists nowhere, or a value that would have to be ignored although it matters, is a :class:`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import ConfigError, nearest
from .foreign_names import ALIASES, INERT_LORA, INERT_TRAINING, SWITCHED_OFF

T = TypeVar("T")


def _translated(cls: type, given: Mapping[str, Any], inert_names: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """``given`` in our own names, and the names that have no effect here."""
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    said_as: dict[str, str] = {}
    inert: list[str] = []
    for name, value in given.items():
        own = ALIASES.get(name, name)
        if own in known:
            if own in values and values[own] != value:
                pair = f"{said_as[own]!r} ({values[own]!r}) and {name!r} ({value!r})"
                raise ConfigError(f"{cls.__name__}: {pair} are one setting with two values; give one of them")
            values[own], said_as[own] = value, name
        elif name in SWITCHED_OFF:
            if value not in SWITCHED_OFF[name]:
                allowed = " or ".join(repr(v) for v in SWITCHED_OFF[name])
                raise ConfigError(
                    f"{cls.__name__}: {name}={value!r} is not supported; allowed: {allowed}. Leave it out."
                )
            inert.append(name)
        elif name in inert_names:
            inert.append(name)
        else:
            raise ConfigError(
                f"{cls.__name__} has no field {name!r} (value {value!r}).{nearest(name, known | set(ALIASES))} "
                f"Allowed: {', '.join(sorted(known))}"
            )
    return values, sorted(inert)


def _takes_foreign_names(inert_names: frozenset[str]):
    """Class decorator: the dataclass constructor also takes aliases and inert names, and refuses the rest nicely."""

    def decorate(cls: type[T]) -> type[T]:
        generated = cls.__init__

        @functools.wraps(generated)
        def __init__(self, *args: Any, **given: Any) -> None:
            values, inert = _translated(cls, given, inert_names)
            generated(self, *args, **values)
            self.inert = tuple(inert)

        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate


_OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd",
)  # fmt: skip
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")


def _require(ok: bool, cls: str, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{cls}: {name}={value!r}; allowed: {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@_takes_foreign_names(INERT_LORA)
@dataclass
class LoraConfig:
    """What to adapt and how; PEFT's names. ``LoraConfig(**peft_config)`` takes the seed's dict as it is.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested) or a value outside its range.
    """

    r: int = 8
    """Rank of each adapter, > 0."""
    lora_alpha: float = 8
    """The adapter's output is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``)."""
    lora_dropout: float = 0.0
    """Probability of dropping an entry of the adapter's input, in [0, 1)."""
    bias: str = "none"
    """Which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers)."""
    target_modules: str | Sequence[str] = "all-linear"
    """``"all-linear"`` (every linear layer but the output head) or a list of module-name suffixes. On Phi-3's fused
    projections ``q_proj, k_proj, v_proj`` and ``gate_proj, up_proj`` select segments."""
    task_type: str | None = "CAUSAL_LM"
    """Recorded for other tools."""
    modules_to_save: None = None
    """Only None: whole modules are not trained here."""
    use_rslora: bool = False
    """Rank-stabilised scaling, https://arxiv.org/abs/2312.03732."""
    segments: Mapping[str, Mapping[str, int] | Sequence[int]] | None = None
    """Fused layers of your own model: suffix -> widths of its segments along the output, named
    (``{"qkv": {"q": 64, "k": 16, "v": 16}}``, each name then a valid target) or not (``{"qkv": (64, 16, 16)}``)."""
    inert: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    """Names that were given and have no effect here."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            _require(ok, "LoraConfig", name, getattr(self, name), allowed)

        check(_is_count(self.r, 1), "r", "a whole number >= 1")
        check(_is_number(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "a number > 0")
        check(_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "lora_dropout", "0 <= p < 1")
        check(self.bias in ("none", "all", "lora_only"), "bias", "'none', 'all', 'lora_only'")
        check(self.modules_to_save is None, "modules_to_save", "None (whole modules are not trained here)")
        check(isinstance(self.use_rslora, bool), "use_rslora", "True or False")
        given = self.target_modules
        targets = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
        named = bool(targets) and all(isinstance(t, str) and t for t in targets)
        check(named, "target_modules", "'all-linear' or a list of module-name suffixes that is not empty")
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
        if self.segments is not None:
            self.segments = {
                suffix: dict(widths) if isinstance(widths, Mapping) else list(widths)
                for suffix, widths in self.segments.items()
            }
        if not isinstance(self.target_modules, str):
            unordered = isinstance(self.target_modules, (set, frozenset))
            self.target_modules = sorted(targets) if unordered else targets

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order; ``LoraConfig(**config.to_dict())`` is an equal config."""
        return _plain(self)


@_takes_foreign_names(INERT_TRAINING)
@dataclass
class TrainingConfig:
    """How to train; transformers' names and defaults. ``TrainingConfig(**training_config)`` takes the seed's dict.

    "steps" are optimizer steps; ``logging_steps, eval_steps, save_steps`` in (0, 1) are shares of all steps.

    Raises:
        ConfigError: an unknown name (the nearest one is suggested), a value outside its range, a contradiction.
    """

    output_dir: str = "phi3lora_output"
    """Where checkpoints, ``metrics.jsonl`` and the loss picture go."""
    overwrite_output_dir: bool = False
    """Start afresh in a folder that holds another run's checkpoints (they are deleted)."""
    per_device_train_batch_size: int = 8
    """Rows in a micro-batch: packed rows of ``max_length`` tokens, or documents with ``packing=False``."""
    per_device_eval_batch_size: int = 8
    """The same, in evaluation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in one optimizer step; the loss is the mean over all their supervised tokens together."""
    num_train_epochs: float = 3.0
    """Passes over the data, unless ``max_steps`` > 0."""
    max_steps: int = -1
    """Optimizer steps; > 0 overrides ``num_train_epochs``."""
    learning_rate: float = 5e-5
    """The peak learning rate."""
    lora_plus_lr_ratio: float | None = None
    """LoRA+, https://arxiv.org/abs/2402.12354: each B learns at ``learning_rate`` times this (16, say), A at
    ``learning_rate``. None: all at ``learning_rate``."""
    lr_scheduler_type: str = "linear"
    """``"linear"``, ``"cosine"``, ``"constant"``, ``"constant_with_warmup"``."""
    warmup_steps: float = 0
    """Steps of linear warm-up; a float in (0, 1) is a share of all steps."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps; ``warmup_steps`` > 0 takes precedence."""
    optim: str = "adamw_torch"
    """``"adamw_torch"``, ``"adamw_torch_fused"`` (both fused where torch has it), ``"sgd"``. Through bitsandbytes
    (extra ``qlora``): ``"adamw_bnb_8bit"`` or ``"adamw_8bit"``, moments of 8 bits; ``"paged_adamw_32bit"`` and
    ``"paged_adamw_8bit"``, moments that make room on a full GPU."""
    weight_decay: float = 0.0
    """Decoupled decay of the LoRA matrices; biases have none."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Clip the gradient's global 2-norm to this; 0 or less: no clipping."""
    max_nonfinite_steps: int = 5
    """Stop after this many steps in a row whose loss or gradient is NaN or infinite; each is skipped."""
    bf16: bool = False
    """bfloat16 autocast. With neither ``bf16`` nor ``fp16`` the model's own dtype decides."""
    fp16: bool = False
    """float16 autocast with a gradient scaler."""
    seed: int = 42
    """Of dropout and, without ``data_seed``, of the order of the documents."""
    data_seed: int | None = None
    """Of the order of the documents."""
    packing: bool = True
    """Fill rows of ``max_length`` with whole documents that do not see each other; False: one document a row."""
    max_length: int | None = None
    """Tokens in a row; None: the dataset's."""
    activation_checkpointing: str | bool | None = None
    """What the backward recomputes to save memory: ``"none"``, ``"selective"`` (the feed-forward parts), ``"full"``
    (whole decoder layers), ``"offload"`` (the same, and their inputs wait in host memory), or ``"auto"``: the fastest
    of them that the GPU has memory for."""
    gradient_checkpointing: bool | None = None
    """transformers' name for the same: True means ``activation_checkpointing="full"``."""
    compile: bool | None = None
    """True: ``torch.compile`` each decoder layer. False: transformers' layers as they are. None: the fastest there is,
    which on a GPU are the fused passes of model/fused_decoder.py."""
    parallel: str | None = None
    """Only None so far: one process, one device."""
    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    log_level: str = "passive"
    """``"warning"`` silences the banner; ``"error"`` and ``"critical"`` also the lines of :func:`phi3lora.doctor` that
    the run starts with."""
    disable_tqdm: bool | None = None
    """No progress bar."""
    report_to: str | Sequence[str] = "none"
    """``"none"``, ``"tensorboard"``, ``"wandb"`` or a list of them (extra ``tracking``)."""
    run_name: str | None = None
    """The run's name in the tracker."""
    eval_strategy: str = "no"
    eval_steps: float | None = None
    """None: ``logging_steps``."""
    eval_on_start: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    """Checkpoints kept, the best one always among them; None: all."""
    load_best_model_at_end: bool = False
    """Each new best is saved, and the best one's adapters are put back at the end."""
    metric_for_best_model: str | None = None
    """A metric of the evaluation, with or without ``eval_``; None: ``loss``."""
    greater_is_better: bool | None = None
    """None: False for ``loss`` and ``perplexity``, True for the others."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better metric."""
    early_stopping_threshold: float = 0.0
    """How much better counts as better."""
    continue_on_save_error: bool = False
    """A checkpoint that cannot be written (a full disk) is told and the run goes on; False: it ends the run."""
    resume_from_checkpoint: bool | str | None = False
    """False; a path; True (there must be a good checkpoint); ``"auto"`` (the newest good one, or a fresh start)."""
    resume_with_changes: bool = False
    """Resume although the data, the settings or the versions of torch and transformers are others than the
    checkpoint's; what differs is told. The run is then no longer the one that was cut, bit for bit."""
    inert: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    """Names that were given and have no effect here."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._resolve_activation_checkpointing()
        if self.bf16 and self.fp16:
            raise ConfigError("TrainingConfig: bf16=True and fp16=True exclude each other; set one of them to False")

    def _check(self, ok: bool, name: str, allowed: str) -> None:
        _require(ok, "TrainingConfig", name, getattr(self, name), allowed)

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            self._check(_is_count(getattr(self, name), 1), name, "a whole number >= 1")
        self._check(_is_count(self.max_nonfinite_steps, 1), "max_nonfinite_steps", "a whole number >= 1")
        self._check(_is_count(self.max_steps, -1), "max_steps", "a whole number; -1 to count in epochs")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            optional = value is None and name == "data_seed"
            self._check(optional or _is_count(value, 0), name, "a whole number >= 0")
        for name in ("max_length", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            self._check(value is None or _is_count(value, 1), name, "None or a whole number >= 1")
        for name in ("num_train_epochs", "adam_epsilon"):
            value = getattr(self, name)
            self._check(_is_number(value) and value > 0, name, "a number > 0")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "early_stopping_threshold"):
            value = getattr(self, name)
            self._check(_is_number(value) and value >= 0, name, "a number >= 0")
        ratio = self.lora_plus_lr_ratio
        at_least_1 = ratio is None or (_is_number(ratio) and ratio >= 1)
        self._check(at_least_1, "lora_plus_lr_ratio", "None or a number >= 1")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            value = getattr(self, name)
            self._check(_is_number(value) and 0 <= value < 1, name, "0 <= x < 1")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            optional = value is None and name == "eval_steps"
            whole = _is_number(value) and (float(value).is_integer() or value < 1) and value > 0
            self._check(optional or whole, name, "a whole number >= 1, or a share of all steps in (0, 1)")
        self._check(_is_number(self.max_grad_norm), "max_grad_norm", "a number; 0 for no clipping")

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            if isinstance(f.default, bool) and f.name != "resume_from_checkpoint":
                self._check(isinstance(getattr(self, f.name), bool), f.name, "True, False")
        self._check(self.compile in (None, True, False), "compile", "None, True, False")
        self._check(self.disable_tqdm in (None, True, False), "disable_tqdm", "None, True, False")
        self._check(self.log_level in _LOG_LEVELS, "log_level", ", ".join(map(repr, _LOG_LEVELS)))
        self._check(isinstance(self.output_dir, (str, os.PathLike)), "output_dir", "a path")
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            value = str(getattr(getattr(self, name), "value", getattr(self, name)))
            setattr(self, name, value)
            self._check(value in ("no", "steps", "epoch"), name, "'no', 'steps', 'epoch'")
        self.lr_scheduler_type = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        schedules = ("linear", "cosine", "constant", "constant_with_warmup")
        self._check(self.lr_scheduler_type in schedules, "lr_scheduler_type", ", ".join(map(repr, schedules)))
        self.optim = str(getattr(self.optim, "value", self.optim))
        self._check(self.optim in _OPTIMIZERS, "optim", ", ".join(map(repr, _OPTIMIZERS)))
        self._check(self.parallel is None, "parallel", "None (one process, one device)")
        self.output_dir = os.fspath(self.output_dir)
        if isinstance(self.resume_from_checkpoint, os.PathLike):
            self.resume_from_checkpoint = os.fspath(self.resume_from_checkpoint)
        resumable = self.resume_from_checkpoint is None or isinstance(self.resume_from_checkpoint, (bool, str))
        self._check(resumable, "resume_from_checkpoint", "False, True, 'auto', a path")
        given = self.report_to
        reports = [given] if isinstance(given, str) else given or []
        names = isinstance(reports, Iterable) and all(r in ("none", "tensorboard", "wandb") for r in reports)
        self._check(names, "report_to", "'none', 'tensorboard', 'wandb', or a list of them")
        self.report_to = [r for r in reports if r != "none"]
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.eval_strategy == "no":
            raise ConfigError(
                "TrainingConfig: load_best_model_at_end and early_stopping_patience need evaluations; "
                "set eval_strategy to 'steps' or 'epoch'"
            )

    def _resolve_activation_checkpointing(self) -> None:
        modes: dict[Any, str | None] = {None: None, True: "full", False: "none"}
        modes.update((mode, mode) for mode in ("none", "selective", "full", "offload", "auto"))
        given = self.activation_checkpointing
        known = isinstance(given, (str, bool, type(None))) and given in modes
        self._check(known, "activation_checkpointing", "'none', 'selective', 'full', 'offload', 'auto'")
        self._check(self.gradient_checkpointing in (None, True, False), "gradient_checkpointing", "None, True, False")
        mode, other = modes[given], modes[self.gradient_checkpointing]
        if mode is not None and other is not None and mode != other:
            raise ConfigError(
                f"TrainingConfig: activation_checkpointing={given!r} and gradient_checkpointing="
                f"{self.gradient_checkpointing!r} disagree; set one of them"
            )
        self.activation_checkpointing = mode or other or "none"
        self.gradient_checkpointing = self.activation_checkpointing != "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order; ``TrainingConfig(**config.to_dict())`` is an equal config."""
        return _plain(self)


def _plain(config: Any) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    return json.loads(json.dumps(values, default=list))
