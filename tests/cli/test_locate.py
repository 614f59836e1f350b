"""The files that an image was made with are found: by hash under any name, or by name with a note."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm.places
import scripts.inpaint
import scripts.replay
from ldm.checkpoints.adapters.lora_files import lora_hash
from ldm.cli.locate import Located, locate, model_name
from ldm.data.scenes import image_at
from ldm.images.writer import encode_png
from ldm.job import Init, Job
from ldm.metadata.read import Recipe, read_job
from ldm.metadata.record import record
from tests.support.metadata import png
from tests.support.paths import ROOT

HERE = Path()


@pytest.fixture(autouse=True)
def _aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(path: str, content: bytes) -> str:
    """Writes a new file; returns the SHA-256 of its content."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def tensors(path: str, value: float) -> str:
    """Writes a new file that could be a LoRA; returns its hash, which is all that matters here."""
    content = io.BytesIO()
    torch.save({"x": torch.tensor(value)}, content)
    return written(path, content.getvalue())


def picture(path: str, recipe: Recipe) -> str:
    """Writes an image with a recipe."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    extras = {"Model": recipe.model, "Model hash": recipe.model_hash, **recipe.extras}
    written(path, encode_png(noise, record=record(recipe.job, extras)))
    return path


def replayed(capsys: pytest.CaptureFixture[str], *typed: str) -> tuple[int, list[str]]:
    """Runs the script; returns its exit code and the lines of its warnings."""
    capsys.readouterr()
    code = scripts.replay.main([*typed, "--quiet", "--device", "cpu"])
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith(("error", "warning"))]


def found(located: Located, option: str) -> object:
    """The value that was found for an option, where there are no other warnings."""
    assert (located.notes, located.missing) == ([], [])
    return located.changes[option]


# --- LoRAs and textual inversions ----------------------------------------------------------------------------------


def with_lora(digest: str) -> Recipe:
    job = Job("x", loras=(("ink", 0.8, 0.5),), width=512, height=512)
    return Recipe(job, "ldm", extras={"Lora hashes": f"ink: {digest[:12]}"} if digest else {})


def with_word(digest: str) -> Recipe:
    return Recipe(Job("a foil", width=512, height=512), "ldm", extras={"TI hashes": f"foil: {digest[:12]}"})


def test_a_lora_is_known_by_its_hash_under_any_name() -> None:
    tensors("loras/ink.pt", 1)
    digest = tensors("loras/deep/drawn with a pen.pt", 2)
    located = locate(with_lora(digest), HERE, {"lora_dir": "loras"})
    assert found(located, "lora") == [("loras/deep/drawn with a pen.pt", 0.8, 0.5)]


def test_the_bundled_lora_is_found_by_its_hash_without_a_folder() -> None:
    bundled = ROOT / "models/ldm/shapes/lcm.safetensors"
    located = locate(with_lora(lora_hash(bundled)), HERE, {})
    assert found(located, "lora") == [(str(bundled), 0.8, 0.5)]
    assert locate(with_lora("0" * 12), HERE, {}).changes["lora"] == [("ink", 0.8, 0.5)]


def test_the_hash_of_a_loras_whole_file_counts_as_well() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    Path("loras").mkdir()
    written("loras/ink.pt", b"another file of that name")
    safetensors.save_file({"x": torch.zeros(1)}, "loras/whole.safetensors")
    digest = hashlib.sha256(Path("loras/whole.safetensors").read_bytes()).hexdigest()
    job = Job("x", loras=(("ink", 0.8, 0.5),), width=512, height=512)
    recipe = Recipe(job, "Fooocus", extras={"Lora hashes": f"Ink: {digest[:10].upper()}"})
    located = locate(recipe, HERE, {"lora_dir": "loras"})
    assert found(located, "lora") == [("loras/whole.safetensors", 0.8, 0.5)]


def test_a_name_is_known_in_either_case_where_no_hash_is() -> None:
    written("words/EasyNeg.pt", b"any")
    recipe = Recipe(
        Job("easyneg", width=512, height=512), "SD.Next", extras={"TI hashes": "easyneg: , other: 12"}
    )
    located = locate(recipe, HERE, {"embedding_dir": "words"})
    assert located.changes["embedding"] == [("words/EasyNeg.pt", "easyneg")] and not located.notes
    assert located.missing == ["it needs the textual inversion other; give its folder with --embedding_dir"]


def test_files_that_another_program_names_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "a <lora:ink:0.8>\nNegative prompt: easyneg\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 64x64, "
        'Lora hashes: "ink: 0123456789ab", TI hashes: "easyneg: c74b4e810b03", Version: v1.6.0'
    )
    png(Path("a.png"), parameters=text)
    written("here/ink.pt", b"another file of that name")
    code, [line] = replayed(capsys, "a.png", "--lora_dir", "here", "--embedding_dir", "here")
    assert code == 2 and line.startswith("error: a.png: it needs the textual inversion easyneg")
    located = locate(read_job("a.png"), HERE, {"lora_dir": "here"})
    assert located.notes == ["here/ink.pt has another hash than the LoRA it was made with"]


def test_the_hash_that_a_lora_notes_of_itself_counts() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    Path("loras").mkdir()
    notes = {"sshs_model_hash": "0123456789ab" * 5}
    safetensors.save_file({"x": torch.zeros(1)}, "loras/renamed.safetensors", notes)
    located = locate(with_lora("0123456789ab"), HERE, {"lora_dir": "loras"})
    assert found(located, "lora") == [("loras/renamed.safetensors", 0.8, 0.5)]


def test_a_lora_without_a_hash_is_known_by_its_name() -> None:
    written("loras/other.pt", b"other")
    written("loras/ink.pt", b"any")
    located = locate(with_lora(""), HERE, {"lora_dir": "loras"})
    assert found(located, "lora") == [("loras/ink.pt", 0.8, 0.5)]


def test_a_lora_of_another_hash_is_taken_with_a_note() -> None:
    written("loras/ink.pt", b"any")
    located = locate(with_lora("0" * 12), HERE, {"lora_dir": "loras"})
    assert located.notes == ["loras/ink.pt has another hash than the LoRA it was made with"]
    assert located.changes["lora"] == [("loras/ink.pt", 0.8, 0.5)] and not located.missing


def test_a_textual_inversion_is_known_by_its_hash_under_any_name() -> None:
    written("words/foil.pt", b"another file of that name")
    digest = written("words/deep/shiny.pt", b"the one")
    assert found(locate(with_word(digest), HERE, {"embedding_dir": "words"}), "embedding") == [
        ("words/deep/shiny.pt", "foil")
    ]


def test_a_textual_inversion_of_another_hash_is_taken_with_a_note() -> None:
    written("words/foil.pt", b"any")
    located = locate(with_word("0" * 12), HERE, {"embedding_dir": "words"})
    assert located.notes == ["words/foil.pt has another hash than the textual inversion it was made with"]
    assert located.changes["embedding"] == [("words/foil.pt", "foil")] and not located.missing


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_missing_is_said_in_one_line(folder: bool, capsys: pytest.CaptureFixture[str]) -> None:
    written("here/other.pt", b"of another name and hash")
    for recipe, what, option in (
        (with_lora("0" * 12), "the LoRA ink", "--lora_dir"),
        (with_word("0" * 12), "the textual inversion foil", "--embedding_dir"),
    ):
        given = [option, "here"] if folder else []
        code, lines = replayed(capsys, picture("a.png", recipe), *given)
        assert code == 2
        assert lines == [f"error: a.png: it needs {what}; give its folder with {option}"]
    assert not Path("outputs").exists()


def test_a_folder_that_is_not_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = replayed(capsys, picture("a.png", with_lora("0" * 12)), "--lora_dir", "none")
    assert (code, lines) == (2, ["error: a.png: the folder none does not exist"])


def test_what_the_user_names_is_not_looked_for() -> None:
    both = Recipe(with_lora("0" * 12).job, "ldm", extras={"Lora hashes": "ink: 0", "TI hashes": "foil: 0"})
    assert locate(both, HERE, {"lora": ["x.pt"], "embedding": ["y.pt"]}) == Located()


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def only_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no checkpoint below the toolkit's folder."""
    monkeypatch.setattr(ldm.places, "ROOT", tmp_path / "elsewhere")


def made_with(model: str, digest: str = "") -> Recipe:
    return Recipe(Job("x", width=512, height=512), "ldm", model, digest[:10])


@pytest.mark.usefixtures("only_here")
def test_a_checkpoint_is_known_by_its_hash_under_any_name(tmp_path: Path) -> None:
    written("models/ldm/photo/model.ckpt", b"another model of that name")
    digest = written("models/ldm/renamed/weights.safetensors", b"the one")
    ckpt = found(locate(made_with("photo", digest), HERE, {}), "ckpt")
    assert ckpt == str(tmp_path / "models/ldm/renamed/weights.safetensors")
    assert found(locate(made_with("", digest), HERE, {}), "ckpt") == ckpt


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("models/ldm/photo/model.ckpt", "photo"),
        ("models/ldm/mine/photo.safetensors", "photo"),
        ("models/ldm/photo.ckpt", "photo.ckpt"),  # as ComfyUI names it
        ("models/ldm/photo/model_index.json", "photo"),
    ],
)
def test_a_checkpoint_without_a_hash_is_known_by_its_name(file: str, name: str, tmp_path: Path) -> None:
    written("models/ldm/other/model.ckpt", b"other")
    written(file, b"{}")
    ckpt = tmp_path / file
    expected = ckpt.parent if ckpt.suffix == ".json" else ckpt
    for digest in ("", "f2f73a8e"):  # the second is by an older rule, and ignored
        assert found(locate(made_with(name, digest), HERE, {}), "ckpt") == str(expected)


@pytest.mark.usefixtures("only_here")
def test_a_checkpoint_of_another_hash_is_taken_with_a_note(tmp_path: Path) -> None:
    written("models/ldm/photo/model.ckpt", b"any")
    located = locate(made_with("photo", "0123456789abcdef"), HERE, {})
    [note] = located.notes
    assert "photo [0123456789]" in note and "photo/model.ckpt has that name, but another hash" in note
    assert located.changes["ckpt"] == str(tmp_path / "models/ldm/photo/model.ckpt")


@pytest.mark.usefixtures("only_here")
def test_without_the_checkpoint_the_usual_one_is_taken_with_a_note() -> None:
    written("models/ldm/other/model.ckpt", b"other")
    for recipe, what in ((made_with("photo", "0" * 10), "photo [0000000000]"), (made_with("photo"), "photo")):
        located = locate(recipe, HERE, {})
        assert located.notes == [f"its model {what} is not below models/ldm; using the default one"]
        assert (located.changes, located.missing) == ({}, [])


@pytest.mark.usefixtures("only_here")
def test_a_given_checkpoint_is_taken_and_compared() -> None:
    digest = written("mine.ckpt", b"mine")
    written("models/ldm/photo/model.ckpt", b"any")
    assert locate(made_with("photo", digest.upper()), HERE, {"ckpt": "mine.ckpt"}) == Located()
    [note] = locate(made_with("photo", "0123456789"), HERE, {"ckpt": "mine.ckpt"}).notes
    assert note == "it was made with the model photo [0123456789], which mine.ckpt is not"


@pytest.mark.usefixtures("only_here")
def test_a_picture_that_names_no_model_says_nothing_of_it() -> None:
    assert locate(Recipe(Job("x", width=512, height=512), "ldm"), HERE, {}) == Located()


@pytest.mark.parametrize("path", ["shapes/model.ckpt", "other/shapes.safetensors", "shapes"])
def test_the_name_of_a_model(path: str) -> None:
    Path("shapes").mkdir()
    assert model_name(Path(path)) == "shapes"
    Path("model").mkdir()
    assert model_name(Path("model")) == "model" and model_name(Path("shapes/../model/model.ckpt")) == "model"


WRONG = "0123456789"


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("shapes", [], "shapes/model.ckpt has that name, but another hash"),
        ("photo", [], "is not below models/ldm; using the default one"),
        (
            "photo",
            ["--ckpt", "mine.ckpt", "--config", "configs/shapes/shapes-inference.yaml"],
            "mine.ckpt is not",
        ),
    ],
)
def test_another_model_is_told_once(
    model: str, given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, the usual one, and one that is given."""
    Path("mine.ckpt").symlink_to(ldm.places.ROOT / "models/ldm/shapes/model.ckpt")
    job = Job("a cube", width=64, height=64, steps=1)
    recipe = Recipe(job, "ldm", model, WRONG, {"Config": "shapes-inference"})
    code, lines = replayed(capsys, picture("a.png", recipe), *given)
    assert code == 0
    [line] = [line for line in lines if WRONG in line]
    assert line.startswith("warning: a.png: ") and words in line and f"{model} [{WRONG}]" in line
    assert sum("hash" in line for line in lines) <= 1


# --- images to start from and their masks ------------------------------------------------------------------------


def begun(image: str, mask: str = "") -> Recipe:
    extras = {"Init image hash": image[:10]} | ({"Mask hash": mask[:10]} if mask else {})
    return Recipe(
        Job("x", init=Init("scene.png", mask="mask.png" if mask else ""), width=512, height=512),
        "ldm",
        extras=extras,
    )


@pytest.mark.parametrize("as_list", [False, True])
def test_pictures_lie_in_folders_that_are_given(as_list: bool) -> None:
    image, mask = written("photos/scene.png", b"scene"), written("masks/mask.png", b"mask")
    written("scene.png", b"another, beside the file")
    given = {"init_img": ["photos"] if as_list else "photos", "mask": "masks"}
    located = locate(begun(image, mask), HERE, given)
    assert found(located, "init_img") == ["photos/scene.png"] and found(located, "mask") == "masks/mask.png"


def test_pictures_of_other_content_are_taken_with_a_note_if_they_are_given() -> None:
    image, mask = written("photos/scene.png", b"scene"), written("masks/mask.png", b"mask")
    located = locate(begun("0" * 10, "0" * 10), HERE, {"init_img": "photos", "mask": "masks/mask.png"})
    assert located.notes == [
        "photos/scene.png has another hash than the image it started from",
        "masks/mask.png has another hash than the mask",
    ]
    assert not located.missing
    written("beside/scene.png", b"scene")
    written("beside/mask.png", b"of another shape")
    [missing] = locate(begun(image, mask), Path("beside"), {}).missing
    assert missing == "beside/mask.png is not the mask: its hash differs; give that with --mask"


def test_pictures_that_are_not_in_the_folder_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    file = picture("a.png", begun("0" * 10, "0" * 10))
    code, [line] = replayed(capsys, file, "--init-img", "photos", "--mask", "photos")
    assert code == 2
    assert "the image it started from, photos/scene.png, does not exist; give it with --init-img" in line
    assert "the mask, photos/mask.png, does not exist; give it with --mask" in line


def test_a_moved_picture_and_its_mask_give_the_same_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(image_at(3, "fresh")[:64, :64]).save("scene.png")
    Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(32), (64, 1))).save("mask.png")
    fast = [
        "--ddim_steps",
        "2",
        "--device",
        "cpu",
        "--quiet",
        "--skip_grid",
        "--n_samples",
        "1",
        "--n_iter",
        "1",
    ]
    typed = ["--init-img", "scene.png", "--mask", "mask.png", "--outdir", "out"]
    assert scripts.inpaint.main([*fast, *typed]) == 0
    for name in ("scene.png", "mask.png"):
        Path(f"of {name}").mkdir()
        Path(name).rename(f"of {name}/{name}")
    folders = ["--init-img", "of scene.png", "--mask", "of mask.png"]
    code, lines = replayed(capsys, "out/samples/00000.png", "--verify", *folders)
    assert code == 0 and not any("hash" in line for line in lines)
