"""Distils a model into one of few steps: latent consistency distillation of a LoRA (Luo et al. 2023 and 2023b).

With x_t a noisy latent and the predicted clean one x_0 = (x_t - sqrt(1 - alpha_t) eps(x_t, t)) / sqrt(alpha_t), the
model that is trained maps a latent of any level to the end of its trajectory,

    f(x_t, t) = c_skip(t) x_t + c_out(t) x_0

with the boundary condition of `solvers/consistency.py`: f(x_0, 0) = x_0. Neighbours on a trajectory have one end. So
f(x_t, t) is trained to be f(x_s, s), without gradient, where s = t - k is k timesteps lower, and x_s is what the
model before training makes of x_t in one step of DDIM with guidance (Luo et al. 2023, algorithm 1). Timesteps are
those of the schedule lcm: k - 1, 2 k - 1, ... The distance is the pseudo-Huber one, sqrt(d^2 + c^2) - c. The guidance
scale becomes a part of the LoRA: it is used with scale 1.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.config import read_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.solvers.consistency import boundary
from ldm.pipeline import load_model
from ldm.places import find
from ldm.training.diffusion import NoiseBatch, encode_latents, noise_batches
from ldm.training.lora import whole_lora
from ldm.training.lora_file import lora_tensors, write_lora
from ldm.training.runs import Optimisation
from ldm.training.stage import Stage
from ldm.util import need

logger = logging.getLogger(__name__)


class ConsistencyTraining(pl.LightningModule):
    """Trains a LoRA of `rank` on `model`, which then is its own teacher with the LoRA switched off.

    `scale` is the teacher's guidance scale, `skip` is k, `huber` is c.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        optimisation: Optimisation,
        rank: int,
        scale: float = 7.5,
        skip: int = 20,
        huber: float = 1e-3,
    ) -> None:
        super().__init__()
        need(model.parameterization == "eps", "distillation is for models that predict the noise, not v")
        self.model = model.requires_grad_(False)
        self.lora = whole_lora(model, rank)
        self.optimisation = optimisation
        self.scale, self.skip, self.huber = scale, skip, huber
        with torch.no_grad():
            self._empty = model.get_learned_conditioning([""])

    def consistent(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Returns f(x_t, t) for `x` [N, ...] at timesteps `t` [N]."""
        eps = self.model.apply_model(x, t, context).float()
        skip, out = (_per_sample(value, x) for value in boundary(t.double()))
        return skip * x + out * self.model.predict_start_from_noise(x, t, eps)

    @torch.no_grad()
    def lower(self, x: Tensor, t: Tensor, s: Tensor, context: Tensor) -> Tensor:
        """Returns what the teacher makes of `x` [N, ...] in one step from timesteps `t` to `s` [N]."""
        empty = self._empty.expand(len(x), -1, -1)
        with self.lora.off():
            eps = Guidance(context, empty, self.scale).noise(self.model, x, t)
        return self.model.q_sample(self.model.predict_start_from_noise(x, t, eps), s, eps)

    def training_step(self, batch: NoiseBatch) -> Tensor:
        t = (batch.t // self.skip + 1) * self.skip - 1
        s = (t - self.skip).clamp(min=0)
        # of so few positions, the gradient of the fused kernel takes a third of the time
        with sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                context = self.model.get_learned_conditioning(batch.prompts)
                x = self.model.q_sample(self.model.get_first_stage_encoding(batch.latents), t, batch.noise)
                target = self.consistent(self.lower(x, t, s, context), s, context)
            error = self.consistent(x, t, context) - target
        self.log("error", error.detach().square().mean().sqrt(), batch_size=len(x))
        return ((error.square() + self.huber**2).sqrt() - self.huber).mean()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optimisation.configure(self.lora.parameters())


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def distil(stage: Stage) -> None:
    """Trains the model that the config names under `ckpt` for few steps -> the LoRA that it names under `export`."""
    options, data = stage.config.training, stage.config.data
    model = load_model(read_config(stage.config.model), find(stage.config.ckpt), torch.device("cpu"))
    latents = stage.logdir / stage.name / "latents.npy"
    if not latents.is_file():
        latents.parent.mkdir(parents=True, exist_ok=True)
        encode_latents(model.first_stage_model, stage.rendered("train", data.train), latents)
    torch.manual_seed(0)
    module = ConsistencyTraining(model, stage.optimisation, options.rank, options.scale, options.skip)
    moments = np.load(latents, mmap_mode="r")
    stage.train(module, noise_batches(moments, "train", options.batch_size, model.num_timesteps, drop=0.0))
    about = (
        f"latent consistency (LCM) distillation of {stage.config.ckpt} at guidance scale {options.scale:g}; "
        "use with --sampler lcm --steps 4 --scale 1"
    )
    path = Path(stage.config.export)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(options.rank),
        "ss_output_name": path.stem,
        "ss_training_comment": about,
    }
    write_lora(path, lora_tensors(module.lora, model, "kohya", torch.float16), notes, overwrite=True)
    logger.info("the LoRA is in %s", stage.config.export)
