"""A whole training, from the checks of what was asked for to the file that it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from ldm.files import written_whole
from ldm.finetuning.batches import Epochs, batch_maker
from ldm.finetuning.buckets import Size, bucket_sizes, step_for
from ldm.finetuning.data import Example, read_examples, warn_of_sides, with_hints
from ldm.finetuning.kinds import KINDS
from ldm.finetuning.latents import Placer, moments, place_all, weights_key
from ldm.finetuning.logs import (
    FiniteLoss,
    LossTable,
    Samples,
    StopAsked,
    check_tensorboard,
    plot_losses,
    tensorboard,
)
from ldm.finetuning.module import FineTuning, check_optimizer
from ldm.finetuning.notes import file_notes
from ldm.finetuning.rehearsal import describe, rehearse
from ldm.finetuning.settings import Settings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.places import cache_path
from ldm.runs.progress import Interrupts
from ldm.training.runs import STATE, Batches, RunSettings, check_time, fit, last_state, make_trainer
from ldm.util import InputError, need, printable

logger = logging.getLogger("ldm")

_MAY_CHANGE = {
    "steps", "checkpoint_steps", "sample_steps", "sample_prompt", "precision", "dtype", "layout", "tensorboard"
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A request: the kind, the images, the file to write, and the settings.

    States, losses and samples go into a folder of the file's name and the ending `.training`.
    """

    kind: str
    data: Path
    out: Path
    settings: Settings
    resume: bool = False
    max_time: str | None = None
    bar: bool = False

    @property
    def folder(self) -> Path:
        """The folder of states, losses and samples."""
        return self.out.with_suffix(".training")

    def check(self) -> None:
        """Checks that the training can begin, before any weights are read; else raises `InputError`."""
        endings = KINDS[self.kind].endings
        check_optimizer(self.settings.optimizer)
        check_time(self.max_time)
        check_tensorboard(self.settings.tensorboard)
        need(
            self.out.suffix in endings,
            f"--out {printable(self.out)}: a file of this kind ends in {' or '.join(endings)}",
        )
        need(
            not self.out.exists(),
            f"--out {printable(self.out)} exists; choose another name, or move the file away",
        )
        need(
            self.out.absolute().parent.is_dir(),
            f"--out {printable(self.out)}: the folder {printable(self.out.absolute().parent)} does not exist",
        )
        stated = self.folder / "settings.json"
        if not self.resume:
            need(
                not (self.folder / STATE).exists(),
                f"{printable(self.folder)} has an unfinished training; add --resume to go on with it, choose another "
                "--out, or remove the folder",
            )
            return
        need(stated.is_file(), f"there is nothing to resume: {printable(self.folder)} holds no training")
        last_state(self.folder)
        _same_settings(json.loads(stated.read_text(encoding="utf-8")), self._facts())

    def _facts(self) -> dict[str, Any]:
        facts = {"kind": self.kind, "data": str(self.data.absolute()), **asdict(self.settings)}
        return json.loads(json.dumps(facts))

    def examples(self) -> list[Example]:
        """Reads the list of images and captions, those of the class in general after the user's own."""
        settings = self.settings
        # what no caption means is kept as well, so images of the class alone go without one
        keeps = settings.class_target == "model"
        defaults = Example(
            Path(), settings.caption, flip=settings.flip, shuffle=settings.shuffle_captions,
            keep_tokens=settings.keep_tokens, drop=0.0 if keeps else settings.drop_captions,
        )  # fmt: skip
        found = read_examples(self.data, defaults, settings.caption_extension)
        if settings.class_data is not None:
            general = replace(
                defaults, caption=settings.class_caption, regular=True, drop=settings.drop_captions
            )
            found += read_examples(settings.class_data, general, settings.caption_extension, "--class_data")
        need(
            not keeps or any(example.regular for example in found),
            "--class_target model is for images of the class, and there are none; give them with --class_data",
        )
        warn_of_sides(found)
        if settings.hints is not None:
            found = with_hints(found, Path(settings.hints))
        if self.kind == "controlnet":
            silent = [example.path for example in found if example.hint is None]
            if silent and settings.hint == "none":
                raise InputError(
                    f"{len(silent)} of {len(found)} images have no hint, such as {printable(silent[0])}: give a "
                    "folder of hints with --hints, name them as conditioning_image in metadata.jsonl, or have "
                    "them made with --hint canny"
                )
        if self.kind == "embedding":
            word = (settings.word or "").lower()
            need(
                any(word in example.caption.lower() for example in found),
                f"no caption has the word {printable(settings.word)}; write it into them, or give one for all, such "
                f"as --caption 'a photo of {printable(settings.word)}'",
            )
        return found

    def keep_facts(self) -> None:
        """Writes the settings next to the states, for the check of a run that resumes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / "settings.json", overwrite=True) as part:
            part.write_text(json.dumps(self._facts(), indent=1), encoding="utf-8")


def _same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(now):
        if name not in _MAY_CHANGE and name in before and before[name] != now[name]:
            raise InputError(
                f"--resume: {name} was {printable(before[name])} and is {printable(now[name])}; give it as it was"
            )


def sizes_for(settings: Settings, model: LatentDiffusion) -> list[Size]:
    """Returns the sizes that images are brought to."""
    factor = model.first_stage_model.downsampling
    side = settings.resolution or model.image_size * factor
    need(side >= 4 * factor, f"--resolution {side} is too small for this model; give {4 * factor} or more")
    step = settings.bucket_step or step_for(side, factor)
    need(step % factor == 0, f"--bucket_step {step} is not a multiple of this model's {factor}")
    square = side // step * step
    return [(square, square)] if settings.square else bucket_sizes(side, step)


def run_training(
    training: Training,
    examples: Sequence[Example],
    load: Callable[[], LatentDiffusion],
    notes: Mapping[str, str],
    device: torch.device,
    precision: torch.dtype,
    dry_run: bool = False,
) -> int:
    """Trains and writes the file; returns the exit code: 0, or 128 + n after signal n.

    A training that `max_time` ends early leaves its state and no file. `examples` are those of the training. `load`
    returns the model in float32 on the CPU. `precision` is that of the layers' arithmetic. `notes` are facts about
    the model, for the metadata of the file.
    """
    kind, settings = KINDS[training.kind], training.settings
    if getattr(rank_zero_only, "rank", 0):  # the first process speaks for all
        logger.setLevel(logging.ERROR)
    model = load().to(device)
    placer = Placer(sizes_for(settings, model), settings.random_crop, settings.seed)
    part = kind.part(model, settings)  # before images are encoded, which takes long: it may not fit the model
    if kind.frozen and precision != torch.float32:
        model.model.to(precision)
        model.cond_stage_model.to(precision)
    networks = model.model, part.module
    _use_checkpointing(networks, settings.checkpointing)
    for network in networks:  # as attention returns its maps: convolutions would rearrange their weights
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    folder = cache_path("latents") / weights_key(model.first_stage_model.parameters())

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return moments(model.first_stage_model, pixels)

    placed = place_all(examples, placer, None if dry_run else encode, folder, _Counted())
    epochs = Epochs(placed, settings.batch_size, settings.seed)
    for line in describe(placed, epochs, settings, model.cond_stage_model.cut_words):
        logger.info("%s", line)
    count = sum(p.numel() for group in part.groups() for p in group["params"])
    logger.info("%d parameters are trained", count)
    module = kind.module(model, part, settings)
    module.placer = placer
    if dry_run:
        logger.info("%s", rehearse(module, epochs, device, precision).line())
        return 0
    trainer, received = _train(training, module, epochs, device, precision)
    if not trainer.is_global_zero:  # another process of the same training writes
        return 0
    if received is not None or trainer.global_step < settings.steps:
        state = (trainer.global_step, settings.steps, printable(training.folder))
        logger.warning("step %d of %d: the state is kept in %s; add --resume to go on", *state)
        return 0 if received is None else 128 + received
    if drawn := plot_losses(training.folder / "loss.csv", training.folder / "loss"):
        logger.info("losses: %s", printable(drawn))
    part.write(training.out, file_notes(training, placed, epochs, notes))
    logger.info("written: %s", printable(training.out))
    return 0


def _train(
    training: Training, module: FineTuning, epochs: Epochs, device: torch.device, precision: torch.dtype
) -> tuple[pl.Trainer, int | None]:
    """Runs the loop; returns it, and the signal that ended it early, if one did."""
    settings, model = training.settings, module.model
    make = batch_maker(epochs, model.num_timesteps, settings.noise_offset, settings.class_weight)
    state, step = last_state(training.folder) if training.resume else (None, 0)
    training.keep_facts()
    names = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    run = RunSettings(
        training.folder,
        settings.steps,
        precision=names.get(precision, "32-true"),
        accumulate=settings.accumulate,
        clip=None,  # the module does that
        max_time=training.max_time,
        checkpoint_steps=settings.checkpoint_steps,
        bar=training.bar,
        device=str(device),
        devices=settings.devices,
        num_nodes=settings.num_nodes,
    )
    with Interrupts() as interrupts:
        callbacks: list[pl.Callback] = [
            LossTable(training.folder / "loss.csv"),
            FiniteLoss(),
            StopAsked(interrupts),
        ]
        if settings.sample_steps and settings.sample_prompt:
            callbacks.append(Samples(module, epochs.examples, training.folder / "samples"))
        first = step * settings.accumulate * settings.devices * settings.num_nodes
        trainer = make_trainer(run, callbacks, tensorboard(training.folder) if settings.tensorboard else None)
        fit(trainer, module, Batches(make, settings.seed, first).loader(), None, state)
        return trainer, interrupts.received


def _use_checkpointing(networks: Sequence[torch.nn.Module], wanted: bool) -> None:
    """Sets whether the blocks of networks compute activations again in the backward pass."""
    for block in (block for network in networks for block in network.modules()):
        for name in ("checkpoint", "use_checkpoint"):
            if isinstance(getattr(block, name, None), bool):
                setattr(block, name, wanted)


class _Counted:
    """Logs how many images are encoded, now and then."""

    def __call__(self, done: int, of: int) -> None:
        if done % 100 == 0:
            logger.info("%d of %d images read", done, of)
