"""Job -> conditioning -> latents -> pixels: the Python API, and the one place that knows every room."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from ldm.checkpoints.load import Ema, load_into
from ldm.checkpoints.reader import read_checkpoint
from ldm.images.pixels import finite, to_uint8
from ldm.job import Job
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.noise import NoiseSource, noise_source
from ldm.models.diffusion.plms import PLMSSampler
from ldm.runtime.device import FULL, Precision
from ldm.util import InputError, find, get_obj_from_str, instantiate_from_config, printable

logger = logging.getLogger(__name__)

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
_FREE_TARGETS = ("torch.nn.Identity",)


class ConfigError(InputError):
    """A config file that cannot be used."""


def read_config(path: str | Path, allow_targets: Sequence[str] = ()) -> dict[str, Any]:
    """The `model` entry of a YAML config, checked: only parts of this package, no interpolation.

    `allow_targets` names further packages whose classes the config may use. Nothing foreign is imported
    before its name has been checked. Faults are a `ConfigError` of one line.
    """
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OSError as error:
        raise ConfigError(f"cannot read the config {printable(path)}: {error.strerror}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the config {printable(path)} is no usable YAML: {printable(reason)[:300]}"
        ) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or "target" not in tree["model"]:
        raise ConfigError(f"the config {printable(path)} is no mapping with `model:` and its `target:`")
    model = tree["model"]
    _check_tree(model, path, ("ldm", *allow_targets))
    for target in _targets(model):
        _check_is_class(target, path)
    _resolve_vocabulary(model)
    return model


def _check_tree(node: Any, path: Path, packages: Sequence[str]) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "target":
                _check_target(value, path, packages)
            _check_tree(value, path, packages)
    elif isinstance(node, list):
        for value in node:
            _check_tree(value, path, packages)
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(
            f"{printable(path)}: interpolation is not supported here: {printable(node)}; write the value out"
        )


def _check_target(target: Any, path: Path, packages: Sequence[str]) -> None:
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise ConfigError(f"{printable(path)}: target {printable(target)!r} is no dotted name of a class")
    package = target.partition(".")[0]
    if target not in _FREE_TARGETS and package not in packages:
        raise ConfigError(
            f"{printable(path)}: target {target} is not a part of this toolkit; "
            f"if you trust that package, add --allow_targets {package}"
        )


def _targets(node: Any) -> Iterator[str]:
    values = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "target" in node:
        yield node["target"]
    for value in values:
        yield from _targets(value)


def _check_is_class(target: str, path: Path) -> None:
    try:
        found = get_obj_from_str(target)
    except (ImportError, AttributeError):
        raise ConfigError(f"{printable(path)}: there is no {target}") from None
    package = target.partition(".")[0]
    if not inspect.isclass(found) or found.__module__.partition(".")[0] != package:
        raise ConfigError(f"{printable(path)}: target {target} is no class of the package {package}")


def section(tree: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The mapping that lies under `names`, each step through its `params`; empty where there is none."""
    node: Any = tree
    for key in ("params", *(part for name in names for part in (name, "params"))):
        node = node.get(key) or {}
        if not isinstance(node, Mapping):
            raise ConfigError(f"the config's {'.'.join(names) or 'model'} is {node!r}; it must be a mapping")
    return node


def _resolve_vocabulary(model: Mapping[str, Any]) -> None:
    """A vocabulary folder in the text model's `version` may be relative to the toolkit's folder."""
    params = section(model, "cond_stage_config")
    if isinstance(params.get("version"), str) and find(params["version"]).is_dir():
        params["version"] = str(find(params["version"]))  # type: ignore[index]


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Layers built within it draw no initial weights: for those of v1 that takes a second, even on meta."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    initialisers = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None
        yield
    finally:
        for kind, initialise in zip(kinds, initialisers, strict=True):
            kind.reset_parameters = initialise


def load_model(
    config: Mapping[str, Any],
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    ema: Ema = "auto",
    mmap: bool = True,
) -> LatentDiffusion:
    """The model of a checked config with the weights of a checkpoint, in float32, ready to sample.

    It is built without memory of its own and takes the checkpoint's tensors; see `ldm.checkpoints` for what
    is refused.
    """
    try:
        with torch.device("meta"), _uninitialised():
            model = instantiate_from_config(config)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong value leads to, the config is at fault
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConfigError(f"the config describes no model that can be built: {reason}") from error
    if not isinstance(model, LatentDiffusion):
        raise ConfigError(f"the config's model {config['target']} is no LatentDiffusion")
    load_into(model, read_checkpoint(ckpt, mmap=mmap), dtype=torch.float32, ema=ema)
    return model.eval().to(device)


@dataclass(frozen=True)
class Picture:
    """What became of a job: uint8 pixels [H, W, 3], or None if they were not finite, and notes for the record."""

    job: Job
    pixels: np.ndarray | None
    notes: Mapping[str, str]


class Pipeline:
    """A loaded model that makes pictures from jobs."""

    def __init__(self, model: LatentDiffusion, precision: Precision = FULL):
        self.model = model
        self.precision = precision
        # autocast keeps its casts of weights only if they could be trained; otherwise it casts at every step
        model.model.requires_grad_(precision.autocast is not None)
        self._encode = lru_cache(maxsize=64)(self._encode_one)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def factor(self) -> int:
        """How many pixels one latent value spans along each side."""
        return self.model.first_stage_model.downsampling

    def noise(self, jobs: Sequence[Job]) -> NoiseSource:
        """The noise of one batch of jobs; with seed mode "batch", keep the first batch's for the whole run."""
        first = jobs[0]
        seeds = [job.seed for job in jobs] if first.seed_mode == "image" else [first.seed]
        return noise_source(first.rng, first.seed_mode, seeds, self.device)

    def start_code(self, job: Job, count: int, noise: NoiseSource) -> Tensor:
        """The start noise of a batch of `count` jobs like this one [count, C, h, w], drawn from `noise`."""
        return noise.draw((count, *self._latent_shape(job)))

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        return (self.model.channels, job.height // self.factor, job.width // self.factor)

    def _encode_one(self, prompt: str) -> Tensor:
        return self.model.get_learned_conditioning([prompt])

    def _condition(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self._encode(prompt) for prompt in prompts])

    @torch.inference_mode()
    def make(
        self,
        jobs: Sequence[Job],
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> list[Picture]:
        """The pictures of jobs that differ at most in prompts and seeds, as one batch.

        `noise` is the batch's own by default, `start_code` is drawn from it; `on_step(i)` is called behind
        each denoising step.
        """
        job = jobs[0]
        if len({replace(j, prompt="", negative_prompt="", seed=0, batch_index=0) for j in jobs}) > 1:
            raise ValueError("the jobs of one batch may differ in prompts and seeds only")
        noise = self.noise(jobs) if noise is None else noise
        x_T = self.start_code(job, len(jobs), noise) if start_code is None else start_code
        with self.precision.context(self.device):
            cond = self._condition([job.prompt for job in jobs])
            uncond = None if job.scale == 1.0 else self._condition([job.negative_prompt for job in jobs])
            latents, _ = SAMPLERS[job.sampler](self.model).sample(
                S=job.steps,
                batch_size=len(jobs),
                shape=self._latent_shape(job),
                conditioning=cond,
                unconditional_conditioning=uncond,
                unconditional_guidance_scale=job.scale,
                eta=job.eta,
                x_T=x_T,
                noise=noise,
                ddim_discretize=job.timestep_spacing,
                callback=on_step,
                verbose=False,
            )
        return [self._picture(job, latent[None]) for job, latent in zip(jobs, latents, strict=True)]

    def _picture(self, job: Job, latent: Tensor) -> Picture:
        """Decodes one latent [1, C, h, w]; if half precision overflows, once more in float32."""
        with self.precision.context(self.device):
            decoded = self.model.decode_first_stage(latent)
        cut_words = getattr(
            self.model.cond_stage_model, "cut_words", None
        )  # another package's model may lack it
        cut = cut_words(job.prompt) if cut_words else ""
        notes = {"Prompt cut": cut} if cut else {}
        if not finite(decoded)[0] and self.precision.autocast is not None:
            decoded = self.model.decode_first_stage(latent.float())
            notes["Decoded in"] = "float32"
        return Picture(job, to_uint8(decoded)[0] if finite(decoded)[0] else None, notes)
