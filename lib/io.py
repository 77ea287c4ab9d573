"""Files: one-line errors, atomic writes, the cache folder, and a lock for the output folder."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class BadInput(Exception):
    """The user's input cannot be used. The message says why and what to do, in one line."""


@contextmanager
def open_user_file(path: Path, what: str) -> Iterator[None]:
    """Turn any error while reading `path` into a one-line `BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:  # parsers may raise anything on malformed bytes
        reason = str(e) or type(e).__name__
        raise BadInput(f"{path}: cannot be read as {what} ({reason})") from e


def atomic_write(path: Path, content: bytes):
    """Write a file completely or not at all: under a temporary name, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cache_dir() -> Path:
    """The folder for downloads and shared results. The environment variable DPO_CACHE moves it."""
    folder = Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache/dpo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Allow one run at a time in `folder`. The lock ends with the process."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        message = "another run is using this folder; wait for it, or choose another --out"
        raise BadInput(f"{folder}: {message}") from None
