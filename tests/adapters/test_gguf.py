"""export_gguf: what it passes to llama.cpp's converters, and what it refuses before they run.

Stand-ins for the converters write their arguments into the file. The real ones, with llama.cpp's server, run in
``examples/benchmarks/engines.py``, and in the last test here where they are installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomize_adapters
from peft_folders import change_config, peft_made
from transformers import AutoModelForCausalLM

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.adapters import gguf
from phi3lora.errors import AdapterError, ModelError

CONVERTER = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--outfile") + 1])
if "broken" in sys.argv[-1]:
    raise SystemExit("ValueError: cannot map tensor 'x\\x1b[31m'")
out.write_text(json.dumps(sys.argv[1:]))
"""
WRITER = """
class GGUFWriter:
    def __init__(self):
        self.keys = {}
    def add_bool(self, key, value):
        self.keys[key] = value
    def write_header_to_file(self, path):
        print(self.keys, file=open(path, "a"))
"""


@pytest.fixture
def converters(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "gguf-py").mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


@pytest.fixture(scope="module")
def demo_folders(tmp_path_factory) -> Path:
    """A merged demo, and its adapter in each layout."""
    folder = tmp_path_factory.mktemp("demo")
    model, tokenizer, _, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]))
    randomize_adapters(model)
    p3.save_merged(model, tokenizer, folder / "merged")
    for layout in ("uniform", "pattern", "split"):
        p3.export_peft(model, folder / layout, tokenizer=tokenizer, layout=layout, base_model=str(p3.demo.BASE))
    return folder


def arguments(path: Path) -> dict[str, str]:
    """Option -> value of a stand-in's call; "" -> the folder."""
    words = json.loads(path.read_text())
    return {"": words[-1], **dict(zip(words[:-1:2], words[1:-1:2], strict=True))}


def without_space_prefix(monkeypatch) -> None:
    """The demo needs a key of the file, which the stand-ins cannot write."""
    monkeypatch.setattr("phi3lora.adapters.serving._overrides", lambda tokenizer: {})


def test_a_merged_model_is_converted_under_its_name_in_its_own_numbers(demo_folders, converters, tmp_path, monkeypatch):
    without_space_prefix(monkeypatch)
    made = p3.export_gguf(demo_folders / "merged", tmp_path / "out")
    call = arguments(tmp_path / "out" / "model.gguf")
    assert call[""] == str(demo_folders / "merged")
    assert call["--model-name"] == "Phi-3 base" and call["--outtype"] == "f32"
    assert made.files == ("model.gguf",) and not made.notes
    assert made.commands["llama.cpp"].startswith(f"llama-server -m {tmp_path / 'out' / 'model.gguf'}\nllama-cli")
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}') and "ADAPTER" not in modelfile
    assert modelfile.endswith('PARAMETER num_ctx 512\nPARAMETER stop "<|end|>"\nPARAMETER stop "<|endoftext|>"\n')
    p3.export_gguf(demo_folders / "merged", tmp_path / "out", outtype="q8_0", llama_cpp=converters)
    assert arguments(tmp_path / "out" / "model.gguf")["--outtype"] == "q8_0"


def test_an_adapter_is_converted_beside_its_base_or_for_a_file_of_it(demo_folders, converters, tmp_path, monkeypatch):
    without_space_prefix(monkeypatch)
    made = p3.export_gguf(demo_folders / "uniform", tmp_path / "out")
    assert made.files == ("base.gguf", "adapter.gguf")
    assert arguments(tmp_path / "out" / "base.gguf")["--outtype"] == "bf16"  # as the base is stored
    assert arguments(tmp_path / "out" / "adapter.gguf")["--base"] == str(p3.demo.BASE)
    assert "FROM ./base.gguf\nADAPTER ./adapter.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()
    base = tmp_path / "out" / "base.gguf"
    made = p3.export_gguf(demo_folders / "uniform", tmp_path / "two", base=p3.demo.BASE, base_gguf=base)
    assert made.files == ("adapter.gguf",) and f"-m {base} --lora" in made.commands["llama.cpp"]
    assert f"FROM {base}\n" in (tmp_path / "two" / "Modelfile").read_text()


def test_keys_that_the_converter_leaves_out_are_set_in_the_file(demo_folders, converters, tmp_path):
    """The demo's tokenizer puts no space before the text after a marker; llama.cpp does, unless the file says no."""
    (converters / "gguf-py" / "gguf.py").write_text(WRITER)
    script = CONVERTER + "import gguf\nwriter = gguf.GGUFWriter()\nwriter.write_header_to_file(out)\n"
    (converters / "convert_hf_to_gguf.py").write_text(script)
    p3.export_gguf(demo_folders / "merged", tmp_path / "out")
    assert "{'tokenizer.ggml.add_space_prefix': False}" in (tmp_path / "out" / "model.gguf").read_text()


def test_a_base_file_of_one_s_own_is_given_the_keys_that_ours_has(demo_folders, converters, tmp_path):
    """The converter alone leaves them out, and the file may be its."""
    (tmp_path / "base.gguf").write_text("")
    made = p3.export_gguf(demo_folders / "uniform", tmp_path / "My out", base_gguf=tmp_path / "base.gguf")
    for line in made.commands["llama.cpp"].splitlines():
        assert line.endswith(" --override-kv tokenizer.ggml.add_space_prefix=bool:false")
    assert any("base_gguf must have tokenizer.ggml.add_space_prefix=false" in note for note in made.notes)
    assert made.commands["Ollama"].startswith("ollama create my-out -f ")


def test_the_split_layout_is_found_behind_a_regular_expression(demo_folders, converters, tmp_path):
    shutil.copytree(demo_folders / "split", tmp_path / "split")
    change_config(tmp_path / "split", target_modules=r".*\.(q_proj|v_proj|o_proj|up_proj)")
    with pytest.raises(AdapterError, match=r"adapts q_proj, up_proj, v_proj .layout 'split'."):
        p3.export_gguf(tmp_path / "split", tmp_path / "out", base=p3.demo.BASE)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nmodel_name: Phi-3 mine\n---\n", "Phi-3 mine"),
        ("\ufeff---\r\ntags: 5\r\nmodel_name: Phi-3 mine\r\n---\r\n", "Phi-3 mine"),
        ("---\nmodel_name: [\n---\n", None),
        ("---\nmodel_name: *unknown\n---\n", None),
        ("---\n- model_name\n---\n", None),
        ("---\nmodel_name: 3\n---\n", None),
        ("no front matter", None),
    ],
)
def test_a_card_that_is_no_card_names_no_model(tmp_path, card, name):
    (tmp_path / "README.md").write_text(card, encoding="utf-8", newline="")
    assert gguf._card_name(tmp_path) == name


def test_a_converter_s_last_words_need_not_be_utf_8(demo_folders, converters, tmp_path, monkeypatch):
    without_space_prefix(monkeypatch)
    script = "import sys\nsys.stderr.buffer.write(b'no file caf\\xe9')\nsys.exit(1)"
    (converters / "convert_hf_to_gguf.py").write_text(script)
    with pytest.raises(AdapterError, match=r"convert_hf_to_gguf.py failed: no file caf"):
        p3.export_gguf(demo_folders / "merged", tmp_path / "out")


def test_what_llama_cpp_would_compute_differently_is_refused(demo_folders, converters, tmp_path):
    def refused(message: str, source: Path, error: type = AdapterError, **options) -> None:
        with pytest.raises(error, match=message):
            p3.export_gguf(source, tmp_path / "out", **{"base": p3.demo.BASE, **options})
        assert not (tmp_path / "out").exists()

    refused("rank_pattern or alpha_pattern .* ignores silently; import_peft reads", demo_folders / "pattern")
    refused("adapts q_proj, up_proj, v_proj .layout 'split'.", demo_folders / "split")
    demo = AutoModelForCausalLM.from_pretrained(p3.demo.BASE)
    peft_made(demo, tmp_path / "rslora", target_modules=["qkv_proj"], use_rslora=True)
    refused("has use_rslora, which llama.cpp ignores", tmp_path / "rslora")
    peft_made(demo, tmp_path / "dora", target_modules=["o_proj"], use_dora=True)
    refused("use_dora=True cannot be imported", tmp_path / "dora")
    refused("holds no adapter_config.json and no config.json", tmp_path)
    refused("outtype='q2'; allowed: 'auto', 'f32'", demo_folders / "uniform", outtype="q2")
    refused("there is no file base_gguf=", demo_folders / "uniform", base_gguf=tmp_path / "no.gguf")
    refused("holds no convert_hf_to_gguf.py", demo_folders / "uniform", llama_cpp=tmp_path)
    shutil.copytree(demo_folders / "merged", tmp_path / "no vocabulary")
    (tmp_path / "no vocabulary" / "tokenizer.model").unlink()
    refused("has no tokenizer.model and .*copy the original model's", tmp_path / "no vocabulary", ModelError)
    shutil.copytree(demo_folders / "uniform", tmp_path / "no base")
    change_config(tmp_path / "no base", base_model_name_or_path=None)
    refused("names the base None; give base=", tmp_path / "no base", base=None)


def test_a_converter_that_fails_says_why_and_leaves_the_earlier_export(demo_folders, converters, tmp_path, monkeypatch):
    without_space_prefix(monkeypatch)
    p3.export_gguf(demo_folders / "merged", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    shutil.copytree(demo_folders / "merged", tmp_path / "broken")
    with pytest.raises(
        AdapterError, match=r"convert_hf_to_gguf.py failed: ValueError: .*'x\\x1b.*the command was"
    ) as error:
        p3.export_gguf(tmp_path / "broken", tmp_path / "out")
    assert str(error.value).isprintable()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_command_line_converts_too(demo_folders, converters, tmp_path, monkeypatch, capsys):
    without_space_prefix(monkeypatch)
    options = ["--model", "demo", "--adapter", str(demo_folders / "uniform"), "--gguf", "--out"]
    assert main(["export", *options, str(tmp_path / "peft")]) == 0
    assert {file.name for file in (tmp_path / "peft-gguf").iterdir()} == {"base.gguf", "adapter.gguf", "Modelfile"}
    assert main(["merge", *options, str(tmp_path / "whole")]) == 0
    assert arguments(tmp_path / "whole-gguf" / "model.gguf")[""] == str(tmp_path / "whole")
    assert f"llama-server -m {tmp_path / 'whole-gguf' / 'model.gguf'}" in capsys.readouterr().out
    assert main(["merge", *options, str(tmp_path / "whole")]) == 1  # neither folder is overwritten
    (converters / "convert_hf_to_gguf.py").unlink()
    assert main(["merge", *options, str(tmp_path / "more")]) == 1
    assert "holds no convert_hf_to_gguf.py" in capsys.readouterr().err and not (tmp_path / "more").exists()


def test_without_converters_one_line_says_how_to_get_them(demo_folders, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"converters are not installed: pip install .*\[gguf\].*, or give") as error:
        p3.export_gguf(demo_folders / "merged", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_demo_s_vocabulary_file_holds_its_tokenizer():
    """``tokenizer.model`` has the same pieces at the same ids, ranked as the merges are."""
    sentencepiece = pytest.importorskip("sentencepiece")
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(p3.demo.BASE / "tokenizer.model"))
    _, tokenizer, _, _ = p3.demo.load()
    assert len(vocabulary) == len(tokenizer)
    for i in range(8, len(tokenizer)):
        text = tokenizer.convert_ids_to_tokens(i).replace("Ġ", "▁")
        assert vocabulary.is_byte(i) or vocabulary.id_to_piece(i) == text
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = [vocabulary.get_score(tokenizer.convert_tokens_to_ids("".join(pair))) for pair in merges]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_llama_cpp_s_own_converters(demo_folders, tmp_path):
    """Where they and sentencepiece are installed: the files hold the tensors, the name and the keys."""
    pytest.importorskip("sentencepiece")
    try:
        scripts = gguf.find_converters()
    except AdapterError as error:
        pytest.skip(str(error))
    p3.export_gguf(demo_folders / "uniform", tmp_path / "out")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import gguf
for name in sys.argv[2:]:
    reader = gguf.GGUFReader(name)
    keys = ("general.name", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token", "adapter.lora.alpha")
    print(len(reader.tensors), *(reader.get_field(key).contents() for key in keys if reader.get_field(key)), sep="|")
"""
    files = [str(tmp_path / "out" / name) for name in ("base.gguf", "adapter.gguf")]
    words = [sys.executable, "-c", code, str(scripts / "gguf-py"), *files]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.splitlines()
    assert shown[0] == "27|Phi-3 base|False|False"
    assert shown[1].endswith("|8.0") and shown[1].startswith("24|")
