"""The options of the scripts, in groups. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm import __version__
from ldm.cli.parser import Parser
from ldm.fields import SETTINGS
from ldm.job import RESIZES, Init
from ldm.prompts.dialects import FORMATS

# the defaults of options that not every script has; the shared code reads all of them
_DEFAULTS: dict[str, Any] = {
    "laion400m": False,
    "keep_going": False,
    "on_oom": "fail",
    "init_img": [],
    "indir": None,
    "strength": 1.0,
    "resize": None,
    "background": "white",
    "posterior_mean": False,
    "inpaint": False,
    "mask": None,
    "invert_mask": False,
    "mask_blur": Init("").mask_blur,
    "no_paste": False,
    "outpaint": (0, 0, 0, 0),
    "sampler": None,
    "devices": None,
    "num_nodes": None,
    "kept_input": None,  # the file that replaces standard input
    "typed": None,  # the arguments of the interpreter, if that started the script
    "upscale": 1.0,
    "images_per_prompt": None,
    "upscale_in": "pixels",
    "upscale_strength": 0.5,
}


_SWEPT = [
    name for name in SETTINGS if name not in ("seed_mode", "batch_index", "loras")
]  # those belong to the run


def make_parser(
    description: str, usage: str = "[options]", examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Creates a parser with grouped help; `usage` follows the script's name, `examples` are whole command lines."""
    parser = Parser(description, usage, examples)
    parser.set_defaults(**_DEFAULTS)
    return parser


def add_prompt_options(parser: argparse.ArgumentParser, prompt: str) -> None:
    """Adds the options of the prompt."""
    parser.set_defaults(default_prompt=prompt)
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", default=prompt, help="what to draw")
    group.add_argument("--negative_prompt", metavar="TEXT", default="", help="what to keep away from")
    group.add_argument(
        "--from-file",
        dest="from_file",
        metavar="FILE",
        help="read prompts (and settings of each line) from FILE; - reads standard input",
    )
    group.add_argument(
        "--prompt_format",
        choices=FORMATS,
        default="auto",
        help="how that file is written. plain: a prompt a line; jsonl, csv: fields by name; options, a1111, kohya, "
        "invokeai: a prompt and the options that those programs (options: this one) read; auto: by its content",
    )
    group.add_argument(
        "--expand", action="store_true", help="write out {a|b|c} in prompts, one image an option"
    )
    group.add_argument(
        "--sweep",
        metavar="FIELD=VALUES",
        action="append",
        default=[],
        help="make each image for each of these values, such as scale=5,7.5,10 or steps=10..50:10, and a labelled "
        f"sheet; can be given several times, for all combinations. FIELD is one of {', '.join(_SWEPT)}",
    )
    group.add_argument(
        "--prompt_syntax",
        choices=("plain", "a1111"),
        default="plain",
        help="a1111: (x:1.3), [x] and BREAK in prompts mean what they mean in AUTOMATIC1111's web UI",
    )


def _seed(text: str) -> int:
    try:
        return -1 if text.strip().lower() == "random" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def add_sampling_options(parser: argparse.ArgumentParser, scale: float) -> None:
    """Adds the options of sampling."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--ddim_steps", metavar="N", type=int, default=50, help="denoising steps, 1 to 999")
    group.add_argument(
        "--sampler",
        choices=SETTINGS["sampler"].choices,
        type=_word,
        help="how noise is removed step by step (default: ddim, or what a switch says)",
    )
    samplers = group.add_mutually_exclusive_group()
    samplers.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    samplers.add_argument("--dpm_solver", action="store_true", help="the same as --sampler dpm_solver")
    group.add_argument("--ddim_eta", metavar="X", type=float, default=0.0, help="DDIM's noise, 0 to 1")
    group.add_argument(
        "--scale", metavar="X", type=float, default=scale, help="guidance scale; 1 turns guidance off"
    )
    group.add_argument(
        "--timestep_spacing",
        choices=("uniform", "compvis", "quad"),
        default="uniform",
        help="which timesteps are visited; compvis gives the original's list, which can be longer than asked",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=42,
        help="seed of the first image, of up to 64 bits for --rng philox and 32 for the others; random or -1: any",
    )
    group.add_argument(
        "--seed_mode",
        choices=("image", "batch"),
        default="image",
        help="image: image i has seed + i and can be made again alone; batch: one stream, as in the original",
    )
    group.add_argument(
        "--rng",
        choices=("philox", "cpu", "device", "numpy"),
        default="philox",
        help="philox: the noise of a CUDA device, on any device; cpu, device: torch's generator there; numpy: "
        "NumPy's, as in the published inpainting app",
    )
    group.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")


def _word(text: str) -> str:
    """Spells a choice as here: DPM-Solver is dpm_solver."""
    return "_".join(text.lower().replace("-", " ").split())


def add_size_options(parser: argparse.ArgumentParser, own: str = "the model's own size") -> None:
    """Adds the options of size; `own` describes the default in words."""
    group = parser.add_argument_group("size")
    group.add_argument("--H", metavar="N", type=int, help=f"height in pixels (default: {own})")
    group.add_argument("--W", metavar="N", type=int, help=f"width in pixels (default: {own})")
    group.add_argument("--C", metavar="N", type=int, default=4, help="latent channels, as in the config")
    group.add_argument("--f", metavar="N", type=int, default=8, help="downsampling factor, as in the config")
    group.add_argument(
        "--tiles",
        choices=("auto", "on", "off"),
        default="auto",
        help="encode and decode in tiles, which is approximate; auto: if an image would not fit into memory",
    )


def add_image_options(parser: argparse.ArgumentParser, strength: float, required: bool) -> None:
    """Adds the options of starting images, and of fitting them to the canvas."""
    group = parser.add_argument_group("image to start from")
    group.add_argument(
        "--init-img",
        dest="init_img",
        metavar="FILE",
        nargs="+",
        required=required,
        help="images to start from: PNG, JPEG, WebP, BMP or TIFF files, or folders of them",
    )
    group.add_argument(
        "--strength",
        metavar="X",
        type=float,
        default=strength,
        help="how much changes: the share of the steps that run, 0 (nothing) to 1 (everything)",
    )
    group.add_argument(
        "--resize",
        choices=RESIZES,
        help="how an image becomes --W by --H: fit inside, fill and crop, stretch, or pad "
        "(default: fill; with only one of --W and --H: fit; without: none)",
    )
    group.add_argument(
        "--background",
        metavar="COLOUR",
        help="what shows through transparency and pads: a name or #rrggbb",
    )
    group.add_argument(
        "--posterior_mean",
        action="store_true",
        help="encode an image to the mean of its latent distribution instead of a draw from it",
    )


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of masks."""
    parser.set_defaults(inpaint=True)
    group = parser.add_argument_group("mask")
    group.add_argument(
        "--mask", metavar="FILE", help="white is repainted (default: where the image is transparent)"
    )
    group.add_argument(
        "--indir", metavar="DIR", help="a folder of images NAME.png with their masks NAME_mask.png"
    )
    group.add_argument("--invert_mask", action="store_true", help="black is repainted")
    group.add_argument(
        "--mask_blur",
        metavar="PX",
        type=float,
        help="how softly the new part fades in at its edges",
    )
    group.add_argument(
        "--no_paste",
        action="store_true",
        help="leave the rest as the autoencoder gives it, instead of the image's own pixels",
    )
    group.add_argument(
        "--outpaint",
        metavar="L,T,R,B",
        type=_four_numbers,
        help="add this many pixels at the left, top, right and bottom",
    )


def _four_numbers(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers such as 0,0,64,0") from None
    return left, top, right, bottom


def add_upscale_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the second pass at a larger size."""
    group = parser.add_argument_group("upscaling")
    group.add_argument("--upscale", metavar="X", type=float, help="enlarge the finished image and refine it")
    group.add_argument(
        "--upscale_strength",
        metavar="X",
        type=float,
        help="the second pass's share of the steps, 0 to 1",
    )
    group.add_argument("--upscale_in", choices=("pixels", "latents"), help="what is enlarged")


def add_batch_options(parser: argparse.ArgumentParser, n_iter: int, n_samples: int) -> None:
    """Adds the options of batches and their number."""
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--n_iter", metavar="N", type=int, default=n_iter, help="how often to repeat everything"
    )
    group.add_argument(
        "--n_samples",
        metavar="N",
        type=int,
        default=n_samples,
        help="images per prompt and batch size; with --from-file the batch size only",
    )
    group.add_argument(
        "--images_per_prompt",
        metavar="N",
        type=int,
        help="images of each prompt, whatever the batch size (default: n_samples; with --from-file 1)",
    )
    group.add_argument(
        "--n_rows", metavar="N", type=int, default=0, help="images in a grid's row (0: n_samples)"
    )
    group.add_argument(
        "--keep_going",
        action="store_true",
        help="continue after an image that cannot be made; without it, the run stops there",
    )
    group.add_argument(
        "--on_oom",
        choices=("fail", "halve"),
        default="fail",
        help="when memory runs out: stop, or make the batch in halves (last bits differ, which is recorded)",
    )


def add_output_options(parser: argparse.ArgumentParser, outdir: str) -> None:
    """Adds the options of output files."""
    group = parser.add_argument_group("output")
    group.add_argument("--outdir", metavar="DIR", default=outdir, help="folder for samples and grids")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the latest run in this folder that has the same settings",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="with --resume: read the files, and regenerate damaged ones",
    )
    group.add_argument(
        "--gallery", action="store_true", help="write gallery.html, a page that shows the folder's images"
    )
    group.add_argument("--skip_grid", action="store_true", help="do not write a grid")
    group.add_argument("--skip_save", action="store_true", help="do not write single images")
    group.add_argument("--no_watermark", action="store_true", help="leave the invisible watermark out")
    group.add_argument(
        "--safety",
        choices=("auto", "on", "off"),
        default="auto",
        help="blank images that the safety checker flags. auto: if it is installed; on: required; off: never",
    )
    group.add_argument(
        "--safety_model", metavar="PATH", help="folder or weights file of the safety checker, as published"
    )


def add_telling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of reports that are printed instead of, or in addition to, generating images."""
    group = parser.add_argument_group("progress")
    group.add_argument("--dry_run", action="store_true", help="print what would be made, and make nothing")
    group.add_argument("--json", action="store_true", help="print progress events to stdout as JSON lines")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of logging."""
    group = parser.add_argument_group("report")
    group.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    group.add_argument("--debug", action="store_true", help="show tracebacks and details")
    add_version_option(group)


def add_version_option(parser: argparse._ActionsContainer) -> None:
    """Adds the option that prints the version of this toolkit and exits."""
    parser.add_argument("--version", action="version", version=f"ldm {__version__}", help="print the version")
