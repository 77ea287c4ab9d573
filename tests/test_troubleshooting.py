"""docs/troubleshooting.md: every snippet prints what the page says, and every test named exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)[1:]
ENTRIES = {section.split("\n")[0]: section for section in SECTIONS if "```python" in section}


@pytest.mark.parametrize("entry", ENTRIES)
def test_snippet_prints_what_the_page_says(entry):
    """A snippet run on its own  =>  the output below it"""
    snippet, expected = re.findall(r"```(?:python|text)\n(.*?)```", ENTRIES[entry], re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, entry, "exec"), {})
    assert printed.getvalue() == expected


def test_every_entry_has_cause_check_decision_and_fix():
    """Eight symptoms, each with all parts, in this order"""
    assert len(ENTRIES) == 8
    parts = ["Cause", "Check", "Tests", "Fix"]
    for entry, text in ENTRIES.items():
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.M) == parts, entry


def test_every_theorem_that_decides_exists():
    """`test_...` on the page  =>  a test of that name"""
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named and [name for name in named if f"def {name}(" not in sources] == []
