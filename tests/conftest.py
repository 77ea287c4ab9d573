"""The repository's root on the path, and hypothesis without chance: the same examples on every run and machine."""
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

settings.register_profile("theorems", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("theorems")
