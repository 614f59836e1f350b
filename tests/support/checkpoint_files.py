"""Checkpoint files for the tests: honest ones as training runs left them, and pickles written by hand."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2

from tests.support.paths import GOLDEN

LIGHTNING_CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def tiny_state_dict(seed: int = 0) -> collections.OrderedDict[str, torch.Tensor]:
    """Every key of a v1 model, with tensors of at most 3 elements a side, and a module's `_metadata`."""
    generator = torch.Generator().manual_seed(seed)
    keys = json.loads((GOLDEN / "tiny_keys.json").read_text())
    state = collections.OrderedDict(
        (key, torch.randn([min(n, 3) for n in shape], generator=generator)) for key, shape in keys.items()
    )
    vars(state)["_metadata"] = collections.OrderedDict({"": {"version": 1}})
    return state


def save_like_lightning(path: Path, state_dict: dict[str, Any], **options: Any) -> None:
    """A file as old Lightning runs wrote it: callbacks keyed by class, numpy scalars, optimizer state."""
    names = LIGHTNING_CLASS.split(".")
    modules = {".".join(names[:n]): types.ModuleType(".".join(names[:n])) for n in range(1, len(names))}
    callback = type(names[-1], (), {"__module__": ".".join(names[:-1])})
    setattr(modules[callback.__module__], names[-1], callback)
    with mock.patch.dict(sys.modules, modules):
        torch.save(
            {
                "epoch": 3,
                "global_step": 470000,
                "pytorch-lightning_version": "1.4.2",
                "state_dict": state_dict,
                "callbacks": {
                    callback: {"best_model_score": torch.tensor(0.25), "best_model_path": "x.ckpt"}
                },
                "optimizer_states": [
                    {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
                ],
                "lr_schedulers": [{"base_lrs": [np.float64(1e-4)], "last": np.arange(3), "seen": {1, 2}}],
            },
            path,
            **options,
        )


class StorageId:
    """Becomes a torch persistent id when `described` pickles it."""

    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class Tensor:
    """Becomes a call of torch's tensor rebuilder with whatever numbers the test wants."""

    def __init__(self, size: Any, stride: Any, offset: Any = 0, count: Any = 4, key: Any = "0") -> None:
        storage = StorageId("storage", torch.FloatStorage, key, "cpu", count)
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self) -> Any:
        return _rebuild_tensor_v2, self.arguments


def described(value: Any, protocol: int = 2) -> bytes:
    """Pickles `value`, with `Tensor` objects as tensors."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, StorageId) else None

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def write_zip(path: Path, data: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch zip around a pickle; `records` are named below the top folder, four float32 by default."""
    records = {"data/0": np.arange(4, dtype="<f4").tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def named(module: str, name: str) -> bytes:
    """The pickle instruction that asks for `module.name`."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """The pickle instruction that pushes a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Pickle instructions that call `module.name` with arguments that are instructions too."""
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def safetensors_bytes(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file around a header, with any `length` written before it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data
