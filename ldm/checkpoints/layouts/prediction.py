"""The statements of a checkpoint about its prediction type and its noise schedule."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.files import read_side_file
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import printable

_NOISE = "the noise"
_V = "v-prediction"
_ZERO_SNR = "a noise schedule that ends without signal (zero terminal SNR)"
_EDM = "EDM's parameterization"
# a key of the weights whose presence means it
_MARKS = (
    (re.compile(r"(^|\.)v_pred$"), _V),
    (re.compile(r"(^|\.)ztsnr$"), _ZERO_SNR),
    (re.compile(r"(^|\.)edm_vpred\."), f"{_EDM} and {_V}"),
    (re.compile(r"(^|\.)edm_\w+$"), _EDM),
)
# an entry next to the weights that means it if it is true
_FLAGS = {
    **dict.fromkeys(("v_pred", "v_parameterization", "ss_v_parameterization"), _V),
    **dict.fromkeys(
        ("ztsnr", "zero_terminal_snr", "ss_zero_terminal_snr", "rescale_betas_zero_snr"), _ZERO_SNR
    ),
    "ss_v2": "Stable Diffusion 2",
}
# an entry that names what is predicted
_WORDS = (
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "ss_prediction_type",
    "prediction_type",
    "predict_key",
    "parameterization",
)
_NOISES = frozenset({"eps", "epsilon", "noise"})
_NO = frozenset({"", "0", "0.0", "false", "no", "none", "off"})
_MAX_CONFIG = 2**20
_CONFIG_ENTRY = re.compile(
    rf"""^[^#\n]*?\b({"|".join([*_FLAGS, *(re.escape(w) for w in _WORDS)])})["']?\s*:\s*["']?([\w.-]*)""",
    re.MULTILINE,
)
_CONFIG_V = re.compile(r"^[^#\n]*\.V(?:Scaling|Weighting)\w*", re.MULTILINE)  # of Stability AI's configs


Choice = Literal["auto", "eps", "v"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The statement of a checkpoint about what its U-Net predicts.

    `parameterization` is "eps" (the noise), "v", or "" where nothing is stated. With `zero_snr` the schedule ends
    without signal (zero terminal SNR). `stated` is it in words, with the place of the statement, if it is not the
    noise. `foreign` is what this toolkit does not run, in the same form, or "".
    """

    parameterization: Literal["", "eps", "v"] = ""
    zero_snr: bool = False
    stated: str = ""
    foreign: str = ""

    @classmethod
    def chosen(cls, parameterization: Literal["eps", "v"], file: Prediction) -> Prediction:
        """The prediction type that a user chose for a file that states `file`; "eps" also turns zero SNR off."""
        zero_snr = file.zero_snr and parameterization == "v"
        words = {"eps": "", "v": f"{_V} (chosen){f' and {_ZERO_SNR}' if zero_snr else ''}"}
        return cls(parameterization, zero_snr, words[parameterization])


def stated_prediction(state_dict: Mapping[str, Any], entries: Mapping[str, Any]) -> Prediction:
    """Returns what the keys of a file, its own noise schedule, and the `entries` next to its weights state.

    A false value, such as "False", is a no. Zero terminal SNR means v-prediction, unless the noise is stated.
    """
    found = [*_of_keys(state_dict), *_of_entries(entries)]
    kinds = {what for what, _ in found}
    known = {_NOISE: "", _V: _V, _ZERO_SNR: _ZERO_SNR}
    stated = " and ".join(dict.fromkeys(f"{what} {where}" for what, where in found if known.get(what, what)))
    if foreign := [f"{what} {where}" for what, where in found if what not in known]:
        return Prediction(stated=stated, foreign=foreign[0])
    if _ZERO_SNR in kinds and _V not in kinds and _NOISE in kinds:
        stated = f"{stated}, though it predicts the noise"
        return Prediction(stated=stated, foreign=stated)
    if _V in kinds or _ZERO_SNR in kinds:
        return Prediction("v", _ZERO_SNR in kinds, stated)
    return Prediction("eps" if kinds else "")


def _of_keys(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The kinds of prediction that keys mean, each with its first key; and that of a schedule without signal."""
    for pattern, what in _MARKS:
        key = next(filter(pattern.search, state_dict), None)
        if key is not None:
            yield what, f"(its key {printable(key[:100])})"
    for name in ("alphas_cumprod", "betas"):
        levels = _levels(name, state_dict.get(name))
        if levels is not None and abs(levels[-1]) < 1e-6:
            yield _ZERO_SNR, f"(its {name})"
            return


def _of_entries(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        word = str(value).strip().lower()
        where = f"({printable(name[:100])}: {printable(str(value)[:50])})"
        own = name.rpartition(": ")[2]
        if own in _FLAGS and word not in _NO:
            yield _FLAGS[own], where
        if own in _WORDS and word not in _NO:
            v = re.match("v([_-]|$)", word)
            yield _NOISE if word in _NOISES else _V if v else "another prediction", where


def config_beside(path: str | os.PathLike[str]) -> dict[str, str]:
    """The entries on the prediction type in a YAML file of a checkpoint's name, next to it; empty without one.

    Nothing else in the file is used. One that is not a small regular file is an `InputError`.
    """
    entries: dict[str, str] = {}
    for config in (Path(path).with_suffix(ending) for ending in (".yaml", ".yml")):
        if os.path.isdir(path) or not os.path.lexists(config):
            continue
        text = read_side_file(config, _MAX_CONFIG).decode("utf-8", "replace")
        entries.update({f"{config.name}: {name}": value for name, value in _CONFIG_ENTRY.findall(text)})
        if _CONFIG_V.search(text):
            entries[f"{config.name}: parameterization"] = "v"
    return entries


def is_mark(key: str) -> bool:
    """Whether a key of a state dict only marks the prediction type: its tensor is empty."""
    return any(pattern.search(key) for pattern, what in _MARKS if what in (_V, _ZERO_SNR))


def marks_of(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """The empty tensors by which a state dict marks what a model predicts, other than the noise."""
    marks = {"v_pred": model.parameterization == "v", "ztsnr": model.zero_terminal_snr}
    return {key: torch.empty(0) for key, present in marks.items() if present}


def check_prediction(prediction: Prediction, likeness: str = "") -> None:
    """Refuses a model that predicts neither the noise nor v; `likeness` is added to the line."""
    if prediction.foreign:
        raise CheckpointError(
            f"was trained for {prediction.foreign}; this toolkit runs only models that predict the noise or v"
            f"{likeness}"
        )


def check_schedule(model: LatentDiffusion, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuses a file whose own noise schedule is not the model's, beyond what its type rounds away."""
    ours = model.alphas_cumprod
    for name in ("alphas_cumprod", "betas"):
        found = state_dict.get(name)
        theirs = _levels(name, found)
        if found is None or theirs is None or theirs.shape != ours.shape or ours.is_meta:
            continue
        tolerance = max(1e-4, 2 * torch.finfo(found.dtype).eps)
        if torch.allclose(theirs, ours.double(), rtol=tolerance, atol=1e-6):
            continue
        raise CheckpointError(
            f"has another noise schedule than this config's model (the last of alphas_cumprod is {theirs[-1]:.4g}, "
            f"the model's {ours[-1]:.4g}); give the config that it was trained with: --config"
        )


def _levels(name: str, found: object) -> torch.Tensor | None:
    """The noise levels alphas_cumprod in float64, from a file's tensor of this name; None if it holds none."""
    if not isinstance(found, torch.Tensor) or found.ndim != 1 or not len(found) or found.is_meta:
        return None
    if not found.is_floating_point() or found.element_size() < 2:  # too coarse to compare
        return None
    return found.double() if name == "alphas_cumprod" else torch.cumprod(1 - found.double(), 0)
