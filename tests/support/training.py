"""A tiny model to train, its vocabulary, and latents."""

import numpy as np
import torch

from ldm.data.vocabulary import train_vocabulary
from ldm.models.diffusion.ddpm import LatentDiffusion


def tiny_vocabulary(folder):
    """Writes a vocabulary into `folder`; returns it and the number of its tokens."""
    return folder, train_vocabulary(["a red cube on top of a blue sphere"], 540, folder)


def tiny_model(vocabulary, seed=0):
    folder, tokens = vocabulary
    torch.manual_seed(seed)
    dd = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    unet = {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
        "attention_resolutions": [1], "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True,
        "context_dim": 16, "legacy": False,
    }  # fmt: skip
    text = {"version": str(folder), "tokens": tokens, "max_length": 77, "width": 16, "layers": 1, "heads": 2}
    return LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config={
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 4},
        },
        cond_stage_config={
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": text
        },
        linear_start=0.00085, linear_end=0.012, channels=4, image_size=8, use_ema=False,
    )  # fmt: skip


def moments(count=4):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, 2, 4, 8, 8)).astype(np.float16)
    values[:, 1] = np.abs(values[:, 1]) / 10
    return values
