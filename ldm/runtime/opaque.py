"""Packed weights as bytes, and packed weights of bytes: what oneDNN has laid out once can be kept in a file.

torch hides the memory of a packed tensor, but gives its address, its size and a description of its layout
(`torch.ops.mkldnn`), and makes such a tensor of a description and an address for the code that its compiler
generates, through the C functions of `torch/csrc/inductor/aoti_torch/c/shim.h`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.json_value import Json, as_list, as_object
from ldm.runtime import int8, kernels
from ldm.runtime.int8 import Packed
from ldm.runtime.native import ISA_LIMITS, has_bf16

_LIBRARY = "libtorch_cpu.so"


def machine() -> list[Any]:
    """Identifies what the layout of packed weights depends on: torch, the CPU's instructions, threads."""
    vector = torch.backends.cpu.get_cpu_capability()
    limits = [os.environ.get(name) for name in ISA_LIMITS]
    return [
        torch.__version__,
        vector,
        has_bf16(),
        kernels.has_matrix_units(),
        int8.unsupported(),
        limits,
        torch.get_num_threads(),
    ]


# --- to bytes ---------------------------------------------------------------------------------------------------


def to_bytes(made: Any) -> tuple[Json, list[Tensor]]:
    """Describes a packed weight, of float or 8-bit kernels, or a list of them: as JSON, and as plain tensors.

    Tensors of packed memory are views on it, of uint8; they are valid as long as `made` is.
    """
    tensors: list[Tensor] = []
    return _described(made, tensors), tensors


def _described(made: Any, tensors: list[Tensor]) -> Json:
    if isinstance(made, Packed):
        weight = as_object(_described(made.weight, tensors))
        tensors += [made.scale, made.sum]
        return {**weight, "scale": len(tensors) - 2, "sum": len(tensors) - 1, "results": _name(made.dtype)}
    if not isinstance(made, Tensor):
        return [_described(each, tensors) for each in made]
    mkldnn = torch.ops.mkldnn
    length = int(mkldnn._nbytes(made))
    view = (ctypes.c_uint8 * length).from_address(int(mkldnn.data_ptr(made)))
    layout = bytes(mkldnn._get_mkldnn_serialized_md(made).numpy())
    tensors.append(torch.frombuffer(view, dtype=torch.uint8))
    return {
        "bytes": len(tensors) - 1,
        "layout": layout.hex(),
        "shape": list(made.shape),
        "dtype": _name(made.dtype),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- and back ---------------------------------------------------------------------------------------------------


def of_bytes(described: Json, tensors: Sequence[Tensor]) -> Any:
    """Makes the packed weight that `to_bytes` has described; its memory is that of `tensors`.

    Raises AttributeError, KeyError, IndexError, TypeError, ValueError or RuntimeError if the description is not one.
    """
    if isinstance(described, list):
        return [of_bytes(each, tensors) for each in as_list(described)]
    entry: dict[str, Any] = as_object(described)
    dtype, layout = getattr(torch, entry["dtype"]), bytes.fromhex(entry["layout"])
    held: dict[str, Tensor] = {
        part: tensors[entry[part]] for part in ("bytes", "scale", "sum") if part in entry
    }
    weight = _tensor(held["bytes"], entry["shape"], dtype, layout)
    if "scale" not in held:
        return weight
    return Packed(weight, held["scale"], held["sum"], getattr(torch, entry["results"]))


def _tensor(data: Tensor, shape: Sequence[int], dtype: torch.dtype, layout: bytes) -> Tensor:
    made, functions = ctypes.c_void_p(), _functions()
    sides, description = (ctypes.c_int64 * len(shape))(*shape), (ctypes.c_uint8 * len(layout))(*layout)
    strides = (ctypes.c_int64 * len(shape))()  # it has none of its own
    fault = functions["aoti_torch_create_tensor_from_blob_v2"](
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_int64(len(shape)),
        sides,
        strides,
        ctypes.c_int64(0),
        ctypes.c_int32(functions[f"aoti_torch_dtype_{_name(dtype)}"]()),
        ctypes.c_int32(functions["aoti_torch_device_type_cpu"]()),
        ctypes.c_int32(0),
        ctypes.byref(made),
        ctypes.c_int32(functions["aoti_torch_layout__mkldnn"]()),
        description,
        ctypes.c_int64(len(layout)),
    )
    if fault or made.value is None:
        raise ValueError("torch cannot make a packed weight of this description")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    steal = cast(Any, torch._C._aoti).alloc_tensor_by_stealing_from_void_ptr  # pyright: ignore
    tensor: Tensor = steal(capsule(made.value, None, None))
    if torch.ops.mkldnn._nbytes(tensor) != data.nbytes:
        raise ValueError("a packed weight has other bytes than its layout needs")
    setattr(tensor, "memory", data)  # noqa: B010 - it lives as long as the tensor does
    return tensor


@cache
def _functions() -> Mapping[str, Callable[..., int]]:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY))
    names = (
        "create_tensor_from_blob_v2",
        "layout__mkldnn",
        "device_type_cpu",
        *map("dtype_{}".format, _DTYPES),
    )
    return {f"aoti_torch_{name}": getattr(library, f"aoti_torch_{name}") for name in names}


_DTYPES = ("bfloat16", "float32", "int8")


@cache
def works() -> bool:
    """Returns whether this build of torch makes packed weights of bytes; a product with one is compared."""
    try:
        weight = torch.arange(32.0 * 32).view(32, 32) / 1024
        packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, None)
        described, tensors = to_bytes(packed)
        again = of_bytes(described, [tensor.clone() for tensor in tensors])
        products = [
            torch.ops.mkldnn._linear_pointwise.default(weight, each, None, "none", [], "none")
            for each in (packed, again)
        ]
        return torch.equal(*products)
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError):
        return False
