"""The options of a run as typed values, independent of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.job import Init, Job

COMPARED = {
    "compared": True
}  # marks the fields that --resume compares: the pixels or the files depend on them


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is made: everything that it depends on besides its jobs. The fields have the names of the options.

    `lora` holds files with their weights on the U-Net and on the text encoder, `embedding` files with the word that
    names them (None: the name of the file). `channels` and `factor` are the values of --C and --f, which the model
    must have. `preview` counts steps (0: no previews). `cache_weights` is a folder, "" for the user's cache folder,
    None for no cache.
    """

    # pixels or files depend on these; run files have them in this order
    n_samples: int = field(default=1, metadata=COMPARED)
    fixed_code: bool = field(default=False, metadata=COMPARED)
    ema: Literal["auto", "on", "off"] = field(default="auto", metadata=COMPARED)
    tiles: Literal["auto", "on", "off"] = field(default="auto", metadata=COMPARED)
    no_watermark: bool = field(default=False, metadata=COMPARED)
    safety: Literal["auto", "on", "off"] = field(default="auto", metadata=COMPARED)
    skip_grid: bool = field(default=False, metadata=COMPARED)
    inpaint: bool = field(default=False, metadata=COMPARED)
    compile: bool = field(default=False, metadata=COMPARED)
    prediction: Literal["auto", "eps", "v"] = field(default="auto", metadata=COMPARED)

    outdir: str
    resume: bool = False
    verify: bool = False
    gallery: bool = False
    skip_save: bool = False
    preview: int = 0
    preview_vae: str | None = None
    animate: Literal["webp", "gif"] | None = None
    save_hints: bool = False
    safety_model: str | None = None

    n_iter: int = 1
    images_per_prompt: int | None = None
    n_rows: int = 0
    keep_going: bool = False
    on_oom: Literal["fail", "halve"] = "fail"

    ckpt: str | None = None
    config: str | None = None
    laion400m: bool = False
    allow_targets: tuple[str, ...] = ()
    vae: str | None = None
    text_encoder: str | None = None
    upscaler: str | None = None
    channels: int = 4
    factor: int = 8
    lora: tuple[tuple[str, float, float], ...] = ()
    lora_dir: str | None = None
    embedding: tuple[tuple[str, str | None], ...] = ()
    embedding_dir: str | None = None

    device: str = "auto"
    precision: Literal["full", "autocast", "bf16", "fp16", "int8"] = "autocast"
    lowmem: bool = False
    no_mmap: bool = False
    cache_weights: str | None = None
    devices: int | None = None
    num_nodes: int | None = None

    quiet: bool = False
    debug: bool = False
    json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The images that are requested: the job that all are based on, and the source of prompts and starting images.

    `job` has the values of the options; a width or height of 0 is the model's default. `start` sets how each of
    `images` (files and folders), or of the pairs of image and mask in `folder`, is fitted to the canvas; its `image`
    is empty. `from_file` is a list of prompts in `prompt_format` ("-" for standard input) and replaces the job's
    prompt; `given` is its content where it has been read, from its line `first_line` on. With `expand` {a|b} in
    prompts is expanded. `sweep` holds texts such as "scale=1,2".
    """

    job: Job = field(default_factory=lambda: Job(""))
    start: Init = field(default_factory=lambda: Init(""))
    images: tuple[str, ...] = ()
    folder: str | None = None
    from_file: str | None = None
    given: bytes | None = None
    first_line: int = 1
    prompt_format: str = "auto"
    expand: bool = False
    sweep: tuple[str, ...] = ()
