"""The user's images and captions: what a folder, a list or a TOML file describes, as a plain list of examples.

Understood are a folder of images with captions in `NAME.txt`, with a `metadata.jsonl` or `metadata.csv` (columns
`file_name` and `text`, for hints `conditioning_image`) or the `prompt.json` of ControlNet's authors, folders named
`10_word` (ten repeats, and a caption for images without one), the TOML files of kohya's scripts
(`[[datasets.subsets]]`), and tar files of images and captions (`shards.py`).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.files import read_side_file
from ldm.images.source import EXTENSIONS
from ldm.job import MemoryImage
from ldm.util import InputError, is_list, is_mapping, printable

logger = logging.getLogger(__name__)

LISTS = ("metadata.jsonl", "metadata.csv", "prompt.json")
_FILE, TEXT_COLUMNS = ("file_name", "file", "image", "target"), ("text", "caption", "prompt")
_HINT = ("conditioning_image", "conditioning_image_file_name", "source")
_REPEATED = re.compile(r"(\d+)_(.*)", re.DOTALL)
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_SUBSET = {  # what a subset of a TOML file can have, and the type
    "image_dir": str, "num_repeats": int, "class_tokens": str, "caption_extension": str, "is_reg": bool,
    "flip_aug": bool, "shuffle_caption": bool, "keep_tokens": int, "caption_dropout_rate": float,
    "conditioning_data_dir": str,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One image and how it is trained on.

    It counts `repeats` times an epoch. `regular` marks an image of the class in general, which keeps the model from
    forgetting it (prior preservation, DreamBooth). An image inside of a tar file is `member`. `hint` is the image
    that a ControlNet sees, of the same aspect. The rest are choices for its captions: see `captions.py`.
    """

    path: Path
    caption: str
    repeats: int = 1
    regular: bool = False
    flip: bool = False
    shuffle: bool = False
    keep_tokens: int = 0
    drop: float = 0.0
    member: MemoryImage | None = None
    hint: Path | None = None

    @property
    def image(self) -> str:
        """The image, as `read_image` takes it: its file, or its place in a tar file."""
        return str(self.path) if self.member is None else self.member


def read_examples(
    source: str | Path, defaults: Example, extension: str = ".txt", option: str = "--data"
) -> list[Example]:
    """Reads the examples of a folder or of a TOML file; what it does not state is as in `defaults`.

    The caption of `defaults` is that of images without a caption of their own; if it is empty these images are an
    `InputError`, as are an empty folder and files that cannot be read; `option` is what it calls the source.
    """
    source = Path(source)
    if source.suffix == ".toml" and source.is_file():
        found = list(_of_toml(source, defaults))
    elif source.suffix == ".tar" and source.is_file():
        found = _of_shards([source], defaults)
    elif source.is_dir():
        found = _of_folder(source, defaults, extension)
    else:
        raise InputError(
            f"{option} {printable(source)} is not a folder, a TOML file or a tar file; give one of images"
        )
    if not found:
        raise InputError(f"there are no images in {printable(source)}; put PNG, JPEG or WEBP files there")
    silent = [example for example in found if not example.caption.strip()]
    if silent:
        raise InputError(
            f"{len(silent)} of {len(found)} images have no caption, such as {printable(silent[0].path)}: write it "
            f"into {printable(silent[0].path.stem + extension)} next to it, or give one for all with --caption"
        )
    return found


def _of_folder(folder: Path, defaults: Example, extension: str) -> list[Example]:
    listed = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    if listed is not None:
        return list(_of_list(listed, defaults))
    repeated = [
        (entry, _REPEATED.fullmatch(entry.name)) for entry in sorted(folder.iterdir()) if entry.is_dir()
    ]
    found: list[Example] = []
    for entry, match in repeated:
        if match:
            times, words = int(match[1]), match[2].replace("_", " ").strip()
            if not 1 <= times <= 100_000:
                raise InputError(f"{printable(entry)} asks for {times} repeats; give 1 to 100000")
            found += _with_captions(entry, replace(defaults, caption=words, repeats=times), extension)
    own = _with_captions(folder, defaults, extension)
    if not found and not own:
        return _of_shards(sorted(folder.glob("*.tar")), defaults)
    if found and own:
        logger.warning("%d images outside of the numbered folders are left out", len(own))
    return found or own


def _of_shards(paths: Sequence[Path], defaults: Example) -> list[Example]:
    from ldm.finetuning.shards import read_shard

    return [example for path in paths for example in read_shard(path, defaults)]


def _with_captions(folder: Path, defaults: Example, extension: str) -> list[Example]:
    images = [
        path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS and path.is_file()
    ]
    return [
        replace(defaults, path=path, caption=_caption_of(path, extension) or defaults.caption)
        for path in images
    ]


def _caption_of(image: Path, extension: str) -> str:
    path = image.with_suffix(extension)
    return _text(path).strip() if path.is_file() else ""


def _text(path: Path) -> str:
    try:
        return read_side_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)} is not text in UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{printable(path)} cannot be read: {error.strerror}") from None


def with_hints(examples: Sequence[Example], folder: Path) -> list[Example]:
    """Returns examples with their hints: the images in `folder` of the same names, but for the endings."""
    if not folder.is_dir():
        raise InputError(f"{printable(folder)} is not a folder of hints; give one of images")
    hints = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS}
    lost = [example.path for example in examples if example.path.stem not in hints]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(examples)} images have no hint in {printable(folder)}, such as "
            f"{printable(lost[0].name)}: a hint has the name of its image"
        )
    return [replace(example, hint=hints[example.path.stem]) for example in examples]


def warn_of_sides(examples: Sequence[Example]) -> None:
    """Warns of captions that say left or right if their images are also trained on mirrored."""
    wrong = sum(example.flip and bool(_SIDES.search(example.caption)) for example in examples)
    if wrong:
        logger.warning(
            "%d captions say left or right, which is wrong of mirrored images; leave out --flip", wrong
        )


# --- lists ---------------------------------------------------------------------------------------------------------


def _of_list(path: Path, defaults: Example) -> Iterator[Example]:
    """The rows of one of `LISTS`, whose files are named relative to its folder."""
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_lines(path)
    for number, row in rows:
        name, caption, hint = (
            next((row[key] for key in names if isinstance(row.get(key), str)), "")
            for names in (_FILE, TEXT_COLUMNS, _HINT)
        )
        where = f"{printable(path)}, line {number}"
        if not name:
            raise InputError(f"{where} has no file_name; write one, and text for the caption")
        image, seen = path.parent / name, path.parent / hint if hint else None
        for file in (image, seen):
            if file is not None and not file.is_file():
                raise InputError(f"{where}: {printable(file)} does not exist")
        yield replace(defaults, path=image, caption=caption.strip() or defaults.caption, hint=seen)


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{printable(path)}, line {number} is not a JSON object; write one on each line")
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{printable(path)}, line {reader.line_num} is not CSV: {error}") from None


# --- TOML of kohya's scripts ----------------------------------------------------------------------------------------


def _of_toml(path: Path, defaults: Example) -> Iterator[Example]:
    settings = _read_toml(path)
    general = settings.get("general", {})
    for dataset in _tables(settings.get("datasets"), path):
        for subset in _tables(dataset.get("subsets"), path):
            stated = {**general, **{k: v for k, v in dataset.items() if k != "subsets"}, **subset}
            yield from _of_subset(stated, path, defaults)


def _of_subset(stated: Mapping[str, Any], path: Path, defaults: Example) -> Iterator[Example]:
    for name, kind in _SUBSET.items():
        value = stated.get(name)
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if value is not None and (not fits or (kind is int and isinstance(value, bool))):
            raise InputError(f"{printable(path)}: {name} is {printable(value)!r}, not a {kind.__name__}")
    if "image_dir" not in stated:
        raise InputError(f"{printable(path)}: a subset has no image_dir; name its folder of images")
    folder = path.parent / stated["image_dir"]
    if not folder.is_dir():
        raise InputError(f"{printable(path)}: image_dir {printable(folder)} is not a folder")
    own = Example(
        path=folder,
        caption=stated.get("class_tokens", defaults.caption),
        repeats=stated.get("num_repeats", defaults.repeats),
        regular=stated.get("is_reg", defaults.regular),
        flip=stated.get("flip_aug", defaults.flip),
        shuffle=stated.get("shuffle_caption", defaults.shuffle),
        keep_tokens=stated.get("keep_tokens", defaults.keep_tokens),
        drop=float(stated.get("caption_dropout_rate", defaults.drop)),
    )
    found = _with_captions(folder, own, stated.get("caption_extension", ".txt"))
    if "conditioning_data_dir" in stated:
        found = with_hints(found, path.parent / stated["conditioning_data_dir"])
    yield from found


def _tables(value: Any, path: Path) -> Sequence[Mapping[str, Any]]:
    if not is_list(value) or not all(map(is_mapping, value)):
        raise InputError(
            f"{printable(path)} has no [[datasets]] with [[datasets.subsets]]; see kohya's scripts"
        )
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise InputError("a TOML file needs Python 3.11 or newer; use folders, or metadata.jsonl") from None
    try:
        return tomllib.loads(_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{printable(path)} is not TOML: {printable(error)}") from None
