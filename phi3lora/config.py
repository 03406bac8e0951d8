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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from .compat import ALIASES, INERT_LORA, INERT_TRAINING, SWITCHED_OFF
from .errors import (
    SEED_END,
    ConfigError,
    did_you_mean,
    equals,
    is_int,
    is_number,
    is_one_of,
    is_path,
    is_text,
    short_repr,
)

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
            if own in values and not equals(values[own], value):
                pair = f"{said_as[own]!r} ({short_repr(values[own])}) and {name!r} ({short_repr(value)})"
                raise ConfigError(f"{cls.__name__}: {pair} are one setting with two values; give one of them")
            values[own], said_as[own] = value, name
        elif name in SWITCHED_OFF:
            if not is_one_of(value, SWITCHED_OFF[name]):
                allowed = " or ".join(repr(v) for v in SWITCHED_OFF[name])
                raise ConfigError(
                    f"{cls.__name__}: {name}={short_repr(value)} is not supported; allowed: {allowed}. Leave it out."
                )
            inert.append(name)
        elif name in inert_names:
            inert.append(name)
        else:
            raise ConfigError(
                f"{cls.__name__} has no field {short_repr(name)} (value {short_repr(value)})."
                f"{did_you_mean(name, known | set(ALIASES))} Allowed: {', '.join(sorted(known))}"
            )
    return values, sorted(inert)


def _takes_foreign_names(inert_names: frozenset[str]):
    """Class decorator: the dataclass constructor also takes aliases and inert names, and refuses the rest nicely."""

    def decorate(cls: type[T]) -> type[T]:
        generated = cls.__init__

        @functools.wraps(generated)
        def __init__(self, /, *args: Any, **given: Any) -> None:
            values, inert = _translated(cls, given, inert_names)
            generated(self, *args, **values)
            self.inert = tuple(inert)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


_OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd",
)  # fmt: skip
_LONGEST_ROW = 2**24
_MOST_EPOCHS = 10_000
_MOST_NAMES = 100_000
_CHOICES: dict[str, tuple[str, ...]] = {
    "log_level": ("passive", "detail", "debug", "info", "warning", "error", "critical"),
    "logging_strategy": ("no", "steps", "epoch"),
    "eval_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
    "optim": _OPTIMIZERS,
}


def _require(ok: bool, cls: str, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{cls}: {name}={short_repr(value)}; allowed: {allowed}")


def _plain_name(value: object) -> object:
    """The name of an enum's member (transformers has enums for its choices), else the value."""
    name = getattr(value, "value", value)
    return str(name) if isinstance(name, str) else name


def _are_segments(value: object) -> bool:
    """The form of ``LoraConfig.segments``; whether the widths add up is seen at the layer."""
    if not isinstance(value, Mapping):
        return False
    for suffix, widths in value.items():
        named = isinstance(widths, Mapping) and all(is_text(name) for name in widths)
        numbers = list(widths.values()) if isinstance(widths, Mapping) else widths
        listed = isinstance(numbers, (list, tuple)) and len(numbers) > 0 and all(is_int(n, 1) for n in numbers)
        if not (is_text(suffix) and listed and (named or not isinstance(widths, Mapping))):
            return False
    return True


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

        check(is_int(self.r, 1), "r", "a whole number >= 1")
        check(is_number(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "a number > 0")
        check(is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "lora_dropout", "0 <= p < 1")
        check(is_one_of(self.bias, ("none", "all", "lora_only")), "bias", "'none', 'all', 'lora_only'")
        check(self.modules_to_save is None, "modules_to_save", "None (whole modules are not trained here)")
        check(isinstance(self.use_rslora, bool), "use_rslora", "True or False")
        given = self.target_modules
        listed = isinstance(given, Iterable) and not isinstance(given, Mapping)
        targets = [given] if isinstance(given, str) else list(islice(given, _MOST_NAMES)) if listed else []
        named = bool(targets) and all(is_text(t) and t for t in targets)
        check(named, "target_modules", "'all-linear' or a list of module-name suffixes that is not empty")
        if not isinstance(given, str):
            self.target_modules = sorted(targets) if isinstance(given, (set, frozenset)) else targets
        self.task_type = _plain_name(self.task_type)  # type: ignore[assignment]
        check(self.task_type is None or is_text(self.task_type), "task_type", "None or a name")
        if self.segments is not None:
            check(_are_segments(self.segments), "segments", "suffix -> positive widths, a list or a dict of names")
            self.segments = {
                suffix: dict(widths) if isinstance(widths, Mapping) else list(widths)
                for suffix, widths in self.segments.items()
            }

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
            self._check(is_int(getattr(self, name), 1), name, "a whole number >= 1")
        self._check(is_int(self.max_nonfinite_steps, 1), "max_nonfinite_steps", "a whole number >= 1")
        self._check(is_int(self.max_steps, -1), "max_steps", "a whole number; -1 to count in epochs")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            optional = value is None and name == "data_seed"
            self._check(optional or is_int(value, 0, SEED_END), name, "a whole number >= 0, below 2**63")
        for name in ("max_length", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            self._check(value is None or is_int(value, 1), name, "None or a whole number >= 1")
        longest = self.max_length or 1
        self._check(longest <= _LONGEST_ROW, "max_length", f"at most {_LONGEST_ROW:,}: a row is made whole")
        epochs = self.num_train_epochs  # each of which is planned before the first step
        ok = is_number(epochs) and epochs > 0 and (epochs <= _MOST_EPOCHS or self.max_steps > 0)
        self._check(ok, "num_train_epochs", f"a number > 0, at most {_MOST_EPOCHS:,}; max_steps says how long beyond")
        self._check(is_number(self.adam_epsilon) and self.adam_epsilon > 0, "adam_epsilon", "a number > 0")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "early_stopping_threshold"):
            value = getattr(self, name)
            self._check(is_number(value) and value >= 0, name, "a number >= 0")
        ratio = self.lora_plus_lr_ratio
        at_least_1 = ratio is None or (is_number(ratio) and ratio >= 1)
        self._check(at_least_1, "lora_plus_lr_ratio", "None or a number >= 1")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            value = getattr(self, name)
            self._check(is_number(value) and 0 <= value < 1, name, "0 <= x < 1")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            optional = value is None and name == "eval_steps"
            whole = is_number(value) and (float(value).is_integer() or value < 1) and value > 0
            self._check(optional or whole, name, "a whole number >= 1, or a share of all steps in (0, 1)")
        self._check(is_number(self.max_grad_norm), "max_grad_norm", "a number; 0 for no clipping")

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            if isinstance(f.default, bool) and f.name != "resume_from_checkpoint":
                self._check(isinstance(getattr(self, f.name), bool), f.name, "True, False")
        for name in ("compile", "disable_tqdm", "gradient_checkpointing", "greater_is_better"):
            self._check(is_one_of(getattr(self, name), (None, True, False)), name, "None, True, False")
        for name, allowed in _CHOICES.items():
            value = _plain_name(getattr(self, name))
            self._check(is_one_of(value, allowed), name, ", ".join(map(repr, allowed)))
            setattr(self, name, value)
        for name in ("run_name", "metric_for_best_model"):
            value = getattr(self, name)
            self._check(value is None or is_text(value), name, "None or a name")
        self._check(self.parallel is None, "parallel", "None (one process, one device)")
        self._check(is_path(self.output_dir), "output_dir", "a path")
        self.output_dir = os.fspath(self.output_dir)
        given = self.resume_from_checkpoint
        self._check(
            given is None or isinstance(given, bool) or is_path(given),
            "resume_from_checkpoint",
            "False, True, 'auto', a path",
        )
        self.resume_from_checkpoint = os.fspath(given) if isinstance(given, os.PathLike) else given
        self._check_reports()
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.eval_strategy == "no":
            raise ConfigError(
                "TrainingConfig: load_best_model_at_end and early_stopping_patience need evaluations; "
                "set eval_strategy to 'steps' or 'epoch'"
            )

    def _check_reports(self) -> None:
        given = () if self.report_to is None else self.report_to
        reports = [given] if isinstance(given, str) else list(given) if isinstance(given, Collection) else [None]
        names = all(is_one_of(r, ("none", "tensorboard", "wandb")) for r in reports)
        self._check(names, "report_to", "'none', 'tensorboard', 'wandb', or a list of them")
        self.report_to = [r for r in reports if r != "none"]

    def _resolve_activation_checkpointing(self) -> None:
        modes: dict[Any, str | None] = {None: None, True: "full", False: "none"}
        modes.update((mode, mode) for mode in ("none", "selective", "full", "offload", "auto"))
        given = self.activation_checkpointing
        known = isinstance(given, (str, bool, type(None))) and given in modes
        self._check(known, "activation_checkpointing", "'none', 'selective', 'full', 'offload', 'auto'")
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
