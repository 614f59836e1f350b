"""`ldm where`: the places where each kind of file is looked for, and the files found there."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm import cli
from ldm.checkpoints.configs import BUNDLED_CKPT, INPAINTING_CKPT, LAION_CKPT, V1_CKPT
from ldm.places import cache_path, candidates, hub_files, hub_folder
from ldm.util import printable

_EXAMPLES = ("python -m ldm where", "python -m ldm where --json")
_HUB = "https://huggingface.co/"


class Kind(NamedTuple):
    """A kind of file: where it is looked for, in order, the option that names another, and where it is published."""

    name: str
    places: Sequence[Path]
    option: str = ""
    pages: Sequence[str] = ()
    own: str = ""  # the name of a downloaded file in one of the folders

    @property
    def found(self) -> Path | None:
        return next((place for place in self.places if os.path.lexists(place)), None)

    @property
    def command(self) -> str:
        """The command that links a downloaded file at the last of its places, the user's folder."""
        if not self.own:
            return ""
        target = candidates(self.own)[-1]
        link = ["ln", "-s", "/path/to/download", str(target)]
        return f"{shlex.join(['mkdir', '-p', str(target.parent)])} && {shlex.join(link)}"


def kinds() -> list[Kind]:
    """Returns every kind of file that is looked for without being named, and the VAEs, which always are named."""
    from ldm.evaluation.weights import NETWORKS
    from ldm.modules.encoders.bert import OWN_VOCABULARY, REPOSITORIES, VOCABULARY_FILE
    from ldm.modules.encoders.tokenizer import openai_tables
    from ldm.safety.load import OWN_FOLDER, REPOSITORY, WEIGHTS

    v1 = ("CompVis/stable-diffusion-v-1-4-original", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    vaes = ("stabilityai/sd-vae-ft-mse-original", "stabilityai/sd-vae-ft-ema-original")
    laion = "https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt"
    hub_vocabularies = [place for name in REPOSITORIES for place in _in_hub(name, [VOCABULARY_FILE])]
    return [
        Kind("configs", candidates("configs"), "--config"),
        Kind("Stable Diffusion v1", candidates(V1_CKPT), "--ckpt", _on_hub(*v1), V1_CKPT),
        Kind("inpainting model", candidates(INPAINTING_CKPT), "--ckpt",
             _on_hub("stable-diffusion-v1-5/stable-diffusion-inpainting"), INPAINTING_CKPT),
        Kind("LAION-400M model", candidates(LAION_CKPT), "--ckpt", (laion,), LAION_CKPT),
        Kind("bundled model", candidates(BUNDLED_CKPT), "--ckpt"),
        Kind("VAE", (), "--vae", _on_hub(*vaes)),
        Kind("safety checker", [*candidates(OWN_FOLDER), *_in_hub(REPOSITORY, WEIGHTS)], "--safety_model",
             _on_hub(REPOSITORY), OWN_FOLDER),
        Kind("BERT vocabulary", [*candidates(OWN_VOCABULARY), *hub_vocabularies], "",
             _on_hub(REPOSITORIES[0]), OWN_VOCABULARY),
        Kind("CLIP vocabulary", openai_tables(), "", ("https://pypi.org/project/openai-clip",)),
        *(
            Kind(network.title, network.places(), f"--{name}", (network.page,), network.own)
            for name, network in NETWORKS.items()
        ),
        Kind("caches", [cache_path("")]),
    ]  # fmt: skip


def _in_hub(repository: str, names: Sequence[str]) -> list[Path]:
    """Returns the files that Hugging Face's libraries have downloaded; else their paths, in any revision."""
    return list(hub_files([repository], names)) or [hub_folder(repository) / "snapshots/*" / names[0]]


def _on_hub(*repositories: str) -> list[str]:
    return [_HUB + repository for repository in repositories]


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    description = (
        "Lists where each kind of file is looked for, in order, and what was found. Nothing is downloaded."
    )
    options = cli.make_parser(description, "[options]", _EXAMPLES)
    options.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print one JSON object for each kind of file, each on its line"
    )
    cli.add_report_options(options)
    return options


def lines(kind: Kind) -> list[str]:
    """Describes a kind of file; the place that is used is marked with an arrow."""
    state = "" if kind.found or not kind.places else ": not found"
    written = [
        f"{kind.name}{state}" + (f" ({kind.option} names another)" if kind.option and kind.places else "")
    ]
    written += [f"  {'->' if place == kind.found else '  '} {printable(place)}" for place in kind.places]
    written += [] if kind.places else [f"     only where {kind.option} names it"]
    if kind.found is None:
        written += [f"     published at {page}" for page in kind.pages]
        written += [f"     {printable(kind.command)}"] if kind.command else []
    return written


def run(opt: argparse.Namespace) -> int:
    for kind in kinds():
        if opt.json:
            fields = {"kind": kind.name, "places": [*map(str, kind.places)], "option": kind.option or None}
            fields |= {"found": None if kind.found is None else str(kind.found)}
            print(json.dumps(fields | {"pages": [*kind.pages], "command": kind.command or None}))
        else:
            print("\n".join(lines(kind)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; returns its exit code."""
    return cli.main(parser(), run, argv)
