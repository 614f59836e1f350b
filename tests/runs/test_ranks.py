"""One run by several processes: the same files as by one, whichever process is lost."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from PIL import Image

import scripts.txt2img as txt2img
from ldm.checkpoints.configs import BUNDLED_CONTROL
from ldm.models.diffusion.solvers import SOLVERS
from ldm.runs import launch
from ldm.runs import processes as ranks
from tests.support.forking import ForkServer
from tests.support.paths import ROOT, tree
from tests.support.scripts import interruptible

pytest.importorskip("lightning_fabric")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")

SCRIPT = str(ROOT / "scripts/txt2img.py")
RUN = [
    *["--device", "cpu", "--ddim_steps", "2", "--W", "64", "--H", "64", "--n_iter", "7", "--n_samples", "2"],
    "--gallery",
]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def images(folder):
    """All files except the run file, which records who began the run."""
    return {name: data for name, data in tree(folder).items() if not name.startswith("run-")}


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("fork_server") / "messages") as starter:
        yield starter


class Group:
    """The processes of one run, as `--devices` starts them."""

    def __init__(self, fork_server, meeting, world, options):
        meeting.mkdir()
        self.meeting = meeting
        common = {"LDM_MEETING": str(meeting), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
        argv = [*options, "--devices", str(world), "--quiet"]
        self._fork_server = fork_server
        self.pids = [fork_server.start(argv, LOCAL_RANK=str(rank), **common) for rank in range(world)]

    def wait(self):
        return [self._fork_server.wait(pid) for pid in self.pids]


@pytest.fixture
def group(fork_server, tmp_path):
    """Starts the processes of a run into a folder."""
    count = iter(range(100))
    return lambda folder, world, *options: Group(
        fork_server, tmp_path / f"meeting{next(count)}", world, [*RUN, "--outdir", str(folder), *options]
    )


@pytest.fixture(scope="module")
def whole(fork_server, tmp_path_factory):
    """The files of a run by one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert fork_server.wait(fork_server.start([*RUN, "--quiet", "--outdir", str(folder)])) == 0
    return images(folder)


# --- the same files ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_make_the_files_of_one(group, whole, tmp_path, world):
    assert group(tmp_path / "out", world).wait() == [0] * world
    assert images(tmp_path / "out") == whole
    assert len(whole) == 14 + 2


@pytest.mark.long
def test_a_control_network_is_read_by_each(group, fork_server, tmp_path):
    edges = tmp_path / "edges.png"
    Image.effect_noise((64, 64), 100).save(edges)
    control = ["--control", f"{ROOT / BUNDLED_CONTROL}:{edges}", "--n_iter", "3"]
    assert (
        fork_server.wait(fork_server.start([*RUN, "--quiet", "--outdir", str(tmp_path / "one"), *control]))
        == 0
    )
    assert group(tmp_path / "two", 2, *control).wait() == [0, 0]
    assert images(tmp_path / "two") == images(tmp_path / "one")


@pytest.mark.long
def test_one_stream_of_noise_is_the_same_for_all(group, fork_server, tmp_path):
    one = ["--seed_mode", "batch", "--ddim_eta", "0.5", "--sweep", "scale=1,4"]
    assert (
        fork_server.wait(fork_server.start([*RUN, "--quiet", "--outdir", str(tmp_path / "one"), *one])) == 0
    )
    assert group(tmp_path / "two", 2, *one).wait() == [0, 0]
    assert images(tmp_path / "two") == images(tmp_path / "one")
    assert "sheet-0000.png" in images(tmp_path / "two")


@pytest.mark.long
def test_every_sampler_in_one_sweep_by_one_process_by_two_and_resumed(group, fork_server, tmp_path):
    """Each solver, with its noise, its calls and its own schedule, gives the same bytes in all three."""
    sweep = ["--sweep", f"sampler={','.join(SOLVERS)}", "--n_samples", "1", "--n_iter", "1", "--preview", "1"]

    def begin(folder, *more):
        return fork_server.wait(
            fork_server.start([*RUN, "--quiet", "--outdir", str(tmp_path / folder), *sweep, *more])
        )

    assert begin("one") == 0
    once = images(tmp_path / "one")
    assert len({data for name, data in once.items() if name.startswith("samples/")}) == len(SOLVERS)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    for lost in sorted((tmp_path / "resumed/samples").glob("*.png"))[1::2]:
        lost.unlink()
    assert begin("resumed", "--resume") == 0
    assert group(tmp_path / "two", 2, *sweep).wait() == [0, 0]
    assert images(tmp_path / "resumed") == once and images(tmp_path / "two") == once


@pytest.mark.long
def test_a_lost_process_leaves_its_share_to_any_other_number_of_them(group, whole, tmp_path):
    folder = tmp_path / "out"
    lost = group(folder, 3)
    while not list(folder.glob("samples/*.png")):
        time.sleep(0.005)
    os.kill(lost.pids[1], signal.SIGKILL)
    codes = lost.wait()
    assert codes == [0, signal.SIGKILL, 0]
    here = images(folder)
    mine = [i for k in range(7) if k % 3 != 1 for i in (2 * k, 2 * k + 1)]
    assert {f"samples/{i:05}.png" for i in mine} <= here.keys()
    assert "grid-0000.png" not in here
    assert group(folder, 2, "--resume").wait() == [0, 0]
    assert images(folder) == whole


def kills(group, whole, folder, wanted, seed):
    """Kills processes of runs, each resumed by another number of them, until enough died; returns how many ended."""
    chance, killed, ended = random.Random(seed), 0, 0
    while killed < wanted:
        out, world = folder / f"out{ended}", chance.choice([1, 2, 3])
        now = group(out, world, "--resume")
        time.sleep(chance.uniform(0, 2))
        begun = (now.meeting / "begun").exists()
        # before they have met, the others would wait for one that is lost
        for pid in chance.sample(now.pids, chance.randint(1, world)) if begun else now.pids:
            os.kill(pid, signal.SIGKILL)
        codes = now.wait()
        killed += codes.count(signal.SIGKILL)
        here = images(out) if out.exists() else {}
        assert all(whole[name] == data for name, data in here.items() if name.startswith("samples/0"))
        if not any(codes):
            assert here == whole
            ended += 1
    assert group(folder / f"out{ended}", 2, "--resume").wait() == [0, 0]
    assert images(folder / f"out{ended}") == whole
    return ended


@pytest.mark.kill
def test_processes_killed_at_any_moment_harm_nothing(group, whole, tmp_path):
    kills(group, whole, tmp_path, 5, seed=3)


@pytest.mark.slow
@pytest.mark.kill
def test_many_processes_killed_at_any_moment_harm_nothing(group, whole, tmp_path):
    ended = kills(group, whole, tmp_path, 60, seed=4)
    print(f"60 processes killed, {ended} runs ended in between")


@pytest.mark.long
def test_damaged_files_are_made_again_by_several(group, whole, tmp_path):
    folder = tmp_path / "out"
    assert group(folder, 2).wait() == [0, 0]
    for name in ("samples/00003.png", "samples/00009.png"):
        (folder / name).write_bytes(b"torn")
    assert group(folder, 3, "--resume", "--verify").wait() == [0, 0, 0]
    assert images(folder) == whole


def test_every_batch_is_one_processes_and_shares_differ_by_one_at_most():
    for world in range(1, 9):
        for count in range(20):
            shares = []
            for rank in range(world):
                place = ranks.ProcessInfo(torch.device("cpu"))
                place.rank, place.world = rank, world
                shares.append(place.share(range(count)))
            assert Counter(batch for share in shares for batch in share) == Counter(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- from the command line -----------------------------------------------------------------------------------


def typed(*options, **environment):
    command = [sys.executable, SCRIPT, *RUN, *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
        stdin=subprocess.PIPE, env={**ONE_THREAD, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_devices_are_counted_and_standard_input_reaches_all(whole, tmp_path):
    folder = tmp_path / "out"
    run = typed("--outdir", str(folder), "--devices", "2", "--from-file", "-", "--n_iter", "1", "--json")
    said, errors = run.communicate("a red cube\na blue cube\na green cone\n")
    assert run.returncode == 0, errors
    events = [json.loads(line) for line in said.splitlines()]
    made = Counter(event["process"] for event in events if event["event"] == "image")
    assert made == {0: 2, 1: 1}
    done = [(event.get("process"), event["code"]) for event in events if event["event"] == "done"]
    assert (sorted(done[:2]), done[2:]) == ([(0, 0), (1, 0)], [(None, 0)])
    assert sorted(images(folder)) == [
        "gallery.html", "grid-0000.png", *(f"samples/{i:05}.png" for i in range(3)),
    ]  # fmt: skip
    assert errors.count("no Stable Diffusion weights") == 1
    assert all(errors.count(f"{folder}/samples/{i:05}.png, seed {42 + i}\n") == 1 for i in range(3))


@pytest.mark.kill
def test_ctrl_c_stops_all_behind_their_batches(tmp_path):
    folder = tmp_path / "out"
    run = typed("--outdir", str(folder), "--devices", "2", "--n_iter", "500", "--quiet")
    while run.poll() is None and len(list(folder.glob("samples/*.png"))) < 3:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 130, errors
    assert errors.count("--resume") == 1
    assert errors.count("stopping after this batch") == 2
    assert len(list(folder.glob("samples/*.png"))) % 2 == 0


@pytest.mark.kill
def test_processes_whose_starter_is_killed_stop_too(tmp_path):
    folder = tmp_path / "out"
    run = typed("--outdir", str(folder), "--devices", "2", "--n_iter", "500", "--quiet")
    while run.poll() is None and not list(folder.glob("samples/*.png")):
        time.sleep(0.02)
    run.kill()
    run.communicate(timeout=600)  # returns when no process holds its pipes any more
    assert len(list(folder.glob("samples/*.png"))) < 1000


@pytest.mark.slow
def test_torchrun_says_how_many(whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, SCRIPT, *RUN, "--quiet", "--outdir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=600)
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "out") == whole


@pytest.mark.long
def test_slurm_says_who_is_who(fork_server, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "pictures", "SLURM_NTASKS": "2", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_LOCALID": "0",
    }  # fmt: skip
    argv = [*RUN, "--quiet", "--outdir", str(tmp_path / "out"), "--devices", "1", "--num_nodes", "2"]
    pids = [fork_server.start(argv, SLURM_PROCID=str(i), SLURM_NODEID=str(i), **slurm) for i in range(2)]
    assert [fork_server.wait(pid) for pid in pids] == [0, 0]
    assert images(tmp_path / "out") == whole


def test_another_programs_variables_change_nothing_of_a_single_run(tmp_path, monkeypatch, capsys):
    for name in ("LOCAL_RANK", "LDM_PARENT"):
        monkeypatch.setenv(name, "1")
    run = [
        *RUN,
        "--outdir",
        str(tmp_path),
        "--n_iter",
        "2",
        "--ddim_steps",
        "1",
        "--ddim_eta",
        "1.5",
        "--skip_grid",
    ]
    assert txt2img.main(run) == 0
    assert "warning: an eta of 1.5 is above 1" in capsys.readouterr().err
    assert len(list(tmp_path.glob("samples/*.png"))) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices", "0"], "--devices is 0"),
        (["--num_nodes", "5000"], "--num_nodes is 5000"),
        (["--devices", "2", "--skip_save"], "--skip_save leaves no files"),
        (["--devices", "2", "--num_nodes", "2"], "needs MASTER_ADDR"),
        (["--devices", "2"], "from a command line only"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, options, said):
    assert txt2img.main([*RUN, "--outdir", str(tmp_path / "out"), "--quiet", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_one_visible_gpu_of_another_launcher_is_the_processes_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cuda = torch.device("cuda")
    assert ranks._own_device(cuda, 3) == cuda
    monkeypatch.setenv("LDM_PARENT", "1")
    with pytest.raises(ValueError, match="torch sees 1 CUDA devices"):
        ranks._own_device(cuda, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks._own_device(cuda, 3) == torch.device("cuda", 3)
    assert ranks._own_device(torch.device("cpu"), 3) == torch.device("cpu")


# --- the parent process --------------------------------------------------------------------------------------

CHILD = "import os, sys, time; rank = int(os.environ['LOCAL_RANK']); "


def supervise(tmp_path, code, count=2):
    begun = tmp_path / "begun"
    command = [sys.executable, "-c", CHILD + code.replace("BEGUN", repr(str(begun)))]
    return launch._supervise(command, {**os.environ}, count, os.devnull, begun)


def test_one_that_is_lost_before_they_have_met_ends_all(tmp_path):
    began = time.monotonic()
    assert supervise(tmp_path, "time.sleep(1000) if rank == 0 else sys.exit(2)") == 2
    assert time.monotonic() - began < 500


def test_one_that_is_lost_later_ends_nobody(tmp_path, caplog):
    code = "open(BEGUN, 'w'); os.kill(os.getpid(), 9) if rank else (time.sleep(1), open(BEGUN + '2', 'w'))"
    assert supervise(tmp_path, code) == 1
    assert (tmp_path / "begun2").exists()
    assert "signal 9 ended one of the 2 processes" in caplog.text


@pytest.mark.parametrize(
    ("codes", "received", "joint"),
    [
        ([0, 0], [], 0),
        ([2, 2], [], 2),
        ([0, 2], [], 1),
        ([1, 1], [], 1),
        ([-9, -9], [], 1),
        ([130, 130], [2], 130),
        ([0, 143], [15], 143),
        ([0, 0], [2], 0),
    ],
)
def test_the_exit_code_is_that_of_all(codes, received, joint):
    assert launch._joint_code(codes, received) == joint
