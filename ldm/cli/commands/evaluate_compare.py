"""`ldm evaluate compare`: how two checkpoints, precisions or sets of options differ on the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli, plots
from ldm.cli.commands.evaluate_run import add_run_options, chosen_questions, maker
from ldm.cli.commands.evaluate_score import add_measure_options, request_of, typed_command
from ldm.evaluation.presets import PRESETS
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.evaluation.images import ImageSet
    from ldm.evaluation.prompts import Question
    from ldm.evaluation.results import Result

_DESCRIPTION = (
    "Compares sets of images of the same prompts and seeds, each with the first: folders, or txt2img's options as "
    "'NAME: OPTIONS', which are timed.\n\nOptions after -- are txt2img.py's, for all."
)
_EXAMPLES = (
    'python scripts/evaluate.py compare "float32: --precision full" "bf16: --precision bf16"',
    'python scripts/evaluate.py compare "v1-4: --ckpt v1-4.ckpt" "v1-5: --ckpt v1-5.ckpt" --prompts prompts.txt',
    'python scripts/evaluate.py compare "exact: --steps 25" "every 2nd: --steps 25 --cache_steps 2" '
    '"every 3rd: --steps 25 --cache_steps 3"',
    "python scripts/evaluate.py compare outputs/a outputs/b",
)
PAIRS = 40  # by default, of the bundled model's prompts


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "compare A B [C ...] [options] [-- TXT2IMG OPTIONS]", _EXAMPLES)
    options.add_argument("first", metavar="A", help='a folder of images, or "NAME: OPTIONS"')
    options.add_argument("others", metavar="B", nargs="+", help="others, of the same kind")
    add_run_options(options)
    options.set_defaults(outdir="outputs/comparison")
    add_measure_options(options)
    cli.add_report_options(options)
    return options


def run(opt: argparse.Namespace) -> int:
    """Makes the images that do not exist, compares them, and writes figures, a sheet of pairs, and a plot."""
    from ldm.evaluation.compare import compare_sets, times, write_sheet
    from ldm.evaluation.experiment import seconds_of
    from ldm.evaluation.features import FeatureCache
    from ldm.evaluation.prompts import read_questions
    from ldm.evaluation.results import MARKDOWN, as_markdown, versions, write_results
    from ldm.evaluation.score import Scorer

    folder, asked = Path(opt.outdir), [opt.first, *opt.others]
    if all(Path(name).is_dir() for name in asked):
        questions = read_questions(Path(opt.questions)) if opt.questions else None
        first, *others = (_of_folder(Path(name)) for name in asked)
        seconds: dict[str, float | None] = {}
        folder.mkdir(parents=True, exist_ok=True)
    else:
        code, questions = _make(opt, folder)
        if code:
            return code
        first, *others = (_of_folder(folder / name, name) for name in _names(asked))
        seconds = {images.name: seconds_of(folder / images.name) for images in (first, *others)}
    scorer = Scorer(request_of(opt, _usual(questions)), None if opt.no_cache else FeatureCache())
    found: list[Result] = []
    sheets = [folder / (f"pairs-{other.name}.png" if len(others) > 1 else "pairs.png") for other in others]
    for other, sheet in zip(others, sheets, strict=True):
        results, psnrs = compare_sets(first, other, scorer, questions)
        found += results
        taken = seconds.get(first.name), seconds.get(other.name)
        if taken[0] and taken[1]:
            found += times((first.name, taken[0]), (other.name, taken[1]), len(first))
        write_sheet(sheet, first, other, psnrs, questions or [])
    found = [replace(result, command=typed_command(opt), versions=versions()) for result in found]
    unique = list({result.key: result for result in found}.values())
    write_results(folder, unique)
    print(as_markdown(unique), end="")
    print(f"\n{', '.join(printable(path) for path in (folder / MARKDOWN, *sheets))}")
    if len(others) > 1 and all(seconds.get(images.name) for images in (first, *others)):
        _tell_front(unique, first.name, [other.name for other in others], folder)
    return 0


def _tell_front(results: list[Result], first: str, others: list[str], folder: Path) -> None:
    """Prints which settings no other one beats in time and quality, and draws them if matplotlib is here."""
    from ldm.evaluation.front import front, plot_front, qualities

    measured = qualities(results, first, others)
    for metric, sets in measured.items():
        names, points = list(sets), list(sets.values())
        print(f"quality ({metric}) over time: {', '.join(printable(names[i]) for i in front(points))}")
    if plots.available():
        plot_front(measured, folder / "front.png")
        print(printable(folder / "front.png"))


def _names(asked: Sequence[str]) -> list[str]:
    from ldm.evaluation.experiment import Variant

    return [Variant.parse(text).name for text in asked]


def _make(opt: argparse.Namespace, folder: Path) -> tuple[int, list[Question]]:
    """Makes the images of sets of options; returns the exit code and the prompts."""
    from ldm.evaluation.experiment import Variant, check_points, make_points, plan_points, set_up

    asked = [opt.first, *opt.others]
    shown = " and ".join(printable(text)[:80] for text in asked)
    need(
        not any(Path(text).is_dir() for text in asked),
        f"{shown}: give folders alone, or sets of options alone",
    )
    preset = PRESETS["scenes"]
    questions = chosen_questions(opt, opt.prompts or preset.prompts, None if opt.prompts else PAIRS)
    points = plan_points([Variant.parse(text) for text in asked], [])
    base = [*(() if opt.prompts else preset.options), *opt.passed, *(["--quiet"] if opt.quiet else [])]
    check, make = maker(base)
    check_points(points, check)
    set_up(folder, questions, points, typed_command(opt), {})
    return make_points(folder, points, make, timed=True), questions


def _of_folder(folder: Path, name: str = "") -> ImageSet:
    from ldm.evaluation.images import folder_set

    images = folder_set(folder)
    return replace(images, name=name) if name else images


def _usual(questions: list[Question] | None) -> Mapping[str, Any]:
    """Returns the metrics without --metrics: of pairs, and those of images whose networks are here."""
    from ldm.evaluation.weights import NETWORKS

    metrics = ["psnr", "ssim", *(name for name in ("lpips", "clip") if NETWORKS[name].exists())]
    if questions and all(question.scene for question in questions):
        metrics += ["answers", "right"]
    return {"metrics": ",".join(metrics), "network": "shapes"}
