"""Finds the files that an image was made with by their recorded names and hashes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import files_below
from ldm.job import EMBEDDING_ENDINGS, MODEL_ENDINGS, lora_name
from ldm.metadata.infotext import model_name
from ldm.metadata.recipe import MASK_PADDING
from ldm.places import candidates, find
from ldm.util import InputError, is_list, printable

if TYPE_CHECKING:
    from ldm.metadata.read import Recipe

_CHECKPOINTS = Path("models/ldm")
_HASH = re.compile("[0-9a-f]{8,64}")  # of a LoRA or a textual inversion
_SHA256 = re.compile("[0-9a-f]{10,64}")  # 8 digits of an older rule are from another hash


@dataclass
class Located:
    """The files of a recipe that were found, and lines on those that differ or are missing.

    `changes` are parsed options that name the files.
    """

    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])


def locate(recipe: Recipe, folder: Path, given: Mapping[str, object]) -> Located:
    """Finds the files of a recipe: checkpoint, other parts, LoRAs, textual inversions, the image and its mask.

    `folder` is the folder of the recipe's file, which may also hold the starting image. `given` are the options that
    the user typed: they take precedence, and `lora_dir`, `embedding_dir`, and folders under `init_img` and `mask` are
    searched. Files are identified by hash if one was recorded, else by name.
    """
    located = Located()
    _locate_checkpoint(recipe, given, located)
    _check_parts(recipe, given, located)
    _locate_loras(recipe, given, located)
    _locate_embeddings(recipe, given, located)
    _locate_controls(recipe, folder, given, located)
    _locate_images(recipe, folder, given, located)
    return located


def choose(
    name: str, digest: str, files: Sequence[tuple[str, Path]], *hashes_of: Callable[[Path], str]
) -> tuple[Path | None, bool]:
    """Chooses the file with this hash, else of this name, among named `files`; and returns whether the hash agrees.

    If a hash can be computed in several ways, any may agree.
    """
    named = [path for own, path in files if own == name]
    named += [path for own, path in files if own != name and own.lower() == name.lower()]
    if not digest:
        return (named[0], True) if named else (None, False)
    for path in [*named, *(path for own, path in files if own.lower() != name.lower())]:
        if _agrees(path, digest, *hashes_of):
            return path, True
    return (named[0] if named else None), False


def _agrees(path: Path, digest: str, *hashes_of: Callable[[Path], str]) -> bool:
    try:
        return any(hash_of(path).startswith(digest) for hash_of in hashes_of)
    except (InputError, OSError):  # not a file that an image could be made with
        return False


# --- the model ---------------------------------------------------------------------------------------------------


def _locate_checkpoint(recipe: Recipe, given: Mapping[str, object], located: Located) -> None:
    digest = recipe.model_hash.lower() if _SHA256.fullmatch(recipe.model_hash.lower()) else ""
    what = f"{printable(recipe.model or 'of unknown name')[:100]}{f' [{digest[:10]}]' if digest else ''}"
    ckpt = given.get("ckpt")
    if isinstance(ckpt, str):
        if digest and not _agrees(Path(ckpt), digest, _checkpoint_hash):
            located.notes.append(f"it was made with the model {what}, which {printable(ckpt)} is not")
        return
    if not (recipe.model or digest):
        return
    path, same = choose(lora_name(recipe.model), digest, list(_checkpoints()), _checkpoint_hash)
    if path is None:
        located.notes.append(f"its model {what} is not below {_CHECKPOINTS}; using the default one")
        return
    if not same:
        located.notes.append(f"its model is {what}; {printable(path)} has that name, but another hash")
    located.changes["ckpt"] = str(path)
    config = _config(recipe.extras.get("Config", ""))
    if config is not None and "config" not in given:
        located.changes["config"] = str(config)


def _checkpoint_hash(path: Path) -> str:
    from ldm.checkpoints.hashing import files_sha256
    from ldm.checkpoints.model_files import model_files

    return files_sha256(model_files(path))


def _checkpoints() -> Iterator[tuple[str, Path]]:
    """Returns the checkpoints in models/ldm and its subfolders, with their names."""
    for place in dict.fromkeys(folder.resolve() for folder in candidates(_CHECKPOINTS)):
        for path in sorted([*place.glob("*"), *place.glob("*/*")]):
            of_diffusers = (path / "model_index.json").is_file()
            if of_diffusers or (path.name.endswith(MODEL_ENDINGS) and path.is_file()):
                yield model_name(path), path


def _config(stem: str) -> Path | None:
    """Returns the published config of this name."""
    own = [path for folder in candidates("configs")[1:] for path in sorted(folder.rglob("*.yaml"))]
    return next((path for path in own if path.stem == stem), None)


def _check_parts(recipe: Recipe, given: Mapping[str, object], located: Located) -> None:
    """Checks the replacements of parts of the checkpoint, whose paths only the user knows."""
    for option, key in (("vae", "VAE"), ("text_encoder", "Text encoder"), ("upscaler", "Upscaler")):
        name, digest = recipe.extras.get(key, ""), recipe.extras.get(f"{key} hash", "")
        path = given.get(option)
        if name and path is None:
            located.missing.append(
                f"it was made with the {key} {printable(name)[:100]}; give it with --{option}"
            )
        elif digest and isinstance(path, str) and not _agrees(Path(path), digest, _part_hash(option)):
            located.notes.append(
                f"--{option} {printable(path)} has another hash than the {key} it was made with"
            )


def _part_hash(option: str) -> Callable[[Path], str]:
    def hash_of(path: Path) -> str:
        from ldm.checkpoints.hashing import files_sha256
        from ldm.checkpoints.model_files import model_files

        if option == "upscaler":
            return files_sha256([path])
        return files_sha256(model_files(path, "vae" if option == "vae" else "text_encoder"))

    return hash_of


# --- additions to the model ----------------------------------------------------------------------------------------


def _locate_loras(recipe: Recipe, given: Mapping[str, object], located: Located) -> None:
    if not recipe.job.loras or "lora" in given:
        return
    from ldm.checkpoints.adapters.lora_files import lora_hash
    from ldm.checkpoints.configs import BUNDLED_LORA
    from ldm.checkpoints.hashing import file_sha256

    files, bundled = _files_below(given.get("lora_dir")), find(BUNDLED_LORA)
    hashes = {_plain(name): digest for name, digest in _hashes(recipe.extras.get("Lora hashes", "")).items()}
    values: list[tuple[str, float, float]] = []
    for name, weight, on_text in recipe.job.loras:
        digest = hashes.get(_plain(name), "")
        path, same = choose(name, digest, files, lora_hash, file_sha256)
        if not same and digest and _agrees(bundled, digest, lora_hash):
            path, same = bundled, True
        _say(located, "LoRA", name, path, same, "--lora_dir")
        values.append((name if path is None else str(path), weight, on_text))
    located.changes["lora"] = values


def _locate_embeddings(recipe: Recipe, given: Mapping[str, object], located: Located) -> None:
    hashes = _hashes(recipe.extras.get("TI hashes", ""))
    if not hashes or "embedding" in given:
        return
    from ldm.checkpoints.hashing import file_sha256

    files = _files_below(given.get("embedding_dir"), EMBEDDING_ENDINGS)
    values: list[tuple[str, str]] = []
    for name, digest in hashes.items():
        path, same = choose(name, digest, files, file_sha256)
        _say(located, "textual inversion", name, path, same, "--embedding_dir")
        values += [] if path is None else [(str(path), name)]
    located.changes["embedding"] = values


def _locate_controls(recipe: Recipe, folder: Path, given: Mapping[str, object], located: Located) -> None:
    """Finds control networks below models and the folder of the recipe's file, and hints in that folder."""
    if not recipe.job.controls or "control" in given:
        return
    from ldm.checkpoints.hashing import file_sha256
    from ldm.checkpoints.image_encoder import encoder_hash

    places = [place for name in ("models", "models/ControlNet") for place in candidates(name)]
    files = [
        (path.name, path)
        for place in (folder, *places)
        for path in sorted([*place.glob("*"), *place.glob("*/*")])
    ]
    networks = [
        (name, path) for name, path in files if path.is_dir() or name.endswith((*MODEL_ENDINGS, ".pth"))
    ]
    networks += [(path.stem, path) for _, path in networks]
    hashes = {
        key: {
            _plain(name): digest for name, digest in _hashes(recipe.extras.get(f"{key} hashes", "")).items()
        }
        for key in ("Control", "Hint", "Image encoder")
    }
    values = []
    for file, image, *rest in recipe.job.controls:
        path, same = choose(file, hashes["Control"].get(_plain(file), ""), networks, _checkpoint_hash)
        hint, same_hint = choose(image, hashes["Hint"].get(_plain(image), ""), files, file_sha256)
        for found, name, what in ((path, file, "ControlNet"), (hint, image, "hint")):
            if found is None:
                located.missing.append(
                    f"it needs the {what} {printable(name or 'of unknown name')[:100]}; give both with --control"
                )
        _note_hashes(located, (("ControlNet", path, same), ("hint", hint, same_hint)))
        encoder = hashes["Image encoder"].get(_plain(file), "")
        if path is not None and encoder and not _agrees(path, encoder, encoder_hash):
            located.notes.append(
                f"the image encoder for {printable(path)} is another one than that which it was made with"
            )
        values.append((str(path), str(hint), *rest))
    located.changes["control"] = values


def _note_hashes(located: Located, found: Iterable[tuple[str, Path | None, bool]]) -> None:
    located.notes += [
        f"{printable(path)} has another hash than the {what} it was made with"
        for what, path, same in found
        if path is not None and not same
    ]


def _say(located: Located, what: str, name: str, path: Path | None, same: bool, option: str) -> None:
    if path is None:
        located.missing.append(f"it needs the {what} {printable(name)[:100]}; give its folder with {option}")
    elif not same:
        located.notes.append(f"{printable(path)} has another hash than the {what} it was made with")


def _files_below(folder: object, endings: tuple[str, ...] = MODEL_ENDINGS) -> list[tuple[str, Path]]:
    if not isinstance(folder, str):
        return []
    files = files_below(folder, "the folder")
    return [(path.stem, path) for path in files if path.name.endswith(endings)]


def _hashes(listed: str) -> dict[str, str]:
    """Parses `name: hash, name: hash`; a hash that is missing, or too short to identify a file, is empty."""
    table: dict[str, str] = {}
    for part in listed.split(", "):
        name, _, digest = part.rpartition(":") if ":" in part else (part, "", "")
        if name.strip():
            digest = digest.strip().lower()
            table[name.strip()] = digest if _HASH.fullmatch(digest) else ""
    return table


def _plain(name: str) -> str:
    """Normalises a name for comparison: without the characters that lists of hashes omit, in lower case."""
    return re.sub("[:,]", "", name).lower()


# --- the image that it started from ------------------------------------------------------------------------------


def _locate_images(recipe: Recipe, folder: Path, given: Mapping[str, object], located: Located) -> None:
    init, extras = recipe.job.init, recipe.extras
    if init is None and recipe.job.strength == 1:
        return
    name = "" if init is None else init.image
    _locate_image("init_img", name, extras.get("Init image hash", ""), folder, given, located)
    if (init is not None and init.mask) or "mask" in given:
        mask = "" if init is None else init.mask
        _locate_image("mask", mask, extras.get("Mask hash", ""), folder, given, located)
        if MASK_PADDING in extras:
            region = {
                "crop_to_mask": int(extras[MASK_PADDING]),
                "W": recipe.job.width,
                "H": recipe.job.height,
            }
            located.changes |= {option: value for option, value in region.items() if option not in given}


def _locate_image(
    option: str, name: str, digest: str, folder: Path, given: Mapping[str, object], located: Located
) -> None:
    """Finds an image that the user gave, as a file or by its folder, or the recorded one near the recipe's file."""
    from ldm.checkpoints.hashing import file_sha256

    what = "mask" if option == "mask" else "image it started from"
    shown = f"--{option.replace('_', '-')}"
    place = given.get(option)
    if is_list(place):
        if len(place) != 1:
            raise InputError(f"give one image, or a folder, with {shown}, not {len(place)}")
        place = place[0]
    typed = isinstance(place, str)
    path = Path(str(place)) if typed else folder / name
    if typed and path.is_dir():
        path /= name
    same = not digest or _agrees(path, digest, file_sha256)
    if not name and not typed:
        located.missing.append(f"the {what} is not in its file; give it with {shown}")
    elif not path.is_file():
        located.missing.append(f"the {what}, {printable(path)}, does not exist; give it with {shown}")
    elif same or typed:
        located.changes[option] = [str(path)] if option == "init_img" else str(path)
        located.notes += [] if same else [f"{printable(path)} has another hash than the {what}"]
    else:
        located.missing.append(
            f"{printable(path)} is not the {what}: its hash differs; give that with {shown}"
        )
