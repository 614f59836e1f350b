"""Damages checkpoint files at random and reads them; run as a program it does so in bounded memory.

`python -m tests.support.fuzzing FOLDER COUNT SEED` prints, as JSON, the results of COUNT files of each kind.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import pickletools
import random
import re
import resource
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.imports import imports_of
from ldm.checkpoints.formats.read import read_checkpoint
from ldm.checkpoints.layouts.recognise import kind_of
from tests.support.checkpoint_files import save_like_lightning, write_zip

TARGETS = ("zip", "pickle", "legacy", "safetensors")
STATE = {"model.a": torch.arange(6.0).reshape(2, 3).T, "model.b": torch.ones(4, dtype=torch.float16)}
SPARE_MEMORY = 2**30
Damage = Callable[[bytes, random.Random], bytes]

_ZIP_RECORD = re.compile(rb"PK[\x01\x03\x05\x06][\x02\x04\x06\x07]")
_EXTREMES = (
    0,
    1,
    2**7,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def bytes_damage(raw: bytes, rng: random.Random) -> bytes:
    """Bytes and bits changed, cut out, put in, copied."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        where = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[where] = rng.randrange(256)
        elif kind == 1:
            data[where] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[where : where + rng.randrange(1, 9)]
        elif kind == 3:
            data[where:where] = rng.randbytes(rng.randrange(1, 5))
        else:
            source = rng.randrange(len(data))
            data[where : where + 8] = data[source : source + 8]
        if not data:
            return b"\0"
    return bytes(data)


def zip_damage(raw: bytes, rng: random.Random) -> bytes:
    """Numbers in the headers and the directory at their limits, or a little off."""
    data = bytearray(raw)
    records = [match.start() for match in _ZIP_RECORD.finditer(raw)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        where = rng.choice(records) + rng.randrange(4, 46)
        length = rng.choice([2, 4, 8])
        old = int.from_bytes(data[where : where + length], "little")
        new = rng.choice([*_EXTREMES, old + 1, max(old - 1, 0), old ^ 8])
        data[where : where + length] = (new % 256**length).to_bytes(length, "little")
    return bytes(data)


def pickle_damage(raw: bytes, rng: random.Random) -> bytes:
    """Instructions of a pickle left out, repeated, exchanged, moved, or with another's argument."""
    starts = [position for _, _, position in pickletools.genops(raw) if position is not None]
    parts = [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        where, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0 and len(parts) > 1:
            del parts[where]
        elif kind == 1:
            parts.insert(other, parts[where] * rng.choice([1, 1, 100]))
        elif kind == 2:
            parts[where], parts[other] = parts[other], parts[where]
        elif kind == 3:
            parts[where] = parts[other]
        else:
            number = rng.choice(_EXTREMES).to_bytes(9, "little")
            parts[where] = rng.choice(
                [b"J" + number[:4], b"\x8a\x09" + number, b"K\x00", b"N", b")", b"}", b"Q", b"R"]
            )
    return b"".join(parts)


def legacy_damage(raw: bytes, rng: random.Random) -> bytes:
    """The same in one of the five pickles that such a file begins with."""
    stream, ends = io.BytesIO(raw), [0]
    for _ in range(5):
        collections.deque(pickletools.genops(stream), maxlen=0)
        ends.append(stream.tell())
    start, end = rng.choice(list(itertools.pairwise(ends)))
    return raw[:start] + pickle_damage(raw[start:end], rng) + raw[end:]


def safetensors_damage(raw: bytes, rng: random.Random) -> bytes:
    """Words and numbers of the header exchanged, doubled or at their limits; its length follows."""
    length = int.from_bytes(raw[:8], "little")
    tokens = re.findall(rb'"[^"]*"|[0-9]+|.', raw[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2, 4])):
        where, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        kind = rng.randrange(4)
        if kind == 0:
            tokens[where], tokens[other] = tokens[other], tokens[where]
        elif kind == 1:
            tokens[where] = tokens[other]
        elif kind == 2:
            tokens[where] *= 2
        elif numbers := [i for i, token in enumerate(tokens) if token.isdigit()]:
            tokens[rng.choice(numbers)] = str(rng.choice([*_EXTREMES, -1, 1.5])).encode()
    header = b"".join(tokens)
    size = rng.choice([len(header), len(header), length, *_EXTREMES])
    return min(size, 2**64 - 1).to_bytes(8, "little") + header + raw[8 + length :]


OWN_DAMAGE: dict[str, Damage] = {
    "zip": zip_damage,
    "pickle": pickle_damage,
    "legacy": legacy_damage,
    "safetensors": safetensors_damage,
}


def members(whole: bytes) -> dict[str, bytes]:
    """The members of a torch zip by their names below the top folder."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def read_damaged(folder: Path, target: str, count: int, seed: int) -> dict[str, float]:
    """Reads `count` files with damage; raises unless each gives finite tensors or one line."""
    path = folder / "damaged.ckpt"
    if target == "safetensors":
        raw = safetensors.torch.save(
            {key: tensor.contiguous() for key, tensor in STATE.items()}, {"note": "x"}
        )
    else:
        save_like_lightning(path, STATE, _use_new_zipfile_serialization=target != "legacy")
        raw = path.read_bytes()
    records = members(raw) if target == "pickle" else {}
    raw = records.pop("data.pkl", raw)
    rng = random.Random(f"{target} {seed}")
    outcomes: dict[str, float] = {"read": 0, "refused": 0, "slowest": 0.0}
    for _ in range(count):
        damaged = rng.choice([bytes_damage, OWN_DAMAGE[target]])(raw, rng)
        path.unlink(missing_ok=True)  # on many disks faster than to write over it
        if target == "pickle":
            write_zip(path, damaged, records)
        else:
            path.write_bytes(damaged)
        start = time.monotonic()
        outcomes[_outcome(path, mmap=rng.random() < 0.5)] += 1
        outcomes["slowest"] = max(outcomes["slowest"], time.monotonic() - start)
    return outcomes


def _outcome(path: Path, mmap: bool) -> str:
    with path.open("rb") as file:
        assert all(isinstance(name, str) for name in imports_of(file))
    try:
        state_dict = read_checkpoint(path, mmap=mmap).state_dict
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return "refused"
    kind_of(state_dict)
    for tensor in state_dict.values():
        assert tensor.numel() < 10_000 and tensor.double().sum().numel() == 1
    return "read"


def main(folder: Path, count: int, seed: int) -> None:
    warnings.simplefilter("ignore")  # a damaged text may have an invalid escape sequence
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, used + SPARE_MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report: dict[str, object] = {target: read_damaged(folder, target, count, seed) for target in TARGETS}
    report["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
