"""Sets of images: folders, runs, and rendered scenes, one image in memory at a time."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ldm.util import InputError, need, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.job import Job


@dataclass(frozen=True)
class Item:
    """One image: its name, a key that names its content (SHA-256), and a function that returns its pixels.

    Pixels are uint8 [H, W, 3]. `key` may read the file; it raises InputError, as `pixels` does, for damaged ones.
    """

    name: str
    key: Callable[[], str]
    pixels: Callable[[], np.ndarray]
    path: Path | None = None


@dataclass(frozen=True)
class ImageSet:
    """A named set of images in the order of their names."""

    name: str
    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    def digest(self) -> str:
        """Returns the SHA-256 of the keys of all images."""
        return hashlib.sha256("".join(item.key() for item in self.items).encode()).hexdigest()


def folder_set(folder: Path) -> ImageSet:
    """Returns the images of a folder and its subfolders; of a run's folder those in `samples`.

    Raises InputError if there are none.
    """
    from ldm.files import files_below
    from ldm.images.source import EXTENSIONS

    samples = folder / "samples"
    paths = files_below(samples if samples.is_dir() else folder, "the folder of images")
    found = [path for path in paths if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    need(
        bool(found),
        f"{printable(folder)} holds no images; give a folder of PNG, JPEG, WEBP, BMP or TIFF files",
    )
    return ImageSet(str(folder), [_of_file(path) for path in found])


def _of_file(path: Path) -> Item:
    def key() -> str:
        from ldm.images.source import read_bytes, reading

        with reading(str(path)):
            return hashlib.sha256(read_bytes(str(path))).hexdigest()

    def pixels() -> np.ndarray:
        import numpy as np

        from ldm.images.source import read_image

        return np.asarray(read_image(str(path)).color)

    return Item(path.name, key, pixels, path)


def scene_set(count: int, size: int = 128) -> ImageSet:
    """Returns `count` rendered scenes of the bundled model's domain, which no prompt of an evaluation describes."""
    from ldm.data import scenes
    from ldm.evaluation.shapes import REFERENCES_FROM, SPLIT

    source = hashlib.sha256(inspect.getsource(scenes).encode()).hexdigest()

    def item(index: int) -> Item:
        key = hashlib.sha256(f"{source} {SPLIT} {index} {size}".encode()).hexdigest()
        return Item(f"{SPLIT} {index}", lambda: key, lambda: scenes.image_at(index, SPLIT, size))

    return ImageSet(f"scenes:{count}", [item(REFERENCES_FROM + i) for i in range(count)])


def array_set(name: str, images: Sequence[np.ndarray]) -> ImageSet:
    """Returns a set of images in memory: uint8 [H, W, 3] each."""

    def item(number: int, image: np.ndarray) -> Item:
        key = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        return Item(str(number), lambda: key, lambda: image)

    return ImageSet(name, [item(i, image) for i, image in enumerate(images)])


def read_set(text: str) -> ImageSet:
    """Returns the set that a text names: a folder, or `scenes:COUNT`. Raises InputError for others."""
    kind, _, count = text.partition(":")
    if kind == "scenes" and not Path(text).exists():
        need(
            count.isdecimal() and int(count) > 0,
            f"{printable(text)}: write scenes:2000, the number of scenes",
        )
        return scene_set(int(count))
    need(
        Path(text).is_dir(),
        f"{printable(text)} is not a folder of images; give one, a .npz file, or scenes:2000",
    )
    return folder_set(Path(text))


def jobs_of(images: ImageSet, mixed: bool = False) -> list[Job]:
    """Returns how each image was made, from its file.

    Raises InputError if an image does not record it, and, unless `mixed`, if two differ in more than prompt and seed.
    """
    from ldm.job import batch_key
    from ldm.metadata.read import read_job

    jobs: list[Job] = []
    first: _Made | None = None
    for item in images.items:
        if item.path is None:
            raise InputError(f"{images.name}: rendered images have no prompts; give --questions")
        recipe = read_job(str(item.path))
        made = (batch_key(recipe.job), recipe.job.scale, recipe.model_hash)
        first = first or made
        if made != first and not mixed:
            raise InputError(
                f"{printable(item.path)} was made with other settings than {printable(images.items[0].name)}: "
                f"{_difference(first, made)}; give the folder of one run, or --mixed"
            )
        jobs.append(recipe.job)
    return jobs


def model_of(images: ImageSet) -> str:
    """Returns the name and hash of the model that made the first image; empty if its file does not hold them."""
    from ldm.metadata.read import read_job

    path = images.items[0].path
    try:
        recipe = None if path is None else read_job(str(path))
    except InputError:
        recipe = None
    return f"{recipe.model} [{recipe.model_hash}]" if recipe and recipe.model else ""


_Made: TypeAlias = "tuple[Job, float, str]"  # the settings, the scale and the model of an image


def _difference(first: _Made, other: _Made) -> str:
    from dataclasses import asdict

    if first[2] != other[2]:
        return f"model {first[2]} and {other[2]}"
    if first[1] != other[1]:
        return f"scale {first[1]:g} and {other[1]:g}"
    before, after = asdict(first[0]), asdict(other[0])
    name = next(name for name in before if before[name] != after[name])
    return printable(f"{name} {before[name]} and {after[name]}")[:100]
