"""The networks' files: their published names, where they are looked for, and the message where one is missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.places import candidates, hub_files, hub_folder
from ldm.util import InputError, printable

FOLDER = "models/evaluation"


@dataclass(frozen=True)
class Published:
    """A network's weights: a title, the names of the file or folder, the repository of a folder, and its page."""

    title: str
    names: tuple[str, ...]
    page: str
    repository: str = ""

    @property
    def own(self) -> str:
        """The place in the toolkit's folders."""
        return f"{FOLDER}/{self.names[0]}"

    def places(self) -> list[Path]:
        """Returns where the weights are looked for, in order: own folders, the caches of torch and Hugging Face."""
        own = [path for name in self.names for path in candidates(f"{FOLDER}/{name}")]
        if not self.repository:
            return own + [_torch_cache() / name for name in self.names]
        found = [path.parent for path in hub_files([self.repository], ["config.json"])]
        return own + (found or [hub_folder(self.repository) / "snapshots/*"])

    def exists(self) -> bool:
        """Returns whether the weights are in one of the places."""
        return any(map(os.path.lexists, self.places()))

    def find(self, given: str | None = None) -> Path:
        """Returns the file or folder; raises InputError, with the places, if there is none."""
        places = [Path(given)] if given else self.places()
        found = next((path for path in places if os.path.lexists(path)), None)
        if found is None and given:
            raise InputError(f"{printable(given)} does not exist; give the file or folder of {self.title}")
        if found is None:
            raise InputError(
                f"{self.title} is missing: put {self.names[0]} into {FOLDER} (published at {self.page}); "
                "`ldm where` lists the places"
            )
        return found


NETWORKS: Mapping[str, Published] = {
    "inception": Published(
        "Inception of FID",
        ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        "https://github.com/mseitzer/pytorch-fid/releases",
    ),
    "clip": Published(
        "CLIP of text-image scores", ("clip-vit-large-patch14",), "https://huggingface.co/openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14",
    ),
    "dinov2": Published(
        "DINOv2", ("dinov2-large",), "https://huggingface.co/facebook/dinov2-large", "facebook/dinov2-large"
    ),
    "lpips": Published(
        "AlexNet of LPIPS", ("alexnet-owt-7be5be79.pth",),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
    "aesthetic": Published(
        "aesthetic predictor", ("sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth"),
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
    "detector": Published(
        "object detector", ("detector",), "https://huggingface.co/models?pipeline_tag=object-detection"
    ),
}  # fmt: skip


def _torch_cache() -> Path:
    """Returns the folder of torch.hub's downloads, where other programs leave these files."""
    home = os.environ.get("TORCH_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch"
    )
    return Path(os.path.expanduser(home), "hub", "checkpoints")
