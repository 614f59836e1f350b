"""`ldm inspect`: reports the kind and content of model files, and executes nothing from them."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.checkpoints.configs import (
    BUNDLED_CONFIG,
    BUNDLED_INPAINTING_CONFIG,
    EDIT_CONFIG,
    INPAINTING_CONFIG,
    LAION_CONFIG,
    V1_CONFIG,
    config_for,
)

if TYPE_CHECKING:
    from ldm.checkpoints.layouts.recognise import ModelKind

_DESCRIPTION = (
    "Reports what model files are: kind, parts, precision, checksums, damage; runs nothing from them."
)
_EXAMPLES = (
    "python scripts/inspect_model.py sd-v1-4.ckpt",
    "python scripts/inspect_model.py --json --no_hash loras/*.safetensors",
    "python scripts/inspect_model.py models/ldm/shapes/model.ckpt --config configs/shapes/shapes-inference.yaml",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "PATH [PATH ...] [options]", _EXAMPLES)
    options.add_argument("paths", metavar="PATH", nargs="+", help="model files, or folders of diffusers")
    group = options.add_argument_group("inspection")
    group.add_argument("--json", action="store_true", help="print one JSON object a file, each on its line")
    group.add_argument(
        "--no_hash", action="store_true", help="be quick: no checksums, no search for damage in the weights"
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="compare the keys with this config's model (default: the published one of the same kind)",
    )
    group.add_argument(
        "--allow_targets",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="let the config use classes of this package, which runs its code",
    )
    cli.add_report_options(options)
    return options


def own_config(kind: ModelKind, path: Path) -> str | None:
    """Returns this toolkit's config of a supported complete model at `path`; its bundled model has no family."""
    from ldm.checkpoints.adapters.control import config_for_control
    from ldm.checkpoints.layouts.recognise import EDIT, INPAINTING, LAION, V1
    from ldm.checkpoints.model_files import read_model

    if (kind.part, kind.family) == ("model", ""):
        found = config_for(read_model(path).state_dict)
        return found if found in (BUNDLED_CONFIG, BUNDLED_INPAINTING_CONFIG) else None

    if kind.part in ("T2I-Adapter", "IP-Adapter"):
        return V1_CONFIG
    if kind.part == "ControlNet" and kind.family in (V1, ""):
        return config_for_control(read_model(path).state_dict)
    configs = {
        (V1, ""): V1_CONFIG,
        (V1, INPAINTING): INPAINTING_CONFIG,
        (V1, EDIT): EDIT_CONFIG,
        (LAION, ""): LAION_CONFIG,
    }
    return configs.get((kind.family, kind.variant)) if kind.part == "model" else None


def run(opt: argparse.Namespace) -> int:
    from ldm.checkpoints.inspect import inspect_path
    from ldm.checkpoints.inspection_text import lines
    from ldm.config import read_config
    from ldm.places import find
    from ldm.util import InputError

    logger = logging.getLogger("ldm")

    def config_of(path: Path, kind: ModelKind) -> dict[str, Any] | None:
        config = opt.config or own_config(kind, path)
        return read_config(config, opt.allow_targets) if config else None

    worst = 0
    for path in opt.paths:
        try:
            found = inspect_path(find(path), not opt.no_hash, partial(config_of, find(path)), logger.info)
        except InputError as error:
            logger.error("error: %s", error)
            worst = 2
            continue
        for one in found:
            print(json.dumps(one.as_json()) if opt.json else "\n".join(lines(one)))
            worst = max(worst, 0 if one.sound else 1)
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(), run, argv)
