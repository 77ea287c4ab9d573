"""Mutation testing of dpo.py: nearly every small edit must make a theorem fail.

    python tests/mutate.py               all mutants
    python tests/mutate.py frontier      those of one function

An edit changes one node of the syntax tree: an operator, a comparison, a constant, the order of
two arguments, a keyword argument, a call, a decorator. It is found in the tree, not by its text, so
renaming breaks only entries of EQUIVALENT. Each mutant runs in a forked process, in which it takes
the place of the module `dpo`.
"""

import ast
import copy
import importlib
import inspect
import multiprocessing
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401  before the fork, because it takes a second
import pytest
import torch
import torch.testing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THEOREMS = (
    "test_logps",
    "test_loss",
    "test_preferences",
    "test_optimum",
    "test_training",
    "test_population",
)
SECONDS = 120  # a mutant that runs longer may only be slow, and does not count as killed

SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq}
SWAPS |= {after: before for before, after in SWAPS.items()}
METHODS = {"sum": "mean", "mean": "sum", "max": "min", "min": "max", "any": "all", "all": "any"}

# Mutants that compute the same function, each with the reason.
EQUIVALENT = {
    # The terms are summed over k, so their order does not matter.
    "plackett_luce: r.flip(-1).logcumsumexp(-1).flip(-1) -> r.flip(-1).logcumsumexp(-1)",
    # Promotion is symmetric.
    "log_softmax: torch.promote_types(logits.dtype, torch.float32)"
    " -> torch.promote_types(torch.float32, logits.dtype)",
    # The tensor has two dimensions.
    "sequence_kl: -1 -> 1 (place 4)",
    "pair_logps: -1 -> 1",
    "pair_logps: -1 -> 1 (place 2)",
    # A one-element tensor can be a slice bound.
    "select: int(self.mask[rows].any(0).nonzero().max()) -> self.mask[rows].any(0).nonzero().max()",
    # self.pairs[:, 1]: both rows of a pair have the same prompt.
    "select: 0 -> 1",
}


class Mutant(NamedTuple):
    name: str  # "function: before -> after"
    whole: ast.Module
    node: ast.AST  # a node of `whole`
    edited: ast.AST | None  # what takes its place; None is nothing

    @property
    def tree(self) -> ast.Module:
        """A copy of the module with the edit applied."""
        edited = ast.Pass() if self.edited is None else copy.deepcopy(self.edited)
        return ast.fix_missing_locations(copy.deepcopy(self.whole, {id(self.node): edited}))


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, without those in EQUIVALENT."""
    tree = ast.parse(source)
    found, places = [], Counter()
    for function, node in code_nodes(tree):
        for edited in edits(node):
            after = "nothing" if edited is None else ast.unparse(edited)
            name = f"{function}: {ast.unparse(node)} -> {after}"
            places[name] += 1  # the same edit in several places in the function
            if places[name] > 1:
                name = f"{name} (place {places[name]})"
            found.append(Mutant(name, tree, node, edited))
    return [mutant for mutant in found if mutant.name not in EQUIVALENT]


def code_nodes(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The nodes inside functions, with the function's name; no annotations and no docstrings."""
    for outer in ast.walk(tree):
        if not isinstance(outer, ast.FunctionDef):
            continue
        body = outer.body[1:] if ast.get_docstring(outer) else outer.body
        for part in [*body, *outer.args.defaults, *outer.decorator_list]:
            for node in ast.walk(part):
                yield outer.name, node


def edits(node: ast.AST) -> Iterator[ast.AST | None]:
    """The nodes that take the place of this one. None removes a statement."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Constant):
        yield from constants(node)
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
        yield from swapped(node, "elts")
    if isinstance(node, ast.Call):
        yield from calls(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield None


def constants(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield ast.Constant(-node.value)


def calls(node: ast.Call) -> Iterator[ast.AST]:
    """Exchanged arguments, a dropped keyword, another method, the call removed."""
    yield from swapped(node, "args")
    for i in range(len(node.keywords)):
        yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if isinstance(node.func, ast.Attribute):
        yield node.func.value  # x.f(...) -> x
        if node.func.attr in METHODS:
            method = ast.Attribute(node.func.value, METHODS[node.func.attr], ast.Load())
            yield ast.Call(method, node.args, node.keywords)
    if node.args:
        yield node.args[0]  # f(x, ...) -> x


def swapped(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """The node with two neighbouring entries of a list exchanged."""
    items = getattr(node, field)
    for i in range(len(items) - 1):
        other = copy.copy(node)
        setattr(other, field, [*items[:i], items[i + 1], items[i], *items[i + 2 :]])
        yield other


# ------------------------------------------------- running the theorems on a mutant


def first_failure(mutant: Mutant, examples: int) -> str | None:
    """The first theorem that fails when the mutant takes the place of dpo."""
    forget_project()
    module = types.ModuleType("dpo")
    sys.modules["dpo"] = module
    failed = "import"
    try:
        exec(compile(mutant.tree, "mutant of dpo.py", "exec"), vars(module))
        from beyond import conformance

        offered = conformance.load(str(ROOT / "tests" / "theorems" / "offer.py"))
        with conformance.hypothesis_profile(examples, shrink=False):
            for test, arguments in in_order(mutant, offered):
                conformance.reset_tolerance()
                failed = test.__name__
                test(**arguments)
    except (Exception, pytest.fail.Exception):
        return failed
    return None


def forget_project():
    """Modules of this project are imported again, because they hold functions of dpo."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(str(ROOT)) and name != __name__:
            del sys.modules[name]


def in_order(mutant: Mutant, offered: dict) -> list[tuple]:
    """All tests with their arguments, and those about the mutated function first."""
    modules = [importlib.import_module(name) for name in THEOREMS]
    found = [case for module in modules for case in cases(module, offered)]
    function = mutant.name.split(":")[0]
    return sorted(found, key=lambda case: function not in case[1])


def cases(module: types.ModuleType, offered: dict) -> Iterator[tuple]:
    """The tests of a module with their arguments: offered functions, and one parameter or none."""
    for name, test in list(vars(module).items()):
        if not name.startswith("test_"):
            continue
        needed = set(inspect.signature(test).parameters)
        marks = [mark.args for mark in getattr(test, "pytestmark", [])]
        choices = [{parameter: value} for parameter, values in marks for value in values]
        for choice in choices or [{}]:
            if needed - set(choice) <= set(offered):
                yield test, {key: offered[key] for key in needed - set(choice)} | choice


def in_fork(mutant: Mutant, examples: int) -> str | None:
    """`first_failure` in a forked process."""
    fork = multiprocessing.get_context("fork")
    answers, answer = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: answer.send(first_failure(mutant, examples)))
    process.start()
    answer.close()  # so that a crash ends the wait
    try:
        return answers.recv() if answers.poll(SECONDS) else "time limit"
    except EOFError:
        return "crash"
    finally:
        process.kill()
        process.join()


def killer(mutant: Mutant) -> str | None:
    """The theorem that notices the mutant: few examples first, then as many as in the suite."""
    return in_fork(mutant, 10) or in_fork(mutant, 60)


def main(functions: list[str]) -> int:
    source = (ROOT / "dpo.py").read_text(encoding="utf-8")
    every = [m for m in mutants(source) if not functions or m.name.split(":")[0] in functions]
    torch.set_num_threads(1)
    killed = 0
    for i, mutant in enumerate(every, 1):
        theorem = killer(mutant)
        killed += theorem not in (None, "time limit")
        print(f"{i}/{len(every)} {theorem or 'SURVIVES'}  |  {mutant.name}", flush=True)
    print(
        f"{killed} of {len(every)} mutants killed ({100 * killed / len(every):.1f} %), "
        f"{len(EQUIVALENT)} equivalent ones left out"
    )
    return int(killed < 0.97 * len(every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
