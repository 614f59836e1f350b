"""Tests that need a CUDA device: `pytest -m gpu`."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import read_config
from ldm.job import Job
from ldm.models.diffusion.noise import PhiloxNoise
from ldm.pipeline import Pipeline, load_model
from ldm.runtime.device import resolve_precision
from ldm.runtime.prepare import prepare
from tests.support.golden_data import TOLERANCE, figure, figures, relative_error, sampled, tiny_model

pytestmark = pytest.mark.gpu
# the original under fp16 autocast, against its float32
FP16_BUDGET = {
    ("ddim", 10, 7.5): 4.1e-3,
    ("plms", 10, 7.5): 4.1e-3,
    ("ddim", 50, 7.5): 2.3e-3,
    ("plms", 50, 7.5): 2.2e-3,
}


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


@pytest.fixture(scope="module")
def model(device):
    return tiny_model().to(device)


@pytest.fixture(autouse=True)
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def sample(model, method, steps, scale):
    with torch.no_grad():
        return sampled(model, method, steps, scale, ddim_discretize="compvis").cpu()


@pytest.mark.parametrize("case", ["unet", "unet_wide"])
def test_unet(model, case):
    inputs = [figure(f"{case}/{name}").to(model.device) for name in ("x", "t", "context")]
    assert relative_error(model.apply_model(*inputs).cpu(), figure(f"{case}/eps")) <= TOLERANCE


def test_autoencoder_and_text(model):
    posterior = model.encode_first_stage(figure("vae/image").to(model.device))
    assert relative_error(posterior.mean.cpu(), figure("vae/mean")) <= TOLERANCE
    decoded = model.decode_first_stage(figure("vae/z").to(model.device))
    assert relative_error(decoded.cpu(), figure("vae/decoded")) <= TOLERANCE
    embedding = model.get_learned_conditioning(figures()["text/prompts"].tolist())
    assert relative_error(embedding.cpu(), figure("text/embedding")) <= TOLERANCE


@pytest.mark.parametrize(
    "name", [k for k in figures() if k.startswith(("sample/ddim_S", "sample/plms_S")) and "scale" in k]
)
def test_sampling(model, name):
    method, steps, scale = name.removeprefix("sample/").split("_")
    assert relative_error(sample(model, method, int(steps[1:]), float(scale[5:])), figure(name)) <= TOLERANCE


@pytest.mark.parametrize(("method", "steps", "scale"), FP16_BUDGET)
def test_fp16_stays_within_the_originals_error(model, method, steps, scale):
    with torch.autocast("cuda", torch.float16):
        latents = sample(model, method, steps, scale)
    expected = figure(f"sample/{method}_S{steps}_scale{scale}")
    assert relative_error(latents, expected) <= FP16_BUDGET[method, steps, scale]


@pytest.mark.parametrize(("method", "steps", "scale"), FP16_BUDGET)
def test_fp16_parameters_stay_within_the_originals_error(device, method, steps, scale):
    model = tiny_model().to(device)
    prepare(model, torch.float16, lambda weight: None)
    expected = figure(f"sample/{method}_S{steps}_scale{scale}")
    assert relative_error(sample(model, method, steps, scale), expected) <= FP16_BUDGET[method, steps, scale]


def test_a_batch_of_philox_noise_is_the_devices_own(device):
    torch.manual_seed(42)
    own = [torch.randn(3, 4, 64, 64, device=device) for _ in range(2)]
    noise = PhiloxNoise(42, device)
    for expected in own:
        assert torch.allclose(noise.draw(expected.shape), expected, atol=1e-5)


def test_txt2img_end_to_end(device, tmp_path):
    import scripts.txt2img as txt2img

    options = [
        "--prompt",
        "a red cube",
        "--n_samples",
        "1",
        "--n_iter",
        "1",
        "--precision",
        "full",
        "--no_watermark",
    ]
    for name in ("cuda", "cpu"):
        assert txt2img.main([*options, "--device", name, "--outdir", str(tmp_path / name), "--quiet"]) == 0
    on = {n: np.asarray(Image.open(tmp_path / n / "samples/00000.png"), dtype=int) for n in ("cuda", "cpu")}
    assert np.abs(on["cuda"] - on["cpu"]).mean() < 1.0


@pytest.mark.parametrize("sizes", [(1,), (4 * 64 * 64,), (4 * 96 * 64,)])
def test_single_image_noise_is_the_devices_own(device, sizes):
    torch.manual_seed(43)
    expected = torch.randn(*sizes, device=device)
    assert torch.allclose(PhiloxNoise(43, device).draw(sizes), expected, atol=1e-5)


def test_where_the_mapping_changes(device):
    """Up to the number of threads in flight every GPU draws the same numbers; above that they depend on the GPU."""
    properties = torch.cuda.get_device_properties(device)
    threads = properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256) * 256
    for count in (threads, threads + 1, 4 * threads + 1):
        torch.manual_seed(44)
        expected = torch.randn(count, device=device)
        assert torch.allclose(PhiloxNoise(44, device, threads).draw((count,)), expected, atol=1e-5), count


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_second_gpu_alone_is_used(tmp_path):
    import scripts.txt2img as txt2img

    before = torch.cuda.memory_allocated(0)
    options = ["--device", "cuda:1", "--n_iter", "1", "--n_samples", "1", "--ddim_steps", "2", "--quiet"]
    assert txt2img.main([*options, "--outdir", str(tmp_path)]) == 0
    assert torch.cuda.memory_allocated(0) == before


def test_full_size_image(device, tmp_path, capsys):
    """Seconds and peak memory of one 512x512 image at 50 PLMS steps, full-size model with rebuilt weights."""
    from tests.support.full_size import write_checkpoint

    path = write_checkpoint(tmp_path / "v1.ckpt", torch.float16)
    model = load_model(read_config("configs/stable-diffusion/v1-inference.yaml"), path, device)
    pipeline = Pipeline(model, resolve_precision("autocast", device))
    job = Job("an astronaut riding a horse", sampler="plms")
    pipeline.make([job])
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    (picture,) = pipeline.make([job])
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(f"\n512x512, 50 PLMS steps: {seconds:.2f} s, {peak:.2f} GiB allocated at most")
    assert picture.pixels is not None
    assert picture.pixels.shape == (512, 512, 3)
