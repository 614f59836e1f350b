"""Files that are written completely or not at all, and the small functions that extensions import."""

import errno
import os
import re

import numpy as np
import pytest

from ldm.files import (
    files_below,
    part_beside,
    read_side_file,
    temporary_folder,
    without_leftovers,
    written_whole,
)
from ldm.util import InputError, default, exists, parallel_data_prefetch


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.bin"
    with written_whole(path) as part:
        part.write_bytes(b"whole")
        assert re.fullmatch(r"\.a\.bin\.[0-9a-f]{8}\.part", part.name)
        assert [*tmp_path.iterdir()] == [part]
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["fsync", "give"])
def test_whatever_fails_the_old_file_stays(tmp_path, monkeypatch, call, overwrite):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.bin"
    if overwrite:
        path.write_bytes(b"old")
    before = [*tmp_path.iterdir()]
    monkeypatch.setattr(os, {"fsync": "fsync", "give": "replace" if overwrite else "link"}[call], fail)
    with pytest.raises(OSError, match="No space"), written_whole(path, overwrite) as part:
        part.write_bytes(b"new")
    assert [*tmp_path.iterdir()] == before
    assert not overwrite or path.read_bytes() == b"old"


def test_a_body_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), written_whole(tmp_path / "a.bin") as part:
        part.write_bytes(b"half")
        raise KeyError
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appeared_meanwhile_is_kept(tmp_path, monkeypatch, links):
    def no_links(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if links:  # so that no check is needed before
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
    else:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.bin"
    with pytest.raises(FileExistsError), written_whole(path) as part:
        part.write_bytes(b"mine")
        path.write_bytes(b"theirs")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"theirs"


def test_hidden_names_keep_to_the_folder(tmp_path):
    names = {part_beside(tmp_path / "line\nbreak.png") for _ in range(20)}
    assert len(names) == 20
    assert all(
        name.parent == tmp_path and re.fullmatch(r"\.line\nbreak\.png\.[0-9a-f]{8}\.part", name.name)
        for name in names
    )


def test_values_that_may_be_missing():
    assert exists(0) and exists("") and not exists(None)
    assert (default(0, 5), default(None, 5), default(None, lambda: 6), default(None, int)) == (0, 5, 6, int)


def test_a_side_file_is_a_small_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("/no/such")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(20 * 2**30)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_side_file(tmp_path / "small", 2**20) == b"12345"
    reasons = {
        "pipe": "is a pipe, socket or device",
        "zeros": "is a pipe, socket or device",
        "link": "is a broken link to /no/such",
        "sparse": "is larger than 1 MB",
        "none": "does not exist",
        "": "is a folder",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"^{tmp_path / name} {reason}"):
            read_side_file(tmp_path / name, 2**20)


def test_a_temporary_folder_is_gone_at_the_end_and_dead_ones_before_it(tmp_path):
    dead, other = tmp_path / "mine-0123abcd", tmp_path / "mine-of-somebody"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / "mine-01234567").symlink_to(other)
    with temporary_folder("mine-", tmp_path) as folder:
        assert not dead.exists()
        assert (other / "file").exists()
        with temporary_folder("mine-", tmp_path):
            assert folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-01234567", "mine-of-somebody"]


def test_only_the_dead_parts_of_the_same_file_are_removed(tmp_path):
    for name in (".a.ckpt.0123abcd.part", ".b.ckpt.0123abcd.part", ".a.ckpt.part"):
        (tmp_path / name).touch()
    (tmp_path / ".a.ckpt.01234567.part").mkdir()
    with without_leftovers(tmp_path / "a.ckpt"):
        living = tmp_path / ".a.ckpt.89abcdef.part"
        living.touch()
        with without_leftovers(tmp_path / "a.ckpt"):
            assert living.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".b.ckpt.0123abcd.part", ".a.ckpt.part", ".a.ckpt.89abcdef.part"}


def test_a_folder_that_cannot_be_listed_is_named(monkeypatch, tmp_path):
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name in ("b", "sub/a", "sub/deep/c"):
        (tmp_path / name).write_bytes(b"")
    assert files_below(tmp_path, "the folder") == [tmp_path / name for name in ("b", "sub/a", "sub/deep/c")]
    with pytest.raises(InputError, match=r"^the LoRA folder .*nowhere\\n does not exist$"):
        files_below(tmp_path / "nowhere\n", "the LoRA folder")
    with pytest.raises(InputError, match="b is not a folder"):
        files_below(tmp_path / "b", "the LoRA folder")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"loop cannot be listed: .*symbolic links"):
        files_below(tmp_path / "loop", "the folder")

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.listdir", forbidden)  # root may read everything
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        files_below(tmp_path, "the folder")


@pytest.mark.parametrize("processes", [True, False], ids=["processes", "threads"])
@pytest.mark.parametrize("workers", [1, 3, 20])
def test_data_in_parts_keep_their_order(processes, workers):
    values = np.arange(14).reshape(7, 2)
    squares = parallel_data_prefetch(np.square, values, workers, cpu_intensive=processes)
    assert squares.tolist() == (values**2).tolist()
    listed = parallel_data_prefetch(sorted, [[3], [1], [2]], workers, "list", cpu_intensive=processes)
    assert sorted(listed) == [[1], [2], [3]]


def test_each_part_knows_its_worker():
    def named(part, worker_id):
        return [(worker_id, value) for value in part]

    found = parallel_data_prefetch(named, "abcd", 2, "list", cpu_intensive=False, use_worker_id=True)
    assert found == [(0, "a"), (0, "b"), (1, "c"), (1, "d")]
    with pytest.raises(ValueError, match="there are 0 values"):
        parallel_data_prefetch(named, [], 2)
