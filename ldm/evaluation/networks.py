"""The networks that measure images, from local files: Inception, CLIP, DINOv2, and the bundled reader of scenes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.evaluation.resize import MODES, centre_square
from ldm.evaluation.weights import NETWORKS
from ldm.places import find
from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    from ldm.training.quality import SceneReader

_Network = TypeVar("_Network", bound=nn.Module)
FEATURES = ("inception", "dinov2", "clip", "shapes")  # the networks of distances
JUDGE = "models/ldm/shapes/judge.pt"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Base:
    """The common part of all networks: the number of features, the mode of resizing, and the hash of the weights."""

    name: str
    width: int
    side: int

    def __init__(self, weights: str, resize: str, device: torch.device | str) -> None:
        need(resize in MODES, f"--resize {printable(resize)}: give one of {', '.join(MODES)}")
        self.weights, self.resize, self.device = weights, resize, torch.device(device)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.width} {self.weights} {self.resize}"

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return MODES[self.resize](pixels, self.side)


class InceptionFeatures(_Base):
    """The 2048 features of FID."""

    name, width, side = "inception", 2048, 299

    def __init__(
        self, path: str | None = None, resize: str = "clean", device: torch.device | str = "cpu"
    ) -> None:
        from ldm.evaluation.inception import Inception

        file = NETWORKS["inception"].find(path)
        super().__init__(file_sha256(file), resize, device)
        self._net = load_strictly(Inception(), file).to(self.device)

    def features(self, x: Tensor) -> Tensor:
        return self._net(x.to(self.device))


class DinoFeatures(_Base):
    """The class token of DINOv2, as FD-DINOv2 uses it (Stein et al., arXiv:2306.04675), of a transformers folder."""

    name, side = "dinov2", 224

    def __init__(
        self, path: str | None = None, resize: str = "pillow", device: torch.device | str = "cpu"
    ) -> None:
        folder = NETWORKS["dinov2"].find(path)
        with of_transformers(folder):
            from transformers import Dinov2Model

            net: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        super().__init__(folder_sha256(folder), resize, device)
        self._net, self.width = net.eval().to(self.device), net.config.hidden_size

    def features(self, x: Tensor) -> Tensor:
        return self._net(_normalised(x.to(self.device), _IMAGENET_MEAN, _IMAGENET_STD)).pooler_output


class ClipFeatures(_Base):
    """CLIP's embeddings of images and texts, of length 1, of a folder as transformers writes it."""

    name = "clip"

    def __init__(
        self, path: str | None = None, resize: str = "pillow", device: torch.device | str = "cpu"
    ) -> None:
        folder = NETWORKS["clip"].find(path)
        with of_transformers(folder):
            from transformers import CLIPModel

            net: Any = CLIPModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        super().__init__(folder_sha256(folder), resize, device)
        self._net: Any = net.eval().to(self.device)
        self.width, self.side = net.config.projection_dim, net.config.vision_config.image_size
        self._words = net.config.text_config.vocab_size
        need(
            self._words == 49408,
            f"{printable(folder)} has {self._words} tokens, and CLIP's vocabulary 49408; give a CLIP model of OpenAI",
        )

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Returns the input of an image, cut to its largest centred square, as CLIP's own programs do."""
        return super().prepare(centre_square(pixels))

    def features(self, x: Tensor) -> Tensor:
        x = _normalised(x.to(self.device), _CLIP_MEAN, _CLIP_STD)
        pooled = self._net.vision_model(x).pooler_output
        return _unit(self._net.visual_projection(pooled))

    def texts(self, prompts: list[str]) -> Tensor:
        """Returns the embeddings of texts [N, width], each cut to 77 tokens."""
        from ldm.modules.encoders.tokenizer import CLIPTokenizer

        ids = torch.as_tensor(CLIPTokenizer.openai()(prompts, 77)).to(self.device)
        with torch.inference_mode():
            hidden = self._net.text_model(ids).last_hidden_state
            ends = hidden[
                torch.arange(len(ids)), ids.argmax(1)
            ]  # the first end of text, which has the highest id
            return _unit(self._net.text_projection(ends)).float().cpu()


class SceneFeatures:
    """The 16 channels of the reader's last convolution, averaged in each quarter of the image: 64 features.

    They are as many as a few hundred images allow a Fréchet distance to have, and what the reader's answers are from.
    """

    name, width, resize = "shapes", 64, "area"

    def __init__(self, path: str | None = None, device: torch.device | str = "cpu") -> None:
        from ldm.training.quality import load_reader

        file = find(path or JUDGE)
        self._reader: SceneReader = load_reader(file).to(device)
        self.weights, self.device = file_sha256(file), torch.device(device)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.width} {self.weights} {self.resize}"

    def prepare(self, pixels: np.ndarray) -> Tensor:
        x = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)[None]
        return F.interpolate(x, (self._reader.side, self._reader.side), mode="area")[0]

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self._reader.features(2 * x.to(self.device) - 1), 2).flatten(1)


class SceneAnswers(SceneFeatures):
    """The reader's scores of all answers to the questions of `ldm.training.questions`, in their order."""

    name = "shapes-answers"

    def __init__(self, path: str | None = None, device: torch.device | str = "cpu") -> None:
        from ldm.training.questions import QUESTIONS

        super().__init__(path, device)
        self.width = sum(QUESTIONS.values())

    def features(self, x: Tensor) -> Tensor:
        return self._reader(x.to(self.device))


def network(name: str, path: str | None, resize: str | None, device: torch.device | str) -> Any:
    """Returns the network of distances of this name; raises InputError for an unknown one or missing weights.

    `resize` is a mode of `ldm.evaluation.resize`; None is the network's own.
    """
    kinds = {"inception": InceptionFeatures, "dinov2": DinoFeatures, "clip": ClipFeatures}
    need(name in FEATURES, f"--network {printable(name)}: give one of {', '.join(FEATURES)}")
    if name == "shapes":
        return SceneFeatures(path, device)
    return kinds[name](path, device=device, **({"resize": resize} if resize else {}))


# --- weights ------------------------------------------------------------------------------------------------


def load_strictly(net: _Network, file: Path, prefix: str = "") -> _Network:
    """Gives a network the weights of a file, in float32 and evaluation mode; nothing in the file is run.

    With `prefix` only the weights whose names begin with it. Raises InputError for missing ones and other shapes.
    """
    from ldm.checkpoints.formats.read import read_checkpoint

    found = {
        k.removeprefix(prefix): v.float()
        for k, v in read_checkpoint(file).state_dict.items()
        if k.startswith(prefix)
    }
    try:
        net.load_state_dict(found, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{printable(file)} is not a file of {type(net).__name__}: {printable(reason)}"
        ) from None
    return net.eval().requires_grad_(False)


@contextlib.contextmanager
def of_transformers(folder: Path) -> Generator[None]:
    """Turns the faults of a folder of transformers into an InputError of one line."""
    need(folder.is_dir(), f"{printable(folder)} is not a folder with config.json and model.safetensors")
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{printable(folder)} cannot be used: {printable(reason)}") from None


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    from ldm.checkpoints.hashing import files_sha256

    return files_sha256([file])


def folder_sha256(folder: Path) -> str:
    """Returns the SHA-256 of a folder's config and weights."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    hashes = [file_sha256(path) for path in [folder / "config.json", *names]]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns images in [0, 255] as a network was trained on them."""
    shape = (1, 3, 1, 1)
    return (x / 255 - torch.tensor(mean, device=x.device).view(shape)) / torch.tensor(
        std, device=x.device
    ).view(shape)


def _unit(x: Tensor) -> Tensor:
    return x / cast("Tensor", x.norm(dim=-1, keepdim=True))
