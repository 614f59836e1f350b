"""The estimates of --dry_run: counted work, measured pace, and the time and memory of a whole run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import scripts.txt2img as txt2img
from ldm.checkpoints.configs import (
    BUNDLED_CKPT,
    BUNDLED_CONFIG,
    BUNDLED_CONTROL,
    INPAINTING_CONFIG,
    V1_CONFIG,
)
from ldm.checkpoints.load import build_model
from ldm.cli.dry_run import tell_memory, tell_time
from ldm.cli.values import options_of, request_of
from ldm.config import read_config
from ldm.images.canvas import open_canvas
from ldm.job import Init, Job
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.pipeline import LOW_MEMORY, Pipeline, load_model
from ldm.runs.estimate import Batch, batch_kinds, count_texts, parallel, run_seconds
from ldm.runs.memory import MOST_MAPS, Memory, beyond_memory, needed_memory
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan, read_prompts
from ldm.runs.starts import Start
from ldm.runtime.device import BF16, FULL, resolve_precision
from ldm.runtime.estimate import NetworkWork, Pace, Work, count_work, measure_pace, weight_bytes
from ldm.runtime.shortcuts import shortcuts
from tests.support.control import ip_weights
from tests.support.paths import ROOT
from tests.support.precision import needs_bf16_kernels, needs_int8_kernels

CPU = torch.device("cpu")
SIDE = (128, 128)
# a second for each operation of a product alone, so that the seconds of a run are its operations
COUNTING = Pace(dict.fromkeys(("convolution", "matrix", "attention"), 1.0), 0.0, 0.0)


@pytest.fixture(scope="module")
def model():
    return build_model(read_config(BUNDLED_CONFIG))


@pytest.fixture(scope="module")
def work(model):
    return NetworkWork(model)


@pytest.fixture(scope="module")
def v1():
    return build_model(read_config(V1_CONFIG))


def on_meta(*shape):
    return torch.zeros(shape, device="meta")


# --- work -------------------------------------------------------------------------------------------------------


def test_a_small_stack_by_hand():
    with torch.device("meta"):
        stack = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1, stride=2))
    x = on_meta(2, 3, 16, 16)
    found = count_work(lambda: stack(x).flatten(2).transpose(1, 2))
    assert found.products == {"convolution": 2 * (8 * 2 * 256 * 27 + 4 * 2 * 64 * 8)}
    assert (found.written, found.operations) == (8 * 2 * 256, 3)
    assert found.alive == 2 * 8 * 2 * 256  # the first convolution's result and the SiLU's


def test_attention_by_hand():
    with torch.device("meta"):
        attention = CrossAttention(query_dim=24, context_dim=10, heads=4, dim_head=6)
    found = count_work(lambda: attention(on_meta(2, 50, 24), on_meta(2, 7, 10)))
    assert found.products["matrix"] == 2 * 2 * (50 * 24 * 24 + 2 * 7 * 10 * 24 + 50 * 24 * 24)
    assert found.products["attention"] == 2 * 2 * (2 * 50 * 7 * 24)


def test_all_products_are_those_that_torch_counts(model, work):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        context = model.get_learned_conditioning([""])
    assert sum(work.read.products.values()) == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.apply_model(on_meta(1, model.channels, 16, 16), on_meta(1), context)
    factor = model.first_stage_model.downsampling
    assert sum(work.predict(16 * factor, 16 * factor).products.values()) == counter.get_total_flops()


def test_v1_does_what_is_known_of_it(v1):
    """804.4 GFLOP a sample at 512x512, 2518 for decoding, 13.3 for a prompt, by adding up its layers on paper."""
    work = NetworkWork(v1)
    for found, known in ((work.predict(512, 512), 804.4), (work.decode(512, 512), 2518), (work.read, 13.3)):
        assert sum(found.products.values()) == pytest.approx(known * 1e9, rel=5e-3)


@pytest.mark.long
def test_a_model_for_inpainting_sees_more_channels(v1):
    models = v1, build_model(read_config(INPAINTING_CONFIG))
    usual, inpainting = (NetworkWork(each).predict(64, 64).products["convolution"] for each in models)
    assert inpainting - usual == 2 * 9 * 5 * 320 * 8 * 8


def test_other_sizes_follow_from_the_first(model):
    first, counted = NetworkWork(model), NetworkWork(model)
    for call in ("predict", "decode", "encode"):
        getattr(first, call)(128, 128)
        scaled, exact = getattr(first, call)(256, 192), getattr(counted, call)(256, 192)
        for mine, right in ((scaled.products, exact.products), (scaled, exact)):
            total = sum(mine.values()) if isinstance(mine, dict) else mine.written
            expected = sum(right.values()) if isinstance(right, dict) else right.written
            assert total == pytest.approx(expected, rel=0.1)  # attention to the text grows more slowly


# --- pace -------------------------------------------------------------------------------------------------------


def test_seconds_are_work_times_pace():
    pace = Pace({"convolution": 2.0, "matrix": 3.0, "attention": 5.0}, 7.0, 11.0)
    work = Work({"convolution": 1, "matrix": 10, "attention": 100}, 1000, 10_000, 1)
    assert pace.seconds(work, 3) == 3 * (2 + 30 + 500 + 7000) + 110_000


@pytest.mark.parametrize("name", ["full", "bf16", pytest.param("int8", marks=needs_int8_kernels)])
def test_the_trial_of_a_machine_leaves_no_trace(name, monkeypatch):
    monkeypatch.setattr("ldm.runtime.estimate.TRIAL", 0.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pace = measure_pace(CPU, resolve_precision(name, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(pace.product) == {"convolution", "matrix", "attention"}
    assert min(*pace.product.values(), pace.number, pace.operation) > 0


# --- time -------------------------------------------------------------------------------------------------------


def seconds(work, batches, texts=0, pace=lambda precision: COUNTING):
    return run_seconds(batches, texts, work, pace, BF16)


def of(call):
    return sum(call.products.values())


def test_a_run_is_its_steps_its_pictures_and_its_prompts(work):
    job = Job("", width=128, height=128, steps=20)
    assert seconds(work, {Batch(job, 3, True): 2}, texts=5) == (
        2 * (20 * 6 * of(work.predict(*SIDE)) + 3 * of(work.decode(*SIDE))) + 5 * of(work.read)
    )


def test_twice_the_pictures_or_steps_take_twice_the_time(work):
    job = Job("", width=128, height=128, steps=10)
    once = seconds(work, {Batch(job, 2, True): 1})
    assert seconds(work, {Batch(job, 4, True): 1}) == seconds(work, {Batch(job, 2, True): 2}) == 2 * once
    longer, longest = (seconds(work, {Batch(replace(job, steps=n), 2, True): 1}) for n in (20, 40))
    assert longest - longer == 2 * (longer - once) > 0
    assert seconds(work, {Batch(job, 4, False): 1}) > once  # the images of half as many samples are decoded


def test_steps_without_guidance_cost_one_prediction_and_joined_prompts_one_each(work):
    job = Job("", width=128, height=128, steps=20, guidance_interval=(0.1, 0.7))
    rest = 2 * of(work.decode(*SIDE))
    cost = of(work.predict(*SIDE))
    assert seconds(work, {Batch(job, 2, True): 1}) == (12 * 4 + 8 * 2) * cost + rest
    assert seconds(work, {Batch(job, 2, True, parts=3): 1}) == (12 * 8 + 8 * 6) * cost + rest


def test_steps_that_run_few_blocks_cost_what_these_do(model, work):
    """Of 6 steps two are whole; torch counts what a call runs in the others."""
    job, context = Job("", width=128, height=128, steps=6), on_meta(1, 48, 192)
    calls = on_meta(1, 4, 16, 16), on_meta(1), context
    with torch.no_grad(), shortcuts(model.model.diffusion_model, (3, 1), 0.0, 6) as stepped:
        model.apply_model(*calls)
        stepped()
        with FlopCounterMode(display=False) as counter:
            model.apply_model(*calls)
    few = counter.get_total_flops()
    assert 0 < few < of(work.predict(*SIDE)) / 2
    saved = 2 * 2 * 4 * (of(work.predict(*SIDE)) - few)  # two halves of two images
    exact, cached = (
        seconds(work, {Batch(one, 2, True): 1}) for one in (job, replace(job, cache_steps=(3, 1)))
    )
    assert exact - cached == pytest.approx(saved)


def test_the_second_pass_and_the_encoder_are_counted(work):
    paces = {
        BF16: COUNTING,
        FULL: replace(COUNTING, product=dict.fromkeys(COUNTING.product, 1000.0)),
    }
    job = Job("", width=128, height=128, steps=20, upscale=2.0, upscale_strength=0.5)
    latents = seconds(work, {Batch(replace(job, upscale_in="latents"), 1, False): 1}, pace=paces.get)
    assert latents == (
        20 * of(work.predict(*SIDE)) + 10 * of(work.predict(256, 256)) + of(work.decode(256, 256))
    )
    pixels = seconds(work, {Batch(job, 1, False): 1}, pace=paces.get)
    assert pixels - latents == of(work.decode(*SIDE)) + 1000 * of(work.encode(256, 256))
    start = replace(job, upscale=1.0, init=Init("a.png"), strength=0.5)
    assert seconds(work, {Batch(start, 1, False): 4}, pace=paces.get) == (
        4 * (10 * of(work.predict(*SIDE)) + of(work.decode(*SIDE))) + 1000 * of(work.encode(*SIDE))
    )


def test_a_plan_has_kinds_of_batches(tmp_path):
    (tmp_path / "list.txt").write_text(
        "a\nb --scale 1\nc --scale 1 --ddim_steps 9\nd --negative_prompt x\ne --scale 1"
    )
    options = ["--from-file", str(tmp_path / "list.txt"), "--n_samples", "3", "--n_iter", "2"]
    opt = txt2img.parser().parse_args([*options, "--H", "64", "--W", "64"])
    run, request = options_of(opt), request_of(opt)
    plan = Plan(run, request, read_prompts(run, request), [Start(None, 64, 64)], open_canvas)
    found = Counter({(kind.job.steps, kind.images, kind.guided): n for kind, n in batch_kinds(plan).items()})
    assert found == {(50, 3, True): 2, (50, 1, False): 2, (9, 1, False): 2}
    assert not any(kind.guided for kind in batch_kinds(plan, embedded=True)), "with the scale as an input"
    assert count_texts(plan) == 5 + 2


def test_devices_share_the_batches(monkeypatch):
    opt = RunOptions(outdir="", devices=4, num_nodes=2)
    assert [parallel(opt, torch.device("cuda"), count) for count in (100, 3, 0)] == [8, 3, 1]
    assert parallel(RunOptions(outdir=""), CPU, 100) == 1
    monkeypatch.setattr("os.cpu_count", lambda: 2 * torch.get_num_threads())
    assert parallel(opt, CPU, 100) == 4  # two machines with cores for two processes
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, value)
    assert parallel(RunOptions(outdir=""), torch.device("cuda"), 100) == 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "0.012 s"), (4.04, "4.0 s"), (99.4, "99 s"), (100, "1.7 min"), (725, "12 min"), (4e4, "11 h"),
     (5e6, "1400 h")],
)  # fmt: skip
def test_time_in_words(seconds, said):
    line = tell_time(seconds, "cpu in bf16", 400)
    assert line == f"time: about {said} on cpu in bf16 (400 steps; rough estimate, without loading the model)"


@pytest.mark.parametrize(("total", "advice"), [(10, "--n_samples 30 would fit"), (2, "use a smaller --W")])
def test_more_than_the_machine_has_is_said_with_what_would_fit(monkeypatch, total, advice):
    monkeypatch.setattr("ldm.runtime.memory.total_memory", lambda device: total * 2**30)
    memory, cuda = Memory(4 * 2**30, 20 * 2**30, "denoising 512x512"), torch.device("cuda")
    said = beyond_memory(memory, cuda, 100)
    assert said is not None
    assert "in batches of 100 needs about 24 GiB, and cuda has" in said
    assert advice in said
    assert beyond_memory(Memory(0, total * 2**30, ""), cuda, 100) is None


def test_the_bound_is_above_the_estimate(model):
    """Else a batch that is too large would pass unchecked."""
    unet = NetworkWork(model).predict(128, 128).alive
    assert unet < MOST_MAPS * model.model.diffusion_model.model_channels * 16 * 16


# --- memory -----------------------------------------------------------------------------------------------------


def test_memory_in_words():
    memory = Memory(2 * 2**30, 0.71 * 2**30, "decoding 512x512")
    assert tell_memory(memory, 0) == "memory: about 2.7 GiB (2.0 weights, 0.7 for decoding 512x512)"
    small = Memory(21 * 2**20, 10 * 2**20, "denoising 64x64")
    assert tell_memory(small, 350 * 2**20) == (
        "memory: about 380 MiB (21 weights, 10 for denoising 64x64, 350 for the program)"
    )


def test_weights_in_float32_are_all_parameters(model):
    networks = (model.model, model.first_stage_model, model.cond_stage_model)
    numbers = sum(weight.numel() for network in networks for weight in network.parameters())
    assert sum(weight_bytes(model, FULL).values()) == 4 * numbers
    encoder = (model.first_stage_model.encoder, model.first_stage_model.quant_conv)
    unused = sum(weight.numel() for network in encoder for weight in network.parameters())
    assert sum(weight_bytes(model, FULL, encodes=False).values()) == 4 * (numbers - unused)


@pytest.mark.parametrize(
    "name",
    [pytest.param("bf16", marks=needs_bf16_kernels), pytest.param("int8", marks=needs_int8_kernels)],
)
def test_weights_are_what_a_run_packs(model, work, name, tmp_path):
    precision = resolve_precision(name, CPU)
    loaded = load_model(read_config(BUNDLED_CONFIG), BUNDLED_CKPT)
    pipeline = Pipeline(loaded, precision)
    pipeline.make([Job("a cube", width=64, height=64, steps=1)])
    packer = pipeline.maker.placement.packer
    assert packer is not None
    told = sum(weight_bytes(model, precision, encodes=False).values())
    alone = packer.size
    assert alone == pytest.approx(told, rel=0.15)  # without embeddings, norms, biases
    Image.new("RGB", (64, 64)).save(tmp_path / "hint.png")
    control = (str(ROOT / BUNDLED_CONTROL), str(tmp_path / "hint.png"), 1.0, 0.0, 1.0)
    pipeline.make([Job("a cube", width=64, height=64, steps=1, controls=(control,))])
    network = pipeline.control.read(control[0])
    exact = [*network.input_hint_block.parameters(), *network.time_embed.parameters()]  # packed by another
    own = work.control_bytes(precision) - 4 * sum(weight.numel() for weight in exact)
    assert packer.size - alone == pytest.approx(own, rel=0.05)


def bytes_needed(model, work, *batches, precision=FULL, tiles="off", lowmem=False):
    return needed_memory(
        RunOptions(outdir="", tiles=tiles, lowmem=lowmem), batches, model, work, CPU, precision
    )


def test_the_peak_is_the_largest_of_three(model, work):
    batch = Batch(Job("", width=128, height=128, steps=2), 1, True)
    alone = bytes_needed(model, work, batch)
    assert alone.peak == "decoding 128x128"
    assert bytes_needed(model, work, batch, precision=BF16).computed == alone.computed / 2
    twice = bytes_needed(model, work, batch, replace(batch, job=replace(batch.job, height=256)))
    assert (twice.peak, twice.computed) == ("decoding 128x256", 2 * alone.computed)
    many = bytes_needed(model, work, replace(batch, images=500))
    assert (many.peak, many.computed) == ("denoising 128x128", 4 * 1000 * work.predict(*SIDE).alive)
    start = replace(batch, job=replace(batch.job, init=Init("a.png")))
    from_picture = bytes_needed(model, work, start, precision=BF16)
    assert from_picture.peak == "encoding 128x128"
    assert from_picture.weights > bytes_needed(model, work, batch, precision=BF16).weights


@pytest.mark.long
def test_tiles_and_lowmem_take_less(model, work, v1):
    large = Batch(Job("", width=2048, height=1024, steps=2), 1, False)
    side = 64 * model.first_stage_model.downsampling
    tiled, whole = (bytes_needed(model, work, large, tiles=tiles) for tiles in ("on", "off"))
    assert tiled.peak == whole.peak == "decoding 2048x1024"
    assert tiled.computed == pytest.approx(whole.computed * side**2 / (2048 * 1024))
    batch = Batch(Job("", width=64, height=64), 1, True)
    assert bytes_needed(v1, NetworkWork(v1), batch, lowmem=True).weights == LOW_MEMORY


# --- what is printed --------------------------------------------------------------------------------------------


def dry_run(capsys, tmp_path, *options):
    shared = ["--device", "cpu", "--quiet", "--precision", "full", "--outdir", str(tmp_path), "--dry_run"]
    assert txt2img.main([*shared, *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_estimates(capsys, tmp_path, monkeypatch):
    pace = Pace(dict.fromkeys(COUNTING.product, 1e-9), 0.0, 0.0)
    monkeypatch.setattr("ldm.runtime.estimate.measure_pace", lambda device, precision: pace)
    *_, memory, time = dry_run(capsys, tmp_path, "--n_iter", "2", "--n_samples", "1", "--ddim_steps", "40")
    assert memory.startswith("memory: about ")
    assert "for decoding 128x128" in memory
    # 80 guided calls of 2 * 0.70 GFLOP, two images of 5.7, two prompts of 0.13
    assert time.startswith("time: about 2.1 min on cpu in full (80 steps;")


def test_a_network_that_needs_its_weights_is_no_fault(capsys, tmp_path, monkeypatch):
    def asks(self, x, t, cond):
        return x * float(x.sum())

    monkeypatch.setattr("ldm.models.diffusion.ddpm.LatentDiffusion.apply_model", asks)
    assert "unknown" in dry_run(capsys, tmp_path, "--n_iter", "1", "--n_samples", "1")[-1]


# --- control networks -------------------------------------------------------------------------------------------


def controlled(*files):
    return Job(
        "", width=128, height=128, steps=4, controls=tuple((str(file), "h", 1.0, 0.0, 1.0) for file in files)
    )


def test_control_networks_take_time_and_memory(model, work, tmp_path):
    """Twice the file is once its weights; a call is of the size of the U-Net's way down."""
    a, b = ROOT / BUNDLED_CONTROL, tmp_path / "b.safetensors"
    b.symlink_to(a)
    batches = [Batch(controlled(*files), 1, True) for files in ((), (a,), (a, a), (a, b))]
    weights = [needed_memory(RunOptions(outdir=""), [b], model, work, CPU, FULL).weights for b in batches]
    own = sum(p.numel() for p in ControlNet(**model.model.diffusion_model.settings).parameters())
    assert [w - weights[0] for w in weights] == [0, 4 * own, 4 * own, 8 * own]
    seconds = [run_seconds({b: 1}, 1, work, lambda dtype: COUNTING, FULL) for b in batches]
    call = 2 * 4 * sum(work.control(*SIDE).products.values())
    assert [round(s - seconds[0]) for s in seconds] == [0, call, 2 * call, 2 * call]
    assert 0.25 < call / (2 * 4 * sum(work.predict(*SIDE).products.values())) < 0.35


def test_adapters_count_by_what_their_files_hold(model, work, tmp_path):
    """In float32, as they are saved here; the image encoder is there only while it reads. Steps take no longer."""
    adapter, prompt, encoder = (
        tmp_path / name for name in ("t2i.safetensors", "ip.safetensors", "image_encoder")
    )
    save_file(T2IAdapter(3, [64, 128, 128]).state_dict(), adapter)
    save_file(ip_weights(model), prompt)
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    save_file({"any": torch.zeros(20_000_000)}, encoder / "model.safetensors")
    batches = [Batch(controlled(*files), 1, True) for files in ((), (adapter,), (prompt,))]
    none, t2i, ip = (bytes_needed(model, work, batch, precision=BF16) for batch in batches)
    for found, file in ((t2i, adapter), (ip, prompt)):
        held = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")  # without its header
        assert found.weights - none.weights == held == found.added[str(file)]
    assert (ip.peak, ip.computed) == ("reading images for an IP-Adapter", 80_000_000)
    assert t2i.computed == none.computed
    assert len({seconds(work, {batch: 1}) for batch in batches}) == 1


def test_a_dry_run_names_what_controls_take(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.runtime.estimate.TRIAL", 0.0)
    Image.new("RGB", (128, 128)).save(tmp_path / "hint.png")
    file = ROOT / BUNDLED_CONTROL
    typed = ("--control", f"{file}:{tmp_path / 'hint.png'}", "--n_iter", "1", "--n_samples", "1")
    memory = dry_run(capsys, tmp_path, *typed)[-2]
    assert (
        f"among them {2 * file.stat().st_size / 2**20:.2g} of control.safetensors" in memory
    )  # fp16 in the file


def test_more_controls_than_memory():
    """v1's, in float32: 1.35 GiB each."""
    memory = Memory(weights=0, computed=1.0, peak="denoising 512x512")
    v1 = NetworkWork(build_model(read_config(V1_CONFIG)))
    assert round(v1.control_bytes(FULL) / 2**30, 2) == 1.35
    size = v1.control_bytes(FULL)
    too_much = beyond_memory(replace(memory, weights=10**6 * size, added={"a": size, "b": size}), CPU, 1)
    assert too_much is not None and "denoising 512x512 in batches of 1 needs about" in too_much
    assert (
        "(1.3 GiB of it a, 1.3 GiB of it b)" in too_much and "fewer of these files, or --lowmem" in too_much
    )
