"""The metadata of a trained file: kohya's entries, which other programs show, and ModelSpec's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.finetuning.batches import Epochs
from ldm.finetuning.latents import Placed

if TYPE_CHECKING:
    from ldm.finetuning.run import Training

_ARCHITECTURE = {
    "lora": "stable-diffusion-v1/lora",
    "embedding": "stable-diffusion-v1/textual-inversion",
    "controlnet": "stable-diffusion-v1/controlnet",
}


def file_notes(
    training: Training, placed: Sequence[Placed], epochs: Epochs, model: Mapping[str, str]
) -> dict[str, str]:
    """Returns the entries of a file: how it was trained, and on what; `model` are entries about the base model."""
    settings, count = training.settings, sum(image.example.repeats for image in placed)
    sizes = Counter(image.placement.size for image in placed)
    buckets = {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sizes.items())}
    tags = Counter(tag.strip() for image in placed for tag in image.example.caption.split(",") if tag.strip())
    folders = Counter(str(image.example.path.parent.name) for image in placed)
    notes = {
        "ss_output_name": training.out.stem,
        "ss_steps": settings.steps,
        "ss_max_train_steps": settings.steps,
        "ss_num_epochs": -(-settings.steps * settings.accumulate // epochs.batches),
        "ss_num_train_images": count,
        "ss_num_reg_images": sum(image.example.repeats for image in placed if image.example.regular),
        "ss_num_batches_per_epoch": epochs.batches,
        "ss_batch_size_per_device": settings.batch_size,
        "ss_gradient_accumulation_steps": settings.accumulate,
        "ss_gradient_checkpointing": settings.checkpointing,
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": settings.learning_rate,
        "ss_text_encoder_lr": settings.text_rate,
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warm_up_steps,
        "ss_optimizer": settings.optimizer,
        "ss_resolution": "({}, {})".format(*max(sizes)),
        "ss_clip_skip": settings.clip_skip,
        "ss_seed": settings.seed,
        "ss_min_snr_gamma": settings.min_snr_gamma,
        "ss_noise_offset": settings.noise_offset,
        "ss_prior_loss_weight": settings.class_weight,
        "ss_keep_tokens": settings.keep_tokens,
        "ss_shuffle_caption": settings.shuffle_captions,
        "ss_caption_dropout_rate": settings.drop_captions,
        "ss_bucket_info": json.dumps({"buckets": buckets}),
        "ss_tag_frequency": json.dumps({training.data.name: dict(tags.most_common(500))}),
        "ss_dataset_dirs": json.dumps({name: {"img_count": n} for name, n in folders.items()}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURE.get(training.kind, "stable-diffusion-v1"),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": training.out.stem,
        "modelspec.resolution": "{}x{}".format(*max(sizes)),
        "modelspec.encoder_layer": settings.clip_skip if settings.clip_skip > 1 else None,
        "ss_training_comment": f"train {training.kind}, ldm {__version__}",
    }
    if training.kind == "lora":
        alpha = settings.rank if settings.alpha is None else settings.alpha
        notes |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": settings.rank,
            "ss_network_alpha": float(alpha),
        }
        if settings.conv_rank:
            notes["ss_network_args"] = json.dumps(
                {"conv_dim": settings.conv_rank, "conv_alpha": settings.conv_alpha}
            )
    return {name: str(value) for name, value in notes.items() if value is not None} | dict(model)
