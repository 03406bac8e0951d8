"""What llama.cpp and Ollama must be told about a model, and what the converters read in a merged folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import adapted_model, longrope_model, tiny_config
from family import MEMBERS, make_tokenizer
from transformers import AutoTokenizer

import phi3lora as p3
from phi3lora.adapters.hub import model_card
from phi3lora.adapters.serving import llama_cpp_settings, model_name, ollama_template, restore_tokenizer_files

TEXTS = ["<|user|>\n Hello <|end|>\n", "<|end|>a", "  two  spaces", "x</s> y<|endoftext|>"]


def base_folder(folder: Path, name: str, **settings) -> Path:
    """A family member's tokenizer as a published folder has it: with its class, and a vocabulary if it is Phi-3's."""
    folder.mkdir()
    make_tokenizer(name).save_pretrained(folder)
    tiny_config().save_pretrained(folder)
    is_phi4 = name.startswith("phi-4")
    if not is_phi4:
        (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    path = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "GPT2Tokenizer" if is_phi4 else "LlamaTokenizer", "add_bos_token": False, **settings}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_merged_folder_has_the_tokenizer_files_of_the_base(tmp_path, name):
    """llama.cpp's converter wants ``tokenizer.model``, or the class GPT2Tokenizer; transformers saves neither."""
    base = base_folder(tmp_path / "base", name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    p3.save_merged(adapted_model(), tokenizer, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == ("GPT2Tokenizer" if name.startswith("phi-4") else "LlamaTokenizer")
    assert settings["add_bos_token"] is False  # else llama.cpp begins a chat with <s>
    vocabulary = tmp_path / "merged" / "tokenizer.model"
    assert vocabulary.exists() == (base / "tokenizer.model").exists()
    assert not vocabulary.exists() or vocabulary.read_bytes() == b"a vocabulary"
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_without_a_folder_the_class_follows_the_vocabulary(tmp_path):
    """A tokenizer that was read from no folder: nothing in the current one is taken for its own."""
    for name, kind in (("phi-4", "GPT2Tokenizer"), ("phi-3-legacy", "TokenizersBackend")):
        folder = tmp_path / name
        make_tokenizer(name).save_pretrained(folder)
        restore_tokenizer_files(make_tokenizer(name), folder)
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == kind
        assert not (folder / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("phi-3", "microsoft/Phi-3-mini-4k-instruct", "Phi-3-mini-4k-instruct"),
        ("phi-3.5", "microsoft/Phi-3.5-mini-instruct", "Phi-3.5-mini-instruct"),
        ("phi-3-legacy", "models/support-bot/", "Phi-3 support-bot"),
        ("phi-4", "microsoft/phi-4", "phi-4"),
        ("phi-4-mini", "runs/phi3lora-phi-4-mini", "philora-phi-4-mini"),  # llama.cpp would look for </s> and fail
    ],
)
def test_the_name_by_which_llama_cpp_strips_white_space(name, base, expected):
    """It strips after markers if and only if ``general.name`` contains phi-3 or phi3 (src/llama-vocab.cpp)."""
    tokenizer = make_tokenizer(name)
    assert model_name(tokenizer, base) == expected
    assert bool(re.search("phi-?3", expected, re.I)) == ("</s>" in tokenizer.get_vocab())


def test_the_cards_of_merged_models_name_them(tmp_path):
    base = base_folder(tmp_path / "base", "phi-3")
    model = adapted_model()
    model.name_or_path = "microsoft/Phi-3-mini-4k-instruct"
    p3.save_merged(model, AutoTokenizer.from_pretrained(base), tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "\nmodel_name: Phi-3-mini-4k-instruct\n" in card and "base_model: microsoft/Phi-3-mini-4k-instruct" in card
    p3.write_model_card(tmp_path / "merged", base_model="runs/bot", merged=True)
    assert "\nmodel_name: Phi-3 bot\n" in (tmp_path / "merged" / "README.md").read_text()
    assert "model_name" not in model_card(tmp_path / "merged", "x", "runs/bot", merged=True)


def test_a_longrope_model_is_served_at_the_length_it_was_trained_on(tmp_path):
    exported = p3.export_peft(longrope_model(), tmp_path / "a", tokenizer=make_tokenizer(), base_model="o/Phi-3-128k")
    assert exported.commands["llama.cpp"].splitlines()[-1].endswith("adapter.gguf -c 40")
    assert "PARAMETER num_ctx 40\n" in exported.commands["Ollama"]
    assert exported.commands["vLLM"].endswith("--max-model-len 40")
    assert any("-c and num_ctx 40 keep the short ones" in note for note in exported.notes)


def test_a_sliding_window_is_noted(tmp_path):
    model = adapted_model(changes={"sliding_window": 4})
    exported = p3.export_peft(model, tmp_path / "a", tokenizer=make_tokenizer(), base_model="o/Phi-3-4k")
    assert any("sliding window off: the same up to 4 tokens" in note for note in exported.notes)


@pytest.mark.parametrize(
    ("name", "settings", "overrides"),
    [
        ("phi-3-legacy", {}, set()),
        ("phi-3-legacy", {"add_bos_token": True}, {"bos"}),
        ("phi-4", {}, set()),
        ("phi-4-mini", {"add_bos_token": True}, {"bos"}),
    ],
)
def test_the_begin_token_is_switched_off_where_the_converter_would_add_it(tmp_path, name, settings, overrides):
    tokenizer = AutoTokenizer.from_pretrained(base_folder(tmp_path / "base", name, **settings))
    found = llama_cpp_settings(tiny_config(), tokenizer, "o/Phi-3-mini")
    assert {key.split("_")[1] for key in found.overrides} == overrides
    assert found.options == (" --override-kv tokenizer.ggml.add_bos_token=bool:false" if overrides else "")


def test_the_demo_puts_no_space_after_a_marker_and_says_so(tmp_path):
    model, tokenizer, _, _ = p3.demo.load()
    found = llama_cpp_settings(model.config, tokenizer, "demo/base")
    assert found.model_name == "Phi-3 base"
    assert found.options == " --override-kv tokenizer.ggml.add_space_prefix=bool:false"


def test_a_tokenizer_whose_folder_is_gone_is_still_saved_and_exported(tmp_path, caplog):
    base = base_folder(tmp_path / "base", "phi-3")
    tokenizer = AutoTokenizer.from_pretrained(base)
    shutil.rmtree(base)
    exported = p3.export_peft(adapted_model(), tmp_path / "a", tokenizer=tokenizer, base_model="o/Phi-3")
    assert "--model-name Phi-3" in exported.commands["llama.cpp"]
    p3.save_merged(adapted_model(), tokenizer, tmp_path / "merged")
    assert f"is gone, {base}: its tokenizer.model" in caplog.text
    assert not (tmp_path / "merged" / "tokenizer.model").exists()


def test_a_hub_tokenizer_of_another_cache_folder_keeps_its_class_and_vocabulary(tmp_path):
    """The hub's cache: each file is a link to a blob, in a folder that the name alone does not tell."""
    base, repository = base_folder(tmp_path / "base", "phi-3"), tmp_path / "cache" / "models--o--phi"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for file in base.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    tokenizer = AutoTokenizer.from_pretrained("o/phi", cache_dir=tmp_path / "cache", local_files_only=True)
    p3.save_merged(adapted_model(), tokenizer, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    vocabulary = tmp_path / "merged" / "tokenizer.model"
    assert vocabulary.read_bytes() == b"a vocabulary" and not vocabulary.is_symlink()


def test_no_file_of_an_earlier_tokenizer_stays_beside_another_s(tmp_path):
    for name in ("phi-3", "phi-4"):
        tokenizer = AutoTokenizer.from_pretrained(base_folder(tmp_path / name, name))
        p3.save_merged(adapted_model(), tokenizer, tmp_path / "merged")
        (tmp_path / "merged" / "added_tokens.json").write_text('{"<|of an earlier one|>": 400}')
        p3.save_merged(adapted_model(), tokenizer, tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert not names & {"tokenizer.model", "added_tokens.json"} and "tokenizer.json" in names
    p3.save_merged(adapted_model(), None, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").exists()  # no tokenizer is given: the one there stays


@pytest.mark.parametrize("folder", ["lr=2e-4/bot", "r=8,alpha=16", "a,b/my bot", "plain"])
def test_vllm_reads_the_name_and_the_path_of_the_adapter(tmp_path, folder):
    """vLLM splits ``name=path`` at every = and takes a value with a comma for JSON (entrypoints/openai/cli_args.py)."""
    path = tmp_path / folder
    exported = p3.export_peft(adapted_model(), path, base_model="o/Phi-3")
    words = shlex.split(exported.commands["vLLM"])
    item = words[words.index("--lora-modules") + 1]
    if "=" in item and "," not in item:
        name, read = item.split("=")
    else:
        name, read = (json.loads(item)[key] for key in ("name", "path"))
    assert (name, read) == (path.name, str(path))
    assert item.startswith("plain=") == (folder == "plain")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("support-peft", "support-peft"), ("My bot", "my-bot"), ("Büro: r=8, a..b", "b-ro-r-8-a.b"), ("日本", "model")],
)
def test_the_model_s_name_is_one_that_ollama_allows(tmp_path, folder, name):
    """types/model/name.go: ASCII letters, digits, ``_``, ``-`` and ``.``, not two dots in a row."""
    exported = p3.export_peft(adapted_model(), tmp_path / folder, base_model="o/Phi-3")
    assert exported.commands["Ollama"].endswith(f"\nollama create {name} -f Modelfile")


def test_without_a_tokenizer_a_renamed_base_is_noted(tmp_path):
    for base, is_noted in (("microsoft/Phi-3-mini-4k-instruct", False), ("microsoft/phi-4", False), ("o/bot", True)):
        exported = p3.export_peft(adapted_model(), tmp_path / "a", base_model=base)
        assert any("must contain phi-3" in note for note in exported.notes) == is_noted


# --- Ollama's template


def rendered(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of the few actions that are used."""
    body = re.fullmatch(r"\{\{ range \.Messages \}\}\{\{ (.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S)
    roles = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', body[1], re.S))
    return "".join(roles[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + body[2]


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "phi-3-april"])
def test_ollama_s_template_renders_what_the_chat_template_does(name):
    tokenizer = make_tokenizer(name)
    template = ollama_template(tokenizer)
    messages = [{"role": role, "content": f"the {role}'s"} for role in ("system", "user", "assistant", "user")]
    for chat in (messages, messages[1:], messages[1:2]):
        want = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered(template, chat) == want


@pytest.mark.parametrize(
    "template",
    [
        MEMBERS["phi-3-april"].template,  # drops the system message, begins with <s>
        "{{ raise_exception('no system message') if messages[0].role == 'system' }}" + MEMBERS["phi-3"].template,
        MEMBERS["phi-3"].template.replace("'<|system|>\n'", "'{{'"),
        "{% if messages[0].role != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}" + MEMBERS["phi-3"].template,
    ],
)
def test_a_template_that_does_more_has_none(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert ollama_template(tokenizer) is None
