"""Hint images for control networks, made from photographs and drawings without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter

from ldm.images.canvas import Canvas, fit_image
from ldm.images.source import read_image
from ldm.job import Init, Job
from ldm.util import InputError, printable

OpenCanvas = Callable[[Init], Canvas]

CANNY_THRESHOLDS = (100, 200)  # of the authors' examples
_SCRIBBLE_WIDTH = 7  # pixels of a stroke
_TILE = 8  # by how much a copy for a tile model is smaller
_MOST_OFF = 0.02  # by how much the aspects of a hint and of the image may differ
HIDDEN = -1.0  # of the pixels that an inpainting control network does not see


def make_hint(kind: str, pixels: np.ndarray, repaint: np.ndarray | None = None) -> np.ndarray:
    """The hint of `kind` that is made of an image [H, W, 3] uint8: float32 [H, W, 3] from 0 to 1.

    "none" is the image itself, "canny" its edges (Canny 1986), "grey" its brightness, "scribble" its edges as thick
    strokes, "tile" a blurred copy. "inpaint" is the image with `HIDDEN` where bool `repaint` [H, W] is True, as the
    authors' inpainting model wants it.
    """
    if kind == "inpaint":
        seen = pixels.astype(np.float32) / 255
        return seen if repaint is None else np.where(repaint[..., None], np.float32(HIDDEN), seen)
    return _MAKERS[kind](pixels).astype(np.float32) / 255


def shown_hint(hint: np.ndarray) -> np.ndarray:
    """A hint as an image [H, W, 3] uint8; hidden pixels are black."""
    return (hint.clip(0, 1) * 255).round().astype(np.uint8)


def _canny(pixels: np.ndarray) -> np.ndarray:
    try:
        import cv2
    except ImportError:
        raise InputError(
            "--hint canny needs OpenCV, which is not installed: pip install opencv-python-headless"
        ) from None
    return _three(cv2.Canny(np.ascontiguousarray(pixels), *CANNY_THRESHOLDS))


def _grey(pixels: np.ndarray) -> np.ndarray:
    return _three(np.asarray(Image.fromarray(pixels).convert("L")))


def _scribble(pixels: np.ndarray) -> np.ndarray:
    edges = Image.fromarray(_canny(pixels)[..., 0])
    thick = edges.filter(ImageFilter.MaxFilter(_SCRIBBLE_WIDTH)).filter(ImageFilter.MedianFilter(5))
    return _three((np.asarray(thick) > 127).astype(np.uint8) * 255)


def _tile(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    small = image.resize([max(1, side // _TILE) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


_MAKERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda pixels: pixels,
    "canny": _canny,
    "grey": _grey,
    "scribble": _scribble,
    "tile": _tile,
}


def read_hint(job: Job, image: str, size: tuple[int, int], canvases: OpenCanvas) -> np.ndarray:
    """The hint [H, W, 3], float32, that a job makes of an image for a pass of height and width `size`.

    `canvases` opens the job's own image. Where only the region around its mask is made, the hint is one of the whole
    image, of which the same region is cut. Raises `InputError` for an image of another aspect, unless the job has a
    way to fit it.
    """
    canvas = None if job.init is None else canvases(job.init)
    repaint = canvas.repaint if job.hint == "inpaint" and canvas is not None else None
    region = None if canvas is None else canvas.region
    pixels = _image(
        image, size if canvas is None or region is None else canvas.finished_size, job.control_resize
    )
    return make_hint(job.hint, pixels if region is None else region.cut(pixels, size), _fitted(repaint, size))


def _image(image: str, size: tuple[int, int], resize: str) -> np.ndarray:
    height, width = size
    if resize == "none":
        check_aspect(image, (width, height))
        resize = "stretch"
    return fit_image(image, (width, height), resize, (0, 0, 0))


def check_aspect(image: str, size: tuple[int, int]) -> None:
    """Raises `InputError` for a hint of another aspect than that of an image of this width and height."""
    (width, height), (own_width, own_height) = size, read_image(image).color.size
    if abs(own_width * height / (own_height * width) - 1) > _MOST_OFF:
        raise InputError(
            f"the hint {printable(image)} is {own_width}x{own_height}, and the image {width}x{height}, of another "
            "aspect; add --control_resize fill, pad or stretch, or give --W and --H of that aspect"
        )


def _fitted(repaint: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """A mask at a size: that of the first pass is stretched to the second's."""
    if repaint is None or repaint.shape == size:
        return repaint
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, repaint.shape, strict=True))
    return repaint[rows][:, columns]


def hints_of(job: Job, canvases: OpenCanvas) -> Sequence[np.ndarray]:
    """The hints of a job at the size of its first pass."""
    return [read_hint(job, image, (job.height, job.width), canvases) for _, image, *_ in job.controls]
