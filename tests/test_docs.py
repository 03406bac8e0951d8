"""Run every code block of the README and docs/, every docstring example, and check names, links and the tree."""

from __future__ import annotations

import doctest
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.cli.options import parse
from phi3lora.run_file import read_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("examples/**/*.md")]
HUB_NAME = "microsoft/Phi-3-mini-4k-instruct"  # the embedded model stands in for it


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def on_the_demo(source: str) -> str:
    """The code of a page with the embedded model and a short run."""
    short = re.sub(r"max_steps([=:] ?)(500|70|40)", r"max_steps\g<1>2", source)
    return short.replace(HUB_NAME, str(p3.demo.BASE))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem == "training")) for p in PAGES if blocks(p, "python")],
    ids=lambda p: p.name,
)
def test_python_of_a_page_runs_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]
    (tmp_path / "support.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    names: dict = {"__name__": "__main__"}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(on_the_demo(block), f"{page.name}, block {i + 1}", "exec"), names)


@pytest.mark.slow
def test_the_quickstart_teaches_the_answer_that_its_page_shows(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "quickstart.md"
    [table] = blocks(page, "text")
    shown = table.splitlines()[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    exec(compile("".join(blocks(page, "python")), page.name, "exec"), {"__name__": "__main__"})
    assert shown.endswith("Order 7 is on its way.") and shown in capsys.readouterr().out


def commands(page: Path) -> list[list[str]]:
    """Return the words of each phi3lora command of a page."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(on_the_demo(line), comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["phi3lora"]]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for words in commands(ROOT / page):
        shorter = ["--set", "max_steps=2"] if words[0] == "train" else []
        assert main([*words, *shorter]) == 0


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_of_a_page_are_spelt_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        Path("run.yaml").write_text(block)
        read_run("run.yaml")
    for words in commands(page):
        options = parse(words)
        if options.settings:
            read_run(None, options.settings)


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in ALL_PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_file_names_in_a_page_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"\b(?:phi3lora|tests|examples|docs)/[\w/]+\.(?:py|md|ipynb)\b", text):
        assert (ROOT / name).is_file(), name


def test_contributing_names_every_file_of_the_package():
    tree = blocks(ROOT / "CONTRIBUTING.md", "text")[0]
    folder, listed = "", set()
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if name.endswith("/"):
            folder = "" if not indent else name
        elif name.endswith(".py"):
            listed.add((folder if len(indent) > 2 else "") + name)
    files = {p.relative_to(ROOT / "phi3lora").as_posix() for p in (ROOT / "phi3lora").rglob("*.py")}
    assert listed == {name for name in files if not name.endswith("__init__.py")}


@pytest.mark.parametrize("name", [n for n in p3.__all__ if inspect.getdoc(getattr(p3, n))])
def test_examples_of_a_docstring_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = getattr(p3, name)
    bases = [base for base in getattr(item, "__mro__", ())[1:] if base.__module__.startswith("phi3lora")]
    find = doctest.DocTestFinder(recurse=True).find
    examples = [example for each in (item, *bases) for example in find(each, name, module=False, globs={})]
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


def test_every_public_name_has_a_docstring_and_is_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in p3.__all__:
        assert inspect.getdoc(getattr(p3, name)) or name in ("lora_state_dict", "mark_only_lora_as_trainable"), name
        assert re.search(rf"\b{name}\b", page), f"{name} is not in docs/api.md"


@pytest.mark.slow
def test_own_loop_example_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))
    with p3.disabled(names["model"]):
        before = p3.evaluate(names["model"], names["eval_set"])
    assert p3.evaluate(names["model"], names["eval_set"])["loss"] < before["loss"] / 2
