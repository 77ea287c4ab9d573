"""Imports go one way, and nothing is patched. Outside beyond/, functions are short and import no
module of the project."""

import ast
from pathlib import Path

import pytest

from tiny import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("beyond/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}
LAYER = {"dpo": 0, "model": 0, "data": 1, "lib": 2, "train": 3, "beyond": 4}


def imported(tree: ast.AST) -> set[str]:
    """The project's files and packages from which the code imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names} & LAYER.keys()


@pytest.mark.parametrize("name", TREES)
def test_imports_go_from_beyond_to_train_to_lib_to_data_to_dpo(name):
    layer = LAYER[Path(name).parts[0].removesuffix(".py")]
    for other in imported(TREES[name]):
        above = LAYER[other]
        assert above < layer or above == layer in (2, 4), f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("beyond")])
def test_functions_are_short_and_import_nothing_from_the_project(name):
    """So that a reader, and lib/stage.py, can trace what they use by the names in their module."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert not imported(node), node.name
            assert node.end_lineno - node.lineno < 40, node.name


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("beyond")])
def test_beyond_patches_nothing_and_takes_from_train_only_what_train_defines(name):
    body = TREES["train.py"].body
    own = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.targets[0].id for node in body if isinstance(node, ast.Assign)}
    modules = {Path(path).stem for path in TREES}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module == "train":
            assert {alias.name for alias in node.names} <= own
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "train" or node.attr in own
            assert node.value.id not in modules or isinstance(node.ctx, ast.Load), "a patch"
