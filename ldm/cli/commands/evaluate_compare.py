"""`ldm evaluate compare`: how two checkpoints, precisions or sets of options differ on the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.cli.commands.evaluate_run import add_run_options, chosen_questions, maker
from ldm.cli.commands.evaluate_score import add_measure_options, request_of, typed_command
from ldm.evaluation.presets import PRESETS
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.evaluation.images import ImageSet
    from ldm.evaluation.prompts import Question

_DESCRIPTION = (
    "Compares two sets of images of the same prompts and seeds: folders, or txt2img's options as 'NAME: OPTIONS'.\n\n"
    "Options after -- are txt2img.py's, for both."
)
_EXAMPLES = (
    'python scripts/evaluate.py compare "float32: --precision full" "bf16: --precision bf16"',
    'python scripts/evaluate.py compare "v1-4: --ckpt v1-4.ckpt" "v1-5: --ckpt v1-5.ckpt" --prompts prompts.txt',
    "python scripts/evaluate.py compare outputs/a outputs/b",
)
PAIRS = 40  # by default, of the bundled model's prompts


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "compare A B [options] [-- TXT2IMG OPTIONS]", _EXAMPLES)
    for name, which in (("first", "A"), ("second", "B")):
        options.add_argument(name, metavar=which, help='a folder of images, or "NAME: OPTIONS"')
    add_run_options(options)
    options.set_defaults(outdir="outputs/comparison")
    add_measure_options(options)
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Makes the images that do not exist, compares them, and writes figures and a sheet of pairs."""
    from ldm.evaluation.compare import compare_sets, write_sheet
    from ldm.evaluation.features import FeatureCache
    from ldm.evaluation.prompts import read_questions
    from ldm.evaluation.results import MARKDOWN, as_markdown, versions, write_results
    from ldm.evaluation.score import Scorer

    folder = Path(opt.outdir)
    if Path(opt.first).is_dir() and Path(opt.second).is_dir():
        questions = read_questions(Path(opt.questions)) if opt.questions else None
        first, second = (_of_folder(Path(name)) for name in (opt.first, opt.second))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        code, questions = _make(opt, folder)
        if code:
            return code
        first, second = (_of_folder(folder / name, name) for name in _names(opt))
    scorer = Scorer(request_of(opt, _usual(questions)), None if opt.no_cache else FeatureCache())
    found, psnrs = compare_sets(first, second, scorer, questions)
    found = [replace(result, command=typed_command(opt), versions=versions()) for result in found]
    write_results(folder, found)
    write_sheet(folder / "pairs.png", first, second, psnrs, questions or [])
    print(as_markdown(found), end="")
    print(f"\n{printable(folder / MARKDOWN)}, {printable(folder / 'pairs.png')}")
    return 0


def _names(opt: argparse.Namespace) -> list[str]:
    from ldm.evaluation.experiment import Variant

    return [Variant.parse(text).name for text in (opt.first, opt.second)]


def _make(opt: argparse.Namespace, folder: Path) -> tuple[int, list[Question]]:
    """Makes the images of both sets of options; returns the exit code and the prompts."""
    from ldm.evaluation.experiment import Variant, check_points, make_points, plan_points, set_up

    need(
        not any(Path(text).is_dir() for text in (opt.first, opt.second)),
        f"{printable(opt.first)[:80]} and {printable(opt.second)[:80]}: give two folders, or two sets of options",
    )
    preset = PRESETS["scenes"]
    questions = chosen_questions(opt, opt.prompts or preset.prompts, None if opt.prompts else PAIRS)
    points = plan_points([Variant.parse(text) for text in (opt.first, opt.second)], [])
    base = [*(() if opt.prompts else preset.options), *opt.passed, *(["--quiet"] if opt.quiet else [])]
    check, make = maker(base)
    check_points(points, check)
    set_up(folder, questions, points, typed_command(opt), {})
    return make_points(folder, points, make), questions


def _of_folder(folder: Path, name: str = "") -> ImageSet:
    from ldm.evaluation.images import folder_set

    images = folder_set(folder)
    return replace(images, name=name) if name else images


def _usual(questions: list[Question] | None) -> Mapping[str, Any]:
    """Returns the metrics without --metrics: of pairs, and those of images whose networks are here."""
    from ldm.evaluation.weights import NETWORKS

    metrics = ["psnr", "ssim", *(name for name in ("lpips", "clip") if NETWORKS[name].exists())]
    if questions and all(question.scene for question in questions):
        metrics.append("answers")
    return {"metrics": ",".join(metrics), "network": "shapes"}
