"""Textual inversion: files that give a word of the user's own its token vectors (Gal et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats.detect import CheckpointError, open_regular, reading
from ldm.checkpoints.formats.embedding_image import holds_embedding, is_png
from ldm.checkpoints.formats.read import read_tree
from ldm.checkpoints.formats.tensor_bytes import Tree
from ldm.files import files_below
from ldm.job import EMBEDDING_ENDINGS
from ldm.modules.encoders.modules import AbstractEncoder, FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import clean
from ldm.util import InputError, printable

logger = logging.getLogger(__name__)

_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}
_SDXL_WIDTHS = {768, 1280}  # of its two text encoders
_FOR_SDXL = "is an embedding for SDXL, and this toolkit runs Stable Diffusion v1"
_NO_NAMES = ("*", "emb_params", "clip_l")  # placeholders that programs write instead of a name


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding in a file: float32 vectors [n, width], and the words that they replace.

    `name` is the file's, without its ending, or what the user called it; `others` are names inside the file.
    """

    path: Path
    name: str
    others: tuple[str, ...]
    vectors: Tensor


def read_embedding(path: str | Path, width: int, longest: int, name: str | None = None) -> Embedding:
    """The embedding of a file of any usual form, for a text encoder of `width` with room for `longest` tokens.

    With `name`, that is its only word. Files of several words, for another width, too long,
    or with NaN are a `CheckpointError`.
    """
    path = Path(path)
    found, names = _find(read_tree(path), path)
    if width not in {tensor.shape[-1] for tensor in found}:
        other = next((tensor.shape[-1] for tensor in found), 0)
        meant = f": it is for {_WIDTHS[other]}" if other in _WIDTHS else ""
        raise _error(path, f"{width} numbers a vector are needed, the file has {other}{meant}")
    vectors = torch.cat([tensor.float() for tensor in found if tensor.shape[-1] == width])
    if not 1 <= len(vectors) <= longest:
        raise _error(path, f"has {len(vectors)} vectors; a prompt has room for {longest}")
    if not torch.isfinite(vectors).all():
        raise _error(path, "holds NaN or infinity; the file is damaged")
    return Embedding(path, name or path.stem, () if name else tuple(names), vectors)


def _find(tree: Tree, path: Path) -> tuple[list[Tensor], list[str]]:
    """The vectors in a file, each tensor [n, width], and the names next to them."""
    if isinstance(tree, list):
        parts = [_find(entry, path) for entry in tree]
        if {tensor.shape[-1] for tensors, _ in parts for tensor in tensors} == _SDXL_WIDTHS:
            raise _error(path, _FOR_SDXL)
        return [t for tensors, _ in parts for t in tensors], [name for _, names in parts for name in names]
    if not isinstance(tree, dict):
        raise _error(path, "is not an embedding: it holds neither names nor vectors")
    inner = tree.get("string_to_param")
    terms = _vectors(inner if isinstance(inner, dict) else tree)
    if _is_for_sdxl(tree, terms):
        raise _error(path, _FOR_SDXL)
    if len(terms) != 1:
        listed = ", ".join(printable(str(term)[:60]) for term in list(terms)[:5]) or "none"
        raise _error(path, f"must hold the vectors of one word; found {len(terms)}: {listed}")
    own = tree.get("name") if isinstance(inner, dict) else None
    names = [str(name) for name in (own, *terms) if name is not None and name not in _NO_NAMES]
    return list(terms.values()), names


def _is_for_sdxl(tree: Mapping[Any, Tree], terms: Mapping[Any, Tensor]) -> bool:
    """Whether there are vectors for the second text encoder of SDXL, by its name or by their widths."""
    named = any("clip_g" in entry for entry in (tree, *tree.values()) if isinstance(entry, dict))
    return named or {vectors.shape[-1] for vectors in terms.values()} == _SDXL_WIDTHS


def _vectors(entries: Mapping[Any, Tree]) -> dict[Any, Tensor]:
    """The entries that are vectors, each as [n, width]."""
    return {
        term: value[None] if value.dim() == 1 else value
        for term, value in entries.items()
        if isinstance(value, Tensor) and value.dim() in (1, 2) and value.is_floating_point()
    }


class Embeddings:
    """The words of the user's own that an encoder has learned from `files` (a path and a name, or None), and from
    every embedding of a fitting width below `folder`.

    A word is a name with or without angle brackets, in lower case. Names inside files count where no file
    has that name, and only one file has it inside.
    """

    def __init__(
        self,
        encoder: AbstractEncoder,
        files: Sequence[tuple[str | Path, str | None]] = (),
        folder: str | Path | None = None,
    ):
        if not isinstance(encoder, FrozenCLIPEmbedder):
            raise InputError("this model's text encoder takes no embeddings; they are for CLIP")
        self._encoder = encoder
        size = encoder.width, encoder.max_length - 2
        given = [read_embedding(path, *size, name) for path, name in files]
        self._by_word = _words([*given, *_read_folder(folder, *size)])
        encoder.use_embeddings({word: embedding.vectors for word, embedding in self._by_word.items()})

    def used_in(self, *prompts: str) -> list[Embedding]:
        """Those that the prompts use, each once."""
        words = (word for prompt in prompts for word in self._encoder.reader.placeholders_in(prompt))
        return list({self._by_word[word].path: self._by_word[word] for word in words}.values())


def _read_folder(folder: str | Path | None, width: int, longest: int) -> list[Embedding]:
    """The embeddings below a folder; a file that cannot be used is named and left out."""
    if folder is None:
        return []
    found: list[Embedding] = []
    for path in files_below(folder, "the embedding folder"):
        if path.name.endswith(EMBEDDING_ENDINGS):
            try:
                if not _is_other_image(path):
                    found.append(read_embedding(path, width, longest))
            except CheckpointError as error:
                logger.warning("left out: %s", error)
    return found


def _is_other_image(path: Path) -> bool:
    """Whether a file is a PNG image without an embedding, such as a preview of one."""
    with reading(path), open_regular(path) as file:
        return is_png(file) and not holds_embedding(file)


def _words(embeddings: Iterable[Embedding]) -> dict[str, Embedding]:
    """Each word with its embedding; InputError for two files of one name."""
    by_name: dict[str, Embedding] = {}
    by_other: dict[str, set[Path]] = {}
    embeddings = list(embeddings)
    for embedding in embeddings:
        word = _bare(embedding.name)
        if not word:
            raise InputError(f"{printable(embedding.path)}: {printable(embedding.name)!r} cannot be a word")
        first = by_name.setdefault(word, embedding)
        if first.path.absolute() != embedding.path.absolute():
            raise InputError(
                f"two embeddings are called {printable(word)}: {printable(first.path)} and "
                f"{printable(embedding.path)}; rename one, or give one as --embedding FILE=NAME"
            )
        for other in filter(None, map(_bare, embedding.others)):
            by_other.setdefault(other, set()).add(embedding.path)
    for embedding in embeddings:
        for other in map(_bare, embedding.others):
            if len(by_other.get(other, ())) == 1:
                by_name.setdefault(other, embedding)
    return {form: e for word, e in by_name.items() for form in (word, f"<{word}>")}


def _bare(name: str) -> str:
    """A name as the tokenizer meets it, without angle brackets."""
    return clean(name).removeprefix("<").removesuffix(">").strip()


def _error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{printable(path)}: {reason}")
