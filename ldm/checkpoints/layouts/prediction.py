"""The prediction type that a checkpoint states: this toolkit runs models that predict the noise."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.files import read_side_file
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import printable

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
_NOISE = frozenset({"", "none", "eps", "epsilon", "noise"})
_NO = frozenset({"", "0", "0.0", "false", "no", "none", "off"})
_MAX_CONFIG = 2**20
_CONFIG_ENTRY = re.compile(
    rf"""^[^#\n]*?\b({"|".join([*_FLAGS, *(re.escape(w) for w in _WORDS)])})["']?\s*:\s*["']?([\w.-]*)""",
    re.MULTILINE,
)
_CONFIG_V = re.compile(r"^[^#\n]*\.V(?:Scaling|Weighting)\w*", re.MULTILINE)  # of Stability AI's configs


def foreign_prediction(keys: Iterable[str], entries: Mapping[str, Any]) -> str:
    """The prediction type of a model that does not predict the noise, and where it is stated: in keys or `entries`.

    Empty for a model that predicts the noise or states nothing. A false value, such as "False", is a no.
    """
    for key in keys:
        for pattern, what in _MARKS:
            if pattern.search(key):
                return f"{what} (its key {printable(key[:100])})"
    for name, value in entries.items():
        word = str(value).strip().lower()
        where = f"({printable(name[:100])}: {printable(str(value)[:50])})"
        own = name.rpartition(": ")[2]
        if own in _FLAGS and word not in _NO:
            return f"{_FLAGS[own]} {where}"
        if own in _WORDS and word not in _NOISE:
            return f"{_V if re.match('v([_-]|$)', word) else 'another prediction'} {where}"
    return ""


def config_beside(path: str | os.PathLike[str]) -> dict[str, str]:
    """The entries on the prediction type in a YAML file of a checkpoint's name, next to it; empty without one.

    Nothing else in the file is used. One that is not a small regular file is an `InputError`.
    """
    entries = {}
    for config in (Path(path).with_suffix(ending) for ending in (".yaml", ".yml")):
        if os.path.isdir(path) or not os.path.lexists(config):
            continue
        text = read_side_file(config, _MAX_CONFIG).decode("utf-8", "replace")
        entries.update({f"{config.name}: {name}": value for name, value in _CONFIG_ENTRY.findall(text)})
        if _CONFIG_V.search(text):
            entries[f"{config.name}: parameterization"] = "v"
    return entries


def check_prediction(prediction: str, likeness: str = "") -> None:
    """Refuses a model for which `foreign_prediction` is not empty; `likeness` is added to the line."""
    if prediction:
        raise CheckpointError(
            f"was trained for {prediction}; this toolkit runs only models that predict the noise{likeness}"
        )


def check_schedule(model: LatentDiffusion, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuses a file whose own noise schedule is not the model's, beyond what its type rounds away."""
    ours = model.alphas_cumprod
    for name in ("alphas_cumprod", "betas"):
        found = state_dict.get(name)
        if found is None or found.shape != ours.shape or ours.is_meta:
            continue
        if not found.is_floating_point() or found.element_size() < 2:  # too coarse to compare
            continue
        theirs = found.double() if name == "alphas_cumprod" else torch.cumprod(1 - found.double(), 0)
        tolerance = max(1e-4, 2 * torch.finfo(found.dtype).eps)
        if torch.allclose(theirs, ours.double(), rtol=tolerance, atol=1e-6):
            continue
        if abs(theirs[-1]) < 1e-6:
            check_prediction(f"{_ZERO_SNR}, its {name} shows")
        raise CheckpointError(
            f"has another noise schedule than this config's model (the last of alphas_cumprod is {theirs[-1]:.4g}, "
            f"the model's {ours[-1]:.4g}); give the config that it was trained with: --config"
        )
