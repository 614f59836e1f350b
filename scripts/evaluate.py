#!/usr/bin/env python
"""Measures the bundled model: draws captioned scenes and lets an independent reader say what it sees."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ldm import cli  # this toolkit's own, whatever else is installed
from ldm.checkpoints.configs import BUNDLED_CKPT, BUNDLED_CONFIG
from ldm.cli.inputs import check_there, need
from ldm.fields import SETTINGS, count_up
from ldm.places import find
from ldm.prompts.lines import MAX_COUNT
from ldm.util import InputError, printable

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's


logger = logging.getLogger("ldm")

EXAMPLES = (
    "python scripts/evaluate.py --count 40",
    "python scripts/evaluate.py --sampler dpm_solver --steps 10 --sheet sheet.png",
    "python scripts/evaluate.py --ckpt logs/mine/model.ckpt --seed 1000",
)


def parser() -> argparse.ArgumentParser:
    options = cli.make_parser(__doc__ or "", "[options]", EXAMPLES)
    group = options.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", default=BUNDLED_CONFIG, help="model config")
    group.add_argument("--ckpt", metavar="FILE", default=BUNDLED_CKPT, help="the checkpoint that is measured")
    group.add_argument(
        "--judge", metavar="FILE", default="models/ldm/shapes/judge.pt", help="the network that reads images"
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group = options.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SETTINGS["sampler"].choices, default="plms", help="the sampler")
    group.add_argument("--steps", metavar="N", type=int, default=50, help="denoising steps, 1 to 999")
    group.add_argument(
        "--scale", metavar="X", type=float, default=7.5, help="guidance scale; 1 turns guidance off"
    )
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the first image and its caption"
    )
    group.add_argument("--size", metavar="N", type=int, default=128, help="width and height in pixels")
    group = options.add_argument_group("images")
    group.add_argument(
        "--count", metavar="N", type=int, default=400, help="images, half of them of held-out pairs"
    )
    group.add_argument("--batch", metavar="N", type=int, default=20, help="images at a time")
    group.add_argument("--plain", action="store_true", help="canonical captions instead of free wordings")
    group.add_argument("--sheet", metavar="FILE", help="write all images into this one")
    cli.add_report_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parser(), evaluate, argv)


def check(opt: argparse.Namespace) -> None:
    """That numbers are in range and files can be read or written, else an `InputError`."""
    for name, field in (("steps", "steps"), ("scale", "scale"), ("seed", "seed"), ("size", "width")):
        try:
            SETTINGS[field].check(getattr(opt, name))
        except ValueError as error:
            raise InputError(f"--{name} {error}") from None
    need(
        2 <= opt.count <= MAX_COUNT,
        f"--count is {opt.count}; give 2 to {MAX_COUNT}, half for each kind of pair",
    )
    need(1 <= opt.batch <= MAX_COUNT, f"--batch is {opt.batch}; give 1 to {MAX_COUNT}")
    for name in ("config", "ckpt", "judge"):
        check_there(find(getattr(opt, name)), f"give another with --{name}")
    if opt.sheet is not None:
        from PIL import Image

        sheet = Path(opt.sheet)
        known = Image.registered_extensions()
        need(
            known.get(sheet.suffix.lower()) in Image.SAVE, f"--sheet {printable(sheet)}: end its name in .png"
        )
        check_there(sheet.absolute().parent, "give --sheet in a folder that exists")
        need(
            os.access(sheet.absolute().parent, os.W_OK),
            f"--sheet {printable(sheet)}: its folder is read-only",
        )


def evaluate(opt: argparse.Namespace) -> int:
    """Draws the images, has them read, and prints the shares of what is right."""
    check(opt)
    import numpy as np

    from ldm.config import read_config
    from ldm.data.captions import UNORDERED, caption, plain_caption
    from ldm.data.scenes import scene_at
    from ldm.job import Job
    from ldm.pipeline import Pipeline, load_model
    from ldm.runtime.device import resolve_device, resolve_precision
    from ldm.training.quality import judge, load_reader, score

    device, reader = resolve_device(opt.device), load_reader(find(opt.judge))
    model = load_model(read_config(opt.config), find(opt.ckpt), device)
    half = opt.count // 2
    splits = ["fresh"] * (opt.count - half) + ["heldout"] * half
    scenes = [scene_at(i, split) for i, split in enumerate(splits)]
    rng = np.random.default_rng(opt.seed)
    prompts = [plain_caption(scene) if opt.plain else caption(scene, rng) for scene in scenes]
    jobs = [
        Job(prompt, seed=count_up(opt.seed, i, "philox"), width=opt.size, height=opt.size, steps=opt.steps,
            sampler=opt.sampler, scale=opt.scale, rng="philox")
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    pipeline = Pipeline(model, resolve_precision("autocast", device))
    blank = np.zeros((opt.size, opt.size, 3), np.uint8)
    pictures = []
    for batch in chunks(jobs, opt.batch):
        pictures += [blank if made.pixels is None else made.pixels for made in pipeline.make(batch)]
        logger.info("%d of %d images drawn", len(pictures), len(jobs))
    images = np.stack(pictures)
    verdicts = judge(reader, images)
    free = [re.search(rf"\b({'|'.join(UNORDERED)})\b", prompt) is not None for prompt in prompts]
    marks = [
        score(verdict, scene, ordered=not any_order)
        for verdict, scene, any_order in zip(verdicts, scenes, free, strict=True)
    ]
    for split in ("fresh", "heldout"):
        chosen = [mark for mark, of in zip(marks, splits, strict=True) if of == split]
        shares = {name: sum(mark[name] for mark in chosen) / len(chosen) for name in chosen[0]}
        print(f"{split:8s} n={len(chosen)}  " + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    if opt.sheet is not None:
        save_sheet(images, Path(opt.sheet))
    return 0


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items in runs of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


def save_sheet(images, path: Path, columns: int = 8) -> None:
    """The pictures in rows of `columns`, in the order of the prompts; an incomplete last row is left out."""
    import numpy as np
    from PIL import Image

    columns = min(columns, len(images))
    rows = [np.concatenate(list(row), axis=1) for row in chunks(images, columns) if len(row) == columns]
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    sys.exit(main())
