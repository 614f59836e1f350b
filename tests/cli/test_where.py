"""`ldm where` lists the places where a run looks, in its order, and marks what it would use."""

import json
from pathlib import Path

import pytest

from ldm.checkpoints.configs import V1_CKPT
from ldm.cli.commands.where import main
from ldm.evaluation.weights import NETWORKS
from ldm.modules.encoders.bert import find_vocabulary
from ldm.places import find
from ldm.safety.load import find_safety_model
from tests.support.paths import ROOT


@pytest.fixture
def where(tmp_path, monkeypatch, capsys):
    """The output of the command, by kind, in an empty folder of a user without files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def run():
        assert main(["--json"]) == 0
        return {entry["kind"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}

    return run


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


def test_every_kind_of_file_is_listed_with_its_places(where, tmp_path):
    listed = where()
    assert [*listed] == [
        "configs", "Stable Diffusion v1", "inpainting model", "LAION-400M model", "bundled model", "VAE",
        "safety checker", "BERT vocabulary", "CLIP vocabulary",
        *(network.title for network in NETWORKS.values()), "caches",
    ]  # fmt: skip
    v1 = listed["Stable Diffusion v1"]
    assert v1["places"] == [V1_CKPT, str(ROOT / V1_CKPT), str(tmp_path / "data/ldm-v1" / V1_CKPT)]
    assert v1["found"] is None
    assert "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original" in v1["pages"]
    assert listed["bundled model"]["found"] == str(ROOT / "models/ldm/shapes/model.ckpt")
    assert Path(listed["CLIP vocabulary"]["found"]).is_file()


def test_what_is_found_is_what_a_run_uses(where, tmp_path):
    for place in (tmp_path / "data/ldm-v1" / V1_CKPT, tmp_path / V1_CKPT):
        touch(place)
        assert where()["Stable Diffusion v1"]["found"] == str(find(V1_CKPT))
        assert (tmp_path / find(V1_CKPT)).samefile(place)


def test_downloads_of_hugging_faces_libraries_are_found(where, tmp_path):
    hub = tmp_path / "cache/huggingface/hub"
    checker = hub / "models--CompVis--stable-diffusion-safety-checker/snapshots/a/pytorch_model.bin"
    assert where()["safety checker"]["found"] is None
    touch(hub / "models--google-bert--bert-base-uncased/snapshots/b/vocab.txt")
    touch(checker)
    listed = where()
    assert listed["safety checker"]["found"] == str(find_safety_model()) == str(checker)
    assert listed["BERT vocabulary"]["found"] == str(find_vocabulary())


def test_the_command_puts_a_download_where_it_is_found(where, tmp_path):
    v1 = where()["Stable Diffusion v1"]
    *_, target = v1["command"].split()
    touch(Path(target))
    assert where()["Stable Diffusion v1"]["found"] == target


def test_people_get_an_arrow_at_what_is_used(where, tmp_path, capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert f"\n  -> {ROOT / 'models/ldm/shapes/model.ckpt'}\n" in text
    assert "\nStable Diffusion v1: not found (--ckpt names another)\n" in text
    assert "published at https://huggingface.co/CompVis/stable-diffusion-safety-checker\n" in text
