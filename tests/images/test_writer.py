from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.images.writer import RunFolder, encode_png, publish
from ldm.util import InputError
from tests.support.paths import ROOT

SYSTEM_CALLS = ("open", "write", "fsync", "close", "link", "replace", "unlink")
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def failing_at(
    monkeypatch: pytest.MonkeyPatch, call: str, n: int, fault: Callable[[], BaseException]
) -> Iterator[int]:
    """Lets the n-th use of `os.call` fail (a failing close still closes); returns the counter of its uses."""
    real, count = getattr(os, call), itertools.count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(count) != n:
            return real(*args, **kwargs)
        if call == "close":
            real(*args, **kwargs)
        raise fault()

    monkeypatch.setattr(os, call, wrapper)
    return count


FAULTS: dict[str, Callable[[], BaseException]] = {
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "quota": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "i/o error": lambda: OSError(errno.EIO, "Input/output error"),
    "interrupt": KeyboardInterrupt,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_whichever_system_call_fails_files_are_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: str, overwrite: bool
) -> None:
    old, new = b"old" * 100, b"new" * 5000
    for n in range(1, 20):
        path = tmp_path / f"{n}.png"
        if overwrite:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            count = failing_at(patch, call, n, FAULTS[fault])
            try:
                publish(path, new, overwrite)
                failure = None
            except (OSError, KeyboardInterrupt) as error:
                failure = error
            fault_reached = next(count) > n
        content = path.read_bytes() if path.exists() else None
        assert content in ((new,) if failure is None else (new, old) if overwrite else (new, None))
        if isinstance(failure, OSError):
            assert failure.filename == str(path)
        if call != "unlink":
            assert not list(tmp_path.glob(".*"))
        if not fault_reached:
            assert failure is None
            return
    pytest.fail("publish never got through")


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    publish(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_the_disk_is_told_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for call in ("write", "fsync", "link"):
        real = getattr(os, call)
        monkeypatch.setattr(
            os, call, lambda *args, call=call, real=real: (order.append(call), real(*args))[1]
        )
    publish(tmp_path / "a", b"x")
    assert order == ["write", "fsync", "link", "fsync"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def no_links(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    publish(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "a", b"second")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_where_folders_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    failing_at(monkeypatch, "fsync", 2, lambda: OSError(code, os.strerror(code)))
    publish(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
def test_a_file_that_cannot_be_synced_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    failing_at(monkeypatch, "fsync", 1, lambda: OSError(code, os.strerror(code)))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        publish(tmp_path / "a", b"x")
    assert names(tmp_path) == []


def test_publish_overwrites_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    publish(path, b"first")
    with pytest.raises(FileExistsError):
        publish(path, b"second")
    assert path.read_bytes() == b"first"
    publish(path, b"third", overwrite=True)
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["a"]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    publish(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_name_that_is_too_long_is_an_oserror_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with pytest.raises(OSError, match="too long") as caught:
        publish(path, b"x")
    assert caught.value.filename == str(path)


def test_names_and_pixels_of_a_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b") as run:
        paths = [run.save_sample(PICTURE, "text"), run.save_sample(PICTURE), run.save_grid(PICTURE)]
    assert names(tmp_path / "a" / "b") == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    assert [path.name for path in paths] == ["00000.png", "00001.png", "grid-0000.png"]
    for path in paths:
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_numbers_go_on_after_the_highest_not_the_count(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        for _ in range(3):
            run.save_sample(PICTURE)
        run.save_grid(PICTURE)
    (tmp_path / "samples" / "00001.png").unlink()
    (tmp_path / "notes.txt").write_text("a stray file")
    (tmp_path / "samples" / "00099-copy.png").write_bytes(b"")
    with RunFolder(tmp_path) as run:
        assert run.save_sample(PICTURE).name == "00003.png"
        assert run.save_grid(PICTURE).name == "grid-0001.png"


def test_numbers_grow_a_digit(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "99998.png").touch()
    (tmp_path / "grid-9999.png").touch()
    with RunFolder(tmp_path) as run:
        assert [run.save_sample(PICTURE).name for _ in range(2)] == ["99999.png", "100000.png"]
        assert run.save_grid(PICTURE).name == "grid-10000.png"
    with RunFolder(tmp_path) as run:
        assert run.save_sample(PICTURE).name == "100001.png"


def test_a_file_that_appears_during_the_run_is_passed_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        foreign = tmp_path / "samples" / "00000.png"
        foreign.write_bytes(b"mine")
        (tmp_path / "samples" / "00001.png").symlink_to("nowhere")
        assert run.save_sample(PICTURE).name == "00002.png"
    assert foreign.read_bytes() == b"mine"


def test_a_name_taken_at_the_last_moment_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path) as run:
        (tmp_path / "samples" / "00000.png").write_bytes(b"mine")
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        assert run.save_sample(PICTURE).name == "00001.png"
    assert (tmp_path / "samples" / "00000.png").read_bytes() == b"mine"


def test_a_failed_write_leaves_its_number_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path) as run:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            failing_at(patch, "write", 1, FAULTS["no space"])
            run.save_sample(PICTURE)
        assert names(tmp_path) == []
        assert run.save_sample(PICTURE).name == "00000.png"


@pytest.mark.parametrize("where", ["outdir", "parent", "samples"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, where: str) -> None:
    outdir = tmp_path / "out\x1b[31m"
    if where == "samples":
        outdir.mkdir()
        (outdir / "samples").touch()
    else:
        outdir.touch()
    with pytest.raises(InputError, match=r"--outdir") as caught:
        RunFolder(outdir / "deeper" if where == "parent" else outdir)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, "open", 1, lambda: OSError(code, os.strerror(code)))
        with pytest.raises(InputError, match=re.escape(os.strerror(code))):
            RunFolder(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, "listdir", n, lambda: OSError(errno.EACCES, "Permission denied"))
        with pytest.raises(InputError, match=r"Permission denied; choose another --outdir"):
            RunFolder(tmp_path)


def test_folder_names_may_be_odd(tmp_path: Path) -> None:
    for name in ("-rf", "new\nline", "日本語", os.fsdecode(b"\xff\xfe")):
        with RunFolder(tmp_path / name) as run:
            assert run.save_sample(PICTURE).is_file()


def test_the_next_run_sweeps_what_a_dead_one_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples").mkdir()
    for stale in (".grid-0000.png.0123abcd.part", "samples/.00000.png.0123abcd.part"):
        (tmp_path / stale).touch()
    kept = [".hidden", "samples/.00000.png.part", "samples/film.part"]
    kept += [".other.txt.0123abcd.part", ".film.png.0123abcd.part"]  # another program's
    for foreign in kept:
        (tmp_path / foreign).touch()
    with caplog.at_level(logging.INFO, "ldm"), RunFolder(tmp_path):
        assert names(tmp_path) == sorted(kept)
    assert len(caplog.records) == 2


def test_the_parts_of_a_living_run_are_left_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        part = tmp_path / "samples" / ".00000.png.0123abcd.part"
        part.touch()
        RunFolder(tmp_path).close()
        assert part.exists()
    RunFolder(tmp_path).close()
    assert not part.exists()


WRITER = """
import sys
import numpy as np
from ldm.images.writer import RunFolder
with RunFolder(sys.argv[1]) as run:
    print("ready", flush=True)
    for i in range(int(sys.argv[3])):
        run.save_sample(np.full((64, 64, 3), int(sys.argv[2]), np.uint8), sys.argv[2])
        run.save_grid(np.full((64, 64, 3), int(sys.argv[2]), np.uint8), sys.argv[2])
"""


def start_writer(folder: Path, shade: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(shade), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def shade_of(path: Path) -> int:
    with Image.open(path) as image:
        pixels = np.asarray(image)
        assert image.info["parameters"] == str(pixels[0, 0, 0])
    assert (pixels == pixels[0, 0, 0]).all()
    return int(pixels[0, 0, 0])


def test_two_processes_in_one_folder_lose_nothing(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, shade, 40) for shade in (1, 2)]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0]
    for found in (list((tmp_path / "samples").iterdir()), list(tmp_path.glob("*.png"))):
        assert sorted(map(shade_of, found)) == [1] * 40 + [2] * 40


def wait_for_image(folder: Path, shade: int) -> None:
    for _ in range(60_000):
        if any(shade_of(path) == shade for path in (folder / "samples").glob("*.png")):
            return
        time.sleep(0.01)
    raise AssertionError("the writer has written no image in ten minutes")


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_leaves_whole_pictures_only(tmp_path: Path) -> None:
    for attempt in range(3):
        with start_writer(tmp_path, attempt, 1_000_000) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            wait_for_image(tmp_path, attempt)
            time.sleep(0.03 * attempt)
            writer.send_signal(signal.SIGKILL)
    RunFolder(tmp_path).close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {shade_of(path) for path in files} == {0, 1, 2}
    numbers = sorted(int(path.stem) for path in (tmp_path / "samples").iterdir())
    assert numbers == list(range(len(numbers)))


def chunks(png: bytes) -> list[bytes]:
    kinds, at = [], 8
    while at < len(png):
        kinds.append(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return kinds


@pytest.mark.parametrize(
    ("text", "kind"), [("café\nSteps: 1", b"tEXt"), ("日本語 👩‍🚀\u202e", b"iTXt"), ("", None)]
)
def test_text_chunks(text: str, kind: bytes | None) -> None:
    png = encode_png(PICTURE, text)
    assert [found for found in chunks(png) if found.endswith(b"Xt")] == ([kind] if kind else [])
    assert set(chunks(png)) <= {b"IHDR", b"IDAT", b"IEND", b"tEXt", b"iTXt"}
    with Image.open(io.BytesIO(png)) as image:
        assert image.info.get("parameters", "") == text


def test_long_text_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert b"tEXt" in chunks(encode_png(PICTURE, "x" * 65_536))
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "ldm"):
        png = encode_png(PICTURE, "é" * 32_769)
    assert set(chunks(png)) == {b"IHDR", b"IDAT", b"IEND"}
    assert "65538 bytes" in caplog.text


def test_long_prompts_are_left_out_but_not_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ldm"):
        png = encode_png(PICTURE, "x" * 40_000 + "\n" + "y" * 40_000 + "\nSteps: 5, Seed: 1")
    with Image.open(io.BytesIO(png)) as image:
        assert image.info["parameters"] == "Steps: 5, Seed: 1"
    assert "80019 bytes left out of an image but for its last line" in caplog.text


@pytest.mark.parametrize("level", [0, 1, 9])
def test_compression_never_changes_pixels(level: int) -> None:
    with Image.open(io.BytesIO(encode_png(PICTURE, compress_level=level))) as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_a_folder_that_cannot_be_looked_into_is_named(monkeypatch):
    """As below a folder of another user."""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(InputError, match="locked/x: Permission denied; choose another --outdir"):
        RunFolder("locked/x")
