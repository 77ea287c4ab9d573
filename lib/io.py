"""Files: one-line errors, atomic writes, downloads, and a lock for the output folder."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


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
    return Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache" / "dpo")


def download(url: str, path: Path, md5: str) -> Path:
    """Download `url` to `path` once, and verify its MD5. Raises BadInput."""
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url) as response:
            how = {"desc": f"downloading {url}", "total": response.length}
            with tqdm.wrapattr(response, "read", **how) as stream:
                content = b"".join(iter(lambda: stream.read(1 << 20), b""))
        if hashlib.md5(content).hexdigest() != md5:
            raise OSError("wrong checksum")
    except (OSError, http.client.HTTPException) as e:
        raise BadInput(f"{url}: download failed ({e}); download it yourself, see --imdb") from e
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
    return path


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Allow one run at a time in `folder`. The lock ends with the process."""
    with open(folder / ".lock", "ab") as f:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            message = "another run is using this folder; wait for it, or choose another --out"
            raise BadInput(f"{folder}: {message}") from None
        yield
