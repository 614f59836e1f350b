"""`ldm evaluate score`: measures images of folders and runs; `plot` draws the curve."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.util import need, printable

if TYPE_CHECKING:
    from ldm.evaluation.results import Result
    from ldm.evaluation.score import Scorer

_DESCRIPTION = (
    "Measures images: an evaluation, or folders of images and runs, against references and their prompts.\n\n"
    "Nothing is downloaded; `ldm where` lists the files of the networks."
)
_EXAMPLES = (
    "python scripts/evaluate.py score outputs/evaluation",
    "python scripts/evaluate.py score outputs/txt2img-samples --against val2017 --size 512 --metrics fid,kid,clip",
    "python scripts/evaluate.py score after/ --against before/ --metrics psnr,ssim",
)
_PATHS = ("inception", "clip", "dinov2", "lpips", "aesthetic", "detector", "shapes")


_METRICS = (
    "some of fid, kid, precision, recall, fd_dinov2, clip, aesthetic, answers, skills, psnr, ssim, lpips "
    "(default: the preset's, or fid)"
)
_NETWORK = "features of fid, kid, precision and recall: inception, dinov2, clip, shapes (default: inception)"
_RESIZE = "clean, tensorflow, pytorch, pillow (default: the network's own; clean for inception)"


def parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    options = cli.make_parser(_DESCRIPTION, "score PATH [PATH ...] [options]", _EXAMPLES)
    options.add_argument(
        "paths", metavar="PATH", nargs="+", help="an evaluation, a run, or a folder of images"
    )
    add_measure_options(options)
    group = options.add_argument_group("output")
    group.add_argument(
        "--outdir",
        metavar="DIR",
        help="folder of the results (default: the first PATH if an evaluation's, else here)",
    )
    group.add_argument("--save_statistics", metavar="FILE", help="write the references' mu and sigma as .npz")
    cli.add_report_options(options)
    return options


def add_measure_options(options: argparse.ArgumentParser) -> None:
    """Adds the options of measures, which `run` and `compare` have too."""
    group = options.add_argument_group("measures")
    group.add_argument("--metrics", metavar="NAMES", help=_METRICS)
    group.add_argument(
        "--against", metavar="PATH", help="references: a folder, .npz statistics, or scenes:2000 (rendered)"
    )
    group.add_argument("--network", metavar="NAME", help=_NETWORK)
    group.add_argument("--resize", metavar="MODE", help=_RESIZE)
    group.add_argument("--size", metavar="N", type=int, help="cut all images to squares of N pixels first")
    group.add_argument(
        "--questions", metavar="FILE", help="the images' prompts, in their order; or GenEval's .jsonl"
    )
    group.add_argument(
        "--few", action="store_true", help="a Fréchet distance of fewer images than 2 for each feature"
    )
    group.add_argument("--mixed", action="store_true", help="take images of several settings as one set")
    group.add_argument(
        "--resamples",
        metavar="N",
        type=int,
        default=100,
        help="of the bootstrap; 0: distances without intervals",
    )
    group.add_argument("--no_cache", action="store_true", help="keep no features in the cache folder")
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group = options.add_argument_group("files of networks")
    for name in _PATHS:
        group.add_argument(f"--{name}", metavar="PATH", help=f"file or folder of {name}")


def run(opt: argparse.Namespace) -> int:
    """Measures every path and writes the results."""
    results = score(opt, [Path(path) for path in opt.paths], opt.outdir)
    need(bool(results), "nothing was measured")
    return 0


def score(opt: argparse.Namespace, paths: Sequence[Path], outdir: str | None) -> list[Result]:
    """Measures the sets of images at the paths, writes and prints the results."""
    from ldm.evaluation.experiment import DESCRIPTION, read_evaluation
    from ldm.evaluation.features import FeatureCache
    from ldm.evaluation.results import MARKDOWN, as_markdown, versions, write_results
    from ldm.evaluation.score import Scorer

    of_evaluation = (paths[0] / DESCRIPTION).exists()
    usual: Mapping[str, Any] = read_evaluation(paths[0]).scoring if of_evaluation else {}
    scorer = Scorer(request_of(opt, usual), None if opt.no_cache else FeatureCache())
    found = [result for path in paths for result in _measured(scorer, path, opt.questions)]
    command, used = typed_command(opt), versions()
    found = [replace(result, command=command, versions=used) for result in found]
    folder = Path(outdir) if outdir else paths[0] if of_evaluation else Path()
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, found)
    if getattr(opt, "save_statistics", None):
        _save(scorer, Path(opt.save_statistics))
    print(as_markdown(found), end="")
    print(f"\n{printable(folder / MARKDOWN)} and the same as .csv and .jsonl")
    return found


def _measured(scorer: Scorer, path: Path, questions: str | None) -> list[Result]:
    from ldm.evaluation.experiment import DESCRIPTION, questions_of, read_evaluation
    from ldm.evaluation.images import folder_set
    from ldm.evaluation.prompts import read_questions
    from ldm.evaluation.score import check_whole

    given = read_questions(Path(questions)) if questions else None
    if not (path / DESCRIPTION).exists():
        return scorer(folder_set(path), given)
    asked = given or questions_of(path)
    sets = [(point, folder_set(path / point.folder)) for point in read_evaluation(path).points]
    for _, images in sets:  # before anything is measured
        check_whole(images, asked)
    return [
        replace(result, variant=point.variant, settings=dict(point.settings))
        for point, images in sets
        for result in scorer(images, asked)
    ]


def request_of(opt: argparse.Namespace, usual: dict[str, Any] | Any) -> Any:
    """Returns the measures that are asked for; `usual` are those of a preset."""
    from ldm.evaluation.score import Request
    from ldm.runtime.device import resolve_device

    def chosen(name: str, default: Any = None) -> Any:
        typed = getattr(opt, name)
        return usual.get(name, default) if typed is None else typed

    need(opt.resamples >= 0, f"--resamples is {opt.resamples}; give 0 or more")
    return Request(
        metrics=tuple(name.strip() for name in chosen("metrics", "fid").split(",")),
        network=chosen("network", "inception"), against=chosen("against"), resize=opt.resize, size=chosen("size"),
        paths={name: path for name in _PATHS if (path := getattr(opt, name))}, device=str(resolve_device(opt.device)),
        few=opt.few, mixed=opt.mixed, resamples=opt.resamples,
    )  # fmt: skip


def typed_command(opt: argparse.Namespace) -> str:
    """Returns the command as it was typed, for results."""
    return shlex.join(["python", *(sys.argv if opt.typed is None else opt.typed)])


def _save(scorer: Scorer, path: Path) -> None:
    from ldm.evaluation.statistics import write_statistics

    write_statistics(path, scorer.reference(scorer.request.network)[1])
