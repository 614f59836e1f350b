"""Everything that the images of a run depend on, by name, and how two such descriptions differ."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.job import Job
from ldm.models.diffusion.passes import eta_of
from ldm.util import is_mapping, printable

if TYPE_CHECKING:
    pass


logger = logging.getLogger("ldm")
_DIGEST = re.compile(", digest [0-9a-f]{16}$")  # of values that differ among the jobs
_DIGEST_LENGTH = 8  # hex digits of a prompt's SHA-256: only to find which of them changed
Content = dict[str, Any]


def describe(jobs: Sequence[Job], batches: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> Content:
    """Describes everything that a run's pixels depend on, by name, as JSON values.

    A field of the jobs has its value if all agree, else the first one and a digest of all. `settings` are the values
    that jobs do not hold. The jobs are read once, in order.
    """
    values = {field.name: _Values() for field in fields(Job)}
    digests: list[str] = []
    for job in jobs:
        for name, seen in values.items():
            seen.add(eta_of(job) if name == "eta" else getattr(job, name))
        digests.append(_sha256(job.prompt)[:_DIGEST_LENGTH])
    made = {name: seen.summary() for name, seen in values.items()}
    made |= {"prompts": "".join(digests), "batches": _sha256(repr([list(batch) for batch in batches]))[:16]}
    return json.loads(json.dumps({**made, **settings}))


class _Values:
    """The values of one field of all jobs."""

    def __init__(self) -> None:
        self._changes, self._count, self._sha = 0, 0, hashlib.sha256()
        self._first: Any = None
        self._last: Any = None

    def add(self, value: Any) -> None:
        if self._count == 0:
            self._first = value
        if self._count == 0 or value != self._last:
            self._changes += 1
            self._sha.update(f"{self._count}:{value!r};".encode("utf-8", "surrogatepass"))
            self._last = value
        self._count += 1

    def summary(self) -> Any:
        if self._changes > 1:
            first = self._first if isinstance(self._first, int | float) else printable(self._first)[:40]
            return f"{first} and others, digest {self._sha.hexdigest()[:16]}"
        return (
            asdict(self._last)
            if is_dataclass(self._last) and not isinstance(self._last, type)
            else self._last
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str]:
    """Returns what else the last bits and the files' bytes depend on: libraries, processor, threads."""
    import numpy
    import PIL
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "ldm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        **gpu,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the differences of two descriptions: name, old value and new value of each. Controls are escaped."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after or (name == "prompt" and "prompts" in old):
            continue
        if name == "prompts" and isinstance(before, str) and isinstance(after, str):
            found.append(_prompt_difference(before, after))
        elif is_mapping(before) and is_mapping(after):
            found += [f"{_shown(name, 200)}.{line}" for line in differences(before, after)]
        else:
            shown, now = _shown(before), _shown(after)
            if _DIGEST.sub("", shown) != _DIGEST.sub("", now):
                shown, now = _DIGEST.sub("", shown), _DIGEST.sub("", now)
            found.append(f"{_shown(name, 200)} ({shown} there, {now} now)")
    return found


def _prompt_difference(before: str, after: str) -> str:
    # lists of prompts can differ in length; that is reported if no line differs
    pairs = zip(*(re.findall(f".{{{_DIGEST_LENGTH}}}", text) for text in (before, after)), strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if number is None:
        count, now = len(before) // _DIGEST_LENGTH, len(after) // _DIGEST_LENGTH
        return f"prompts ({count} there, {now} now)"
    return f"the prompt of image {number + 1} (line {number + 1} of a file that is used once)"


def _shown(value: Any, longest: int = 60) -> str:
    text = "nothing" if value is None else value if value and isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= longest else f"{text[: longest - 3]}...")


def digest_of(value: object) -> object:
    """Returns the digest of several values, which versions word differently; else the value itself."""
    found = _DIGEST.search(value) if isinstance(value, str) else None
    return found[0] if found else value
