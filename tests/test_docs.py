"""Every code block of the README and of docs/, every docstring example and every example script runs."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest

import phi3lora as p3
from phi3lora.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_NAME = "microsoft/Phi-3-mini-4k-instruct"  # what pages name; here the embedded model stands for it


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_page_s_python_runs_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]
    (tmp_path / "support.jsonl").write_text("".join(f"{line}\n" for line in [_json({"messages": chat})] * 40))
    names: dict = {"__name__": "__main__"}
    for i, block in enumerate(blocks(page, "python")):
        source = block.replace(HUB_NAME, str(p3.demo.BASE)).replace("max_steps=500", "max_steps=2")
        exec(compile(source, f"{page.name}, block {i + 1}", "exec"), names)


def test_the_quickstart_s_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quickstart.md"
    exec(blocks(page, "python")[0], {})
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for block in blocks(page, "bash"):
        for command in block.replace("\\\n", " ").strip().splitlines():
            words = shlex.split(command.replace(HUB_NAME, str(p3.demo.BASE)).replace("max_steps=500", "max_steps=2"))
            assert words[:3] == ["python", "-m", "phi3lora"]
            assert main(words[3:]) == 0


def test_the_readme_names_the_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.M)
    assert {"demo", "test"} <= set(commands) <= targets


def test_the_tree_in_contributing_is_the_tree():
    tree = blocks(ROOT / "CONTRIBUTING.md", "text")[0]
    package = ROOT / "phi3lora"
    for path in package.rglob("*.py"):
        assert path.name == "__init__.py" or path.name in tree, (
            f"{path.relative_to(ROOT)} is not in CONTRIBUTING's tree"
        )
    for name in re.findall(r"\S+\.py", tree):
        assert list(ROOT.glob(f"[!.]*/**/{name}")), f"the README names {name}, which does not exist"


@pytest.mark.parametrize("name", [n for n in p3.__all__ if inspect.getdoc(getattr(p3, n))])
def test_the_docstring_s_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = getattr(p3, name)
    examples = doctest.DocTestFinder(recurse=True).find(thing, name, module=False, globs={})
    if not any(example.examples for example in examples):
        return
    model, tokenizer, chats, _ = p3.demo.load()
    p3.inject_lora(model)
    names = {"p3": p3, "model": model, "tokenizer": tokenizer, "chats": chats.select(range(4))}
    runner = doctest.DocTestRunner()
    for example in examples:
        example.globs = dict(names)
        runner.run(example)
    assert runner.failures == 0


def test_every_public_name_has_a_docstring_and_a_row_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    results = {"InjectionReport", "TrainingResult"}  # what functions return, documented there
    for name in set(p3.__all__) - results:
        assert inspect.getdoc(getattr(p3, name)) or name in ("lora_state_dict", "mark_only_lora_as_trainable"), name
        assert re.search(rf"\b{name}\b", page), f"{name} is not in docs/api.md"


def test_the_own_loop_example_lowers_the_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))
    with p3.disabled(names["model"]):
        before = p3.evaluate(names["model"], names["eval_set"])
    assert p3.evaluate(names["model"], names["eval_set"])["loss"] < before["loss"] / 2


def _json(value) -> str:
    import json

    return json.dumps(value)
