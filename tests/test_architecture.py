"""The floors of the package: what a module may import, no circles, and heavy packages only when used."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mingpt

PACKAGE = Path(mingpt.__file__).parent
ROOT_LIMIT = 12

FLOORS = [
    {"utils", "kv_cache", "distributed"},
    {"algebra", "prefix"},
    {"tasks"},
    {"datasets", "decoding"},
    {"model", "text"},
    {"adapters"},
    {"storage"},
    {"training"},
    {"trainer", "evaluation"},
    {"analysis", "experiments"},
    {"huggingface"},
    {"lab"},
    {"cli", "data_tools"},
    {"__main__"},
]
"""Modules of the root and folders, from the ground up; CONTRIBUTING.md says what each is for."""

FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
"""Every module's file by its name within the package, "prefix" or "decoding.automata"; a folder is its ``__init__``."""


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
            assert not node.level, "imports are absolute"
            found.update(
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}".removeprefix("mingpt.") in MODULES
                else str(node.module)
                for alias in node.names
            )  # fmt: skip
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return {name.removeprefix("mingpt.") for name in found if name.startswith("mingpt.")}


IMPORTS = {name: package_imports(path.read_text()) for name, path in MODULES.items()}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os, mingpt", set()),
        ("import mingpt.model as m", {"model"}),
        ("import mingpt.model, mingpt.tasks", {"model", "tasks"}),
        ("from mingpt import __version__, distributed", {"distributed"}),
        ("from mingpt.tasks import Task, Add1", {"tasks"}),
        ("from mingpt.decoding import generate, automata", {"decoding", "decoding.automata"}),
        ("from mingpt.decoding.automata import DFA", {"decoding.automata"}),
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


def test_every_module_has_a_floor():
    tops = {name.split(".")[0] for name in MODULES}
    assert tops == set(FLOOR_OF), "give the new module or folder a floor in FLOORS and a line in CONTRIBUTING.md"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF), "a module is on two floors"
    in_root = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(in_root) <= ROOT_LIMIT, "the root holds what the sandbox is about; a capability has a folder"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    """A module imports from its own folder and from the floors below; two folders of one floor are strangers."""
    top = module.split(".")[0]
    others = {name.split(".")[0] for name in IMPORTS[module]} - {top}
    upward = {other for other in others if FLOOR_OF[other] > FLOOR_OF[top]}
    assert not upward, f"{module} (floor {FLOOR_OF[top]}) imports {', '.join(sorted(upward))}, which are above it"
    assert "data_tools" not in others, "data_tools is for notebooks; import from where the name lives"
    if module != top:
        assert top not in IMPORTS[module], f"{module} imports its own folder; import from the file"


def test_there_is_no_circle():
    tops = {name: {other.split(".")[0] for other in IMPORTS[name]} - {name.split(".")[0]} for name in IMPORTS}
    of_folders: dict[str, set[str]] = {}
    for name, others in tops.items():
        of_folders.setdefault(name.split(".")[0], set()).update(others)
    for graph in (IMPORTS, of_folders):
        tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_folder_names_its_public_api(folder):
    """Its ``__init__`` says what is inside, and holds imports and ``__all__`` only."""
    tree = ast.parse(MODULES[folder].read_text())
    assert len((ast.get_docstring(tree) or "").splitlines()) >= 3, "say in a few lines what is inside"
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree.body)
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    (names,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert sorted(imported) == sorted(ast.literal_eval(names)), "__all__ names what is imported"


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
heavy = ["matplotlib", "seaborn", "pandas", "transformers", "peft", "llguidance", "tensorboard"]
for name in sorted(sys.modules):
    if name in heavy:
        print(name)
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""


def test_nothing_is_pickled():
    """What is read may be anyone's: no file is unpickled, here or through torch."""
    unsafe = re.compile(r"\b(c?[pP]ickle|dill|joblib|shelve|marshal)\b|torch\.(load|save)\(|(?<![\w.`])(eval|exec)\(")
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if unsafe.search(line) and not line.lstrip().startswith("def eval(")
    ]
    assert not found
    assert unsafe.search("torch.load(path)")
    assert unsafe.search("import pickle")
