"""The stages' configs, and the consistency of the files that they pass on."""

from pathlib import Path

import pytest
import torch

from ldm.training.config import read_config
from ldm.training.export import save_atomically
from ldm.training.stage import Stage
from ldm.training.stages import STAGES
from ldm.util import InputError, instantiate_from_config
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs" / "shapes"


def test_the_bundled_model_fits_into_24_mib():
    config = read_config(CONFIGS / "shapes-inference.yaml").model
    with torch.device("meta"):
        model = instantiate_from_config(config)
    assert sum(p.numel() for p in model.parameters()) * 2 < 24 * 2**20


def test_changes_from_the_command_line_reach_the_run():
    config = read_config(CONFIGS / "diffusion.yaml", ["training.optimisation.steps=7", "run.clip=0.5"])
    stage = Stage("diffusion", config, Path("logs"))
    assert stage.optimisation.steps == 7
    assert stage.config.run.clip == 0.5


def test_a_missing_config_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no config"):
        read_config(tmp_path / "none.yaml")


def test_a_stage_without_its_inputs_names_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = Stage("diffusion", read_config(CONFIGS / "diffusion.yaml"), tmp_path)
    with pytest.raises(InputError, match=r"autoencoder\.pt does not exist"):
        STAGES["diffusion"](stage)


def test_a_scale_factor_of_another_autoencoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    save_atomically({"state_dict": {}, "scale_factor": 123.0}, tmp_path / "autoencoder.pt")
    save_atomically({"state_dict": {}}, tmp_path / "text.pt")
    stage = Stage("diffusion", read_config(CONFIGS / "diffusion.yaml"), tmp_path)
    with pytest.raises(InputError, match=r"latents need 123\.00000"):
        STAGES["diffusion"](stage)
