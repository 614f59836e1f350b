"""The findings of an inspection as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.checkpoints.inspect import Inspection

_SHOWN = 5  # names in a row


def amount(size: int) -> str:
    """A number of bytes for people: "4.27 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    power = min((len(str(size)) - 1) // 3, len(units) - 1)
    return f"{size / 1000**power:.3g} {units[power]}"


def lines(found: Inspection) -> Iterator[str]:
    """A report of one file, line by line."""
    yield found.path
    rows = [*_what(found), *_weights(found), *_safety(found), *found.hashes.items()]
    # the word in front keeps a file from adding rows of its own to the report
    rows += [(f"metadata {key}", value) for key, value in found.metadata.items() if key != "global_step"]
    yield from (f"  {name:<16} {value}" for name, value in rows)


def _what(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "kind", "not known: it was not read" if found.refused else found.kind.name
    yield "format", f"{found.format or 'unknown'}, {found.size:,} bytes"
    if found.refused:
        yield "refused", found.refused
    if found.published:
        yield "published as", found.published


def _weights(found: Inspection) -> Iterator[tuple[str, str]]:
    if not found.tensors:
        return
    yield "weights", f"{sum(found.parameters.values()):,} in {found.tensors:,} tensors"
    yield from ((f"  {part}", f"{count:,}") for part, count in found.parameters.items())
    yield "precision", ", ".join(f"{name} ({count:,})" for name, count in found.precisions.items())
    only = ", and no others of the U-Net: they are used" if found.only_ema else ""
    yield "EMA weights", f"yes{only}" if found.ema else "no"
    if found.global_step is not None:
        yield "training steps", f"{found.global_step:,}"
    if found.prediction:
        yield "predicts", f"not the noise: {found.prediction}"
    yield from (("variant", variant) for variant in found.variants if variant != found.prediction)
    if found.made_for:
        yield "made for", found.made_for
    if found.fits is not None:
        yield "loads", "yes" if found.fits else f"no: {found.problem}"
    if found.unexpected:
        yield "unexpected keys", f"{len(found.unexpected)}: {_some(found.unexpected)}"


def _safety(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.checked:
        yield "damage", f"{len(found.damaged)}: {_some(found.damaged)}" if found.damaged else "none found"
    if found.noted_hash_fits is not None:
        differs = "not that of the weights: they were damaged, or changed by a tool that kept it"
        yield "noted SHA-256", "that of the weights" if found.noted_hash_fits else differs
    if found.imports:
        others = (
            f", {len(found.foreign)} of them not allowed: {_some(found.foreign)}" if found.foreign else ""
        )
        yield "asks to import", f"{len(found.imports)} names{others or ', all known'}; none was imported"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
