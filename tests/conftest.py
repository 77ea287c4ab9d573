"""The project on the path, deterministic Hypothesis, one thread, and tiny runs that tests share."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; threads would only spin
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from hypothesis import settings

settings.register_profile(
    "theorems", max_examples=60, deadline=None, derandomize=True, database=None
)
settings.load_profile("theorems")

# A shell ignores SIGINT in background jobs, and processes started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def recorded_run(tmp_path_factory, name: str):
    import tiny

    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_CACHE", str(folder / "cache"))
        return tiny.record(folder, tiny.config(name, folder))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A tiny run on the toy dataset: its folder, results, stages, and everything they executed."""
    return recorded_run(tmp_path_factory, "toy")


@pytest.fixture(scope="session")
def imdb(tmp_path_factory):
    return recorded_run(tmp_path_factory, "imdb")


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A tiny run on preferences of the user's own."""
    return recorded_run(tmp_path_factory, "own")
