"""Differences within pairs of images: PSNR, SSIM and LPIPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.evaluation.networks import load_strictly
from ldm.evaluation.weights import NETWORKS
from ldm.images.compare import compare


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images [H, W, 3] in dB; infinite for equal ones."""
    return compare(first, second).psnr


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the structural similarity of two uint8 images [H, W, 3], 1 for equal ones (Wang et al. 2004).

    torchmetrics computes it: windows of 11 pixels, a Gaussian of sigma 1.5, the mean over colours.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (_batch(image).double() for image in (first, second))
    return float(structural_similarity_index_measure(x, y, data_range=255.0))  # type: ignore[arg-type]


def _batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None]


class Lpips(nn.Module):
    """LPIPS of AlexNet, version 0.1 (Zhang et al., arXiv:1801.03924, equation 1): 0 for equal images.

    AlexNet's weights are torchvision's file; the weights of its layers come with torchmetrics.
    """

    TAPS = (1, 4, 7, 9, 11)  # the ReLUs whose outputs are compared

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.features = alexnet()
        load_strictly(self.features, NETWORKS["lpips"].find(path), prefix="features.")
        self.heads = [_head(index) for index in range(len(self.TAPS))]

    @torch.inference_mode()
    def forward(self, first: np.ndarray, second: np.ndarray) -> float:
        """Returns the distance of two uint8 images [H, W, 3], at least 32 pixels a side."""
        total = 0.0
        for x, y, head in zip(self._layers(first), self._layers(second), self.heads, strict=True):
            total += float(((x - y) ** 2 * head).sum(1).mean())
        return total

    def _layers(self, image: np.ndarray) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (_batch(image) / 127.5 - 1 - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        found: list[Tensor] = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def alexnet() -> nn.Sequential:
    """Returns AlexNet's convolutions without weights, as torchvision has them (Krizhevsky, arXiv:1404.5997)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip


def _head(index: int) -> Tensor:
    """Returns the weights of a layer's channels [1, C, 1, 1], from torchmetrics."""
    import torchmetrics.functional.image as home

    file = Path(home.__file__).parent / "lpips_models" / "alex.pth"
    return torch.load(file, "cpu", weights_only=True)[f"lin{index}.model.1.weight"].float()
