"""What a failing theorem most likely means: the mistake, its pitfall number, and the fix.

`beyond.conformance` prints it with the failure. Within a file, theorems about one function are in
the order of diagnosis: the first one that fails names the mistake.
"""

from collections.abc import Callable
from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    pitfall: int | None  # its row in the table of pitfalls in tests/README.md
    fix: str


def mistake(name: str, pitfall: int | None, fix: str) -> Callable:
    """Decorator: attach the likely mistake to a theorem."""

    def attach(theorem: Callable) -> Callable:
        theorem.mistake = Mistake(name, pitfall, fix)
        return theorem

    return attach
