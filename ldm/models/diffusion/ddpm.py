"""Latent diffusion: the U-Net, the autoencoder and the text encoder as one (Rombach et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.diffusion.control import Control
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.schedule import diffusion_buffers, make_beta_schedule
from ldm.models.diffusion.schedule import zero_terminal_snr as rescaled_to_zero_snr
from ldm.modules.attention import seeing
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import InputError, instantiate_from_config, is_list, is_mapping, only_with, printable

logger = logging.getLogger(__name__)


class DiffusionWrapper(nn.Module):
    """Passes conditionings to the U-Net: as channels next to x (concat), as context (crossattn), or both (hybrid)."""

    KEYS = (None, "concat", "crossattn", "hybrid")

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in self.KEYS:
            raise InputError(f"conditioning_key {conditioning_key!r} is not one of {self.KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        guidance: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """`control` adds to the maps of the U-Net; its networks see x without the channels of `c_concat`."""
        context = _joined(c_crossattn) if c_crossattn else None
        extra: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
        if control is not None:
            parts = {"control": control.added(x, t, context), "features": control.features()}
            extra |= {name: part for name, part in parts.items() if part}
        images = None if control is None else control.images(len(x))
        if c_concat:
            x = torch.cat([x, *c_concat], dim=1)
        with nullcontext() if images is None else seeing(self.diffusion_model, images):
            return self.diffusion_model(x, t, context=context, **extra)


def _joined(contexts: Sequence[Tensor]) -> Tensor:
    """Concatenates contexts along the token axis; a single one is returned as the same object."""
    return contexts[0] if len(contexts) == 1 else torch.cat(list(contexts), dim=1)


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a frozen part, so that the mode of the model does not change its mode."""
    return self


def _frozen(part: Any) -> Any:
    """Returns `part` frozen: without gradients, and in evaluation mode whatever the model's mode is."""
    if part is not None:
        part.eval().requires_grad_(False)
        part.train = partial(disabled_train, part)
    return part


class DDPM(nn.Module):
    """A noise predictor and its schedule of noise levels (Ho et al. 2020).

    Parameters are those of the published configs. Sampling reads the schedule (`timesteps`, `linear_start`,
    `linear_end`, `beta_schedule`, `cosine_s`, `given_betas`, `v_posterior`, and `zero_terminal_snr`, with which it
    ends without signal), `parameterization` (what the U-Net
    predicts: "eps", the noise, or "v", which samplers convert to it), `conditioning_key`, `channels`, `image_size`
    and the config of the U-Net; `use_ema` keeps averaged weights under `model_ema`. The rest serves training.
    `ckpt_path` and the parameters for reading it are ignored.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        zero_terminal_snr: bool = False,
    ):
        super().__init__()
        if parameterization not in ("eps", "v"):
            raise InputError(
                f"parameterization {parameterization!r} is not supported; a model predicts eps, the noise, or v"
            )
        if zero_terminal_snr and parameterization != "v":
            raise InputError(
                "zero_terminal_snr needs parameterization: v; without signal the noise determines nothing"
            )
        only_with(type(self).__name__, learn_logvar=(learn_logvar, False))  # a weight that v1 models lack
        if ckpt_path is not None:
            logger.warning("the config's ckpt_path %s is ignored", printable(ckpt_path))
        self.parameterization, self.zero_terminal_snr = parameterization, zero_terminal_snr
        self.image_size, self.channels = image_size, channels
        self.log_every_t, self.first_stage_key, self.monitor = log_every_t, first_stage_key, monitor
        self.loss_type, self.l_simple_weight = loss_type, l_simple_weight
        self.original_elbo_weight, self.v_posterior = original_elbo_weight, v_posterior
        self.clip_denoised, self.use_positional_encodings = clip_denoised, use_positional_encodings
        self.learn_logvar, self.logvar_init = learn_logvar, logvar_init
        self.use_scheduler, self.scheduler_config = scheduler_config is not None, scheduler_config
        self.betas: Tensor
        self.alphas_cumprod: Tensor
        self.alphas_cumprod_prev: Tensor
        self.sqrt_alphas_cumprod: Tensor
        self.sqrt_one_minus_alphas_cumprod: Tensor
        self.sqrt_recip_alphas_cumprod: Tensor
        self.sqrt_recipm1_alphas_cumprod: Tensor
        self.register_schedule(
            given_betas=given_betas,
            beta_schedule=beta_schedule,
            timesteps=timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
        )
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Computes the tables of the schedule, as buffers."""
        betas = (
            make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
            if given_betas is None
            else np.asarray(given_betas, dtype=np.float64)
        )
        if self.zero_terminal_snr:
            betas = rescaled_to_zero_snr(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        for name, values in diffusion_buffers(betas, self.v_posterior).items():
            # computed values, so they are never left on the meta device that a model may be built on
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device="cpu"))
        self.num_timesteps = len(betas)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.betas.device

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Generator[None]:
        """Gives the U-Net its averaged weights, and restores the others on exit; `context` is logged."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        logger.debug("averaged weights in use: %s", context)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noises clean latents [N, ...] to timesteps t [N] (DDPM, equation 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        tables = (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        signal, spread = (extract_into_tensor(table, t, x_start.shape) for table in tables)
        return signal * x_start + spread * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns the clean latents that `noise` in the latents x_t [N, ...] at timesteps t [N] implies."""
        tables = (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)
        scale, spread = (extract_into_tensor(table, t, x_t.shape) for table in tables)
        return scale * x_t - spread * noise


class LatentDiffusion(DDPM):
    """Text to latents to images: a noise predictor over the latents of a frozen autoencoder.

    Besides `DDPM`'s parameters sampling reads `scale_factor`, `cond_stage_forward` (the text encoder's method that is
    used, by default `encode`) and the configs of autoencoder and text encoder; the latter may be "__is_first_stage__"
    or "__is_unconditional__". Without `cond_stage_trainable` the text encoder is frozen as the autoencoder always is.
    The rest (`num_timesteps_cond`, `cond_stage_key`, `concat_mode`) serves training.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = "crossattn",
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        *args: Any,
        **kwargs: Any,
    ):
        # a scale that is measured in training would be part of the state dict
        only_with(type(self).__name__, scale_by_std=(scale_by_std, False))
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.scale_factor, self.scale_by_std = scale_factor, scale_by_std
        self.num_timesteps_cond, self.concat_mode = num_timesteps_cond, concat_mode
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.first_stage_model: Any = _frozen(instantiate_from_config(first_stage_config))
        text_encoder: Any = (
            self.first_stage_model
            if cond_stage_config == "__is_first_stage__"
            else instantiate_from_config(cond_stage_config)
        )
        self.cond_stage_model = text_encoder if cond_stage_trainable else _frozen(text_encoder)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input, and needs no second prediction for it."""
        return getattr(self.model.diffusion_model, "time_cond_proj_dim", None) is not None

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning, return_ids: bool = False) -> Tensor:
        """Returns what the U-Net predicts for latents [N, C, h, w] at timesteps t [N]: see `parameterization`.

        `cond` is a tensor, a list of tensors, or a dict with `c_crossattn` and `c_concat` lists, with the scales
        `guidance` [N] for a model that `embeds_guidance`, and with the control networks of `control`. `return_ids` is
        for U-Nets with a codebook, which these are not.
        """
        if not is_mapping(cond):
            conds = list(cond) if is_list(cond) else [cond]
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": conds}
        return self.model(x_noisy, t, **cond)

    def get_learned_conditioning(self, c: str | Sequence[str], clip_skip: int = 1) -> Tensor:
        """Encodes one or more prompts as the context of the U-Net's cross-attention [N, tokens, width].

        With a `clip_skip` other than 1 see `FrozenCLIPEmbedder.encode`; `InputError` for other text encoders.
        """
        if clip_skip != 1:
            if not isinstance(self.cond_stage_model, FrozenCLIPEmbedder):
                raise InputError(
                    f"CLIP skip {clip_skip} needs CLIP's text encoder, and this model has a "
                    f"{type(self.cond_stage_model).__name__}; leave it out, or give 1"
                )
            return self.cond_stage_model.encode(c, clip_skip)
        method = "encode" if hasattr(self.cond_stage_model, "encode") else "__call__"
        found = getattr(self.cond_stage_model, self.cond_stage_forward or method)(c)
        return found.mode() if isinstance(found, DiagonalGaussianDistribution) else found

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] | None = None
    ) -> Tensor:
        """Returns the conditioning of the empty prompt or of `null_label`, `batch_size` times, or that of labels."""
        labels = [null_label or ""] if null_label is None or isinstance(null_label, str) else list(null_label)
        if len(labels) not in (1, batch_size):
            raise InputError(
                f"{len(labels)} null labels for a batch of {batch_size}; give one, or one for each"
            )
        found = self.get_learned_conditioning(labels)
        return found.expand(batch_size, *found.shape[1:])

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Encodes images [N, 3, H, W] in [-1, 1] as the distribution of their (unscaled) latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoder_posterior: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Scales latents for diffusion: a sample of the distribution (with `noise` if given), or a tensor."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample(noise)
        return self.scale_factor * encoder_posterior

    def decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """Decodes scaled latents [N, C, h, w] to images [N, 3, f * h, f * w], approximately in [-1, 1].

        `force_not_quantize` changes nothing: a KL autoencoder has no codebook, nor indices to predict.
        """
        only_with("decode_first_stage", predict_cids=(predict_cids, False))
        return self.first_stage_model.decode(z / self.scale_factor)

    differentiable_decode_first_stage = decode_first_stage


class HybridDiffusion(LatentDiffusion):
    """Latent diffusion whose U-Net gets channels next to x and the text; `hybrid_conditioning` makes its cond."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.model.conditioning_key != "hybrid":
            raise InputError(
                f"conditioning_key is {self.model.conditioning_key!r}; {type(self).__name__} needs 'hybrid'"
            )

    def hybrid_conditioning(self, context: Tensor, *channels: Tensor) -> dict[str, list[Tensor]]:
        """Builds the `cond` of context [N, L, width] and channels [N, C, h, w]."""
        return {"c_concat": list(channels), "c_crossattn": [context]}


class LatentEditDiffusion(HybridDiffusion):
    """Latent diffusion whose U-Net also gets the latent of an image to edit (InstructPix2Pix, Brooks et al. 2023).

    That latent is not scaled: `hybrid_conditioning(context, latent / scale_factor)`; without an image it is 0.
    """


class LatentInpaintDiffusion(HybridDiffusion):
    """Latent diffusion whose U-Net also gets the mask, and the image with the repainted part masked out.

    The conditioning is hybrid: next to x the U-Net gets `concat_keys` as channels, by default the mask (1 channel,
    1 is repainted) and the latent of the masked image, and the text as context. Its additional parameters
    except `concat_keys` and `masked_image_key` are for training only.
    """

    def __init__(
        self,
        *args: Any,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = None,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        unknown = [key for key in concat_keys if key not in ("mask", masked_image_key)]
        if unknown:
            raise InputError(f"concat_keys has {unknown}; it takes 'mask' and {masked_image_key!r}")
        self.concat_keys, self.masked_image_key = tuple(concat_keys), masked_image_key
        self.finetune_keys, self.keep_finetune_dims = finetune_keys, keep_finetune_dims
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end

    def hybrid_conditioning(self, context: Tensor, *channels: Tensor) -> dict[str, list[Tensor]]:
        """Builds the `cond` of context [N, L, width], mask [N, 1, h, w] and scaled latent [N, C, h, w]."""
        concat = dict(zip(("mask", self.masked_image_key), channels, strict=True))
        return super().hybrid_conditioning(context, *(concat[key] for key in self.concat_keys))
