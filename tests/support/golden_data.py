"""The figures of the original code, and the weights they were computed with."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from tests.support.paths import GOLDEN, ROOT

WEIGHT_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
TOLERANCE = 2e-5


@cache
def figures(name: str = "tiny.npz") -> Mapping[str, np.ndarray]:
    """Inputs and outputs of the original, by name."""
    with np.load(GOLDEN / name) as data:
        return dict(data)


def figure(key: str, name: str = "tiny.npz") -> torch.Tensor:
    return torch.from_numpy(figures(name)[key].copy())


@cache
def keys(name: str) -> Mapping[str, list[int]]:
    return json.loads((GOLDEN / name).read_text())


def weight_of(key: str, shape: Iterable[int]) -> torch.Tensor:
    """The weight that belongs to a state-dict key: the same numbers on every machine."""
    return _drawn(key, tuple(shape)).clone()


@cache
def _drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return torch.from_numpy(z / np.float32(np.sqrt(np.prod(shape[1:]))))
    return torch.from_numpy(0.02 * z if key.endswith("bias") else 1 + 0.02 * z).float()


def rebuilt_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for every floating-point key of the networks."""
    return {
        key: weight_of(key, value.shape)
        for key, value in model.state_dict().items()
        if key.startswith(WEIGHT_PREFIXES) and value.is_floating_point()
    }


def tiny_config() -> dict[str, Any]:
    """The tiny model's config, with the shape of its text encoder."""
    config = deepcopy(_tiny_yaml())
    config["params"]["cond_stage_config"]["params"] = {"width": 64, "layers": 2, "heads": 4}
    return config


@cache
def _tiny_yaml() -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(GOLDEN / "tiny.yaml"))
    assert isinstance(config, dict)
    return config["model"]


def small_config(own_words: bool = True) -> dict[str, Any]:
    """The tiny model with fewer levels, blocks and channels, for tests of files; it has no figures.

    With `own_words` its vocabulary is the bundled model's 1000 tokens, else OpenAI's.
    """
    config = tiny_config()
    parts = config["params"]
    fewer = {"num_res_blocks": 1, "num_groups": 8}
    levels = {"channel_mult": [1, 2], "attention_resolutions": [1]}  # the last without attention, as in v1
    parts["unet_config"]["params"] |= {"model_channels": 8, "context_dim": 16, **levels, **fewer}
    parts["first_stage_config"]["params"]["ddconfig"] |= {"ch": 8, **fewer}
    words = {"version": str(ROOT / "models/ldm/shapes"), "tokens": 1000} if own_words else {}
    parts["cond_stage_config"]["params"] = {"width": 16, "layers": 2, "heads": 4, **words}
    return config


def inpainting_config(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tiny model, or another of four channels, with 9 input channels."""
    config = config or tiny_config()
    config["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    config["params"]["conditioning_key"] = "hybrid"
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    return config


def edit_config(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tiny model, or another of four channels, with the 8 input channels of InstructPix2Pix."""
    config = inpainting_config(config)
    config["target"] = "ldm.models.diffusion.ddpm.LatentEditDiffusion"
    config["params"]["unet_config"]["params"]["in_channels"] = 8
    return config


def laion_config(tokens: int) -> dict[str, Any]:
    """The tiny model with the LAION-400M text encoder, for a vocabulary of so many tokens."""
    config = tiny_config()
    config["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": 64, "n_layer": 3, "vocab_size": tokens},
    }
    return config


def tiny_model(config: Mapping[str, Any] | None = None) -> Any:
    """The tiny model, or another config's, with rebuilt weights."""
    from ldm.checkpoints.load import build_model

    model = build_model(config or tiny_config())
    missing, unexpected = model.load_state_dict(rebuilt_state_dict(model), strict=False, assign=True)
    assert not unexpected
    assert all(not key.startswith(WEIGHT_PREFIXES) or key.endswith("position_ids") for key in missing)
    return model.eval().requires_grad_(False)


def sampled(model: Any, method: str, steps: int, scale: float, **options: Any) -> torch.Tensor:
    """The latents that "ddim", "plms" or "dpm" makes from the inputs of the figures `sample/...`."""
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.dpm_solver import DPMSolverSampler
    from ldm.models.diffusion.plms import PLMSSampler

    samplers = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
    cond, uncond, noise = (figure(f"sample/{name}").to(model.device) for name in ("cond", "uncond", "x_T"))
    return samplers[method](model).sample(
        S=steps,
        batch_size=2,
        shape=[4, 8, 8],
        conditioning=cond,
        unconditional_conditioning=uncond,
        unconditional_guidance_scale=scale,
        x_T=noise,
        verbose=False,
        **options,
    )[0]


def relative_error(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """L2 norm of the difference over that of the expected values."""
    a = torch.as_tensor(np.asarray(actual)).double()
    b = torch.as_tensor(np.asarray(expected)).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def written_model(config: dict[str, Any], folder: Path = Path(), model: Any = None) -> list[str]:
    """Writes a config, and the weights of its tiny model or of `model`, into a folder; returns their options."""
    OmegaConf.save({"model": config}, folder / "config.yaml")
    torch.save({"state_dict": (model or tiny_model(config)).state_dict()}, folder / "model.ckpt")
    return ["--config", str(folder / "config.yaml"), "--ckpt", str(folder / "model.ckpt")]
