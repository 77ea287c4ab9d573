"""Everything that is read and written: one door in, one door out, downloads, and stages that are made once and kept."""
import hashlib
import http.client
import inspect
import io
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and what to do about it."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """The door through which every file is read: whatever a missing or damaged one raises becomes a BadInput naming it."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:          # there is no list of what a parser may raise on bytes that somebody made up
        raise BadInput(f"{path}: cannot be read as {what} ({str(e) or type(e).__name__})") from None


def write(path: Path, content: bytes):
    """A file that appears whole or not at all, whatever happens meanwhile: temporary name, fsync, rename. Errors: BadInput."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        if os.name == "posix":                  # the new name, too, must outlast a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); what was there is kept") from None
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------- downloads, archives

ARCHIVE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE_BYTES, ARCHIVE_MD5 = 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"


def cache() -> Path:
    """The folder of what is downloaded, which the environment variable DPO_CACHE can move."""
    return Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache" / "dpo")


def download_imdb(folder: Path) -> Path:
    """Fetch the archive once: to a temporary name, checked, then renamed. Errors: BadInput (no network, wrong bytes)."""
    path = folder / "aclImdb_v1.tar.gz"
    if path.exists():
        if (path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()) != (ARCHIVE_BYTES, ARCHIVE_MD5):
            raise BadInput(f"{path}: is not the archive that was downloaded; delete it, and it is fetched again")
        return path
    print(f"downloading {ARCHIVE} ({ARCHIVE_BYTES / 1e6:.0f} MB) into {folder}")
    part = folder / f"{path.name}.{os.getpid()}.part"
    size, md5 = 0, hashlib.md5()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(ARCHIVE, timeout=60) as source, open(part, "wb") as f, \
                tqdm(total=ARCHIVE_BYTES, unit="B", unit_scale=True, desc="downloading") as bar:
            if not source.geturl().startswith("https://"):
                raise OSError(f"it is redirected to {source.geturl()}, which is not https")
            while size <= ARCHIVE_BYTES and (block := source.read(1 << 16)):
                f.write(block)
                md5.update(block)
                size += len(block)
                bar.update(len(block))
            if (size, md5.hexdigest()) != (ARCHIVE_BYTES, ARCHIVE_MD5):
                raise OSError("what arrived is not the archive: its size or md5 differs")
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        raise BadInput(f"{ARCHIVE} could not be downloaded ({e}); try again, or name a copy of it with --imdb PATH") from None
    finally:
        part.unlink(missing_ok=True)
    return path


class Bounded:
    """A file that gives no more than `limit` bytes: a small archive can unpack to any size."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit

    def read(self, n: int) -> bytes:
        block = self.file.read(n)
        self.left -= len(block)
        if self.left < 0:
            raise OSError("it unpacks to far more than the reviews of IMDb")
        return block


# ----------------------------------------------------------------------------- stages: what is made once, and kept

@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One run at a time in a folder: the operating system's lock, which ends with the process, however that ends."""
    with open(folder / ".lock", "ab") as f:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BadInput(f"{folder}: another run is at work there; let it end, or name another folder with --out") from None
        yield


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint(name: str | None) -> object:
    """What tells that a file, or a folder of files, is not what it was; the name itself if there is none."""
    path = Path(name or "")
    if not name or not path.exists():
        return name
    if path.is_file():
        return checksum(path.read_bytes())
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in path.glob("**/*.txt"))


class Stages:
    """Results by name, each kept in a file. Each is made again only if something that it depends on has changed: a
    setting, an earlier stage's file, or source. A file that is not the one that was written there is an error."""

    def __init__(self, out: Path, settings: object, functions: dict[str, Callable], **known: object):
        self.out, self.settings, self.functions, self.known = out, settings, functions, known
        self.log = out / "stages.json"
        self.seconds: dict[str, float] = {}

    def value(self, need: str) -> object:
        if need in self.known:                              # an earlier stage, or what the run knows besides
            return self.known[need]
        if need.endswith(".py"):
            return (Path(__file__).parent.parent / need).read_text(encoding="utf-8")
        if need in ("data", "imdb", "init") and getattr(self.settings, need) not in ("toy", "imdb"):        # paths
            return fingerprint(getattr(self.settings, need))
        if hasattr(self.settings, need):
            return getattr(self.settings, need)
        return inspect.getsource(self.functions[need])

    def __call__(self, name: str, needs: str, make: Callable[[], object]):
        """The result of make(), which may depend on its own source, and on what `needs` lists: settings, sources, stages."""
        key = checksum(repr((name, inspect.getsource(make), [self.value(need) for need in needs.split()])).encode())
        path, done, entry = self.out / f"{name}.pt", {}, {}
        if self.log.exists():
            with reading(self.log, "the list of stages; delete it to start anew"):
                done = json.loads(self.log.read_bytes())
                entry = dict(done.pop(name, {}))
        if entry.get("key") == key and path.exists():
            content = path.read_bytes()
            if checksum(content) != entry.get("checksum"):
                raise BadInput(f"{path}: is not the file that was written here; delete it, and it is made again")
        else:
            if entry:                                       # taken out first, so that a new file never meets an old key
                write(self.log, json.dumps(done, indent=1).encode())
            began = time.perf_counter()
            torch.save(make(), buffer := io.BytesIO())
            content = buffer.getvalue()
            write(path, content)
            entry = dict(key=key, checksum=checksum(content), seconds=time.perf_counter() - began)
            write(self.log, json.dumps(done | {name: entry}, indent=1).encode())
        self.seconds[name] = entry.get("seconds")
        self.known[name] = key + checksum(content)          # what a stage is made from reaches all that depend on it
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def pack(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor and their lengths; `unpack` undoes it."""
    return torch.tensor([i for ids in lists for i in ids], dtype=torch.int32), torch.tensor([len(ids) for ids in lists])


def unpack(packed: tuple[Tensor, Tensor]) -> list[list[int]]:
    return [ids.tolist() for ids in packed[0].split(packed[1].tolist())]
