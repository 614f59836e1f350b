"""Small versions of images that are being made, and how they were made: files that the run does not depend on."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ldm.files import without_leftovers
from ldm.runs.background import Background
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.pipeline import StepInfo
    from ldm.runs.options import RunOptions
    from ldm.runs.progress import Events
    from ldm.safety.screen import Screen

logger = logging.getLogger("ldm")

_ENLARGED = 4  # times a latent cell: half of the finished image
_FRAME, _LAST_FRAME = 120, 2000  # milliseconds
_WAITING = 64  # files; more are left out rather than waited for
_NAMES = r"[0-9]{5,}\.(png|webp|gif)"


class Previews:
    """Writes what the model predicts during denoising, as a context manager; it never fails or delays the run.

    Every `options.preview` steps, and after the last, the file `previews/NUMBER.png` of each image is replaced; with
    `options.animate` those of these steps, by default of all, become `previews/NUMBER.webp` or `.gif`.
    `shown` turns latents [N, C, h, w] into uint8 pixels [N, h, w, 3] or larger ones; `sample_path` gives the file of
    an image.
    """

    def __init__(
        self,
        options: RunOptions,
        shown: Callable[[Tensor], np.ndarray],
        sample_path: Callable[[int], Path],
        events: Events,
    ) -> None:
        self._single, self._kind = bool(options.preview), options.animate
        self._every = options.preview or 1
        self._shown, self._sample_path, self._events = shown, sample_path, events
        self._folder = Path(options.outdir) / "previews"
        self._images: Sequence[int] = ()
        self._frames: dict[int, list[np.ndarray]] = {}
        self._cells: Sequence[int] = ()  # height and width of the latents
        self._background = Background(_WAITING)
        self._works = True

    def __enter__(self) -> Previews:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {printable(self._folder)} cannot be made: {error.strerror}; leave --preview and "
                "--animate out, or choose another --outdir"
            ) from None
        self._held = without_leftovers(self._folder / "preview", _NAMES)
        self._held.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._background.wait()
        self._background.stop()
        self._held.__exit__(kind, error, trace)

    def begin(self, images: Sequence[int]) -> None:
        """Begins a batch: these images of the run."""
        self._images, self._frames = images, {}

    def step(self, step: StepInfo) -> None:
        """Takes the prediction of a step, if it is one of those that are shown."""
        if not self._works or ((step.index + 1) % self._every and step.index + 1 < step.total):
            return
        self._cells = cells = step.estimate.shape[-2:]
        for row, pixels in zip(step.rows, self._shown(step.estimate), strict=True):
            number = self._sample_path(self._images[row]).stem
            if self._kind is not None:
                self._frames.setdefault(row, []).append(pixels)
            if self._single:
                at = {"step": step.index + 1, "steps": step.total}
                small = partial(_enlarged, pixels, cells)
                self._background.offer(lambda n=number, s=small, at=at: self._write_preview(n, s, at))

    def end(self) -> None:
        """Ends the batch: its animations are written."""
        for row, frames in self._frames.items() if self._works else ():
            number = self._sample_path(self._images[row]).stem
            self._background.offer(partial(self._write_animation, number, frames, self._cells))
        self._frames = {}

    def _write_preview(self, number: str, small: Callable[[], np.ndarray], at: dict[str, int]) -> None:
        from ldm.images.writer import encode_png

        path = self._folder / f"{number}.png"
        if self._publish(path, encode_png(small(), compress_level=1)):
            self._events.emit("preview", path=str(path), **at)

    def _write_animation(self, number: str, frames: Sequence[np.ndarray], cells: Sequence[int]) -> None:
        assert self._kind is not None
        path = self._folder / f"{number}.{self._kind}"
        self._publish(path, encode_animation(frames, cells, self._kind))

    def _publish(self, path: Path, data: bytes) -> bool:
        from ldm.images.writer import publish

        try:
            publish(path, data, overwrite=True)
        except OSError as error:
            if self._works:
                reason = error.strerror or printable(error)
                logger.warning("no more previews: %s cannot be written: %s", printable(path), reason)
            self._works = False
        return self._works


def encode_animation(frames: Sequence[np.ndarray], cells: Sequence[int], kind: str) -> bytes:
    """Encodes uint8 pixels [h, w, 3] as a "webp" or "gif" file, for a map of `cells`, height and width."""
    from PIL import Image

    shown = [Image.fromarray(_enlarged(pixels, cells)) for pixels in frames]
    if kind == "gif":  # a tenth of the time of Pillow's own choice of colours
        shown = [
            frame.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in shown
        ]
    times, file = [_FRAME] * (len(shown) - 1) + [_LAST_FRAME], io.BytesIO()
    extra = {"quality": 90} if kind == "webp" else {}
    shown[0].save(file, kind.upper(), save_all=True, append_images=shown[1:], duration=times, loop=0, **extra)
    return file.getvalue()


def _enlarged(pixels: np.ndarray, cells: Sequence[int]) -> np.ndarray:
    """The pixels, of latent cells or parts of them, as those of an image for a map of `cells`, height and width."""
    import numpy as np
    from PIL import Image

    height, width = (side * _ENLARGED for side in cells)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def wanted(options: RunOptions, screen: Screen) -> bool:
    """Whether a run writes previews; the safety check cannot judge them, so with it there are none."""
    if not (options.preview or options.animate):
        return False
    if screen.checks:
        logger.warning(
            "the safety check cannot judge previews, so none are written; --safety off allows them"
        )
    return not screen.checks


def check_animation(kind: str | None) -> None:
    """Raises an `InputError` if this Pillow cannot write animations of the kind."""
    from PIL import features

    if kind == "webp" and not features.check("webp"):
        raise InputError("--animate webp: the Pillow on this machine cannot write WebP; use --animate gif")
