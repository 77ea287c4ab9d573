"""Imports go one way and name the defining module; functions are short."""

import ast
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


def imports(name: str) -> dict[str, tuple[str, str | None]]:
    """Names that a file imports from the project: the module, and the name in it or None."""
    found = {}
    for node in ast.walk(TREES[name]):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module = getattr(node, "module", None)
            whole = f"{module}.{alias.name}" if module else alias.name
            if whole in MODULES:
                found[alias.asname or alias.name] = whole, None
            elif module in MODULES:
                found[alias.asname or alias.name] = module, alias.name
    return found


def definitions(module: str) -> set[str]:
    """The names that a module defines itself, at any level."""
    nodes = [*ast.walk(TREES[MODULES[module]])]
    made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return made | {node.id for node in names if isinstance(node.ctx, ast.Store)}


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
            if imported is None:
                assert node.attr in definitions(module), f"{name}: {module}.{node.attr}"
                assert isinstance(node.ctx, ast.Load), "a patch"


def test_imports_have_no_cycle():
    graph = {module: {m for m, _ in imports(name).values()} for module, name in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("beyond")])
def test_functions_are_short_and_import_nothing_from_the_project(name):
    """So that a reader, and lib/stage.py, can trace what they use by the names in their module."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            inner = [n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            assert not set(inner) & set(MODULES), node.name
            assert node.end_lineno - node.lineno < 40, node.name
