"""LoRA and textual inversion from the command line to the image, and against diffusers' network."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.txt2img as txt2img
from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.adapters.lora_files import lora_hash
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.checkpoints.layouts.names import to_diffusers
from ldm.config import read_config
from ldm.job import Job, lora_tag, split_loras
from ldm.metadata.infotext import infotext, job_from_infotext, parse_infotext
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.pipeline import Pipeline, load_model
from ldm.places import ROOT
from ldm.util import InputError
from tests.support.golden_data import figure, relative_error, tiny_model

safetensors = pytest.importorskip("safetensors.torch")
FAST = ["--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--device", "cpu", "--quiet", "--skip_grid",
        "--precision", "full", "--W", "64", "--H", "64"]  # fmt: skip
SHAPES = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (128, 192),
    "lora_unet_mid_block_resnets_0_conv1": (128, 128, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (768, 192),
}


def factors(shapes, rank=4, seed=0, scale=0.15):
    """A kohya file's tensors for layers with weights of these shapes."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, (out, *rest) in shapes.items():
        up_shape = (out, rank, *[1] * (len(rest) - 1))
        tensors[f"{name}.lora_down.weight"] = scale * random.standard_normal((rank, *rest)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = random.standard_normal(up_shape).astype(np.float32)
        tensors[f"{name}.alpha"] = np.float32(rank / 2)
    return tensors


def save(path, tensors, metadata=None):
    path.parent.mkdir(exist_ok=True, parents=True)
    safetensors.save_file({key: torch.tensor(value) for key, value in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def ink(tmp_path):
    return save(tmp_path / "loras/ink.safetensors", factors(SHAPES))


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs the script with the bundled model; returns the images it wrote, with their metadata."""
    monkeypatch.chdir(tmp_path)
    runs = iter(range(99))

    def run(*options, code=0):
        folder = tmp_path / f"out{next(runs)}"
        assert txt2img.main([*FAST, "--outdir", str(folder), *options]) == code
        return [Image.open(path) for path in sorted(folder.rglob("*.png"))]

    return run


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


# --- the command line -----------------------------------------------------------------------------------------------


def test_pixels_change_with_the_weight(draw, ink):
    (plain,) = draw()
    (full,) = draw("--lora", str(ink))
    (half,) = draw("--lora", f"{ink}:0.5")
    (text_only,) = draw("--lora", f"{ink}:0:1")
    (none,) = draw("--lora", f"{ink}:0")
    pictures = [plain, full, half, text_only]
    assert not any(same(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert same(none, plain)


def test_a_tag_in_the_prompt_is_the_option(draw, ink):
    (option,) = draw("--prompt", "a red cube", "--lora", f"{ink}:0.8:0.5")
    (tag,) = draw("--prompt", "a red cube <lora:ink:0.5:0.8>", "--lora_dir", str(ink.parent))
    (found,) = draw("--prompt", "a red cube", "--lora", "ink:0.8:0.5", "--lora_dir", str(ink.parent))
    tag_of_file = "a red cube <lora:ink.safetensors:0.5:0.8>"
    (with_ending,) = draw("--prompt", tag_of_file, "--lora_dir", str(ink.parent))
    assert same(option, tag) and same(option, found) and same(option, with_ending)
    for picture in (option, tag, with_ending):
        text = picture.text["parameters"]
        assert text.startswith("a red cube <lora:ink:0.5:0.8>\n")
        assert parse_infotext(text)["Lora hashes"] == f"ink: {lora_hash(ink)}"
        job = job_from_infotext(text)
        assert (job.prompt, job.loras) == ("a red cube", (("ink", 0.8, 0.5),))
        assert "loras/" not in json.dumps(picture.text)


def test_a_tag_may_say_the_name_of_the_trainings_output(draw, tmp_path):
    file = save(tmp_path / "loras/ink-000010.safetensors", factors(SHAPES), {"ss_output_name": "ink_v2"})
    (by_file,) = draw("--prompt", "a red cube <lora:ink-000010:0.8>", "--lora_dir", str(file.parent))
    (by_name,) = draw("--prompt", "a red cube <lora:ink_v2:0.8>", "--lora_dir", str(file.parent))
    assert same(by_file, by_name)
    text = by_name.text["parameters"]
    assert text.startswith("a red cube <lora:ink_v2:0.8>\n")
    assert parse_infotext(text)["Lora hashes"] == f"ink_v2: {lora_hash(file)}"


def test_without_a_folder_a_tag_is_text(draw, capsys):
    (literal,) = draw("--prompt", "a cube <lora:ink:1>", "--n_samples", "1")
    assert capsys.readouterr().err.count("without --lora_dir") == 1
    job = job_from_infotext(literal.text["parameters"])
    assert (job.prompt, job.loras) == ("a cube <lora:ink:1>", ())
    assert not same(literal, draw("--prompt", "a cube")[0])


@pytest.mark.long
def test_prompts_with_different_loras_share_no_batch(draw, ink, tmp_path):
    prompts = ["a red cube", "a red cube <lora:ink:1>", "a blue cube <lora:ink:1>", "a red cube"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    together = draw(
        "--from-file", str(tmp_path / "prompts.txt"), "--n_samples", "4", "--lora_dir", str(ink.parent)
    )
    assert len(together) == 4
    for i, (prompt, picture) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = draw("--prompt", prompt, "--seed", str(42 + i), "--lora_dir", str(ink.parent))
        far = np.abs(np.asarray(alone, dtype=int) - np.asarray(picture, dtype=int)).max()
        assert far <= 2, (i, far)  # another batch size, other last bits


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora", "none.safetensors:0.5"], "none.safetensors does not exist"),
        (["--lora_dir", "nowhere"], "nowhere does not exist"),
        (["--lora_dir", __file__], "test_lora_options.py is not a folder"),
        (["--lora_dir", ".", "--prompt", "a <lora:none:1>"], "no LoRA named none below"),
        (["--lora_dir", ".", "--prompt", "a <lora:ink:strong>"], "<lora:NAME:WEIGHT>"),
        (["--embedding", "none.pt"], "none.pt does not exist"),
        (["--embedding_dir", "nowhere"], "nowhere does not exist"),
        (["--embedding_dir", __file__], "test_lora_options.py is not a folder"),
    ],
)
def test_what_is_missing_is_said_in_one_line(draw, capsys, options, message):
    assert draw(*options, code=2) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_file_for_another_model_stops_the_run_at_once(draw, capsys, tmp_path):
    path = save(
        tmp_path / "xl.safetensors", factors({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (8, 8)})
    )
    assert draw("--lora", str(path), code=2) == []
    assert "SDXL" in capsys.readouterr().err


def parsed(*options):
    return txt2img.parser().parse_args([str(option) for option in options])


def test_only_numbers_are_split_off_a_file(tmp_path):
    for text, expected in (
        ("x.safetensors", ("x.safetensors", 1, 1)),
        ("x.safetensors:0.5", ("x.safetensors", 0.5, 0.5)),
        ("x.safetensors:-1:.25", ("x.safetensors", -1, 0.25)),
        ("C:\\loras\\x.safetensors:2", ("C:\\loras\\x.safetensors", 2, 2)),
        ("C:\\loras\\x", ("C:\\loras\\x", 1, 1)),
        ("a:b:nan", ("a:b:nan", 1, 1)),
        ("a:1:2:3", ("a:1", 2, 3)),
    ):
        assert parsed("--lora", text).lora == [expected]
    strange = tmp_path / "v:2"
    strange.write_bytes(b"x")
    assert parsed("--lora", strange).lora == [(str(strange), 1, 1)]
    assert parsed("--lora", f"{strange}:0.5").lora == [(str(strange), 0.5, 0.5)]
    assert parsed("--embedding", "a=b", "--embedding", "c").embedding == [("a", "b"), ("c", None)]


@pytest.mark.long
def test_an_embedding_changes_the_picture(draw, tmp_path):
    path = tmp_path / "ti/foil.pt"
    path.parent.mkdir()
    random = torch.Generator().manual_seed(0)
    torch.save({"string_to_param": {"*": torch.randn(2, 192, generator=random)}, "name": "inner"}, path)
    (plain,) = draw("--prompt", "a red cube foil")
    (folder,) = draw("--prompt", "a red cube foil", "--embedding_dir", str(path.parent))
    (renamed,) = draw("--prompt", "a red cube <shiny>", "--embedding", f"{path}=shiny")
    (negative,) = draw("--prompt", "a red cube", "--negative_prompt", "foil", "--embedding", str(path))
    (unused,) = draw("--prompt", "a red cube", "--embedding", str(path))
    assert not same(plain, folder) and same(folder, renamed)
    assert not same(negative, unused) and same(unused, draw("--prompt", "a red cube")[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for picture, name in ((folder, "foil"), (renamed, "shiny"), (negative, "foil")):
        assert parse_infotext(picture.text["parameters"])["TI hashes"] == f"{name}: {digest}"
    assert "TI hashes" not in unused.text["parameters"]


# --- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_loras_come_and_go_between_jobs(ink):
    model = load_model(read_config(BUNDLED_CONFIG), ROOT / BUNDLED_CKPT)
    own = dict(model.named_parameters())
    before = {key: value.clone() for key, value in own.items()}
    pipeline = Pipeline(model)

    def pixels(*loras):
        (picture,) = pipeline.make([Job("a red cube", width=128, height=128, steps=2, loras=loras)])
        return picture.pixels

    plain, changed, text = pixels(), pixels((str(ink), 1.0, 1.0)), pixels((str(ink), 0.0, 1.0))
    assert not same(plain, changed) and not same(plain, text)
    assert same(pixels((str(ink), 1.0, 1.0)), changed)
    assert same(pixels(), plain)
    assert all(
        value is own[key] and torch.equal(value, before[key]) for key, value in model.named_parameters()
    )


# --- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, prompt, loras",
    [
        ("a <lora:x:0.5>", "a", (("x", 0.5, 0.5),)),
        ("<lora:x>", "", (("x", 1.0, 1.0),)),
        ("a <lora:x:te=.5:unet=1> b", "a  b", (("x", 1.0, 0.5),)),
        ("a <lora:x:unet=2><lora:dir/y.v2:-1e-3>", "a", (("x", 2.0, 1.0), ("dir/y.v2", -1e-3, -1e-3))),
        (
            "<lora:x:strong> <lora:> <lora> <lora:x:1:2:3>",
            "<lora:x:strong> <lora:> <lora> <lora:x:1:2:3>",
            (),
        ),
    ],
)
def test_tags(text, prompt, loras):
    assert split_loras(text) == (prompt, loras)
    for lora in loras:
        assert split_loras(lora_tag(*lora)) == ("", (lora,))


@pytest.mark.parametrize(
    "prompt", ["", "a ", "a\nb", "literal <lora:y:1>", "a\nNegative prompt: b", "\x00", "é"]
)
@pytest.mark.parametrize("name", ["x", "styles, v2", "a:b", "<", "film.v2"])
def test_any_job_comes_back_from_its_text(prompt, name):
    job = Job(prompt, loras=((name, 0.1 + 0.2, -1.0), ("other", 1.0, 1.0)), width=512, height=512)
    assert job_from_infotext(infotext(job, {})) == job


@pytest.mark.parametrize(
    "loras", ['[["x", 1]]', '{"x": 1}', '[["x", [], 1]]', f'[["x", 1{"0" * 400}, 1]]', "x"]
)
def test_a_forged_entry_is_refused(loras):
    text = infotext(Job("a", loras=(("x:y", 1.0, 1.0),), width=512, height=512), {})
    assert "Loras: " in text
    forged = re.sub(r'Loras: ".*?[^\\]"', lambda _: f"Loras: {json.dumps(loras)}", text)
    with pytest.raises(InputError, match="Loras"):
        job_from_infotext(forged)


def test_folders_of_loras_stay_private():
    job = Job(
        "a",
        loras=(("/home/me/secret/x.safetensors", 1.0, 1.0), ("C:\\secret\\y.pt", 1.0, 1.0)),
        width=512,
        height=512,
    )
    text = infotext(job, {})
    assert "secret" not in text
    assert [name for name, *_ in job_from_infotext(text).loras] == ["x", "y"]


# --- the same in diffusers ------------------------------------------------------------------------------------------


def their_unet(diffusers, tiny):
    """The tiny model's U-Net as diffusers builds it."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8
    )
    unet.load_state_dict(to_diffusers(tiny.state_dict())["unet"])
    return unet.eval().requires_grad_(False)


def their_latents(diffusers, unet, x, context, uncond, scale):
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        cond, free = (unet(x, t, encoder_hidden_states=c).sample for c in (context, uncond))
        x = scheduler.step(free + scale * (cond - free), t, x).prev_sample
    return x


@pytest.mark.long
def test_five_steps_agree_with_diffusers_on_merged_weights(tiny, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = their_unet(diffusers, tiny)
    kinds = torch.nn.Linear, torch.nn.Conv2d
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}
    shapes = {f"lora_unet_{name.replace('.', '_')}": tuple(m.weight.shape) for name, m in layers.items()}
    tensors = factors(shapes, scale=0.02)
    for name, module in layers.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        down, up = tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"]
        delta = 0.7 * 0.5 * np.einsum("or,r...->o...", up.reshape(len(up), -1), down)
        module.weight += torch.from_numpy(delta.astype(np.float32))
    x, seeds = figure("sample/x_T"), torch.Generator().manual_seed(0)
    context, uncond = (torch.randn(2, 77, 64, generator=seeds) for _ in range(2))
    expected = their_latents(diffusers, unet, x, context, uncond, 5.0)

    model = tiny_model()
    path = save(tmp_path / "x.safetensors", tensors)
    options = {"S": 5, "batch_size": 2, "shape": x.shape[1:], "conditioning": context, "x_T": x, "verbose": False,
               "unconditional_guidance_scale": 5.0, "unconditional_conditioning": uncond}  # fmt: skip
    plain, _ = DDIMSampler(model).sample(**options)
    LoraStack(model).apply([(str(path), 0.7, 0.7)])
    got, _ = DDIMSampler(model).sample(**options)
    assert relative_error(got, expected) < 2e-5
    assert relative_error(plain, expected) > 0.05
