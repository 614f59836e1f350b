"""The trained LoRA against PEFT: gradients, a step of AdamW, DoRA; and the written file against its readers."""

import copy

import pytest
import torch

from ldm.checkpoints.adapters.lora import LoraStack
from ldm.checkpoints.adapters.lora_files import lora_hash
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.training.lora import usual_lora
from ldm.training.lora_file import lora_tensors, write_lora
from ldm.util import InputError
from tests.support.golden_data import relative_error, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def filled(lora, seed=0):
    """Random upward factors: at zero, half of the gradients would be zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.paths.values():
        layer.up.data.normal_(generator=generator).mul_(0.05)
    return lora


def inputs():
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return x, torch.tensor([10, 700]), torch.randn(2, 7, 64, generator=generator), target


def loss_of(unet):
    x, t, context, target = inputs()
    return (unet(x, t, context=context) - target).square().mean()


@pytest.mark.long
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_and_a_step_are_those_of_peft(model, dora):
    peft = pytest.importorskip("peft")
    unet = model.model.diffusion_model.requires_grad_(False)
    theirs = copy.deepcopy(unet)
    lora = filled(usual_lora(model, rank=3, alpha=6.0, conv_rank=3, conv_alpha=6.0, dora=dora))
    try:
        prefix = "model.diffusion_model."
        paths = [path.removeprefix(prefix) for path in lora.paths]
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=3, lora_alpha=6, target_modules=paths, use_dora=dora), theirs
        )
        layers = {path: theirs.get_submodule(path) for path in paths}
        for path, layer in layers.items():
            own = lora.paths[prefix + path]
            layer.lora_A["default"].weight.data.copy_(own.down)
            layer.lora_B["default"].weight.data.copy_(own.up.reshape(layer.lora_B["default"].weight.shape))
        ours_loss, their_loss = loss_of(unet), loss_of(theirs)
        assert relative_error(ours_loss.detach(), their_loss.detach()) < 1e-5
        ours_loss.backward()
        their_loss.backward()
        trained = [
            p
            for layer in lora.paths.values()
            for p in (layer.down, layer.up, layer.magnitude)
            if p is not None
        ]
        same = []
        for path, layer in layers.items():
            own = lora.paths[prefix + path]
            same += [(own.down, layer.lora_A["default"].weight), (own.up, layer.lora_B["default"].weight)]
            if dora:
                same.append((own.magnitude, layer.lora_magnitude_vector["default"].weight))
        # lengths of rows before a norm have gradients of rounding errors alone: all are compared as one vector
        gradients = [torch.cat([p.grad.flatten() for p in side]) for side in zip(*same, strict=True)]
        assert relative_error(*gradients) < 1e-5
        if dora:
            return
        torch.optim.AdamW(trained, lr=1e-3, fused=True).step()
        torch.optim.AdamW([their for _, their in same], lr=1e-3).step()
        for mine, their in same:
            assert relative_error(mine.detach(), their.detach().reshape(mine.shape)) < 1e-5
    finally:
        lora.remove()


@pytest.mark.long
@pytest.mark.parametrize(("layout", "dora"), [("kohya", True), ("diffusers", False)])
def test_the_file_changes_a_model_as_the_training_did(model, layout, dora, tmp_path):
    torch.manual_seed(0)  # of the factors that `filled` leaves as they are
    x, t, context, _ = inputs()
    lora = filled(usual_lora(model, rank=4, alpha=2.0, conv_rank=2, conv_alpha=1.0, text=True, dora=dora))
    for layer in lora.paths.values():
        if layer.magnitude is not None:
            layer.magnitude.data.mul_(1.1)
    with torch.no_grad():
        trained = model.apply_model(x, t, context), model.get_learned_conditioning(["a cube"])
    path = tmp_path / "own.safetensors"
    write_lora(path, lora_tensors(lora, model, layout, torch.float32), {"ss_network_dim": "4"})
    lora.remove()
    stack = LoraStack(model)
    plain = model.apply_model(x, t, context)
    stack.apply([(str(path), 1.0, 1.0)])
    with torch.no_grad():
        loaded = model.apply_model(x, t, context), model.get_learned_conditioning(["a cube"])
    stack.apply([])
    assert relative_error(loaded[0], trained[0]) < 2e-6
    assert relative_error(loaded[1], trained[1]) < 2e-6
    assert relative_error(plain.detach(), trained[0]) > 1e-3


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_names_are_those_of_diffusers_own_network(model, layout):
    """What diffusers' loader makes of the keys are the layers of its U-Net of the same sizes, all of their shapes."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    lora = usual_lora(model, rank=2, alpha=1.0)
    try:
        tensors = lora_tensors(lora, model, layout, torch.float32)
    finally:
        lora.remove()
    if layout == "kohya":
        tensors, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
        assert len(alphas) == len(lora.paths)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8
        )
    named = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): value for key, value in tensors.items()}
    )
    assert len(named) == 2 * len(lora.paths)
    for key, value in named.items():
        layer, part = key.split(".lora_")
        out, into = unet.get_submodule(layer.replace(".processor", "")).weight.shape[:2]
        assert tuple(value.shape[:2]) == ((2, into) if part == "A.weight" else (out, 2)), key


def test_the_hash_is_that_of_the_tensors_bytes(model, tmp_path):
    lora = usual_lora(model, rank=2, alpha=1.0)
    try:
        write_lora(
            tmp_path / "a.safetensors", lora_tensors(lora, model, "kohya", torch.float16), {"ss_x": "1"}
        )
    finally:
        lora.remove()
    import hashlib

    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    noted = read_checkpoint(tmp_path / "a.safetensors").metadata["sshs_model_hash"]
    assert noted == hashlib.sha256(data[start:]).hexdigest()
    assert lora_hash(tmp_path / "a.safetensors") == noted[:12]


def test_a_rank_larger_than_the_layer_is_refused(model):
    with pytest.raises(
        InputError, match=r"the rank 100 is larger than the layer's 32; give --rank 32 or less"
    ):
        usual_lora(model, rank=100, alpha=1.0)


def test_a_new_lora_changes_nothing(model):
    x, t, context, _ = inputs()
    with torch.no_grad():
        plain = model.apply_model(x, t, context)
        lora = usual_lora(model, rank=2, alpha=1.0, conv_rank=2)
        trained = model.apply_model(x, t, context)
        lora.remove()
    assert relative_error(trained, plain) < 1e-6
