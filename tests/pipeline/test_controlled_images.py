"""Control networks through the pipeline: with every solver, pass and start; hints at each size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.images.canvas import open_canvas
from ldm.images.hints import make_hint, read_hint, shown_hint
from ldm.job import Init, Job
from ldm.modules.diffusionmodules.adapter import T2IAdapter
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.pipeline import Pipeline
from ldm.runtime.device import resolve_precision
from ldm.util import InputError
from tests.support.control import ENCODER, ip_weights
from tests.support.golden_data import inpainting_config, small_config, tiny_model, weight_of
from tests.support.precision import needs_int8_kernels


@pytest.fixture(scope="module")
def model():
    return tiny_model(small_config())


@pytest.fixture(scope="module")
def pipeline(model):
    return Pipeline(model)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Control networks for the small model: with weights, with zero convolutions that are zero, with averages."""
    folder = tmp_path_factory.mktemp("control")
    shapes = ControlNet(**model.model.diffusion_model.settings).state_dict()
    weights = {key: weight_of(f"control_model.{key}", value.shape) for key, value in shapes.items()}
    save_file(weights, folder / "some.safetensors")
    save_file(weights, folder / "shuffle.safetensors")
    zero = {key: 0 * tensor if key.startswith(("zero_convs", "middle_block_out")) else tensor
            for key, tensor in weights.items()}  # fmt: skip
    save_file(zero, folder / "zero.safetensors")
    pixels = np.random.RandomState(4).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "hint.png")
    Image.fromarray(np.where(np.arange(64)[:, None] < 32, 255, 0).astype(np.uint8)).save(folder / "mask.png")
    return folder


JOB = Job("a red cube", width=64, height=64, steps=2, seed=11)


def controlled(files, name, job=JOB, weight=1.0, start=0.0, end=1.0, **fields):
    control = (str(files / f"{name}.safetensors"), str(files / "hint.png"), weight, start, end)
    return replace(job, controls=(*job.controls, control), **fields)


def pixels(pipeline, *jobs):
    return [picture.pixels for picture in pipeline.make(jobs)]


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_zeros_change_no_bit(pipeline, files, sampler, scale):
    job = replace(JOB, sampler=sampler, scale=scale)
    plain, zero, other = (
        pixels(pipeline, one)[0]
        for one in (job, controlled(files, "zero", job), controlled(files, "some", job))
    )
    assert np.array_equal(plain, zero)
    assert not np.array_equal(plain, other)
    assert np.array_equal(pixels(pipeline, job)[0], plain)  # nothing stays


def test_a_weight_of_zero_and_an_empty_window_change_nothing(pipeline, files):
    plain = pixels(pipeline, JOB)[0]
    assert np.array_equal(pixels(pipeline, controlled(files, "some", weight=0.0))[0], plain)
    assert np.array_equal(pixels(pipeline, controlled(files, "some", start=0.3, end=0.6))[0], plain)


def test_two_halves_are_a_whole(pipeline, files):
    """Residuals add up: twice with half of the weight, to rounding."""
    once = pixels(pipeline, controlled(files, "some", weight=0.5))[0].astype(int)
    twice = pixels(pipeline, controlled(files, "some", controlled(files, "some", weight=0.25), weight=0.25))[
        0
    ]
    assert abs(once - twice.astype(int)).max() <= 1


# --- several kinds at a time --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(model, files):
    """A file of each kind that acts on the small model: a control of each with its image."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = model.model.diffusion_model
    base, shapes = unet.state_dict(), ControlNet(**unet.settings).state_dict()
    weights = {key: weight_of(f"control_model.{key}", value.shape) for key, value in shapes.items()}
    changes = {key: value - base[key] if key in base else value for key, value in weights.items()}
    save_file({**changes, "difference": torch.zeros(1)}, files / "difference.safetensors")
    adapter = T2IAdapter(3, [unet.model_channels * mult for mult in unet.channel_mult]).state_dict()
    save_file({key: weight_of(key, value.shape) for key, value in adapter.items()}, files / "t2i.safetensors")
    save_file(ip_weights(model), files / "ip.safetensors")
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)).save_pretrained(files / "image_encoder")
    names = ("some", "difference", "t2i", "ip")
    return {name: (str(files / f"{name}.safetensors"), str(files / "hint.png")) for name in names}


def mixed(kinds, weights, job=JOB):
    """A job with a control of each of these kinds, in this order."""
    return replace(job, controls=tuple((*kinds[kind], weight, 0.0, 1.0) for kind, weight in weights.items()))


def test_a_difference_is_the_network_that_it_makes(pipeline, kinds):
    """The file holds the difference of another network from the U-Net's weights."""
    whole, parts = pixels(pipeline, mixed(kinds, {"some": 0.7}), mixed(kinds, {"difference": 0.7}))
    assert np.abs(whole.astype(int) - parts).max() <= 1


WAYS = {
    "text to image": ({}, {}),
    "an image": ({"strength": 0.5}, {}),
    "a second pass": ({"upscale": 2.0}, {}),
    "in tiles": ({"upscale": 2.0}, {"tiles": "on"}),
    "in little memory": ({}, {"lowmem": True}),
    "without guidance": ({"scale": 1.0}, {}),
    "int8": ({}, {"precision": "int8"}),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=needs_int8_kernels if way == "int8" else ()) for way in WAYS]
)
def test_kinds_act_together(files, kinds, way):
    """Their order does not matter, each changes the image, and one with the weight 0 changes no bit."""
    fields, options = WAYS[way]
    rounds = "precision" in options
    precision = resolve_precision("int8" if rounds else "full", torch.device("cpu"))
    rest = {key: value for key, value in options.items() if key != "precision"}
    pipeline = Pipeline(tiny_model(small_config()), precision, **rest)
    init = {"init": Init(str(files / "hint.png"))} if "strength" in fields else {}
    job = replace(JOB, **fields, **init)
    weights = {"some": 0.4, "difference": 0.3, "t2i": 0.5, "ip": 0.6}

    def made(own):
        return pixels(pipeline, mixed(kinds, own, job))[0].astype(int)

    together, backwards = made(weights), made(dict(reversed(weights.items())))
    difference = np.abs(together - backwards)  # of sums in another order
    assert difference.mean() < 2 if rounds else difference.max() <= 1
    for kind in weights:
        without = {name: weight for name, weight in weights.items() if name != kind}
        assert np.array_equal(made({**weights, kind: 0.0}), made(without))
        assert not np.array_equal(made(without), together)
    assert np.array_equal(made(dict.fromkeys(weights, 0.0)), pixels(pipeline, job)[0])


@pytest.mark.parametrize("mode", ["prompt", "control", "guess"])
def test_modes_differ(pipeline, files, mode):
    plain, other = pixels(pipeline, controlled(files, "some"), controlled(files, "some", control_mode=mode))
    assert not np.array_equal(plain, other)


@pytest.mark.slow
def test_averaged_maps_do_not_move_with_the_hint(pipeline, files):
    """Of a network whose maps are averaged a mirrored hint differs less than of another."""
    flipped = files / "flipped.png"
    Image.open(files / "hint.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(flipped)

    def change(name):
        job = controlled(files, name)
        file, _, *rest = job.controls[0]
        other = replace(job, controls=((file, str(flipped), *rest),))
        a, b = (one.astype(float) for one in pixels(pipeline, job, other))
        return abs(a - b).mean()

    assert change("shuffle") < change("some")


@pytest.mark.slow
def test_batches_starts_and_second_passes(pipeline, files):
    jobs = [controlled(files, "some", replace(JOB, seed=seed)) for seed in (11, 12)]
    together = pixels(pipeline, *jobs)
    alone = [pixels(pipeline, job)[0] for job in jobs]
    for a, b in zip(together, alone, strict=True):
        assert abs(a.astype(int) - b).mean() < 1
    start = controlled(files, "some", replace(JOB, init=Init(str(files / "hint.png")), strength=0.5))
    upscaled = controlled(files, "some", replace(JOB, upscale=2.0))
    for job in (start, upscaled):
        found, plain = pixels(pipeline, job)[0], pixels(pipeline, replace(job, controls=()))[0]
        assert found.shape == plain.shape and not np.array_equal(found, plain)
    late = replace(upscaled, controls=((*upscaled.controls[0][:3], 0.0, 0.4),))
    assert np.array_equal(pixels(pipeline, late)[0], pixels(pipeline, replace(late, controls=()))[0])


def test_an_inpainting_model_and_its_hint(files):
    """The network sees the latent alone, without the channels of mask and image."""
    pipeline = Pipeline(tiny_model(inpainting_config(small_config())))
    init = Init(str(files / "hint.png"), mask=str(files / "mask.png"))
    job = controlled(files, "zero", replace(JOB, init=init), hint="inpaint")
    plain = pixels(pipeline, replace(job, controls=(), hint="none"))[0]
    assert np.array_equal(pixels(pipeline, job)[0], plain)
    assert not np.array_equal(
        pixels(pipeline, controlled(files, "some", replace(JOB, init=init), hint="inpaint"))[0], plain
    )


def test_its_mapped_file_may_leave_memory(pipeline, files):
    """Tensors that are made in inference mode stay: see `forget`."""
    name = str(files / "some.safetensors")
    with torch.inference_mode():
        network = pipeline.control.read(name)
    assert not any(parameter.is_inference() for parameter in network.parameters())


@pytest.mark.long
def test_a_lora_changes_the_u_net_that_a_control_network_acts_on(pipeline, files):
    """The weights of a model with the LoRA's differences added by hand; a `difference` file has them too."""
    layer = "output_blocks.1.0.in_layers.2.weight"
    changed = tiny_model(small_config())
    weight = changed.model.diffusion_model.get_parameter(layer)
    encoder = changed.model.diffusion_model.get_parameter("input_blocks.1.0.in_layers.2.weight")
    diffs = {}
    for name, value in (("output_blocks_1_0_in_layers_2", weight), ("input_blocks_1_0_in_layers_2", encoder)):
        diffs[f"lora_unet_{name}.diff"] = weight_of(name, value.shape)
        value.data += 0.5 * diffs[f"lora_unet_{name}.diff"]
    save_file(diffs, files / "lora.safetensors")
    expected = Pipeline(changed)
    own = replace(JOB, loras=((str(files / "lora.safetensors"), 0.5, 1.0),))
    plain = pixels(pipeline, controlled(files, "some"))[0]
    with_lora = pixels(pipeline, controlled(files, "some", own))[0]
    assert np.abs(with_lora.astype(int) - pixels(expected, controlled(files, "some"))[0]).max() <= 1
    assert np.abs(with_lora.astype(int) - plain).max() > 1
    assert np.array_equal(pixels(pipeline, controlled(files, "some"))[0], plain)


@pytest.mark.slow
def test_bf16_stays_close(files):
    from ldm.runtime import kernels
    from ldm.runtime.device import resolve_precision

    if not kernels.can_pack(torch.bfloat16):
        pytest.skip("this CPU has no products in bf16")
    half = Pipeline(tiny_model(small_config()), resolve_precision("autocast", torch.device("cpu")))
    full = Pipeline(tiny_model(small_config()))
    a, b = (pixels(one, controlled(files, "some"))[0].astype(float) for one in (half, full))
    assert abs(a - b).mean() < 6


# --- hints --------------------------------------------------------------------------------------------------------


def picture(height=48, width=40):
    return np.random.RandomState(1).randint(0, 256, (height, width, 3), dtype=np.uint8)


def test_canny_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    edges = make_hint("canny", picture())
    assert np.array_equal(edges[..., 0], cv2.Canny(picture(), 100, 200) / np.float32(255))
    assert np.array_equal(edges[..., 0], edges[..., 2])


def test_simple_hints():
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = 255
    assert np.array_equal(make_hint("none", image), image / np.float32(255))
    grey = make_hint("grey", np.full((8, 8, 3), (255, 0, 0), np.uint8))
    assert np.allclose(grey, 76 / 255)  # ITU-R BT.601
    pytest.importorskip("cv2")
    thin, thick = make_hint("canny", image), make_hint("scribble", image)
    assert set(np.unique(thick)) == {0, 1} and thick.sum() > 3 * thin.sum()
    flat = make_hint("tile", np.full((64, 64, 3), 90, np.uint8))
    assert np.allclose(flat, 90 / 255)
    assert make_hint("tile", picture(64, 64)).std() < 0.3 * (picture(64, 64) / 255).std()


def test_masked_pixels_of_an_inpainting_hint_are_minus_one():
    repaint = np.zeros((48, 40), bool)
    repaint[10:20, 5:9] = True
    hint = make_hint("inpaint", picture(), repaint)
    assert (hint[repaint] == -1).all() and np.array_equal(
        hint[~repaint], picture()[~repaint] / np.float32(255)
    )
    assert (shown_hint(hint)[repaint] == 0).all()


@pytest.mark.parametrize(
    ("resize", "ok"), [("none", False), ("fill", True), ("pad", True), ("stretch", True)]
)
def test_a_hint_of_another_aspect(tmp_path, resize, ok):
    path = str(tmp_path / "wide.png")
    Image.fromarray(picture(40, 80)).save(path)
    job = replace(JOB, control_resize=resize)
    if ok:
        assert read_hint(job, path, (64, 64), open_canvas).shape == (64, 64, 3)
        return
    with pytest.raises(
        InputError, match=r"is 80x40, and the image 64x64, of another aspect; add --control_resize"
    ):
        read_hint(job, path, (64, 64), open_canvas)
    assert read_hint(job, path, (32, 64), open_canvas).shape == (32, 64, 3)


def test_of_a_region_the_hint_is_that_part_of_the_whole(tmp_path):
    """At the region's own size it is the part that is cut out, whatever is made of it."""
    whole, mask = picture(80, 120), np.zeros((80, 120), np.uint8)
    mask[20:40, 50:70] = 255
    for name, image in (("whole", whole), ("mask", mask), ("part", whole[6:54, 36:84])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    init = Init(str(tmp_path / "whole.png"), 48, 48, "fill", mask=str(tmp_path / "mask.png"), crop_to_mask=14)
    job = replace(JOB, hint="tile", init=init)
    found = read_hint(job, str(tmp_path / "whole.png"), (48, 48), open_canvas)
    alone = read_hint(replace(JOB, hint="tile"), str(tmp_path / "part.png"), (48, 48), open_canvas)
    assert np.array_equal(found, alone)
