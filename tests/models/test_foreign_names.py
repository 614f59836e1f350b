"""Names, signatures and attributes of the original that other people's code uses."""

import importlib
import math

import pytest
import torch
from torch import distributions, nn

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.models.autoencoder import IdentityFirstStage, VQModel, VQModelInterface
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.model import Decoder, Encoder, ResnetBlock, nonlinearity
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import avg_pool_nd, conv_nd, linear
from ldm.modules.distributions.distributions import normal_kl
from ldm.util import InputError, count_params, isimage, ismap, log_txt_as_img, mean_flat

UNET = {
    "image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1,
    "attention_resolutions": [1], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
    "context_dim": 16,
}  # fmt: skip
DDCONFIG = {
    "ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
    "resolution": 16, "z_channels": 4, "double_z": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "util.log_txt_as_img", "util.ismap", "util.isimage", "util.mean_flat", "util.count_params", "util.exists",
        "util.parallel_data_prefetch",
        "util.default", "modules.attention.default", "modules.attention.exists",
        "modules.diffusionmodules.util.avg_pool_nd", "modules.diffusionmodules.util.GroupNorm32",
        "modules.diffusionmodules.util.mean_flat", "modules.diffusionmodules.model.nonlinearity",
        "modules.diffusionmodules.openaimodel.exists", "modules.diffusionmodules.openaimodel.th",
        "modules.distributions.distributions.normal_kl", "models.diffusion.ddpm.DDPM",
        "models.diffusion.ddpm.disabled_train", "models.autoencoder.VQModelInterface", "models.autoencoder.VQModel",
        "models.autoencoder.IdentityFirstStage", "data.base.Txt2ImgIterableBaseDataset",
        "models.diffusion.dpm_solver.DPMSolverSampler", "models.diffusion.dpm_solver.sampler.DPMSolverSampler",
    ],
)  # fmt: skip
def test_names_are_where_the_original_has_them(name):
    module, _, attribute = f"ldm.{name}".rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_kinds_of_batches():
    assert [ismap(torch.ones(1, n, 2, 2)) for n in (1, 3, 4)] == [False, False, True]
    assert [isimage(torch.ones(1, n, 2, 2)) for n in (1, 3, 4)] == [True, True, False]
    assert not ismap(torch.ones(4, 2, 2)) and not isimage("text")
    assert torch.equal(mean_flat(torch.arange(8.0).reshape(2, 2, 2)), torch.tensor([1.5, 5.5]))
    assert count_params(nn.Linear(3, 4)) == 16


def test_texts_are_drawn_dark_on_white():
    images = log_txt_as_img((64, 32), ["a cat", ""])
    assert images.shape == (2, 3, 32, 64)
    assert images[0].min() < 0 < images[0].max() == 1
    assert (images[1] == 1).all()


def test_the_divergence_is_that_of_torchs_distributions():
    mean, logvar = torch.tensor([0.5, -2.0]), torch.tensor([0.3, -1.0])
    first = distributions.Normal(mean, (logvar / 2).exp())
    second = distributions.Normal(torch.tensor(1.0), torch.tensor(math.exp(0.25)))
    torch.testing.assert_close(
        normal_kl(mean, logvar, 1.0, 0.5), distributions.kl_divergence(first, second), atol=1e-6, rtol=1e-6
    )


def test_layers_take_the_arguments_of_torchs_own():
    x = torch.randn(1, 4, 8, 8)
    assert conv_nd(2, 4, 6, 3, padding=2, dilation=2, groups=2)(x).shape == (1, 6, 8, 8)
    assert linear(4, 2, bias=False, dtype=torch.float64).weight.dtype is torch.float64
    assert torch.equal(avg_pool_nd(2, kernel_size=2)(x), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(nonlinearity(x), nn.functional.silu(x))


def test_keywords_at_the_values_of_v1_change_nothing_and_others_are_named():
    plain = UNetModel(**UNET)
    keyed = UNetModel(**UNET, num_classes=None, use_fp16=False, n_embed=None, num_heads_upsample=-1)
    keyed.load_state_dict(plain.state_dict())
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16)
    assert torch.equal(keyed(x, t, context, y=None), plain(x, t, context))
    for name, value in (("num_classes", 10), ("use_fp16", True), ("resblock_updown", True)):
        with pytest.raises(InputError, match=name):
            UNetModel(**UNET, **{name: value})
    with pytest.raises(InputError, match="use_linear"):
        SpatialTransformer(32, 2, 16, use_linear=True)
    assert SpatialTransformer(32, 2, 16, disable_self_attn=False, use_linear=False).use_linear is False


def test_keywords_that_forward_does_not_know_are_named_once(caplog):
    unet = UNetModel(**UNET)
    for _ in range(2):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16), only_mid_control=True)
    assert [record.getMessage() for record in caplog.records] == [
        "UNetModel.forward ignores only_mid_control"
    ]


def test_attributes_of_the_networks():
    encoder, decoder = Encoder(**DDCONFIG), Decoder(**DDCONFIG)
    for network in (encoder, decoder):
        assert (network.ch, network.num_resolutions, network.num_res_blocks, network.temb_ch) == (32, 2, 1, 0)
        assert (network.resolution, network.in_channels) == (16, 3)
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=False, temb_channels=0, dropout=0.0)
    assert (block.in_channels, block.out_channels, block.use_conv_shortcut) == (32, 64, False)
    assert ResBlock(32, 64, 0.0, up=False, down=False).updown is False


def test_the_end_of_a_decoder_can_be_left_out_or_bounded():
    z, decoder = torch.randn(1, 4, 8, 8), Decoder(**DDCONFIG)
    whole = decoder(z)
    decoder.tanh_out = True
    assert torch.equal(decoder(z), torch.tanh(whole))
    decoder.give_pre_end = True
    assert decoder(z).shape == (1, 32, 16, 16)


def test_first_stages_that_are_not_here():
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(IdentityFirstStage().decode(IdentityFirstStage().encode(x)), x)
    for cls in (VQModel, VQModelInterface):
        with pytest.raises(InputError, match="AutoencoderKL"):
            cls(embed_dim=4, n_embed=8)


def test_a_stream_of_texts_and_images_is_a_data_set():
    class Numbers(Txt2ImgIterableBaseDataset):
        def __iter__(self):
            yield from self.sample_ids

    numbers = Numbers(3, [1, 2, 3])
    assert (len(numbers), list(torch.utils.data.DataLoader(numbers, batch_size=None))) == (3, [1, 2, 3])
