"""The two configs: dicts for PEFT and transformers work unchanged, every bound holds, nothing is silently ignored."""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import json
import pathlib
from types import MappingProxyType

import numpy as np
import pytest
import torch
import transformers

from phi3lora.compat import ALIASES, IGNORED_LORA_ARGUMENTS, IGNORED_TRAINING_ARGUMENTS, INSTEAD, UNSUPPORTED
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
    """Return name -> default of a dataclass's constructor."""
    return {
        f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(cls)
        if f.init
    }


# --- Dicts written for PEFT and transformers


def test_a_dict_for_peft_or_transformers_is_accepted_unchanged():
    without_effect = ("do_eval", "gradient_checkpointing_kwargs", "remove_unused_columns")
    for cls, given, inert in ((LoraConfig, PEFT_CONFIG, ()), (TrainingConfig, TRAINING_CONFIG, without_effect)):
        config = cls(**given)
        assert config.inert == inert
        kept = {name: value for name, value in given.items() if name not in inert}
        assert {name: getattr(config, name) for name in kept} == kept


def test_all_of_transformers_arguments_are_accepted(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", learning_rate=3e-4)
    config = TrainingConfig(**arguments.to_dict())
    assert (config.learning_rate, config.output_dir, config.lr_scheduler_type) == (3e-4, str(tmp_path), "linear")


def test_all_of_a_peft_config_is_accepted():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["o_proj", "qkv_proj"])
    config = LoraConfig(**theirs.to_dict())
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, ["o_proj", "qkv_proj"])


def documented_defaults() -> dict[str, tuple[str, str]]:
    """Return setting -> (ours, theirs) from the table of defaults in docs/training.md."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## Defaults\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0].strip("`"): (row[1], row[2]) for row in rows[2:]}


@pytest.mark.parametrize(("cls", "package"), [(LoraConfig, "peft"), (TrainingConfig, "transformers")])
def test_every_argument_of_theirs_is_known_and_defaults_that_differ_are_documented(cls, package):
    name = {"peft": "LoraConfig", "transformers": "TrainingArguments"}[package]
    theirs, ours = fields_of(getattr(pytest.importorskip(package), name)), fields_of(cls)
    for name, value in theirs.items():
        try:
            cls(**{name: value})
        except ConfigError as error:
            assert "has no field" not in str(error) and "allowed" in str(error), "refused on purpose"
    shared, documented = theirs.keys() & ours.keys(), documented_defaults()
    assert len(shared) > (5 if cls is LoraConfig else 30)
    for name in shared:
        expected = theirs[name].value if isinstance(theirs[name], enum.Enum) else theirs[name]
        # transformers' gradient_checkpointing is False, or None since 5.2x
        if ours[name] == expected or (name == "gradient_checkpointing" and not ours[name] and not expected):
            assert name not in documented
        else:
            mine, its = documented[name]
            assert its == "`logging_steps`" or ast.literal_eval(its.strip("`")) == expected, name
            if name not in ("lora_alpha", "warmup_steps", "eval_steps"):  # they follow from other settings
                assert ast.literal_eval(mine.strip("`")) == ours[name], name


def test_defaults_that_depend_on_other_settings():
    assert (LoraConfig().lora_alpha, LoraConfig(r=4).lora_alpha, LoraConfig(r=4, lora_alpha=8).lora_alpha) == (32, 8, 8)
    assert (LoraConfig(4).lora_alpha, LoraConfig(4, 16).lora_alpha) == (8, 16)
    assert dataclasses.replace(LoraConfig(r=4), r=8).lora_alpha == 8
    config = TrainingConfig()
    assert (config.warmup_steps, config.warmup_ratio, config.eval_steps) == (None, None, 0.1)
    for given, warmup in (
        ({"warmup_steps": 0}, (0, 0)),
        ({"warmup_ratio": 0.2}, (0, 0.2)),
        ({"warmup_steps": 3}, (3, 0)),
        ({"warmup_steps": 0, "warmup_ratio": None}, (0, 0)),
    ):
        config = TrainingConfig(**given)
        assert (config.warmup_steps, config.warmup_ratio) == warmup
        assert TrainingConfig(**config.to_dict()) == config
    assert TrainingConfig(logging_steps=3).eval_steps is None
    assert TrainingConfig(logging_steps=3, eval_steps=5).eval_steps == 5


def test_a_config_knows_which_fields_it_was_given():
    assert LoraConfig(4, lora_dropout=0.1, revision="main").given == {"r", "lora_dropout"}
    assert TrainingConfig(max_seq_length=8, evaluation_strategy="no").given == {"max_length", "eval_strategy"}
    assert TrainingConfig().given == set()
    assert copy.deepcopy(LoraConfig(r=2)).given == {"r"}
    assert LoraConfig(r=16) == LoraConfig(), "equal settings are equal, whoever gave them"


SFT_CONFIG = {
    "model_init_kwargs": None, "router_aux_loss_coef": 0.001, "trust_remote_code": False, "chat_template_path": None,
    "dataset_text_field": "text", "dataset_kwargs": None, "dataset_num_proc": None, "eos_token": None,
    "max_length": 1024, "truncation_mode": "keep_start", "shuffle_dataset": False, "packing": False,
    "packing_strategy": "bfd", "padding_free": False, "pad_to_multiple_of": None, "eval_packing": None,
    "completion_only_loss": None, "loss_type": None, "activation_offloading": False, "pad_token": None,
}  # fmt: skip
"""SFTConfig's own fields at their defaults (TRL, July 2026); ``assistant_only_loss=False`` is refused."""


def test_trls_names_are_accepted_where_they_say_what_the_library_does():
    config = TrainingConfig(**SFT_CONFIG)
    assert (config.max_length, config.packing) == (1024, False)
    assert set(config.inert) == SFT_CONFIG.keys() - {"max_length", "packing"}
    says_the_same = {
        "assistant_only_loss": True, "completion_only_loss": True, "padding_free": True, "packing_strategy": "bfd",
        "eos_token": "<|end|>", "loss_type": "chunked_nll", "max_seq_length": 512, "dataset_batch_size": 100,
    }  # fmt: skip
    assert TrainingConfig(**says_the_same) == TrainingConfig(max_length=512)
    trl = pytest.importorskip("trl")
    assert trl.SFTConfig.__dataclass_fields__.keys() >= SFT_CONFIG.keys()


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("assistant_only_loss", False, "train_on='all'"),
        ("completion_only_loss", False, "train_on='all'"),
        ("packing_strategy", "wrapped", "overflow='split'"),
        ("truncation_mode", "keep_end", "overflow='split'"),
        ("dataset_text_field", "body", "columns={'text': 'your_column'}"),
        ("loss_type", "dft", "'nll' or 'chunked_nll'"),
        ("activation_offloading", True, "activation_checkpointing='offload'"),
        ("eos_token", "</s>", "chat template"),
        ("model_init_kwargs", {"dtype": "bfloat16"}, "load_model"),
        ("chat_template_path", "template.jinja", "tokenizer.chat_template"),
    ],
)
def test_trls_names_that_ask_for_something_else_are_refused_with_the_way_to_get_it(name, value, hint):
    assert hint in refusal(TrainingConfig, **{name: value})


# --- Aliases, ignored and unsupported arguments, unknown names


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_its_field_and_must_not_contradict_it(alias):
    name = ALIASES[alias]
    value, other = {
        "eval_strategy": ("epoch", "steps"), "compile": (True, False), "max_length": (128, 64),
        "lora_plus_lr_ratio": (16, 8), "per_device_train_batch_size": (2, 1), "per_device_eval_batch_size": (2, 1),
    }[name]  # fmt: skip
    config = TrainingConfig(**{alias: value})
    assert (getattr(config, name), config.inert) == (value, ())
    assert TrainingConfig(**{alias: value, name: value}) == config
    message = refusal(TrainingConfig, **{alias: value, name: other})
    assert f"{alias}={value!r} and {name}={other!r}" in message


@pytest.mark.parametrize(
    ("cls", "names"), [(TrainingConfig, IGNORED_TRAINING_ARGUMENTS), (LoraConfig, IGNORED_LORA_ARGUMENTS)]
)
def test_an_ignored_argument_is_listed_and_changes_nothing(cls, names):
    for name in names:
        for value in (None, True, 3, "anything", {"a": [1]}):
            config = cls(**{name: value})
            assert config.inert == (name,)
            assert config == cls()
            assert name not in config.to_dict()
    assert cls(**dict.fromkeys(names)).inert == tuple(sorted(names))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_argument_is_accepted_only_at_a_value_that_changes_nothing(name):
    for cls in (LoraConfig, TrainingConfig):
        if name in fields_of(cls):
            continue  # modules_to_save, which has a bound below
        for value in UNSUPPORTED[name]:
            config = cls(**{name: value})
            assert config.inert == (name,)
            assert config == cls()
        message = refusal(cls, **{name: "on"})
        assert f"{name}='on' is not supported" in message
        assert all(repr(value) in message for value in UNSUPPORTED[name])
        assert INSTEAD.get(name, "Leave it out") in message


def test_an_empty_list_of_modules_to_save_and_the_home_folder_mean_what_they_do_elsewhere(monkeypatch):
    assert LoraConfig(modules_to_save=[]).modules_to_save is None
    monkeypatch.setenv("HOME", "/there")
    config = TrainingConfig(output_dir="~/runs", resume_from_checkpoint="~/runs/checkpoint-5")
    assert (config.output_dir, config.resume_from_checkpoint) == ("/there/runs", "/there/runs/checkpoint-5")


def test_no_name_is_in_two_tables():
    own = fields_of(LoraConfig).keys() | fields_of(TrainingConfig).keys()
    ignored = [IGNORED_TRAINING_ARGUMENTS, IGNORED_LORA_ARGUMENTS]
    tables = [*ignored, UNSUPPORTED.keys() - {"modules_to_save"}, ALIASES.keys(), own]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(ALIASES.values()) <= own
    assert INSTEAD.keys() <= UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("cls", "name", "suggestion"),
    [
        (TrainingConfig, "lerning_rate", " Did you mean 'learning_rate'?"),
        (TrainingConfig, "evaluation_strateg", " Did you mean 'evaluation_strategy'?"),
        (LoraConfig, "do_eval", ""),
        (TrainingConfig, "loftq_config", ""),
        (TrainingConfig, "inert", ""),
        (TrainingConfig, "zzzzzz", " Allowed: "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one_and_the_list(cls, name, suggestion):
    message = refusal(cls, **{name: 1})
    assert f"{cls.__name__} has no field {name!r} (value 1).{suggestion}" in message
    assert all(field in message for field in fields_of(cls))


# --- Every bound: name -> (values accepted, values refused)


NAN, INF = float("nan"), float("inf")
COUNT = ([1, 7], [0, -1, 1.5, True, "1", None, NAN])
COUNT_OR_NONE = ([None, 1, 7], [0, -1, 1.5, True, "1"])
POSITIVE = ([1e-12, 3, 0.5], [0, -1, NAN, INF, "1", True, None])
NOT_NEGATIVE = ([0, 1e-5, 3], [-1e-9, NAN, INF, "1", True, None])
SHARE = ([0, 0.5, 0.999], [1, -0.1, NAN, "0.5", None])
STEPS = ([1, 20, 500.0, 0.1, 0.999], [0, -1, 1.5, NAN, INF, "10", True])
STRATEGY = (["no", "steps", "epoch"], ["never", "", None, 1, "best"])
SWITCH = ([True, False], ["false", "", 1, None])  # a word such as "false" must not count as True
OPTIONAL_SWITCH = ([True, False, None], ["yes", 3, [True]])
NAME = ([None, "a name"], [5, ["a"]])
OPTIMIZERS = "adamw_torch adamw_torch_fused sgd adamw_bnb_8bit adamw_8bit paged_adamw_32bit paged_adamw_8bit".split()
SCHEDULES = [kind.value for kind in transformers.SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
TRAINING_BOUNDS = {
    **{name: SWITCH for name, default in fields_of(TrainingConfig).items() if isinstance(default, bool)},
    **dict.fromkeys((*BATCH_SIZES, "max_nonfinite_steps", "eval_max_new_tokens"), COUNT),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience", "eval_max_samples"), COUNT_OR_NONE),
    **dict.fromkeys(("learning_rate", "weight_decay", "early_stopping_threshold"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE),
    "warmup_steps": (NOT_NEGATIVE[0], [*NOT_NEGATIVE[1][:-1], 1.5, False]),
    "warmup_ratio": (SHARE[0], SHARE[1][:-1]),
    **dict.fromkeys(("logging_steps", "save_steps"), (STEPS[0], [*STEPS[1], None])),
    **dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), STRATEGY),
    **dict.fromkeys(("compile", "disable_tqdm", "greater_is_better"), OPTIONAL_SWITCH),
    **dict.fromkeys(("run_name", "metric_for_best_model"), NAME),
    "output_dir": (["runs/a"], [None, 5]),
    "max_length": ([*COUNT_OR_NONE[0], 2**24], [*COUNT_OR_NONE[1], 2**24 + 1]),
    "max_steps": ([-1, 0, 9], [-2, 1.5, True, "9", None]),
    "num_train_epochs": ([*POSITIVE[0], 10_000], [*POSITIVE[1], 10_001]),
    "adam_epsilon": POSITIVE,
    "lora_plus_lr_ratio": ([None, 1, 16.0], [0.5, 0, -1, NAN, INF, "16", True]),
    "max_grad_norm": ([-1, 0, 0.5, 3], [NAN, INF, "1", None]),
    "seed": ([0, 42, 2**63 - 1], [-1, 2**63, 1.5, True, None, "1"]),
    "data_seed": ([None, 0, 42], [-1, 1.5, True, "1"]),
    "eval_steps": ([*STEPS[0], None], STEPS[1]),
    "lr_scheduler_type": (SCHEDULES, ["reduce_lr_on_plateau", "greedy", "", None, 1]),
    "lr_scheduler_kwargs": ([None, {}, {"num_cycles": 2}], ["num_cycles=2", [1], 3]),
    "optim": (OPTIMIZERS, ["paged_adamw", "adafactor", "", None]),
    "parallel": ([None, "auto", "ddp", "fsdp"], ["tp", True]),
    "report_to": ([["wandb"], ["tensorboard", "mlflow", "trackio"], ["all"]], ["comet", ["wandb", "comet"], 5]),
    "project": (["bots"], ["", None, 5]),
    "resume_from_checkpoint": ([False, True, None, "auto", "runs/checkpoint-5"], [1.5, ["a"]]),
    "activation_checkpointing": (["none", "full"], ["some", 3, ["full"], 1]),
    "gradient_checkpointing": ([True, False], ["yes", 3, ["full"], 1, 0]),
    "log_level": (["passive", "info", "error"], ["loud"]),
}
SEGMENTS_REFUSED = [5, "qkv", ["qkv"], {"qkv": 5}, {"qkv": []}, {"qkv": {"q": "8"}}, {"qkv": [20, -4]}, {1: [8]}]
LORA_BOUNDS = {
    "r": (COUNT[0], [*COUNT[1], 2**16 + 1]),
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "bias": (["none", "all", "lora_only"], ["some", "", None, True]),
    "use_rslora": SWITCH,
    "target_modules": (
        ["all-linear", "o_proj", ["qkv_proj", "o_proj"], r".*\.(q|v)_proj"],
        ["", [], None, [""], ["o_proj", 3], 5, "("],
    ),
    "modules_to_save": ([None], [["lm_head"], "lm_head"]),
    "task_type": (["CAUSAL_LM", "SEQ_CLS", None], [5, "Causal_LM", ""]),
    "segments": ([None, {"qkv": [8, 4]}, {"qkv": {"q": 8, "k": 4}}], SEGMENTS_REFUSED),
    "exclude_modules": ([None, "lm_head", r".*\.layers\.\d+\.mlp\..*", ["k_proj"]], ["(", 5, ["o_proj", 3], [""]]),
    "layers_to_transform": ([None, [0], [3, 1]], [-1, [1.5], "0", [True], True]),
    "layers_pattern": ([None], [5, [3], "(", ["h", "*"], [""]]),
    "rank_pattern": (
        [{}, {"o_proj": 4, r"layers\.[01]\..*": 32}],
        [["o_proj"], {"o_proj": 0}, {"(": 4}, {3: 4}, {"": 4}, "x"],
    ),
    "alpha_pattern": ([{}, {"o_proj": 0.5}], [{"o_proj": 0}, {"o_proj": "8"}, {"*": 4}, 3]),
}
TABLES = {TrainingConfig: TRAINING_BOUNDS, LoraConfig: LORA_BOUNDS}
BOUNDS = [(cls, name) for cls, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("cls", "name"), BOUNDS, ids=[name for _, name in BOUNDS])
def test_values_within_the_bounds_are_kept_and_others_refused_by_name(cls, name):
    options = {"eval_strategy": "epoch"} if name in ("load_best_model_at_end", "early_stopping_patience") else {}
    accepted, refused = TABLES[cls][name]
    for value in accepted:
        assert getattr(cls(**{name: value}, **options), name) == value
    for value in refused:
        message = refusal(cls, **{name: value}, **options)
        assert f"{name}=" in message and "allowed" in message, value


def test_every_field_is_in_these_tables():
    assert all(table.keys() == fields_of(cls).keys() for cls, table in TABLES.items())


# --- Settings that belong together, and other forms of a value


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_settings_that_contradict_or_need_each_other():
    assert "mutually exclusive" in refusal(TrainingConfig, bf16=True, fp16=True)
    assert "set eval_strategy" in refusal(TrainingConfig, load_best_model_at_end=True)
    assert "set eval_strategy" in refusal(TrainingConfig, early_stopping_patience=2)
    assert "set max_steps" in refusal(TrainingConfig, num_train_epochs=10_001)
    TrainingConfig(num_train_epochs=10_001, max_steps=5)


@pytest.mark.parametrize("activation", [None, "none", "full", False, True, "selective", "offload", "auto"])
@pytest.mark.parametrize("gradient", [None, False, True])
def test_a_mode_of_activation_checkpointing_and_its_switch_must_agree(activation, gradient):
    values = {"activation_checkpointing": activation, "gradient_checkpointing": gradient}
    wanted = {None if activation is None else activation not in ("none", False), gradient} - {None}
    if len(wanted) == 2:
        assert "disagree" in refusal(TrainingConfig, **values)
    else:
        config, on = TrainingConfig(**values), True in wanted
        mode = activation if isinstance(activation, str) else "full" if on else "none"
        assert (config.activation_checkpointing, config.gradient_checkpointing) == (mode, on)
        assert TrainingConfig(**config.to_dict()) == config
        assert (
            "checkpointing" not in "".join(TrainingConfig(**{k: v for k, v in values.items() if v}).not_given())
            or not on
        )


def test_enums_paths_and_sets_become_plain_values():
    config = TrainingConfig(
        output_dir=pathlib.Path("runs") / "a",
        resume_from_checkpoint=pathlib.Path("runs/b"),
        lr_scheduler_type=transformers.SchedulerType.COSINE,
        eval_strategy=transformers.trainer_utils.IntervalStrategy.EPOCH,
    )
    texts = (config.output_dir, config.resume_from_checkpoint, config.lr_scheduler_type, config.eval_strategy)
    assert texts == ("runs/a", "runs/b", "cosine", "epoch")
    assert all(type(text) is str for text in texts)
    assert TrainingConfig(report_to="wandb").report_to == ["wandb"]
    for no_tracker in ("none", None, [], ["none"]):
        assert TrainingConfig(report_to=no_tracker).report_to == []
    assert LoraConfig(target_modules={"v_proj", "k_proj", "q_proj"}).target_modules == ["k_proj", "q_proj", "v_proj"]
    assert LoraConfig(target_modules=("v_proj", "k_proj")).target_modules == ["v_proj", "k_proj"]


class Kind(enum.Enum):
    EIGHT = 8
    HALF = 0.5


PLAIN = [
    (LoraConfig, "r", 8, [np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), Kind.EIGHT]),
    (LoraConfig, "lora_alpha", 8, [np.int64(8), np.float32(8), torch.tensor(8.0)]),
    (LoraConfig, "lora_dropout", 0.5, [np.float64(0.5), np.float16(0.5), torch.tensor(0.5), Kind.HALF]),
    (LoraConfig, "use_rslora", True, [np.bool_(True), torch.tensor(True)]),
    (LoraConfig, "target_modules", ["o_proj"], [np.array(["o_proj"]), [np.str_("o_proj")]]),
    (LoraConfig, "layers_to_transform", [0, 1], [np.arange(2), torch.arange(2), [np.int64(0), np.int64(1)], range(2)]),
    (LoraConfig, "rank_pattern", {"o_proj": 8}, [{np.str_("o_proj"): np.int64(8)}, MappingProxyType({"o_proj": 8})]),
    (LoraConfig, "segments", {"qkv": [8, 4]}, [{"qkv": np.array([8, 4])}, {"qkv": (np.int64(8), 4)}]),
    (TrainingConfig, "learning_rate", 0.5, [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)]),
    (TrainingConfig, "max_steps", 8, [np.int64(8), torch.tensor(8)]),
    (TrainingConfig, "seed", 8, [np.int64(8), np.uint64(8)]),
    (TrainingConfig, "compile", False, [np.bool_(False), torch.tensor(False)]),
    (TrainingConfig, "packing", False, [np.bool_(False)]),
    (TrainingConfig, "output_dir", "a", [np.str_("a"), pathlib.Path("a")]),
    (TrainingConfig, "lr_scheduler_kwargs", {"num_cycles": 0.5}, [{"num_cycles": np.float32(0.5)}]),
]


@pytest.mark.parametrize(("cls", "name", "plain", "others"), PLAIN, ids=[case[1] for case in PLAIN])
def test_values_of_numpy_and_torch_are_the_numbers_that_they_hold(cls, name, plain, others):
    expected = cls(**{name: plain})
    for value in others:
        config = cls(**{name: value})
        assert config == expected, value
        assert json.loads(json.dumps(config.to_dict())) == expected.to_dict()
        assert type(getattr(config, name)) in (type(plain), float)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (LoraConfig, "r", np.float64(8.5)), (LoraConfig, "r", np.bool_(True)), (LoraConfig, "r", np.array([8, 8])),
        (LoraConfig, "use_rslora", np.int64(1)), (LoraConfig, "lora_alpha", np.float32("nan")),
        (TrainingConfig, "seed", np.int64(-1)), (TrainingConfig, "packing", torch.tensor(1)),
        (TrainingConfig, "output_dir", ""), (TrainingConfig, "resume_from_checkpoint", ""),
    ],
)  # fmt: skip
def test_a_value_of_numpy_or_torch_keeps_the_bounds_of_its_field(cls, name, value):
    assert f"{name}=" in refusal(cls, **{name: value})


def test_the_first_fields_may_be_given_by_position():
    assert LoraConfig(16, 32, 0.05) == LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    assert TrainingConfig("runs/a", do_eval=True).inert == ("do_eval",)
    with pytest.raises(TypeError, match="multiple values"):
        LoraConfig(16, r=8)
    assert "r=0" in refusal(LoraConfig, 0)


ROUND_TRIPS = [
    LoraConfig(**PEFT_CONFIG),
    LoraConfig(r=3, lora_alpha=0.5, bias="lora_only", target_modules={"q_proj", "o_proj"}, use_rslora=True),
    LoraConfig(rank_pattern={"o_proj": 4}, alpha_pattern={"o_proj": 2.5}, exclude_modules=("k_proj", "down_proj")),
    LoraConfig(layers_to_transform=3, layers_pattern="layers", target_modules=r".*proj"),
    LoraConfig(task_type=None, segments={"qkv": {"q": 64, "k": 16, "v": 16}, "gate_up": (8, 8)}),
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


def test_configs_are_equal_if_their_effective_settings_are():
    assert TrainingConfig(do_eval=True) == TrainingConfig()
    assert TrainingConfig(seed=1) != TrainingConfig()
    assert dataclasses.replace(LoraConfig(r=4), lora_alpha=16) == LoraConfig(r=4, lora_alpha=16)


@pytest.mark.parametrize(("config", "name", "hint"), [
    (TrainingConfig(), "max_stepss", "Did you mean 'max_steps'?"), (LoraConfig(), "rank", "'r'"),
])  # fmt: skip
def test_setting_a_name_that_is_no_field_is_refused(config, name, hint):
    with pytest.raises(ConfigError, match=f"{type(config).__name__} has no field '{name}'") as caught:
        setattr(config, name, 3)
    assert hint in str(caught.value) and not hasattr(config, name)
    again = copy.deepcopy(config)
    again.given = frozenset()
    assert again == config
