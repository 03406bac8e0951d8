"""The order of the package, its freedom from import cycles, and that importing phi3lora has no side effects."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import phi3lora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "phi3lora"
FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
ORDER = """
errors
files processes display | compat
config run_settings run_file
lora
model kernels | data
inference
adapters
training checks
demo cli __init__ __main__
"""
"""A file may import its own group and the lines above it. A bar separates the groups of one line."""

LEVELS = [[group.split() for group in line.split("|")] for line in ORDER.strip().splitlines()]
PLACE = {name: (i, j) for i, groups in enumerate(LEVELS) for j, group in enumerate(groups) for name in group}

# Imports inside a function: Triton is optional, and these two files are read before the rest of the package.
DEFERRED_MODULES = ("kernels/",)
DEFERRING_FILES = ("demo/__init__.py", "__main__.py")


class Import(NamedTuple):
    file: str
    """File below phi3lora that is imported."""
    deferred: bool
    """True inside a function."""


def imports_of(path: str, source: str) -> list[Import]:
    """Return the imports of phi3lora's own files in a file of the package."""
    tree, package = ast.parse(source), ["phi3lora", *Path(path).parent.parts]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {node for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        found += [Import(file_of(name[1:]), node in deferred) for name in names if name[0] == "phi3lora"]
    return found


def file_of(name: list[str]) -> str:
    """Return the file of a module below phi3lora, or of the module that defines the name."""
    for parts in (name, name[:-1]):
        for file in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if (PACKAGE / file).is_file():
                return file
    raise AssertionError(f"no file for {name}")


def group_of(file: str) -> tuple[int, int]:
    return PLACE[Path(file).parts[0].removesuffix(".py")]


def violations(path: str, source: str) -> list[str]:
    """Return the imports that break the order, or that a function hides without need."""
    own, bad = group_of(path), []
    for file, deferred in imports_of(path, source):
        optional = deferred and file.startswith(DEFERRED_MODULES)
        if deferred and not optional and path not in DEFERRING_FILES:
            bad.append(f"{path} imports {file} inside a function")
        if group_of(file) != own and group_of(file)[0] >= own[0] and not optional:
            bad.append(f"{path} may not import {file}")
    return bad


def source_of(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_its_own_group_and_those_above(file):
    assert violations(file, source_of(file)) == []


def test_no_files_import_each_other():
    graph = {file: {i.file for i in imports_of(file, source_of(file)) if not i.deferred} for file in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the files of a cycle
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**graph, "errors.py": {"config.py"}}).prepare()


def test_the_loss_takes_tensors_only():
    assert [i.file for i in imports_of("model/loss.py", source_of("model/loss.py"))] == ["kernels/cross_entropy.py"]


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("data/batches.py", "from ..model.loss import linear_cross_entropy", False),
        ("config.py", "import phi3lora.lora.layers", False),
        ("inference/generation.py", "from phi3lora import train", False),
        ("training/step.py", "def f():\n    from .loop import train", False),
        ("training/step.py", "from ..model.loss import x\nfrom .loop import train\nimport torch.data", True),
        ("lora/base_weight.py", "def f():\n    from ..kernels import nf4", True),
        ("demo/__init__.py", "def f():\n    from ..data.dataset import ChatDataset", True),
        ("__main__.py", "from . import train\nfrom .demo.show import run_demo", True),
    ],
)
def test_the_rule_itself(path, source, allowed):
    assert (violations(path, source) == []) == allowed


def test_import_phi3lora_alone_loads_no_library():
    code = "import sys; old = set(sys.modules); import phi3lora; print(*sorted(set(sys.modules) - old))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "phi3lora" in loaded
    assert loaded - {"phi3lora"} <= set(sys.stdlib_module_names)


def test_layers_and_settings_load_no_part_of_transformers():
    code = "import sys, phi3lora as p3; p3.inject_lora, p3.Linear, p3.LoraConfig; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"transformers", "datasets", "huggingface_hub"} & set(done.stdout.split())


def test_the_names_for_type_checkers_are_those_at_run_time():
    block = next(node for node in ast.parse(source_of("__init__.py")).body if isinstance(node, ast.If))
    imported = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: "." * node.level + (node.module or "") for node in imported for alias in node.names}
    assert seen == {**phi3lora._HOME_OF, "demo": "."}
    assert sorted(seen) == phi3lora.__all__
    assert set(phi3lora.__all__) <= set(dir(phi3lora))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = phi3lora.nonsense


PROBE = """
import json, logging, os, random, sys, warnings
import loralib, torch, torch._dynamo, transformers.models.phi3.modeling_phi3  # their side effects are not ours

connected, written, started = [], [], []
def watch(event, arguments):
    if event == "socket.connect":
        connected.append(str(arguments[1]))
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        written.append(str(arguments[0]))
    elif event == "subprocess.Popen":
        started.append(str(arguments[0]))
def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "python random": repr(random.getstate()),
        "torch random": torch.get_rng_state().tolist(), "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()), "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(), "warnings": repr(warnings.filters),
        "root log level": logging.getLogger().level, "log level": logging.getLogger("transformers").level,
    }
before = state()
sys.addaudithook(watch)
import phi3lora
for name in phi3lora.__all__:
    getattr(phi3lora, name)  # a name is imported when it is first used
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]], "connected": connected, "written": written,
    "started": started, "cuda": torch.cuda.is_initialized(), "root handlers": len(logging.getLogger().handlers),
    "own handlers": len(logging.getLogger("phi3lora").handlers),
    "optional imports": [m for m in ("datasets", "pandas", "matplotlib", "peft", "wandb") if m in sys.modules],
}))
"""


def test_importing_phi3lora_has_no_side_effects(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    folder.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "changed": [], "connected": [], "written": [], "started": [], "cuda": False, "root handlers": 0,
        "own handlers": 0, "optional imports": [],
    }  # fmt: skip
    assert [*home.rglob("*"), *folder.rglob("*")] == []
