"""One-way imports of the defining module, short functions, and a tidy top level."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tiny import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("beyond/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}
MODULES = {
    name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in TREES
}
LAYER = {"dpo": 0, "model": 0, "data": 1, "lib": 2, "train": 3, "beyond": 4}

ENTRIES = """README.md LICENSE requirements.txt .ruff.toml .gitignore .ci .github
    .pre-commit-config.yaml dpo.py model.py data.py train.py derive.ipynb lib beyond tests docs
    results""".split()


def imports(name: str) -> dict[str, tuple[str, str | None]]:
    """Names that a file imports from the project: the module, and the name in it or None."""
    found = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    found[alias.asname or alias.name] = alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    found[alias.asname or alias.name] = whole, None
                elif node.module in MODULES:
                    found[alias.asname or alias.name] = node.module, alias.name
    return found


def definitions(module: str) -> set[str]:
    """The names that a module defines itself, at the top level."""
    found = set()
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("name", TREES)
def test_imports_go_from_beyond_to_train_to_lib_to_data_to_dpo(name):
    layer = LAYER[Path(name).parts[0].removesuffix(".py")]
    for module, _ in imports(name).values():
        above = LAYER[module.split(".")[0]]
        assert above < layer or above == layer in (2, 4), f"{name} imports {module}"


@pytest.mark.parametrize("name", TREES)
def test_names_are_imported_from_the_module_that_defines_them(name):
    """No re-exports: neither `from m import x` nor `m.x`, if m imports x from elsewhere."""
    found = imports(name)
    for module, imported in found.values():
        if imported:
            assert imported in definitions(module), f"{name}: {module}.{imported}"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, imported = found.get(node.value.id, (None, "x"))
            if imported is None and isinstance(node.ctx, ast.Load):
                assert node.attr in definitions(module), f"{name}: {module}.{node.attr}"
            assert (imported is None and isinstance(node.ctx, ast.Load)) or imported, "a patch"


def test_imports_have_no_cycle():
    graph = {module: {m for m, _ in imports(name).values()} for module, name in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_stages_can_be_followed_because_project_imports_are_at_the_top():
    """lib/stage.py finds code by the names of a module, so no function imports project code."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not name.startswith("beyond"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.ImportFrom):
                        assert inner.module not in MODULES, f"{name}: {node.name}"


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("beyond")])
def test_functions_have_at_most_40_lines(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - (first[0].lineno if first else node.end_lineno) + 1
            assert lines <= 40, f"{name}: {node.name} has {lines} lines"


def test_the_top_level_holds_what_a_reader_expects():
    try:
        command = ["git", "ls-files"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    assert {path.parts[0] for path in paths} <= set(ENTRIES)
    assert not [path for path in paths if path.suffix in (".pyc", ".log", ".part", ".tmp")]
