"""The options of the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm.checkpoints.configs import V1_CONFIG

PARTS = ("step", "decode", "whole")


@dataclass(frozen=True)
class Peer:
    """A package that does the same work.

    `needs` are the packages to install, and `for_int8` those that it also needs for 8-bit products (None: it has
    none). `types` are its own names of types. A peer that is `closed` reads the checkpoint itself and makes whole
    images, one at a time: it has no folder of weights, and its latents and U-Net cannot be compared.
    """

    needs: tuple[str, ...]
    for_int8: tuple[str, ...] | None = None
    types: Mapping[str, str] = field(default_factory=dict[str, str])
    closed: bool = False

    def type_for(self, precision: str, dtype: str) -> str:
        """Returns the type that it runs in where ours is `precision` and others run in `dtype`."""
        wanted = "int8" if precision == "int8" and self.for_int8 is not None else dtype
        return self.types.get(wanted, wanted)


_DIFFUSERS = ("diffusers", "transformers", "safetensors")
PEERS: dict[str, Peer] = {
    "diffusers": Peer(_DIFFUSERS),
    "openvino": Peer(("openvino", *_DIFFUSERS), for_int8=("nncf",)),
    "sdcpp": Peer(
        ("stable-diffusion-cpp-python",),
        for_int8=(),
        types={"float32": "f32", "bfloat16": "f16", "float16": "f16", "int8": "q8_0"},
        closed=True,
    ),
    "zentorch": Peer(("zentorch", *_DIFFUSERS)),
}
MODULES = {"stable-diffusion-cpp-python": "stable_diffusion_cpp"}  # where they differ from the package's name


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options: the subjects to measure, the peer, and the number of rounds."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--parts",
        metavar="LIST",
        default="step,decode",
        help="step, decode, whole. step and decode are timed in long-running processes that take turns, whole in "
        "a fresh process each time, from its start to the last PNG file",
    )
    group.add_argument("--sizes", metavar="LIST", default="512", help="sides of the images in pixels")
    group.add_argument("--batch", metavar="N", type=int, default=1, help="images at a time")
    group.add_argument("--steps", metavar="N", type=int, default=20, help="DDIM steps")
    group.add_argument(
        "--mode", choices=("txt2img", "img2img"), default="txt2img", help="what kind of run is timed"
    )
    group.add_argument(
        "--strength", metavar="X", type=float, default=0.75, help="img2img's share of the steps"
    )
    group.add_argument("--rounds", metavar="N", type=int, default=5, help="how often each part is timed")
    group.add_argument("--check", action="store_true", help="compare results with float32's")
    group.add_argument("--seed", metavar="N", type=int, default=42, help="seed of the start noise")

    group = parser.add_argument_group("computation")
    group.add_argument(
        "--precision",
        metavar="LIST",
        default="autocast",
        help="full, autocast, bf16, fp16 or int8, or several in turn",
    )
    group.add_argument(
        "--fast",
        metavar="LIST",
        default="exact",
        help="exact, balanced or draft, or several in turns: what our own images leave out, as for txt2img.py",
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads (0: torch's choice)")
    group.add_argument("--compile", action="store_true", help="torch.compile the U-Nets, the peer's too")

    group.add_argument(
        "--cache_weights",
        action="store_true",
        help="time our fresh processes with weights that an earlier one has packed, see txt2img.py",
    )

    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--peers",
        metavar="LIST",
        default="",
        help=f"other packages that do the same work in turns: {', '.join(PEERS)}; those that are not installed are "
        "left out",
    )
    group.add_argument(
        "--peer_recipe",
        choices=("auto", "plain", "channels-last"),
        default="auto",
        help="the peer's memory layout; auto: whichever is faster",
    )
    group.add_argument(
        "--peer_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 for full, else float16 on a GPU and bfloat16 on a CPU; "
        "for int8, int8 in those that have it; sdcpp has f16 for both",
    )
    group.add_argument(
        "--peer_malloc",
        choices=("system", "tuned"),
        default="system",
        help="tuned: the peer gets the allocator setting that this toolkit gives itself, too",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", default=V1_CONFIG, help="model config")
    group.add_argument(
        "--ckpt", metavar="FILE", help="checkpoint (default: random weights, made once in the cache folder)"
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for what is made: 4.3 GB of weights, 2.1 or 4.3 GB for a peer (default: the user's)",
    )
    group.add_argument("--json", metavar="FILE", help="add every sample to FILE as JSON lines; -: to stdout")
