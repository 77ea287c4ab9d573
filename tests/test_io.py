"""lib/io.py: atomic writes, downloads, locks, and one-line errors."""

import hashlib
import io
import os
import urllib.error
from types import SimpleNamespace

import pytest
import torch

import tiny
import train
from lib import io as files
from lib.io import BadInput, atomic_write, file_lock, open_user_file
from lib.stage import Stage


@pytest.mark.parametrize("error", [ValueError("why"), KeyError(), RecursionError(), MemoryError()])
def test_any_error_while_reading_names_the_file_in_one_line(error, tmp_path):
    with pytest.raises(BadInput, match=r"x\.txt: cannot be read as a list"):
        with open_user_file(tmp_path / "x.txt", "a list"):
            raise error


def test_a_message_for_the_user_passes_unchanged():
    with pytest.raises(BadInput, match=r"^as it is$"), open_user_file("x", "a list"):
        raise BadInput("as it is")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(error, tmp_path, monkeypatch):
    """It fails before the rename, when all bytes are in the temporary file."""
    path = tmp_path / "results.json"
    atomic_write(path, b"old")

    def replace(source, target):
        assert open(source, "rb").read() == b"new"
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(type(error)):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


CONTENT = tiny.archive()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Response(io.BytesIO):
    def info(self):
        return SimpleNamespace(get_all=lambda name: None)  # the server does not tell the length


def arriving(content: bytes | Exception):
    def urlopen(*args, **kwargs):
        if isinstance(content, Exception):
            raise content
        return Response(content)

    return urlopen


def test_the_archive_is_downloaded_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "IMDB_SHA256", SHA256)
    monkeypatch.setattr(torch.hub, "urlopen", arriving(CONTENT))
    stage = Stage(tmp_path / "out")
    assert train.load_reviews(None, stage).keys() >= {"train/pos", "test/neg"}
    assert (files.cache_dir() / "aclImdb_v1.tar.gz").read_bytes() == CONTENT
    assert train.IMDB_URL in capsys.readouterr().out
    monkeypatch.setattr(torch.hub, "urlopen", None)
    train.load_reviews(None, stage)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        CONTENT[:-1],
        CONTENT + b"!",
        urllib.error.URLError("no network"),
        ConnectionResetError("cut off"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(content, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "IMDB_SHA256", SHA256)
    monkeypatch.setattr(torch.hub, "urlopen", arriving(content))
    with pytest.raises(BadInput, match=r"aclImdb_v1\.tar\.gz: cannot be read"):
        train.load_reviews(None, Stage(tmp_path / "out"))
    assert list(files.cache_dir().iterdir()) == []


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with file_lock(tmp_path):
        with pytest.raises(BadInput, match="another run"), file_lock(tmp_path):
            pass
    with file_lock(tmp_path):
        pass


def test_an_environment_variable_moves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.delenv("DPO_CACHE")
    assert files.cache_dir().name == "dpo"
