"""Mutation testing of dpo.py: a few mutants here, all of them with `python tests/mutate.py`."""

import os

import mutate
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
SOURCE = (mutate.ROOT / "dpo.py").read_text(encoding="utf-8")
MUTANTS = mutate.mutants(SOURCE)


@pytest.mark.parametrize("mutant", MUTANTS[7::90], ids=lambda mutant: mutant.name)
def test_mutant_makes_a_theorem_fail(mutant):
    """One edit of dpo.py  =>  a theorem fails.  pitfall 32"""
    assert str(mutate.in_fork(mutant, 10)).startswith("test_")  # not a crash or the time limit


def test_unchanged_source_survives():
    """No edit  =>  no theorem fails"""
    tree = mutate.ast.parse(SOURCE)
    unchanged = mutate.Mutant("bradley_terry: unchanged", tree, tree.body[0], tree.body[0])
    assert mutate.in_fork(unchanged, 3) is None


def test_equivalent_mutants_are_mutants(monkeypatch):
    """A name in EQUIVALENT  =>  it is a mutant of dpo.py, and `mutants` leaves it out"""
    equivalent = set(mutate.EQUIVALENT)
    monkeypatch.setattr(mutate, "EQUIVALENT", {})
    names = {mutant.name for mutant in mutate.mutants(SOURCE)}
    assert equivalent <= names and names - equivalent == {mutant.name for mutant in MUTANTS}
