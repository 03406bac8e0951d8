"""Run files and ``--set``: values by the type of their field, unknown names, and a file that runs again."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import yaml

import phi3lora as p3
from phi3lora.compat import ATTENTION_SETTINGS, CALLED_HERE
from phi3lora.run_file import read_run, run_text
from phi3lora.run_settings import SECTIONS, field_help, setting_names


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def found_in(run, name):
    section, _, field = name.partition(".")
    return getattr(getattr(run, section), field)


FOREIGN = {
    "lora_rank": "lora.r", "lr": "training.learning_rate", "micro_batch_size": "training.per_device_train_batch_size",
    "gradient_clipping": "training.max_grad_norm", "cutoff_len": "data.max_length", "base_model": "model.name_or_path",
    "load_in_4bit": "model.base_precision", "val_set_size": "data.eval_share",
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), FOREIGN.items())
def test_a_name_of_another_tool_is_refused_with_the_name_that_it_has_here(write, theirs, ours):
    for path, options in ((None, [(theirs, "1")]), (write(f"{theirs}: 1"), []), (write(f"lora: {{{theirs}: 1}}"), [])):
        with pytest.raises(p3.ConfigError, match=rf"Here it is called {re.escape(ours)}\."):
            read_run(path, options)
    section, _, field = ours.partition(".")
    for home, config in (("lora", p3.LoraConfig), ("training", p3.TrainingConfig)):
        said = f"Did you mean '{field}'" if home == section else f"'{field}' and belongs to "
        with pytest.raises(p3.ConfigError, match=said):
            config(**{theirs: 1})


def test_every_name_of_other_tools_is_no_name_of_ours_and_leads_to_one():
    for theirs, ours in CALLED_HERE.items():
        section, _, field = ours.partition(".")
        assert field in setting_names(section)
        assert not any(theirs in setting_names(each) for each in SECTIONS)


@pytest.mark.parametrize("name", sorted(ATTENTION_SETTINGS))
def test_a_setting_of_the_attention_leads_to_load_model(write, name):
    attempts = [
        lambda: read_run(None, [(name, "true")]),
        lambda: read_run(write(f"lora: {{{name}: true}}")),
        lambda: p3.LoraConfig(**{name: True}),
        lambda: p3.TrainingConfig(**{name: True}),
    ]
    for attempt in attempts:
        with pytest.raises(p3.ConfigError, match="load_model chooses the attention") as caught:
            attempt()
        assert "Did you mean" not in str(caught.value)


NEEDED = {"eval_split=test": "eval_source=b.jsonl", "split_seed=3": "eval_share=0.1", "buffer_size=9": "streaming=yes"}


@pytest.mark.parametrize(("name", "needed"), NEEDED.items())
def test_a_setting_that_needs_another_says_that_it_has_no_effect_without(caplog, name, needed):
    options = [tuple(pair.split("=")) for pair in (name, needed)]
    read_run(None, options)
    assert not caplog.records
    read_run(None, options[:1])
    assert f"data.{options[0][0]}=" in caplog.text and f"no effect without {options[1][0]}" in caplog.text


def test_the_home_folder_may_be_written_as_a_shell_does(write, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    text = "model: ~/phi\ndata: [~/a.jsonl, b~/c.jsonl]\ntraining: {output_dir: ~/runs}\nout: ~/a.pt"
    run = read_run(write(text), [("eval_source", ["~/b.jsonl"]), ("adapter", "~/a.pt"), ("run_name", "~/x")])
    assert (run.model.name_or_path, run.model.adapter, run.out) == ("/users/me/phi", "/users/me/a.pt", "/users/me/a.pt")
    assert (run.data.source, run.data.eval_source) == (["/users/me/a.jsonl", "b~/c.jsonl"], ["/users/me/b.jsonl"])
    assert (run.training.output_dir, run.training.run_name) == ("/users/me/runs", "~/x")


def test_each_name_of_the_length_is_the_data_s():
    for name in ("max_length", "max_seq_length", "max_seq_len"):
        assert read_run(None, [(name, "64")]).data.max_length == 64


VALUES = [
    ("training.learning_rate", "1e-4", 1e-4),
    ("training.learning_rate", "2E-5", 2e-5),
    ("training.learning_rate", "1", 1),
    ("training.warmup_ratio", ".1", 0.1),
    ("training.warmup_ratio", "+.1", 0.1),
    ("training.max_steps", "1e3", 1000),
    ("training.max_steps", "-1", -1),
    ("training.seed", "010", 10),
    ("training.run_name", "2024", "2024"),
    ("training.run_name", "2024-01-01", "2024-01-01"),
    ("training.run_name", "12:30", "12:30"),
    ("training.run_name", "no", "no"),
    ("training.run_name", "1e-4", "1e-4"),
    ("training.run_name", "true", "true"),
    ("training.eval_strategy", "no", "no"),
    ("training.save_strategy", "no", "no"),
    ("training.packing", "no", False),
    ("training.packing", "off", False),
    ("training.packing", "Yes", True),
    ("training.bf16", "1", True),
    ("training.compile", "null", None),
    ("training.activation_checkpointing", "none", "none"),
    ("training.activation_checkpointing", "true", "full"),
    ("training.resume_from_checkpoint", "auto", "auto"),
    ("training.resume_from_checkpoint", "true", True),
    ("training.resume_from_checkpoint", "runs/1", "runs/1"),
    ("training.report_to", "tensorboard", ["tensorboard"]),
    ("training.save_total_limit", "None", None),
    ("training.output_dir", "2024", "2024"),
    ("lora.r", "8", 8),
    ("lora.lora_alpha", "16", 16),
    ("lora.lora_dropout", "5e-2", 0.05),
    ("lora.bias", "none", "none"),
    ("lora.target_modules", "all-linear", "all-linear"),
    ("model.base_precision", "nf4", "nf4"),
    ("model.base_precision", "none", None),
    ("model.revision", "1234567", "1234567"),
    ("data.eval_share", "5e-2", 0.05),
    ("data.source", "a,b.jsonl", "a,b.jsonl"),
    ("data.streaming", "yes", True),
]


@pytest.mark.parametrize(("name", "text", "expected"), VALUES, ids=str)
def test_a_text_is_read_by_the_type_of_its_field_in_a_file_and_after_set(write, name, text, expected):
    section, _, field = name.partition(".")
    more = {"streaming": [("max_steps", "1")]}.get(field, [])
    runs = [
        read_run(write(f"{section}:\n  {field}: {text}\n"), more),
        read_run(write(f'{section}:\n  {field}: "{text}"\n'), more),
        read_run(None, [(name, text), *more]),
    ]
    for run in runs:
        value = found_in(run, name)
        assert value == expected and type(value) is type(expected)


def test_a_list_is_spelt_with_commas_or_as_a_list(write):
    spellings = ["q_proj,v_proj", "q_proj, v_proj", '["q_proj", "v_proj"]']
    for text in spellings:
        assert read_run(None, [("target_modules", text)]).lora.target_modules == ["q_proj", "v_proj"]
    assert read_run(None, [("lora.target_modules", ["q_proj", "v_proj"])]).lora.target_modules == ["q_proj", "v_proj"]
    assert read_run(None, [("lora.target_modules", ["all-linear"])]).lora.target_modules == "all-linear"
    for text in ("[q_proj, v_proj]", "\n  - q_proj\n  - v_proj", "q_proj,v_proj"):
        assert read_run(write(f"lora:\n  target_modules: {text}\n")).lora.target_modules == ["q_proj", "v_proj"]


def test_a_regular_expression_with_a_comma_is_one_target(write):
    regex = r".*layers\.\d{1,2}\.(mlp|self_attn)\.o_proj"
    for options in ([("target_modules", regex)], [("lora.target_modules", [regex])]):
        assert read_run(None, options).lora.target_modules == regex
    for text in (f"'{regex}'", regex):
        assert read_run(write(f"lora:\n  target_modules: {text}\n")).lora.target_modules == regex


def test_a_list_of_numbers_holds_numbers(write):
    for raw in ("0,1", "0, 1", "[0, 1]", ["0", "1"]):
        assert read_run(None, [("layers_to_transform", raw)]).lora.layers_to_transform == [0, 1]
    for text in ("[0, 1]", "\n  - 0\n  - 1", "0,1"):
        assert read_run(write(f"lora:\n  layers_to_transform: {text}\n")).lora.layers_to_transform == [0, 1]


def test_columns_are_texts_and_other_mappings_hold_numbers(write):
    columns = {"prompt": "no", "completion": "2024"}
    assert read_run(write("data: {columns: {prompt: no, completion: 2024}}")).data.columns == columns
    assert read_run(None, [("columns", "prompt=no,completion=2024")]).data.columns == columns
    assert read_run(None, [("data.columns", ["prompt=no", "completion=2024"])]).data.columns == columns
    run = read_run(write("lora: {segments: {qkv: {q: 64, k: 16, v: 16}}}"))
    assert run.lora.segments == {"qkv": {"q": 64, "k": 16, "v": 16}}
    for raw in ('{"qkv": [64, 16]}', ['{"qkv": [64, 16]}']):
        assert read_run(None, [("segments", raw)]).lora.segments == {"qkv": [64, 16]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rat: 1}", "learning_rate"),
        ("training: {learning_rate: fast}", "learning_rate='fast'; allowed: a number"),
        ("training: {learning_rate: .nan}", "learning_rate"),
        ("training: {packing: maybe}", "packing='maybe'; allowed: True, False"),
        ("training: {max_steps: 1.5}", "max_steps=1.5"),
        ("trainings: {max_steps: 1}", "there is no section 'trainings'. Did you mean 'training'?"),
        ("learning_rate: 1", "belongs in the section 'training'"),
        ("model: {name_or_pat: x}", "Did you mean 'name_or_path'?"),
        ("data: {colums: x}", "Did you mean 'columns'?"),
        ("lora: {learning_rate: 8}", "It belongs in the section 'training'."),
        ("lora: {rnk: 8}", "Did you mean 'rank'?"),
        ("training: {seed: 1, seed: 2}", "'seed' is given twice"),
        ("training: {eval_strategy: no, evaluation_strategy: steps}", "eval_strategy='no' are two values of one"),
        ("training: [1, 2]", "training is ['1', '2']; allowed: names and values"),
        ("- a", "allowed: the sections"),
        ("# nothing yet", "it is empty; allowed: the sections"),
        ("training: {seed: 1", "line 1, column 19: expected ',' or '}', but got '<stream end>'"),
        ("training:\n\tseed: 1", "line 2, column 1: found character '\\t'"),
        ("training:\n  seed: 1\n max_steps: 1", "line 3, column 2: "),
        ("training: \x07", "cannot be read: unacceptable character"),
        ("training: !!python/object:os.system {}", "cannot be read"),
        ("training: {output_dir: {{ name }}}", "line 1: {'name': None} is no name; a text with braces needs quotes"),
        ("training: {max_steps: 1__0}", "max_steps='1__0'; allowed"),
        ("training: {lr_scheduler_kwargs: {min_lr: 1_}, max_steps: 1_}", "max_steps='1_'; allowed"),
        ("data: {eval_share: 2}", "data.eval_share=2; allowed"),
        ("data: {eval_share: 0.1, eval_source: x}", "exclude each other"),
        ("data: {eval_share: 0.1, streaming: true}", "a stream cannot be split"),
        ("data: {max_length: 1}", "data.max_length=1; allowed"),
        ("data: {split_seed: -5}", "data.split_seed=-5; allowed"),
        ("data: {streaming: ture}", "data.streaming='ture'; allowed: True, False"),
        ("data: {columns: !!float 1}", "columns=1.0; allowed: names of ours and yours"),
        (f"training: {{weight_decay: {'1' * 400}}}", "weight_decay=111"),
        ("data: {source: {a: b}}", "data.source={'a': 'b'}; allowed"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(write, text, message):
    with pytest.raises(p3.ConfigError) as caught:
        read_run(write(text))
    assert message in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_run_file_that_is_not_there_or_is_the_data_is_named(tmp_path):
    with pytest.raises(p3.ConfigError, match="there is no run file 'none"):
        read_run("none.yaml")
    with pytest.raises(p3.ConfigError, match="data is named by --data"):
        read_run("support.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([("r", "8"), ("r", "16")], "r=16 and r=8 are two values of one setting"),
        ([("r", "8"), ("rank", "16")], "two values of one setting"),
        ([("learning_rat", "1")], "Did you mean 'learning_rate'?"),
        ([("lora.nonsense", "1")], "the section 'lora' has no setting 'nonsense'"),
        ([("model.nonsense", "1")], "the section 'model' has no setting 'nonsense'"),
        ([("revision", "x")], "write model.revision or data.revision"),
        ([("columns", "prompt")], "allowed: OURS=YOURS"),
        ([("use_dora", "true")], "use_dora=True is not supported"),
    ],
    ids=str,
)
def test_what_options_cannot_say_is_refused_by_name(options, message):
    with pytest.raises(p3.ConfigError) as caught:
        read_run(None, options)
    assert message in str(caught.value)


def test_an_option_takes_the_place_of_the_file_and_the_same_value_twice_is_one(write):
    path = write("training: {evaluation_strategy: steps, seed: 3}\nlora: {rank: 4}\nmodel: demo\ndata: [a, b]")
    run = read_run(path, [("eval_strategy", "epoch"), ("r", "8"), ("r", "8")])
    assert (run.training.eval_strategy, run.training.seed, run.lora.r) == ("epoch", 3, 8)
    assert (run.model.name_or_path, run.model.dtype, run.data.max_length) == ("demo", "float32", 256)
    assert run.data.source == ["a", "b"]


def test_foreign_names_mean_what_they_mean_in_python(write):
    run = read_run(write("training: {evaluation_strategy: steps, remove_unused_columns: no}"))
    assert run.training.eval_strategy == "steps" and run.training.inert == ("remove_unused_columns",)
    assert read_run(None, [("remove_unused_columns", "false")]).training.inert == ("remove_unused_columns",)


def test_the_length_of_documents_follows_that_of_rows(write):
    assert read_run(None).data.max_length == 2048
    assert read_run(None, [("max_length", "512")]).data.max_length == 512
    assert read_run(write("training: {max_length: 512}")).data.max_length == 512


def test_held_out_data_is_evaluated_every_epoch_unless_the_run_says_otherwise(write):
    assert read_run(None, [("eval_share", ".1")]).training.eval_strategy == "epoch"
    assert read_run(write("data: {eval_source: a}")).training.eval_strategy == "epoch"
    assert read_run(write("data: {eval_source: a}\ntraining: {evaluation_strategy: no}")).training.eval_strategy == "no"
    assert read_run(None).training.eval_strategy == "no"


def test_json_and_yaml_say_the_same(write):
    content = {"model": "demo", "data": {"source": ["a"], "columns": {"prompt": "q"}}, "training": {"seed": 5}}
    runs = [read_run(write(json.dumps(content), "run.json")), read_run(write(yaml.safe_dump(content)))]
    one, other = ((run.model, run.data, run.lora, run.training) for run in runs)
    assert one == other
    with pytest.raises(p3.ConfigError, match="'seed' is given twice"):
        read_run(write('{"training": {"seed": 1, "seed": 2}}', "run.json"))


def test_a_written_file_reads_back_as_the_same_run(write, caplog):
    lora = p3.LoraConfig(
        r=4, target_modules=["q_proj"], segments={"qkv": {"q": 64, "k": 16}}, exclude_modules=r"layers\.\d{1,2}\.o",
        layers_to_transform=[0, 2], rank_pattern={r"layers\.\d{1,2}\.down_proj": 8}, alpha_pattern={"o_proj": 1e-5},
    )  # fmt: skip
    training = p3.TrainingConfig(
        output_dir="1e-4", learning_rate=1e-5, eval_strategy="no", run_name="no", report_to=["tensorboard"],
        warmup_ratio=1e-7, data_seed=7, activation_checkpointing="full",
    )  # fmt: skip
    data = {"source": "ü.jsonl", "columns": {"prompt": "on", "completion": "1"}, "eval_share": 0.25}
    text = run_text({"name_or_path": "demo", "dtype": "float32"}, data, lora, training)
    run = read_run(write(text))
    assert (run.lora, run.training) == (lora, training)
    assert (run.data.source, run.data.columns, run.data.eval_share) == ("ü.jsonl", data["columns"], 0.25)
    assert caplog.messages == []
    read_run(
        write(text.replace(f"transformers: {yaml.safe_load(text)['versions']['transformers']}", "transformers: 1"))
    )
    assert "transformers 1 (here" in caplog.text


def test_every_setting_has_a_text_and_a_name_that_is_found():
    for section in SECTIONS:
        names = setting_names(section)
        assert set(names) <= set(field_help(section)), section
        assert not any("``" in text or ":func:" in text for text in field_help(section).values())
        assert [f.name for f in dataclasses.fields(SECTIONS[section]) if f.init] == names
