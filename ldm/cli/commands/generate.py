"""`ldm txt2img`, `ldm img2img` and `ldm inpaint`: one run, with different options and defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm import cli

_TXT2IMG = (
    'python scripts/txt2img.py --prompt "a red cube on top of a blue sphere" --plms',
    'python scripts/txt2img.py --ckpt sd-v1-4.ckpt --prompt "an astronaut riding a horse" --steps 25 --seed 7',
    "python scripts/txt2img.py --from-file prompts.txt --n_samples 4 --outdir outputs/tonight --resume",
)
_IMG2IMG = (
    'python scripts/img2img.py --init-img sketch.png --prompt "a blue sphere left of a red cone"',
    'python scripts/img2img.py --init-img photo.jpg --W 512 --H 512 --strength 0.5 --prompt "an oil painting"',
    'python scripts/img2img.py --init-img folder/ --n_samples 1 --prompt "a watercolour" --dry_run',
)
_INPAINT = (
    'python scripts/inpaint.py --init-img scene.png --mask mask.png --prompt "a red sphere"',
    'python scripts/inpaint.py --init-img scene.png --outpaint 0,0,64,0 --prompt "a wide landscape"',
    'python scripts/inpaint.py --indir pairs/ --ckpt sd-v1-5-inpainting.ckpt --prompt "an empty street"',
)


def txt2img_parser() -> argparse.ArgumentParser:
    """Returns the options of `ldm txt2img`."""
    options = cli.make_parser("Generates images from text.", "--prompt TEXT [options]", _TXT2IMG)
    cli.add_prompt_options(options, prompt="a painting of a virus monster playing guitar")
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options)
    cli.add_upscale_options(options)
    cli.add_control_options(options)
    cli.add_batch_options(options, n_iter=2, n_samples=3)
    _add_run_options(options, outdir="outputs/txt2img-samples", laion=True)
    return options


def img2img_parser() -> argparse.ArgumentParser:
    """Returns the options of `ldm img2img`."""
    usage = "--init-img FILE --prompt TEXT [options]"
    options = cli.make_parser("Generates images from images and text.", usage, _IMG2IMG)
    cli.add_prompt_options(options, prompt="a painting of a virus monster playing guitar")
    cli.add_image_options(options, strength=0.75, required=True)
    cli.add_sampling_options(options, scale=5.0)
    cli.add_size_options(options, own="the image's own size")
    cli.add_upscale_options(options)
    cli.add_control_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=2)
    _add_run_options(options, outdir="outputs/img2img-samples")
    return options


def inpaint_parser() -> argparse.ArgumentParser:
    """Returns the options of `ldm inpaint`."""
    usage = "--init-img FILE --mask FILE --prompt TEXT [options]"
    options = cli.make_parser("Repaints a part of an image, or extends it.", usage, _INPAINT)
    cli.add_prompt_options(options, prompt="")
    cli.add_image_options(options, strength=1.0, required=False)
    cli.add_mask_options(options)
    cli.add_sampling_options(options, scale=7.5)
    cli.add_size_options(options, own="the image's own size")
    cli.add_control_options(options)
    cli.add_batch_options(options, n_iter=1, n_samples=1)
    _add_run_options(options, outdir="outputs/inpaint-samples")
    return options


def _add_run_options(options: argparse.ArgumentParser, outdir: str, laion: bool = False) -> None:
    cli.add_output_options(options, outdir=outdir)
    cli.add_model_options(options)
    cli.add_rank_options(options)
    if laion:
        cli.add_laion_option(options)
    cli.add_telling_options(options)
    cli.add_report_options(options)


def _run(opt: argparse.Namespace) -> int:
    from ldm.cli.run import run  # late: --help needs nothing of it

    return run(opt)


def txt2img(argv: Sequence[str] | None = None) -> int:
    """Runs `ldm txt2img` with these arguments, or those of the process; returns its exit code."""
    return cli.main(txt2img_parser(), _run, argv)


def img2img(argv: Sequence[str] | None = None) -> int:
    """Runs `ldm img2img` with these arguments, or those of the process; returns its exit code."""
    return cli.main(img2img_parser(), _run, argv)


def inpaint(argv: Sequence[str] | None = None) -> int:
    """Runs `ldm inpaint` with these arguments, or those of the process; returns its exit code."""
    return cli.main(inpaint_parser(), _run, argv)
