"""`ldm evaluate run`: makes the images of an evaluation, a run for each point of a sweep, and scores them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import cli, plots
from ldm.cli.commands.evaluate_plot import draw
from ldm.cli.commands.evaluate_score import add_measure_options, score, typed_command
from ldm.evaluation.presets import PRESETS, SOURCES
from ldm.util import need

if TYPE_CHECKING:
    from ldm.evaluation.prompts import Question

USUAL_COUNT = 400  # prompts of the bundled model's domain
_SCORING = ("metrics", "against", "network", "size")  # options of measures that the evaluation's folder keeps

_DESCRIPTION = (
    "Makes images of many prompts for every combination of settings, and measures each: \n"
    "FID against text-image score.\n\n"
    "Options after -- are txt2img.py's. The same command continues what was interrupted."
)
_EXAMPLES = (
    "python scripts/evaluate.py run --preset scenes",
    "python scripts/evaluate.py run --preset card --prompts captions_val2017.json --against val2017 "
    '--variant "v1-4: --ckpt sd-v1-4.ckpt" --variant "v1-5: --ckpt v1-5.ckpt" -- --devices 4',
    "python scripts/evaluate.py run --prompts prompts.txt --sweep steps=10,20,50 --sweep sampler=ddim,plms",
)


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "run [options] [-- TXT2IMG OPTIONS]", _EXAMPLES)
    add_run_options(options)
    group = options.add_argument_group("points")
    group.add_argument("--preset", choices=tuple(PRESETS), default="scenes",
                       help="card: the model cards' protocol; scenes, skills: the bundled model's")  # fmt: skip
    group.add_argument("--sweep", metavar="FIELD=VALUES", action="append", default=[],
                       help="a point for each value, such as scale=1.5,3,7.5; several: all combinations "
                       "(default: the preset's)")  # fmt: skip
    group.add_argument("--variant", metavar="NAME:OPTIONS", action="append", default=[],
                       help="a curve with these txt2img.py options, as in 'v1-5: --ckpt v1-5.ckpt'")  # fmt: skip
    add_measure_options(options)
    options.add_argument_group("steps of the command").add_argument(
        "--no_score", action="store_true", help="make the images only"
    )
    cli.add_report_options(options)
    return options


def add_run_options(options: argparse.ArgumentParser) -> None:
    """Adds the options of prompts and output, which `compare` has too."""
    group = options.add_argument_group("prompts")
    group.add_argument("--prompts", metavar="FILE",
                       help="COCO's captions_val2017.json, a list of prompts, GenEval's .jsonl, or of the bundled "
                       f"model's domain: {', '.join(SOURCES)}")  # fmt: skip
    group.add_argument("--count", metavar="N", type=int, help="prompts, drawn from the list by --subset_seed")
    group.add_argument("--subset_seed", metavar="N", type=int, default=0, help="of the draw of prompts")
    group = options.add_argument_group("output")
    group.add_argument(
        "--outdir", metavar="DIR", default="outputs/evaluation", help="folder of the evaluation"
    )


def run(opt: argparse.Namespace) -> int:
    """Makes the images, then scores them and draws the curve."""
    from ldm.evaluation.experiment import Variant, check_points, make_points, plan_points, set_up
    from ldm.evaluation.plots import makes_a_curve

    preset, folder = PRESETS[opt.preset], Path(opt.outdir)
    own = opt.prompts is None or not preset.prompts
    questions = chosen_questions(opt, opt.prompts or preset.prompts, preset.count if own else None)
    variants = [Variant.parse(text) for text in opt.variant] or [Variant("model")]
    points = plan_points(variants, opt.sweep or preset.sweep)
    scoring = {
        **preset.scoring,
        **{name: value for name in _SCORING if (value := getattr(opt, name)) is not None},
    }
    check, make = maker([*preset.options, *opt.passed, *(["--quiet"] if opt.quiet else [])])
    check_points(points, check)
    evaluation = set_up(folder, questions, points, typed_command(opt), scoring)
    code = make_points(folder, points, make)
    if code or opt.no_score:
        return code
    opt.questions = None
    results = score(opt, [folder], opt.outdir)
    if len(evaluation.points) > 1 and plots.available() and makes_a_curve(results):
        draw([folder], None)
    return 0


def chosen_questions(opt: argparse.Namespace, source: str, usual: int | None) -> list[Question]:
    """Returns the questions of a file or a source of the bundled model; `usual` is their number without --count."""
    from ldm.evaluation.prompts import read_questions, subset
    from ldm.evaluation.shapes import scene_questions, skill_questions

    count = usual if opt.count is None else opt.count
    need(source != "", "--preset card needs the prompts: give COCO's captions_val2017.json with --prompts")
    need(count is None or count >= 1, f"--count is {count}; give 1 or more")
    if source in SOURCES:
        make = scene_questions if source == "scenes" else skill_questions
        return make(count or USUAL_COUNT, opt.subset_seed)
    return subset(read_questions(Path(source)), count, opt.subset_seed)


def maker(base: Sequence[str]) -> tuple[Callable[[list[str]], None], Callable[[list[str]], int]]:
    """Returns functions that check txt2img.py's options, and make their images; `base` comes first.

    Models stay in memory.
    """
    from ldm.cli.commands.generate import txt2img_parser
    from ldm.cli.run import run as generate
    from ldm.cli.values import check_options, options_of
    from ldm.places import ROOT, is_checkout
    from ldm.runs.model_cache import ModelCache
    from ldm.runs.models import check_additions

    cache, parser = ModelCache(), txt2img_parser()
    script = [str(ROOT / "scripts/txt2img.py")] if is_checkout() else ["-m", "ldm", "txt2img"]

    def check(options: list[str]) -> None:
        opt = parser.parse_args([*base, *options])
        check_options(opt)
        check_additions(options_of(opt))

    def make(options: list[str]) -> int:
        words = [*base, *options]
        opt = parser.parse_args(words)
        opt.typed = [*script, *words]
        return generate(opt, cache)

    return check, make
