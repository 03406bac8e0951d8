"""The notebooks: their code learns on the demo, their output is clean, and ``REAL`` asks for the right things."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from offline import replace_downloads

import phi3lora as p3
from phi3lora.adapters import hub

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("inference_and_finetuning", "finetune_lora_hub", "finetune_qlora_hub")
ALPACA = "iamtarun/python_code_instructions_18k_alpaca"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
LLAMA_NAMES = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


def cells(name: str, kind: str = "code") -> list[dict]:
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def execute(name: str, **settings) -> dict:
    """Run the code cells in order, with other values for variables of the first cell, and return their variables."""
    names: dict = {"__name__": "__main__"}
    for i, cell in enumerate(cells(name)):
        source = "".join(cell["source"])
        if i == 0:
            for variable, value in settings.items():
                source, found = re.subn(rf"^{variable} = \w+", f"{variable} = {value!r}", source, flags=re.M)
                assert found == 1
        exec(compile(source, f"{name}, code cell {i + 1}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def no_picture():
    """Draw the pictures here."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_inference_and_finetuning_learns_and_reloads(capsys):
    names = execute("inference_and_finetuning")
    output = capsys.readouterr().out
    assert names["exact_before"] == 0 and names["exact_after"] > 0.9
    assert output.count("the same answer: True") == 2
    assert "0 unexpected names, 0 LoRA names missing" in output
    assert names["after"]["loss"] < 0.1 < names["before"]["loss"]
    assert Path("ckpt_lora.pt").is_file() and Path("adapter.safetensors").is_file()
    folder = Path("runs/inference_and_finetuning")
    assert (folder / "training.png").is_file() and len(list(folder.glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_finetune_lora_hub_reaches_the_references_and_writes_what_it_says(capsys):
    names = execute("finetune_lora_hub")
    assert names["before"]["rougeL"] < 0.7 < 0.95 < names["after"]["rougeL"]
    assert len(names["test_set"]) == round(0.05 * 600)
    assert names["agreement"] == 1
    uploaded = capsys.readouterr().out.partition("would upload:")[2].split()[::3]
    assert uploaded == sorted(file.name for file in Path("phi3-lora").iterdir())
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(uploaded)

    model, _, _, _ = p3.demo.load()
    p3.import_peft(model, "phi3-lora")
    assert p3.evaluate(model, names["test_set"])["loss"] == pytest.approx(names["after"]["loss"], rel=1e-4)
    assert not p3.load_model("phi3-lora-merged", dtype="float32")[0].state_dict().keys() & {"lora_A", "lora_B"}


@pytest.mark.slow
def test_finetune_qlora_hub_tunes_four_bits_and_merges_into_the_dense_weights():
    names = execute("finetune_qlora_hub")
    assert type(names["layer"]).__name__ == "Linear4bit"
    assert names["layer"].weight.nbytes * 2 == names["numbers"]
    assert names["before"]["exact_match"] == 0
    assert names["after"]["exact_match"] > 0.9 and names["merged"]["exact_match"] > 0.9
    dense, _ = p3.load_model(p3.demo.BASE, dtype="float32")
    merged, _ = p3.load_model("phi3-qlora-merged", dtype="float32")
    assert merged.num_parameters() == dense.num_parameters()
    assert merged.lm_head.weight.equal(dense.lm_head.weight)
    assert Path("phi3-qlora/README.md").is_file()


def alpaca_rows() -> list[dict]:
    lines = (p3.demo.FOLDER / "train.jsonl").read_text().splitlines()
    turns = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    return [{"instruction": question, "input": "", "output": answer} for question, answer in turns]


def test_the_real_inference_and_finetuning_asks_for_phi_3_and_sharegpt_chats(monkeypatch):
    calls = replace_downloads(monkeypatch, alpaca_rows)
    execute("inference_and_finetuning", REAL=True)
    assert calls.models == [(PHI3, {"dtype": "bfloat16", "base_precision": None, "device": "cuda"})] * 3
    assert calls.datasets == [("macadeliccc/opus_samantha", {"max_length": 2048, "on_bad_row": "skip"})]
    [config] = calls.configs
    assert (config.learning_rate, config.num_train_epochs, config.max_steps) == (1e-4, 3, -1)
    assert config.activation_checkpointing == "full" and not config.disable_tqdm


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_lora_hub", "finetune_qlora_hub"])
def test_the_real_hub_notebooks_ask_for_phi_3_and_python_tasks_and_push(name, monkeypatch):
    uploads = []

    class Hub:
        def __init__(self, **options):
            self.endpoint = "hub"

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **options):
            [folder] = {str(Path(added.path_or_fileobj).parent) for added in operations}
            uploads.append((repo_id, folder))
            return type("Commit", (), {"commit_url": "the commit"})

    monkeypatch.setattr(hub, "HfApi", Hub)
    calls = replace_downloads(monkeypatch, alpaca_rows)
    names = execute(name, REAL=True, PUSH_TO="you/name")
    four_bits = name == "finetune_qlora_hub"
    first, *others = calls.models
    precision = "nf4" if four_bits else None
    assert first == (PHI3, {"dtype": "bfloat16", "base_precision": precision, "device": "cuda"})
    assert any(call[0] == PHI3 for call in others) == four_bits, "the dense base, to merge into"
    [(source, options)] = calls.datasets
    assert source == ALPACA
    assert options == {"max_length": 512 if four_bits else 2048, "format": "alpaca", "on_bad_row": "skip"}
    lora = names["lora_config"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 16, 0.05, LLAMA_NAMES)
    [config] = calls.configs
    assert config.bf16 and config.activation_checkpointing == "full"
    assert config.optim == ("paged_adamw_32bit" if four_bits else "adamw_torch")
    assert (config.learning_rate, config.num_train_epochs, config.warmup_ratio) == (1e-4, 3, 0.1)
    folder = "phi3-qlora" if four_bits else "phi3-lora"
    assert uploads == [("you/name", folder)]
    card = Path(folder, "README.md").read_text()
    assert f"base_model: {PHI3}" in card and f"- {ALPACA}" in card


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_a_clean_run_of_the_demo(name):
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells(name)] == list(range(1, len(cells(name)) + 1))
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    pages = ["".join(output["data"]["text/html"]) for output in outputs if "data" in output]
    assert sum("data:image/png" in page for page in pages) == 1, "the curves"
    [run] = [page for page in pages if page.startswith("<div><progress")]
    assert "<svg" in run and "held-out loss" in run and run.count("<tr>") > 5, "the live table stays"
    text = "\n".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    pages = [re.sub('base64,[^"]*', "", page) for page in pages]
    assert not re.search(r"(?<![\w.<])/(tmp|home|root|work|usr|Users)/|it/s|Warning", "\n".join([text, *pages]))
    assert len(cells(name, "markdown")) >= 8
    assert "REAL = False" in "".join(cells(name)[0]["source"])
