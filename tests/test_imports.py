"""Who may import whom, read from the syntax tree; and that importing phi3lora does nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "phi3lora"
LAYERS = [
    {"errors"}, {"files", "compat"}, {"config"}, {"lora"}, {"model", "kernels", "data"}, {"inference"}, {"adapters"},
    {"training", "checks"}, {"demo", "__init__", "__main__"},
]  # fmt: skip
TOGETHER = [{"model", "kernels"}, {"training", "checks"}, LAYERS[-1]]
LAYER = {unit: height for height, units in enumerate(LAYERS) for unit in units}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, source: str) -> list[tuple[str, bool]]:
    """(dotted name below phi3lora, whether in a function) of everything of the package that a module imports."""
    package = ("phi3lora", *path.parent.parts)
    found, tree = [], ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found += [(".".join(name[1:]) or "__init__", id(node) in inside) for name in names if name[0] == "phi3lora"]
    return found


def unit(dotted: str) -> str:
    """The package or top-level module that a name below phi3lora is in; a name of ``__init__``'s own is in that."""
    first = dotted.split(".")[0]
    is_module = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if is_module else "__init__"


def violations(path: Path, source: str) -> list[str]:
    """Imports of a higher layer, of another package in the same layer, or hidden in a function."""
    own = unit(path.with_suffix("").as_posix().replace("/", "."))
    bad = []
    for name, hidden in imports(path, source):
        other = unit(name)
        # Triton and bitsandbytes are not installed everywhere: their users import them where they call them.
        optional = name.startswith(("kernels.", "training.bnb_adamw"))
        if hidden and not optional and path.as_posix() not in ("demo/__init__.py", "__main__.py"):
            bad.append(f"{path}: imports {name} inside a function")
        together = own == other or any({own, other} <= pair for pair in TOGETHER)
        if LAYER[other] > LAYER[own] and not (hidden and optional) or LAYER[other] == LAYER[own] and not together:
            bad.append(f"{path}: {own} may not import {other} ({name})")
    return bad


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_its_own_package_and_lower_layers_only(path):
    assert violations(path.relative_to(PACKAGE), path.read_text(encoding="utf-8")) == []


def test_the_loss_takes_tensors_only():
    found = imports(Path("model/loss.py"), (PACKAGE / "model" / "loss.py").read_text(encoding="utf-8"))
    assert [name for name, _ in found] == ["kernels.cross_entropy.cross_entropy_"]  # a kernel on tensors


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/batches.py", "from ..model.loss import linear_cross_entropy"),
        ("lora/layers.py", "from ..data import dataset"),
        ("lora/layers.py", "from ..training.loop import train"),
        ("config.py", "import phi3lora.lora.layers"),
        ("errors.py", "from .config import LoraConfig"),
        ("inference/generation.py", "from phi3lora import train"),
        ("inference/generation.py", "from .. import demo"),
        ("adapters/adapter_file.py", "def f():\n    from ..training import loop"),
        ("training/step.py", "def f():\n    from .loop import train"),
    ],
)
def test_the_rule_catches(path, source):
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/step.py", "from ..model.loss import x\nfrom .loop import train\nimport torch.data"),
        ("adapters/adapter_file.py", "from ..config import LoraConfig\nfrom .named import disabled"),
        ("demo/__init__.py", "def f():\n    from ..data.dataset import ChatDataset"),
        ("__main__.py", "from . import train\nfrom .demo.show import run"),
    ],
)
def test_the_rule_lets_pass(path, source):
    assert violations(Path(path), source) == []


PROBE = """
import json, logging, os, random, sys, warnings
import loralib, torch, torch._dynamo, transformers.models.phi3.modeling_phi3  # what they do is not ours

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
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]], "connected": connected, "written": written,
    "started": started, "cuda": torch.cuda.is_initialized(), "root handlers": len(logging.getLogger().handlers),
    "own handlers": len(logging.getLogger("phi3lora").handlers),
    "slow imports": [m for m in ("datasets", "pandas", "matplotlib", "peft", "wandb") if m in sys.modules],
    "adapter layers": bool(phi3lora.Linear),
}))
"""


def test_importing_phi3lora_does_nothing(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    folder.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "changed": [], "connected": [], "written": [], "started": [], "cuda": False, "root handlers": 0,
        "own handlers": 0, "slow imports": [], "adapter layers": True,
    }  # fmt: skip
    assert list(home.rglob("*")) == []
    assert list(folder.rglob("*")) == []
    assert done.stderr == ""
