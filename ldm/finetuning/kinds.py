"""The kinds of training: how each prepares the model, and what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ldm.finetuning.control import ControlPart, ControlTuning
from ldm.finetuning.inpainting import InpaintingTuning
from ldm.finetuning.module import FineTuning
from ldm.finetuning.parts import EmbeddingPart, LoraPart, NetworkPart, Part
from ldm.finetuning.settings import Settings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.lora import usual_lora
from ldm.util import InputError

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Kind(NamedTuple):
    """A kind of training: the endings of its file, the part it trains, the loop's module, and what it may narrow.

    Where `frozen`, the model's own weights do not change and may be held in half precision.
    """

    endings: tuple[str, ...]
    part: Callable[[LatentDiffusion, Settings], Part]
    module: type[FineTuning]
    frozen: bool


def _lora(model: LatentDiffusion, settings: Settings) -> Part:
    if settings.text_only and not settings.text_rate:
        raise InputError(
            "--text_only trains the text encoder, but --text_rate is 0; give a rate, such as 5e-5"
        )
    torch.manual_seed(settings.seed)
    lora = usual_lora(
        model,
        settings.rank,
        float(settings.rank if settings.alpha is None else settings.alpha),
        settings.conv_rank,
        settings.conv_alpha,
        unet=not settings.text_only,
        text=settings.text_rate > 0,
        dora=settings.dora,
    )
    rates = settings.learning_rate, settings.text_rate
    return LoraPart(model, lora, *rates, settings.plus_ratio, settings.layout, DTYPES[settings.dtype])


def _embedding(model: LatentDiffusion, settings: Settings) -> Part:
    assert settings.word is not None
    return EmbeddingPart(
        model, settings.word, settings.init, settings.vectors, settings.learning_rate, settings.decay
    )


def _network(model: LatentDiffusion, settings: Settings) -> Part:
    rates = settings.learning_rate, settings.text_rate
    keep = settings.class_target == "model"
    return NetworkPart(model, *rates, settings.ema_decay, DTYPES[settings.dtype], keep)


def _control(model: LatentDiffusion, settings: Settings) -> Part:
    torch.manual_seed(settings.seed)
    return ControlPart(
        model, settings.learning_rate, settings.start, settings.ema_decay, DTYPES[settings.dtype]
    )


_CHECKPOINT = (".safetensors", ".ckpt")
KINDS: Mapping[str, Kind] = {
    "lora": Kind((".safetensors",), _lora, FineTuning, True),
    "embedding": Kind((".safetensors", ".pt"), _embedding, FineTuning, True),
    "dreambooth": Kind(_CHECKPOINT, _network, FineTuning, False),
    "finetune": Kind(_CHECKPOINT, _network, FineTuning, False),
    "inpainting": Kind(_CHECKPOINT, _network, InpaintingTuning, False),
    "controlnet": Kind((".safetensors",), _control, ControlTuning, True),
}
