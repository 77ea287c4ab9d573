"""docs/troubleshooting.md: every snippet prints what the page says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/troubleshooting.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", PAGE, re.S)
assert SNIPPETS


@pytest.mark.parametrize("snippet, expected", SNIPPETS, ids=range(1, len(SNIPPETS) + 1))
def test_snippet_prints_what_the_page_says(snippet, expected):
    """A snippet run on its own  =>  the output below it"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert printed.getvalue() == expected
