"""docs/troubleshooting.md: every snippet prints what the page says, and every test named exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("snippet, expected", SNIPPETS, ids=range(1, len(SNIPPETS) + 1))
def test_snippet_prints_what_the_page_says(snippet, expected):
    """A snippet run on its own  =>  the output below it"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert printed.getvalue() == expected


def test_every_theorem_named_on_the_page_exists():
    """`test_...` on the page  =>  a test of that name"""
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert SNIPPETS and named and [n for n in named if f"def {n}(" not in sources] == []
