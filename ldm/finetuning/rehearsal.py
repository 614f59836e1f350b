"""Describes a training before it begins: its images, and by a few steps its time and memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from ldm.finetuning.batches import Batch, Epochs
from ldm.finetuning.latents import Placed
from ldm.finetuning.module import FineTuning, make_optimizer
from ldm.finetuning.settings import Settings
from ldm.runtime.memory import peak_memory


def describe(
    placed: list[Placed], epochs: Epochs, settings: Settings, cut_words: Callable[[str], str]
) -> list[str]:
    """Returns lines about what is trained on: images, sizes, epochs, captions of which the model sees a part."""
    sizes = Counter(image.placement.size for image in placed)
    visits = settings.steps * settings.accumulate
    listed = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sizes.most_common())
    regular = sum(image.example.regular for image in placed)
    cut = sum(bool(cut_words(image.example.caption)) for image in placed)
    own = f"{len(placed) - regular} images" + (f" and {regular} of the class" if regular else "")
    return [
        f"{own}, {epochs.batches} batches an epoch, {visits / epochs.batches:.3g} epochs in {settings.steps} steps",
        f"sizes: {listed}",
        *([f"{cut} captions are longer than the text encoder reads, and are cut"] if cut else []),
    ]


class Rehearsal(NamedTuple):
    """The seconds that a whole training takes, and the peak of memory in bytes, of the GPU or of this process."""

    seconds: float
    peak: int

    def line(self) -> str:
        """Returns it as a line about the training that would follow."""
        hours, rest = divmod(round(self.seconds), 3600)
        minutes, seconds = divmod(rest, 60)
        time_ = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
        return f"about {time_} and {self.peak / 2**30:.2f} GiB, by two steps with random values"


def rehearse(module: FineTuning, epochs: Epochs, device: torch.device, precision: torch.dtype) -> Rehearsal:
    """Takes two steps on random latents of the largest batch; what is trained is not worth keeping after that.

    The first one is not timed: it reads the weights from the disk and prepares kernels.
    """
    settings, model = module.settings, module.model
    optimizer = make_optimizer(module.part.groups(), settings)
    batch = module.transfer_batch_to_device(_random_batch(module, epochs), device, 0)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            module.loss(batch).backward()
        passes = time.perf_counter() - start
        optimizer.step()
        module.part.after_step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start + (settings.accumulate - 1) * passes
    model.zero_grad()
    return Rehearsal(seconds * settings.steps, peak_memory(device))


def _random_batch(module: FineTuning, epochs: Epochs) -> Batch:
    """Returns a full batch of the images with the most pixels, with random latents."""
    model, settings = module.model, module.settings
    largest = max(epochs.examples, key=lambda image: image.placement.size[0] * image.placement.size[1])
    count = min(settings.batch_size, len(epochs.examples))
    width, height = (side // model.first_stage_model.downsampling for side in largest.placement.size)
    latents, noise = torch.randn(2, count, model.channels, height, width)
    t = torch.randint(model.num_timesteps, (count,))
    images = [largest] * count
    return Batch(latents, [largest.example.caption] * count, t, noise, torch.ones(count), images, [0] * count)
