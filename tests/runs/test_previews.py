"""Previews and animations: what they show, and that the run does not depend on them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import save_file

import scripts.txt2img as txt2img
from ldm.images import writer
from ldm.modules.diffusionmodules.taesd import TAESDDecoder, TAESDEncoder
from ldm.pipeline.colours import colours_of, fit_colours
from ldm.runs import model_cache
from ldm.runs.previews import encode_animation
from ldm.safety.screen import Screen
from tests.support.scripts import SMALL

PROMPTS = "a red cube\na blue sphere\n"


def draw(tmp_path: Path, *others: str) -> tuple[int, dict[str, bytes]]:
    """The exit code, and the files of a run of two images in one batch."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    out = tmp_path / "out"
    code = txt2img.main(
        ["--from-file", str(tmp_path / "prompts.txt"), "--n_iter", "1", "--n_samples", "2", "--steps", "6",
         "--device", "cpu", "--precision", "full", "--safety", "off", "--outdir", str(out), *SMALL, *others]
    )  # fmt: skip
    return code, {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_they_change_nothing_and_show_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes of the run's files, frames, and colours, which are those of the image itself and not of its neighbour."""
    code, plain = draw(tmp_path / "plain", "--quiet")
    assert code == 0
    code, files = draw(tmp_path / "with", "--preview", "4", "--animate", "webp", "--json", "--quiet")
    assert code == 0
    names = {f"previews/0000{i}.{kind}" for i in (0, 1) for kind in ("png", "webp")}
    assert {name for name in files if name.startswith("previews")} == names
    assert {n: data for n, data in files.items() if n.endswith(".png") and n not in names} == {
        n: data for n, data in plain.items() if n.endswith(".png")
    }
    told = [e for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["event"] == "preview"]
    assert [(Path(e["path"]).stem, e["step"], e["steps"]) for e in told] == [
        ("00000", 4, 6), ("00001", 4, 6), ("00000", 6, 6), ("00001", 6, 6),
    ]  # fmt: skip
    out = tmp_path / "with/out"
    made = [
        np.asarray(Image.open(out / f"samples/0000{i}.png").resize((32, 32), Image.Resampling.BOX))
        for i in (0, 1)
    ]
    shown = [np.asarray(Image.open(out / f"previews/0000{i}.png")) for i in (0, 1)]
    for i in (0, 1):
        assert psnr(shown[i], made[i]) > 18 > psnr(shown[i], made[1 - i])
        with Image.open(out / f"previews/0000{i}.webp") as animation:
            assert (animation.n_frames, animation.size) == (2, (32, 32))  # type: ignore[attr-defined]


def test_a_taesd_decodes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is the image of the same seeds with that decoder as `--vae`, at half its size."""
    torch.manual_seed(0)
    for half, network in (("encoder", TAESDEncoder(4, 8)), ("decoder", TAESDDecoder(4, 8))):
        save_file(network.state_dict(), tmp_path / f"taesd_{half}.safetensors")
    file = str(tmp_path / "taesd_decoder.safetensors")
    code, shown = draw(
        tmp_path / "shown", "--preview", "4", "--preview_vae", file, "--animate", "webp", "--quiet"
    )
    assert code == 0
    code, whole = draw(tmp_path / "whole", "--vae", file, "--quiet")
    assert code == 0
    for i in (0, 1):
        decoded = Image.open(io.BytesIO(whole[f"samples/0000{i}.png"])).resize((32, 32), Image.Resampling.BOX)
        preview = Image.open(io.BytesIO(shown[f"previews/0000{i}.png"]))
        assert np.abs(np.asarray(preview).astype(int) - np.asarray(decoded)).max() <= 1
        with Image.open(io.BytesIO(shown[f"previews/0000{i}.webp"])) as animation:
            assert animation.size == (32, 32)
    capsys.readouterr()
    other = file.replace("decoder", "encoder")
    for options, fault in (
        (["--preview", "1", "--preview_vae", other], "has no decoder of a TAESD: it is"),
        (["--preview", "1", "--preview_vae", "none.pth"], "none.pth does not exist; give the file of a TAESD"),
        (["--preview_vae", file], "--preview_vae decodes previews; give --preview or --animate too"),
    ):  # fmt: skip
        assert draw(tmp_path / "faulty", *options)[0] == 2
        assert fault in capsys.readouterr().err


def test_the_map_of_a_linear_decoder_is_found() -> None:
    """A decoder that is affine in each cell, with colours inside [-1, 1]."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(5, 3, generator=generator) * 0.05

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(colours_of(z, matrix), scale_factor=8)

    assert torch.allclose(fit_colours(decode, 4, torch.device("cpu")), matrix, atol=1e-5)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_an_animation_has_every_frame_in_the_last_one_s_size(kind: str) -> None:
    """Frames of one colour each, and a pass at a smaller size before."""
    frames = [np.full((4 + 2 * (i > 1), 6, 3), 60 * i, np.uint8) for i in range(4)]
    with Image.open(io.BytesIO(encode_animation(frames, (6, 6), kind))) as file:
        assert (file.n_frames, file.size) == (4, (24, 24))  # type: ignore[attr-defined]
        for i, frame in enumerate(ImageSequence.Iterator(file)):
            assert np.abs(np.asarray(frame.convert("RGB")).astype(int) - 60 * i).max() < 16


def test_beside_a_safety_check_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        model_cache, "make_screen", lambda *_: Screen(lambda x: torch.ones(len(x), dtype=torch.bool))
    )
    code, files = draw(tmp_path, "--preview", "1", "--animate", "gif")
    assert code == 0 and not [name for name in files if name.startswith("previews")]
    assert "cannot judge previews" in capsys.readouterr().err


def test_a_disk_that_takes_none_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = writer.publish

    def full(path: Any, data: bytes, overwrite: bool = False) -> None:
        if "previews" in Path(path).parts:
            raise OSError(28, "No space left on device")
        publish(path, data, overwrite)

    monkeypatch.setattr(writer, "publish", full)
    code, files = draw(tmp_path, "--preview", "1")
    assert code == 0 and len([name for name in files if name.startswith("samples/0")]) == 2
    assert capsys.readouterr().err.count("no more previews") == 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [(["--preview", "-1"], "--preview is -1; give a number of steps"), (["--animate", "png"], "--animate")],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], fault: str
) -> None:
    try:
        code, _ = draw(tmp_path, *options)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    assert code == 2 and fault in capsys.readouterr().err
