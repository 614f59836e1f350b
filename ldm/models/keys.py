"""The prefixes of the keys of a latent diffusion model's state dict: CompVis's names for its parts."""

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
COND_STAGE_PREFIX = "cond_stage_model."
EMA_PREFIX = "model_ema."
