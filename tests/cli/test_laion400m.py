"""`txt2img.py --laion400m`: the original's other model, tiny, in files."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import scripts.img2img as img2img
import scripts.txt2img as txt2img
from ldm.checkpoints import configs as known
from ldm.cli.values import request_of
from ldm.config import read_config
from ldm.metadata.infotext import parse_infotext
from ldm.modules.encoders import bert
from ldm.runs import models
from ldm.runs.starts import own_size
from tests.support.golden_data import laion_config, tiny_model

FAST = ["--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--device", "cpu", "--precision", "full"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "horse", "rid", "##ing", ",", "red"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with config.yaml, model.ckpt and vocab.txt."""
    folder = tmp_path_factory.mktemp("laion")
    config = laion_config(len(TOKENS))
    OmegaConf.save({"model": config}, folder / "config.yaml")
    torch.save({"state_dict": tiny_model(config).state_dict()}, folder / "model.ckpt")
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    return folder


@pytest.fixture
def draw(files, tmp_path, monkeypatch):
    """Runs the script with the tiny model's files in the standard places; returns exit code and samples by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "LAION_CONFIG", str(files / "config.yaml"))
    monkeypatch.setattr("ldm.checkpoints.configs.LAION_CONFIG", str(files / "config.yaml"))
    monkeypatch.setattr(models, "LAION_CKPT", str(files / "model.ckpt"))
    monkeypatch.setattr(bert, "OWN_VOCABULARY", str(files / "vocab.txt"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*options, script=txt2img):
        before = set(tmp_path.rglob("*.png"))
        code = script.main([*FAST, *options])
        new = sorted(set(tmp_path.rglob("samples/*.png")) - before)
        return code, [str(path.relative_to(tmp_path)) for path in new]

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def settings(path):
    return parse_infotext(Image.open(path).text["parameters"])


def test_the_flag_chooses_config_checkpoint_folder_and_size(draw):
    code, (path,) = draw("--laion400m", "--prompt", "a cat riding a horse")
    assert code == 0
    assert path == "outputs/txt2img-samples-laion400m/samples/00000.png"
    assert Image.open(path).size == (64, 64)
    assert settings(path)["Config"] == "config"


def test_the_published_config_draws_256_by_256():
    options = txt2img.parser().parse_args(["--laion400m"])
    assert own_size(request_of(options), read_config(known.LAION_CONFIG)) == (256, 256)


@pytest.mark.long
def test_prompts_are_read_word_by_word_in_lower_case(draw):
    def picture(prompt):
        return pixels(draw("--laion400m", "--plms", "--no_watermark", "--prompt", prompt)[1][0])

    cat = picture("a red cat")
    assert np.array_equal(cat, picture("A  RED\tCat"))
    assert not np.array_equal(cat, picture("a red horse"))
    assert not np.array_equal(cat, picture(""))


@pytest.mark.parametrize("order", [("--laion400m", "--outdir", "mine"), ("--outdir", "mine", "--laion400m")])
def test_a_folder_that_was_typed_is_taken(draw, order):
    assert draw(*order) == (0, ["mine/samples/00000.png"])


@pytest.mark.parametrize("option", ["--ckpt", "--config"])
def test_files_that_were_typed_are_taken(draw, capsys, option):
    assert draw("--laion400m", option, "no/such.ckpt") == (2, [])
    assert f"no/such.ckpt does not exist; give another with {option}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [(), ("--laion400m",)], ids=["by content", "by flag"])
def test_a_checkpoint_elsewhere(draw, files, tmp_path, flag):
    path = tmp_path / "elsewhere.ckpt"
    path.symlink_to(files / "model.ckpt")
    code, (sample,) = draw("--ckpt", str(path), "--outdir", "out", *flag)
    assert code == 0
    assert (settings(sample)["Config"], settings(sample)["Model"]) == ("config", "elsewhere")


def test_a_config_that_names_its_vocabulary(draw, files, tmp_path, monkeypatch):
    config = laion_config(len(TOKENS))
    config["params"]["cond_stage_config"]["params"]["version"] = str(files)
    OmegaConf.save({"model": config}, tmp_path / "own.yaml")
    monkeypatch.setattr(bert, "OWN_VOCABULARY", "no/such")
    assert draw("--config", "own.yaml", "--ckpt", str(files / "model.ckpt"))[0] == 0


@pytest.mark.long
def test_a_picture_as_a_start(draw, files, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    code, _ = draw("--ckpt", str(files / "model.ckpt"), "--init-img", "red.png", script=img2img)
    assert code == 0


def test_a_missing_vocabulary_is_one_line_before_the_model_is_read(draw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bert, "OWN_VOCABULARY", "models/ldm/text2img-large/vocab.txt")
    monkeypatch.setattr("ldm.places.ROOT", tmp_path)
    monkeypatch.setattr("ldm.pipeline.load_model", lambda *_, **__: pytest.fail("the model was read"))
    assert draw("--laion400m") == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "vocab.txt does not exist" in line
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_another_model_is_one_line(draw, tmp_path, capsys, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENS, "blue"]))
    monkeypatch.setattr(bert, "OWN_VOCABULARY", str(tmp_path / "vocab.txt"))
    assert draw("--laion400m", "--quiet") == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{len(TOKENS) + 1} entries, the text encoder {len(TOKENS)}" in line


def test_a_checkpoint_of_another_model_is_one_line(draw, capsys):
    assert draw("--laion400m", "--quiet", "--ckpt", known.BUNDLED_CKPT) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not the LAION-400M model; leave --laion400m out" in line


def test_a_long_prompt_says_what_is_cut(draw, capsys):
    code, (path,) = draw("--laion400m", "--prompt", "cat " * 75 + "red horse")
    assert code == 0
    assert settings(path)["Prompt cut"] == "red horse"
    assert "longer than 75 tokens; this is cut off: red horse" in capsys.readouterr().err
