"""Points the theorems at dpo.py: an argument named like an offered function receives that function.

`offer.py` has the functions that this project offers, some of them adapted to the arguments that
the theorems expect.
"""

from pathlib import Path

import pytest
from worlds import tolerance_in_use

from beyond import conformance

OFFERED = conformance.load(str(Path(__file__).with_name("offer.py")))


def pytest_generate_tests(metafunc):
    for name in metafunc.fixturenames:
        if name in OFFERED:
            metafunc.parametrize(name, [OFFERED[name]], ids=[name])
        elif name in conformance.OFFERS:
            reason = "not offered by this project; test_conformance.py runs this on other code"
            metafunc.parametrize(name, [pytest.param(None, marks=pytest.mark.skip(reason))])


@pytest.fixture(autouse=True)
def double_precision():
    tolerance_in_use.set(1e-9)
