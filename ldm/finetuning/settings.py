"""The settings of a training: one row each, read by the options, by YAML configs and by the checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints

from ldm.util import InputError, is_list, printable


def setting(
    default: Any,
    help: str,
    least: float | None = None,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
    group: str = "training",
    only: tuple[str, ...] = (),
    metavar: str | None = None,
) -> Any:
    """Returns a field of `Settings`: its default, help, limits, and the kinds of training that have it (all: ())."""
    about = {"help": help, "least": least, "most": most, "choices": choices, "group": group, "only": only}
    return field(default=default, metadata={**about, "metavar": metavar})


_NETWORKS = ("dreambooth", "finetune", "inpainting")


@dataclass(frozen=True)
class Settings:
    """How a model is trained on the user's images. Rates are those of the optimiser's steps; sizes are pixels."""

    # --- data
    resolution: int | None = setting(
        None, "side of a square of the images' area (default: the model's)", 32, 2048, group="data"
    )
    bucket_step: int | None = setting(
        None, "sizes are multiples of this (default: 64, less for small models)", 8, 256, group="data"
    )
    square: bool = setting(False, "crop every image to a square", group="data")
    random_crop: bool = setting(False, "choose what is cropped by chance instead of the middle", group="data")
    flip: bool = setting(False, "also train on mirrored images", group="data")
    caption: str = setting("", "caption of images that have none", group="data", metavar="TEXT")
    caption_extension: str = setting(".txt", "ending of the captions' files", group="data", metavar=".EXT")
    shuffle_captions: bool = setting(
        False, "change the order of captions' parts between commas", group="data"
    )
    keep_tokens: int = setting(
        0, "so many first parts of a caption stay in front", 0, group="data", metavar="N"
    )
    drop_captions: float = setting(0.0, "share of empty captions, for guidance", 0, 1, group="data")
    class_data: str | None = setting(
        None, "images of the class in general, for prior preservation", group="data", metavar="DIR"
    )
    class_caption: str = setting("", "caption of these", group="data", metavar="TEXT")
    class_weight: float = setting(1.0, "how much their loss counts", 0, group="data", metavar="W")
    class_target: str = setting(
        "image", "what they teach: how they look, or what the model made of them before the training",
        group="data", choices=("image", "model"), only=("lora", "dreambooth", "finetune"),
    )  # fmt: skip

    # --- optimisation
    steps: int = setting(1000, "steps of the optimiser", 1, metavar="N")
    batch_size: int = setting(1, "images in a batch", 1, 4096, metavar="N")
    accumulate: int = setting(1, "batches in a step", 1, 4096, metavar="N")
    learning_rate: float = setting(1e-4, "learning rate", 0, metavar="R")
    text_rate: float = setting(
        0.0, "learning rate of the text encoder; 0 leaves it as it is", 0, metavar="R",
        only=("lora", "dreambooth", "finetune"),
    )  # fmt: skip
    warm_up_steps: int = setting(0, "the rate grows linearly over so many first steps", 0, metavar="N")
    schedule: str = setting("constant", "how the rate continues", choices=("constant", "linear", "cosine"))
    optimizer: str = setting("adamw", "optimiser", choices=("adamw", "adamw8bit", "adafactor"))
    weight_decay: float = setting(0.01, "weight decay of the optimiser", 0, metavar="D")
    clip: float = setting(1.0, "longest gradient; 0: any", 0, metavar="NORM")
    loss: str = setting("l2", "squared error, or pseudo-Huber", choices=("l2", "huber"))
    min_snr_gamma: float | None = setting(None, "min-SNR weights with this gamma; 5 is usual", 0, metavar="G")
    debiased: bool = setting(False, "weight the loss by 1 / sqrt(SNR)")
    noise_offset: float = setting(0.0, "add this much common noise to each channel", 0, 1, metavar="X")
    clip_skip: int = setting(1, "the text encoder's layer from the end, as --clip_skip", 1, 12, metavar="N")
    ema_decay: float | None = setting(
        None, "keep and write averaged weights", 0, 1, only=(*_NETWORKS, "controlnet"), metavar="D"
    )
    checkpointing: bool = setting(
        True, "compute activations twice instead of keeping them: less memory, slower"
    )
    seed: int = setting(0, "seed of order, noise and first values", 0, 2**32 - 1, metavar="N")

    # --- what is trained
    rank: int = setting(8, "rank of the LoRA", 1, 4096, only=("lora",), group="LoRA", metavar="N")
    alpha: float | None = setting(
        None,
        "its change is scaled by alpha / rank (default: the rank)",
        0,
        only=("lora",),
        group="LoRA",
        metavar="A",
    )
    conv_rank: int = setting(
        0,
        "rank for 3x3 convolutions; 0 leaves them as they are",
        0,
        4096,
        only=("lora",),
        group="LoRA",
        metavar="N",
    )
    conv_alpha: float = setting(1.0, "their alpha", 0, only=("lora",), group="LoRA", metavar="A")
    text_only: bool = setting(False, "train the text encoder only", only=("lora",), group="LoRA")
    dora: bool = setting(False, "train directions and lengths apart (DoRA)", only=("lora",), group="LoRA")
    plus_ratio: float = setting(
        1.0,
        "the upward factors learn so many times faster (LoRA+)",
        0,
        only=("lora",),
        group="LoRA",
        metavar="X",
    )
    layout: str = setting(
        "kohya", "names in the file", choices=("kohya", "diffusers"), only=("lora",), group="LoRA"
    )
    word: str | None = setting(
        None, "the word to learn", only=("embedding",), group="embedding", metavar="WORD"
    )
    init: str = setting(
        "", "begin as the vectors of these words", only=("embedding",), group="embedding", metavar="TEXT"
    )
    vectors: int | None = setting(
        None,
        "number of vectors (default: those of --init)",
        1,
        75,
        only=("embedding",),
        group="embedding",
        metavar="N",
    )
    decay: float = setting(
        0.0, "share by which their lengths approach the usual one each step", 0, 1, only=("embedding",),
        group="embedding", metavar="X",
    )  # fmt: skip
    hints: str | None = setting(
        None, "hint images of the images' names (default: those that the list names, or the images themselves)",
        only=("controlnet",), group="ControlNet", metavar="DIR",
    )  # fmt: skip
    hint: str = setting(
        "none", "what is made of a hint image, as with txt2img --hint", only=("controlnet",), group="ControlNet",
        choices=("none", "canny", "grey", "scribble", "tile"),
    )  # fmt: skip
    start: str | None = setting(
        None, "begin with this ControlNet (default: the U-Net's encoder)", only=("controlnet",),
        group="ControlNet", metavar="FILE",
    )  # fmt: skip
    dtype: str = setting(
        "fp16", "type of the weights in the file", choices=("fp32", "fp16", "bf16"), group="file"
    )

    # --- the run
    precision: str = setting(
        "auto", "arithmetic; auto: bf16 where the device has it, else float32", group="run",
        choices=("auto", "full", "bf16", "fp16"),
    )  # fmt: skip
    checkpoint_steps: int = setting(
        250, "keep a state to resume from every N steps", 1, group="run", metavar="N"
    )
    sample_steps: int = setting(
        0, "draw --sample_prompt every N steps; 0: never", 0, group="run", metavar="N"
    )
    tensorboard: bool = setting(
        False, "also log losses for TensorBoard, into the folder of the training", group="run"
    )
    devices: int = setting(
        1, "share each step among N processes, one for each GPU", 1, group="run", metavar="N"
    )
    num_nodes: int = setting(1, "share it among N machines, started by torchrun", 1, group="run", metavar="N")
    sample_prompt: tuple[str, ...] = setting(
        (), "a prompt to draw; can be given several times", group="run", metavar="TEXT"
    )


# the kinds of training, and what differs from the defaults above
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "embedding": {"learning_rate": 5e-3, "steps": 2000, "weight_decay": 0.0},
    "dreambooth": {"learning_rate": 2e-6, "steps": 800},
    "finetune": {"learning_rate": 1e-5, "drop_captions": 0.1},
    "inpainting": {"learning_rate": 1e-5, "drop_captions": 0.1},
    "controlnet": {"learning_rate": 1e-5, "drop_captions": 0.5},  # as its authors trained theirs
}


def rows(kind: str) -> Iterator[tuple[Field[Any], Any]]:
    """Yields the settings of a kind of training, each with its default."""
    for row in fields(Settings):
        if not row.metadata["only"] or kind in row.metadata["only"]:
            yield row, DEFAULTS[kind].get(row.name, row.default)


def make_settings(kind: str, values: Mapping[str, Any]) -> Settings:
    """Returns checked settings: the defaults of a kind, changed by `values`.

    An unknown name, a value of another type and one outside of its limits are an `InputError`.
    """
    hints = get_type_hints(Settings)
    known = {row.name: row for row, _ in rows(kind)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"unknown setting {printable(name)} of train {kind}; see train {kind} --help")
        _check(known[name], hints[name], value)
    stated = {row.name: default for row, default in rows(kind)} | dict(values)
    stated["sample_prompt"] = tuple(stated["sample_prompt"])
    return Settings(**stated)


def _check(row: Field[Any], hint: Any, value: Any) -> None:
    about, shown = row.metadata, printable(value)
    if value is None and row.default is None:
        return
    if about["choices"]:
        if value not in about["choices"]:
            raise InputError(f"--{row.name} {shown}: choose from {', '.join(about['choices'])}")
        return
    hints = (hint, *getattr(hint, "__args__", ()))
    kind = next((kind for kind in (bool, int, float, str) if kind in hints), str)
    if row.default == ():
        fits, what = is_list(value) and all(isinstance(part, str) for part in value), "a list of texts"
    else:
        accepted = (int, float) if kind is float else (kind,)
        fits = isinstance(value, accepted) and (not isinstance(value, bool) or kind is bool)
        what = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    if not fits:
        raise InputError(f"{row.name} is {shown!r}; give {what}")
    least = about["least"]
    if least is not None and not least <= value <= about["most"]:
        most = f" to {about['most']:g}" if about["most"] < math.inf else " or more"
        raise InputError(f"--{row.name} {shown}: give {least:g}{most}")
