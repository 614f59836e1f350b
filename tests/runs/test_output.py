"""Writing finished images to files: order, errors, memory, events and messages."""

import errno
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.txt2img as txt2img
from ldm.images.grid import GridWriter, count_pages
from ldm.images.writer import RunFolder
from ldm.job import Job
from ldm.metadata.read import read_job
from ldm.metadata.record import read_record
from ldm.pipeline import GeneratedImage
from ldm.runs import run_folder
from ldm.runs.background import Background
from ldm.runs.description import describe, differences
from ldm.runs.existing import Present, read_pixels
from ldm.runs.gallery import GALLERY_MARK, write_gallery
from ldm.runs.output import Output
from ldm.runs.progress import Events, Progress, in_words
from ldm.runs.run_folder import open_run
from ldm.safety.screen import Screen
from ldm.util import InputError
from tests.support.fake_run import SIDE, in_batches, make_jobs, output_options, pixels_of, run_without_model
from tests.support.paths import ROOT, tree

# --- files ---------------------------------------------------------------------------------------------------


def test_batches_may_come_in_any_order(tmp_path):
    jobs, batches = make_jobs(11), in_batches(11, 2)
    run_without_model(tmp_path / "a", jobs, batches)
    shuffled = [batches[i] for i in (3, 0, 5, 1, 4, 2)]
    run_without_model(tmp_path / "b", jobs, shuffled)
    run_without_model(tmp_path / "c", jobs, shuffled, skip_save=True)
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert list(a) == ["grid-0000.png", "run-00000.json", *(f"samples/{i:05}.png" for i in range(11))]
    for name in a.keys() - {"run-00000.json"}:
        assert a[name] == b[name]
    assert c["grid-0000.png"] == a["grid-0000.png"]
    for i, job in enumerate(jobs):
        np.testing.assert_array_equal(read_pixels(tmp_path / f"b/samples/{i:05}.png"), pixels_of(job))


def test_a_picture_carries_infotext_and_record(tmp_path):
    jobs = make_jobs(1, scale=3.25)
    run_without_model(tmp_path, jobs, [[0]])
    with Image.open(tmp_path / "samples/00000.png") as image:
        assert image.info["parameters"].startswith("prompt 0")
        found = read_record(image.info["ldm"])
    assert found.job == jobs[0]
    assert found.extras.items() >= {"Model": "fake", "Safety": "unchecked"}.items()
    assert read_job(str(tmp_path / "samples/00000.png")).job == jobs[0]


def test_a_second_run_goes_on_behind_the_first(tmp_path):
    run_without_model(tmp_path, make_jobs(3), [[0, 1, 2]])
    before = tree(tmp_path)
    run_without_model(tmp_path, make_jobs(2), [[0, 1]])
    after = tree(tmp_path)
    assert after.keys() - before.keys() == {
        "grid-0001.png", "run-00003.json", "samples/00003.png", "samples/00004.png",
    }  # fmt: skip
    assert all(after[name] == data for name, data in before.items())


def test_a_file_that_appears_during_the_run_is_not_overwritten(tmp_path, caplog):
    class Late(Screen):
        def screen(self, pictures):
            (tmp_path / "samples/00001.png").write_bytes(b"mine")
            return super().screen(pictures)

    _, output, _ = run_without_model(tmp_path, make_jobs(2), [[0, 1]], screen=Late(None), skip_grid=True)
    assert (output.saved, output.failed) == (1, 1)
    assert (tmp_path / "samples/00001.png").read_bytes() == b"mine"
    assert "00001.png appeared" in caplog.text


@pytest.mark.parametrize(("count", "columns"), [(1, 3), (5, 2), (12, 3), (13, 3), (25, 1)])
def test_pages_are_counted_beforehand(tmp_path, monkeypatch, count, columns):
    monkeypatch.setattr("ldm.images.grid.MAX_PAGE_PIXELS", 5000)
    shapes = [(SIDE, SIDE)] * count + [(8, 24)] * 2
    sheets = []
    with GridWriter(tmp_path, columns, sheets.append) as grid:
        for shape in shapes:
            grid.add(np.zeros((*shape, 3), np.uint8))
        grid.finish()
    assert count_pages(shapes, columns) == len(sheets)


# --- the thread ----------------------------------------------------------------------------------------------


def test_work_waits_when_too_much_is_waiting():
    gate, done = threading.Event(), []
    background = Background(size=2)
    background.put(gate.wait)
    filler = threading.Thread(target=lambda: [background.put(lambda i=i: done.append(i)) for i in range(6)])
    filler.start()
    filler.join(0.1)
    assert filler.is_alive()
    gate.set()
    filler.join(10)
    background.wait()
    background.stop()
    assert done == list(range(6))


def test_an_error_there_is_raised_here_and_ends_the_work():
    background, done = Background(), []

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    background.put(fail)
    for _ in range(20):  # none of them blocks, whether the error has come yet or not
        try:
            background.put(lambda: done.append(1))
        except OSError:
            break
    with pytest.raises(OSError, match="No space"):
        background.wait()
    background.stop()
    assert not done


def test_an_error_of_the_run_keeps_what_is_finished(tmp_path):
    jobs = make_jobs(3)
    with RunFolder(tmp_path) as folder, Events(False) as events:
        run = open_run(folder, describe(jobs, [[0, 1, 2]], {}), 3, {"grid": 1}, {}, resume=False)
        with (
            pytest.raises(RuntimeError),
            Output(
                output_options(),
                folder,
                run,
                Present(run, False),
                3,
                lambda p: p.copy(),
                Screen(None),
                lambda j: {},
                events,
            ) as output,
        ):
            output.add([0, 1, 2], lambda: [GeneratedImage(job, pixels_of(job), {}) for job in jobs])
            raise RuntimeError("the device failed")
        run.close()
    assert len(list(tmp_path.glob("samples/*.png"))) == 3


@pytest.mark.parametrize("on_cpu", [True, False])
def test_torch_computes_on_one_thread_of_a_cpu(tmp_path, on_cpu):
    """Two threads, each with torch's threads, would compete for the cores."""
    jobs, threads = make_jobs(1), []

    def finish():
        threads.append(threading.current_thread())
        return [GeneratedImage(job, pixels_of(job), {}) for job in jobs]

    def flag(pictures):
        threads.append(threading.current_thread())
        return torch.zeros(len(pictures), dtype=torch.bool)

    with RunFolder(tmp_path) as folder, Events(False) as events:
        run = open_run(folder, describe(jobs, [[0]], {}), 1, {"grid": 1}, {}, False)
        present = Present(run, False)
        output = Output(
            output_options(),
            folder,
            run,
            present,
            1,
            lambda p: p,
            Screen(flag),
            lambda job: {},
            events,
            on_cpu,
        )
        with output:
            output.add([0], finish)
            output.finish()
        run.close()
    assert (tmp_path / "samples/00000.png").exists()
    assert [thread is threading.current_thread() for thread in threads] == [on_cpu] * 2


# --- memory --------------------------------------------------------------------------------------------------

MEMORY = """
import os, resource, sys
os.fsync = lambda descriptor: None  # it takes time, not memory
sys.path.insert(0, {root!r})
import tests.support.fake_run as f
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jobs = f.make_jobs({count})
f.run_without_model({folder!r} + "/warm", jobs[:200], f.in_batches(200, 4))
before = peak()
f.run_without_model({folder!r} + "/long", jobs, f.in_batches(len(jobs), 4))
print(peak() - before)
"""


def growth(tmp_path, count):
    code = MEMORY.format(root=str(ROOT), count=count, folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_images(tmp_path):
    # far less than their 1.5 MB of pixels twice over, grid and all
    assert growth(tmp_path, 2000) < 16 * 2**20


LONG_LIST = """
import os, sys
os.fsync = lambda descriptor: None  # it takes time, not memory
root, folder = sys.argv[1:]
sys.path.insert(0, root)
import torch, yaml
import scripts.txt2img as txt2img
from ldm.runs.output import Output
from tests.support.golden_data import tiny_config, tiny_model
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def add(self, indices, pictures):
    real(self, indices, pictures)
    if (indices[-1] + 1) % 5000 == 0:
        print(indices[-1] + 1, resident(), flush=True)
real, Output.add = Output.add, add
os.chdir(folder)
with open("tiny.yaml", "w") as file:
    yaml.safe_dump({"model": tiny_config()}, file)
torch.save({"state_dict": tiny_model().state_dict()}, "tiny.ckpt")
with open("list.txt", "w") as file:
    file.writelines(f"picture {i} in the style of {i * i}\\n" for i in range(100_000))
sys.exit(txt2img.main(
    "--config tiny.yaml --ckpt tiny.ckpt --from-file list.txt --n_iter 1 --n_samples 100 --ddim_steps 1 "
    "--H 32 --W 32 --device cpu --precision full --quiet --outdir out".split()
))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_a_hundred_thousand_prompts(tmp_path):
    """The tiny model and the whole script, grid pages and all; takes half an hour."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_LIST, str(ROOT), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    resident = {int(count): int(size) for count, size in map(str.split, done.stdout.splitlines())}
    print({count: f"{size / 2**20:.0f} MiB" for count, size in resident.items()})
    assert list(resident) == list(range(5_000, 100_001, 5_000))
    assert len(list(tmp_path.glob("out/samples/*.png"))) == 100_000
    for count in (50_000, 100_000):  # their pixels alone would be 154 and 307 MB
        assert resident[count] - resident[5_000] < 150 * 2**20


# --- events --------------------------------------------------------------------------------------------------


def test_events_are_lines_of_json(tmp_path, capsys):
    run_without_model(tmp_path, make_jobs(3), [[0, 1], [2]], json_events=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["image"] * 3
    for i, event in enumerate(events):
        path = Path(event["path"])
        assert path.name == f"{i:05}.png"
        assert (event["index"], event["seed"]) == (i, i)
        assert event["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert event["seconds"] >= 0


def test_warnings_and_errors_are_events(tmp_path, capsys, caplog):
    (tmp_path / "samples").mkdir(parents=True)
    (tmp_path / "run-00000.json").write_text("[]")
    run_without_model(tmp_path, make_jobs(1), [[0]], json_events=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["warning", "image"]
    assert "run-00000.json" in events[0]["text"]


def test_an_unbuffered_stdout_that_processes_share_gets_whole_lines():
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ldm.runs.progress import Events
other = os.fork()
with Events(True) as events:
    for i in range(20000):
        events.emit("image", index=i)
if other:
    os.waitpid(other, 0)
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True, check=True
    )
    indices = [json.loads(line)["index"] for line in done.stdout.splitlines()]
    assert sorted(indices) == sorted([*range(20000), *range(20000)])


EVENTS = """
import sys
sys.path.insert(0, {root!r})
from ldm.runs.progress import Events
from ldm.runs.messages import set_up_messages
set_up_messages(False, False)
with Events(True) as events:
    for i in range(50000):
        events.emit("image", index=i)
print("went on", file=sys.stderr)
"""


@pytest.mark.parametrize("stdout", ["head", "full"])
def test_a_stdout_that_is_gone_stops_nothing(stdout):
    if stdout == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no full device here")
    target = "> /dev/full" if stdout == "full" else "| head -1 > /dev/null"
    code = EVENTS.format(root=str(ROOT)).replace("'", '"')
    command = f"set -o pipefail; {sys.executable} -c '{code}' {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "went on"
    assert done.stderr.count("warning: stdout takes no more events") == 1
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("wrong", ["100", "wide"])
def test_every_refusal_ends_in_done(tmp_path, capsys, wrong):
    try:
        code = txt2img.main(["--json", "--quiet", "--outdir", str(tmp_path), "--device", "cpu", "--W", wrong])
    except SystemExit as left:
        code = left.code
    assert code == 2
    error, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert (error["event"], "--W" in error["text"]) == ("error", True)
    assert (done["event"], done["saved"], done["code"]) == ("done", 0, 2)


def test_steps_are_events_at_a_bounded_rate_and_lines_within_long_batches(monkeypatch, capsys, caplog):
    clock = itertools.count(0.0, 0.25)
    monkeypatch.setattr("ldm.runs.progress.time.monotonic", lambda: next(clock))
    caplog.set_level("INFO")
    with Events(True) as events:
        progress = Progress(1, 400, False, events)
        progress.begin(1)
        for i in range(400):
            progress.step(i)
        progress.end(1)
    steps = [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()]
    assert steps == list(range(4, 401, 4))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["step 120 of 400, 70 s left", "step 240 of 400, 40 s left"]
    assert lines[-1].startswith("image 1 of 1")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 0 min"), (12000, "3 h 20 min")],
)
def test_times_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words


# --- gallery -------------------------------------------------------------------------------------------------


def test_the_gallery_shows_the_folder_and_replaces_only_itself(tmp_path, caplog):
    run_without_model(tmp_path, make_jobs(2), [[0, 1]], gallery=True)
    first = (tmp_path / "gallery.html").read_text()
    assert first.count("<figure>") == 2
    assert first.endswith(GALLERY_MARK)
    run_without_model(tmp_path, make_jobs(1), [[0]], gallery=True)
    assert (tmp_path / "gallery.html").read_text().count("<figure>") == 3
    (tmp_path / "gallery.html").write_text("my own page")
    write_gallery(tmp_path)
    assert (tmp_path / "gallery.html").read_text() == "my own page"
    assert "is left alone" in caplog.text


# --- the sources of a run ------------------------------------------------------------------------------------


def test_differences_name_field_and_both_values():
    old, new = (
        describe(make_jobs(3, scale=scale), [[0, 1, 2]], {"precision": "full"}) for scale in (7.5, 8.0)
    )
    assert differences(old, new) == ["scale (7.5 there, 8.0 now)"]
    assert differences(old, old) == []


def test_values_that_differ_among_the_jobs_are_shown_by_the_first():
    old, new = (
        describe([Job("x", seed=seed + i, width=512, height=512) for i in range(2)], [[0, 1]], {})
        for seed in (42, 7)
    )
    assert differences(old, new) == ["seed (42 and others there, 7 and others now)"]
    middle = describe([Job("x", seed=seed, width=512, height=512) for seed in (42, 44)], [[0, 1]], {})
    (found,) = differences(old, middle)
    assert re.fullmatch(
        r"seed \(42 and others, digest \w{16} there, 42 and others, digest \w{16} now\)", found
    )


def test_an_edited_prompt_is_found():
    jobs = make_jobs(5)
    edited = [*jobs[:3], Job("other", seed=3, width=SIDE, height=SIDE), jobs[4]]
    found = differences(describe(jobs, [[0]], {}), describe(edited, [[0]], {}))
    assert len(found) == 1
    assert "image 4 (line 4" in found[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_living_run_keeps_its_numbers(tmp_path):
    content = describe(make_jobs(5), [[0]], {})
    with RunFolder(tmp_path) as folder:
        first = open_run(folder, content, 5, {"grid": 1}, {}, resume=False)
        second = open_run(folder, content, 5, {"grid": 1}, {}, resume=False)
        assert second.first == 5
        with pytest.raises(InputError, match="still working"):
            open_run(folder, content, 5, {"grid": 1}, {}, resume=True)
        first.write()
        assert open_run(folder, content, 2, {"grid": 1}, {}, resume=False).first == 10
        first.close()
        second.close()


def test_a_run_that_died_without_a_picture_leaves_its_numbers(tmp_path):
    content = describe(make_jobs(5), [[0]], {})
    with RunFolder(tmp_path) as folder:
        for _ in range(2):
            run = open_run(folder, content, 5, {"grid": 1}, {}, resume=False)
            assert run.first == 0
            run.close()
    assert [path.name for path in tmp_path.glob("*.json")] == ["run-00000.json"]


def test_no_field_of_a_run_file_can_surprise(tmp_path):
    with RunFolder(tmp_path) as folder:
        for text in ("", "{", "[" * 100_000, '{"version": 1}', '{"version": 1, "first": "0"}', "null"):
            (tmp_path / "run-00000.json").write_text(text)
            assert run_folder._read_all(folder) == []
