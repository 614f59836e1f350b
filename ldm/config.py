"""Configs are data: a YAML file is checked before anything that it names is imported."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.files import read_side_file
from ldm.places import find
from ldm.util import InputError, get_obj_from_str, is_list, is_mapping, printable

_OUR_TARGETS = (
    "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm.LatentEditDiffusion",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "ldm.modules.encoders.modules.BERTEmbedder",
    "ldm.lr_scheduler.LambdaLinearScheduler",
    "torch.nn.Identity",
)
_MAX_BYTES = 2**20
_MAX_SIZE = 2**20
_MAX_DEPTH = 100
_DEPTHS = ("num_res_blocks", "transformer_depth", "n_layer", "layers")  # how often something is built
_LONG_LISTS = ("given_betas",)
_NOT_BUILT = ("scheduler_config",)  # of training; its cycles are endless in the published configs


class ConfigError(InputError):
    """A config file that cannot be used."""


def read_config(path: str | Path, allow_targets: Sequence[str] = ()) -> dict[str, Any]:
    """Reads and checks the `model` entry of a YAML config: only listed classes of this package, no interpolation.

    `allow_targets` names other packages, all of whose classes the config may use. Nothing foreign is imported before
    its name has been checked. Raises `ConfigError` with one line.
    """
    path = find(path)
    try:
        text = _read_text(path)
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the config {printable(path)} is not usable YAML: {printable(reason)[:300]}"
        ) from None
    model = tree.get("model") if is_mapping(tree) else None
    if not is_mapping(model) or "target" not in model:
        raise ConfigError(f"the config {printable(path)} is not a mapping with `model:` and its `target:`")
    _check_tree(model, path, allow_targets)
    _check_sizes(model, path)
    for target in targets(model):
        _check_is_class(target, path)
    _resolve_vocabulary(model)
    return dict(model)


def _read_text(path: Path) -> str:
    try:
        return read_side_file(path, _MAX_BYTES).decode("utf-8-sig")
    except InputError as error:
        raise ConfigError(f"the config {error}") from None


def _check_tree(node: Any, path: Path, packages: Sequence[str]) -> None:
    if is_mapping(node):
        for key, value in node.items():
            if key == "target":
                _check_target(value, path, packages)
            _check_tree(value, path, packages)
    elif is_list(node):
        for value in node:
            _check_tree(value, path, packages)
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(
            f"{printable(path)}: interpolation is not supported here: {printable(node)}; write the value out"
        )


def _check_sizes(node: Any, path: Path, name: str = "") -> None:
    """Refuses sizes that no model can be built with, before any is built: each costs time or memory in proportion."""
    if is_mapping(node):
        for key, value in node.items():
            if key not in _NOT_BUILT:
                _check_sizes(value, path, str(key))
    elif is_list(node):
        if len(node) > _MAX_DEPTH and name not in _LONG_LISTS:
            raise ConfigError(
                f"{printable(path)}: {printable(name)} has {len(node)} entries; at most {_MAX_DEPTH}"
            )
        for value in node:
            _check_sizes(value, path, name)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(f"{printable(path)}: {printable(name)} is {node}; it must be a finite number")
    elif isinstance(node, int):
        most = _MAX_DEPTH if name in _DEPTHS else _MAX_SIZE
        if abs(node) > most:
            raise ConfigError(f"{printable(path)}: {printable(name)} is {node}; at most {most} can be built")


def _check_target(target: object, path: Path, packages: Sequence[str]) -> None:
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise ConfigError(
            f"{printable(path)}: target {printable(target)!r} is not the dotted name of a class"
        )
    package = target.partition(".")[0]
    if target in _OUR_TARGETS:
        return
    if package == "ldm":  # whoever trusts this package has not asked for its other classes
        names = ", ".join(sorted(name.rpartition(".")[2] for name in _OUR_TARGETS))
        raise ConfigError(f"{printable(path)}: a config cannot use {target}; its targets can be {names}")
    if package not in packages:
        raise ConfigError(
            f"{printable(path)}: target {target} is not a part of this toolkit; "
            f"if you trust that package, add --allow_targets {package}"
        )


def targets(node: Any) -> Iterator[str]:
    """Returns the dotted name of every class that a config, or a part of one, names."""
    if is_mapping(node) and "target" in node:
        yield node["target"]
    for value in node.values() if is_mapping(node) else node if is_list(node) else ():
        yield from targets(value)


def _check_is_class(target: str, path: Path) -> None:
    try:
        found = get_obj_from_str(target)
    except (ModuleNotFoundError, AttributeError) as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and not f"{target}.".startswith(f"{missing}."):
            raise  # a package that the target's module needs
        raise ConfigError(f"{printable(path)}: there is no {target}") from None
    package = target.partition(".")[0]
    if not inspect.isclass(found) or found.__module__.partition(".")[0] != package:
        raise ConfigError(f"{printable(path)}: target {target} is not a class of the package {package}")


def section(tree: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Returns the mapping found under `names`, each step through its `params`; empty if there is none."""
    node: Any = tree
    for key in ("params", *(part for name in names for part in (name, "params"))):
        node = node.get(key) or {}
        if not is_mapping(node):
            raise ConfigError(f"the config's {'.'.join(names) or 'model'} is {node!r}; it must be a mapping")
    return node


def _resolve_vocabulary(model: Mapping[str, Any]) -> None:
    """Makes a relative vocabulary folder in the text encoder's `version` relative to the toolkit's folder."""
    params: Any = section(model, "cond_stage_config")
    if isinstance(params.get("version"), str) and find(params["version"]).is_dir():
        params["version"] = str(find(params["version"]))
