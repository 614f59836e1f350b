"""A v1 model at its real size: `pytest -m slow` (needs 5 GB of disk and 8 GB of memory)."""

import json
import subprocess
import sys

import pytest
import torch

from tests.support.full_size import write_checkpoint
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

LOAD = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
import torch
from ldm.config import read_config
from ldm.pipeline import load_model
config = read_config("configs/stable-diffusion/v1-inference.yaml")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
model = load_model(config, {path!r})
total = sum(float(value.sum()) for value in model.state_dict().values())
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"peak": peak * 1024, "seconds": seconds, "total": total}}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("full") / "v1.ckpt")
    yield path
    path.unlink()


def test_loading_takes_no_second_copy(checkpoint):
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(root=str(ROOT), path=str(checkpoint))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = json.loads(run.stdout)
    assert loaded["peak"] < 1.3 * checkpoint.stat().st_size
    state_dict = torch.load(checkpoint, weights_only=True, mmap=True)["state_dict"]
    expected = sum(float(value.sum()) for value in state_dict.values())
    # the model has the schedule and the position ids in addition
    assert loaded["total"] != 0
    assert abs(loaded["total"] - expected - _extra_sum()) < 1e-3 * abs(expected)


def _extra_sum():
    """The sum of the buffers that the model computes."""
    from ldm.models.diffusion.schedule import diffusion_buffers, make_beta_schedule

    buffers = diffusion_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))
    return sum(float(values.sum()) for values in buffers.values()) + sum(range(77))


def test_txt2img(checkpoint, tmp_path):
    import scripts.txt2img as txt2img

    options = [
        "--ckpt",
        str(checkpoint),
        "--H",
        "256",
        "--W",
        "256",
        "--ddim_steps",
        "2",
        "--plms",
        "--quiet",
    ]
    batch = ["--n_iter", "1", "--n_samples", "1", "--outdir", str(tmp_path), "--device", "cpu"]
    assert txt2img.main([*options, *batch]) == 0
    assert (tmp_path / "samples/00000.png").is_file()
