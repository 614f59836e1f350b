"""The settings of a model other than its weights, under the names that diffusers' config files have for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.models.autoencoder import AutoencoderKL, SmallAutoencoder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.schedule import make_beta_schedule, zero_terminal_snr
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder


def component_configs(
    model: LatentDiffusion, components: Iterable[str] = ("unet", "vae", "text_encoder", "scheduler")
) -> dict[str, dict[str, Any]]:
    """The settings that diffusers needs besides the weights, under its names, for each of the components of a folder.

    Two models whose configs agree in all of this compute the same from the same weights. A component that
    diffusers has no words for is a `CheckpointError`.
    """
    settings: dict[str, Callable[[LatentDiffusion], dict[str, Any]]] = {
        "unet": lambda model: unet_config(model.model.diffusion_model),
        "vae": _vae_config,
        "text_encoder": _text_config,
        "scheduler": _scheduler_config,
    }
    return {name: settings[name](model) for name in components}


def unet_config(unet: Any) -> dict[str, Any]:
    """The settings of a U-Net."""
    layers = list(unet.modules()) if isinstance(unet, UNetModel) else []
    transformer = next((layer for layer in layers if isinstance(layer, SpatialTransformer)), None)
    if transformer is None or unet.num_heads < 1:
        raise _not_describable(f"a {type(unet).__name__} without num_heads")
    shifts = any(layer.use_scale_shift_norm for layer in layers if isinstance(layer, ResBlock))
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
    block: Any = transformer.transformer_blocks[0]
    return {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if len(unet.middle_block) else None,
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)],
        "cross_attention_dim": block.attn2.to_k.in_features,
        "transformer_layers_per_block": len(transformer.transformer_blocks),
        "attention_head_dim": unet.num_heads,  # the field's old name for a number of heads
        "norm_num_groups": transformer.norm.num_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
        "use_linear_projection": False,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "time_cond_proj_dim": unet.time_cond_proj_dim,
    }


def control_config(unet: Any, hint_channels: int, pools: bool) -> dict[str, Any]:
    """The settings of a ControlNet for a U-Net."""
    own = unet_config(unet)
    names = (
        "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "mid_block_type",
        "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "norm_num_groups", "norm_eps",
        "act_fn", "flip_sin_to_cos", "freq_shift", "downsample_padding", "resnet_time_scale_shift",
        "use_linear_projection", "class_embed_type", "addition_embed_type",
    )  # fmt: skip
    return {
        **{name: own[name] for name in names},
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": pools,
    }


def _vae_config(model: LatentDiffusion) -> dict[str, Any]:
    vae = model.first_stage_model
    if isinstance(vae, SmallAutoencoder):
        return _taesd_config(vae)
    if not isinstance(vae, AutoencoderKL) or vae.decoder.conv_in.in_channels != vae.embed_dim:
        raise _not_describable(f"a {type(vae).__name__} with latents of two sizes")
    level: Any = vae.encoder.down[0]
    return {
        "in_channels": vae.encoder.conv_in.in_channels,
        "out_channels": vae.decoder.conv_out.out_channels,
        "latent_channels": vae.embed_dim,
        "block_out_channels": vae.widths,
        "layers_per_block": len(level.block),
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
        "norm_num_groups": vae.encoder.norm_out.num_groups,
        "act_fn": "silu",
        "scaling_factor": model.scale_factor,
    }


def _taesd_config(vae: SmallAutoencoder) -> dict[str, Any]:
    if len(vae.halves) != 2:
        raise _not_describable(f"an autoencoder of which only the {vae.halves[0]} is TAESD's")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": vae.embed_dim,
        "encoder_block_out_channels": [vae.width] * 4,
        "decoder_block_out_channels": [vae.width] * 4,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "upsampling_scaling_factor": 2,
        "upsample_fn": "nearest",
        "act_fn": "relu",
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def _text_config(model: LatentDiffusion) -> dict[str, Any]:
    embedder = model.cond_stage_model
    if not isinstance(embedder, FrozenCLIPEmbedder):
        raise _not_describable(f"the text encoder {type(embedder).__name__}")
    encoder = embedder.transformer.text_model
    layer: Any = encoder.encoder.layers[0]
    return {
        "vocab_size": encoder.embeddings.token_embedding.num_embeddings,
        "max_position_embeddings": encoder.embeddings.position_embedding.num_embeddings,
        "hidden_size": layer.mlp.fc1.in_features,
        "intermediate_size": layer.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.encoder.layers),
        "num_attention_heads": layer.self_attn.heads,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _scheduler_config(model: LatentDiffusion) -> dict[str, Any]:
    """diffusers calls the square of a line, CompVis's "linear" schedule, scaled_linear."""
    start, end = model.linear_start, model.linear_end
    line = make_beta_schedule("linear", model.num_timesteps, start, end)
    if model.zero_terminal_snr:
        line = zero_terminal_snr(line)
    if not np.allclose(model.betas.cpu().numpy(), line, rtol=1e-5):
        raise _not_describable("a noise schedule that is not v1's")
    return {
        "num_train_timesteps": model.num_timesteps,
        "beta_schedule": "scaled_linear",
        "beta_start": start,
        "beta_end": end,
        "trained_betas": None,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[model.parameterization],
        "rescale_betas_zero_snr": model.zero_terminal_snr,
    }


def _not_describable(what: str) -> CheckpointError:
    return CheckpointError(f"the diffusers layout has no place for {what}")
