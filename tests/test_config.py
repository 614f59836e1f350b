"""Configs that are wrong, hostile or too large: one line that names the fault, and nothing runs or is built."""

import itertools
import os
import sys

import pytest
import torch
import yaml

from ldm.config import _OUR_TARGETS, ConfigError, read_config
from ldm.pipeline import load_model
from ldm.runs.models import latent_factor
from ldm.util import InputError
from tests.support.golden_data import small_config, tiny_model
from tests.support.paths import GOLDEN

MODEL = "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}\n"
LEVELS = "abcdefghij"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise(LEVELS)
)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def changed(**values):
    """The tiny model's config as YAML, with some entries replaced."""
    config = small_config()
    for path, value in values.items():
        *names, last = path.split("__")
        node = config["params"]
        for name in names:
            node = node[name]["params"]
        node[last] = value
    return yaml.safe_dump({"model": config})


def refusal(path, **options):
    with pytest.raises(ConfigError) as caught:
        read_config(path, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "the config .* does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is a pipe"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, socket or device"),
        (lambda path: path.write_bytes(b" " * (2**20 + 1)), "larger than 1 MB"),
    ],
)
def test_paths_that_are_no_configs(tmp_path, make, reason):
    make(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=reason):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a mapping"),
        ("- a\n- b", "is not a mapping"),
        ("hello", "is not a mapping"),
        ("model: 3", "is not a mapping"),
        ("a: &a [*a]", "is no"),
        ("model: {target: os.system}", "--allow_targets os"),
        ("model: {target: builtins.eval}", "--allow_targets builtins"),
        ("model: {target: ldmx.models.Thing}", "--allow_targets ldmx"),
        ("model: {target: ldm.util.instantiate_from_config}", "cannot use ldm.util.instantiate_from_config"),
        ("model: {target: ldm.models.diffusion.ddpm.torch}", "cannot use ldm.models.diffusion.ddpm.torch"),
        ("model: {target: ldm.models.no_such_module.Thing}", "targets can be AutoencoderKL, BERTEmbedder"),
        (
            "model: {target: ldm.images.writer.RunFolder, params: {outdir: x}}",
            "cannot use ldm.images.writer.RunFolder",
        ),
        ("model: {target: 'ldm models'}", "not the dotted name"),
    ],
)
def test_texts_that_name_no_model_of_this_toolkit(config_file, text, reason):
    assert reason in refusal(config_file(text))


def test_a_named_package_is_allowed(config_file):
    path = config_file("model: {target: collections.OrderedDict}")
    assert read_config(path, allow_targets=["collections"])["target"] == "collections.OrderedDict"
    for name, reason in (("namedtuple", "is not a class of"), ("Nothing", "there is no collections.Nothing")):
        path = config_file(f"model: {{target: collections.{name}}}")
        assert reason in refusal(path, allow_targets=["collections"])


def test_trust_in_this_package_adds_none_of_its_classes(config_file):
    path = config_file("model: {target: ldm.images.writer.RunFolder}")
    assert "cannot use" in refusal(path, allow_targets=["ldm"])


def test_every_target_of_this_package_can_be_used(config_file):
    for target in _OUR_TARGETS:
        assert read_config(config_file(f"model: {{target: {target}}}"))["target"] == target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that fits the config."""
    path = tmp_path_factory.mktemp("model") / "m.ckpt"
    torch.save(tiny_model(small_config()).state_dict(), path)
    return path


@pytest.mark.parametrize("target", [target for target in _OUR_TARGETS if target.startswith("ldm")])
def test_a_target_in_the_wrong_place_is_named(config_file, checkpoint, target):
    for name in ("", "unet_config", "first_stage_config", "cond_stage_config"):
        config = small_config()
        node = config["params"][name] if name else config
        if node["target"] == target:
            continue
        node["target"] = target
        with pytest.raises(InputError):
            load_model(read_config(config_file(yaml.safe_dump({"model": config}))), checkpoint)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        (
            "unet_config",
            {"model_chanels": 32},
            r"UNetModel takes no parameter 'model_chanels'; .*model_channels",
        ),
        (
            "first_stage_config",
            {"embed_dimm": 4},
            r"AutoencoderKL takes no parameter 'embed_dimm'; .*embed_dim",
        ),
        ("unet_config", {"model_channels": None}, "UNetModel needs the parameter 'model_channels'"),
        ("first_stage_config", {"embed_dim": None}, "AutoencoderKL needs the parameter 'embed_dim'"),
    ],
)
def test_a_parameter_that_is_unknown_or_missing_is_named(config_file, checkpoint, part, change, said):
    config = small_config()
    params = {**config["params"][part]["params"], **change}
    config["params"][part]["params"] = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(InputError, match=said):
        load_model(read_config(config_file(yaml.safe_dump({"model": config}))), checkpoint)


def test_what_a_tag_would_run_is_refused_with_its_line(config_file, tmp_path):
    canary = tmp_path / "canary"
    text = MODEL + f"other: !!python/object/apply:os.system ['touch {canary}']"
    assert "line 2" in refusal(config_file(text))
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        BOMB + MODEL,
        "model: &a {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: *a}",
        "model: " + "[" * 2000 + "]" * 2000,
        "{model: " * 2000 + "}" * 2000,
    ],
    ids=["aliases", "cycle", "lists", "mappings"],
)
def test_bombs_cycles_and_depth(config_file, text):
    assert "not usable YAML" in refusal(config_file(text))


@pytest.mark.parametrize(
    "text",
    [b"model:\n\ttarget: x", b"model:\0 x", b"model: {target: ldm.\xe9}", "model: 1".encode("utf-16")],
    ids=["tab", "NUL", "latin-1", "UTF-16"],
)
def test_bytes_that_are_no_utf8_yaml(config_file, text):
    assert "not usable YAML" in refusal(config_file(text))


def test_a_foreign_target_deep_inside_is_found_before_any_import(config_file):
    config = small_config()
    config["params"]["first_stage_config"]["params"]["lossconfig"] = {
        "params": [{"target": "antigravity.Loss"}]
    }
    path = config_file(yaml.safe_dump({"model": config}))
    assert "antigravity.Loss is not a part of this toolkit" in refusal(path)
    assert "antigravity" not in sys.modules


def test_secrets_of_the_environment_are_not_resolved(config_file, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    for text in ("${oc.env:SECRET_TOKEN}", "${oc.decode:'1'}", "a ${oc.env:NONE,${oc.env:SECRET_TOKEN}}"):
        message = refusal(config_file(changed(first_stage_key=text)))
        assert "interpolation is not supported" in message and "hunter2" not in message


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("linear_start", float("nan"), "linear_start is nan"),
        ("scale_factor", float("inf"), "scale_factor is inf"),
        ("timesteps", 10**11, "timesteps is 100000000000"),
        ("unet_config__model_channels", 10**12, "at most 1048576"),
        ("unet_config__num_res_blocks", 10**6, "num_res_blocks is 1000000; at most 100"),
        ("unet_config__channel_mult", [1] * 101, "channel_mult has 101 entries"),
        ("cond_stage_config__layers", 10**6, "layers is 1000000"),
    ],
)
def test_numbers_that_no_model_can_be_built_with(config_file, name, value, reason):
    assert reason in refusal(config_file(changed(**{name: value})))


def test_what_only_training_reads_may_be_endless(config_file):
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"cycle_lengths": [10**13]}}
    assert read_config(config_file(changed(scheduler_config=schedule)))


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("use_ema", "on", "use_ema"),
        ("timesteps", "12:30", "timesteps"),
        ("channels", 4.5, "channels"),
        ("linear_start", "nan", "linear_start"),
        ("unet_config__model_channels", 64.0, "model_channels"),
        ("unet_config__use_checkpoint", 1, "use_checkpoint"),
        ("unet_config__no_such_thing", 1, "no_such_thing"),
        ("unet_config__num_heads", 0, "can be built"),
        ("unet_config__model_channels", -64, "can be built"),
        ("cond_stage_config", "__is_unconditional__", "cond_stage_config is"),
        ("cond_stage_config", {"params": [1]}, "cond_stage_config is"),
        ("unet_config", 3, "a config entry is 3"),
    ],
)
def test_values_of_the_wrong_kind_are_named_before_anything_is_read(config_file, name, value, word):
    with pytest.raises(InputError, match=word):
        load_model(read_config(config_file(changed(**{name: value}))), "not/read.ckpt")


@pytest.mark.parametrize(
    ("ddconfig", "reason"), [(3, "ddconfig is 3; it must be a mapping"), ({"ch_mult": 3}, "ch_mult is 3")]
)
def test_an_autoencoder_whose_factor_cannot_be_told(config_file, ddconfig, reason):
    model = read_config(config_file(changed(first_stage_config__ddconfig=ddconfig)))
    with pytest.raises(ConfigError, match=reason):
        latent_factor(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet_config__model_channels", 64),
        ("unet_config__model_channels", 10**6),
        ("unet_config__context_dim", 32),
    ],
)
def test_a_config_that_does_not_fit_the_checkpoint_is_blamed(config_file, checkpoint, name, value):
    """Sizes are compared on paper: a model of a million channels takes no memory."""
    with pytest.raises(
        InputError, match=r"has shape .*, the model expects .*config or checkpoint is of another"
    ):
        load_model(read_config(config_file(changed(**{name: value}))), checkpoint)


def test_a_checkpoint_that_the_config_names_is_ignored_with_a_note(config_file, checkpoint, tmp_path, caplog):
    os.mkfifo(tmp_path / "canary")  # opening it would block for ever
    names = {key: str(tmp_path / "canary") for key in ("ckpt_path", "first_stage_config__ckpt_path")}
    assert load_model(read_config(config_file(changed(**names))), checkpoint)
    notes = [record.message for record in caplog.records if "ckpt_path" in record.message]
    assert len(notes) == 2 and all(note.endswith("is ignored") for note in notes)


def test_a_byte_order_mark_is_no_fault(config_file):
    assert read_config(config_file(b"\xef\xbb\xbf" + (GOLDEN / "tiny.yaml").read_bytes()))["target"]


def test_the_published_spelling_of_numbers_is_read(config_file):
    text = (GOLDEN / "tiny.yaml").read_text()
    assert "linear_start: 0.00085" in text
    model = read_config(config_file(text.replace("linear_start: 0.00085", "linear_start: 8.5e-4")))
    assert model["params"]["linear_start"] == 0.00085
