#!/usr/bin/env python
"""Measures the bundled model: draws captioned scenes and lets an independent reader say what it sees."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ldm  # noqa: F401  (this toolkit's own, whatever else is installed)

sys.path.pop(0)  # its parts are found through it from here on; the folder itself may be the user's


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", default="configs/shapes/shapes-inference.yaml")
    options.add_argument("--ckpt", default="models/ldm/shapes/model.ckpt")
    options.add_argument("--judge", type=Path, default=Path("models/ldm/shapes/judge.pt"), help="the reader")
    options.add_argument("--count", type=int, default=400, help="pictures, half of them of held-out pairs")
    options.add_argument("--batch", type=int, default=20)
    options.add_argument("--sampler", default="plms")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--scale", type=float, default=7.5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="auto", help="as in txt2img.py")
    options.add_argument("--size", type=int, default=128)
    options.add_argument("--plain", action="store_true", help="canonical captions instead of free wordings")
    options.add_argument("--sheet", type=Path, help="write all pictures into this image")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    from ldm.util import InputError

    options = parser().parse_args(argv)
    try:
        if options.count < 2:
            raise InputError(f"--count {options.count} is too few: 2 or more, half of each kind")
        evaluate(options)
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Draws the pictures, has them read, and prints the shares of what is right."""
    import numpy as np

    from ldm.config import read_config
    from ldm.data.captions import UNORDERED, caption, plain_caption
    from ldm.data.scenes import scene_at
    from ldm.job import Job
    from ldm.pipeline import Pipeline, load_model
    from ldm.runtime.device import resolve_device, resolve_precision
    from ldm.training.quality import judge, load_reader, score

    half = options.count // 2
    splits = ["fresh"] * (options.count - half) + ["heldout"] * half
    scenes = [scene_at(i, split) for i, split in enumerate(splits)]
    rng = np.random.default_rng(options.seed)
    prompts = [plain_caption(scene) if options.plain else caption(scene, rng) for scene in scenes]
    jobs = [
        Job(prompt, seed=options.seed + i, width=options.size, height=options.size, steps=options.steps,
            sampler=options.sampler, scale=options.scale)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    device = resolve_device(options.device)
    model = load_model(read_config(options.config), options.ckpt, device)
    pipeline = Pipeline(model, resolve_precision("autocast", device))
    blank = np.zeros((options.size, options.size, 3), np.uint8)
    pictures = []
    for batch in chunks(jobs, options.batch):
        pictures += [blank if made.pixels is None else made.pixels for made in pipeline.make(batch)]
        print(f"\r{len(pictures)} of {len(jobs)} drawn", end="", file=sys.stderr, flush=True)
    images = np.stack(pictures)
    verdicts = judge(load_reader(options.judge), images)
    free = [re.search(rf"\b({'|'.join(UNORDERED)})\b", prompt) is not None for prompt in prompts]
    marks = [
        score(verdict, scene, ordered=not any_order)
        for verdict, scene, any_order in zip(verdicts, scenes, free, strict=True)
    ]
    print(file=sys.stderr)
    for split in ("fresh", "heldout"):
        chosen = [mark for mark, of in zip(marks, splits, strict=True) if of == split]
        shares = {name: sum(mark[name] for mark in chosen) / len(chosen) for name in chosen[0]}
        print(f"{split:8s} n={len(chosen)}  " + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    if options.sheet:
        save_sheet(images, options.sheet)


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
