"""Small or random networks that measure images, as files that evaluation reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn


def draw_weights(net: nn.Module) -> nn.Module:
    """Gives a network random weights, the same on every machine: those of a tensor depend on its place by name."""
    for number, (_, tensor) in enumerate(sorted(net.named_parameters())):
        generator = torch.Generator().manual_seed(number)
        spread = (2 / max(tensor[0].numel(), 1)) ** 0.5 if tensor.dim() > 1 else 0.1
        drawn = torch.randn(tensor.shape, generator=generator) * spread
        tensor.data = drawn if tensor.dim() > 1 else drawn + 0.5
    return net.eval().requires_grad_(False)


def image(side: int = 64, seed: int = 0, height: int | None = None) -> np.ndarray:
    """Returns a smooth random image, uint8 [height or side, side, 3], the same on every machine."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: height or side, :side] / side
    waves = [
        np.sin(rng.uniform(1, 12) * rows + rng.uniform(1, 12) * columns + rng.uniform(0, 6)) for _ in range(3)
    ]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


def write_clip(folder: Path, side: int = 32) -> Path:
    """Writes a tiny random CLIP with OpenAI's vocabulary, as transformers writes it."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text, vision = sizes | {"vocab_size": 49408}, sizes | {"image_size": side, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """Writes a tiny random DINOv2 as transformers writes it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    return folder


def write_detector(folder: Path) -> Path:
    """Writes a tiny random detector (YOLOS) with three classes as transformers writes it."""
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=5, id2label={0: "dog", 1: "cat", 2: "bench"},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    return folder


def alexnet_features() -> nn.Sequential:
    """Returns the layers of torchvision's AlexNet that LPIPS uses, with random weights."""
    from ldm.evaluation.pairs import alexnet

    return draw_weights(alexnet())  # type: ignore[return-value]
