"""The remembered SHA-256 of files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from ldm.checkpoints import hashing
from ldm.checkpoints.hashing import file_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ldm-v1" / "sha256.json"


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records every file that is actually read."""
    read: list[Path] = []
    digest = hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: (read.append(path), digest(path))[1])
    return read


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_the_digest_equals_hashlibs(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "m").write_bytes(content)
    assert file_sha256(tmp_path / "m") == hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path: Path, digests: list[Path]) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"one")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_sha256(path) == file_sha256(path) == file_sha256(link) and len(digests) == 1
    old = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() and len(digests) == 2
    replacement = tmp_path / "new"
    replacement.write_bytes(b"six")
    os.utime(replacement, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    os.replace(replacement, path)
    assert file_sha256(path) == hashlib.sha256(b"six").hexdigest(), "same size and time, another inode"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"x": 1}', b"[" * 100_000])
def test_a_damaged_cache_is_replaced(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(b"abc")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert file_sha256(tmp_path / "m") == hashlib.sha256(b"abc").hexdigest()
    assert json.loads(cache.read_text())[str(tmp_path / "m")]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert [entry.name for entry in cache.parent.iterdir()] == ["sha256.json"]


def test_a_file_that_changes_meanwhile_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").write_bytes(b"abc")
    monkeypatch.setattr(hashing, "_digest", lambda path: str(path.write_bytes(b"longer")))
    file_sha256(tmp_path / "m")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m").write_bytes(b"abc")
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    assert file_sha256(tmp_path / "m") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "none")
