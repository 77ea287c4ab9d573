"""The tables of tests/README.md are true: what they name exists, and the docstrings say the same."""
import re
from pathlib import Path

import dpo
from beyond import losses, pairs, ppo

HERE = Path(__file__).parent
TABLES = [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()[2:]]
          for table in re.findall(r"(?:^\|.*\n)+", (HERE / "README.md").read_text(encoding="utf-8"), re.M)]
EQUATIONS, AFTERWARDS, PITFALLS = TABLES

# Each test's docstring, by its name.
DOCUMENTED = r'^def (test_\w+)\(.*\):\n    """((?:.|\n)*?)"""'
SAID = {name: " ".join(doc.split()) for path in sorted(HERE.glob("test_*.py"))
        for name, doc in re.findall(DOCUMENTED, path.read_text(encoding="utf-8"), re.M)}


def named_in(cell: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", cell)


def pitfalls_in(docstring: str) -> set[int]:
    found = re.search(r"pitfalls? (\d+(?:, \d+)*)", docstring)
    return set(map(int, found[1].split(", "))) if found else set()


def cited_in(text: str) -> set[str]:
    """What of the paper a text cites; "Eq. 11 to 14" is four equations, and "Eq. 3 and 4" two."""
    named = r"(?:Lemma|Theorem|Proposition|Definition) \d|Section 4's \w+|App\. A\.4|The population theorem"
    found = set(re.findall(named, text))
    for first, word, last in re.findall(r"Eq\. (\d+)(?: (to|and) (\d+))?", text):
        numbers = range(int(first), int(last) + 1) if word == "to" else [first, last] if word else [first]
        found |= {f"Eq. {n}" for n in numbers}
    return found


def test_every_equation_has_a_row_and_a_test_that_cites_it():
    """The paper's statements  =>  a row each, and the docstrings of the row's tests cite all that the row names"""
    due = {f"Eq. {n}" for n in range(1, 23)} | {
        "Definition 1", "Lemma 1", "Lemma 2", "Theorem 1", "Proposition 1", "Section 4's gradient",
        "Section 4's reference", "The population theorem"}
    assert due <= set().union(*(cited_in(row[0]) for row in EQUATIONS))
    for row in EQUATIONS:
        assert cited_in(row[0]) <= set().union(*(cited_in(SAID[name]) for name in named_in(row[2]))), row[0]


def test_every_function_named_beside_an_equation_is_in_dpo():
    """A row's second column  =>  attributes of dpo.py"""
    assert all(hasattr(dpo, name) for row in EQUATIONS for name in re.findall(r"`(\w+)`", row[1]))


def test_every_loss_that_came_after_has_a_row():
    """A row's second column  =>  functions of beyond/, and every loss of LOSSES but DPO"""
    named = {name for row in AFTERWARDS for name in re.findall(r"`(\w+)`", row[1])}
    assert [name for name in named if not any(hasattr(module, name) for module in (losses, pairs, ppo))] == []
    assert set(losses.LOSSES) - {"dpo"} <= named and all(named_in(row[3]) for row in AFTERWARDS)


def test_every_notebook_section_named_exists():
    """A row's last column, where it is not empty  =>  a heading of derive.ipynb"""
    notebook = (HERE.parent / "derive.ipynb").read_text(encoding="utf-8")
    assert [row[3] for row in EQUATIONS if row[3] and f"# {row[3]}" not in notebook] == []


def test_every_pitfall_has_a_row_with_a_test_or_a_reason():
    """Pitfalls 1 to 33  =>  one row each, in order, with tests that exist or the reason why there is none"""
    assert [int(row[0]) for row in PITFALLS] == list(range(1, 34))
    assert all(named_in(row[2]) or re.match("not applicable yet: .", row[2]) for row in PITFALLS)


def test_every_test_in_the_tables_exists():
    """A name in any table  =>  a test with a docstring"""
    named = [name for row in EQUATIONS + AFTERWARDS + PITFALLS for name in named_in(" ".join(row))]
    assert [name for name in named if name not in SAID] == []


def test_docstrings_and_table_agree_on_pitfalls():
    """A test's docstring names a pitfall  <=>  the pitfall's row names the test"""
    said = {(name, n) for name, doc in SAID.items() for n in pitfalls_in(doc)}
    assert said == {(name, int(row[0])) for row in PITFALLS for name in named_in(row[2])}
