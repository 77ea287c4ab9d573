"""The tables of tests/README.md are true: tests and functions exist, and no row is missing."""

import ast
import re
from pathlib import Path

import dpo

TESTS = Path(__file__).resolve().parent
TABLES = re.findall(r"(?:^\|.*\n)+", (TESTS / "README.md").read_text(encoding="utf-8"), re.M)
EQUATIONS, PITFALLS = [
    [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    for table in TABLES
]
DOCSTRINGS = {
    node.name: " ".join((ast.get_docstring(node) or "").split())
    for path in TESTS.rglob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}


def names_in(row: list[str]) -> list[str]:
    return re.findall(r"`(test_\w+)`", row[2])


def equations_in(text: str) -> set[int]:
    """The text `Eq. 6, 16 and 17` names three equations, and `Eq. 11 to 15` five."""
    found = set()
    for numbers in re.findall(r"Eq\. (\d+(?:(?:, | and | to )\d+)*)", text):
        listed = list(map(int, re.findall(r"\d+", numbers)))
        found |= set(range(listed[0], listed[-1] + 1)) if "to" in numbers else set(listed)
    return found


def test_every_equation_has_a_row_and_a_test_that_cites_it():
    """Eq. 1 to 22 without 21, which is misprinted  =>  a row whose tests cite it"""
    assert set().union(*(equations_in(row[0]) for row in EQUATIONS)) == set(range(1, 23)) - {21}
    for row in EQUATIONS:
        cited = set().union(*(equations_in(DOCSTRINGS[test]) for test in names_in(row)))
        assert equations_in(row[0]) <= cited, row[0]


def test_every_pitfall_has_a_row_with_a_test():
    """Pitfalls 1 to 33  =>  one row each, in order, with at least one test"""
    assert [int(row[0]) for row in PITFALLS] == list(range(1, 34))
    assert all(names_in(row) for row in PITFALLS)


def test_every_test_and_function_named_exists():
    """A name in a table or in docs/  =>  a test, or a function of dpo.py"""
    pages = [TESTS / "README.md", *TESTS.parent.glob("docs/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in re.findall(r"`(test_\w+)`", text) if name not in DOCSTRINGS] == []
    functions = [name for row in EQUATIONS for name in re.findall(r"`(\w+)`", row[1])]
    assert functions and all(hasattr(dpo, name) for name in functions)
