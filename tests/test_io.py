"""lib/io.py: atomic writes, downloads, and one-line errors."""

import hashlib
import io
import os
import urllib.error
from types import SimpleNamespace

import pytest
import torch

import tiny
import train
from lib.io import BadInput, atomic_write, open_user_file
from lib.stage import Stage


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("why"), r"x\.txt: cannot be read as a list \(why\)"),
        (MemoryError(), r"x\.txt: cannot be read as a list \(MemoryError\)"),
        (BadInput("as it is"), "^as it is$"),
    ],
)
def test_any_error_while_reading_names_the_file_in_one_line(error, message, tmp_path):
    with pytest.raises(BadInput, match=message), open_user_file(tmp_path / "x.txt", "a list"):
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(error, tmp_path, monkeypatch):
    """It fails before the rename, when all bytes are in the temporary file."""
    path = tmp_path / "results.json"
    atomic_write(path, b"old")

    def replace(source, target):
        assert open(source, "rb").read() == b"new"
        raise error

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


CONTENT = tiny.archive()


class Response(io.BytesIO):
    def info(self):
        return SimpleNamespace(get_all=lambda name: None)  # the server does not send the length


@pytest.fixture
def download(tmp_path, monkeypatch):
    """download(content) calls load_reviews on a network that delivers content, or raises it."""

    def download(content: bytes | Exception):
        def urlopen(*args, **kwargs):
            if isinstance(content, Exception):
                raise content
            return Response(content)

        monkeypatch.setattr(torch.hub, "urlopen", urlopen)
        return train.load_reviews(None, Stage(tmp_path / "out"))

    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "IMDB_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return download


def test_the_archive_is_downloaded_once(download, tmp_path, capsys):
    """Into the folder that the environment variable DPO_CACHE names."""
    assert download(CONTENT).keys() >= {"train/pos", "test/neg"}
    assert (tmp_path / "cache" / "aclImdb_v1.tar.gz").read_bytes() == CONTENT
    assert train.IMDB_URL in capsys.readouterr().out
    download(AssertionError("another download"))


@pytest.mark.parametrize(
    "content", [CONTENT[:-1], urllib.error.URLError("no network"), ConnectionResetError("cut off")]
)
def test_a_download_that_fails_gives_one_line_and_leaves_nothing(content, download, tmp_path):
    with pytest.raises(BadInput, match=r"aclImdb_v1\.tar\.gz: cannot be read"):
        download(content)
    assert list((tmp_path / "cache").iterdir()) == []
