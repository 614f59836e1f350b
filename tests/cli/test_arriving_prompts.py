"""--from-file - while the input is open: each line is made as it comes."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ldm.pipeline
import scripts.txt2img as txt2img
from tests.support.scripts import FAST

LINES = "a red cube", "a blue sphere --seed 7 --ddim_steps 1", "a green cone"
OPTIONS = ["--prompt_format", "options", "--precision", "full", "--safety", "off"]
Write = Callable[[str], object]
Writing = Callable[[Write], object]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Writing], None]]:
    """Replaces standard input by a pipe that a thread writes to."""
    threads = []

    def start(writing: Writing) -> None:
        reads, writes = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(reads))

        def work() -> None:
            with os.fdopen(writes, "wb", buffering=0) as pipe:
                writing(lambda text: pipe.write(text.encode()))

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(60)


def draw(out: Path, source: str, *others: str) -> tuple[int, dict[str, bytes]]:
    code = txt2img.main([*FAST, *OPTIONS, "--from-file", source, "--outdir", str(out), *others])
    return code, {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.png")}


def until(path: Path) -> None:
    """Waits for a file."""
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The images of the lines in a file."""
    folder = tmp_path_factory.mktemp("listed")
    (folder / "lines.txt").write_text("\n".join(LINES))
    code, files = draw(folder / "out", str(folder / "lines.txt"))
    assert code == 0
    return files


def test_lines_are_made_as_they_come(
    tmp_path: Path,
    typed: Callable[[Writing], None],
    listed: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes are those of a list; a faulty line is one error; the model is loaded once; --resume goes on."""
    out, loads, load_model = tmp_path / "out", [], ldm.pipeline.load_model

    def load(*args: object, **kwargs: object) -> object:
        loads.append(1)
        return load_model(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ldm.pipeline, "load_model", load)

    def first_two(write: Write) -> None:
        write(f"{LINES[0]}\n")
        until(out / "samples/00000.png")
        write("a cube --ddim_steps 0\n\n")
        time.sleep(0.3)
        write(f"{LINES[1][:9]}")
        time.sleep(0.1)
        write(f"{LINES[1][9:]}\n")

    typed(first_two)
    code, files = draw(out, "-", "--json")
    assert code == 1 and len(loads) == 1
    assert files == {name: listed[name] for name in ("samples/00000.png", "samples/00001.png")}
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (error,) = [event for event in events if event["event"] == "error"]
    assert error["text"].startswith("standard input, line 2: ") and "steps" in error["text"]
    assert (events[-1]["event"], events[-1]["saved"], events[-1]["code"]) == ("done", 2, 1)

    def all_three(write: Write) -> None:
        for line in LINES:
            write(f"{line}\n")
            time.sleep(0.3)

    before = (out / "samples/00001.png").stat().st_mtime_ns
    typed(all_three)
    code, files = draw(out, "-", "--resume")
    assert code == 0 and files == {name: data for name, data in listed.items() if name.startswith("samples")}
    assert (out / "samples/00001.png").stat().st_mtime_ns == before


def test_a_list_that_comes_at_once_is_a_run(
    tmp_path: Path, typed: Callable[[Writing], None], listed: dict[str, bytes]
) -> None:
    typed(lambda write: write("\n".join(LINES)))
    assert draw(tmp_path / "out", "-") == (0, listed)


def test_a_document_is_read_to_its_end(
    tmp_path: Path, typed: Callable[[Writing], None], listed: dict[str, bytes]
) -> None:
    def slowly(write: Write) -> None:
        write("prompt,seed,steps\n")
        time.sleep(0.5)
        write("a red cube,42,2\na blue sphere,7,1\na green cone,44,2\n")

    typed(slowly)
    code, files = draw(tmp_path / "out", "-", "--prompt_format", "auto")
    assert code == 0 and files["grid-0000.png"] == listed["grid-0000.png"]
