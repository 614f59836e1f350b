"""The options of the scripts, in groups. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm import __version__
from ldm.cli.fast import FAST
from ldm.cli.parser import Group, Options, Parser
from ldm.fields import CONTROL, DEFAULTS, FIELDS, MASK, SETTINGS, SIZE, START, Field
from ldm.prompts.dialects import FORMATS
from ldm.util import printable

# the defaults of options of a run that not every script has; the shared code reads all of them
_DEFAULTS: Mapping[str, Any] = {
    "laion400m": False,
    "keep_going": False,
    "on_oom": "fail",
    "indir": None,
    "inpaint": False,
    "devices": None,
    "num_nodes": None,
    "kept_input": None,  # the file that replaces standard input
    "typed": None,  # the arguments of the interpreter, if that started the script
    "images_per_prompt": None,
}
# hints that other programs make by networks
_BY_NETWORKS = re.compile("depth|midas|zoe|pose|line_?art|mlsd|normal|seg|hed|soft_?edge|pidi")
_SWEPT = [row.name for row in FIELDS if not row.of_run and row.name not in ("loras", "controls")]


def _defaults_of_fields() -> dict[str, Any]:
    """Returns the defaults of all options that set fields of a job, those of starting images included."""
    values: dict[str, Any] = {
        row.dest: None if row.unset else DEFAULTS[row.name] for row in FIELDS if row.option
    }
    switches = {switch.option: False for row in FIELDS for switch in row.switches}
    return values | switches | {"init_img": []}


def make_parser(description: str, usage: str = "[options]", examples: Sequence[str] = ()) -> Parser:
    """Creates a parser with grouped help; `usage` follows the script's name, `examples` are whole command lines."""
    parser = Parser(description, usage, examples)
    parser.set_defaults(**_defaults_of_fields(), **_DEFAULTS)
    return parser


def _group(parser: argparse.ArgumentParser, name: str, title: str = "", **own: Mapping[str, Any]) -> Group:
    """Adds the options of the fields in a group of the table; returns the group of the parser.

    `own` are arguments of `add_argument` that are the script's, by option.
    """
    group = parser.add_argument_group(title or name)
    for row in FIELDS:
        if row.group == name:
            _add_field(group, row, own.get(row.dest, {}))
    return group


def _add_field(group: Group, row: Field, own: Mapping[str, Any]) -> None:
    """Adds the option of a field, and its switches, of which one excludes the others."""
    setting = SETTINGS[row.name]
    if row.option:
        shape = {"choices": setting.choices} if setting.choices else {"metavar": row.metavar}
        usual = setting.kind if setting.kind in (int, float) else setting.spell if setting.choices else None
        kind = _KINDS.get(row.name, usual)
        if row.entry is not None:
            kind, own = _entry(row.entry), {"action": "append", **own}
        group.add_argument(f"--{row.option}", **{**shape, "type": kind, "help": row.help, **own})
    switches = group.add_mutually_exclusive_group() if len(row.switches) > 1 else group
    for switch in row.switches:
        switches.add_argument(f"--{switch.option}", action="store_true", help=switch.help)


def _seed(text: str) -> int:
    try:
        return -1 if text.strip().lower() == "random" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _entry(read: Callable[[str], tuple[Any, ...]]) -> Callable[[str], tuple[Any, ...]]:
    """Returns a reader of one entry of a list, whose refusals are messages."""

    def read_entry(text: str) -> tuple[Any, ...]:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{printable(text)[:100]!r}: {error}") from None

    return read_entry


def _numbers(name: str, form: str) -> Callable[[str], tuple[Any, ...]]:
    """Returns a reader of a field of several numbers, which have the form that a message names."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return SETTINGS[name].parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}") from None

    return read


def _hint(text: str) -> str:
    word = SETTINGS["hint"].spell(text)
    if _BY_NETWORKS.search(word):
        raise argparse.ArgumentTypeError(
            f"{text!r} is made by a network, which is not here; make that image with controlnet_aux or a web UI's "
            "preprocessor, and give it as the IMAGE of --control"
        )
    return word


# readers of options that accept more than the type of their field, or explain its form
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "seed": _seed,
    "hint": _hint,
    "sigmas": _numbers("sigmas", "a list of numbers such as 14.6,3.2,0"),
    "timesteps": _numbers("timesteps", "a list of numbers such as 999,759,499,259"),
    "init.outpaint": _numbers("init.outpaint", "four whole numbers such as 0,0,64,0"),
    "cache_steps": _numbers("cache_steps", "a number of steps such as 3, or with a branch, such as 3,1"),
    "guidance_interval": _numbers("guidance_interval", "two numbers such as 0.1,0.7"),
}


def add_prompt_options(parser: argparse.ArgumentParser, prompt: str) -> None:
    """Adds the options of the prompt."""
    parser.set_defaults(default_prompt=prompt)
    group = _group(parser, "prompt", prompt={"default": prompt})
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


def add_sampling_options(parser: argparse.ArgumentParser, scale: float) -> None:
    """Adds the options of sampling."""
    group = _group(parser, "sampling", scale={"default": scale})
    group.add_argument(
        "--fast",
        choices=tuple(FAST),
        default="exact",
        help="settings that take less time: exact changes nothing, balanced loses details, draft more of them",
    )
    group.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")


def add_size_options(parser: argparse.ArgumentParser, own: str = "the model's own size") -> None:
    """Adds the options of size; `own` describes the default in words."""
    sides: dict[str, Any] = {
        row.dest: {"help": f"{row.help} (default: {own})"} for row in FIELDS if row.name in SIZE
    }
    group = _group(parser, "size", **sides)
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
    image = {"nargs": "+", "required": required}
    _group(parser, START, "image to start from", init_img=image, strength={"default": strength})


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of masks."""
    parser.set_defaults(inpaint=True)
    _group(parser, MASK).add_argument(
        "--indir", metavar="DIR", help="a folder of images NAME.png with their masks NAME_mask.png"
    )


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of control networks and their hints."""
    _group(parser, CONTROL).add_argument(
        "--save_hints",
        action="store_true",
        help="write the hints, as the networks see them, into the folder hints",
    )


def add_upscale_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the second pass at a larger size."""
    _group(parser, "upscaling")


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
    group.add_argument(
        "--preview",
        metavar="N",
        type=int,
        default=0,
        help="every N steps, replace the file previews/NUMBER.png: a small image of what it will be",
    )
    group.add_argument(
        "--preview_vae",
        metavar="PATH",
        help="decode previews with this TAESD, each for a tenth of a step of v1 (default: a linear map, for nothing)",
    )
    group.add_argument(
        "--animate",
        choices=("webp", "gif"),
        help="write how each image was made, in the steps of --preview (default: all): previews/NUMBER.webp, .gif",
    )
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


def add_version_option(parser: Options) -> None:
    """Adds the option that prints the version of this toolkit and exits."""
    parser.add_argument("--version", action="version", version=f"ldm {__version__}", help="print the version")
