"""The two configs: dicts written for PEFT and transformers as they are, every bound, and nothing ignored in silence."""

import dataclasses
import enum
import itertools
import json
import pathlib

import numpy as np
import pytest
import transformers

from phi3lora.compat import ALIASES, IGNORED_LORA_ARGUMENTS, IGNORED_TRAINING_ARGUMENTS, UNSUPPORTED
from phi3lora.config import LoraConfig, TrainingConfig
from phi3lora.errors import ConfigError

PEFT_CONFIG = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": "all-linear", "modules_to_save": None,
}  # fmt: skip
TRAINING_CONFIG = {
    "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
    "logging_strategy": "steps", "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1,
    "output_dir": "./checkpoint_dir", "overwrite_output_dir": True, "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4, "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1,
    "seed": 0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1, "warmup_ratio": 0.2,
}  # fmt: skip


def refusal(cls, *args, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        cls(*args, **values)
    return str(caught.value)


def fields_of(cls) -> dict:
    """Name -> default, of a dataclass's constructor."""
    made = {}
    for f in dataclasses.fields(cls):
        if f.init:
            made[f.name] = f.default_factory() if f.default is dataclasses.MISSING else f.default
    return made


def test_the_peft_dict_is_taken_as_it_is():
    config = LoraConfig(**PEFT_CONFIG)
    assert {name: getattr(config, name) for name in PEFT_CONFIG} == PEFT_CONFIG
    assert config.inert == ()
    assert config.scaling == 2.0


def test_the_training_dict_is_taken_as_it_is():
    config = TrainingConfig(**TRAINING_CONFIG)
    inert = ("do_eval", "gradient_checkpointing_kwargs", "remove_unused_columns")
    assert config.inert == inert
    kept = {name: value for name, value in TRAINING_CONFIG.items() if name not in inert}
    assert {name: getattr(config, name) for name in kept} == kept
    assert config.activation_checkpointing == "full"


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


# What else is written for these two names


DIFFERENT_DEFAULTS = {
    "output_dir": "transformers has none; ours has a name of its own",
    "optim": "adamw_torch is fused wherever torch can, which transformers calls adamw_torch_fused",
    "resume_from_checkpoint": "False and None both mean a fresh start",
}


def test_shared_names_have_transformers_defaults():
    theirs, ours = fields_of(transformers.TrainingArguments), fields_of(TrainingConfig)
    shared = theirs.keys() & ours.keys() - DIFFERENT_DEFAULTS.keys()
    assert {
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
        "num_train_epochs", "max_steps", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2",
        "adam_epsilon", "max_grad_norm", "warmup_steps", "logging_steps", "logging_strategy", "save_steps",
        "save_strategy", "save_total_limit", "eval_strategy", "eval_steps", "seed", "data_seed", "bf16", "fp16",
    } <= shared  # fmt: skip

    def plain(name, value):
        value = value.value if isinstance(value, enum.Enum) else value
        return bool(value) if name == "gradient_checkpointing" else value  # False there, None since 5.2x

    assert {name: plain(name, ours[name]) for name in shared} == {name: plain(name, theirs[name]) for name in shared}


@pytest.mark.parametrize("name", fields_of(transformers.TrainingArguments))
def test_every_name_of_transformers_is_known_at_its_default(name):
    try:
        TrainingConfig(**{name: fields_of(transformers.TrainingArguments)[name]})
    except ConfigError as error:
        assert "has no field" not in str(error)
        assert "allowed" in str(error), "refused on purpose: the message says what is allowed"


def test_a_whole_dict_of_transformers_arguments_is_taken(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", learning_rate=3e-4)
    config = TrainingConfig(**arguments.to_dict())
    assert (config.learning_rate, config.output_dir, config.lr_scheduler_type) == (3e-4, str(tmp_path), "linear")


def peft_fields() -> dict:
    try:
        import peft
    except ImportError:
        return {"(peft is not installed)": None}
    return fields_of(peft.LoraConfig)


@pytest.mark.parametrize("name", peft_fields())
def test_every_name_of_peft_is_known_at_its_default(name):
    pytest.importorskip("peft")
    try:
        LoraConfig(**{name: peft_fields()[name]})
    except ConfigError as error:
        assert "has no field" not in str(error)
        assert "allowed" in str(error)


def test_a_whole_dict_of_a_peft_config_is_taken():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["o_proj", "qkv_proj"])
    config = LoraConfig(**theirs.to_dict())
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, ["o_proj", "qkv_proj"])
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")


def test_shared_names_have_peft_s_defaults():
    pytest.importorskip("peft")
    shared = ("r", "lora_alpha", "lora_dropout", "bias", "modules_to_save", "use_rslora")
    assert {name: fields_of(LoraConfig)[name] for name in shared} == {name: peft_fields()[name] for name in shared}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_its_field_and_may_stand_beside_it_only_in_agreement(alias):
    name = ALIASES[alias]
    value, other = {
        "eval_strategy": ("epoch", "steps"), "compile": (True, False), "max_length": (128, 64),
        "lora_plus_lr_ratio": (16, 8),
    }[name]  # fmt: skip
    config = TrainingConfig(**{alias: value})
    assert getattr(config, name) == value
    assert config.inert == ()
    assert TrainingConfig(**{alias: value, name: value}) == config
    message = refusal(TrainingConfig, **{alias: value, name: other})
    assert repr(alias) in message
    assert repr(name) in message


@pytest.mark.parametrize(
    ("cls", "names"),
    [(TrainingConfig, IGNORED_TRAINING_ARGUMENTS), (LoraConfig, IGNORED_LORA_ARGUMENTS)],
    ids=["training", "lora"],
)
def test_an_inert_name_is_taken_at_any_value_listed_and_changes_nothing(cls, names):
    for name in names:
        for value in (None, True, 3, "anything", {"a": [1]}):
            config = cls(**{name: value})
            assert config.inert == (name,)
            assert config == cls()
            assert name not in config.to_dict()
    assert cls(**dict.fromkeys(names)).inert == tuple(sorted(names))


def test_inert_names_of_one_config_are_unknown_to_the_other():
    assert "has no field 'do_eval'" in refusal(LoraConfig, do_eval=True)
    assert "has no field 'loftq_config'" in refusal(TrainingConfig, loftq_config={})


SWITCHED_ON = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "fsdp": True, "push_to_hub": True, "eval_delay": 1,
    "auto_find_batch_size": True, "save_only_model": True, "ignore_data_skip": True, "use_dora": True,
    "lora_bias": True, "fan_in_fan_out": True, "rank_pattern": {"o_proj": 4}, "alpha_pattern": {"o_proj": 4},
    "layers_to_transform": [0], "exclude_modules": ["o_proj"], "init_lora_weights": False, "use_qalora": True,
    "deepspeed": "ds.json", "lr_scheduler_kwargs": {"num_cycles": 2}, "train_sampling_strategy": "group_by_length",
    "trainable_token_indices": [3], "layer_replication": [[0, 2]], "target_parameters": ["weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in UNSUPPORTED if n not in fields_of(LoraConfig)])
def test_a_name_that_would_change_the_result_is_taken_only_switched_off(name):
    for cls in (LoraConfig, TrainingConfig):
        for value in UNSUPPORTED[name]:
            config = cls(**{name: value})
            assert config.inert == (name,)
            assert config == cls()
        on = SWITCHED_ON.get(name, "switched on")
        message = refusal(cls, **{name: on})
        assert f"{name}={on!r} is not supported" in message
        assert all(repr(value) in message for value in UNSUPPORTED[name])


def test_whole_modules_are_not_trained_and_modules_to_save_is_refused():
    assert "modules_to_save=['lm_head']" in refusal(LoraConfig, modules_to_save=["lm_head"])
    assert "modules_to_save=['lm_head']" in refusal(TrainingConfig, modules_to_save=["lm_head"])


def test_no_name_stands_in_two_tables():
    own = fields_of(LoraConfig).keys() | fields_of(TrainingConfig).keys()
    tables = [
        IGNORED_TRAINING_ARGUMENTS,
        IGNORED_LORA_ARGUMENTS,
        UNSUPPORTED.keys() - {"modules_to_save"},
        ALIASES.keys(),
        own,
    ]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(ALIASES.values()) <= own


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        (TrainingConfig, "learning_rat", "learning_rate"),
        (TrainingConfig, "lerning_rate", "learning_rate"),
        (TrainingConfig, "evaluation_strateg", "evaluation_strategy"),
        (LoraConfig, "lora_alhpa", "lora_alpha"),
        (LoraConfig, "target_module", "target_modules"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one_and_the_list(cls, name, meant):
    message = refusal(cls, **{name: 1})
    assert f"{cls.__name__} has no field {name!r} (value 1)." in message
    assert f"Did you mean {meant!r}?" in message
    assert all(field in message for field in fields_of(cls))


def test_a_name_like_nothing_gets_no_suggestion():
    message = refusal(TrainingConfig, zzzzzz=1)
    assert "has no field 'zzzzzz'" in message
    assert "Did you mean" not in message
    assert "has no field 'inert'" in refusal(TrainingConfig, inert=("bf16",))


# Every bound: name -> (values taken, values refused)


NAN, INF = float("nan"), float("inf")
COUNT = ([1, 7], [0, -1, 1.5, True, "1", None, NAN])
COUNT_OR_NONE = ([None, 1, 7], [0, -1, 1.5, True, "1"])
POSITIVE = ([1e-12, 3, 0.5], [0, -1, NAN, INF, "1", True, None])
NOT_NEGATIVE = ([0, 1e-5, 3], [-1e-9, NAN, INF, "1", True, None])
SHARE = ([0, 0.5, 0.999], [1, -0.1, NAN, "0.5", None])
STEPS = ([1, 20, 500.0, 0.1, 0.999], [0, -1, 1.5, NAN, INF, "10", True])
STRATEGY = (["no", "steps", "epoch"], ["never", "", None, 1, "best"])
TRAINING_BOUNDS = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "max_nonfinite_steps": COUNT,
    "max_length": COUNT_OR_NONE,
    "save_total_limit": COUNT_OR_NONE,
    "max_steps": ([-1, 0, 9], [-2, 1.5, True, "9", None]),
    "num_train_epochs": POSITIVE,
    "adam_epsilon": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "lora_plus_lr_ratio": ([None, 1, 16.0], [0.5, 0, -1, NAN, INF, "16", True]),
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "early_stopping_threshold": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "warmup_ratio": SHARE,
    "max_grad_norm": ([-1, 0, 0.5, 3], [NAN, INF, "1", None]),
    "seed": ([0, 42], [-1, 1.5, True, None, "1"]),
    "data_seed": ([None, 0, 42], [-1, 1.5, True, "1"]),
    "logging_steps": (STEPS[0], [*STEPS[1], None]),
    "save_steps": (STEPS[0], [*STEPS[1], None]),
    "eval_steps": ([*STEPS[0], None], STEPS[1]),
    "logging_strategy": STRATEGY,
    "eval_strategy": STRATEGY,
    "save_strategy": STRATEGY,
    "lr_scheduler_type": (["linear", "cosine", "constant", "constant_with_warmup"], ["polynomial", "", None, 1]),
    "optim": (
        "adamw_torch adamw_torch_fused sgd adamw_bnb_8bit adamw_8bit paged_adamw_32bit paged_adamw_8bit".split(),
        ["paged_adamw", "adafactor", "", None],
    ),
    "parallel": ([None], ["ddp", True]),
    "report_to": ([["wandb"], ["tensorboard", "wandb"]], ["mlflow", ["wandb", "mlflow"], 5]),
    "resume_from_checkpoint": ([False, True, None, "auto", "runs/checkpoint-5"], [1.5, ["a"]]),
    "activation_checkpointing": (["none", "full"], ["some", 3, ["full"]]),
    "gradient_checkpointing": ([True, False], ["yes", 3, ["full"]]),
    "compile": ([True, False, None], ["yes", 3, [True]]),
    "output_dir": (["runs/a"], [None, 5]),
    "log_level": (["passive", "info", "error"], ["loud"]),
}
LORA_BOUNDS = {
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "bias": (["none", "all", "lora_only"], ["some", "", None, True]),
    "use_rslora": ([True, False], ["yes", None, 1]),
    "target_modules": (["all-linear", "o_proj", ["qkv_proj", "o_proj"]], ["", [], None, [""], ["o_proj", 3], 5]),
    "modules_to_save": ([None], [["lm_head"], "lm_head"]),
    "task_type": (["CAUSAL_LM", None], []),
}
BOUNDS = [(TrainingConfig, *item) for item in TRAINING_BOUNDS.items()]
BOUNDS += [(LoraConfig, *item) for item in LORA_BOUNDS.items()]
each_bound = pytest.mark.parametrize(("cls", "name", "values"), BOUNDS, ids=[bound[1] for bound in BOUNDS])


@each_bound
def test_values_within_the_bounds_are_kept(cls, name, values):
    for value in values[0]:
        assert getattr(cls(**{name: value}), name) == value


@each_bound
def test_values_outside_the_bounds_are_refused_by_name_and_with_what_is_allowed(cls, name, values):
    for value in values[1]:
        message = refusal(cls, **{name: value})
        assert name in message, value
        assert "allowed" in message, value


SWITCHES = [name for name, default in fields_of(TrainingConfig).items() if isinstance(default, bool)]


@pytest.mark.parametrize("name", [n for n in SWITCHES if n != "resume_from_checkpoint"])
def test_a_switch_is_true_or_false_and_not_a_word_that_counts_as_true(name):
    """``overwrite_output_dir="false"`` from a YAML file or a command line must not delete checkpoints."""
    options = {"eval_strategy": "epoch"} if name == "load_best_model_at_end" else {}
    for value in (True, False):
        assert getattr(TrainingConfig(**{name: value}, **options), name) is value
    message = refusal(TrainingConfig, **{name: "false"}, **options)
    assert f"{name}='false'" in message


def test_every_field_has_a_bound_in_these_tables():
    untested = {"disable_tqdm", "run_name", "metric_for_best_model", "greater_is_better", "early_stopping_patience"}
    assert TRAINING_BOUNDS.keys() | set(SWITCHES) | untested == fields_of(TrainingConfig).keys()
    assert LORA_BOUNDS.keys() | {"segments"} == fields_of(LoraConfig).keys()


# Settings that belong together


def test_bf16_and_fp16_exclude_each_other():
    message = refusal(TrainingConfig, bf16=True, fp16=True)
    assert "bf16=True and fp16=True" in message
    assert TrainingConfig(bf16=True).bf16
    assert TrainingConfig(fp16=True, bf16=False).fp16


@pytest.mark.parametrize("activation", [None, "none", "full", False, True])
@pytest.mark.parametrize("gradient", [None, False, True])
def test_the_two_names_of_activation_checkpointing_agree_or_are_refused(activation, gradient):
    values = {"activation_checkpointing": activation, "gradient_checkpointing": gradient}
    said = {None: None, False: False, True: True, "none": False, "full": True}
    wanted = {said[activation], said[gradient]} - {None}
    if len(wanted) == 2:
        assert "disagree" in refusal(TrainingConfig, **values)
        return
    config = TrainingConfig(**values)
    on = True in wanted
    assert (config.activation_checkpointing, config.gradient_checkpointing) == ("full" if on else "none", on)


@pytest.mark.parametrize("values", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}], ids=str)
def test_the_best_model_needs_evaluations(values):
    assert "eval_strategy" in refusal(TrainingConfig, **values)
    assert TrainingConfig(**values, eval_strategy="epoch").eval_strategy == "epoch"


@pytest.mark.parametrize("value", ["none", None, [], ["none"]], ids=repr)
def test_no_tracker_has_many_spellings(value):
    assert TrainingConfig(report_to=value).report_to == []
    assert TrainingConfig(report_to="wandb").report_to == ["wandb"]


def test_transformers_enums_and_paths_become_plain_text():
    config = TrainingConfig(
        output_dir=pathlib.Path("runs") / "a",
        resume_from_checkpoint=pathlib.Path("runs/b"),
        lr_scheduler_type=transformers.SchedulerType.COSINE,
        eval_strategy=transformers.trainer_utils.IntervalStrategy.EPOCH,
    )
    texts = (config.output_dir, config.resume_from_checkpoint, config.lr_scheduler_type, config.eval_strategy)
    assert texts == (str(pathlib.Path("runs/a")), str(pathlib.Path("runs/b")), "cosine", "epoch")
    assert all(type(text) is str for text in texts)


def test_a_set_of_targets_gets_an_order():
    assert LoraConfig(target_modules={"v_proj", "k_proj", "q_proj"}).target_modules == ["k_proj", "q_proj", "v_proj"]
    assert LoraConfig(target_modules=("v_proj", "k_proj")).target_modules == ["v_proj", "k_proj"]


# The constructor and back to a dict


def test_the_first_fields_may_be_given_by_position():
    assert LoraConfig(16, 32, 0.05) == LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    assert TrainingConfig("runs/a", True).overwrite_output_dir is True
    assert TrainingConfig("runs/a", do_eval=True).inert == ("do_eval",)
    with pytest.raises(TypeError, match="multiple values"):
        LoraConfig(16, r=8)
    assert "r=0" in refusal(LoraConfig, 0)


ROUND_TRIPS = [
    LoraConfig(),
    LoraConfig(**PEFT_CONFIG),
    LoraConfig(r=3, lora_alpha=0.5, bias="lora_only", target_modules={"q_proj", "o_proj"}, use_rslora=True),
    LoraConfig(task_type=None, segments={"qkv": {"q": 64, "k": 16, "v": 16}}),
    LoraConfig(segments={"qkv": (64, 16, 16), "gate_up": [8, 8]}),
    TrainingConfig(),
    TrainingConfig(**TRAINING_CONFIG),
    TrainingConfig(report_to=("wandb",), eval_strategy="steps", eval_steps=0.25, fp16=True, max_length=128),
    TrainingConfig(activation_checkpointing=False, resume_from_checkpoint=pathlib.Path("a"), data_seed=7),
]


@pytest.mark.parametrize("config", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_to_dict_is_json_and_makes_an_equal_config(config):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert values == config.to_dict()
    assert list(values) == list(fields_of(type(config)))
    assert type(config)(**values) == config


def test_configs_are_equal_by_their_settings_not_by_what_had_no_effect():
    assert TrainingConfig(do_eval=True) == TrainingConfig()
    assert TrainingConfig(seed=1) != TrainingConfig()
    assert dataclasses.replace(LoraConfig(r=4), lora_alpha=16) == LoraConfig(r=4, lora_alpha=16)


class Hostile:
    """Every question is answered by an error."""

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None

    def __repr__(self):
        raise RuntimeError


ANYTHING = {
    "an integer beyond the floats": lambda: 10**400,
    "an integer of 5,000 digits": lambda: 10**5000,
    "an array": lambda: np.arange(3),
    "a hostile object": Hostile,
    "no Unicode": lambda: "\ud800",
    "an endless iterator": itertools.count,
    "a dict": lambda: {"a": {"b": []}},
}


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
@pytest.mark.parametrize("cls", [LoraConfig, TrainingConfig])
def test_any_value_of_any_name_is_taken_or_refused_by_name(cls, make):
    for name in [*fields_of(cls), *ALIASES, *UNSUPPORTED, "no_such_name", "self"]:
        message = refusal(cls, **{name: make()})
        message.encode()
        assert name in message or ALIASES.get(name, "?") in message or "no field" in message
        assert len(message) < 5000


@pytest.mark.parametrize(
    "segments", [5, "qkv", ["qkv"], {"qkv": 5}, {"qkv": []}, {"qkv": {"q": "8"}}, {"qkv": [20, -4]}, {1: [8]}]
)
def test_segments_are_widths_by_suffix(segments):
    assert "segments=" in refusal(LoraConfig, segments=segments)


@pytest.mark.parametrize(("name", "most"), [("num_train_epochs", 10_000), ("max_length", 2**24), ("seed", 2**63 - 1)])
def test_what_would_never_end_or_never_fit_is_refused(name, most):
    assert getattr(TrainingConfig(**{name: most}), name) == most
    assert "allowed" in refusal(TrainingConfig, **{name: most + 1})
