"""The layers of the package: a module imports only from layers below its own, and heavy packages only when used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mingpt

PACKAGE = Path(mingpt.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

LAYERS = [
    {"utils", "tasks", "automata", "precision", "past", "distributed"},
    {"datasets", "prefix", "logits_processors", "optim", "sharding", "lora"},
    {"generation", "batches", "constraints", "grammar", "checkpoint"},
    {"model", "predictor", "watch"},
    {"trainer", "evaluation", "visualization", "store"},
    {"multistep", "analysis", "interop", "constructions", "stages"},
    {"experiment", "comparison"},
    {"cli", "data_tools"},
    {"__main__"},
]
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}


def package_imports(source: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in it, but not under ``if TYPE_CHECKING:``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["mingpt" if node.level else "", node.module]))
            found.update([base] + [f"{base}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    inside = {name.split(".")[1] for name in found if name.startswith("mingpt.")}
    return inside & (LAYER_OF.keys() | set(MODULES))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os, mingpt", set()),
        ("import mingpt.model as m", {"model"}),
        ("import mingpt.model, mingpt.tasks", {"model", "tasks"}),
        ("from mingpt import __version__, generation", {"generation"}),
        ("from mingpt.tasks import Task, Add1", {"tasks"}),
        ("from . import utils", {"utils"}),
        ("from .prefix import Prefix", {"prefix"}),
        ("def f():\n    class A:\n        from mingpt.trainer import Trainer", {"trainer"}),
        ("try:\n    import mingpt.cli\nexcept ImportError:\n    pass", {"cli"}),
        ("import importlib\nimportlib.import_module('mingpt.model')", {"model"}),
        ("if TYPE_CHECKING:\n    import mingpt.model\nelse:\n    import mingpt.tasks", {"tasks"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    from mingpt.model import GPT", set()),
        ("if not TYPE_CHECKING:\n    import mingpt.model", {"model"}),
        ("from model import x\nimport tasks", set()),
    ],
)
def test_imports_are_found(source, expected):
    assert package_imports(source) == expected


def test_every_module_has_a_layer():
    assert MODULES, PACKAGE
    assert set(MODULES) <= set(LAYER_OF), "give the new module a place in LAYERS and in CONTRIBUTING.md"
    assert sum(map(len, LAYERS)) == len(LAYER_OF), "a module is in two layers"
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert folders == {"."}, "the package is flat"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    imported = package_imports((PACKAGE / f"{module}.py").read_text())
    assert {module, *imported} <= LAYER_OF.keys(), "give the new module a place in LAYERS"
    upward = {other for other in imported if LAYER_OF[other] >= LAYER_OF[module]}
    assert not upward, f"{module} (layer {LAYER_OF[module]}) imports {', '.join(sorted(upward))}, not below it"
    assert "data_tools" not in imported, "data_tools is for notebooks; import from where the name lives"


def test_the_package_itself_imports_nothing():
    """Any module may import ``mingpt``, so it must not import any of them."""
    assert package_imports((PACKAGE / "__init__.py").read_text()) == set()


def test_importing_is_light_and_silent():
    """Heavy packages are imported where they are used, and importing does no work that shows."""
    modules = [module for module in MODULES if module != "__main__"]  # that one is there to be run
    script = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module("mingpt." + module)
heavy = ["matplotlib", "seaborn", "transformers", "peft", "llguidance", "tensorboard"]
for name in sorted(sys.modules):
    if name in heavy:
        print(name)
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""
