"""The list of wrong implementations."""

from collections.abc import Callable
from typing import NamedTuple


class Wrong(NamedTuple):
    offer: str  # the name under which the function is offered
    function: Callable
    pitfall: int | None
    theorem: str  # the statement that must name the mistake, without `test_`


WRONG: list[Wrong] = []


def wrong(offer: str, pitfall: int | None, theorem: str) -> Callable:
    """Decorator: register a function that makes one mistake."""

    def register(function: Callable) -> Callable:
        WRONG.append(Wrong(offer, function, pitfall, theorem))
        return function

    return register
