"""The model card as the hub reads it; uploads to a small stand-in of the hub, byte by byte."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import adapted_model, chat_dataset, make_tokenizer
from safetensors.torch import save_file

import phi3lora as p3
from phi3lora.errors import AdapterError

TOKEN = "hf_of_a_test"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "support"
    p3.save_adapter(adapted_model(), folder / "adapter.safetensors")
    return folder


@pytest.fixture(scope="module")
def merged_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "merged"
    p3.save_merged(adapted_model(), make_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(adapter_folder, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(adapter_folder, tmp_path / "support"))


def parts(card: Path) -> tuple[dict, str]:
    """Front matter and text."""
    empty, front, text = card.read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def rows(text: str) -> dict[str, str]:
    return dict(
        (cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("| ")
    )


# --- The card


def test_the_front_matter_is_what_the_hub_reads(folder):
    card = p3.write_model_card(
        folder, base_model="microsoft/Phi-3-mini-4k-instruct", dataset="you/chats", language="en", license="mit"
    )
    assert card == folder / "README.md"
    front, text = parts(card)
    assert front == {
        "base_model": "microsoft/Phi-3-mini-4k-instruct", "library_name": "phi3lora", "tags": ["lora", "phi3lora"],
        "pipeline_tag": "text-generation", "datasets": ["you/chats"], "language": ["en"], "license": "mit",
    }  # fmt: skip
    assert "https://huggingface.co/datasets/you/chats" in text


def test_the_front_matter_has_the_evaluation_in_the_hubs_form(folder):
    from huggingface_hub import ModelCard

    metrics = {
        "train_loss": 2.0, "eval_loss": 1.25, "eval_token_accuracy": 0.5, "eval_rougeL": 0.75, "eval_n_tokens": 9,
        "eval_exact": 0.25, "eval_perplexity": float("inf"), "tokens": 100,
    }  # fmt: skip
    for dataset, kind, name in (
        ("owner/chats", "owner/chats", "owner/chats"),
        ("/srv/data/chats.jsonl", "custom", "chats.jsonl"),
    ):
        path = p3.write_model_card(folder, base_model="a/b", dataset=dataset, metrics=metrics)
        results = ModelCard.load(path).data.eval_results
        assert {(r.dataset_type, r.dataset_name, r.task_type) for r in results} == {(kind, name, "text-generation")}
        assert [(r.metric_type, r.metric_value) for r in results] == [
            ("loss", 1.25), ("accuracy", 0.5), ("rouge", 0.75), ("exact", 0.25)
        ]  # fmt: skip
    for without in ({"metrics": metrics}, {"dataset": "owner/chats", "metrics": {"train_loss": 1.0}}):
        assert not ModelCard.load(p3.write_model_card(folder, base_model="a/b", **without)).data.eval_results


def test_the_tables_have_the_settings_and_the_metrics(folder):
    lora = p3.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    training = p3.TrainingConfig(output_dir="/nowhere/secret", max_steps=500, learning_rate=2e-4, bf16=True)
    metrics = {"loss": 1.23456, "n_tokens": 12345, "samples": ["text"], "best": True}
    _, text = parts(p3.write_model_card(folder, base_model="a/b", lora=lora, training=training, metrics=metrics))
    table = rows(text)
    assert table["r"] == "16"
    assert table["target_modules"] == "q_proj, v_proj"
    assert (table["learning_rate"], table["max_steps"], table["bf16"]) == ("0.0002", "500", "True")
    assert (table["loss"], table["n_tokens"]) == ("1.235", "12,345")
    assert not {"num_train_epochs", "output_dir", "samples", "best", "lora_plus_lr_ratio"} & table.keys()
    assert "secret" not in text
    assert "phi3lora" in text.split("## Versions")[1]


def test_every_card_of_a_folder_with_patterns_says_who_ignores_them(tmp_path):
    model = adapted_model(r=3, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2})
    for layout, is_said in (("pattern", True), ("uniform", False)):
        p3.export_peft(model, tmp_path / layout, layout=layout, base_model="o/b")
        for _ in range(2):
            card = (tmp_path / layout / "README.md").read_text()
            assert ("llama.cpp, Ollama and SGLang ignore them silently" in card) == is_said
            p3.write_model_card(tmp_path / layout, base_model="o/b")


def test_local_paths_are_not_written(folder, tmp_path):
    data = tmp_path / "customers.jsonl"
    data.touch()
    front, text = parts(p3.write_model_card(folder, base_model=tmp_path / "base", dataset=str(data)))
    assert not {"base_model", "datasets"} & front.keys()
    assert str(tmp_path) not in text
    assert "`base`" in text
    assert "`customers.jsonl`" in text


def test_the_statistics_of_a_dataset_and_the_settings_that_are_not_used(folder):
    data = chat_dataset(8)
    _, text = parts(p3.write_model_card(folder, base_model="a/b", dataset=data, training=p3.TrainingConfig()))
    assert f"8 chats of {data.statistics()['tokens']:,} tokens" in text
    assert "num_train_epochs" in rows(text) and "max_steps" not in rows(text)


def test_the_phi3lora_lines_of_the_card_run(folder, monkeypatch):
    _, text = parts(p3.write_model_card(folder, base_model="a/b"))
    (block,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    monkeypatch.chdir(folder)
    names: dict = {}
    base = adapted_model()
    p3.delete_adapter(base, "default")
    monkeypatch.setattr(p3, "load_model", lambda name: (base, name))
    exec(block, names)
    assert names["tokenizer"] == "a/b"
    assert p3.list_adapters(base) == {"default": True}


def test_the_card_says_how_to_load_each_kind_of_folder(folder, merged_folder):
    front, text = parts(p3.write_model_card(merged_folder, base_model="microsoft/phi-4", merged=True))
    assert front["library_name"] == "transformers"
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text and "peft" not in text
    p3.export_peft(adapted_model(), folder)
    (folder / "adapter.safetensors").unlink()
    front, text = parts(p3.write_model_card(folder, base_model="a/b"))
    assert front["library_name"] == "peft"
    assert "PeftModel.from_pretrained(model, folder)" in text and "p3.import_peft(model, folder)" in text


def test_a_folder_without_adapter_or_model_has_no_card(folder, merged_folder, tmp_path):
    for path, merged in ((tmp_path, False), (merged_folder, False), (folder, True), (tmp_path, True)):
        with pytest.raises(AdapterError, match="holds no "):
            p3.write_model_card(path, base_model="a/b", merged=merged)
    with pytest.raises(AdapterError, match="there is no folder"):
        p3.write_model_card(tmp_path / "none", base_model="a/b")
    (folder / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match=r"torn\.safetensors' is not a readable"):
        p3.write_model_card(folder, base_model="a/b")


STRANGE = "a`b|c\x1b[2J\n## Fake\n[x](y)"


def test_the_card_quotes_what_it_inserts(folder, tmp_path):
    """Names and texts of strangers are shown, not obeyed: by Markdown, by a terminal, by Python."""
    named = folder.with_name('x"+exit(1)+"\n# y')
    folder.rename(named)
    (named / "adapter.safetensors").rename(named / 'a"+exit(1)+"{1}.safetensors')
    base = tmp_path / 'b")+exit(1)#\n`'
    lora = p3.LoraConfig(target_modules=[STRANGE])
    _, text = parts(p3.write_model_card(named, base_model=base, dataset=STRANGE, lora=lora, metrics={STRANGE: 1.0}))
    assert all(line.isprintable() for line in text.splitlines())
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Data", "## Hyperparameters", "## Metrics", "## How to load it", "## Versions",
    ]  # fmt: skip
    assert all(line.replace("\\|", "").count("|") == 3 for line in text.splitlines() if line.startswith("|"))
    (block,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {"p3.load_model", "p3.load_adapter"}


def test_a_card_that_cannot_be_written_leaves_the_earlier_one(folder, monkeypatch):
    card = p3.write_model_card(folder, base_model="a/b")
    before = card.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi3lora.files.fsync", fail)
    with pytest.raises(
        AdapterError, match=r"README\.md' cannot be written: .*No space.*; an earlier card is unchanged"
    ):
        p3.write_model_card(folder, base_model="c/d")
    assert card.read_bytes() == before and len(list(folder.iterdir())) == 2


# --- The hub


class Hub:
    """A server that speaks as much of the hub's protocol as an upload needs and keeps what arrived."""

    def __init__(self) -> None:
        hub = self
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # LFS: oid -> bytes
        self.created: dict = {}
        self.commits: list[str] = []
        self.fail: dict[str, int] = {}  # part of a path -> status

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status = next((s for part, s in hub.fail.items() if part in self.path), 200)
                if "/lfs-store/" not in self.path:  # a signed address needs no token
                    hub.tokens.add(self.headers.get("Authorization"))
                answer = json.dumps(hub.answer(self.path, body) if status == 200 else {"error": "no"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = handle_one

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.url}/you/support"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode[n], "shouldIgnore": False, "oid": None} for n in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs-store/{item['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs-store/"):
            self.objects[path.removeprefix("/lfs-store/")] = body
            return {}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines[1:]:
                value = line["value"]
                is_lfs = line["key"] == "lfsFile"
                self.files[value["path"]] = self.objects[value["oid"]] if is_lfs else base64.b64decode(value["content"])
            self.commits.append(lines[0]["value"]["summary"])
            return {"commitUrl": f"{self.url}/you/support/commit/abc", "commitOid": "abc", "success": True}
        raise AssertionError(f"unexpected: {path}")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def push(hub, folder, **options):
    return p3.push_to_hub(folder, "you/support", endpoint=hub.url, token=TOKEN, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_byte_of_the_folder_arrives_in_one_commit(hub, folder, merged_folder):
    """Without the folders that the client itself leaves out; a merged model arrives too, publicly if asked."""
    p3.write_model_card(folder, base_model="microsoft/phi-4")
    want = contents(folder)
    for name in (".git/config", ".cache/huggingface/download/x.lock"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("secret")
    assert push(hub, folder) == f"{hub.url}/you/support/commit/abc"
    assert hub.files == want
    assert hub.created == {"name": "support", "organization": "you", "visibility": "private"}
    assert hub.commits == ["Upload with phi3lora"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert list(hub.objects) == [hashlib.sha256(hub.files["adapter.safetensors"]).hexdigest()]
    hub.files.clear()
    push(hub, merged_folder, private=False, commit_message="The model")
    assert hub.files == contents(merged_folder) and "tokenizer.json" in hub.files
    assert hub.created["visibility"] == "public" and hub.commits[1:] == ["The model"]


def test_an_adapter_that_llama_cpp_has_converted_arrives_too(hub, folder):
    """The command that export_peft prints writes it beside the adapter."""
    p3.write_model_card(folder, base_model="microsoft/phi-4")
    (folder / "adapter.gguf").write_bytes(b"GGUF")
    push(hub, folder)
    assert hub.files["adapter.gguf"] == b"GGUF"


def test_an_export_keeps_a_card_and_says_so_if_it_differs(tmp_path, caplog):
    export = partial(p3.export_peft, adapted_model(), tmp_path / "out", base_model="microsoft/phi-4")
    card = tmp_path / "out" / "README.md"
    for _ in range(2):
        export()
    assert "stays" not in caplog.text
    card.write_text("mine")
    export()
    assert card.read_text() == "mine"
    assert caplog.text.count("README.md stays as it is; write_model_card(...) replaces it") == 1


@pytest.mark.parametrize("name", ["optimizer.pt", "data.jsonl", "checkpoint-5/lora.safetensors", ".cache/token"])
def test_a_folder_with_other_files_or_with_nothing_to_publish_is_refused(hub, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("secret")
    for i in range(7):
        (folder / f"rng_state_{i}.pth").touch()
    with pytest.raises(AdapterError, match=r"should not be published: .*\.pth and 3 more\. Allowed") as caught:
        push(hub, folder)
    assert f"{name}, " in str(caught.value)
    (folder / "adapter.safetensors").unlink()
    save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
    with pytest.raises(AdapterError, match="neither an adapter nor a model"):
        push(hub, folder)
    with pytest.raises(AdapterError, match="there is no folder"):
        push(hub, folder / "none")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "model.safetensors", "notes", "folder"])
def test_links_are_not_followed(hub, folder, tmp_path, name):
    """A README.md that leads to ~/.ssh/id_rsa would publish it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret" if name == "folder" else tmp_path / "secret" / "key")
    if name.endswith(".safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "adapter.safetensors")
    with pytest.raises(AdapterError, match=rf"holds links, which are not followed: {name}\. Allowed: files"):
        push(hub, folder)
    assert hub.requests == []


def test_what_a_killed_save_left_and_a_late_file_are_not_sent(hub, folder, monkeypatch):
    """The list that was checked is sent, whatever appears in the folder meanwhile; the folder itself may be a link."""
    want = contents(folder)
    (folder / ".adapter.safetensors.999999999.tmp").write_text("half")
    answer = hub.answer

    def add_a_file(path, body):
        (folder / "config.json").write_text("{}")
        return answer(path, body)

    monkeypatch.setattr(hub, "answer", add_a_file)
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    push(hub, linked)
    assert hub.files == want and len(hub.commits) == 1


def test_a_base_that_only_this_machine_has_is_not_revealed(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("here/phi").mkdir(parents=True)  # a path of the hub's form reveals nothing
    for base in ("/nowhere/phi", "./phi", "..\\phi", "a/b/c"):
        p3.export_peft(adapted_model(), folder, base_model=base)
        with pytest.raises(AdapterError, match=r"a folder on this machine; .*export_peft\(..., base_model='owner/name"):
            push(hub, folder)
    assert hub.requests == []
    for base in ("microsoft/phi-4", "here/phi", "gpt2", "https://hub/a/b", None):
        p3.export_peft(adapted_model(), folder, base_model=base)
        push(hub, folder)
        assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ({"repos/create": 401, "api/models": 401}, "401"),
        ({"repos/create": 403, "api/models": 404}, "403"),
        ({"/preupload/": 404}, "404"),
        ({"/lfs-store/": 403}, "403"),
        ({"/commit/": 400}, "Bad request"),
    ],
    ids=str,
)
def test_a_refusal_of_the_hub_is_one_line(hub, folder, fail, message):
    hub.fail = fail
    with pytest.raises(AdapterError, match=rf"not uploaded to 'you/support' at {hub.url}: .*{message}.*token="):
        push(hub, folder)
    assert hub.files == {}


def test_an_unreachable_hub_a_bad_name_and_offline_mode_are_one_line(hub, folder, monkeypatch):
    with pytest.raises(AdapterError, match=r"at http://127\.0\.0\.1:1: .*[Cc]onnect"):
        p3.push_to_hub(folder, "you/support", endpoint="http://127.0.0.1:1", token=TOKEN)
    with pytest.raises(AdapterError, match="'a/b/c'"):
        p3.push_to_hub(folder, "a/b/c", endpoint=hub.url, token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        push(hub, folder)
    assert hub.requests == []
