"""The repository's root on the path, and hypothesis without chance: the same examples on every run and machine."""
import signal
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

settings.register_profile("theorems", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("theorems")

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell ignores it in the background, and so would our processes
