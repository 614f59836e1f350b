"""ControlNet from the command line to the image and back, and mistakes with it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import scripts.replay as replay
import scripts.txt2img as txt2img
from ldm.checkpoints.configs import BUNDLED_CONFIG
from ldm.checkpoints.load import build_model
from ldm.config import read_config
from ldm.job import Job
from ldm.metadata.infotext import infotext, job_from_infotext
from ldm.metadata.read import read_job
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.places import ROOT
from tests.support.golden_data import weight_of
from tests.support.scripts import FAST

CONTROLS = (("a,b.pth", 'h "1".png', 0.5, 0.25, 1.0), ("c.safetensors", "d: e.png", 1.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A control network for the bundled model, and a hint."""
    folder = tmp_path_factory.mktemp("control")
    unet = build_model(read_config(ROOT / BUNDLED_CONFIG)).model.diffusion_model
    with torch.device("meta"):
        shapes = ControlNet(**unet.settings).state_dict()
    weights = {key: weight_of(key, value.shape) for key, value in shapes.items()}
    save_file({f"control_model.{key}": tensor for key, tensor in weights.items()}, folder / "net.safetensors")
    pixels = np.random.RandomState(5).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "hint.png")
    Image.fromarray(pixels[:32]).save(folder / "wide.png")
    return folder


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        usual = ["--prompt", "a red cube", *FAST, "--skip_grid", "--outdir", "out"]
        try:
            code = txt2img.main([*usual, *map(str, arguments)])
        except SystemExit as left:  # argparse's answer
            code = left.code
        return code, sorted((tmp_path / "out/samples").glob("*.png")), capsys.readouterr().err

    return run


@pytest.mark.long
def test_an_image_and_its_metadata(draw, control, capsys):
    net, hint = control / "net.safetensors", control / "hint.png"
    code, (plain,), _ = draw()
    assert code == 0
    typed = ("--control", f"{net}:{hint}:0.5", "--control_mode", "prompt")
    code, (_, made), _ = draw(*typed)
    assert code == 0
    assert not np.array_equal(np.asarray(Image.open(plain)), np.asarray(Image.open(made)))
    recipe = read_job(str(made))
    assert recipe.job.controls == (("net.safetensors", "hint.png", 0.5, 0.0, 1.0),)
    assert recipe.job.control_mode == "prompt"
    assert set(recipe.extras) >= {"Control hashes", "Hint hashes"}
    text = Image.open(made).text["parameters"]
    assert str(control) not in text and "net.safetensors: " in text

    assert replay.main([str(made), "--quiet", "--device", "cpu"]) == 2
    assert "it needs the ControlNet net.safetensors; give both with --control" in capsys.readouterr().err
    for file in (net, hint):
        (made.parent / file.name).write_bytes(file.read_bytes())
    assert replay.main([str(made), "--verify", "--quiet", "--device", "cpu"]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.slow
def test_lines_of_a_list(draw, control, tmp_path):
    """A line may have several; one that has none is the image without."""
    net, hint = control / "net.safetensors", control / "hint.png"
    (tmp_path / "list.txt").write_text(
        f"a red cube --control {net}:{hint}:0.3 --control {net}:{hint}\na red cube\n"
    )
    code, files, _ = draw("--from-file", "list.txt")
    assert code == 0
    first, second = (read_job(str(file)).job.controls for file in files)
    assert [weight for _, _, weight, *_ in first] == [0.3, 1.0] and second == ()
    entry = {"prompt": "a cube", "control": [[str(net), str(hint), 1, 0, 1]]}
    (tmp_path / "list.jsonl").write_text(json.dumps(entry) + "\n")
    code, files, _ = draw("--from-file", "list.jsonl")
    assert code == 0 and read_job(str(files[-1])).job.controls[0][2:] == (1.0, 0.0, 1.0)


@pytest.mark.slow
def test_a_run_with_control_resumes(draw, control):
    typed = ("--control", f"{control / 'net.safetensors'}:{control / 'hint.png'}", "--n_iter", "2")
    _, files, _ = draw(*typed)
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    code, files, _ = draw(*typed, "--resume")
    assert code == 0 and [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("net.safetensors", "'net.safetensors': not two files; give FILE:IMAGE"),
        ("net.safetensors:hint.png:1:2", "two numbers at its end; give a weight, or"),
        ("none.pth:hint.png", "the ControlNet none.pth does not exist; give a file, or a folder"),
        ("net.safetensors:none.png", "none.png: "),
        (
            "net.safetensors:wide.png",
            "is 64x32, and the image 64x64, of another aspect; add --control_resize fill",
        ),
        ("net.safetensors:hint.png:50", "has the weight 50; give -10 to 10"),
        ("net.safetensors:hint.png:1:0.7:0.2", "acts from 0.7 to 0.2; give shares of the steps"),
        (
            "v1.safetensors:hint.png",
            "is a ControlNet for Stable Diffusion v1 of 320 channels, and the model has 64; give",
        ),
        ("v2.safetensors:hint.png", "is a ControlNet for Stable Diffusion v2, and this toolkit runs"),
        (
            "hint.png:hint.png",
            "hint.png is an image, where the file of a network belongs; give --control FILE:",
        ),
        ("hint.png:net.safetensors", "the network comes first; give --control net.safetensors:hint.png"),
        (
            "net.safetensors:v1.safetensors",
            "v1.safetensors holds weights, where the image belongs; each network has",
        ),
        ("0.5:net.safetensors:hint.png", "--control 0.5:net.safetensors:hint.png: the weight comes last"),
        ("net.safetensors:hint.png:0:1", "two numbers at its end; give a weight, or a weight and two shares"),
        ("net.safetensors", "not two files; give FILE:IMAGE[:WEIGHT[:START:END]]"),
        ("net.safetensors:0.5", "not two files; give FILE:IMAGE[:WEIGHT[:START:END]]"),
    ],
)
def test_mistakes_are_one_line(draw, control, monkeypatch, typed, said):
    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    for name, width in (("v1", 768), ("v2", 1024)):
        tensors = {key: torch.zeros(320, width), "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
                   "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}  # fmt: skip
        save_file(tensors, control / f"{name}.safetensors")
    monkeypatch.setattr(
        "ldm.pipeline.load.load_into", lambda *rest, **more: pytest.fail("weights were loaded")
    )
    monkeypatch.chdir(control)
    code, _, err = draw("--control", typed)
    assert code == 2 and said in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["depth", "OpenPose", "lineart_anime"])
def test_a_hint_that_needs_a_network_has_its_tool_named(draw, kind):
    code, _, err = draw("--control", "a.pth:b.png", "--hint", kind)
    assert code == 2
    assert f"{kind!r} is made by a network, which is not here; make that image with controlnet_aux" in err


@pytest.mark.parametrize(
    "fields", [{}, {"hint": "canny"}, {"control_mode": "guess", "control_resize": "pad"}]
)
def test_infotext_comes_back(fields):
    job = Job("a cat", width=64, height=64, controls=CONTROLS, **fields)
    assert job_from_infotext(infotext(job, {"Version": "ldm x"})) == job


@pytest.mark.long
def test_hints_are_saved_and_shown(draw, control, tmp_path):
    cv2 = pytest.importorskip("cv2")
    typed = ("--control", f"{control / 'net.safetensors'}:{control / 'hint.png'}", "--hint", "canny")
    code, (made,), _ = draw(*typed, "--save_hints", "--gallery")
    assert code == 0 and read_job(str(made)).job.hint == "canny"
    saved = np.asarray(Image.open(tmp_path / "out/hints/00000-0.png"))
    edges = cv2.Canny(np.asarray(Image.open(control / "hint.png")), 100, 200)
    assert np.array_equal(saved, np.repeat(edges[..., None], 3, axis=2))
    assert 'src="hints/00000-0.png"' in (tmp_path / "out/gallery.html").read_text()


@pytest.mark.long
def test_a_sheet_has_a_row_of_hints(draw, control, tmp_path):
    net, hint = control / "net.safetensors", control / "hint.png"
    typed = ("--control", f"{net}:{hint}", "--sweep", "scale=1,4", "--no_watermark", "--save_hints")
    code, _, _ = draw(*typed)
    assert code == 0
    (sheet,) = (np.asarray(Image.open(file)) for file in (tmp_path / "out").glob("sheet*.png"))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (64, 64))
    found = np.argwhere((windows == np.asarray(Image.open(hint))[..., 0]).all((2, 3)))
    assert len(found) == 2 and found[0][0] == found[1][0]  # a row: one for each column
