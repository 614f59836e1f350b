"""State dicts have exactly the keys and shapes of published checkpoints."""

import copy

import pytest
import torch

from ldm.checkpoints.load import skip_init
from ldm.config import read_config
from ldm.util import InputError, instantiate_from_config
from tests.support.golden_data import keys


def on_meta(config):
    with torch.device("meta"), skip_init():
        return instantiate_from_config(config)


def shapes(model):
    return {key: list(value.shape) for key, value in model.state_dict().items()}


@pytest.fixture
def v1():
    return copy.deepcopy(read_config("configs/stable-diffusion/v1-inference.yaml"))


def test_v1(v1):
    assert shapes(on_meta(v1)) == keys("keys_v1.json")


def test_v1_with_averages(v1):
    v1["params"]["use_ema"] = True
    assert shapes(on_meta(v1)) == keys("keys_v1_ema.json")


def test_laion400m():
    assert shapes(on_meta(read_config("configs/latent-diffusion/txt2img-1p4B-eval.yaml"))) == keys(
        "keys_laion400m.json"
    )


def test_building_allocates_nothing(v1):
    model = on_meta(v1)
    kept = {name for name, value in model.named_buffers() if not value.is_meta}
    assert all(p.is_meta for p in model.parameters())
    assert kept == {"cond_stage_model.transformer.text_model.embeddings.position_ids"} | {
        name for name in keys("keys_v1.json") if "." not in name
    }


@pytest.mark.parametrize(
    "where",
    [(), ("unet_config",), ("first_stage_config",), ("cond_stage_config",)],
    ids=lambda w: "/".join(w),
)
def test_unknown_parameter_is_named(v1, where):
    node = v1
    for name in where:
        node = node["params"][name]
    node.setdefault("params", {})["no_such_parameter"] = 1
    with pytest.raises(InputError, match="no_such_parameter"):
        on_meta(v1)


def test_missing_parameter_is_named(v1):
    del v1["params"]["unet_config"]["params"]["model_channels"]
    with pytest.raises(InputError, match="model_channels"):
        on_meta(v1)
