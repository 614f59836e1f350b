"""Images depend on seeds and not on batches, and numbers that are not finite are detected."""

import dataclasses
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import ldm.pipeline.first_stage
import ldm.pipeline.placement
from ldm.job import Init, Job
from ldm.models.diffusion.sampler import Sampler
from ldm.pipeline import Pipeline, load_model
from ldm.runtime.device import FP16, FULL, resolve_device, resolve_precision
from ldm.runtime.tiling import needed_memory
from ldm.util import InputError
from tests.support.golden_data import inpainting_config, small_config, tiny_model


@pytest.fixture(scope="module")
def tiny():
    """A small model for this file only: a pipeline changes how its model runs."""
    return tiny_model(small_config())


JOB = Job(prompt="a red cube", width=64, height=64, steps=3, seed=11)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return Pipeline(tiny)


def pixels(pipeline, jobs):
    return torch.stack([torch.from_numpy(picture.pixels).float() for picture in pipeline.make(jobs)])


def test_an_image_is_the_same_noise_in_any_batch(pipeline):
    jobs = [dataclasses.replace(JOB, seed=11 + i) for i in range(3)]
    together = pixels(pipeline, jobs)
    for i, job in enumerate(jobs):
        # another batch size rounds differently, nothing more
        assert (together[i] - pixels(pipeline, [job])[0]).abs().mean() < 1.0
    assert (together[0] - together[1]).abs().mean() > 5.0


def test_equal_batches_give_equal_bytes(pipeline):
    jobs = [JOB, dataclasses.replace(JOB, prompt="a blue sphere", seed=12)]
    assert torch.equal(pixels(pipeline, jobs), pixels(pipeline, jobs))


def test_each_job_of_a_batch_has_the_conditioning_of_its_clip_skip(pipeline):
    jobs = [Job("a red cube", negative_prompt="blue", clip_skip=skip) for skip in (1, 2, 1)]
    guidance = pipeline.maker.conditioning.plan(jobs, None).first
    for text, found in (("a red cube", guidance.cond), ("blue", guidance.uncond)):
        for row, skip in zip(found, (1, 2, 1), strict=True):
            assert torch.equal(row, pipeline.model.get_learned_conditioning([text], skip)[0])
    assert not torch.equal(guidance.cond[0], guidance.cond[1])


def test_each_job_of_a_batch_has_its_share_of_rescaled_guidance(pipeline):
    plain = Job("a red cube", width=64, height=64, steps=3, seed=11)
    jobs = [plain, dataclasses.replace(plain, guidance_rescale=0.7)]
    guidance = pipeline.maker.conditioning.plan(jobs, None).first
    assert torch.as_tensor(guidance.rescale).flatten().tolist() == pytest.approx([0.0, 0.7])
    first, second = pixels(pipeline, jobs)
    assert torch.equal(first, pixels(pipeline, [plain, plain])[0]) and not torch.equal(first, second)


def test_global_randomness_has_no_influence(pipeline):
    torch.manual_seed(1)
    first = pixels(pipeline, [dataclasses.replace(JOB, eta=1.0)])
    torch.manual_seed(2)
    assert torch.equal(first, pixels(pipeline, [dataclasses.replace(JOB, eta=1.0)]))


def test_building_without_initial_weights_leaves_layers_as_they_were():
    before = torch.nn.Linear.reset_parameters
    with pytest.raises(InputError):
        load_model(small_config(), "no/such.ckpt")
    assert torch.nn.Linear.reset_parameters is before
    assert torch.nn.Linear(64, 64).weight.std() > 0.01


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_a_mixed_batch_gives_each_job_what_it_gets_alone(pipeline, sampler):
    scales = [1.0, 7.5, 3.0, -2.0]
    jobs = [
        dataclasses.replace(
            JOB, prompt=f"cube {i}", negative_prompt="x" * i, seed=i, scale=scale, sampler=sampler
        )
        for i, scale in enumerate(scales)
    ]
    together = pixels(pipeline, jobs)
    for job, picture in zip(jobs, together, strict=True):
        assert (picture - pixels(pipeline, [job])[0]).abs().mean() < 1.0  # rounding of another batch size
    assert (together[1] - pixels(pipeline, [dataclasses.replace(jobs[1], scale=3.0)])[0]).abs().mean() > 1.0


def test_without_guidance_in_any_step_it_is_the_image_of_scale_one(pipeline):
    def drawn(**fields):
        return pixels(pipeline, [dataclasses.replace(JOB, **fields)])

    assert torch.equal(drawn(guidance_interval=(0.5, 0.5)), drawn(scale=1.0))
    assert torch.equal(drawn(guidance_interval=(0.0, 20.0), guidance_interval_in="sigma"), drawn())
    assert not torch.equal(drawn(guidance_schedule="linear"), drawn())


@pytest.mark.long
def test_many_prompts_leave_the_negative_one_encoded(tiny, monkeypatch):
    encoded, encode = [], tiny.get_learned_conditioning
    monkeypatch.setattr(tiny, "get_learned_conditioning", lambda c: (encoded.append(c[0]), encode(c))[1])
    pipeline = Pipeline(tiny)
    for i in range(2):
        jobs = [dataclasses.replace(JOB, prompt=f"{i} {j}", steps=1, width=8, height=8) for j in range(72)]
        pipeline.make(jobs)
    assert encoded.count("") == 1
    assert len(encoded) > 64  # more than are kept


def test_weights_count_in_a_syntax_that_has_them(pipeline):
    def drawn(prompt, syntax="a1111", **changes):
        return pixels(pipeline, [dataclasses.replace(JOB, prompt=prompt, prompt_syntax=syntax, **changes)])

    assert torch.equal(drawn("a red cube"), drawn("a red cube", "plain"))
    assert torch.equal(drawn("(a red cube:1.0)"), drawn("a red cube", "plain"))
    assert not torch.equal(drawn("a (red:1.5) cube"), drawn("a red cube", "plain"))


def edited(pipeline, prompt, **changes):
    return pixels(
        pipeline, [dataclasses.replace(JOB, prompt=prompt, prompt_syntax="a1111", steps=4, **changes)]
    )


def test_a_prompt_whose_change_comes_first_or_last_is_one_text(pipeline):
    assert torch.equal(edited(pipeline, "a [red:blue:0] cube"), edited(pipeline, "a blue cube"))
    assert torch.equal(edited(pipeline, "a [red:blue:1.0] cube"), edited(pipeline, "a red cube"))


@pytest.mark.parametrize(
    ("prompt", "turns"), [("a [red|blue] cube", "rrbr"), ("a [red:blue:1] cube", "rrbb")]
)  # as the web UI: a change after step n is seen by the second step after it
def test_a_prompt_that_changes_is_a_run_stitched_of_two_conditionings(tiny, monkeypatch, prompt, turns):
    pipeline = Pipeline(tiny)
    together = edited(pipeline, prompt)
    texts = {"r": "a red cube", "b": "a blue cube"}
    conds = {turn: tiny.get_learned_conditioning(["", text]) for turn, text in texts.items()}
    left, apply = list(turns), tiny.apply_model
    monkeypatch.setattr(tiny, "apply_model", lambda x, t, cond: apply(x, t, conds[left.pop(0)]))
    assert torch.equal(together, edited(pipeline, "a green cube"))
    assert left == []


def test_prompts_that_change_at_other_steps_or_are_joined_share_a_batch(pipeline):
    prompts = ["a [red:blue:1] cube", "a [red:blue:2] cube", "a cube :0.5 AND a cone", "a cube AND [a|b] :2"]
    jobs = [
        dataclasses.replace(JOB, prompt=p, seed=i, prompt_syntax="a1111", steps=4)
        for i, p in enumerate(prompts)
    ]
    for job, picture in zip(jobs, pixels(pipeline, jobs), strict=True):
        assert (picture - pixels(pipeline, [job])[0]).abs().mean() < 1.0


def test_a_prompt_joined_of_its_halves_is_the_prompt(pipeline):
    whole = edited(pipeline, "a red cube")
    assert (edited(pipeline, "a red cube :0.5 AND a red cube :0.5") - whole).abs().mean() < 1.0
    assert (edited(pipeline, "a red cube :0.5", scale=2 * JOB.scale) - whole).abs().mean() < 1.0


def test_the_upscaled_pass_has_the_texts_of_its_own_steps(tiny, monkeypatch):
    seen, apply = [], tiny.apply_model
    monkeypatch.setattr(tiny, "apply_model", lambda x, t, cond: (seen.append(cond[-1]), apply(x, t, cond))[1])
    edited(Pipeline(tiny), "a [red:blue:1.25] cube", upscale=2.0, upscale_strength=1.0)
    red, blue = tiny.get_learned_conditioning(["a red cube", "a blue cube"])
    assert [torch.equal(cond, red) for cond in seen] == [True] * 6 + [False] * 2
    assert torch.equal(seen[-1], blue)


def test_prompts_of_different_lengths_share_a_call(pipeline):
    prompts = ["a cube", "a cube BREAK a sphere", "a cone"]
    jobs = [dataclasses.replace(JOB, prompt=p, seed=i, prompt_syntax="a1111") for i, p in enumerate(prompts)]
    together = pixels(pipeline, jobs)
    for job, picture in zip(jobs, together, strict=True):
        assert (picture - pixels(pipeline, [job])[0]).abs().mean() < 1.0


def test_a_batch_has_one_size_and_step_count(pipeline):
    with pytest.raises(ValueError, match="rescaling and CLIP skips only"):
        pipeline.begin([JOB, dataclasses.replace(JOB, steps=4)])


def test_negative_prompt_takes_the_place_of_the_empty_one(pipeline):
    plain = pixels(pipeline, [JOB])
    assert torch.equal(plain, pixels(pipeline, [dataclasses.replace(JOB, negative_prompt="")]))
    assert not torch.equal(plain, pixels(pipeline, [dataclasses.replace(JOB, negative_prompt="blurry")]))
    # pushed away from the prompt by as much as towards it
    same = dataclasses.replace(JOB, negative_prompt=JOB.prompt)
    assert (
        pixels(pipeline, [same]) - pixels(pipeline, [dataclasses.replace(JOB, scale=1.0)])
    ).abs().mean() < 1.0


def test_a_picture_that_is_not_finite_is_none(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "decode_first_stage", lambda z: torch.full((1, 3, 64, 64), float("nan")))
    (picture,) = Pipeline(tiny).make([JOB])
    assert picture.pixels is None


def test_decoding_is_tried_again_in_float32(tiny, monkeypatch):
    decoder, tried = tiny.first_stage_model.decoder, []

    def decode(z):
        tried.append(decoder.conv_in.weight.dtype)
        return torch.full((1, 3, 64, 64), 0.0 if tried[-1] is torch.float32 else float("inf"))

    monkeypatch.setattr(ldm.pipeline.placement, "prepare", lambda *args: None)
    monkeypatch.setattr(tiny, "decode_first_stage", decode)
    decoder.half()
    weights = decoder.conv_in.weight.clone()
    (picture,) = Pipeline(tiny, FP16).make([JOB])
    assert tried == [torch.float16, torch.float32]
    assert picture.pixels is not None
    assert picture.notes == {"Decoded in": "float32", "Safety": "unchecked"}
    assert torch.equal(decoder.conv_in.weight, weights)


@cache
def elsewhere(channels):
    """A pipeline whose model is not on the CPU, as on a GPU: torch refuses to mix devices, and to read a value."""
    config = small_config() if channels == 4 else inpainting_config(small_config())
    return Pipeline(tiny_model(config).to("meta"), FP16)


BEGUN = {
    "ddim": {},
    "plms": {"sampler": "plms"},
    "dpm": {"sampler": "dpm_solver"},
    "eta": {"eta": 0.5, "rng": "cpu"},
    "weighted": {"prompt_syntax": "a1111", "prompt": "a (red:1.3) cube"},
    "picture": {"init": Init("start.png")},
    "mask": {"init": Init("start.png", mask="mask.png"), "sampler": "plms"},
    "mean": {"init": Init("start.png", mask="mask.png"), "posterior": "mean"},
}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("name", BEGUN)
def test_a_batch_is_begun_on_the_device_and_waits_for_no_value(tiny, channels, name, tmp_path, monkeypatch):
    fields, pipeline = BEGUN[name], elsewhere(channels)
    if fields:  # without the U-Net, which is slow here, in all but the first
        monkeypatch.setattr(pipeline.model, "apply_model", lambda x, t, cond: x / 2)
    monkeypatch.chdir(tmp_path)
    for file in ("start.png", "mask.png"):
        Image.new("RGB", (64, 64), "white").save(file)
    table = tiny.alphas_cumprod.double().numpy()
    monkeypatch.setattr(Sampler, "_alphas_cumprod", lambda self: table)  # read from the device once a batch
    job = dataclasses.replace(JOB, **fields)
    pending = pipeline.begin([job, dataclasses.replace(job, seed=1, scale=2.0)])
    assert [picture.decoded.device.type for picture in pending] == ["meta"] * 2
    assert [picture.decoded.shape for picture in pending] == [(1, 3, 64, 64)] * 2


def test_with_little_memory_a_network_is_on_the_device_where_it_runs(tmp_path, monkeypatch):
    """As on a GPU, where networks wait in the CPU's memory; here only the requests to move them are checked."""
    model, ran = tiny_model(small_config()), Counter()
    parts = {"text": model.cond_stage_model, "unet": model.model, "autoencoder": model.first_stage_model}
    here = dict.fromkeys(parts, True)  # the model is loaded onto the device
    uses = {
        "get_learned_conditioning": "text",
        "apply_model": "unet",
        "encode_first_stage": "autoencoder",
        "decode_first_stage": "autoencoder",
    }

    def watch(name, part, real):
        def call(*args):
            assert here[part], name
            ran[name] += 1
            return real(*args)

        return call

    for part, network in parts.items():
        monkeypatch.setattr(network, "to", lambda where, part=part: here.update({part: where != "cpu"}))
    for name, part in uses.items():
        monkeypatch.setattr(model, name, watch(name, part, getattr(model, name)))
    monkeypatch.setattr(ldm.pipeline.placement, "prepare", lambda *args: None)
    pipeline = Pipeline(model, lowmem=True)
    for seed in range(2):
        path = tmp_path / f"{seed}.png"
        Image.new("RGB", (64, 64), (seed, 0, 0)).save(path)
        job = dataclasses.replace(JOB, init=Init(str(path)), upscale=2.0, seed=seed, prompt=str(seed))
        pipeline.make([job])
    assert not any(here.values())
    assert ran["encode_first_stage"] == ran["decode_first_stage"] == 4
    assert ran["get_learned_conditioning"] == 3


def test_a_large_image_has_the_room_of_the_text_encoder(tiny, monkeypatch):
    pipeline = Pipeline(tiny)
    expected, packed = pixels(pipeline, [JOB]), pipeline.maker.placement.packer.size
    monkeypatch.setattr(ldm.pipeline.first_stage, "LARGE", 0)
    other = dataclasses.replace(JOB, seed=12)
    pixels(pipeline, [other])
    encoder = sum(
        layer.weight.nbytes
        for layer in tiny.cond_stage_model.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    )
    assert pipeline.maker.placement.packer.size == packed - encoder > 0
    again = dataclasses.replace(JOB, prompt="another prompt")
    assert not torch.equal(pixels(pipeline, [again]), expected)  # its text is encoded
    assert torch.equal(pixels(pipeline, [JOB]), expected)


def test_a_picture_is_decoded_again_while_no_other_is_decoded(tiny, monkeypatch):
    decoder, at_work, tried = tiny.first_stage_model.decoder, threading.Lock(), Counter()

    def decode(z):
        assert at_work.acquire(blocking=False)
        dtype = decoder.conv_in.weight.dtype
        tried[dtype] += 1
        time.sleep(0.003)
        assert decoder.conv_in.weight.dtype is dtype
        at_work.release()
        return torch.full((1, 3, 64, 64), 0.0 if dtype is torch.float32 else float("inf"))

    monkeypatch.setattr(ldm.pipeline.placement, "prepare", lambda *args: None)
    monkeypatch.setattr(tiny, "decode_first_stage", decode)
    decoder.half()
    pipeline, job = Pipeline(tiny, FP16), dataclasses.replace(JOB, steps=1)
    pipeline.make([job])  # its text is known from now on
    with ThreadPoolExecutor(2) as others:
        made = [others.submit(pipeline.finish, pipeline.begin([job] * 4)) for _ in range(10)]
    pictures = [picture for batch in made for picture in batch.result()]
    assert len(pictures) == 40
    assert all(picture.pixels is not None and picture.notes["Decoded in"] for picture in pictures)
    assert tried == {torch.float16: 41, torch.float32: 41}
    assert decoder.conv_in.weight.dtype is torch.float16


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "meta"])
def test_absent_devices_are_named(name):
    with pytest.raises(InputError, match=name):
        resolve_device(name)


def test_precision():
    assert resolve_precision("full", torch.device("cpu")) == FULL
    assert resolve_precision("autocast", torch.device("cuda")).dtype is torch.float16
    assert resolve_precision("bf16", torch.device("cpu")).dtype is torch.bfloat16
    for name in ("half", "fp16"):
        with pytest.raises(InputError, match=name):
            resolve_precision(name, torch.device("cpu"))


def test_tiles_are_taken_where_a_picture_would_not_fit(tiny, monkeypatch):
    def tile(height, width, available, tiles="auto"):
        monkeypatch.setattr(ldm.pipeline.first_stage, "available_memory", lambda device: available)
        return Pipeline(tiny, tiles=tiles).tile_side(height, width)

    needed = needed_memory(tiny.first_stage_model.widths, 1024 * 1024)
    assert tile(1024, 1024, None) is None
    assert tile(1024, 1024, 2 * needed) is None
    assert tile(1024, 1024, needed) == 64
    assert tile(512, 512, needed // 8) == 32  # a tile of 64 is all of it
    assert tile(1024, 1024, needed // 2, "off") is None
    assert tile(1024, 512, 2 * needed, "on") == 64
    assert tile(512, 512, 2 * needed, "on") is None


def test_a_tiled_picture_says_so_and_looks_alike(tiny):
    job = Job("a", width=640, height=64, steps=1, scale=1.0)
    (whole,), (tiled,) = (Pipeline(tiny, tiles=tiles).make([job]) for tiles in ("off", "on"))
    assert (whole.notes.get("Tiles"), tiled.notes["Tiles"]) == (None, "approximate")
    assert np.abs(whole.pixels.astype(int) - tiled.pixels).mean() < np.std(whole.pixels) / 2


def test_an_eta_above_1_is_possible(tiny):
    (picture,) = Pipeline(tiny).make([dataclasses.replace(JOB, eta=1.5, steps=5)])
    assert picture.pixels is not None
